"""Every architecture of the zoo: its name, its counts, its graphs, and what timm asks of a model.

golden/counts.csv was counted by a program that shares no code with xzoo; its rows with compression
1 equal torchvision's published parameters and multiply-accumulates. The sections on timm follow
timm's own tests of models.
"""

import copy
import csv
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import freeze_batch_norm_2d
from timm.models import load_checkpoint, save_for_hf
from timm.models._efficientnet_builder import efficientnet_init_weights
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import xzoo
from xzoo import graphs, weights
from xzoo.errors import GraphError, ModelError
from xzoo.hub import folder as hub_folder
from xzoo.layers import ExpanderConv2d, ExpanderLinear
from xzoo.models.x_timm import x_timm
from xzoo.models.x_vgg import x_vgg16

GOLDEN = Path(__file__).parent / "golden"

# The paper's and the authors' own degrees: weights, and millions of multiply-accumulates.
DEGREES = {
    "x_vgg16": (809_664, 88.8),
    "x_vgg16_1": (1_649_344, 114.6),
    "x_vgg16_2": (1_141_440, 110.1),
    "x_alexnet_1": (7_613_120, 661),
    "x_alexnet_2": (9_710_272, 663),
}
# The other names: their network in counts.csv, and its compression.
EVEN = {
    **{f"x_vgg16_c{c}": ("vgg16_cifar", c) for c in (4, 8, 16)},
    **{f"x_resnet{depth}": (f"resnet{depth}", 2) for depth in (18, 34, 50, 101, 152)},
    **{f"x_resnet50_c{c}": ("resnet50", c) for c in (4, 8)},
    **{f"x_densenet{depth}": (f"densenet{depth}", 2) for depth in (121, 161, 169, 201)},
    **{
        f"x_densenetbc_{form}": (f"densenetbc_{form}", 2)
        for form in ("40_24", "40_36", "40_48", "40_60", "58_60", "70_60", "100_12")
    },
    **{f"x_mobilenet050_c{c}": ("mobilenetv1_050", c) for c in (2, 4, 8, 16)},
    "x_mobilenet100_c4": ("mobilenetv1_100", 4),
}
# Widths of the stages, convolutions of each, weights, millions of multiply-accumulates.
AIR = {
    "x_air94": ((128, 512, 512), 2, 1_986_848, 131.4),
    "x_air96": ((128, 384, 512), 3, 2_502_944, 133.1),
}
NAMES = (*DEGREES, *EVEN, *AIR)
# One of each class; all the others are slow. (AlexNet has VGG's class, and takes seconds to build.)
SMALL = ("x_air96", "x_vgg16_c16", "x_resnet18", "x_densenetbc_40_24", "x_mobilenet050_c16")
# The dense networks that timm has.
TIMM = {
    **{f"x_resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"x_densenet{depth}": f"densenet{depth}" for depth in (121, 161, 169, 201)},
    "x_mobilenet100_c4": "mobilenetv1_100",
}

scripting = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning"
)


