"""Objectives on single responses: wanted or not, or simply given. Pairs count as one of each."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dpo_ref.objectives.interface import BatchLogps, KLStrength, Labelled, Likelihood, Mismatched, positive
from dpo_ref.types import ResponseLogps


def _signed_values(values: Float[Tensor, " N"], labels: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The values of wanted responses, and the negative of the others'."""
    return torch.where(labels, values, -values)


def kto(
    policy: ResponseLogps,
    reference: ResponseLogps,
    labels: Bool[Tensor, " N"],
    mismatched: Mismatched,
    *,
    beta: KLStrength = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Labelled:
    """w_d sigmoid(z - R) of wanted and w_u sigmoid(R - z) of unwanted responses (KTO, arXiv:2402.01306).

    R = beta log(pi/pi_ref), summed over the response, is the reward. z = beta max(0, KL) held fixed, KL the mean of
    log(pi/pi_ref) over the optimiser batch's mismatched responses: for each prompt all responses of the next prompt in
    the data's order, cyclic. TRL (KTOTrainer) and HALOs take the neighbour in the micro-batch, which may answer the
    same prompt. The weights should make up for unequal numbers of wanted and unwanted responses: eq. 8, by TRL's
    account, has w_d n_d / (w_u n_u) between 1 and 4/3.
    """
    positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    rewards = beta * (policy.sums - reference.sums)
    kl = (mismatched.policy - mismatched.reference).mean().clamp(min=0)
    weights = torch.where(labels, desirable_weight, undesirable_weight)
    return Labelled(weights * _signed_values(beta * kl - rewards, labels).sigmoid(), rewards.detach())


def bco(
    policy: ResponseLogps,
    reference: ResponseLogps,
    labels: Bool[Tensor, " N"],
    whole: BatchLogps[ResponseLogps],
    *,
    beta: KLStrength = 0.1,
) -> Labelled:
    """-log sigmoid(R - delta) of wanted and -log sigmoid(delta - R) of unwanted responses (BCO, arXiv:2404.04656).

    R = beta log(pi/pi_ref), summed over the response, is the reward. delta, held fixed, is the mean of the wanted and
    of the unwanted responses' mean reward: theirs of the optimiser batch, which needs no state, where TRL's former
    BCOTrainer keeps a running mean over all responses. No density-ratio weights. `beta` is TRL's; the paper's is 0.01
    by TRL's account. TRL: loss_type="bco_pair" is the paired form with delta 0.
    """
    positive(beta=beta)
    rewards = beta * (policy.sums - reference.sums)
    assert whole.labels is not None
    batch_rewards, wanted = beta * (whole.policy.sums - whole.reference.sums), whole.labels.double()
    means = [(batch_rewards * share).sum() / share.sum() for share in (wanted, 1 - wanted)]  # nan of none
    shift = torch.stack(means).nanmean()
    return Labelled(-F.logsigmoid(_signed_values(rewards - shift, labels)), rewards.detach())


# --- the likelihood of given responses


def sft(policy: ResponseLogps) -> Likelihood:
    """Negative mean token log-probability of each response, in nats per token; every response weighs the same.

    On preference data the chosen response is the one fitted (Preferred-FT); the rejected one is never forwarded.
    """
    losses = -policy.sums / policy.lengths
    return Likelihood(losses, -losses.detach())
