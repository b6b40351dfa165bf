"""`stage=cache_reference export=`: the rows hold what the reference says of the texts in them, and what they are is
certified."""

import json
import math
import re

import pytest

from dpo_ref.references.certificate import TOLERANCE, TOLERANCE_HALF, pair_alone
from dpo_ref.references.export import as_row
from dpo_ref.types import Message, PromptGroup
from tests.support.command import ROOT, composes, train
from tests.support.exported import COMMON, LAB, Naive, certificate_in, exported, rows_in, written
from tests.support.given_columns import written as rows_to

PAIRS = (("ref_chosen_logps", "ref_rejected_logps"), ("chosen_logprob", "rejected_logprob"))
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
]
TALK = {"prompt": TURNS, "chosen": "yes, it is four.", "rejected": "no"}
RANKED = {"prompt": "name a bird.", "responses": ["a stone", "a heron", "blue blue"], "scores": [1, 3, 2]}


@pytest.fixture(scope="module")
def tiny():
    return Naive("lab:tiny")


def expected(naive, row):
    """The log-probs of a row's two answers, of its text as it stands in the row."""
    sides = (row[side][-1]["content"] for side in ("chosen", "rejected"))
    return [naive.logp(written(row["prompt"]), f"{words}<|eot|>") for words in sides]


def test_rows_are_messages_with_the_log_probs_of_both_readers(tiny, tmp_path):
    done = exported(tmp_path / "table", *LAB)
    assert done.returncode == 0, done.stderr
    files = {name: rows_in(tmp_path / "table", name) for name in ("train.jsonl", "validation.jsonl")}
    assert {name: len(rows) for name, rows in files.items()} == {"train.jsonl": 40, "validation.jsonl": 12}
    for row in (*files["train.jsonl"][:6], *files["validation.jsonl"][:3]):
        for columns in PAIRS:
            assert [row[name] for name in columns] == pytest.approx(expected(tiny, row), abs=2e-4)
        assert [turn["role"] for turn in (*row["prompt"], *row["chosen"])] == ["user", "assistant"]
        assert row["score_chosen"] != row["score_rejected"]


def test_earlier_turns_and_ranked_answers(tiny, tmp_path):
    """Of k answers a row for every pair of different scores, the better one first."""
    for name, row, count in (("talk", TALK, 1), ("ranked", RANKED, 3)):
        data = ("data=jsonl", f"data.path={rows_to(tmp_path / f'{name}.jsonl', row)}")
        pairing = ("data.pairing=all",) if name == "ranked" else ()
        done = exported(tmp_path / name, *data, *pairing)
        assert done.returncode == 0, done.stderr
        rows = rows_in(tmp_path / name)
        assert len(rows) == count
        for found in rows:
            assert [found[name] for name in PAIRS[0]] == pytest.approx(expected(tiny, found), abs=2e-4)
            assert not (tmp_path / name / "validation.jsonl").exists()
    assert rows_in(tmp_path / "talk")[0]["prompt"] == TURNS
    words = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows_in(tmp_path / "ranked")]
    assert words == [("a heron", "blue blue"), ("a heron", "a stone"), ("blue blue", "a stone")]
    scores = [(row["score_chosen"], row["score_rejected"]) for row in rows_in(tmp_path / "ranked")]
    assert scores == [(3, 2), (3, 1), (2, 1)]


def test_all_turns_of_the_assistant_as_refdpo_scores_them(tiny, tmp_path):
    """RefDPO's mask leaves every turn of the assistant; its end token is counted each time (`data_utils.py`)."""
    data = ("data=jsonl", f"data.path={rows_to(tmp_path / 'rows.jsonl', TALK)}", "data.score=all")
    assert exported(tmp_path / "table", *data).returncode == 0
    (row,) = rows_in(tmp_path / "table")
    earlier = tiny.logp(written(TURNS[:2]), "four<|eot|>")
    assert row["chosen_logprob"] == pytest.approx(earlier + expected(tiny, row)[0], abs=2e-4)
    certificate = certificate_in(tmp_path / "table")
    assert certificate["text"]["turns"] == "all"
    assert certificate["rows"]["groups_by_what_trl_reads"] == {"other": 1}


