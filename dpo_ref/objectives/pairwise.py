"""Objectives on pairs: a chosen response and a rejected one.

Most are functions of implicit rewards, beta (log pi - log pi_ref) of each response, and a loss of their margin. They
differ in the function, in what the reward is of (divergence, length, tokens), and in whether it looks at more than the
margin (anchored). Those that look at other pairs are in `coupled.py`, those that look at rows' scores in `scored.py`,
those without a reference in `reference_free.py`.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dpo_ref.objectives.interface import (
    Compared,
    KLStrength,
    Preference,
    TokenPairLogps,
    positive,
)
from dpo_ref.types import PairLogps, PairScores

# --- functions of the margin
# Of DPO's implicit rewards, beta (log pi - log pi_ref) summed over each response. What differs between these
# objectives is only the function of the margin.


def dpo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) summed over the response (arXiv:2305.18290, eq. 7).

    `beta` in 1/nats: a larger one keeps the policy closer to the reference. The other rewards of arXiv:2407.13709 are
    this function with another reference: `reference=none` gives log-probabilities 0 and the posterior-probability
    reward beta log pi(y|x); `reference=prior` gives log pi(y|x) - log p(y), the likelihood reward. TRL:
    loss_type="sigmoid"; HALOs: dpo.
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def cdpo(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, label_smoothing: float = 0.1
) -> Preference:
    """-(1 - s) log sigmoid(margin) - s log sigmoid(-margin): DPO with smoothed labels (Mitchell 2023).

    Least where sigmoid(margin) = 1 - s, so margins stay bounded. Rewards are dpo's, sums over the response.
    `label_smoothing`, s in (0, 0.5), is the share of labels taken to be flipped. TRL's loss_type="sigmoid" ignores
    its label_smoothing; HALOs: cdpo with epsilon.
    """
    positive(beta=beta)
    between(0.0, 0.5, "label_smoothing=0 is objective=dpo", label_smoothing=label_smoothing)
    rewards = log_ratio_rewards(policy, reference, beta)
    right, wrong = F.logsigmoid(rewards.margins), F.logsigmoid(-rewards.margins)
    return rewards.with_losses(-(1 - label_smoothing) * right - label_smoothing * wrong)


def robust_dpo(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, label_smoothing: float = 0.1
) -> Preference:
    """[-(1 - s) log sigmoid(margin) + s log sigmoid(-margin)] / (1 - 2 s) (rDPO, arXiv:2403.00409).

    Its mean over labels flipped with probability `label_smoothing`, s in (0, 0.5), is DPO's loss on clean labels.
    Unbounded below for large margins. Rewards are dpo's, sums over the response. Defaults are the paper's (section B
    and 6) by TRL's account. TRL: loss_type="robust", with the same label_smoothing.
    """
    positive(beta=beta)
    between(0.0, 0.5, "label_smoothing=0 is objective=dpo", label_smoothing=label_smoothing)
    rewards = log_ratio_rewards(policy, reference, beta)
    right, wrong = F.logsigmoid(rewards.margins), F.logsigmoid(-rewards.margins)
    return rewards.with_losses((label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing))


def hypo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, threshold: float = 0.0) -> Preference:
    """-log sigmoid(beta (D - max(D_ref, threshold))), D = log pi(chosen) - log pi(rejected), summed over the responses
    (HyPO, arXiv:2602.11902 v1, eq. 11, whose gamma is `threshold`, in nats).

    DPO where the reference prefers the chosen response; where it prefers the rejected one (a pessimistic pair) its
    margin counts as 0, so that a policy that is merely no worse than the reference is not taken to be right. Rewards
    are dpo's with the chosen response's reference log-prob raised to the rejected one's where it is below. Without the
    constant margin of the paper's experiments.
    """
    positive(beta=beta)
    chosen = torch.maximum(reference.chosen, reference.rejected + threshold)
    rewards = log_ratio_rewards(policy, replace(reference, chosen=chosen), beta)
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def hinge(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """max(0, 1 - margin): SLiC's rank calibration loss (arXiv:2305.10425) on log-ratios to the reference, as in RSO
    (arXiv:2309.06657).

    SLiC's margin delta is 1/beta here: max(0, delta - h) = max(0, 1 - beta h) / beta. Rewards are dpo's, sums over the
    response; no cross-entropy term. TRL: loss_type="hinge"; HALOs' slic has no reference and adds the cross-entropy.
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses(F.relu(1 - rewards.margins))


