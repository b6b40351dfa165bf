"""The two bandits: what is drawn, what it is worth, and how far a policy is from its reference.

Reference, reward, optimum and frontier are found by enumeration, in float64. V arms lie side by side on [-1, 1]. A
response of L tokens is L arms; its reward is the mean of theirs, so everything that can be written down is about one
token and `length` says how many there are. The policies are causal language models, so that log-probs, objectives and
trainer are those of any run.
"""

import copy
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_ref.models.attention import REGISTERED, layout_under_way
from dpo_ref.types import TokenGroup

# --- policies


class Packed:
    """The part of a model's config that says that `base_model` takes whole packs."""

    _attn_implementation = REGISTERED["sdpa"]

    def get_text_config(self) -> "Packed":
        """What is said of the text, as of models that also see."""
        return self


PACKED = Packed()


class Categorical(nn.Module):
    """A softmax over V arms: a model without context whose one hidden unit is always 1, so that its head's weights are
    the logits. In float64."""

    config = PACKED

    def __init__(self, logits: Float[Tensor, " V"]) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(logits), bias=False, dtype=torch.float64)
        self.head.weight.data.copy_(logits[:, None])

    def get_output_embeddings(self) -> nn.Linear:
        """The head, whose weights are the logits."""
        return self.head

    def base_model(
        self, input_ids: Int[Tensor, "1 T"], position_ids: Int[Tensor, "1 T"], use_cache: bool
    ) -> tuple[Float[Tensor, "1 T 1"]]:
        """The hidden unit of every token of a pack."""
        return (torch.ones(*input_ids.shape, 1, dtype=torch.float64),)

    def probabilities(self) -> Float[Tensor, " V"]:
        """The distribution over arms, detached."""
        return self.head.weight.detach().squeeze(1).softmax(dim=0)


class EqualLengths(nn.Module):
    """A causal model on packs whose prompts are one token and whose groups have equally many responses of L tokens.

    A pack [prompt | y1 | ... | yk] per group is unfolded into rows [prompt | yj] of one rectangle. That needs one
    attention call a layer, where packed attention on a CPU makes one for every response; hidden states are the same.
    """

    config = PACKED

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_output_embeddings(self) -> nn.Linear:
        """The model's own head."""
        causal_lm: Any = self.model
        return causal_lm.get_output_embeddings()

    def base_model(
        self, input_ids: Int[Tensor, "1 T"], position_ids: Int[Tensor, "1 T"], use_cache: bool
    ) -> tuple[Float[Tensor, "1 T H"]]:
        """Hidden states of every token of a pack, a prompt's from the row of its first response."""
        layout = layout_under_way().layout
        sizes = layout[0][1]
        groups = input_ids.view(len(layout), 1 + sum(sizes))
        responses = groups[:, 1:].unflatten(1, (len(sizes), sizes[0]))
        prompts = groups[:, None, :1].expand(-1, len(sizes), -1)
        rows = torch.cat([prompts, responses], dim=2)
        backbone: Any = self.model.base_model
        hidden = backbone(input_ids=rows.flatten(0, 1), use_cache=False)[0].unflatten(0, rows.shape[:2])
        return (torch.cat([hidden[:, 0, :1], hidden[:, :, 1:].flatten(1, 2)], dim=1).flatten(0, 1)[None],)

    def next_tokens(self, ids: Int[Tensor, "N t"], last: int = 0) -> Float[Tensor, "N s V"]:
        """pi(. | ids up to here) at the `last` positions (0: at all), from the model's logits, in float64."""
        causal_lm: Any = self.model
        return causal_lm(input_ids=ids, use_cache=False, logits_to_keep=last).logits.double().softmax(dim=-1)


# --- what can be written down


NUM_ARMS = 100


def tanh_cauchy(num_arms: int = NUM_ARMS, location: float = -0.7, scale: float = 0.4) -> Float[Tensor, " V"]:
    """Probability of each of V equal bins of [-1, 1] under tanh(X), X Cauchy(location, scale).

    Exact, from the distribution function F(x) = 1/2 + arctan((artanh(x) - location) / scale) / pi; the authors' code
    takes the histogram of 10,000 draws.
    """
    edges = torch.linspace(-1.0, 1.0, num_arms + 1, dtype=torch.float64)
    cumulative = 0.5 + torch.atan((torch.atanh(edges) - location) / scale) / math.pi
    return cumulative.diff()


def bump(peak: int, width: float, num_arms: int = NUM_ARMS) -> Float[Tensor, " V"]:
    """Reward of each arm: exp(-((a - peak) / width)^2), a = 0, 1, ..."""
    arms = torch.arange(num_arms, dtype=torch.float64)
    return torch.exp(-(((arms - peak) / width) ** 2))


def tilt(reference: Float[Tensor, " V"], rewards: Float[Tensor, " V"], strength: float) -> Float[Tensor, " V"]:
    """pi_ref exp(strength r) / Z, which maximises strength E[r] - KL(pi || pi_ref)."""
    return (reference.log() + strength * rewards).softmax(dim=-1)


