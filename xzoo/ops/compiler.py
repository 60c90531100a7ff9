"""From C++ source to a library that is loaded: with which compiler, by which flags, and where it is
kept.

A compiler is asked for the best that the caller knows, then for less, until it makes a library that
loads: old ones do not know x86-64-v3, drivers for C do not link C++ by themselves. What came out is
kept under XZOO_HOME, or where nothing can be kept there in a private folder, under a hash of
everything it depends on; beside it a record (.json) with the hash of the library, how it was made
and what was refused. A compiler whose library cannot be loaded, or that took too long, is
remembered too, or every process would build for minutes again.

Not here: what the source is and which flags suit this CPU (native.py).
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..home import home, private

FORMAT = 1  # of the records
PATIENCE = 3  # seconds, then it is said what a first call waits for
LIMIT = 600  # seconds, then a compiler is given up
# Seconds that a failure is remembered: what was wrong may have been mended elsewhere.
MEMORY = 24 * 3600
SPACE = 16 << 20  # bytes: preprocessed source, object and library are 3 MB

# What the link needs, by itself or, where the compiler is one for C, by name. Undefined symbols are
# refused, so that the library loads in every process and not only beside one that happens to have
# them.
LINKS: tuple[list[str], ...] = (
    ["-Wl,-z,defs"],
    ["-Wl,-z,defs", "-lstdc++"],
    ["-Wl,-z,defs", "-lc++"],
    [],
    ["-lstdc++"],
    ["-lc++"],
)

LOADS = "import ctypes, sys; print('begun', flush=True); ctypes.CDLL(sys.argv[1])"


class BuildError(RuntimeError):
    """No library. `lasting` where finding that out took a compilation, so that it should not be
    found out again."""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Built(NamedTuple):
    """A library that is loaded; `record` tells command, version, flags, level, and what was refused
    before.

    `skipped` are folders that came first and would not do, with the reason.
    """

    library: ctypes.CDLL
    path: Path
    record: dict[str, Any]
    skipped: Sequence[str] = ()


class Variant(NamedTuple):
    """Flags to ask a compiler for; those of one level are spellings of the same."""

    level: str
    flags: list[str]


# ---- compilers


def compilers() -> Iterator[list[str]]:
    """The compilers to try, as words of a command: CXX alone if it is set, else what is installed.

    Raises: BuildError where CXX names none.
    """
    if given := os.environ.get("CXX", "").strip():
        yield _words(given)
        return
    seen = set()
    for name in itertools.chain(("g++", "c++", "clang++"), _versioned()):
        found = shutil.which(name)
        if found and os.path.realpath(found) not in seen:
            seen.add(os.path.realpath(found))
            yield [found]


def _words(given: str) -> list[str]:
    """CXX as a shell reads it, which is what make does: launchers, flags, a variable set in
    front."""
    if found := shutil.which(os.path.expanduser(given)):  # a path, perhaps with blanks in it
        return [os.path.abspath(found)]
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX={given!r} is not a command: {error}") from None
    if words and re.match(r"\w+=", words[0]):
        words = ["env", *words]
    found = shutil.which(os.path.expanduser(words[0])) if words else None
    if found is None:
        raise BuildError(
            f"CXX={given!r} names no compiler that is there; unset it, or name one that is"
        )
    return [os.path.abspath(found), *words[1:]]


def _versioned() -> Iterator[str]:
    """g++-12, clang++-19, x86_64-linux-gnu-g++ and the like, newest first: often all that is
    installed."""
    form = re.compile(rf"({re.escape(platform.machine())}[\w-]*-)?(g\+\+|clang\+\+)(-(\d+))?")
    found: set[tuple[int, str]] = set()
    for folder in os.get_exec_path():
        with contextlib.suppress(OSError):
            matches = [match for name in os.listdir(folder) if (match := form.fullmatch(name))]
            found.update((int(match[4] or 0), match[0]) for match in matches)
    for _, name in sorted(found, reverse=True):
        yield name


def _identity(words: Sequence[str]) -> list[Any]:
    """Changes when a program of the command does. Not its --version: that is a process for every
    process."""
    found = []
    for word in words:
        if path := None if word.startswith("-") else shutil.which(word):
            state = os.stat(path)
            found.append([os.path.realpath(path), state.st_size, state.st_mtime_ns])
    return found


# ---- the library


def build(
    source: Path,
    variants: Sequence[Variant],
    load: Callable[[Path], ctypes.CDLL],
    again: bool = False,
) -> Built:
    """The source as a library: the kept one, or a new one by the first compiler that makes one.

    Args:
        source: a file; headers that it includes in quotes are beside it.
        variants: what to ask for, the best first; the last is what every compiler should know.
        load: loads a library; raises OSError where that cannot be done.
        again: try once more what is remembered as a failure.
    Raises: BuildError, which says why there is none, in one line.
    """
    notice = _Notice()
    least, reasons = None, []
    for words in compilers():
        try:
            built = _by(words, source, variants, load, again, notice)
        except BuildError as error:
            reasons.append(str(error))
            continue
        if built.record["level"] != variants[-1].level or len(variants) == 1:
            return built
        least = least or built  # this compiler knows no vectors; perhaps the next one does
    if least is None:
        raise BuildError(
            "; ".join(reasons) or "no C++ compiler: install g++ or clang++, or name one in CXX"
        )
    return least


def whole(source: Path, seen: set[Path] | None = None) -> str:
    """All that the library is made of: the source, with each header beside it put where it is
    included first."""
    seen = set() if seen is None else seen
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith('#include "'):
            header = source.parent / line.split('"')[1]
            if header not in seen:
                seen.add(header)
                lines.append(whole(header, seen))
        elif line != "#pragma once\n":
            lines.append(line)
    return "".join(lines)


def _by(
    words: list[str],
    source: Path,
    variants: Sequence[Variant],
    load: Callable[[Path], ctypes.CDLL],
    again: bool,
    notice: "_Notice",
) -> Built:
    """The library of one compiler, from the first folder that will do."""
    parts = [FORMAT, whole(source), variants, words, _identity(words), platform.machine(), _libc()]
    # -march=native: for this CPU, and a home may be of several machines.
    if any("native" in word for word in words):
        parts.append(_cpu())
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    wrong: dict[Path, str] = {}
    for folder in _folders():
        if folder in wrong:
            continue
        try:
            found = _kept(folder, key, load, again)
            if found is None:
                _prepare(folder)
                with _locked(folder / f"{key}.{os.getuid()}.lock", notice):
                    # Another process may have been faster.
                    found = _kept(folder, key, load, again)
                    found = found or _made(folder, key, words, source, variants, load, notice)
            return found._replace(skipped=tuple(wrong.values()))
        except OSError as error:  # full, read-only, noexec, another user's: the next one
            wrong[folder] = f"{folder}: {error.strerror or error}"
    raise BuildError(f"no folder to build in ({'; '.join(wrong.values())}); name one in XZOO_HOME")


def _folders() -> Iterator[Path]:
    yield home() / "native"
    yield private() / "native"
    for parent in ("/tmp", "/var/tmp"):  # TMPDIR may be on a disk from which nothing is loaded
        yield private(parent) / "native"


def _prepare(folder: Path) -> None:
    """Make the folder. Raises: OSError where no library can be built in it and loaded from it."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _trust(folder)
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("nothing may be run from this disk (noexec)")
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, SPACE)


