"""Chat templates, verdict patterns and data files that take all time or all memory: stopped, and told with the row."""

import bz2
import gzip
import json
import lzma
import os
import re
import resource
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from dpo_ref.data import bounded as bounds
from dpo_ref.data import readers
from dpo_ref.data.bounded import OverLimit, bounded
from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import tokenise
from dpo_ref.evaluation.judging.judge import judge_pairs
from dpo_ref.types import Message, PromptGroup, silent
from tests.support.command import forked, typed
from tests.support.judge_server import JudgeServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.tokenizers_here import CHATML, byte_bpe

pytestmark = pytest.mark.slow  # `make faults` runs it

TOKENIZER = byte_bpe()
SECOND = 0.3  # of computing for an item, here
SIGN = "explode"  # the word in a row at which a template begins to do harm


@pytest.fixture(autouse=True)
def limits(monkeypatch, tmp_path):
    monkeypatch.setattr(bounds, "SECONDS", SECOND)
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))


def group(number, text):
    turn = Message(role="user", content=text)
    return PromptGroup((turn,), ("a cat", "a dog"), ((0, 1),), origin=f"pairs.jsonl row {number}")


def written_with(harm):
    """The refusal of ChatML that does something on the row with the sign; seconds and the most memory it took."""
    at_the_sign = f"{{% if messages[0].content == '{SIGN}' %}}{harm}{{% endif %}}"
    tokenizer = byte_bpe(at_the_sign + CHATML)
    groups = [group(1, "the cat"), group(2, "the dog"), group(3, SIGN), group(4, "the mat")]
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^pairs\.jsonl row 3 cannot be written by the chat template: ") as refusal:
        tokenise(groups, tokenizer, max_length=10**6)
    return str(refusal.value), time.monotonic() - begun


NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{% set ns = namespace(a='ab') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}"
ALIASED = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}"
MANY = "{% for i in range(99999) %}0123456789{% endfor %}"
MACRO = "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}"
TREE = "{% macro two(n) %}{% if n %}{{ two(n - 1) }}{{ two(n - 1) }}{% endif %}{% endmacro %}{{ two(90) }}"
TEMPLATES = {
    "loops for minutes (loops inside of loops)": (NESTED, "more than 0.3 seconds"),
    "loops for minutes (a macro that calls itself twice)": (TREE, "more than 0.3 seconds"),
    "computes a number without end (9**9**9)": ("{{ 9 ** (9 ** (8 + messages | length)) }}", "more than 0.3 seconds"),
    "writes a list of lists of lists 2^60 times": (ALIASED, "more than"),
    "multiplies a text to 10 GB": ("{{ 'a' * 10**10 }}", "more than 512 MiB of memory"),
    "multiplies a list to 8 GB": ("{{ [0] * 10**9 }}", "more than 512 MiB of memory"),
    "formats a number 10 GB wide": ("{{ '%10000000000d' % 1 }}", "memory|Error"),
    "pads a text to 10 GB": ("{{ 'a'.rjust(10**10) }}", "more than 512 MiB of memory"),
    "formats a text 10 GB wide": ("{{ '{:>10000000000}'.format(1) }}", "more than 512 MiB of memory"),
    "joins and replaces to 10 GB": (
        "{% set a = 'a' * 10**5 %}{{ a.replace('a', a) }}",
        "more than 512 MiB of memory",
    ),
    "doubles a text 60 times": (DOUBLED, "more than"),
    "writes 1 MB for a word": (MANY, "999,99. .*at most 262,|makes [0-9,]+ characters"),
    "counts to a thousand million": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "calls a macro in itself without end": (MACRO, "RecursionError"),
    "reaches into Python": ("{{ ''.__class__.__mro__ }}", "unsafe|undefined|attribute"),
    "reaches into Python by a filter": ("{{ (''|attr('__class__')).mro }}", "unsafe|undefined|attribute"),
    "reaches for globals": ("{{ raise_exception.__globals__['os'].system('id') }}", "unsafe|undefined|attribute"),
}


@pytest.mark.parametrize("done", TEMPLATES)
def test_a_template_that_does_harm_on_one_row(done, tell):
    harm, reason = TEMPLATES[done]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message, seconds = written_with(harm)
    assert re.search(reason, message), message
    assert "\n" not in message
    assert seconds < 60 * SECOND  # of the wall, on a busy machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200 * 1024
    tell("let in", f"a chat template {done}, on row 3 alone", seen=message, survived="the machine's memory and time")


