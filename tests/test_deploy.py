"""`deploy`: the same outputs but for rounding, fewer modules, and a model of the caller's that nobody touched."""

import logging
import sys

import pytest
import timm
import torch
from torch import nn

import xzoo
from xzoo.deploy import deploy, fold, fuse
from xzoo.errors import ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear


def trained(name: str, **arguments: object) -> nn.Module:
    """A model whose norms have statistics, as after a training."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
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
        ("x_densenetbc_40_24", 32, 21),  # its norms stand before the layers: only bottlenecks have one behind
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
    assert norms(fast) == left < norms(model) and not any(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert fast.num_classes == 7 and fast.forward_features(x).shape == model.forward_features(x).shape


def test_what_it_did_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="xzoo.deploy"):
        deploy(trained("x_mobilenet050_c4"), torch.zeros(1, 3, 32, 32))
    assert "27 of 27 norms folded, 12 activations fused; " in caplog.text
    assert "times as fast as the other" in caplog.text and "of 12 X-layers are faster dense" in caplog.text


class Shared(nn.Module):
    """Layers that must not be folded: called twice, read by two, tied, without statistics; and one that may."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm1, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
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
        assert fold(model, x) == 1 and isinstance(model.norm6, nn.Identity)
        torch.testing.assert_close(model(x), before)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_what_cannot_be_traced_stays_and_is_told(caplog):
    model = Branching().eval()
    assert fold(model, torch.ones(1, 3, 2, 2)) == 0 and "torch.fx cannot trace the model" in caplog.text and norms(model) == 1


def test_an_example_that_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"does not run on an example of \[1, 4, 32, 32\]"):
        xzoo.deploy(trained("x_vgg16_c16"), torch.zeros(1, 4, 32, 32))


def test_a_deployed_model_finds_the_faster_format(monkeypatch):
    model = trained("x_vgg16_c16")
    # The clock decides; here it is one that dislikes contiguous weights.
    module = sys.modules["xzoo.deploy"]  # the package's name for it is the function
    dislikes = lambda net, x: isinstance(net, nn.Module) and float(net.features[0].weight.is_contiguous()) + 1  # noqa: E731
    monkeypatch.setattr(module, "_seconds", dislikes)
    fast = deploy(model, torch.zeros(1, 3, 32, 32))
    assert fast.features[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fast.features[3].weight.is_contiguous()  # an X-layer's is one


def activations(model: nn.Module) -> list[str]:
    return [part.activation for part in model.modules() if isinstance(part, ExpanderConv2d | ExpanderLinear)]


@pytest.mark.parametrize(
    ("name", "activation", "others"),
    [("x_vgg16_c16", "relu", 0), ("x_mobilenet050_c4", "relu6", 0), ("x_resnet18", "relu", 8)],
)
def test_activations_that_follow_are_fused(name, activation, others):
    model = trained(name)
    x = torch.randn(2, 3, 32, 32)
    fold(model, x)
    with torch.no_grad():
        before = model(x)
        done = fuse(model, x)
        torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
        found = activations(model)
        assert found.count(activation) == done > 0 and found.count("") == others
        # What a user may still do with it.
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(xzoo.to_dense(model)(x), before, rtol=1e-4, atol=1e-4)
    assert not activations(model)


class Followed(nn.Module):
    """Activations that must stay: used twice, after a result that others read, watched; and one that need not."""

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
        assert fuse(model, x) == 1 and activations(model) == ["", "", "", "", "relu"]
        torch.testing.assert_close(model(x), before)


def test_a_layer_that_is_faster_dense_becomes_dense(monkeypatch):
    # The clock decides; here it is one that likes one dense layer, and dislikes all the others.
    def seconds(model, names, example):
        return {n: float(isinstance(model.get_submodule(n), ExpanderConv2d) is (n == "features.7")) for n in names}

    monkeypatch.setattr(sys.modules["xzoo.deploy"], "_seconds_of", seconds)
    model, x = trained("x_vgg16_c16"), torch.randn(1, 3, 32, 32)
    fast = deploy(model, x)
    kinds = {name: type(part).__name__ for name, part in fast.named_modules() if name.startswith("features.")}
    assert [kinds[f"features.{i}"] for i in (3, 7, 10)] == ["ExpanderConv2d", "Sequential", "ExpanderConv2d"]
    assert [type(part) for part in fast.features[7]] == [nn.Conv2d, nn.ReLU]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
