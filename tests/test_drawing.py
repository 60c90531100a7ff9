"""Pictures show what was measured, write nothing but their files, and come out the same twice."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from xzoo import drawing, graphs, theory
from xzoo.errors import ModelError
from xzoo.layers import ExpanderConv2d
from xzoo.theory import Graph

ROOT = Path(__file__).parent.parent


def small_model():
    layers = [ExpanderConv2d(i, o, 1, degree=4, seed=i) for i, o in ((8, 16), (16, 24), (24, 8))]
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 2, 1), ExpanderConv2d(2, 2, 1, degree=1)
    )


def texts(figure):
    return " ".join(
        text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    )


def test_a_models_pictures(tmp_path):
    paths = drawing.draw_model(small_model(), tmp_path / "new" / "folder", name="tiny")
    assert [path.name for path in paths] == ["spectrum.png", "reach.png", "graph.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    again = drawing.draw_model(small_model(), tmp_path / "again", name="tiny")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_a_model_without_x_layers_has_no_pictures(tmp_path):
    with pytest.raises(
        ModelError, match=r"tiny has no X-layers to draw; give an X-Net, or expand it first"
    ):
        drawing.draw_model(nn.Linear(4, 4), tmp_path / "none", name="tiny")
    assert not (tmp_path / "none").exists()


def test_layers_are_drawn_at_their_normalised_second_value():
    measured = {
        name: theory.spectrum(graph) for name, graph in theory.graphs_of(small_model()).items()
    }
    axes = drawing.draw_layers(measured, "tiny").axes[0]
    heights = np.asarray(axes.collections[-1].get_offsets())[:, 1]
    assert heights == pytest.approx([found.normalised for found in measured.values()])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(measured)


def test_reach_is_drawn_in_per_cent_of_depth():
    curves = {kind: theory.reach(theory.stack(kind, 16, 4, layers=6)) for kind in graphs.KINDS}
    lines = {line.get_label(): line for line in drawing.draw_reach(curves).axes[0].lines}
    for kind, found in curves.items():
        x, y = lines[drawing.LABEL[kind]].get_data()
        assert list(x) == list(range(1, len(found.connected) + 1))
        assert list(y) == pytest.approx([100 * part for part in found.connected])


def test_the_spectrum_marks_both_bounds_and_both_values():
    graph = Graph.sample("biregular", 48, 96, 8, share=2)
    found, figure = theory.spectrum(graph), drawing.draw_spectrum(graph)
    for value in (found.first, found.second, found.ramanujan, found.random_matrix):
        assert f"{value:.2f}" in texts(figure)
    # all values but the first
    assert sum(patch.get_height() for patch in figure.axes[0].patches[:48]) == 47


def test_the_matrix_of_a_layer_repeats_its_rows():
    graph = Graph.sample("biregular", 12, 24, 3, share=2)
    (image,) = drawing.draw_adjacency(graph).axes[1].images
    matrix = np.asarray(image.get_array())
    assert matrix.shape == (24, 12)
    assert np.array_equal(
        np.nonzero(matrix)[1].reshape(24, 3), np.repeat(graph.neighbours, 2, axis=0)
    )


def test_stacks_say_what_one_output_depends_on():
    stacks = {kind: list(theory.stack(kind, 16, 4, layers=3)) for kind in ("group", "biregular")}
    figure = drawing.draw_stacks(stacks, output=6)
    assert "192 weights" in texts(figure)
    assert "depends on 4 of 16 inputs" in texts(figure)
    assert "depends on 16 of 16 inputs" in texts(figure)


@pytest.mark.parametrize("n", [1, 2])
def test_the_smallest_graphs_can_be_drawn(n, tmp_path):
    drawing.draw_model(nn.Sequential(ExpanderConv2d(n, n, 1, degree=1)), tmp_path)


@pytest.mark.slow
def test_importing_draws_nothing_and_drawing_leaves_pyplot_alone():
    code = (
        "import sys; from xzoo import drawing, theory; assert 'matplotlib' not in sys.modules, "
        "'too early'; "
        "drawing.draw_spectrum(theory.Graph.sample('biregular', 8, 8, 4)); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_readmes_pictures(tmp_path):
    done = [sys.executable, str(ROOT / ".github" / "readme.py"), str(tmp_path)]
    printed = subprocess.run(done, capture_output=True, text=True, check=True).stdout.split()
    assert [path.rsplit("/")[-1] for path in printed] == [
        "graph.png",
        "spectrum.png",
        "reach.png",
        "mixing.png",
    ]
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("graph.png", "mixing.png"))
