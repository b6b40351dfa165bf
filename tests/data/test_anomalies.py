"""Rows to look at: each kind found where it is, by hand, and not where it is not."""

import random
import time

import pytest

from dpo_ref.data.anomalies import (
    SHOWN,
    NearlyLeaked,
    anomalies,
    differ_in_form,
    differ_in_script,
    has_one_word,
    likeness,
    runs_of,
    script_of,
)
from dpo_ref.data.tokenise import tokenise
from dpo_ref.types import Message, PreferenceData, PromptGroup, silent
from tests.support.tokenizer_families import FAMILIES

TOKENIZER = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
RUSSIAN, CHINESE, JAPANESE = "доброе утро всем", "早上好，我的朋友们，你们好吗", "おはようございます、友達"


def group(prompt, *responses, origin="", **more):
    return PromptGroup((Message(role="user", content=prompt),), responses, ((0, 1),), origin=origin, **more)


def found(train, held_out=(), **options):
    """By name, how many there are and where the shown ones are from."""

    def write(groups):
        return tokenise(groups, TOKENIZER, **({"max_length": 100_000} | options))

    data = PreferenceData(list(train), list(held_out), [])
    findings = anomalies(data, write(data.train), write(data.eval), write, silent)
    return {finding.name: (finding.count, [case.origin for case in finding.cases]) for finding in findings}


FORM = "pairs whose sides differ in blanks, case or Unicode form alone"
SCRIPT = "pairs whose sides are in different scripts"
ONE_WORD = "responses of one word or none"
NEAR = "held-out prompts are nearly the same as one that is trained on"
LOPSIDED = "pairs have a side more than 10 times as long as the other"
LONG = "prompts are more than 10 times as long as half of them"
SAME = "pairs dropped: both sides are the same tokens"


def test_each_kind_is_counted_and_shown_with_its_row():
    train = [
        group("a", "Good  morning", "good morning", origin="form"),
        group("b", "good morning to all", RUSSIAN, origin="script"),
        group("c", "yes", "no, not at all", origin="one word"),
        group("d", "word " * 300, "not so long", origin="lopsided"),
        group("word " * 300, "not so short", "not so long", origin="long"),
        *(group(f"e {i}", f"nothing odd {i}", f"here at all {i}", origin="sound") for i in range(9)),
    ]
    odd = {name: origins for name, (_, origins) in found(train).items() if origins}
    assert odd == {FORM: ["form"], SCRIPT: ["script"], ONE_WORD: ["one word"], LOPSIDED: ["lopsided"], LONG: ["long"]}


def test_held_out_rows_are_looked_at_and_no_more_shown_than_can_be_read():
    rows = [group(f"a {i}", "yes", "no, not at all", origin=f"row {i}") for i in range(12)]
    assert found(rows[:4], rows[4:])[ONE_WORD] == (12, [f"row {i}" for i in range(SHOWN)])


def test_dropped_pairs_are_the_rows_that_lost_theirs():
    rows = [
        group("a", "A one two three four five six", "B one two three four five six", origin="apart"),
        group("b", "one two three four five six A", "one two three four five six B", origin="cut alike"),
        group("c" * 400, "yes", "yes and no", origin="too long"),
    ]
    odd = found(rows, over_length="truncate_response", max_response_length=8, max_length=200)
    assert odd[SAME] == (1, ["cut alike"])
    assert found(rows)[SAME] == (0, [])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Good morning", "good  morning\n", True),
        ("e\u0301te\u0301", "été", True),  # composed or not
        ("ﬁne", "FINE", True),
        ("x" * 63 + "e\u0301" * 9, "x" * 63 + "é" * 9, True),  # across the end of what is compared first
        ("good morning", "good mornings", False),
        ("good morning" * 9 + "a", "good morning" * 9 + "b", False),
        ("été", "ete", False),
        ("the same", "the same", False),
    ],
)
def test_form(first, second, expected):
    assert differ_in_form(first, second) is differ_in_form(second, first) is expected


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("good morning — “you”", "LATIN"),
        (RUSSIAN, "CYRILLIC"),
        (CHINESE, "HAN OR KANA"),
        (JAPANESE, "HAN OR KANA"),
        ("good 早上好", ""),  # too few letters
        ("早上好早上好 good morning", "LATIN"),
        ("доброе утро good morning dear", "LATIN"),
        ("доброе утро good mornin", ""),  # half and half
        ("1 + 1 = 2, 3 × 4", ""),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


