"""Files as people name and write them: what is held out is not trained on, and what is no row, or says two things, is
refused by file, place and remedy instead of read in part."""

import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_ref.data.formats.checks import BadRow, json_text, written_out
from dpo_ref.data.readers import file_rows
from dpo_ref.data.sources import preferences
from tests.data.test_sources import fill, opened, prompts

LINE = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def refusal(path, **source):
    with pytest.raises(ValueError) as error:
        list(opened(path, **source).rows)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"data.path={path}")


def rows_of(path):
    return [row for _, row in file_rows(path)]


def bad(path):
    """The bad rows of a file with their names, as messages begin."""
    return [f"{name} {row}" for name, row in file_rows(path) if isinstance(row, BadRow)]


# --- splits of folders


PAIRS_OF_NAMES = {
    "training": ("training.jsonl", "testing.jsonl", "test"),
    "trainset": ("trainset.jsonl", "testset.jsonl", "test"),
    "traindata": ("traindata.jsonl", "testdata.jsonl", "test"),
    "in the middle": ("pairs_train_v2.jsonl", "pairs_test_v2.jsonl", "test"),
    "before a kind": ("uf_train_prefs.jsonl", "uf_test_prefs.jsonl", "test"),
    "camel first": ("trainPairs.jsonl", "testPairs.jsonl", "test"),
    "camel last": ("pairsTrain.jsonl", "pairsTest.jsonl", "test"),
    "behind capitals": ("HHTrain.jsonl", "HHTest.jsonl", "test"),
    "in brackets": ("pairs (train).jsonl", "pairs (test).jsonl", "test"),
    "behind a blank": ("hh train.jsonl", "hh test.jsonl", "test"),
    "shouted": ("PAIRS_TRAIN.jsonl", "PAIRS_TEST.jsonl", "test"),
    "numbered": ("train1.jsonl", "test1.jsonl", "test"),
    "in the folder of train": ("train/train.jsonl", "train/test.jsonl", "test"),
    "in folders": ("training/0.jsonl", "my held-out/0.jsonl", "heldout"),
    "in data": ("data/uf_train_prefs.jsonl", "data/uf_test_prefs.jsonl", "test"),
    "heldout": ("train.jsonl", "held_out.jsonl", "held-out"),
    "validate": ("train.jsonl", "validate.jsonl", "val"),
    "evaluation": ("train.jsonl", "evaluation.jsonl", "eval"),
    "benchmark": ("train.jsonl", "benchmark.jsonl", "benchmark"),
}


@pytest.mark.parametrize("case", PAIRS_OF_NAMES)
def test_held_out_files_are_not_trained_on(tmp_path, case):
    train, held_out, split = PAIRS_OF_NAMES[case]
    folder = fill(tmp_path / "rows", train, held_out)
    assert prompts(folder) == [train]
    assert prompts(folder, split=split, split_key="data.eval_split") == [held_out]
    assert f"; {held_out} is held back (data.eval_split=" in opened(folder).notes[0]
    hinted = re.search(r"data\.eval_split=(\w+)", opened(folder).notes[0])[1]
    assert prompts(folder, split=hinted, split_key="data.eval_split") == [held_out]


HELD_OUT = ["heldout", "held_out", "held-out", "holdout", "hold_out", "evaluation", "eval", "tests", "validate"]
HELD_OUT += ["benchmark", "testing", "devset", "unseen test", "pairsHeldOut", "benchmarks_v2", "2024-test-05"]


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_file_beside_one_that_says_nothing(tmp_path, name):
    assert refusal(fill(tmp_path, "pairs.jsonl", f"{name}.jsonl")) == (
        f": a split is in the name of {name}.jsonl, and none in that of pairs.jsonl; rename those, or move them out"
    )
    (tmp_path / "pairs.jsonl").unlink()
    assert re.fullmatch(r" has the splits \w+ and no train; data\.split=\w+ reads that", refusal(tmp_path))


NO_SPLITS = ["contest", "latest", "greatest", "trainer", "attested", "evaluated", "retrain", "devil", "interval"]
NO_SPLITS += ["Contest", "devices", "validated", "testament", "trainees_v2", "upheld_outcry", "thresholdout"]


def test_words_that_hold_the_name_of_a_split(tmp_path):
    names = sorted(f"{name}.jsonl" for name in NO_SPLITS)
    assert prompts(fill(tmp_path, *names)) == names
    assert opened(tmp_path).notes == ()


