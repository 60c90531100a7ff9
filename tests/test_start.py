"""Layers pass their inputs on along a matching; the first convolution whitens the patches of the
images.
"""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

from xzoo import graphs
from xzoo.errors import ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear
from xzoo.train.start import identity_start, whiten

examples = settings(derandomize=True, deadline=None, max_examples=100)


class Net(nn.Module):
    """What timm's models have of `start`'s concern: `first_conv`, and a classifier."""

    def __init__(self, first, *layers, first_conv="first"):
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(layers)
        self.fc = nn.Linear(4, 4)
        self.pretrained_cfg = {"first_conv": first_conv, "classifier": "fc"}

    def get_classifier(self):
        return self.fc


@st.composite
def graph_cases(draw, kinds=graphs.KINDS, largest=24):
    """Arguments of `graphs.sample` that admit a graph, and the graph."""
    kind = draw(st.sampled_from(kinds))
    share = draw(st.integers(1, 4))
    n_in, blocks = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    if kind in ("group", "shuffle"):
        degrees = [d for d in range(1, n_in + 1) if n_in % d == 0]
    elif kind == "ramanujan":
        # Dense enough that a draw meets the bound.
        n_in, blocks = max(n_in, 4), max(blocks, 4)
        degrees = [d for d in range(max(2, n_in // 2), n_in + 1) if blocks * d >= 2 * n_in]
    else:
        degrees = range(1, n_in + 1)
    degree, seed = draw(st.sampled_from(list(degrees))), draw(st.integers(0, 9))
    return {
        "kind": kind,
        "n_in": n_in,
        "n_out": blocks * share,
        "degree": degree,
        "share": share,
        "seed": seed,
    }


def edges_of(case):
    """0/1 matrix [n_out, n_in] of the layer, entry by entry."""
    matrix = np.zeros((case["n_out"], case["n_in"]), dtype=int)
    for block, row in enumerate(graphs.sample(**case)):
        for i in row:
            matrix[block * case["share"] : (block + 1) * case["share"], i] = 1
    return matrix


def matching_of(case):
    return graphs.matching(graphs.sample(**case), case["n_in"], case["share"])


@examples
@given(case=graph_cases())
def test_matching_pairs_outputs_with_inputs_that_they_read_and_has_the_largest_size(case):
    found, edges = matching_of(case), edges_of(case)
    assert found.shape == (case["n_out"],) and found.dtype == np.int64
    matched = np.flatnonzero(found >= 0)
    assert (found[found < 0] == -1).all()
    assert edges[matched, found[matched]].all()
    assert len(set(found[matched])) == len(matched)
    rows, columns = linear_sum_assignment(edges, maximize=True)
    assert len(matched) == edges[rows, columns].sum()
    assert np.array_equal(found, matching_of(case))


@examples
@given(case=graph_cases(kinds=[kind for kind in graphs.KINDS if kind != "random"]))
def test_matching_saturates_the_smaller_side_where_inputs_are_read_equally_often(case):
    reads = edges_of(case).sum(axis=0)
    # a share multiplies what one read more makes of a difference
    within = 1 if case["share"] == 1 else 0
    if reads.max() - reads.min() <= within and reads.min() > 0:
        assert (matching_of(case) >= 0).sum() == min(case["n_in"], case["n_out"])


def test_matching_leaves_out_what_a_graph_cannot_match():
    neighbours = np.array([[0, 1], [0, 1], [0, 1], [2, 3]], dtype=np.int32)
    assert sorted(graphs.matching(neighbours, 4)) == [-1, 0, 1, 2]
    assert sorted(graphs.matching(neighbours, 4, share=2)) == [-1] * 4 + [0, 1, 2, 3]
    random = graphs.sample("random", 32, 32, 2, seed=0)
    assert 16 < (graphs.matching(random, 32) >= 0).sum() < 32


@examples
@given(case=graph_cases(), kernel=st.sampled_from([(1, 1), (3, 3), (5, 1)]), bias=st.booleans())
def test_convolution_copies_its_matched_inputs_exactly(case, kernel, bias):
    n_in, n_out = case["n_in"], case["n_out"]
    options = {name: case[name] for name in ("degree", "share", "seed")} | {
        "graph": case["kind"],
        "bias": bias,
    }
    layer = ExpanderConv2d(n_in, n_out, kernel, padding="same", **options)
    before = layer.weight.detach().clone()
    told = identity_start(Net(nn.Conv2d(3, 4, 3), layer))
    found = matching_of(case)
    x = torch.randn(2, n_in, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = layer(x)
    assert_copied(x, y, found)
    left = torch.from_numpy(found < 0)
    assert torch.equal(layer.weight[left], before[left])
    assert told == (1, (found >= 0).sum(), min(n_in, n_out))


@examples
@given(case=graph_cases(), bias=st.booleans())
def test_linear_layer_copies_its_matched_inputs_exactly(case, bias):
    n_in, n_out = case["n_in"], case["n_out"]
    options = {name: case[name] for name in ("degree", "share", "seed")} | {
        "graph": case["kind"],
        "bias": bias,
    }
    layer = ExpanderLinear(n_in, n_out, **options)
    before = layer.weight.detach().clone()
    identity_start(Net(nn.Conv2d(3, 4, 3), layer))
    found = matching_of(case)
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = layer(x)
    assert_copied(x, y, found)
    left = torch.from_numpy(found < 0)
    assert torch.equal(layer.weight[left], before[left])


def assert_copied(x, y, found):
    outputs = np.flatnonzero(found >= 0)
    assert torch.equal(y[:, outputs], x[:, found[outputs]])


@pytest.mark.parametrize(("n_in", "n_out"), [(5, 8), (8, 5), (6, 6)])
def test_dense_layers_start_as_torch_does(n_in, n_out):
    conv, linear = nn.Conv2d(n_in, n_out, 3), nn.Linear(n_in, n_out)
    drawn = conv.weight.detach().clone(), linear.weight.detach().clone()
    assert identity_start(Net(nn.Conv2d(3, 4, 3), conv, linear)) == (
        2,
        2 * min(n_in, n_out),
        2 * min(n_in, n_out),
    )
    first = min(n_in, n_out)
    expected = nn.init.dirac_(torch.empty(n_out, n_in, 3, 3))
    assert torch.equal(conv.weight[:first], expected[:first])
    assert torch.equal(linear.weight[:first], torch.eye(n_out, n_in)[:first])
    assert torch.equal(conv.weight[first:], drawn[0][first:])
    assert torch.equal(linear.weight[first:], drawn[1][first:])
    for layer in (conv, linear):
        assert not layer.bias[:first].any()
        assert layer.bias[first:].all()


def test_what_has_no_identity_stays_as_it_was_drawn():
    layers = (
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 2),
        nn.Conv2d(8, 8, (3, 2)),
        nn.BatchNorm2d(8),
    )
    net = Net(nn.Conv2d(3, 8, 3), *layers)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert identity_start(net) == (0, 0, 0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_network_of_the_zoo_passes_on_all_it_can():
    net = timm.create_model("x_vgg16_c16", num_classes=10).to(memory_format=torch.channels_last)
    net.features[3].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    told = identity_start(net)
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    assert told.layers == 13  # 12 convolutions and the hidden layer
    assert told.passed == told.possible == sum(widths[:-1]) + 512
    after = net.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert not {
        key
        for key in changed
        if key.startswith(("features.0.", "fc.")) or key.endswith("neighbours")
    }
    assert not net.features[3].weight.requires_grad
    assert net.features[7].weight.requires_grad
    assert net.features[7].weight.is_contiguous(memory_format=torch.channels_last)


def photos(n, channels, height, width, seed=0):
    """Smooth and noisy at once, with a mean, so that patches are far from white."""
    draw = np.random.default_rng(seed)
    smooth = draw.normal(size=(n, channels, height, width)).cumsum(axis=2).cumsum(axis=3) / 4
    return torch.from_numpy(smooth + draw.normal(size=smooth.shape) + 0.5).float()


def patches_of(images, layer):
    """All patches [count, d] within the images in float64, by loops."""
    kh, kw = layer.kernel_size
    stride = layer.stride[0]
    found = []
    for image in images.numpy().astype(np.float64):
        for top in range(0, image.shape[1] - kh + 1, stride):
            for left in range(0, image.shape[2] - kw + 1, stride):
                found.append(image[:, top : top + kh, left : left + kw].ravel())
    return np.array(found)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    channels=st.integers(1, 3),
    kernel=st.sampled_from([(2, 2), (3, 3), (1, 2)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    more=st.integers(-6, 3),
)
def test_whitened_patches_have_unit_second_moment(channels, kernel, stride, padding, more):
    d = channels * kernel[0] * kernel[1]
    n_out = max(2, 2 * d + more)
    layer = nn.Conv2d(channels, n_out, kernel, stride=stride, padding=min(padding, 1))
    before = layer.weight.detach().clone()
    images = photos(12, channels, 9, 8)
    whiten(Net(layer), images, eps=1e-9)
    k = min(d, n_out // 2)
    patches = patches_of(images, layer)
    filters = layer.weight.detach().double().numpy().reshape(n_out, d)
    y = patches @ filters[:k].T
    assert np.abs(y.T @ y / len(y) - np.eye(k)).max() < 1e-3
    # Of all directions, those that hold most: what is left of the patches is the sum of the other
    # eigenvalues.
    values = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    assert np.allclose(1 / (filters[:k] ** 2).sum(axis=1), values[:k], rtol=1e-3)
    assert np.array_equal(filters[k : 2 * k], -filters[:k])
    assert torch.equal(layer.weight[2 * k :], before[2 * k :])
    assert not layer.bias.any()


def test_eps_bounds_the_filters_of_images_without_contrast():
    layer = nn.Conv2d(3, 24, 2, bias=False)
    whiten(Net(layer), torch.ones(4, 3, 8, 8))
    lengths = layer.weight.detach()[:12].flatten(1).norm(dim=1)
    expected = [1 / math.sqrt(12 + 5e-4)] + [1 / math.sqrt(5e-4)] * 11
    torch.testing.assert_close(lengths, torch.tensor(expected), rtol=1e-4, atol=0)


def test_images_are_taken_in_parts(monkeypatch):
    images, whole, parts = photos(10, 3, 8, 8), nn.Conv2d(3, 24, 2), nn.Conv2d(3, 24, 2)
    whiten(Net(whole), images)
    monkeypatch.setattr("xzoo.train.start.CHUNK", 3 * 12 * 64)
    whiten(Net(parts), images)
    # Eigenvectors have a sign of their own; both signs are there.
    found, expected = (layer.weight.detach()[:12].flatten(1) for layer in (parts, whole))
    torch.testing.assert_close(
        (found * expected).sum(1).abs(), (expected**2).sum(1), rtol=1e-4, atol=0
    )


def test_network_of_the_zoo_is_whitened_and_keeps_its_form():
    net = timm.create_model("x_vgg16_c16", num_classes=10).to(memory_format=torch.channels_last)
    net.features[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = photos(8, 3, 32, 32)
    whiten(net, images)
    weight = net.features[0].weight
    assert not weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)
    y = (
        patches_of(images, net.features[0])
        @ weight.detach().double().numpy().reshape(64, 27)[:27].T
    )
    # eigenvalue / (eigenvalue + eps) on the diagonal, and the eigenvalues of these images are above
    # 0.1.
    assert np.abs(y.T @ y / len(y) - np.eye(27)).max() < 6e-3
    assert torch.equal(weight[54:], before["features.0.weight"][54:])
    changed = {
        key for key, value in net.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"features.0.weight"}  # its bias was zero


def test_air_is_made_for_both():
    net = timm.create_model("x_air94", num_classes=10)
    assert identity_start(net) == (6, 24 + 2 * 128 + 3 * 512, 24 + 2 * 128 + 3 * 512)
    images = photos(8, 3, 32, 32)
    whiten(net, images, eps=1e-9)
    filters = net.features[0].weight.detach().double().numpy().reshape(24, 12)
    y = patches_of(images, net.features[0]) @ filters.T
    # Both signs of 12 directions are all of the 24 filters.
    both = np.kron([[1, -1], [-1, 1]], np.eye(12))
    assert np.abs(y.T @ y / len(y) - both).max() < 1e-3


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (Net(nn.Linear(3, 4)), "first layer first is Linear; whitening needs a dense nn.Conv2d"),
        (
            Net(ExpanderConv2d(3, 4, 3, degree=2)),
            "first layer first is ExpanderConv2d; whitening needs",
        ),
        (
            Net(nn.Conv2d(3, 6, 3, groups=3)),
            "first layer first is a grouped Conv2d; whitening needs",
        ),
        (Net(nn.Conv2d(1, 4, 3)), "first reads 1 channels and the images have 3; .*in_chans=3"),
        (Net(nn.Conv2d(3, 1, 3)), "first layer first has 1 filter; whitening needs 2 or more"),
        (
            Net(nn.Conv2d(3, 4, 3), first_conv=None),
            "Net has no first convolution; whitening needs one",
        ),
        (
            Net(nn.Conv2d(3, 4, 3), first_conv=("first", "fc")),
            "Net has 2 first convolutions, first, fc;",
        ),
    ],
)
def test_what_cannot_be_whitened_is_told_in_a_line(net, match):
    with pytest.raises(ModelError, match=match) as caught:
        whiten(net, torch.randn(2, 3, 8, 8))
    assert "\n" not in str(caught.value)
