"""Objectives that raise the likelihood of given responses."""

from dpo_ref.objectives.interface import Likelihood
from dpo_ref.types import ResponseLogps


def sft(policy: ResponseLogps) -> Likelihood:
    """Negative mean token log-probability of each response, in nats per token; every response weighs the same.

    On preference data the chosen response is the one fitted (Preferred-FT); the rejected one is never forwarded.
    """
    losses = -policy.sums / policy.lengths
    return Likelihood(losses, -losses.detach())