def exo(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, label_smoothing: float = 1e-3
) -> Preference:
    """KL(q || p) of q = (sigmoid(margin), sigmoid(-margin)) from p = (1 - s, s) (EXO, arXiv:2402.00856, eq. 16).

    The reverse of the KL that cdpo minimises up to a constant; zero where sigmoid(margin) = 1 - s. Rewards are dpo's,
    sums over the response. s is `label_smoothing`, as in TRL: loss_type="exo_pair"; 0.001 is the paper's by TRL's
    account, where the authors' code has log s = -10.
    """
    positive(beta=beta)
    between(0.0, 0.5, "the paper takes 0.001", label_smoothing=label_smoothing)
    rewards = log_ratio_rewards(policy, reference, beta)
    margins = rewards.margins
    first = margins.sigmoid() * (F.logsigmoid(margins) - math.log1p(-label_smoothing))
    second = (-margins).sigmoid() * (F.logsigmoid(-margins) - math.log(label_smoothing))
    return rewards.with_losses(first + second)


def discopop(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.05, tau: float = 0.05) -> Preference:
    """-log sigmoid(margin) (1 - s) + exp(-margin) s with s = sigmoid(margin / tau) (LRML, arXiv:2406.08414, eq. 5).

    `tau` is the temperature of the blend in (0, 1]: above 1 the exponential would outgrow its weight. Not convex: the
    slope at margin 0 is (1 - log 2) / (4 tau) - 3/4, positive below tau 0.1, so a run that starts at the reference
    starts by lowering margins. Rewards are dpo's, sums over the response. TRL: loss_type="discopop", discopop_tau=tau;
    it multiplies the two factors, which gives inf * 0 at very negative margins, where this one adds their logarithms.
    """
    positive(beta=beta, tau=tau)
    if tau > 1:
        raise ValueError(f"tau={tau} must be at most 1, else the loss of a wrongly ordered pair has no bound")
    rewards = log_ratio_rewards(policy, reference, beta)
    margins = rewards.margins
    logistic = -F.logsigmoid(margins) * (-margins / tau).sigmoid()
    exponential = (F.logsigmoid(margins / tau) - margins).exp()
    return rewards.with_losses(logistic + exponential)


# --- log-ratios regressed onto targets
# IPO, SPPO and Cal-DPO: pairs already in order still pull.


def ipo_sum(policy: PairLogps, reference: PairLogps, *, tau: KLStrength = 0.1) -> Preference:
    """(h - 1 / (2 tau))^2 with h the difference of summed log-ratios (IPO, arXiv:2310.12036, eq. 17).

    In terms of rewards tau log(pi/pi_ref): (margin / tau - 1 / (2 tau))^2. The equation as printed and as in the DPO
    authors' code; TRL and HALOs divide by response lengths (`ipo_mean`). CPOTrainer's "ipo" has no reference.
    """
    positive(tau=tau)
    rewards = log_ratio_rewards(policy, reference, tau)
    return rewards.with_losses((rewards.margins / tau - 1 / (2 * tau)) ** 2)


