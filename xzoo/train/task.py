"""The classifier that Lightning trains, for `xzoo finetune` and every recipe alike.

What a step does depends on its position (step, share of the run) and on nothing that a resume
could lose: the rate is a pure function of progress, and each batch reseeds torch from (seed, step,
rank).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import cos, isfinite, pi
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ..data.augment import mixed
from ..data.module import DataModule
from ..data.order import STEP, key, steps_of_epoch
from ..errors import ModelError, XzooError, first_line
from ..layers import ExpanderConv2d, ExpanderLinear
from ..models import create_model
from ..norms import fuse, unfuse
from . import start
from .callbacks import Clock, refuse_unsafe_averaging, refuse_unsafe_synchronising
from .distill import Teacher, distilled
from .steps import Lookahead, ham_


def rate(
    progress: float,
    warmup: float,
    wait: float = 0.0,
    schedule: str = "cosine",
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    floor: float = 0.0,
    start: float = 0.0,
) -> float:
    """Share of the peak rate at `progress` of the run: nothing, a linear rise, then down by the
    schedule.

    Args:
        progress, warmup, wait: shares of the run, 0 to 1: where it is, how long it rises, how long
            it waits.
        start: where the rise begins, as a share of the peak.
        schedule: "cosine" or "linear", to zero at the end; "step", times gamma at each of the
            milestones (shares of the run), and never below floor (a share of the peak).
    """
    if progress < wait:
        return 0.0
    if progress < wait + warmup:
        return start + (1 - start) * (progress - wait) / warmup
    if schedule == "step":
        # A hair of tolerance: a milestone is a step, and steps / steps is not always the decimal
        # that was meant.
        return max(floor, gamma ** sum(progress >= milestone - 1e-9 for milestone in milestones))
    fallen = min(1.0, (progress - wait - warmup) / max(1e-9, 1 - wait - warmup))
    return 1 - fallen if schedule == "linear" else 0.5 + 0.5 * cos(pi * fallen)


def sides(full: int, first: Sequence[int] | None, until: float) -> list[tuple[int, float]]:
    """Sides of the images that training shows one after the other, in pixels, each with its share
    of the run.

    Args: full: of the data; first, until: a Classifier's grow_sizes and grow_until.
    """
    first = first or ()
    smaller = [(side, until / len(first)) for side in first]
    return [*smaller, (full, 1 - until if first else 1.0)]


def network_arguments(options: Any) -> dict[str, Any]:
    """What a Classifier's options pass on to `create_model`: model_kwargs, and those of an X-Net
    that are given.
    """
    drawn = {name: options[name] for name in ("compression", "share", "spatial_share", "graph")}
    drawn["seed"] = options["graph_seed"]
    given = {name: value for name, value in drawn.items() if value is not None}
    return (options["model_kwargs"] or {}) | given


class Classifier(pl.LightningModule):
    """A timm or xzoo model, its loss, optimizer and schedule.

    Shape: images float32 [B, C, H, W] -> logits [B, num_classes]. Logs train/loss, val/loss,
    val/acc1, val/acc5.

    Args:
        name: of a model that `xzoo.create_model` knows, built with `model_kwargs` (builtins only:
            they are in the checkpoint, which has to load with weights_only=True).
        compression, share, spatial_share, graph, graph_seed: of an X-Net, where they are not those
            of its name: compression=1 is the dense twin, graph="group" a rival.
        optimizer: any name of `timm.optim` ("sgd" has Nesterov's momentum, "momentum" the plain
            one); lr is its peak rate. muon is refused for X-layers: it takes the columns of a
            compact weight for inputs. adafactor and kron do so too, in what they remember of
            gradients.
        lr_base: the peak rate for a batch of 256 images, in place of lr (timm's word): the rate is
            in proportion to the batch, and with it what SGD's weight decay takes from a weight in
            an epoch.
        momentum: of the optimizers that have one.
        decay_all: decay norms and biases too, as the authors did; else, as timm does, weights
            alone.
        schedule, milestones, gamma, floor: how the rate falls; see `rate`.
        warmup: share of the run in which the rate rises.
        warmup_start: share of the peak rate at which that begins.
        body_lr: rate of everything but the head, as a multiple of lr.
        head_first: share of the run in which only the head moves.
        layer_decay: factor on the rate from each layer to the one before it (timm's grouping of
            layers).
        whiten: initial values of the first convolution from 5,000 training images (see
            `start.whiten`): "start" to train on from there, "fixed" to keep its weight as it is.
        identity_start: initial values that pass channels on (see `start.identity_start`).
        fix_norm_scale: batch norm's scales stay 1, or what they are in a pretrained network; its
            biases learn.
        norm_bias_lr: rate of batch norm's biases, as a multiple of what it would be without this.
            (Of all three: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv
            2404.00498.)
        norm_momentum: batch norm's own; None for what the network has. Short runs want more than
            torch's 0.1.
        lookahead: average the weights every so many steps and go on from there, 0 for never; see
            `Lookahead`.
        ham: strength of sign-aware shrinking after each step, 0 for none; see `ham_`.
        grow_sizes: sides of the images that training shows first, in pixels, in equal parts of the
            run up to grow_until (a share of it); then those of the data. (Howard 2018, fast.ai's
            progressive resizing.)
        mixup, cutmix: alpha of each, 0 for none; see `augment.mixed`.
        teacher: a trained model that knows the same classes, by timm's name (local-dir:FOLDER and
            hf-hub:NAME too), whose logits are learnt from as well; see `distill.Teacher`.
        teacher_weight: share of that in the loss.
        temperature: by which both logits are divided for it.
        compile: torch.compile the network for the fit, in place, so that no name changes.
        channels_last: memory format of the network and its images.
        freeze: train the head alone; the rest stays as it is, batch norm's statistics included.
        freeze_norm: batch norm keeps its statistics; for batches too small to estimate them.
    Raises: ModelError for a model that cannot be built; XzooError when the loss is no longer a
    number.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        compression: int | None = None,
        share: int | None = None,
        spatial_share: int | None = None,
        graph: str | None = None,
        graph_seed: int | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_base: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.05,
        decay_all: bool = False,
        label_smoothing: float = 0.1,
        whiten: Literal["start", "fixed"] | None = None,
        identity_start: bool = False,
        fix_norm_scale: bool = False,
        norm_bias_lr: float = 1.0,
        norm_momentum: float | None = None,
        lookahead: int = 0,
        ham: float = 0.0,
        grow_sizes: list[int] | None = None,
        grow_until: float = 0.5,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        temperature: float = 2.0,
        schedule: Literal["cosine", "linear", "step"] = "cosine",
        milestones: list[float] | None = None,
        gamma: float = 0.1,
        floor: float = 0.0,
        warmup: float = 0.1,
        warmup_start: float = 0.0,
        body_lr: float = 1.0,
        head_first: float = 0.0,
        layer_decay: float | None = None,
        freeze: bool = False,
        freeze_norm: bool = False,
        compile: bool = False,
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 <= teacher_weight <= 1 or temperature <= 0:
            raise ModelError(
                f"teacher_weight={teacher_weight:g}, temperature={temperature:g}: a share of the "
                "loss, and above 0"
            )
        for option, value, right, allowed in (
            ("lr_base", lr_base, lr_base is None or lr_base > 0, "a rate over 0"),
            ("momentum", momentum, 0 <= momentum < 1, "from 0 on and below 1"),
            ("warmup_start", warmup_start, 0 <= warmup_start <= 1, "a share of the peak, 0 to 1"),
            ("norm_bias_lr", norm_bias_lr, norm_bias_lr > 0, "a multiple of lr, over 0"),
            (
                "norm_momentum",
                norm_momentum,
                norm_momentum is None or 0 < norm_momentum <= 1,
                "over 0 and up to 1",
            ),
            ("lookahead", lookahead, lookahead >= 0, "a number of steps, 0 for never"),
            ("ham", ham, ham >= 0, "a strength, 0 for none"),
            (
                "grow_until",
                grow_until,
                0 < grow_until <= 1,
                "a share of the run, over 0 and up to 1",
            ),
        ):
            if not right:
                raise ModelError(f"{option}={value}: use {allowed}")
        if pretrained and (whiten or identity_start):
            raise ModelError(
                "whiten and identity_start would overwrite trained weights: leave them out, or use "
                "pretrained=False"
            )
        arguments = {"num_classes": num_classes} | network_arguments(self.hparams)
        # The weights are a function of the seed too, and of nothing drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key(seed, 0, STEP, 0))
            self.net = create_model(name, pretrained=pretrained, **arguments)
        self.head = cast(Any, self.net).get_classifier()
        if not isinstance(self.head, nn.Module) or not list(self.head.parameters()):
            raise ModelError(
                f"{name} has no single classifier layer to train; choose another model"
            )
        sparse = any(
            isinstance(part, ExpanderConv2d | ExpanderLinear) for part in self.net.modules()
        )
        if sparse and "muon" in optimizer.lower():
            raise ModelError(
                f"optimizer={optimizer}: it takes a compact weight [out, degree] for a matrix, but "
                "its columns are other inputs in each row, so its steps would depend on their "
                "order; use sgd or a dense network"
            )
        if identity_start:
            start.identity_start(self.net)
        if whiten:
            start.first_convolution(self.net, cast(Any, self.net).in_chans).weight.requires_grad_(
                whiten == "start"
            )
        for part in self._norms():
            part.momentum = part.momentum if norm_momentum is None else norm_momentum
            if fix_norm_scale and part.affine:
                if not pretrained:
                    # timm's residual networks begin with zeros, for good then
                    nn.init.ones_(part.weight)
                part.weight.requires_grad_(False)
        if freeze:
            self.net.requires_grad_(False)
            self.head.requires_grad_(True)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self._teacher: Teacher | None = None
        self._lookahead: Lookahead | None = None
        self._average: dict[str, Tensor] = {}  # of a checkpoint, until the fit begins
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        # torchmetrics' default average, "macro", is not top-1 accuracy.
        accuracy = partial(MulticlassAccuracy, num_classes=num_classes, average="micro")
        # The graph is equal on all ranks, as `on_fit_start` checks; DDP would send it with every
        # step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in self.named_buffers() if name.endswith(".neighbours")
        ]
        self.acc1, self.acc5 = accuracy(top_k=1), accuracy(top_k=min(5, num_classes))
        # by default it leaves out what is not a number
        self.mean_loss = MeanMetric(nan_strategy="disable")

    def forward(self, images: Tensor) -> Tensor:
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.hparams["freeze"]:
            self.net.eval()
            self.head.train(mode)
        if self.hparams["freeze_norm"]:
            for part in self._norms():
                part.eval()
        return self

    def _norms(self) -> list[_BatchNorm]:
        return [part for part in self.net.modules() if isinstance(part, _BatchNorm)]

    # ---- how far the run is

    def progress(self, step: int) -> float:
        """Share of the run after `step` optimizer steps, 0 to 1: by steps or by the clock,
        whichever is further.
        """
        trainer = self.trainer
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        by_clock = max((c.share for c in callbacks if isinstance(c, Clock)), default=0.0)
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return by_clock
        # Never trainer.estimated_stepping_batches: it builds the loaders before the loop is
        # restored, and the run then starts again at the first batch (Lightning's issue 20550).
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise XzooError(
                "the schedule needs the number of steps: pass trainer.fit a data module of "
                "xzoo.train"
            )
        steps = trainer.max_epochs * -(
            -steps_of_epoch(trainer, data) // trainer.accumulate_grad_batches
        )
        return min(1.0, max(step / steps, by_clock))

    @property
    def peak(self) -> float:
        """The peak rate."""
        if self.hparams["lr_base"] is None:
            return self.hparams["lr"]
        trainer: Any = self.trainer
        return (
            self.hparams["lr_base"]
            * trainer.datamodule.batch_size
            * trainer.accumulate_grad_batches
            / 256
        )

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = create_optimizer_v2(
            self.net,
            hp["optimizer"],
            lr=self.peak,
            momentum=hp["momentum"],
            weight_decay=hp["weight_decay"],
            param_group_fn=self._groups,
        )
        rates = [self._rate_of(group["wait"]) for group in optimizer.param_groups]
        # LambdaLR over pure functions: it stores nothing that could be stale after a resume.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_of(self, wait: float) -> Callable[[int], float]:
        hp = self.hparams
        return lambda step: rate(
            self.progress(step),
            warmup=hp["warmup"],
            wait=wait,
            schedule=hp["schedule"],
            milestones=hp["milestones"] or (),
            gamma=hp["gamma"],
            floor=hp["floor"],
            start=hp["warmup_start"],
        )

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """timm's groups (no decay for vectors), each with its own rate, and the head apart from the
        body.
        """
        hp, weight_decay = self.hparams, self.hparams["weight_decay"]
        # timm asks for these itself only where it makes the groups: position embeddings and the
        # like.
        spared: set[str] = getattr(model, "no_weight_decay", set)()
        if hp["decay_all"]:
            learned = [p for p in model.parameters() if p.requires_grad]
            groups: Any = [{"params": learned, "weight_decay": weight_decay}]
        elif hp["layer_decay"] is None:
            groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
        else:
            groups = param_groups_layer_decay(
                model, weight_decay, spared, layer_decay=hp["layer_decay"]
            )
        part_of = dict.fromkeys(map(id, self.head.parameters()), "head")
        if hp["norm_bias_lr"] != 1:
            part_of |= {id(norm.bias): "norm biases" for norm in self._norms()}
        split = []
        for group, name in product(groups, ("body", "head", "norm biases")):
            params = [p for p in group["params"] if part_of.get(id(p), "body") == name]
            if not params:
                continue
            scale = group.get("lr_scale", 1.0) * (1.0 if name == "head" else hp["body_lr"])
            part = group | {"params": params, "wait": 0.0 if name == "head" else hp["head_first"]}
            if name == "norm biases":
                scale *= hp["norm_bias_lr"]
                # A step takes rate * decay of a parameter: as much of these as of the others.
                part["weight_decay"] = group["weight_decay"] / hp["norm_bias_lr"]
            split.append(part | {"lr": self.peak * scale})
        return split

    # ---- steps

    def setup(self, stage: str) -> None:
        if stage == "fit":
            refuse_unsafe_averaging(self.trainer, self)
            refuse_unsafe_synchronising(self.trainer, self)
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.check(self.trainer, data)
            if self.hparams["whiten"] and self.trainer.ckpt_path is None:
                start.whiten(self.net, data.sample(5000))

    def check(self, trainer: pl.Trainer, data: DataModule) -> None:
        """Raise ModelError where options do not fit the trainer's callbacks or the data module."""
        hp = self.hparams
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and hp["lookahead"]:
                raise ModelError(
                    f"lookahead={hp['lookahead']} beside {type(callback).__name__}: two averages "
                    "of the same weights; leave out one of them (ema: null, or lookahead: 0)"
                )
        if hp["ham"] and str(trainer.precision) == "16-mixed":
            raise ModelError(
                f"ham={hp['ham']:g} with precision=16-mixed: gradients may be infinite there; use "
                "bf16-mixed"
            )
        if hp["whiten"] and not data.has_sample:
            raise ModelError(
                f"whiten looks at training images, which {type(data).__name__} does not keep in "
                "memory; use CIFAR10, CIFAR100 or TinyImageNet, or leave it out"
            )
        for side in hp["grow_sizes"] or ():
            channels, _, full = data.input_size
            if not 0 < side < full:
                raise ModelError(
                    f"grow_sizes: {side} pixels; use sides below those of the data, {full}"
                )
            before = self.net.training
            try:
                with torch.no_grad():
                    self.net.eval()(torch.zeros(1, channels, side, side, device=self.device))
            except Exception as error:
                raise ModelError(
                    f"grow_sizes: {hp['name']} cannot take images of {side} pixels "
                    f"({first_line(error)}); use larger ones"
                ) from error
            finally:
                self.net.train(before)

    def make_teacher(self, data: DataModule) -> Teacher | None:
        """The teacher that the options name, for the student's images; ModelError where it cannot
        teach.
        """
        teacher = self.hparams["teacher"]
        if not (teacher and self.hparams["teacher_weight"]):
            return None
        return Teacher(teacher, data.class_names, data.mean, data.std)

    def on_fit_start(self) -> None:
        # All ranks compute on one graph, or their gradients belong to different layers.
        names = self._ddp_params_and_buffers_to_ignore
        graphs = [self.get_buffer(name).cpu().numpy().tobytes() for name in names]
        mine = hashlib.sha256(b"".join(graphs)).hexdigest()
        equal = mine == self.trainer.strategy.broadcast(mine)
        if not self.trainer.strategy.reduce_boolean_decision(equal, all=True):
            raise XzooError(
                "the graphs of the processes differ; give all of them the same model, seed and "
                "checkpoint"
            )
        hp = self.hparams
        # Here, after the callbacks' setup: EMA has copied the module by then, without teacher and
        # compiled code.
        if teacher := self.make_teacher(self.trainer.datamodule):  # type: ignore[attr-defined]
            self._teacher = teacher.to(self.device)
        if hp["lookahead"]:
            self._lookahead = Lookahead(self.net, hp["lookahead"])
            self._lookahead.load(self._average)
            self._average = {}
        if hp["compile"]:
            self.net.compile()
        elif self.device.type == "cpu":
            fuse(self.net)

    def on_fit_end(self) -> None:
        unfuse(self.net)
        self._teacher, self._lookahead = None, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._lookahead:
            checkpoint["lookahead"] = self._lookahead.average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._average = checkpoint.get("lookahead", {})

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        # Here and not in a hook of the batch's end, where checkpoints are written first.
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.hparams["ham"]:
            ham_(optimizer, self.hparams["ham"])
        if self._lookahead:
            step = self.global_step + 1
            self._lookahead.step(step, self.progress(step))

    def on_validation_epoch_start(self) -> None:
        # Under DDP each rank has seen another part of the last batch. The first one's statistics
        # are taken, which DDP sends to the others with every step in any case: their mean over the
        # ranks would be lost in a resume.
        if self.trainer.world_size > 1:
            distribute_bn(self.net, self.trainer.world_size, reduce=False)

    def on_train_start(self) -> None:
        # Lightning leaves modes as it finds them, and a module is born in train mode without a call
        # of train().
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Lightning saves no random state, and gives every rank the same one. The epoch hooks are
        # not called when a run resumes within an epoch, so it is done here.
        seed = key(
            self.hparams["seed"],
            0,
            STEP,
            self.global_step * self.trainer.world_size + self.global_rank,
        )
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss, step = self._loss(images, labels, batch_idx), self.global_step
        # Only where Lightning writes it down: reading the loss waits for the device.
        if (step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # The mean over all ranks, so that all of them stop at a NaN of one, or the others
            # would hang.
            mean = float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
            if not isfinite(mean):
                raise XzooError(
                    f"the loss is {mean} at step {step}: training has diverged; use a lower rate "
                    f"than lr={self.peak:g} (and another --out)"
                )
            self.log("train/loss", mean, batch_size=len(labels))
            self.log("lr", self.peak * self._rate_of(0.0)(step), batch_size=len(labels))
        return loss

    def _loss(self, images: Tensor, labels: Tensor, batch_idx: int) -> Tensor:
        hp = self.hparams
        place = hp["seed"], self.current_epoch, batch_idx
        images, partners, share = mixed(images, labels, hp["mixup"], hp["cutmix"], *place)
        logits = self(self._shrunk(images))
        loss = self.loss(logits, labels)
        if share < 1:
            loss = share * loss + (1 - share) * self.loss(logits, partners)
        if self._teacher:
            loss = loss.lerp(
                distilled(logits, self._teacher(images), hp["temperature"]), hp["teacher_weight"]
            )
        return loss

    def _shrunk(self, images: Tensor) -> Tensor:
        """The images in the size of this part of the run."""
        if not self.hparams["grow_sizes"]:
            return images
        progress, full = self.progress(self.global_step), images.shape[-1]
        for side, share in sides(full, self.hparams["grow_sizes"], self.hparams["grow_until"]):
            progress -= share
            if progress < 0 and side < full:
                return nn.functional.interpolate(
                    images, (side, side), mode="bilinear", antialias=True, align_corners=False
                )
        return images

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        images, labels = batch
        logits = self(images)
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        # without smoothing, to compare over runs
        loss = nn.functional.cross_entropy(logits, labels)
        # Not the number itself: Lightning divides its sum over the ranks by a number of images
        # rounded down.
        self.mean_loss(loss, len(labels))
        metrics = {"loss": self.mean_loss, "acc1": self.acc1, "acc5": self.acc5}
        for name, metric in metrics.items():
            self.log(f"{part}/{name}", metric, batch_size=len(labels))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes] and labels [B] of the images, in float32 on the CPU."""
        images, labels = batch
        return self(images).float().cpu(), labels.cpu()
