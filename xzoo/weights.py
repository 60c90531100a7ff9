"""Trained weights by tag: where they are, and never a byte of them that is not the one meant.

weights.json has a row for each tag, such as "x_vgg16_2.cifar10": the Hub's repository and
commit, and size and sha256 of config.json and model.safetensors; `xzoo publish` writes it. `fetch`
takes the first place that has them:

    embedded    hub_cards/ in the wheel, or beside the package in a checkout
    cache       XZOO_HOME/hub, or cache_dir
    Hub         HF_ENDPOINT, with HF_TOKEN if there is one; never under HF_HUB_OFFLINE=1

The Hub's client checks sizes alone, and nothing in its cache; so every file is hashed at every
load, and what was hashed is what is parsed. Only safetensors are: no pickle can get in. Not here:
building models (models/), and data sets, whose files are not hashed.
"""

import hashlib
import json
import logging
import re
import urllib.error
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from . import files, graphs, network
from .errors import ModelError, XzooError, first_line
from .home import home

_logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("weights.json")
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"x_\w+\.[\w-]+")
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Pin:
    """What a file has to be; of a commit that nobody pinned the digest is the Hub's own, perhaps
    git's sha1.
    """

    digest: str
    size: int

    def fits(self, data: bytes) -> bool:
        return len(data) == self.size and self.digest in (_sha256(data), git_sha1(data))


@dataclass(frozen=True)
class Entry:
    """A row of weights.json. Without repo and commit the weights are only in a folder, of a
    checkout or a wheel.
    """

    name: str
    files: Mapping[str, Pin]
    cfg: Mapping[str, Any]  # timm's pretrained_cfg, without names of classes
    repo: str | None = None
    commit: str | None = None
    version: str | None = None

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]


@dataclass(frozen=True)
class Checkpoint:
    """Verified weights: what config.json says, the tensors, and where they were taken from."""

    entry: Entry
    config: dict[str, Any]
    state: dict[str, Tensor]
    path: Path
    source: str