LETTERS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    around=st.tuples(LETTERS, LETTERS).filter(lambda both: not {"test", "val", "dev", "eval"} & set(both)),
    border=st.sampled_from(["_", "-", ".", " ", "__", "2", "(", "_v3_"]),
    word=st.sampled_from(["test", "Test", "TEST", "heldout", "eval", "dev", "benchmark", "testset"]),
)
def test_a_split_between_what_is_no_letter(tmp_path_factory, around, border, word):
    """The file is held back whatever surrounds the word, if its letters end there; else it is as any other."""
    folder = tmp_path_factory.mktemp("rows")
    assert prompts(fill(folder, "train.jsonl", f"{border.join((around[0], word, around[1]))}.jsonl")) == [
        "train.jsonl"
    ]
    folder = tmp_path_factory.mktemp("rows")
    fill(folder, "train.jsonl", f"{around[0]}{word.lower()}{around[1]}.jsonl")
    assert ": a split is in the name of train.jsonl, and none in" in refusal(folder)


@pytest.mark.parametrize("name", ["train_test.jsonl", "test-of-train.jsonl", "test/train.jsonl", "dev/train/0.jsonl"])
def test_a_name_of_two_splits(tmp_path, name):
    message = refusal(fill(tmp_path, "train.jsonl", name))
    assert re.fullmatch(rf": {re.escape(name)} is of two splits by its name, train and \w+; rename it", message)


def test_the_own_name_of_a_file_goes_before_its_folder(tmp_path):
    fill(tmp_path, "train/a.jsonl", "train/test.jsonl", "dev/test.jsonl", "dev/b.jsonl")
    assert prompts(tmp_path) == ["train/a.jsonl"]
    assert prompts(tmp_path, split="test") == ["dev/test.jsonl", "train/test.jsonl"]
    assert prompts(tmp_path, split="dev") == ["dev/b.jsonl"]


KINDS = {
    "UltraFeedback": ("train_gen", "train_prefs", "train_sft", "test_prefs"),
    "shards": ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft-00000-of-00001"),
    "versions": ("train_sft_v2", "train_preferences.v1"),
    "camels": ("trainPrefs", "trainSft"),
    "without splits": ("my_prefs", "my_sft"),
}


@pytest.mark.parametrize("case", KINDS)
def test_sets_of_different_kinds(tmp_path, case):
    names = [f"{name}.jsonl" for name in KINDS[case]]
    message = refusal(fill(tmp_path, *names))
    assert " are sets of different kinds by their names; read one by data." in message
    assert message.endswith("data.path=its file, or several by data.sources=[...]")
    option = re.search(r"by data\.split=([^,]+), ", message)
    assert (option is None) == (case == "without splits")
    if option:
        one = prompts(tmp_path, split=option[1])
        assert len({re.sub(r"-\d+", "", name) for name in one}) == 1
    assert prompts(tmp_path / names[0]) == [names[0]]


SEVERAL = ("a b", "2024-01-01 2024-01-02", "part-00000-of-00002 part-00001-of-00002", "pairs_v1 pairs_v2")
SEVERAL += ("math_prefs chat_prefs", "sft-model-pairs dpo-model-pairs", "sft_a b", "prefs pairs", "train_0 train_1")


@pytest.mark.parametrize("names", SEVERAL)
def test_ordinary_folders_of_several_files(tmp_path, names):
    names = sorted(f"{name}.jsonl" for name in names.split())
    assert prompts(fill(tmp_path, *names)) == names
    assert opened(tmp_path).notes == ()


def test_several_sets_of_one_split_are_noted(tmp_path):
    fill(tmp_path / "rows", "train.jsonl", "train_old.jsonl")
    assert opened(tmp_path / "rows").notes == ("rows: train.jsonl, train_old.jsonl are read",)
    fill(tmp_path / "twice", "train.json", "train.jsonl")
    assert opened(tmp_path / "twice").notes == ("twice: train.json, train.jsonl are read",)


# --- quotes in tables


