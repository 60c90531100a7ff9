"""Where xzoo keeps on a user's machine what it can make or fetch again."""

import os
import sys
from pathlib import Path


def home() -> Path:
    """XZOO_HOME, else the platform's cache folder; it need not exist."""
    if given := os.environ.get("XZOO_HOME"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "xzoo"
