"""Rows of Arrow's tables, from Parquet and from Arrow's own files, in bounded memory whatever those hold."""

import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ref.data.formats.checks import Row, most_frequent, shown

ROW = 64  # bytes that a row of nothing counts as
AT_ONCE = 64  # rows
NO_ARROW = (struct.error, ValueError, OverflowError)  # what `_messages` raises of other files


class Unreadable(Exception):
    """Why a file is not read; the message goes on from its name."""


class OutOfProportion(Exception):
    """A file holds more than the bytes that were allowed."""


def without_padding(row: Row) -> Row:
    """The row without the nulls that Arrow writes into objects for keys that another row's objects have."""
    for column, value in row.items():
        if type(value) in (dict, list):
            row[column] = _without_padding(value)
    return row


def _without_padding(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: inner if type(inner) is str else _without_padding(inner)
            for key, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list | tuple):  # a tuple is an entry of a map
        return type(value)(map(_without_padding, value))
    return value


def refuse_columns_twice(names: Sequence[str]) -> None:
    """Raise Unreadable for two columns of one name, of which a row could keep only the last."""
    if len(set(names)) != len(names):
        raise Unreadable(f"has the column {shown(most_frequent(names))} twice; rename or remove one of them")


def parquet_rows(content: Any, most: int) -> Iterator[Row]:
    """The rows of a Parquet file that unpacks to at most so many bytes. Raises Unreadable for others."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(content)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > most:
            raise OutOfProportion
        refuse_columns_twice(file.schema_arrow.names)
        yield from _rows(file.iter_batches(AT_ONCE), most)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"is not Parquet: {error}") from error


MAGIC = b"ARROW1"  # at both ends of a file; between them, but for a table of contents, is a stream


def arrow_rows(content: Any, most: int) -> Iterator[Row]:
    """The rows of an Arrow file, or stream, that unpacks to at most so many bytes. Raises Unreadable for others."""
    import pyarrow
    import pyarrow.ipc

    try:
        memory = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 if memory[: len(MAGIC)] == MAGIC else 0
        if begin and (len(memory) < 2 * begin or memory[-len(MAGIC) :] != MAGIC):
            raise Unreadable("is not Arrow: it is cut short")
        memory.seek(begin)
        if sum(map(_unpacked_size, _messages(memory))) > most:
            raise OutOfProportion
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(memory).slice(begin)) as batches:
            refuse_columns_twice(batches.schema.names)
            yield from _rows(map(_validated, batches), most)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unreadable(f"is not Arrow: {error}") from error
    except NO_ARROW as error:
        raise Unreadable("is not Arrow, or is damaged or cut short") from error


def _validated(batch: Any) -> Any:
    """The batch. Raises ArrowInvalid where its offsets or its texts are none."""
    batch.validate(full=True)
    return batch


def _rows(batches: Iterable[Any], most: int) -> Iterator[Row]:
    count = 0
    for batch in batches:
        most -= ROW * batch.num_rows + sum(map(_weight, batch.columns))
        if most < 0:
            raise OutOfProportion
        for begin in range(0, batch.num_rows, AT_ONCE):
            part = batch.slice(begin, AT_ONCE)
            yield from map(without_padding, _plain(part, count))
            count += part.num_rows


def _plain(part: Any, count: int) -> list[Row]:
    try:
        return part.to_pylist()
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a year 20,000
        place = f"rows {count + 1:,} to {count + part.num_rows:,}"
        raise Unreadable(f"holds what cannot be read in {place}: {error}") from error


def _weight(array: Any) -> int:
    """Bytes of the values when each is written out: in Arrow, many may be the same bytes, and nulls none."""
    import pyarrow

    kind, types = array.type, pyarrow.types
    if isinstance(array, pyarrow.ExtensionArray):
        return _weight(array.storage)
    if types.is_dictionary(kind):
        return 8 * len(array) + _weight_of_words(array)
    if types.is_struct(kind):
        return 8 * len(array) + sum(map(_weight, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return 8 * len(array) + _weight(array.flatten())
    if types.is_map(kind):
        return 8 * len(array) + _weight(array.keys) + _weight(array.items)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        sizes = np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset :: 4][: len(array)]
        return 16 * len(array) + int(sizes.clip(0).sum(dtype=np.int64))
    if types.is_nested(kind) or types.is_run_end_encoded(kind):
        raise Unreadable(f"has a column of Arrow's type {kind}; write its rows as JSON lines")
    return array.nbytes + (8 * len(array) if types.is_null(kind) else 0)


def _weight_of_words(array: Any) -> int:
    counts = array.indices.drop_null().value_counts().to_pylist()
    return sum(entry["counts"] * _weight(array.dictionary.slice(entry["values"], 1)) for entry in counts)


# --- Arrow's messages, read without Arrow, which unpacks compressed buffers without a limit


DICTIONARY_BATCH, RECORD_BATCH, V4 = 2, 3, 3  # Arrow's Message.fbs and Schema.fbs


def has_packed_buffers(stream: Any) -> bool:
    """Whether buffers of an Arrow stream are compressed. Raises one of NO_ARROW where it is none."""
    return any(map(_packed_batch, _messages(stream)))


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

    def target(self, index: int) -> int | None:
        """Where stands what a field refers to."""
        place = self.field(index)
        return None if place is None else place + struct.unpack_from("<I", self.content, place)[0]

    def table(self, index: int) -> "_Table | None":
        """A table that a field refers to."""
        place = self.target(index)
        return None if place is None else _Table(self.content, place)


class _Message(NamedTuple):
    """The head of a message, and where in the stream its body stands."""

    head: _Table
    stream: Any
    body: int


def _messages(stream: Any) -> Iterator[_Message]:
    """The messages of an Arrow stream; what they carry is passed over. Raises one of NO_ARROW where it is none."""
    while (size := _int32(stream)) and (size := _int32(stream) if size == -1 else size) > 0:
        content = stream.read(size)
        head = _Table(content, *struct.unpack_from("<I", content))
        body = stream.tell()
        yield _Message(head, stream, body)
        stream.seek(body + max(head.scalar(3, "<q"), 0))


def _int32(stream: Any) -> int:
    """The next number; 0, which ends a stream, also where nothing follows."""
    content = stream.read(4)
    return struct.unpack("<i", content)[0] if content else 0


def _packed_batch(message: _Message) -> _Table | None:
    """The record batch, or that of a dictionary, whose fourth field, `compression`, is there; or which says so as
    Arrow did before it had one, in the message's own fifth."""
    kind, batch = message.head.scalar(1, "<B"), message.head.table(2)
    if kind == DICTIONARY_BATCH and batch:
        batch = batch.table(1)
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH) or batch is None:
        return None
    of_old = message.head.scalar(0, "<h") <= V4 and message.head.field(4) is not None
    return batch if of_old or batch.field(3) is not None else None


def _unpacked_size(message: _Message) -> int:
    """Bytes that the compressed buffers of a message say they unpack to, each in its first eight."""
    batch = _packed_batch(message)
    if batch is None or (place := batch.target(2)) is None:
        return 0
    end = place + 4 + 16 * struct.unpack_from("<I", batch.content, place)[0]
    total = 0
    for offset, size in struct.iter_unpack("<qq", batch.content[place + 4 : end]):
        message.stream.seek(message.body + offset)
        total += max(0, struct.unpack("<q", message.stream.read(8))[0]) if size else 0
    return total