def slow_unless(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", params=slow_unless(SMALL, NAMES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def built(name):
    """The model of `name` for 10 classes; not to be changed."""
    return timm.create_model(name, num_classes=10).eval()


@pytest.fixture(scope="module")
def reseeded(name):
    """The same with other graphs and weights; not to be changed."""
    return timm.create_model(name, num_classes=10, seed=1).eval()


@pytest.fixture
def model(built):
    """A copy that a test may do with as it likes."""
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def skeleton(name):
    """As timm configures it, without memory: for shapes and names only; not to be changed."""
    return on_meta(name).eval()


def on_meta(name, **options):
    return timm.create_model(name, device="meta", **options)


def images(name, batch=1, channels=3):
    """The smallest that the architectures take: 32 px, or 64."""
    side = min(64, timm.get_pretrained_cfg(name).input_size[-1])
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def x_layers(model):
    return {
        n: m for n, m in model.named_modules() if isinstance(m, ExpanderConv2d | ExpanderLinear)
    }


def graphs_of(model):
    """All graphs, in order, whatever the layers are called."""
    return [layer.neighbours for layer in x_layers(model).values()]


def assert_same_graphs(one, other):
    one, other = graphs_of(one), graphs_of(other)
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same_output(one, other, x):
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


@functools.cache
def counts():
    with (GOLDEN / "counts.csv").open(newline="") as file:
        return [
            {k: v if k == "network" else int(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def rows(network, compression):
    return [
        row for row in counts() if (row["network"], row["compression"]) == (network, compression)
    ]


def assert_counts(model, expected):
    """Of all sizes of images in the table."""
    assert expected
    for row in expected:
        found = xzoo.profile(model, (3, row["size"], row["size"]))
        assert (found.weights, found.params, found.macs) == (
            row["weights"],
            row["params"],
            row["macs"],
        )


# The registry.


def test_registry_has_these_names_and_no_others():
    assert sorted(xzoo.list_models()) == sorted((*NAMES, "x_timm"))
    assert timm.list_models("x_*") == xzoo.list_models()


def test_list_takes_a_pattern():
    assert xzoo.list_models("x_vgg16_c*") == ["x_vgg16_c4", "x_vgg16_c8", "x_vgg16_c16"]
    assert xzoo.list_models("resnet*") == []
    trained = [name for name in weights.entries() if name.startswith("x_vgg")]
    assert sorted(xzoo.list_models("x_vgg*", pretrained=True)) == sorted(trained)


@pytest.mark.parametrize("family", ["air", "vgg", "alexnet", "resnet", "densenet", "mobilenet"])
def test_families_are_filed_apart_from_those_of_timm(family):
    ours = timm.list_models(module=f"x_{family}")
    assert ours == [name for name in xzoo.list_models() if name.startswith(f"x_{family}")]
    assert not [name for name in timm.list_models(module=family) if name.startswith("x_")]


def test_names_without_weights_say_so():
    trained = {entry.architecture for entry in weights.entries().values()}
    names = [name for name in NAMES if name not in trained]
    assert not [name for name in names if timm.is_model_pretrained(name)]
    assert all(timm.get_pretrained_cfg(name).tag == "untrained" for name in names)


# Counts.


@pytest.mark.parametrize("name", slow_unless(("x_vgg16_c8", "x_densenet121", *SMALL), EVEN))
def test_name_has_the_independent_counts(name):
    network, compression = EVEN[name]
    found = rows(network, compression)
    assert_counts(on_meta(name, num_classes=found[0]["classes"]), found)


@pytest.mark.parametrize("compression", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "network", slow_unless(("vgg16_cifar", "resnet18", "densenetbc_40_24"), dict(EVEN.values()))
)
def test_every_compression_has_the_independent_counts(network, compression):
    name = next(name for name, (of, _) in EVEN.items() if of == network)
    found = rows(network, compression)[:1]  # the larger images; the smaller are in the test above
    assert_counts(on_meta(name, compression=compression, num_classes=found[0]["classes"]), found)


@pytest.mark.parametrize("name", DEGREES)
def test_tables_of_degrees_have_the_counts_of_the_paper_and_the_release(name):
    weights, millions = DEGREES[name]
    found = xzoo.profile(on_meta(name))
    assert found.weights == weights
    assert round(found.macs / 1e6, 1 if "vgg" in name else None) == millions


@pytest.mark.parametrize("name", ["x_vgg16", "x_alexnet_1"])
def test_dense_twin_of_a_table_of_degrees_has_the_independent_counts(name):
    network = {"x_vgg16": "vgg16_cifar", "x_alexnet_1": "alexnet"}[name]
    for row in rows(network, 1):
        found = xzoo.profile(on_meta(name, compression=1), (3, row["size"], row["size"]))
        # torchvision's AlexNet, which was counted, has no BatchNorm.
        norms = 2 * (64 + 192 + 384 + 256 + 256 + 4096 + 4096) if network == "alexnet" else 0
        assert (found.weights, found.params, found.macs) == (
            row["weights"],
            row["params"] + norms,
            row["macs"],
        )


def air_counts(widths, convs, compression, side):
    """Weights, parameters and multiply-accumulates for 10 classes, layer by layer."""
    side -= 1
    weights, params, macs = 24 * 3 * 2 * 2, 24, 24 * 3 * 2 * 2 * side**2
    n_in = 24
    for width in widths:
        for number in range(convs):
            degree = n_in if n_in == 24 else n_in // compression
            weights += width * degree * 9
            macs += width * degree * 9 * side**2
            params += 2 * width
            n_in = width
            if number == 0:
                side //= 2
    head = widths[-1] * 10
    return weights + head, params + weights + head, macs + head


@pytest.mark.parametrize("compression", [1, 4, 16])
@pytest.mark.parametrize("side", [20, 32])
@pytest.mark.parametrize("name", AIR)
def test_air_has_the_counts_of_its_layers(name, side, compression):
    widths, convs, *_ = AIR[name]
    found = xzoo.profile(on_meta(name, compression=compression), (3, side, side))
    assert (found.weights, found.params, found.macs) == air_counts(widths, convs, compression, side)


@pytest.mark.parametrize("name", AIR)
def test_air_has_the_counts_that_it_was_made_for(name):
    *_, weights, millions = AIR[name]
    found = xzoo.profile(on_meta(name))
    assert (found.weights, round(found.macs / 1e6, 1)) == (weights, millions)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("x_vgg16_c8", 512), ("x_densenetbc_40_24", 264), ("x_densenetbc_100_12", 342)],
)
def test_ninety_more_classes_cost_ninety_rows_of_the_classifier(name, inputs):
    ten, hundred = (xzoo.profile(on_meta(name, num_classes=n)) for n in (10, 100))
    assert hundred.weights - ten.weights == hundred.macs - ten.macs == 90 * inputs
    assert hundred.params - ten.params == 90 * inputs + 90


# Graphs.


@pytest.mark.parametrize("compression", [1, 2, 4, 8, 16])
def test_sharing_leaves_no_input_unread(name, compression):
    options = {} if name in DEGREES else {"compression": compression}
    for layer in x_layers(on_meta(name, share=16, spatial_share=16, **options)).values():
        n_in, n_out, degree = layer._n_in, layer._n_out, layer.degree
        for limit in (2, 4, 8, 16):
            share = graphs.effective_share(n_in, n_out, degree, limit)
            assert n_out % share == 0
            assert share <= limit
            assert share == 1 or n_out // share * degree >= 2 * n_in
        assert layer.share == share


def test_every_input_is_read_if_there_are_edges_enough(built):
    for layer in x_layers(built).values():
        read = len(np.unique(layer.neighbours.numpy()))
        assert read == min(layer._n_in, layer._n_out * layer.degree)


def test_only_too_few_edges_leave_inputs_unread():
    model = timm.create_model("x_densenetbc_100_12", compression=16)
    unread = {layer._n_in - len(layer.neighbours.unique()) for layer in x_layers(model).values()}
    assert unread == {0, 48 - 12 * 3}  # 3x3 convolutions: 12 outputs of degree 3 for 48 inputs


def test_spatial_kernels_have_a_share_of_their_own():
    layers = x_layers(on_meta("x_resnet50")).values()
    assert {layer.share for layer in layers if layer.kernel_size == (3, 3)} == {1}
    assert {layer.share for layer in layers if layer.kernel_size == (1, 1)} == {4}
    layers = x_layers(on_meta("x_resnet50", share=1, spatial_share=2)).values()
    assert {layer.share for layer in layers if layer.kernel_size == (3, 3)} == {2}
    assert {layer.share for layer in layers if layer.kernel_size == (1, 1)} == {1}


def test_graph_is_that_of_the_seed_and_the_name_of_the_layer(built):
    for name, layer in x_layers(built).items():
        seed = graphs.layer_seed(0, name)
        expected = graphs.sample(
            "biregular", layer._n_in, layer._n_out, layer.degree, layer.share, seed
        )
        assert np.array_equal(layer.neighbours, expected)


def digest(model):
    found = {
        name: graphs.fingerprint(layer.neighbours.numpy())
        for name, layer in x_layers(model).items()
    }
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def test_graphs_are_the_golden_ones(name, built):
    """Renew with: python tests/test_models.py (which means that seeds no longer give the graphs
    that they gave).
    """
    assert digest(built) == json.loads((GOLDEN / "model_graphs.json").read_text())[name]


def test_graphs_do_not_depend_on_other_random_draws(name, built):
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        state = np.random.get_state()
        other = timm.create_model(name, in_chans=1, num_classes=0)
        assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))
    assert_same_graphs(built, other)


