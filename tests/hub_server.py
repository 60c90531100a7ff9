"""A small Hugging Face Hub on 127.0.0.1, for the unmodified clients: huggingface_hub, timm, the
`hf` command.

    with Hub() as hub:
        hub.account("secret", "ann", orgs=("lab",))
        run(environment=hub.environment(tmp_path, token="secret"))      # a process that uses the real client
        hub.fault("GET /storage/.*", flip=100)                          # and what goes wrong

Two servers: the Hub and, on another port, the storage that large files are redirected to and
uploaded to. It has the endpoints that uploading a folder, downloading, listing, tags and branches
need, with private and gated repositories, error codes, Range and faults; it has no datasets, no
pull requests, no xet (HF_HUB_DISABLE_XET=1 is in `environment`). Everything is kept in memory;
`requests` lists what was asked for.
"""

import base64
import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlencode

# stored as the Hub stores large files, whatever their size
LARGE = (".safetensors", ".bin", ".png")


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The ETag: sha256 of a large file, git's own hash of another."""
        return sha256(self.data) if self.large else git_sha1(self.data)


@dataclass(frozen=True)
class Commit:
    title: str
    files: Mapping[str, Stored]
    parent: str | None = None


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    # accounts that accepted a gated repository's terms
    readers: set[str] = field(default_factory=set)

    def commit(self, title: str, files: Mapping[str, Stored], branch: str = "main") -> str:
        parent = self.branches.get(branch)
        content = {path: file.oid for path, file in sorted(files.items())}
        oid = hashlib.sha1(
            json.dumps([title, parent, len(self.commits), content]).encode()
        ).hexdigest()
        self.commits[oid] = Commit(title, dict(files), parent)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)


@dataclass
class Account:
    name: str
    orgs: tuple[str, ...] = ()
    write: bool = True


