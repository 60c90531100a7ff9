"""Derivatives of every order and kind are those of the dense layer: double backward, forward mode,
torch.func.

The oracle is torch's own operation on a dense weight that a matrix product with one-hot rows lays
out, in float64.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import xzoo
from xzoo import ExpanderConv2d, ExpanderLinear, graphs, ops

# torch.compile looks at the gradient of every tensor of a frame, also where that has none by
# design.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GEOMETRY = ((2, 1), (1, 0), (1, 2))


def dense_of(weight, rows, n_in):
    """[out, n_in, ...]; differentiable in whatever way torch's products are."""
    chosen = F.one_hot(rows.long().repeat_interleave(len(weight) // len(rows), 0), n_in).to(
        weight.dtype
    )
    return torch.einsum("odi,od...->oi...", chosen, weight)


def pairs(kind="biregular"):
    """Name, our operation, the dense one, and tensors x, weight, bias of float64."""
    rows = torch.from_numpy(graphs.sample(kind, 6, 4, 3, share=2, seed=0))
    draw = torch.Generator().manual_seed(0)
    image, kernel = (
        (torch.randn(*s, generator=draw, dtype=torch.float64)) for s in [(2, 6, 5, 4), (4, 3, 3, 2)]
    )
    row, weight, bias = (
        torch.randn(*s, generator=draw, dtype=torch.float64) for s in [(2, 3, 6), (4, 3), (4,)]
    )

    def conv(x, w, b):
        return ops.conv2d(x, w, rows, b, *GEOMETRY)

    def dense_conv(x, w, b):
        return F.conv2d(x, dense_of(w, rows, 6), b, *GEOMETRY)

    def linear(x, w, b):
        return ops.linear(x, w, rows, b)

    def dense_linear(x, w, b):
        return F.linear(x, dense_of(w, rows, 6), b)

    return {
        "conv2d": (conv, dense_conv, (image, kernel, bias)),
        "linear": (linear, dense_linear, (row, weight, bias)),
    }


PAIRS = pairs()
GROUPS = pairs("shuffle")  # those that `group` can run
OPERATIONS = pytest.mark.parametrize("operation", PAIRS)
BACKENDS = pytest.mark.parametrize("backend", ["dense", "gather", "group", "auto"])


def same(got, want, tolerance=1e-10):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cubed(function):
    """A number of which all derivatives up to the third are there."""
    return lambda *tensors: function(*tensors).pow(3).sum()


@st.composite
def layers(draw, of_groups=False):
    """Our operation as a function of x, weight and bias, and small tensors for it."""
    share, blocks, degree = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    if of_groups:
        kind, n_in = "shuffle", degree * blocks
    else:
        kind, n_in = "biregular", draw(st.integers(degree, 5))
    rows = torch.from_numpy(
        graphs.sample(kind, n_in, blocks * share, degree, share, draw(st.integers(0, 9)))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    bias = torch.randn(blocks * share, **sizes)
    if draw(st.booleans()):
        x, weight = torch.randn(2, n_in, **sizes), torch.randn(blocks * share, degree, **sizes)
        return lambda x, w, b: ops.linear(x, w, rows, b), (x, weight, bias)
    kernel, stride, padding = (draw(st.integers(1, most)) for most in (3, 2, 1))
    x = torch.randn(1, n_in, 3, 4, **sizes)
    weight = torch.randn(blocks * share, degree, kernel, 1, **sizes)
    geometry = ((stride, 1), (padding, 0), (1, 2))
    return lambda x, w, b: ops.conv2d(x, w, rows, b, *geometry), (x, weight, bias)


@pytest.mark.slow
@BACKENDS
@settings(derandomize=True, deadline=None, max_examples=8)
@given(data=st.data())
def test_finite_differences_of_random_layers(backend, data):
    function, tensors = data.draw(layers(backend == "group"))
    with ops.backend(backend):
        assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, tensors, check_fwd_over_rev=True, check_batched_grad=True)


@OPERATIONS
@BACKENDS
def test_batched_forward_mode(backend, operation):
    ours, _, tensors = (GROUPS if backend == "group" else PAIRS)[operation]
    tensors = [t.clone().requires_grad_() for t in tensors]
    with ops.backend(backend):
        assert gradcheck(ours, tensors, check_forward_ad=True, check_batched_forward_grad=True)


TRANSFORMS = {
    "grad": lambda f, t: grad(f, (0, 1, 2))(*t),
    "grad of grad": lambda f, t: grad(
        lambda *t: sum(g.pow(2).sum() for g in grad(f, (0, 1, 2))(*t)), (0, 1, 2)
    )(*t),
    "vjp": lambda f, t: vjp(f, *t)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jvp": lambda f, t: jvp(f, t, tuple(a.cos() for a in t)),
    "jvp of grad": lambda f, t: jvp(lambda *t: grad(f, (0, 1))(*t), t, tuple(a.cos() for a in t)),
    "grad of jvp": lambda f, t: grad(
        lambda x: jvp(lambda w: f(x, w, t[2]), (t[1],), (t[1].cos(),))[1]
    )(t[0]),
    "jacrev": lambda f, t: jacrev(f, (0, 1, 2))(*t),
    "jacfwd": lambda f, t: jacfwd(f, (0, 1, 2))(*t),
    "hessian": lambda f, t: hessian(f, (1, 2))(*t),
    "vmap over x": lambda f, t: vmap(f, (0, None, None))(torch.stack([t[0], 2 * t[0]]), *t[1:]),
    "vmap over weights": lambda f, t: vmap(f, (None, 1, 0))(
        t[0], torch.stack([t[1], 2 * t[1]], 1), t[2].expand(2, -1)
    ),
    "vmap over all": lambda f, t: vmap(f)(*(torch.stack([a, 2 * a, a.cos()]) for a in t)),
    "vmap of vmap": lambda f, t: vmap(
        lambda x: vmap(lambda w: f(x, w, t[2]))(torch.stack([t[1], 2 * t[1]]))
    )(torch.stack([t[0], 2 * t[0]])),
    "vmap of grad": lambda f, t: vmap(grad(f, (0, 1, 2)), (0, None, None))(
        torch.stack([t[0], 2 * t[0]]), *t[1:]
    ),
    "grad of vmap": lambda f, t: grad(
        lambda x, w: vmap(f, (0, None, None))(torch.stack([x, 2 * x]), w, t[2]).sum(), (0, 1)
    )(*t[:2]),
}


@OPERATIONS
@pytest.mark.parametrize("backend", ["auto", "group"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(operation, transform, backend):
    ours, dense, tensors = (GROUPS if backend == "group" else PAIRS)[operation]
    with ops.backend(backend):
        got = TRANSFORMS[transform](cubed(ours), tensors)
    same(got, TRANSFORMS[transform](cubed(dense), tensors))


@OPERATIONS
@pytest.mark.parametrize(
    "transform",
    [
        "grad",
        "jacrev",
        "jvp",
        "vmap over weights",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in TRANSFORMS
            if name not in ("grad", "jacrev", "jvp")
        ),
    ],
)
def test_torch_func_compiled(operation, transform):
    ours, dense, tensors = PAIRS[operation]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: TRANSFORMS[transform](cubed(ours), t), backend="aot_eager")
    same(compiled(*tensors), TRANSFORMS[transform](cubed(dense), tensors))


@OPERATIONS
def test_torch_autograd_functional(operation):
    from torch.autograd import functional

    ours, dense, tensors = PAIRS[operation]
    vectors = tuple(t.cos() for t in tensors)
    for derive in (functional.hvp, functional.vhp, functional.jvp):
        same(derive(cubed(ours), tensors, vectors), derive(cubed(dense), tensors, vectors))
    same(functional.hessian(cubed(ours), tensors), functional.hessian(cubed(dense), tensors))
    same(
        functional.hessian(cubed(ours), tensors, vectorize=True),
        functional.hessian(cubed(dense), tensors),
    )
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        same(functional.jacobian(ours, tensors, **options), functional.jacobian(dense, tensors))


@OPERATIONS
def test_gradients_of_several_at_once(operation):
    ours, dense, tensors = PAIRS[operation]

    def batched(function):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        several = torch.stack([y.detach().sin(), y.detach().cos()])
        return torch.autograd.grad(y, leaves, several, is_grads_batched=True)

    same(batched(ours), batched(dense))


@OPERATIONS
def test_the_registered_operation_has_the_derivatives_too(operation):
    """As in a program of torch.export, which calls torch.ops.xzoo.*."""
    _, dense, (x, weight, bias) = PAIRS[operation]
    rows = torch.from_numpy(graphs.sample("biregular", 6, 4, 3, share=2, seed=0))
    x = x if operation == "conv2d" else x[0]
    last = ("auto",) if operation == "linear" else (*GEOMETRY, "auto")
    call = getattr(torch.ops.xzoo, operation)

    def ours(x, w, b):
        return call(x, w, rows, b, *last)

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    first = torch.autograd.grad(cubed(ours)(*leaves), leaves, create_graph=True)
    again = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    theirs = torch.autograd.grad(cubed(dense)(*leaves), leaves, create_graph=True)
    same((first, again), (theirs, torch.autograd.grad(sum(g.pow(2).sum() for g in theirs), leaves)))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            ours(forward_ad.make_dual(x, x.cos()), weight, bias)
        ).tangent
    same(tangent, jvp(lambda x: dense(x, weight, bias), (x,), (x.cos(),))[1])
    same(
        vmap(ours, (0, None, None))(torch.stack([x, 2 * x]), weight, bias)[1],
        dense(2 * x, weight, bias),
    )
    with pytest.raises(
        RuntimeError, match=f"torch.func cannot .* torch.ops.xzoo.{operation}[a-z_]* itself; use"
    ):
        grad(lambda x: ours(x, weight, bias).sum())(x)
    with pytest.raises(RuntimeError, match="with an activation has no derivative here"):
        call(leaves[0], weight, rows, bias, *last, "relu")


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_an_exported_program_can_be_trained(backend):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), ExpanderConv2d(8, 8, 3, degree=4, padding=1), nn.ReLU()
    )
    x = torch.randn(2, 3, 8, 8)
    with ops.backend(backend):
        program = torch.export.export(model, (x,)).module()
    for net in (model, program):
        net(x).square().sum().backward()
    for (name, want), got in zip(model.named_parameters(), program.parameters(), strict=True):
        assert got.grad is not None, name
        torch.testing.assert_close(got.grad, want.grad)


