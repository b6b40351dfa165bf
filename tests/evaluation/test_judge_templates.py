"""What a judge is asked, how its words become a preference, what preferences come to; numbers by hand."""

import math

import numpy as np
import pytest

from dpo_ref.evaluation.judging.answers import JudgeAnswer
from dpo_ref.evaluation.judging.judge import (
    Judge,
    Pair,
    answer_pairs,
    combine_orders,
    first_wins,
    judge_metrics,
    label_of,
    read_judgments,
    write_judgments,
)
from dpo_ref.evaluation.judging.templates import FOLDER, Verdict, conversation_text, load_template
from dpo_ref.generation.records import Generation
from dpo_ref.types import Message
from tests.support.judgments import JUDGMENTS

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
QUESTION = (Message(role="user", content="Name {second} birds. {0} <b> $5 \\1 {prompt}"),)


def said(text="", candidates=None):
    return JudgeAnswer(text, candidates, 1, 1, "stop")


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_stand_in_their_places_in_both_orders(name):
    """Texts that look like places, format fields, regular expressions or labels stay as they are."""
    template = load_template(name)
    ours, theirs = "OURS {first} {prompt} %s [[A]]", "THEIRS </answer> {second} {}"
    for first, second in ((ours, theirs), (theirs, ours)):
        text = "\n".join(turn["content"] for turn in template.fill(QUESTION, first, second))
        assert text.count(ours) == text.count(theirs) == text.count(QUESTION[0]["content"]) == 1
        assert text.index(QUESTION[0]["content"]) < text.index(first) < text.index(second)
        whole = "\n".join(turn["content"] for turn in template.messages)
        assert len(text) == len(whole) - len("{prompt}{first}{second}") + len(QUESTION[0]["content"] + first + second)


def test_a_conversation_is_written_with_its_speakers():
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Birds?")]
    text = conversation_text([Message(role=role, content=content) for role, content in turns])
    assert text == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Birds?"
    assert conversation_text(QUESTION) == QUESTION[0]["content"]


