"""`xzoo fit`, `validate`, `test` and `predict`: a recipe on Lightning's Trainer, in a run folder of its own.

A recipe is YAML for `Classifier`, a data module and the Trainer, under LightningCLI's names, and may name another one
as its base (recipes.py). Later files and flags win, key by key. The same command continues a run that was
interrupted, and tells the result of one that is finished.

What is reported is the accuracy of what is saved: the averaged weights, where there is an average, at the end of
the last epoch, read back from the model folder. Not the best epoch, which is chosen by the images that judge it.
"""

import csv
import datetime
import json
import os
import pydoc
import subprocess
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import XzooError
from ..hub import folder as model_folder
from ..options import explain
from ..profile import profile
from . import pictures, recipes
from .callbacks import EMA, Clock, Report, SyncBatchNorm, checkpoints
from .results import DATASETS, DENSE, Row, append, read, recipe_sha
from .run import (
    CONFIG,
    LAST,
    METRICS,
    RESULT,
    AtomicCheckpointIO,
    MetricsFile,
    atomic,
    claimed,
    quiet,
    read_metrics,
    refuse_other,
    steps_of,
    write_text,
)
from .run import fit as run_fit
from .task import Classifier

# Where a run happens; it may change from one start to the next.
PLACES = {
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("data.init_args.root", "data.init_args.workers"),
}
# How it is computed: rounding apart the same recipe, with columns of their own in the results.
MEANS = {
    *("trainer.precision", "trainer.sync_batchnorm", "trainer.benchmark", "trainer.deterministic"),
    *("model.compile", "model.channels_last", "data.init_args.channels_last", "data.init_args.eval_batch_size"),
}
DATA = (
    "CIFAR10",
    "CIFAR100",
    "TinyImageNet",
    "ImageNet",
    "ImageFolder",
)  # the data modules, by the names that recipes use
# Of one call, and no part of what the run is.
OF_CALL = ("config", "base", "out", "results", "ckpt_path")