def _trust(folder: Path) -> None:
    state = folder.stat()
    if state.st_uid not in (os.getuid(), 0):
        raise PermissionError("it belongs to another user")
    if state.st_mode & 0o1002 == 0o002:
        raise PermissionError("every user can change what is in it")


def _kept(folder: Path, key: str, load: Callable[[Path], ctypes.CDLL], again: bool) -> Built | None:
    """What this user or root made here before. Raises: OSError if that cannot be loaded, BuildError
    if it failed."""
    for user in dict.fromkeys((os.getuid(), 0)):
        path = folder / f"{key}.{user}.so"
        try:
            file, data = path.with_suffix(".json"), b""
            record = json.loads(_own(file))
            if "failed" not in record:
                data = _own(path)
        except (OSError, ValueError):  # not there, not ours, or half of it
            continue
        if "failed" in record:
            if not again and abs(time.time() - file.stat().st_mtime) < MEMORY:
                raise BuildError(
                    f"{record['failed']} (this was found before; `xzoo doctor` tries again)"
                )
        # One that was cut would end the process.
        elif hashlib.sha256(data).hexdigest() == record["sha256"]:
            _trust(folder)
            return Built(load(path), path, record)
    return None


def _own(path: Path) -> bytes:
    """A file's content, if nobody but this user or root can have written it."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_uid not in (os.getuid(), 0) or state.st_mode & 0o022:
            raise PermissionError("others can write it")
        return file.read()


def _made(
    folder: Path,
    key: str,
    words: list[str],
    source: Path,
    variants: Sequence[Variant],
    load: Callable[[Path], ctypes.CDLL],
    notice: "_Notice",
) -> Built:
    """Compile, load, and keep what loads. Raises: BuildError, and remembers it if it is a lasting
    one."""
    stem = f"{key}.{os.getuid()}"
    for left in folder.glob(f"{stem}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=f"{stem}.", suffix=".tmp"))
    try:
        try:
            library, record = _compiled(_Compiler(words, work, notice), source, variants)
            try:
                loaded = load(library)
            except OSError as error:
                raise BuildError(
                    f"{shlex.join(words)}: its library cannot be loaded: {error}", lasting=True
                ) from None
        except BuildError as error:
            if error.lasting:
                _write(work, folder / f"{stem}.json", {"failed": str(error)})
            raise
        os.chmod(library, library.stat().st_mode & ~0o022)
        os.replace(library, folder / f"{stem}.so")
        _write(work, folder / f"{stem}.json", record)
        return Built(loaded, folder / f"{stem}.so", record)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, path: Path, record: dict[str, Any]) -> None:
    draft = work / path.name
    draft.write_text(json.dumps(record), encoding="utf-8")
    os.chmod(draft, draft.stat().st_mode & ~0o022)  # whatever the umask is
    os.replace(draft, path)


def _compiled(
    compiler: "_Compiler", source: Path, variants: Sequence[Variant]
) -> tuple[Path, dict[str, Any]]:
    """The best variant that this compiler knows: the library, which loads, and its record."""
    refused: list[str] = []
    failed: set[str] = set()
    code = compiler.work / "native.o"
    for level, flags in variants:
        if level in failed:
            continue
        # First what takes no time: unknown flags, no headers, no compiler behind the name.
        quick = [flag for flag in flags if flag != "-shared"] + ["-w"]
        if said := compiler.run(
            [*quick, "-E", "-o", str(compiler.work / "native.ii"), str(source)]
        ):
            refused.append(f"{level}: {said}")
            continue
        said = compiler.run([*quick, "-c", "-o", str(code), str(source)])
        if said or not code.is_file():
            failed.add(level)
            refused.append(f"{level}: {said or f'{compiler.name} wrote no file'}")
            continue
        wrong = []
        for number, needs in enumerate(LINKS):
            library = compiler.work / f"{number}.so"
            said = compiler.run([*flags, "-o", str(library), str(code), *needs])
            if not said and not library.is_file():
                said = f"{compiler.name} wrote no file"
            if not said and (reason := _loads(library)):
                said = f"{compiler.name}: its library cannot be loaded: {reason}"
            wrong.append(said)
            if not said:
                record = {
                    "command": compiler.words,
                    "version": compiler.version(),
                    "flags": [*flags, *needs],
                }
                digest = hashlib.sha256(library.read_bytes()).hexdigest()
                return library, record | {"level": level, "refused": refused, "sha256": digest}
        raise BuildError(
            next((said for said in wrong if "cannot be loaded" in said), wrong[0]), lasting=True
        )
    raise BuildError(refused[-1].partition(": ")[2], lasting=bool(failed))


def _loads(path: Path) -> str:
    """What loading says, in a process of its own: a sanitizer's runtime would end this one. Empty
    if it works."""
    if not Path(sys.executable or "").name.startswith("python"):  # within another program
        return ""
    try:
        command = [sys.executable, "-S", "-P", "-c", LOADS, str(path)]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "loading it did not end within 60 s"
    except OSError:  # it cannot be asked
        return ""
    if not run.returncode or not run.stdout:
        return ""
    lines = run.stderr.decode(errors="replace").strip().splitlines() or [f"code {run.returncode}"]
    return lines[-1]


class _Compiler:
    """A compiler that is being used: runs it, and knows when to give it up."""

    def __init__(self, words: list[str], work: Path, notice: "_Notice") -> None:
        self.words, self.work, self.notice = words, work, notice
        self.name, self.end = shlex.join(words), time.monotonic() + LIMIT

    def run(self, arguments: Iterable[str]) -> str:
        """What is wrong, in one line; empty if nothing is. Raises: BuildError if no further try
        makes sense."""
        # Messages in English, as they are searched; its own files where there is space.
        environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(self.work)}
        # No pipe: what a launcher leaves running would hold it.
        with tempfile.TemporaryFile(dir=self.work) as file:
            try:
                process = subprocess.Popen(
                    [*self.words, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise BuildError(f"{self.name} cannot be run: {error.strerror}") from None
            try:
                while process.poll() is None:
                    self.notice.after_a_while(
                        f"is building its CPU kernels with {self.name}; "
                        "this is done once, in up to a minute"
                    )
                    if time.monotonic() > self.end:
                        raise BuildError(f"{self.name} did not end within {LIMIT} s", lasting=True)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
            finally:
                if process.poll() is None:  # and all that it started
                    with contextlib.suppress(OSError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            file.seek(0)
            lines = [
                line.strip()
                for line in file.read().decode(errors="replace").splitlines()
                if line.strip()
            ]
        if not process.returncode:
            return ""
        errors = [line for line in lines if "error" in line.lower() or "undefined" in line]
        first = (errors or lines or ["no message"])[0]
        said = f"{self.name} failed with code {process.returncode}: {first}"
        if process.returncode < 0 or any("Killed signal" in line for line in lines):
            raise BuildError(said, lasting=True)  # no memory: not again, with other flags
        return said

    def version(self) -> str:
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([*self.words, "--version"], timeout=10, **pipes).stdout.decode(
                errors="replace"
            )
            return said.strip().partition("\n")[0]
        return ""


class _Notice:
    """One line on standard error, if something takes a while."""

    def __init__(self) -> None:
        self.due, self.said = time.monotonic() + PATIENCE, False

    def after_a_while(self, what: str) -> None:
        if self.said or time.monotonic() < self.due:
            return
        self.said = True
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(f"xzoo {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path: Path, notice: _Notice) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + LIMIT + 60
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                notice.after_a_while("is waiting for another process that builds its CPU kernels")
                if time.monotonic() > end:  # it was stopped
                    raise TimeoutError("another process holds it") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has it open too
    finally:
        os.close(file)


def _libc() -> str:
    """A home folder may be shared by a machine and its containers."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    return ""


def _cpu() -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return []
