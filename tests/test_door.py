"""What does not go together reaches no backend: it is refused in one line, or computed rightly;
nothing in between.

The smallest cases are of people who cast half of a model, called the operations by themselves,
averaged a state dict, or imported a package twice.
"""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import xzoo
from xzoo import ExpanderConv2d, ExpanderLinear, GraphError, graphs, ops
from xzoo.ops import operations

ROWS = torch.from_numpy(graphs.sample("biregular", 64, 32, 8, seed=0))
SHUFFLED = torch.from_numpy(graphs.sample("shuffle", 64, 32, 8))  # which `group` can run as well
BACKENDS = [name for name in ops.available() if name != "triton"]


def rows_for(backend):
    return SHUFFLED if backend == "group" else ROWS


def call(operation, x=None, weight=None, rows=None, bias=None, **other):
    """An operation of 64 inputs and 32 outputs whose sizes `native` has a kernel for."""
    rows = rows_for(operations.forced()) if rows is None else rows
    kernel = (3, 3) if operation == "conv2d" else ()
    size = (6, 6) if kernel else ()
    x = torch.randn(20, 64, *size) if x is None else x
    weight = torch.randn(32, 8, *kernel) if weight is None else weight
    more = ((1, 1), (1, 1)) if kernel else ()
    return getattr(ops, operation)(x, weight, rows, bias, *more, **other)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("operation", ["conv2d", "linear"])
class TestTypesAndSizes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_types_that_differ(self, operation, backend, dtype):
        kernel = (3, 3) if operation == "conv2d" else ()
        with ops.backend(backend):
            for x, weight, bias in (
                (None, torch.randn(32, 8, *kernel).to(dtype), None),
                (None, None, torch.randn(32, dtype=dtype)),
                (torch.randn(20, 64, *kernel).to(dtype), None, None),
            ):
                with pytest.raises(
                    RuntimeError,
                    match=r"x is of torch\.\w+, \w+ of torch\.\w+; they must be of the",
                ):
                    call(operation, x, weight, bias=bias)

    def test_sizes_that_do_not_fit(self, operation, backend):
        kernel = (3, 3) if operation == "conv2d" else ()
        x, weight = torch.randn(20, 64, *kernel), torch.randn(32, 8, *kernel)
        with ops.backend(backend):
            for given, said in (
                ({"weight": weight[:30]}, r"weight \[30, 8.*divide evenly"),
                ({"weight": weight[:, :3]}, r"weight \[32, 3.*the degree"),
                ({"weight": weight[:0]}, r"weight \[0, 8.*1 or more"),
                ({"weight": weight[:, :0], "rows": ROWS[:, :0]}, r"1 or more"),
                ({"bias": torch.randn(1)}, r"bias is \[1\]; 32 outputs need \[32\]"),
                ({"bias": torch.randn(5)}, r"bias is \[5\]"),
                ({"rows": ROWS.float()}, "neighbours are of torch.float32; they must be integers"),
                ({"rows": ROWS.flatten()}, r"neighbours \[256\]; they must be"),
                ({"weight": weight[..., None]}, "they must be"),
                ({"x": x[:, :0]}, "only the batch may be empty"),
            ):
                with pytest.raises(RuntimeError, match=said):
                    call(operation, **given)

    def test_a_neighbour_that_is_no_input(self, operation, backend):
        for value, dtype in (
            (64, torch.int32),
            (-1, torch.int32),
            (2**32 + 3, torch.int64),
            (-1, torch.int64),
        ):
            rows = rows_for(backend).to(dtype, copy=True)
            rows[5, 2] = value
            with ops.backend(backend), pytest.raises(IndexError, match="from 0 to 63"):
                call(operation, rows=rows)

    def test_one_that_was_written_past_torchs_count_of_changes(self, operation, backend):
        rows = rows_for(backend).clone()
        with ops.backend(backend):
            want = call(
                operation,
                x := torch.randn(20, 64, *((6, 6) if operation == "conv2d" else ())),
                rows=rows,
            )
            rows.numpy()[5, 2] = 1 << 20
            if backend in ("native", "auto") and "native" in BACKENDS:
                with pytest.raises(IndexError, match="from 0 to 63"):
                    call(operation, x, rows=rows)
        assert want.isfinite().all()

    def test_devices_that_differ(self, operation, backend):
        with ops.backend(backend):
            for given in ({"rows": ROWS.to("meta")}, {"bias": torch.randn(32, device="meta")}):
                with pytest.raises(
                    RuntimeError, match=r"x is on cpu, \w+ on meta; they must be on the same device"
                ):
                    call(operation, **given)

    def test_numbers_that_are_not_in_memory_as_they_are(self, operation, backend):
        kernel = (3, 3) if operation == "conv2d" else ()
        x, weight = torch.randn(20, 64, *kernel), torch.randn(32, 8, *kernel)
        with ops.backend(backend):
            want = call(operation, x, weight)
            torch.testing.assert_close(call(operation, torch._neg_view(x), weight), -want)
            torch.testing.assert_close(call(operation, x, torch._neg_view(weight)), -want)
            zero = torch._efficientzerotensor(x.shape)
            assert not call(operation, zero, weight).any()
            want = call(operation, x, weight, bias=torch.ones(32))
            torch.testing.assert_close(
                call(operation, x, weight, bias=torch._neg_view(-torch.ones(32))), want
            )

    def test_integers_of_any_width(self, operation, backend):
        x = torch.randn(20, 64, *((6, 6) if operation == "conv2d" else ()))
        weight = torch.randn(32, 8, *((3, 3) if operation == "conv2d" else ()))
        with ops.backend(backend):
            want = call(operation, x, weight)
            for dtype in (torch.int64, torch.int16, torch.uint8):
                assert torch.equal(call(operation, x, weight, rows_for(backend).to(dtype)), want)