def test_another_seed_draws_other_graphs(built, reseeded):
    pairs = zip(graphs_of(built), graphs_of(reseeded), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_state_dict_brings_its_graphs_into_a_model_of_another_seed(name, built, reseeded):
    other = copy.deepcopy(reseeded)
    other.load_state_dict(built.state_dict())
    assert_same_graphs(built, other)
    assert_same_output(built, other, images(name))


@pytest.mark.parametrize("form", [{}, {"feature_cls": "getter"}])
def test_feature_extractors_have_the_graphs_of_the_model(name, built, form):
    """Of the layers that it has: an extractor leaves out what comes after the last level."""
    features = timm.create_model(name, features_only=True, **form)
    kept = graphs_of(features)
    assert kept or "alexnet" in name  # whose X-layers all come after the features
    assert all(torch.equal(a, b) for a, b in zip(graphs_of(built), kept, strict=False))


def test_meta_model_is_filled_by_a_state_dict(name, built):
    with torch.device("meta"):
        other = timm.create_model(name, num_classes=10, seed=1)
    assert all(p.is_meta for p in other.state_dict().values())
    other.load_state_dict(built.state_dict(), assign=True)
    assert_same_graphs(built, other)
    assert_same_output(built, other.eval(), images(name))


def test_another_process_draws_the_same_graphs():
    code = """
import xzoo
model = xzoo.create_model("x_mobilenet050_c16")
print([xzoo.graphs.fingerprint(b.numpy()) for name, b in model.named_buffers() if name.endswith("neighbours")])
"""
    # Another hash seed: sets of strings come in another order.
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    ours = [
        graphs.fingerprint(graph.numpy())
        for graph in graphs_of(timm.create_model("x_mobilenet050_c16"))
    ]
    assert run.stdout.strip() == str(ours)


@pytest.mark.parametrize("kind", ["random", "group", "shuffle"])
@pytest.mark.parametrize("name", ["x_densenetbc_40_24", "x_mobilenet050_c4"])
def test_graph_may_be_of_any_kind(name, kind):
    model = timm.create_model(name, graph=kind).eval()
    assert {layer.graph for layer in x_layers(model).values()} == {kind}
    assert x_layers(model).keys() == x_layers(on_meta(name)).keys()
    assert model(images(name)).isfinite().all()


def test_group_takes_the_largest_divisor_and_says_so(caplog):
    model = on_meta("x_densenetbc_100_12", graph="group", compression=8)
    layer = model.get_submodule("features.denseblock1.denselayer2.conv1")
    assert (layer.in_channels, layer.degree) == (36, 4)
    model = on_meta("x_densenetbc_100_12", graph="group", compression=5)
    layer = model.get_submodule("features.denseblock1.denselayer2.conv1")
    assert (layer.in_channels, layer.degree) == (36, 6)  # 36 // 5 = 7
    assert "features.denseblock1.denselayer1.conv2: 8 instead of 9 of 48 inputs" in caplog.text


def test_ramanujan_is_met_by_every_layer():
    model = timm.create_model("x_mobilenet050_c4", graph="ramanujan")
    for layer in x_layers(model).values():
        _, second = graphs.singular_values(layer.neighbours.numpy(), layer._n_in)
        assert second <= graphs.ramanujan_bound(
            layer._n_in, len(layer.neighbours), layer.degree
        ) * (1 + 1e-6)


# What is expanded, and what that leaves alone.


def test_dense_twin_has_the_same_other_keys(name, skeleton):
    twin = on_meta(name, compression=1)
    assert not x_layers(twin)
    expanded = x_layers(skeleton)
    for prefix, layer in expanded.items():
        keys = ["weight", "neighbours"] if layer.bias is None else ["weight", "bias", "neighbours"]
        assert [key for key in skeleton.state_dict() if key.startswith(f"{prefix}.")] == [
            f"{prefix}.{k}" for k in keys
        ]
    ours = [key for key in skeleton.state_dict() if not key.endswith(".neighbours")]
    assert ours == list(twin.state_dict())


def test_stem_classifier_and_depthwise_convolutions_stay_dense(skeleton):
    cfg = skeleton.pretrained_cfg
    assert type(skeleton.get_submodule(cfg["first_conv"])) is nn.Conv2d
    assert type(skeleton.get_submodule(cfg["classifier"])) is nn.Linear
    for name, layer in skeleton.named_modules():
        if getattr(layer, "groups", 1) > 1 or "downsample" in name:
            assert name not in x_layers(skeleton)
    if isinstance(skeleton, timm.models.EfficientNet):
        assert len(x_layers(skeleton)) == 12


@pytest.mark.parametrize("name", slow_unless(("x_resnet18", "x_mobilenet100_c4"), TIMM))
def test_compression_one_is_the_network_of_timm(name):
    ours, theirs = (
        timm.create_model(name, compression=1).eval(),
        timm.create_model(TIMM[name]).eval(),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_same_output(ours, theirs, images(name))


def test_expanded_weights_start_with_the_variance_of_the_true_fan_in(built):
    for layer in x_layers(built).values():
        # Four standard errors of a sample's standard deviation, 1 / sqrt(2 n); 5 % for the large
        # layers.
        tolerance = max(0.05, 4 / math.sqrt(2 * layer.weight.numel()))
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "initialise"),
    [
        ("x_resnet18", timm.models.ResNet.init_weights),
        ("x_mobilenet050_c16", efficientnet_init_weights),
    ],
)
def test_initialising_anew_leaves_the_graphs_alone(name, initialise):
    """timm calls every submodule's methods of certain names."""
    model = timm.create_model(name)
    before = copy.deepcopy(model)
    initialise(model)
    assert_same_graphs(before, model)


