"""Quantile rewards: by hand, the normaliser by enumeration, samples that are drawn once, and a run."""

import json
import math

import pytest
import torch

from dpo_ref.objectives.interface import Quantiles
from dpo_ref.training.quantiles import qrpo, quantiles_of
from dpo_ref.types import ResponseLogps
from tests.support.command import resolved, train

SMALL = ["objective=qrpo", "model.path=lab:initial", "data.num_pairs=24", "data.num_eval_pairs=8"]
SMALL += ["data.num_test_prompts=4", "tracking=none", "objective.num_samples=4", "trainer.batch_size=8"]


def logps(*sums):
    ones = torch.ones(len(sums), dtype=torch.long)
    return ResponseLogps(torch.tensor(sums, dtype=torch.float64), ones, ones, None)


def loss_of(policy, reference, quantiles, beta):
    return qrpo(policy, reference, Quantiles(torch.tensor(quantiles, dtype=torch.float64)), beta=beta)


def test_the_share_of_samples_that_are_no_better():
    """Ties count: of 1, 2, 2 and 3 three are no higher than 2, none is no higher than 0.5."""
    assert quantiles_of([2.0, 0.5, 3.0], [2.0, 1.0, 3.0, 2.0]).tolist() == [0.75, 0.0, 1.0]


def test_by_hand():
    """beta 1: Z = e - 1. Log-ratios 2 and -1; q 1 and 0.25."""
    log_z = math.log(math.e - 1)
    outcome = loss_of(logps(-3.0, -6.0), logps(-5.0, -5.0), [1.0, 0.25], beta=1.0)
    assert outcome.losses.tolist() == pytest.approx([(1 - log_z - 2) ** 2, (0.25 - log_z + 1) ** 2])
    assert outcome.rewards.tolist() == [2.0, -1.0]


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 3.0])
def test_the_optimum_is_a_distribution(beta):
    """Of 20,000 equally likely responses with quantiles spread evenly, the policy whose rewards are the targets sums
    to 1: that is what Z is."""
    count = 20_000
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    reference = logps(*[-math.log(count)] * count)
    targets = qrpo(reference, reference, Quantiles(quantiles), beta=beta).targets
    optimum = reference.sums + targets / beta
    assert float(optimum.exp().sum()) == pytest.approx(1.0, abs=1e-6 if beta > 0.1 else 1e-3)
    at_optimum = loss_of(logps(*optimum.tolist()), reference, quantiles.tolist(), beta)
    assert float(at_optimum.losses.abs().max()) < 1e-20


def test_finite_at_small_strengths():
    assert loss_of(logps(-3.0), logps(-5.0), [0.5], beta=1e-4).losses.isfinite().all()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples_in(cache):
    lines = [line for path in cache.glob("reference/*/samples-*/*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_samples_are_drawn_once_and_kept_beside_the_table(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("DPO_REF_CACHE", str(cache))
    first, again = (train(*SMALL, f"output_dir={tmp_path / name}") for name in ("first", "again"))
    assert first.returncode == 0, first.stderr
    assert " prompts x 4 samples of the reference" in first.stdout
    assert "samples of the reference" not in again.stdout
    assert [row.get("train/loss") for row in rows(tmp_path / "first")] == [
        row.get("train/loss") for row in rows(tmp_path / "again")
    ]
    kept = samples_in(cache)
    assert len(kept) == len({row["asked"] for row in kept}) > 20
    assert all(len(row["rewards"]) == len(row["outputs"]) == 4 for row in kept)
    more = train(*SMALL, "data.num_pairs=32", f"output_dir={tmp_path / 'more'}")
    assert more.returncode == 0, more.stderr
    assert len(samples_in(cache)) == len(kept) + 8
    other = train(*SMALL, "objective.num_samples=2", f"output_dir={tmp_path / 'other'}")
    assert other.returncode == 0, other.stderr
    assert len(list(cache.glob("reference/*/samples-*"))) == 2


def test_targets_are_those_of_the_rewards(tmp_path):
    """Nothing is learned yet: the loss is the mean square of the targets, whose mean is that of q - beta log Z."""
    done = train(*SMALL, "beta=0.5", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    before = rows(tmp_path / "run")[0]
    log_z = 0.5 * math.log(0.5 * (math.exp(2) - 1))
    assert -log_z <= before["eval/rewards/targets"] <= 1 - log_z
    assert before["eval/loss"] >= before["eval/rewards/targets"] ** 2
    assert before["eval/rewards/all"] == 0
    assert before["eval/rewards/accuracies"] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reference=none"], "has no samples to be drawn before training"),
        (["reference=moving"], "has no samples to be drawn before training"),
        (["reference.strength=0.5"], "draws samples of the reference as it is"),
        (["data=on_policy"], "answers its prompts as it goes on"),
        (["scorer@objective.scorer=judge", "objective.scorer.judge.model=m"], "ranks answers among themselves"),
    ],
)
def test_what_has_no_samples_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolved("objective=qrpo", *words)


def test_a_scorer_without_a_number_is_refused(tmp_path):
    done = train(*SMALL, "scorer@objective.scorer=none", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "has no finite reward for" in done.stderr
