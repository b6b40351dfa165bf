"""Rows of files as people have them: every encoding, layout and container gives the rows, or one message by name."""

import bz2
import gzip
import json
import re
import struct

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.formats.checks import BadRow
from dpo_ref.data.readers import file_rows
from dpo_ref.data.rows import Source, open_source

ROWS = [{"prompt": f"née {i}?\n", "chosen": f"{{oui}} {i}", "rejected": None, "turns": [{"n": i}]} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)
PRETTY = json.dumps(ROWS[0], indent=2, ensure_ascii=False)
TABLE = 'prompt,chosen\n"née,\n\n""1""?",oui\nqui,"a\nb"\n'
TABLE_ROWS = [{"prompt": 'née,\n\n"1"?', "chosen": "oui"}, {"prompt": "qui", "chosen": "a\nb"}]


def zstandard(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(table, opened=pa.ipc.new_file, **options):
    sink = pa.BufferOutputStream()
    with opened(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read(path, **source):
    """All rows of a source without their names."""
    return [row for _, row in open_source(Source(str(path), **source), "data.path").rows]


def refusal(path, **source):
    with pytest.raises(ValueError) as error:
        read(path, **source)
    assert "\n" not in str(error.value)
    return str(error.value)


def lines(*prompts):
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()


def is_bad(row):
    return isinstance(row, BadRow)


# --- texts


TEXTS = {
    "lines": ("a.jsonl", LINES, ROWS),
    "list": ("a.json", LIST, ROWS),
    "list over lines": ("a.json", json.dumps(ROWS, indent=1), ROWS),
    "list in .jsonl": ("a.jsonl", LIST, ROWS),
    "list over lines in .jsonl": ("a.jsonl", "\n \n" + json.dumps(ROWS, indent=1) + "\n\n", ROWS),
    "lines in .json": ("a.json", LINES, ROWS),
    "one object": ("a.json", json.dumps(ROWS[0]), ROWS[:1]),
    "one object over lines": ("a.json", PRETTY, ROWS[:1]),
    "one object over lines in .jsonl": ("a.jsonl", PRETTY, ROWS[:1]),
    "one object, closed late": ("a.json", LINES[: LINES.index("}]}")] + "\n}]}", ROWS[:1]),
    "objects over lines": ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
    "objects over lines in .jsonl": ("a.jsonl", "".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
    "objects side by side": ("a.json", LINES.replace("\n", " ").replace("} {", "}{"), ROWS),
    "table": ("a.csv", TABLE, TABLE_ROWS),
    "table with CRLF": ("a.csv", "prompt,chosen\r\nqui,oui\r\n", [{"prompt": "qui", "chosen": "oui"}]),
    "table with CR": ("a.csv", "prompt,chosen\rqui,oui\r", [{"prompt": "qui", "chosen": "oui"}]),
    "table with tabs": ("A.TSV", "prompt\tchosen\nqui;,oui\tnon\n", [{"prompt": "qui;,oui", "chosen": "non"}]),
}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be, marked"])
@pytest.mark.parametrize("layout", TEXTS)
def test_text_in_every_layout_and_encoding(tmp_path, layout, encoding):
    name, text, rows = TEXTS[layout]
    text, encoding = ("\ufeff" + text, encoding[:9]) if "marked" in encoding else (text, encoding)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read(tmp_path / name) == rows


def test_texts_larger_than_what_is_read_at_once(tmp_path):
    rows = [{"prompt": "né" * (number % 50_000), "chosen": number} for number in range(0, 300_000, 7001)]
    for encoding in ENCODINGS:
        for name, text in {
            "list.jsonl": json.dumps(rows, ensure_ascii=False),
            "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            "rows.json": "".join(json.dumps(row, ensure_ascii=False, indent=1) for row in rows),
        }.items():
            (tmp_path / name).write_bytes(text.encode(encoding))
            assert read(tmp_path / name) == rows


ROWLESS = {
    "a text": ("a.json", b'"hello"', "a.json holds a JSON str, not rows; save a list of objects, or an object a line"),
    "a number": ("a.json", b" 3\n", "a.json holds a JSON int, not rows"),
    "null": ("a.json", b"null", "a.json holds a JSON null, not rows"),
    "true": ("a.json", b"\xef\xbb\xbftrue", "a.json holds a JSON bool, not rows"),
    "an object around the rows": (
        "a.json",
        json.dumps({"version": 1, "data": ROWS}).encode(),
        "a.json holds one object; its rows are in 'data': save that list alone",
    ),
    "the same over lines": (
        "a.json",
        json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
        "a.json holds one object; its rows are in 'data': save that list alone",
    ),
    "an object that ends early": ("a.json", PRETTY.encode()[:-9], "a.json is not JSON: "),
    "a bad object": ("a.json", PRETTY.encode() + b'\n{\n"a" 1}', "a.json is not JSON: Expecting ':' delimiter, beh"),
    "a list that ends early": ("a.json", b'[{"a": 1}', "a.json is not JSON: The list does not end, behind 0 rows"),
    "a bad list": ("a.jsonl", b'[{"a": 1}\n{"a": 2}]', "a.jsonl is not JSON: Expecting ',' delimiter behind a"),
    "half a UTF-16": ("a.jsonl", LINES.encode("utf-16")[:-1], "a.jsonl begins as UTF-16 and goes on otherwise"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWLESS)
def test_what_holds_no_rows(tmp_path, name):
    file, content, message = ROWLESS[name]
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path / file).startswith(message)


BAD = {
    "scalars in a list": ("a.json", b'[{"a": 1}, "x", null]', ["is a JSON str, not an", "is a JSON null, not an"]),
    "scalars in lines": ("a.json", b'{"a": 1}\n"x"\n', ["is a JSON str, not an object"]),
    "a list as first row of two": ("a.jsonl", b'[1, 2]\n{"a": 1}\n', ["is a JSON list, not an object"]),
    "the first of lines": ("a.json", b'{"b": \n{"a": 1}\n', ["is not JSON (Expecting value at column"]),
    "junk behind the first": ("a.jsonl", b'{"b": 2} x\n{"a": 1}\n', ["is not JSON (Extra data at column 10"]),
    "brackets": ("a.jsonl", b"[" * 200_000 + b'\n{"a": 1}\n', ["is JSON that cannot be read"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_among_good_ones(tmp_path, name):
    file, content, reasons = BAD[name]
    (tmp_path / file).write_bytes(content)
    rows = read(tmp_path / file)
    assert [row for row in rows if not is_bad(row)] == [{"a": 1}]
    for bad, reason in zip(filter(is_bad, rows), reasons, strict=True):
        assert str(bad).startswith(reason)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == []
    assert refusal(tmp_path) == f"data.path={tmp_path}: {name} is empty; remove it, or fetch it again"


# --- bytes that are no text


def test_a_bad_byte_far_into_packed_lines(tmp_path):
    content = b'{"a": 1}\n' * 69_999 + b'{"a": "\xff"}\n' + b'{"a": 1}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    bad = [(name, str(row)) for name, row in file_rows(tmp_path / "a.jsonl.gz") if is_bad(row)]
    assert bad == [("a.jsonl.gz row 70000", "is not UTF-8 (byte 7)")]


@pytest.mark.parametrize("before", [0, 20_000, 65_531, 65_535])  # around the end of what is read at once
@pytest.mark.parametrize("end", [b"\xff,b\n", b"\xc3"])
def test_a_bad_byte_in_a_table_and_in_a_list(tmp_path, before, end):
    table = b"a,b\n" + "é\n".encode() * (before // 3) + b"x" * (before % 3)
    (tmp_path / "a.csv.zst").write_bytes(zstandard(table + end))
    line = before // 3 + 2
    assert refusal(tmp_path / "a.csv.zst") == f"a.csv.zst is not UTF-8 (byte {len(table):,}) in line {line:,}"
    objects = b"[" + '{"é": 1},\n'.encode() * (before // 11) + b'"'
    (tmp_path / "a.json").write_bytes(objects + end)
    message = refusal(tmp_path / "a.json")
    assert message == f"a.json is not JSON: it is not UTF-8 (byte {len(objects):,}) in line {before // 11 + 1:,}"


# --- packed files


def test_zstandard_like_the_others(tmp_path):
    text, rows = LINES.encode(), [{"a": 1, "b": [{"c": "x"}]}] * 200
    contents = {
        "a.jsonl.zst": (zstandard(text), ROWS),
        "b.jsonl.zst": (zstandard(text[:50]) + zstandard(text[50:]), ROWS),  # as by several threads
        "A.Parquet.zst": (zstandard(parquet(rows)), rows),
        "a.arrow.zst": (zstandard(arrow(pa.Table.from_pylist(rows))), rows),
    }
    for name, (content, expected) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == expected


def test_zstandard_that_is_none_or_too_much(tmp_path):
    path, good = tmp_path / "a.jsonl.zst", zstandard(LINES.encode() * 1000)
    for content in (good[:-3], good[: len(good) // 2], b"\x28\xb5\x2f\xfd\x00", LINES.encode(), good + b"junk"):
        path.write_bytes(content)
        assert refusal(path).startswith("a.jsonl.zst: the file cannot be read, or is damaged or cut short (")
    path.write_bytes(zstandard((b"{}" + b" " * 2**20 + b"\n") * 80))
    assert refusal(path).startswith("a.jsonl.zst unpacks to more than 67,")


# --- tables of Arrow


CHAT = [
    {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "call": {"name": "f"}}, None], "label": None},
    {"m": None, "label": True},
    {"m": [], "label": False},
]


def test_arrow_in_every_container(tmp_path):
    table = pa.Table.from_pylist(CHAT)
    Dataset(table).save_to_disk(tmp_path / "saved")
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    contents = {
        "file.arrow": arrow(table),
        "stream.arrow": arrow(table, pa.ipc.new_stream),
        "lz4.feather": arrow(table, compression="lz4"),
        "zstd.arrow": arrow(table, pa.ipc.new_stream, compression="zstd"),
        "datasets.arrow": shard.read_bytes(),
        "packed.arrow.bz2": bz2.compress(arrow(table)),
        "a.parquet": parquet(CHAT),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == CHAT, name
    assert read(tmp_path / "saved") == CHAT
    pa.feather.write_feather(table, tmp_path / "a.feather")
    assert read(tmp_path / "a.feather") == CHAT


def test_columns_of_words_views_and_maps(tmp_path):
    kind = pa.map_(pa.string(), pa.struct([("x", pa.int8()), ("y", pa.int8())]))
    table = pa.table(
        {
            "word": pa.array(["u", None, "v", "u"]).dictionary_encode(),
            "view": pa.array(["p", "q" * 50, None, "r"], pa.string_view()),
            "map": pa.array([[("k", {"x": 1})], [], None, [("l", None)]], kind),
            "bytes": pa.array([b"1", None, b"", b"2"]),
        }
    )
    (tmp_path / "a.arrow").write_bytes(arrow(table))
    rows = read(tmp_path / "a.arrow")
    assert [row["word"] for row in rows] == ["u", None, "v", "u"]
    assert [row["view"] for row in rows] == ["p", "q" * 50, None, "r"]
    assert [row["map"] for row in rows] == [[("k", {"x": 1})], [], None, [("l", None)]]


def test_nulls_of_the_hub_and_nulls_of_json(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list(CHAT))
    assert read("someone/chat") == CHAT
    explicit = [{"a": {"b": None, "c": [None, {"d": None}]}, "e": None}]
    for name, text in {"a.jsonl": json.dumps(explicit[0]), "a.json": json.dumps(explicit)}.items():
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == explicit


TEXT_OR_LIST = st.one_of(st.text(max_size=3), st.integers(0, 9), st.booleans())


def shapes():
    """A shape of a nested value, with which some keys may be absent."""
    leaves = st.sampled_from([str, int])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1), st.tuples(inner)
        ),
        max_leaves=5,
    )  # fmt: skip


@st.composite
def values(draw, shape):
    """A value of a shape: objects lack some keys, lists have elements that are null."""
    if shape in (str, int):
        return draw(st.text(max_size=2) if shape is str else st.integers(0, 9))
    if isinstance(shape, tuple):
        return draw(st.lists(st.one_of(st.none(), values(shape[0])), max_size=3))
    return {key: draw(values(inner)) for key, inner in shape.items() if draw(st.booleans())}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_arrow_fills_in_is_taken_out(tmp_path_factory, data):
    """Rows go through Parquet and come back as they were: only absent keys were null in them, and they are absent."""
    shape = data.draw(shapes())
    rows = [{"number": number, "value": data.draw(values(shape))} for number in range(data.draw(st.integers(1, 5)))]

    def type_of(shape):
        if isinstance(shape, dict):
            return pa.struct([(key, type_of(inner)) for key, inner in shape.items()])
        return pa.list_(type_of(shape[0])) if isinstance(shape, tuple) else pa.string() if shape is str else pa.int64()

    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    schema = pa.schema([("number", pa.int64()), ("value", type_of(shape))])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    assert read(path) == rows


def of_nulls():
    return pa.table({"a": pa.ListArray.from_arrays(pa.array([0, 2**28], pa.int32()), pa.nulls(2**28))})


def of_one_word():
    return pa.table(
        {"a": pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array(["x" * 10**6]))}
    )


def of_one_view():
    view = pa.array(["x" * 10**6], pa.string_view())
    fields = np.frombuffer(view.buffers()[1], np.uint8)
    buffers = [None, pa.py_buffer(np.tile(fields, 10**4)), view.buffers()[2]]
    return pa.table({"a": pa.Array.from_buffers(pa.string_view(), 10**4, buffers)})


def declared(content):
    """The first packed buffer says that it holds 2^40 bytes."""
    return re.sub(rb".{8}(?=\x28\xb5\x2f\xfd)", struct.pack("<q", 2**40), content, count=1, flags=re.DOTALL)


TEXTS_ALIKE = pa.array(["x" * 2**16] * 100)
BOMBS = {
    "nulls": lambda: arrow(of_nulls()),
    "rows of nothing": lambda: arrow(pa.table({"a": pa.nulls(2**31 - 1)})),
    "rows without columns": lambda: arrow(pa.table({"a": pa.nulls(2**31 - 1)}).select([])),
    "one word in every row": lambda: arrow(of_one_word()),
    "one view in every row": lambda: arrow(of_one_view()),
    "zstd": lambda: declared(arrow(pa.table({"a": TEXTS_ALIKE}), compression="zstd")),
    "zstd, as a stream": lambda: declared(arrow(pa.table({"a": TEXTS_ALIKE}), pa.ipc.new_stream, compression="zstd")),
    "zstd, in a dictionary": lambda: declared(
        arrow(pa.table({"a": TEXTS_ALIKE.dictionary_encode()}), compression="zstd")
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_arrow_that_holds_more_than_it_seems(tmp_path, name):
    (tmp_path / "a.arrow").write_bytes(BOMBS[name]())
    with pytest.raises(ValueError, match=r"^a\.arrow unpacks to more than [0-9,]+ bytes"):
        next(file_rows(tmp_path / "a.arrow"))


def test_buffers_packed_as_before_arrow_1(tmp_path):
    """The compression stands beside the batch then; here the buffer says that it unpacks to 2^40 bytes."""
    batch = pa.record_batch({"a": [2**40]})
    old = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=old) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().to_pybytes())
    assert refusal(tmp_path / "a.arrow").startswith("a.arrow unpacks to more than 67,")


def unlike_text():
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    return pa.table({"a": column})


def test_arrow_that_is_none(tmp_path):
    whole = arrow(pa.Table.from_pylist(CHAT))
    contents = [whole[:end] for end in (0, 5, 6, 8, 100, len(whole) // 2, len(whole) - 1)]
    contents += [LINES.encode(), bytes(100), whole[:8] + bytes(len(whole) - 14) + whole[-6:], arrow(unlike_text())]
    for content in contents:
        (tmp_path / "a.arrow").write_bytes(content)
        assert refusal(tmp_path / "a.arrow").startswith("a.arrow is not Arrow")
    (tmp_path / "a.arrow").write_bytes(arrow(pa.table({"a": pa.array([2**62], pa.timestamp("s"))})))
    assert refusal(tmp_path / "a.arrow").startswith("a.arrow holds what cannot be read in rows 1 to 1: ")
    (tmp_path / "a.arrow").write_bytes(arrow(pa.table({"a": pa.array([["x"]], pa.list_view(pa.string()))})))
    assert refusal(tmp_path / "a.arrow").startswith("a.arrow has a column of Arrow's type list_view")
    pyarrow.parquet.write_table(unlike_text(), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith("a.parquet holds what cannot be read in rows 1 to 1: ")
