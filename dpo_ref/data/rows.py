"""Rows of files, of dataset folders and of the hub, each with the name by which messages call it."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dpo_ref.data.formats.checks import BadRow, Row

Named = tuple[str, Row | BadRow]  # a row, or why there is none

OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)
LONGEST = 32 * 2**20  # bytes of one row; one text of it may have 2^20 characters
EMPTY = 10**6  # lines without a row that may follow each other
UNPACKED, TIMES = 64 * 2**20, 200  # bytes that a packed file may unpack to: so many, and so many times its own


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
    """The data files that `path` names: itself, or those in the folder. ValueError without any, and for one that is no
    file or lies elsewhere."""
    local_path = Path(path).expanduser()
    if local_path.is_file():
        if _kind(local_path)[0] not in READERS:
            raise ValueError(f"{key}={path} is none of {', '.join(READERS)} (each also .gz, .bz2, .xz)")
        return [local_path]
    if not local_path.is_dir():
        raise ValueError(f"{key}={path} is a pipe, a device or a socket; write its rows into a file")
    paths = sorted(entry for entry in local_path.glob("*") if _kind(entry)[0] in READERS and not entry.is_dir())
    if not paths:
        raise ValueError(f"{key}={path} holds no file of {', '.join(READERS)}")
    for entry in paths:
        if not entry.is_file():
            raise ValueError(f"{key}={path}: {entry.name} is a pipe, a device, a socket or a broken link; remove it")
        _refuse_link(entry, local_path, f"{key}={path}")
    return paths


def _refuse_link(entry: Path, folder: Path, origin: str) -> None:
    """Raise ValueError for a file outside of its folder. The hub's cache keeps the files of its snapshots beside
    them."""
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.name == "snapshots"), None)
    if not entry.resolve().is_relative_to((snapshots.parent if snapshots else folder).resolve()):
        raise ValueError(
            f"{origin}: {entry.name} is a link to {entry.resolve()}, outside of the folder; copy that file into it"
        )


# --- files, row by row; what they hold is limited, so that no file takes all memory or goes on for ever


class TooMuch(Exception):
    """More than is taken of a file; the message goes on from its name."""


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as far as that is not out of all proportion."""

    def __init__(self, path: Path, stream: Any) -> None:
        self.path, self.stream, self.left = path, stream, _most_of(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self.stream.readinto(buffer)
        self.left -= size
        if self.left < 0:
            raise _out_of_proportion(self.path)
        return size

    def close(self) -> None:
        self.stream.close()
        super().close()


def _most_of(path: Path) -> int:
    """Bytes that may come out of a packed file."""
    return UNPACKED + TIMES * path.stat().st_size


def _out_of_proportion(path: Path) -> TooMuch:
    return TooMuch(
        f"unpacks to more than {_most_of(path):,} bytes ({UNPACKED // 2**20} MiB and {TIMES} times its own size); if "
        "it is meant to, write its rows into a plain .jsonl file"
    )


def _open(path: Path, packed: str) -> Any:
    stream = OPEN[packed](path, "rb")
    return io.BufferedReader(_Unpacked(path, stream), 2**17) if packed else stream


Open = Callable[[Path], Any]


def _file_rows(path: Path) -> Iterator[Named]:
    kind, packed = _kind(path)
    try:
        for row_number, row in enumerate(READERS[kind](path, partial(_open, packed=packed)), start=1):
            if row is not None:
                yield f"{path.name} row {row_number}", row
    except TooMuch as error:
        raise ValueError(f"{path.name} {error}") from error
    except DAMAGED as error:
        raise ValueError(f"{path.name}: the file cannot be read, or is damaged or cut short ({error})") from error


def _json_lines(path: Path, open_stream: Open) -> Iterator[Row | BadRow | None]:
    num_empty = 0
    with open_stream(path) as stream:
        while line := stream.readline(LONGEST + 1):
            num_empty = 0 if line.strip() else num_empty + 1
            if num_empty > EMPTY:
                raise TooMuch(f"has more than {EMPTY:,} empty lines one after the other; remove them")
            if len(line) > LONGEST:
                yield BadRow(TOO_LONG)
                while not line.endswith(b"\n") and (line := stream.readline(LONGEST)):
                    pass
            else:
                yield _row_of(line) if line.strip() else None


TOO_LONG = f"has more than {LONGEST // 2**20} MiB, the most that are taken for one row"


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


def _json(path: Path, open_stream: Open) -> Iterator[Row | BadRow | None]:
    """One list of rows, or a row a line."""
    with open_stream(path) as stream:
        beginning = stream.read(LONGEST)
    if not beginning.lstrip().startswith(b"["):
        _refuse_wrapped(path, beginning)
        yield from _json_lines(path, open_stream)
        return
    with open_stream(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        try:
            yield from _elements(text.read)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name} is not JSON: {error}") from error


PART = 2**16  # characters read at once
_DECODER = json.JSONDecoder()


def _elements(read: Callable[[int], str]) -> Iterator[Row | BadRow]:
    """The rows of a list, each as soon as it is there: the list may be larger than the memory."""
    text = _go_on(_go_on("", read)[1:], read)
    while text != "]" and not (text.startswith("]") and not _go_on(text[1:], read)):
        row, text = _element(text, read)
        yield row if isinstance(row, dict) else BadRow(f"is a JSON {type(row).__name__}, not an object")
        if text.startswith(","):
            text = _go_on(text[1:], read)
        elif not text.startswith("]"):
            raise json.JSONDecodeError("Expecting ',' delimiter behind a row", text[:PART], 0)


def _go_on(text: str, read: Callable[[int], str]) -> str:
    """The text from its next character on that is no space."""
    text = text.lstrip()
    while not text and (more := read(PART)):
        text = more.lstrip()
    return text


def _element(text: str, read: Callable[[int], str]) -> tuple[Any, str]:
    """The value that `text` begins with, and what follows: as much is read as that takes."""
    while True:
        try:
            value, end = _DECODER.raw_decode(text)
            if rest := _go_on(text[end:], read):
                return value, rest
            raise json.JSONDecodeError("The list does not end", text, end)
        except json.JSONDecodeError:
            more = read(max(PART, len(text)))
            if not more:
                raise
        text += more
        if len(text) > LONGEST:
            raise TooMuch(f"holds a row that {TOO_LONG}")


def _refuse_wrapped(path: Path, content: bytes) -> None:
    """Say what to do about one object around the list of rows."""
    try:
        whole = json.loads(content)
    except ValueError:
        return  # a row a line
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and not {"messages", "completions", "chosen", "answers", "summaries"} & set(whole):
        raise ValueError(f"{path.name} holds one object; its rows are in {lists[0]!r}: save that list alone")


def _csv(path: Path, open_stream: Open, delimiter: str) -> Iterator[Row | BadRow | None]:
    csv.field_size_limit(LONGEST)
    with open_stream(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        lines = _RowLines(text)
        try:
            for row in csv.DictReader(lines, delimiter=delimiter):
                yield BadRow("has more cells than the header has columns") if None in row else row  # pyright: ignore
                lines.size = 0
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is not UTF-8 (byte {error.start})") from error
        except csv.Error as error:
            raise ValueError(f"{path.name} is not CSV: {error}") from error


class _RowLines:
    """The lines of a text; `size` counts the characters of those since the last row."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.size = text, 0

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        line = self.text.readline(LONGEST + 1)
        self.size += len(line)
        if not line:
            raise StopIteration
        if self.size > LONGEST:
            raise TooMuch(f"holds a row that {TOO_LONG}; is a quote never closed?")
        return line


ROW = 64  # bytes that a row of nothing counts as


def _parquet(path: Path, open_stream: Open) -> Iterator[Row | BadRow | None]:
    import pyarrow
    import pyarrow.parquet

    left = _most_of(path)
    try:
        with open_stream(path) as stream, _seekable(stream) as content:
            file = pyarrow.parquet.ParquetFile(content)
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            if sum(group.total_byte_size for group in groups) > left:
                raise _out_of_proportion(path)
            for batch in file.iter_batches(64):
                left -= batch.nbytes + ROW * batch.num_rows
                if left < 0:
                    raise _out_of_proportion(path)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is not Parquet: {error}") from error


def _seekable(stream: Any) -> Any:
    """The stream, or a file of what it holds where it is unpacked on the way."""
    if stream.seekable():
        return stream
    content = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(stream, content)
    return content


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
    _refuse_climbing(Path(source.path).expanduser(), f"{key}={source.path}")
    _refuse_packed(Path(source.path).expanduser(), f"{key}={source.path}")
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


def _refuse_climbing(folder: Path, origin: str) -> None:
    """Raise ValueError for a folder of `datasets` that says its rows lie elsewhere."""
    for state in (folder / "state.json", *folder.glob("*/state.json")):
        try:
            names = [str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # `datasets` says what is wrong
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{origin}: {state.name} names {name}, which is no file of this folder")
            _refuse_link(state.parent / name, folder, origin)


def _refuse_packed(folder: Path, origin: str) -> None:
    """Raise ValueError for a file of Arrow whose buffers are compressed: pyarrow unpacks them without a limit, and
    `datasets` never packs them."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # state.json may give any name
        with path.open("rb") as stream, suppress(struct.error):  # no Arrow, or cut off: pyarrow says what is wrong
            if any(_is_packed(message) for message in _messages(stream)):
                raise ValueError(
                    f"{origin}: the buffers in {path.name} are compressed, which datasets never writes; save its rows "
                    "as JSON lines or Parquet"
                )


def _messages(stream: BinaryIO) -> Iterator["_Table"]:
    """The heads of the messages in an Arrow stream; what they carry is passed over. Raises struct.error where it is
    none."""
    while (size := _int32(stream)) and (size := _int32(stream) if size == -1 else size) > 0:
        message = _Table(content := stream.read(size), *struct.unpack_from("<I", content))
        yield message
        stream.seek(max(message.scalar(3, "<q"), 0), os.SEEK_CUR)


def _int32(stream: BinaryIO) -> int:
    return struct.unpack("<i", stream.read(4))[0]


def _is_packed(message: "_Table") -> bool:
    """Whether a record batch, or that of a dictionary, has its fourth field, `compression`."""
    kind = message.scalar(1, "<B")
    batch = message.table(2)
    if kind == DICTIONARY_BATCH and batch:
        batch = batch.table(1)
    return kind in (DICTIONARY_BATCH, RECORD_BATCH) and batch is not None and batch.field(3) is not None


DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # Arrow's Message.fbs


class _Table(NamedTuple):
    """A table of a flatbuffer: its position, where the distance back to the offsets of its fields stands."""

    content: bytes
    position: int

    def field(self, index: int) -> int | None:
        """Where a field stands; None for one that is left out."""
        offsets = self.position - struct.unpack_from("<i", self.content, self.position)[0]
        size, offset = struct.unpack_from("<H", self.content, offsets)[0], 4 + 2 * index
        if offset >= size or not (distance := struct.unpack_from("<H", self.content, offsets + offset)[0]):
            return None
        return self.position + distance

    def scalar(self, index: int, form: str) -> int:
        """A number; 0 for one that is left out."""
        return 0 if (place := self.field(index)) is None else struct.unpack_from(form, self.content, place)[0]

    def table(self, index: int) -> "_Table | None":
        """A table that a field refers to."""
        if (place := self.field(index)) is None:
            return None
        return _Table(self.content, place + struct.unpack_from("<I", self.content, place)[0])


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