# ---- what people do with second derivatives: a small X-net against its dense twin


class SmallNet(nn.Module):
    """A convolution and a linear layer of each kind, smooth, so that second derivatives exist
    everywhere.
    """

    def __init__(self, dense=False):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.silu(self.second(torch.tanh(self.first(x)))).mean((2, 3))
        return self.head(torch.tanh(self.third(x)))


def twins():
    """An X-net in float64, and the dense network that computes the same."""
    torch.manual_seed(0)
    net = SmallNet()
    report = xzoo.expand(net, 2, only=["second", "third"])
    assert report.replaced == ("second", "third")
    net = net.double()
    return net, xzoo.to_dense(copy.deepcopy(net))


def as_dense(net, tensors):
    """Tensors of the X-net's parameters (gradients, vectors) in the sizes of its dense twin's."""
    result = []
    for name, value in zip(dict(net.named_parameters()), tensors, strict=True):
        layer = net.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and isinstance(layer, ExpanderConv2d | ExpanderLinear):
            value = ops.dense.scatter(value, layer.neighbours, layer._n_in)
        result.append(value)
    return result


def only_edges(net, tensors):
    """The same with what lies beside the edges put to zero, where a dense gradient is not."""
    edges = as_dense(net, [torch.ones_like(p) for p in net.parameters()])
    return [t * e for t, e in zip(tensors, edges, strict=True)]


