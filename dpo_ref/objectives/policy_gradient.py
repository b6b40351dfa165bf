"""Objectives on samples of a policy and what each is worth: policy gradients, and weighted likelihood.

The advantage of a response comes with the data: its reward, less a baseline made of the other samples of its prompt
(`dpo_ref/training/advantages.py`), which stands where PPO has a value head. It is the same for all tokens of the
response. Every response weighs the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_ref.component import component
from dpo_ref.objectives.interface import KLStrength, Sampled, TokenLogps, positive
from dpo_ref.types import ResponseLogps

LARGEST_LOG_RATIO = 20.0  # nats on a token; beyond it a ratio is held where float32 is still finite


@component(advantage="none")
def rwr(
    policy: ResponseLogps, advantages: Float[Tensor, " N"], *, beta: KLStrength = 1.0, max_weight: float = 20.0
) -> Sampled:
    """-min(exp(A / beta), max_weight) log pi(y|x), summed over the response (AWR, arXiv:1910.00177).

    With the reward itself as advantage this is reward-weighted regression (Peters and Schaal 2007). `beta` is in units
    of the reward: the larger, the more equal the weights, and the closer the policy stays to what was sampled. The
    bound of 20 on the weights is that of both AWR's code and arXiv:2404.14367's.
    """
    positive(beta=beta, max_weight=max_weight)
    weights = (advantages / beta).exp().clamp(max=max_weight)
    return Sampled(-weights * policy.sums)


@component(advantage="leave_one_out")
def reinforce(
    policy: ResponseLogps, reference: ResponseLogps, advantages: Float[Tensor, " N"], *, beta: KLStrength = 0.05
) -> Sampled:
    """-(A - beta log(pi/pi_ref)) log pi(y|x), the bracket held fixed, both summed over the response (REINFORCE,
    Williams 1992; leave-one-out baseline and KL in the reward as in RLOO, arXiv:2402.14740).

    On the policy's own samples its gradient is that of E[reward] - beta KL(pi || pi_ref), without bias. No importance
    weights: with data.inner_epochs above 1, or stale samples, it is biased. `beta` in rewards per nat; the KL part has
    no baseline.
    """
    positive(beta=beta)
    worth = advantages - beta * (policy.sums - reference.sums).detach()
    return Sampled(-worth * policy.sums)


@component(advantage="leave_one_out")
def ppo_clip(
    policy: TokenLogps,
    old: TokenLogps,
    reference: ResponseLogps,
    advantages: Float[Tensor, " N"],
    *,
    beta: KLStrength = 0.05,
    epsilon: float = 0.2,
) -> Sampled:
    """-sum_t min(rho_t A', clip(rho_t, 1 - epsilon, 1 + epsilon) A'), rho_t = pi / pi_old of token t (PPO,
    arXiv:1707.06347, eq. 7), with A' = A - beta log(pi_old/pi_ref) of the whole response: the KL is in the reward, as
    in arXiv:2203.02155, and fixed at sampling.

    A group baseline stands for the value head, there is no discount, and tokens are summed: at pi = pi_old the
    gradient is reinforce's. `beta` in rewards per nat.
    """
    positive(beta=beta, epsilon=epsilon)
    worth = advantages - beta * (old.sums - reference.sums)
    return Sampled(-_response_sums(_surrogate(policy, old, worth, epsilon), policy))


@component(advantage="group_standardised")
def grpo(
    policy: TokenLogps,
    old: TokenLogps,
    reference: TokenLogps,
    advantages: Float[Tensor, " N"],
    *,
    beta: KLStrength = 0.04,
    epsilon: float = 0.2,
) -> Sampled:
    """-1/|y| sum_t [min(rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon) A) - beta k3_t] with
    k3 = pi_ref/pi - log(pi_ref/pi) - 1 of the token, an estimate of KL(pi || pi_ref) that is never negative (GRPO,
    arXiv:2402.03300, eqs. 3 and 4).

    The KL is in the loss. Tokens are averaged within a response, so a token of a short one weighs more, as published.
    """
    positive(beta=beta, epsilon=epsilon)
    log_ratio = (reference.tokens() - policy.tokens()).double().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    k3 = log_ratio.exp() - log_ratio - 1
    per_token = _surrogate(policy, old, advantages, epsilon) - beta * k3
    return Sampled(-_response_sums(per_token, policy) / policy.lengths)


def _surrogate(
    policy: TokenLogps, old: TokenLogps, advantages: Float[Tensor, " N"], epsilon: float
) -> Float[Tensor, " R"]:
    """min(rho A, clip(rho) A) of every token."""
    log_ratio = (policy.tokens() - old.tokens()).double().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio, worth = log_ratio.exp(), advantages[policy.response_index]
    return torch.minimum(ratio * worth, ratio.clamp(1 - epsilon, 1 + epsilon) * worth)


def _response_sums(values: Float[Tensor, " R"], policy: TokenLogps) -> Float[Tensor, " N"]:
    """Sums over each response's tokens."""
    zeros = torch.zeros(len(policy.lengths), dtype=values.dtype, device=values.device)
    return zeros.index_add(0, policy.response_index, values)
