"""Texts beside the points of a picture, put where they lie on nothing: neither points, lines nor
one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sin
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

PAPER = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.6}


@dataclass(frozen=True)
class Label:
    """What stands beside the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    color: str
    size: float = 8.5


# Around the point, to the right first, and further away only if need be; then a thin line leads to
# it.
_PLACES = [
    (r, k * pi / 6) for r in (8, 15, 24, 36, 52) for k in (0, 1, 11, 2, 10, 6, 5, 7, 3, 9, 4, 8)
]


def place(
    axes: "Axes", labels: Sequence[Label], marks: Sequence[tuple[float, float]], margin: float = 4.5
) -> None:
    """Draw the labels; to be called when all else is drawn and the limits of the axes are final.

    Args:
        marks: points that no text may hide, in data coordinates.
        margin: half the width of a mark, in points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..lettering import letter

    figure = axes.get_figure(root=True)
    assert figure is not None
    if not labels:
        return
    figure.draw_without_rendering()  # now the layout is final
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixel = figure.dpi / 72
    spots = axes.transData.transform(np.asarray(marks, dtype=float).reshape(-1, 2))
    fixed = np.concatenate([spots - margin * pixel, spots + margin * pixel], axis=1)
    if legend := axes.get_legend():
        fixed = np.concatenate([fixed, [legend.get_window_extent(renderer).extents]])
    lines = _boxes_along(axes, pixel)
    frame = np.array(axes.get_window_extent(renderer).extents)
    texts = [_text(axes, label) for label in labels]
    letter(figure)  # before they are measured
    sizes = [text.get_window_extent(renderer) for text in texts]
    anchors = axes.transData.transform([(label.x, label.y) for label in labels])
    taken = np.zeros((len(labels), 4))
    chosen = [0] * len(labels)
    # Twice, since the first round knows nothing of labels that come later.
    for sweep in range(3):
        for i, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            boxes = np.array(
                [_box(anchor, size.width, size.height, r * pixel, angle) for r, angle in _PLACES]
            )
            others = np.delete(taken, i, axis=0) if sweep else taken[:i]
            cost = (
                8 * _overlap(boxes, others)
                + 5 * _overlap(boxes, fixed)
                + 1.2 * _overlap(boxes, lines)
            )
            cost += 20 * _outside(boxes, frame) + pixel**2 * np.array(
                [0.25 * r**1.5 for r, _ in _PLACES]
            )
            cost += pixel**2 * 0.2 * (np.arange(len(_PLACES)) % 12)
            chosen[i] = int(cost.argmin())
            taken[i] = boxes[chosen[i]]
    for label, text, index, box in zip(labels, texts, chosen, taken, strict=True):
        _move(text, label, _PLACES[index][0], box, axes)


def _text(axes: "Axes", label: Label) -> "Annotation":
    at = (label.x, label.y)
    text = axes.annotate(
        label.text, at, at, color=label.color, fontsize=label.size, ha="center", va="center"
    )
    text.set_in_layout(False)
    return text


def _move(
    text: "Annotation", label: Label, radius: float, box: NDArray[np.float64], axes: "Axes"
) -> None:
    middle = axes.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    text.set_position((float(middle[0]), float(middle[1])))
    text.set(bbox=PAPER, zorder=5)
    if radius > 20:
        ends = ([label.x, middle[0]], [label.y, middle[1]])
        axes.plot(
            *ends,
            color=label.color,
            linewidth=0.5,
            alpha=0.7,
            zorder=1.5,
            scalex=False,
            scaley=False,
        )


def _box(
    anchor: NDArray[np.float64], width: float, height: float, radius: float, angle: float
) -> tuple[float, float, float, float]:
    """A box whose nearest edge is `radius` from the anchor, in the direction of the angle."""
    x = anchor[0] + cos(angle) * (radius + width / 2)
    y = anchor[1] + sin(angle) * (radius + height / 2)
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _boxes_along(axes: "Axes", pixel: float) -> NDArray[np.float64]:
    """Small boxes on all lines of the axes, so that lines count as taken."""
    spots = [np.empty((0, 2))]
    for line in axes.lines:
        points = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        for start, end in pairwise(points):
            steps = (
                max(2, int(np.hypot(*(end - start)) / (5 * pixel)))
                if np.isfinite([start, end]).all()
                else 0
            )
            spots.append(np.linspace(start, end, steps) if steps else np.empty((0, 2)))
    along = np.concatenate(spots)
    return np.concatenate([along - 1.5 * pixel, along + 1.5 * pixel], axis=1)


def _overlap(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area that each box shares with the others, in all."""
    a, b = boxes[:, None], others[None]
    width = np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    return (width.clip(min=0) * height.clip(min=0)).sum(axis=1)


def _outside(boxes: NDArray[np.float64], frame: NDArray[np.float64]) -> NDArray[np.float64]:
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area - _overlap(boxes, frame[None])
