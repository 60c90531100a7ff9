"""X-layers behave as their dense namesakes with zeros would, wherever torch takes a module; and
their graph survives.

The dense twin of every comparison is nn.Conv2d or nn.Linear, its weight filled in by the loop
below.
"""

import copy
import importlib.util
import io
import math
import os
import pickle

import pytest
import torch
import torch.multiprocessing
from timm.models import create_feature_extractor
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from xzoo import graphs, ops
from xzoo.errors import GraphError, InputError, ModelError
from xzoo.layers import ExpanderConv2d, ExpanderLinear

scripting = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch.jit:FutureWarning",
    # the check of the number of inputs
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning",
)


@pytest.fixture(autouse=True)
def stream_of_the_test():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def conv(seed=0, **options):
    arguments = {"padding": 1, "stride": 2, "degree": 4, "share": 2, "seed": seed, **options}
    return ExpanderConv2d(16, 32, 3, **arguments)


def net(**options):
    """Two X-layers and what usually stands between them; x [B, 16, 9, 7] -> [B, 10]."""
    return nn.Sequential(
        conv(**options),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(1),
        ExpanderLinear(640, 10, degree=64, share=2),
    )


def net_for(backend):
    """One that this backend can run: `group` does graphs of groups alone."""
    model = net(graph="shuffle") if backend == "group" else net()
    if backend == "group":
        model[-1] = ExpanderLinear(640, 10, degree=64, graph="shuffle")
    return model


def images(batch=2, height=9, width=7, channels=16, **options):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, height, width, generator=generator).to(**options)


def dense_twin(layer):
    """The layer of torch that computes the same."""
    sizes = {
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    if isinstance(layer, ExpanderLinear):
        twin = nn.Linear(layer.in_features, layer.out_features, **sizes)
    else:
        geometry = {
            n: getattr(layer, n)
            for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        twin = nn.Conv2d(layer.in_channels, layer.out_channels, **geometry, **sizes)
    with torch.no_grad():
        twin.weight.zero_()
        for o in range(len(twin.weight)):
            for j, i in enumerate(layer.neighbours[o // layer.share].tolist()):
                twin.weight[o, i] = layer.weight[o, j]
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def assert_equals_twin(layer, x):
    torch.testing.assert_close(layer(x), dense_twin(layer)(x))


# Arguments


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (1, 3), "padding": (2, 0)},
        {"padding": 1, "dilation": 2},
        {"dilation": (1, 2)},
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 3)},
        {"bias": False},
        {"dtype": torch.float64},
        {"device": "cpu", "dtype": torch.bfloat16},
        *(
            {"padding": (1, 2), "padding_mode": mode}
            for mode in ("zeros", "reflect", "replicate", "circular")
        ),
        *(
            {"padding": "same", "padding_mode": mode}
            for mode in ("reflect", "replicate", "circular")
        ),
        {"padding": "valid", "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel_size", [1, 2, 3, (4, 3)], ids=str)
# of the dense twin
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_convolution_takes_the_arguments_of_torch(kernel_size, options):
    layer = ExpanderConv2d(16, 8, kernel_size, **options, degree=4, share=2)
    assert_equals_twin(layer, images(dtype=options.get("dtype", torch.float32)))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"dtype": torch.float64}, {"device": "cpu", "share": 3}],
    ids=str,
)
def test_linear_takes_the_arguments_of_torch(options):
    layer = ExpanderLinear(16, 12, **options, degree=4)
    assert_equals_twin(layer, images(dtype=options.get("dtype", torch.float32))[:, :, 0, 0])
    assert_equals_twin(layer, images(dtype=options.get("dtype", torch.float32)).transpose(1, 3))


def test_lines_of_the_slides_run_as_printed():
    layer = ExpanderConv2d(256, 512, kernel_size=3, padding=1, expandSize=128)
    assert layer.weight.shape == (512, 128, 3, 3)
    assert layer.neighbours.shape == (512, 128)
    layer = ExpanderLinear(512, 512, expandSize=128)
    assert layer.weight.shape == (512, 128)
    assert layer.degree == 128


def test_full_degree_is_the_dense_layer():
    layer = ExpanderConv2d(16, 8, 3, degree=16)
    twin = nn.Conv2d(16, 8, 3)
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "neighbours"})
    assert torch.equal(layer(images()), twin(images()))


