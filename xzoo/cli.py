"""The command line: parses and prints. Everything that it does can be called from Python.

Exit codes: 0; 2 for a mistake of the user's or a fault of the machine, told in one line; 1 for a
bug in xzoo, with its traceback; 130 after Ctrl-C, 143 after SIGTERM. Commands are imported when
they are run, so that few wait for Lightning.
"""

import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import files, machine
from .errors import XzooError
from .names import shown
from .options import explain, nearest

# What each command does, and an example of it.
COMMANDS = {
    "list": ("the models, with weights and multiply-accumulates", "xzoo list 'x_resnet*'"),
    "inspect": (
        "a model layer by layer, and its graphs against the theory",
        "xzoo inspect x_vgg16_c8 --pictures out",
    ),
    "finetune": (
        "train a model on your images",
        "xzoo finetune photos --model x_resnet50 --minutes 30",
    ),
    "fit": ("train by a recipe", "xzoo fit cifar10/x_vgg16_2+air --data.root DATA --out runs/vgg"),
    "validate": (
        "evaluate a run's weights on its validation images",
        "xzoo validate RECIPE --out runs/vgg",
    ),
    "test": (
        "evaluate a run's weights on the data set's test part",
        "xzoo test RECIPE --ckpt_path FILE",
    ),
    "predict": (
        "write the predicted class of each test image",
        "xzoo predict RECIPE --out runs/vgg",
    ),
    "queue": (
        "run what is left of a list of runs, or show its state",
        "xzoo queue recipes/QUEUE.md --list",
    ),
    "recipes": (
        "list the recipes with their counts, or copy one to change it",
        "xzoo recipes 'cifar10/*+air'",
    ),
    "export": (
        "write a run's model as a folder to publish",
        "xzoo export runs/vgg hub_cards/x_vgg16_2.cifar10_q75",
    ),
    "card": (
        "rewrite the cards of exported folders",
        "xzoo card hub_cards/x_vgg16_2.cifar10_q75",
    ),
    "publish": (
        "send an exported folder or a run to the Hub",
        "xzoo publish runs/photos --repo me/my-flowers",
    ),
    "compare": (
        "draw results beside the paper's",
        "xzoo compare recipes/results.csv --out figures",
    ),
    "classify": (
        "classify images",
        "xzoo classify runs/photos-x_resnet50 holiday/*.jpg",
    ),
    "doctor": (
        "what computes here: CPU, backends, our kernels, and why not better ones",
        "xzoo doctor",
    ),
    "bench": (
        "measure layers, models and the training loop",
        "xzoo bench --models x_vgg16_c8 --csv bench.csv",
    ),
}
# Those whose options are a recipe's, and Lightning's to parse.
LIGHTNING = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; nothing is raised but SystemExit by a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise XzooError(f"unknown command {command!r}; {nearest(command, COMMANDS)}")
        _check_folder()
        _check_backend()
        _run(command, rest)
        if sys.stdout is not None:
            # what cannot be written is told here, and not by the interpreter's end
            sys.stdout.flush()
    except XzooError as error:
        print(f"xzoo: error: {shown(_one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "; the same command resumes" if command in ("finetune", "fit", "queue") else ""
        print(f"xzoo: interrupted{resumes}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output had enough, as `head` does
        sys.stdout = None  # or the interpreter complains when it flushes
        return 0
    except SystemExit as stop:  # --help, SIGTERM
        return int(stop.code or 0)
    except Exception as error:
        fault = _fault(error)
        if fault is None:
            traceback.print_exc()
            print(
                "xzoo: this is a bug in xzoo; please report it with the lines above",
                file=sys.stderr,
            )
            return 1
        print(f"xzoo: error: {shown(fault)}", file=sys.stderr)
        with suppress(OSError, ValueError):
            if sys.stdout is not None:
                sys.stdout.flush()
            return 2
        sys.stdout = None  # it takes nothing any more, and the interpreter would complain of it
        return 2
    return 0


def _run(command: str, arguments: Sequence[str]) -> None:
    if command in LIGHTNING:
        _load_package()
        _lightning(command, arguments)
        return
    parser = ArgumentParser(
        prog=f"xzoo {command}",
        description=COMMANDS[command][0],
        epilog=f"example: {COMMANDS[command][1]}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    run = globals()[f"_{command}"](parser)
    args = _parse(parser, arguments)
    _load_package()
    run(args)


def _load_package() -> None:
    """Give the package its public names, as importing it does in any other program.

    A class that a recipe names may use them. Its functions `profile` and `deploy` have the names of
    modules, so they are set even where those modules were imported before.
    """
    from . import public

    package = vars(import_module("xzoo"))
    for name in public.__all__:
        package[name] = getattr(public, name)


def _check_folder() -> None:
    """Raise XzooError where the current folder has been removed: torch's libraries cannot even be
    loaded there.
    """
    try:
        os.getcwd()
    except OSError:
        raise XzooError(
            "the folder that xzoo was started in is gone; change to another one"
        ) from None


def _check_backend() -> None:
    """Raise XzooError for an XZOO_BACKEND that does not exist, before the first layer would."""
    name = os.environ.get("XZOO_BACKEND")
    if name is None:
        return
    from . import ops

    try:
        with ops.backend(name):
            pass
    except XzooError as error:
        raise XzooError(f"XZOO_BACKEND={name}: {error}; unset it, or set one of them") from None


# What torch and its loaders say when the machine fails, and what to do about it.
_FAULTS = {
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|bad_alloc|Unable to allocate": (
        "there is not enough memory ({}); a smaller batch (--batch-size) or image (--img-size) "
        "needs less"
    ),
    r"DataLoader worker .*(killed|exited)|shared memory|shm_open|ancdata": (
        "a process that loads images was ended by the system ({}); use fewer --workers, or 0"
    ),
    r"can't start new thread": (
        "no more threads can be started here ({}); close other programs, or raise ulimit -u"
    ),
    r"Too many open files": "too many files are open ({}); raise ulimit -n",
    r"CUDA|cuDNN|cuBLAS|NVIDIA|MPS backend": "the GPU cannot be used ({}); try --device cpu",
    r"[Nn]o space left on device": "the disk is full ({})",
}


def _fault(error: Exception) -> str | None:
    """What a user's machine has done to us, in one line; None for a bug in xzoo."""
    text = _one_line(error) or type(error).__name__
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package == "xzoo":
            return None
        return (
            f"{package or 'a package'} cannot be imported ({text}); install xzoo and what it "
            "needs again"
        )
    if isinstance(error, MemoryError | OSError | RuntimeError):
        for pattern, told in _FAULTS.items():
            if re.search(pattern, text):
                return told.format(text)
    if isinstance(error, MemoryError):
        return next(iter(_FAULTS.values())).format(text)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {files.reason(error)}" if error.filename else files.reason(error)
    if isinstance(error, OSError):
        return text
    if isinstance(error, UnicodeError):
        return f"text that cannot be read or shown in this encoding ({text}); set PYTHONUTF8=1"
    return None


def _one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:  # raised by a loader's worker: torch hands it on with all that
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


def _overview() -> str:
    lines = ["usage: xzoo COMMAND ...   (xzoo COMMAND --help shows its options)", ""]
    for name, (what, example) in COMMANDS.items():
        lines += [f"  {name:<10}{what}", f"  {'':<10}{example}"]
    return "\n".join(lines)


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    # --batch-size and --batch_size are the same option.
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)  # behind it are names
    options = [
        re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in given[:end]
    ]
    try:
        return parser.parse_args([*options, *given[end:]])
    except ArgumentError as error:
        options = [
            option
            for action in parser._actions
            for option in action.option_strings
            if option[:2] == "--"
        ]
        for name in given[:end]:
            if name[0:1] == "-" and name not in options and Path(name).exists():
                raise XzooError(
                    f"{name} is taken for an option; write ./{name}, or -- before the names"
                ) from None
        raise XzooError(explain(str(error), options)) from None


# ---- commands: each adds its options and returns what runs them


def _lightning(command: str, arguments: Sequence[str]) -> None:
    from .train import evaluate, fit

    if {"-h", "--help"} & set(arguments):  # the parser's own goes on for a hundred options
        print(f"{COMMANDS[command][0]}\nexample: {COMMANDS[command][1]}\n")
    if command == "fit":
        machine.keep_memory()
        fit.fit(arguments)
    elif command == "predict":
        evaluate.predict(arguments)
    else:
        evaluate.evaluate(command, arguments)


def _list(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument("filter", nargs="?", default="*", help="a pattern, such as 'x_resnet*'")

    def run(args: Namespace) -> None:
        import torch

        from .models import create_model, list_models
        from .profile import profile

        names = list_models(args.filter)
        if not names:
            raise XzooError(
                f"no model is called {args.filter}; {nearest(args.filter, list_models())}"
            )
        console, table = _console(), _table("model", "pixels", "weights", "MACs")
        for name in names:
            with torch.device("meta"):  # counting needs no weights
                model: Any = create_model(name)
            counts, size = profile(model), model.pretrained_cfg["input_size"]
            table.add_row(
                name, str(size[-1]), f"{counts.weights / 1e6:.2f} M", f"{counts.macs / 1e6:,.0f} M"
            )
        console.print(table)

    return run


def _finetune(parser: ArgumentParser) -> Callable[[Namespace], None]:
    from .train.finetune import finetune

    what = "folder of images or parquet files, Hub data set (org/name), or digits"
    parser.add_argument("data", nargs="?", default="digits", help=what)
    parser.add_argument("--freeze", action="store_true", help="train only the last layer")
    parser.add_function_arguments(finetune, skip={"data", "freeze"}, as_group=False)

    def run(args: Namespace) -> None:
        machine.keep_memory()
        result = finetune(**args.as_dict())
        print(f"{result.top1:.2f} %\t{shown(result.run)}")

    return run


def _classify(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument("model", help="run folder, model folder, or name of a pretrained model")
    parser.add_argument("images", nargs="+", help="images, and folders of images")
    parser.add_argument(
        "--csv", type=str | None, default=None, help="write all of them to this file"
    )
    parser.add_argument("--top", type=int, default=5, help="how many classes")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")

    def run(args: Namespace) -> None:
        from .train.classify import classify, write_csv

        if args.top < 1 or args.batch_size < 1:
            raise XzooError(f"top={args.top}, batch_size={args.batch_size}: 1 or more are needed")
        if args.csv is not None:
            files.check_file(args.csv, "--csv")

        def tell(prediction: Any) -> None:
            classes = "  ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
            print(shown(f"{prediction.image}: {classes}"), flush=True)

        predictions = []
        try:
            for prediction in classify(
                args.model, args.images, args.top, args.batch_size, args.device
            ):
                predictions.append(prediction)
                if prediction.error is not None:
                    print(f"xzoo: not read: {shown(prediction.error)}", file=sys.stderr)
                elif args.csv is None:
                    tell(prediction)
        finally:  # Ctrl-C leaves what was found
            if args.csv is not None and predictions:
                try:
                    write_csv(predictions, Path(args.csv), args.top)
                except XzooError:  # the disk has become full: they are not lost
                    for prediction in predictions:
                        if prediction.error is None:
                            tell(prediction)
                    raise
                print(shown(f"{len(predictions)} images in {args.csv}"))
        if all(prediction.error is not None for prediction in predictions):
            raise XzooError(f"none of the {len(predictions)} images can be read")

    return run


def _queue(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument(
        "file", nargs="?", default=None, help="Markdown with blocks of shell; by default QUEUE.md"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="show what is done and estimate what is left; start nothing",
    )
    parser.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="runs side by side; by default 2, on one core 1",
    )
    parser.add_argument(
        "--blocks", type=str | None, default=None, help="only those of these numbers, such as 0,3"
    )

    def run(args: Namespace) -> None:
        from .train import queue, recipes

        file = args.file or recipes.folder() / queue.QUEUE
        runs = queue.read_queue(file, args.blocks.split(",") if args.blocks is not None else ())
        if not args.list:
            queue.run_queue(runs, args.jobs)
            return
        console, table = _console(), _table("block", "run", "state", "core-hours left")
        rows = queue.listed(runs)
        for entry, state, hours in rows:
            table.add_row(
                entry.block, shown(entry.out), state, "?" if math.isnan(hours) else f"{hours:,.1f}"
            )
        for column in table.columns[1:3]:
            column.justify = "left"
        console.print(table)
        finished = sum(entry.is_finished for entry in runs)
        total = sum(hours for _, _, hours in rows if not math.isnan(hours))
        console.print(
            f"{finished} of {len(runs)} runs are finished; about {total:,.1f} core-hours are left"
        )

    return run


def _recipes(parser: ArgumentParser) -> Callable[[Namespace], None]:
    what = "list, copy, or a pattern such as 'cifar10/*+air'"
    parser.add_argument("what", nargs="?", default="list", help=what)
    parser.add_argument(
        "recipe", nargs="?", default=None, help="with list, a pattern; with copy, a name or a file"
    )
    parser.add_argument("to", nargs="?", default=".", help="with copy, the folder")

    def run(args: Namespace) -> None:
        from .train import recipes

        if args.what == "copy":
            if args.recipe is None:
                raise XzooError("copy needs the name of a recipe; `xzoo recipes` lists them")
            for path in recipes.copy(args.recipe, args.to):
                print(shown(path))
        elif args.what == "list":
            _list_recipes(args.recipe or "*")
        elif "/" in args.what or "*" in args.what:
            _list_recipes(args.what)
        else:
            raise XzooError(f"recipes {args.what}: {nearest(args.what, ('list', 'copy'))}")

    return run


def _list_recipes(pattern: str) -> None:
    """A line as soon as it is counted, since all of them take a minute; of a single recipe all that
    it says.
    """
    from fnmatch import fnmatch

    from .train import queue, recipes
    from .train.parse import RecipeCLI
    from .train.run import quiet

    known = recipes.names() if "+" in pattern else recipes.plain_names()
    found = [name for name in known if fnmatch(name, pattern)]
    places = [name for name in recipes.hardware() if fnmatch(name, pattern)]
    if not found and not places:
        raise XzooError(f"no recipe is called {pattern}; {recipes.hint(pattern, recipes.names())}")
    width = max(map(len, found + places))
    if found:
        print(f"{'recipe':{width}}    px  epochs     weights        MACs  settings")
    for name in found:
        with quiet():
            cli = RecipeCLI([name])
        size, epochs = queue.size_of(cli), cli.config.trainer.max_epochs
        counts = queue.counts(cli, size)
        weights, macs = f"{counts.weights / 1e6:.2f} M", f"{counts.macs / 1e6:,.0f} M"
        more = [] if "+" in name else [f"+{part.name}" for part in recipes.settings_of(name)]
        line = f"{name:{width}}  {size:4}  {epochs:6}  {weights:>10}  {macs:>10}  {' '.join(more)}"
        print(line.rstrip(), flush=True)
    for name in places:
        print(f"{name:{width}}  {recipes.find(name).layers[0].notes.partition(chr(10))[0]}")
    if len(found) == 1:
        (layer,) = recipes.find(found[0]).layers
        print(f"\nxzoo fit {found[0]} --data.root DATA\n\n{recipes.text(layer)}", end="")


def _export(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument(
        "run", help="folder of a run of fit or finetune that is finished; for a file, any model"
    )
    parser.add_argument("to", help="the new folder; or a file that ends in .onnx or .pt2")
    parser.add_argument(
        "--half", action="store_true", help="weights in float16, if the accuracy does not move"
    )

    def run(args: Namespace) -> None:
        from .hub import export, program

        if Path(args.to).suffix in program.ENDINGS:
            from .hub.folder import load_any

            files.check_file(args.to)
            print(shown(f"{args.to}: {program.write(load_any(args.run), args.to)}"))
        else:
            print(
                shown(
                    export(
                        args.run, args.to, half=partial(_judged, args.run) if args.half else None
                    )
                )
            )

    return run


def _judged(run: str, weights: Path) -> float:
    """Top-1 accuracy, in per cent, of a file of weights on the validation images of a run of `xzoo
    fit`.
    """
    from .train.evaluate import evaluate

    figures = evaluate(
        "validate", ["--config", str(Path(run) / "config.yaml"), "--ckpt_path", str(weights)]
    )
    assert figures is not None  # this is the only process
    return round(100 * figures["val/acc1"], 4)  # as in result.json


def _card(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument(
        "folders", nargs="*", default=[], help="exported folders; by default all in hub_cards"
    )

    def run(args: Namespace) -> None:
        from .hub import card, publish

        for folder in args.folders or publish.folders():
            changed = card.write(folder)
            publish.register(Path(folder))
            print(shown(f"{folder}: {'rewritten' if changed else 'up to date'}"))

    return run


def _publish(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument(
        "folder", nargs="?", default=None, help="exported folder, or the folder of a finished run"
    )
    parser.add_argument(
        "--org", type=str | None, default=None, help="owner of the repository; xzoo's by default"
    )
    parser.add_argument(
        "--repo", type=str | None, default=None, help="the repository, as owner/name"
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry_run", action="store_true", help="show what would be sent")
    parser.add_argument("--all", action="store_true", help="every folder in hub_cards")

    def run(args: Namespace) -> None:
        from .hub import publish

        if args.all == (args.folder is not None) or (args.all and args.repo):
            raise XzooError(
                "give a folder or a run, perhaps with --repo; or --all alone, perhaps with --org"
            )
        for folder in publish.folders() if args.all else [args.folder]:
            done = publish.publish(folder, args.org, args.repo, args.private, args.dry_run)
            changed = ", ".join(done.changed) or "nothing"
            if args.dry_run:
                print(shown(f"{done.repo}: {changed} would be sent"))
                continue
            print(shown(f"{done.repo} {done.version}: {changed} sent; commit {done.commit}"))
            for name, sha in done.sha256.items():
                print(shown(f"  {sha}  {name}"))
            if done.registered:
                print("  entered in xzoo/weights.json")

    return run


def _compare(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument("results", help="table of runs, such as recipes/results.csv")
    parser.add_argument(
        "--out", type=str, default="figures", help="folder for the pictures and the table"
    )
    parser.add_argument("--datasets", type=list[str], default=[], help="only these data sets")

    def run(args: Namespace) -> None:
        from .results.compare import compare

        for path in compare(args.results, args.out, args.datasets):
            print(shown(path))

    return run


def _inspect(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parser.add_argument("model", help="name of a model, run folder, or model folder")
    parser.add_argument(
        "--pictures", type=str | None, default=None, help="draw its graphs into this folder"
    )

    def run(args: Namespace) -> None:
        from .drawing import draw_model
        from .hub.folder import load_any
        from .models import create_model
        from .profile import profile
        from .theory import runs

        if args.pictures is not None:
            files.check_folder(args.pictures, "--pictures")
        model: Any = load_any(args.model) if Path(args.model).is_dir() else create_model(args.model)
        counts, console = profile(model), _console()
        console.print(_layers_table(model, counts))
        size = " x ".join(map(str, model.pretrained_cfg["input_size"]))
        console.print(
            f"{counts.weights:,} weights, {counts.macs:,} MACs for an image of {size}",
            highlight=False,
        )
        for stretch in runs(model):
            first, last, n = stretch.names[0], stretch.names[-1], len(stretch.names)
            depth = stretch.reach.depth
            reached = (
                f"sensitivity depth {depth}"
                if depth
                else "not every output depends on every input yet"
            )
            console.print(
                f"{n} X-layers, {first} to {last}: {reached}", highlight=False, soft_wrap=True
            )
        if args.pictures is not None:
            try:
                for picture in draw_model(model, args.pictures, args.model):
                    print(shown(picture))
            except OSError as error:
                raise XzooError(
                    f"cannot draw into {args.pictures}: {files.reason(error)}"
                ) from error

    return run


def _doctor(parser: ArgumentParser) -> Callable[[Namespace], None]:
    def run(args: Namespace) -> None:
        from .doctor import doctor

        facts = doctor()
        width = max(map(len, facts)) + 2
        for name, fact in facts.items():
            print(shown(f"{name:<{width}}{fact}"))

    return run


def _bench(parser: ArgumentParser) -> Callable[[Namespace], None]:
    parts = {
        "models": "whole models, in inference and training (the default); names, or none for all",
        "layers": (
            "single layers; texts that their names contain, sizes of your own, or none for all"
        ),
        "policy": "what `auto` takes against the library's best, over 20 shapes",
        "share": "second singular value and speed by share",
        "scaling": (
            "what threads gain our kernels, against what they gain dense ones (--threads 2 or more)"
        ),
        "loop": "the training loop, augmentation, and loading of images",
    }
    for part, what in parts.items():
        several: dict[str, Any] = {"nargs": "*", "type": str, "default": None}
        parser.add_argument(
            f"--{part}",
            help=what,
            **(several if part in ("models", "layers") else {"action": "store_true"}),
        )
    parser.add_argument(
        "--finetune", type=str | None, default=None, help="images to learn with and without weights"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch's; 1 measures a thread's own time"
    )
    parser.add_argument(
        "--pairs", type=int | None, default=None, help="times that each form is measured"
    )
    parser.add_argument(
        "--batch_size", type=int | None, default=None, help="of models, and of the loop"
    )
    parser.add_argument(
        "--compile", action="store_true", help="dense models by torch.compile as well"
    )
    parser.add_argument(
        "--model", type=str | None, default=None, help="what the loop, or --finetune, trains"
    )
    parser.add_argument(
        "--minutes", type=float | None, default=None, help="of each run of --finetune; by default 2"
    )
    parser.add_argument(
        "--seeds",
        type=int | None,
        default=None,
        help="runs of each kind of --finetune; by default 3",
    )
    parser.add_argument(
        "--each",
        type=int | None,
        default=None,
        help="images per class of --finetune; by default 10",
    )
    parser.add_argument(
        "--photos", type=int | None, default=None, help="files that are drawn for the loop's loader"
    )
    parser.add_argument(
        "--csv", type=str | None, default=None, help="write the figures to this file too"
    )
    parser.add_argument(
        "--plot", type=str | None, default=None, help="draw models and layers into this file"
    )

    def run(args: Namespace) -> None:
        from . import bench

        if args.finetune is not None:
            _bench_finetuning(args)
            return
        asked = [part for part in parts if getattr(args, part) not in (None, False)] or ["models"]
        pairs = {} if args.pairs is None else {"pairs": args.pairs}
        size = {} if args.batch_size is None else {"batch_size": args.batch_size}
        loop = {
            key: value for key in ("model", "photos") if (value := getattr(args, key)) is not None
        }
        start: dict[str, Callable[[], Any]] = {
            "models": lambda: bench.models(
                args.models or (), compiled=args.compile, **pairs, **size
            ),
            "layers": lambda: bench.layers(args.layers, **pairs),
            "policy": lambda: bench.policy(**pairs),
            "share": lambda: bench.share(**pairs),
            "scaling": lambda: bench.scaling(**pairs),
            "loop": lambda: bench.loop(**loop, **pairs, **size),
        }
        if args.csv is not None:
            bench.check_file(Path(args.csv))
        if args.plot is not None:
            bench.check_file(Path(args.plot), bench.PICTURES)
        figures: list[bench.Figure] = []
        with bench.threads(args.threads):
            # all that is asked for is checked before any of it is measured
            begun = [start[part]() for part in asked]
            try:
                for part in begun:
                    for figure in part:
                        figures.append(figure)
                        if args.csv is not None:
                            bench.write_csv(figures, Path(args.csv))
            finally:  # Ctrl-C leaves what was measured
                if figures:
                    _print_figures([figure.as_row() for figure in figures], bench.machine())
        if args.plot is not None:
            bench.draw(figures, Path(args.plot))

    return run


def _bench_finetuning(args: Namespace) -> None:
    from . import bench

    if args.model is None or args.csv is None:
        raise XzooError(
            "--finetune needs --model NAME, with weights, and --csv FILE, which gets a row for "
            "each run"
        )
    given = {
        name: value
        for name in ("minutes", "seeds", "each")
        if (value := getattr(args, name)) is not None
    }
    with bench.threads(args.threads):
        for row in bench.finetuning(args.finetune, args.model, args.csv, **given):
            start = "from the weights" if row["pretrained"] == "true" else "from scratch"
            print(
                shown(
                    f"{row['train_images']} images of {row['data']}, seed {row['seed']}, {start}: "
                    f"{row['top1']} %"
                )
            )


def _print_figures(rows: Sequence[dict[str, str]], machine: dict[str, str]) -> None:
    """Columns that nothing stands in are left out."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    table = _table(*columns)
    for column in table.columns:
        if column.header in ("against", "note"):
            column.justify = "left"
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console = _console()
    console.print(table)
    console.print(f"{machine['machine']}; torch {machine['torch']}", soft_wrap=True)


def _console() -> Any:
    """As wide as the terminal; into a file or a pipe no line is folded."""
    from rich.console import Console

    # names of layers are not markup
    plain: Any = {"highlight": False, "markup": False, "emoji": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=200)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _layers_table(model: Any, counts: Any) -> Any:
    """A row a layer. Singular values are shares of the first, so that 1 is a group convolution and
    0 a dense layer; the two after the second are its bounds. "/ G" stands for a layer of G groups.
    """
    from .theory import graphs_of, spectrum

    table = _table(
        "layer",
        "in",
        "out",
        "kernel",
        "degree",
        "share",
        "second",
        "Ramanujan",
        "random",
        "weights",
        "MACs",
    )
    drawn = graphs_of(model)
    for layer in counts.layers:
        kernel = "x".join(map(str, layer.kernel)) if layer.kernel != (1, 1) else "1"
        measured = ["dense" if layer.groups == 1 else f"/ {layer.groups}", "", "", "", ""]
        if layer.name in drawn:
            found = spectrum(drawn[layer.name])
            bounds = (found.second, found.ramanujan, found.random_matrix)
            measured = [
                str(layer.degree),
                str(layer.share),
                *(f"{bound / found.first:.3f}" for bound in bounds),
            ]
        sizes = [str(layer.n_in), str(layer.n_out), kernel]
        table.add_row(layer.name, *sizes, *measured, f"{layer.weights:,}", f"{layer.macs:,}")
    return table
