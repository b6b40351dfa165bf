"""Scorers: handed generations, they return a name and one number for each, nan for an answer that nobody scored."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations
from typing import Annotated, Any, Literal, NamedTuple

import torch

from dpo_ref.component import MemberOf, component
from dpo_ref.data.chat_templates import text_identity
from dpo_ref.data.encoding import Encoder
from dpo_ref.distributed import best_device
from dpo_ref.evaluation.judging.judge import Judge, judge_pairs, pair_of
from dpo_ref.evaluation.judging.judges import JudgeContext
from dpo_ref.files.cache import cache_folder
from dpo_ref.generation.records import Generation, Scores
from dpo_ref.models.asked import ModelLoader
from dpo_ref.models.checkpoint import state_digest
from dpo_ref.models.folders import check_finite, check_vocabulary, positions_of
from dpo_ref.models.loading import check_folder, compute_dtype, load_tokenizer, pretrained_model
from dpo_ref.types import digest, silent


def none(generations: Sequence[Generation]) -> Scores:
    """No score: lengths, KL and held-out pairs are measured, and there is no win rate."""
    return Scores("none", [math.nan] * len(generations))


def _check_target(target: int) -> None:
    if target < 1:
        raise ValueError(f"scorer.target={target} must be at least 1: an answer has its end token")


@component(check=_check_target)
def length(generations: Sequence[Generation], *, target: int) -> Scores:
    """Minus how far each answer's length is from `target`, in tens of tokens, the end token counted.

    A reward whose best answers are known, to see what a method does where they are near and where they are far: Min
    Length is target 1, Mode Length the policy's own mean (Tajwar et al. 2024, arXiv:2404.14367). Raises ValueError for
    a target below 1.
    """
    return Scores("length", [-abs(generation.num_tokens - target) / 10 for generation in generations])


# --- a reward model: any sequence classifier with one output


KEY = "scorer.path"
Precision = Literal["auto", "float32", "bfloat16"]


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    max_length: int | None


def _check_classifier(config: Any) -> None:
    """Raise ValueError for an architecture that is no sequence classifier with one output."""
    kind = (config.architectures or ["model of no known architecture"])[0]
    outputs = f" with {config.num_labels} outputs" if "Classification" in kind else ""
    if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"it is a {kind}{outputs}, and a reward model is a sequence classifier with one; objective=reward_model "
            "trains one"
        )


@lru_cache(maxsize=2)  # one that chooses among answers and one that judges the chosen ones
def _load(path: str, dtype: str) -> _Loaded:
    """The classifier at `path`. Raises ValueError for what is none, or has no head of one output."""
    from transformers import AutoModelForSequenceClassification

    check_folder(path, KEY)
    device = best_device()
    chosen = compute_dtype(dtype, device, "scorer.dtype")
    model = pretrained_model(AutoModelForSequenceClassification, _check_classifier, path, KEY, None, dtype=chosen)
    check_finite(model.to(device), f"{KEY}={path}")
    tokenizer = load_tokenizer(path, KEY)
    check_vocabulary(tokenizer, model, f"{KEY}={path}")
    return _Loaded(model, tokenizer, positions_of(model.config))


def _sequences(loaded: _Loaded, generations: Sequence[Generation]) -> list[list[int]]:
    """Prompt and answer as the reward model's own template and tokenizer write them, end of turn included."""
    rows = [replace(generation.texts, origin=f"generation {n}") for n, generation in enumerate(generations, 1)]
    written = [ids.prompt + ids.responses[0] for ids in Encoder(loaded.tokenizer).last_turns(rows)]
    for row, ids in enumerate(written, 1):
        if loaded.max_length is not None and len(ids) > loaded.max_length:
            raise ValueError(
                f"generation {row} has {len(ids)} tokens with its prompt, and the reward model has positions for "
                f"{loaded.max_length}; lower max_new_tokens or max_prompt_length"
            )
    return written


