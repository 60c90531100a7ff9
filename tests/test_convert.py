"""Any model can be expanded: by rules that its report tells, keeping what it learnt, and back
again.
"""

import copy
import re
import warnings
from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import xzoo
from xzoo import graphs, ops
from xzoo.errors import GraphError, ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear


class Net(nn.Module):
    """One layer for each rule. x [B, 3, 12, 12] -> [B, 10]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.spatial = nn.Conv2d(16, 32, 3, stride=2, padding="valid", bias=False)
        self.point = nn.Conv2d(32, 32, 1)
        self.narrow = nn.Conv2d(32, 4, 1)
        self.small = nn.Conv2d(4, 32, 1)
        self.hidden = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.depthwise(self.stem(x)).relu()
        x = self.point(self.spatial(x).relu()).relu()
        x = self.small(self.narrow(x)).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


def two(first, second):
    """A model in which the first convolution and the classifier, which are kept, stand around the
    two.
    """
    return nn.Sequential(nn.Conv2d(3, 16, 1), first, second, nn.Linear(16, 2))


def reasons(report):
    return {row.name: row.reason for row in report.rows}


def x_layers(model):
    return {
        n: m for n, m in model.named_modules() if isinstance(m, ExpanderConv2d | ExpanderLinear)
    }


def rows_of(layer):
    """The inputs of each output, [out, degree]."""
    return layer.neighbours.long().repeat_interleave(layer.share, 0)


def images(batch=2):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0))


# Rules.


def test_report_gives_every_layer_and_its_reason():
    report = xzoo.expand(Net(), 4)
    assert reasons(report) == {
        "stem": "kept: the first convolution",
        "depthwise": "kept: a grouped convolution (16 groups)",
        "spatial": "degree 4, share 1",
        "point": "degree 8, share 4",
        # two blocks that read an input need 2 * 32 edges, and 4 outputs have 32
        "narrow": "degree 8, share 1",
        "small": "kept: only 4 inputs",
        "hidden": "degree 8, share 4",
        "head": "kept: the classifier",
    }
    assert report.replaced == ("spatial", "point", "narrow", "hidden")


def test_report_adds_up_to_the_model():
    model = Net()
    weights = xzoo.profile(model, (3, 12, 12)).weights
    report = xzoo.expand(model, 4)
    assert report.weights_before == weights
    assert report.weights_after == xzoo.profile(model, (3, 12, 12)).weights
    for row in report.rows:
        layer = model.get_submodule(row.name)
        assert row.weights_after == layer.weight.numel()
        assert (row.degree, row.share) == (
            getattr(layer, "degree", None),
            getattr(layer, "share", None),
        )
        assert row.weights_before == (4 if row.degree else 1) * row.weights_after


def test_report_is_a_table_with_the_sum_below():
    lines = str(xzoo.expand(Net(), 4)).splitlines()
    assert len(lines) == 9
    assert re.fullmatch(
        r"spatial +conv 16 -> 32, 3x3 +4,608 -> +1,152  degree 4, share 1", lines[2]
    )
    assert re.fullmatch(r"head +linear 64 -> 10 +640 -> +640  kept: the classifier", lines[7])
    assert lines[-1] == "4 of 8 layers expanded: 9,152 -> 3,296 weights, 2.78 times fewer"


def test_model_without_layers_has_an_empty_report():
    report = xzoo.expand(nn.Sequential(nn.ReLU()), 4)
    assert report.rows == report.replaced == ()
    assert str(report).startswith("0 of 0 layers expanded")


@pytest.mark.parametrize("compression", [2, 3, 8, 100])
def test_degree_is_the_compressed_number_of_inputs(compression):
    model = Net()
    xzoo.expand(model, compression)
    for layer in x_layers(model).values():
        assert layer.degree == max(1, layer._n_in // compression)


def test_compression_one_changes_nothing():
    model = Net()
    before = copy.deepcopy(model)
    report = xzoo.expand(model, 1)
    assert report.replaced == ()
    assert reasons(report)["point"] == "kept: every output would read every input"
    assert torch.equal(model(images()), before(images()))


def test_only_and_skip_take_patterns():
    assert xzoo.expand(Net(), only=["s*", "head"], skip="small").replaced == (
        "stem",
        "spatial",
        "head",
    )
    report = xzoo.expand(Net(), only="point")
    assert reasons(report)["hidden"] == "kept: not among the names in only"
    assert reasons(xzoo.expand(Net(), skip="h*"))["hidden"] == "kept: skipped by name"


def test_named_layers_are_expanded_where_the_rules_would_keep_them():
    assert xzoo.expand(Net(), 2, only=("stem", "small", "head")).replaced == (
        "stem",
        "small",
        "head",
    )
    assert reasons(xzoo.expand(Net(), only="depthwise"))["depthwise"].startswith(
        "kept: a grouped convolution"
    )


def test_classifier_is_what_timm_calls_so():
    model = timm.create_model("test_resnet")
    model.add_module("after", nn.Linear(16, 16))
    report = xzoo.expand(model)
    assert reasons(report)["fc"] == "kept: the classifier"
    assert "after" in report.replaced


def test_both_classifiers_of_a_distilled_model_are_kept():
    report = xzoo.expand(timm.create_model("levit_128s", device="meta"))
    assert {
        name for name, reason in reasons(report).items() if reason == "kept: the classifier"
    } == {
        "head.linear",
        "head_dist.linear",
    }


@pytest.mark.parametrize(
    ("share", "spatial_share", "expected"),
    [
        (1, 1, (1, 1)),
        (2, 4, (2, 4)),
        (16, 1, (8, 1)),  # 64 / 16 blocks of degree 4 would read 16 inputs only once
        (1, 16, (1, 8)),
    ],
)
def test_shares_go_by_the_kernel_and_leave_inputs_read_twice(share, spatial_share, expected):
    model = two(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3))
    xzoo.expand(model, 4, share, spatial_share)
    assert (model[1].share, model[2].share) == expected


@pytest.mark.parametrize("kind", ["group", "shuffle"])
def test_rival_graphs_take_the_largest_divisor(kind):
    model = two(nn.Conv2d(16, 36, 1), nn.Conv2d(36, 16, 1))
    report = xzoo.expand(model, 5, graph=kind)
    # of 16 // 5 = 3 and 36 // 5 = 7
    assert [row.degree for row in report.rows] == [None, 2, 6, None]


def test_graph_is_that_of_the_seed_and_the_name_of_the_layer():
    model, same, other = Net(), Net(), Net()
    xzoo.expand(model, 4, seed=3)
    torch.rand(7)
    xzoo.expand(same, 4, seed=3, only=("hidden", "spatial"))
    xzoo.expand(other, 4, seed=4)
    for name, layer in x_layers(same).items():
        assert torch.equal(layer.neighbours, model.get_submodule(name).neighbours)
    for name, layer in x_layers(model).items():
        seed = graphs.layer_seed(3, name)
        drawn = graphs.sample(
            "biregular", layer._n_in, layer._n_out, layer.degree, layer.share, seed
        )
        assert layer.neighbours.tolist() == drawn.tolist()
        assert not torch.equal(layer.neighbours, other.get_submodule(name).neighbours)


def test_expanding_twice_is_expanding_once():
    model = Net()
    xzoo.expand(model, 4)
    state = copy.deepcopy(model.state_dict())
    assert xzoo.expand(model, 4).replaced == ()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# Layers that must stay as they are.


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.free = nn.Linear(16, 16), nn.Linear(16, 16)
        self.list = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        x = nn.functional.linear(x, self.proj.weight) + self.list[1].weight.sum()
        return self.free(x.to(self.free.weight.dtype))


class ReadsByInheritance(ReadsWeight):
    pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("cls", [ReadsWeight, ReadsByInheritance])
def test_weights_that_a_module_reads_itself_stay(cls):
    model = nn.Sequential(cls(), nn.Linear(16, 2))
    found = reasons(xzoo.expand(model))
    assert found["0.proj"] == found["0.list.1"] == f"kept: {cls.__name__} reads its weight itself"
    assert found["0.free"] == "degree 4, share 2"
    assert model(torch.ones(1, 16)).shape == (1, 2)


def test_subclasses_stay():
    found = reasons(xzoo.expand(nn.Sequential(Scaled(16, 16), nn.Linear(16, 2))))
    assert found["0"] == "kept: Scaled is a subclass that may compute something else"


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated"),
        ),
    ],
)
def test_computed_weights_stay(compute):
    model = nn.Sequential(compute(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 2))
    report = xzoo.expand(model)
    assert reasons(report)["0"].startswith("kept: ")
    assert report.replaced == ("1",)
    model(torch.ones(1, 16)).sum().backward()


def test_tied_weights_and_shared_layers_stay():
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    tied[2].weight = tied[0].weight
    assert xzoo.expand(tied).replaced == ("1",)
    assert tied[2].weight is tied[0].weight
    bias = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    bias[1].bias = bias[0].bias
    assert xzoo.expand(bias).replaced == ()
    layer = nn.Linear(16, 16)
    shared = nn.Sequential(layer, layer, nn.Linear(16, 2))
    assert reasons(xzoo.expand(shared))["0"] == "kept: its weight is used in two places"
    assert shared[0] is shared[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "cls", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention]
)
def test_fast_paths_of_torch_stay_right(cls):
    """In eval mode without gradients, torch's transformers hand their weights to one fused
    operation.
    """
    options = {"dropout": 0.0, "batch_first": True}
    x = torch.randn(2, 5, 16)
    if cls is nn.MultiheadAttention:
        model = cls(16, 2, **options)
        arguments = (x, x, x)
    else:
        model = cls(16, 2, 32, **options)
        arguments = (x,) if cls is nn.TransformerEncoderLayer else (x, x)
    whole = nn.Sequential(model, nn.Linear(16, 2))
    report = xzoo.expand(whole)
    assert report.replaced == (
        ("0.linear1", "0.linear2") if cls is nn.TransformerDecoderLayer else ()
    )
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    slow = first(model.train()(*arguments))
    with torch.no_grad():
        fast = first(model.eval()(*arguments))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_transformer_around_expanded_layers_stays_right():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    )
    model = nn.Sequential(nn.Linear(16, 16), encoder, nn.Linear(16, 16), nn.Linear(16, 2))
    assert xzoo.expand(model).replaced == ("0", "2")
    x = torch.randn(2, 5, 16)
    slow = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), slow, rtol=1e-5, atol=1e-5)


# What has no X-form is named too.


class Everything(nn.Module):
    """One of each that holds weights, and small parameters, which are none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.one, self.three = nn.Conv1d(16, 32, 5), nn.Conv3d(16, 32, (1, 3, 3))
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.place, self.scale = nn.Parameter(torch.zeros(1, 9, 16)), nn.Parameter(torch.ones(16))
        self.words, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 3))
        self.done = ExpanderLinear(16, 16, degree=4)
        self.both, self.gru = nn.Bilinear(4, 5, 6), nn.GRU(4, 5)
        self.free, self.head = nn.Linear(16, 16), nn.Linear(16, 2)