@dataclass
class Fault:
    """What is done to the next `times` requests whose "METHOD /path" matches; see `Hub.fault`."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)  # None takes one away
    delay: float = 0
    drop: int | None = None
    stall: int | None = None
    flip: int | None = None
    cut: int | None = None
    reset: bool = False
    lose: bool = False
    rate: int | None = None


class Hub:
    """See the module. Attributes: endpoint, repos by name, requests ("METHOD /path" in order),
    ranges ("bytes=5-" in order)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, Account] = {}
        self.blobs: dict[str, bytes] = {}  # large files that were uploaded, by sha256
        self.parts: dict[tuple[str, int], bytes] = {}  # of those that are on their way
        # bytes of a part of an upload; entries in an answer of the tree
        self.part_size, self.page = 1 << 30, 1000
        self.requests: list[str] = []
        self.ranges: list[str] = []  # parts of files that were asked for
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._stop = threading.Event()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(self)) for _ in range(2)]
        self.endpoint, self.storage = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )

    def __enter__(self) -> Self:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def account(
        self, token: str, name: str, orgs: tuple[str, ...] = (), write: bool = True
    ) -> None:
        self.accounts[token] = Account(name, orgs, write)

    def add(
        self, name: str, files: Mapping[str, bytes], private: bool = False, gated: bool = False
    ) -> str:
        """A repository with one commit more, without any client; returns the commit."""
        repo = self.repos.setdefault(name, Repo(name, private, gated))
        head = repo.branches.get("main")
        before = repo.commits[head].files if head else {}
        stored = {path: Stored(data, path.endswith(LARGE)) for path, data in files.items()}
        return repo.commit("files", {**before, **stored})

    def fault(self, pattern: str, times: int = 1, **what: Any) -> None:
        """The next `times` requests that match ("GET /storage/.*") go wrong.

        status: answer with it and no body. headers: changed, or with None taken away. delay:
        seconds before the answer. drop: close after that many bytes of the body. stall: send no
        more after that many. flip: turn a bit of that byte. cut: leave out the body's last bytes
        and say so honestly. reset: break the connection. lose: do what was asked for, then close
        without an answer. rate: bytes a second.
        """
        self.faults.append(Fault(pattern, times, **what))

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """Of a process whose client talks to this Hub, with its caches in `home`."""
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE"))
        }
        places = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "XZOO_HOME": str(home / "xzoo"),
        }
        quiet = (
            "DISABLE_XET",
            "DISABLE_TELEMETRY",
            "DISABLE_UPDATE_CHECK",
            "DISABLE_PROGRESS_BARS",
        )
        flags = {f"HF_HUB_{name}": "1" for name in quiet} | {
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return own | places | flags | ({"HF_TOKEN": token} if token else {}) | more

    def wait(self, seconds: float) -> None:
        """Sleep, but not longer than the server lives."""
        self._stop.wait(seconds)

    def pop_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class RefusedError(Exception):
    """An answer that is an error: its status, code and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code or str(status))
        self.status, self.code, self.message = status, code, message or code


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    return type("Bound", (Handler,), {"hub": hub})


class Handler(BaseHTTPRequestHandler):
    """One connection; routes are methods of ROUTES' names, and raise `RefusedError`."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    headers: Message
    fault: Fault | None

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        raw, _, query = self.path.partition("?")
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(raw)}")
        self.fault = self.hub.pop_fault(f"{self.command} {unquote(raw)}")
        self.query = parse_qs(query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.fault is not None:
                self.hub.wait(self.fault.delay)
                if self.fault.reset:
                    self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
                    self._close()
                    return
                if self.fault.status is not None:
                    raise RefusedError(self.fault.status, "", "a fault of the test")
            self._route(raw, body)
        except RefusedError as error:
            coded = {"X-Error-Code": error.code} if error.code else {}
            headers = {**coded, "X-Error-Message": error.message}
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # names of the standard library

    def _route(self, raw: str, body: bytes) -> None:
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, raw)
            if found and self.command in method.split("|"):
                getattr(self, name)(
                    body, *(unquote(part) for part in found.groups() if part is not None)
                )
                return
        raise RefusedError(404, "", f"no such endpoint: {self.command} {raw}")

    # ---- answers

    def _json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None
    ) -> None:
        fault = self.fault or Fault("", 0)
        if fault.lose:
            self._close()
            return
        if fault.flip is not None and fault.flip < len(body):
            body = body[: fault.flip] + bytes([body[fault.flip] ^ 1]) + body[fault.flip + 1 :]
        if fault.cut is not None:
            body = body[: -fault.cut]
        told = {
            "Content-Length": str(len(body) if length is None else length),
            **headers,
            **fault.headers,
        }
        self.send_response(status)
        for name, value in told.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(len(body), *(n for n in (fault.drop, fault.stall) if n is not None), len(body))
        step = fault.rate or 1 << 20
        for low in range(0, end, step):
            self.wfile.write(body[low : min(end, low + step)])
            self.wfile.flush()
            if fault.rate:
                self.hub.wait(1)
        if fault.stall is not None:
            self.hub.wait(600)
        if end < len(body):
            self._close()

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    # ---- who asks, and for what

    def _account(self) -> Account | None:
        given = self.headers.get("Authorization")
        if not given:
            return None
        account = self.hub.accounts.get(given.removeprefix("Bearer "))
        if account is None:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return account

    def _repo(self, name: str, write: bool = False) -> Repo:
        account = self._account()
        repo = self.hub.repos.get(name)
        own = account is not None and name.partition("/")[0] in (account.name, *account.orgs)
        if repo is None or (repo.private and not own):
            raise RefusedError(404 if account else 401, "RepoNotFound", "Repository not found")
        if write and not (own and account and account.write):
            raise RefusedError(
                403 if account else 401, "", "You have no right to write to this repository"
            )
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        found = repo.resolve(revision)
        if found is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _entry(self, path: str, file: Stored) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(file.data), "oid": git_sha1(file.data)}
        lfs = {"oid": file.oid, "size": len(file.data), "pointerSize": 130}
        return entry | ({"lfs": lfs} if file.large else {})

    # ---- routes

    def whoami(self, body: bytes) -> None:
        account = self._account()
        if account is None:
            raise RefusedError(401, "", "Invalid username or password.")
        orgs = [{"name": name, "type": "org"} for name in account.orgs]
        role = "write" if account.write else "read"
        token = {"accessToken": {"role": role, "displayName": "test"}}
        self._json({"name": account.name, "type": "user", "orgs": orgs, "auth": token})

    def create(self, body: bytes) -> None:
        asked, account = json.loads(body), self._account()
        if account is None:
            raise RefusedError(401, "", "Invalid username or password.")
        owner = asked.get("organization") or account.name
        name = f"{owner}/{asked['name']}"
        if owner not in (account.name, *account.orgs) or not account.write:
            raise RefusedError(
                403,
                "",
                f"You don't have the rights to create a model under the namespace {owner!r}",
            )
        told = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            self._json(told | {"error": "You already created this model repo"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[name] = Repo(name, private)
        repo.commit(
            "initial commit", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)}
        )
        self._json(told)

    def delete(self, body: bytes) -> None:
        asked, account = json.loads(body), self._account()
        name = f"{asked.get('organization') or (account.name if account else '')}/{asked['name']}"
        self._repo(name, write=True)
        del self.hub.repos[name]
        self._json({})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit = self._commit(repo, revision)
        files = repo.commits[commit].files
        siblings = []
        for path, file in files.items():
            known = {"rfilename": path}
            if self.query.get("blobs"):
                known |= {"size": len(file.data), "blobId": git_sha1(file.data)}  # type: ignore[dict-item]
                if file.large:
                    known["lfs"] = {"sha256": file.oid, "size": len(file.data), "pointerSize": 130}  # type: ignore[assignment]
            siblings.append(known)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        told = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": siblings,
            "private": repo.private,
        }
        told |= {"gated": "auto" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0}
        self._json(told | {"lastModified": now, "createdAt": now})

    def tree(self, body: bytes, name: str, revision: str, under: str = "") -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)].files
        under = under.strip("/")
        inside = {
            path: file for path, file in files.items() if not under or path.startswith(f"{under}/")
        }
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        found: dict[str, dict[str, Any]] = {}
        for path, file in inside.items():
            rest = path[len(under) + 1 :] if under else path
            if "/" in rest:
                folder = f"{under}/{rest.partition('/')[0]}".strip("/")
                found[folder] = {
                    "type": "directory",
                    "path": folder,
                    "oid": git_sha1(folder.encode()),
                    "size": 0,
                }
            if deep or "/" not in rest:
                found[path] = self._entry(path, file)
        begin = int(self.query.get("cursor", ["0"])[0])
        page = list(found.values())[begin : begin + self.hub.page]
        more = {k: v[0] for k, v in self.query.items()} | {"cursor": str(begin + self.hub.page)}
        next_ = f'<{self.hub.endpoint}{self.path.partition("?")[0]}?{urlencode(more)}>; rel="next"'
        self._json(page, headers={"Link": next_} if begin + self.hub.page < len(found) else {})

    def paths_info(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)].files
        asked = parse_qs(body.decode())
        self._json(
            [self._entry(path, files[path]) for path in asked.get("paths", []) if path in files]
        )

    def refs(self, body: bytes, name: str) -> None:
        repo = self._repo(name)

        def told(kind: str, table: Mapping[str, str]) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid}
                for n, oid in table.items()
            ]

        self._json(
            {
                "branches": told("heads", repo.branches),
                "tags": told("tags", repo.tags),
                "converts": [],
            }
        )

    def history(self, body: bytes, name: str, revision: str) -> None:
        repo, told = self._repo(name), []
        oid: str | None = self._commit(repo, revision)
        while oid:
            commit = repo.commits[oid]
            date = "2026-01-01T00:00:00.000Z"
            told.append(
                {
                    "id": oid,
                    "title": commit.title,
                    "message": "",
                    "date": date,
                    "authors": [{"user": "ann"}],
                }
            )
            oid = commit.parent
        self._json(told)

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        head = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        license_ = head and re.search(r"^license: *(\S+)", head[1], re.MULTILINE)
        warnings = [] if license_ else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": warnings})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        files = repo.commits[self._commit(repo, revision)].files
        told = []
        for asked in json.loads(body)["files"]:
            large = asked["path"].endswith(LARGE)
            known = {
                "path": asked["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            there = files.get(asked["path"])
            told.append(known | ({"oid": there.oid} if there else {}))
        self._json({"files": told})

    def batch(self, body: bytes, name: str) -> None:
        self._repo(name, write=True)
        told = []
        for asked in json.loads(body)["objects"]:
            item = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                place = f"{self.hub.storage}/upload/{asked['oid']}"
                put: dict[str, Any] = {"href": place}
                if asked["size"] > self.hub.part_size:
                    count = -(-asked["size"] // self.hub.part_size)
                    urls = {f"{i:05d}": f"{place}/{i}" for i in range(1, count + 1)}
                    put["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/verify"}
                item["actions"] = {"upload": put, "verify": verify}
            told.append(item)
        self._json({"transfer": "basic", "objects": told})

    def put(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise RefusedError(400, "", "the token was sent to the storage")
        if sha256(body) != oid:
            raise RefusedError(400, "", "the content does not match the oid")
        self.hub.blobs[oid] = body
        self._json({})

    def put_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = body
        self._json({}, headers={"ETag": f'"{sha256(body)}"'})

    def complete(self, body: bytes, oid: str) -> None:
        data = b""
        for part in json.loads(body)["parts"]:
            piece = self.hub.parts.pop((oid, part["partNumber"]))
            if part["etag"].strip('"') != sha256(piece):
                raise RefusedError(400, "", "a part is another one than was sent")
            data += piece
        self.put(data, oid)

    def verify(self, body: bytes, name: str) -> None:
        asked = json.loads(body)
        self._repo(name, write=True)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "", "no such object")
        self._json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        with self.hub.lock:
            self._commit_lines(body, name, revision)

    def _commit_lines(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        if revision not in repo.branches:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head, title = repo.branches[revision], ""
        files = dict(repo.commits[head].files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise RefusedError(
                        412, "", "A commit has happened since. Please refresh and try again."
                    )
            elif key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise RefusedError(400, "", f"lfs object {value['oid']} is not uploaded")
                files[value["path"]] = Stored(self.hub.blobs[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise RefusedError(400, "", f"unknown operation {key}")
        oid = repo.commit(title, files, revision)
        self._json(
            {
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}",
                "commitOid": oid,
                "success": True,
            }
        )

    def tag(self, body: bytes, name: str, revision: str) -> None:
        repo, asked = self._repo(name, write=True), json.loads(body or b"{}")
        if self.command == "DELETE":
            del repo.tags[revision]
        elif asked["tag"] in repo.tags:
            raise RefusedError(409, "", "Tag reference exists already")
        else:
            repo.tags[asked["tag"]] = self._commit(repo, revision)
        self._json({})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repo, asked = self._repo(name, write=True), json.loads(body or b"{}")
        if self.command == "DELETE":
            del repo.branches[branch]
        elif branch in repo.branches:
            raise RefusedError(409, "", "Reference already exists")
        else:
            repo.branches[branch] = self._commit(repo, asked.get("startingPoint") or "main")
        self._json({})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        account = self._account()
        if repo.gated and not (account and account.name in repo.readers):
            raise RefusedError(
                403 if account else 401, "GatedRepo", f"Access to model {name} is restricted"
            )
        commit = self._commit(repo, revision)
        file = repo.commits[commit].files.get(path)
        here = {"X-Repo-Commit": commit}
        if file is None:
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                **here,
            }
            self._json({"error": "Entry not found"}, 404, headers)
            return
        headers = {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes", **here}
        if file.large:
            self.hub.blobs[file.oid] = file.data
            linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            place = {"Location": f"{self.hub.storage}/storage/{file.oid}/{quote(path)}"}
            self._send(302, b"", {**headers, **linked, **place})
            return
        self._ranged(file.data, headers)

    def stored(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise RefusedError(400, "", "the token was sent to the storage")
        if oid not in self.hub.blobs:
            raise RefusedError(404, "", "no such object")
        self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            length = len(data) if self.command == "HEAD" else None
            self._send(200, data, headers, length)
            return
        with self.hub.lock:
            self.hub.ranges.append(asked[0])
        low = int(asked[1])
        high = min(int(asked[2] or len(data) - 1), len(data) - 1)
        if low >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(
            206,
            data[low : high + 1],
            {**headers, "Content-Range": f"bytes {low}-{high}/{len(data)}"},
        )


_ID = r"([^/]+/[^/]+?)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{_ID}", "info"),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)(/.*)?", "tree"),
    ("POST", rf"/api/models/{_ID}/paths-info/([^/]+)", "paths_info"),
    ("GET", rf"/api/models/{_ID}/refs", "refs"),
    ("GET", rf"/api/models/{_ID}/commits/([^/]+)", "history"),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", "commit"),
    ("POST|DELETE", rf"/api/models/{_ID}/tag/([^/]+)", "tag"),
    ("POST|DELETE", rf"/api/models/{_ID}/branch/([^/]+)", "branch"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"/{_ID}\.git/verify", "verify"),
    ("PUT", r"/upload/([0-9a-f]{64})", "put"),
    ("PUT", r"/upload/([0-9a-f]{64})/(\d+)", "put_part"),
    ("POST", r"/upload/([0-9a-f]{64})", "complete"),
    ("GET|HEAD", r"/storage/([0-9a-f]{64})/.*", "stored"),
    ("GET|HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