def ipo_mean(policy: PairLogps, reference: PairLogps, *, tau: KLStrength = 0.1) -> Preference:
    """(h - 1 / (2 tau))^2 with h the difference of per-token mean log-ratios (IPO, arXiv:2310.12036, eq. 17).

    Each response's log-ratio is divided by its own number of tokens (the policy's, end of turn included); rewards are
    tau times that. The authors of IPO told TRL that the paper's results are of this form. The target is per token, so
    a given `tau` pulls far harder than in `ipo_sum`. TRL: loss_type="ipo", beta=tau; HALOs: ipo.
    """
    positive(tau=tau)
    rewards = Rewards(*(tau * ratio for ratio in per_token(log_ratios(policy, reference), policy)))
    return rewards.with_losses((rewards.margins / tau - 1 / (2 * tau)) ** 2)


def sppo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.001) -> Preference:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, r summed log-ratios (SPPO, arXiv:2405.00675, eq. 4.7).

    Hard labels: the chosen response wins with probability 1. `beta` is 1/eta of the paper, whose eta is 1000. Not a
    function of the margin; rewards are beta r, with targets +1/2 and -1/2. The authors' code takes half of it, with
    win probabilities that a judge estimates for 1 and 0. TRL: loss_type="sppo_hard".
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses(_off_halves(rewards, beta))


def _off_halves(rewards: "Rewards", beta: float) -> Float[Tensor, " B"]:
    """Squared distances of log-ratios to where their rewards are +1/2 and -1/2, added up, in nats squared."""
    return ((rewards.chosen - 0.5) / beta) ** 2 + ((rewards.rejected + 0.5) / beta) ** 2


def cal_dpo(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.001, calibration_weight: float = 0.5
) -> Preference:
    """-log sigmoid(r_w - r_l) + weight [(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2], r summed log-ratios
    (Cal-DPO, arXiv:2412.14516; the authors' code, loss_type "Cal-DPO").

    DPO with sppo's targets: the second term says how large the rewards should be, where the first only says in which
    order. No `beta` in the sigmoid, as there. `calibration_weight` 0.5 is their code's, and whether the paper has it
    could not be confirmed. Rewards are beta r; not a function of their margin alone.
    """
    positive(beta=beta)
    if not 0 < calibration_weight < float("inf"):
        raise ValueError(
            f"calibration_weight={calibration_weight} must be positive and finite; 0 is objective=dpo beta=1"
        )
    rewards = log_ratio_rewards(policy, reference, beta)
    order = -F.logsigmoid(rewards.margins / beta)
    return rewards.with_losses(order + calibration_weight * _off_halves(rewards, beta))


# --- other divergences
# f-DPO: the same logistic loss under other divergences from the reference (arXiv:2309.16240). The reward is
# beta f'(u) with u = pi/pi_ref of the whole response; reverse KL, f' = log u + 1, gives dpo. Constants of f' cancel in
# the margin and are chosen so that the reward is 0 where policy and reference agree.


LARGEST_EXPONENT = 40.0  # nats; the square of its exponential, summed over a gradient, is still a float32


