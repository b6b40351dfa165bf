"""Objectives on rankings: by hand, by enumeration of all orders, beside dpo, and through packs of any size."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations

import pytest
import torch

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate, pack
from dpo_ref.models import logps
from dpo_ref.objectives.interface import RankedLogps, bind
from dpo_ref.objectives.listwise import plackett_luce
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.references.policies import LiveReference
from dpo_ref.training.trainer import backward
from dpo_ref.types import ResponseLogps
from tests.support.command import train
from tests.support.tiny import VOCAB, naive_logps, policy_of, random_groups, shared, tiny_model


def ranking(order, ties=()):
    """The pairs of responses that stand in this order, best first."""
    return tuple((a, b) for a, b in combinations(order, 2) if {a, b} not in map(set, ties))


def losses(rewards, pairs, beta=1.0):
    """Of one prompt whose responses have these log-ratios."""
    count = len(rewards)
    sums, ones = torch.tensor(rewards, dtype=torch.float64), torch.ones(count, dtype=torch.long)
    chosen, rejected = (torch.tensor(side) for side in zip(*pairs, strict=True))
    same = {"chosen": chosen, "rejected": rejected, "prompt_index": 0 * ones, "num_prompts": 1}
    both = (RankedLogps(values, ones, ones, None, **same) for values in (sums, torch.zeros_like(sums)))
    return plackett_luce(*both, beta=beta).losses


def test_by_hand():
    """Rewards 1, 0 and -1 at beta 0.5, in this order: the first is drawn out of three, the second out of two."""
    first = 1 - math.log(math.e + 1 + 1 / math.e)
    second = 0 - math.log(1 + 1 / math.e)
    assert losses([2.0, 0.0, -2.0], ranking([0, 1, 2]), beta=0.5).tolist() == pytest.approx([-first - second])


def test_the_likelihoods_of_all_orders_sum_to_one():
    rewards = [0.3, -1.2, 2.0, 0.7]
    orders = list(permutations(range(4)))
    likelihoods = [math.exp(-float(losses(rewards, ranking(order)))) for order in orders]
    assert sum(likelihoods) == pytest.approx(1.0)
    best = max(orders, key=lambda order: likelihoods[orders.index(order)])
    assert best == (2, 3, 0, 1)


def test_tied_responses_are_not_compared_with_each_other():
    """1 and 2 are tied below 0 and above 3: each is drawn out of itself and 3."""
    rewards = [1.0, 0.5, -0.5, 0.2]
    terms = [math.log(sum(map(math.exp, rewards))) - 1.0]
    terms += [math.log(math.exp(r) + math.exp(0.2)) - r for r in (0.5, -0.5)]
    assert losses(rewards, ranking([0, 1, 2, 3], ties=[(1, 2)])).tolist() == pytest.approx([sum(terms)])


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_finite_at_extreme_rewards(extreme):
    assert losses([extreme, 0.0, -extreme], ranking([0, 1, 2])).isfinite().all()


LAYOUT = [(3 + i % 4, tuple(1 + (i + j) % 5 for j in range(2 + i % 3))) for i in range(7)]
GROUPS = from_groups(
    replace(group, pairs=ranking(range(len(group.response_ids)))) for group in random_groups(LAYOUT, seed=5)
)
PACKINGS = {
    "one pack": partial(pack, tokens_per_batch=10_000),
    "several packs": partial(pack, tokens_per_batch=30),
    "one group each": partial(pack, tokens_per_batch=1, packing="one_group"),
}


def model(seed):
    return tiny_model("gpt_neox", seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("tokens_per_chunk", [10, 10_000], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_loss_and_gradient_of_lists_of_unequal_length(packing, tokens_per_chunk, monkeypatch):
    """A mean over prompts, whatever their packs; against the equation by autograd, one response at a time."""
    policy, theirs = model(0), model(1)
    terms = []
    for group in GROUPS:
        both = [torch.stack([x.sum() for x in naive_logps(m, group)]) for m in (policy, theirs)]
        rewards = 0.3 * (both[0] - both[1].detach())
        terms.append(sum(rewards[k:].logsumexp(0) - rewards[k] for k in range(len(rewards) - 1)))
    loss = torch.stack(terms).mean()
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    monkeypatch.setattr(logps, "CHUNK_LOGITS", tokens_per_chunk * VOCAB)
    trained = model(0)
    packs = PACKINGS[packing](list(GROUPS))
    reference = LiveReference("other", theirs, "id", "weights")
    values, _ = backward(policy_of(trained), reference, bind(plackett_luce, beta=0.3), shared(packs))
    torch.testing.assert_close(values["loss"].mean(), loss.detach(), rtol=1e-9, atol=1e-9)
    assert len(values["rewards/margins"]) == sum(len(group.pairs) for group in GROUPS)
    for ours, expected in zip(trained.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, expected, rtol=1e-7, atol=1e-9)


def test_of_two_responses_it_is_dpo():
    groups = random_groups([(4, (3, 5)), (2, (1, 2))], seed=1)
    batch = collate(groups)
    sums = [torch.linspace(-4, -1, 4, dtype=torch.float64), torch.linspace(-1, -5, 4, dtype=torch.float64)]
    ours, theirs = (ResponseLogps(each, batch.lengths, batch.num_bytes, None) for each in sums)
    lists = plackett_luce(*(RankedLogps.of(each, batch) for each in (ours, theirs)), beta=0.4)
    pairs = dpo(*(each.pairs(batch.chosen, batch.rejected) for each in (ours, theirs)), beta=0.4)
    for listed, paired in zip(lists, pairs, strict=True):
        torch.testing.assert_close(listed, paired)


def test_a_run_on_ranked_rows(tmp_path):
    """Every response of a row is compared with all below it, in one group."""
    rows = [
        {"prompt": f"Say {n}", "responses": [f"{n}!", f"no {n}", "what?", "x"], "scores": [3, 2, 1, n % 2]}
        for n in range(12)
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model.path=lab:tiny", "data=jsonl", f"data.path={path}", "data.pairing=all", "tracking=none"]
    words += ["objective=plackett_luce", "trainer.batch_size=4", "data.eval_fraction=0.25"]
    done = train(*words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    terms = (math.log(24), math.log(12))  # nothing is learned yet: of 4 in order, or of 4 with the last two tied
    assert terms[1] - 1e-6 <= first["eval/loss"] <= terms[0] + 1e-6
