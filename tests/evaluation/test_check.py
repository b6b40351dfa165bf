"""What is likely to go wrong with a run: each warning where it belongs and nowhere else, the costliest first."""

from dataclasses import replace

import numpy as np
import pytest

from dpo_ref.data.inspection import Hygiene
from dpo_ref.evaluation.check import Fit, RankFacts, RanksFacts, RunFacts, in_time, run_warnings, step_zero
from dpo_ref.types import Reading

NONE = np.zeros(0, dtype=np.int64)


def hygiene(**changes):
    clean = {
        "reading": Reading(), "counts": {"groups": 1000}, "num_train": 900, "num_eval": 100, "num_written": 1000,
        "duplicates": 0, "contradictions": 0, "leaked": 0, "lopsided": 0, "empty": 0,
        "prompts": np.full(900, 20), "chosen": np.full(900, 50), "rejected": np.full(900, 50), "alone": NONE,
    }  # fmt: skip
    return Hygiene(**(clean | changes))


SOUND = RunFacts(
    hygiene=hygiene(),
    max_length=1024,
    tokens_per_batch=8192,
    num_steps=100,
    epoch_share=1.0,
    pairwise=True,
    uses_reference=True,
    reference="initial",
    lr=1e-6,
    usual_lr=1e-6,
    whose_lr="a model of 135 M parameters",
    unfinished=0.0,
    longest=300,
    positions=2048,
    prompt_is_open=True,
    held_out_option="data.eval_fraction=0.1",
    seconds={"steps": 1000.0, "evaluation": 100.0},
)
WRONG = np.array([1.0] * 4 + [-1.0] * 60)
FAR = np.array([100.0, -100.0] * 32)


def ranks_facts(speeds=(1e12, 1e12, 1e12), busiest=1.0, sending=0.0):
    """Of ranks that compute so fast."""
    ranks = [RankFacts(f"node-{at}", 2 * at, 10, speed, 900) for at, speed in enumerate(speeds)]
    return RanksFacts(ranks, busiest, 28e6, sending, 2.0)


CASES = [
    ({"fit": Fit(30 * 2**30, 20 * 2**30, 4096, "this machine")}, "it takes 30.0 GiB", "data.tokens_per_batch=4096"),
    ({"fit": Fit(30 * 2**30, 20 * 2**30, 100, "this machine")}, "it takes 30.0 GiB", "model.lora_rank=16"),
    ({"lr": 1e-4}, "optim.lr=0.0001 is 100 times", "optim.lr=1e-06"),
    ({"lr": 1e-8}, "optim.lr=1e-08 is a 100th", "optim.lr=1e-06"),
    ({"hygiene": hygiene(counts={"dropped: too long": 100})}, "100 of 1,100 groups dropped", "data.max_length"),
    ({"hygiene": hygiene(counts={"responses cut": 100})}, "100 responses cut", "data.max_length"),
    ({"hygiene": hygiene(duplicates=90)}, "90 of 900 groups were there before", "data.deduplicate=exact"),
    ({"hygiene": hygiene(contradictions=90)}, "90 groups order", "objective=cdpo"),
    ({"hygiene": hygiene(leaked=10)}, "10 of 100 held-out", "data.eval_fraction=0.1"),
    ({"hygiene": hygiene(num_eval=0)}, "no rows are held out", "data.eval_fraction=0.1"),
    ({"hygiene": hygiene(chosen=np.full(900, 60))}, "the longer response is chosen in 100%", "objective=r_dpo"),
    ({"step_zero": step_zero(WRONG, WRONG, 0.1, range(64))}, "the reference prefers the rejected", "reference="),
    ({"step_zero": step_zero(FAR, 0 * FAR, 0.1, range(64))}, "100% of 64 pairs are saturated", "beta=0.03"),
    ({"epoch_share": 0.25}, "the run's 100 steps visit 25%", "trainer.max_steps"),
    ({"seconds": {"steps": 100.0, "answers": 700.0}}, "evaluations take longer", "evaluation.every"),
    ({"unfinished": 0.2}, "20% of the responses end without", "data.over_length=drop"),
    ({"prompt_is_open": False}, "the chat template does not write", "model.template"),
    ({"positions": 512}, "data.max_length=1,024 exceeds the 512", "data.max_length=512"),
    ({"reference": "none"}, "reference=none", "reference=initial"),
    ({"frozen_experts": 0.8}, "experts, 80%", "model.lora_rank"),
    ({"float32_on_cuda": True}, "model.dtype=float32", "model.dtype=auto"),
    ({"together": ranks_facts((4e12, 2e12, 4.2e12, 3.8e12))}, "rank 1 (node-1) computes 0.50 times", "leaving it out"),
    ({"together": ranks_facts((1e12, 0.8e12))}, "rank 1 (node-1) computes 0.80 times", "leaving it out"),
    ({"together": ranks_facts(busiest=1.25)}, "the rank with the longest pairs of a batch has 1.25", "trainer.batch_"),
    ({"together": ranks_facts(sending=1.0)}, "a rank sends 28.0 MB in a step, which takes 1 s of 2 s", "lora_rank=16"),
]