# Networks for small images.


@pytest.mark.parametrize("name", AIR)
def test_air_computes_what_its_source_does(name):
    """Written down with torch's functions, and dense weights."""
    model = timm.create_model(name, num_classes=10)
    dense = xzoo.to_dense(copy.deepcopy(model)).train()
    x = images(name, batch=4)
    state = {key: value.clone() for key, value in dense.state_dict().items()}

    def conv(x, key):
        return F.conv2d(x, state[f"{key}.weight"], padding=1)

    def norm(x, key):
        return F.batch_norm(
            x, None, None, state[f"{key}.weight"], state[f"{key}.bias"], training=True
        )

    y = F.gelu(F.conv2d(x, state["features.0.weight"], state["features.0.bias"]))
    for stage in ("features.2", "features.3", "features.4"):
        y = F.gelu(norm(F.max_pool2d(conv(y, f"{stage}.enter.0"), 2), f"{stage}.enter.2"))
        first = y
        y = norm(conv(y, f"{stage}.branch.0"), f"{stage}.branch.1")
        if name == "x_air96":
            y = norm(conv(F.gelu(y), f"{stage}.branch.3"), f"{stage}.branch.4") + first
        y = F.gelu(y)
    expected = y.amax(dim=(2, 3)) @ state["fc.weight"].T / 9
    with torch.no_grad():
        torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [20, 24, 28, 32, 40])
@pytest.mark.parametrize("name", ["x_vgg16_c16", *AIR])
def test_small_networks_take_images_of_growing_sizes(name, side):
    model = timm.create_model(name, num_classes=10, compression=16).train()
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.fc.weight.grad.any()
    sizes = [
        feature.shape[2]
        for feature in model.eval().forward_intermediates(x, intermediates_only=True)
    ]
    reductions = [info["reduction"] for info in model.feature_info]
    assert all(
        size <= math.ceil(side / reduction)
        for size, reduction in zip(sizes, reductions, strict=True)
    )


@pytest.mark.parametrize("side", [32, 64])
def test_rounding_up_changes_nothing_at_multiples_of_32_pixels(side):
    model = timm.create_model("x_vgg16_c16", num_classes=10).eval()
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = False
    assert_same_output(
        model, other, torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    )


# timm's contract: shapes and names.