def _expm1(exponent: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """exp(x) - 1, continued by its tangent above 40: a response that the policy all but excludes has a large, finite
    gradient, where the exponential itself would overflow."""
    beyond = F.relu(exponent - LARGEST_EXPONENT)
    return torch.expm1(exponent.clamp(max=LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * beyond


def forward_kl_dpo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """-log sigmoid(margin), rewards beta (1 - pi_ref/pi): DPO under KL(pi_ref || pi) (f-DPO, arXiv:2309.16240).

    f(u) = -log u. The ratio is of whole responses; its exponential is exact up to 40 nats below the reference and
    linear beyond. TRL: f_divergence_type="forward_kl" with loss_type="sigmoid".
    """
    positive(beta=beta)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(-beta * _expm1(-ratios.chosen), -beta * _expm1(-ratios.rejected))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def js_dpo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """-log sigmoid(margin), rewards beta log(2u / (1 + u)): DPO under Jensen-Shannon (f-DPO, arXiv:2309.16240).

    f(u) = u log u - (u + 1) log((u + 1) / 2), u = pi/pi_ref of whole responses. No reward exceeds beta log 2. TRL:
    f_divergence_type="js_divergence" with loss_type="sigmoid".
    """
    positive(beta=beta)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(*(beta * (math.log(2) + F.logsigmoid(ratio)) for ratio in ratios))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def alpha_divergence_dpo(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, alpha: float = 0.5
) -> Preference:
    """-log sigmoid(margin), rewards beta (1 - u^-alpha) / alpha: DPO under an alpha-divergence (arXiv:2309.16240).

    f(u) = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1)), u = pi/pi_ref of whole responses, alpha in
    (0, 1): towards 0 it is dpo, towards 1 forward_kl_dpo. Powers are exact up to exp(40) and linear beyond. TRL:
    f_divergence_type="alpha_divergence" with f_alpha_divergence_coef = 1 - alpha.
    """
    positive(beta=beta)
    between(0.0, 1.0, "0 is objective=dpo, 1 is objective=forward_kl_dpo", alpha=alpha)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(*(-beta / alpha * _expm1(-alpha * ratio) for ratio in ratios))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def chi_po(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.05) -> Preference:
    """-log sigmoid(margin), rewards beta (u + log u - 1): DPO under KL and chi-squared together (chi-PO,
    arXiv:2407.13399).

    f(u) = u^2 / 2 + u log u, u = pi/pi_ref of whole responses: an ever larger ratio costs more than its logarithm,
    against overoptimisation. exp is of log u clipped to [-88, 20], as published for experiments, so that beyond only
    log u moves the policy; without the bound of margins at 2 R_max that the paper's theorems have. `beta` 0.05 is the
    larger of the paper's two; both of these are second-hand.
    """
    positive(beta=beta)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(*(beta * (torch.expm1(ratio.clamp(-88, 20)) + ratio) for ratio in ratios))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


# --- rewards that know how long a response is


def dpo_norm(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 5.0) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) per token of the response (Tulu 3, arXiv:2411.15124).

    Both models' sums are divided by the policy's token count, end of turn included, also where the reference has
    another tokenizer. TRL: loss_type="sigmoid_norm"; open-instruct: dpo_norm, whose default beta this is; HALOs:
    loss.length_normalization, with rewards per 100 tokens.
    """
    positive(beta=beta)
    rewards = Rewards(*(beta * ratio for ratio in per_token(log_ratios(policy, reference), policy)))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def dpo_per_byte(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 20.0) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) per UTF-8 byte of the response's text.

    A byte is the same for every tokenizer, so one `beta` means the same for policies, references and responses of
    any vocabulary and length; the default is dpo_norm's at four bytes a token. An empty response counts as one byte:
    its end of turn is scored but has no text.
    """
    positive(beta=beta)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(
        beta * ratios.chosen / policy.chosen_bytes.clamp(min=1),
        beta * ratios.rejected / policy.rejected_bytes.clamp(min=1),
    )
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def r_dpo(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, alpha: float = 0.01) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) + alpha length (R-DPO, arXiv:2403.19159).

    The reward that DPO fits when the policy pays `alpha` for every token: a longer chosen response explains part of
    the preference by its length, and raises the policy less. Sums over the response, lengths in the policy's tokens.
    The sign follows from that; the authors' code was not found, and some programs have the opposite one.
    """
    positive(beta=beta)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be positive and finite; alpha=0 is objective=dpo")
    rewards = log_ratio_rewards(policy, reference, beta)
    rewards = Rewards(
        rewards.chosen + alpha * policy.chosen_lengths, rewards.rejected + alpha * policy.rejected_lengths
    )
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


# --- single tokens
# Logistic losses that look at them: how far they lie behind, how likely the policy finds them.


def ld_dpo(
    policy: TokenPairLogps, reference: TokenPairLogps, *, beta: KLStrength = 0.1, alpha: float = 0.5
) -> Preference:
    """-log sigmoid(margin), rewards beta log(pi/pi_ref) in which tokens beyond the shorter response's length count
    `alpha` times (LD-DPO, arXiv:2409.06411).

    Policy and reference alike, as in TRL (ld_alpha=alpha); LLaMA-Factory's version leaves the reference whole.
    `alpha` in [0, 1): what of a response's extra length still counts. Sums over the response, end of turn included.
    """
    positive(beta=beta)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1); alpha=1 is objective=dpo")
    shared = torch.minimum(policy.chosen_lengths, policy.rejected_lengths)
    heads = [ours - theirs for ours, theirs in zip(policy.first(shared), reference.first(shared), strict=True)]
    ratios = zip(log_ratios(policy, reference), heads, strict=True)
    rewards = Rewards(*(beta * (alpha * whole + (1 - alpha) * head) for whole, head in ratios))
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def wpo(policy: PairLogps, reference: PairLogps, collision: PairLogps, *, beta: KLStrength = 0.01) -> Preference:
    """-w log sigmoid(margin), w = w(chosen) w(rejected), w(y) = exp(mean over tokens of log p(y_t) - log sum_v p_v^2)
    (WPO, arXiv:2406.11827, eq. 2, with its sampled alignment).

    The weights are the policy's of now, held fixed: a pair counts as much as it is like what the policy would write;
    p_v is its distribution at the token. The product can exceed 1, as in TRL (use_weighting=True); the authors' code
    caps it at 1. Rewards are dpo's, sums over the response; not a function of their margin alone.
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    chosen = (policy.chosen - collision.chosen) / policy.chosen_lengths
    rejected = (policy.rejected - collision.rejected) / policy.rejected_lengths
    weights = (chosen + rejected).detach().exp()
    return rewards.with_losses(-weights * F.logsigmoid(rewards.margins))


# --- anchored
# These also say where the chosen log-ratio itself should go, not only how far it leads the rejected one.


def dpo_positive(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.3, penalty: float = 50.0
) -> Preference:
    """-log sigmoid(margin) with chosen reward beta (r_w - penalty max(0, -r_w)) (DPOP of Smaug, arXiv:2402.13228).

    r are summed log-ratios; the rejected reward is beta r_l. `penalty` (lambda of the paper) makes every nat that the
    chosen response loses against the reference count 1 + penalty times. The paper's first version prints the brackets
    otherwise, and no code of its authors was found: that the penalty is multiplied by beta, and both defaults, are
    second-hand.
    """
    positive(beta=beta)
    if not 0 < penalty < float("inf"):
        raise ValueError(f"penalty={penalty} must be positive and finite; penalty=0 is objective=dpo")
    ratios = log_ratios(policy, reference)
    rewards = Rewards(beta * (ratios.chosen - penalty * F.relu(-ratios.chosen)), beta * ratios.rejected)
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def dpo_shift(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.01, shift: float = 0.95) -> Preference:
    """-log sigmoid(margin) with rejected reward shift beta r_l (DPO-Shift, arXiv:2502.07599 v1; the authors' code,
    dpo_lambda_strategy "fixed").

    r are summed log-ratios; the chosen reward is beta r_w. With `shift`, f(lambda) of the paper, in (0, 1) a nat less
    on the rejected response earns less than a nat more on the chosen one, so that chosen responses lose less. Their
    linear schedules of it are not here. Defaults are those of a released model and its recipe.
    """
    positive(beta=beta)
    between(0.0, 1.0, "shift=1 is objective=dpo", shift=shift)
    ratios = log_ratios(policy, reference)
    rewards = Rewards(beta * ratios.chosen, shift * beta * ratios.rejected)
    return rewards.with_losses(-F.logsigmoid(rewards.margins))


def nca(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.01) -> Preference:
    """-log sigmoid(R_w) - 1/2 log sigmoid(-R_w) - 1/2 log sigmoid(-R_l) (pairwise NCA, arXiv:2402.05369).

    R = beta log(pi/pi_ref), summed over the response, are the rewards; not a function of their margin. Least in R_w at
    log 2. `beta` is alpha of the paper. TRL: loss_type="nca_pair".
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    chosen, rejected = rewards
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return rewards.with_losses(losses)


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """sigmoid(-R_w) + sigmoid(R_l): chosen up, rejected down, from where they are (APO, arXiv:2408.06266, eq. 7).

    R = beta log(pi/pi_ref), summed over the response, are the rewards; not a function of their margin. For chosen
    responses better than the policy's own. TRL: loss_type="apo_zero".
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses((-rewards.chosen).sigmoid() + rewards.rejected.sigmoid())


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1) -> Preference:
    """sigmoid(R_w) + sigmoid(R_l - R_w): both down, rejected further (APO, arXiv:2408.06266, eq. 8).

    R = beta log(pi/pi_ref), summed over the response, are the rewards; not a function of their margin. For chosen
    responses worse than the policy's own. TRL: loss_type="apo_down".
    """
    positive(beta=beta)
    rewards = log_ratio_rewards(policy, reference, beta)
    return rewards.with_losses(rewards.chosen.sigmoid() + (-rewards.margins).sigmoid())