def test_a_sound_run_is_left_alone():
    assert run_warnings(SOUND) == []
    healthy = step_zero(-WRONG, -WRONG, 0.1, range(64))
    assert run_warnings(replace(SOUND, together=ranks_facts((9e11, 1e12, 1e12), 1.09, 0.5))) == []
    assert run_warnings(replace(SOUND, step_zero=healthy, fit=Fit(1, 2, None, "here"), lr=1e-5)) == []


@pytest.mark.parametrize(("changes", "what", "mend"), CASES, ids=[what for _, what, _ in CASES])
def test_what_is_wrong_is_said_with_the_option_that_mends_it(changes, what, mend):
    (warning,) = run_warnings(replace(SOUND, **changes))
    assert warning.what.startswith(what)
    assert mend in warning.mend
    assert warning.cost
    assert 0 < warning.wasted <= 1


def test_the_rank_with_least_room_is_the_tightest():
    assert ranks_facts().tightest == 2
    unknown = [rank._replace(available=None) for rank in ranks_facts().ranks]
    assert replace(ranks_facts(), ranks=unknown).tightest == 0


def test_the_costliest_comes_first():
    facts = replace(SOUND, lr=1e-4, fit=Fit(3, 2, None, "here"), hygiene=hygiene(duplicates=90), epoch_share=0.5)
    wasted = [warning.wasted for warning in run_warnings(facts)]
    assert len(wasted) == 4
    assert wasted == sorted(wasted, reverse=True)
    assert run_warnings(facts)[0].what.startswith("it takes")


def test_what_few_pairs_say_by_chance_is_no_warning():
    """5 of 8 the wrong way round: chance does that more than every third time."""
    margins = np.array([-1.0] * 5 + [1.0] * 3)
    assert run_warnings(replace(SOUND, step_zero=step_zero(margins, margins, 0.1, range(8)))) == []


def test_step_zero_by_hand():
    """Reference margins 2, -1, 0, 3: one wrong and one tie. Policy less reference 50, -50, 10, 0 at beta 0.1 are
    rewards 5, -5, 1, 0: two of four beyond 4; at 0.03 none is."""
    reference = np.array([2.0, -1.0, 0.0, 3.0])
    zero = step_zero(reference + np.array([50.0, -50.0, 10.0, 0.0]), reference, 0.1, range(4))
    assert zero.prefers_rejected == pytest.approx(1.5 / 4)
    assert zero.at is not None
    assert (zero.at.saturated_right, zero.at.saturated_wrong) == (0.25, 0.25)
    assert zero.start.listed == 0.03
    assert step_zero(reference, 0 * reference, 0.1, range(4)).prefers_rejected is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "under 1 s"), (12.4, "12 s"), (210.0, "3.5 min"), (8640.0, "2.4 h"), (270000.0, "3.1 days")],
)
def test_times_in_the_unit_that_says_most(seconds, text):
    assert in_time(seconds) == text
