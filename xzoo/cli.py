"""The command line: parses and prints. Everything that it does can be called from Python.

Exit codes: 0; 2 for a user's mistake or a fault of the machine, reported in one line; 1 for a bug
in xzoo, with its traceback; 130 after Ctrl-C, 143 after SIGTERM. Commands are imported when they
are run, so that few wait for Lightning.
"""

import inspect
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import files, machine
from .errors import XzooError
from .names import shown
from .options import explain, nearest, option_names

Several = Sequence[str]  # an argument of several words
# What each command does, and an example of it. The function `_NAME` runs it.
COMMANDS = {
    "finetune": (
        "train a model on your images",
        "xzoo finetune photos --model x_resnet50 --minutes 30",
    ),
    "classify": (
        "classify images",
        "xzoo classify runs/photos-x_resnet50 holiday/*.jpg",
    ),
    "list": ("the models, with weights and multiply-accumulates (MACs)", "xzoo list 'x_resnet*'"),
    "inspect": (
        "a model layer by layer, and its graphs against the theory",
        "xzoo inspect x_vgg16_c8 --pictures out",
    ),
    "fit": ("train by a recipe", "xzoo fit cifar10/x_vgg16_2+air --data.root DATA --out runs/vgg"),
    "recipes": (
        "list the recipes with their counts, or copy one to change it",
        "xzoo recipes 'cifar10/*+air'",
    ),
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
    "compare": (
        "draw results beside the paper's",
        "xzoo compare recipes/results.csv --out figures",
    ),
    "export": (
        "write a run's model as a folder to publish",
        "xzoo export runs/vgg hub_cards/x_vgg16_2.cifar10",
    ),
    "card": (
        "rewrite the cards of exported folders",
        "xzoo card hub_cards/x_vgg16_2.cifar10",
    ),
    "publish": (
        "send an exported folder or a run to the Hub",
        "xzoo publish runs/photos --repo me/my-flowers",
    ),
    "doctor": (
        "what computes here, and what keeps faster kernels from running",
        "xzoo doctor",
    ),
    "tune": (
        "measure which layers are faster in xzoo's own kernels on this CPU, and use them for those",
        "xzoo tune",
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
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("xzoo"))
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise XzooError(f"unknown command {command!r}; {nearest(command, COMMANDS)}")
        _check_surroundings()
        _run(command, rest)
        if sys.stdout is not None:
            # what cannot be written is reported here, and not when the interpreter ends
            sys.stdout.flush()
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
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except (OSError, ValueError):
            sys.stdout = None  # it takes nothing more, and the interpreter would complain
        return 2
    return 0


def _run(command: str, arguments: Sequence[str]) -> None:
    if command in LIGHTNING:
        _load_package()
        _lightning(command, arguments)
        return
    function = globals()[f"_{command}"]
    parser = ArgumentParser(
        prog=f"xzoo {command}",
        description=COMMANDS[command][0],
        epilog=f"example: {COMMANDS[command][1]}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    _add_arguments(parser, function)
    if command == "finetune":
        from .train.finetune import finetune

        parser.add_function_arguments(finetune, skip={"data", "freeze"}, as_group=False)
    args = _parse(parser, arguments)
    _load_package()
    function(**args.as_dict())


def _load_package() -> None:
    """Give the package its public names, as importing it does in any other program.

    A class that a recipe names may use them. Its functions `profile` and `deploy` have the names of
    modules, so they are set even where those modules were imported before.
    """
    from . import public

    names = {name: getattr(public, name) for name in public.__all__}
    vars(import_module("xzoo")).update(names)


def _check_surroundings() -> None:
    """Raise XzooError where the current folder has been removed, since torch's libraries cannot
    even be loaded there; and for an XZOO_BACKEND that does not exist, before the first layer would.
    """
    try:
        os.getcwd()
    except OSError:
        raise XzooError(
            "the folder that xzoo was started in is gone; change to another one"
        ) from None
    name = os.environ.get("XZOO_BACKEND")
    if name is not None:
        from . import ops

        try:
            with ops.backend(name):
                pass
        except XzooError as error:
            raise XzooError(f"XZOO_BACKEND={name}: {error}; unset it, or set one of them") from None


# What torch and its loaders say when the machine fails, and what to do about it.
_FAULTS = {
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|bad_alloc"
    r"|Unable to allocate|MemoryError": (
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
    """A user's mistake, or what went wrong on the machine, in one line; None for a bug in xzoo."""
    text = _one_line(error) or type(error).__name__
    if isinstance(error, XzooError):
        return text
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package == "xzoo":
            return None
        return (
            f"{package or 'a package'} cannot be imported ({text}); install xzoo and what it "
            "needs again"
        )
    if isinstance(error, MemoryError | OSError | RuntimeError):
        for pattern, advice in _FAULTS.items():
            if re.search(pattern, f"{type(error).__name__}: {text}"):
                return advice.format(text)
    if isinstance(error, OSError):
        reason = text if error.errno is None else files.reason(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, UnicodeError):
        return f"text that cannot be read or shown in this encoding ({text}); set PYTHONUTF8=1"
    return None


def _one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:  # raised by a loader's worker: torch hands it on with all that
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


def _overview() -> str:
    text = "usage: xzoo COMMAND ...   (xzoo COMMAND --help shows its options; xzoo --version)\n"
    for name, (what, example) in COMMANDS.items():
        text += f"\n  {name:<10}{what}\n  {'':<10}{example}"
    return text


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
        options = option_names(parser)
        for name in given[:end]:
            if name[0:1] == "-" and name not in options and Path(name).exists():
                raise XzooError(
                    f"{name} is taken for an option; write ./{name}, or -- before the names"
                ) from None
        raise XzooError(explain(str(error), options)) from None


# ---- the commands. A function's parameters are the command's arguments, those after `*` its
# options; each annotation has the type and the help.


def _add_arguments(parser: ArgumentParser, function: Callable[..., None]) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # the options of another function
            continue
        kind, text = get_args(parameter.annotation)
        is_option = parameter.kind is parameter.KEYWORD_ONLY
        is_required = parameter.default is parameter.empty
        settings = {"help": text} if is_required else {"help": text, "default": parameter.default}
        if kind is bool:
            settings["action"] = "store_true"
        elif kind in (Several, Several | None):
            settings["nargs"] = "+" if is_required else "*"
        elif not (is_option or is_required):
            settings["nargs"] = "?"
        if is_option and kind is not bool:
            settings["type"] = str if "nargs" in settings else kind
        parser.add_argument(f"--{name}" if is_option else name, **settings)


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


def _list(
    filter: Annotated[str, "a pattern, such as 'x_resnet*'"] = "*",
) -> None:
    import torch

    from .models import create_model, list_models
    from .profile import profile

    names = list_models(filter)
    if not names:
        raise XzooError(f"no model is called {filter}; {nearest(filter, list_models())}")
    table = _table("model", "pixels", "weights", "MACs")
    for name in names:
        with torch.device("meta"):  # counting needs no weights
            model: Any = create_model(name)
        counts, size = profile(model), model.pretrained_cfg["input_size"][-1]
        table.add_row(name, str(size), *_in_millions(counts))
    _console().print(table)


def _finetune(
    data: Annotated[
        str,
        "folder of images or parquet files, Hub data set (org/name), or digits",
    ] = "digits",
    *,
    freeze: Annotated[bool, "train only the last layer"] = False,
    **options: Any,
) -> None:
    from .train.finetune import finetune

    machine.keep_memory()
    result = finetune(data, freeze=freeze, **options)
    print(f"{result.top1:.2f} %\t{shown(result.run)}")


def _classify(
    model: Annotated[str, "run folder, model folder, or name of a pretrained model"],
    images: Annotated[Several, "images, and folders of images"],
    *,
    csv: Annotated[str | None, "write all of them to this file"] = None,
    top: Annotated[int, "how many classes"] = 5,
    batch_size: Annotated[int, "images at a time"] = 32,
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto",
) -> None:
    from .train.classify import classify, write_csv

    if top < 1 or batch_size < 1:
        raise XzooError(f"top={top}, batch_size={batch_size}: 1 or more are needed")
    if csv is not None:
        files.check_file(csv, "--csv")

    def show(prediction: Any) -> None:
        classes = "  ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
        print(shown(f"{prediction.image}: {classes}"), flush=True)

    read, predictions = [], []
    try:
        for prediction in classify(model, images, top, batch_size, device):
            predictions.append(prediction)
            if prediction.error is not None:
                print(f"xzoo: not read: {shown(prediction.error)}", file=sys.stderr)
                continue
            read.append(prediction)
            if csv is None:
                show(prediction)
    finally:  # Ctrl-C leaves the predictions so far
        if csv is not None and predictions:
            try:
                write_csv(predictions, Path(csv), top)
            except XzooError:  # the disk has become full: they are not lost
                for prediction in read:
                    show(prediction)
                raise
            print(shown(f"{len(predictions)} images in {csv}"))
    if not read:
        raise XzooError(f"none of the {len(predictions)} images can be read")


def _queue(
    file: Annotated[str | None, "Markdown with blocks of shell; by default QUEUE.md"] = None,
    *,
    list: Annotated[bool, "show what is done and estimate what is left; start nothing"] = False,
    jobs: Annotated[int | None, "runs side by side; by default 2, on one core 1"] = None,
    blocks: Annotated[str | None, "only those of these numbers, such as 0,3"] = None,
) -> None:
    from .train import queue, recipes

    numbers = () if blocks is None else blocks.split(",")
    runs = queue.read_queue(file or recipes.folder() / queue.QUEUE, numbers)
    if not list:
        queue.run_queue(runs, jobs)
        return
    table = _table("block", "run", "state", "core-hours left", left=("run", "state"))
    total = 0.0
    for entry, state, hours in queue.listed(runs):
        known = not math.isnan(hours)
        total += hours if known else 0.0
        table.add_row(entry.block, shown(entry.out), state, f"{hours:,.1f}" if known else "?")
    console = _console()
    console.print(table)
    finished = sum(entry.is_finished for entry in runs)
    console.print(
        f"{finished} of {len(runs)} runs are finished; about {total:,.1f} core-hours are left"
    )


def _recipes(
    what: Annotated[str, "list, copy, or a pattern such as 'cifar10/*+air'"] = "list",
    recipe: Annotated[str | None, "with list, a pattern; with copy, a name or a file"] = None,
    to: Annotated[str, "with copy, the folder"] = ".",
) -> None:
    from .train import recipes

    if what == "copy":
        if recipe is None:
            raise XzooError("copy needs the name of a recipe; `xzoo recipes` lists them")
        for path in recipes.copy(recipe, to):
            print(shown(path))
    elif what == "list":
        _list_recipes(recipe or "*")
    elif "/" in what or "*" in what:
        _list_recipes(what)
    else:
        raise XzooError(f"recipes {what}: {nearest(what, ('list', 'copy'))}")


def _list_recipes(pattern: str) -> None:
    """A line as soon as it is counted, since all of them take a minute; everything that a recipe
    says where it is the only one.
    """
    import fnmatch

    from .train import queue, recipes
    from .train.parse import RecipeCLI
    from .train.run import quiet

    names = fnmatch.filter(recipes.names() if "+" in pattern else recipes.plain_names(), pattern)
    hardware = fnmatch.filter(recipes.hardware(), pattern)
    if not names and not hardware:
        raise XzooError(f"no recipe is called {pattern}; {recipes.hint(pattern, recipes.names())}")
    width = max(map(len, names + hardware))
    if names:
        print(f"{'recipe':{width}}    px  epochs     weights        MACs  settings")
    for name in names:
        with quiet():
            cli = RecipeCLI([name])
        size, epochs = queue.size_of(cli), cli.config.trainer.max_epochs
        weights, macs = _in_millions(queue.counts(cli, size))
        line = f"{name:{width}}  {size:4}  {epochs:6}  {weights:>10}  {macs:>10}"
        if "+" not in name:
            line += "  " + " ".join(f"+{part.name}" for part in recipes.settings_of(name))
        print(line.rstrip(), flush=True)
    for name in hardware:
        print(f"{name:{width}}  {recipes.find(name).layers[0].notes.partition(chr(10))[0]}")
    if len(names) == 1:
        (layer,) = recipes.find(names[0]).layers
        print(f"\nxzoo fit {names[0]} --data.root DATA\n\n{recipes.text(layer)}", end="")


def _export(
    run: Annotated[
        str,
        "folder of a run of fit or finetune that is finished; for a file, any model",
    ],
    to: Annotated[str, "the new folder; or a file that ends in .onnx or .pt2"],
    *,
    half: Annotated[bool, "weights in float16, if the accuracy does not move"] = False,
) -> None:
    from .hub import export, program
    from .hub.folder import load_any

    if Path(to).suffix in program.ENDINGS:
        files.check_file(to)
        print(shown(f"{to}: {program.write(load_any(run), to)}"))
    else:
        print(shown(export(run, to, half=partial(_accuracy, run) if half else None)))


def _accuracy(run: str, weights: Path) -> float:
    """Top-1 accuracy, in per cent, of a file of weights on the validation images of a run of `xzoo
    fit`.
    """
    from .train.evaluate import evaluate

    recipe = str(Path(run) / "config.yaml")
    figures = evaluate("validate", ["--config", recipe, "--ckpt_path", str(weights)])
    assert figures is not None  # this is the only process
    return round(100 * figures["val/acc1"], 4)  # as in result.json


def _card(
    folders: Annotated[Several, "exported folders; by default all in hub_cards"] = [],  # noqa: B006
) -> None:
    from .hub import card, publish

    for folder in folders or publish.folders():
        changed = card.write(folder)
        publish.register(Path(folder))
        print(shown(f"{folder}: {'rewritten' if changed else 'up to date'}"))


def _publish(
    folder: Annotated[str | None, "exported folder, or the folder of a finished run"] = None,
    *,
    org: Annotated[str | None, "owner of the repository; xzoo's by default"] = None,
    repo: Annotated[str | None, "the repository, as owner/name"] = None,
    private: Annotated[bool, "make a private repository"] = False,
    dry_run: Annotated[bool, "show what would be sent"] = False,
    all: Annotated[bool, "every folder in hub_cards"] = False,
) -> None:
    from .hub import publish

    if all == (folder is not None) or (all and repo):
        raise XzooError(
            "give a folder or a run, perhaps with --repo; or --all alone, perhaps with --org"
        )
    for path in [folder] if folder is not None else publish.folders():
        done = publish.publish(path, org, repo, private, dry_run)
        changed = ", ".join(done.changed) or "nothing"
        if dry_run:
            print(shown(f"{done.repo}: {changed} would be sent"))
            continue
        print(shown(f"{done.repo} {done.version}: {changed} sent; commit {done.commit}"))
        for name, sha in done.sha256.items():
            print(shown(f"  {sha}  {name}"))
        if done.registered:
            print("  entered in xzoo/weights.json")


def _compare(
    results: Annotated[str, "table of runs, such as recipes/results.csv"],
    *,
    out: Annotated[str, "folder for the pictures and the table"] = "figures",
    datasets: Annotated[list[str], "only these data sets"] = [],  # noqa: B006
) -> None:
    from .results.compare import compare

    for path in compare(results, out, datasets):
        print(shown(path))


def _inspect(
    model: Annotated[str, "name of a model, run folder, or model folder"],
    *,
    pictures: Annotated[str | None, "draw its graphs into this folder"] = None,
) -> None:
    from .doctor import advice
    from .drawing import draw_model
    from .hub.folder import load_any
    from .models import create_model
    from .profile import profile
    from .theory import runs

    if pictures is not None:
        files.check_folder(pictures, "--pictures")
    net: Any = load_any(model) if Path(model).is_dir() else create_model(model)
    counts, console = profile(net), _console()
    console.print(_layers_table(net, counts))
    size = " x ".join(map(str, net.pretrained_cfg["input_size"]))
    console.print(f"{counts.weights:,} weights, {counts.macs:,} MACs for an image of {size}")
    for stretch in runs(net):
        first, last, depth = stretch.names[0], stretch.names[-1], stretch.reach.depth
        reached = "not every output depends on every input yet"
        if depth:
            reached = f"sensitivity depth {depth}"
        line = f"{len(stretch.names)} X-layers, {first} to {last}: {reached}"
        console.print(line, soft_wrap=True)
    if any(layer.degree for layer in counts.layers) and (hint := advice()):
        console.print(hint, soft_wrap=True)
    if pictures is not None:
        try:
            for picture in draw_model(net, pictures, model):
                print(shown(picture))
        except OSError as error:
            raise XzooError(f"cannot draw into {pictures}: {files.reason(error)}") from error


def _doctor() -> None:
    from .doctor import doctor

    facts = doctor()
    width = max(map(len, facts)) + 2
    for name, fact in facts.items():
        print(shown(f"{name:<{width}}{fact}"))


def _tune(
    *,
    seconds: Annotated[float, "how long to measure; a slow or busy CPU takes longer"] = 120.0,
) -> None:
    from . import tuning
    from .ops import rules

    print(
        f"measuring for {seconds:g} s or more, on one thread; other programs would disturb it",
        file=sys.stderr,
    )
    made = tuning.tune(seconds)
    kinds = ("3x3", "3x3 strided", "1x1", "linear", "1x1 shared", "linear shared")
    table = _table("product", "from lanes", *kinds)
    for row in tuning.changes(made):
        table.add_row(*row)
    console = _console()
    console.print(table)
    console.print(
        "Compression from which xzoo's own kernels are taken; lanes are samples, or pixels of all "
        "samples of 1x1 layers.",
        soft_wrap=True,
    )
    print(shown(f"{rules.path()}: programs that start now follow it on this machine."))
    print("Delete that file to go back to the built-in rule.")


def _bench(
    *,
    models: Annotated[
        Several | None,
        "whole models, in inference and training (the default); names, or none for all",
    ] = None,
    layers: Annotated[
        Several | None,
        "single layers; texts that their names contain, sizes of your own, or none for all",
    ] = None,
    policy: Annotated[bool, "what `auto` takes against the library's best, over 20 shapes"] = False,
    share: Annotated[bool, "second singular value and speed by share"] = False,
    scaling: Annotated[
        bool,
        "what threads gain our kernels, against what they gain dense ones (--threads 2 or more)",
    ] = False,
    loop: Annotated[bool, "the training loop, augmentation, and loading of images"] = False,
    finetune: Annotated[str | None, "images to learn with and without weights"] = None,
    threads: Annotated[int, "of torch's; 1 measures a thread's own time"] = 1,
    pairs: Annotated[int | None, "times that each form is measured"] = None,
    batch_size: Annotated[int | None, "of models, and of the loop"] = None,
    compile: Annotated[bool, "dense models by torch.compile as well"] = False,
    model: Annotated[str | None, "what the loop, or --finetune, trains"] = None,
    minutes: Annotated[float | None, "of each run of --finetune; by default 2"] = None,
    seeds: Annotated[int | None, "runs of each kind of --finetune; by default 3"] = None,
    each: Annotated[int | None, "images per class of --finetune; by default 10"] = None,
    photos: Annotated[int | None, "files that are drawn for the loop's loader"] = None,
    csv: Annotated[str | None, "write the figures to this file too"] = None,
    plot: Annotated[str | None, "draw models and layers into this file"] = None,
) -> None:
    from . import bench

    machine.keep_memory()  # as training does, and for all forms
    if finetune is not None:
        more = _given(minutes=minutes, seeds=seeds, each=each)
        _bench_finetuning(finetune, model, csv, threads, more)
        return
    times, size = _given(pairs=pairs), _given(batch_size=batch_size)
    trained = _given(model=model, photos=photos)
    if layers is None and not (policy or share or scaling or loop):
        models = models or ()
    if csv is not None:
        bench.check_file(Path(csv))
    if plot is not None:
        bench.check_file(Path(plot), bench.PICTURES)
    parts: tuple[tuple[bool, Callable[[], Iterator[bench.Figure]]], ...] = (
        (models is not None, lambda: bench.models(models or (), compiled=compile, **times, **size)),
        (layers is not None, lambda: bench.layers(layers or (), **times)),
        (policy, lambda: bench.policy(**times)),
        (share, lambda: bench.share(**times)),
        (scaling, lambda: bench.scaling(**times)),
        (loop, lambda: bench.loop(**trained, **times, **size)),
    )
    figures: list[bench.Figure] = []
    with bench.threads(threads):
        # all that is asked for is checked before any of it is measured
        started = [start() for asked, start in parts if asked]
        try:
            for figure in chain.from_iterable(started):
                figures.append(figure)
                if csv is not None:
                    bench.write_csv(figures, Path(csv))
        finally:  # Ctrl-C leaves what was measured
            if figures:
                _print_figures([figure.as_row() for figure in figures], bench.machine())
    if plot is not None:
        bench.draw(figures, Path(plot))


def _bench_finetuning(
    data: str, model: str | None, csv: str | None, threads: int, more: dict[str, Any]
) -> None:
    from . import bench

    if model is None or csv is None:
        raise XzooError(
            "--finetune needs --model NAME, with weights, and --csv FILE, which gets a row for "
            "each run"
        )
    with bench.threads(threads):
        for row in bench.finetuning(data, model, csv, **more):
            images = f"{row['train_images']} images of {row['data']}, seed {row['seed']}"
            start = "from the weights" if row["pretrained"] == "true" else "from scratch"
            print(shown(f"{images}, {start}: {row['top1']} %"))


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: the others keep the defaults of what they are passed to."""
    return {name: value for name, value in options.items() if value is not None}


# ---- tables


def _print_figures(rows: Sequence[dict[str, str]], machine: dict[str, str]) -> None:
    """Empty columns are left out."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    table = _table(*columns, left=("against", "note"))
    for row in rows:
        table.add_row(*map(row.get, columns))
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


def _table(*columns: str, left: Sequence[str] = ()) -> Any:
    """An empty table. The first column, and those named in `left`, are left-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_left = column in (columns[0], *left)
        table.add_column(column, justify="left" if is_left else "right", no_wrap=True)
    return table


def _in_millions(counts: Any) -> tuple[str, str]:
    """Weights and multiply-accumulates of a profile."""
    return f"{counts.weights / 1e6:.2f} M", f"{counts.macs / 1e6:,.0f} M"


def _layers_table(model: Any, counts: Any) -> Any:
    """One row per layer. Singular values are divided by the first, so that 1 is a group convolution
    and 0 a dense layer; the two after the second are its bounds. "/ G" is a layer of G groups.
    """
    from .theory import graphs_of, spectrum

    columns = "layer in out kernel degree share second Ramanujan random weights MACs"
    table = _table(*columns.split())
    graphs = graphs_of(model)
    for layer in counts.layers:
        kernel = "x".join(map(str, layer.kernel)) if layer.kernel != (1, 1) else "1"
        measured = ["dense" if layer.groups == 1 else f"/ {layer.groups}", "", "", "", ""]
        if layer.name in graphs:
            found = spectrum(graphs[layer.name])
            bounds = (found.second, found.ramanujan, found.random_matrix)
            shares = [f"{bound / found.first:.3f}" for bound in bounds]
            measured = [str(layer.degree), str(layer.share), *shares]
        sizes = [str(layer.n_in), str(layer.n_out), kernel]
        table.add_row(layer.name, *sizes, *measured, f"{layer.weights:,}", f"{layer.macs:,}")
    return table
