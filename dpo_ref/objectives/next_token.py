"""Objectives on pairs that look at the next-token distributions of policy and reference at every token of a response,
not at the tokens alone. The reference must be a model in memory.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_ref.component import component
from dpo_ref.objectives.divergences import FORWARD_KL, PairDivergences, RenyiSum, TokenDivergence
from dpo_ref.objectives.interface import KLStrength, Preference, Running, Stepped, positive
from dpo_ref.objectives.pairwise import Rewards, between, log_ratios
from dpo_ref.types import PairLogps

# --- the KL of every token beside the log-ratios


def _forward_kl() -> tuple[TokenDivergence, ...]:
    return (FORWARD_KL,)


@component(between=_forward_kl)
def tdpo(
    policy: PairLogps,
    reference: PairLogps,
    divergences: PairDivergences,
    *,
    beta: KLStrength = 0.1,
    alpha: float = 0.5,
) -> Preference:
    """-log sigmoid(margin), rewards beta (log(pi/pi_ref) + alpha KL), KL the sum over the response's tokens of
    KL(pi_ref || pi) of the next token, which has no gradient in the chosen response (TDPO2, arXiv:2404.11999).

    A rejected response pays for where the policy has left the reference while it is written, beyond the log-ratio of
    the tokens that stand there. `alpha` in nats per nat; towards 0 it is dpo. Sums over the response, end of turn
    included. The authors log rewards with alpha 1.
    """
    positive(beta=beta)
    _some(alpha=alpha)
    kl_chosen, kl_rejected = divergences[FORWARD_KL]
    return _with_kl(policy, reference, (alpha * kl_chosen.detach(), alpha * kl_rejected), beta)


@component(between=_forward_kl)
def tdpo1(
    policy: PairLogps, reference: PairLogps, divergences: PairDivergences, *, beta: KLStrength = 0.1
) -> Preference:
    """-log sigmoid(margin), rewards beta (log(pi/pi_ref) + KL), KL the sum over the response's tokens of
    KL(pi_ref || pi) of the next token (TDPO1, arXiv:2404.11999).

    What the token-level Bradley-Terry model gives: tdpo with alpha 1 and the gradient of both KLs, so the chosen
    response's is made larger. Sums over the response, end of turn included.
    """
    positive(beta=beta)
    return _with_kl(policy, reference, divergences[FORWARD_KL], beta)


def _with_kl(
    policy: PairLogps, reference: PairLogps, kl: tuple[Float[Tensor, " B"], Float[Tensor, " B"]], beta: float
) -> Preference:
    """DPO's loss of rewards to which a KL is added."""
    ratios = log_ratios(policy, reference)
    rewards = Rewards(beta * (ratios.chosen + kl[0]), beta * (ratios.rejected + kl[1]))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def _some(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite; {name}=0 is objective=dpo")


# --- a strength for every pair, by what the policy would say under another


def _extrapolated(*, epsilon: float) -> tuple[TokenDivergence, ...]:
    return RenyiSum(1 + epsilon), RenyiSum(1 - epsilon)


def _settle(running: Running, values: Mapping[str, Tensor], *, beta: float, epsilon: float) -> Running:
    """beta <- beta / (1 + epsilon s), s the mean step of the optimiser batch's pairs."""
    return {"beta": running.get("beta", beta) / (1 + epsilon * values["beta/step"].mean())}


@component(between=_extrapolated, settle=_settle)
def epsilon_dpo(
    policy: PairLogps,
    reference: PairLogps,
    divergences: PairDivergences,
    running: Running,
    *,
    beta: KLStrength = 0.01,
    epsilon: float = 0.01,
) -> Stepped:
    """-log sigmoid(margin), rewards b log(pi/pi_ref) with b = beta / (1 + epsilon s), s in {1, 0, -1} for each pair
    (epsilon-DPO, arXiv:2502.13177, eq. 3 to 5 and algorithm 1; the authors' code).

    Logits f + a epsilon (f - f_ref) are about those of a policy trained with beta / (1 + a epsilon). With z_a the log
    odds log pi(chosen) - log pi(rejected) that they give, s is 1 where z_1 > z_0 > z_-1, a weaker constraint would
    tell the pair better apart, -1 where z_-1 > z_0 > z_1, else 0. b is held fixed. After every optimiser step beta <-
    beta / (1 + epsilon S), S the step's mean s: it has no bounds and is in checkpoints; on held-out data it stays. The
    paper's beta is the mean of b instead, which differs by epsilon squared. Sums over the response. Defaults are the
    authors'.
    """
    positive(beta=beta)
    between(0.0, 1.0, "epsilon=0 is objective=dpo", epsilon=epsilon)
    weaker, stronger = (_odds_beyond(policy, reference, divergences, 1 + a * epsilon) for a in (1, -1))
    usual = policy.chosen - policy.rejected
    steps = ((weaker > usual) & (usual > stronger)).double() - ((stronger > usual) & (usual > weaker)).double()
    strengths = running.get("beta", beta) / (1 + epsilon * steps)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(strengths * ratios.chosen, strengths * ratios.rejected)
    return Stepped(*rewards.with_losses(-F.logsigmoid(rewards.margins)), steps)


@torch.no_grad()
def _odds_beyond(
    policy: PairLogps, reference: PairLogps, divergences: PairDivergences, order: float
) -> Float[Tensor, " B"]:
    """log p(chosen) - log p(rejected) under the logits a f + (1 - a) f_ref, a the `order`."""
    normalisers = divergences[RenyiSum(order)]
    ours, theirs = policy.chosen - policy.rejected, reference.chosen - reference.rejected
    return order * ours + (1 - order) * theirs - (normalisers[0] - normalisers[1])
