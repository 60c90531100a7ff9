"""What the machine lends a process: CPUs by affinity and control groups, torch's threads, and how
they wait.
"""

import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from xzoo import machine
from xzoo.machine import cores, own_threads, quota

V1 = "31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "32 30 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"


def machine_of(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A root folder with the system's files that tell of control groups."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(folder: str, most: int, period: int = 100_000) -> dict[str, str]:
    base = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    return {f"{base}/cpu.cfs_quota_us": f"{most}\n", f"{base}/cpu.cfs_period_us": f"{period}\n"}


def v2(folder: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/cpu.max": f"{text}\n"}


CASES = {
    "none": ("", "", {}, None),
    "v1": ("4:cpu,cpuacct:/\n", V1, v1("", 150_000), 1.5),
    "v1 without a limit": ("4:cpu,cpuacct:/\n", V1, v1("", -1), None),
    "v1 nested": (
        "4:cpuacct,cpu:/a/b\n",
        V1,
        v1("a/b", 400_000) | v1("a", 50_000) | v1("", -1),
        0.5,
    ),
    "v1 of other controllers": ("4:cpuset:/a\n", V1, v1("a", 50_000), None),
    "v2": ("0::/\n", V2, v2("", "200000 100000"), 2.0),
    "v2 without a limit": ("0::/\n", V2, v2("", "max 100000"), None),
    "v2 nested": (
        "0::/a/b/c\n",
        V2,
        v2("a/b/c", "max 100000") | v2("a/b", "75000 50000") | v2("a", "300000 100000"),
        1.5,
    ),
    "both": (
        "4:cpu,cpuacct:/a\n0::/a\n",
        V1 + V2,
        v1("a", 300_000) | v2("a", "250000 100000"),
        2.5,
    ),
    # docker without a namespace of its own: the group has the host's name, and its folder alone is
    # mounted.
    "docker v1": (
        "4:cpu,cpuacct:/docker/12ab\n",
        V1.replace("/ /sys", "/docker/12ab /sys"),
        v1("", 50_000),
        0.5,
    ),
    "the host's name, mounted elsewhere": ("0::/kube/pod/12ab\n", V2, v2("", "50000 100000"), 0.5),
    "a blank in a name": (
        "0::/a b\n",
        V2.replace("/sys/fs/cgroup", "/sys/fs/c\\040g"),
        {"sys/fs/c g/a b/cpu.max": "20000 100000\n"},
        0.2,
    ),
    "broken": ("x\n0::/a\n4:cpu\n", "1 2 3\n - \n" + V2, v2("a", "half a core"), None),
}


@pytest.mark.parametrize(("groups", "mounts", "files", "want"), CASES.values(), ids=CASES)
def test_quota_is_the_smallest_on_the_way_up(tmp_path, groups, mounts, files, want):
    assert quota(machine_of(tmp_path, groups, mounts, files)) == want


def test_cores_are_those_of_affinity_and_quota(tmp_path):
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cores(tmp_path) == there  # no such files
    for text, want in (
        ("50000 100000", 1),
        ("100 100000", 1),
        ("9900000 100000", min(there, 99)),
        ("max 100000", there),
    ):
        assert cores(machine_of(tmp_path, "0::/\n", V2, v2("", text))) == want


THREADS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("machine", sys.argv[1])
machine = importlib.util.module_from_spec(spec)  # without the package, which takes seconds
spec.loader.exec_module(machine)
machine.cores = lambda root="/": 1
machine._affinity = lambda: 4
{before}
seen = [torch.get_num_threads()]
for _ in range(2):
    with machine.own_threads():
        seen.append(torch.get_num_threads())
    seen.append(torch.get_num_threads())
print(*seen)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "environment", "within"),
    [
        ("", {}, 1),
        ("torch.set_num_threads(2)", {}, None),  # the caller's own
        ("", {"OMP_NUM_THREADS": "2"}, None),
    ],
    ids=["alone", "set", "OMP_NUM_THREADS"],
)
def test_torch_has_no_more_threads_than_there_are_cores_unless_it_was_told(
    before, environment, within
):
    clean = {name: value for name, value in os.environ.items() if name not in machine.CHOSEN_BY}
    told = subprocess.run(
        [sys.executable, "-c", THREADS.format(before=before), machine.__file__],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    usual, *seen = map(int, told.stdout.split())
    assert seen == [usual if within is None else within, usual] * 2


GROUP = Path("/sys/fs/cgroup/cpu")


@pytest.fixture
def half_a_core():
    """A control group of version 1 that allows half a core, where this process may make one."""
    group = GROUP / f"xzoo-test-{os.getpid()}"
    try:
        (group / "inner").mkdir(parents=True)
        (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group / "inner"
    # A test that failed may have left its process in the group, which then cannot be removed.
    for name in (group / "inner" / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(name), signal.SIGKILL)
    end = time.monotonic() + 60
    while (group / "inner" / "cgroup.procs").read_text() and time.monotonic() < end:
        time.sleep(0.01)
    (group / "inner").rmdir()
    group.rmdir()


@pytest.mark.slow
def test_half_a_core_is_one_thread_for_a_run(half_a_core, make_folder, tmp_path):
    """As `docker --cpus=0.5`, in a group within the one that has the limit."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core alone")
    code = (
        "import os, sys, torch\n"
        "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "import xzoo.train\n"
        "module = sys.modules['xzoo.train.finetune']\n"
        "fit = module.fit\n"
        "def spy(*arguments):\n"
        "    print(torch.get_num_threads())\n"
        "    fit(*arguments)\n"
        "module.fit = spy\n"
        "options = dict(model='test_resnet', expand=4, pretrained=False, img_size=32, "
        "batch_size=8, device='cpu')\n"
        "module.finetune(sys.argv[2], epochs=1, out=sys.argv[3], **options)\n"
        "print(torch.get_num_threads() > 1)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in machine.CHOSEN_BY}
    command = [
        sys.executable,
        "-c",
        code,
        str(half_a_core),
        str(make_folder()),
        str(tmp_path / "run"),
    ]
    told = subprocess.run(
        command, env=clean, capture_output=True, text=True, check=False, timeout=600
    )
    assert told.stdout.split() == ["1", "True"], told.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
def test_the_command_waits_briefly_on_a_busy_machine():
    """What torch's library of threads says itself that it read, while a process runs on each CPU."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-m", "xzoo", "--help"]
    shown = clean | {"OMP_DISPLAY_ENV": "verbose"}
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())
    ]
    try:
        told = subprocess.run(
            command, env=shown, capture_output=True, text=True, check=True, timeout=600
        ).stderr
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert f"GOMP_SPINCOUNT = '{machine.SPINS}'" in told


