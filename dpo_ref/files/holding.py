"""Folders that one process alone writes."""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems, such as some over a network


def not_writable(folder: Path, error: OSError) -> ValueError:
    """What is said of a folder for output that cannot be made or written."""
    return ValueError(f"the folder {folder} cannot be written: {error.strerror or error}; see output_dir")


def new_folder(path: Path) -> Path:
    """Make a folder that was not there: `path`, or with _2, _3, ... behind its name where others came first. Raises
    ValueError where none can be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folders = (path.with_name(f"{path.name}_{number}") if number > 1 else path for number in count(1))
        return next(folder for folder in folders if _is_made(folder))
    except OSError as error:
        raise not_writable(path, error) from error


def _is_made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def held(folder: Path, say: Callable[[str], None], work: str | None = None) -> Iterator[None]:
    """A folder, made where there is none, that no other process holds; the kernel lets go of it however this one ends.

    Raises ValueError where another process holds it, naming that; one that does the same `work` is waited for, for
    what it leaves behind is what this one would make.
    """
    try:
        stood_before = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, say, work)
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        _sign(lock, folder, work)
        yield
    finally:
        with suppress(OSError):  # the folder may have been removed
            (folder / LOCK).unlink()
            if not stood_before:
                folder.rmdir()  # where nothing was put into it
        os.close(lock)


def _locked(folder: Path, say: Callable[[str], None], work: str | None) -> int:
    """The open file by which the folder is held."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock, folder, say, work)
            if _stands_at(folder / LOCK, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # who held it has removed it


def _sign(lock: int, folder: Path, work: str | None) -> None:
    """Write for others who holds the folder."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": since, "work": work}
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise not_writable(folder, error) from error


def _stands_at(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock))
    except FileNotFoundError:
        return False


def _lock(lock: int, folder: Path, say: Callable[[str], None], work: str | None) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        who = "process {pid} on {host}, since {since},".format(**holder) if holder else "another process"
        if work is None or holder.get("work") != work:
            raise ValueError(
                f"{folder} is in use: {who} writes to it. Wait until that has ended, or give another output_dir"
            ) from None
        say(f"{folder}: {who} is doing the same; waiting for it (Ctrl-C ends this)")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        say(f"{folder}: its file system has no locks; let no second process write to it")


def _holder(lock: int) -> dict[str, Any]:
    """Who holds a folder; empty where that has not been written yet."""
    try:
        return json.loads(os.pread(lock, 4096, 0))
    except ValueError:
        return {}
