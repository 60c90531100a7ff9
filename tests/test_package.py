"""The package as a whole: imports run down the stair, and importing does nothing but define."""

import ast
import functools
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xzoo
from xzoo.errors import first_line

ROOT = Path(xzoo.__file__).parent

# A module imports from its own step and from those below, and no step twice.
STAIR = (
    {"__main__"},
    {"cli"},
    {"public"},
    {"bench", "doctor", "tuning"},
    {"train"},
    {"data"},
    {"hub"},
    {"results"},
    {"models"},
    {
        "convert",
        "theory",
        "drawing",
        "lettering",
        "profile",
        "deploy",
        "weights",
        "norms",
        "tracing",
    },
    {"layers"},
    {"ops", "graphs"},
    {"machine", "files", "home", "network", "names", "options", "errors", "datasets"},
)
# Of the modules of one step, which may import which.
BESIDE = {
    ("network", "errors"),
    ("ops", "graphs"),
    ("drawing", "theory"),
    ("drawing", "lettering"),
    ("deploy", "convert"),
    ("deploy", "profile"),
    ("deploy", "norms"),
    ("deploy", "tracing"),
    ("norms", "tracing"),
    ("tracing", "convert"),
    ("tracing", "profile"),
    ("drawing", "profile"),
    ("machine", "errors"),
    ("files", "errors"),
    ("files", "names"),
}


def step(part):
    found = [i for i, names in enumerate(STAIR) if part in names]
    assert found, f"xzoo.{part} has no place on the stair; give it one here"
    return found[0]


