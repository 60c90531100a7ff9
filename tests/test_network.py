"""A network that is dead in any way costs seconds and one line; and whoever else uses the client
notices nothing.

Over loopback alone: sockets that refuse, accept and say nothing, or drop what comes; small servers
that answer something else than a Hub does; a Hub. The seconds are fewer here than a user's 5. What
is counted is the requests: a server that is dead is asked once, where the Hub's client asks it
again and again, each time for longer.
"""

import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.hub
from hub_server import Hub
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import close_session, get_session, httpx
from PIL import Image

from xzoo import network
from xzoo.cli import main
from xzoo.errors import ModelError
from xzoo.hub import save
from xzoo.models import create_model

TIMM = "resnet10t.c3_in1k"  # of timm's list, with weights on the Hub


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token, proxy or cache of this machine; a client made anew."""
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        *(f"{s}_{p}" for s in ("HTTP", "HTTPS", "ALL") for p in ("PROXY",)),
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(network, "ANSWER", 1.0)
    monkeypatch.setenv("XZOO_HOME", str(tmp_path / "home"))
    close_session()
    yield
    close_session()


class Answer(http.server.BaseHTTPRequestHandler):
    """The same page for everything, as the sign-in page of a network has it."""

    status = 200

    def do_GET(self) -> None:
        page = b"<html>Welcome to the hotel</html>"
        self.send_response(self.status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as started:
        started.daemon_threads = True
        threading.Thread(target=started.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield started.server_port
        finally:
            started.shutdown()


def listening(stack: ExitStack, backlog: int) -> int:
    deaf = stack.enter_context(socket.socket())
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(backlog)
    return deaf.getsockname()[1]


def dead(kind: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the Hub one that is dead in that way."""
    scheme, host, port = "http", "127.0.0.1", 1
    if kind == "accepts and says nothing":
        port = listening(stack, 20)
    elif kind == "drops packets":  # once as many as the queue holds are waiting in it
        port = listening(stack, 0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
    elif kind == "no such name":
        host = "nowhere.invalid"
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    elif kind == "names are looked up for ever":
        host = "nowhere.invalid"
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: threading.Event().wait(30))
    elif kind == "another protocol":
        scheme, port = "https", stack.enter_context(server(Answer))
    elif kind == "sign-in page":
        port = stack.enter_context(server(Answer))
    elif kind == "busy":
        port = stack.enter_context(server(type("Busy", (Answer,), {"status": 503})))
    elif kind == "dead proxy":
        host, port = "hub.invalid", 80
        monkeypatch.setenv("HTTP_PROXY", "http://ann:secret@127.0.0.1:1")
    elif kind == "no proxy at all":
        scheme, host, port = "https", "hub.invalid", 443
        monkeypatch.setenv("HTTPS_PROXY", "ftp://127.0.0.1:1")
    point_to(f"{scheme}://{host}:{port}", monkeypatch)


def unknown(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


KINDS = {
    "refuses": "127.0.0.1:1 refuses connections; check the connection",
    "accepts and says nothing": "did not answer within 1 seconds; check the connection",
    "drops packets": "did not answer within 1 seconds; check the connection",
    "no such name": "the name nowhere.invalid cannot be looked up",
    "names are looked up for ever": "did not answer within 1 seconds",
    "another protocol": "no secure connection to 127.0.0.1",
    "sign-in page": "does not answer as the Hub does; is it the sign-in page of a network?",
    "busy": "answered 503 Service Unavailable",
    "dead proxy": r"\(through the proxy 127.0.0.1:1\)",
    "no proxy at all": "the proxy that is set cannot be used",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [TIMM, "hf-hub:lab/net"])
def test_a_dead_network_is_one_line_in_seconds(name, kind, monkeypatch, capsys, asked):
    with ExitStack() as stack:
        dead(kind, stack, monkeypatch)
        with pytest.raises(ModelError, match=KINDS[kind]) as caught:
            create_model(name, pretrained=True)
    # Who answers at all is asked for each name that the weights may have.
    most = {"sign-in page": 2, "busy": 2, "no proxy at all": 0}.get(kind, 1)
    assert set(asked) <= {1.0} and len(asked) <= most
    told = str(caught.value)
    assert "\n" not in told and len(told) < 400 and "secret" not in told
    assert "Retrying" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["classify", "inspect", "finetune"])
def test_every_command_that_asks_the_hub(
    command, monkeypatch, capsys, make_folder, tmp_path, asked
):
    photos = make_folder(each=3)
    arguments = {
        "classify": ["classify", TIMM, str(photos)],
        "inspect": ["inspect", "hf-hub:lab/net"],
        "finetune": [
            "finetune",
            str(photos),
            "--model",
            TIMM,
            "--out",
            str(tmp_path / "run"),
            "--device",
            "cpu",
        ],
    }
    with ExitStack() as stack:
        dead("accepts and says nothing", stack, monkeypatch)
        code = main(arguments[command])
    assert asked == [1.0]
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith("xzoo: error: cannot get ") and "did not answer" in last


