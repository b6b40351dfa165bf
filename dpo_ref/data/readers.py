"""Rows of one file, whatever its kind.

What a file holds is limited, so that none takes all memory or goes on for ever.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_ref.data.formats.checks import BadRow, Row
from dpo_ref.data.tables import OutOfProportion, Unreadable, arrow_rows, parquet_rows

Named = tuple[str, Row | BadRow]  # a row, or why there is none
Rows = Iterator[Row | BadRow | None]  # None for a line without a row, which counts
Open = Callable[[Path], Any]

DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)
LONGEST = 32 * 2**20  # bytes of one row; one text of it may have 2^20 characters
EMPTY = 10**6  # lines without a row that may follow each other
UNPACKED, TIMES = 64 * 2**20, 200  # bytes that a packed file may unpack to: so many, and so many times its own
PART = 2**16  # bytes or characters read at once


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix that says what a file holds, and the one that says how it is compressed."""
    suffixes = Path(path.name.lower()).suffixes[-2:]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else packed), packed


def file_rows(path: Path) -> Iterator[Named]:
    """The rows of a file, each with its name. Raises ValueError, naming the file, for what is damaged or none of its
    kind."""
    kind, packed = kind_of(path)
    try:
        for row_number, row in enumerate(READERS[kind](path, partial(_open, packed=packed)), start=1):
            if row is not None:
                yield f"{path.name} row {row_number}", row
    except Unreadable as error:
        raise ValueError(f"{path.name} {error}") from error
    except DAMAGED as error:
        raise ValueError(f"{path.name}: the file cannot be read, or is damaged or cut short ({error})") from error


# --- bytes


def _zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


PACKED: dict[str, Open] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}


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


def _out_of_proportion(path: Path) -> Unreadable:
    return Unreadable(
        f"unpacks to more than {_most_of(path):,} bytes ({UNPACKED // 2**20} MiB and {TIMES} times its own size); if "
        "it is meant to, write its rows into a plain .jsonl file"
    )


def _open(path: Path, packed: str) -> Any:
    return io.BufferedReader(_Unpacked(path, PACKED[packed](path)), 2**17) if packed else path.open("rb")


class _Recoded(io.RawIOBase):
    """UTF-8 of a text in another encoding."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self.stream, self.encoding, self.ready = stream, encoding, b""
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = b"-"
        while part and not self.ready:
            part = self.stream.read(PART)
            self.ready = self._recode(part)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def _recode(self, part: bytes) -> bytes:
        try:
            return self.decoder.decode(part, not part).encode()
        except UnicodeError as error:
            raise Unreadable(f"begins as {self.encoding.upper()} and goes on otherwise: {error}") from error

    def close(self) -> None:
        self.stream.close()
        super().close()


def _utf8(path: Path, open_stream: Open) -> Any:
    """A text as UTF-8 without a byte order mark, also where the file is UTF-16 or UTF-32."""
    with open_stream(path) as stream:
        encoding = json.detect_encoding(stream.read(4))
    stream = open_stream(path)
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    return stream if encoding.startswith("utf-8") else io.BufferedReader(_Recoded(stream, encoding), 2**17)


def _bad_byte(path: Path, open_stream: Open) -> str:
    """Where a text stops being UTF-8."""
    place, lines, decoder, part = 0, 1, codecs.getincrementaldecoder("utf-8")(), b"-"
    with _utf8(path, open_stream) as stream:
        try:
            while part:
                part = stream.read(PART)
                place, lines = place + len(part), lines + part.count(b"\n")
                decoder.decode(part, not part)
        except UnicodeDecodeError as error:  # of what was left before and of this part
            place += error.start - len(error.object)
            lines -= error.object[error.start :].count(b"\n")
    return f"(byte {place:,}) in line {lines:,}"


# --- JSON


TOO_LONG = f"has more than {LONGEST // 2**20} MiB, the most that are taken for one row"
CONVERSATIONS = {"messages", "conversation", "conversations", "turns", "history", "prompt", "tools"}
RESPONSES = {"chosen", "rejected", "completions", "responses", "answers", "summaries"}  # lists of objects in one row
_DECODER = json.JSONDecoder()


def _json(path: Path, open_stream: Open) -> Rows:
    """One list of rows, or what JSON lines may be; what holds no rows at all is refused."""
    with _utf8(path, open_stream) as stream:
        beginning = stream.read(LONGEST)
    if beginning.lstrip().startswith(b"["):
        yield from _json_text(path, open_stream, _elements)
    else:
        _refuse_rowless(beginning)
        yield from _json_lines(path, open_stream)


def _refuse_rowless(content: bytes) -> None:
    """Say what to do about one value that is no row: a text, a number, an object around the list of rows."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return  # several rows, or none that can be read
    if not isinstance(whole, dict):
        raise Unreadable(f"holds a JSON {_type_of(whole)}, not rows; save a list of objects, or an object a line")
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and not (CONVERSATIONS | RESPONSES) & set(whole):
        raise Unreadable(f"holds one object; its rows are in {lists[0]!r}: save that list alone")


