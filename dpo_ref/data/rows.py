"""Rows of files, of dataset folders and of the hub, each with the name by which messages call it."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ref.data.formats.checks import BadRow, Row

Named = tuple[str, Row | BadRow]  # a row, or why there is none

OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file, a folder of files, a folder written by `datasets`, or a name on the hub."""

    path: str
    name: str | None = None  # of the data set's configuration on the hub
    folder: str | None = None  # inside the data set on the hub
    split: str | None = None  # train unless the files have no splits
    split_key: str = "data.split"  # by which messages call it
    streaming: bool = False

    def hub_options(self) -> dict[str, Any]:
        """Options of data sets of the hub, by the keys that messages call them."""
        options = {"data.name": self.name, "data.folder": self.folder}
        return {**options, self.split_key: self.split, "data.streaming": self.streaming}


class Opened(NamedTuple):
    """A source's rows, and a digest of all that they hold; None where only reading them could tell."""

    rows: Iterable[Named]
    content: str | None


def open_source(source: Source, key: str) -> Opened:
    """Find a source. Raises ValueError, naming `key`, for what is not there; its rows raise it for what is damaged."""
    local_path = Path(source.path).expanduser()
    if not local_path.exists():
        return _open_hub(source, key)
    if local_path.is_dir() and any((local_path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _open_saved(source, key)
    _refuse_options(source, key, "a file or a folder of files")
    paths = files(source.path, key)
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            hasher.update(f"{path.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return Opened(chain.from_iterable(map(_file_rows, paths)), hasher.hexdigest())


def _refuse_options(source: Source, key: str, description: str) -> None:
    for option, value in source.hub_options().items():
        if value:
            raise ValueError(f"{option}={value} has no effect: {key}={source.path} is {description}")


def _kind(path: Path) -> tuple[str, str]:
    """The suffix that says what a file holds, and the one that says how it is compressed."""
    suffixes = path.suffixes[-2:]
    packed = suffixes[-1] if suffixes and suffixes[-1] in OPEN else ""
    return (suffixes[-2] if packed and len(suffixes) > 1 else path.suffix), packed


def files(path: str, key: str) -> list[Path]:
    """The data files that `path` names: itself, or those in the folder; ValueError without any."""
    local_path = Path(path).expanduser()
    if local_path.is_file():
        if _kind(local_path)[0] not in READERS:
            raise ValueError(f"{key}={path} is none of {', '.join(READERS)} (each also .gz, .bz2, .xz)")
        return [local_path]
    paths = sorted(entry for entry in local_path.glob("*") if entry.is_file() and _kind(entry)[0] in READERS)
    if not paths:
        raise ValueError(f"{key}={path} holds no file of {', '.join(READERS)}")
    return paths


def _file_rows(path: Path) -> Iterator[Named]:
    kind, packed = _kind(path)
    try:
        for row_number, row in enumerate(READERS[kind](path, OPEN[packed]), start=1):
            if row is not None:
                yield f"{path.name} row {row_number}", row
    except DAMAGED as error:
        raise ValueError(f"{path.name}: the file cannot be read, or is damaged or cut short ({error})") from error


def _json_lines(path: Path, open_stream: Callable[..., Any]) -> Iterator[Row | BadRow | None]:
    with open_stream(path, "rb") as stream:
        for line in stream:
            yield _row_of(line) if line.strip() else None


def _row_of(line: bytes) -> Row | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return BadRow(f"is JSON that cannot be read ({error})")
    return row if isinstance(row, dict) else BadRow(f"is a JSON {type(row).__name__}, not an object")


def _json(path: Path, open_stream: Callable[..., Any]) -> Iterator[Row | BadRow | None]:
    """One list of rows, or a row a line."""
    with open_stream(path, "rb") as stream:
        content = stream.read()
    if not content.lstrip().startswith(b"["):
        _refuse_wrapped(path, content)
        yield from (_row_of(line) if line.strip() else None for line in content.splitlines())
        return
    try:
        rows = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    for row in rows:
        yield row if isinstance(row, dict) else BadRow(f"is a JSON {type(row).__name__}, not an object")


def _refuse_wrapped(path: Path, content: bytes) -> None:
    """Say what to do about one object around the list of rows."""
    try:
        whole = json.loads(content)
    except ValueError:
        return  # a row a line
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and not {"messages", "completions", "chosen", "answers", "summaries"} & set(whole):
        raise ValueError(f"{path.name} holds one object; its rows are in {lists[0]!r}: save that list alone")


def _csv(path: Path, open_stream: Callable[..., Any], delimiter: str) -> Iterator[Row | BadRow | None]:
    csv.field_size_limit(2**30)
    with open_stream(path, "rt", encoding="utf-8-sig", newline="") as stream:
        try:
            for row in csv.DictReader(stream, delimiter=delimiter):
                yield BadRow("has more cells than the header has columns") if None in row else row  # pyright: ignore
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is not UTF-8 (byte {error.start})") from error
        except csv.Error as error:
            raise ValueError(f"{path.name} is not CSV: {error}") from error


def _parquet(path: Path, open_stream: Callable[..., Any]) -> Iterator[Row | BadRow | None]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_stream(path, "rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is not Parquet: {error}") from error


READERS = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}


def _open_saved(source: Source, key: str) -> Opened:
    """A folder written by `datasets`' save_to_disk."""
    from datasets import DatasetDict, load_from_disk

    _refuse_options(replace(source, split=None), key, "a folder on this machine")
    try:
        dataset: Any = load_from_disk(str(Path(source.path).expanduser()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={source.path} is a folder of datasets that cannot be read: {error}") from error
    if isinstance(dataset, DatasetDict):
        split = source.split or "train"
        if split not in dataset:
            raise ValueError(f"{source.split_key}={split}: {source.path} has {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    elif source.split:
        raise ValueError(f"{source.split_key}={source.split} has no effect: {source.path} has no splits")
    return Opened(_named_rows(dataset, Path(source.path).name), dataset._fingerprint)


def _open_hub(source: Source, key: str) -> Opened:
    from datasets import load_dataset

    path = source.path
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or _kind(Path(path))[0] in READERS:
        raise ValueError(f"{key}={source.path} does not exist")
    try:
        dataset: Any = load_dataset(
            source.path, source.name, data_dir=source.folder, split=source.split or "train", streaming=source.streaming
        )
    except Exception as error:  # the hub client raises many kinds; all mean that there are no rows
        raise ValueError(
            f"{key}={source.path} is neither a local file or folder nor to be had from the hub: {error}"
        ) from error
    rows = _named_rows(dataset, f"{source.path} {source.split or 'train'}")
    return Opened(rows, None if source.streaming else dataset._fingerprint)


def _named_rows(rows: Any, name: str) -> Iterator[Named]:
    for row_number, row in enumerate(rows, start=1):
        yield f"{name} row {row_number}", row
