"""What watches a run: the average of the weights, checkpoints, the clock, the progress report."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ModelError
from ..names import say

SAVE_EVERY = 180.0  # seconds, beside the end of each epoch


class EMA(WeightAveraging):
    """Exponential moving average of weights and batch statistics; the run validates and saves the
    average.

    Only floating tensors are averaged, the others are copied: an average of two equal int32 indices
    is, for many decays, another index (Lightning's own EMAWeightAveraging ruins X-layers'
    `neighbours` so).

    Args:
        decay: upper limit. After t steps it is (1 + t) / (10 + t), so the average spans the last
            ninth of the run so far, however long that is, and never remembers the initialisation.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
            if not averaged[0].is_floating_point():
                torch._foreach_copy_(averaged, current)
                return
            t = int(count)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + t) / (10 + t)))

        super().__init__(use_buffers=True, multi_avg_fn=average)
        self._exchanged = False

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._exchanged = not self._exchanged

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Interrupted while validating: a checkpoint written now would hold raw and averaged weights
        # exchanged. Checkpoint callbacks come last, so this is in time.
        if self._exchanged:
            self._swap_models(pl_module)


def refuse_unsafe_averaging(trainer: pl.Trainer, module: torch.nn.Module) -> None:
    """Raise ModelError if a callback of the trainer would average the indices in the module's
    buffers.

    By class and arguments, not by trial: at some decays (0.99, 0.999) the arithmetic happens to be
    exact.
    """
    counters = "num_batches_tracked"
    indices = [
        n for n, b in module.named_buffers() if not (b.is_floating_point() or n.endswith(counters))
    ]
    for callback in getattr(trainer, "callbacks", []):
        unsafe = isinstance(callback, WeightAveraging) and not isinstance(callback, EMA)
        if indices and unsafe and callback._use_buffers:
            raise ModelError(
                f"{type(callback).__name__} with use_buffers=True would average the indices in "
                f"{indices[0]}; use xzoo.train.EMA, or use_buffers=False"
            )


class SyncBatchNorm(TorchSyncBatchNorm):
    """Trainer(plugins=[SyncBatchNorm()]): batch norm over all devices, by timm's converter.

    Trainer(sync_batchnorm=True) is torch's, which drops the activation inside of timm's
    BatchNormAct2d (timm's issue 1254): densenet121's logits of 1 were off by 271. After the fit the
    model has its own modules again.
    """

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        parts = model.named_modules()
        self._norms = {name: part for name, part in parts if isinstance(part, _BatchNorm)}
        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        for name, norm in self._norms.items():
            synced = model.get_submodule(name)
            norm.train(synced.training)
            norm._parameters, norm._buffers = synced._parameters, synced._buffers
            model.set_submodule(name, norm)
        return model


def refuse_unsafe_synchronising(trainer: pl.Trainer, module: torch.nn.Module) -> None:
    """Raise ModelError if torch's converter would take activations out of the module."""
    sync = getattr(trainer.strategy, "_layer_sync", None)
    norms = [name for name, part in module.named_modules() if isinstance(part, BatchNormAct2d)]
    if norms and isinstance(sync, TorchSyncBatchNorm) and not isinstance(sync, SyncBatchNorm):
        raise ModelError(
            f"Trainer(sync_batchnorm=True) would drop the activation inside {norms[0]}; "
            "use Trainer(plugins=[xzoo.train.SyncBatchNorm()])"
        )


def checkpoints(folder: Path) -> list[ModelCheckpoint]:
    """Savers of last.ckpt, at the end of each epoch and every few minutes within, and of best.ckpt.

    Two, since save_last=True of a monitored one is rewritten only when the metric improves. The
    best comes first: last.ckpt holds what the other savers know, and a resumed run would forget the
    best of the epoch behind it.
    """
    place: dict[str, Any] = {"dirpath": str(folder), "enable_version_counter": False}
    return [
        _Saver(filename="best", monitor="val/acc1", mode="max", **place),
        _Saver(filename="last", save_on_train_epoch_end=True, **place),
        _Regularly(filename="last", **place),
    ]


