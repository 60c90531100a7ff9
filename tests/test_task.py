"""The classifier on Lightning's Trainer: its schedule, its average of weights, and what must not go
on in silence.
"""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

from xzoo import ExpanderConv2d
from xzoo.data.augment import mixed
from xzoo.data.photos import ImageModule
from xzoo.data.scan import read
from xzoo.errors import ModelError, XzooError
from xzoo.hub import folder as model_folder
from xzoo.train.callbacks import (
    EMA,
    Clock,
    ProgressReport,
    SyncBatchNorm,
    refuse_unsafe_synchronising,
)
from xzoo.train.run import AtomicCheckpointIO
from xzoo.train.task import Classifier, rate

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}
TINY = {"name": "x_mobilenet050_c4", "num_classes": 2, "warmup": 0.1}


@pytest.fixture
def module(make_folder):
    return ImageModule(read(make_folder(each=12)), CONFIG, batch_size=8, workers=0)


def trainer(**arguments) -> pl.Trainer:
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        **(defaults | quiet | arguments),
    )


def test_rate_is_a_rise_and_a_cosine():
    assert [rate(p, 0.2) for p in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0, 0.5, 1, 0])
    assert rate(0.6, 0.2) == pytest.approx(0.5)
    assert rate(0.05, 0.1, wait=0.1) == 0 and rate(0.15, 0.1, wait=0.1) == pytest.approx(0.5)
    falling = [rate(0.2 + 0.008 * i, 0.2) for i in range(101)]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False)) and falling[
        -1
    ] == pytest.approx(0)


class Rates(pl.Callback):
    def __init__(self):
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_head_and_body_have_rates_of_their_own(module):
    task = Classifier(**TINY, lr=0.01, body_lr=0.1, head_first=0.5)
    rates = Rates()
    trainer(callbacks=[rates]).fit(task, module)
    groups = task.trainer.optimizers[0].param_groups
    head = {id(p) for p in task.head.parameters()}
    of_head = [all(id(p) in head for p in group["params"]) for group in groups]
    assert sum(of_head) == 2 and sum(len(g["params"]) for g in groups) == len(
        list(task.net.parameters())
    )
    # decayed are the matrices, X-layers' compact ones among them, and nothing else
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    steps = len(rates.seen)
    assert steps == 2 * module.batches_per_epoch()
    for step, seen in enumerate(rates.seen):  # Lightning steps the schedule before the callback
        for rate_, in_head in zip(seen, of_head, strict=True):
            progress = (step + 1) / steps
            assert rate_ == pytest.approx(
                0.01 * (rate(progress, 0.1) if in_head else 0.1 * rate(progress, 0.1, 0.5))
            )


def test_layer_decay_lowers_the_rate_from_the_head_down(module):
    task = Classifier(**TINY, lr=0.01, layer_decay=0.5)
    trainer(max_epochs=1).fit(task, module)
    first = {
        id(p): group["initial_lr"]
        for group in task.trainer.optimizers[0].param_groups
        for p in group["params"]
    }
    assert (
        first[id(task.net.conv_stem.weight)]
        < 1e-4
        < first[id(task.head.weight)]
        == pytest.approx(0.01)
    )