def test_report_names_all_that_holds_weights():
    model = Everything()
    report = xzoo.expand(model)
    apart = "holds it itself, not in a convolution or linear layer"
    no_form = "nn.Conv2d and nn.Linear alone have an X-form"
    assert {row.name: (row.layer, row.weights_before, row.reason) for row in report.rows} == {
        "place": ("parameter 1x9x16", 144, f"kept: Everything {apart}"),
        "stem": ("conv 3 -> 16, 1x1", 48, "kept: the first convolution"),
        "one": ("Conv1d 16 -> 32, 5", 2560, f"kept: a Conv1d; {no_form}"),
        "three": ("Conv3d 16 -> 32, 1x3x3", 4608, f"kept: a Conv3d; {no_form}"),
        "up": ("ConvTranspose2d 16 -> 8, 2x2", 512, f"kept: a ConvTranspose2d; {no_form}"),
        "attention.in_proj_weight": ("parameter 48x16", 768, f"kept: MultiheadAttention {apart}"),
        "attention.out_proj": (
            "linear 16 -> 16",
            256,
            "kept: NonDynamicallyQuantizableLinear is a subclass that may compute something else",
        ),
        "words": ("Embedding 20x16", 320, f"kept: an Embedding; {no_form}"),
        "normed": ("Conv1d 16 -> 16, 3", 768, f"kept: a Conv1d; {no_form}"),
        "done": ("ExpanderLinear 16x4", 64, "kept: an X-layer already"),
        "both": ("Bilinear 6x4x5", 120, f"kept: a Bilinear; {no_form}"),
        "gru.weight_ih_l0": ("parameter 15x4", 60, f"kept: GRU {apart}"),
        "gru.weight_hh_l0": ("parameter 15x5", 75, f"kept: GRU {apart}"),
        "free": ("linear 16 -> 16", 256, "degree 4, share 2"),
        "head": ("linear 16 -> 2", 32, "kept: the classifier"),
    }


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_report_adds_up_for_models_of_any_parts(name):
    model = timm.create_model(name)
    weights = xzoo.profile(model).weights
    report = xzoo.expand(model)
    assert report.weights_before == weights and report.weights_after == xzoo.profile(model).weights


