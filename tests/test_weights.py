"""Trained weights: found where they are, verified at every load, and nothing else is ever loaded.

Over loopback with the Hub's real client. Most tests run it in this process, with its constants
changed; what needs processes of its own (timm's doors, several at once, a kill) imports a copy of
the package with a table of its own.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub, sha256
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import xzoo
from xzoo import network, weights
from xzoo.errors import ModelError, XzooError
from xzoo.hub import load, save
from xzoo.models import create_model
from xzoo.models._build import cfg_cifar, rows

NAME, REPO = "x_vgg16_c16.test_r32", "lab/x_vgg16_c16.test_r32"
NAMES = [f"class {i}" for i in range(10)]
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the fingerprint of its graphs, as an export has it."""
    folder = tmp_path_factory.mktemp("cards") / NAME
    model = create_model("x_vgg16_c16", seed=3, num_classes=10).eval()
    save(model, folder, NAMES, block={"fingerprint": weights.fingerprint(model.state_dict())})
    return folder


@pytest.fixture
def hub():
    with Hub() as started:
        yield started


class Place:
    """A table with one row, a Hub that has it, and an empty cache."""

    def __init__(self, hub: Hub, card: Path, table: Path) -> None:
        self.hub, self.card, self.table = hub, card, table
        self.files = {
            name: (card / name).read_bytes() for name in (weights.CONFIG, weights.WEIGHTS)
        }
        self.commit = hub.add(REPO, self.files)
        self.point(commit=self.commit)

    def point(self, **changes: Any) -> None:
        row = {**weights.row(self.card, REPO, self.commit, "v1"), **changes}
        self.row = row
        self.table.write_text(json.dumps({NAME: row}))

    def asked(self) -> int:
        return len(self.hub.requests)

    def serve(self, **files: bytes) -> None:
        """The Hub has other files at the same commit."""
        commit = self.hub.repos[REPO].commits[self.commit]
        for name, data in files.items():
            name = {"config": weights.CONFIG, "weights": weights.WEIGHTS}[name]
            commit.files[name] = type(commit.files[name])(data, commit.files[name].large)  # type: ignore[index]


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)


