"""What several test files need: real images where they lie, and small folders of drawn ones."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from PIL import Image

import xzoo
from xzoo import network
from xzoo.home import home
from xzoo.ops import native

MakeFolder = Callable[..., Path]

# Builds for this CPU, for vectors of 8 floats, and of 4 (as for CPUs that we know nothing of); and
# for ARM, under an emulator.
LEVELS = ["best"]
for level in ("x86-64-v3", "x86-64", *emulated.LEVELS):
    LEVELS.append(pytest.param(level, marks=pytest.mark.slow))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside each other; threads that wait for each other on a busy machine take minutes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def same_xzoo_in_children() -> Iterator[None]:
    """Processes that tests start import the package under test, from whatever folder they run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(xzoo.__file__).parents[1]), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_tuned_rule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own, so that no developer's `xzoo tune` moves them; the kernels
    that were built before are used.
    """
    built, own = home() / "native", tmp_path_factory.mktemp("home")
    if os.name == "posix":  # elsewhere there are no kernels
        built.mkdir(parents=True, exist_ok=True)
        (own / "native").symlink_to(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XZOO_HOME", str(own))
        yield


@pytest.fixture
def real_data() -> Path:
    """The folder of real image data (sign-digits and others); tests that use it are marked `data`."""
    place = os.environ.get("XZOO_TEST_DATA")
    if not place:
        pytest.skip("XZOO_TEST_DATA does not name a folder with real image data")
    return Path(place)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Draw class folders: noisy images, each class of its own colour, so that a net learns them in
    a few steps.
    """

    def make(
        classes: tuple[str, ...] = ("ant", "bee"),
        each: int = 12,
        side: int = 24,
        where: str = "photos",
        seed: int = 0,
    ) -> Path:
        root, draw = tmp_path / where, np.random.default_rng(seed)
        for number, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            color = np.array(
                [(number * 97) % 256, (number * 57 + 120) % 256, 255 - (number * 97) % 256]
            )
            for i in range(each):
                noise = draw.integers(-40, 40, (side, side + 4, 3))
                pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
        return root

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that each request was given, in order; what they add up to is the longest that a
    call can wait.
    """
    seconds, in_time = [], network._in_time

    def spy(limit: float, work: Any) -> Any:
        seconds.append(limit)
        return in_time(limit, work)

    monkeypatch.setattr(network, "_in_time", spy)
    return seconds


@pytest.fixture(scope="module", params=LEVELS)
def built(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The library of the kernels at one of LEVELS."""
    if request.param == "best":
        assert native.available()
        yield native._loaded[0]
    elif request.param in emulated.LEVELS:
        with pytest.MonkeyPatch.context() as patch:
            emulated.on_arm(patch, request.param)
            library = native.build(native._flags())
        yield library
        library.close()
    else:
        best = " ".join(native._flags())
        if "x86-64" not in best:
            pytest.skip(f"this CPU is not {request.param}")
        yield native.build(re.sub(r"-march=\S+", f"-march={request.param}", best).split())


@pytest.fixture
def kernels(built: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The same, in use."""
    monkeypatch.setattr(native, "_loaded", [built])
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    yield built
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
