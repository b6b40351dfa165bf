"""Objectives on pairs without a reference: on the policy's own log-probabilities."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dpo_ref.component import component
from dpo_ref.objectives.interface import KLStrength, Preference, positive
from dpo_ref.objectives.pairwise import Rewards, per_token
from dpo_ref.types import PairLogps


def simpo(policy: PairLogps, *, beta: KLStrength = 2.0, gamma: float = 1.0) -> Preference:
    """-log sigmoid(margin - gamma), rewards beta log pi per token of the response (SimPO, arXiv:2405.14734).

    `gamma` is the margin that the rewards should reach, in units of reward; authors and HALOs configure gamma / beta.
    TRL: CPOTrainer with loss_type="simpo", simpo_gamma=gamma, cpo_alpha=0; HALOs: simpo.
    """
    positive(beta=beta)
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma={gamma} must be positive and finite; 0 is objective=dpo_norm reference=none")
    rewards = Rewards(*(beta * mean for mean in per_token(Rewards(policy.chosen, policy.rejected), policy)))
    return rewards.with_losses(-F.logsigmoid(rewards.margins - gamma))


def simper(policy: PairLogps) -> Preference:
    """-margin, rewards exp(log pi per token of the response), which is 1 / perplexity (SimPER, arXiv:2502.00883 v4;
    the authors' loss_type "SimPER").

    Without reference, temperature or any other constant. Each response is pushed by its own inverse perplexity: where
    the policy finds it unlikely hardly at all. The loss lies in (-1, 1).
    """
    rewards = Rewards(*(mean.exp() for mean in per_token(Rewards(policy.chosen, policy.rejected), policy)))
    return rewards.with_losses(-rewards.margins)


@component(fits_chosen=True)
def cpo(policy: PairLogps, *, beta: KLStrength = 0.1, alpha: float = 1.0) -> Preference:
    """-log sigmoid(beta (log pi_w - log pi_l)) - alpha log pi_w / length (CPO, arXiv:2401.08417; eq. 3 is its first
    term by TRL's account).

    Rewards are beta log pi, summed over the response; the second term is the chosen response's mean token negative
    log-likelihood, of weight `alpha`, so the loss is not a function of the margin alone. TRL: CPOTrainer with
    loss_type="sigmoid", cpo_alpha=alpha, whose likelihood term is, like the authors', a mean over all chosen tokens of
    the micro-batch instead of one per pair.
    """
    positive(beta=beta)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be positive and finite; alpha=0 is objective=dpo reference=none")
    rewards = Rewards(beta * policy.chosen, beta * policy.rejected)
    return rewards.with_losses(-F.logsigmoid(rewards.margins) - alpha * policy.chosen / policy.chosen_lengths)


def _log_odds(sums: Float[Tensor, " B"], lengths: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(p / (1 - p)) of p = exp(mean token log-prob), bounded where p rounds to 1."""
    surprisal = (-sums / lengths).clamp(min=torch.finfo(sums.dtype).eps)
    return -surprisal - torch.log(-torch.expm1(-surprisal))


@component(fits_chosen=True)
def orpo(policy: PairLogps, *, weight: float = 0.1) -> Preference:
    """-log pi_w / length - weight log sigmoid(log odds_w - log odds_l) (ORPO, arXiv:2403.07691, eq. 4 and 7).

    odds = p / (1 - p) with p = exp(mean token log-prob). Rewards are the log odds; the likelihood term keeps the loss
    from being a function of their margin alone. `weight` is lambda of the paper and `beta` of TRL's ORPOTrainer; it
    binds the policy to nothing, so it is no strength of a KL constraint. The likelihood is of the response, a mean per
    pair; TRL's, and the authors' by default, is of prompt and response, over all tokens of the micro-batch.
    """
    positive(weight=weight)
    rewards = Rewards(
        _log_odds(policy.chosen, policy.chosen_lengths), _log_odds(policy.rejected, policy.rejected_lengths)
    )
    likelihood = policy.chosen / policy.chosen_lengths
    return rewards.with_losses(-likelihood - weight * F.logsigmoid(rewards.margins))


def unlikelihood(policy: PairLogps, *, alpha: float = 0.1) -> Preference:
    """-log pi_w + alpha log pi_l, summed over each response: the DPO paper's unlikelihood baseline (arXiv:2305.18290).

    Rewards are log pi, summed over the response; with alpha below 1 the loss is not a function of their margin. It has
    no lower bound. `alpha` in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in (0, 1]; alpha=0 only fits the chosen response: objective=sft")
    return Rewards(policy.chosen, policy.rejected).with_losses(alpha * policy.rejected - policy.chosen)
