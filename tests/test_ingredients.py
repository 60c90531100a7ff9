"""What makes short runs good: each option by itself against a plain computation, and all of them in
one run.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from test_fit import (
    arguments,
    data,  # noqa: F401
    free_port,
    resumed_are_the_same,
    saved_by_step,  # noqa: F401
    torchrun,
    two_processes_killed_and_resumed,
)
from test_task import CONFIG, Rates, trainer
from torch import nn

from xzoo import ExpanderConv2d, profile
from xzoo.cli import main
from xzoo.errors import ModelError, XzooError
from xzoo.hub import folder as model_folder
from xzoo.train import CIFAR10, EMA
from xzoo.train.distill import Teacher
from xzoo.train.fit import fit
from xzoo.train.run import read_metrics
from xzoo.train.steps import Lookahead, ham_
from xzoo.train.task import Classifier, rate

ALL_ON = """
# All ingredients on a tiny net and tiny data.
seed_everything: 0
model:
  name: x_mobilenet050_c4
  optimizer: sgd
  lr_base: 0.1
  momentum: 0.85
  weight_decay: 1.3e-3
  warmup_start: 0.2
  whiten: start
  identity_start: true
  fix_norm_scale: true
  norm_bias_lr: 8
  norm_momentum: 0.4
  lookahead: 2
  ham: 0.01
  grow_sizes: [20, 24]
