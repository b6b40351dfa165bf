"""Files and folders that appear whole or not at all (written beside their place, then moved there), that carry the
digest of what was written, that one process alone writes; and where what was built is kept between runs.
"""

import csv
import errno
import fcntl
import io
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing says of a disk, and not of which file


class NotWritten(OSError):
    """A file or folder that its disk did not take."""

    def __str__(self) -> str:
        return (
            f"{self.filename} was not written: {self.strerror}. Free space on its disk, then type the command again, "
            "or resume= the run that was trained: what was computed before is kept"
        )


@contextmanager
def needing_room(path: Path) -> Iterator[None]:
    """Around writing: raises NotWritten, with the name of `path`, where its disk is full or fails. NumPy says that
    without a number."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        if error.errno not in (*NO_ROOM, None):
            raise
        raise NotWritten(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`. A failure leaves what was there, and nothing beside it."""
    partial = _beside(path)
    try:
        with needing_room(path):
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
    stood_before = path.exists()
    try:
        with needing_room(path):
            partial.mkdir(parents=True)
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


def remove_half_written(folder: Path) -> None:
    """Delete the files that processes which are no more were writing anywhere in a folder that is this one's alone."""
    for path in list(folder.rglob(".*.*")):
        owner = path.suffix.removeprefix(".")
        if owner.isdigit() and path.is_file() and not _is_alive(int(owner)):
            path.unlink(missing_ok=True)


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


ABANDONED_AFTER = 600.0  # seconds without a change; a process of another machine may share the folder


def sweep_abandoned(folder: Path) -> None:
    """Delete what killed processes left half-made anywhere below a folder that many write: where the process that a
    name ends with is dead, and has not been writing for a while."""
    for workspace in list(folder.rglob(".*")):
        owner = workspace.suffix.removeprefix(".")
        if (
            owner.isdigit()
            and not _is_alive(int(owner))
            and abs(time.time() - _last_change(workspace)) > ABANDONED_AFTER
        ):
            remove(workspace)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _last_change(workspace: Path) -> float:
    times = [0.0]
    for path in [workspace, *workspace.rglob("*")]:
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


# --- digests of files


PART = 2**26  # bytes


def file_digest(path: Path) -> str:
    """XXH3-128 over the XXH3-128 of a file's parts; all cores take parts of a large file.

    It tells what decayed, not what was forged: who can write the file can write its digest. So it need not be
    cryptographic, and costs a sixth of SHA-256.
    """
    starts = range(0, path.stat().st_size or 1, PART)
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        return xxh3_128_hexdigest(b"".join(pool.map(partial(_part_digest, path), starts)))


def _part_digest(path: Path, start: int) -> bytes:
    hasher, rest, block = xxh3_128(), PART, memoryview(bytearray(min(PART, 2**20)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while rest and (num_read := file.readinto(block[:rest])):
            hasher.update(block[:num_read])
            rest -= num_read
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


FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")  # how a text begins that a spreadsheet computes
NUMBER = re.compile(r"[+-]?(?:[\d.,]+(?:e[+-]?\d+)?|inf|nan)(?: ?± ?[\d.]+)?(?:[ \u00a0]?%)?")


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    apostrophe = "'" if FORMULA.match(value) else ""
    return apostrophe + value.replace("\r", r"\r")  # which would begin a row


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute has an apostrophe before it; numbers stay as they are."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


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
        stood_before = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, say, work)
    except OSError as error:
        raise not_writable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have been removed
            (folder / LOCK).unlink()
            if not stood_before:
                folder.rmdir()  # where nothing was put into it
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
    holder = {"pid": os.getpid(), "host": platform.node(), "since": since, "work": work}
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


# --- bytes that a later process trusts: they carry a digest, so that what was lost or changed is seen


TELLERS: list[Callable[[str], None]] = []  # by whom rooms that have no terminal tell the user something
DIGEST, DIGESTS = "digest", "digests.json"


def _tell(sentence: str) -> None:
    for teller in TELLERS:
        teller(sentence)


class Damaged(ValueError):
    """A file that is not what was written. `what` says which and how one sees it, `remedy` what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


def bytes_digest(content: bytes) -> str:
    """XXH3-128, as of files."""
    return xxh3_128_hexdigest(content)


def _json_digest(content: Mapping[str, Any]) -> str:
    return bytes_digest(json.dumps(content).encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of everything it says, as its last entry."""
    return {**content, DIGEST: _json_digest(content)}


def unsealed(text: str | bytes, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that was `sealed`. Raises Damaged, naming `what`, for anything else; an object without a digest
    is of an earlier version, and read with a word to the user."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is damaged: it is not JSON ({error})", remedy) from error
    if not isinstance(content, dict):
        raise Damaged(f"{what} is damaged: it is no JSON object", remedy)
    if (digest := content.pop(DIGEST, None)) is None:
        if not _WITHOUT_DIGEST:
            _tell(f"{what} is of an earlier version, which wrote no digests: such files are read unchecked")
        _WITHOUT_DIGEST.append(what)
    elif digest != _json_digest(content):
        raise Damaged(f"{what} is damaged: its digest is that of other content", remedy)
    return content


_WITHOUT_DIGEST: list[str] = []  # what was read unchecked; the first is told of


def seal_folder(folder: Path) -> None:
    """Write the digests of all files in a folder beside them."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write_json(folder / DIGESTS, {name: file_digest(folder / name) for name in names if name != DIGESTS})


def damage_in(folder: Path) -> str | None:
    """The file of a sealed folder that is not as it was when the folder was sealed; None where all are."""
    try:
        digests = json.loads((folder / DIGESTS).read_bytes())
        return next((name for name, digest in digests.items() if file_digest(folder / name) != digest), None)
    except FileNotFoundError as error:
        return Path(error.filename).name
    except (OSError, ValueError, AttributeError):
        return DIGESTS


# --- the cache: what was built once and is shared by all runs


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
    _tell(f"{entry} is damaged, or of an earlier version ({damaged}): {remedy}")
    delete(entry)
    return False


def delete(entry: Path) -> None:
    """Remove an entry of the cache: gone at once for those who look for it, whatever happens meanwhile."""
    release(entry)
    aside = _beside(entry)
    os.replace(entry, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file or a folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


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