def test_networks_of_other_convolutions_say_so():
    report = xzoo.expand(torchvision.models.video.r3d_18(weights=None))
    kinds = Counter(row.layer.split()[0] for row in report.rows)
    assert kinds == {"Conv3d": 4, "Conv3DSimple": 16, "linear": 1} and report.replaced == ()


class Adapter(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base_layer, rank=8):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.up["default"](self.down["default"](x))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_of, self.lora_a, self.lora_b = (
            nn.Linear(32, 32),
            nn.Linear(32, 8),
            nn.Linear(8, 32),
        )

    def forward(self, x):
        return self.weight_of(x) + self.lora_b(self.lora_a(x))


def test_adapters_stay():
    model = nn.Sequential(Adapter(nn.Linear(32, 32)), LoRA(), Adapter(nn.Linear(32, 32)))
    report = xzoo.expand(model)
    assert report.replaced == ("0.base_layer", "1.weight_of")
    assert reasons(report)["2.base_layer"] == "kept: the classifier"
    adapters = (
        "0.down.default",
        "0.up.default",
        "1.lora_a",
        "1.lora_b",
        "2.down.default",
        "2.up.default",
    )
    assert [
        name for name, reason in reasons(report).items() if reason == "kept: a matrix of an adapter"
    ] == [*adapters]
    assert model(torch.ones(2, 32)).shape == (2, 32)


