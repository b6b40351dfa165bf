"""Servers that are asked over HTTP, and what to make of their failures. Every request to one goes through `Server`.

What passes by itself (a full queue, a restart behind a proxy, a cut connection, an answer that is none) is retried
with exponential back-off and jitter, or after the time the server asks for. A key is read from an environment variable
when a question is sent, goes to the stated server alone, and is cut out of everything that comes back. Proxies and
SSL_CERT_FILE are taken from the environment; other certificates are certifi's.

An answer is limited in time and in bytes where they are read, headers included: however slowly it drips, whatever it
unpacks to. One over the limits is none.
"""

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from threading import Event, Lock, local
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import httpx2

from dpo_ref.tracking.redaction import hide

KEY = "DPO_REF_SERVED_KEY"  # environment variable with the key for models that are sampled from or scored with
SHOWN = 300  # characters of a server's own message


class ServerRefused(Exception):
    """The server answered that it will not do this; asking again would not help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class ServerUnavailable(Exception):
    """No usable answer after all retries; the message is the last reason."""


class _Passing(Exception):
    """A failure that may pass; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def check_url(url: str, option: str, key_goes: str = f"a key goes into {KEY}") -> str:
    """`url` without a slash at its end. Raises ValueError for what is no base address, and for a key inside it."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(f"{option} must hold no user, password or query; {key_goes}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{option}={url} must be the base of a server, such as http://host:8000/v1")
    for path in ("/chat/completions", "/completions"):
        if parts.path.rstrip("/").endswith(path):
            raise ValueError(f"{option}={url} must be the base, without {path}")
    return url.rstrip("/")


# --- one request, as often as it takes


KEPT = 1.0  # seconds that an idle connection is kept; servers keep theirs longer, so that none ends under a question
_OPENING = Lock()


@cache
def _client(url: str, timeout: float) -> httpx2.Client:
    """The connections to a server. They follow no redirect, where a POST becomes a GET, and keep no cookie, which
    would bind all questions to one machine behind a balancer."""
    for library in ("httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.WARNING)  # else lines for every question
    return httpx2.Client(
        base_url=url,
        headers={
            "Content-Type": "application/json",
            "User-Agent": "dpo_ref",  # some refuse a library's own name
            "Accept-Encoding": "identity",  # what is packed can unpack to anything
        },
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        timeout=timeout,
        limits=httpx2.Limits(keepalive_expiry=KEPT),
        follow_redirects=False,
    )


os.register_at_fork(after_in_child=_client.cache_clear)  # two processes would read each other's answers


# --- how long an answer may take, and how large it may be


WHOLE = 3  # times `timeout`: seconds for everything from the question to the answer's last byte
LARGEST, TIMES = 4 * 2**20, 100  # bytes of an answer: so many, and so many times those of the question
SLICE = 2**16  # bytes sent at once, between two looks at the clock


class _Budget(local):
    """What is left to the answer that this thread waits for."""

    end = 0.0
    seconds = 0.0
    size = 0
    largest = 0

    def begin(self, seconds: float, largest: int) -> None:
        self.end, self.seconds, self.size, self.largest = time.monotonic() + seconds, seconds, 0, largest

    def rest(self, timeout: float | None) -> float:
        """Seconds for one operation of the network."""
        rest = self.end - time.monotonic()
        if rest <= 0:
            raise httpcore2.ReadTimeout(f"the answer was not complete after {self.seconds:g} seconds")
        return rest if timeout is None else min(rest, timeout)

    def take(self, data: bytes) -> bytes:
        self.size += len(data)
        if self.size > self.largest:
            raise httpcore2.ReadError(f"the answer has more than {self.largest / 2**20:.0f} MiB")
        return data


_budget = _Budget()


def _watch(event: str, details: Mapping[str, Any]) -> None:
    """Hold every new connection to the budget of whoever uses it."""
    if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
        return
    stream: httpcore2.NetworkStream = details["return_value"]
    read, write = stream.read, stream.write

    def limited_read(max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return _budget.take(read(max_bytes, _budget.rest(timeout)))
        except httpcore2.ReadTimeout:
            _budget.rest(timeout)  # says so where it was the whole answer's time
            raise

    def limited_write(buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), SLICE):
            write(buffer[start : start + SLICE], _budget.rest(timeout))

    stream.read, stream.write = limited_read, limited_write


def _whole(answer: Any) -> Any:
    return answer


def _json(body: bytes) -> Any:
    """What `body` says; None where it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # thousands of brackets
        return None


