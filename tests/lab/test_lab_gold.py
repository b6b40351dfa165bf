"""The gold reward by hand, attempts to game it included."""

import pytest

from dpo_ref.lab.gold import gold_rewards
from dpo_ref.types import Message

NAME = (Message(role="user", content="Name three animals, but not cat."),)
COUNT = (Message(role="user", content="Count from 3 to 6 by ones."),)
SPELL = (Message(role="user", content="Spell fox with dashes between the letters."),)
PICK = (Message(role="user", content="Pick the largest of 7 12 9."),)
TWO_TURN = (
    Message(role="user", content="Reverse the list oak cat fig."),
    Message(role="assistant", content="Answer: fig cat oak."),
    Message(role="user", content="Now give only the last one."),
)


def gold(prompt, response: str, finished: bool = True) -> float:
    return gold_rewards([prompt], [response], [finished])[0]


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (NAME, "Answer: dog fox cow.", 1.0),
        (NAME, "Sure, here you go: COW, Fox and dog!", 1.0),
        (NAME, "Answer: dog fox.", 0.7 * 0.4 * 2 / 3 + 0.3),  # two of three
        (NAME, "Answer: dog fox cat.", 0.7 * 0.4 * 2 / 3 + 0.3),  # the excluded one
        (NAME, "Answer: dog dog dog.", 0.7 * 0.4 * 1 / 3 + 0.3),  # repetition
        (NAME, "Answer: oak elm ash.", 0.0),  # another category
        (COUNT, "Answer: 3 4 5 6.", 1.0),
        (COUNT, "Answer: 3 4 5.", 0.7 * 0.4 * 3 / 4 + 0.3),
        (COUNT, "Answer: 6 5 4 3.", 0.0),  # no position agrees
        (COUNT, "Answer: 3 4 5 6 7 8 9 10.", 0.7 * 0.4 * 4 / 8 + 0.3),
        (SPELL, "Answer: f-o-x.", 1.0),
        (SPELL, "Answer: f*o*x.", 0.7 * 0.4 * 3 / 5 + 0.3),  # letters right, marks wrong
        (SPELL, "Answer: fox.", 0.0),
        (PICK, "Certainly, the answer is 12.", 1.0),
        (PICK, "Answer: 7 12 9.", 0.0),  # everything listed: position 1 is wrong
        (PICK, "Answer: 12 7 9.", 0.7 * 0.4 / 3 + 0.3),
        (TWO_TURN, "Answer: oak.", 1.0),
        (TWO_TURN, "Answer: fig.", 0.0),
    ],
)
def test_correctness(prompt, response, expected):
    assert gold(prompt, response) == pytest.approx(expected)


def test_empty_answers_and_mere_form_are_worth_nothing():
    assert gold(COUNT, "") == gold(COUNT, ".") == gold(COUNT, "Sure, here you go.") == gold(COUNT, "\n\n") == 0.0


def test_ending():
    assert gold(COUNT, "Answer: 3 4 5 6") == pytest.approx(0.85)
    assert gold(COUNT, "Answer: 3 4 5 6.", finished=False) == pytest.approx(0.35 + 0.15)


def test_relevance_falls_from_60_to_200_characters_beside_the_items():
    answer = "3 4 5 6."  # 8 characters, of which 4 x (1 + 1) belong to the items: none beside them

    def padded(extra: int) -> float:
        return gold(COUNT, "x" * extra + answer)

    assert padded(60) == pytest.approx(1.0)
    assert padded(130) == pytest.approx(0.85 + 0.15 * 0.5)
    assert padded(200) == pytest.approx(0.85)
    assert padded(5000) == pytest.approx(0.85)


def test_hedging_costs_two_thirds_of_the_relevance():
    assert gold(COUNT, "Perhaps it is 3 4 5 6.") == pytest.approx(0.7 + 0.05 + 0.15)


def test_the_answer_again_and_again_is_worth_less_than_once():
    once = gold(COUNT, "Answer: 3 4 5 6.")
    twice = gold(COUNT, "Answer: 3 4 5 6. 3 4 5 6.")
    endless = gold(COUNT, "3 4 5 6 " * 40, finished=False)
    assert once == 1.0
    assert twice == pytest.approx(0.7 * 0.4 * 4 / 8 + 0.3)
    assert endless == pytest.approx(0.7 * 0.4 * 4 / 160 * 0.5 + 0.15)
    everything = gold(NAME, "Answer: cat dog fox cow hen owl bee goat.")
    assert everything == pytest.approx(0.7 * 0.4 * 3 / 8 + 0.3)


def test_all_values_lie_between_0_and_1_and_the_batch_equals_its_rows():
    prompts = [NAME, COUNT, SPELL, PICK, TWO_TURN]
    texts = ["maybe dog fox cow", "3" * 500, "é 字 f-o-x", "12", "oak" + " and so on" * 40]
    ended = [True, False, True, False, True]
    values = gold_rewards(prompts, texts, ended)
    assert all(0 <= value <= 1 for value in values)
    assert values == [gold(*row) for row in zip(prompts, texts, ended, strict=True)]


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        gold_rewards([NAME, COUNT], ["Answer: dog fox cow."], [True, True])