# What is kept of the model.


def test_surviving_weights_keep_their_direction_and_the_norm_of_the_output():
    model = Net()
    dense = copy.deepcopy(model)
    xzoo.expand(model, 4)
    for name, layer in x_layers(model).items():
        trained = dense.get_submodule(name)
        for o, inputs in enumerate(rows_of(layer)):
            kept = trained.weight[o, inputs]
            expected = kept * trained.weight[o].norm() / kept.norm()
            torch.testing.assert_close(layer.weight[o], expected)
        assert (layer.bias is None) == (trained.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, trained.bias)


def test_outputs_without_weights_stay_without():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    xzoo.expand(model)
    assert not model[0].weight.any()


def test_weights_can_be_drawn_anew():
    model = Net()
    dense = copy.deepcopy(model)
    xzoo.expand(model, 4, keep_weights=False)
    assert not torch.equal(model.hidden.bias, dense.hidden.bias)
    assert model.hidden.weight.abs().max() <= 8**-0.5  # torch's bound at a fan-in of 8
    assert torch.equal(model.head.weight, dense.head.weight)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_parameters_are_kept(training):
    model = Net().train(training)
    model.hidden.weight.requires_grad_(False)
    xzoo.expand(model)
    assert all(m.training is training for m in model.modules())
    assert not model.hidden.weight.requires_grad
    assert model.hidden.bias.requires_grad
    xzoo.to_dense(model)
    assert all(m.training is training for m in model.modules())
    assert not model.hidden.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_is_kept(dtype):
    model = Net().to(dtype)
    xzoo.expand(model)
    assert all(p.dtype == dtype for p in model.parameters())
    assert {b.dtype for b in model.buffers()} == {torch.int32}
    assert model(images().to(dtype)).dtype == dtype
    assert all(p.dtype == dtype for p in xzoo.to_dense(model).parameters())


