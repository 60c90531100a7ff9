"""Publishing a model folder: one commit of the format's own files, read back, tagged, and entered
in weights.json.

Each step looks first at what is there, so that the same command ends right after any interruption,
and changes nothing the second time. The commit names its parent: what somebody else has published
meanwhile is not overwritten.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_token,
)
from huggingface_hub.utils import build_hf_headers, get_session, httpx, validate_repo_id

from .. import network, weights
from ..errors import XzooError, first_line
from ..files import check_file
from ..names import encoded
from . import card
from .folder import EXPORTED, check, export

WAIT = 90.0  # seconds without a byte in any other call; the Hub itself gives a commit 60


@dataclass(frozen=True)
class Publication:
    """What is on the Hub now; of a dry run, what would be. `changed` are the files to send."""

    repo: str
    commit: str | None
    version: str | None
    changed: list[str]
    sha256: dict[str, str]
    registered: bool


def publish(
    source: Path | str,
    org: str | None = None,
    repo: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Publication:
    """Publish a folder that `export` wrote, or a run, and read back what has arrived.

    Args:
        source: an exported folder, named ARCHITECTURE.TAG in a checkout's hub_cards; or the folder
            of a run.
        org: whose repository; by default the zoo's own.
        repo: the repository's whole name, such as me/my-flowers; needed for a run.
        private: make a private one, if it is made.
        dry_run: say what would be sent, and send nothing.
    Raises: XzooError that says what to do: without a token or rights, or where the folder is not as
    it was exported.
    """
    source = Path(source)
    if (source / "result.json").is_file():
        if repo is None:
            raise XzooError(
                f"{source} is a run: give its repository a name, such as --repo me/my-flowers"
            )
        with tempfile.TemporaryDirectory() as place:
            folder = export(source, Path(place) / repo.rpartition("/")[2], repo, timed=False)
            return _publish(folder, repo, private, dry_run)
    check(source)
    return _publish(source, repo or f"{org or card.ORG}/{source.resolve().name}", private, dry_run)


def folders() -> list[Path]:
    """All that are in the checkout's hub_cards."""
    return sorted(path.parent for path in weights.homes()[1].glob(f"*/{weights.CONFIG}"))


def register(
    folder: Path, repo: str | None = None, commit: str | None = None, version: str | None = None
) -> bool:
    """Enter a folder of the checkout's hub_cards into weights.json; returns whether it is one.

    Without a commit, that of its row is kept while the files are the same.
    """
    folder = folder.resolve()
    if folder.parent != weights.homes()[1].resolve():
        return False
    row = weights.row(folder, repo, commit, version)
    known = json.loads(weights.TABLE.read_text(encoding="utf-8")).get(folder.name, {})
    if commit is None and known.get("files") == row["files"]:
        row |= {key: known.get(key) for key in ("repo", "commit", "version")}
    weights.write(folder.name, row)
    return True


def _publish(folder: Path, repo: str, private: bool, dry_run: bool) -> Publication:
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise XzooError(f"{repo!r} is not a repository's name; give it as OWNER/NAME")
        if not dry_run and folder.resolve().parent == weights.homes()[1].resolve():
            check_file(weights.TABLE)  # it is written at the end
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in EXPORTED}
        # For a repository of another name the card says other things.
        files[card.CARD] = encoded(card.text(folder, repo))
        session = get_session()
        limits = session.timeout
        session.timeout = WAIT  # the client's own default is to wait forever
        try:
            return _send(HfApi(endpoint=constants.ENDPOINT), folder, repo, files, private, dry_run)
        finally:
            session.timeout = limits
    except XzooError:
        raise
    except (httpx.HTTPError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise XzooError(_explained(repo, error)) from error


def _send(
    api: HfApi, folder: Path, repo: str, files: dict[str, bytes], private: bool, dry_run: bool
) -> Publication:
    _check_rights(repo)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    if dry_run and not api.repo_exists(repo):
        return Publication(repo, None, None, sorted(files), digests, False)
    if not dry_run:
        api.create_repo(repo, private=private, exist_ok=True)
    head = str(api.model_info(repo, timeout=WAIT).sha)
    changed, surplus = _differences(api, repo, head, files)
    if dry_run:
        return Publication(repo, None, None, changed + surplus, digests, False)
    commit = head
    if changed or surplus:
        operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in changed]
        operations += [CommitOperationDelete(name) for name in surplus]
        title = f"{folder.name}: {', '.join(changed + surplus)}"
        try:
            commit = api.create_commit(
                repo, operations, commit_message=title, parent_commit=head
            ).oid
        except httpx.TransportError:  # done, perhaps, and the answer was lost
            commit = str(api.model_info(repo, timeout=WAIT).sha)
    if _differences(api, repo, commit, files) != ([], []):
        raise XzooError(f"{repo} has other files at {commit} than were sent; publish again")
    with tempfile.TemporaryDirectory() as cache:
        hub = weights.Hub(repo, commit, Path(cache))
        for name, data in files.items():
            hub.file(name, weights.Pin(digests[name], len(data)))
    version = _tagged(api, repo, commit)
    return Publication(
        repo, commit, version, changed + surplus, digests, register(folder, repo, commit, version)
    )


