"""`deploy`: the same outputs but for rounding, fewer modules, and a model of the caller's that
nobody touched.
"""

import dataclasses
import logging
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from test_convert import FAMILIES
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import xzoo
from xzoo.deploy import Proof, _fold_norms, _fuse_activations, deploy
from xzoo.errors import ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear


def trained(name: str, **arguments: object) -> nn.Module:
    """A model whose norms have statistics, as after a training."""
    torch.manual_seed(0)
    return settled(timm.create_model(name, num_classes=7, **arguments))


def settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("x_resnet18", 64, 0),
        ("x_mobilenet050_c4", 64, 0),
        ("x_vgg16_c16", 32, 0),
        # its norms stand before the layers: only bottlenecks have one behind
        ("x_densenetbc_40_24", 32, 21),
        ("resnet18", 64, 0),
    ],
)
def test_outputs_are_the_same_but_for_rounding(name, size, left):
    model, x = trained(name), torch.randn(3, 3, size, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = deploy(model, x)
    with torch.no_grad():
        exact = model.double()(x.double())
        model.float()
        allowed = 4 * (model(x) - exact).abs().max() + 1e-6
        assert (fast(x) - exact).abs().max() <= allowed
    assert norms(fast) == left < norms(model) and not any(
        p.requires_grad for p in fast.parameters()
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (
        fast.num_classes == 7 and fast.forward_features(x).shape == model.forward_features(x).shape
    )


def test_what_it_did_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="xzoo.deploy"):
        deploy(trained("x_mobilenet050_c4"), torch.zeros(1, 3, 32, 32))
    assert "27 of 27 norms folded, 12 activations fused; " in caplog.text
    assert (
        "times as fast as the other" in caplog.text
        and "of 12 X-layers are faster dense" in caplog.text
    )


class Shared(nn.Module):
    """Layers that must not be folded: called twice, read by two, tied, without statistics; and one
    that may.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm1, self.norm2 = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
        )
        self.read, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.tied, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.tied.weight
        self.free, self.norm5 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.last, self.norm6 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.twice(x)) + self.norm2(self.twice(x))
        y = self.read(x)
        x = self.norm3(y) + y
        x = self.other(self.norm4(self.tied(x)))
        return self.norm6(self.last(self.norm5(self.free(x))))


def test_what_is_used_elsewhere_too_stays():
    model, x = Shared().eval(), torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        for norm in (model.norm1, model.norm2, model.norm3, model.norm4, model.norm6):
            nn.init.uniform_(norm.running_mean)
        before = model(x)
        assert _fold_norms(Proof(model, x)) == 1 and isinstance(model.norm6, nn.Identity)
        torch.testing.assert_close(model(x), before)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_what_cannot_be_traced_stays_and_is_told(caplog):
    model = Branching().eval()
    assert (
        _fold_norms(Proof(model, torch.ones(1, 3, 2, 2))) == 0
        and "torch.fx cannot trace the model" in caplog.text
        and norms(model) == 1
    )


def test_an_example_that_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"does not run on an example of \[1, 4, 32, 32\]"):
        xzoo.deploy(trained("x_vgg16_c16"), torch.zeros(1, 4, 32, 32))


def test_a_deployed_model_finds_the_faster_format(monkeypatch):
    model = trained("x_vgg16_c16")
    # The clock decides; here it is one that dislikes contiguous weights.
    module = sys.modules["xzoo.deploy"]  # the package's name for it is the function
    dislikes = lambda net, x: (  # noqa: E731
        isinstance(net, nn.Module) and float(net.features[0].weight.is_contiguous()) + 1
    )
    monkeypatch.setattr(module, "_seconds", dislikes)
    fast = deploy(model, torch.zeros(1, 3, 32, 32))
    assert fast.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fast.features[3].weight.is_contiguous()  # an X-layer's is one


def activations(model: nn.Module) -> list[str]:
    return [
        part.activation
        for part in model.modules()
        if isinstance(part, ExpanderConv2d | ExpanderLinear)
    ]


@pytest.mark.parametrize(
    ("name", "activation", "others"),
    [("x_vgg16_c16", "relu", 0), ("x_mobilenet050_c4", "relu6", 0), ("x_resnet18", "relu", 8)],
)
def test_activations_that_follow_are_fused(name, activation, others):
    model = trained(name)
    x = torch.randn(2, 3, 32, 32)
    _fold_norms(Proof(model, x))
    with torch.no_grad():
        before = model(x)
        done = _fuse_activations(Proof(model, x))
        torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
        found = activations(model)
        assert found.count(activation) == done > 0 and found.count("") == others
        # What a user may still do with it.
        torch.testing.assert_close(
            torch.export.export(model, (x,)).module()(x), before, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(xzoo.to_dense(model)(x), before, rtol=1e-4, atol=1e-4)
    assert not activations(model)


class Followed(nn.Module):
    """Activations that must stay: used twice, after a result that others read, watched; and one
    that need not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ExpanderConv2d(4, 4, 1, degree=2, seed=i) for i in range(5)])
        self.twice, self.read, self.watched, self.free = nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.watched.register_forward_hook(lambda part, args, y: y + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.layers[1](self.twice(self.layers[0](x))))
        y = self.layers[2](x)
        x = self.read(y) - y
        return self.free(self.layers[4](self.watched(self.layers[3](x))))