def test_model_without_memory_stays_so_and_is_filled_later():
    model, full = Net().to("meta"), Net()
    report = xzoo.expand(model, seed=5)
    assert all(t.is_meta for t in model.state_dict().values())
    assert report == xzoo.expand(full)
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(model(images()), full(images()))
    assert all(t.is_meta for t in xzoo.to_dense(Net().to("meta")).state_dict().values())


def test_hooks_go_on_and_can_be_removed():
    model = two(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(start_dim=2))
    calls = []
    layer = model[1]
    handles = [
        layer.register_forward_hook(
            lambda m, args, kwargs, y: calls.append("forward"), with_kwargs=True
        ),
        layer.register_forward_pre_hook(lambda m, args: calls.append("pre")),
        layer.register_full_backward_hook(
            lambda m, dx, dy: calls.append(("back", len(dx), dx[0].shape))
        ),
    ]
    model = nn.Sequential(model[0], model[1])
    xzoo.expand(model, only="1")
    assert isinstance(model[1], ExpanderConv2d)
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert calls == ["pre", "forward", ("back", 1, (1, 16, 4, 4))]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert len(calls) == 3


def test_pretrained_classifier_still_works_a_little():
    """Norms of trained outputs kept, a network of random weights has outputs of the same size as
    before.
    """
    model = timm.create_model("resnet18", num_classes=10).eval()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.forward_features(x).std()
        xzoo.expand(model, 4)
        after = model.forward_features(x).std()
    assert 0.5 < after / before < 2


# The inverse.


def test_dense_again_gives_the_same_bits():
    model = Net()
    keys = list(model.state_dict())
    xzoo.expand(model, 4)
    before = copy.deepcopy(model)
    assert xzoo.to_dense(model) is model
    assert not x_layers(model)
    assert list(model.state_dict()) == keys
    assert {type(m) for m in (model.spatial, model.hidden)} == {nn.Conv2d, nn.Linear}
    with ops.backend("dense"):
        assert torch.equal(model(images()), before(images()))


def test_dense_layer_of_a_lone_layer_is_returned():
    conv = ExpanderConv2d(16, 8, 3, 2, 1, 2, padding_mode="circular", degree=4)
    same = ExpanderConv2d(16, 8, (1, 3), padding="same", degree=4)
    linear = ExpanderLinear(16, 8, degree=4, share=2)
    for layer, x in (
        (conv, torch.randn(1, 16, 9, 9)),
        (same, torch.randn(1, 16, 9, 9)),
        (linear, torch.randn(3, 16)),
    ):
        dense = xzoo.to_dense(layer)
        assert type(dense) in (nn.Conv2d, nn.Linear)
        with ops.backend("dense"):
            assert torch.equal(dense(x), layer(x))
        assert (dense.weight != 0).sum() == layer.weight.numel()