# --- reward models: a scalar head on the model, fitted to which response of a pair is the better one


def reward_model(policy: PairScores) -> Compared:
    """-log sigmoid(r_w - r_l), the likelihood of the preferences under Bradley-Terry (arXiv:2203.02155, eq. 1).

    Rewards are the scores themselves: of the response's last token, end of turn included. TRL: RewardTrainer; HALOs:
    bradley-terry.
    """
    return Compared(-F.logsigmoid(policy.chosen - policy.rejected), policy.chosen.detach(), policy.rejected.detach())


def reward_model_margin(policy: PairScores, rewards: PairScores, *, scale: float = 1.0) -> Compared:
    """-log sigmoid(r_w - r_l - m), m = scale (s_w - s_l) of the rows' own scores s (Llama 2, arXiv:2307.09288, eq. 2).

    A pair that was judged further apart must be scored further apart. `scale` is in units of reward per unit of the
    rows' scores. Rewards are the model's scores. TRL: RewardTrainer with a column `margin`.
    """
    positive(scale=scale)
    margins = scale * (rewards.chosen - rewards.rejected)
    losses = -F.logsigmoid(policy.chosen - policy.rejected - margins)
    return Compared(losses, policy.chosen.detach(), policy.rejected.detach())


# --- implicit rewards of pairs, and the option checks that objectives share


