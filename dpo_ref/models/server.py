"""A server that speaks OpenAI's completions API, and what to make of its failures.

What passes by itself (a full queue, a restart behind a proxy, a cut connection) is retried with exponential back-off
and jitter, or after the time the server asks for.
"""

import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

KEY = "DPO_REF_SERVED_KEY"  # environment variable; the only place a key is read from
SHOWN = 300  # characters of a server's own message


class Refused(Exception):
    """The server answered that it will not do this; asking again would not help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Unavailable(Exception):
    """No usable answer after all retries; the message is the last reason."""


class _Passing(Exception):
    """A failure that may pass; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(HTTPRedirectHandler):
    """A redirected POST becomes a GET, and its headers, the key among them, would go to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """No further request: the answer is an error like any other."""


_OPENER = build_opener(_NoRedirect)


def check_url(url: str, group: str) -> str:
    """`url` without a slash at its end. Raises ValueError for what is no base address, and for a key inside it."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(f"{group}.url must hold no user, password or query; a key goes into {KEY}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{group}.url={url} must be the base of a server, such as http://host:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"{group}.url={url} must be the base, without /completions")
    return url.rstrip("/")


def _without_key(text: str) -> str:
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text


def _message(body: bytes) -> str:
    """What a server says in an error: vLLM and OpenAI nest it under `error`, older vLLM does not."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    inner = found.get("error", found) if isinstance(found, Mapping) else None
    said = inner.get("message", text) if isinstance(inner, Mapping) else text
    return _without_key(" ".join(str(said).split()))[:SHOWN]


def _body(error: HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, HTTPException):
        return b""


@dataclass(frozen=True, slots=True)
class Server:
    """Asks `url`/completions for completions by `model`. A request is tried 1 + `retries` times and given `timeout`
    seconds without a byte from the server. `group` is whose options messages name: reference or generation; `remedy`
    is what to do where the server has no such model."""

    url: str
    model: str
    retries: int
    timeout: float
    group: str
    remedy: str

    def completed(self, options: Mapping[str, Any]) -> Any:
        """The answer to one request, as JSON.

        Raises `Refused` and `Unavailable`, and ValueError for a key or model that the server does not know.
        """
        return self._asked("/completions", {"model": self.model, **options})

    def models(self) -> list[str] | None:
        """The names under which models are served; None where the server does not say. Raises `Unavailable`."""
        try:
            return [str(entry["id"]) for entry in self._asked("/models", None)["data"]]
        except (Refused, LookupError, TypeError):
            return None

    def _asked(self, path: str, content: Mapping[str, Any] | None) -> Any:
        """The server's answer as JSON, whatever passing failures come before it."""
        for attempt in range(self.retries + 1):
            try:
                return self._tried(path, content)
            except _Passing as failure:
                if attempt == self.retries:
                    raise Unavailable(str(failure)) from None
                time.sleep(pause(attempt, failure.wait))
        raise AssertionError("every attempt returns or raises")

    def _tried(self, path: str, content: Mapping[str, Any] | None) -> Any:
        try:
            body = self._sent(path, content)
        except HTTPError as error:
            raise self._failure(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _Passing(str(reason) or type(reason).__name__) from None
        try:
            return json.loads(body)
        except ValueError:
            start = _without_key(body[:80].decode(errors="replace"))
            raise _Passing(f"the answer is not JSON; it begins with {start!r}") from None

    def _sent(self, path: str, content: Mapping[str, Any] | None) -> bytes:
        data = None if content is None else json.dumps(content).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()

    def _failure(self, error: HTTPError) -> Exception:
        """What an HTTP error means."""
        status, body = error.code, _body(error)
        if status in RETRIED:
            wait = seconds_asked(error.headers.get("Retry-After"))
            return _Passing(f"{status}: {_message(body) or error.reason}", wait)
        if status in (401, 403):  # the body may repeat the key
            had = "does not accept the key in" if os.environ.get(KEY) else "wants a key: set"
            return ValueError(f"the server at {self.url} ({status}) {had} {KEY}")
        if status == 404 and error.url.endswith("/completions"):
            return ValueError(self._not_found())
        return Refused(status, _message(body) or str(error.reason))

    def _not_found(self) -> str:
        try:
            served = [entry["id"] for entry in self._tried("/models", None)["data"]]
        except (_Passing, Refused, ValueError, LookupError, TypeError):
            return (
                f"{self.url}/completions was not found (404): {self.group}.url must be the base of a completions "
                f"server, such as http://host:8000/v1, and {self.model} a model that it serves"
            )
        return (
            f"the server at {self.url} has no model {self.model}; it serves {', '.join(map(str, served))}: "
            f"{self.remedy}"
        )


# --- how long to wait before a server is asked again


RETRIED = {408, 429, 500, 502, 503, 504}  # statuses that pass by themselves
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


def pause(attempt: int, asked: float = 0.0) -> float:
    """Seconds to wait after the 0-based `attempt` failed, at least the `asked` ones."""
    return max(asked, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.5))