def test_configuration_describes_the_network(name, skeleton):
    cfg = skeleton.pretrained_cfg
    assert cfg["architecture"] == name
    state = skeleton.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    assert skeleton.get_classifier() is skeleton.get_submodule(cfg["classifier"])
    assert skeleton.num_classes == cfg["num_classes"] == skeleton.get_classifier().out_features
    x = torch.empty(1, *cfg["input_size"], device="meta")
    with torch.no_grad():
        features = skeleton.forward_features(x)
        assert tuple(features.shape) == (1, skeleton.num_features, *cfg["pool_size"])
        assert skeleton.forward_head(features, pre_logits=True).shape == (
            1,
            skeleton.head_hidden_size,
        )
        assert skeleton(x).shape == (1, cfg["num_classes"])


def test_classifier_can_be_left_out(name, skeleton):
    model = on_meta(name).eval()
    cfg = model.pretrained_cfg
    x = torch.empty(1, *cfg["input_size"], device="meta")
    with torch.no_grad():
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == (1, model.head_hidden_size)
        assert on_meta(name, num_classes=0).eval()(x).shape == (1, skeleton.head_hidden_size)
        model.reset_classifier(0, "")
        unpooled = (1, model.num_features, *cfg["pool_size"])
        assert model(x).shape == unpooled
        assert on_meta(name, num_classes=0, global_pool="")(x).shape == unpooled
        model.reset_classifier(7, "avg")
        assert model(x).shape == (1, 7)


def test_new_classifier_keeps_mode_type_and_pooling(name, model):
    model.to(torch.float64).reset_classifier(5)
    assert not model.get_classifier().training
    assert model.get_classifier().weight.dtype == torch.float64
    assert model(images(name).double()).shape == (1, 5)
    other = on_meta(name, global_pool="max")
    other.reset_classifier(5)
    assert other.global_pool.pool_type == "max"


def test_plain_networks_pool_before_their_hidden_layers():
    with pytest.raises(ModelError, match="global_pool='' with num_classes=10"):
        timm.create_model("x_vgg16", global_pool="")
    with pytest.raises(ModelError, match="global_pool='catavgmax'"):
        timm.create_model("x_vgg16", global_pool="catavgmax", num_classes=0)


def test_group_matcher_puts_every_parameter_into_one_group(name, skeleton):
    twin = on_meta(name, compression=1)
    for coarse in (False, True):
        groups = group_parameters(skeleton, skeleton.group_matcher(coarse=coarse))
        found = [parameter for group in groups.values() for parameter in group]
        assert sorted(found) == sorted(n for n, _ in skeleton.named_parameters())
        assert groups == group_parameters(twin, twin.group_matcher(coarse=coarse))
        assert len(groups) > 2


# timm's contract: computing.


def test_forward_is_finite_and_the_same_with_checkpointing(name, model):
    # else torch warns that checkpoints have nothing to recompute for
    x = images(name).requires_grad_()
    y = model(x)
    assert y.shape == (1, 10)
    assert y.isfinite().all()
    calls = Counter()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: calls.update([module]))
    model.set_grad_checkpointing()
    again = model(x)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    again.sum().backward()
    assert max(calls.values()) == 2  # computed a second time for the backward pass


def traced_by_fx(model):
    head = model.pretrained_cfg["classifier"]
    traced = create_feature_extractor(model, [head], tracer_kwargs={"param_shapes_constant": True})
    return traced, lambda x: traced(x)[head]


@pytest.mark.parametrize("traced", [False, True])
def test_every_parameter_gets_a_gradient(name, model, traced):
    model.train()
    network, run = traced_by_fx(model) if traced else (model, model)
    run(images(name, batch=2)).mean().backward()
    parameters = dict(network.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())


def test_traced_by_fx_it_gives_the_same_bits(name, model):
    _, run = traced_by_fx(model)
    assert_same_output(run, model, images(name))


@scripting
def test_scripted_it_computes_the_same(name, model):
    scriptable = on_meta(name, num_classes=10, scriptable=True).eval()
    scriptable.load_state_dict(model.state_dict(), assign=True)
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(scriptable)(x), model(x), rtol=1e-4, atol=1e-5)


@scripting
@pytest.mark.parametrize("name", SMALL)
def test_traced_and_scripted_it_computes_the_same(name):
    model = timm.create_model(name, num_classes=10).eval()
    traced, _ = traced_by_fx(model)
    x = images(name)
    with torch.no_grad():
        (y,) = torch.jit.script(traced)(x).values()
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", [{}, {"feature_cls": "getter"}, {"feature_cls": "hook"}, {"feature_cls": "fx"}]
)
def test_features_have_the_channels_and_sizes_that_they_say(name, form):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, **form).eval()
    side = timm.get_pretrained_cfg(name).input_size[-1]
    with torch.no_grad():
        features = model(torch.empty(1, 3, side, side, device="meta"))
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(features) == len(channels) >= 3
    for feature, width, reduction in zip(features, channels, reductions, strict=True):
        assert feature.shape[:2] == (1, width)
        assert feature.shape[2] <= math.ceil(side / reduction) + 1


def test_features_are_those_of_the_model(name, model):
    with torch.device("meta"):
        extractor = timm.create_model(name, features_only=True).eval()
    state = flat_keys(model, extractor)
    extractor.load_state_dict({key: state[key] for key in extractor.state_dict()}, assign=True)
    x = images(name)
    with torch.no_grad():
        *_, last = extractor(x)
        _, intermediates = model.forward_intermediates(
            x, indices=extractor.feature_info.out_indices
        )
    assert torch.equal(last, intermediates[-1])


