"""Servers within a time: a dead network costs seconds and one line, not minutes and a page of
retries.

    with network.bounded() as contact:
        ...                     # whatever asks the Hub's client or torch.hub, however deep inside
        contact.failure         # what went wrong with a server, in words, or None

Inside, each request has `patience()` seconds until its answer begins, a server that was dead once
is not asked again, and none is asked again and again. A download that has begun goes on for as long
as bytes come. Only the calling context is bounded: other threads that share the client are served
as before, and afterwards nothing is left behind.
"""

import contextvars
import functools
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import first_line

ANSWER = 5.0  # seconds for a server to begin its answer
STALL = 30.0  # seconds without a byte that end a download whose client gives none itself

# statuses after which the Hub's client would ask five times more
_BUSY = (408, 429, 500, 502, 503, 504)


@dataclass
class Contact:
    """What came of the requests of one call."""

    failure: str | None = None  # the last one, told as "HOST did not answer within 5 seconds"
    dead: dict[str, str] = field(default_factory=dict)  # servers that could not be reached, and why


_contact: contextvars.ContextVar[Contact | None] = contextvars.ContextVar("contact", default=None)
_lock = threading.Lock()
# by identity, what has a watched function, and how many calls are inside
_watched: dict[int, int] = {}


@contextmanager
def bounded() -> Iterator[Contact]:
    """Bound what the Hub's client and torch.hub do inside; in a block that is bounded already,
    nothing changes.

    A request that fails raises what the client raises in offline mode, so that it takes what is in
    its cache.
    """
    outer = _contact.get()
    if outer is not None:
        yield outer
        return
    import torch.hub
    from huggingface_hub.utils import get_session

    contact = Contact()
    with ExitStack() as stack:
        try:
            stack.enter_context(_watching(get_session(), "send", _send))
        except (ImportError, ValueError) as error:
            # no client for HTTPS_PROXY; what is in the cache needs none
            contact.failure = f"the proxy that is set cannot be used ({_proxies()}): {error}"
        stack.enter_context(_watching(torch.hub, "urlopen", _urlopen))
        token = _contact.set(contact)
        try:
            yield contact
        finally:
            _contact.reset(token)


def failure() -> str | None:
    """What went wrong with a server inside of this `bounded` block; None where nothing did, and
    outside.
    """
    contact = _contact.get()
    return contact.failure if contact else None


def unreachable() -> bool:
    """Whether a server could not be reached inside of this `bounded` block: asking again is of no
    use.
    """
    contact = _contact.get()
    return contact is not None and bool(contact.dead)


def patience() -> float:
    """Seconds for a server to begin its answer: HF_HUB_ETAG_TIMEOUT where it is set, for slow
    lines, or 5.
    """
    from huggingface_hub import constants

    given = constants.HF_HUB_ETAG_TIMEOUT
    return ANSWER if given == constants.DEFAULT_ETAG_TIMEOUT else float(given)


