"""Batch norms that do the activation after them: the kernels against torch in float64, and fused
models against what they were.
"""

import copy
import pickle
import struct

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn

import xzoo
from xzoo.norms import FusedBatchNorm2d, FusedBatchNormAct2d, FusedReLU, unfuse
from xzoo.ops import native
from xzoo.ops.norms import ACTIVATIONS, batch_norm_act

FUNCTIONS = {"": lambda y: y, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}
pytestmark = pytest.mark.skipif(not native.possible(), reason="no C++ compiler")


@st.composite
def cases(draw):
    """(x, grad, weight and bias or None, activation, training), float32."""
    sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])
    batch, channels = draw(st.sampled_from([1, 2, 3, 31, 33, 70])), draw(sizes)
    shape = [batch, channels, draw(sizes), draw(sizes)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=random) * draw(st.sampled_from([0.1, 1, 30]))
    x = x + draw(st.sampled_from([0, 3, -50]))
    grad = torch.randn(shape, generator=random)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        grad = grad.to(memory_format=torch.channels_last)
    scale, bias = torch.rand(2, channels, generator=random) + 0.5
    affine = (scale, bias - 1) if draw(st.booleans()) else (None, None)
    return x, grad, affine, draw(st.sampled_from(list(ACTIVATIONS))), draw(st.booleans())


def results(function, x, grad, affine, activation, training, dtype):
    """y, the running statistics afterwards, and the gradients by x, weight and bias."""
    x, *affine = (t if t is None else t.to(dtype).clone().requires_grad_() for t in (x, *affine))
    channels = x.shape[1]
    running = (
        torch.linspace(-1, 1, channels, dtype=dtype),
        torch.linspace(0.5, 2, channels, dtype=dtype),
    )
    with xzoo.ops.backend("native"):  # also where `auto` does not take it
        y = function(x, *running, *affine, training, 0.3, 1e-3, activation)
    y.backward(grad.to(dtype))
    grads = [t.grad for t in (x, *affine) if t is not None]
    return [y.detach(), *running, *grads]


def by_torch(x, mean, var, weight, bias, training, momentum, eps, activation):
    return FUNCTIONS[activation](F.batch_norm(x, mean, var, weight, bias, training, momentum, eps))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(case=cases(), threads=st.sampled_from([1, 2, 3]))
def check(case, threads):
    x, grad, affine, activation, training = case
    if training and x.numel() == x.shape[1]:
        return  # torch refuses one number per channel
    torch.set_num_threads(threads)
    # The derivative jumps where the norm's result is 0 (or 6): no gradient comes from near there.
    plain = results(by_torch, x, grad, affine, "", training, torch.float64)[0]
    for kink in {"relu": [0], "relu6": [0, 6]}.get(activation, []):
        grad = grad * ((plain - kink).abs() > 1e-3).float()
    got = results(batch_norm_act, x, grad, affine, activation, training, torch.float32)
    want = results(by_torch, x, grad, affine, activation, training, torch.float64)
    names = ("y", "running mean", "running variance", "dx", "dweight", "dbias")
    # Gradients of sums over few numbers cancel: what is lost is measured against what was added.
    # A mean far from 0 has fewer digits left for what is beside it, in torch's form too.
    count = x.numel() / x.shape[1]
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    far = float((mean.abs() / (var + 1e-3).sqrt()).max())
    for name, g, w in zip(names, got, want, strict=False):
        scale = w.norm() + (grad.norm() * count**0.5 if name.startswith("d") else 0)
        error, allowed = (g.double() - w).norm(), (1e-5 + 1e-6 * far) * scale + 1e-9
        assert error <= allowed, f"{name} off by {error:.1e}, allowed {allowed:.1e}"
    assert got[0].stride() == x.contiguous(memory_format=native_format(x)).stride()