@pytest.mark.skipif("native" not in BACKENDS, reason="no compiler")
@pytest.mark.parametrize("which", ["x", "weight", "bias", "rows"])
def test_memory_that_was_given_back(which):
    given = {
        "x": torch.randn(20, 64),
        "weight": torch.randn(32, 8),
        "bias": torch.randn(32),
        "rows": ROWS.to(torch.int32, copy=True),
    }
    given[which].untyped_storage().resize_(given[which].untyped_storage().nbytes() - 4)
    with (
        ops.backend("native"),
        pytest.raises(RuntimeError, match="lacks its memory: the storage was freed or resized"),
    ):
        call("linear", **given)


@pytest.mark.skipif("native" not in BACKENDS, reason="no compiler")
def test_memory_that_was_given_back_of_a_view():
    x = torch.randn(64, 20).t()
    x.untyped_storage().resize_(0)
    with ops.backend("native"), pytest.raises(RuntimeError, match="lacks its memory"):
        call("linear", x)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gradients_of_a_wrong_size_are_refused(backend):
    x, weight, grad = torch.randn(20, 64, 6, 6), torch.randn(32, 8, 3, 3), torch.randn(20, 32, 6, 6)
    geometry, library = ((1, 1), (1, 1), (1, 1)), torch.ops.xzoo
    rows = rows_for(backend)
    for operation in (library.conv2d_input_grad, library.conv2d_weight_grad):
        assert operation(grad, x, weight, rows, *geometry, backend).isfinite().all()
        for wrong in (grad[:19], grad[:, :31], grad[..., 1:]):
            with pytest.raises(
                RuntimeError, match="grad is .* the output of these, and so grad, is"
            ):
                operation(wrong, x, weight, rows, *geometry, backend)
        with pytest.raises(RuntimeError, match=r"x is of torch.float32, grad of torch.float64"):
            operation(grad.double(), x, weight, rows, *geometry, backend)
    for operation in (library.linear_input_grad, library.linear_weight_grad):
        with pytest.raises(RuntimeError, match="grad is"):
            operation(grad[:, :9, 0, 0], x[:, :, 0, 0], weight[:, :, 0, 0], rows, backend)