def entries() -> dict[str, Entry]:
    """The rows whose weights can be had, in the table's order: an architecture's first tag is its
    default.

    Larger ones that nobody has published yet are in a checkout, and not in the wheel: there they do
    not exist. Raises: XzooError if the table is broken.
    """
    try:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        rows = {name: _entry(name, row) for name, row in table.items()}
        return {name: entry for name, entry in rows.items() if entry.repo or embedded(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise XzooError(f"{TABLE} cannot be read: {error}; install xzoo again") from error


def _entry(name: str, row: Mapping[str, Any]) -> Entry:
    # These become paths and addresses.
    for what, value, allowed in (("name", name, _NAME), ("repo", row.get("repo"), _REPO)):
        if value is not None and not allowed.fullmatch(value):
            raise ValueError(f"{what} {value!r}")
    if row.get("commit") is not None and not _COMMIT.fullmatch(row["commit"]):
        raise ValueError(f"commit {row['commit']!r} is not 40 hexadecimal digits")
    known = row["files"]
    pins = {file: Pin(known[file]["sha256"], known[file]["size"]) for file in (CONFIG, WEIGHTS)}
    return Entry(name, pins, row["cfg"], row.get("repo"), row.get("commit"), row.get("version"))


def write(name: str, row: Mapping[str, Any]) -> None:
    """Put a row into weights.json, whole or not at all; rows are sorted by name."""
    _entry(name, row)
    table = json.loads(TABLE.read_text(encoding="utf-8")) | {name: dict(row)}
    files.write_text(TABLE, json.dumps(dict(sorted(table.items())), indent=1) + "\n")


def row(
    folder: Path, repo: str | None = None, commit: str | None = None, version: str | None = None
) -> dict[str, Any]:
    """What weights.json says of a model folder."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    cfg = {
        key: value
        for key, value in config["pretrained_cfg"].items()
        if not key.startswith("label_")
    }
    sizes = {}
    for name in (CONFIG, WEIGHTS):
        data = (folder / name).read_bytes()
        sizes[name] = {"sha256": _sha256(data), "size": len(data)}
    return {"repo": repo, "commit": commit, "version": version, "files": sizes, "cfg": cfg}


def find(name: str) -> Entry | None:
    """The row of "arch.tag", or of an architecture's default; None where there is none."""
    table = entries()
    if "." in name:
        return table.get(name)
    return next((entry for entry in table.values() if entry.architecture == name), None)


def homes() -> tuple[Path, Path]:
    """Where embedded folders may be: in the wheel, and beside the package in a checkout."""
    package = Path(__file__).parent
    return package / "hub_cards", package.parent / "hub_cards"


def embedded(name: str) -> Path | None:
    """The folder of weights that came with this installation; None for those of the Hub."""
    folders = (place / name for place in homes())
    return next((folder for folder in folders if (folder / WEIGHTS).is_file()), None)


def timm_rows() -> dict[str, dict[str, Any]]:
    """The table as timm's rows of default_cfgs, so that its own create_model finds the pinned
    commit.
    """
    rows = {}
    for name, entry in entries().items():
        there = embedded(name)
        source = {"file": str(there / WEIGHTS)} if there else {}
        if entry.repo:
            # Named, or timm would take a pickle where the Hub does not answer.
            source |= {"hf_hub_id": f"{entry.repo}@{entry.commit}", "hf_hub_filename": WEIGHTS}
        # as timm's own
        cfg = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.cfg.items()}
        rows[name] = cfg | source
    return rows


def fetch(
    entry: Entry, revision: str | None = None, cache_dir: Path | str | None = None
) -> Checkpoint:
    """Find, verify and read the weights of a row.

    Args:
        revision: another commit of its repository. Nobody has pinned that one: it is held against
            what the Hub says.
        cache_dir: of the Hub's client, in place of XZOO_HOME/hub.
    Raises: ModelError that says what is wrong and what to do. Nothing that was not verified is
    returned.
    """
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise ModelError(
            f"revision={revision!r}: give a commit, 40 hexadecimal digits; branches and tags move"
        )
    other = revision is not None and revision != entry.commit
    folder = None if other else embedded(entry.name)
    if folder is not None:
        there = {name: _read(folder / name) or b"" for name in entry.files}
        if all(pin.fits(there[name]) for name, pin in entry.files.items()):
            return _parsed(entry, there, folder / WEIGHTS, "embedded")
        if entry.repo is None:
            raise ModelError(
                f"{folder} is damaged: its files are not those of {entry.name}; install xzoo again"
            )
        _logger.warning(
            "%s is damaged: its files are not those of %s; taking them from the Hub",
            folder,
            entry.name,
        )
    if entry.repo is None or entry.commit is None:
        raise ModelError(
            f"revision={revision}: {entry.name} is not on the Hub, and has no commits; leave it out"
        )
    hub = Hub(entry.repo, revision or entry.commit, Path(cache_dir or home() / "hub"))
    found, sources = {}, set()
    with network.bounded():  # of both files at once: a server that is dead is asked once
        for name in (CONFIG, WEIGHTS):
            pin = hub.stated(name) if other else entry.files[name]
            found[name], path, source = hub.file(name, pin)
            sources.add(source)
    return _parsed(entry, found, path, "Hub" if "Hub" in sources else "cache")


def _parsed(entry: Entry, contents: Mapping[str, bytes], path: Path, source: str) -> Checkpoint:
    try:
        config = json.loads(contents[CONFIG])
        state = safetensors.torch.load(contents[WEIGHTS])
        if config["architecture"] != entry.architecture:
            raise ModelError(
                f"{path}: these are weights of {config['architecture']}, not of "
                f"{entry.architecture}"
            )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, XzooError):
            raise
        raise ModelError(
            f"{path} is not a model that can be read: {type(error).__name__}: {error}"
        ) from error
    check_fingerprint(config, state, str(path))
    _logger.info(
        "weights of %s: %s (%s), sha256 %s", entry.name, path, source, _sha256(contents[WEIGHTS])
    )
    return Checkpoint(entry, config, state, path, source)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of all graphs of a model, by name, whatever integers they are stored in; ""
    without any.
    """
    prints = ""
    for key in sorted(state):
        if key.rpartition(".")[2] == "neighbours":
            rows = state[key].to(torch.int32).numpy(force=True)
            prints += f"{key} {graphs.fingerprint(rows)}\n"
    return _sha256(prints.encode()) if prints else ""


def check_fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor], what: str) -> None:
    """Raise ModelError where the graphs are others than those that config.json was written for."""
    wanted = (config.get("xzoo") or {}).get("fingerprint")
    if wanted is not None and wanted != fingerprint(state):
        raise ModelError(
            f"{what}: its graphs are not those that {CONFIG} was written for (fingerprint "
            f"{wanted[:12]})"
        )


# ---- the Hub


class Hub:
    """One commit of a repository, through the Hub's own client and a cache of its form."""

    def __init__(self, repo: str, commit: str, cache: Path) -> None:
        from huggingface_hub import constants

        self.repo, self.commit, self.cache = repo, commit, cache
        self.endpoint, self.offline = constants.ENDPOINT, constants.HF_HUB_OFFLINE

    def stated(self, name: str) -> Pin:
        """What the Hub says of a file."""
        from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

        if self.offline:
            raise ModelError(
                f"{self.repo} at {self.commit} is asked of the Hub, and HF_HUB_OFFLINE is set"
            )
        try:
            with network.bounded():
                url = hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
                found = get_hf_file_metadata(url, token=get_token())
        except Exception as error:
            raise self._error(name, error) from error
        # The client makes paths of the ETag, and takes any.
        if found.commit_hash != self.commit or not found.etag or found.size is None:
            raise ModelError(
                f"{self.endpoint} says nothing of use about {self.repo}/{name} at {self.commit}: "
                "is it the Hub, or "
                "the sign-in page of a network?"
            )
        if not (_SHA256.fullmatch(found.etag) or _COMMIT.fullmatch(found.etag)):
            raise ModelError(
                f"{self.endpoint} gives {self.repo}/{name} an ETag that is not a hash; nothing was "
                "taken"
            )
        return Pin(found.etag, found.size)

    def file(self, name: str, pin: Pin) -> tuple[bytes, Path, str]:
        """Verified bytes, their path, and whether they came from the "cache" or the "Hub"."""
        from huggingface_hub import hf_hub_download

        fetch_file = partial(
            hf_hub_download, self.repo, name, revision=self.commit, cache_dir=self.cache
        )
        state = "not in"
        with suppress(OSError, ValueError):  # not in the cache
            cached = Path(fetch_file(local_files_only=True))
            data = _read(cached)
            if data is not None and pin.fits(data):
                return data, cached, "cache"
            state = "damaged in"
            _logger.warning("%s is damaged and will be fetched again", cached)
        if self.offline:
            raise ModelError(
                f"{self.repo}/{name} is {state} {self.cache}, and HF_HUB_OFFLINE is set; unset it "
                "once to fetch it"
            )
        self._check_pin(name, pin)
        for last in (False, True):
            try:
                with network.bounded():
                    path = Path(
                        fetch_file(
                            endpoint=self.endpoint,
                            etag_timeout=network.patience(),
                            force_download=last or state == "damaged in",
                        )
                    )
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                refused = status is not None and status < 500
                unwritten = getattr(error, "errno", None) is not None  # a full disk, permissions
                if last or refused or unwritten or network.unreachable():
                    raise self._error(name, error) from error
                continue
            data = path.read_bytes()
            if pin.fits(data):
                return data, path, "Hub"
            # Other programs read this cache and check nothing: a damaged file must not stay there.
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise ModelError(
            f"{self.repo}/{name} came damaged twice from {self.endpoint}; nothing was kept, try "
            "again later"
        )

    def _check_pin(self, name: str, pin: Pin) -> None:
        """Raise ModelError if the Hub has another file than the pinned one."""
        stated = self.stated(name)
        both_sha256 = len(stated.digest) == len(pin.digest) == 64
        if stated.size != pin.size or (both_sha256 and stated.digest != pin.digest):
            raise ModelError(
                f"{self.endpoint} has another {name} in {self.repo} at {self.commit[:12]} than "
                f"this xzoo was made for ({stated.size} bytes, {pin.size} expected); nothing was "
                "taken"
            )

    def _error(self, name: str, error: Exception) -> ModelError:
        if isinstance(error, XzooError):
            return ModelError(str(error))
        what = f"{self.repo}/{name}"
        text = explained(error, self.repo, self.commit, name)
        if text is None and isinstance(error, OSError) and error.errno is not None:
            text = f"cannot write {what} to {self.cache}: {files.reason(error)}"
        return ModelError(text or f"cannot get {what} from {self.endpoint}: {first_line(error)}")


