"""Whether something can be written, found out before the work, and why it could not be, in words.

Not here: writing itself (train/run.py: atomic).
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

from .errors import XzooError

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it grows beyond the size that a file may have here (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}
# What the draft of a file needs of a disk that has room for it.
_PROBE = 1 << 20


def reason(error: OSError) -> str:
    """Why the operating system refused, in words, without the name of a file."""
    told = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
    words = _WORDS.get(error.errno or 0)
    return f"{words} ({told})" if words else told


def refused(draft: Path) -> str | None:
    """Why the disk takes no more of a file whose writing has just failed; None if it does.

    By asking for more, since libraries turn a full disk into errors of their own ("unexpected pos").
    """
    try:
        with open(draft, "ab") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return reason(error)
    return None


def check_file(path: Path | str, what: str = "") -> None:
    """Raise XzooError unless a file can be written there, into a folder that exists; before the work, not after it.

    Args:
        path: where it will be; a file that is there may be replaced, anything else may not.
        what: the option that named it, such as "--csv", for the message.
    """
    path = Path(path)
    cannot = f"{what} {path}: cannot be written".strip()
    try:
        if path.is_dir():
            raise XzooError(f"{cannot}: it is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            raise XzooError(f"{cannot}: it is not a regular file; give another name")
        if not path.parent.is_dir():
            raise XzooError(f"{cannot}: there is no folder {path.parent}; make it first, or give another")
        _touch(path.parent, path.name)
    except (OSError, ValueError) as error:
        if isinstance(error, XzooError):
            raise
        raise XzooError(f"{cannot}: {_why(error)}; give another place") from error


def check_folder(path: Path | str, what: str = "") -> None:
    """Raise XzooError unless files can be written into that folder, which may be absent, and is so afterwards."""
    path = Path(path)
    cannot = f"{what} {path}: cannot be written".strip()
    made: list[Path] = []
    try:
        if path.exists() and not path.is_dir():
            raise XzooError(f"{cannot}: it is not a folder; give another")
        made = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        _touch(path, "probe")
    except (OSError, ValueError) as error:
        if isinstance(error, XzooError):
            raise
        raise XzooError(f"{cannot}: {_why(error)}; give another place") from error
    finally:
        with suppress(OSError, ValueError):
            for place in made:
                place.rmdir()


def _touch(folder: Path, name: str) -> None:
    """Write a draft as `atomic` does, and take it away."""
    draft = folder / f".{name}.{os.getpid()}.part"
    try:
        draft.write_bytes(b"x")
    finally:
        draft.unlink(missing_ok=True)


def _why(error: OSError | ValueError) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)  # a name with a null byte