@pytest.mark.parametrize("kind", graphs.KINDS)
def test_graph_is_that_of_its_arguments(kind):
    layer = ExpanderLinear(16, 32, degree=4, share=2, graph=kind, seed=3)
    assert layer.neighbours.dtype == torch.int32
    assert not layer.neighbours.requires_grad
    assert torch.equal(layer.neighbours, torch.from_numpy(graphs.sample(kind, 16, 32, 4, 2, 3)))


def test_graph_leaves_torchs_generator_alone():
    torch_state = torch.get_rng_state()
    layer = conv(bias=False)
    torch.set_rng_state(torch_state)
    bound = 1 / math.sqrt(4 * 9)
    assert torch.equal(layer.weight, nn.init.uniform_(torch.empty(32, 4, 3, 3), -bound, bound))


def test_initial_weights_have_torchs_bound_at_the_true_fan_in():
    for layer, fan_in in (
        (ExpanderConv2d(64, 64, 3, degree=8), 72),
        (ExpanderLinear(512, 512, degree=16), 16),
    ):
        bound = 1 / math.sqrt(fan_in)
        for parameter in (layer.weight, layer.bias):
            assert 0.9 * bound < parameter.abs().max() <= bound
        assert abs(layer.weight.std() * math.sqrt(3) / bound - 1) < 0.03


def test_representation_says_what_shapes_the_layer():
    layer = conv(padding="same", stride=1, dilation=2, padding_mode="reflect", bias=False)
    assert repr(layer) == (
        "ExpanderConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding='same', dilation=(2, "
        "2), "
        "padding_mode='reflect', bias=False, degree=4, share=2, graph='biregular', seed=0)"
    )
    assert repr(ExpanderLinear(8, 4, degree=2, seed=5)) == (
        "ExpanderLinear(8, 4, bias=True, degree=2, share=1, graph='biregular', seed=5)"
    )


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (GraphError, r"degree=None, expandSize=None: give one of them", {}),
        (GraphError, r"degree=4, expandSize=4: give one of them", {"degree": 4, "expandSize": 4}),
        (GraphError, r"degree=17 with 16 inputs: .* use 1 to 16", {"degree": 17}),
        (GraphError, r"degree=0 with 16 inputs", {"expandSize": 0}),
        (GraphError, r"degree=2\.5 is not an integer", {"degree": 2.5}),
        (GraphError, r"share=3 with 32 outputs: use a divisor of 32", {"degree": 4, "share": 3}),
        (
            GraphError,
            r"graph='magic' is not a kind of graph; use one of random, ",
            {"degree": 4, "graph": "magic"},
        ),
        (GraphError, r"nearest that do are 4 and 8", {"degree": 5, "graph": "group"}),
        (GraphError, r"seed=-1: use an integer from 0 on", {"degree": 4, "seed": -1}),
    ],
)
def test_impossible_graphs_are_refused(error, match, options):
    for make in (
        lambda: ExpanderConv2d(16, 32, 3, **options),
        lambda: ExpanderLinear(16, 32, **options),
    ):
        with pytest.raises(error, match=match):
            make()


def test_impossible_convolutions_are_refused():
    with pytest.raises(
        ModelError, match=r"groups=4: a graph takes the place of groups; .*'group' with degree=4"
    ):
        ExpanderConv2d(16, 32, 3, groups=4, degree=4)
    with pytest.raises(GraphError, match="a graph from 0 inputs to 32 outputs"):
        ExpanderConv2d(0, 32, 3, degree=1)
    with pytest.raises(ValueError, match="padding='same' is not supported for strided"):
        ExpanderConv2d(16, 32, 3, stride=2, padding="same", degree=4)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        ExpanderConv2d(16, 32, 3, padding_mode="magic", degree=4)


@pytest.mark.parametrize("error", [InputError, ModelError, RuntimeError])  # torch's is the last
@pytest.mark.parametrize("channels", [8, 32])
def test_input_of_another_size_is_refused(channels, error):
    match = rf"ExpanderConv2d of 16 inputs: x is not \[B, 16, H, W\] but \[2, {channels}, 9, 7\]$"
    with pytest.raises(error, match=match):
        conv()(images(channels=channels))
    match = rf"ExpanderLinear of 16 inputs: x is not \[\.\.\., 16\] but \[2, {channels}\]$"
    with pytest.raises(error, match=match):
        ExpanderLinear(16, 4, degree=4)(images(channels=channels)[:, :, 0, 0])


