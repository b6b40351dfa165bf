"""Objectives on pairs whose rows say how good each response is: by how much the chosen one leads is told, not only
that it does.

`rewards` are the rows' own scores s, held fixed. The policy's rewards are dpo's, beta log(pi/pi_ref) summed over each
response, and a loss looks at their margin and at the scores' difference.
"""

import torch
import torch.nn.functional as F

from dpo_ref.objectives.interface import KLStrength, Preference, positive
from dpo_ref.objectives.pairwise import log_ratio_rewards
from dpo_ref.types import PairLogps, PairScores


def odpo(
    policy: PairLogps, reference: PairLogps, rewards: PairScores, *, beta: KLStrength = 0.5, alpha: float = 1.0
) -> Preference:
    """-log sigmoid(margin - alpha log(s_w - s_l)) (DPO with an offset, arXiv:2402.10571 v2; the authors' code).

    A pair that lies a score of 1 apart is dpo's; one further apart must have a larger margin, a closer one a smaller,
    and one that lies ever less apart has a loss that tends to 0. So where the scores do not put the chosen response
    ahead, which has no logarithm, the loss is 0 and the pair moves nothing; the authors leave pairs of equal scores
    out of the data. `alpha` is in units of reward. TRL's "odpo" is another: online DPO.
    """
    positive(beta=beta)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be positive and finite; alpha=0 is objective=dpo")
    leads = rewards.chosen - rewards.rejected
    ahead = leads > 0
    offsets = alpha * torch.where(ahead, leads, 1.0).log()
    implicit = log_ratio_rewards(policy, reference, beta)
    return implicit.with_losses(torch.where(ahead, -F.logsigmoid(implicit.margins - offsets), 0.0))


def reward_aware(
    policy: PairLogps, reference: PairLogps, rewards: PairScores, *, beta: KLStrength = 0.2, eta: float = 1.0
) -> Preference:
    """KL((q, 1 - q) || (p, 1 - p)), q = sigmoid(eta (s_w - s_l)) and p = sigmoid(margin) (reward-aware preference
    optimisation, arXiv:2502.00203; NeMo-Aligner's "rpo_bwd_kl").

    dpo with the label q that the scores say, less that label's entropy: 0 where the margin is eta (s_w - s_l), and
    towards dpo as that grows. Scores that put the rejected response ahead turn the pair around. `eta` is in units of
    reward per unit of the rows' scores. Defaults are NeMo-Aligner's.
    """
    positive(beta=beta, eta=eta)
    implicit, targets = log_ratio_rewards(policy, reference, beta), eta * (rewards.chosen - rewards.rejected)
    right = targets.sigmoid() * (F.logsigmoid(targets) - F.logsigmoid(implicit.margins))
    wrong = (-targets).sigmoid() * (F.logsigmoid(-targets) - F.logsigmoid(-implicit.margins))
    return implicit.with_losses(right + wrong)


def reward_aware_squared(
    policy: PairLogps, reference: PairLogps, rewards: PairScores, *, beta: KLStrength = 0.2, eta: float = 1.0
) -> Preference:
    """(margin - eta (s_w - s_l))^2 (reward-aware preference optimisation, arXiv:2502.00203; NeMo-Aligner's "rpo_sq").

    The margins are regressed onto the scores' differences; with eta (s_w - s_l) = 1/2 in every pair it is ipo_sum
    times beta^2. `eta` is in units of reward per unit of the rows' scores. Defaults are NeMo-Aligner's.
    """
    positive(beta=beta, eta=eta)
    implicit = log_ratio_rewards(policy, reference, beta)
    return implicit.with_losses((implicit.margins - eta * (rewards.chosen - rewards.rejected)) ** 2)