def _type_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _json_lines(path: Path, open_stream: Open) -> Rows:
    """A row a line; or one list, or objects over many lines, where the file begins so."""
    with _utf8(path, open_stream) as stream:
        lines = filter(bytes.strip, islice(iter(partial(stream.readline, LONGEST + 1), b""), EMPTY))
        first, second = next(lines, b"").strip(), next(lines, b"")
    try:
        is_list = isinstance(json.loads(first), list) and not second
        is_objects = False
    except json.JSONDecodeError:
        is_list = first.startswith(b"[")
        is_objects = not is_list and (first == b"{" or _goes_on_behind_line(path, open_stream))
    except (ValueError, RecursionError):
        is_list, is_objects = False, False
    if is_list or is_objects:
        yield from _json_text(path, open_stream, _elements if is_list else _objects)
    else:
        yield from _lines(path, open_stream)


def _goes_on_behind_line(path: Path, open_stream: Open) -> bool:
    """Whether the first object ends on another line than it begins, or the next one begins on the same."""
    with _utf8(path, open_stream) as stream:
        text = stream.read(LONGEST).decode(errors="replace").lstrip()
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and ("\n" in text[:end] or text[end : end + PART].lstrip().startswith("{"))


def _lines(path: Path, open_stream: Open) -> Rows:
    num_empty = 0
    with _utf8(path, open_stream) as stream:
        while line := stream.readline(LONGEST + 1):
            num_empty = 0 if line.strip() else num_empty + 1
            if num_empty > EMPTY:
                raise Unreadable(f"has more than {EMPTY:,} empty lines one after the other; remove them")
            if len(line) > LONGEST:
                yield BadRow(TOO_LONG)
                while not line.endswith(b"\n") and (line := stream.readline(LONGEST)):
                    pass
            else:
                yield _row_of(line) if line.strip() else None


def _row_of(line: bytes) -> Row | BadRow:
    try:
        return _as_row(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return BadRow(f"is JSON that cannot be read ({error})")


def _as_row(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"is a JSON {_type_of(value)}, not an object")


Read = Callable[[int], str]


def _json_text(path: Path, open_stream: Open, rows_of: Callable[[Read], Iterator[Row | BadRow]]) -> Rows:
    count = 0
    with _utf8(path, open_stream) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        try:
            for count, row in enumerate(rows_of(text.read), start=1):  # noqa: B007 (the messages have it)
                yield row
        except UnicodeDecodeError as error:
            raise Unreadable(f"is not JSON: it is not UTF-8 {_bad_byte(path, open_stream)}") from error
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise Unreadable(f"is not JSON: {reason}, behind {count:,} rows") from error


def _elements(read: Read) -> Iterator[Row | BadRow]:
    """The rows of a list, each as soon as it is there: the list may be larger than the memory."""
    text = _go_on(_go_on("", read)[1:], read)
    while text != "]" and not (text.startswith("]") and not _go_on(text[1:], read)):
        row, text = _element(text, read)
        if not text:
            raise json.JSONDecodeError("The list does not end", text, 0)
        yield _as_row(row)
        if text.startswith(","):
            text = _go_on(text[1:], read)
        elif not text.startswith("]"):
            raise json.JSONDecodeError("Expecting ',' delimiter behind a row", text[:PART], 0)


def _objects(read: Read) -> Iterator[Row | BadRow]:
    """Rows that follow each other without a comma, each over as many lines as it likes."""
    text = _go_on("", read)
    while text:
        row, text = _element(text, read)
        yield _as_row(row)


def _go_on(text: str, read: Read) -> str:
    """The text from its next character on that is no space."""
    text = text.lstrip()
    while not text and (more := read(PART)):
        text = more.lstrip()
    return text


def _element(text: str, read: Read) -> tuple[Any, str]:
    """The value that `text` begins with, and what follows: as much is read as that takes."""
    while True:
        try:
            value, end = _DECODER.raw_decode(text)
            return value, _go_on(text[end:], read)
        except json.JSONDecodeError:
            more = read(max(PART, len(text)))
            if not more:
                raise
        text += more
        if len(text) > LONGEST:
            raise Unreadable(f"holds a row that {TOO_LONG}; is it an object around the list of rows?")


# --- tables of text


def _csv(path: Path, open_stream: Open, delimiter: str) -> Rows:
    csv.field_size_limit(LONGEST)
    with _utf8(path, open_stream) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        lines = _RowLines(text)
        try:
            for row in csv.DictReader(lines, delimiter=delimiter):
                yield BadRow("has more cells than the header has columns") if None in row else row  # pyright: ignore
                lines.size = 0
        except UnicodeDecodeError as error:
            raise Unreadable(f"is not UTF-8 {_bad_byte(path, open_stream)}") from error
        except csv.Error as error:
            raise Unreadable(f"is not CSV: {error}") from error


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
            raise Unreadable(f"holds a row that {TOO_LONG}; is a quote never closed?")
        return line


# --- tables of Arrow


def _table(path: Path, open_stream: Open, rows_of: Callable[[Any, int], Iterator[Row]]) -> Rows:
    try:
        with open_stream(path) as stream, _on_disk(stream) as content:
            yield from rows_of(content, _most_of(path))
    except OutOfProportion as error:
        raise _out_of_proportion(path) from error


@contextmanager
def _on_disk(stream: Any) -> Iterator[Any]:
    """The stream, or a file of what it holds where it is unpacked on the way."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as content:
        shutil.copyfileobj(stream, content)
        content.seek(0)
        yield content


READERS: dict[str, Callable[[Path, Open], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": partial(_csv, delimiter=","),
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": partial(_table, rows_of=parquet_rows),
    ".arrow": partial(_table, rows_of=arrow_rows),
    ".feather": partial(_table, rows_of=arrow_rows),
}
KINDS = f"{', '.join(READERS)} (each also {', '.join(PACKED)})"