def native_format(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def test_kernels_equal_torch_in_float64(kernels):
    check()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_bits_do_not_depend_on_the_number_of_threads(kernels, form):
    torch.manual_seed(0)
    x = torch.randn(33, 37, 21, 13).to(memory_format=form)
    affine, grad = (torch.rand(37), torch.randn(37)), torch.randn_like(x)
    torch.set_num_threads(1)
    want = results(batch_norm_act, x, grad, affine, "relu", True, torch.float32)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        got = results(batch_norm_act, x, grad, affine, "relu", True, torch.float32)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_goes_where_torch_lets_it_go(kernels, activation, value):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    x[2, 1, 3, 3] = value
    affine = torch.rand(3), torch.randn(3)
    for training in (True, False):
        case = x, torch.randn(4, 3, 5, 5), affine, activation, training
        for got, want in zip(
            results(batch_norm_act, *case, torch.float32),
            results(by_torch, *case, torch.float32),
            strict=True,
        ):
            assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_gradients_pass_where_the_result_did_to_the_last_bit(kernels, form):
    torch.manual_seed(0)
    mean = torch.randn(5)
    affine = torch.rand(5) + 0.5, torch.zeros(5)
    x = mean[:, None, None] + torch.randn(5, 1, 1) * torch.arange(-200, 200).view(1, 20, 20) * 2e-8
    x = x[None].contiguous(memory_format=form).requires_grad_()
    for activation, bend in (("relu", 0), ("relu6", 6)):
        weight, bias = affine[0], affine[1] + bend
        with xzoo.ops.backend("native"):
            y = batch_norm_act(x, mean, torch.ones(5), weight, bias, False, 0.1, 1e-5, activation)
        (dx,) = torch.autograd.grad(y.sum(), x)
        passed = (y > 0) & (y < 6)
        assert 0 < passed.sum() < passed.numel()
        assert torch.equal(dx != 0, passed)


def test_a_variance_far_below_the_mean_is_kept(kernels):
    torch.manual_seed(0)
    x = torch.randn(64, 2, 8, 8) * 1e-2 + 100
    x[0, :, 0, 0] = 1e4  # where sums of squares may take their origin from
    got = results(batch_norm_act, x, x, (None, None), "", True, torch.float32)
    want = results(by_torch, x, x, (None, None), "", True, torch.float64)
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
@pytest.mark.parametrize("step", [1, 2])  # 2: x does not lie together
def test_second_derivatives(activation, training, step):
    torch.manual_seed(0)
    tensors = torch.randn(4, 3, 2, 2 * step), torch.rand(3) + 0.5, torch.randn(3)

    def penalty(function, dtype):
        inputs = [t.to(dtype).clone().requires_grad_() for t in tensors]
        x, weight, bias = inputs
        running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        seen = x[..., ::step]
        y = function(seen, *running, weight, bias, training, 0.1, 1e-5, activation)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    got, want = penalty(batch_norm_act, torch.float32), penalty(by_torch, torch.float64)
    largest = max(float(w.abs().max()) for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-6 * largest)


def test_vectors_of_4_floats_are_taken_by_name_alone(monkeypatch):
    assert native.available()
    monkeypatch.setattr(native, "lanes", lambda: 4)
    torch.manual_seed(0)
    x, running = torch.randn(4, 3, 5, 5), (torch.zeros(3), torch.ones(3))
    affine = torch.rand(3).requires_grad_(), torch.randn(3)
    arguments = x, *running, *affine, False, 0.1, 1e-5, "relu"
    y = batch_norm_act(*arguments)
    assert "BatchNormAct" not in y.grad_fn.name()
    assert torch.equal(y, by_torch(*arguments))
    with xzoo.ops.backend("native"):
        assert "BatchNormAct" in batch_norm_act(*arguments).grad_fn.name()


@pytest.mark.parametrize("wrong", [{0: 0}, {1: -1}, {2: 0}, {4: 0}, {5: 4}, {5: -1}, {0: 2**44}])
def test_sizes_that_are_no_norm_are_refused_before_any_address_is_used(wrong):
    assert native.available()
    sizes = [2, 3, 4, 0, 1, 0, 1]  # norms.h's N, C, P, last, threads, activation, training
    for place, size in wrong.items():
        sizes[place] = size
    for name, tensors in native._NORM_TENSORS.items():
        function = getattr(native._loaded[0], name)
        assert function(struct.pack("7q2d", *sizes, 1e-5, 0.1), *[None] * tensors) == 3, name


@pytest.mark.parametrize("training", [True, False])
def test_one_number_per_channel_is_refused_in_training_only(training):
    x, running = torch.randn(1, 3, 1, 1), (torch.zeros(3), torch.ones(3))
    if training:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            batch_norm_act(x, *running, None, None, True, 0.1, 1e-5)
    else:
        got = batch_norm_act(x, *running, None, None, False, 0.1, 1e-5)
        torch.testing.assert_close(got, x / (1 + 1e-5) ** 0.5)


# ---- models


def trained(model, x, steps=2):
    """Everything in a model's state and gradients, and its outputs, after a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(x))
        outputs[-1].logsumexp(1).sum().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        outputs.append(model(x))
    return {**model.state_dict(), **{str(i): y.detach() for i, y in enumerate(outputs)}}


def torchvision_block():
    """An activation that is called twice, and one that a sum stands before."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(x + y)

    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.GELU())
    return nn.Sequential(stem, Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS = {
    "torchvision's form": torchvision_block,
    **{
        name: lambda name=name: xzoo.create_model(name, num_classes=5)
        for name in (
            "x_vgg16_c8",
            "x_resnet18",
            "x_densenetbc_40_24",
            "x_mobilenet050_c8",
            "x_air94",
        )
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_models_train_to_what_they_were(name):
    torch.manual_seed(0)
    plain, x = MODELS[name](), torch.randn(8, 3, 32, 32)
    exact = copy.deepcopy(plain).double()
    fused = xzoo.fuse(copy.deepcopy(plain))
    norms = [m for m in fused.modules() if type(m) in (FusedBatchNorm2d, FusedBatchNormAct2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    start = copy.deepcopy(exact.state_dict())
    want = trained(exact, x.double())
    before, after = trained(plain, x), trained(fused, x)
    assert list(after) == list(before)  # the names in the state dict among them
    for key, value in want.items():
        # Where a number near 0 falls on the other side of a relu in float32, a gradient jumps.
        moved = (value - start.get(key, 0)).double().norm()
        allowed = 3 * (before[key] - value).double().norm() + 0.05 * moved + 1e-6
        assert (after[key] - value).double().norm() <= allowed, key


def norm_and_relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return model, torch.randn(4, 3, 9, 9)


def test_the_activation_is_done_once_and_by_whoever_is_there():
    model, x = norm_and_relu()
    want = model(x)
    fused = xzoo.fuse(copy.deepcopy(model))
    seen = []
    fused[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = fused(x)
    assert isinstance(fused[2], FusedReLU)
    assert y is seen[0]  # passed through
    torch.testing.assert_close(y, want)
    fused[1] = nn.InstanceNorm2d(8)  # another norm in its place: the activation acts
    assert fused(x).min() == 0
    assert seen[1].min() < 0


def test_a_hook_on_the_norm_sees_the_norms_result():
    model, x = norm_and_relu()
    fused, seen = xzoo.fuse(model), []
    fused[1].register_forward_hook(lambda module, args, y: seen.append(y))
    assert fused(x).min() == 0
    assert seen[0].min() < 0


def test_a_mark_that_is_lost_costs_a_pass_and_nothing_else():
    model, x = norm_and_relu()
    want = copy.deepcopy(model)(x)
    fused = xzoo.fuse(model)
    fused[1] = nn.Sequential(fused[1], nn.Flatten(0, 0))  # another tensor of the same numbers
    torch.testing.assert_close(fused(x), want)


def test_synchronized_norms_take_the_place_of_fused_ones():
    model, x = norm_and_relu()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(xzoo.fuse(model)).eval()
    assert type(model[1]) is nn.SyncBatchNorm
    assert model(x).min() == 0


def test_copies_pickles_and_unfuse():
    model, x = norm_and_relu()
    want = [type(m) for m in model.modules()]
    fused = xzoo.fuse(model)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied.eval()(x), fused.eval()(x))
    assert [type(m) for m in unfuse(fused).modules()] == want
    assert vars(fused[1]).get("activation") is None


def test_the_profiler_shows_what_runs_without_it():
    model = xzoo.fuse(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    with torch.profiler.profile() as profile:
        model(torch.randn(2, 4, 8, 8))
    events = {event.key for event in profile.key_averages()}
    assert "_BatchNormAct" in events and "aten::native_batch_norm" not in events


def test_other_norms_and_subclasses_stay():
    class Clamped(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    model = nn.Sequential(
        Clamped(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3), nn.GELU()
    )
    fused = xzoo.fuse(model)
    kinds = [Clamped, nn.ReLU, FusedBatchNorm2d, nn.Tanh, FusedBatchNorm2d, nn.GELU]
    assert [type(m) for m in fused] == kinds


def test_backend_dense_is_torch_to_the_bit():
    model, x = norm_and_relu()
    want = trained(copy.deepcopy(model), x)
    with xzoo.ops.backend("dense"):
        got = trained(xzoo.fuse(model), x)
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_formats_are_torchs(dtype):
    model, x = norm_and_relu()
    model, x = model.to(dtype), x.to(dtype)
    want = copy.deepcopy(model)(x)
    assert torch.equal(xzoo.fuse(model)(x), want)


def test_exported_as_if_nothing_had_been_fused():
    model, x = norm_and_relu()
    want = copy.deepcopy(model).eval()(x)
    program = torch.export.export(xzoo.fuse(model).eval(), (x,))
    assert "relu" in str(program.graph)
    torch.testing.assert_close(program.module()(x), want)


@pytest.mark.slow
def test_compiled_as_if_nothing_had_been_fused():
    model, x = norm_and_relu()
    want = copy.deepcopy(model)(x)
    torch.testing.assert_close(torch.compile(xzoo.fuse(model), fullgraph=True)(x), want)


def test_deployed_as_if_nothing_had_been_fused():
    model, x = norm_and_relu()
    fast = xzoo.deploy(xzoo.fuse(model), x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_timms_norm_with_dropout_or_an_unknown_activation_is_timms():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 5)
    for options in ({"act_layer": nn.SiLU}, {"drop_layer": nn.Dropout2d}, {"apply_act": False}):
        norm = BatchNormAct2d(6, **options).eval()
        want = norm(x)
        fused = xzoo.fuse(copy.deepcopy(norm))
        assert type(fused) is FusedBatchNormAct2d
        torch.testing.assert_close(fused(x), want)