def explained(
    error: BaseException, repo: str, revision: str | None = None, file: str | None = None
) -> str | None:
    """What kept the Hub's client from a repository, in one line that says what to do; None for
    other errors.

    Within network.bounded(), which knows what was wrong with the network.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx

    endpoint, what = constants.ENDPOINT, f"{repo}/{file}" if file else repo
    status = getattr(getattr(error, "response", None), "status_code", None)
    commit = "commit" if _COMMIT.fullmatch(revision or "") else "revision"
    missing = file or Path(str(getattr(getattr(error, "response", None), "url", CONFIG))).name
    for kind, text in (
        (
            errors.GatedRepoError,
            f"{repo} is gated: accept its terms at {endpoint}/{repo}, then set HF_TOKEN or run "
            "`hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{endpoint} has no repository {repo}, or it is private: then set HF_TOKEN or run `hf "
            "auth login`",
        ),
        (
            errors.RevisionNotFoundError,
            f"{repo} has no {commit} {revision}" if revision else f"{repo} has no such revision",
        ),
        (
            errors.RemoteEntryNotFoundError,
            f"{repo} has no {missing}" + (f" at {revision}" if revision else ""),
        ),
        (
            errors.HFValidationError,
            f"{repo!r} is not the name of a repository of the Hub; give OWNER/NAME",
        ),
    ):
        if isinstance(error, kind):
            return text
    if status in (401, 403):
        return f"{endpoint} refused the token for {what}; set another HF_TOKEN, or none"
    if isinstance(error, UnicodeEncodeError):  # headers are ASCII, and of ours the token is in them
        return f"the token of the Hub is not plain ASCII ({error.reason}); set HF_TOKEN again"
    causes = (error, error.__cause__)
    if any(isinstance(cause, errors.FileMetadataError) for cause in causes):
        return (
            f"cannot get {what}: {endpoint} does not answer as the Hub does; is it the sign-in "
            "page of a network?"
        )
    unanswered = (
        httpx.HTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        urllib.error.URLError,
    )
    failure = network.failure()
    if any(isinstance(cause, unanswered) for cause in causes) or (
        failure and failure.startswith("the proxy")
    ):
        failure = failure or first_line(error)
        if "HF_HUB_OFFLINE" in failure:
            return f"{what} is not in the cache, and {failure}"
        return (
            f"cannot get {what} from {endpoint}, and it is not in the cache: {failure}; check the "
            "connection"
        )
    return None


def _read(path: Path) -> bytes | None:
    """What a file of the cache holds; None where it cannot be read."""
    with suppress(OSError):
        return path.read_bytes()
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
