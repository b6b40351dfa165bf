"""Rows of JSON-lines files, with messages that name file and row."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_ref.types import PromptGroup


class BadRow(ValueError):
    """A row that cannot be used; the message says why and what a good one looks like."""


def files(path: str, key: str) -> list[Path]:
    """The .jsonl and .jsonl.gz files that `path` names: itself, or those in the folder; ValueError without any."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    found = sorted([*place.glob("*.jsonl"), *place.glob("*.jsonl.gz")]) if place.is_dir() else []
    if not found:
        what = "holds no .jsonl or .jsonl.gz file" if place.is_dir() else "does not exist"
        raise ValueError(f"{key}={path} {what}")
    return found


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            yield from stream
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path.name}: the compressed file is damaged or cut short ({error})") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise BadRow(f"is a JSON {type(row).__name__}, not an object")
    return row


def read_groups(
    paths: list[Path], to_group: Callable[[dict[str, Any], str], PromptGroup], limit: int | None, on_bad_row: str
) -> tuple[list[PromptGroup], list[str]]:
    """Groups of all rows (at most `limit`), and what was wrong with the rows skipped.

    `to_group(row, origin)` raises BadRow. With `on_bad_row="error"` the first bad row raises ValueError naming it.
    """
    groups: list[PromptGroup] = []
    skipped: list[str] = []
    for path in paths:
        for number, line in enumerate(_lines(path), start=1):
            if limit is not None and len(groups) >= limit:
                return groups, skipped
            if not line.strip():
                continue
            origin = f"{path.name} row {number}"
            try:
                groups.append(to_group(_parse(line), origin))
            except BadRow as error:
                if on_bad_row == "error":
                    raise ValueError(f"{origin} {error}. data.on_bad_row=skip leaves such rows out") from error
                skipped.append(f"{origin} {error}")
    if not groups:
        raise ValueError(f"{', '.join(map(str, paths))}: no usable row ({len(skipped)} skipped)")
    return groups, skipped
