"""Files and folders that appear whole or not at all (written beside their place, then moved there), and where built
models and reference tables are kept between runs.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
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
    shutil.rmtree(workspace, ignore_errors=True)  # left by a killed process that had the same id
    partial.mkdir(parents=True)
    stood_before = path.exists()
    try:
        yield partial
        if stood_before and path.exists():
            os.replace(path, replaced)
        _move_unless_there(partial, path)
    finally:
        if replaced.exists() and not path.exists():  # stopped between the two moves
            os.replace(replaced, path)
        shutil.rmtree(workspace, ignore_errors=True)


def _move_unless_there(partial: Path, path: Path) -> None:
    try:
        os.replace(partial, path)
    except OSError as error:  # a folder that is not empty is never replaced
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def remove_abandoned(path: Path) -> None:
    """Delete what killed processes left beside a folder that one process alone writes."""
    for workspace in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(workspace, ignore_errors=True)


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


def cache_folder() -> Path:
    """DPO_REF_CACHE, or dpo_ref in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ref"
    return Path(os.environ.get("DPO_REF_CACHE") or default).expanduser()