def test_shared_layer_stays_shared():
    layer = ExpanderLinear(16, 16, degree=4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    before = copy.deepcopy(model)
    xzoo.to_dense(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]
    torch.testing.assert_close(model(torch.ones(1, 16)), before(torch.ones(1, 16)))


def test_expanding_the_dense_form_again_gives_the_model_back():
    model = Net()
    xzoo.expand(model, 4, seed=6)
    before = copy.deepcopy(model)
    xzoo.expand(xzoo.to_dense(model), 4, seed=6)
    for name, layer in x_layers(before).items():
        assert torch.equal(model.get_submodule(name).neighbours, layer.neighbours)
        torch.testing.assert_close(model.get_submodule(name).weight, layer.weight)


def computed_layers():
    """X-layers whose weight is computed, and the call that ends it."""
    mk = lambda: ExpanderLinear(16, 16, degree=4)  # noqa: E731
    remove = torch.nn.utils.parametrize.remove_parametrizations
    yield (
        "remove_parametrizations",
        nn.utils.parametrizations.weight_norm(mk()),
        lambda la: remove(la, "weight"),
    )
    yield (
        "prune.remove",
        prune.l1_unstructured(mk(), "weight", 0.5),
        lambda la: prune.remove(la, "weight"),
    )
    yield (
        "prune.remove",
        prune.random_unstructured(mk(), "bias", 0.5),
        lambda la: prune.remove(la, "bias"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have the newer form
        yield "remove_weight_norm", nn.utils.weight_norm(mk()), nn.utils.remove_weight_norm


@pytest.mark.parametrize(("remedy", "layer", "remove"), list(computed_layers()))
def test_computed_x_layers_are_refused_by_name_and_the_remedy_helps(remedy, layer, remove):
    model = nn.Sequential(ExpanderLinear(16, 16, degree=4), layer, nn.Linear(16, 2))
    x = torch.ones(2, 16)
    before, first = model(x), model[0]
    with pytest.raises(
        ModelError, match=rf"layer 1 \(ExpanderLinear\): its \w+ is computed .*{remedy}\(layer"
    ):
        xzoo.to_dense(model)
    assert model[0] is first and torch.equal(model(x), before)
    assert xzoo.expand(copy_without_graph(model)).replaced == ()
    remove(layer)
    torch.testing.assert_close(xzoo.to_dense(model)(x), before)
    assert not x_layers(model)


def copy_without_graph(model):
    with torch.no_grad():
        model(torch.ones(1, 16))
    return copy.deepcopy(model)


class Doubled(ExpanderLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_of_x_layers_are_refused_by_name():
    with pytest.raises(
        ModelError, match=r"layer 0 \(Doubled\) is a subclass that may compute something else"
    ):
        xzoo.to_dense(nn.Sequential(Doubled(16, 16, degree=4)))


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_pruned_layers_stay(tensor):
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(16, 16), tensor, 0.5), nn.Linear(16, 2))
    assert reasons(xzoo.expand(model))[
        "0"
    ] == "kept: its weight is computed (parametrized)".replace("weight", tensor)
    model(torch.ones(1, 16)).sum().backward()


# Families of timm besides the paper's.

READERS = {
    "eva": "EvaAttention",
    "beit": "Attention",
    "swinv2": "WindowAttention",
    "mobilevitv2": "LinearSelfAttention",
}
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64}
FAMILIES = {
    "test_vit": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "eva02_tiny_patch14_224": TINY | {"img_size": 56},
    "beit_base_patch16_224": TINY,
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "embed_dim": 24,
        "depths": (1, 1),
        "num_heads": (2, 4),
    },
    "mobilevitv2_050": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "mobilevit_xxs": {"img_size": 64},
    "regnety_002": {},
    "coatnet_pico_rw_224": {"img_size": 64},
    "levit_128s": {"img_size": 64},
    "efficientformer_l1": {},
    "test_mambaout": {},
    "test_maxvit": {},
    "test_nfnet": {},
    "test_vit_relpos": {},
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "efficientnet_b0": {},
    "convnext_atto": {},
    "edgenext_xx_small": {},
    "davit_tiny": {},
    "maxvit_nano_rw_256": {"img_size": 64},
}
FAST = (
    "test_vit",
    "test_convnext",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "swinv2_tiny_window8_256",
)


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_family_can_be_expanded(family):
    """Forward, backward, counts, a state dict into another seed, and back to dense."""

    def build():
        return timm.create_model(family, **FAMILIES[family])

    model, size = build(), timm.get_pretrained_cfg(family).input_size
    side = FAMILIES[family].get("img_size", size[-1])
    shape = (3, side, side)
    before = xzoo.profile(model, shape)
    report = xzoo.expand(model, 4)
    after = xzoo.profile(model, shape)
    assert len(report.replaced) >= 5
    assert before.weights - after.weights == report.weights_before - report.weights_after > 0
    assert after.macs < before.macs
    reader = next((cls for prefix, cls in READERS.items() if family.startswith(prefix)), None)
    read = [row.reason for row in report.rows if "reads its weight" in row.reason]
    assert set(read) == ({f"kept: {reader} reads its weight itself"} if reader else set())

    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    y = model.train()(x)
    sum(part.square().mean() for part in (y if isinstance(y, tuple) else (y,))).backward()
    for layer in x_layers(model).values():
        assert layer.weight.grad is not None
        assert layer.weight.grad.isfinite().all()

    other = build()
    xzoo.expand(other, 4, seed=1)
    other.load_state_dict(model.state_dict())
    with torch.no_grad(), ops.backend("dense"):
        expected = model.eval()(x)
        assert torch.equal(other.eval()(x), expected)
        assert torch.equal(xzoo.to_dense(model)(x), expected)


