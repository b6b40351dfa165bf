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
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from dpo_ref.data.formats.checks import STRICT, BadRow, Row, UnusableKey, shown
from dpo_ref.data.tables import OutOfProportion, Unreadable, arrow_rows, parquet_rows, refuse_columns_twice

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
        _refuse_pointer(path)
        for row_number, row in enumerate(READERS[kind](path, partial(_open, packed=packed)), start=1):
            if row is not None:
                yield f"{path.name} row {row_number}", row
    except Unreadable as error:
        raise ValueError(f"{path.name} {error}") from error
    except DAMAGED as error:
        raise ValueError(f"{path.name}: the file cannot be read, or is damaged or cut short ({error})") from error


# --- bytes


POINTER = b"version https://git-lfs.github.com/spec/v1"


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise Unreadable("is a pointer of Git LFS, not the rows; `git lfs pull` in its repository fetches them")


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
        return _as_row(STRICT.decode(line.decode("utf-8-sig")))
    except UnusableKey as error:
        return error.bad_row()
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
        yield row
        if text.startswith(","):
            text = _go_on(text[1:], read)
        elif not text.startswith("]"):
            raise json.JSONDecodeError("Expecting ',' delimiter behind a row", text[:PART], 0)


def _objects(read: Read) -> Iterator[Row | BadRow]:
    """Rows that follow each other without a comma, each over as many lines as it likes."""
    text = _go_on("", read)
    while text:
        row, text = _element(text, read)
        yield row


def _go_on(text: str, read: Read) -> str:
    """The text from its next character on that is no space."""
    text = text.lstrip()
    while not text and (more := read(PART)):
        text = more.lstrip()
    return text


def _element(text: str, read: Read) -> tuple[Row | BadRow, str]:
    """The row that `text` begins with, and what follows: as much is read as that takes."""
    while True:
        try:
            row, end = _first_row(text)
            return row, _go_on(text[end:], read)
        except json.JSONDecodeError:
            more = read(max(PART, len(text)))
            if not more:
                raise
        text += more
        if len(text) > LONGEST:
            raise Unreadable(f"holds a row that {TOO_LONG}; is it an object around the list of rows?")


def _first_row(text: str) -> tuple[Row | BadRow, int]:
    """The row that `text` begins with, and where it ends."""
    try:
        value, end = STRICT.raw_decode(text)
        return _as_row(value), end
    except UnusableKey as error:
        return error.bad_row(), _DECODER.raw_decode(text)[1]


# --- tables of text


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAID = re.compile(r"sep=([,;\t|])\s*")  # the first line of what some spreadsheets write
_QUOTED = re.compile(r'"[^"]*("|$)')
QUOTES = 'put a text that holds quotes into quotes, with each of its own twice (""), or save the rows as JSON lines'


def _csv(path: Path, open_stream: Open, delimiter: str) -> Rows:
    csv.field_size_limit(LONGEST)
    with _utf8(path, open_stream) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        lines = _RowLines(text)
        try:
            yield from _csv_rows(lines, delimiter)
        except UnicodeDecodeError as error:
            raise Unreadable(f"is not UTF-8 {_bad_byte(path, open_stream)}") from error
        except csv.Error as error:
            raise Unreadable(f"is not CSV: {_fault(error, lines)}") from error


def _csv_rows(lines: "_RowLines", delimiter: str) -> Iterator[Row | BadRow]:
    first = next(filter(str.strip, lines), "")
    said = _SAID.fullmatch(first)
    delimiter, begin = (said[1], []) if said else (_separator(first, delimiter), [first])
    lines.row = begin
    reader = csv.reader(chain(begin, lines), delimiter=delimiter, strict=True)
    header = _header(next(filter(None, reader), []))
    lines.row = []
    for cells in reader:
        if cells:  # csv has none for an empty line
            yield _csv_row(header, cells, lines)
        lines.row, lines.size = [], 0


def _separator(first: str, delimiter: str) -> str:
    """What stands between the cells of the first line: what the file's name says, or another where only that does."""
    bare = _QUOTED.sub("", first.rstrip("\r\n"))
    found = [other for other in SEPARATORS if other in bare]
    if delimiter in found or not found:
        return delimiter
    if len(found) > 1:
        raise Unreadable(
            f"has no {SEPARATORS[delimiter]} in its first line, which names the columns, but "
            f"{' and '.join(SEPARATORS[other] for other in found)}; separate all cells by {SEPARATORS[delimiter]}"
        )
    return found[0]


def _header(names: list[str]) -> list[str]:
    """The columns' names; but for the first, those without one are called by their numbers."""
    blank = next((name for name in names if name != name.strip()), None)
    if blank is not None:
        raise Unreadable(
            f"has blanks around the name {shown(blank)} in its header; remove those beside separators, in rows as well"
        )
    nameless = [number for number, name in enumerate(names) if not name]
    header = [f"column {number + 1}" if number in nameless[1:] else name for number, name in enumerate(names)]
    refuse_columns_twice(header)
    return header


def _csv_row(header: list[str], cells: list[str], lines: "_RowLines") -> Row | BadRow:
    if len(cells) > len(header):
        return BadRow("has more cells than the header has columns")
    for name, cell in zip(header, cells, strict=False):
        if cell[:1].isspace() and cell.lstrip()[:1] == '"' and not lines.has_in_quotes(cell):
            return BadRow(f"has a blank before a quote in {name} (line {lines.number:,}); remove it, or {QUOTES}")
    return dict(zip_longest(header, cells))


def _fault(error: csv.Error, lines: "_RowLines") -> str:
    """What is wrong in which line. Of an open quote csv knows at the end of the file, or at the next quote."""
    begin = lines.number - len(lines.row) + 1
    if lines.ended:
        return f"the row of line {begin:,} has a quote that is never closed; {QUOTES}"
    if "expected after" in str(error):
        several = f", in the row that begins in line {begin:,}" if len(lines.row) > 1 else ""
        return f"line {lines.number:,} has text behind a closing quote{several}; {QUOTES}"
    return f"{error} in line {lines.number:,}"


class _RowLines:
    """The lines of a text; `row` holds those since the last row and `size` counts their characters."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.size, self.number, self.ended = text, 0, 0, False
        self.row: list[str] = []

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        line = self.text.readline(LONGEST + 1)
        self.size += len(line)
        if not line:
            self.ended = True
            raise StopIteration
        if self.size > LONGEST:
            raise Unreadable(f"holds a row that {TOO_LONG}; is a quote never closed?")
        self.number += 1
        self.row.append(line)
        return line

    def has_in_quotes(self, cell: str) -> bool:
        """Whether the row's lines hold a cell's text in quotes, as it is written there."""
        quoted = cell.replace('"', '""')
        return f'"{quoted}"' in "".join(self.row)


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