def test_texts_differ_in_script_only_where_both_have_one():
    assert differ_in_script("good morning to all", CHINESE)
    assert differ_in_script(RUSSIAN, CHINESE)
    assert not differ_in_script(JAPANESE, CHINESE)
    assert not differ_in_script("good morning, “you”", "good morning")
    assert not differ_in_script(RUSSIAN, "42")


def test_words_are_characters_where_no_blanks_are_written():
    assert [has_one_word(text) for text in ("", " yes!", "好", "C3PO.")] == [True] * 4
    assert [has_one_word(text) for text in ("yes no", "好的", "x" * 64)] == [False] * 3


def test_likeness_is_that_of_sets_of_runs_of_five_words():
    words = ["how", "do", "I", "get", "to", "the", "harbour", "before", "it", "gets", "dark"]
    changed = [*words[:-1], "cold"]
    first, second = runs_of(" ".join(words)), runs_of(" ".join(changed).upper() + "?!")
    runs = len(words) - 4
    assert (len(first), len(second)) == (runs, runs)
    assert likeness(first, second) == pytest.approx((runs - 1) / (runs + 1))
    assert likeness(first, first) == 1
    assert likeness(runs_of("one two"), runs_of("two one")) == 0
    assert likeness(runs_of(""), runs_of("")) == 0


def test_held_out_prompts_that_are_nearly_trained_on():
    asked = "how do I get from the old town to the harbour before it gets dark in the winter months"
    train = [
        group("what else is there to be seen?", "a b", "b c"),
        group(asked, "a b", "b c", origin="t"),
    ]
    held_out = [
        group(asked, "a b", "b c", origin="equal, which is counted elsewhere"),
        group(asked.replace("winter", "summer"), "a b", "b c", origin="changed"),
        group(asked.upper() + "???", "a b", "b c", origin="written otherwise"),
        group(" ".join(asked.split()[::-1]), "a b", "b c", origin="reversed"),
        group("早上好，请问从老城怎么去港口？天黑之前能到吗", "a b", "b c", origin="Chinese"),
    ]
    count, origins = found(train, held_out)[NEAR]
    assert (count, sorted(origins)) == (2, ["changed", "written otherwise"])
    chinese = group("早上好，请问从老城怎么去港口？天黑之前能到吗？谢谢", "a b", "b c")
    assert found([*train, chinese], held_out)[NEAR][0] == 3


def test_a_sample_of_near_duplicates_is_found_among_many():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    prompts = [rng.choices(words, k=rng.randint(12, 90)) for _ in range(2000)]

    def changed(prompt):
        return [*prompt[: len(prompt) // 2], "new", *prompt[len(prompt) // 2 :]]

    def groups(some):
        return [group(" ".join(prompt), "a", "b") for prompt in some]

    near, apart = [changed(prompt) for prompt in prompts[:200]], [rng.choices(words, k=40) for _ in range(200)]
    leaked = NearlyLeaked(PreferenceData([], groups([*near, *apart]), []))
    for one in groups(prompts):
        leaked.look(one)
    alike = sum(
        likeness(runs_of(" ".join(a)), runs_of(" ".join(b))) >= 0.5 for a, b in zip(prompts[:200], near, strict=True)
    )
    assert alike > 150
    assert leaked.finding.count >= 0.98 * alike
    assert leaked.finding.count <= alike


def test_prompts_that_share_a_template_cost_no_more():
    shared = "you are given a text and have to say in one sentence what it is about, here is the text: "

    def seconds(opening):
        rows = [group(opening.format(i) + f"number {i}", "a", "b") for i in range(3000)]
        leaked = NearlyLeaked(PreferenceData([], rows[:1500], []))
        begun = time.process_time()
        for one in rows[1500:]:
            leaked.look(one)
        return time.process_time() - begun

    assert seconds(shared) < 5 * seconds(shared.replace(" ", " {0} "))