class _Saver(ModelCheckpoint):
    """Knows what it knew (the best score) also where the run folder was moved or copied;
    Lightning's own forgets it.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, here = str(state_dict["dirpath"]), str(self.dirpath)
        known = dict(state_dict, dirpath=here)
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            known[name] = known[name].replace(before, here, 1)
        known["best_k_models"] = {
            k.replace(before, here, 1): v for k, v in known["best_k_models"].items()
        }
        super().load_state_dict(known)


class _Regularly(_Saver):
    """Also within an epoch, every few minutes: an epoch of a large folder may take hours."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(every_n_train_steps=1, save_on_train_epoch_end=False, **arguments)
        self._saved = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Gradients that are still being accumulated are in no checkpoint; and a run that resumes
        # behind an epoch's last batch, before its end, takes one step too many (Lightning 2.6.6):
        # the epoch's own checkpoint comes soon. Nor does a run that resumes before a validation
        # within the epoch make up for it (Lightning 2.6.6).
        if (
            (batch_idx + 1) % trainer.accumulate_grad_batches
            or trainer.is_last_batch
            or _validates_now(trainer)
        ):
            return
        due = time.monotonic() - self._saved >= SAVE_EVERY
        if trainer.world_size > 1:
            # All processes save together, by the first one's clock; asking in each step would make
            # them wait.
            due = batch_idx % 50 == 49 and bool(trainer.strategy.broadcast(due))
        if due:
            # Lightning writes a step's row after its callbacks: killed in between, a run would go
            # on without the row.
            trainer._logger_connector.update_train_step_metrics()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._saved = time.monotonic()


def _validates_now(trainer: pl.Trainer) -> bool:
    """Whether validation follows this batch. Not a public name of Lightning's; test_fit.py holds
    it.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


class Clock(Callback):
    """Training time, kept across resumes; ends the run when its minutes are used up.

    Unlike Trainer(max_time=...), whose stop looks like the end of an epoch to a resumed run,
    running out is final: `share` is then 1, and so is the schedule's progress.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self._before = 0.0  # seconds, of earlier starts of this run
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    @property
    def share(self) -> float:
        """Share of the minutes that is used; 0 where there is no limit."""
        return min(1.0, self.seconds / (60 * self.minutes)) if self.minutes else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()
        self._stop_when_used(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        self._stop_when_used(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before, self._since = self.seconds, None

    def _stop_when_used(self, trainer: pl.Trainer) -> None:
        # Processes read their clocks apart: all stop when the first one is through, or they wait
        # for each other.
        if self.minutes and trainer.strategy.reduce_boolean_decision(self.share >= 1, all=False):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict["seconds"]


class ProgressReport(Callback):
    """Reports how far the run is: a bar with the time left on a terminal, and a line per epoch.

    Lightning's own bars count an epoch's batches; a run that ends by the clock has no number of
    epochs, and in a log file they print nothing or too much.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._started, self._at, self._reported = 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._started = self._reported = time.monotonic()
        self._at = pl_module.progress(trainer.global_step)
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._bar.update(self._bar.add_task("training", total=1.0), completed=self._at)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        progress = pl_module.progress(trainer.global_step)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=progress)
        elif time.monotonic() - self._reported > 60:
            # an epoch may take an hour, and a log has to show progress
            self._line(f"{_epoch(trainer)}  {100 * progress:3.0f} %  {self._left(progress)}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Here, not at the end of validation: the epoch's own loss is known now.
        values = trainer.callback_metrics
        parts = [
            f"train loss {values['train/loss']:.3f}" if "train/loss" in values else "",
            f"val loss {values['val/loss']:.3f}  val accuracy {100 * values['val/acc1']:.2f} %"
            if "val/acc1" in values
            else "",
            self._left(pl_module.progress(trainer.global_step)),
        ]
        self._line("  ".join([_epoch(trainer), *filter(None, parts)]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        self._reported = time.monotonic()
        say(self.console, text)

    def _left(self, progress: float) -> str:
        elapsed, done = time.monotonic() - self._started, progress - self._at
        gone = f"{timedelta(seconds=round(elapsed))} gone"
        if done <= 0:
            return gone
        return f"{gone}, about {timedelta(seconds=round(elapsed * (1 - progress) / done))} left"


def _epoch(trainer: pl.Trainer) -> str:
    total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
    return f"epoch {trainer.current_epoch + 1}" + (f"/{total}" if total else "")
