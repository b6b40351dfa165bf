"""Single responses with the log-ratio of every token, to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from dpo_ref.data.inspection import decode_ids, token_texts
from dpo_ref.evaluation.diagnostics.token_statistics import ScoredTokens
from dpo_ref.types import TokenGroup


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token's text, or several tokens' where one holds only part of a character, and the sums of their log-probs in
    nats; None where it is not scored, and for a loss reference that knows no tokens."""

    text: str
    policy: float | None
    initial: float | None
    reference: float | None

    @property
    def logratio(self) -> float | None:
        """log pi - log initial."""
        return None if self.policy is None or self.initial is None else self.policy - self.initial


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response's tokens under its name: chosen, rejected, or answer."""

    name: str
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class TokenExample:
    """A prompt with one or two responses, and how it was picked."""

    picked: str
    prompt: str
    responses: tuple[ShownResponse, ...]


class Looks:
    """Groups, their tokens' readings and a tokenizer: what is needed to show one of them."""

    def __init__(self, tokenizer: Any, groups: Sequence[TokenGroup], tokens: ScoredTokens) -> None:
        self.tokenizer, self.groups, self.tokens = tokenizer, groups, tokens
        sizes = [len(group.response_ids) for group in groups]
        self._firsts = list(accumulate(sizes, initial=0))
        self._owners = np.repeat(np.arange(len(groups)), sizes)
        self._starts = np.concatenate([[0], tokens.lengths.cumsum()])

    def pair(self, group: int, picked: str) -> TokenExample:
        """A group's first pair."""
        better, worse = self.groups[group].pairs[0]
        return self._example(group, picked, {"chosen": better, "rejected": worse})

    def answer(self, response: int, picked: str) -> TokenExample:
        """One of all responses."""
        group = int(self._owners[response])
        return self._example(group, picked, {"answer": response - self._firsts[group]})

    def _example(self, group: int, picked: str, indices: dict[str, int]) -> TokenExample:
        prompt = self.groups[group].prompt_ids
        responses = (ShownResponse(name, self._tokens(group, index)) for name, index in indices.items())
        return TokenExample(picked, decode_ids(self.tokenizer, prompt), tuple(responses))

    def _tokens(self, group: int, index: int) -> tuple[ShownToken, ...]:
        owner, response = self.groups[group], self._firsts[group] + index
        ids = owner.response_ids[index]
        scored = np.array(owner.scored[index] if owner.scored else [True] * len(ids), dtype=bool)
        span = slice(self._starts[response], self._starts[response + 1])
        columns = [self.tokens.policy.logps, self.tokens.initial.logps, self.tokens.reference]
        values = [None if column is None else _spread(column[span], scored) for column in columns]
        return tuple(
            ShownToken(text, *(_sum(value, start, stop) for value in values))
            for text, start, stop in token_texts(self.tokenizer, owner.prompt_ids[-1:], ids)
        )


def _spread(values: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Values of the scored tokens among all tokens, nan elsewhere."""
    whole = np.full(len(scored), np.nan)
    whole[scored] = values
    return whole


def _sum(values: np.ndarray | None, start: int, stop: int) -> float | None:
    total = float("nan") if values is None else float(values[start:stop].sum())
    return None if np.isnan(total) else total


def drawn_pairs(looks: Looks, count: int, seed: int) -> list[TokenExample]:
    """The first pairs of `count` groups, drawn by the seed."""
    with_pairs = [index for index, group in enumerate(looks.groups) if group.pairs]
    order = np.random.default_rng([seed, 7]).permutation(len(with_pairs))[:count]
    return [looks.pair(with_pairs[index], "drawn at random") for index in sorted(order.tolist())]


def drawn_answers(looks: Looks, count: int, seed: int) -> list[TokenExample]:
    """`count` responses drawn by the seed, then the `count` others that moved furthest per token."""
    size = looks.tokens.num_responses
    order = np.random.default_rng([seed, 8]).permutation(size)[:count].tolist()
    far = looks.tokens.sums(np.abs(looks.tokens.logratios)) / looks.tokens.lengths
    rest = [index for index in np.argsort(-far, kind="stable").tolist() if index not in order]
    at_random = [looks.answer(index, "drawn at random") for index in sorted(order)]
    return at_random + [looks.answer(index, "furthest from the initial policy, per token") for index in rest[:count]]
