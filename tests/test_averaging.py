"""A state dict averaged by anybody's loop: the graph stays as it was, or the next forward pass or
load says so.
"""

import copy

import pytest
import torch
from timm.utils import ModelEmaV2
from torch import nn
from torch.optim.swa_utils import AveragedModel

import xzoo
from xzoo.errors import XzooError

# load_state_dict collects what its layers raise in a RuntimeError
REFUSED = (XzooError, RuntimeError)


def network():
    """Indices up to 511, of which many are not multiple of what a decay leaves exact."""
    torch.manual_seed(0)
    return nn.Sequential(
        xzoo.ExpanderLinear(512, 64, degree=32, seed=3), nn.ReLU(), nn.Linear(64, 4)
    )


def averaged_by(decay):
    def average(model):
        ema = ModelEmaV2(model, decay=decay)
        for _ in range(20):
            ema.update(model)
        return ema.module

    return average


def by_torch(model):
    mean = AveragedModel(model, use_buffers=True)
    for _ in range(20):
        mean.update_parameters(model)
    return mean.module


def by_loop(model):
    other = copy.deepcopy(model)
    for mine, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        for _ in range(20):
            mine.copy_(mine * 0.9999 + theirs * (1 - 0.9999))
    return other


def by_data(model):
    """Through .data, which torch's version counter does not see."""
    other = copy.deepcopy(model)
    for name, value in other.state_dict().items():
        value.data.copy_(
            (value.double() * 0.9999).to(value.dtype) if name.endswith("neighbours") else value
        )
    return other


def by_lerp(model):
    other = copy.deepcopy(model)
    for mine, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(mine.float().lerp(theirs.float() * 0.999, 0.5))
    return other


def to_half_and_back(model):
    """bfloat16 has eight bits: indices above 256 lose their last."""
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.copy_(value.bfloat16())
    return other


IN_PLACE = {
    "ModelEmaV2, 0.9999": averaged_by(0.9999),
    "ModelEmaV2, 0.9": averaged_by(0.9),
    "AveragedModel(use_buffers=True)": by_torch,
    "copy_": by_loop,
    "through .data": by_data,
    "lerp": by_lerp,
    "bfloat16 and back": to_half_and_back,
}


# A forward pass asks torch's version counter alone, so that it costs nothing; saving looks at the
# numbers.
@pytest.mark.parametrize("way", [way for way in IN_PLACE if way != "through .data"])
def test_the_graph_stays_or_the_next_forward_refuses(way):
    model, x, told = network(), torch.randn(3, 512), ""
    with torch.no_grad():
        wanted = model(x)
        try:
            averaged = IN_PLACE[way](model)
            y = averaged(x)
        except REFUSED as error:
            told = str(error)
        if told:
            assert "neighbours" in told
        else:
            assert torch.equal(averaged[0].neighbours, model[0].neighbours)
            torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("way", IN_PLACE)
def test_a_moved_graph_is_not_saved_and_loaded(way):
    """The averaged model's state dict, loaded by another: nobody has run a forward pass yet."""
    model, other, told = network(), network(), ""
    try:
        other.load_state_dict(IN_PLACE[way](model).state_dict())
    except REFUSED as error:
        told = str(error)
    assert "neighbours" in told or torch.equal(other[0].neighbours, model[0].neighbours)


def mean(*states):
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def weighted(*states):
    """By decays of float32, whose sum is one but for rounding."""
    shares = torch.softmax(torch.arange(float(len(states))), 0)
    return {
        name: sum(w * state[name].float() for w, state in zip(shares, states, strict=True))
        for name in states[0]
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("average", [mean, weighted])
def test_a_soup_of_one_graph_is_loaded(average, assign):
    models = [network() for _ in range(3)]
    for i, model in enumerate(models):
        torch.manual_seed(i)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    state = average(*(model.state_dict() for model in models))
    assert state["0.neighbours"].is_floating_point()
    soup = network()
    soup.load_state_dict(state, assign=assign)
    assert (
        torch.equal(soup[0].neighbours, models[0][0].neighbours)
        and soup[0].neighbours.dtype == torch.int32
    )
    torch.testing.assert_close(
        soup[0].weight, average(*({"w": model[0].weight} for model in models))["w"]
    )
    assert soup(torch.randn(2, 512)).isfinite().all()


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_a_soup_of_several_graphs_is_refused(share):
    one, other = network(), network()
    other[0] = xzoo.ExpanderLinear(512, 64, degree=32, seed=4)
    states = one.state_dict(), other.state_dict()
    state = {
        name: (1 - share) * value + share * states[1][name] for name, value in states[0].items()
    }
    with pytest.raises(
        RuntimeError, match=r"0\.neighbours: has dtype torch\.float32; a graph is integers"
    ):
        network().load_state_dict(state)