def test_activations_that_are_used_elsewhere_too_stay():
    model, x = Followed().eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        before = model(x)
        assert _fuse_activations(Proof(model, x)) == 1 and activations(model) == [
            "",
            "",
            "",
            "",
            "relu",
        ]
        torch.testing.assert_close(model(x), before)


def test_a_layer_that_is_faster_dense_becomes_dense(monkeypatch):
    # The clock decides; here it is one that likes one dense layer, and dislikes all the others.
    def seconds(model, names, example):
        return {
            n: float(isinstance(model.get_submodule(n), ExpanderConv2d) is (n == "features.7"))
            for n in names
        }

    monkeypatch.setattr(sys.modules["xzoo.deploy"], "_seconds_of", seconds)
    model, x = trained("x_vgg16_c16"), torch.randn(1, 3, 32, 32)
    fast = deploy(model, x)
    kinds = {
        name: type(part).__name__
        for name, part in fast.named_modules()
        if name.startswith("features.")
    }
    assert [kinds[f"features.{i}"] for i in (3, 7, 10)] == [
        "ExpanderConv2d",
        "Sequential",
        "ExpanderConv2d",
    ]
    assert [type(part) for part in fast.features[7]] == [nn.Conv2d, nn.ReLU]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


# What may not be folded: each model's outputs stay its own, and it keeps this many norms.


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class LoRALinear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.clamp(-0.3, 0.3))