def test_fake_tensors_are_refused_alike():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, weight, rows = (
            mode.from_tensor(torch.randn(20, 64)),
            mode.from_tensor(torch.randn(32, 8)),
            ROWS,
        )
        rows = mode.from_tensor(rows)
        assert ops.linear(x, weight, rows).shape == (20, 32)
        with pytest.raises(RuntimeError, match="x is of torch.float32, weight of torch.float64"):
            ops.linear(x, weight.double(), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_which_half_was_cast(dtype):
    model = nn.Sequential(ExpanderConv2d(16, 32, 3, degree=4, padding=1), nn.ReLU())
    x = torch.randn(16, 16, 8, 8)
    model(x)
    model[0].weight.data = model[0].weight.data.to(dtype)
    with pytest.raises(RuntimeError, match=f"x is of torch.float32, weight of {dtype}"):
        model(x)


# ---- a graph that changed in place


def layers():
    yield ExpanderConv2d(16, 32, 3, degree=4, padding=1), torch.randn(2, 16, 5, 5)
    yield ExpanderLinear(16, 32, degree=4, share=2), torch.randn(2, 16)


def changed(layer):
    """Another graph of the same sizes."""
    return torch.from_numpy(graphs.sample("biregular", 16, len(layer.neighbours), 4, seed=99)).int()


@pytest.mark.parametrize(
    "how", ["copy_", "add_", "data", "before the first call", "after a copy", "by half"]
)
def test_numbers_changed_in_place_are_refused_at_the_next_forward_pass(how):
    for layer, x in layers():
        if how != "before the first call":
            layer(x)
        if how == "after a copy":
            layer = copy.deepcopy(layer)
        with torch.no_grad():
            if how == "add_":
                layer.neighbours.add_(1)
            elif how == "by half":
                layer.neighbours.copy_(
                    layer.neighbours * 0.9999 + layer.neighbours.roll(1, 0) * 0.0001
                )
            elif how == "data":  # a new tensor, which is not a graph
                layer.neighbours.data = torch.zeros_like(layer.neighbours)
                layer.neighbours.add_(0)
            else:
                layer.neighbours.copy_(changed(layer))
        with pytest.raises(
            GraphError, match=f"an {type(layer).__name__}.*neighbours.*load_state_dict"
        ):
            layer(x)


def test_the_layer_is_named_as_in_its_model():
    model = xzoo.create_model("x_vgg16_c16")
    names = [name for name, m in model.named_modules() if isinstance(m, ExpanderConv2d)]
    model.get_submodule(names[2]).neighbours.add_(1)
    with pytest.raises(GraphError, match=f"layer {names[2]}, an ExpanderConv2d"):
        model(torch.randn(1, 3, 32, 32))


def test_equal_numbers_are_no_change():
    """As DistributedDataParallel's broadcast of buffers writes them before every forward pass."""
    for layer, x in layers():
        want = layer(x)
        layer.neighbours.copy_(layer.neighbours.clone())
        assert torch.equal(layer(x), want)
        layer.double()
        layer.float()
        layer.to(memory_format=torch.channels_last)
        assert torch.equal(copy.deepcopy(layer)(x), want)


def test_a_loaded_graph_is_the_layers_own():
    for layer, x in layers():
        layer(x)
        state = layer.state_dict() | {"neighbours": changed(layer)}
        for assign in (False, True):
            other = copy.deepcopy(layer)
            other.load_state_dict(copy.deepcopy(state), assign=assign)
            assert not torch.equal(other(x), layer(x))
        other.neighbours.add_(1)
        other.load_state_dict(state)  # mends what was broken
        other(x)
        other.neighbours.add_(1)
        other.load_state_dict({}, strict=False)  # and this does not
        with pytest.raises(GraphError, match="changed in place"):
            other(x)


def test_another_graph_in_a_functional_call_is_computed_and_no_graph_is_refused():
    for layer, x in layers():
        other = copy.deepcopy(layer)
        other.load_state_dict(layer.state_dict() | {"neighbours": changed(layer)})
        for _ in range(2):
            assert torch.equal(functional_call(layer, other.state_dict(), (x,)), other(x))
            layer(x)
        with pytest.raises(GraphError, match="neighbours"):
            functional_call(
                layer, layer.state_dict() | {"neighbours": torch.zeros_like(layer.neighbours)}, (x,)
            )
        with pytest.raises(GraphError, match="integers"):
            functional_call(
                layer, layer.state_dict() | {"neighbours": layer.neighbours * 1.0}, (x,)
            )


def test_memory_without_numbers_is_no_graph():
    for layer, x in layers():
        layer.to_empty(device="cpu")
        layer.neighbours.zero_()
        with pytest.raises(GraphError, match="neighbours"):
            layer(x)


def test_layers_built_in_inference_mode_work():
    with torch.inference_mode():
        layer = ExpanderLinear(16, 32, degree=4)
        assert layer(torch.randn(2, 16)).shape == (2, 32)
        layer.neighbours.add_(1)
        with pytest.raises(GraphError, match="changed in place"):
            layer(torch.randn(2, 16))


# ---- importing twice, and other classes of tensors

AGAIN = """
import importlib, sys, warnings
import torch
import xzoo
layer, x = xzoo.ExpanderLinear(16, 8, degree=4), torch.randn(3, 16)
want = layer(x)
importlib.reload(xzoo.ops.operations)
importlib.reload(xzoo.ops)
assert torch.equal(layer(x), want)
for name in [name for name in sys.modules if name.split(".")[0] == "xzoo"]:
    del sys.modules[name]
import xzoo
layer = xzoo.ExpanderLinear(16, 8, degree=4)
layer(x).sum().backward()
assert layer.weight.grad is not None
exported = torch.export.export(layer, (x,)).module()
assert torch.equal(exported(x), layer(x))
"""


@pytest.mark.slow
def test_importing_again_works():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AGAIN], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