def flat_keys(model, extractor):
    """The state of the model under the names of an extractor, which writes features_conv0 for
    features.conv0.
    """
    state = model.state_dict()
    if any(key.startswith("features_") for key in extractor.state_dict()):
        return {key.replace("features.", "features_", 1): value for key, value in state.items()}
    return state


def test_intermediates_end_in_the_features(name, model):
    x = images(name).requires_grad_()
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        last, intermediates = model.forward_intermediates(x, output_fmt="NCHW")
        torch.testing.assert_close(last, model.forward_features(x), rtol=1e-4, atol=1e-5)
        infos = model.feature_info
        assert len(intermediates) == len(infos)
        for feature, info in zip(intermediates, infos, strict=True):
            assert feature.shape[1] == info["num_chs"]
            assert feature.shape[2] <= math.ceil(x.shape[2] / info["reduction"]) + 1
            assert feature.isfinite().all()


def test_pruning_keeps_the_intermediates_that_were_asked_for(name, model):
    x = images(name)
    indices = [0, 2]
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        kept = model.prune_intermediate_layers(indices)
        after = model.forward_intermediates(x, indices=kept, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert model(x).shape[1] == after[-1].shape[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_other_channels(name, channels):
    model = on_meta(name, in_chans=channels).eval()
    side = images(name).shape[-1]
    assert model(torch.empty(2, channels, side, side, device="meta")).shape == (
        2,
        model.num_classes,
    )
    assert model.in_chans == channels
    cfg = timm.data.resolve_model_data_config(model)
    assert cfg["input_size"][1:] == model.pretrained_cfg["input_size"][1:]


def test_images_are_prepared_as_the_configuration_says(skeleton):
    found, cfg = timm.data.resolve_model_data_config(skeleton), skeleton.pretrained_cfg
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert found[key] == cfg[key]
    x = timm.data.create_transform(**found)(Image.new("RGB", (90, 50)))
    assert tuple(x.shape) == cfg["input_size"]


def test_norms_can_be_frozen_or_synchronised(name, model):
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    torch.testing.assert_close(frozen(images(name)), model(images(name)), rtol=1e-4, atol=1e-5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    synchronised = timm.layers.convert_sync_batchnorm(copy.deepcopy(model))
    found = [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(found) == len(norms)
    assert_same_graphs(model, synchronised)
    timm.utils.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    timm.utils.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["x_resnet18", "x_densenet121", "x_mobilenet050_c4"])
def test_norm_and_activation_can_be_chosen_by_name(name):
    model = on_meta(
        name, norm_layer="groupnorm1" if "resnet" in name else "batchnorm2d", act_layer="silu"
    )
    assert [m for m in model.modules() if isinstance(m, nn.SiLU)]
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


# timm's extras: averaging, optimizers, deployment, checkpoints, folders.


def test_averaging_over_training_keeps_the_graphs(name, built, model):
    average = timm.utils.ModelEmaV3(model)  # decay 0.9999, whose rounding would move indices
    model.train()(images(name, batch=2)).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    average.update(model)
    assert_same_graphs(built, average.module)
    assert_same_graphs(built, model)


def test_averaging_of_norms_over_ranks_keeps_the_graphs(built, model, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(7))
    timm.utils.distribute_bn(model, world_size=2, reduce=False)
    assert_same_graphs(built, model)
    assert all(
        (m.running_mean == 7).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )


def test_weight_decay_takes_compact_weights_and_no_graph(skeleton):
    model = copy.deepcopy(skeleton)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.5)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    parameters = dict(model.named_parameters())
    assert decay.keys() == {id(p) for p in parameters.values()}
    assert not {id(t) for t in graphs_of(model)} & decay.keys()
    for key, parameter in parameters.items():
        assert decay[id(parameter)] == (
            0.5 if parameter.dim() > 1 and not key.endswith(".bias") else 0
        )


def test_layer_decay_scales_as_in_the_dense_twin(name, skeleton):
    def scales(model):
        optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.5, layer_decay=0.7)
        scale = {
            id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]
        }
        return {key: scale[id(p)] for key, p in model.named_parameters()}

    found = scales(copy.deepcopy(skeleton))
    assert found == scales(on_meta(name, compression=1))
    cfg = skeleton.pretrained_cfg
    assert (
        found[f"{cfg['first_conv']}.weight"]
        == min(found.values())
        < found[f"{cfg['classifier']}.weight"]
        == 1
    )


def test_reparameterizing_leaves_the_model_as_it_is(name, built, model):
    other = timm.utils.reparameterize_model(model)
    assert x_layers(other).keys() == x_layers(built).keys()
    assert_same_output(built, other, images(name))


def test_checkpoint_of_lightning_loads_with_a_filter(name, built, reseeded, tmp_path):
    path = tmp_path / "last.ckpt"
    state = {f"net.{key}": value for key, value in built.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 3}, path)
    other = copy.deepcopy(reseeded)

    def strip(state, model):
        return {key.removeprefix("net."): value for key, value in state.items()}

    load_checkpoint(other, str(path), filter_fn=strip)
    assert_same_output(built, other, images(name))


