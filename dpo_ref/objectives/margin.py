"""Objectives on the margin of two implicit rewards."""

import torch.nn.functional as F

from dpo_ref.objectives.interface import Preference, Strength, positive
from dpo_ref.types import PairLogps


def dpo(policy: PairLogps, reference: PairLogps, *, beta: Strength = 0.1) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) summed over the response (arXiv:2305.18290, eq. 7).

    `beta` in 1/nats: a larger one keeps the policy closer to the reference. With no reference (log-probabilities 0)
    the reward is beta log pi: the posterior-probability reward of arXiv:2407.13709.
    """
    positive(beta=beta)
    chosen_rewards = beta * (policy.chosen - reference.chosen)
    rejected_rewards = beta * (policy.rejected - reference.rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return Preference(losses, chosen_rewards.detach(), rejected_rewards.detach())
