"""The kernels built for ARM (aarch64) and called in a process under an emulator.

`on_arm` lets xzoo.ops find itself on such a machine, with a cross compiler; what it builds and
loads is then an `Emulated`, which takes the place of the library. Debian has both programs:
`apt install qemu-user g++-aarch64-linux-gnu`. Results are those of the CPU, times are not.
"""

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from guard import array_bytes

from xzoo.ops import compiler, native

DRIVER = Path(__file__).with_suffix(".cpp")
GCC, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LEVELS = ("aarch64", "aarch64-clang")  # by GCC, and by clang with GCC's headers and libraries


def on_arm(patch: pytest.MonkeyPatch, level: str = "aarch64") -> None:
    """xzoo.ops on a machine of ARM's, with the compiler of one of LEVELS."""
    for program in (GCC, EMULATOR):
        if not shutil.which(program):
            pytest.skip(f"no {program}")
    command = GCC
    if level == "aarch64-clang":
        command = f"{clang()} --target=aarch64-linux-gnu"
    patch.setattr(platform, "machine", lambda: "aarch64")
    patch.setenv("CXX", command)
    patch.setattr(compiler, "_loads", lambda path: "")  # this CPU cannot; `Emulated` does
    patch.setattr(native, "_opened", Emulated)


def clang() -> str:
    """The newest clang++ there is."""
    for words in compiler.compilers():
        if "clang" in Path(words[0]).name:
            return words[0]
    pytest.skip("no clang++")


class Emulated:
    """A library of kernels of the other CPU: its functions, on addresses of this process."""

    def __init__(self, library: Path) -> None:
        self.lock, self.folder = threading.Lock(), tempfile.TemporaryDirectory()
        driver = Path(self.folder.name) / "driver"
        build = [GCC, "-std=c++17", "-fopenmp", "-o", driver, DRIVER]
        subprocess.run(build, check=True)
        asked = [GCC, "-print-file-name=libc.so.6"]
        libc = Path(
            subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        )
        # Threads that wait do not spin: an emulated machine has more of them than this one cores.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            [EMULATOR, "-L", libc.resolve().parents[1], driver, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.call("xzoo_lanes")  # has loaded the library, which is then moved to its place

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()

    def __getattr__(self, name: str):
        return lambda *arguments: self.call(name, *arguments)

    def call(self, name: str, *arguments: bytes | int | None) -> int:
        """The sizes come first, as bytes, then addresses of arrays; all arrays are written back."""
        counts = [len(arguments[0]), *array_bytes(name, arguments[0])] if arguments else []
        sent = [
            -1 if argument is None else count
            for argument, count in zip(arguments, counts, strict=True)
        ]
        with self.lock:
            requests, answers = self.process.stdin, self.process.stdout
            requests.write(struct.pack(f"32sq{len(sent)}q", name.encode(), len(sent), *sent))
            for argument, count in zip(arguments, sent, strict=True):
                if argument is not None:
                    requests.write(ctypes.string_at(argument, count))
            requests.flush()
            answer = answers.read(8)
            if not answer:
                raise OSError(f"{EMULATOR} ended in {name} with code {self.process.wait()}")
            for argument, count in zip(arguments, sent, strict=True):
                if argument is not None:
                    after = answers.read(count)
                    if isinstance(argument, int):
                        ctypes.memmove(argument, after, count)
        return struct.unpack("q", answer)[0]
