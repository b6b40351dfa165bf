"""Files and folders that appear whole or not at all: written beside their place, then moved there."""

import csv
import errno
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

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


def with_remedy(error: Exception) -> Exception:
    """What ended a command; where a disk had no room, whatever was made there, NotWritten."""
    if type(error) is OSError and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename:
        return NotWritten(error.errno, error.strerror, error.filename)
    return error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`. A failure leaves what was there, and nothing beside it."""
    partial = beside(path)
    try:
        with needing_room(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """Hidden, and this process's own: others may be writing the same."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill with what shall stand at `path`. A failure leaves what was there, and nothing beside it.

    What stood at `path` before is replaced; where nothing did, a folder that another process puts there meanwhile
    stays, for it is whole too.
    """
    workspace = beside(path)
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


def remove(path: Path) -> None:
    """Delete a file or a folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def below(folder: Path) -> Iterator[Path]:
    """What is anywhere below a folder from which others may take meanwhile; Path.rglob fails on what has gone."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


ABANDONED_AFTER = 600.0  # seconds without a change; a process of another machine may share the folder


def sweep_abandoned(folder: Path) -> None:
    """Delete what killed processes left half-made anywhere below a folder that many write: where the process that a
    name ends with is dead, and has not been writing for a while."""
    for workspace in [path for path in below(folder) if path.name.startswith(".")]:
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
    for path in [workspace, *below(workspace)]:
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


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
