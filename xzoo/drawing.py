"""Pictures of graphs and models, from measurements.

Every function returns a matplotlib Figure, made without pyplot, so that nothing global is touched
and a notebook, a test and the command line can all use it. Colours are those of Okabe and Ito, told
apart by the colour-blind; a kind of graph has the same colour, marker and name in every picture.

Not here: the measurements themselves (theory.py).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from . import theory
from .errors import ModelError
from .names import cut, shown
from .theory import Graph

if TYPE_CHECKING:  # matplotlib takes half a second to import, and most of xzoo never draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Edge = tuple[tuple[float, float], tuple[float, float]]  # from a channel to one of the next layer

INK, PALE = "#333333", "#d9d9d9"
COLOUR = {
    "biregular": "#0072b2",
    "expander": "#0072b2",
    "random": "#e69f00",
    "shuffle": "#009e73",
    "group": "#d55e00",
    "ramanujan": "#cc79a7",
}
MARKER = {"biregular": "o", "random": "s", "shuffle": "^", "group": "D", "ramanujan": "v"}
LABEL = {
    "biregular": "expander (biregular)",
    "random": "random fan-in",
    "shuffle": "group + shuffle",
    "group": "group",
    "ramanujan": "Ramanujan",
}


def draw_stacks(stacks: Mapping[str, Sequence[Graph]], output: int = 0) -> "Figure":
    """Columns of channels joined by edges, as on the slides, with all that one output depends on
    coloured.

    One panel for each title -> stack; up to some 32 channels a layer stay legible.

    Args:
        stacks: a title that is a kind of graph gives its panel the colour of that kind.
        output: which output of the last layer is followed back to the inputs.
    """
    figure = _figure(4.2 * len(stacks), 4.6)
    for number, (title, stack) in enumerate(stacks.items()):
        axes = figure.add_subplot(1, len(stacks), number + 1)
        colour = COLOUR.get(title, INK)
        depends = _draw_columns(axes, stack, output, colour)
        edges = sum(graph.neighbours.size * graph.share for graph in stack)
        axes.set_title(title, fontsize=14, fontweight="bold", color=colour, pad=10)
        caption = f"{edges} weights\none output depends on {depends} of {stack[0].n_in} inputs"
        axes.set_xlabel(caption, fontsize=11, labelpad=8)
    return figure


def draw_adjacency(graph: Graph, title: str = "") -> "Figure":
    """One layer as a bipartite drawing (of some of its outputs, if there are many) beside its 0/1
    matrix.
    """
    from matplotlib.colors import ListedColormap

    figure = _figure(10, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_lines(left, graph)
    matrix = np.repeat(graph.matrix(), graph.share, axis=0)
    right.imshow(
        matrix,
        cmap=ListedColormap(["white", COLOUR["biregular"]]),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    right.set(xlabel="input channel", ylabel="output channel")
    density = f"{graph.degree} of {graph.n_in} inputs for each output"
    right.set_title(
        f"matrix: {density}" + (f", share {graph.share}" if graph.share > 1 else ""), fontsize=11
    )
    figure.suptitle(title, fontsize=13)
    return figure


def draw_spectrum(graph: Graph, title: str = "") -> "Figure":
    """Histogram of all singular values of the quotient graph, with both bounds and the two largest
    marked.
    """
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    draw_histogram(axes, graph)
    axes.set_title(title or f"{graph.n_in} inputs, {graph.blocks} blocks, degree {graph.degree}")
    return figure


def draw_reach(curves: Mapping[str, theory.Reach], title: str = "") -> "Figure":
    """Share of all pairs (input, output) that is connected, by layer; one curve for each name."""
    figure = _figure(7, 4.2)
    draw_growth(figure.subplots(), curves)
    figure.suptitle(title)
    return figure


def draw_layers(measured: Mapping[str, theory.Spectrum], title: str = "") -> "Figure":
    """Normalised second singular value of every layer against both bounds and a group layer's
    value.
    """
    from .lettering import drawable

    figure = _figure(min(14, 6 + 0.12 * len(measured)), 4.6)
    axes = figure.subplots()
    found = list(measured.values())
    place = np.arange(len(found))
    axes.axhline(1, color=COLOUR["group"], linewidth=1.5, label="group convolution")
    ends = (place - 0.4, place + 0.4)
    heights = [each.ramanujan / each.first for each in found]
    axes.hlines(heights, *ends, color=INK, linewidth=1.6, label="Ramanujan bound")
    heights = [each.random_matrix / each.first for each in found]
    axes.hlines(heights, *ends, color="#999999", linewidth=1.6, label="random-matrix value")
    size = 30 if len(found) < 60 else 12
    axes.scatter(
        place,
        [each.normalised for each in found],
        size,
        COLOUR["biregular"],
        zorder=3,
        label="layer",
    )
    axes.set(ylim=(0, 1.08), ylabel="second / first singular value", xlim=(-0.7, len(found) - 0.3))
    step = max(1, len(found) // 24 + (len(found) > 24))
    names = [drawable(cut(shown(layer), 60)) for layer in list(measured)[::step]]
    axes.set_xticks(place[::step], names, rotation=60, ha="right", fontsize=7)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_title(title)
    return figure


def draw_model(model: nn.Module, folder: str | Path, name: str = "model") -> list[Path]:
    """Write three pictures of a model's X-layers into `folder` (made if absent) and return their
    paths.

    `spectrum.png`: every layer against both bounds; `reach.png`: growth of reachability through the
    longest run; `graph.png`: the layer with the fewest edges, as a drawing and as a matrix.

    Raises: ModelError for a model without X-layers.
    """
    drawn = theory.graphs_of(model)
    if not drawn:
        raise ModelError(
            f"{name} has no X-layers to draw; give an X-Net, or expand it first (xzoo.expand)"
        )
    name = cut(shown(name), 80)
    run = max(theory.runs(model), key=lambda run: len(run.names))
    span = run.names[0] if len(run.names) == 1 else f"{run.names[0]} ... {run.names[-1]}"
    state = f"complete after {run.reach.depth}" if run.reach.complete else "not complete"
    smallest = min(drawn, key=lambda layer: drawn[layer].neighbours.size)
    pictures = {
        "spectrum": draw_layers(
            dict(zip(drawn, map(theory.spectrum, drawn.values()), strict=True)), name
        ),
        "reach": draw_reach(
            {span: run.reach}, f"{name}: its longest run has {len(run.names)} X-layers, {state}"
        ),
        "graph": draw_adjacency(drawn[smallest], f"{name}: {cut(shown(smallest), 60)}"),
    }
    return save(pictures, folder)


def _draw_columns(axes: "Axes", stack: Sequence[Graph], output: int, colour: str) -> int:
    """Draw the stack from left to right; return how many inputs `output` depends on."""
    from matplotlib.collections import LineCollection

    widths = [stack[0].n_in, *(graph.n_out for graph in stack)]
    chosen = {output}
    marked = [chosen]
    for column, graph in reversed(list(enumerate(stack))):
        rows = np.repeat(graph.neighbours, graph.share, axis=0)
        pale: list[Edge] = []
        bright: list[Edge] = []
        for o, row in enumerate(rows):
            for i in row:
                start, end = (column, _height(i, graph.n_in)), (column + 1, _height(o, graph.n_out))
                (bright if o in chosen else pale).append((start, end))
        width = 1.1 if len(bright) < 200 else 0.35  # a dense layer would be a wall of ink
        axes.add_collection(LineCollection(pale, colors=PALE, linewidths=0.7, zorder=1))
        axes.add_collection(
            LineCollection(bright, colors=colour, linewidths=width, alpha=0.7, zorder=2)
        )
        chosen = set(rows[list(chosen)].ravel().tolist())
        marked.insert(0, chosen)
    for column, (width, on_path) in enumerate(zip(widths, marked, strict=True)):
        inside = np.isin(range(width), list(on_path))
        fill = np.where(inside, colour, "white").tolist()
        rim = np.where(inside, colour, "#aaaaaa").tolist()
        heights = [_height(channel, width) for channel in range(width)]
        axes.scatter([column] * width, heights, 42, fill, edgecolors=rim, linewidths=1.1, zorder=3)
    axes.set(xlim=(-0.2, len(stack) + 0.2), ylim=(-0.04, 1.04), yticks=[])
    names = ["input", *map("layer {}".format, range(1, len(widths)))]
    axes.set_xticks(range(len(widths)), names, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return len(chosen)


def _draw_lines(axes: "Axes", graph: Graph) -> None:
    """Outputs over inputs; of a wide layer every k-th output is drawn, with all of its edges."""
    from matplotlib.collections import LineCollection

    # a thousand lines are as many as the eye can tell apart
    drawn = max(4, min(32, 1000 // graph.degree))
    outputs = range(0, graph.n_out, -(-graph.n_out // drawn))
    lines = []
    for o in outputs:
        for i in graph.neighbours[o // graph.share]:
            lines.append(((_height(i, graph.n_in), 0), (_height(o, graph.n_out), 1)))
    axes.add_collection(
        LineCollection(
            lines,
            colors=COLOUR["biregular"],
            linewidths=0.8,
            alpha=max(0.08, min(0.6, 90 / len(lines))),
        )
    )
    for width, height in ((graph.n_in, 0), (graph.n_out, 1)):
        places = [_height(channel, width) for channel in range(width)]
        axes.scatter(places, [height] * width, min(30, 900 / width), INK, zorder=3)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.06, 1.06), xticks=[])
    axes.set_yticks([0, 1], [f"{graph.n_in}\ninputs", f"{graph.n_out}\noutputs"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_histogram(axes: "Axes", graph: Graph) -> None:
    values, found = theory.all_singular_values(graph), theory.spectrum(graph)
    axes.hist(
        values[1:],
        bins=min(48, len(values)),
        color=COLOUR["biregular"],
        alpha=0.8,
        label="singular values",
    )
    axes.axvline(
        found.ramanujan,
        color=INK,
        linestyle="--",
        linewidth=1.4,
        label=f"Ramanujan bound {found.ramanujan:.2f}",
    )
    label = f"random-matrix value {found.random_matrix:.2f}"
    axes.axvline(found.random_matrix, color=INK, linestyle=":", linewidth=1.6, label=label)
    arrow = {"arrowstyle": "-|>", "color": INK}
    right = found.first * 1.2
    marks = (
        (found.second, f"second {found.second:.2f}", 0.45),
        (found.first, f"first {found.first:.2f}", 0.3),
    )
    for value, text, height in marks:
        # Above the axis in fractions of it; the text of the second stands clear of the histogram.
        place = (min(value + 0.12 * right, 0.88 * right), height)
        axes.annotate(
            text,
            (value, 0),
            place,
            xycoords="data",
            textcoords=axes.get_xaxis_transform(),
            ha="center",
            arrowprops=arrow,
        )
    axes.set(xlabel="singular value", ylabel="number", xlim=(0, right))
    axes.legend(frameon=False, fontsize=9)


def draw_growth(axes: "Axes", curves: Mapping[str, theory.Reach]) -> None:
    """A complete curve goes on at 100 % beside longer ones, since no layer can undo that."""
    from matplotlib.ticker import MaxNLocator

    longest = max(len(found.connected) for found in curves.values())
    for name, found in curves.items():
        growth = [100 * part for part in found.connected]
        colour, marker = COLOUR.get(name, COLOUR["biregular"]), MARKER.get(name, "o")
        # matplotlib's legends leave out what begins with an underscore.
        label = LABEL.get(name) or re.sub("^_", " _", cut(shown(name), 80))
        axes.plot(range(1, len(growth) + 1), growth, color=colour, marker=marker, label=label)
        if found.complete:
            axes.plot([len(growth), longest], [100, 100], color=colour, zorder=1)
    axes.set(
        xlabel="layers",
        ylabel="connected pairs of input and output, %",
        ylim=(0, 104),
        xlim=(0.7, longest + 0.3),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)


def _height(channel: int, width: int) -> float:
    """Channels from top (1) to bottom (0); a single one in the middle."""
    return 1 - channel / (width - 1) if width > 1 else 0.5


def _figure(width: float, height: float) -> "Figure":
    from .lettering import Picture

    return Picture(width, height)


def save(pictures: Mapping[str, "Figure"], folder: str | Path) -> list[Path]:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=110, pil_kwargs={"optimize": True})
        paths.append(folder / f"{name}.png")
    return paths