class RecipeCLI(LightningCLI):
    """LightningCLI's parser over `Classifier` and the data modules; `build` makes what it parsed.

    Apart, because the run folder has to be claimed between the two.
    """

    def __init__(self, arguments: Sequence[str], verb: str = "fit") -> None:
        self.recipe: Path | None = None  # the file that says what is trained
        with warnings.catch_warnings():
            # It has arguments of its own, and would rather have the process's.
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter")
            super().__init__(
                Classifier,
                pl.LightningDataModule,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={"prog": f"xzoo {verb}", "exit_on_error": False, "allow_abbrev": False},
                args=self._with_bases(arguments),
                run=False,
            )

    def _with_bases(self, arguments: Sequence[str]) -> list[str]:
        """Each --config by its path, after its bases."""
        given, found = list(arguments), []
        while given:
            flag, _, value = given.pop(0).partition("=")
            if flag not in ("--config", "-c"):
                found.append(f"{flag}={value}" if value else flag)
                continue
            if not (value or given):
                raise XzooError("--config: a recipe is needed after it; `xzoo recipes` lists them")
            path = recipes.find(value or given.pop(0))
            if self.recipe is None:
                self.recipe = path
            found += [f"--config={file}" for file in recipes.chain(path)]
        return found

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ema", type=float | None, default=None, help="decay of averaged weights in a step")
        parser.add_argument("--base", type=str | None, default=None, help="the recipe that this one differs from")
        parser.add_argument("--out", type=str | None, default=None, help="run folder; by default runs/RECIPE")
        parser.add_argument("--results", type=str | None, default=None, help="append the result to this table")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="weights to judge, not to train")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            options = [option for action in parser._actions for option in action.option_strings if option[:2] == "--"]
            raise XzooError(explain(str(error), options, DATA)) from None

    def _add_instantiators(self) -> None:
        """None: `build` makes everything, later."""

    def instantiate_classes(self) -> None:
        """See `build`."""

    def build(self, **trainer: Any) -> tuple[pl.Trainer, Classifier, Any]:
        """Trainer, classifier and data; `trainer` has arguments over the recipe's, lists of it after its lists."""
        # Not by the parser: it would tell of an error in the data's constructor that they are "None or a data module",
        # and write itself into every checkpoint.
        place = self.config.data
        data: Any = pydoc.locate(place.class_path)(**place.init_args.as_dict())  # type: ignore[operator]
        task = Classifier(**self.config.model.as_dict() | {"num_classes": data.num_classes})
        parts = ArgumentParser()
        parts.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
        given = parts.instantiate(Namespace(trainer=self.config.trainer)).trainer.as_dict()
        for name in ("callbacks", "plugins", "logger"):
            own, ours = given.pop(name), trainer.get(name, [])
            if ours is not False:
                trainer[name] = [*ours, *(own if isinstance(own, list) else [own] if own else [])]
        if given["sync_batchnorm"]:
            trainer |= {"sync_batchnorm": False, "plugins": [*trainer["plugins"], SyncBatchNorm()]}
        quietly = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        # The data modules shard by themselves.
        return pl.Trainer(**given | quietly | {"use_distributed_sampler": False} | trainer), task, data

    def plain(self, changes_only: bool = False) -> dict[str, Any]:
        """The configuration in plain values, as a recipe that does the same; of `changes_only`, without defaults."""
        text = self.parser.dump(self.config, format="yaml", skip_unset=False, skip_default=changes_only)
        return {key: value for key, value in yaml.safe_load(text).items() if key not in OF_CALL}

    @property
    def name(self) -> str:
        """The recipe's own, such as cifar10/x_vgg16_2, or of a file elsewhere its stem."""
        if self.recipe is None:
            return self.config.model.name
        path, home = self.recipe.resolve(), recipes.folder().resolve()
        return path.relative_to(home).with_suffix("").as_posix() if path.is_relative_to(home) else path.stem

    @property
    def sha(self) -> str:
        """Of what is computed: the recipe with its bases and overrides, wherever and however it runs."""
        return recipe_sha(_without(self.plain(changes_only=True), PLACES | MEANS))


