"""What is said about the data is so: counted by hand, and on real dialogues against a plain implementation."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from dpo_ref.data import sources
from dpo_ref.data.inspection import examples_of, inspect, score_margins, short_report
from dpo_ref.data.tokenise import tokenise
from dpo_ref.types import Message, PreferenceData, PromptGroup, Reading
from tests.support.command import train
from tests.support.tokenizer_families import FAMILIES

HH = Path(os.environ.get("DPO_REF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "hh_harmless"
TOKENIZER = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer


def group(prompt, *responses, rewards=None):
    return PromptGroup((Message(role="user", content=prompt),), responses, ((0, 1),), rewards)


def test_counts_by_hand():
    train_groups = [
        group("a", "yes yes yes", "no"),
        group("a", "yes yes yes", "no"),  # again
        group("b", "x", "y y y", rewards=(3.0, 1.0)),
        group("b", "y y y", "x", rewards=(1.0, 3.0)),  # the other way round
        group("c", "same", "size"),
    ]
    held_out = [group("c", "1", "2"), group("d", "1", "2")]
    data = PreferenceData(train_groups, held_out, [], Reading(9, {"bad rows": 2}, ("f row 1 is bad",), ("ranked",)))
    hygiene = inspect(data, *(tokenise(part, TOKENIZER) for part in (train_groups, held_out)))
    assert (hygiene.num_train, hygiene.num_eval) == (5, 2)
    assert (hygiene.duplicates, hygiene.contradictions, hygiene.leaked) == (1, 2, 1)
    assert hygiene.longer_chosen == pytest.approx((2 + 1 + 0.5) / 5)
    lengths = [len(TOKENIZER.encode(text)) + 1 for text in ("yes yes yes", "yes yes yes", "x", "y y y", "same")]
    assert hygiene.chosen.tolist() == lengths
    assert score_margins(train_groups).tolist() == [2.0, -2.0]
    report = "\n".join(short_report(hygiene))
    assert "5 groups to train on, 2 held out from 9 rows (ranked)" in report
    assert "the longer response is chosen in 70%" in report
    for line in ("2 rows left out: bad rows", "f row 1 is bad", "1 duplicates", "2 groups contradict", "1 held-out"):
        assert line in report


def test_lengths_of_groups_of_every_shape():
    groups = [
        PromptGroup((Message(role="user", content="a"),), ("b",), ()),
        PromptGroup((Message(role="user", content="a b c"),), ("b", "c d", "e f g"), ((2, 0), (1, 0))),
        PromptGroup((Message(role="user", content="a"),), ("b c", "d"), ((1, 0),)),
    ]
    token_groups = tokenise(groups, TOKENIZER).groups
    prompts, chosen, rejected, alone = token_groups.lengths()
    ids = [[len(r) for r in g.response_ids] for g in token_groups]
    assert prompts.tolist() == [len(g.prompt_ids) for g in token_groups]
    assert chosen.tolist() == [ids[1][2], ids[1][1], ids[2][1]]
    assert rejected.tolist() == [ids[1][0], ids[1][0], ids[2][0]]
    assert alone.tolist() == [ids[0][0]]


def test_an_example_shows_every_scored_token():
    text = "naïve 日本 \N{GRINNING FACE} ok"
    prompt = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    given = PromptGroup((*prompt, Message(role="user", content="c")), (text, "no"), ((1, 0),))
    groups = tokenise([given], TOKENIZER, score="all").groups
    (example,) = examples_of(TOKENIZER, groups)
    assert list(example.responses) == ["rejected", "chosen"]
    said = example.responses["rejected"]
    assert "".join(turn.text for turn in said) == TOKENIZER.decode(groups[0].response_ids[0])
    assert "".join(p.text for turn in said for p in turn.pieces if p.scored) == f"b<|im_end|>{text}<|im_end|>"
    begin = "<|im_start|>assistant\n"
    assert example.rows()[:6] == [
        ["user", "<|im_start|>user\na<|im_end|>\n", "no"],
        ["assistant", begin, "no"],
        ["rejected", "b<|im_end|>", "yes"],
        ["rejected", "\n", "no"],
        ["user", "<|im_start|>user\nc<|im_end|>\n", "no"],
        ["rejected", begin, "no"],
    ]


def test_the_terminal_gets_the_first_and_the_last_of_many_turns():
    turns = [Message(role=("user", "assistant")[i % 2], content=f"turn {i}") for i in range(21)]
    groups = tokenise([PromptGroup(tuple(turns), ("yes", "no"), ((0, 1),))], TOKENIZER, max_length=10_000).groups
    (example,) = examples_of(TOKENIZER, groups)
    assert len(example.rows()) == 21 + 1 + 2
    shown = example.short_rows()
    assert [row[0] for row in shown] == ["user", "assistant", "...", "user", "assistant", "user", "assistant",
                                         "chosen", "rejected"]  # fmt: skip
    assert shown[2][1] == "16 more"
    assert shown[0][1] == "<|im_start|>user\nturn 0<|im_end|>"
    assert "turn 20" in shown[5][1]


def plain_hh(row):
    """A dialogue pair read with one regular expression; None for what cannot be compared."""
    sides = []
    for side in (row["chosen"], row["rejected"]):
        parts = re.split(r"\n\n(Human|Assistant):", side)[1:]
        sides.append([(role, text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)])
    chosen, rejected = sides
    alternates = [role for role, _ in chosen] == ["Human", "Assistant"] * (len(chosen) // 2)
    usable = chosen[:-1] == rejected[:-1] and alternates and chosen[-1][1] and rejected[-1][1]
    return (chosen, rejected[-1]) if usable and chosen[-1] != rejected[-1] and chosen[-2][1] else None


@pytest.mark.skipif(not HH.is_dir(), reason="hh-rlhf's rows are not here")
def test_hh_equals_a_plain_implementation(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))
    path = HH / "test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = [plain_hh(json.loads(line)) for line in stream]
    expected = [row for row in rows if row is not None]
    data = sources.preferences(0, path=str(path), format="hh", on_bad_row="skip")
    assert data.reading.num_rows == len(rows) == 2312
    assert data.reading.dropped["bad rows"] == 2312 - len(expected)
    token_groups = tokenise(data.train, TOKENIZER, max_length=10**6).groups
    assert len(token_groups) == len(expected)
    names = {"Human": "user", "Assistant": "assistant"}
    for token_group, (chosen, rejected) in zip(token_groups, expected, strict=True):
        turns = "".join(f"<|im_start|>{names[role]}\n{text}<|im_end|>\n" for role, text in chosen[:-1])
        prompt = TOKENIZER.encode(turns + "<|im_start|>assistant\n", add_special_tokens=False)
        answers = [
            TOKENIZER.encode(text + "<|im_end|>", add_special_tokens=False) for _, text in (chosen[-1], rejected)
        ]
        assert token_group.prompt_ids == prompt
        assert list(token_group.response_ids) == answers


def test_lopsided_pairs_and_empty_responses_are_counted():
    groups = [
        group("a", "word " * 300, "no no"),
        group("b", "word " * 300, "word " * 40),
        group("c", "no", "word " * 10),  # many times as long, but short
        group("d", "", "words"),
    ]
    hygiene = inspect(
        PreferenceData(groups, [], []), *(tokenise(part, TOKENIZER, max_length=9999) for part in (groups, []))
    )
    assert (hygiene.lopsided, hygiene.empty) == (1, 1)
    report = short_report(hygiene)
    assert "  1 pairs have a side more than 10 times as long as the other" in report
    assert "  1 responses are empty" in report


def test_stage_data_writes_a_page_and_loads_no_model(tmp_path):
    rows = [
        {"prompt": f"why {i}?", "chosen": "because " * (i + 2), "rejected": "<b>no</b>", "note": i} for i in range(12)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = train("stage=data", "data=jsonl", f"data.path={path}", "model=lab_tiny", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "data.html").read_text()
    assert "12 groups to train on" in page
    assert "&lt;" in page
    assert "<b>no" not in page
    assert "nothing (every word of 12 groups was looked for)" in page
    assert "12 held-out" not in done.stdout
    assert not re.search(r'(src|href)="(?!#)', page)
