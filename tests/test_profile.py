"""The counts of a model are those of its layers, worked out by hand or published; and counting
changes nothing.
"""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import xzoo
from xzoo.errors import ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear


def net():
    """x [B, 16, 9, 7]: each kind of layer once."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, groups=4),  # 32 * 4 * 9 weights at 63 places
        nn.BatchNorm2d(32),
        # 24 * 5 * 3 at 4 * 4
        ExpanderConv2d(32, 24, (3, 1), stride=2, degree=5, share=2, bias=False),
        nn.Flatten(),
        ExpanderLinear(384, 10, degree=7, share=2),
        nn.Linear(10, 3, bias=False),
    )


def test_counts_are_those_of_the_layers():
    found = xzoo.profile(net(), (16, 9, 7))
    weights = [32 * 4 * 9, 24 * 5 * 3, 10 * 7, 10 * 3]
    macs = [weights[0] * 63, weights[1] * 16, weights[2], weights[3]]
    assert found.weights == sum(weights)
    assert found.params == sum(weights) + 32 + 2 * 32 + 10
    assert found.macs == sum(macs)
    assert [layer.weights for layer in found.layers] == weights
    assert [layer.macs for layer in found.layers] == macs
    facts = [
        (la.name, la.kind, la.n_in, la.n_out, la.kernel, la.groups, la.degree, la.share)
        for la in found.layers
    ]
    assert facts == [
        ("0", "Conv2d", 16, 32, (3, 3), 4, None, None),
        ("2", "ExpanderConv2d", 32, 24, (3, 1), 1, 5, 2),
        ("4", "ExpanderLinear", 384, 10, (1, 1), 1, 7, 2),
        ("5", "Linear", 10, 3, (1, 1), 1, None, None),
    ]


# torchvision's published parameters and billions of multiply-accumulates, of networks that timm has
# too.
PUBLISHED = [
    ("resnet18", 11_689_512, 1.814),
    ("resnet50", 25_557_032, 4.089),
    ("densenet121", 7_978_856, 2.834),
]


@pytest.mark.parametrize(("name", "params", "billions"), PUBLISHED)
def test_dense_networks_have_the_published_counts(name, params, billions):
    found = xzoo.profile(timm.create_model(name, device="meta"))
    assert (found.params, round(found.macs / 1e9, 3)) == (params, billions)
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.weights for layer in found.layers) == found.weights


def test_layers_of_a_whole_model_sum_up():
    found = xzoo.profile(timm.create_model("x_mobilenet050_c4", device="meta"))
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert sum(layer.weights for layer in found.layers) == found.weights
    assert len([layer for layer in found.layers if layer.degree is not None]) == 12


@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_no_backend_changes_the_count(backend):
    with xzoo.ops.backend(backend):
        assert xzoo.profile(net(), (16, 9, 7)) == xzoo.profile(net(), (16, 9, 7))
        assert xzoo.profile(net(), (16, 9, 7)).macs == 32 * 4 * 9 * 63 + 24 * 5 * 3 * 16 + 70 + 30


def test_expanding_divides_the_counts():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    before = xzoo.profile(model, (64, 8, 8))
    xzoo.expand(model, 4, only="*")
    after = xzoo.profile(model, (64, 8, 8))
    assert (after.weights, after.macs) == (before.weights / 4, before.macs / 4)


def test_weights_used_twice_count_once_and_compute_twice():
    layer = nn.Linear(8, 8, bias=False)
    found = xzoo.profile(nn.Sequential(layer, layer), (8,))
    assert (found.weights, found.params, found.macs) == (64, 64, 128)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = net().train(training)
    model(torch.randn(2, 16, 9, 7)).sum().backward()
    model[0].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad for p in model.parameters()]
    xzoo.profile(model, (16, 9, 7))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    assert all(m.training is training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(grads) - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_weights_does_not_matter(dtype):
    assert xzoo.profile(net().to(dtype), (16, 9, 7)) == xzoo.profile(net(), (16, 9, 7))


def test_model_without_memory_is_counted():
    assert xzoo.profile(net().to("meta"), (16, 9, 7)) == xzoo.profile(net(), (16, 9, 7))


def test_model_in_channels_last_is_counted():
    assert xzoo.profile(net().to(memory_format=torch.channels_last), (16, 9, 7)) == xzoo.profile(
        net(), (16, 9, 7)
    )


def test_size_is_that_of_the_configuration_unless_given():
    model = timm.create_model("x_vgg16", device="meta")
    assert xzoo.profile(model) == xzoo.profile(model, (3, 32, 32))
    assert xzoo.profile(model, (3, 64, 64)).macs > xzoo.profile(model).macs


def test_feature_extractors_are_counted():
    whole = xzoo.profile(timm.create_model("x_resnet18", device="meta"))
    with torch.device("meta"):
        features = xzoo.profile(timm.create_model("x_resnet18", features_only=True))
    assert features.weights == whole.weights - 512 * 1000
    assert features.macs == whole.macs - 512 * 1000


def test_products_of_activations_are_not_counted():
    """A block of attention of width 64 has 12 * 64^2 weights, each used at each of the 197 places."""
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=64, num_heads=1, depth=1, num_classes=0, device="meta"
    )
    found = xzoo.profile(model)
    assert found.macs == 196 * 64 * 3 * 16 * 16 + 197 * 12 * 64**2


def test_layers_that_are_never_called_cost_nothing():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].unused = nn.Linear(100, 100, bias=False)
    found = xzoo.profile(model, (8,))
    assert (found.macs, found.weights) == (32, 32 + 10_000)
    assert [layer.macs for layer in found.layers] == [32, 0]


def test_size_must_be_known():
    with pytest.raises(ModelError, match=r"give input_size, such as \(3, 224, 224\)"):
        xzoo.profile(net())


@pytest.mark.parametrize("name", ["cait_xxs24_224", "pit_ti_224"])
def test_models_that_pass_parameters_between_modules_are_counted(name):
    found = xzoo.profile(timm.create_model(name, num_classes=7))
    assert sum(layer.macs for layer in found.layers) == found.macs > 4e8


BY_OUTPUT = (
    parametrizations.weight_norm,
    nn.utils.weight_norm,
    lambda la: prune.l1_unstructured(la, "weight", 0.5),
)
# The last computes its weight by products of matrices.
BY_MATRIX = (parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.orthogonal)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    ("build", "compute"),
    [(lambda: ExpanderLinear(16, 16, degree=4), compute) for compute in BY_OUTPUT]
    + [(lambda: nn.Linear(16, 16), compute) for compute in (*BY_OUTPUT, *BY_MATRIX)],
)
def test_computed_weights_count_as_what_they_are(build, compute):
    plain = xzoo.profile(nn.Sequential(build()), (16,))
    model = nn.Sequential(compute(build()))
    # a hook's weight is then a result, which copy.deepcopy refuses
    model(torch.randn(2, 16)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    found = xzoo.profile(model, (16,))
    assert (found.macs, found.layers) == (plain.macs, plain.layers)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_tensor_is_copied():
    """On the CPU: 256 MB of weights, a tensor beside the parameters included, for some kilobytes."""
    model = nn.Sequential(nn.Linear(4000, 8000), ExpanderLinear(8000, 10, degree=4))
    model[0].mask = torch.ones(4000, 4000)
    with torch.profiler.profile(profile_memory=True) as trace:
        xzoo.profile(model, (4000,))
    largest = max((event.cpu_memory_usage for event in trace.events()), default=0)
    assert largest < 1e6


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.MultiheadAttention])
def test_products_with_weights_of_torchs_attention_are_counted(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = kind(
                16,
                2,
                **({"dim_feedforward": 32} if "Layer" in kind.__name__ else {}),
                batch_first=True,
            )

        def forward(self, x):
            return self.block(x) if hasattr(self.block, "linear1") else self.block(x, x, x)[0]

    weights = 4 * 16 * 16 + (2 * 16 * 32 if "Layer" in kind.__name__ else 0)
    assert xzoo.profile(Net(), (5, 16)).macs == 5 * weights


def test_wrapped_models_are_counted():
    plain = xzoo.profile(net(), (16, 9, 7))
    assert xzoo.profile(nn.DataParallel(net()), (16, 9, 7)) == plain
    assert xzoo.profile(torch.compile(net(), backend="eager"), (16, 9, 7)) == plain


def test_a_lone_layer_is_counted():
    found = xzoo.profile(ExpanderLinear(16, 12, degree=4), (16,))
    assert found.macs == 48 and [layer.macs for layer in found.layers] == [48]


def test_transposed_convolutions_have_their_sizes():
    found = xzoo.profile(nn.Sequential(nn.ConvTranspose2d(6, 4, 2)), (6, 3, 3))
    assert [(layer.n_in, layer.n_out) for layer in found.layers] == [(6, 4)]


class Looks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_counted_is_told():
    with pytest.raises(
        ModelError, match=r"profile\(\) cannot run Looks on torch's meta device .*\[3, 8, 8\]: "
    ):
        xzoo.profile(Looks(), (3, 8, 8))
    with pytest.raises(
        ModelError, match="layer 0 is a LazyLinear without sizes yet: run a forward pass first"
    ):
        xzoo.profile(nn.Sequential(nn.LazyLinear(3)), (8,))


@pytest.mark.parametrize("train", [True, False])
def test_torchs_counter_is_exact_for_x_layers(train):
    """What README says of it: nothing else has to be told."""
    model = net().train(train)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 16, 9, 7))
    assert counter.get_total_flops() == 2 * xzoo.profile(model, (16, 9, 7)).macs