def test_the_rows_before_and_after_are_as_without_the_harm():
    tokenizer = byte_bpe("{% if messages[0].content == 'explode' %}{{ 'a' * 10**10 }}{% endif %}" + CHATML)
    groups = [group(1, "the cat"), group(2, "the dog")]
    with_it, without = (tokenise(groups, each, max_length=10**6).groups for each in (tokenizer, TOKENIZER))
    assert [list(each.prompt_ids) for each in with_it] == [list(each.prompt_ids) for each in without]
    assert [list(map(list, each.response_ids)) for each in with_it] == [
        list(map(list, each.response_ids)) for each in without
    ]


def test_a_template_that_never_ends_when_the_tokenizer_is_opened(tell):
    began = os.times().children_user
    with pytest.raises(ValueError, match="a question and its answer cannot be written by the chat template") as error:
        ChatText(byte_bpe(NESTED + CHATML))
    assert os.times().children_user - began < 10 * bounds.SECONDS
    tell(
        "let in", "a chat template that always loops for minutes", seen=str(error.value), survived="nothing is trained"
    )


def children() -> set[str]:
    """The processes that this one started and has not waited for."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("times", [1, 2])
def test_the_process_that_writes_templates_is_killed(tmp_path, times, tell):
    """As by the kernel when memory is short, or by hand: once, it is done again; again, it is told; nothing waits."""

    def work(number):
        marks = list(tmp_path.iterdir())
        if number == 2 and len(marks) < times:
            (tmp_path / str(len(marks))).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    others = children()
    outcomes, seen = bounded(work, [0, 1, 2, 3]), "the same texts"
    assert [next(outcomes), next(outcomes)] == [0, 1]
    if times == 1:
        assert list(outcomes) == [2, 3]
    else:
        with pytest.raises(OverLimit, match="was ended by SIGKILL") as error:
            next(outcomes)
        seen = str(error.value)
    assert children() == others
    tell(
        "killed", f"kill -9 of the process that writes texts, {times}x", seen=seen, survived="no hang, no process left"
    )


def test_signals_and_errors_of_what_runs_apart():
    def work(number):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return 10 // number

    outcomes = bounded(work, [5, 2, 0, 1], ZeroDivisionError)
    assert [next(outcomes), next(outcomes)] == [2, 5]
    with pytest.raises(ZeroDivisionError, match="division or modulo by zero"):
        next(outcomes)
    assert list(bounded(work, [])) == []


ASKED = """{prompt} <answer of=\"m\">\n{first}\n</answer>\n\n<answer of=\"M\">\n{second}\n</answer>"""
SLOW = {
    "messages": [{"role": "user", "content": ASKED}],
    "verdict": {"first": "a", "second": "b", "pattern": "^(?:(?:x|xx|x+)+)+(a|b)$"},
}


def test_a_verdict_pattern_that_takes_for_ever(tmp_path, tell):
    from tests.evaluation.test_judge_server import judge, pairs

    (tmp_path / "slow.yaml").write_text(json.dumps(SLOW))
    with JudgeServer(verdict=lambda share: "x" * 60 + "!") as server:
        options = {"template": str(tmp_path / "slow.yaml"), "logprobs": None}
        with pytest.raises(ValueError, match=r"verdict\.pattern of template slow") as error:
            judge_pairs(judge(tmp_path, server.url, **options), pairs(2), silent)
    tell(
        "let in",
        "a judge's template whose pattern takes hours",
        seen=str(error.value),
        survived="all answers are kept",
    )


# --- data files


GOOD = json.dumps({"prompt": "why?", "chosen": "because", "rejected": "no idea"}).encode() + b"\n"
REFUSED = 300 * 1024  # KiB of memory that reading may take beyond what there was before


GZ = partial(gzip.open, mode="wb", compresslevel=1)
BZ2 = partial(bz2.open, mode="wb", compresslevel=1)
XZ = partial(lzma.open, mode="wb", preset=0)


def packed(path, opened, parts):
    with opened(path) as stream:
        for part in parts:
            stream.write(part)


def in_one_line():
    yield GOOD + b'{"prompt": "'
    yield from [b"a" * 2**20] * 48


def in_one_list():
    yield b"["
    yield from [b"{}," * 2**18] * 300


def in_rows():
    yield from [(b" " * 2**16 + GOOD) * 16] * 80


def parquet_of_one_text(path):
    column = pyarrow.array(["a" * 2**20] * 300)
    pyarrow.parquet.write_table(pyarrow.table({"chosen": column, "rejected": column}), path, compression="zstd")