def fit(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Train by a recipe; returns the result (as in result.json), on the first process alone.

    Args:
        arguments: of the command line: --config RECIPE ... --data.root FOLDER --out RUN --key value ...
    Raises: XzooError for what cannot be run or is another run's folder; KeyboardInterrupt after Ctrl-C.
    """
    console = Console(stderr=True)
    with quiet():
        cli = RecipeCLI(arguments)
        _refuse_what_does_not_resume(cli.config.trainer)
        if cli.config.trainer.fast_dev_run:
            trainer, task, data = cli.build(**_world())
            run_fit(trainer, task, data, None)
            return None
        run, config = _run_folder(cli), cli.plain()
        if _first():
            refuse_other(run, config, "xzoo fit", free=PLACES)
            if cli.config.results and Path(cli.config.results).exists():
                read(cli.config.results)  # a table that cannot take the result is told before the training
        if (run / RESULT).exists():
            result = json.loads((run / RESULT).read_text(encoding="utf-8"))
            if _first():
                _say(console, f"{run} is finished; choose another --out to train again")
                _show(result, console)
            return result
        with claimed(run) if _first() else nullcontext():
            return _train(cli, run, config, console)


def _train(cli: RecipeCLI, run: Path, config: dict[str, Any], console: Console) -> dict[str, Any] | None:
    last = run / LAST
    resumes = last.exists()
    if resumes:
        # All weights come from the checkpoint: no network is needed for others.
        cli.config.model.pretrained = False
    done, clock = steps_of(last) if resumes else 0, Clock()
    trainer, task, data = cli.build(
        **_world(),
        default_root_dir=str(run),
        callbacks=[
            *([EMA(cli.config.ema)] if cli.config.ema else []),
            *(clock, Report(console)),
            *checkpoints(last.parent),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=[MetricsFile(run / METRICS, done)],
    )
    data.prepare_data()
    data.setup("fit")  # missing data are told before anything is written
    if cli.config.results and not (data.dataset and _commit()):
        lacks = "this data set is none of " + ", ".join(DATASETS) if not data.dataset else "no commit: not a checkout"
        raise XzooError(f"results={cli.config.results}: the table cannot take this run ({lacks}); leave it out")
    if cli.config.results:
        _row(facts(cli, task, data, trainer))  # what it cannot take is told now
    steps = data.batches_per_epoch(trainer.world_size)
    trainer.log_every_n_steps = max(1, min(trainer.log_every_n_steps, steps // 3))  # type: ignore[attr-defined]
    if _first():
        if not resumes:
            head = f"# {cli.name}; recipe {cli.sha}. The same command continues the run.\n"
            write_text(run / CONFIG, head + yaml.safe_dump(config, sort_keys=False))
        going_on = f", going on after {done} steps" if resumes else ""
        _say(
            console, f"{cli.name}: {cli.config.model.name}, {steps} steps an epoch; everything goes to {run}{going_on}"
        )
    run_fit(trainer, task, data, last if resumes else None)
    if not trainer.is_global_zero:
        return None
    result = _finish(cli, run, trainer, task, data, clock.seconds)
    _show(result, console)
    return result


def _finish(
    cli: RecipeCLI, run: Path, trainer: pl.Trainer, task: Classifier, data: Any, seconds: float
) -> dict[str, Any]:
    """Save the model, read it back, judge it, draw the curves; result.json comes last and ends the run."""
    checkpoint = torch.load(run / LAST, map_location="cpu", weights_only=True)
    task.load_state_dict(checkpoint["state_dict"])
    device = trainer.strategy.root_device
    made = {"recipe": cli.name, "recipe_sha": cli.sha, "seed": task.hparams["seed"]}
    model_folder.save(task.net, run / "model", data.class_names, _data_config(task.net, data), {"fit": made})
    logits, labels = judged(model_folder.load(run / "model").to(device), data, device)
    result = {
        **facts(cli, task, data, trainer),
        "top1": top(logits, labels, 1),
        "top5": top(logits, labels, 5) if logits.shape[1] > 5 else None,
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "epoch_reported": int(checkpoint["epoch"]) + 1,
        "wall_s": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
    }
    score = f"{cli.name}: {result['top1']:.2f} % of {len(labels)} {result['split']} images"
    pictures.curves(read_metrics(run / METRICS), run / "curves.png", score)
    if cli.config.results:
        # Before result.json: what fails here is tried again by the same command.
        append(cli.config.results, _row(result))
    write_text(run / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _row(result: dict[str, Any]) -> Row:
    """The line of a result; where there is none yet, of a run that would be half right."""
    ended: dict[str, Any] = {"top1": 50.0, "top5": 50.0, "epoch_reported": 1, "wall_s": 0.0, "date": "2000-01-01"}
    return Row(**{key: value for key, value in (ended | result).items() if key != "loss"})


def facts(cli: RecipeCLI, task: Classifier, data: Any, trainer: pl.Trainer) -> dict[str, Any]:
    """The columns of results.csv that are known before the result."""
    net: Any = task.net
    counts = profile(net, data.input_size)
    drawn = getattr(net, "_model_args", {})
    compression = drawn.get("compression", 1)
    compression = compression if isinstance(compression, int) else None
    graph = {"graph": DENSE} if compression == 1 else {"graph": drawn["graph"]}
    names = ("share", "spatial_share", "seed")
    given = {name: None if compression == 1 else drawn[name] for name in names}
    part = data.dataset and DATASETS[data.dataset].split
    steps = data.batches_per_epoch(trainer.world_size) * (trainer.max_epochs or 0)
    return {
        "model": cli.config.model.name,
        "recipe": f"recipes/{cli.name}.yaml" if "/" in cli.name else cli.name,
        "recipe_sha": cli.sha,
        "dataset": data.dataset,
        "split": "holdout" if data.holdout else part or "val",
        "n_val": data.n_val,
        "img_size": data.img_size,
        "crop_pct": getattr(data, "crop_pct", None),
        "interpolation": data.interpolation,
        **graph,
        "compression": compression,
        "share": given["share"],
        "spatial_share": given["spatial_share"],
        "graph_seed": given["seed"],
        "seed": task.hparams["seed"],
        "epochs": trainer.max_epochs,
        "global_batch": data.batch_size * trainer.accumulate_grad_batches,
        "ema": bool(cli.config.ema),
        "params": counts.params,
        "weights": counts.weights,
        "macs": counts.macs,
        "train_macs": 3 * counts.macs * data.batch_size * steps,  # forwards, and twice that backwards
        "device": _hardware(trainer),
        "precision": str(trainer.precision),
        "torch": str(torch.__version__),
        "xzoo": version("xzoo"),
        "commit": _commit(),
    }


def evaluate(verb: str, arguments: Sequence[str]) -> dict[str, float] | None:
    """`validate` or `test`: loss, top 1 and top 5 (shares) of a run's weights, or of those that --ckpt_path names.

    Raises: XzooError where there are no weights: random ones are not judged.
    """
    with quiet():
        cli = RecipeCLI(arguments, verb)
        task, data, trainer = _with_weights(cli)
        figures = getattr(trainer, verb)(task, datamodule=data, verbose=False)[0]
    if not _first():
        return None
    n = data.n_val if verb == "validate" else data.n_test
    table = Table(box=None, pad_edge=False, show_header=False)
    part = "val" if verb == "validate" else "test"
    table.add_row("top-1", f"{100 * figures[f'{part}/acc1']:.2f} % of {n} images")
    table.add_row("top-5", f"{100 * figures[f'{part}/acc5']:.2f} %")
    table.add_row("loss", f"{figures[f'{part}/loss']:.4f}")
    Console().print(table)
    return figures


def predict(arguments: Sequence[str]) -> Path:
    """Write the predicted class of each test image, with its probability, to predictions.csv in the run folder.

    Raises: XzooError where there are no weights, or for several devices.
    """
    with quiet():
        cli = RecipeCLI(arguments, "predict")
        task, data, trainer = _with_weights(cli)
        if trainer.world_size > 1:
            raise XzooError(f"predict with {trainer.world_size} devices: one writes the table; use --trainer.devices 1")
        batches: Any = trainer.predict(task, datamodule=data)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    run = _run_folder(cli)
    run.mkdir(parents=True, exist_ok=True)
    chances, names = logits.softmax(1).max(1), data.class_names
    path = run / "predictions.csv"
    with atomic(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("image", "label", "predicted", "probability"))
        for i, (label, chance, found) in enumerate(zip(labels, chances.values, chances.indices, strict=True)):
            table.writerow((i, names[label], names[found], f"{float(chance):.6f}"))
    Console().print(f"{len(labels)} images in {path}", highlight=False, soft_wrap=True)
    return path


# ---- weights to judge


def _with_weights(cli: RecipeCLI) -> tuple[Classifier, Any, pl.Trainer]:
    place = cli.config.ckpt_path or (_run_folder(cli) / LAST if (_run_folder(cli) / LAST).exists() else None)
    if place:
        cli.config.model.pretrained = False
    elif not cli.config.model.pretrained:
        raise XzooError(
            f"no weights to judge: {_run_folder(cli) / LAST} is not there; give --ckpt_path FILE, --out RUN or "
            "--model.pretrained true"
        )
    trainer, task, data = cli.build(**_world(), logger=False, enable_checkpointing=False)
    if place:
        load_weights(task, Path(place))
    return task, data, trainer


def load_weights(task: Classifier, path: Path) -> None:
    """Weights of a checkpoint (averaged ones, where it has them) or of a safetensors file; every one has to fit.

    Only weights: what else a checkpoint says (rate, model) does not override the recipe and the flags.
    Raises: XzooError that names what does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            task.net.load_state_dict(load_file(path))
        else:
            task.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except Exception as error:  # a dozen of classes for a broken file
        first, *keys = str(error).splitlines() or [type(error).__name__]  # torch lists every key
        reason = f"{keys[0].strip()} ({len(keys)} such keys)" if keys else first
        raise XzooError(f"{path} does not hold the weights of this recipe: {reason}") from error


@torch.inference_mode()
def judged(model: nn.Module, data: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and labels [N] of all validation images, in order, on the CPU; in this process alone."""
    data.trainer = None
    parts = [(model(images.to(device)).float().cpu(), labels) for images, labels in data.val_dataloader()]
    logits, labels = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(labels)


def top(logits: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of images whose label is among the k largest logits."""
    best = logits.topk(k, dim=1).indices
    return round(100 * float((best == labels[:, None]).any(1).double().mean()), 4)


# ---- what a run stands in


def _run_folder(cli: RecipeCLI) -> Path:
    return Path(cli.config.out or Path("runs") / cli.name.replace("/", "-")).expanduser()


def _first() -> bool:
    """Whether this process is the first of its run, before there is a trainer to ask."""
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    rank = next((int(os.environ[name]) for name in ranks if name in os.environ), 0)
    return rank == 0 and ("RANK" in os.environ or int(os.environ.get("NODE_RANK", 0)) == 0)


def _world() -> dict[str, int]:
    """Under torchrun, the devices and nodes that it started; it knows better than a recipe."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return {"devices": local, "num_nodes": world // local}


def _refuse_what_does_not_resume(trainer: Any) -> None:
    if trainer.max_time is not None or trainer.max_steps not in (-1, None):
        raise XzooError("max_steps and max_time do not resume where they were; use --trainer.max_epochs alone")
    if not trainer.fast_dev_run and (trainer.max_epochs is None or trainer.max_epochs < 1):
        raise XzooError(f"trainer.max_epochs={trainer.max_epochs}: a recipe says how many epochs, 1 or more")


def _without(config: Any, keys: set[str], place: str = "") -> Any:
    if not isinstance(config, dict):
        return config
    here = {key: f"{place}.{key}" if place else key for key in config}
    return {key: _without(config[key], keys, name) for key, name in here.items() if name not in keys}


def _data_config(net: nn.Module, data: Any) -> dict[str, Any]:
    """How timm has to prepare an image for this model: as this data set's validation does."""
    own = {"input_size": data.input_size, "mean": tuple(data.mean), "std": tuple(data.std)}
    own |= {"crop_pct": getattr(data, "crop_pct", 1.0), "interpolation": data.interpolation or "bilinear"}
    return resolve_model_data_config(net) | own


def _hardware(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        name = f"{cpu[0].partition(':')[2].strip() if cpu else 'CPU'}, {torch.get_num_threads()} threads"
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _commit() -> str | None:
    """Of the checkout that this code is in, with -dirty where files were changed; None for an installed wheel."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    asked = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "model": f"{result['model']}, {result['weights'] / 1e6:.2f} M weights, {result['macs'] / 1e6:,.0f} M MACs",
        "recipe": f"{result['recipe']} ({result['recipe_sha']})",
        "top-1": f"{result['top1']:.2f} % of {result['n_val']:,} {result['split']} images",
        "top-5": f"{result['top5']:.2f} %" if result["top5"] is not None else "-",
        "loss": f"{result['loss']:.4f}",
        "epochs": f"{result['epoch_reported']} in {datetime.timedelta(seconds=round(result['wall_s']))}",
        "on": f"{result['device']}, {result['precision']}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