@contextmanager
def _watching(owner: Any, name: str, watch: Callable[..., Any]) -> Iterator[None]:
    """watch(function, ...) in place of owner's function; several threads may be inside, and the
    last one tidies up.
    """
    key, own = id(owner), name in vars(owner)
    with _lock:
        if not _watched.get(key):
            setattr(owner, name, functools.partial(watch, getattr(owner, name)))
        _watched[key] = _watched.get(key, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _watched[key] -= 1
            if not _watched[key]:
                del _watched[key]
                function = getattr(owner, name).args[0]
                if own or not hasattr(type(owner), name):
                    setattr(owner, name, function)
                else:
                    delattr(owner, name)  # the class has it


def _send(send: Callable[..., Any], request: Any, *, stream: bool = False, **options: Any) -> Any:
    """httpx.Client.send."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    contact = _contact.get()
    if contact is None:
        return send(request, stream=stream, **options)
    server = request.url.netloc.decode(errors="replace")
    _refuse_dead(contact, server)
    seconds = patience()
    asked = request.extensions.get("timeout") or {}
    limits = {key: asked.get(key) or STALL for key in ("read", "write", "pool")}
    request.extensions["timeout"] = limits | {"connect": seconds}
    try:
        response = _in_time(seconds, functools.partial(send, request, stream=True, **options))
        if not stream:
            response.read()
    except OfflineModeIsEnabled:
        contact.failure = (
            "offline mode is on (HF_HUB_OFFLINE); unset it once to fetch what is missing"
        )
        raise
    except (TimeoutError, httpx.TransportError) as error:
        contact.failure = _told(error, str(request.url), seconds)
        if isinstance(
            error, TimeoutError | httpx.TimeoutException | httpx.ConnectError | httpx.ProxyError
        ):
            contact.dead[server] = contact.failure
        raise OfflineModeIsEnabled(contact.failure) from error
    if response.status_code in _BUSY:
        response.close()
        contact.failure = (
            f"{server} answered {response.status_code} {response.reason_phrase}".rstrip()
        )
        raise OfflineModeIsEnabled(contact.failure)
    # Without it the client uses plain HTTP, whose stalls end and whose downloads resume; xet's have
    # no such bounds.
    response.headers.pop("X-Xet-Hash", None)
    return response


def _urlopen(urlopen: Callable[..., Any], request: Any, *arguments: Any, **options: Any) -> Any:
    """urllib.request.urlopen, of weights that have a bare address."""
    contact = _contact.get()
    if contact is None:
        return urlopen(request, *arguments, **options)
    url = request.full_url if isinstance(request, urllib.request.Request) else str(request)
    server = urllib.parse.urlsplit(url).netloc
    _refuse_dead(contact, server)
    seconds = patience()
    try:
        return _in_time(
            seconds,
            functools.partial(urlopen, request, *arguments, **{"timeout": STALL, **options}),
        )
    except urllib.error.HTTPError as error:
        contact.failure = f"{server} answered {error.code} {error.reason}"
        raise
    except (OSError, ValueError) as error:
        contact.failure = contact.dead[server] = _told(error, url, seconds)
        raise urllib.error.URLError(contact.failure) from error


def _refuse_dead(contact: Contact, server: str) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if server in contact.dead:
        contact.failure = contact.dead[server]
        raise OfflineModeIsEnabled(contact.failure)


def _in_time(seconds: float, work: Callable[[], Any]) -> Any:
    """What work() returns or raises. Raises: TimeoutError after so many seconds.

    In a thread, which is left behind: neither the look-up of a name nor a server with many
    addresses has an end of its own, and each of the addresses gets all the seconds.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _told(error: BaseException, url: str, seconds: float) -> str:
    """What is wrong with a server or the way to it, in words."""
    import socket
    import ssl

    place = urllib.parse.urlsplit(url)
    through = _through(place)
    causes = [error]
    while (
        next_ := causes[-1].__cause__
        or causes[-1].__context__
        or getattr(causes[-1], "reason", None)
    ) is not None:
        if not isinstance(next_, BaseException) or next_ in causes:
            break
        causes.append(next_)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return (
                f"the name {place.hostname} cannot be looked "
                f"up{through.replace('through', 'or that of')}"
            )
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", "") or cause.reason or str(cause)
            return f"no secure connection to {place.netloc}{through}: {reason}"
        if isinstance(cause, ConnectionRefusedError):
            return f"{place.netloc} refuses connections{through}"
    if any(
        isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in causes
    ):
        return f"{place.netloc} did not answer within {seconds:g} seconds{through}"
    return f"{place.netloc} broke off{through}: {first_line(error)}"


def _through(place: urllib.parse.SplitResult) -> str:
    proxies = urllib.request.getproxies()
    proxy = proxies.get(place.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(place.hostname or ""):
        return ""
    return f" (through the proxy {_nameless(proxy)})"


def _proxies() -> str:
    found = {
        f"{scheme}_proxy": proxy
        for scheme, proxy in urllib.request.getproxies().items()
        if scheme != "no"
    }
    return ", ".join(f"{name.upper()}={_nameless(proxy)}" for name, proxy in found.items())


def _nameless(proxy: str) -> str:
    """Without the user's name and password, which some proxies are given."""
    return proxy.rpartition("@")[2] if "@" in proxy else proxy