BOMBS = {
    "rows.jsonl.gz, 48 MB in one line": (partial(packed, opened=GZ, parts=in_one_line()), "row 2 has more than"),
    "rows.jsonl.xz, 48 MB in one line": (partial(packed, opened=XZ, parts=in_one_line()), "row 2 has more than"),
    "rows.csv.gz, a quote that is never closed": (
        partial(packed, opened=GZ, parts=[b'a,b\n"', *[(b"a" * 1023 + b"\n") * 2**10] * 40]),
        "holds a row that has more than 32 MiB",
    ),
    "rows.jsonl.gz, 100 million empty lines": (
        partial(packed, opened=GZ, parts=[b"\n" * 2**20] * 100),
        "has more than 1,000,000 empty lines",
    ),
    "rows.json.gz, a list of 225 MB": (partial(packed, opened=GZ, parts=in_one_list()), "row 1 "),
    "rows.jsonl.bz2, 80 MB of good rows": (partial(packed, opened=BZ2, parts=in_rows()), "unpacks to more than"),
    "rows.parquet, one text in 600 cells": (parquet_of_one_text, "unpacks to more than"),
}  # fmt: skip


def read_whole(path, on_bad_row):
    """Reads a source in a process of its own; prints how it was refused and the memory it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        preferences(0, path=str(path), on_bad_row=on_bad_row)
    except ValueError as error:
        print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def refusal(tmp_path, path, on_bad_row="error"):
    process = forked(tmp_path, read_whole, path, on_bad_row)
    process.join()
    message, memory = (tmp_path / "out").read_text().splitlines()
    assert int(memory) < REFUSED, message
    return message


@pytest.mark.parametrize("done", BOMBS)
def test_a_file_that_unpacks_to_too_much(tmp_path, done, tell):
    make, reason = BOMBS[done]
    path = tmp_path / done.partition(",")[0]
    make(path)
    message = refusal(tmp_path, path)
    assert message.startswith(path.name)
    assert reason in message
    tell("let in", done, seen=message, survived=f"less than {REFUSED // 1024} MiB of memory are taken")


def test_a_list_is_read_row_by_row_and_may_be_long(tmp_path):
    path = tmp_path / "rows.json"
    rows = [
        {"prompt": f"{number}?", "chosen": "a" * (number % 700 + 1), "rejected": "b,]}"} for number in range(1, 900)
    ]
    path.write_text(json.dumps(rows, indent=2))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    as_list, as_lines = (preferences(0, path=str(tmp_path / name)) for name in ("rows.json", "rows.jsonl"))
    assert [g.responses for g in as_list.train] == [g.responses for g in as_lines.train]


JSON = {
    "is nested 100,000 deep": b"[" * 10**5,
    "holds a number of 10 million digits": b'[{"prompt": ' + b"9" * 10**7 + b"}]",
    "ends in the middle": b"[" + GOOD[:-9],
    "goes on behind its end": b"[" + GOOD + b"] {}",
    "has no comma between rows": b"[" + GOOD + GOOD + b"]",
    "is not UTF-8": b'[{"prompt": "\xff"}]',
}


@pytest.mark.parametrize("done", JSON)
def test_a_list_that_is_no_json(tmp_path, done, tell):
    (tmp_path / "rows.json").write_bytes(JSON[done])
    message = refusal(tmp_path, tmp_path / "rows.json")
    assert message.startswith("rows.json is not JSON: ")
    tell("let in", f"a .json file that {done}", seen=message[:200], survived="memory and time are bounded")


ROWS = {
    "has a million keys": (json.dumps({f"k{number}": 1 for number in range(10**6)}).encode(), "row 1 "),
    "holds numbers beyond all bounds": (b'{"prompt": 1e999999, "chosen": "a", "rejected": "b"}', "row 1 "),
    "is nested 100,000 deep": (GOOD + b"[" * 10**5, "row 2 is JSON that cannot be read"),
    "holds a number of 10 million digits": (GOOD + b'{"prompt": ' + b"9" * 10**7 + b"}", "row 2 is JSON that cannot"),
}


@pytest.mark.parametrize("done", ROWS)
def test_a_row_that_is_out_of_proportion(tmp_path, done, tell):
    content, reason = ROWS[done]
    (tmp_path / "rows.jsonl").write_bytes(content)
    message = refusal(tmp_path, tmp_path / "rows.jsonl")
    assert message.startswith(f"rows.jsonl {reason}")
    tell("let in", f"a row that {done}", seen=message[:200], survived="memory and time are bounded")


def saved_folder(path, table, compression=None):
    """What `save_to_disk` writes, and beside it the same rows with packed buffers."""
    Dataset(table).save_to_disk(path)
    (file,) = path.glob("*.arrow")
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(file), table.schema, options=options) as writer:
        for batch in table.to_batches(3):
            writer.write_batch(batch)
    return file


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("of_words", [False, True])
def test_packed_buffers_in_a_folder_of_datasets(tmp_path, compression, of_words, tell):
    rows = [{"prompt": f"question {number} ", "chosen": "a" * 2**12, "rejected": "b"} for number in range(7)]
    table = pyarrow.Table.from_pylist(rows)
    if of_words:  # a dictionary is a message of its own
        table = table.set_column(1, "chosen", table["chosen"].dictionary_encode())
    saved_folder(tmp_path / "plain", table)
    assert len(preferences(0, path=str(tmp_path / "plain")).train) == len(rows)
    saved_folder(tmp_path / "packed", table, compression)
    with pytest.raises(ValueError, match=r"data\.path=.*: the buffers in data-.*\.arrow are compressed") as error:
        preferences(0, path=str(tmp_path / "packed"))
    kind = f"a saved data set with buffers compressed by {compression}{', in a dictionary' if of_words else ''}"
    tell("let in", kind, seen=str(error.value), survived="nothing is unpacked")


def test_packed_buffers_under_another_name(tmp_path):
    file = saved_folder(tmp_path / "packed", pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b"}]), "zstd")
    file.rename(file.with_name("rows"))
    state = tmp_path / "packed" / "state.json"
    state.write_text(state.read_text().replace(file.name, "rows"))
    with pytest.raises(ValueError, match="the buffers in rows are compressed"):
        preferences(0, path=str(tmp_path / "packed"))


@pytest.mark.parametrize("end", [0, 3, 8, 100, 400])
def test_a_saved_data_set_that_is_cut_off(tmp_path, end):
    file = saved_folder(tmp_path / "cut", pyarrow.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"data\.path=.* is a folder of datasets that cannot be read"):
        preferences(0, path=str(tmp_path / "cut"))


def test_what_is_no_file(tmp_path, tell):
    os.mkfifo(tmp_path / "rows.jsonl")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jsonl"))
        for path in ("/dev/zero", tmp_path / "rows.jsonl", tmp_path / "socket.jsonl"):
            with pytest.raises(ValueError, match="is a pipe, a device or a socket") as error:
                preferences(0, path=str(path))
    with pytest.raises(ValueError, match=r"rows\.jsonl is a pipe, a device, a socket or a broken link; remove it"):
        preferences(0, path=str(tmp_path))
    tell("let in", "a pipe, /dev/zero and a socket as data", seen=str(error.value), survived="nothing waits for them")


def test_a_folder_with_a_link_out_of_it(tmp_path, tell):
    for folder in ("rows", "hub/snapshots/abc", "hub/blobs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "secret.jsonl").write_bytes(GOOD)
    (tmp_path / "rows" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is a link to .*secret\.jsonl, outside of the folder") as error:
        preferences(0, path=str(tmp_path / "rows"))
    (tmp_path / "hub" / "blobs" / "0").write_bytes(GOOD)
    (tmp_path / "hub" / "snapshots" / "abc" / "a.jsonl").symlink_to("../../blobs/0")
    assert len(preferences(0, path=str(tmp_path / "hub" / "snapshots" / "abc")).train) == 1
    tell("let in", "a data folder with a link out of it", seen=str(error.value), survived="the file is not read")


def test_a_folder_of_datasets_that_names_files_elsewhere(tmp_path, tell):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(ValueError, match=r"state\.json names \.\./secret\.arrow") as error:
        preferences(0, path=str(tmp_path / "saved"))
    tell("let in", "a folder of `datasets` that climbs out", seen=str(error.value), survived="the file is not read")


def test_a_bomb_as_one_types_it(tmp_path, tell):
    path = tmp_path / "rows.jsonl.gz"
    packed(path, GZ, in_one_line())
    done = typed("train.py", "data=jsonl", f"data.path={path}", "model=lab_tiny", f"output_dir={tmp_path}/run")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = next(line for line in done.stderr.splitlines() if "rows.jsonl.gz row 2" in line)
    tell("let in", "a .gz with 48 MB in one line, typed", seen=line, survived="nothing is trained")


def test_limits_leave_what_people_have(tmp_path):
    assert readers.LONGEST > 2**24
    path = tmp_path / "rows.jsonl.gz"
    packed(path, GZ, [GOOD * 10**4])
    assert len(preferences(0, path=str(path), deduplicate="off").train) == 10**4