def _text(body: bytes) -> str:
    return body.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Server:
    """A server at the base address `url`. A request is tried 1 + `retries` times and given `timeout` seconds without a
    byte from the server, `WHOLE` times that in all; none is tried again once `stop` is set. `key_variable` is the
    environment variable that may hold a key, `role` what messages call the server."""

    url: str
    timeout: float
    retries: int
    key_variable: str = KEY
    role: str = "server"
    stop: Event = field(default_factory=Event)

    def post(self, path: str, content: Mapping[str, Any], read: Callable[[Any], Any] = _whole) -> Any:
        """What `read` makes of the JSON that answers `content`. Where it raises ValueError, LookupError, TypeError,
        AttributeError or OverflowError the answer is none, and asked for again.

        Raises `ServerRefused` and `ServerUnavailable`, and ValueError for a key that the server does not accept.
        """
        return self._ask(path, json.dumps(content).encode(), read)

    def order(self, path: str, content: Mapping[str, Any]) -> None:
        """Have the server do something. What it says once that is done is for people, and need not be JSON. Raises as
        `post` does."""
        self._ask(path, json.dumps(content).encode(), _whole, _text)

    def models(self) -> list[str] | None:
        """The names under which models are served; None where the server does not say. Raises `ServerUnavailable`."""
        try:
            return [str(entry["id"]) for entry in self._ask("/models", None, _whole)["data"]]
        except (ServerRefused, LookupError, TypeError):
            return None

    def _ask(
        self, path: str, data: bytes | None, read: Callable[[Any], Any], parse: Callable[[bytes], Any] = _json
    ) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._read(self._sent(path, data), read, parse)
            except _Passing as failure:
                if attempt == self.retries or self.stop.wait(pause(attempt, failure.wait)):
                    raise ServerUnavailable(str(failure)) from None
        raise AssertionError("every attempt returns or raises")

    def _sent(self, path: str, data: bytes | None) -> httpx2.Response:
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with _OPENING:
                client = _client(self.url, self.timeout)
            _budget.begin(WHOLE * self.timeout, LARGEST + TIMES * len(data or b""))
            method, extensions = "GET" if data is None else "POST", {"trace": _watch}
            with client.stream(method, path, content=data, headers=headers, extensions=extensions) as response:
                encoding = response.headers.get("Content-Encoding", "identity")
                if encoding != "identity":
                    raise _Passing(f"the answer is packed ({encoding[:SHOWN]}), which was not asked for")
                response.read()
                return response
        except httpx2.LocalProtocolError:  # its message shows the key
            raise ValueError(f"the key in {self.key_variable} holds characters that cannot be sent") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            shown = self._without_key(str(error).encode()).decode()
            raise _Passing(shown or type(error).__name__) from None

    def _without_key(self, received: bytes) -> bytes:
        key = os.environ.get(self.key_variable)
        return hide(_spelled_out(received.decode("latin-1")), key).encode("latin-1") if key else received

    def _read(self, response: httpx2.Response, read: Callable[[Any], Any], parse: Callable[[bytes], Any]) -> Any:
        body = self._without_key(response.content)
        if not response.is_success:
            raise self._failure(response, body)
        beginning = repr(body[:80].decode(errors="replace"))
        if (answer := parse(body)) is None:
            raise _Passing(f"the answer is not JSON; it begins with {beginning}")
        try:
            return read(answer)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise _Passing(f"{error}; the answer begins with {beginning}") from None

    def _failure(self, response: httpx2.Response, body: bytes) -> Exception:
        """What an HTTP error means."""
        status, (message, code) = response.status_code, _complaint(body, response.reason_phrase)
        if status in (401, 403):
            verdict = "does not accept the key in" if os.environ.get(self.key_variable) else "wants a key: set"
            return ValueError(f"the {self.role} at {self.url} ({status}) {verdict} {self.key_variable}")
        if code == "insufficient_quota":
            return ServerUnavailable(f"{status}: {message}")
        if status in RETRIED or status > 504:
            return _Passing(f"{status}: {message}", seconds_asked(response.headers.get("Retry-After")))
        return ServerRefused(status, message)


def _spelled_out(body: str) -> str:
    """JSON with its letters as they are, where a server writes them as \\u0041."""
    return re.sub(r"\\(?:u00([2-7][0-9a-fA-F])|.)", _letter, body) if "\\u00" in body else body


def _letter(escape: re.Match[str]) -> str:
    letter = chr(int(escape[1], 16)) if escape[1] else ""
    return letter if letter.isalnum() or letter in tuple("-_.~+/=") else escape[0]


def _complaint(body: bytes, reason: str) -> tuple[str, Any]:
    """Message and code of an error: vLLM and OpenAI nest them under `error`, older vLLM does not."""
    content = _json(body)
    inner = content.get("error", content) if isinstance(content, Mapping) else None
    fields = inner if isinstance(inner, Mapping) else {}
    text = fields.get("message") or body.decode(errors="replace") or reason
    return " ".join(str(text).split())[:SHOWN], fields.get("code")


# --- how long to wait before a server is asked again


RETRIED = {408, 409, 429, 500, 502, 503, 504}  # statuses that pass by themselves, as do those above
FIRST_PAUSE = 1.0  # seconds before the first retry; doubles with every further one
LONGEST_PAUSE, LONGEST_ASKED = 60.0, 3600.0  # seconds; the latter for a server's Retry-After


def seconds_asked(header: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 if there is none."""
    for read in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        try:
            return min(LONGEST_ASKED, max(0.0, read(header or "0")))
        except ValueError:
            continue
    return 0.0


def pause(attempt: int, requested: float = 0.0) -> float:
    """Seconds to wait after the 0-based `attempt` failed, at least the `requested` ones."""
    return max(requested, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.5))


# --- a model that speaks OpenAI's completions API


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server gives completions of under a `name`. `group` is whose options messages name: reference or
    generation; `remedy` is what to do where the server has no such model."""

    server: Server
    name: str
    group: str
    remedy: str

    def complete(self, options: Mapping[str, Any]) -> Any:
        """The answer to one request, as JSON.

        Raises what `Server.post` raises, and ValueError for a model that the server does not know.
        """
        try:
            return self.server.post("/completions", {"model": self.name, **options})
        except ServerRefused as refusal:
            if refusal.status != 404:
                raise
            raise ValueError(self._not_found()) from None

    def _not_found(self) -> str:
        url = self.server.url
        try:
            served = replace(self.server, retries=0).models()
        except (ServerUnavailable, ValueError):
            served = None
        if served is None:
            return (
                f"{url}/completions was not found (404): {self.group}.url must be the base of a completions "
                f"server, such as http://host:8000/v1, and {self.name} a model that it serves"
            )
        return f"the server at {url} has no model {self.name}; it serves {', '.join(served)}: {self.remedy}"
