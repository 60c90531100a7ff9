"""Names from outside (classes, files, folders, recipes), in any script and any encoding: in a line,
in a file, hashed.

Python reads a byte of a file name that is not UTF-8 as a surrogate, which no encoder accepts.
How names are drawn in pictures is in lettering.py.
"""

import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Of the characters that nobody sees, those that join letters and emoji belong to the spelling of
# many languages.
_JOINERS = "\u200c\u200d"
# control and format characters, surrogates, ends of lines and paragraphs
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def shown(name: object, encoding: str = "utf-8") -> str:
    r"""The name in one line, of what `encoding` has; all else as Python escapes it.

    Escaped are what would break a line or move the cursor (`\n`, `\x1b`), what nobody sees
    (`\u200b`), bytes that are not UTF-8 (`\udce9` for the byte E9), and what the encoding lacks. A
    backslash stays one, for the sake of Windows.
    """
    text = rejoined(str(name))
    if not text.isprintable():
        text = "".join(escape(c) if is_unseen(c) else c for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def is_unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN and character not in _JOINERS


def escaped(name: str) -> str:
    r"""`shown` with `\\` for a backslash, so that no two names become one and each can be read
    back.
    """
    return shown(name.replace("\\", "\\\\"))


def encoded(text: str) -> bytes:
    """UTF-8; bytes that were none when a file name was read are themselves again."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair, as Windows and JSON allow
        return text.encode("utf-8", "surrogatepass")


def to_yaml(values: Any) -> str:
    """YAML in which every text stays one, whatever it looks like (`yes`, `null`, `1e3`), for
    readers of 1.1 and 1.2.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    # In 1.2 these are numbers too; what resolves to one is written in quotes if it is a text.
    numbers = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|0o[0-7]+$")
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+.0123456789"))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def rejoined(name: str) -> str:
    """The name as UTF-8 means it, where Python read it byte by byte in a locale of ASCII."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair
        return name


def say(console: "Console", text: str) -> None:
    """Print one line as it is: no markup, no `:cat:` made an emoji, and nothing that the console
    cannot show.
    """
    line = shown(text, console.encoding)
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def cut(text: str, most: int) -> str:
    """At most so many characters, without the middle of a longer text: names in a series differ at
    their ends.
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return text[: most - 1 - tail] + "\u2026" + text[len(text) - tail :]


def code(text: str) -> str:
    """A code span of Markdown, between more backticks than the text has in a row."""
    text = shown(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks, blank = "`" * (longest + 1), " " * (longest > 0)
    return f"{ticks}{blank}{text}{blank}{ticks}"


def markdown(text: object) -> str:
    r"""A text in Markdown, as it is: neither HTML nor emphasis, links, code, formulas or the end of
    a table's cell.
    """
    plain = shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore between letters means nothing there.
    return re.sub(r"[\\`*\[\]|$~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)