HEADER = "prompt,chosen,rejected\n"
QUOTES = 'put a text that holds quotes into quotes, with each of its own twice (""), or save the rows as JSON lines'
BAD_QUOTES = {
    "never closed": (
        "a.csv", HEADER + 'Sky?,Blue.,"Round.\nSea?,Wet.,Dry.\nSun?,Hot.,Cold.\n',
        "the row of line 2 has a quote that is never closed",
    ),
    "never closed, without an end of line": (
        "a.csv", HEADER + 'Why?,So.,No.\nSky?,Blue.,"Round.', "the row of line 3 has a quote that is never closed",
    ),
    "never closed in the header": (
        "a.csv", '"prompt,chosen\nSky?,Blue.\n', "the row of line 1 has a quote that is never closed",
    ),
    "closed by another row's": (
        "a.csv", HEADER + 'Sky?,Blue.,"Round.\nSea?,Wet.,"Dry."\n',
        "line 3 has text behind a closing quote, in the row that begins in line 2",
    ),
    "text behind": ("a.csv", HEADER + 'Sky?,"Blue" he said,No\n', "line 2 has text behind a closing quote"),
    "blank behind": ("a.csv", HEADER + '"Sky?" ,Blue.,No\n', "line 2 has text behind a closing quote"),
    "in a TSV": ("a.tsv", 'prompt\tchosen\trejected\nA?\t"B" is it\tC\n', "line 2 has text behind a closing quote"),
    "backslashes": (
        "a.csv", HEADER + '\nWhy?,So.,No.\nSky?,"He said \\"blue\\"",No\n', "line 4 has text behind a closing quote",
    ),
    "behind semicolons": ("a.csv", 'sep=;\na;b\n"c" d;e\n', "line 3 has text behind a closing quote"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_QUOTES)
def test_quotes_that_do_not_fit(tmp_path, case):
    name, content, reason = BAD_QUOTES[case]
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name) == f"{name} is not CSV: {reason}; {QUOTES}"


def test_a_blank_before_a_quote(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + 'Sky?, "Blue.", "Round."\nWhy?,So., No.\n"A?"," ""B"""," ""C, too"""\n')
    rows = rows_of(tmp_path / "a.csv")
    assert rows[1:] == [
        {"prompt": "Why?", "chosen": "So.", "rejected": " No."},
        {"prompt": "A?", "chosen": ' "B"', "rejected": ' "C, too"'},
    ]
    assert bad(tmp_path / "a.csv") == [
        f"a.csv row 1 has a blank before a quote in chosen (line 2); remove it, or {QUOTES}"
    ]


def test_quotes_inside_a_text_without_quotes(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + 'He said "hi",5" wide,"a ""b"" c"\n"two\nlines",\\,""\n')
    assert rows_of(tmp_path / "a.csv") == [
        {"prompt": 'He said "hi"', "chosen": '5" wide', "rejected": 'a "b" c'},
        {"prompt": "two\nlines", "chosen": "\\", "rejected": ""},
    ]