def test_hessian_vector_product_of_a_net():
    net, dense = twins()
    x, labels = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    vectors = [p.detach().cos() for p in net.parameters()]

    def product(model, vectors):
        parameters = list(model.parameters())
        first = torch.autograd.grad(
            F.cross_entropy(model(x), labels), parameters, create_graph=True
        )
        return torch.autograd.grad(
            sum((g * v).sum() for g, v in zip(first, vectors, strict=True)), parameters
        )

    want = only_edges(net, product(dense, as_dense(net, vectors)))
    same(as_dense(net, product(net, vectors)), want)
    assert all(t.abs().max() > 1e-6 for t in want)


def test_gradient_penalty_of_a_net():
    net, dense = twins()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    def penalty(model):
        seen = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(seen).sum(), seen, create_graph=True)
        return torch.autograd.grad(
            (slope.flatten(1).norm(dim=1) - 1).square().mean(), list(model.parameters())[:-1]
        )

    ours = [*penalty(net), torch.zeros_like(net.head.bias)]
    theirs = [*penalty(dense), torch.zeros_like(net.head.bias)]
    same(as_dense(net, ours), only_edges(net, theirs))


def test_model_agnostic_meta_learning():
    net, dense = twins()
    x = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])

    def meta_gradient(model):
        parameters = dict(model.named_parameters())
        first = torch.autograd.grad(
            F.cross_entropy(model(x[0]), labels), parameters.values(), create_graph=True
        )
        # Of a dense twin only the edges learn.
        if model is dense:
            first = only_edges(net, first)
        learnt = {k: p - 0.5 * g for (k, p), g in zip(parameters.items(), first, strict=True)}
        loss = F.cross_entropy(functional_call(model, learnt, x[1]), labels)
        return torch.autograd.grad(loss, parameters.values())

    same(as_dense(net, meta_gradient(net)), only_edges(net, meta_gradient(dense)))