@pytest.mark.parametrize(
    ("program", "loaded", "environment", "others", "want"),
    [
        ("/bin/xzoo", False, {}, 64, machine.SPINS),
        ("/bin/xzoo", False, {}, 0, None),  # nobody to make way for
        ("/bin/xzoo", True, {}, 64, None),  # too late
        ("/home/me/train.py", False, {}, 64, None),  # a program that imports xzoo
        ("/bin/xzoo", False, {"GOMP_SPINCOUNT": "7"}, 64, "7"),
        ("/bin/xzoo", False, {"OMP_WAIT_POLICY": "active"}, 64, None),
    ],
)
def test_other_programs_and_the_users_own_choice_are_left(
    monkeypatch, tmp_path, program, loaded, environment, others, want
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, environment[name]) if name in environment else monkeypatch.delenv(
            name, raising=False
        )
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["python", program])
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text(f"cpu 1 2 3\nprocs_running {others + 1}\nprocs_blocked 0\n")
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    machine.wait_briefly(tmp_path)
    assert os.environ.get("GOMP_SPINCOUNT") == want
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)


def test_own_threads_leave_this_process_as_it_was():
    before = torch.get_num_threads()
    with own_threads():
        assert torch.get_num_threads() <= before
    assert torch.get_num_threads() == before


FORK = """
import os, signal, sys, torch
told = sys.argv[1] == "told"
from xzoo import ExpanderConv2d, ExpanderLinear, ops
torch.set_num_threads(2)
conv, linear = ExpanderConv2d(32, 32, 3, padding=1, degree=8), ExpanderLinear(256, 128, degree=32)
images, rows = torch.rand(64, 32, 16, 16, requires_grad=True), torch.rand(512, 256, requires_grad=True)
def run():
    found = b""
    for layer, x in ((conv, images), (linear, rows)):
        with ops.backend("native"), torch.set_grad_enabled(told):
            y, grads = layer(x), []
            if told:
                grads = torch.autograd.grad(y, [x, layer.weight], torch.ones(()).expand(y.shape).contiguous())
        found += b"".join(t.detach().numpy().tobytes() for t in (y, *grads))
    return found
want = run()
child = os.fork()
if not child:
    signal.alarm(120)  # ends a child that hangs
    torch.set_num_threads(1) if told else None
    os._exit(0 if run() == want else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run() == want)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("child", ["told", "untold"])
def test_x_layers_compute_in_a_fork_as_before_it(child):
    """After two threads have run: forwards and both gradients where the child says that it is
    alone, else forwards.
    """
    command = [sys.executable, "-W", "ignore", "-c", FORK, child]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert told.stdout.split() == ["0", "True"], told.stderr


@pytest.mark.slow
def test_python_within_another_program_has_no_arguments():
    code = (
        "import sys; sys.argv = []; sys.orig_argv = []; import xzoo.machine; "
        "print(xzoo.machine.is_command())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600
    )
    assert told.stdout.strip() == "False", told.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """Pages that a tensor of 64 MB faults in, after one of that size was freed."""
    code = """
import resource, sys, torch
from xzoo import machine
if sys.argv[1] == "keep":
    machine.keep_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(how, **variables):
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith("MALLOC_")
        }
        done = subprocess.run(
            [sys.executable, "-c", code, how],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    returned = faults("return")
    assert faults("keep") * 4 < returned
    assert faults("keep", MALLOC_ARENA_MAX="4") * 2 > returned  # the user's own settings


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor: 0\nmodel name\t: AMD EPYC 9354\n\nmodel name\t: another\n", "AMD EPYC 9354"),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\n",
            f"{platform.machine()}, implementer 0x41, part 0xd0c",
        ),
    ],
)
def test_the_name_of_the_cpu(tmp_path, told, name):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(told)
    assert machine.cpu(tmp_path) == name
    assert machine.cpuinfo(tmp_path)["processor"] == "0"


def test_the_name_of_the_cpu_where_linux_does_not_tell_it(tmp_path, monkeypatch):
    assert machine.cpuinfo(tmp_path) == {}
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    assert machine.cpu(tmp_path) == "Intel64 Family 6"
    asked = tmp_path / "sysctl"
    asked.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M2\n')
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.cpu(tmp_path) == "Apple M2"