CELLS = st.text(st.sampled_from('ab ,;|\t\n"\\é'), max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    separator=st.sampled_from(",;|\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
@example(rows=[(' "', '" "')], quoting=csv.QUOTE_MINIMAL, separator=",", end="\n")
def test_what_csv_writes_is_read(tmp_path_factory, rows, quoting, separator, end):
    """Tables in every separator, also where the file's name promises commas, come back as they were."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, delimiter=separator, lineterminator=end)
    writer.writerows([("one", "two"), *rows])
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    path.write_bytes(text.getvalue().encode())
    assert rows_of(path) == [{"one": one, "two": two} for one, two in rows]


WORDS = st.text("abé ", min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), data=st.data())
def test_a_table_that_lacks_one_closing_quote(tmp_path_factory, rows, data):
    """Rows are never taken into a text: the file is refused, and the message names the row's line."""
    place = data.draw(st.integers(0, 2 * len(rows) - 1))
    cells = [f'"{cell}"' for row in rows for cell in row]
    cells[place] = cells[place][:-1]
    lines = [f"{one},{two}\n" for one, two in zip(cells[::2], cells[1::2], strict=True)]
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    path.write_text("".join(["one,two\n", *lines]))
    message = refusal(path)
    assert message.startswith("a.csv is not CSV: ")
    assert f"line {place // 2 + 2}" in message


# --- separators and headers


SEPARATED = {
    "semicolons": ("a.csv", "prompt;chosen\nSky, now?;Blue.\n"),
    "semicolons in quotes": ("a.csv", '"prompt";"chosen"\n"Sky, now?";"Blue."\n'),
    "tabs": ("a.csv", "prompt\tchosen\nSky, now?\tBlue.\n"),
    "bars": ("a.csv", "prompt|chosen\nSky, now?|Blue.\n"),
    "said": ("a.csv", "sep=;\r\nprompt;chosen\r\nSky, now?;Blue.\r\n"),
    "said in a TSV": ("a.tsv", "sep=|\nprompt|chosen\nSky, now?|Blue.\n"),
    "commas in a TSV": ("a.tsv", 'prompt,chosen\n"Sky, now?",Blue.\n'),
    "behind empty lines": ("a.csv", '\n \nprompt;chosen\n\n"Sky, now?";Blue.\n\n'),
}


@pytest.mark.parametrize("case", SEPARATED)
def test_other_separators(tmp_path, case):
    name, content = SEPARATED[case]
    (tmp_path / name).write_bytes(content.encode())
    assert rows_of(tmp_path / name) == [{"prompt": "Sky, now?", "chosen": "Blue."}]


HEADERS = {
    "two separators": (
        "a.csv", "prompt;chosen|rejected\n", "a.csv has no commas in its first line, which names the columns, but "
        "semicolons and bars; separate all cells by commas",
    ),
    "blanks": (
        "a.csv", "prompt, chosen\na, b\n", "a.csv has blanks around the name ' chosen' in its header; remove those "
        "beside separators, in rows as well",
    ),
    "bars with blanks": ("a.csv", "prompt | chosen\n", "a.csv has blanks around the name 'prompt ' in its header"),
    "a column twice": (
        "a.csv", "prompt,chosen,chosen\na,b,c\n", "a.csv has the column 'chosen' twice; rename or remove one of them",
    ),
    "a column thrice": ("a.tsv", "a\tb\tb\tb\n", "a.tsv has the column 'b' twice; rename or remove one of them"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(tmp_path, case):
    name, content, message = HEADERS[case]
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name).startswith(message)


def test_columns_without_a_name_are_told_apart(tmp_path):
    (tmp_path / "a.csv").write_text(",prompt,,\n1,a,,c\n2,b\n")
    assert rows_of(tmp_path / "a.csv") == [
        {"": "1", "prompt": "a", "column 3": "", "column 4": "c"},
        {"": "2", "prompt": "b", "column 3": None, "column 4": None},
    ]


# --- keys and columns that are there twice


TWICE = "has the key 'chosen' twice in one object; remove one of them"
LAYOUTS = {
    "lines": ("a.jsonl", "{}\n{}\n{}\n"),
    "a list": ("a.json", "[{},\n{}, {}]"),
    "objects over lines": ("a.json", "{\n{}\n\n{} {}"),
}


def filled(form, row):
    """Three rows, the second of which is given."""
    good = LINE[1:] if form.startswith("{\n") else LINE
    return form.replace("{}", "%s") % (good, row, LINE)


WITH_TWICE = {
    "top level": '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}',
    "in a turn": '{"prompt": "q", "chosen": [{"role": "assistant", "chosen": 1, "chosen": 1}], "rejected": "b"}',
    "deep": '{"a": {"b": [1, {"c": {"chosen": {}, "d": "}", "chosen": {}}}]}, "b": "{"}',
}


@pytest.mark.parametrize("case", WITH_TWICE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_key_twice_in_json(tmp_path, layout, case):
    (name, form), row = LAYOUTS[layout], WITH_TWICE[case]
    (tmp_path / name).write_text(filled(form, row))
    assert bad(tmp_path / name) == [f"{name} row 2 {TWICE}"]
    rows = rows_of(tmp_path / name)
    assert [rows[0], rows[2]] == [json.loads(LINE)] * 2


def test_a_key_twice_across_what_is_read_at_once(tmp_path):
    row = '{"a": {"chosen": 1, "chosen": 2}, "b": "%s"}' % ("é}" * 200_000)
    for name, content in {"a.json": f"[{LINE}, {row}, {LINE}]", "b.json": f"{LINE} {row}\n{LINE}"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert bad(tmp_path / name) == [f"{name} row 2 {TWICE}"]
        assert len(rows_of(tmp_path / name)) == 3
    (tmp_path / "c.json").write_text(f"[{LINE}, {row[:-1]}")
    assert refusal(tmp_path / "c.json").startswith("c.json is not JSON: ")


def test_a_row_with_a_key_twice_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n{WITH_TWICE['top level']}\n")
    with pytest.raises(ValueError, match=rf"^a\.jsonl row 2 {TWICE}\. data\.on_bad_row=skip leaves such rows out$"):
        preferences(0, path=str(tmp_path / "a.jsonl"))
    data = preferences(0, path=str(tmp_path / "a.jsonl"), on_bad_row="skip", max_bad_share=0.5)
    assert (len(data.train), data.reading.examples) == (1, (f"a.jsonl row 2 {TWICE}",))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3))
def test_json_whose_keys_are_there_once_is_read_as_before(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text(json.dumps(value))
    assert rows_of(path) == [value]


def calling(arguments):
    call = {"function": {"name": "tide", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ('{"at": 1, "at": 2}', "has the key 'at' twice in one object in the arguments of tide in chosen; remove one"),
        ('{"at": [{"x": 1, "x": 1}]}', "has the key 'x' twice in one object in the arguments of tide in chosen; rem"),
        ('{"at": NaN}', "has text that is not JSON in the arguments of tide in chosen: '{\"at\": NaN}'"),
        ('{"at": -Infinity}', "has text that is not JSON in the arguments of tide in chosen: "),
    ],
)
def test_arguments_that_say_two_things_or_none(tmp_path, arguments, reason):
    row = {"prompt": "q", "chosen": [calling(arguments)], "rejected": "b"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"^{re.escape(f'a.jsonl row 1 {reason}')}"):
        preferences(0, path=str(tmp_path / "a.jsonl"))
    assert json_text('{"at": 1e3, "x": null}', "x") == {"at": 1000.0, "x": None}


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "a", "content": "b"}]',
        "[{'role': 'user', 'content': 'a', 'content': 'b'}]",
        '{"from": "human", "value": "a", "more": {"content": 1, "content": 2}}',
    ],
)
def test_turns_written_as_text_with_a_key_twice(text):
    with pytest.raises(BadRow, match=r"^has the key 'content' twice in one object in a conversation that is written"):
        written_out(text)