def test_dense_checkpoint_is_refused_strict_or_not(name, built, model):
    dense = xzoo.to_dense(copy.deepcopy(built)).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"neighbours: missing"):
            model.load_state_dict(dense, strict=strict)
    assert_same_graphs(built, model)


def test_checkpoint_without_graphs_is_refused_where_timm_is_not_strict(tmp_path):
    """With another number of classes timm loads without strictness."""
    path = tmp_path / "weights.pth"
    state = timm.create_model("x_mobilenet050_c16").state_dict()
    torch.save({key: value for key, value in state.items() if not key.endswith("neighbours")}, path)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    for classes in (1000, 3):
        with pytest.raises(RuntimeError, match=r"neighbours: missing"):
            timm.create_model("x_mobilenet050_c16", num_classes=classes, **options)


@pytest.mark.parametrize("options", [{"in_chans": 1, "num_classes": 0}, {"features_only": True}])
def test_trained_weights_suit_other_channels_classes_and_uses(name, built, options, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(built.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 10}
    model = timm.create_model(
        name, pretrained=True, seed=1, pretrained_cfg_overlay=overlay, **options
    ).eval()
    for ours, theirs in zip(
        x_layers(model).values(), x_layers(built).values(), strict="features_only" not in options
    ):
        assert torch.equal(ours.neighbours, theirs.neighbours)
        assert torch.equal(ours.weight, theirs.weight)
    channels = 1 if "in_chans" in options else 3
    with torch.no_grad():
        y = model(images(name, channels=channels))
        if channels == 1:  # the sum over the channels of the trained stem
            features = built.forward_features(images(name, channels=1).expand(-1, 3, -1, -1))
            torch.testing.assert_close(
                y, built.forward_head(features, pre_logits=True), rtol=1e-4, atol=1e-5
            )


def test_folder_in_the_format_of_the_hub_gives_the_model_back(name, reseeded, tmp_path):
    model = reseeded
    save_for_hf(
        model,
        str(tmp_path),
        model_config={"label_names": list("abcdefghij")},
        safe_serialization=True,
    )
    # The arguments alone give the graphs; with the weights, the file's graphs win over those of the
    # seed.
    assert_same_graphs(model, timm.create_model(f"local-dir:{tmp_path}"))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, seed=4).eval()
    assert_same_output(model, loaded, images(name))
    assert loaded.pretrained_cfg["label_names"] == list("abcdefghij")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"] | {"seed": 1, "share": 4} == config["model_args"]


@pytest.mark.parametrize(
    ("entry_point", "options"),
    [(x_vgg16, {"compression": {"hidden.0": 16}}), (x_timm, {"base": "test_convnext"})],
)
def test_model_of_the_entry_point_alone_can_be_rebuilt(entry_point, options, tmp_path):
    model = entry_point(share=2, seed=5, **options).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_output(model, loaded, torch.randn(1, *model.pretrained_cfg["input_size"]))


def test_transformers_loads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = timm.create_model("x_mobilenet050_c16", num_classes=10, seed=3).eval()
    hub_folder.save(model, tmp_path / "folder", label_names=list("abcdefghij"))
    loaded = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "folder"
    ).eval()
    assert_same_graphs(model, loaded)
    x = images("x_mobilenet050_c16")
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x))


@pytest.mark.parametrize("location", ["expansion", "bottleneck"])
def test_hooks_of_mobilenet_survive_the_expansion(location):
    options = {"features_only": True, "feature_location": location}
    x = torch.zeros(1, 3, 64, 64)
    ours, dense = (
        timm.create_model("x_mobilenet050_c16", compression=c, **options).eval()(x) for c in (16, 1)
    )
    assert [y.shape for y in ours] == [y.shape for y in dense]
    assert len(ours) == 5


# x_timm: any dense model of timm, expanded.


def test_base_is_expanded_by_the_rules_of_expand():
    model = timm.create_model("x_timm", base="resnet18", compression=8, num_classes=10, seed=2)
    expected = timm.create_model("resnet18", num_classes=10)
    xzoo.expand(expected, 8, seed=2)
    assert x_layers(model).keys() == x_layers(expected).keys()
    assert_same_graphs(model, expected)
    assert model.pretrained_cfg["architecture"] == "x_timm"
    assert model.get_classifier() is model.fc