def test_what_limits_cut_is_left_out_and_counted(tmp_path):
    rows = [{"prompt": f"question {n}", "chosen": "yes " * (1 + 9 * (n == 1)), "rejected": "no"} for n in range(4)]
    rows[2]["prompt"] = "word " * 40
    path = rows_to(tmp_path / "rows.jsonl", *rows)
    for policy, kept in (("truncate_response", [0, 3]), ("truncate_prompt_start", [0, 3]), ("drop", [0, 3])):
        folder = tmp_path / policy
        limits = ("data.max_length=24", f"data.over_length={policy}", "data.max_response_length=8")
        done = exported(folder, "data=jsonl", f"data.path={path}", *limits)
        assert done.returncode == 0, done.stderr
        assert [row["prompt"][0]["content"] for row in rows_in(folder)] == [f"question {n}" for n in kept]
        certificate, cut = certificate_in(folder), 0 if policy == "drop" else 1
        assert certificate["rows"]["groups_left_out_as_cut"] == cut
        assert sum(certificate["left_out"].values()) >= 2 - cut
        assert ("1 groups left out: a limit has cut them" in done.stdout) == bool(cut)
        assert certificate["limits"] == {
            "max_length": 24, "max_prompt_length": None, "max_response_length": 8, "over_length": policy
        }  # fmt: skip


def test_nothing_whole_is_no_table(tmp_path):
    path = rows_to(tmp_path / "rows.jsonl", {"prompt": "why?", "chosen": "yes " * 30, "rejected": "no " * 30})
    limits = ("data.max_response_length=8", "data.over_length=truncate_response")
    done = exported(tmp_path / "table", "data=jsonl", f"data.path={path}", *limits)
    assert done.returncode == 1
    assert "none of 1 groups is a whole pair (1 were cut)" in done.stderr
    assert list(tmp_path.glob("*table*")) == []


def test_what_trl_would_score_besides_is_said(tmp_path):
    """Zephyr's template writes a line's end behind the token that ends a turn."""
    done = exported(tmp_path / "table", *LAB, "model.template=zephyr")
    assert "TRL scores what the chat template writes behind the end of a turn as well" in done.stdout
    certificate = certificate_in(tmp_path / "table")
    assert certificate["rows"]["groups_by_what_trl_reads"] == {"behind": 52}
    assert (certificate["text"]["end_of_turn"], certificate["text"]["behind_the_end"]) == ("<|eot|>", "\n")


def test_a_special_token_in_a_text_is_another_row_for_trl(tmp_path):
    row = {"prompt": "say <|eot|>", "chosen": "yes", "rejected": "no"}
    assert exported(tmp_path / "t", "data=jsonl", f"data.path={rows_to(tmp_path / 'r.jsonl', row)}").returncode == 0
    assert certificate_in(tmp_path / "t")["rows"]["groups_by_what_trl_reads"] == {"other": 1}


LIVE = {
    "cache=off": ["reference=initial", "reference.cache=off"],
    "uniform": ["reference=uniform_token"],
    "mixture": ["reference=mixture", "reference.parts=[{reference: initial}, {reference: uniform_token}]"],
    "prior": ["reference=prior"],
    "other": ["reference=other", "reference.path=lab:foreign"],
    "strength": ["reference=initial", "reference.strength=0.5"],
}