@scripting
@torch.no_grad()
def test_input_of_another_size_is_refused_by_all_forms_of_a_layer():
    traced = torch.fx.symbolic_trace(net())
    traced.graph.eliminate_dead_code()
    traced.recompile()
    torch.compiler.reset()
    for module in (traced, torch.compile(net(), backend="aot_eager")):
        with pytest.raises(InputError, match=r"x is not \[B, 16, H, W\] but \[2, 8, 9, 7\]"):
            module(images(channels=8))
        with pytest.raises(InputError, match=r"x is not \[\.\.\., 640\] but \[2, 768\]"):
            module(images(height=12))
    with pytest.raises(torch.jit.Error, match=r"x is not \[B, 16, H, W\]"):
        torch.jit.script(net())(images(channels=8))


# Wherever torch takes a module


@pytest.mark.parametrize("backend", [b for b in ops.available() if b != "triton"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_and_either_memory_format(batch, backend):
    graph = "shuffle" if backend == "group" else "biregular"
    with ops.backend(backend):
        for layer in (conv(graph=graph), ExpanderConv2d(16, 8, 1, degree=4, graph=graph)):
            assert_equals_twin(layer, images(batch))
            layer.to(memory_format=torch.channels_last)
            x = images(batch, memory_format=torch.channels_last).requires_grad_()
            y = layer(x)
            assert y.is_contiguous(memory_format=torch.channels_last) or not batch
            assert_equals_twin(layer, x)
            y.sum().backward()
            assert x.grad.shape == x.shape
            assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["dense", "gather", "group"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_change_the_weights_only(dtype, backend):
    model = net_for(backend).eval()
    graph = model[0].neighbours.clone()
    with ops.backend(backend):
        want = model(images())
        got = model.to(dtype)(images(dtype=dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=2 * torch.finfo(dtype).eps, rtol=2e-2)
    assert torch.equal(model.float()[0].neighbours, graph)
    assert model[0].neighbours.dtype == torch.int32


@pytest.mark.parametrize("backend", ["dense", "gather", "group"])
def test_autocast_casts_as_it_does_for_torchs_layers(backend):
    graph = "shuffle" if backend == "group" else "biregular"
    linear = ExpanderLinear(16, 12, degree=4, graph=graph)
    for layer, x in ((conv(graph=graph), images()), (linear, images()[:, :, 0, 0])):
        twin = dense_twin(layer)
        with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
            got, want = layer(x), twin(x)
        assert got.dtype == want.dtype == torch.bfloat16
        # sums in another order, rounded to 8 bits
        torch.testing.assert_close(got, want, atol=1e-2, rtol=2e-2)
        got.sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", [b for b in ops.available() if b != "triton"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_in_one_graph(compiler, backend, form):
    model = net_for(backend).to(memory_format=form)
    plain = copy.deepcopy(model)
    results = []
    torch.compiler.reset()
    for module in (plain, torch.compile(model, fullgraph=True, backend=compiler)):
        x = images(memory_format=form).requires_grad_()
        with ops.backend(backend):
            y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0])
    assert [k.removeprefix("_orig_mod.") for k in module.state_dict()] == list(plain.state_dict())


def test_compiled_module_follows_the_chosen_backend(monkeypatch):
    calls = []
    for backend in (ops.dense, ops.gather):
        plain = backend.conv2d
        monkeypatch.setattr(
            backend,
            "conv2d",
            lambda *a, f=plain, n=backend.__name__: calls.append(n.rpartition(".")[2]) or f(*a),
        )
    torch.compiler.reset()
    module = torch.compile(conv(), fullgraph=True, backend="aot_eager")
    for name in ("gather", "dense", "gather"):
        with ops.backend(name):
            module(images())
    assert calls == ["gather", "dense", "gather"]


def test_compiles_under_autocast():
    torch.compiler.reset()
    model, x = net().eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    torch.testing.assert_close(got, want)


def test_fx_records_a_call_of_the_operation():
    model, x = net().eval(), images()
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert ops.conv2d in calls
    assert ops.linear in calls
    assert torch.equal(traced(x), model(x))
    assert torch.equal(copy.deepcopy(traced)(x), model(x))
    traced(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(got, model.parameters(), strict=True))


def test_feature_extractor_gives_the_same_bits():
    model = net().eval()
    features = create_feature_extractor(model, ["0", "2"])(images())
    assert torch.equal(features["0"], model[0](images()))
    assert torch.equal(features["2"], model[:3](images()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_exports_with_dynamic_sizes(strict):
    model = nn.Sequential(
        conv(), nn.ReLU(), ExpanderConv2d(32, 8, 2, padding="same", degree=4), nn.Flatten(2)
    ).eval()
    sizes = {
        "input": {
            0: torch.export.Dim("b"),
            2: torch.export.Dim("h", min=5),
            3: torch.export.Dim("w", min=5),
        }
    }
    program = torch.export.export(model, (images(),), dynamic_shapes=sizes, strict=strict)
    graphs_of_program = [
        m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    targets = [str(node.target) for graph in graphs_of_program for node in graph.nodes]
    assert targets.count("xzoo.conv2d.default") == 2
    for x in (images(), images(1), images(5, 12, 6)):
        assert torch.equal(program.module()(x), model(x))
    assert torch.equal(program.state_dict["0.neighbours"], model[0].neighbours)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_onnx_form_has_operations_of_torch_only(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(net().eval(), (images(),), strict=False)
    assert not [n for n in program.graph.nodes if "xzoo" in str(n.target)]


@scripting
def test_torchscript_gets_the_dense_form():
    layers = [
        net(),
        conv(padding_mode="reflect"),
        conv(stride=1, padding="same", dilation=2),
        conv(bias=False),
    ]
    for model in layers:
        model.eval()
        for scripted in (torch.jit.script(model), torch.jit.trace(model, images())):
            for x in (images(), images(5)):
                torch.testing.assert_close(scripted(x), model(x))
            file = io.BytesIO()
            torch.jit.save(scripted, file)
            file.seek(0)
            torch.testing.assert_close(torch.jit.load(file)(images()), model(images()))
        scripted(images()).sum().backward()
        assert next(model.parameters()).grad is not None


@scripting
# torch's own
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_export(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    if dynamo and not importlib.util.find_spec("onnxscript"):
        pytest.skip("torch's ONNX exporter needs onnxscript, which is not installed")
    file, model, x = tmp_path / "model.onnx", net().eval(), images()
    torch.onnx.export(model, (x,), str(file), dynamo=dynamo)
    graph = onnx.load(str(file))
    onnx.checker.check_model(graph)
    kinds = {node.op_type for node in graph.graph.node}
    assert "Conv" in kinds
    assert not any(node.domain.startswith("xzoo") for node in graph.graph.node)
    if not importlib.util.find_spec("onnxruntime"):
        pytest.skip("exported and checked; onnxruntime, which would run it, is not installed")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), atol=1e-5, rtol=1e-4)


def test_copies_and_pickles_compute_the_same():
    model = net().eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), model(images()))
        assert other[0].weight is not model[0].weight
        assert other[0].neighbours is not model[0].neighbours
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["0.neighbours"], model[0].neighbours)


def test_meta_layer_gets_its_graph_when_it_gets_memory():
    with torch.device("meta"):
        layer = conv(seed=7)
    assert layer.weight.is_meta
    assert layer.neighbours.is_meta
    assert layer.neighbours.dtype == torch.int32
    assert layer(images(device="meta")).shape == (2, 32, 5, 4)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.neighbours, conv(seed=7).neighbours)
    assert 0 < layer.weight.abs().max() <= 1 / 6


def test_reset_parameters_restores_the_graph_of_the_seed():
    layer = conv(seed=1)
    layer.load_state_dict(conv(seed=2).state_dict())
    layer.reset_parameters()
    assert torch.equal(layer.neighbours, conv(seed=1).neighbours)


def run_rank(rank, file, folder):
    """One of two processes of DDP: half the batch, and seeds that differ until DDP broadcasts."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    model = nn.Sequential(
        conv(seed=rank), nn.ReLU(), nn.Flatten(1), ExpanderLinear(640, 10, degree=64, seed=rank)
    )
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(images(4).chunk(2)[rank]).square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    torch.save((model.state_dict(), grads), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)
def test_data_parallel_training_equals_one_process(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path / "store", tmp_path), nprocs=2)
    (state, grads), (other_state, other_grads) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert torch.equal(state["0.neighbours"], conv(seed=0).neighbours)
    for key, value in state.items():
        assert torch.equal(value, other_state[key]), key
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(1), ExpanderLinear(640, 10, degree=64))
    model.load_state_dict(state)
    model(images(4)).square().mean().backward()
    for ours, other, single in zip(
        grads, other_grads, (p.grad for p in model.parameters()), strict=True
    ):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours, single)


# The graph survives


def test_loaded_layer_computes_the_saved_function():
    for assign in (False, True):
        saved, loaded = net(seed=1).eval(), net(seed=2).eval()
        assert not torch.equal(saved[0].neighbours, loaded[0].neighbours)
        loaded.load_state_dict(saved.state_dict(), assign=assign)
        assert torch.equal(loaded(images()), saved(images()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_without_their_graph_are_refused(strict, assign):
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 16, 1), "stage": net()})
    state = model.state_dict()
    del state["stage.0.neighbours"]
    before = copy.deepcopy(model["stage"][0].state_dict())
    with pytest.raises(
        RuntimeError, match=r"stage\.0\.neighbours: missing, and the weights beside it mean nothing"
    ):
        model.load_state_dict({k: v + 1 for k, v in state.items()}, strict=strict, assign=assign)
    assert_same(model["stage"][0].state_dict(), before)


def test_file_without_the_whole_layer_is_torchs_affair():
    layer = conv()
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias", "neighbours"]
    layer.load_state_dict({"neighbours": conv(seed=1).neighbours}, strict=False)
    assert torch.equal(layer.neighbours, conv(seed=1).neighbours)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_dense_checkpoint_is_refused():
    for strict in (False, True):
        with pytest.raises(RuntimeError, match="neighbours: missing"):
            conv().load_state_dict(dense_twin(conv()).state_dict(), strict=strict)


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)


def changed(row, column, value):
    def change(rows):
        rows = rows.clone()
        rows[row, column] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(3, -1, 16), r"has indices from 0 to 16; the layer has inputs 0 to 15"),
        (changed(3, 0, -1), r"has indices from -1 to 15; the layer has inputs 0 to 15"),
        (lambda rows: rows.flip(1), r"is not ascending: row 0 has"),
        (lambda rows: rows[:, [0, 0, 2, 3]], r"repeats an input: row 0 has"),
        (lambda rows: rows.float() + 0.01, r"has dtype torch\.float32; a graph is integers"),
        (
            lambda rows: rows.roll(1, 0).bfloat16(),
            r"has dtype torch\.bfloat16; a graph is integers",
        ),
        (lambda rows: rows.bool(), r"dtype bool; allowed is a non-empty integer array"),
        # of another share
        (lambda rows: rows[::2], r"has shape \[8, 4\]; this layer needs \[16, 4\]"),
        (lambda rows: rows[:, :3], r"has shape \[16, 3\]; this layer needs \[16, 4\]"),
        (lambda rows: rows[0], r"has shape \[4\]; this layer needs \[16, 4\]"),
    ],
)
def test_what_is_not_a_graph_is_refused_by_name(change, match):
    model = nn.ModuleDict({"block": conv()})
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in before.items()} | {
        "block.neighbours": change(before["block.neighbours"])
    }
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(RuntimeError, match=rf"block\.neighbours: .*{match}"):
            model.load_state_dict(state, **options)
        assert_same(model.state_dict(), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64], ids=str)
def test_graphs_of_any_integer_type_are_stored_as_int32(dtype, assign):
    layer, rows = conv(), conv(seed=1).neighbours
    state = layer.state_dict() | {"neighbours": rows.to(dtype)}
    layer.load_state_dict(state, assign=assign)
    assert layer.neighbours.dtype == torch.int32
    assert torch.equal(layer.neighbours, rows)
    assert state["neighbours"].dtype == dtype  # the caller's dictionary is left alone


def test_what_is_no_tensor_is_torchs_affair():
    with pytest.raises(RuntimeError, match=r'named "neighbours", expected torch\.Tensor'):
        conv().load_state_dict(conv().state_dict() | {"neighbours": conv().neighbours.numpy()})


def test_averaging_and_training_leave_the_graph_alone():
    model = net()
    graph = model[0].neighbours.clone()
    averages = [ModelEmaV3(model, decay=0.9999), AveragedModel(model, use_buffers=False)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        model(images()).square().mean().backward()
        optimizer.step()
        averages[0].update(model)
        averages[1].update_parameters(model)
    assert not torch.equal(model[0].weight, before)
    for module in (model, *(average.module for average in averages)):
        assert torch.equal(module[0].neighbours, graph)
        assert module[0].neighbours.dtype == torch.int32
    assert not torch.equal(averages[0].module[0].weight, model[0].weight)
    assert torch.equal(model.half().float()[0].neighbours, graph)


def test_graph_is_no_parameter():
    layer = conv()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert list(layer.state_dict()) == ["weight", "bias", "neighbours"]
    assert sum(p.numel() for p in layer.parameters()) == 32 * 4 * 9 + 32


def test_no_method_has_a_name_that_timm_or_transformers_call():
    called = {"fuse", "reparameterize", "init_weights", "init_non_persistent_buffers"}
    for layer in (ExpanderConv2d, ExpanderLinear):
        assert not called & set(dir(layer))


# What computes a weight from others.


def test_dense_weight_is_the_matrix_and_differentiable():
    for layer in (conv(bias=False), ExpanderLinear(16, 12, degree=4, share=2)):
        dense = layer.dense_weight()
        assert dense.shape == (layer.weight.shape[0], 16, *layer.weight.shape[2:])
        assert (dense != 0).sum() == layer.weight.numel()
        dense.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, 2 * layer.weight)
        assert torch.equal(layer.dense_weight(2 * layer.weight), 2 * dense)


class BySpectralNorm(nn.Module):
    """What the refusal below advises."""

    def __init__(self, layer):
        super().__init__()
        self.__dict__["layer"] = layer

    def forward(self, weight):
        return weight / torch.linalg.matrix_norm(self.layer.dense_weight(weight).flatten(1), 2)


def along_inputs(form):
    return lambda layer: form(layer, dim=1)


WHOLE_MATRIX = {
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, older": nn.utils.spectral_norm,
    "weight_norm along the inputs": along_inputs(parametrizations.weight_norm),
    "weight_norm along the inputs, older": along_inputs(nn.utils.weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("form", WHOLE_MATRIX)
def test_what_goes_by_the_whole_matrix_is_refused_and_the_layer_stays(form):
    layer, x = conv(), images()
    before, text = layer(x), repr(layer)
    with pytest.raises(
        ModelError, match=r"on an X-layer would go by its compact weight .*xzoo\.to_dense\(layer\)"
    ):
        WHOLE_MATRIX[form](layer)
    assert type(layer) is ExpanderConv2d and repr(layer) == text
    assert {*layer.state_dict()} == {*conv().state_dict()}
    assert isinstance(layer.weight, nn.Parameter) and not layer._forward_pre_hooks
    assert torch.equal(layer(x), before)
    parametrizations.weight_norm(layer)  # what is right is still done
    torch.testing.assert_close(layer(x), before)


def test_orthogonal_is_refused_and_leaves_a_layer():
    """torch has overwritten the weight before anybody can look."""
    layer = conv()
    with pytest.raises(ModelError, match="^Orthogonal on an X-layer"):
        parametrizations.orthogonal(layer)
    assert type(layer) is ExpanderConv2d and isinstance(layer.weight, nn.Parameter)
    assert layer(images()).isfinite().all() and layer.weight.std() > 0.01


def test_what_is_added_to_another_is_refused_at_each_use():
    layer = parametrizations.weight_norm(conv())
    parametrizations.spectral_norm(layer)
    with pytest.raises(ModelError, match="^SpectralNorm on an X-layer"):
        layer(images())
    with pytest.raises(ModelError, match="^SpectralNorm on an X-layer"):
        _ = layer.weight


def test_a_bias_is_no_matrix():
    layer = parametrizations.spectral_norm(conv(), "bias")
    with pytest.raises(ModelError, match="^SpectralNorm on an X-layer"):
        parametrizations.spectral_norm(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer(images()).isfinite().all()


def test_the_advised_parametrization_has_norm_one_and_trains():
    layer = conv()
    nn.utils.parametrize.register_parametrization(layer, "weight", BySpectralNorm(layer))
    norm = torch.linalg.matrix_norm(layer.dense_weight().flatten(1), 2)
    torch.testing.assert_close(norm, torch.tensor(1.0))
    layer(images()).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("form", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("dim", [0, None])
def test_weight_norm_by_output_is_that_of_the_matrix(form, dim):
    layer = conv()
    wanted = layer.dense_weight()
    form(layer, dim=dim)
    torch.testing.assert_close(layer.dense_weight(), wanted)
    length = (
        layer.parametrizations.weight.original0
        if hasattr(layer, "parametrizations")
        else layer.weight_g
    )
    norm = wanted.norm() if dim is None else wanted.flatten(1).norm(dim=1)
    torch.testing.assert_close(length.flatten(), norm.flatten())


def test_pruned_layers_compute_with_what_is_left():
    layer, x = prune.l1_unstructured(conv(), "weight", 0.5), images()
    assert (layer.dense_weight() != 0).sum() == layer.weight.numel() // 2
    torch.testing.assert_close(
        layer(x),
        nn.functional.conv2d(x, layer.dense_weight(), layer.bias, layer.stride, layer.padding),
        rtol=1e-4,
        atol=1e-5,
    )