class Rewards(NamedTuple):
    """Implicit rewards of B pairs, with their gradient."""

    chosen: Float[Tensor, " B"]
    rejected: Float[Tensor, " B"]

    @property
    def margins(self) -> Float[Tensor, " B"]:
        """How much more the chosen response earns."""
        return self.chosen - self.rejected

    def with_losses(self, losses: Float[Tensor, " B"]) -> Preference:
        """The outcome of an objective: the losses, and these rewards detached."""
        return Preference(losses, self.chosen.detach(), self.rejected.detach())


def log_ratios(policy: PairLogps, reference: PairLogps) -> Rewards:
    """log pi - log pi_ref summed over each response, in nats: the rewards at beta 1."""
    return Rewards(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def per_token(sums: Rewards, policy: PairLogps) -> Rewards:
    """Sums over each response as means over its tokens, of which it has as many as the policy counts."""
    return Rewards(sums.chosen / policy.chosen_lengths, sums.rejected / policy.rejected_lengths)


def log_ratio_rewards(policy: PairLogps, reference: PairLogps, beta: float) -> Rewards:
    """beta (log pi - log pi_ref), summed over each response: DPO's implicit rewards."""
    ratios = log_ratios(policy, reference)
    return Rewards(beta * ratios.chosen, beta * ratios.rejected)


def between(low: float, high: float, remedy: str = "", **values: float) -> None:
    """Raise ValueError naming the first value that is not strictly between `low` and `high`."""
    for name, value in values.items():
        if not low < value < high:
            raise ValueError(
                f"{name}={value} must lie strictly between {low:g} and {high:g}{remedy and '; ' + remedy}"
            )