def test_freeze_trains_the_head_alone(module):
    task = Classifier(**TINY, freeze=True)
    before = {k: v.clone() for k, v in task.net.state_dict().items()}
    trainer(callbacks=[EMA()]).fit(task, module)
    changed = {k for k, v in task.net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_freeze_norm_keeps_the_statistics(module):
    task = Classifier(**TINY, freeze_norm=True)
    trainer(max_epochs=1).fit(task, module)
    norms = [m for m in task.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(int(m.num_batches_tracked) == 0 for m in norms)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_averages_weights_and_copies_indices(module, decay):
    task = Classifier(**TINY)
    layer = next(m for m in task.modules() if isinstance(m, ExpanderConv2d))
    neighbours = layer.neighbours.clone()
    trajectory: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trajectory.append(layer.weight.detach().clone())

    trainer(callbacks=[EMA(decay), Watch()]).fit(task, module)
    assert torch.equal(layer.neighbours, neighbours) and layer.neighbours.dtype == torch.int32
    wanted = trajectory[0]
    for t, weight in enumerate(trajectory[1:], start=1):
        wanted = wanted.lerp(weight, 1 - min(decay, (1 + t) / (10 + t)))
    # fit leaves the average in the module
    torch.testing.assert_close(layer.weight.detach(), wanted)
    assert int(task.net.bn1.num_batches_tracked) == len(trajectory)


def test_an_average_that_would_ruin_the_graph_is_refused(module):
    for callback in (EMAWeightAveraging(), WeightAveraging(use_buffers=True)):
        with pytest.raises(
            ModelError, match=r"would average the indices in net\.blocks.*use xzoo\.train\.EMA"
        ):
            trainer(callbacks=[callback]).fit(Classifier(**TINY), module)
    trainer(max_epochs=1, callbacks=[EMAWeightAveraging(use_buffers=False)]).fit(
        Classifier(**TINY), module
    )
    # A dense model has no indices: it keeps every choice.
    trainer(max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(
        Classifier(**TINY, model_kwargs={"compression": 1}), module
    )


def test_interrupted_in_validation_ema_hands_back_the_raw_weights(module):
    task, ema = Classifier(**TINY), EMA()
    raw = {}

    class Stop(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            raw.update({k: v.clone() for k, v in pl_module.state_dict().items()})

        def on_validation_batch_end(self, *args):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[Stop(), ema]).fit(task, module)
    assert all(torch.equal(v, raw[k]) for k, v in task.state_dict().items())
    assert any(
        not torch.equal(v, raw[k[7:]])
        for k, v in ema._average_model.state_dict().items()
        if k[:7] == "module."
    )


def test_a_loss_that_is_no_number_stops_the_run(module):
    task = Classifier(**TINY, lr=0.1)
    with torch.no_grad():
        task.head.weight.fill_(float("nan"))
    with pytest.raises(XzooError, match=r"the loss is nan at step 0: .* lower rate than lr=0\.1"):
        trainer().fit(task, module)


def test_a_step_is_a_function_of_seed_and_step(module):
    losses = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        task = Classifier(**TINY, seed=3, model_kwargs={"drop_rate": 0.5})
        torch.manual_seed(noise + 10)
        fit = trainer(max_epochs=1)
        fit.fit(task, module)
        losses.append(
            [float(fit.callback_metrics["train/loss"]), *task.head.weight.flatten().tolist()]
        )
    assert losses[0] == losses[1]


def test_checkpoints_load_with_weights_only(module, tmp_path):
    place = tmp_path / "checkpoints"
    saver = ModelCheckpoint(place, filename="last", enable_version_counter=False)
    task = Classifier(**TINY)
    run = {
        "enable_checkpointing": True,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [EMA(), Clock(), saver],
    }
    trainer(max_epochs=1, **run).fit(task, module)
    assert [file.name for file in place.iterdir()] == ["last.ckpt"]
    content = torch.load(place / "last.ckpt", weights_only=True)
    assert content["callbacks"]["Clock"]["seconds"] > 0
    loaded = Classifier.load_from_checkpoint(place / "last.ckpt", weights_only=True)
    assert all(torch.equal(v, task.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_the_clock_ends_a_run_and_is_kept(module):
    clock = Clock(minutes=1e-6)
    fit = trainer(max_epochs=-1, callbacks=[clock])
    fit.fit(Classifier(**TINY), module)
    assert fit.global_step <= 1 and clock.share == 1
    assert "val/acc1" in fit.callback_metrics or fit.global_step == 0
    later = Clock(minutes=1)
    later.load_state_dict(clock.state_dict())
    assert later.seconds == clock.seconds and later.share == pytest.approx(clock.seconds / 60)


def test_the_report_is_lines_where_there_is_no_terminal(module, capsys):
    trainer(callbacks=[ProgressReport()]).fit(Classifier(**TINY), module)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert (
        lines[0].startswith("epoch 1/2  train loss ")
        and "val accuracy" in lines[0]
        and "left" in lines[0]
    )


def test_without_a_data_module_the_schedule_says_what_it_needs(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's remarks on plain loaders
        with pytest.raises(XzooError, match="pass trainer.fit a data module"):
            trainer().fit(Classifier(**TINY), module.train_dataloader())


# ---- what the loss may be made of


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_a_mixed_batch_is_learnt_with_mixed_targets(mixup, cutmix):
    task = Classifier(**TINY, mixup=mixup, cutmix=cutmix, label_smoothing=0.1, seed=3).eval()
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 1, 0, 1])
    for number in range(4):
        x, partners, share = mixed(images, labels, mixup, cutmix, 3, 0, number)
        one, other = (torch.nn.functional.one_hot(y, 2) * 0.9 + 0.05 for y in (labels, partners))
        wanted = torch.nn.functional.cross_entropy(task(x), share * one + (1 - share) * other)
        torch.testing.assert_close(task._loss(images, labels, number), wanted)


@pytest.fixture
def teacher(tmp_path):
    """A model folder; its weights are drawn, which is knowledge enough."""
    net = Classifier(**TINY, seed=11).net
    model_folder.save(net, tmp_path / "teacher", ["ant", "bee"], CONFIG)
    return f"local-dir:{tmp_path / 'teacher'}", net.eval()


def test_a_teacher_is_learnt_from_and_stays_outside(module, teacher, tmp_path):
    name, net = teacher
    task = Classifier(**TINY, teacher=name, teacher_weight=0.25, temperature=3.0)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            images, labels = batch
            pl_module.eval()
            with torch.no_grad():
                logits, wanted = pl_module(images), (net(images) / 3).softmax(1)
                apart = (wanted * (wanted.log() - (logits / 3).log_softmax(1))).sum(1).mean() * 9
                expected = 0.75 * pl_module.loss(logits, labels) + 0.25 * apart
                torch.testing.assert_close(pl_module._loss(images, labels, batch_idx), expected)
            pl_module.train()

    copies = EMA()
    trainer(max_epochs=1, callbacks=[Look(), copies]).fit(task, module)
    task.trainer.save_checkpoint(tmp_path / "t.ckpt")
    names = set(torch.load(tmp_path / "t.ckpt", weights_only=True)["state_dict"])
    assert names == set(Classifier(**TINY).state_dict())
    assert task._teacher is None and copies._average_model.module._teacher is None


def test_a_teacher_that_cannot_teach_is_refused(module, teacher, tmp_path):
    name, _ = teacher
    model_folder.save(
        Classifier(**TINY | {"num_classes": 3}).net,
        tmp_path / "other",
        ["ant", "fly", "wasp"],
        CONFIG,
    )
    with pytest.raises(
        ModelError,
        match="knows 3 classes, the data have 2, and 'bee' is none of the teacher's names",
    ):
        trainer().fit(Classifier(**TINY, teacher=f"local-dir:{tmp_path / 'other'}"), module)
    with pytest.raises(ModelError, match="x_mobilenet050_c4 has no trained weights"):
        trainer().fit(Classifier(**TINY, teacher="x_mobilenet050_c4"), module)
    with pytest.raises(ModelError, match="local-dir:/no/such: Config file not found"):
        trainer().fit(Classifier(**TINY, teacher="local-dir:/no/such"), module)
    with pytest.raises(ModelError, match=r"teacher_weight=1.5, temperature=2: a share of the loss"):
        Classifier(**TINY, teacher=name, teacher_weight=1.5)


def test_compiled_and_channels_last_is_the_same_network_under_the_same_names(module, monkeypatch):
    # The compiler itself takes a minute; what is ours is that it is asked, in place.
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self))
    plain = Classifier(**TINY)
    task = Classifier(**TINY, compile=True, channels_last=True)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(task.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    assert task.net.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    trainer(max_epochs=1).fit(task.train(), module)
    assert asked == [task.net]
    assert set(task.state_dict()) == set(plain.state_dict())


# ---- several devices


def test_the_graph_is_not_sent_with_every_step(module):
    task = Classifier(**TINY)
    ignored = task._ddp_params_and_buffers_to_ignore
    names = [name for name, part in task.named_modules() if isinstance(part, ExpanderConv2d)]
    assert ignored == [f"{name}.neighbours" for name in names] and len(names) == 12
    # Of all that DDP sends it is the largest: int32 indices against running means and variances.
    sent = sum(b.numel() for name, b in task.named_buffers() if name not in ignored)
    assert sum(task.get_buffer(name).numel() for name in ignored) > sent


def test_graphs_that_differ_stop_the_run(module, monkeypatch):
    fit = trainer(max_epochs=1)
    monkeypatch.setattr(fit.strategy, "broadcast", lambda mine: "another")
    with pytest.raises(XzooError, match="the graphs of the processes differ"):
        fit.fit(Classifier(**TINY), module)


def test_synchronised_norms_keep_their_activations_and_come_back():
    # on a CPU they do not train, but what they compute can be seen
    task = Classifier(**TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    before, kinds = task(images), [type(part) for part in task.modules()]
    sync = SyncBatchNorm()
    changed = sync.apply(task)
    assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in changed.modules())
    torch.testing.assert_close(changed(images), before)
    with torch.no_grad():
        changed.net.bn1.weight.mul_(2)  # as training does
    back = sync.revert(changed)
    assert [type(part) for part in back.modules()] == kinds
    assert torch.equal(back(images), task(images)) and not torch.equal(back(images), before)


def test_the_converter_that_drops_activations_is_refused(module):
    fit = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        sync_batchnorm=True,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(
        ModelError, match=r"would drop the activation inside net\.bn1; .*SyncBatchNorm"
    ):
        refuse_unsafe_synchronising(fit, Classifier(**TINY))
    fit.strategy._layer_sync = SyncBatchNorm()
    refuse_unsafe_synchronising(fit, Classifier(**TINY))
