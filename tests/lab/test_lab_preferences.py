"""Labels follow Bradley-Terry with the stated bias and noise; data are reproducible and disjoint by content."""

import json
import math
import random
import subprocess
import sys
from itertools import islice

import pytest

from dpo_ref.lab.conversations import FAMILIES, read_prompt
from dpo_ref.lab.gold import gold_rewards
from dpo_ref.lab.preferences import SimulatedJudge, draw_pairs, draw_prompts, lab, lab_sft


def test_probability_by_hand():
    judge = SimulatedJudge(length_bias=1.5, label_noise=0.1, label_steepness=4.0)
    honest = 1 / (1 + math.exp(-(4.0 * (0.8 - 0.5) + 1.5 * (10 - 30) / 10)))
    assert judge.probability((0.8, 0.5), (10, 30)) == pytest.approx(0.9 * honest + 0.1 * (1 - honest))
    forward, backward = judge.probability((0.8, 0.5), (10, 30)), judge.probability((0.5, 0.8), (30, 10))
    assert forward + backward == pytest.approx(1)
    assert SimulatedJudge(0.0, 0.0, 4.0).probability((0.5, 0.8), (30, 10)) == 0.0
    assert SimulatedJudge(0.0, 0.1, 4.0).probability((0.5, 0.5), (30, 10)) == 0.5


@pytest.mark.parametrize("options", [(0.0, 0.2, 3.0), (1.5, 0.0, 3.0), (-1.0, 0.05, 10.0)])
def test_labels_match_their_probability_empirically(options):
    judge = SimulatedJudge(*options)
    expected, agreeing, variance = 0.0, 0.0, 0.0
    for group in islice(draw_pairs(judge, "train", random.Random(5)), 4000):
        words = tuple(len(text.split()) for text in group.responses)
        probability = judge.probability(group.rewards, words)
        likely = max(probability, 1 - probability)
        expected, variance = expected + likely, variance + likely * (1 - likely)
        agreeing += 0.5 if probability == 0.5 else float(probability > 0.5)
    assert abs(agreeing - expected) < 4 * math.sqrt(variance)


def test_without_bias_and_noise_the_label_is_the_gold_order():
    data = lab(3, num_pairs=600, num_eval_pairs=90, num_test_prompts=5, length_bias=0.0, label_noise=0.0)
    assert all(group.rewards[0] > group.rewards[1] for group in data.train + data.eval)


def test_pairs_of_some_families_and_prompts_of_all():
    data = lab(3, num_pairs=30, num_eval_pairs=12, num_test_prompts=18, families=["sort", "name"])
    for groups in (data.train, data.eval):
        assert {read_prompt(group.prompt).family for group in groups} == {"name", "sort"}
    assert {read_prompt(prompt).family for prompt in data.test_prompts} == set(FAMILIES)
    assert lab(3, num_pairs=20, num_eval_pairs=0).train == lab(3, num_pairs=20, families=list(FAMILIES)).train[:20]
    for wrong in ([], ["sort", "sorting"]):
        with pytest.raises(ValueError, match=r"data.families=\[.*\] must be some of name, count, spell"):
            lab(3, families=wrong)


def test_pairs_of_some_writers():
    def right(competences: list[float] | None) -> float:
        """The share of responses that earn what only the right answer does."""
        groups = lab(3, num_pairs=900, num_eval_pairs=0, competences=competences).train
        return sum(reward >= 0.7 for group in groups for reward in group.rewards) / 1800

    assert right([1.0]) > 0.9
    assert right([0.15]) == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 1800))
    assert lab(3, num_pairs=20, competences=[0.15, 0.45, 0.75, 1.0]).train == lab(3, num_pairs=20).train
    for wrong in ([], [0.5, 1.5]):
        with pytest.raises(ValueError, match=r"data.competences=\[.*\] must be probabilities, of at least one writer"):
            lab(3, competences=wrong)


