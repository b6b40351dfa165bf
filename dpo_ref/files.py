"""Files and folders that appear whole or not at all (written beside their place, then moved there), folders that one
process alone writes, and where built models and reference tables are kept between runs.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`. A failure leaves what was there, and nothing beside it."""
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Hidden, and this process's own: others may be writing the same."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill with what shall stand at `path`. A failure leaves what was there, and nothing beside it.

    What stood at `path` before is replaced; where nothing did, a folder that another process puts there meanwhile
    stays, for it is whole too.
    """
    workspace = _beside(path)
    partial, replaced = workspace / "new", workspace / "old"
    _clear(workspace, path)  # left by a killed process that had the same id
    partial.mkdir(parents=True)
    stood_before = path.exists()
    try:
        yield partial
        if stood_before and path.exists():
            os.replace(path, replaced)
        _move_unless_there(partial, path)
    finally:
        _clear(workspace, path)


def _clear(workspace: Path, path: Path) -> None:
    """Delete what was made beside `path`. A folder that was moved aside stands in its place again, where the other was
    never moved there."""
    replaced = workspace / "old"
    if replaced.exists() and not path.exists():
        os.replace(replaced, path)
    shutil.rmtree(workspace, ignore_errors=True)


def _move_unless_there(partial: Path, path: Path) -> None:
    try:
        os.replace(partial, path)
    except OSError as error:  # a folder that is not empty is never replaced
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def remove_abandoned(path: Path) -> None:
    """Delete what killed processes left beside a folder that one process alone writes; if they were killed while they
    replaced it, it stands in its place again."""
    for workspace in path.parent.glob(f".{path.name}.*"):
        _clear(workspace, path)


def sweep_abandoned(folder: Path) -> None:
    """Delete what processes that are no more left anywhere in `folder` beside the files they were writing."""
    for path in list(folder.rglob(".*.*")):
        _, _, process = path.name.rpartition(".")
        if process.isdigit() and path.is_file() and not _lives(int(process)):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


DELETED = ".deleted."  # begins the name of a folder that is being deleted


def delete_folder(path: Path) -> None:
    """Delete a folder; it is moved aside first, so that what a kill leaves of it is not taken for the whole."""
    remove_deleted(path.parent)
    os.replace(path, path.with_name(DELETED + path.name))
    remove_deleted(path.parent)


def remove_deleted(parent: Path) -> None:
    """Delete what is left of folders whose deletion was interrupted."""
    for path in parent.glob(f"{DELETED}*"):
        shutil.rmtree(path, ignore_errors=True)


# --- digests of files


PART = 2**26  # bytes


def file_digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of a file's parts, as 32 hexadecimal digits; all cores take parts of a large file."""
    starts = range(0, path.stat().st_size or 1, PART)
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        parts = pool.map(partial(_part_digest, path), starts)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _part_digest(path: Path, start: int) -> bytes:
    hasher, rest = hashlib.sha256(), PART
    with path.open("rb") as file:
        file.seek(start)
        while rest and (block := file.read(min(rest, 2**20))):
            hasher.update(block)
            rest -= len(block)
    return hasher.digest()


# --- text and JSON


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file by lines that bring their ends; it is on the disk when this returns."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, content: str) -> None:
    """Replace a text file."""
    write_lines(path, [content])


def plain(value: Any) -> Any:
    """Values as JSON knows them: what is not finite is null."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "_asdict"):
        return {name: plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):  # an array
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file. Raises ValueError for numbers that are not finite, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


# --- folders that one process alone writes


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
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, say, work)
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have been removed
            (folder / LOCK).unlink()
        os.close(lock)


def _locked(folder: Path, say: Callable[[str], None], work: str | None) -> int:
    """The open file by which the folder is held. In it stands, for others, who holds it."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(lock, folder, say, work)
            if _stands_at(folder / LOCK, lock):
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # who held it has removed it
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "work": work}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


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


# --- kept between runs


def cache_folder() -> Path:
    """DPO_REF_CACHE, or dpo_ref in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ref"
    return Path(os.environ.get("DPO_REF_CACHE") or default).expanduser()
