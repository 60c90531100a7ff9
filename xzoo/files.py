"""Files that are written whole or not at all; whether one can be, found out before the work; why
not, in words.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import XzooError, first_line
from .names import encoded

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
# What torch's writers call a disk that refuses, also where it has room again by now.
_TORN = "unexpected pos|PytorchStreamWriter|iostream error|file write failed"


def reason(error: OSError) -> str:
    """Why the operating system refused, in words, without the name of a file."""
    told = error.strerror or first_line(error)
    words = _WORDS.get(error.errno or 0)
    return f"{words} ({told})" if words else told


def why(error: BaseException, draft: Path) -> str | None:
    """Why writing `draft` has just failed; None where neither the operating system nor the disk is
    the cause.

    Libraries turn a full disk into errors of their own (torch's "unexpected pos 901760 vs 901656"),
    so the disk is asked for more.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return reason(cause)
        cause = cause.__cause__
    if number := re.search(r"os error (\d+)", str(error)):  # safetensors, which is written in Rust
        return reason(OSError(int(number[1]), os.strerror(int(number[1]))))
    try:
        with open(draft, "ab") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refusal:
        return reason(refusal)
    first = first_line(error)
    return f"the disk took only a part of it ({first})" if re.search(_TORN, first) else None


def _draft_of(path: Path) -> Path:
    """Beside it and of this process alone: a move from another file system is a copy that a kill
    can cut in two.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends
    well.

    Raises: XzooError when it cannot be written (full disk, permissions); what was there before
    stays.
    """
    path = Path(path)
    draft = _draft_of(path)
    try:
        try:
            yield draft
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
        except XzooError:
            raise
        # torch's writer turns a full disk into a RuntimeError, safetensors into an error of its
        # own.
        except (OSError, RuntimeError, SafetensorError) as error:
            cause = why(error, draft)
            if cause is None:
                raise
            kept = "what it held before is kept" if path.exists() else "no file was written"
            raise XzooError(f"cannot write {path}: {cause}; {kept}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder, empty, that takes the place of the folder `path` when the block ends
    well.

    Raises: XzooError when it cannot be written, as `atomic`; what was there before stays.
    """
    path = Path(path)
    draft = _draft_of(path)
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        _replace_folder(draft, path)
    except (OSError, SafetensorError) as error:
        cause = why(error, draft / "probe")
        if cause is None:
            raise
        kept = "what it held before is kept" if path.exists() else "no file was written"
        raise XzooError(f"cannot write {path}: {cause}; {kept}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Folders cannot be exchanged in one step on every system."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        with suppress(OSError):
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """In UTF-8; bytes of names that are none are written as they were."""
    with atomic(path) as draft:
        draft.write_bytes(encoded(text))


def check_file(path: Path | str, option: str = "") -> None:
    """Raise XzooError unless a file can be written there, into a folder that exists; before the
    work, not after it.

    Args:
        path: where it will be; a file that is there may be replaced, anything else may not.
        option: what named it, such as "--csv", for the message.
    """
    path = Path(path)
    if problem := _problem(path, path.parent):
        raise XzooError(
            f"cannot write {path}: {problem}; give another{option and f' with {option}'}"
        )


def check_folder(path: Path | str, option: str = "") -> None:
    """Raise XzooError unless files can be written into that folder, which may be absent, and is so
    afterwards.
    """
    path = Path(path)
    made: list[Path] = []
    try:
        if path.exists() and not path.is_dir():
            problem: str | None = "it is not a folder"
        else:
            made = [place for place in (path, *path.parents) if not place.exists()]
            path.mkdir(parents=True, exist_ok=True)
            problem = _problem(path / "probe", path)
    except (OSError, ValueError) as error:
        problem = _why(error)
    finally:
        for place in made:
            with suppress(OSError, ValueError):  # of those that were not made, too
                place.rmdir()
    if problem:
        raise XzooError(
            f"cannot write to {path}: {problem}; give another folder{option and f' with {option}'}"
        )


def _problem(path: Path, folder: Path) -> str | None:
    """Why a file cannot be written, found by writing a draft of it as `atomic` does."""
    try:
        if path.is_dir():
            return "it is a folder"
        if path.exists() and not path.is_file():
            return "it is not a regular file"
        if not folder.is_dir():
            return f"there is no folder {folder}"
        draft = _draft_of(folder / path.name)
        try:
            draft.write_bytes(b"x")
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return _why(error)
    return None


def _why(error: OSError | ValueError) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)  # a name with a null byte