class Named(torch.Tensor):
    """A plain subclass, as many libraries have."""


@pytest.mark.parametrize("compiled", [False, True])
def test_subclasses_of_tensors(compiled):
    from torchvision import tv_tensors

    layer = ExpanderConv2d(16, 8, 3, degree=4)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    x = torch.randn(2, 16, 6, 6)
    for wrapped in (tv_tensors.Image(x), x.as_subclass(Named)):
        torch.testing.assert_close(run(wrapped).as_subclass(torch.Tensor), layer(x))


def test_subclasses_of_tensors_where_compiling_gave_up():
    """torch then compiles inner functions by themselves, in which nobody has taken the subclass
    off.
    """
    from torchvision import tv_tensors

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for channels in (8, 16, 24):
            layer = ExpanderConv2d(channels, 8, 3, degree=4)
            gradient = torch.func.grad(lambda t, layer=layer: layer(t).sum())
            torch.compile(gradient, backend="aot_eager")(torch.randn(2, channels, 6, 6))
            with torch.no_grad():
                x = torch.randn(2, channels, 6, 6)
                compiled = torch.compile(layer, backend="aot_eager")(tv_tensors.Image(x))
                torch.testing.assert_close(compiled.as_subclass(torch.Tensor), layer(x))
    torch._dynamo.reset()


def test_neighbours_of_numpys_default_integers():
    x, weight = torch.randn(20, 64), torch.randn(32, 8)
    rows = torch.from_numpy(ROWS.numpy().astype(np.int64))
    for strided in (rows, rows.t().contiguous().t()):
        assert torch.equal(ops.linear(x, weight, strided), ops.linear(x, weight, ROWS))
