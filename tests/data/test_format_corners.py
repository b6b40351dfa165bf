"""Corners of the formats in which data was once read wrongly or a message was none."""

import bz2
import gzip
import json

import pytest

from dpo_ref.data import sources
from dpo_ref.types import Message


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def read(tmp_path, *rows, name="rows.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return sources.preferences(0, path=str(path), **options)


def groups(tmp_path, *rows, **options):
    return [(g.prompt[-1]["content"], *g.responses) for g in read(tmp_path, *rows, **options).train]


PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("say the cat sat", "say the category", ("say the", "cat sat", "category")),
        ("say the cat sat", "say the cat ran", ("say the cat", "sat", "ran")),
        ("Q: why?\nYes it", "Q: why?\nNo it", ("Q: why?", "Yes it", "No it")),
        ("天空是蓝的", "天空是绿的", ("天空是", "蓝的", "绿的")),
    ],
)
def test_the_words_two_texts_begin_with(tmp_path, chosen, rejected, expected):
    assert groups(tmp_path, {"chosen": chosen, "rejected": rejected}) == [expected]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufeffprompt,chosen,rejected\nWhat?,yes it is,yes he is\n".encode())
    (group,) = sources.preferences(0, path=str(tmp_path / "rows.csv")).train
    assert group.prompt == (Message(role="user", content="What?"),)
    assert groups(tmp_path, "\ufeff" + json.dumps(PAIR)) == [("why?", "because", "no idea")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, PAIR | {"prompt": None}], "row 2 has null in prompt"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "label": False}], "format unpaired"),
        ([PAIR, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}], "format hh"),
        ([{"text": "a"}, PAIR | {"text": "b"}], "row 2 looks like format preference"),
        ([{"prompt": "a", "rejected": "b"}], "nearest is data.format=preference"),
        ([{"prompt": "a", "responses": ["b", "c"], "scores": []}], "empty list in scores"),
        ([{"prompt": "a", "responses": ["b", "c"], "scores": 3}], "has a int in scores, where a list"),
        ([{"question": "a", "answers": [1, 2]}], "has 1 in answers, where an object is expected"),
        ([{"instruction": "a", "completions": [{"response": "b", "annotations": {"x": 3}}]}], "has 3 in x, where an"),
        (['{"prompt": ' + "1" * 5000 + "}"], "row 1 is JSON that cannot be read"),
        (["[" * 200_000], "row 1 is JSON that cannot be read"),
        ([{"info": {"post": "p", "title": "\ud800"}, "summaries": [{"text": "a"}] * 2, "choice": 0}], "half a s"),
        ([PAIR | {"tools": [{"name": "\ud800"}]}], "half a surrogate pair in tools"),
        ([PAIR | {"prompt": [{"role": "wizard" * 400, "content": "x"}]}], "unknown role 'wizardwizard"),
        ([PAIR | {"prompt": [{"role": "user", "content": "x", "tool_calls": "x"}]}], "not JSON in prompt.tool_calls"),
    ],
)  # fmt: skip
def test_refused_with_row_and_reason(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, *rows)
    assert "rows.jsonl row" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40),
        ("a.jsonl.bz2", b"BZh9" + b"\xff" * 40),
        ("a.jsonl.bz2", bz2.compress(b"{}\n" * 400)[:-20] + b"\0" * 20),
        ("a.parquet", b"PAR1" + b"\xff" * 60 + b"PAR1"),
    ],
)
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.\w+.*(damaged|cannot be read|not Parquet)"):
        sources.preferences(0, path=str(tmp_path / name), on_bad_row="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "names no source"),
        ({"sources": [{"path": "a.jsonl", "weight": "x"}]}, "weight=x of a.jsonl must be a positive number"),
        ({"sources": [{"path": "a.jsonl"}], "streaming": True}, "data.streaming=True has no effect"),
        ({"path": "a.jsonl", "min_chars": 5, "max_chars": 2}, "above data.max_chars=2"),
    ],
)
def test_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        sources.preferences(0, **options)


def test_an_eval_split_of_a_file_is_called_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"data\.eval_split=test has no effect"):
        read(tmp_path, PAIR, eval_split="test")


def test_texts_without_prompts_can_be_held_out(tmp_path):
    data = read(tmp_path, *({"text": f"text {i}"} for i in range(10)), eval_fraction=0.3)
    assert (len(data.train), len(data.eval), data.test_prompts) == (7, 3, [])


def test_ratios_are_asked_of_every_pair(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "scores": [10, 9, 1]},
        {"prompt": "b", "responses": ["x", "y", "z"], "scores": [10, 4, 3]},
    ]
    data = read(tmp_path, *rows, pairing="all", min_score_ratio=2.0)
    assert [group.pairs for group in data.train] == [((0, 2), (1, 2)), ((0, 1), (0, 2))]
    (equal,) = [{"prompt": "a", "responses": ["x", "x"], "scores": [2, 1]}]
    data = read(tmp_path, equal, PAIR | {}, rows[0], name="b.jsonl", on_bad_row="skip", max_bad_share=1.0)
    assert data.reading.dropped == {"equal responses": 1, "bad rows": 1}


def test_labels_and_tools_make_rows_differ(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, True)]
    assert [group.labels for group in read(tmp_path, *rows, deduplicate="exact").train] == [(True,), (False,)]
    tools = [PAIR | {"tools": [{"name": name}]} for name in ("f", "g", "f")]
    assert len(read(tmp_path, *tools, deduplicate="exact", name="b.jsonl").train) == 2


def test_parquet_puts_no_nulls_into_tools(tmp_path):
    from datasets import Dataset

    tools = [[{"properties": {name: {"type": "string"}}}] for name in ("city", "day")]
    Dataset.from_list([PAIR | {"tools": schemas} for schemas in tools]).to_parquet(tmp_path / "rows.parquet")
    data = sources.preferences(0, path=str(tmp_path / "rows.parquet"))
    assert [list(group.tools) for group in data.train] == tools


def test_labels_as_csv_spells_them(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,True\na,c,0\n")
    assert [group.labels for group in sources.preferences(0, path=str(tmp_path / "rows.csv")).train] == [
        (True,),
        (False,),
    ]


def test_the_share_of_bad_rows_is_compared_exactly(tmp_path):
    rows = [PAIR | {"prompt": f"why {i}"} for i in range(71)] + ["{"] * 29
    assert len(read(tmp_path, *rows, on_bad_row="skip", max_bad_share=0.29).train) == 71


def test_one_object_around_the_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [PAIR]}))
    with pytest.raises(ValueError, match="its rows are in 'data': save that list alone"):
        sources.preferences(0, path=str(tmp_path / "rows.json"))
