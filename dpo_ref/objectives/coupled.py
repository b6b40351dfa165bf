"""Objectives on pairs in which the loss of a pair depends on the other pairs of the optimiser batch, held fixed."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_ref.component import component
from dpo_ref.objectives.interface import BatchLogps, KLStrength, Preference, Running, positive
from dpo_ref.objectives.pairwise import Rewards, between, log_ratio_rewards, log_ratios
from dpo_ref.types import PairLogps


def aot(
    policy: PairLogps, reference: PairLogps, whole: BatchLogps[PairLogps], *, beta: KLStrength = 0.1
) -> Preference:
    """-log sigmoid(beta (h - h_ref)), h = log pi(chosen) - log pi(rejected) of the policy and h_ref that of the
    reference for the pair of the same rank (paired AOT, arXiv:2406.05882).

    Ranks are over the optimiser batch: sorted policy margins are compared with sorted reference margins, so that the
    one distribution comes to dominate the other. Sorting is a permutation, so the gradient is that of the sorted loss.
    Rewards are dpo's, sums over the response; not a function of their margin. TRL: loss_type="aot".
    """
    positive(beta=beta)
    ranks = (whole.policy.chosen - whole.policy.rejected).argsort(stable=True).argsort()
    theirs = (whole.reference.chosen - whole.reference.rejected).sort().values
    gap = policy.chosen - policy.rejected - theirs[ranks[whole.here]]
    return log_ratio_rewards(policy, reference, beta).with_losses(-F.logsigmoid(beta * gap))


def _mean_margin(whole: BatchLogps[PairLogps], beta: float) -> Float[Tensor, ""]:
    return log_ratio_rewards(whole.policy, whole.reference, beta).margins.mean()


def _advance(running: Running, whole: BatchLogps[PairLogps], *, beta: float = 0.1, momentum: float = 0.9) -> Running:
    mean = _mean_margin(whole, beta)
    return {"mean_margin": momentum * running.get("mean_margin", 0 * mean) + (1 - momentum) * mean}


@component(advance=_advance)
def beta_dpo(
    policy: PairLogps,
    reference: PairLogps,
    whole: BatchLogps[PairLogps],
    running: Running,
    *,
    beta: KLStrength = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    min_beta: float = 0.001,
) -> Preference:
    """-log sigmoid(margin), rewards b log(pi/pi_ref) with b = max(min_beta, beta (1 + alpha (M - M0))) (beta-DPO,
    arXiv:2407.08639, section 4.1).

    M is the mean margin of the optimiser batch at strength `beta`, M0 its moving average over steps: M0 <- momentum M0
    + (1 - momentum) M, from 0, before it is used, as in the authors' code, whose M lacks the factor `beta` (its a is
    alpha beta here). Batches with larger margins than usual get a larger b; b is held fixed. Without the paper's
    random filter of pairs. On held-out data the batch is all of it, and M0 stays.
    """
    positive(beta=beta, alpha=alpha, min_beta=min_beta)
    between(0.0, 1.0, momentum=momentum)
    gap = _mean_margin(whole, beta) - running.get("mean_margin", 0.0)
    strength = (beta * (1 + alpha * gap)).clamp(min=min_beta)
    rewards = Rewards(*(strength * ratio for ratio in log_ratios(policy, reference)))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))