class BatchStatistics(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class StaysInTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class Tied(nn.Module):
    """A decoder that reads the weight of the encoder."""

    def __init__(self, encoder, decode):
        super().__init__()
        self.encoder, self.norm, self.decode = encoder, nn.BatchNorm2d(16), decode

    def forward(self, x):
        return self.decode(self, self.norm(self.encoder(x)))


class Chain(nn.Module):
    """conv, norm, and what a case does between, before or after them. x [B, 8, 6, 6]."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        for name, part in parts.items():
            setattr(self, name, part)
        self.do = forward

    def forward(self, x):
        return self.do(self, x)


class Masked(Chain):
    def forward(self, x, mask=None):
        return super().forward(x) if mask is None else self.conv(x) * mask


class FusedByHand(nn.Module):
    """Reads all of its norm, as code does that folds by itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        y = F.conv2d(x, self.conv.weight * scale[:, None, None, None]) * 0.5
        return y + self.norm(self.conv(x))


class Hidden(nn.Module):
    """What no trace and no source tells: a list of its own holds the layer a second time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.free, self.last = (
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        )
        self.all = [self.conv]

    def forward(self, x):
        y = self.last(self.free(self.norm(self.conv(x))))
        for part in self.all:
            y = y + part._parameters["weight"].sum()
        return y


def decode_conv(model, y):
    return F.conv_transpose2d(y, model.encoder.weight)


def decode_x(model, y):
    return y + model.encoder.weight.mean()


def with_statistics(model, x):
    return model.norm(model.conv(x)) * model.norm.running_var.sqrt().mean()


def shared_norm(model, x):
    return model.norm(model.conv(model.norm(model.conv2(x))))


def patched(part, change):
    forward = part.forward
    part.forward = lambda x: change(forward(x))
    return part


def tied_x_layers():
    model = nn.Sequential(
        *(ExpanderConv2d(8, 8, 1, degree=4), nn.BatchNorm2d(8), ExpanderConv2d(8, 8, 1, degree=4))
    )
    model[2].weight = model[0].weight
    return model


def hooked(model):
    model[0].register_forward_hook(lambda part, args, y: y.abs())
    return model


def sequence(linear, norm):
    return nn.Sequential(linear, norm)


X_LINEAR = {"degree": 4, "share": 2}
LEFT = {
    "norm of another axis": (
        lambda: sequence(ExpanderLinear(8, 16, **X_LINEAR), nn.BatchNorm1d(16)),
        (4, 16, 8),
        1,
    ),
    "the same, dense": (lambda: sequence(nn.Linear(8, 16), nn.BatchNorm1d(16)), (4, 16, 8), 1),
    "norm of rows": (lambda: sequence(nn.Linear(8, 6), nn.BatchNorm2d(6)), (4, 6, 6, 8), 1),
    "synchronized norm of rows": (
        lambda: sequence(nn.Linear(8, 6), nn.SyncBatchNorm(6)),
        (4, 6, 6, 8),
        1,
    ),
    "StdConv2d": (lambda: sequence(StdConv2d(8, 8, 3), nn.BatchNorm2d(8)), (4, 8, 6, 6), 1),
    "ScaledStdConv2d": (
        lambda: sequence(ScaledStdConv2d(8, 8, 3), nn.BatchNorm2d(8)),
        (4, 8, 6, 6),
        1,
    ),
    "standardized": (
        lambda: sequence(StandardizedConv2d(8, 8, 3), nn.BatchNorm2d(8)),
        (4, 8, 6, 6),
        1,
    ),
    "LoRA": (lambda: sequence(LoRALinear(8, 16), nn.BatchNorm1d(16)), (4, 8), 1),
    "norm that clamps": (lambda: sequence(nn.Conv2d(8, 8, 3), ClampedNorm(8)), (4, 8, 6, 6), 1),
    "statistics of the batch": (
        lambda: sequence(nn.Conv2d(8, 8, 3), BatchStatistics(8)),
        (4, 8, 6, 6),
        1,
    ),
    "norm in training": (lambda: sequence(nn.Conv2d(8, 8, 3), StaysInTraining(8)), (4, 8, 6, 6), 1),
    "no statistics": (
        lambda: sequence(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
        (4, 8, 6, 6),
        1,
    ),
    "tied decoder": (lambda: Tied(nn.Conv2d(8, 16, 3), decode_conv), (4, 8, 6, 6), 1),
    "tied X-layer": (lambda: Tied(ExpanderConv2d(8, 16, 3, degree=4), decode_x), (4, 8, 6, 6), 1),
    "two X-layers with one weight": (tied_x_layers, (4, 8, 6, 6), 1),
    "statistics that are read": (lambda: Chain(with_statistics), (4, 8, 6, 6), 1),
    "all of the norm is read": (FusedByHand, (4, 8, 6, 6), 1),
    "one norm twice": (lambda: Chain(shared_norm, conv2=nn.Conv2d(8, 8, 1)), (4, 8, 6, 6), 1),
    "layer with another forward": (
        lambda: sequence(patched(nn.Conv2d(8, 8, 1), torch.relu), nn.BatchNorm2d(8)),
        (4, 8, 6, 6),
        1,
    ),
    "hook between": (
        lambda: hooked(sequence(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))),
        (4, 8, 6, 6),
        1,
    ),
    "a sum between": (
        lambda: Chain(lambda model, x: model.norm(model.conv(x) + x)),
        (4, 8, 6, 6),
        1,
    ),
    "another layer kept elsewhere": (Hidden, (4, 8, 6, 6), 1),
    "weight_norm": (
        lambda: sequence(parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)),
        (4, 8, 6, 6),
        1,
    ),
    "spectral_norm, older": (
        lambda: sequence(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)),
        (4, 8, 6, 6),
        1,
    ),
    "pruned X-layer": (
        lambda: sequence(
            prune.l1_unstructured(ExpanderConv2d(8, 8, 1, degree=4), "weight", 0.5),
            nn.BatchNorm2d(8),
        ),
        (4, 8, 6, 6),
        1,
    ),
    "frozen norm": (lambda: sequence(nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8)), (4, 8, 6, 6), 0),
    "other norms": (
        lambda: nn.Sequential(
            *(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8))
        ),
        (4, 8, 6, 6),
        0,
    ),
}


def assert_same_outputs(fast, model, x):
    with torch.no_grad():
        ours, wanted = tuple(fast(x)), tuple(model.eval()(x))
    for y, expected in zip(ours, wanted, strict=True):
        # Beyond the roundings of a few small layers; the faults that this is for were 0.18 and
        # more.
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_proven_is_left(case, monkeypatch):
    monkeypatch.setattr(sys.modules["xzoo.deploy"], "RUNS", 1)
    build, shape, left = LEFT[case]
    torch.manual_seed(0)
    model, x = settled(build()), torch.randn(shape)
    if case.startswith("pruned"):
        model(x)  # with gradients: its weight is then a result, which copy.deepcopy refuses
    fast = deploy(model, torch.zeros(shape))
    assert_same_outputs(fast, model, x)
    assert norms(fast) == left


FOLDED = {
    "linear": (lambda: sequence(ExpanderLinear(8, 16, **X_LINEAR), nn.BatchNorm1d(16)), (4, 8)),
    "circular": (
        lambda: sequence(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8)),
        None,
    ),
    "grouped": (
        lambda: sequence(nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)),
        None,
    ),
    "synchronized": (
        lambda: sequence(ExpanderConv2d(8, 8, 3, degree=4), nn.SyncBatchNorm(8)),
        None,
    ),
    "argument that is not given": (
        lambda: Masked(lambda model, x: model.norm(model.conv(x))),
        None,
    ),
    "compiled": (
        lambda: torch.compile(sequence(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), backend="eager"),
        None,
    ),
    "data parallel": (
        lambda: nn.DataParallel(sequence(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))),
        None,
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_proven_is_folded(case, monkeypatch):
    monkeypatch.setattr(sys.modules["xzoo.deploy"], "RUNS", 1)
    build, shape = FOLDED[case]
    model, x = settled(build()), torch.randn(shape or (4, 8, 6, 6))
    fast = deploy(model, x)
    assert_same_outputs(fast, model, x)
    assert norms(fast) == 0


def test_a_change_that_shows_is_taken_back_by_name(caplog):
    model = settled(Hidden())
    fast = deploy(model, torch.zeros(2, 8, 6, 6))
    assert (
        "norm is not folded into the layer before it: the model's outputs would change"
        in caplog.text
    )
    assert [type(part) for part in (fast.norm, fast.last)] == [nn.BatchNorm2d, nn.Identity]


def test_a_wrong_activation_or_dense_form_is_taken_back(monkeypatch, caplog):
    """Two faults put in by hand: a fused relu that does nothing, and a dense form of another graph."""
    module = sys.modules["xzoo.deploy"]
    monkeypatch.setattr(module, "ACTIVATIONS", {nn.Hardtanh: "relu"})
    monkeypatch.setattr(module, "dense_form", lambda layer, groups: nn.Conv2d(8, 8, 1))
    slow = lambda model, names, x: {  # noqa: E731
        n: float(isinstance(model.get_submodule(n), ExpanderConv2d)) for n in names
    }
    monkeypatch.setattr(module, "_seconds_of", slow)
    model, x = (
        nn.Sequential(ExpanderConv2d(8, 8, 1, degree=4), nn.Hardtanh()),
        torch.randn(2, 8, 6, 6),
    )
    fast = deploy(model, torch.zeros(2, 8, 6, 6))
    assert_same_outputs(fast, model, x)
    assert type(fast[0]) is ExpanderConv2d and fast[0].activation == ""
    assert "1 is not done by the layer before it" in caplog.text
    assert "0 is not replaced by its dense form" in caplog.text


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    classes: torch.Tensor


FORMS = {
    "dict": lambda y: {"maps": [y, y.mean((2, 3))], "rank": y.flatten(1).argmax(1)},
    "dataclass": lambda y: Found(y, y.flatten(1).argsort(1)),
    "tuple": lambda y: (y, (y.relu(), None)),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_output_is_compared(form):
    """The hidden layer shows in each, so that one norm of two stays."""
    model = settled(Outputs(Hidden(), FORMS[form]))
    assert norms(deploy(model, torch.zeros(2, 8, 6, 6))) == 1


class Outputs(nn.Module):
    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x):
        return self.form(self.net(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), 0

    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) + self.calls


@pytest.mark.parametrize("model", [Counting(), Outputs(Counting(), lambda y: "no tensor")])
def test_what_cannot_be_compared_stays(model, caplog):
    assert norms(deploy(settled(model), torch.zeros(2, 8, 6, 6))) == 1
    assert (
        "nothing is changed: the model's outputs hold no tensors, or differ from call to call"
        in caplog.text
    )


def test_random_numbers_are_no_difference():
    model = settled(
        Chain(lambda model, x: model.norm(model.conv(F.dropout(x, 0.5, training=True))))
    )
    before = torch.get_rng_state()
    assert norms(deploy(model, torch.zeros(2, 8, 6, 6))) == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_types_are_deployed(dtype):
    torch.manual_seed(0)
    x_layers = (
        ExpanderConv2d(8, 16, 3, degree=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.BatchNorm2d(8),
    )
    model = settled(nn.Sequential(*x_layers)).to(dtype)
    fast, x = (
        deploy(model, torch.zeros(2, 8, 6, 6, dtype=dtype)),
        torch.randn(2, 8, 6, 6, dtype=dtype),
    )
    assert norms(fast) == 0
    with torch.no_grad():
        exact = model.double()(x.double())
        error = (fast(x).double() - exact).abs().max() / exact.abs().max()
    assert error <= 8 * torch.finfo(dtype).eps


def test_computed_weights_are_left_and_named(caplog):
    layers = (
        *(parametrizations.weight_norm(ExpanderConv2d(8, 8, 1, degree=4)), nn.ReLU()),
        *(ExpanderConv2d(8, 8, 1, degree=4), nn.BatchNorm2d(8)),
    )
    model = settled(nn.Sequential(*layers))
    fast = deploy(model, torch.zeros(2, 8, 6, 6))
    assert_same_outputs(fast, model, torch.randn(2, 8, 6, 6))
    assert norms(fast) == 0
    assert (
        "layer 0 stays as it is: its weight is computed at each call; "
        "torch.nn.utils.parametrize.remove" in caplog.text
    )


def test_layers_without_sizes_are_refused():
    model = nn.Sequential(nn.LazyConv2d(8, 1), nn.BatchNorm2d(8))
    with pytest.raises(
        ModelError, match="layer 0 is a LazyConv2d without sizes yet: run a forward pass first"
    ):
        deploy(model, torch.zeros(2, 8, 6, 6))


@pytest.mark.parametrize(
    ("name", "left"), [("levit_128s", 48), ("pit_ti_224", 0), ("cait_xxs24_224", 0)]
)
def test_models_that_store_what_they_computed_are_deployed(name, left, monkeypatch):
    """LeViT keeps its biases in eval mode: a trace would put fx's proxies there."""
    monkeypatch.setattr(sys.modules["xzoo.deploy"], "RUNS", 1)
    arguments = {"depth": 2} if name.startswith("cait") else {}
    model, x = trained(name, **arguments), torch.randn(1, 3, 224, 224)
    xzoo.expand(model)
    fast = deploy(model, torch.zeros(1, 3, 224, 224))
    # LeViT's linear layers are flattened before theirs
    assert norms(fast) == left < norms(model) or left == 0
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)