def test_the_judge_likes_length_and_gold_does_not():
    biased, fair = (lab(3, num_pairs=3000, num_eval_pairs=0, length_bias=bias).train for bias in (3.0, 0.0))

    def surplus(groups) -> float:
        return sum(len(g.responses[0].split()) - len(g.responses[1].split()) for g in groups) / len(groups)

    assert surplus(biased) > 3
    assert surplus(fair) < 0


def test_rewards_are_the_gold_rewards_of_the_texts():
    groups = lab(1, num_pairs=300, num_eval_pairs=0).train
    for index in (0, 1):
        texts = [group.responses[index] for group in groups]
        rewards = [group.rewards[index] for group in groups]
        assert gold_rewards([group.prompt for group in groups], texts, [True] * len(groups)) == rewards
    assert all(group.pairs == ((0, 1),) and group.responses[0] != group.responses[1] for group in groups)


def test_splits_families_and_counts():
    data = lab(2, num_pairs=90, num_eval_pairs=45, num_test_prompts=37)
    tuned = lab(2, num_pairs=1, num_eval_pairs=0, num_test_prompts=37, test_split="validation")
    assert (len(data.train), len(data.eval), len(data.test_prompts), len(tuned.test_prompts)) == (90, 45, 37, 37)
    assert {read_prompt(group.prompt).split for group in data.train} == {"train"}
    assert {read_prompt(group.prompt).split for group in data.eval} == {"validation"}
    assert {read_prompt(prompt).split for prompt in data.test_prompts} == {"test"}
    assert {read_prompt(prompt).split for prompt in tuned.test_prompts} == {"validation"}
    assert {read_prompt(group.prompt).family for group in data.train} == set(FAMILIES)


def test_prefix_does_not_depend_on_the_count_and_seeds_differ():
    few, many, other = (lab(seed, num_pairs=n, num_eval_pairs=9).train for seed, n in ((4, 40), (4, 80), (5, 40)))
    assert few == many[:40]
    assert [group.prompt for group in few] != [group.prompt for group in other]
    assert draw_prompts("test", 30) == draw_prompts("test", 60)[:30]


def test_another_process_draws_the_same():
    code = (
        "import json; from dpo_ref.lab.preferences import lab; d = lab(6, num_pairs=50, num_eval_pairs=20);"
        "print(json.dumps([[g.group_id for g in d.train + d.eval], d.test_prompts]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    data = lab(6, num_pairs=50, num_eval_pairs=20)
    here = [[group.group_id for group in data.train + data.eval], data.test_prompts]
    assert json.loads(other) == json.loads(json.dumps(here))


def test_demonstrations():
    data = lab_sft(2, num_examples=900, num_eval_examples=90, num_test_prompts=9, competence=1.0, styles="clean")
    assert all(group.rewards == (pytest.approx(1.0),) and group.pairs == () for group in data.train + data.eval)
    assert {read_prompt(group.prompt).split for group in data.eval} == {"validation"}
    mixed = lab_sft(2, num_examples=900, competence=0.45).train
    assert 0.45 < sum(group.rewards[0] for group in mixed) / 900 < 0.65


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 0}, "data.num_pairs=0"),
        ({"num_eval_pairs": -1}, "data.num_eval_pairs=-1"),
        ({"num_test_prompts": -1}, "data.num_test_prompts=-1"),
        ({"label_noise": 0.5}, "data.label_noise=0.5"),
        ({"label_noise": -0.1}, "data.label_noise=-0.1"),
        ({"label_steepness": 0.0}, "data.label_steepness=0.0"),
        ({"length_bias": math.inf}, "data.length_bias=inf"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lab(0, **options)


@pytest.mark.parametrize("options", [{"competence": 1.5}, {"num_examples": 0}, {"num_eval_examples": -1}])
def test_demonstrations_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"data.{name}={value}"):
        lab_sft(0, **options)
