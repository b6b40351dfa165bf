"""The lab's tasks: prompts can be read back, splits never overlap, the oracle is right and wrong answers are wrong."""

import random
from itertools import product

import pytest

from dpo_ref.lab import tasks
from dpo_ref.lab.conversations import FAMILIES, draw_prompt, read_prompt
from dpo_ref.lab.gold import gold_reward
from dpo_ref.lab.preferences import ASIDES, CLOSINGS, HEDGES, MIXED, ORACLE, POLITE_LEADS, STYLES, TERSE_LEADS, Writer
from dpo_ref.lab.tasks import NUMBER, THING, WORD, enumeration
from dpo_ref.types import Message


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_wording_is_read_back(name, rng):
    family = FAMILIES[name]
    for _, wording in product(range(40), family.wordings):
        task, prompt = family.draw(rng)
        slots = dict(task.slots)
        last = Message(role="user", content=wording.format(**slots))
        assert read_prompt((*prompt[:-1], last)) == task
        others = [other for other in FAMILIES.values() if other is not family]
        assert not any(other.read((*prompt[:-1], last)) for other in others), "the wording fits two families"


def test_other_text_is_no_prompt_of_the_lab(rng):
    with pytest.raises(ValueError, match="not a prompt of the lab"):
        read_prompt((Message(role="user", content="Write a poem about the sea."),))
    task, prompt = FAMILIES["sort"].draw(rng)
    assert read_prompt(prompt) == task
    with pytest.raises(ValueError, match="not a prompt of the lab"):
        read_prompt((Message(role="user", content=prompt[0]["content"] + " And more."),))


def test_there_are_two_turn_prompts_about_numbers_and_about_words(rng):
    drawn = [FAMILIES["follow_up"].draw(rng) for _ in range(60)]
    roles = {tuple(message["role"] for message in prompt) for _, prompt in drawn}
    assert roles == {("user", "assistant", "user")}
    assert {FAMILIES["follow_up"].kind(dict(task.slots)) for task, _ in drawn} == {NUMBER, WORD}


def test_splits_are_disjoint_by_content_and_of_the_stated_sizes(rng):
    tasks = [FAMILIES[name].draw(rng)[0] for name in FAMILIES for _ in range(2000)]
    shares = {
        split: sum(task.split == split for task in tasks) / len(tasks) for split in ("train", "validation", "test")
    }
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03)
    reworded = [(draw_prompt(family, split, rng), split) for family in FAMILIES.values() for split in shares]
    assert all(read_prompt(prompt).split == split for (_, prompt), split in reworded)


@pytest.mark.parametrize("name", FAMILIES)
def test_oracle_is_right_and_the_incompetent_writer_is_not(name, rng):
    family = FAMILIES[name]
    wrong = Writer(0.0, {"terse": 1.0})
    for _ in range(150):
        task, _ = family.draw(rng)
        assert gold_reward(task, ORACLE.respond(task, rng), True) == pytest.approx(1.0)
        assert gold_reward(task, wrong.respond(task, rng), True) <= 0.7 * 0.4 + 0.3


def test_competence_and_style_vary_independently(rng):
    tasks = [FAMILIES[name].draw(rng)[0] for name in FAMILIES for _ in range(300)]

    def mean_words(competence: float) -> float:
        writer = Writer(competence, MIXED)
        return sum(len(writer.respond(task, rng).split()) for task in tasks) / len(tasks)

    def share_right(style) -> float:
        writer = Writer(0.5, {style: 1.0})
        return sum(gold_reward(task, writer.respond(task, rng), True) > 0.7 for task in tasks) / len(tasks)

    assert mean_words(0.0) == pytest.approx(mean_words(1.0), rel=0.05)
    assert {style: share_right(style) for style in STYLES if style != "unfinished"} == pytest.approx(
        dict.fromkeys([style for style in STYLES if style != "unfinished"], 0.5), abs=0.04
    )


def test_phrases_of_the_writers_contain_no_item():
    phrases = (
        *TERSE_LEADS,
        *POLITE_LEADS,
        *CLOSINGS,
        *HEDGES,
        *ASIDES,
        *(w for f in FAMILIES.values() for w in f.wordings),
    )
    matches = [(phrase, kind.find(phrase)) for phrase in phrases for kind in (NUMBER, WORD, THING)]
    assert not [pair for pair in matches if pair[1]]


def test_every_word_stands_in_one_table_only():
    words = [*tasks.WORDS, *tasks.THINGS, *tasks.COLOURS, *tasks.CATEGORIES, *tasks.COUNT_WORDS, *tasks.MARKS]
    assert len(words) == len(set(words))


def test_right_answers_by_hand():
    def right(name: str, **slots: str) -> str:
        return enumeration(FAMILIES[name].right(slots, random.Random(0)))

    assert right("count", start="11", end="5", step="twos") == "11 9 7 5"
    assert right("count", start="3", end="6", step="ones") == "3 4 5 6"
    assert right("spell", word="fox", mark="stars") == "f*o*x"
    assert right("sort", numbers="10 9 2", direction="ascending") == "2 9 10"
    assert right("sort", numbers="10 9 2", direction="descending") == "10 9 2"
    assert right("repeat", word="oak", count="three") == "oak oak oak"
    assert right("reverse", words="oak cat fig") == "fig cat oak"
    assert right("pick", numbers="10 9 2", extreme="largest") == "10"
    assert right("pick", numbers="10 9 12", extreme="smallest") == "9"
    assert right("passage", passage="red hat and blue cup", thing="cup") == "cup blue"
    assert right("follow_up", items="oak cat fig", request="all but the first one") == "cat fig"
    assert right("follow_up", items="4 5 6", request="the same in reverse order") == "6 5 4"
    named = FAMILIES["name"].right({"count": "four", "category": "trees", "excluded": "oak elm"}, random.Random(0))
    assert len(set(named)) == 4
    assert set(named) <= set(tasks.CATEGORIES["trees"]) - {"oak", "elm"}
