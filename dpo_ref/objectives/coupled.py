"""Objectives on pairs in which the loss of a pair depends on the other pairs of the optimiser batch, held fixed."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_ref.component import component
from dpo_ref.objectives.interface import BatchLogps, KLStrength, Preference, Running, positive
from dpo_ref.objectives.pairwise import Rewards, between, log_ratio_rewards, log_ratios, per_token
from dpo_ref.types import PairLogps


def aot(
    policy: PairLogps, reference: PairLogps, whole: BatchLogps[PairLogps], *, beta: KLStrength = 0.01
) -> Preference:
    """-log sigmoid(beta (h - h_ref)), h = log pi(chosen) - log pi(rejected) of the policy and h_ref that of the
    reference for the pair of the same rank (paired AOT, arXiv:2406.05882).

    Ranks are over the optimiser batch: sorted policy margins are compared with sorted reference margins, so that the
    one distribution comes to dominate the other. Sorting is a permutation, so the gradient is that of the sorted loss.
    Rewards are dpo's, sums over the response; not a function of their margin. `beta` 0.01 is the paper's (caption of
    figure 2) by TRL's account. TRL: loss_type="aot".
    """
    positive(beta=beta)
    ranks = (whole.policy.chosen - whole.policy.rejected).argsort(stable=True).argsort()
    theirs = (whole.reference.chosen - whole.reference.rejected).sort().values
    gap = policy.chosen - policy.rejected - theirs[ranks[whole.here]]
    return log_ratio_rewards(policy, reference, beta).with_losses(-F.logsigmoid(beta * gap))


def dr_dpo(
    policy: PairLogps,
    reference: PairLogps,
    whole: BatchLogps[PairLogps],
    *,
    beta: KLStrength = 0.1,
    mode_weight: float = 1.0,
) -> Preference:
    """-b log mean exp(-l / b) over the optimiser batch, l = -log sigmoid(margin) of each pair and b = `mode_weight`
    (Dr. DPO, arXiv:2407.07880; the authors' loss.mode_loss="DrDPO", whose mode_weight is beta' of the paper).

    It is the least value, over weights w of mean 1, of mean(w l) + b mean(w log w), taken at w proportional to
    exp(-l / b): pairs of high loss, as of a flipped label, count less. A pair's loss here is w l with w held fixed,
    plus b mean(w log w), so that the mean over the batch has the value and the gradient of the formula. The authors'
    batch is a rank's micro-batch. Rewards are dpo's, sums over the response; not a function of their margin alone.
    """
    positive(beta=beta, mode_weight=mode_weight)
    scores = F.logsigmoid(log_ratio_rewards(whole.policy, whole.reference, beta).margins) / mode_weight
    log_weights = scores.log_softmax(0) + math.log(len(scores))
    divergence = (log_weights.exp() * log_weights).mean()
    rewards = log_ratio_rewards(policy, reference, beta)
    losses = -log_weights[whole.here].exp() * F.logsigmoid(rewards.margins) + mode_weight * divergence
    return rewards.with_losses(losses)


# --- margins that a batch sets for its pairs


BALANCING_STEPS = 20  # the authors'; a loss is then within 1e-5 of where it tends at the defaults, 1e-4 near the limit


def _balanced_margins(gaps: Float[Tensor, " N"], gamma: float, tau: float) -> Float[Tensor, " N"]:
    """g of gamma_po for these margins: halfway steps, in log g, towards g proportional to exp(-gamma sigmoid(g - gap)
    / tau), which is where the slope of what g minimises is the same for every pair."""
    logs = torch.zeros_like(gaps)  # log(g / gamma)
    for _ in range(BALANCING_STEPS):
        aims = -gamma / tau * (gamma * logs.exp() - gaps).sigmoid()
        logs = ((logs + aims) / 2).log_softmax(0) + math.log(len(gaps))
    return gamma * logs.exp()


def gamma_po(
    policy: PairLogps,
    reference: PairLogps,
    whole: BatchLogps[PairLogps],
    *,
    beta: KLStrength = 0.1,
    gamma: float = 0.5,
    tau: float = 1.0,
) -> Preference:
    """-log sigmoid(margin - (g - gamma)), g the target margins of mean `gamma` that minimise mean(-log sigmoid(margin
    - g)) + tau KL(g / sum g || uniform) over the optimiser batch, held fixed (gamma-PO, arXiv:2506.03690; the DPO form
    of the authors' code, "gm-dpo").

    Pairs that lie further apart must lie further apart still, ambiguous ones less than in dpo, which large `tau`
    gives. The authors' steps solve for g, without their bound at tau below 0.5. Theirs see up to 256 pairs, most of
    them drawn from a queue of earlier ones, which is not deterministic and not here. `gamma` is in units of reward,
    gamma_beta_ratio * beta there; defaults are their code's but for `beta`, for they publish no setting of this form.
    Rewards are dpo's, sums over the response; not a function of their margin alone.
    """
    positive(beta=beta, gamma=gamma, tau=tau)
    if gamma**2 > 4.0001 * tau:  # so that the value named below, as it is printed, passes
        raise ValueError(
            f"gamma={gamma} is too large for tau={tau}: the steps that solve for the margins settle where tau is at "
            f"least gamma^2 / 4; take tau={gamma**2 / 4:g} or more"
        )
    gaps = log_ratio_rewards(whole.policy, whole.reference, beta).margins
    targets = _balanced_margins(gaps, gamma, tau)[whole.here] - gamma
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses(-F.logsigmoid(rewards.margins - targets))


# --- with what earlier batches were like: moving averages, which checkpoints hold


def _averaged(running: Running, batch: Running, momentum: float) -> Running:
    """Moving averages from 0, a batch's statistics taken in."""
    return {name: momentum * running.get(name, 0 * now) + (1 - momentum) * now for name, now in batch.items()}


def _mean_margin(whole: BatchLogps[PairLogps], beta: float) -> Running:
    return {"mean_margin": log_ratio_rewards(whole.policy, whole.reference, beta).margins.mean()}


def _advance_mean_margin(
    running: Running, whole: BatchLogps[PairLogps], *, beta: float = 0.1, momentum: float = 0.9
) -> Running:
    return _averaged(running, _mean_margin(whole, beta), momentum)


@component(advance=_advance_mean_margin)
def beta_dpo(
    policy: PairLogps,
    reference: PairLogps,
    whole: BatchLogps[PairLogps],
    running: Running,
    *,
    beta: KLStrength = 0.1,
    alpha: float = 6.0,
    momentum: float = 0.9,
    min_beta: float = 0.001,
) -> Preference:
    """-log sigmoid(margin), rewards b log(pi/pi_ref) with b = max(min_beta, beta (1 + alpha (M - M0))) (beta-DPO,
    arXiv:2407.08639).

    M is the mean margin of the optimiser batch at strength `beta`, M0 its moving average over steps: M0 <- momentum M0
    + (1 - momentum) M, from 0, before it is used, as in the authors' code, whose M lacks the factor `beta`: its a is
    alpha beta here, and the a = 0.6 of its example, at beta 0.1, is alpha = 6. Batches with larger margins than usual
    get a larger b; b is held fixed. Without the paper's random filter of pairs. On held-out data the batch is all of
    it, and M0 stays.
    """
    positive(beta=beta, alpha=alpha, min_beta=min_beta)
    between(0.0, 1.0, momentum=momentum)
    gap = _mean_margin(whole, beta)["mean_margin"] - running.get("mean_margin", 0.0)
    strength = (beta * (1 + alpha * gap)).clamp(min=min_beta)
    rewards = Rewards(*(strength * ratio for ratio in log_ratios(policy, reference)))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


SMALLEST_SPREAD = 1e-6  # nats per token; rounding alone spreads the log-ratios of equal weights by less


def _gaps(policy: PairLogps, reference: PairLogps) -> Float[Tensor, " B"]:
    """How much further the policy is above the reference on the chosen response, in nats per token."""
    return per_token(log_ratios(policy, reference), policy).margins


def _gap_moments(whole: BatchLogps[PairLogps]) -> Running:
    """Mean and standard deviation of a batch's gaps; the deviation of one pair is 0."""
    gaps = _gaps(whole.policy, whole.reference)
    return {"mean_gap": gaps.mean(), "sd_gap": gaps.std(correction=min(1, len(gaps) - 1))}


def _advance_gap_moments(running: Running, whole: BatchLogps[PairLogps], *, momentum: float = 0.9) -> Running:
    return _averaged(running, _gap_moments(whole), momentum)


@component(advance=_advance_gap_moments)
def alphadpo(
    policy: PairLogps,
    reference: PairLogps,
    whole: BatchLogps[PairLogps],
    running: Running,
    *,
    beta: KLStrength = 2.5,
    gamma: float = 1.5,
    alpha: float = 0.2,
    momentum: float = 0.9,
) -> Preference:
    """-log sigmoid(margin - gamma - beta alpha (M - mu) / sd), rewards beta log pi per token of the response
    (AlphaDPO, arXiv:2410.10148; form and defaults of the authors' code, loss_type "alpha-dpo" and Llama-3-8B).

    SimPO with a target margin, held fixed, that is larger for pairs on which the policy is further ahead of the
    reference than usual: M is a pair's difference of log-ratios per token, mu and sd are moving averages over steps of
    the optimiser batch's mean and standard deviation of M, taken in before use, from 0 and without correction for
    that, as the authors' are: early sd are too small, the first by 1 / (1 - momentum). Where sd is below 1e-6, as
    before the first update or in batches of one pair, the target is `gamma`. An evaluation before the first step takes
    mu and sd of its own pairs. `gamma` is in units of reward as in simpo (theirs is gamma / beta), `alpha` in nats per
    token and standard deviation. Not a function of the margin alone.
    """
    positive(beta=beta)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma={gamma} must be at least 0 and finite")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be positive and finite; alpha=0 is objective=simpo")
    between(0.0, 1.0, momentum=momentum)
    usual = _gap_moments(whole) | running
    gaps = _gaps(policy, reference).detach()
    scores = (gaps - usual["mean_gap"]) / usual["sd_gap"].clamp(min=SMALLEST_SPREAD)
    targets = gamma + beta * alpha * torch.where(usual["sd_gap"] > SMALLEST_SPREAD, scores, 0.0)
    rewards = Rewards(*(beta * mean for mean in per_token(Rewards(policy.chosen, policy.rejected), policy)))
    return rewards.with_losses(-F.logsigmoid(rewards.margins - targets))