WRITTEN = {
    "alpaca_eval": {"m": 1.0, " M\n": 0.0, "m.": None, "": None, "Both": None},
    "mt_bench": {
        "Both are fine. [[C]]": 0.5,
        "At first [[A]] seems better, but [[B]]": 0.0,
        "[[A]]": 1.0,
        "[[D]]": None,
        "A": None,
    },
    "tldr": {
        "Comparison: B is vague.\nPreferred: A": 1.0,
        'Comparison: x\nPreferred: "B"': 0.0,
        "**Preferred:** A": 1.0,
        "Preferred: Summary B": 0.0,
        "Preferred: Both": None,
        "A": None,
    },
    "dialogue": {"More helpful: B": 0.0, "Comparison: A says more.\nMore helpful: Response A.": 1.0, "More: A": None},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_verdicts(name):
    verdict = load_template(name).verdict
    assert {text: first_wins(verdict, said(text)) for text in WRITTEN[name]} == WRITTEN[name]


def test_a_template_shows_the_form_it_reads():
    """What a template asks for is what its pattern finds."""
    for name in NAMES:
        verdict = load_template(name).verdict
        for label in verdict.labels:
            written = {"mt_bench": f"[[{label}]]"}.get(name, f"{verdict.lead}{label}")
            assert label_of(verdict, written) == label


PLAIN = Verdict("m", "M")
WITH_TIE = Verdict("A", "B", "C", pattern="([ABC])", lead="[[")


@pytest.mark.parametrize(
    ("verdict", "candidates", "share"),
    [
        (PLAIN, (("m", math.log(0.6)), ("M", math.log(0.2)), ("The", math.log(0.2))), 0.75),
        (PLAIN, (("m", math.log(0.6)), ("The", math.log(0.4))), 1.0),
        (PLAIN, (("M", math.log(0.01)), ("The", math.log(0.4))), 0.0),
        (PLAIN, (("The", -0.1), ("A", -3.0)), None),
        (PLAIN, (("m", -math.inf), ("M", -math.inf)), None),
        (PLAIN, (("m", math.log(0.3)), (" m", math.log(0.3)), ("M\n", math.log(0.2))), 0.75),
        (PLAIN, (("m", -1000.0), ("M", -1000.0 + math.log(3))), 0.25),
        (WITH_TIE, (("A", math.log(0.5)), ("B", math.log(0.1)), ("C", math.log(0.2))), 0.6 / 0.8),
    ],
)
def test_log_probs_become_a_share(verdict, candidates, share):
    win = first_wins(verdict, said("whatever", candidates))
    assert win == (share if share is None else pytest.approx(share, abs=1e-12))


def test_a_preference_is_the_mean_or_an_agreement():
    assert combine_orders([0.9, 0.4], soft=True) == pytest.approx(0.65)
    assert combine_orders([0.9], soft=True) == 0.9
    assert combine_orders([0.9, None], soft=True) is None
    hard = {(1.0, 1.0): 1.0, (0.0, 0.0): 0.0, (1.0, 0.0): 0.5, (0.5, 1.0): 0.5, (0.5, 0.5): 0.5}
    assert {wins: combine_orders(list(wins), soft=False) for wins in hard} == hard
    assert combine_orders([1.0, None], soft=False) is None


def generation(prompt, sample, output, seed=0, prompt_index=0):
    message = Message(role="user", content=prompt)
    return Generation((message,), prompt_index, sample, output, (), (), "stop", 1, 1, seed, 1.0, 1.0)


def test_answers_are_paired_by_prompt_and_sample():
    """Also when a prompt occurs twice, and when the baseline stands in another order or has fewer samples."""
    ours = [generation(p, s, f"{n}{s}", 1, n) for n, p in enumerate(("a", "b", "a")) for s in (0, 1)]
    theirs = [generation(p, s, f"{n}{s}", 2, n) for n, p in enumerate(("b", "a", "a")) for s in (1, 0)]
    baseline_outputs = {pair.output: pair.baseline_output for pair in answer_pairs(ours, theirs)}
    assert baseline_outputs == {"00": "10", "01": "11", "10": "00", "11": "01", "20": "20", "21": "21"}
    fewer = [answer for answer in theirs if answer.sample_index == 0]
    assert [pair.output for pair in answer_pairs(ours, fewer)] == ["00", "10", "20"]
    with pytest.raises(ValueError, match="only 1 prompts are shared by the policy's 2 and the baseline's 1"):
        answer_pairs(ours[:4], [theirs[2]])


def test_answers_of_the_same_random_numbers_do_not_meet():
    ours, theirs = ([generation("a", s, f"{who}{s}", 7) for s in range(3)] for who in "xy")
    assert [(p.output, p.baseline_output) for p in answer_pairs(ours, theirs)] == [
        ("x0", "y1"),
        ("x1", "y2"),
        ("x2", "y0"),
    ]
    assert [(p.output, p.baseline_output) for p in answer_pairs(ours[:1], theirs[:1])] == [("x0", "y0")]


def test_one_order_is_drawn_evenly_by_the_pair_alone():
    drawn = [Pair(QUESTION, index, 0, f"answer {index}", "other").orders(both=False) for index in range(400)]
    assert {len(orders) for orders in drawn} == {1}
    assert abs(sum(orders[0] for orders in drawn) - 200) < 4 * math.sqrt(400 / 4)
    again = Pair(QUESTION, 99, 5, "answer 7", "other")
    assert again.orders(both=False) == drawn[7]
    assert again.orders(both=True) == (False, True)


def test_numbers_by_hand():
    """Preferences .8 .6 | .2 .5: mean .525. Residuals of the prompts a, b: .35, -.35; the clustered variance is
    (2 * .35^2) / 4^2 * 2 / 1. Wins: two of four, one tie: discrete .625."""
    judge = Judge("x", "y", load_template("alpaca_eval"), {}, True, True, lambda *_: iter(()), FOLDER, (3.0, 5.0))
    metrics = judge_metrics(judge, JUDGMENTS, "initial", seed=0)
    by_hand = {
        "judge_winrate/initial": 0.525,
        "judge_winrate/initial_se": math.sqrt(2 * 0.35**2 / 16 * 2),
        "judge_winrate/initial_low": 0.35,  # both draws of two prompts are b
        "judge_winrate/initial_high": 0.7,
        "judge_winrate/initial_discrete": 0.625,
        "judge/ties": 0.25,
        "judge/winrate_longer": 0.5,
        "judge/winrate_shorter": 0.6,
        "judge/longer_share": 0.5,
        "judge/num_pairs": 6,
        "judge/num_judged": 4,
        "judge/num_missing": 2,
        "judge/identical": 1,
        "judge/parse_failures": 1,
        "judge/refusals": 1,
        "judge/position_consistency": 2 / 3,
        "judge/first_position": np.mean([0, 1, 1, 1, 1, 0]),
        "judge/prompt_tokens": 90,
        "judge/completion_tokens": 18,
        "judge/cost": (90 * 3 + 18 * 5) / 1e6,
    }
    assert {key: metrics[key] for key in by_hand} == pytest.approx(by_hand, abs=1e-12)
    assert "judge/cost" not in judge_metrics(Judge(**fields(judge) | {"prices": None}), JUDGMENTS, "initial", seed=0)


def fields(judge):
    return {name: getattr(judge, name) for name in Judge.__slots__}


def test_no_verdict_at_all_has_no_win_rate():
    judge = Judge("x", "y", load_template("alpaca_eval"), {}, True, True, lambda *_: iter(()), FOLDER)
    metrics = judge_metrics(judge, JUDGMENTS[4:], "initial", seed=0)
    assert "judge_winrate/initial" not in metrics
    assert (metrics["judge/num_judged"], metrics["judge/num_missing"]) == (0, 2)


def test_judgments_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "judgments.jsonl"
    write_judgments(path, JUDGMENTS)
    assert read_judgments(path) == JUDGMENTS
    path.write_text(path.read_text() + '{"pair": 1}\n')
    with pytest.raises(ValueError, match=r"judgments\.jsonl row 7 is no judgment"):
        read_judgments(path)


MESSAGES = "messages: [{role: user, content: '{prompt} {first} {second}'}]\n"
BAD = {
    "no yaml": ("a: [", "is not YAML"),
    "list": ("[1]", "must hold messages: and verdict:"),
    "unknown": (MESSAGES + "verdikt: {}", "verdikt is not known there; it may hold messages, verdict"),
    "turns": ("messages: hello", "messages must be a list of turns"),
    "place": ("messages: [{role: user, content: '{prompt} {first}'}]\nverdict: {}", "no place for {second}"),
    "no verdict": (MESSAGES, "verdict must hold first and second"),
    "label": (MESSAGES + "verdict: {first: A, second: B, third: C}", "third is not known there"),
    "number": (MESSAGES + "verdict: {first: 1, second: 2}", "must be texts; put them in quotes"),
    "equal": (MESSAGES + "verdict: {first: A, second: A}", "labels must differ"),
    "equal tie": (MESSAGES + "verdict: {first: A, second: B, tie: B}", "labels must differ"),
    "space": (MESSAGES + "verdict: {first: ' A', second: B}", "labels must differ and have no space"),
    "pattern": (MESSAGES + "verdict: {first: A, second: B, pattern: '('}", "verdict.pattern is no regular expression"),
    "groups": (MESSAGES + "verdict: {first: A, second: B, pattern: '[AB]'}", "must have one group"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_no_template(case, tmp_path):
    text, message = BAD[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_template(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_template_of_ones_own_and_its_digest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MESSAGES + "verdict: {first: one, second: two}")
    mine = load_template(str(path))
    assert (mine.name, mine.verdict.labels) == ("mine", {"one": 1.0, "two": 0.0})
    digests = {load_template(name).identity for name in NAMES} | {mine.identity}
    path.write_text(MESSAGES + "verdict: {first: one, second: two, tie: none}")
    digests.add(load_template(str(path)).identity)
    assert len(digests) == len(NAMES) + 2
