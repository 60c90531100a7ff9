"""Where xzoo keeps on a user's machine what it can make or fetch again."""

import atexit
import functools
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path


def home() -> Path:
    """XZOO_HOME, else the platform's cache folder, else a private folder for temporary files; it
    need not exist.

    The last where there is no home folder, as for a container's user that has no account, or where
    nothing can be written to it. What is in a cache folder that can only be read is still read.
    """
    try:
        if given := os.environ.get("XZOO_HOME"):
            return Path(given).expanduser()
        if sys.platform == "win32":
            cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            cache = Path.home() / "Library" / "Caches"
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            if not os.environ.get("XDG_CACHE_HOME") and not _is_dir(Path.home()):
                return private()
    except RuntimeError:  # no home folder, and no account that names one
        return private()
    there = next(
        (folder for folder in (cache / "xzoo", *(cache / "xzoo").parents) if _is_dir(folder)), None
    )
    if there == cache / "xzoo" or (there is not None and os.access(there, os.W_OK | os.X_OK)):
        return cache / "xzoo"
    return private()


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # in a folder that may not be entered
        return False


def private(parent: str | None = None) -> Path:
    """A folder that this user alone can enter, in `parent` or where temporary files are; the same
    for all processes.

    Where another user has taken its name: a new one, for this process. Where none can be made, it
    does not exist.
    """
    try:
        place = parent or tempfile.gettempdir()
    except OSError:  # nothing can be written anywhere
        place = "/tmp"
    return _private(place, os.getuid() if hasattr(os, "getuid") else 0)


@functools.cache
def _private(place: str, user: int) -> Path:
    folder = Path(place, f"xzoo-{user}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
        # Windows: the user's place
        ours = os.name != "posix" or (state.st_uid == user and not state.st_mode & 0o077)
        if stat.S_ISDIR(state.st_mode) and ours:
            return folder
        own = Path(tempfile.mkdtemp(prefix=f"xzoo-{user}-", dir=place))
    except OSError:
        return folder
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