def test_texts_about_keys_are_texts():
    """A prompt may be a question about JSON: only turns are refused."""
    assert written_out('{"content": 1, "content": 2}') == {"content": 2}
    assert written_out('[{"role": "user", "content": "a"}, {"b": 1, "b": 2}]')[1] == {"b": 2}
    assert written_out("[{'b': 1, 'b': 2}]") == [{"b": 2}]
    assert written_out("[{'role': 'user', 'content': 'a', 'b': {1: 2, '1': 3}}]")[0]["b"] == {1: 2, "1": 3}


def test_columns_twice_in_tables_of_arrow(tmp_path):
    table = pa.table([["q"], ["a"], ["b"], ["c"]], names=["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "a.feather"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow", "a.feather"):
        assert refusal(tmp_path / name) == f"{name} has the column 'chosen' twice; rename or remove one of them"


# --- half characters


HALF = "has half a surrogate pair in the key 'x\\ud83d': the file was cut or mis-decoded"


@pytest.mark.parametrize("key", ["x\\ud83d", "x\\uD83D"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_a_character_in_a_key(tmp_path, layout, key):
    name, form = LAYOUTS[layout]
    for row in (LINE[:-1] + f', "{key}": "b"}}', f'{{"a": [{{"b": {{"{key}": 1}}}}], "c": "\\ud83d\\ude00"}}'):
        (tmp_path / name).write_text(filled(form, row))
        assert bad(tmp_path / name) == [f"{name} row 2 {HALF}"]


def test_a_row_with_half_a_character_in_a_key_can_be_skipped(tmp_path):
    whole = LINE[:-1] + ', "x\\ud83d\\ude00": "b"}'
    (tmp_path / "a.jsonl").write_text(whole + "\n" + LINE[:-1] + ', "x\\ud83d": "b"}\n')
    with pytest.raises(ValueError, match=rf"^{re.escape(f'a.jsonl row 2 {HALF}')}\. data\.on_bad_row=skip leaves"):
        preferences(0, path=str(tmp_path / "a.jsonl"))
    data = preferences(0, path=str(tmp_path / "a.jsonl"), on_bad_row="skip", max_bad_share=0.5)
    assert (len(data.train), data.reading.examples) == (1, (f"a.jsonl row 2 {HALF}",))
    with pytest.raises(BadRow, match=r"^has half a surrogate pair in the key 'x.ud83d' in a conversation that is w"):
        written_out('[{"role": "user", "content": "a", "x\\ud83d": 1}]')


# --- pointers


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / name
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 12345\n")
    message = f"{name} is a pointer of Git LFS, not the rows; `git lfs pull` in its repository fetches them"
    assert refusal(path) == message
    assert refusal(tmp_path / "rows") == f": {message}"