def _batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Places of sequences of similar length."""
    by_length = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _padding(model: Any, sequences: Sequence[Sequence[int]]) -> int:
    """What the model takes for padding; where it does not say so, a token with which no sequence ends."""
    stated = model.config.get_text_config().pad_token_id
    if stated is not None:
        return stated
    last = {ids[-1] for ids in sequences}
    return next(token for token in range(len(last) + 1) if token not in last)


@torch.no_grad()
def score_sequences(model: Any, sequences: Sequence[list[int]], batch_size: int) -> list[float]:
    """The model's output for each sequence of token ids, read where its architecture reads it; padded on the right."""
    device, scores = next(model.parameters()).device, torch.empty(len(sequences), dtype=torch.float64)
    text_config = model.config.get_text_config()
    stated = text_config.pad_token_id
    for indices in _batches(sequences, batch_size):
        rows = [sequences[index] for index in indices]
        text_config.pad_token_id = padding = _padding(model, rows)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        scores[indices] = model(input_ids=ids, attention_mask=mask).logits[:, 0].double().cpu()
        text_config.pad_token_id = stated
    return scores.tolist()


def _check_options(path: str, dtype: str, batch_size: int) -> None:
    check_folder(path, KEY)
    if batch_size < 1:
        raise ValueError(f"scorer.batch_size={batch_size} must be at least 1")


def _identity(*, path: str, dtype: Precision = "auto") -> str:
    """Digest of what the scores mean: weights, their dtype, tokenizer and template."""
    loaded = _load(path, dtype)
    return digest([state_digest(loaded.model.state_dict()), text_identity(loaded.tokenizer)])


@component(check=_check_options, identity=_identity)
def reward_model(
    generations: Sequence[Generation], *, path: str, dtype: Precision = "auto", batch_size: int = 16
) -> Scores:
    """What the sequence classifier in the folder or on the hub at `path` gives each answer, in its own unit.

    Prompt and answer are written with its own chat template; an answer that was cut is judged as if it ended there.
    `dtype` auto is bfloat16 on CUDA, float32 on a CPU; `batch_size` counts answers. Raises ValueError for what has no
    scalar head and for answers longer than its positions.
    """
    loaded = _load(path, dtype)
    return Scores("reward_model", score_sequences(loaded.model, _sequences(loaded, generations), batch_size))


# --- a judge: the answers to one prompt are compared with each other, two by two


@component(relative=True)
def judge(generations: Sequence[Generation], *, judge: Annotated[Any, MemberOf("judge")]) -> Scores:
    """Of each answer the mean share of the win against the other answers to its prompt, in [0, 1]: its rank among
    them, and nothing about other prompts or policies. n answers to a prompt are n (n - 1) / 2 pairs.

    nan for an answer about which the judge gave no verdict. Raises ValueError where a prompt has one answer, and when
    the judge is lost; what it said until then is kept, and the same command goes on.
    """
    chosen: Judge = judge(JudgeContext(judge.name, cache_folder(), _loader(), silent))
    by_prompt: dict[int, list[int]] = defaultdict(list)
    for index, generation in enumerate(generations):
        by_prompt[generation.prompt_index].append(index)
    if alone := [indices[0] for indices in by_prompt.values() if len(indices) == 1]:
        raise ValueError(
            f"scorer=judge compares answers to the same prompt, and prompt {generations[alone[0]].prompt_index} has "
            "one; draw at least two"
        )
    duels = [duel for indices in by_prompt.values() for duel in combinations(indices, 2)]
    shares: dict[int, list[float]] = defaultdict(list)
    judgments = judge_pairs(
        chosen, [pair_of(generations[first], generations[other], chosen.shows) for first, other in duels], silent
    ).judgments
    for (first, other), judgment in zip(duels, judgments, strict=True):
        if judgment.preference is not None:
            shares[first].append(judgment.preference)
            shares[other].append(1 - judgment.preference)
    means = {index: sum(values) / len(values) for index, values in shares.items()}
    return Scores("judge", [means.get(index, float("nan")) for index in range(len(generations))])


@cache
def _loader() -> ModelLoader:
    """Judges are asked again and again, and loaded once."""
    return ModelLoader(best_device(), keep=1)