@pytest.mark.parametrize("kind", LIVE)
def test_every_reference_that_stays(kind, tiny, tmp_path):
    folder = tmp_path / "table"
    done = exported(folder, "data.num_pairs=4", "data.num_eval_pairs=0", "data.num_test_prompts=2", *LIVE[kind])
    assert done.returncode == 0, done.stderr
    row, certificate = rows_in(folder)[0], certificate_in(folder)
    chosen, sizes = row["chosen"][0]["content"], len(certificate["probes"][0]["response_ids"][0])
    uniform = -sizes * math.log(len(tiny.tokenizer))
    value = {
        "cache=off": lambda: expected(tiny, row)[0],
        "uniform": lambda: uniform,
        "mixture": lambda: 0.5 * (expected(tiny, row)[0] + uniform),
        "prior": lambda: tiny.logp("<|bos|>", f"{chosen}<|eot|>"),
        "other": lambda: None,
        "strength": lambda: 0.5 * expected(tiny, row)[0],
    }[kind]()
    if value is not None:
        assert row["ref_chosen_logps"] == pytest.approx(value, abs=2e-4)
    probe = certificate["probes"][0]
    assert probe["logps"] == pytest.approx([row[name] for name in PAIRS[0]], abs=1e-5)
    named = None if certificate["model"] is None else certificate["model"]["path"]
    assert named == {"uniform": None, "mixture": None, "other": "lab:foreign"}.get(kind, "lab:tiny")
    assert certificate["text"]["own"] == (kind == "other")


REFUSED = {
    "another stage": (["export_to={}"], "export={} has no effect with stage=train; add stage=cache_reference"),
    "none": (["reference=none"], "reference=none gives every response 0"),
    "moving": (["reference=moving"], "reference=moving changes while the policy is trained"),
    "bema": (["reference=bema"], "reference=bema changes while the policy is trained"),
    "given": (
        ["reference=columns", "reference.provenance=mine"], "the log-probs of reference=columns came with the rows",
    ),
    "sampled": (["data=on_policy"], "data=on_policy samples while the policy is trained"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused(case, tmp_path):
    words, message = REFUSED[case]
    folder = tmp_path / "table"
    stage = train(*COMMON, *LAB, *(word.format(folder) for word in words)) if case == "another stage" else None
    done = stage or exported(folder, *words)
    assert done.returncode == 1
    assert message.format(folder) in done.stderr
    assert not folder.exists()


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "mine.txt").write_text("kept")
    done = exported(tmp_path / "table", *LAB)
    assert done.returncode == 1
    assert "is there already; name a new folder" in done.stderr
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert exported(tmp_path / "empty", *LAB).returncode == 0


def test_a_pair_of_a_group_stands_alone():
    group = PromptGroup((Message(role="user", content="q"),), ("a", "b", "c"), ((2, 0),), (1.0, 2.0, 3.0), "r",
                        logps=(-1.0, -2.0, -3.0))  # fmt: skip
    pair = pair_alone(group, (2, 0))
    assert (pair.responses, pair.pairs, pair.rewards, pair.logps) == (("c", "a"), ((0, 1),), (3.0, 1.0), (-3.0, -1.0))


def test_tools_and_template_options_stay_with_the_row():
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    called = [{"type": "function", "function": {"name": "look"}}]
    call = Message(role="assistant", content="", tool_calls=called)
    prompt = (Message(role="user", content="q"),)
    pair = PromptGroup(prompt, ((call,), "no"), ((0, 1),), tools=(tool,), logps=(-1.0, -2.0),
                       template_options={"enable_thinking": False})  # fmt: skip
    row = as_row(pair)
    assert json.loads(row["tools"]) == [tool]
    assert row["chat_template_kwargs"] == {"enable_thinking": False}
    assert row["chosen"] == [call]
    assert row["rejected"] == [{"role": "assistant", "content": "no"}]
    assert "score_chosen" not in row


PAGE = (ROOT / "docs" / "references_table.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^python train\.py.*", PAGE, re.MULTILINE))
def test_the_page_s_commands_compose(command):
    composes(command)


def test_the_page_s_numbers_are_the_code_s():
    assert (TOLERANCE, TOLERANCE_HALF) == ({"float32": 1e-3}, 0.05)
    assert "within 1e-3 nats a token in float32 and 0.05 in half\n" in PAGE