def test_offline_mode_is_called_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for arguments in (["inspect", "hf-hub:lab/net"], ["classify", TIMM, str(tmp_path / "a.png")]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "offline mode is on (HF_HUB_OFFLINE)" in told and told.count("\n") == 1
        assert "connection" not in told


def test_weights_at_a_bare_address(monkeypatch, tmp_path, asked):
    """As some twenty models of timm have them: torch.hub gives a server no time at all."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    with ExitStack() as stack:
        address = f"http://127.0.0.1:{listening(stack, 20)}/resnet.pth"
        sources = {"url": address, "hf_hub_id": None}
        with pytest.raises(
            ModelError, match="did not answer within 1 seconds; check the connection"
        ):
            create_model("resnet10t", pretrained=True, pretrained_cfg_overlay=sources)
    assert asked == [1.0]


# ---- a Hub that answers


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as started:
        point_to(started.endpoint, monkeypatch)
        yield started


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(
        create_model("x_mobilenet050_c4", num_classes=3),
        folder,
        ["ant", "bee", "cow"],
        {"input_size": (3, 32, 32)},
    )
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_fetched_before_serves_a_dead_network(hub, net, monkeypatch):
    hub.add("lab/net", net)
    first = create_model("hf-hub:lab/net", pretrained=True).state_dict()
    for kind in ("refuses", "accepts and says nothing", "busy", "dead proxy"):
        with ExitStack() as stack, monkeypatch.context() as patch:
            dead(kind, stack, patch)
            close_session()
            again = create_model("hf-hub:lab/net", pretrained=True).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first), kind
        close_session()


def test_names_and_tokens_that_are_wrong(hub, net, monkeypatch):
    hub.account("secret", "ann")

    def refused(name: str, told: str) -> None:
        with pytest.raises(ModelError, match=told) as caught:
            create_model(name, pretrained=True)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    refused("hf-hub:lab/nothing", "has no repository lab/nothing, or it is private")
    refused(
        "hf-hub:lab/a b", "'lab/a b' is not the name of a repository of the Hub; give OWNER/NAME"
    )
    refused("hf-hub:", "hf-hub: is not a model that can be built")
    refused("hf-hub:lab/a@b@c", "should only contain one @")
    hub.add("lab/net", net)
    refused("hf-hub:lab/net@v9", "lab/net has no revision v9")
    hub.add("lab/photos", {"a.txt": b"a"})
    refused("hf-hub:lab/photos", "lab/photos has no config.json")
    hub.add("lab/odd", {"config.json": b'["no", "model"]', "model.safetensors": b""})
    refused("hf-hub:lab/odd", "hf-hub:lab/odd is not a model that can be built")
    hub.add("lab/gated", net, gated=True)
    refused("hf-hub:lab/gated", "lab/gated is gated: accept its terms at")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("hf-hub:lab/net", "refused the token for lab/net; set another HF_TOKEN, or none")
    monkeypatch.setenv("HF_TOKEN", "\u043a\u043b\u044e\u0447")
    refused("hf-hub:lab/net", "the token of the Hub is not plain ASCII")
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    assert create_model("hf-hub:lab/net", pretrained=True).num_classes == 3


def test_a_cache_that_is_damaged_or_cannot_be_written(hub, net, tmp_path):
    hub.add("lab/net", net)
    create_model("hf-hub:lab/net", pretrained=True)
    (blob,) = (
        path for path in (tmp_path / "cache").rglob("blobs/*") if path.stat().st_size > 100_000
    )
    blob.write_bytes(blob.read_bytes()[:50_000])
    with pytest.raises(
        ModelError,
        match="the copy of lab/net in .*cache is damaged .*; remove it there and try again",
    ):
        create_model("hf-hub:lab/net", pretrained=True)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        ModelError, match="cannot keep lab/net in .*cache.*: (Not a directory|File exists)"
    ):
        create_model("hf-hub:lab/net", pretrained=True)


def test_files_come_by_plain_http(hub, net):
    """xet has servers of its own, and no bound on the time that they take."""
    hub.add("lab/net", net)
    xet = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.endpoint}/api/nothing"}
    hub.fault("HEAD .*safetensors", times=9, headers=xet)
    assert create_model("hf-hub:lab/net", pretrained=True).num_classes == 3


# ---- nobody else notices


def test_the_client_is_as_it_was_and_other_threads_are_not_bounded(hub, net):
    hub.add("lab/net", net)
    before, seen = torch.hub.urlopen, {}

    def other(address: str) -> None:
        try:
            get_session().get(address, timeout=3.0)
        except Exception as error:
            seen[address] = error

    with ExitStack() as stack:
        address = f"http://127.0.0.1:{listening(stack, 20)}/"
        with network.bounded() as contact:
            with network.bounded() as inner:
                assert inner is contact
            thread = threading.Thread(target=other, args=(address,))
            thread.start()
            with pytest.raises(OfflineModeIsEnabled):
                get_session().get(address)
            thread.join()
        assert contact.failure is not None and network.failure() is None
        assert isinstance(seen[address], httpx.ReadTimeout)  # its own, after its own seconds
    assert "send" not in vars(get_session()) and torch.hub.urlopen is before
    assert Path(hf_hub_download("lab/net", "config.json")).is_file()
