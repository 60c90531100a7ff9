"""The Hub of the tests is one to the unmodified clients: huggingface_hub, timm and the `hf`
command.
"""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub


@pytest.fixture
def hub():
    with Hub() as started:
        started.account("secret", "ann", orgs=("lab",))
        yield started


def python(code: str, environment: dict[str, str]) -> Any:
    """What `code` prints as JSON, in a process of its own: the client reads its environment once."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


UPLOAD = """
import json
from huggingface_hub import HfApi, CommitOperationAdd, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
api.create_repo("ann/net"); api.create_repo("ann/net", exist_ok=True)
files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "sub/a.txt": b"a"}
head = api.model_info("ann/net").sha
done = api.create_commit("ann/net", [CommitOperationAdd(p, d) for p, d in files.items()],
                         commit_message="all", parent_commit=head)
try:
    api.create_commit("ann/net", [CommitOperationAdd("x", b"x")], commit_message="late", parent_commit=head)
    moved = None
except HfHubHTTPError as error:
    moved = error.response.status_code
api.create_tag("ann/net", tag="v1", revision=done.oid)
api.create_branch("ann/net", branch="dev/x")
refs = api.list_repo_refs("ann/net")
paths = api.get_paths_info("ann/net", list(files), revision=done.oid)
folder = snapshot_download("ann/net", revision="v1")
same = all(open(f"{folder}/{p}", "rb").read() == d for p, d in files.items())
print(json.dumps({"same": same, "moved": moved, "tag": refs.tags[0].target_commit == done.oid,
    "branches": sorted(b.name for b in refs.branches), "who": api.whoami()["name"],
    "large": [p.path for p in paths if p.lfs], "listed": sorted(api.list_repo_files("ann/net")),
    "commits": len(api.list_repo_commits("ann/net"))}))
"""


def test_a_folder_goes_up_and_comes_down(hub, tmp_path):
    told = python(UPLOAD, hub.environment(tmp_path, "secret"))
    assert told["same"] and told["tag"] and told["moved"] == 412 and told["commits"] == 2
    assert (
        told["branches"] == ["dev/x", "main"]
        and told["who"] == "ann"
        and told["large"] == ["model.safetensors"]
    )
    assert told["listed"] == [".gitattributes", "config.json", "model.safetensors", "sub/a.txt"]
    # The large file went to the other host both times, without the token: the server would have
    # refused it.
    assert any(r.startswith("PUT /upload/") for r in hub.requests)
    assert any(r.startswith("GET /storage/") for r in hub.requests)


def test_in_parts_and_page_by_page(hub, tmp_path):
    hub.part_size, hub.page = 100, 2
    told = python(UPLOAD, hub.environment(tmp_path, "secret"))
    assert told["same"] and len(told["listed"]) == 4
    parts = [r for r in hub.requests if r.startswith("PUT /upload/")]
    assert len(parts) > 2 and all(re.fullmatch(r"PUT /upload/\w{64}/\d+", r) for r in parts)
    assert sum("/tree/main" in r for r in hub.requests) == 3


ERRORS = """
import json
from huggingface_hub import hf_hub_download, HfApi
seen = {}
for name, repo, file, revision in [("none", "ann/none", "a", None), ("private", "ann/private", "a", None),
        ("gated", "ann/gated", "a", None), ("file", "ann/open", "b", None), ("revision", "ann/open", "a", "v9")]:
    try:
        seen[name] = open(hf_hub_download(repo, file, revision=revision)).read()
    except Exception as error:
        seen[name] = type(error).__name__
try:
    HfApi().create_repo("lab/new"); seen["write"] = "created"
except Exception as error:
    seen["write"] = f"{type(error).__name__} {error.response.status_code}"
print(json.dumps(seen))
"""


def test_errors_have_the_codes_that_the_client_knows(hub, tmp_path):
    for name in ("private", "gated", "open"):
        hub.add(
            f"ann/{name}", {"a": name.encode()}, private=name == "private", gated=name == "gated"
        )
    hub.repos["ann/gated"].readers.add("ann")
    hub.account("reader", "bob", write=False)
    nobody = python(ERRORS, hub.environment(tmp_path / "1"))
    assert nobody == {
        **dict.fromkeys(("none", "private"), "RepositoryNotFoundError"),
        **{
            "gated": "GatedRepoError",
            "file": "RemoteEntryNotFoundError",
            "revision": "RevisionNotFoundError",
        },
        "write": "HfHubHTTPError 401",
    }
    owner = python(ERRORS, hub.environment(tmp_path / "2", "secret"))
    assert (
        owner["private"] == "private" and owner["gated"] == "gated" and owner["write"] == "created"
    )
    other = python(ERRORS, hub.environment(tmp_path / "3", "reader"))
    assert other["private"] == "RepositoryNotFoundError" and other["gated"] == "GatedRepoError"
    assert other["write"] == "HfHubHTTPError 403"


FETCH = """
import json, time
from huggingface_hub import hf_hub_download
began = time.time()
try:
    told = len(open(hf_hub_download("ann/big", "m.safetensors"), "rb").read())
except Exception as error:
    told = f"{type(error).__name__}: {error}"
print(json.dumps([told, time.time() - began]))
"""


@pytest.mark.slow
def test_faults_are_what_they_say(hub, tmp_path):
    size = 25 << 20
    hub.add("ann/big", {"m.safetensors": bytes(size)})

    def fetch(name: str) -> Any:
        return python(FETCH, hub.environment(tmp_path / name))[0]

    hub.fault("GET /storage/.*", drop=12 << 20)
    assert (
        fetch("drop") == size
        and len([r for r in hub.requests if r.startswith("GET /storage")]) == 2
    )
    hub.fault("GET /storage/.*", cut=100)
    assert "Consistency check failed" in fetch("cut")
    hub.fault("GET /storage/.*", status=503)
    assert fetch("503").startswith("HfHubHTTPError")
    hub.fault("GET /storage/.*", reset=True)
    assert fetch("reset").startswith("ReadError")
    hub.fault("GET /storage/.*", flip=1000)
    assert fetch("flip") == size  # accepted: nobody looks
    hub.fault("GET /storage/.*", delay=0.2)
    assert fetch("slow") == size


@pytest.mark.slow
def test_the_hf_command_and_timm_talk_to_it(hub, tmp_path):
    environment = hub.environment(tmp_path, "secret")
    (tmp_path / "m.safetensors").write_bytes(bytes(5000))
    hf = Path(sysconfig.get_path("scripts")) / "hf"
    if not hf.exists():
        hf = Path(sys.executable).parent / "hf"
    for arguments in (
        ["repos", "create", "ann/net"],
        ["upload", "ann/net", "m.safetensors"],
        ["download", "ann/net"],
    ):
        run = subprocess.run(
            [hf, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr
    assert set(hub.repos["ann/net"].commits[hub.repos["ann/net"].branches["main"]].files) >= {
        "m.safetensors"
    }
    code = """
import json, timm, torch, xzoo
torch.set_num_threads(1)
net = timm.create_model("x_mobilenet050_c8", num_classes=3, seed=5).eval()
timm.models.push_to_hf_hub(net, "ann/tiny", model_card={"license": "mit"}, safe_serialization=True)
again = timm.create_model("hf-hub:ann/tiny", pretrained=True).eval()
x = torch.ones(1, 3, 32, 32)
print(json.dumps(torch.equal(net(x), again(x))))
"""
    assert python(code, environment)