def _check_rights(repo: str) -> None:
    """Raise XzooError unless there is a token whose owner may write; asked by hand, to hear of a
    dead Hub soon.
    """
    if constants.HF_HUB_OFFLINE:
        raise XzooError("HF_HUB_OFFLINE is set; unset it to publish")
    if not get_token():
        raise XzooError(
            "publishing needs a token that may write: set HF_TOKEN, or run `hf auth login`"
        )
    with network.bounded():
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers()
        )
    if answer.status_code in (401, 403):
        raise XzooError(
            f"{constants.ENDPOINT} does not know the token; set HF_TOKEN, or run `hf auth login`"
        )
    answer.raise_for_status()
    try:
        told, owner = answer.json(), repo.partition("/")[0]
        names = [told["name"], *(org["name"] for org in told.get("orgs", []))]
    except (ValueError, KeyError, TypeError) as error:
        raise XzooError(
            f"{constants.ENDPOINT} does not answer as the Hub does; is it the sign-in page of a "
            "network?"
        ) from error
    if owner not in names:
        raise XzooError(
            f"{told['name']} may not write to {owner}; give --org or --repo, of "
            f"{' or '.join(names)}"
        )
    if told.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise XzooError(
            f"the token of {told['name']} may only read; make one that writes, and set HF_TOKEN"
        )


def _differences(
    api: HfApi, repo: str, commit: str, files: dict[str, bytes]
) -> tuple[list[str], list[str]]:
    """Files that are missing there or differ, and files of the format that do not belong there."""
    there = {}
    for info in api.get_paths_info(repo, sorted(EXPORTED), revision=commit):
        lfs = getattr(info, "lfs", None)
        there[info.path] = lfs.sha256 if lfs else getattr(info, "blob_id", None)
    changed = []
    for name, data in sorted(files.items()):
        if there.get(name) not in (hashlib.sha256(data).hexdigest(), weights.git_sha1(data)):
            changed.append(name)
    return changed, sorted(there.keys() - files.keys())


def _tagged(api: HfApi, repo: str, commit: str) -> str:
    """The version of a commit: v1, v2, ...; a new one where it has none. A tag is never moved."""
    for _ in range(3):  # a tag of the same name may come from elsewhere at the same time
        tags = [
            tag for tag in api.list_repo_refs(repo).tags if re.fullmatch(r"v[1-9]\d*", tag.name)
        ]
        versions = {int(tag.name[1:]): tag.target_commit for tag in tags}
        known = [number for number, target in versions.items() if target == commit]
        if known:
            return f"v{max(known)}"
        # That it is there already is not an error for the client, wherever it points; so it is
        # looked at again.
        api.create_tag(repo, tag=f"v{max(versions, default=0) + 1}", revision=commit, exist_ok=True)
    raise XzooError(f"{repo} could not be tagged at {commit}; publish again")


def _explained(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a repository's name: {first_line(error)}"
    if status in (401, 403):
        return f"the token may not write to {repo}; make one that may, and set HF_TOKEN"
    if status == 412:
        return (
            f"somebody else has published to {repo} in the meantime; look at it, and publish again"
        )
    if isinstance(error, UnicodeEncodeError):
        return "the token of the Hub is not plain ASCII; set HF_TOKEN again, or run `hf auth login`"
    kind, told = type(error).__name__, first_line(error)
    # What network.bounded raises says all by itself.
    if told != kind and not isinstance(error, errors.OfflineModeIsEnabled):
        told = f"{kind}: {told}"
    return f"publishing {repo} to {constants.ENDPOINT} was cut short ({told}); publish again"