@functools.cache
def every_import():
    """(path, line, importing module, imported name) of all of xzoo's imports of itself, inside
    functions too.
    """
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT.parent).with_suffix("").parts  # ("xzoo", "models", "x_vgg")
        package = place[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [tuple(alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else ()
                base = (*above, *(node.module or "").split(".")) if node.module else above
                targets = [(*base, alias.name) for alias in node.names]
            else:
                continue
            found += [
                (path, node.lineno, place, target) for target in targets if target[0] == "xzoo"
            ]
    return found


def imports():
    """(file, line, importing part, imported part) of them all."""
    return [
        (str(path.relative_to(ROOT)), line, module[1], target[1])
        for path, line, module, target in every_import()
    ]


def test_imports_run_down_the_stair():
    assert len(imports()) > 30
    up = []
    for file, line, part, target in imports():
        if part == "__init__" or part == target:
            continue
        if not ((ROOT / target).is_dir() or (ROOT / f"{target}.py").is_file()):
            up.append(
                f"{file}:{line} imports {target} from the package itself, which is above everything"
            )
        elif step(target) < step(part) or (
            step(target) == step(part) and (part, target) not in BESIDE
        ):
            up.append(f"{file}:{line} imports {target}, which does not stand below {part}")
    assert not up, "\n".join(up)


def module_of(target):
    """The longest part of a dotted name that is a module here: what an import of that name runs."""
    while not (
        ROOT.parent.joinpath(*target).with_suffix(".py").is_file()
        or ROOT.parent.joinpath(*target).is_dir()
    ):
        target = target[:-1]
    return ".".join(target)


def test_no_module_needs_itself():
    needs = {}
    for _, _, module, target in every_import():
        face = module[-1] == "__init__"
        needs.setdefault(module_of(module[:-1] if face else module), set()).add(module_of(target))
    # its CycleError names the circle
    order = list(graphlib.TopologicalSorter(needs).static_order())
    assert order.index("xzoo.errors") < order.index("xzoo.data.folders") < order.index("xzoo.cli")


def test_every_module_has_a_place():
    parts = {p.stem for p in ROOT.glob("*.py")} | {
        p.parent.name for p in ROOT.glob("*/__init__.py")
    }
    for part in parts - {"__init__"}:
        step(part)


def test_public_names_are_these():
    assert set(xzoo.__all__) == {
        *("create_model", "list_models", "profile", "expand", "fuse", "to_dense", "deploy"),
        *("ExpanderConv2d", "ExpanderLinear"),
        *("graphs", "ops", "theory"),
        *("XzooError", "GraphError", "ModelError", "DataError"),
    }
    assert xzoo.__all__ == sorted(xzoo.__all__)
    assert all(hasattr(xzoo, name) for name in xzoo.__all__)


def modules_after(program, *arguments, **variables):
    """What a program of Python has imported when it ends."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
    command = [sys.executable, "-c", code + program, *arguments]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stderr.splitlines()[-1].split()), done


AS_THE_COMMAND = "sys.argv[0] = 'xzoo'; from xzoo.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 0),
        (["fintune"], 2),
        (["lsit", "--help"], 2),
        *(([name, "--help"], 0) for name in ("list", "doctor", "inspect", "bench", "queue")),
        (["list", "--filtre"], 2),
    ],
)
def test_help_and_misspelled_commands_import_neither_torch_nor_timm(arguments, code):
    modules, done = modules_after(AS_THE_COMMAND, *arguments)
    assert done.returncode == code and "xzoo.cli" in modules
    assert not modules & {"torch", "timm", "numpy", "pytorch_lightning"}


def test_importing_xzoo_registers_its_models_with_timm():
    program = "import xzoo, timm; assert timm.is_model('x_resnet50'); xzoo.theory.spectrum"
    modules, done = modules_after(program)
    assert done.returncode == 0 and "xzoo.models.x_resnet" in modules


def test_the_command_has_all_public_names_when_it_runs_something():
    """Where a recipe's class may use them; before that, each is imported when it is used."""
    names = sorted(xzoo.__all__)
    first = "sys.argv[0] = 'xzoo'; import xzoo; assert 'torch' not in sys.modules;"
    ask = f"assert all(hasattr(xzoo, name) for name in {names!r});"
    loaded = "import xzoo.profile, xzoo.deploy, xzoo.cli; xzoo.cli._load_package();"
    last = "import timm; assert callable(xzoo.profile) and timm.is_model('x_vgg16_2')"
    assert modules_after(first + ask + loaded + last)[1].returncode == 0
    assert modules_after(first + loaded + ask + last)[1].returncode == 0


@pytest.mark.parametrize("name", ["GraphError", "ModelError", "DataError"])
def test_errors_are_one_family(name):
    assert issubclass(getattr(xzoo, name), xzoo.XzooError)
    assert issubclass(xzoo.XzooError, ValueError)


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "RuntimeError"), (" \n ", "RuntimeError"), ("\n a\nb", "a"), ("one line", "one line")],
)
def test_the_first_line_of_an_error_is_never_empty(text, told):
    assert first_line(RuntimeError(text)) == told


@pytest.mark.slow
def test_import_only_defines():
    """In a process of its own: no heavy library, no thread, no file, no word, no random draw, no
    CUDA.
    """
    code = """
import json, os, random, sys, threading
import numpy, torch, timm, torchvision
before, state, drawn = set(sys.modules), torch.get_rng_state(), (random.getstate(), str(numpy.random.get_state()))
threads, environment, cwd = threading.active_count(), dict(os.environ), sorted(os.listdir())
import xzoo
assert torch.equal(state, torch.get_rng_state())
assert drawn == (random.getstate(), str(numpy.random.get_state()))
assert (threads, environment, cwd) == (threading.active_count(), dict(os.environ), sorted(os.listdir()))
assert not torch.cuda.is_initialized()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    new = json.loads(run.stdout)
    roots = {name.partition(".")[0] for name in new}
    heavy = {
        "matplotlib",
        "pytorch_lightning",
        "lightning",
        "sklearn",
        "scipy",
        "pyarrow",
        "datasets",
        "torchmetrics",
    }
    assert not roots & (heavy | {"jsonargparse", "rich", "transformers", "onnx", "pandas"})
    parts = {name.split(".")[1] for name in new if name.startswith("xzoo.")}
    assert parts and not parts & {"train", "data", "results", "cli", "hub", "bench", "doctor"}
    assert len([name for name in new if not name.startswith("xzoo")]) < 100