data: {class_path: CIFAR10, init_args: {batch_size: 16, shift: 2, cutout: 4, flip: alternating}}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1, log_every_n_steps: 1}
"""
NET = {"name": "x_mobilenet050_c4", "num_classes": 10}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "all_on.yaml"
    path.write_text(ALL_ON)
    return str(path)


@pytest.fixture
def module(data):  # noqa: F811
    return CIFAR10(data, batch_size=16)


# ---- rates


def test_the_rise_begins_where_it_is_told():
    assert [rate(p, 0.2, start=0.25) for p in (0.0, 0.1, 0.2)] == pytest.approx([0.25, 0.625, 1.0])
    assert rate(0.05, 0.2, wait=0.1, start=0.25) == 0


def test_the_base_rate_is_for_256_images(module):
    rates = Rates()
    task = Classifier(**NET, lr_base=0.8, optimizer="sgd", warmup=0.0)
    trainer(max_epochs=1, callbacks=[rates], accumulate_grad_batches=2).fit(task, module)
    assert task.trainer.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(
        0.8 * 16 * 2 / 256
    )


def test_biases_of_norms_have_a_rate_of_their_own_and_their_scales_stay(module):
    task = Classifier(
        **NET, lr=0.01, optimizer="sgd", fix_norm_scale=True, norm_bias_lr=64, decay_all=True
    )
    scales = [m.weight.clone() for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    trainer(max_epochs=1).fit(task, module)
    norms = [m for m in task.modules() if isinstance(m, nn.BatchNorm2d)]
    of_norms, seen = {id(m.bias) for m in norms}, set()
    for group in task.trainer.optimizers[0].param_groups:
        for p in group["params"]:
            seen.add(id(p))
            assert group["initial_lr"] == pytest.approx(0.01 * (64 if id(p) in of_norms else 1))
            # As large a share of each weight goes in a step.
            assert group["initial_lr"] * group["weight_decay"] == pytest.approx(0.01 * 0.05)
    assert seen == {id(p) for p in task.net.parameters()} - {id(m.weight) for m in norms}
    assert all(torch.equal(m.weight, scale) for m, scale in zip(norms, scales, strict=True))


def test_the_momentum_of_norm_and_optimizer(module):
    task = Classifier(**NET, norm_momentum=0.4, momentum=0.85, optimizer="sgd")
    trainer(max_epochs=1).fit(task, module)
    assert {m.momentum for m in task.modules() if isinstance(m, nn.BatchNorm2d)} == {0.4}
    assert {group["momentum"] for group in task.trainer.optimizers[0].param_groups} == {0.85}


# ---- after a step


def test_lookahead_is_the_recursion_and_leaves_the_graph():
    net = ExpanderConv2d(8, 8, 1, degree=3).double()
    graph, draw = net.neighbours.clone(), np.random.default_rng(0)
    average = fast = net.weight.detach().numpy().copy()
    ahead = Lookahead(net, every=3)
    for step in range(1, 12):
        fast = fast + draw.normal(size=fast.shape)
        with torch.no_grad():
            net.weight.copy_(torch.from_numpy(fast))
        ahead.step(step, step / 11)
        if step % 3 == 0:
            kept = 0.95**3 * (step / 11) ** 3
            average = fast = kept * average + (1 - kept) * fast
    # the end: the average alone
    np.testing.assert_allclose(net.weight.detach().numpy(), average, rtol=1e-12)
    assert torch.equal(net.neighbours, graph)


def test_ham_is_its_formula():
    torch.manual_seed(0)
    weight, vector = (
        nn.Parameter(torch.randn(*size, dtype=torch.float64)) for size in ((5, 4), (5,))
    )
    before, unchanged = weight.detach().clone(), vector.detach().clone()
    ((weight**2).sum() + vector.sum()).backward()
    ham_(torch.optim.SGD([weight, vector], lr=0.01), 20.0)
    wanted = before * torch.exp(-0.01 * (20 * before.sign() * 2 * before + 1e-3))
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=0)
    assert torch.equal(vector, unchanged)


def test_fixed_scales_of_residual_networks_are_not_the_zeros_that_they_begin_with():
    net = Classifier("x_resnet18", 10, fix_norm_scale=True).net
    assert all((m.weight == 1).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_ham_is_refused_where_gradients_may_be_infinite():
    fp16 = SimpleNamespace(precision="16-mixed", callbacks=[])
    with pytest.raises(ModelError, match="ham=200 with precision=16-mixed"):
        Classifier(**NET, ham=200.0).check(fp16, None)


# ---- what training sees


def test_images_grow_and_their_work_is_counted(recipe, data, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    forward = Classifier.forward

    def spy(self, images):
        seen.append((self.training, images.shape[-1]))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", spy)
    result = fit(arguments(recipe, data, tmp_path / "run", model__grow_until=0.8)).facts
    trained = [side for training, side in seen if training]
    assert trained == [20] * 6 + [24] * 6 + [32] * 3  # of 15 steps
    assert {side for training, side in seen if not training} == {32}
    net = Classifier(**NET).net
    macs = [profile(net, (3, side, side)).macs for side in (20, 24, 32)]
    assert result["train_macs"] == pytest.approx(
        3 * 15 * 16 * (0.4 * macs[0] + 0.4 * macs[1] + 0.2 * macs[2]), abs=1
    )


def saved(net: nn.Module, place, names: list[str], **config) -> str:
    model_folder.save(net, place, names, CONFIG | config)
    return f"local-dir:{place}"


def test_a_teacher_sees_its_own_size_and_colors(tmp_path):
    own = {"input_size": (3, 24, 24), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    net = Classifier(**NET | {"num_classes": 3}).net.eval()
    name = saved(net, tmp_path / "t", ["ant", "bee", "fly"], **own)
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    images = (pixels - mean[:, None, None]) / std[:, None, None]
    shown = nn.functional.interpolate(pixels, (24, 24), mode="bilinear", antialias=True)
    shown = (shown - torch.tensor(own["mean"])[:, None, None]) / torch.tensor(own["std"])[
        :, None, None
    ]
    with torch.no_grad():
        logits = net(shown)
    for names in (["bee", "ant"], ["fly", "bee", "ant"]):  # some of its classes, and another order
        teacher = Teacher(name, names, mean.tolist(), std.tolist())
        wanted = logits[:, [["ant", "bee", "fly"].index(label) for label in names]]
        torch.testing.assert_close(teacher(images), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="'wasp' is none of the teacher's names"):
        Teacher(name, ["bee", "ant", "wasp"], mean.tolist(), std.tolist())
    # As many classes, all of other names: taken for the same ones.
    teacher = Teacher(name, ["Ameise", "Biene", "Fliege"], mean.tolist(), std.tolist())
    torch.testing.assert_close(teacher(images), logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ModelError,
        match="knows 3 classes, the data have 2, and 'wasp' is none of the teacher's names",
    ):
        Teacher(name, ["ant", "wasp"], mean.tolist(), std.tolist())


# ---- all together


@pytest.fixture
def everything(recipe, tmp_path):
    """The recipe, with a teacher too."""
    own = {"input_size": (3, 24, 24), "mean": (0.4,) * 3}
    name = saved(
        Classifier(**NET, seed=3).net, tmp_path / "teacher", [f"c{i}" for i in range(10)], **own
    )
    path = tmp_path / "everything.yaml"
    path.write_text(ALL_ON.replace("  ham: 0.01\n", f"  ham: 0.01\n  teacher: '{name}'\n"))
    return str(path)


def test_all_together_resumed_ends_with_the_same_bits(everything, data, tmp_path, saved_by_step):  # noqa: F811
    asked = arguments(everything, data, tmp_path / "run", trainer__max_epochs=2)
    resumed_are_the_same(asked, tmp_path / "run", saved_by_step, lambda n: [1, n - 3])


@pytest.mark.slow
def test_all_together_in_two_processes_killed_and_resumed_ends_with_the_same_bits(
    everything,
    data,  # noqa: F811
    tmp_path,
):
    """Batch statistics and their average among them."""
    two_processes_killed_and_resumed(everything, data, tmp_path)


@pytest.mark.slow
def test_all_together_in_two_processes_is_one(everything, data, tmp_path):  # noqa: F811
    """With frozen batch statistics, as without the ingredients."""
    frozen = {"model__freeze_norm": True, "model__lr_base": 0.1}
    fit(arguments(everything, data, tmp_path / "one", **frozen))
    asked = arguments(everything, data, tmp_path / "two", **frozen)
    child = torchrun(asked, "--nproc_per_node=2", f"--master_port={free_port()}")
    told = child.communicate()[1]
    assert child.returncode == 0, told
    first, second = (read_metrics(tmp_path / run / "metrics.csv") for run in ("one", "two"))
    assert len(first) == len(second) == 15
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "two")]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            "--model.optimizer muon",
            "optimizer=muon: it takes a compact weight [out, degree] for a matrix",
        ),
        (
            "--model.lookahead 5 --ema 0.9",
            "lookahead=5 beside EMA: two averages of the same weights",
        ),
        ("--model.lookahead -1", "lookahead=-1: use a number of steps, 0 for never"),
        ("--model.optimizer Muon", "optimizer=Muon: it takes a compact weight"),
        ("--model.norm_bias_lr 0", "norm_bias_lr=0.0: use a multiple of lr, over 0"),
        ("--model.norm_momentum 7", "norm_momentum=7.0: use over 0 and up to 1"),
        ("--model.lr_base -1", "lr_base=-1.0: use a rate over 0"),
        ("--model.teacher local-dir:/no/such", "Config file not found"),
        ("--model.name crossvit_9_240", "2 first convolutions"),
        ("--model.grow_sizes [40]", "grow_sizes: 40 pixels; use sides below those of the data, 32"),
        ("--model.grow_until 0", "grow_until=0.0: use a share of the run"),
        (
            "--model.name x_vgg16_c16 --model.grow_sizes [0]",
            "grow_sizes: 0 pixels; use sides below",
        ),
        ("--model.name densenetblur121d --model.grow_sizes [8]", "cannot take images of 8 pixels"),
        (
            "--model.name mixer_s16_224.no_such --model.pretrained true",
            "whiten and identity_start would overwrite",
        ),
        ("--model.pretrained true", "whiten and identity_start would overwrite trained weights"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(recipe, data, tmp_path, capsys, more, told):  # noqa: F811
    run = tmp_path / "run"
    assert main(["fit", *arguments(recipe, data, run), *more.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and len(error.splitlines()) == 1
    assert not run.exists()


def test_whitening_needs_images_in_memory(make_folder):
    from xzoo.data.photos import ImageModule
    from xzoo.data.scan import read

    photos = ImageModule(read(make_folder(each=12)), CONFIG, batch_size=8, workers=0)
    with pytest.raises(
        ModelError, match="whiten looks at training images, which ImageModule does not keep"
    ):
        trainer().fit(Classifier(**NET | {"num_classes": 2}, whiten="start"), photos)


def test_an_average_begins_with_the_whitened_weights(module):
    """EMA copies the module before it is whitened; its average is the first step's weights all the
    same.
    """
    task, copies = Classifier(**NET, whiten="fixed", optimizer="sgd", lr=0.1), EMA()
    trainer(max_epochs=1, callbacks=[copies]).fit(task, module)
    plain = Classifier(**NET, whiten="fixed", optimizer="sgd", lr=0.1)
    trainer(max_epochs=1).fit(plain, module)
    assert torch.equal(task.net.conv_stem.weight, plain.net.conv_stem.weight)


def test_a_fixed_first_convolution_stays(module):
    task = Classifier(**NET, whiten="fixed", optimizer="sgd", lr=0.1)
    weights = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            weights.append(task.net.conv_stem.weight.clone())

    trainer(callbacks=[Watch()]).fit(task, module)
    assert torch.equal(task.net.conv_stem.weight, weights[0])
    assert not torch.equal(weights[0], Classifier(**NET).net.conv_stem.weight)


def test_a_run_from_before_an_option_goes_on(recipe, data, tmp_path, capsys):  # noqa: F811
    """Its folder does not say what the option was: the default."""
    run = tmp_path / "run"
    asked = arguments(recipe, data, run, trainer__max_epochs=1)
    result = fit(asked).facts
    text = (run / "config.yaml").read_text()
    assert "  lr: 0.001\n" in text
    (run / "config.yaml").write_text(text.replace("  lr: 0.001\n", ""))
    assert fit(asked).facts == result
    (run / "config.yaml").write_text(text.replace("  lr: 0.001\n", "  lr: 0.002\n"))
    with pytest.raises(XzooError, match="model.lr is 0.002 there and 0.001 here"):
        fit(asked)