# Errors.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compression": 0}, "compression=0: use an integer from 1"),
        ({"compression": -2}, "compression=-2: use an integer from 1"),
        ({"compression": 2.5}, "compression=2.5: use an integer from 1"),
        ({"compression": True}, "compression=True: use an integer from 1"),
        ({"share": 0}, "share=0: use an integer from 1 on"),
        ({"share": "4"}, "share='4': use an integer from 1 on"),
        ({"spatial_share": 0}, "spatial_share=0: use an integer from 1 on"),
        ({"seed": -1}, "seed=-1: use an integer from 0 on"),
        ({"seed": None}, "seed=None: use an integer from 0 on"),
        (
            {"only": "layer4.*"},
            r"pattern 'layer4.\*' fits no convolution or linear layer, such as stem, depth",
        ),
        ({"skip": ["stem", "Head"]}, "pattern 'Head' fits no convolution or linear layer"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    model = Net()
    with pytest.raises(ModelError, match=match):
        xzoo.expand(model, **options)
    assert not x_layers(model)


@pytest.mark.parametrize("options", [{"share": 0}, {"seed": -1}])
def test_share_and_seed_out_of_range_are_one_error_for_models_and_layers(options):
    with pytest.raises(GraphError):
        xzoo.expand(Net(), **options)
    with pytest.raises(GraphError):
        ExpanderLinear(16, 8, degree=4, **options)


def test_impossible_graph_changes_nothing():
    """The layer before the one that has no such graph is left too."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 2))
    before = list(model)
    with pytest.raises(GraphError, match="layer 1: graph='ramanujan' .*use a larger degree"):
        xzoo.expand(model, 8, share=1, graph="ramanujan")
    assert list(model) == before
    with pytest.raises(GraphError, match="layer 0: graph='ring' is not a kind of graph"):
        xzoo.expand(model, graph="ring")
    assert list(model) == before


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(16, 16, 1)])
def test_lone_layer_cannot_be_replaced_in_place(layer):
    with pytest.raises(ModelError, match=f"lone {type(layer).__name__}.*wrap it in nn.Sequential"):
        xzoo.expand(layer)


def test_layer_without_sizes_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(2))
    with pytest.raises(
        ModelError, match="layer 1 is a LazyLinear without sizes yet: run a forward pass first"
    ):
        xzoo.expand(model)
    model(torch.ones(1, 16))
    assert xzoo.expand(model).replaced == ("0",)