def divergence(policy: Float[Tensor, "*n V"], reference: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """KL(policy || reference) over the last axis, in nats; an arm of probability 0 in the policy adds nothing."""
    return (torch.special.xlogy(policy, policy) - torch.special.xlogy(policy, reference)).sum(dim=-1)


def optimum(
    reference: Float[Tensor, " V"], rewards: Float[Tensor, " V"], strength: float, length: int = 1
) -> Float[Tensor, " V"]:
    """Distribution of each token under pi_ref(y) exp(strength r(y)) / Z for responses of independent tokens.

    r is the mean over the tokens, so every token is tilted by its share strength / length.
    """
    return tilt(reference, rewards, strength / length)


def frontier(
    reference: Float[Tensor, " V"], rewards: Float[Tensor, " V"], length: int = 1, num_points: int = 200
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """(KL, expected reward) of the optima at strengths from 0 to 1000 times the length: no policy lies above."""
    strengths = torch.cat([torch.zeros(1), torch.logspace(-2, 3, num_points - 1)]).tolist()
    policies = torch.stack([tilt(reference, rewards, strength) for strength in strengths])
    return length * divergence(policies, reference.expand_as(policies)), policies @ rewards


# --- how a policy's draws become preferences: a rater who is drawn to reward, with noise


class Draws(NamedTuple):
    """G prompts of one token, k responses of L tokens to each, and their rewards."""

    prompts: Int[Tensor, " G"]
    responses: Int[Tensor, "G k L"]
    rewards: Float[Tensor, "G k"]


def utilities(rewards: Float[Tensor, "G k"], steepness: float, generator: torch.Generator) -> Float[Tensor, "G k"]:
    """steepness r plus Gumbel noise: the order of two is Bradley-Terry, P(a over b) = sigmoid(steepness (r_a - r_b)),
    and the best of k is Plackett-Luce, P(a) proportional to exp(steepness r_a)."""
    uniform = torch.rand(rewards.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return steepness * rewards - torch.log(-torch.log(uniform))


def rated_groups(draws: Draws, utility: Float[Tensor, "G k"], first_number: int) -> list[TokenGroup]:
    """One group per prompt, numbered from `first_number`: its responses compared two by two, first with second, third
    with fourth and so on, the pair of the best response of all first."""
    better = (utility[:, 0::2] > utility[:, 1::2]).tolist()
    winners = utility.unflatten(1, (-1, 2)).amax(dim=2)
    order = winners.argsort(dim=1, descending=True).tolist()
    rows = zip(draws.prompts.tolist(), draws.responses.tolist(), better, order, strict=True)
    return [
        TokenGroup(
            group_index=first_number + index,
            group_id=f"{first_number + index:032x}",
            prompt_ids=[prompt],
            response_ids=tuple(responses),
            num_bytes=tuple(map(len, responses)),  # a token counts as one byte
            pairs=tuple((2 * i, 2 * i + 1) if wins[i] else (2 * i + 1, 2 * i) for i in ranked),
        )
        for index, (prompt, responses, wins, ranked) in enumerate(rows)
    ]


# --- the worlds


MEASURED = 128  # responses over which a sequence policy is measured
FIT_BATCH = 64
FIT_LR = 3e-3
GPT: dict[str, Any] = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


class Measured(NamedTuple):
    """Expected reward, KL(policy || reference) in nats per response, and the mean distribution of a token."""

    reward: float
    kl: float
    tokens: Float[Tensor, " V"]


@runtime_checkable
class World(Protocol):
    """A bandit. `reference` is the distribution of a token under the reference, exactly or as it was fitted to."""

    reference: Float[Tensor, " V"]
    length: int
    width: float

    def initial(self, seed: int) -> nn.Module:
        """The policy before training, which is the reference; a function of the seed."""
        ...

    def draw(
        self, policy: nn.Module, rewards: Float[Tensor, " V"], size: tuple[int, int], generator: torch.Generator
    ) -> Draws:
        """Responses of the policy, (prompts, responses to each); every one of them costs one reward query."""
        ...

    def measure(
        self, policy: nn.Module, reference: nn.Module, rewards: Float[Tensor, " V"], generator: torch.Generator
    ) -> Measured:
        """What the policy earns, and how far it went."""
        ...

    def rewards(self, peak: int) -> Float[Tensor, " V"]:
        """Reward of a token."""
        ...


class Arms:
    """One arm of V is chosen; nothing depends on the prompt. Reward and KL are exact."""

    length = 1

    def __init__(self, width: float) -> None:
        self.width, self.reference = width, tanh_cauchy()

    def rewards(self, peak: int) -> Float[Tensor, " V"]:
        """Reward of an arm."""
        return bump(peak, self.width)

    def initial(self, seed: int) -> Categorical:
        """The reference itself, whatever the seed."""
        return Categorical(self.reference.log())

    def draw(
        self, policy: nn.Module, rewards: Float[Tensor, " V"], size: tuple[int, int], generator: torch.Generator
    ) -> Draws:
        """Independent arms; the prompts are the arms in turn, and the policy does not see them."""
        assert isinstance(policy, Categorical)
        flat = torch.multinomial(policy.probabilities(), size[0] * size[1], replacement=True, generator=generator)
        arms = flat.view(*size)
        return Draws(torch.arange(size[0]) % len(rewards), arms[..., None], rewards[arms])

    def measure(
        self, policy: nn.Module, reference: nn.Module, rewards: Float[Tensor, " V"], generator: torch.Generator
    ) -> Measured:
        """By enumeration."""
        assert isinstance(policy, Categorical)
        assert isinstance(reference, Categorical)
        ours, theirs = policy.probabilities(), reference.probabilities()
        return Measured(float(ours @ rewards), float(divergence(ours, theirs)), ours)


class TokenWorld:
    """A small GPT answers one random token with L tokens; the reward is the mean of the tokens' rewards.

    The policy starts as a fit to independent tokens of the reference. The prompt is not scored, and log-probs are of
    the next token; in the authors' code the prompt's reward counts and log-probs are read one position late.
    """

    def __init__(self, width: float, length: int, fit_steps: int, num_tokens: int = NUM_ARMS) -> None:
        self.width, self.length, self.fit_steps = width, length, fit_steps
        self.reference = tanh_cauchy(num_tokens)

    def rewards(self, peak: int) -> Float[Tensor, " V"]:
        """Reward of a token, of which a response's is the mean."""
        return bump(peak, self.width, len(self.reference))

    def initial(self, seed: int) -> EqualLengths:
        """A GPT fitted to the reference: least mean KL(reference || policy) at every position of random sequences."""
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            size: Any = {"vocab_size": len(self.reference), "n_positions": self.length + 1}
            config = GPT2Config(**GPT, **size, bos_token_id=None, eos_token_id=None)
            policy = EqualLengths(GPT2LMHeadModel(config))
            _fit(policy, self.reference, self.length, self.fit_steps)
        return policy

    @torch.no_grad()
    def draw(
        self, policy: nn.Module, rewards: Float[Tensor, " V"], size: tuple[int, int], generator: torch.Generator
    ) -> Draws:
        """Prompts drawn uniformly, responses at temperature 1."""
        assert isinstance(policy, EqualLengths)
        prompts = torch.randint(len(self.reference), (size[0],), generator=generator)
        ids = prompts.repeat_interleave(size[1])[:, None]
        for _ in range(self.length):
            chances = policy.next_tokens(ids, last=1)[:, 0]
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        responses = ids[:, 1:].unflatten(0, size)
        return Draws(prompts, responses, rewards[responses].mean(dim=-1))

    @torch.no_grad()
    def measure(
        self, policy: nn.Module, reference: nn.Module, rewards: Float[Tensor, " V"], generator: torch.Generator
    ) -> Measured:
        """Rao-Blackwellised: exact expected reward and exact KL of the next token at every prefix of `MEASURED`
        responses of the policy (arXiv:2504.10637)."""
        assert isinstance(policy, EqualLengths)
        assert isinstance(reference, EqualLengths)
        draws = self.draw(policy, rewards, (MEASURED, 1), generator)
        prefixes = torch.cat([draws.prompts[:, None], draws.responses[:, 0, :-1]], dim=1)
        ours, theirs = policy.next_tokens(prefixes), reference.next_tokens(prefixes)
        return Measured(
            float((ours @ rewards).mean()),
            float(divergence(ours, theirs).sum(dim=1).mean()),
            ours.mean(dim=(0, 1)),
        )


def _fit(policy: EqualLengths, target: Float[Tensor, " V"], length: int, num_steps: int) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=FIT_LR)
    for step in range(num_steps):
        prompts = torch.randint(len(target), (FIT_BATCH, 1))
        ids = _independent_tokens(target, prompts, length)
        causal_lm: Any = policy.model
        logits = causal_lm(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), target.float().expand(logits.shape[0] * logits.shape[1], -1))
        for group in optimizer.param_groups:
            group["lr"] = FIT_LR * (1 - step / num_steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _independent_tokens(target: Float[Tensor, " V"], prompts: Int[Tensor, "N 1"], length: int) -> Int[Tensor, "N L"]:
    """Prompts followed by independent tokens, without the last one, after which nothing is predicted."""
    tokens = torch.multinomial(target, len(prompts) * (length - 1), replacement=True)
    return torch.cat([prompts, tokens.view(len(prompts), -1)], dim=1)


def frozen_copy(policy: nn.Module) -> nn.Module:
    """The policy as it is now."""
    return copy.deepcopy(policy).requires_grad_(False)
