"""What a judge is asked and what it answers: every answer a judge ever gave lies in one SQLite file, stored the moment
it arrives, so that it is asked only what it has not been asked before.
"""

import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_ref.files.cache import in_use, release, unused
from dpo_ref.files.digests import Damaged, sealed, unsealed
from dpo_ref.files.writing import NotWritten, needing_room
from dpo_ref.models.server import ServerUnavailable
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Message, Progress, digest

# --- one request to a judge, and what is kept of its answer


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question. `parameters` are everything beside the messages that determines the answer, the model's name
    first of all."""

    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of model, parameters and full prompt."""
        return digest([self.messages, dict(self.parameters)])


@dataclass(frozen=True, slots=True)
class JudgeAnswer:
    """What a judge wrote. `candidates` are the likeliest first tokens with their log-probs in nats, None where none
    were asked for."""

    text: str
    candidates: tuple[tuple[str, float], ...] | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None


class JudgeRefused(Exception):
    """The judge will not answer this question, however often it is asked; the message is its reason."""


Store = Callable[[JudgeRequest, JudgeAnswer | JudgeRefused], None]
# Asks all requests, hands every outcome to the store the moment it arrives, and yields the request then. Raises
# ServerUnavailable when the judge is lost.
Asker = Callable[[Sequence[JudgeRequest], Store], Iterator[JudgeRequest]]


# --- every answer a judge ever gave


FILE = "judge_answers.sqlite"
WAIT = 60.0  # seconds for another process's write
AT_ONCE = 500  # keys in one query
TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, stored REAL NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID"""


class AnswerCache:
    """Answers by the digest of what was asked. Threads and processes may use the same file; a power cut loses at most
    the last answers, never the file (write-ahead log). Of a damaged file what is whole is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._use = path.with_suffix(".lock")  # of the file itself a closed handle would end SQLite's own locks
        with needing_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._use.touch()
        try:
            if path.exists() and (damage := _damage(path)) is not None:
                with unused(self._use) as alone:
                    _mend(path, damage, alone)
            in_use(self._use)
            with _needing_room(path):
                self._connection = _opened(path)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} cannot be opened: {error}") from error

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        release(self._use)

    def store(self, request: JudgeRequest, answer: JudgeAnswer) -> None:
        """Keep an answer; the first one to a question stays."""
        row = (request.key, str(request.parameters.get("model")), time.time(), json.dumps(sealed(asdict(answer))))
        with self._lock, _needing_room(self.path):
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)

    def known(self, requests: Iterable[JudgeRequest]) -> dict[str, JudgeAnswer]:
        """The stored answers to `requests`, by their keys; damaged ones are deleted."""
        keys = list(dict.fromkeys(request.key for request in requests))
        answers: dict[str, JudgeAnswer] = {}
        damages: dict[str, str] = {}
        for start in range(0, len(keys), AT_ONCE):
            batch = keys[start : start + AT_ONCE]
            query = f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(batch))})"
            with self._lock:
                rows = self._connection.execute(query, batch).fetchall()
            for key, text in rows:
                try:
                    answers[key] = _answer(text, f"an answer in {self.path}")
                except Damaged as damage:
                    damages[key] = damage.what
        if damages:
            say(f"{next(iter(damages.values()))}: {len(damages)} questions are asked again")
            self._forget(damages)
        return answers

    def _forget(self, keys: Iterable[str]) -> None:
        with self._lock:
            self._connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])


def _answer(text: str, what: str) -> JudgeAnswer:
    remedy = "ask the question again"
    row = unsealed(text, what, remedy)
    try:
        candidates = row.pop("candidates")
        tokens = None if candidates is None else tuple((token, logp) for token, logp in candidates)
        return JudgeAnswer(**row, candidates=tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{what} is damaged: {error}", remedy) from error


@contextmanager
def _needing_room(path: Path) -> Iterator[None]:
    """Raises NotWritten where SQLite finds that the disk is full or fails."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise
        raise NotWritten(errno.ENOSPC, str(error), str(path)) from error


def _opened(path: Path) -> sqlite3.Connection:
    # No transactions of Python's own: every statement is one, and is on the disk when it returns.
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.text_factory = _text
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(TABLE)
    return connection


def _text(content: bytes) -> str:
    """A flipped byte need not be UTF-8."""
    return content.decode(errors="replace")


def _damage(path: Path) -> str | None:
    """What is wrong with the file's structure; None where nothing is."""
    with closing(sqlite3.connect(path, timeout=WAIT)) as connection:
        try:
            finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            return None if finding == "ok" else " ".join(finding.split())
        except sqlite3.OperationalError:  # locked, not ours to read: for who opens it
            return None
        except sqlite3.DatabaseError as error:
            return str(error)


def _mend(path: Path, damage: str, alone: bool) -> None:
    """Set a damaged file aside and begin another with the answers that can still be read."""
    if not alone:
        raise Damaged(
            f"{path} is damaged ({damage}) and in use by another process", "type this again when it has ended"
        )
    aside = path.with_name(f"{path.stem}.damaged-{time.time_ns()}{path.suffix}")
    rows = _readable_rows(path)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    path.rename(aside)
    with closing(_opened(path)) as connection:
        connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
    say(
        f"{path} was damaged ({damage}): {len(rows)} answers are kept, the others asked again; the old file is {aside}"
    )


def _lengthen(path: Path) -> None:
    """Fill a file that was cut short up to the length that its head states: SQLite reads nothing of a shorter one."""
    with path.open("rb") as stream:
        head = stream.read(100)
    if head.startswith(b"SQLite format 3"):
        page_size, num_pages = int.from_bytes(head[16:18]), int.from_bytes(head[28:32])
        os.truncate(path, max(path.stat().st_size, page_size * num_pages))


def _readable_rows(path: Path) -> list[tuple[Any, ...]]:
    """Rows of a damaged file: read in small parts by the first digits of their keys, as far as each goes."""
    rows = []
    _lengthen(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = _text
        for start in range(256):
            with suppress(sqlite3.DatabaseError):
                query = "SELECT * FROM answers WHERE key >= ? AND key < ?"
                rows += connection.execute(query, (f"{start:02x}", f"{start:02x}g")).fetchall()
    return rows


# --- asking what has not been asked before


@dataclass(slots=True)
class JudgeOutcome:
    """Answers and refusals by the keys of their requests; `num_asked` questions went to the judge this time. `lost`
    says why it was given up, if it was."""

    answers: dict[str, JudgeAnswer]
    refusals: dict[str, str] = field(default_factory=dict)
    num_asked: int = 0
    lost: str | None = None


def collect(requests: Sequence[JudgeRequest], cache: AnswerCache, ask: Asker, progress: Progress) -> JudgeOutcome:
    """The outcome of every request: from the cache, or asked once however often it occurs, and stored."""
    outcome = JudgeOutcome(cache.known(requests))
    missing = list({request.key: request for request in requests if request.key not in outcome.answers}.values())

    def keep(request: JudgeRequest, answer: JudgeAnswer | JudgeRefused) -> None:
        if isinstance(answer, JudgeRefused):
            outcome.refusals[request.key] = str(answer)
            return
        cache.store(request, answer)
        outcome.answers[request.key] = answer

    try:
        for _ in progress(ask(missing, keep), "judging", len(missing)) if missing else ():
            outcome.num_asked += 1
    except ServerUnavailable as error:
        outcome.lost = str(error)
    return outcome
