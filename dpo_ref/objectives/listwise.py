"""Objectives on rankings: a prompt and all its responses at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_ref.objectives.interface import KLStrength, Ranked, RankedLogps, positive


def plackett_luce(policy: RankedLogps, reference: RankedLogps, *, beta: KLStrength = 0.1) -> Ranked:
    """-sum_i log(exp R_i / (exp R_i + sum_j exp R_j)), j over the responses that are worse than i: the likelihood of a
    ranking under Plackett-Luce (DPO, arXiv:2305.18290, appendix A.3, eq. 20), one loss a prompt.

    R = beta log(pi/pi_ref), summed over the response, are the rewards. With two responses it is dpo. The pairs of the
    data say what is worse: with data.pairing=all every response is compared with all below it, and tied ones are not
    compared with each other, which is the equation where nothing is tied.
    """
    positive(beta=beta)
    rewards = beta * (policy.sums - reference.sums)
    terms = _log_sum_of_worse(rewards, policy) - rewards
    losses = torch.zeros(policy.num_prompts, dtype=terms.dtype, device=terms.device)
    rewards = rewards.detach()
    chosen, rejected = rewards[policy.chosen], rewards[policy.rejected]
    return Ranked(losses.index_add(0, policy.prompt_index, terms), chosen, rejected)


def _log_sum_of_worse(rewards: Float[Tensor, " N"], ranked: RankedLogps) -> Float[Tensor, " N"]:
    """log(exp R_i + sum_j exp R_j) of every response, j over those it is better than; R_i where there are none."""
    fixed = rewards.detach()
    largest = fixed.scatter_reduce(0, ranked.chosen, fixed[ranked.rejected], "amax")
    worse = (rewards[ranked.rejected] - largest[ranked.chosen]).exp()
    return largest + (rewards - largest).exp().index_add(0, ranked.chosen, worse).log()