@pytest.fixture
def place(hub: Hub, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    point_to(hub.endpoint, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(weights, "TABLE", tmp_path / "weights.json")
    monkeypatch.setattr(weights, "homes", lambda: (tmp_path / "wheel", tmp_path / "checkout"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("XZOO_HOME", str(tmp_path / "home")),
        ("HF_TOKEN_PATH", str(tmp_path / "no")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no"))
    return Place(hub, card, tmp_path / "weights.json")


def logits(model: Any, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


def pretrained(**kwargs: Any) -> Any:
    return create_model("x_vgg16_c16", pretrained=True, **kwargs)


def refused(match: str, **kwargs: Any) -> None:
    """In one line, and nothing that a later run would trust is left."""
    with pytest.raises(ModelError, match=match) as caught:
        pretrained(**kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def cached(tmp_path: Path) -> list[Path]:
    return [
        path
        for path in (tmp_path / "home" / "hub").rglob("*")
        if path.is_file() and "blobs" in path.parts
    ]


# ---- where they are found


def test_the_table_of_the_package_is_whole():
    for name, entry in weights.entries().items():
        assert name == f"{entry.architecture}.{entry.tag}" and set(entry.files) == {
            weights.CONFIG,
            weights.WEIGHTS,
        }
        folder = weights.embedded(name)
        if folder is not None:  # what lies here is what the table says
            assert all(pin.fits((folder / file).read_bytes()) for file, pin in entry.files.items())


def test_from_the_hub_then_from_the_cache(place, card, caplog):
    caplog.set_level(logging.INFO, "xzoo.weights")
    wanted = logits(create_model(f"local-dir:{card}", pretrained=True))
    model = pretrained()
    assert torch.equal(logits(model), wanted) and "(Hub)" in caplog.text
    assert model.pretrained_cfg["label_names"] == NAMES and "state_dict" not in model.pretrained_cfg
    assert model.pretrained_cfg["hf_hub_id"] == f"{REPO}@{place.commit}"
    assert (
        Path(model.pretrained_cfg["file"]).is_file() and model.pretrained_cfg["tag"] == "test_r32"
    )
    asked = place.asked()
    assert torch.equal(logits(pretrained()), wanted) and "(cache)" in caplog.text
    assert place.asked() == asked  # the cache costs no request


def test_an_embedded_folder_needs_no_network(place, card, tmp_path, caplog):
    caplog.set_level(logging.INFO, "xzoo.weights")
    shutil.copytree(card, tmp_path / "checkout" / NAME)
    place.point(repo=None, commit=None)
    model = pretrained()
    assert (
        "(embedded)" in caplog.text
        and place.asked() == 0
        and "hf_hub_id" not in model.pretrained_cfg
    )
    saved = tmp_path / "again"
    save(model, saved, NAMES)  # and says nothing of this machine
    assert str(tmp_path) not in (saved / weights.CONFIG).read_text()
    # A damaged one is not loaded: without a repository it is an error, with one the Hub's is taken.
    spoiled = tmp_path / "checkout" / NAME / weights.WEIGHTS
    spoiled.write_bytes(flipped(spoiled.read_bytes()))
    refused("is damaged: its files are not those of x_vgg16_c16.test_r32")
    place.point()
    assert torch.equal(logits(pretrained()), logits(model)) and "(Hub)" in caplog.text


def test_weights_that_are_nowhere_do_not_exist(place, card, tmp_path):
    """Those that are too large for the wheel, where nobody has published them: `finetune` begins
    without.
    """
    place.point(repo=None, commit=None)
    assert (
        weights.find(NAME) is None
        and weights.find("x_vgg16_c16") is None
        and weights.timm_rows() == {}
    )
    shutil.copytree(card, tmp_path / "checkout" / NAME)
    assert weights.find("x_vgg16_c16") is not None and NAME in weights.timm_rows()
    refused(
        "x_vgg16_c16.test_r32 is not on the Hub, and has no commits; leave it out",
        revision="0" * 40,
    )


def test_another_cache_and_another_commit(place, card, tmp_path):
    pretrained(cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "home").exists()
    other = load_file(card / weights.WEIGHTS)
    other["fc.bias"] += 1
    save_file(other, tmp_path / "other.safetensors")
    commit = place.hub.add(REPO, {weights.WEIGHTS: (tmp_path / "other.safetensors").read_bytes()})
    difference = logits(pretrained(revision=commit)) - logits(pretrained())
    assert torch.allclose(difference, torch.ones(()), atol=1e-5)
    for bad in ("main", "v1", "../../../../x", commit[:39]):
        refused("give a commit, 40 hexadecimal digits", revision=bad)
    refused("has no commit 0000", revision="0" * 40)
    with pytest.raises(ModelError, match=r"revision='main'.* has no weights of xzoo's"):
        create_model("x_vgg16_c8", revision="main")


def test_a_model_without_a_row_has_no_weights(place):
    with pytest.raises(ModelError, match="x_vgg16_c8 has no trained weights yet"):
        create_model("x_vgg16_c8", pretrained=True)


def test_a_name_means_the_same_network_with_and_without_weights(place):
    """The first tag is timm's default where it has the architecture's classes, and else not."""
    cfg = cfg_cifar(first_conv="features.0", classifier="fc")
    found = rows({"x_vgg16_c16": cfg, "x_vgg16_c8": cfg})
    assert list(found["x_vgg16_c16"].tags) == ["test_r32", "untrained"] and list(
        found["x_vgg16_c8"].tags
    ) == ["untrained"]
    default = found["x_vgg16_c16"].default
    assert (
        default.hf_hub_id == f"{REPO}@{place.commit}" and default.hf_hub_filename == weights.WEIGHTS
    )
    place.point(cfg={**place.row["cfg"], "num_classes": 100})
    found = rows({"x_vgg16_c16": cfg})["x_vgg16_c16"]
    assert list(found.tags) == ["untrained", "test_r32"] and found.default.num_classes == 10


# ---- another head, another input, features


def test_another_head_and_input(place, card):
    whole = load_file(card / weights.WEIGHTS)
    model = pretrained(num_classes=7)
    assert logits(model).shape == (2, 7)
    body = {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, whole[key].to(value.dtype)) for key, value in body.items())
    assert logits(pretrained(num_classes=0)).shape == (2, 512)
    grey = pretrained(in_chans=1)
    x = X[:, :1]
    assert torch.allclose(logits(grey, x), logits(pretrained(), x.expand(-1, 3, -1, -1)), atol=1e-4)
    features = pretrained(features_only=True)
    assert len(logits(features)) == 6 and torch.equal(
        features.state_dict()["features_0.weight"], whole["features.0.weight"]
    )
    assert "state_dict" not in features.pretrained_cfg


def test_nothing_but_the_head_may_be_missing(place, card, tmp_path):
    refused(
        r"is not of this model: features\.10\.neighbours is unknown", compression=1, num_classes=7
    )
    whole = load_file(card / weights.WEIGHTS)
    for key, match in (
        ("features.3.neighbours", "neighbours is missing"),
        ("features.4.bias", "features.4.bias is miss"),
    ):
        data = safetensors({k: v for k, v in whole.items() if k != key})
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(card / weights.CONFIG, tmp_path / "bad")
        (tmp_path / "bad" / weights.WEIGHTS).write_bytes(data)
        config = json.loads((card / weights.CONFIG).read_text())
        config["xzoo"].pop("fingerprint")
        (tmp_path / "bad" / weights.CONFIG).write_text(json.dumps(config))
        place.card, place.commit = tmp_path / "bad", place.hub.add(REPO, files_of(tmp_path / "bad"))
        place.point()
        refused(match, num_classes=7)
        refused(match)


# ---- what may be wrong with them


def flipped(data: bytes, at: int = -100) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def safetensors(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    return to_bytes(state)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (weights.CONFIG, weights.WEIGHTS)}


def test_a_flipped_bit_is_fetched_again_once(place, card, tmp_path):
    wanted = logits(create_model(f"local-dir:{card}", pretrained=True))
    place.hub.fault("GET /storage/.*", flip=5000)
    assert torch.equal(logits(pretrained()), wanted)
    # In the cache, too: nobody else looks there.
    blob = next(
        path for path in cached(tmp_path) if path.name == sha256(place.files[weights.WEIGHTS])
    )
    for spoiled in (flipped(blob.read_bytes()), blob.read_bytes()[:100]):
        blob.write_bytes(spoiled)
        assert torch.equal(logits(pretrained()), wanted)
    blob.write_bytes(flipped(blob.read_bytes()))
    place.hub.fault("GET /storage/.*", times=2, flip=5000)
    refused("came damaged twice")
    assert blob not in cached(tmp_path)  # nothing that another program would take for it
    assert torch.equal(logits(pretrained()), wanted)


def test_what_is_not_pinned_is_not_taken(place, tmp_path):
    place.serve(config=place.files[weights.CONFIG] + b" ")
    refused("has another config.json")
    # as long as the right one
    place.serve(config=place.files[weights.CONFIG].replace(b"class 1", b"class 7"))
    refused("config.json came damaged twice")
    place.serve(config=place.files[weights.CONFIG], weights=flipped(place.files[weights.WEIGHTS]))
    refused("has another model.safetensors in .* than this xzoo was made for")
    place.serve(weights=place.files[weights.WEIGHTS][:-1000])
    refused("has another model.safetensors")
    assert not [r for r in place.hub.requests if r.startswith("GET /storage/")]


def test_a_short_or_broken_answer(place, card):
    wanted = logits(create_model(f"local-dir:{card}", pretrained=True))
    for fault in ({"cut": 1000}, {"status": 503}, {"reset": True}):
        place.hub.fault("GET /storage/.*", **fault)
        assert torch.equal(logits(pretrained()), wanted)
        shutil.rmtree(Path(os.environ["XZOO_HOME"]))
    place.hub.fault("GET /storage/.*", times=2, cut=1000)
    refused("Consistency check failed")
    assert not [
        p
        for p in Path(os.environ["XZOO_HOME"]).rglob("*")
        if p.name == sha256(place.files[weights.WEIGHTS])
    ]


def test_a_pickle_is_not_opened(place, card, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(card, folder)
    torch.save(load_file(card / weights.WEIGHTS), folder / weights.WEIGHTS)
    place.card, place.commit = folder, place.hub.add(REPO, files_of(folder))
    place.point()
    refused("is not a model that can be read: SafetensorError")
    (folder / weights.WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match="has no model.safetensors; weights of any other format are not loaded"
    ):
        create_model(f"local-dir:{folder}", pretrained=True)


def test_another_graph_than_the_config_was_written_for(place, card, tmp_path):
    folder = tmp_path / "redrawn"
    shutil.copytree(card, folder)
    redrawn = load_file(card / weights.WEIGHTS)
    graph = "features.3.neighbours"
    redrawn[graph] = create_model("x_vgg16_c16", seed=4).state_dict()[graph]
    save_file(redrawn, folder / weights.WEIGHTS)
    place.card, place.commit = folder, place.hub.add(REPO, files_of(folder))
    place.point()
    refused("its graphs are not those that config.json was written for")


def test_names_that_are_paths(place, tmp_path):
    for name, change in (
        (f"../../{NAME}", {}),
        (NAME, {"repo": "../../etc/passwd"}),
        (NAME, {"commit": "../../../../x"}),
        (NAME, {"commit": "main"}),
    ):
        place.table.write_text(
            json.dumps({name: {**weights.row(place.card, REPO, place.commit), **change}})
        )
        with pytest.raises(XzooError, match=r"weights\.json cannot be read"):
            pretrained()
    place.point()
    place.hub.fault(
        "HEAD .*",
        times=10,
        headers={"X-Linked-Etag": '"../../../../../x"', "ETag": '"../../../../../x"'},
    )
    refused("an ETag that is not a hash; nothing was taken")
    assert not cached(tmp_path) and not list(tmp_path.rglob("x.lock"))


# ---- repositories and endpoints


def test_repositories_that_are_not_there_or_not_open(place, monkeypatch):
    repo = place.hub.repos[REPO]
    place.hub.account("secret", "ann")
    place.hub.account("lab's", "lab")
    repo.gated = True
    refused(
        r"is gated: accept its terms at http://127.0.0.1:\d+/lab/x_vgg16_c16.test_r32, then set "
        r"HF_TOKEN"
    )
    repo.gated, repo.private = False, True
    refused("has no repository lab/x_vgg16_c16.test_r32, or it is private: then set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("refused the token for .*; set another HF_TOKEN, or none")
    monkeypatch.setenv("HF_TOKEN", "lab's")
    pretrained()
    del place.hub.repos[REPO]
    shutil.rmtree(os.environ["XZOO_HOME"])
    refused("has no repository")
    place.hub.add(REPO, {"a": b"a"})
    place.hub.repos[REPO].private = False
    refused("has no commit")


def test_a_dead_endpoint_costs_nothing_where_there_is_a_copy(place, monkeypatch, asked):
    monkeypatch.setattr(network, "ANSWER", 1.0)
    wanted = logits(pretrained())
    with socket.socket() as deaf:  # accepts, and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        for port in (1, deaf.getsockname()[1]):
            point_to(f"http://127.0.0.1:{port}", monkeypatch)
            asked.clear()
            entry = weights.find(NAME)
            assert entry is not None and weights.fetch(entry).source == "cache"
            assert torch.equal(logits(pretrained()), wanted) and asked == []
            refused(
                "cannot get .* from http://127.0.0.1:.* and it is not in",
                cache_dir=Path("/nonexistent"),
            )
            assert asked == [1.0]


def test_offline(place, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("is not in .*, and HF_HUB_OFFLINE is set; unset it once")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    wanted = logits(pretrained())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(pretrained()), wanted)
    refused("HF_HUB_OFFLINE is set", revision="0" * 40)


@pytest.mark.slow
def test_a_download_ends_by_a_stall_alone_and_goes_on_where_it_stopped(
    place, card, monkeypatch, asked
):
    wanted = logits(create_model(f"local-dir:{card}", pretrained=True))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    place.hub.fault("GET /storage/.*", stall=100_000)
    assert torch.equal(logits(pretrained()), wanted)
    assert place.hub.ranges == ["bytes=100000-"]
    # Slow is not a stall: it takes longer than any limit here.
    shutil.rmtree(os.environ["XZOO_HOME"])
    monkeypatch.setattr(network, "ANSWER", 1.0)
    place.hub.fault("GET /storage/.*", rate=len(place.files[weights.WEIGHTS]) // 4)
    assert torch.equal(logits(pretrained()), wanted)
    # A storage that is dead where the Hub is not: seconds, and one line.
    shutil.rmtree(os.environ["XZOO_HOME"])
    place.hub.fault("GET /storage/.*", times=9, delay=60)
    asked.clear()
    place.hub.requests.clear()
    refused("did not answer within 1 seconds; check the connection")
    assert (
        set(asked) == {1.0} and sum(r.startswith("GET /storage/") for r in place.hub.requests) == 1
    )


def test_a_cache_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot write lab/", cache_dir=tmp_path / "file")


# ---- weights that the caller names, and timm's door


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "seven.safetensors"
    save_file(create_model("x_vgg16_c16", num_classes=7).state_dict(), file)
    return file


@pytest.mark.parametrize("name", ["x_vgg16_c16", "resnet10t"])
@pytest.mark.parametrize("way", ["overlay", "checkpoint_path"])
def test_a_file_that_is_not_there_or_is_none(name, way, tmp_path):
    def told(file: Path) -> str:
        sources: dict[str, Any] = {"checkpoint_path": file}
        if way == "overlay":
            sources = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
        with pytest.raises(ModelError) as caught:
            create_model(name, **sources)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        return str(caught.value)

    missing = told(tmp_path / "no.pth")
    assert (
        missing.startswith(f"{name}: the file of weights ")
        and "does not exist; give one that exists in" in missing
    )
    assert (
        "checkpoint_path=FILE"
        if way == "checkpoint_path"
        else "pretrained_cfg_overlay=dict(file=FILE)"
    ) in missing
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in told(tmp_path / "folder.pth")
    broken = {
        "a.pth": b"",
        "b.pth": b"no weights",
        "c.pth": b"PK\x03\x04 half a zip",
        "a.safetensors": b"no weights",
    }
    for file, content in broken.items():
        (tmp_path / file).write_bytes(content)
        assert "cannot be read as weights" in told(tmp_path / file)


def test_a_file_that_does_not_fit_is_one_line(checkpoint, tmp_path):
    def told(name: str, **kwargs: Any) -> str:
        with pytest.raises(ModelError) as caught:
            create_model(name, **kwargs)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    classes = told("x_vgg16_c16", checkpoint_path=checkpoint)
    assert (
        "fc.weight is [7, 512] there and [10, 512] in the model" in classes
        and "num_classes=7" in classes
    )
    # What it tells to do does it.
    assert create_model("x_vgg16_c16", num_classes=7, checkpoint_path=checkpoint).num_classes == 7
    overlay = {"file": str(checkpoint), "num_classes": 7}
    body = create_model(
        "x_vgg16_c16", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3
    ).state_dict()
    assert body["fc.weight"].shape == (3, 512)
    assert torch.equal(body["features.0.weight"], load_file(checkpoint)["features.0.weight"])
    features = told("x_vgg16_c16", features_only=True, checkpoint_path=checkpoint)
    assert "missing there" in features and "pretrained_cfg_overlay=dict(file=FILE)" in features
    net = create_model(
        "x_vgg16_c16", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(
        net.state_dict()["features_0.weight"], load_file(checkpoint)["features.0.weight"]
    )
    other = told("x_vgg16_c8", checkpoint_path=checkpoint, num_classes=7)
    assert (
        "does not fit x_vgg16_c8" in other and "the arguments that the file was saved with" in other
    )
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "dense.pth")
    assert "num_classes=7" in told("resnet10t", checkpoint_path=tmp_path / "dense.pth")


@pytest.mark.parametrize("name", ["x_mobilenet050_c8", "x_vgg16_2"])
def test_timms_door_finds_what_a_bare_name_means(name):
    """Embedded ones: also where they have other classes than the architecture has without weights."""
    ours, theirs = (
        xzoo.create_model(name, pretrained=True),
        timm.create_model(name, pretrained=True),
    )
    x = torch.rand(
        1, *ours.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(logits(ours, x), logits(theirs, x))
    assert logits(timm.create_model(name, pretrained=True, num_classes=3), x).shape == (1, 3)
    assert timm.create_model(name).num_classes == xzoo.create_model(name).num_classes


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "JSONDecodeError"),
        ("[1, 2]", "is not a model folder that can be read"),
        ('{"architecture": "x_nothing", "pretrained_cfg": {}}', "Unknown model (x_nothing)"),
        ('{"pretrained_cfg": {}}', "KeyError"),
        (
            '{"architecture": "x_vgg16_c16", "pretrained_cfg": 7}',
            "is not a model folder that can be read",
        ),
        ("\udcff", "UnicodeDecodeError"),
        (None, "config.json"),
    ],
)
def test_a_broken_folder_is_one_line(config, told, tmp_path):
    (tmp_path / weights.WEIGHTS).write_bytes(b"")
    if config is None:
        (tmp_path / weights.CONFIG).mkdir()
    else:
        (tmp_path / weights.CONFIG).write_text(config, encoding="utf-8", errors="surrogateescape")
    for build in (lambda: create_model(f"local-dir:{tmp_path}"), lambda: load(tmp_path)):
        with pytest.raises(ModelError) as caught:
            build()
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(ModelError) as caught:
        create_model(f"local-dir:{tmp_path}")
    assert told in str(caught.value)


# ---- processes of their own


@pytest.fixture
def site(place: Place, tmp_path: Path) -> Path:
    """A copy of the package with the table of `place`, to import by PYTHONPATH."""
    package = Path(xzoo.__file__).parent
    shutil.copytree(
        package, tmp_path / "site" / "xzoo", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(place.table, tmp_path / "site" / "xzoo" / "weights.json")
    return tmp_path / "site"


def start(code: str, site: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    where = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment | where, cwd=site, **pipes
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out.splitlines()[-1]


SHOW = """
import sys, hashlib, torch, xzoo
model = xzoo.create_model("x_vgg16_c16", pretrained=True).eval()
x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(1)
print(hashlib.sha256(model(x).detach().numpy().tobytes()).hexdigest())
"""
TIMM = """
import hashlib, timm, torch, xzoo
torch.set_num_threads(1)
x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
names = ["x_vgg16_c16", "x_vgg16_c16.test_r32", "hf-hub:lab/x_vgg16_c16.test_r32"]
models = [timm.create_model(name, pretrained=True).eval() for name in names]
models.append(xzoo.create_model("x_vgg16_c16.test_r32", pretrained=True).eval())
assert "x_vgg16_c16.test_r32" in xzoo.list_models(pretrained=True)
shown = {hashlib.sha256(model(x).detach().numpy().tobytes()).hexdigest() for model in models}
assert len(shown) == 1
print(shown.pop())
"""


@pytest.mark.slow
def test_timms_doors_lead_to_the_same_weights(place, site, tmp_path):
    environment = place.hub.environment(tmp_path / "new")
    assert ended(start(TIMM, site, environment)) == ended(start(SHOW, site, environment))


FULL = """
import resource, xzoo
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # as a full disk, but for the number of its error
try:
    xzoo.create_model("x_vgg16_c16", pretrained=True)
except xzoo.ModelError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk(place, site, tmp_path):
    environment = place.hub.environment(tmp_path / "new")
    assert "cannot write lab/x_vgg16_c16.test_r32/model.safetensors to" in ended(
        start(FULL, site, environment)
    )
    assert not [
        path for path in (tmp_path / "new").rglob("*.incomplete") if path.stat().st_size > 500_000
    ]
    assert ended(start(SHOW, site, environment))


@pytest.mark.slow
def test_three_processes_at_once(place, site, tmp_path):
    place.hub.fault("GET /storage/.*", times=3, rate=400_000)
    environment = place.hub.environment(tmp_path / "new")
    told = [ended(process) for process in [start(SHOW, site, environment) for _ in range(3)]]
    assert len(set(told)) == 1
    assert len([r for r in place.hub.requests if r.startswith("GET /storage/")]) == 1


@pytest.mark.slow
def test_a_kill_while_it_is_fetched(place, site, tmp_path):
    place.hub.fault("GET /storage/.*", rate=100_000)
    environment = place.hub.environment(tmp_path / "new")
    process = start(SHOW, site, environment)
    while not any(r.startswith("GET /storage/") for r in place.hub.requests):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = ended(start(SHOW, site, environment))
    again = place.hub.environment(tmp_path / "new", HF_HUB_OFFLINE="1")
    assert ended(start(SHOW, site, again)) == first
