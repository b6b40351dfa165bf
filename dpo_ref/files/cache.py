"""The cache: what was built once and is shared by all runs."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from dpo_ref.files.digests import damage_in, tell
from dpo_ref.files.writing import beside, remove


def cache_folder() -> Path:
    """DPO_REF_CACHE, or dpo_ref in the user's cache folder; made where it is not there, else ValueError."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ref"
    folder = Path(os.environ.get("DPO_REF_CACHE") or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_not_writable(folder, error.strerror or str(error)) from error
    return folder


def cache_not_writable(folder: Path, reason: str) -> ValueError:
    """What is said of a cache that cannot be made or written."""
    return ValueError(
        f"the cache {folder} cannot be written: {reason}; set DPO_REF_CACHE to a folder that can, kept between runs"
    )


def is_kept(entry: Path, remedy: str) -> bool:
    """Whether a sealed folder of the cache is there with the bytes that were written. One that is not whole is told
    of, with what becomes of it, `remedy`, and deleted."""
    in_use(entry)
    if not entry.is_dir():
        return False
    damaged = damage_in(entry)
    if damaged is None:
        return True
    tell(f"{entry} is damaged, or of an earlier version ({damaged}): {remedy}")
    delete(entry)
    return False


def delete(entry: Path) -> None:
    """Remove an entry of the cache: gone at once for those who look for it, whatever happens meanwhile."""
    release(entry)
    aside = beside(entry)
    os.replace(entry, aside)
    remove(aside)


SECONDS_BETWEEN_ATTEMPTS = 0.1
ATTEMPTS_BEFORE_A_LINE = 300


@contextmanager
def made_by_one(entry: Path) -> Iterator[None]:
    """Inside, no other process makes the same: one that is about to waits, and finds it made.

    Where nothing can be locked, as in a cache that may only be read or on a full disk, nobody waits: whoever writes
    there says what is wrong.
    """
    path = entry.with_name(f".{entry.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            _wait_for(lock, entry)
        yield
    finally:
        path.unlink(missing_ok=True)  # whoever waits has it open, and looks whether the entry is there
        os.close(lock)


def _wait_for(lock: int, entry: Path) -> None:
    """Those that are about to make the same at once wait for seconds, which is not worth a line."""
    for attempt in count():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        if attempt == ATTEMPTS_BEFORE_A_LINE:
            tell(f"another process is making {entry.parent.name}/{entry.name} in the cache; waiting for it")


_LOCKS: dict[Path, int] = {}


def in_use(entry: Path) -> None:
    """Say that this process works with an entry of the cache, if it is there: nobody prunes it until it is released or
    the process ends, however that ends, and it counts as used now."""
    with suppress(OSError):  # of what is not there, on disks without locks, in a cache that one may only read
        if entry not in _LOCKS:
            _LOCKS[entry] = os.open(entry, os.O_RDONLY)
            fcntl.flock(_LOCKS[entry], fcntl.LOCK_SH)
        os.utime(entry)


def release(entry: Path) -> None:
    """Say that this process is done with an entry."""
    if entry in _LOCKS:
        os.close(_LOCKS.pop(entry))


def entries_in_use() -> list[Path]:
    """What this process works with."""
    return list(_LOCKS)


@contextmanager
def releasing() -> Iterator[None]:
    """At the end this process is done with the entries that it began to work with inside: each is an open file, and a
    sweep's jobs may have hundreds."""
    before = set(_LOCKS)
    try:
        yield
    finally:
        for entry in entries_in_use():
            if entry not in before:
                release(entry)


@contextmanager
def unused(entry: Path) -> Iterator[bool]:
    """Whether no process works with an entry of the cache; none begins to before this ends."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
