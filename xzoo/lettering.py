"""Texts in pictures as they are: no formulas read into them, and every character from a font that
has it.

matplotlib reads what stands between two dollar signs as TeX, and draws a box for what its font
lacks. Here a text is never TeX. Its characters come from matplotlib's own font or from any other
that is installed; one that no font has is escaped, and a class with such a name is drawn as its
number (`class_labels`).
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import filterfalse
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray
from rich.console import Console

from .errors import first_line
from .names import cut, escape, is_unseen, say, shown

FAMILY = "DejaVu Sans"  # comes with matplotlib
NUMBERED = re.compile(r"#\d+")  # how `class_labels` begins where a name is not enough


class Picture(Figure):
    """A Figure whose texts are lettered whenever it is drawn; its layout is constrained."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__((width, height), layout="constrained")

    def draw(self, renderer: Any) -> None:
        letter(self)
        super().draw(renderer)


def letter(figure: Figure) -> None:
    """Make all texts of the figure plain, in fonts that have their characters, whatever the user's
    matplotlibrc says.

    Names of ticks have to be `drawable` before: matplotlib sets them anew when it draws.
    """
    for text in figure.findobj(Text):
        words = text.get_text()
        if not words.isascii():
            words = "\n".join(map(drawable, words.split("\n")))
        text.set(text=words, usetex=False, parse_math=False, fontfamily=[FAMILY, *_families(words)])


def drawable(name: str) -> str:
    """The name in one line, of characters that some font here has; all others are escaped."""
    text = shown(name)
    lacking = _lacking(text)
    return "".join(escape(c) if c in lacking else c for c in text)


def class_labels(classes: Sequence[str], most: int) -> list[str]:
    """A text for each class, all different to the eye.

    It is the name: in quotes where it is empty, ends in blanks or looks like a number of ours,
    without its middle where it is longer than `most` characters. Names that look the same have the
    number of their class before them, counted from 1; a name that no font can draw is its number
    alone.
    """
    labels = []
    for number, name in enumerate(classes, 1):
        text = shown(name)
        if text != text.strip() or not text or NUMBERED.match(text):
            text = f'"{text}"'
        labels.append(f"#{number}" if _lacking(text) else cut(text, most))
    # By their outlines, which take milliseconds: an accent in one character or two, letters of two
    # alphabets.
    plain = "".join(labels).isascii()
    looks = labels if plain else list(map(_outline, labels))
    seen = Counter(looks)
    return [
        f"#{number} {label}" if seen[look] > 1 else label
        for number, (label, look) in enumerate(zip(labels, looks, strict=True), 1)
    ]


def _outline(text: str) -> bytes:
    font = FontProperties(family=[FAMILY, *_families(text)])
    points, _ = text_to_path.get_text_path(font, text, ismath=False)
    return np.asarray(points).tobytes()


@contextmanager
def spared(what: object, console: Console) -> Iterator[None]:
    """What fails in this block is told in one line and ends nothing: a run is worth more than its
    pictures.
    """
    try:
        yield
    except Exception as error:  # of matplotlib, its fonts, Pillow, the disk
        say(console, f"{what} is not drawn: {first_line(error)}")


# ---- fonts


def _lacking(text: str) -> set[str]:
    """The characters of a text that no font has."""
    return set() if text.isascii() else {c for c in set(text) - _own() if _family_of(c) is None}


def _families(text: str) -> list[str]:
    """Those that the text needs beside FAMILY."""
    if text.isascii():
        return []
    families = map(_family_of, filterfalse(_own().__contains__, text))
    return list(dict.fromkeys(filter(None, families)))


@functools.cache
def _own() -> frozenset[str]:
    """The characters of FAMILY."""
    codes = FT2Font(font_manager.findfont(FAMILY)).get_charmap()
    return frozenset(map(chr, codes)) | {"\n"}


@functools.cache
def _family_of(character: str) -> str | None:
    """The family of the first installed font that can draw the character; None without any."""
    if is_unseen(character):
        return None
    for file in _installed():
        if _has(file, character) and (family := _known(file, character)):
            return family
    return None


@functools.cache
def _installed() -> list[str]:
    """Fonts of the system and those added to matplotlib: without serifs, upright and regular ones
    first.
    """
    # fonts for formulas, and one that has a box for everything
    own = Path(matplotlib.get_data_path())
    known = map(attrgetter("fname"), font_manager.fontManager.ttflist)
    files = {*font_manager.findSystemFonts(), *known}

    def order(file: str) -> tuple[bool, bool, str]:
        name = Path(file).stem.lower()
        return "sans" not in name, not re.search("regular|book|medium", name), file

    return sorted((file for file in files if not Path(file).is_relative_to(own)), key=order)


@functools.cache
def _codes(file: str) -> NDArray[np.uint32]:
    """Code points of a font, ascending; none of a font that matplotlib cannot use, or that draws a
    box for all.
    """
    try:
        font = FT2Font(file)
        if not font.scalable or re.search(
            "last ?resort|blank|fallback sil", font.family_name.lower()
        ):
            return np.empty(0, np.uint32)
        return np.sort(np.fromiter(font.get_charmap(), np.uint32))
    except Exception:  # FreeType's classes for a broken file
        return np.empty(0, np.uint32)


def _has(file: str, character: str) -> bool:
    codes, code = _codes(file), ord(character)
    place = int(np.searchsorted(codes, code))
    return place < len(codes) and int(codes[place]) == code


def _known(file: str, character: str) -> str | None:
    """The font's family, which matplotlib now knows, if by that name it draws the character."""
    try:
        font = FT2Font(file)
        font.load_char(ord(character))
        # coloured emoji have no outline
        if not len(font.get_path()[0]) and not character.isspace():
            return None
        manager = font_manager.fontManager
        if file not in {known.fname for known in manager.ttflist}:  # its list is of an earlier day
            manager.addfont(file)
        found = font_manager.findfont(
            FontProperties(family=[font.family_name]), fallback_to_default=False
        )
    except Exception:  # a font that FreeType or matplotlib does not take is as good as none
        return None
    return font.family_name if _has(str(found), character) else None