# With those of test_convert, 36 kinds of models.
KINDS = FAMILIES | {
    **{
        "cait_xxs24_224": {"depth": 2},
        "pit_ti_224": {},
        "repvgg_a0": {},
        "mobilenetv3_small_050": {},
    },
    **{"ghostnet_050": {}, "mobileone_s0": {}, "fastvit_t8": {}, "xcit_nano_12_p16_224": {}},
    **{"poolformer_s12": {}, "resnest14d": {}, "vgg11_bn": {}},
}
QUICK = ("test_efficientnet", "beit_base_patch16_224")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_expanded_models_of_all_kinds_are_deployed(name, monkeypatch):
    monkeypatch.setattr(sys.modules["xzoo.deploy"], "RUNS", 1)
    model = trained(name, **KINDS[name])
    xzoo.expand(model)
    side = KINDS[name].get("img_size", timm.get_pretrained_cfg(name).input_size[-1])
    x = torch.randn(1, 3, side, side)
    fast = deploy(model, torch.zeros(1, 3, side, side))
    with torch.no_grad():
        for y, wanted in zip(Outputs(fast, tensors)(x), Outputs(model, tensors)(x), strict=True):
            torch.testing.assert_close(y, wanted, rtol=1e-3, atol=float(1e-3 * wanted.abs().max()))


def tensors(y):
    return y if isinstance(y, tuple) else (y,)
