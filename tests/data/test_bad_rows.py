"""Malformed rows and files: one message each that names the place, the reason and the remedy; or they are counted."""

import gzip
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpo_ref.data.sources import preferences
from tests.support.format_rows import CASES

REMEDY = ". data.on_bad_row=skip leaves such rows out"
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
OTHER, SYSTEM = {"role": "user", "content": "who?"}, {"role": "system", "content": "Be kind."}
GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}
BAD = {"prompt": "why?", "chosen": 12, "rejected": "no idea"}
NO_TEXT = "has a chosen that is neither text nor a list of messages"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def refused(path, **options):
    """The message with which a source is refused."""
    with pytest.raises(ValueError) as error:
        preferences(0, path=str(path), **options)
    return str(error.value)


def turn(role, content):
    return {"role": role, "content": content}


def but(**changed):
    return {**GOOD, **changed}


CALL = {"name": "tide", "arguments": {"harbour": "Husum"}}


def calls(*entries):
    return {"role": "assistant", "content": None, "tool_calls": list(entries)}


def deep(levels):
    """A list in a list in a list."""
    return [deep(levels - 1)] if levels else "far"


ROWS = {
    "comma missing": (b'{"prompt": "q", "chosen": "a" "rejected": "b"}', "is not JSON (Expecting ',' delimiter at"),
    "no JSON": (b"why? because", "is not JSON (Expecting value at column 1)"),
    "column missing": (
        {"prompt": "q", "chosen": "a", "rating": 3},
        "has no rejected; its columns are prompt, chosen, rating; data.format=preference expects chosen, rejected",
    ),
    "many columns": ({f"c{i}": i for i in range(9)}, "its columns are c0, c1, c2, c3, c4, c5, c6, c7, ...;"),
    "null text": (but(rejected=None), "has null in rejected"),
    "null content": (but(chosen=[turn("assistant", None)]), "has null in chosen (assistant turn), where text is"),
    "numeric content": (but(rejected=[turn("assistant", 7)]), "has a int in rejected (assistant turn), where text is"),
    "empty part": (but(prompt=[turn("user", [{"type": "text"}])]), "has null in prompt (user turn), where text is"),
    "image": (
        but(prompt=[turn("user", [{"type": "text", "text": "why?"}, {"type": "image"}])]),
        "has content of type image in prompt (user turn); only parts {type: text, text: ...} are read",
    ),
    "part with more": (
        but(chosen=[turn("assistant", [{"type": "text", "text": "so.", "audio": "a.wav"}])]),
        "has content with audio in chosen (assistant turn); only parts {type: text,",
    ),
    "no turn": (but(chosen=["so."]), "a turn that is not {role: system|user|assistant|tool, content: text}"),
    "empty list": (but(chosen=[]), "has an empty list in chosen"),
    "empty prompt": (but(prompt=[]), "has an empty list in prompt"),
    "two answers": (
        but(chosen=[ANSWER, ANSWER]),
        "has roles out of order in prompt and chosen: turn 3 is assistant after a turn of assistant; it must answer",
    ),
    "users in a row": (
        but(prompt=[USER, OTHER]),
        "has roles out of order in prompt: turn 2 is user after a turn of user; join what one speaker says into one",
    ),
    "late system": (
        but(prompt=[USER, SYSTEM, USER]),
        "roles out of order in prompt: turn 2 is system after a turn of user; it must be the first, and the only one",
    ),
    "two system turns": (but(prompt=[SYSTEM, SYSTEM, USER]), "turn 2 is system after a turn of system; it must be"),
    "assistant first": (but(prompt=[ANSWER, USER]), "of order in prompt: turn 1 is assistant at the beginning"),
    "two systems": (
        but(prompt=[SYSTEM, USER], system="Be brief."),
        "has a system turn in the prompt and a column system; data.ignore=[system] keeps the turn",
    ),
    "result without a call": (
        but(prompt=[USER, ANSWER, turn("tool", "2.4")]),
        "has a tool's result without its call in prompt: turn 3; the assistant's tool_calls must hold it",
    ),
    "result of another call": (
        but(prompt=[USER, calls({"id": "c1", "function": CALL}), turn("tool", "2.4") | {"tool_call_id": "c9"}]),
        "has a tool's result without its call in prompt: turn 3 answers 'c9', while the calls before it are c1",
    ),
    "result first": (but(prompt=[turn("tool", "2.4")]), "turn 1 is tool at the beginning; it must follow the assis"),
    "calls are none": (but(chosen=[calls("tide")]), "has tool_calls in chosen that are not a list of objects"),
    "call without a name": (
        but(chosen=[calls({"function": {"arguments": {}}})]),
        "has a call in chosen.tool_calls without a name; it is {function: {name, arguments}}",
    ),
    "arguments cut": (
        but(chosen=[calls({"function": {"name": "tide", "arguments": '{"harbour": '}})]),
        "has text that is not JSON in the arguments of tide in chosen: '{\"harbour\": '",
    ),
    "arguments are a list": (
        but(chosen=[calls({"function": {"name": "tide", "arguments": ["Husum"]}})]),
        "has ['Husum'] as the arguments of tide in chosen; they are an object",
    ),
    "empty turn between": (
        but(chosen=[calls({"function": CALL}), turn("tool", "2.4"), turn("assistant", "")]),
        "has an empty chosen: its turn 3 has neither words nor calls",
    ),
    "ends with a result": (
        but(chosen=[calls({"function": CALL}), turn("tool", "2.4")]),
        "has a chosen that ends with a turn of tool; it must end with the assistant",
    ),
    "deep": (
        but(chosen=[turn("assistant", "so.") | {"why": deep(80)}]),
        "has more than 64 lists and objects inside each other in chosen.why",
    ),
    "speaker": (but(chosen={"from": "bing", "value": "so."}), "has the unknown speaker 'bing' in chosen; known are s"),
    "written call": (
        but(chosen={"from": "function_call", "value": "tide(Husum)"}),
        "has text that is not JSON in a function_call in chosen, which is {name, arguments}: 'tide(Husum)'",
    ),
    "options": (
        but(chat_template_kwargs="thinking"),
        "has 'thinking' in chat_template_kwargs, where an object such as {enable_thinking: false} is expected",
    ),
    "no answer": ({"chosen": [USER], "rejected": [USER, ANSWER]}, "has a chosen that ends with a turn of user"),
    "unequal prompts": (
        {"chosen": [USER, ANSWER], "rejected": [OTHER, ANSWER]},
        "has conversations in chosen and rejected that part at a turn of the user: two prompts, where one is expected",
    ),
    "another prompt": (but(rejected=[OTHER, ANSWER]), "has a rejected whose conversation begins with another prompt"),
    "nothing shared": ({"chosen": "Yes it is", "rejected": "No"}, "has an empty prompt"),
    "NUL": (but(rejected="no\0thing"), "has a NUL character in rejected (assistant turn)"),
    "surrogate": (
        b'{"prompt": "q", "chosen": "ab\\ud800", "rejected": "b"}',
        "has half a surrogate pair in chosen (assistant turn) (character 2): the file was cut or mis-decoded",
    ),
    "10 MB": (
        but(chosen="a" * 10 * 2**20),
        "has 10,485,760 characters in chosen (assistant turn); at most 1,048,576 are taken for one text",
    ),
    "role": (but(chosen=[turn("gpt", "so.")]), "has the unknown role 'gpt' in chosen; known are system, user,"),
    "score": (but(score_chosen="good", score_rejected=1), "has 'good' in score_chosen, where a finite number is exp"),
    "NaN": (but(score_chosen=1, score_rejected=float("nan")), "has nan in score_rejected, where a finite number is"),
    "tools": (but(tools="weather("), "has tools that are not JSON; they are a list of JSON schemas, or its text"),
    "tools of words": (but(tools=["weather"]), "has tools that are not JSON"),
    "tools of numbers": (but(tools=[3]), "has tools that are not a list of JSON schemas"),
    "mixed": (CASES["kto"].rows[0], "looks like format unpaired, while the rows before are preference"),
    "mixed scored": (CASES["shp"].rows[0], "looks like format shp, while the rows before are preference"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_message_for_a_pair(tmp_path, name):
    bad, reason = ROWS[name]
    path = written(tmp_path / "pairs.jsonl", [GOOD, bad, GOOD])
    message = refused(path)
    assert message.startswith("pairs.jsonl row 2 ")
    assert reason in message
    assert message.endswith(REMEDY)
    assert len(message) < 400


HH = "\n\nHuman: why?\n\nAssistant:"
FORMATS = [
    ("sft_messages", {"messages": [USER, ANSWER, OTHER]}, "has messages that end with a turn of user; a demon"),
    ("sft_messages", {"messages": [SYSTEM, ANSWER]}, "has a prompt that ends with a turn of system; it must end with"),
    ("sft_messages", {"messages": [USER, turn("assistant", " ")]}, "has an empty response 1"),
    ("sft_text", {"text": " \n"}, "has an empty text"),
    ("alpaca", {"instruction": "", "input": ""}, "has nothing in instruction or input"),
    ("kto", {"label": "yes"}, "has 'yes' in label, where true or false"),
    ("hh", {"chosen": f"{HH} so.\n\nHuman: who?"}, "has a dialogue that does not end with an assistant turn"),
    ("hh", {"chosen": f"{HH} so."}, "has dialogues that differ before their last assistant turn"),
    ("shp", {"labels": 2}, "has 2 in labels, where true or false (1 or 0) is expected"),
    ("shp", {"score_B": None}, "has null in score_B"),
    ("summarize_from_feedback", {"choice": 2}, "has 2 in choice, where true or false (1 or 0) is expected"),
    ("summarize_from_feedback", {"summaries": [{"text": "Cat."}]}, "has 1 summaries, where two are compared"),
    ("alpaca_eval", {"preference": 0}, "has 0 in preference, which runs from 1 (the first is better) to 2"),
    ("helpsteer2", {"helpfulness": "much"}, "has 'much' in helpfulness, where a finite number is expected"),
    ("helpsteer3", {"context": 4}, "has a context that is neither text nor a list of messages"),
    ("stack_exchange", {"answers": "none"}, "has a str in answers, where a list is expected"),
    ("stack_exchange", {"answers": [{"text": "<p>a</p>"}]}, "has no pm_score; its columns are text"),
    ("ultrafeedback", {"completions": []}, "has an empty list in completions"),
    ("ultrafeedback", {"completions": ["A cod."]}, "has 'A cod.' in completions, where an object is expected"),
    ("ultrafeedback", {"completions": [{"response": "A cod."}]}, "has a completion without ratings"),
    ("ranked_scores", {"scores": [1, 2]}, "has 3 responses and 2 scores or ranks"),
    ("ranked_scores", {"responses": ["a", None, "b"]}, "has null in responses, where text is expected"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changed", "reason"), FORMATS)
def test_message_for_each_format(tmp_path, name, changed, reason):
    row = CASES[name].rows[0]
    message = refused(written(tmp_path / "rows.jsonl", [row, {**row, **changed}]))
    assert message.startswith(f"rows.jsonl row 2 {reason}")
    assert message.endswith(REMEDY)


def test_first_row_that_fits_no_format(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"question": "why?", "reply": "so."}, GOOD])
    message = refused(path)
    assert message.startswith(
        "rows.jsonl row 1 fits no known format; its columns are question, reply. The nearest is "
    )
    assert "data.format=stack_exchange, which needs answers, question" in message
    named = refused(path, format="preference")
    assert "row 1 has no chosen; its columns are question, reply; data.format=preference expects chosen, rej" in named


def test_row_number_far_into_a_file(tmp_path):
    path = written(tmp_path / "rows.jsonl", [*[GOOD] * 1999, BAD, GOOD])
    assert refused(path) == f"rows.jsonl row 2000 {NO_TEXT}{REMEDY}"
    written(path, [GOOD, b"", b"  ", BAD])
    assert refused(path) == f"rows.jsonl row 4 {NO_TEXT}{REMEDY}"  # the number is the line's


def parquet(rows):
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


MANY = "".join(json.dumps(but(prompt=f"why {i * i}?")) + "\n" for i in range(1000)).encode()
FILES = {
    "cut.jsonl.gz": (gzip.compress(MANY, mtime=0)[:-1000], "cut.jsonl.gz: the file cannot be read, or is damaged"),
    "plain.jsonl.gz": (MANY, "plain.jsonl.gz: the file cannot be read, or is damaged or cut short"),
    "plain.json.xz": (MANY, "plain.json.xz: the file cannot be read, or is damaged or cut short"),
    "cut.parquet": (parquet([GOOD] * 50)[:-60], "cut.parquet is not Parquet: "),
    "text.parquet": (MANY, "text.parquet is not Parquet: "),
    "empty.parquet": (b"", "empty.parquet is not Parquet: "),
    "cut.json": (json.dumps([GOOD] * 3).encode()[:-9], "cut.json is not JSON: "),
    "latin.csv": ("prompt,chosen,rejected\nq,é,b\n".encode("latin-1"), "latin.csv is not UTF-8 (byte 25)"),
    "rows.zip": (b"PK", "rows.zip is none of .jsonl, .json, .csv, .tsv, .parquet"),
    "rows.jsonl.zip": (b"PK", "rows.jsonl.zip is none of .jsonl, .json, .csv, .tsv, .parquet"),
    "rows.txt": (MANY, "rows.txt is none of .jsonl, .json, .csv, .tsv, .parquet"),
    "rows.gz": (gzip.compress(MANY, mtime=0), "rows.gz is none of .jsonl, .json, .csv, .tsv, .parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(tmp_path, cache, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    for on_bad_row in ("error", "skip"):  # half a file is not a bad row
        assert message in refused(tmp_path / name, on_bad_row=on_bad_row)
        assert not [path for path in cache.rglob("*") if path.is_file()]


def test_folder_without_data(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.zip").write_bytes(b"PK")
    assert "rows: rows.zip cannot be read; data files are .jsonl, .json, " in refused(tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", b"prompt,chosen,rejected\nq,a,b\nq,a,b,c\nq,a,b\n", "has more cells than the header has columns"),
        ("rows.csv", b"prompt,chosen,rejected\nq,a,b\nq,a\nq,a,b\n", "has null in rejected"),
        ("rows.tsv", b"prompt\tchosen\trejected\nq\ta\tb\nq\ta\ta\nq\ta\tb\n", "has chosen equal to rejected"),
        ("rows.json", json.dumps([GOOD, [GOOD], GOOD]).encode(), "is a JSON list, not an object"),
        ("rows.json", b"".join(json.dumps(row).encode() + b"\n" for row in (GOOD, BAD, GOOD)), NO_TEXT),
        ("rows.parquet", parquet([GOOD, but(chosen=None), GOOD]), "has null in chosen"),
        ("rows.jsonl.gz", gzip.compress(b"\n{\n".join([json.dumps(GOOD).encode()] * 2), mtime=0), "is not JSON"),
    ],
)  # fmt: skip
def test_bad_row_of_other_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert message.startswith(f"{name} row 2 {reason}")
    assert message.endswith(REMEDY)
    kept = preferences(0, path=str(tmp_path / name), on_bad_row="skip", max_bad_share=0.4)
    assert [group.origin for group in kept.train] == [f"{name} row 1", f"{name} row 3"]


def test_skipped_rows_are_counted_and_the_first_ten_listed(tmp_path):
    path = written(tmp_path / "rows.jsonl", [row for i in range(12) for row in (but(prompt=f"q {i}"), GOOD, BAD)])
    skip = partial(preferences, 0, path=str(path), on_bad_row="skip", max_bad_share=0.34, deduplicate="exact")
    for data in (skip(), skip()):  # the second reading is the one kept
        assert (data.reading.num_rows, len(data.train)) == (36, 13)
        assert data.reading.dropped == {"bad rows": 12, "a duplicate": 11}
        assert data.reading.examples == tuple(f"rows.jsonl row {row} {NO_TEXT}" for row in range(3, 33, 3))


def test_share_of_bad_rows(tmp_path):
    path = written(tmp_path / "rows.jsonl", [GOOD, BAD, GOOD, BAD, GOOD, BAD, GOOD, BAD])
    skip = {"on_bad_row": "skip"}
    assert len(preferences(0, path=str(path), max_bad_share=0.5, **skip).train) == 4
    message = refused(path, max_bad_share=0.49, **skip)
    assert message.startswith(
        f"{path}: 4 of 8 rows cannot be used, more than data.max_bad_share=0.49, such as: rows.j"
    )
    assert [f"row {row} has" in message for row in (2, 4, 6, 8)] == [True, True, True, False]
    assert "3 bad rows; rows.jsonl row 1 has" in refused(written(path, [BAD] * 3), max_bad_share=0.0, **skip)


def test_share_is_judged_while_reading(tmp_path):
    """Bad rows after 1,000 good ones are too many at the 112th: 112 > 0.1 · 1,112, while 111 < 0.1 · 1,111."""
    path = written(tmp_path / "rows.jsonl", [*[GOOD] * 1000, *[BAD] * 2000])
    assert ": 112 of 1112 rows cannot be used, more than data.max_bad_share=0.1" in refused(path, on_bad_row="skip")
    written(path, [GOOD, *[BAD] * 300, *[GOOD] * 2699])  # all in the first 1,000 rows, which are not judged yet
    data = preferences(0, path=str(path), on_bad_row="skip")
    assert (data.reading.dropped, len(data.train)) == ({"bad rows": 300}, 2700)
    assert ": 300 of 3000 rows" in refused(path, on_bad_row="skip", max_bad_share=0.0999)
