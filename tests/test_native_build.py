"""How the kernels get built: compilers of all kinds, and places that cannot be written, read or run
from.

Most tests build a small source with the functions of native.cpp: real compilers, real loading, in a
second.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from emulated import clang

from xzoo import home as home_module
from xzoo.cli import main
from xzoo.home import home
from xzoo.ops import native

GXX = shutil.which("g++")
SOURCE = native.SOURCE
X86 = native.platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(GXX is None, reason="no g++")

# As native.cpp: needs the C++ library for what a thread leaves behind, and tells its vectors.
# Without a header, which would take most of the time.
SMALL = r"""
struct Scratch { void* p = nullptr; ~Scratch() { __builtin_free(p); } };
static thread_local Scratch scratch;
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
extern "C" {
void xzoo_init(void*, void*, void*, void*) { scratch.p = __builtin_malloc(4); }
int xzoo_lanes() { return LANES; }
int xzoo_fast() { return 0; }
int xzoo_conv3() { return 0; }
int xzoo_conv3_input_grad() { return 0; }
int xzoo_conv3_weight_grad() { return 0; }
int xzoo_point() { return 0; }
int xzoo_point_input_grad() { return 0; }
int xzoo_point_weight_grad() { return 0; }
int xzoo_norm() { return 0; }
int xzoo_norm_grad() { return 0; }
}
"""


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The small source, an empty home and an empty folder for temporary files."""
    (tmp_path / "small.cpp").write_text(SMALL)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(native, "SOURCE", tmp_path / "small.cpp")
    monkeypatch.setattr(native, "_loaded", [])
    monkeypatch.setattr(native, "_found", [], raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XZOO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Write a compiler: shell lines that run before g++ does, each call of which is counted; CXX
    names it.
    """

    def write(lines="", name="cxx"):
        file = tmp_path / name
        count = f'echo "$*" >> "{tmp_path}/calls"'
        file.write_text(f'#!/bin/sh\n{count}\n{lines}\nexec "{GXX}" "$@"\n')
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))
        return file

    return write


def calls(tmp_path, word=""):
    """How often the script was called, with this among its words."""
    file = tmp_path / "calls"
    return (
        sum(f" {word} " in f" {line} " or not word for line in file.read_text().splitlines())
        if file.exists()
        else 0
    )


def until(reached):
    """Wait for it, for a minute at most."""
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, "it has not come about within a minute"
        time.sleep(0.01)


def process():
    """As a new process would find it."""
    native._loaded.clear()
    return native.available()


def files(tmp_path, ending):
    return list((tmp_path / "home" / "native").glob(f"*{ending}"))


def refusing(*patterns):
    return (
        f'for a in "$@"; do case "$a" in {"|".join(patterns)}) echo "error: unknown $a" >&2; exit '
        "1;; esac; done"
    )


# ---- CXX


@pytest.mark.parametrize(
    "form",
    [
        "g++ -m64" if X86 else "g++ -g",
        " g++ ",
        "  ",
        "/usr/bin/env g++",
        "FLAVOR=plain g++",
        "{tmp}/launch g++ -DX='a b'",
        "{tmp}/launch {tmp}/launch g++",
        "{tmp}/my tools/g++",
        "'{tmp}/my tools/g++' -g",
        "g++ -Wall -Wextra -Wpedantic -Werror",
        "g++ -flto",
    ],
)
def test_cxx_is_read_as_make_reads_it(form, tmp_path, monkeypatch):
    (tmp_path / "launch").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "my tools").mkdir()
    (tmp_path / "my tools" / "g++").write_text(f'#!/bin/sh\nexec {GXX} "$@"\n')
    for file in ("launch", "my tools/g++"):
        (tmp_path / file).chmod(0o755)
    monkeypatch.setenv("CXX", form.format(tmp=tmp_path))
    assert native.possible() and native.available()


@pytest.mark.parametrize("form", ["/nowhere/g++", "'g++", "''", "nothing-of-that-name g++"])
def test_a_cxx_that_names_nothing_is_said(form, monkeypatch, caplog):
    monkeypatch.setenv("CXX", form)
    assert not native.possible() and not native.available()
    assert "CXX=" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("name", ["gcc", "cc", "clang", "clang-14"])
def test_a_driver_for_c_gets_the_library_of_cxx(name, monkeypatch):
    if not shutil.which(name):
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CXX", name)
    assert native.available()
    assert "-lstdc++" in native._found[0].record["flags"]


def test_a_compiler_of_another_name_is_found(tmp_path, script, monkeypatch):
    script(f"PATH={os.environ['PATH']}", name="g++-99")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.possible() and native.available()
    assert native._found[0].record["command"] == [str(tmp_path / "g++-99")]


def test_a_broken_compiler_is_passed_over_if_cxx_does_not_name_it(tmp_path, script, monkeypatch):
    script(name="clang++")
    script("echo error: no license >&2; exit 1", name="g++")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert native.available()
    assert native._found[0].record["command"] != [str(tmp_path / "g++")]


# ---- levels


@pytest.mark.skipif(not X86, reason="levels of x86-64")
@pytest.mark.parametrize(
    ("refused", "lanes"),
    [
        ((), 16),
        (("-march=x86-64-v*",), 16),  # GCC 10
        (("-march=*",), 4),
        (("-march=x86-64-v*", "-mf16c", "-mmovbe"), 16),
        (("-march=x86-64-v4", "-mavx512*"), 8),
        (("-march=x86-64-v*", "-mavx512*"), 8),
        (("-march=x86-64-v*", "-mavx512*", "-mbmi2"), 8),
        (("-march=x86-64-v*", "-mavx*"), 4),
    ],
)
def test_what_a_compiler_does_not_know_is_asked_in_other_words_then_for_less(
    refused, lanes, script
):
    script(refusing(*refused) if refused else "")
    flags = [flag for flag in native._flags() if not flag.startswith("-march=")]
    assert native.build([*flags, "-march=x86-64-v4"]).xzoo_lanes() == lanes


@pytest.mark.skipif(not X86, reason="levels of x86-64")
def test_a_level_that_does_not_compile_is_stepped_down(tmp_path, script):
    script(
        'case " $* " in *" -c "*) case "$*" in *v4*|*avx512*) echo internal compiler error >&2; '
        "exit 4;; esac; esac"
    )
    flags = [flag for flag in native._flags() if not flag.startswith("-march=")]
    assert native.build([*flags, "-march=x86-64-v4"]).xzoo_lanes() == 8
    assert calls(tmp_path, "-c") == 2  # not once for each spelling


# ---- libraries that are no use


def test_what_cannot_be_loaded_is_not_kept_and_not_built_again(tmp_path, script, caplog):
    junk = (
        'for a in "$@"; do [ "$b" = -o ] && [ "${a%.so}" != "$a" ] && echo junk > "$a" && exit 0; '
        'b="$a"; done'
    )
    script(junk)
    assert not process()
    assert "cannot be loaded" in caplog.text and not files(tmp_path, ".so")
    before = calls(tmp_path)
    assert not process() and calls(tmp_path) == before
    (record,) = files(tmp_path, ".json")
    os.utime(record, (0, 0))  # long ago
    assert not process() and calls(tmp_path) > before
    script(junk.replace("junk", "other"))  # another compiler
    assert not process()
    script()
    assert process()


def test_a_library_that_would_end_the_process_is_not_loaded_into_it(tmp_path, script):
    (tmp_path / "trap.c").write_text(
        "__attribute__((constructor)) void begin(void) { __builtin_trap(); }"
    )
    trap = f'exec gcc -shared -fPIC -o "$a" {tmp_path}/trap.c'
    script(f'for a in "$@"; do [ "$b" = -o ] && [ "${{a%.so}}" != "$a" ] && {trap}; b="$a"; done')
    assert not process()
    assert "cannot be loaded" in native._found[0]


def test_a_compiler_that_writes_nothing_has_failed(tmp_path, script):
    script("exit 0")
    assert not process()
    assert "wrote no file" in native._found[0] and not files(tmp_path, ".so")


def test_warnings_are_no_errors_and_messages_are_asked_for_in_english(script, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    script("echo warning: error-prone >&2")
    assert process()
    script(
        '[ "$LC_ALL" = C ] && echo "x: error: broken" >&2 || printf "Fehler\\nkaputt\\377\\n" >&2; '
        "exit 1"
    )
    assert not process()
    assert native._found[0].endswith("failed with code 1: x: error: broken")


def test_a_killed_compiler_is_not_tried_with_other_flags(tmp_path, script):
    script('case " $* " in *" -c "*) kill -9 $$;; esac')
    assert not process() and calls(tmp_path, "-c") == 1
    assert not process() and calls(tmp_path, "-c") == 1


def test_a_compiler_that_hangs_is_given_up_with_all_that_it_started(tmp_path, script, monkeypatch):
    from xzoo.ops import compiler

    monkeypatch.setattr(compiler, "LIMIT", 1)
    script(f"sleep 1000 & echo $! > '{tmp_path}/sleeper'; wait")
    assert not process()
    assert "did not end within 1 s" in native._found[0] and calls(tmp_path) == 1
    state = Path("/proc", (tmp_path / "sleeper").read_text().strip(), "stat")
    until(lambda: not state.exists() or state.read_text().split()[2] == "Z")
    assert not process() and calls(tmp_path) == 1


def test_a_kept_library_that_was_cut_is_built_anew(tmp_path, script):
    script()
    assert process()
    (library,) = files(tmp_path, ".so")
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(whole[: len(whole) // 2])
    assert process()
    assert library.read_bytes()[:4] == whole[:4] and calls(tmp_path, "-c") == 2
    (record,) = files(tmp_path, ".json")
    record.write_text(record.read_text()[:30])
    assert process() and calls(tmp_path, "-c") == 3
    assert process() and calls(tmp_path, "-c") == 3


def test_a_warm_cache_starts_no_process(tmp_path, script):
    script()
    assert process()
    before = calls(tmp_path)
    assert process() and calls(tmp_path) == before


def test_two_versions_side_by_side_have_a_library_each(tmp_path, script):
    script()
    for text in (SMALL, SMALL + "// newer\n", SMALL):
        (tmp_path / "small.cpp").write_text(text)
        assert process()
    assert calls(tmp_path, "-c") == 2 and len(files(tmp_path, ".so")) == 2


def test_a_header_is_a_part_of_what_is_compiled(tmp_path, script):
    script()
    (tmp_path / "small.cpp").write_text(
        '#include "lanes.h"\n#include "more.h"\n' + SMALL.replace("LANES;", "lanes;")
    )
    (tmp_path / "more.h").write_text('#pragma once\n#include "lanes.h"\n')
    for number in (5, 6, 5):
        (tmp_path / "lanes.h").write_text(f"#pragma once\nenum {{ lanes = {number} }};\n")
        assert process() and native.lanes() == number
    assert calls(tmp_path, "-c") == 2 and len(files(tmp_path, ".so")) == 2


# ---- places


@contextlib.contextmanager
def mounted(place, options):
    place.mkdir(exist_ok=True)
    run = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "xzoo-test", place], capture_output=True
    )
    if run.returncode:
        pytest.skip("mounting is not permitted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("options", ["size=64k", "noexec", "ro"])
def test_a_cache_that_is_full_or_cannot_be_used_is_done_without(options, tmp_path, script):
    script()
    with mounted(tmp_path / "home", options):
        assert process()
        kept = native._found[0].path
        assert kept.is_relative_to(tmp_path / "tmp")
        assert process() and calls(tmp_path, "-c") == 1
        assert str(tmp_path / "home") in native._found[0].skipped[0]


def test_a_cache_that_is_a_file_is_done_without(tmp_path, script):
    script()
    (tmp_path / "home").write_text("")  # a file where the folder should be
    assert process() and calls(tmp_path, "-c") == 1
    assert process() and calls(tmp_path, "-c") == 1


def test_a_cache_that_can_only_be_read_is_read(tmp_path, script):
    script()
    with mounted(tmp_path / "home", "size=64m"):
        assert process()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "home"], check=True)
        assert process()
        assert (
            native._found[0].path.is_relative_to(tmp_path / "home") and calls(tmp_path, "-c") == 1
        )


def test_blanks_in_paths_do_not_matter(tmp_path, monkeypatch):
    for name in ("my home", "my tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XZOO_HOME", str(tmp_path / "my home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "my tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert native.available()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_under_any_umask_the_library_is_kept(umask, tmp_path, script):
    script()
    before = os.umask(umask)
    try:
        assert process() and process()
    finally:
        os.umask(before)
    assert calls(tmp_path, "-c") == 1
    assert all(
        not file.stat().st_mode & 0o022
        for file in [*files(tmp_path, ".so"), *files(tmp_path, ".json")]
    )


def test_what_others_can_write_is_not_loaded(tmp_path, script):
    script()
    assert process()
    (library,) = files(tmp_path, ".so")
    library.chmod(0o777)
    assert process() and calls(tmp_path, "-c") == 2
    (tmp_path / "home" / "native").chmod(0o777)
    assert process()
    assert native._found[0].path.is_relative_to(tmp_path / "tmp")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_not_loaded(tmp_path, script):
    script()
    assert process()
    (library,) = files(tmp_path, ".so")
    os.chown(library, 12345, 12345)
    assert process() and calls(tmp_path, "-c") == 2
    os.chown(tmp_path / "home" / "native", 12345, 12345)
    # a private folder's name, which another user has taken
    os.mkdir(tmp_path / "tmp" / "xzoo-0", 0o755)
    os.chown(tmp_path / "tmp" / "xzoo-0", 12345, 12345)
    assert process()
    assert native._found[0].path.is_relative_to(tmp_path / "tmp")
    assert not native._found[0].path.is_relative_to(tmp_path / "tmp" / "xzoo-0")


# ---- no home folder

HOME = f"import runpy, sys; print(runpy.run_path({home_module.__file__!r})['home']())"


def nobody(code, tmp_path, **environment):
    """Python code as a user without account and home folder, as in containers."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    command = ["unshare", "--user", "--map-user=12345"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("other users' names are not permitted here")
    gone = ("HOME", "XZOO_HOME", "XDG_CACHE_HOME", "CXX")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    environment = kept | {"TMPDIR": str(tmp_path / "tmp")} | environment
    return subprocess.run(
        [*command, sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_without_home_folder_and_account_a_private_folder_serves(tmp_path):
    run = nobody(HOME, tmp_path)
    assert (run.returncode, run.stdout.strip()) == (0, f"{tmp_path}/tmp/xzoo-12345"), run.stderr
    assert (tmp_path / "tmp" / "xzoo-12345").stat().st_mode & 0o777 == 0o700
    run = nobody(HOME, tmp_path, XZOO_HOME="~/models")
    assert (run.returncode, run.stdout.strip()) == (0, f"{tmp_path}/tmp/xzoo-12345"), run.stderr


def test_a_home_folder_that_is_not_there_or_cannot_be_written_is_none(tmp_path):
    folder = tmp_path / "read"
    folder.mkdir(mode=0o555)
    for place in ("/nonexistent", folder):
        assert (
            nobody(HOME, tmp_path, HOME=str(place)).stdout.strip() == f"{tmp_path}/tmp/xzoo-12345"
        )
    folder.chmod(0o755)
    (folder / ".cache" / "xzoo").mkdir(parents=True)
    folder.chmod(0o555)
    assert nobody(HOME, tmp_path, HOME=str(folder)).stdout.strip() == f"{folder}/.cache/xzoo"


def test_a_home_folder_is_what_it_was(tmp_path, monkeypatch):
    assert home() == tmp_path / "home"
    monkeypatch.delenv("XZOO_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home() == tmp_path / ".cache" / "xzoo" and not home().exists()


@pytest.mark.slow
def test_kernels_without_home_folder(tmp_path):
    code = "from xzoo.ops import native; print(native.available(), native._found[0].path)"
    run = nobody(code, tmp_path, PYTHONPATH=os.environ["PYTHONPATH"])
    assert run.returncode == 0 and run.stdout.startswith(
        f"True {tmp_path}/tmp/xzoo-12345/native/"
    ), run.stderr


# ---- waiting


def test_a_build_that_lasts_is_said_in_one_line_and_a_quick_one_is_not(
    tmp_path, script, monkeypatch, capfd
):
    from xzoo.ops import compiler

    monkeypatch.setattr(compiler, "PATIENCE", 3600)
    script()
    assert process()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(compiler, "PATIENCE", 0)
    assert process()
    assert capfd.readouterr().err == ""  # it is there
    script("# another")
    assert process()
    said = capfd.readouterr().err
    assert said.startswith("xzoo is building its CPU kernels with ") and said.count("\n") == 1


def test_who_waits_for_another_builder_says_so(tmp_path, script, monkeypatch):
    from xzoo.ops import compiler

    script(f"while [ ! -e '{tmp_path}/go' ]; do sleep 0.05; done")
    found = []
    builder = threading.Thread(
        target=lambda: found.append(native.build(native._flags())), daemon=True
    )
    builder.start()
    until(lambda: calls(tmp_path))
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(compiler, "PATIENCE", 0)
    waiter = threading.Thread(
        target=lambda: found.append(native.build(native._flags())), daemon=True
    )
    waiter.start()
    until(lambda: "waiting for another process" in stderr.getvalue() or not waiter.is_alive())
    (tmp_path / "go").touch()
    builder.join(60)
    waiter.join(60)
    assert len(found) == 2 and calls(tmp_path, "-c") == 1
    assert [line for line in stderr.getvalue().splitlines() if "waiting" in line] == [
        "xzoo is waiting for another process that builds its CPU kernels"
    ]


# ---- doctor


def test_doctor_says_what_runs_and_why_not_better(tmp_path, script, capsys):
    script(refusing("-march=x86-64-v*", "-mavx*") if X86 else "")
    assert main(["doctor"]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["torch"].startswith(torch.__version__) and "native" in told["backends"]
    assert told["cache"] == str(tmp_path / "home") and str(tmp_path / "cxx") in told["compiler"]
    assert told["library"] == str(files(tmp_path, ".so")[0])
    if X86 and native.levels():
        assert told["kernels"].startswith("4 floats at a time")
        assert "unknown -march=x86-64-v" in told["limited"] and told["limited"].startswith("by ")


def test_doctor_tries_again_what_failed(tmp_path, script, monkeypatch):
    from xzoo.doctor import doctor

    script(f'[ -e "{tmp_path}/mended" ] || case " $* " in *" -shared "*) exit 1;; esac')
    assert not native.available()
    facts = doctor()
    assert facts["kernels"].startswith("none") and "failed with code 1" in facts["reason"]
    (tmp_path / "mended").touch()
    assert not process()  # it is remembered
    assert "reason" not in doctor() and native.available()
    assert json.loads(files(tmp_path, ".json")[0].read_text())["sha256"]


@pytest.mark.skipif(not X86, reason="levels of x86-64")
def test_doctor_names_what_holds_the_kernels(monkeypatch):
    from xzoo.doctor import doctor

    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    facts = doctor()
    assert facts["kernels"].startswith("4 floats at a time")
    assert "ATEN_CPU_CAPABILITY=default" in facts["limited by"]


def test_doctor_on_arm_says_when_its_kernels_are_taken(script, monkeypatch):
    from xzoo.doctor import doctor

    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # which ARM has no such levels for
    script()
    facts = doctor()
    assert (
        facts["kernels"] == "4 floats at a time, which `auto` takes only where they were measured"
    )
    assert facts["vectors"] == "aarch64" and "-march" not in facts["flags"]
    assert "limited by" not in facts


# ---- clang


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="levels of x86-64")
@pytest.mark.parametrize(
    ("level", "lanes"), [("-march=x86-64-v4", 16), ("-march=x86-64-v3", 8), ("", 4)]
)
def test_clang_makes_the_same_kernels(level, lanes, monkeypatch):
    from test_native import check

    monkeypatch.setenv("CXX", clang())
    monkeypatch.setattr(native, "SOURCE", SOURCE)
    flags = [flag for flag in native._flags() if not flag.startswith("-march=")]
    library = native.build([*flags, level] if level else flags)
    assert library.xzoo_lanes() == lanes
    if level and level.rpartition("-")[2] not in native.levels():
        return  # this CPU cannot run it
    monkeypatch.setattr(native, "_loaded", [library])
    check()
    torch.set_num_threads(1)