@pytest.mark.parametrize("base", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_expanded_base_comes_back_from_its_folder(base, tmp_path):
    model = timm.create_model("x_timm", base=base, compression=2, num_classes=7, seed=3).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_output(model, loaded, torch.randn(1, *model.pretrained_cfg["input_size"]))
    ours, theirs = (
        timm.data.resolve_model_data_config(m) for m in (loaded, timm.create_model(base))
    )
    assert json.dumps(ours) == json.dumps(theirs)  # where lists and tuples are the same


def test_expanded_base_takes_the_trained_weights_of_what_stays_connected(tmp_path, monkeypatch):
    dense = timm.create_model("test_resnet").eval()
    state = {key: value + 1 for key, value in dense.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    cfg = timm.models.PretrainedCfg(
        file=str(path), input_size=(3, 160, 160), first_conv="conv1", classifier="fc"
    )
    for key in ("test_resnet", "test_resnet.r160_in1k"):
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, key, cfg)
    model = xzoo.create_model("x_timm", base="test_resnet", pretrained=True)
    assert torch.equal(model.bn1.weight, state["bn1.weight"])
    name, layer = next(iter(x_layers(model).items()))
    for o, weight in enumerate(layer.weight):
        ratio = weight / state[f"{name}.weight"][o, layer.neighbours[o // layer.share].long()]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("base", ["test_vit", "test_resnet", "test_convnext"])
def test_expanded_base_gives_features(base):
    model = timm.create_model("x_timm", base=base, features_only=True, compression=2).eval()
    features = model(torch.zeros(1, 3, 160, 160))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert len(features) == 3


@pytest.mark.parametrize("base", ["nope", "x_resnet18", 3, ""])
def test_base_must_be_a_dense_model(base):
    with pytest.raises(ModelError, match=f"base={base!r} is not the name of a dense timm model"):
        xzoo.create_model("x_timm", base=base)


# Errors.


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("x_resnet51", {}, "unknown model 'x_resnet51'; did you mean x_resnet"),
        ("x_vgg", {}, "unknown model 'x_vgg'; did you mean x_vgg16"),
        ("qqqqqqq", {}, r"xzoo.list_models\(\) has the names"),
        ("x_vgg16.cifar11", {}, "x_vgg16 has no tag 'cifar11'; it has untrained"),
        ("x_vgg16.cifar11", {"pretrained": True}, "x_vgg16 has no tag 'cifar11'"),
        (
            "x_vgg16",
            {"pretrained": True},
            "x_vgg16 has no trained weights yet; use pretrained=False",
        ),
        (
            "x_timm",
            {"base": "test_nope", "pretrained": True},
            "base='test_nope' is not the name of a dense timm model",
        ),
        ("x_timm", {"base": "resnet10t.nope"}, "resnet10t has no tag 'nope'; it has c3_in1k"),
        ("ftp:x_vgg16", {}, "'ftp' is not a source of models; use hf-hub or local-dir"),
        ("local-dir:/no/such/folder", {}, "local-dir:/no/such/folder: Config file not found"),
        ("x_resnet18", {"widht": 3}, r"x_resnet18 takes no argument 'widht' \(given: 3\)"),
        ("x_mobilenet050_c4", {"widht": 3}, "x_mobilenet050_c4 takes no argument 'widht'"),
        ("x_timm", {"base": "test_vit", "widht": 3}, "x_timm takes no argument 'widht'"),
        ("x_vgg16", {"num_classes": -1}, "num_classes=-1: use an integer from 0 on"),
        ("x_vgg16", {"num_classes": 2.5}, "num_classes=2.5: use an integer from 0 on"),
        ("x_vgg16", {"in_chans": 0}, "in_chans=0: use an integer from 1 on"),
        ("x_resnet18", {"compression": 0}, "compression=0: use an integer from 1"),
        ("x_resnet18", {"compression": 2.0}, "compression=2.0: use an integer from 1"),
        ("x_resnet18", {"compression": True}, "compression=True: use an integer from 1"),
        ("x_resnet18", {"share": 0}, "share=0: use an integer from 1 on"),
        ("x_resnet18", {"spatial_share": 1.5}, "spatial_share=1.5: use an integer from 1 on"),
        ("x_resnet18", {"seed": -1}, "seed=-1: use an integer from 0 on"),
        ("x_resnet18", {"seed": "a"}, "seed='a': use an integer from 0 on"),
        (
            "x_vgg16",
            {"compression": {"features.3": 0}},
            r"\{'features.3': 0\}: a table gives degrees, integers from 1 on",
        ),
        (
            "x_vgg16",
            {"compression": {"fc": 8}},
            r"\{'fc': ...\}: fits no layer that is expanded; they are features.3,",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(name, options, match):
    with pytest.raises(ModelError, match=match) as caught:
        xzoo.create_model(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"graph": "ring"},
            "layer layer1.0.conv1: graph='ring' is not a kind of graph; use one of random, "
            "biregular",
        ),
        (
            {"graph": "ramanujan", "compression": 64},
            "layer layer1.0.conv1: graph='ramanujan' .*needs 2 edges or more",
        ),
    ],
)
def test_impossible_graphs_are_told_with_their_layer(options, match):
    with pytest.raises(GraphError, match=match):
        xzoo.create_model("x_resnet18", **options)


def test_folder_with_the_weights_of_another_architecture_is_refused(tmp_path):
    for name in ("x_mobilenet050_c16", "x_mobilenet050_c8"):
        save_for_hf(timm.create_model(name), str(tmp_path / name), safe_serialization=True)
    folder = tmp_path / "x_mobilenet050_c16"
    (tmp_path / "x_mobilenet050_c8" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"local-dir:.*has shape \[.*this layer needs") as caught:
        xzoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_models_of_timm_are_built_too():
    assert xzoo.create_model("test_resnet", num_classes=3).num_classes == 3


if __name__ == "__main__":
    found = {name: digest(timm.create_model(name)) for name in NAMES}
    (GOLDEN / "model_graphs.json").write_text(json.dumps(found, indent=1) + "\n")
