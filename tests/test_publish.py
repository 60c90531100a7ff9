"""What is published is what is read back; and the same command ends right after whatever has gone
wrong.

Over loopback, with the Hub's real client in this process, its constants changed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, Stored, sha256
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config

import xzoo
from xzoo import cli, weights
from xzoo.errors import XzooError
from xzoo.hub import card, export, folder, save
from xzoo.hub.publish import folders, publish
from xzoo.models import create_model

# huggingface_hub hands httpx what it uploads by an argument of older days.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "x_vgg16_c16.test_r32"
RESULT = {
    **{
        "model": "x_vgg16_c16",
        "recipe": "recipes/cifar10/net.yaml",
        "recipe_sha": "0" * 16,
        "commit": "abc",
    },
    **{
        "dataset": "cifar10",
        "split": "test",
        "n_val": 100,
        "seed": 0,
        "top1": 91.25,
        "top5": 99.5,
        "loss": 0.3,
    },
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `xzoo fit` leaves it, with what must not leave the machine beside it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    save(
        create_model("x_vgg16_c16", seed=3).eval(), run / "model", [f"class {i}" for i in range(10)]
    )
    (run / "config.yaml").write_text("data: {init_args: {root: /home/ann/photos, shift: 4}}")
    (run / "curves.png").write_bytes(b"png")
    (run / "samples.png").write_bytes(b"a child's face")
    (run / "result.json").write_text(json.dumps(RESULT))
    return run


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("checkout") / "hub_cards" / NAME)


@pytest.fixture
def hub():
    with Hub() as started:
        started.account("secret", "ann", orgs=("lab",))
        yield started


@pytest.fixture
def checkout(hub: Hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The exported folder in a checkout of its own, with an empty table; Ann's token; the Hub."""
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + path)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setattr(constants, name, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("XZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "TABLE", tmp_path / "weights.json")
    monkeypatch.setattr(weights, "homes", lambda: (tmp_path / "wheel", tmp_path / "hub_cards"))
    (tmp_path / "weights.json").write_text("{}")
    place = tmp_path / "hub_cards" / NAME
    shutil.copytree(exported, place)
    card.write(place)
    return place


def files_of(hub: Hub, repo: str) -> dict[str, bytes]:
    found = hub.repos[repo]
    return {path: file.data for path, file in found.commits[found.branches["main"]].files.items()}


def table() -> Any:
    return json.loads(weights.TABLE.read_text())


def test_published_then_loaded_by_its_name_in_a_fresh_cache(hub, checkout, tmp_path):
    wanted = folder.golden_logits(folder.load(checkout))
    done = publish(checkout, org="lab")
    assert (done.repo, done.version, done.registered) == (f"lab/{NAME}", "v1", True)
    assert set(done.changed) == folder.EXPORTED == set(done.sha256)
    there = files_of(hub, done.repo)
    assert set(there) == folder.EXPORTED | {".gitattributes"}
    assert all(sha256(there[name]) == digest for name, digest in done.sha256.items())
    row = table()[NAME]
    assert (row["repo"], row["commit"], row["version"]) == (done.repo, done.commit, "v1")
    assert row["files"]["model.safetensors"]["sha256"] == done.sha256["model.safetensors"]
    assert hub.repos[done.repo].tags == {"v1": done.commit}
    shutil.rmtree(checkout)
    model = create_model("x_vgg16_c16", pretrained=True)
    assert torch.equal(folder.golden_logits(model), wanted)
    assert model.pretrained_cfg["hf_hub_id"] == f"lab/{NAME}@{done.commit}"
    assert (tmp_path / "home" / "hub").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("source", folders(), ids=lambda source: source.name)
def test_every_folder_of_the_repository_goes_up_and_comes_down(hub, checkout, tmp_path, source):
    place = tmp_path / "hub_cards" / source.name
    shutil.copytree(source, place)
    card.write(place)
    wanted = folder.golden_logits(folder.load(place))
    done = publish(place, org="lab")
    shutil.rmtree(place)
    model = create_model(source.name, pretrained=True)
    assert torch.equal(folder.golden_logits(model), wanted)
    assert model.pretrained_cfg["hf_hub_id"] == f"lab/{source.name}@{done.commit}"


def test_again_nothing_is_sent_and_a_change_is_one_commit_and_a_new_tag(hub, checkout):
    first = publish(checkout, org="lab")
    repo = hub.repos[first.repo]
    asked, commits = len(hub.requests), len(repo.commits)
    again = publish(checkout, org="lab")
    assert (again.commit, again.version, again.changed) == (first.commit, "v1", [])
    assert len(repo.commits) == commits and not [
        r for r in hub.requests[asked:] if "/commit/" in r or "PUT" in r
    ]
    state = load_file(checkout / "model.safetensors")
    state["fc.bias"] += 1
    save_file(state, checkout / "model.safetensors")
    with pytest.raises(XzooError, match="its outputs are not those of logits.safetensors"):
        publish(checkout, org="lab")
    model = folder.load(checkout)
    save_file({"logits": folder.golden_logits(model)}, checkout / "logits.safetensors")
    second = publish(checkout, org="lab")
    assert second.changed == ["logits.safetensors", "model.safetensors"] and second.version == "v2"
    assert len(repo.commits) == commits + 1 and repo.tags == {
        "v1": first.commit,
        "v2": second.commit,
    }
    assert table()[NAME]["commit"] == second.commit


def test_a_dry_run_sends_nothing(hub, checkout):
    done = publish(checkout, org="lab", dry_run=True)
    assert set(done.changed) == folder.EXPORTED and not hub.repos and table() == {}
    publish(checkout, org="lab")
    assert publish(checkout, org="lab", dry_run=True).changed == []


def test_a_run_is_published_under_a_name_of_ones_own(hub, checkout, run, tmp_path):
    with pytest.raises(
        XzooError, match="is a run: give its repository a name, such as --repo me/my-flowers"
    ):
        publish(run)
    done = publish(run, repo="ann/my-flowers", private=True)
    assert hub.repos["ann/my-flowers"].private and not done.registered and table() == {}
    there = files_of(hub, "ann/my-flowers")
    assert set(there) == folder.EXPORTED | {".gitattributes"}  # and no picture of the images
    assert not any(
        b"/home/ann" in data or str(run.parent).encode() in data for data in there.values()
    )
    assert b'create_model("hf-hub:ann/my-flowers", pretrained=True)' in there["README.md"]
    assert publish(run, repo="ann/my-flowers").changed == []


def test_what_one_may_not(hub, checkout, monkeypatch):
    def refused(match: str, **kwargs: Any) -> None:
        with pytest.raises(XzooError, match=match) as caught:
            publish(checkout, **{"org": "lab"} | kwargs)
        assert "\n" not in str(caught.value)

    refused("ann may not write to xzoo; give --org or --repo, of ann or lab", org=None)
    refused("is not a repository's name", repo="a/b/c")
    refused("is not a repository's name", repo="../x")
    refused("is not a repository's name; give it as OWNER/NAME", repo="flowers")
    hub.account("reader", "bob", orgs=("lab",), write=False)
    monkeypatch.setenv("HF_TOKEN", "reader")
    refused("the token of bob may only read; make one that writes")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("does not know the token; set HF_TOKEN, or run `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    refused("publishing needs a token that may write: set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set; unset it to publish")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused("publishing lab/.* to http://127.0.0.1:1 was cut short .*; publish again")
    assert not hub.repos and table() == {}


def test_a_stale_card_is_not_published(hub, checkout):
    (checkout / "README.md").write_text(
        (checkout / "README.md").read_text().replace("license: other", "")
    )
    with pytest.raises(XzooError, match="is stale; `xzoo card"):
        publish(checkout, org="lab")
    assert not hub.requests


@pytest.mark.parametrize(
    "fault",
    [
        ("PUT /upload/.*", {"status": 403}),
        ("POST .*/commit/main", {"status": 500}),
        ("POST .*/tag/.*", {"status": 500}),
        ("POST .*/tag/.*", {"lose": True}),
        ("GET /storage/.*", {"status": 404}),
    ],
    ids=str,
)
def test_interrupted_and_repeated(hub, checkout, fault):
    pattern, what = fault
    hub.fault(pattern, **what)
    with pytest.raises(XzooError) as caught:
        publish(checkout, org="lab")
    assert "\n" not in str(caught.value) and table() == {}
    done = publish(checkout, org="lab")
    repo = hub.repos[done.repo]
    assert (done.version, len(repo.commits)) == ("v1", 2) and repo.tags == {"v1": done.commit}
    assert table()[NAME]["commit"] == done.commit


def test_a_hub_that_falls_silent_is_not_waited_for(hub, checkout, monkeypatch):
    monkeypatch.setattr("xzoo.hub.publish.WAIT", 0.5)
    hub.fault("GET /api/models/.*", times=9, delay=60)
    with pytest.raises(XzooError, match=r"was cut short \(ReadTimeout.*publish again"):
        publish(checkout, org="lab")
    assert sum("GET /api/models/" in request for request in hub.requests) == 1 and table() == {}, (
        hub.requests
    )
    hub.faults.clear()
    assert publish(checkout, org="lab").version == "v1"


def test_an_answer_that_is_lost_is_looked_for(hub, checkout):
    hub.fault("POST .*/commit/main", lose=True)
    done = publish(checkout, org="lab")
    assert len(hub.repos[done.repo].commits) == 2 and table()[NAME]["commit"] == done.commit


def test_somebody_else_at_the_same_time(hub, checkout, monkeypatch):
    publish(checkout, org="lab")
    repo = hub.repos[f"lab/{NAME}"]
    # Between the look at the branch and the commit, which names the head that it saw.
    hub.add(f"lab/{NAME}", {"README.md": b"theirs"})
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        files = dict(repo.commits[repo.branches["main"]].files)
        repo.commit("theirs", {**files, "x": Stored(b"x", False)})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(XzooError, match="somebody else has published to lab/.* in the meantime"):
        publish(checkout, org="lab")


def test_bits_that_turn_on_the_way_back_are_found(hub, checkout):
    hub.fault("GET /storage/.*", times=20, flip=3)
    with pytest.raises(XzooError, match="came damaged twice"):
        publish(checkout, org="lab")
    assert table() == {} and not hub.repos[f"lab/{NAME}"].tags


def test_the_command(hub, checkout, run, capsys, monkeypatch):
    assert cli.main(["publish", str(checkout), "--org", "lab", "--dry-run"]) == 0
    assert "would be sent" in capsys.readouterr().out
    assert cli.main(["publish", "--all", "--org", "lab"]) == 0
    out = capsys.readouterr().out
    row = table()[NAME]
    assert f"commit {row['commit']}" in out and "entered in xzoo/weights.json" in out
    assert f"{row['files']['model.safetensors']['sha256']}  model.safetensors" in out
    for wrong in (
        ["publish"],
        ["publish", str(checkout), "--all"],
        ["publish", "--all", "--repo", "a/b"],
    ):
        assert cli.main(wrong) == 2
        assert "give a folder or a run" in capsys.readouterr().err


def test_cards_are_written_and_entered_by_one_command(hub, checkout, capsys):
    (checkout / "README.md").write_text("by hand")
    assert cli.main(["card"]) == 0
    assert "rewritten" in capsys.readouterr().out and table()[NAME]["commit"] is None
    # embedded, published or not
    assert create_model(f"{NAME.partition('.')[0]}", pretrained=True) is not None
    done = publish(checkout, org="lab")
    assert cli.main(["card", str(checkout)]) == 0
    assert "up to date" in capsys.readouterr().out and table()[NAME]["commit"] == done.commit


@pytest.mark.slow
def test_a_model_of_40_mb_by_every_door(hub, checkout, run, tmp_path, monkeypatch):
    """xzoo, timm and the `hf` command have the same bytes, though the connection breaks on the way."""
    big = tmp_path / "big"
    shutil.copytree(run, big)
    shutil.rmtree(big / "model")
    model = create_model("x_resnet34", num_classes=10).eval()
    names = [str(i) for i in range(10)]
    save(
        model, big / "model", names, resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    )
    name = "x_resnet34.test_r64"
    place = export(big, tmp_path / "hub_cards" / name)
    assert (place / "model.safetensors").stat().st_size > 30e6
    wanted = folder.golden_logits(folder.load(place))
    done = publish(place, org="lab")
    shutil.rmtree(place)
    hub.fault("GET /storage/.*", drop=15 << 20)
    assert torch.equal(folder.golden_logits(create_model("x_resnet34", pretrained=True)), wanted)
    environment = hub.environment(tmp_path / "new")
    code = f"""
import timm, torch, xzoo
from xzoo.hub.folder import golden_logits
torch.set_num_threads(1)
print(golden_logits(timm.create_model("hf-hub:lab/{name}@{done.commit}", pretrained=True)).tolist())
"""
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert torch.equal(torch.tensor(json.loads(told.stdout)), wanted)
    hf, there = Path(sys.executable).parent / "hf", tmp_path / "there" / name
    command = [str(hf), "download", f"lab/{name}", "--revision", "v1", "--local-dir", str(there)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert torch.equal(folder.golden_logits(folder.load(there)), wanted)


@pytest.mark.slow
def test_the_wheel_makes_every_embedded_model_offline(checkout, tmp_path):
    """Built from the repository with a folder embedded; installed outside of it; with no network
    and no cache.
    """
    source, project = tmp_path / "source", Path(xzoo.__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("xzoo", "recipes"):
        shutil.copytree(project / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, source)
    shutil.copytree(checkout, source / "hub_cards" / NAME)
    (source / "xzoo" / "weights.json").write_text(json.dumps({NAME: weights.row(checkout)}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", tmp_path, source], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"no wheel can be built here: {built.stderr[-200:]}")
    wheel, site = next(tmp_path.glob("*.whl")), tmp_path / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True
    )
    code = """
import torch, xzoo
names = xzoo.list_models(pretrained=True)
for name in names:
    model = xzoo.create_model(name, pretrained=True)
    tuned = xzoo.create_model(name, pretrained=True, num_classes=3)
    torch.nn.functional.cross_entropy(tuned(torch.rand(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    assert "hub_cards" in model.pretrained_cfg["file"]
print(xzoo.__file__, names)
"""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=site, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [str(site / "xzoo" / "__init__.py"), f"['{NAME}']"]
    assert not list(site.rglob("*.png"))


@pytest.mark.slow
def test_a_kill_while_it_is_sent(hub, checkout, tmp_path):
    package = tmp_path / "xzoo"
    shutil.copytree(
        Path(xzoo.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(weights.TABLE, package / "weights.json")
    environment = hub.environment(tmp_path / "new", "secret", PYTHONPATH=str(tmp_path))
    command = [sys.executable, "-m", "xzoo", "publish", str(checkout), "--org", "lab"]
    hub.fault("PUT /upload/.*", times=3, delay=30)
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not any(r.startswith("PUT /upload/") for r in hub.requests):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.faults.clear()
    assert json.loads((package / "weights.json").read_text()) == {}
    for _ in range(2):
        told = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr
    row = json.loads((package / "weights.json").read_text())[NAME]
    repo = hub.repos[f"lab/{NAME}"]
    assert (
        len(repo.commits) == 2 and repo.tags == {"v1": row["commit"]} and os.listdir(package.parent)
    )