@pytest.mark.slow
def test_an_ensemble_of_stacked_models_trains_each():
    """Models with graphs of their own, their parameters and buffers stacked: torch's tutorial on
    ensembles.
    """
    models = [
        nn.Sequential(ExpanderLinear(8, 6, degree=3, seed=seed), nn.Tanh()) for seed in range(3)
    ]
    x = torch.randn(5, 8)
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,)).square().sum()

    for run in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        grads = run(lambda p, b: vmap(grad(loss), (0, 0, None))(p, b, x))(parameters, buffers)
        for i, model in enumerate(models):
            want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            same([g[i] for g in grads.values()], want, 1e-5)
    # Trained through vmap by backward(), as with stacked leaves.
    torch.stack(list(vmap(loss, (0, 0, None))(parameters, buffers, x))).sum().backward()
    for name, stacked in parameters.items():
        same(stacked.grad, grads[name], 1e-5)


def test_a_frozen_layer_under_vmap_hands_on_its_inputs_gradient():
    layer = ExpanderLinear(8, 6, degree=3).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    vmap(layer)(x).square().sum().backward()
    assert x.grad is not None
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_per_sample_gradients_add_up_to_the_batchs():
    layer, x = ExpanderConv2d(6, 4, 3, degree=3), torch.randn(5, 6, 6, 6)

    def loss(weight, x):
        return ops.conv2d(x[None], weight, layer.neighbours, layer.bias).square().sum()

    each = vmap(grad(loss), (None, 0))(layer.weight.detach(), x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(each.sum(0), layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_the_kernels_take_part_in_second_derivatives():
    """In float32, in sizes that `auto` gives to our own kernels where there are any."""
    torch.manual_seed(0)
    rows = torch.from_numpy(graphs.sample("biregular", 64, 64, 8, seed=0))
    x, weight, bias = torch.randn(16, 64, 6, 6), torch.randn(64, 8, 3, 3) / 8, torch.randn(64)

    def second(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        with ops.backend(backend):
            y = ops.conv2d(leaves[0], leaves[1], rows, leaves[2], (1, 1), (1, 1)).sin().sum()
            first = torch.autograd.grad(y, leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, want in zip(
        second(torch.float32, "auto"), second(torch.float64, "dense"), strict=True
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < 1e-5 and not math.isnan(error)
