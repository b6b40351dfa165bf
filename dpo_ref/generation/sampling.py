"""Engines that answer prompts. This one runs a transformers model here, on CPU or CUDA."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids
from dpo_ref.generation.decoding import Rule, decode, decoding_mode
from dpo_ref.generation.noise import stream_name
from dpo_ref.generation.records import Generation
from dpo_ref.progress import Progress, silent
from dpo_ref.types import Message


def never_sampled(tokenizer: Any, vocab_size: int) -> Int[Tensor, " B"]:
    """Vocabulary entries that are no text, whose logits no training ever touched: the padding token (unless it also
    ends a turn) and rows of the embedding beyond the tokenizer's vocabulary. After drift a policy does reach them.
    """
    ids = set(range(len(tokenizer), vocab_size))
    if tokenizer.pad_token_id is not None:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(ids - end_of_turn_ids(tokenizer)), dtype=torch.int64)


def _check(temperature: float, top_p: float, counts: dict[str, int]) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generation.temperature={temperature} must be 0 (greedy) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"generation.top_p={top_p} must be above 0 and at most 1 (1 keeps every token)")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"generation.{name}={count} must be at least 1")
    if temperature == 0 and counts["samples_per_prompt"] > 1:
        raise ValueError("generation.temperature=0 gives every sample of a prompt alike; use samples_per_prompt=1")


def _encode(tokenizer: Any, prompts: Sequence[Sequence[Message]], room: int | None) -> list[list[int]]:
    """Prompts as token ids, up to where the assistant begins; `room` is what the model's positions leave for them."""
    encoded = encode_prompts(tokenizer, prompts)
    for index, ids in enumerate(encoded):
        if room is not None and len(ids) > room:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, but the model's positions leave {max(room, 0)} beside "
                "generation.max_new_tokens; lower generation.max_new_tokens or leave the prompt out"
            )
    return encoded


def _streams(prompts: Sequence[Sequence[Message]], seed: int, samples_per_prompt: int) -> list[int]:
    """One stream name per prompt and sample; a prompt that occurs twice gets different samples."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        occurrence = seen[str(prompt)]
        seen[str(prompt)] += 1
        names += [stream_name(seed, prompt, occurrence, sample) for sample in range(samples_per_prompt)]
    return names


def _sample(
    model: Any,
    prompts: Sequence[list[int]],
    streams: Int[Tensor, " S"],
    rule: Rule,
    batch_size: int,
    progress: Progress,
) -> list[list[int]]:
    """The tokens drawn for each of S prompts, which are batched by length."""
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    drawn: dict[int, list[int]] = {}
    with decoding_mode(model):
        for places in progress(batches, "generating", len(batches)):
            answers = decode(model, [prompts[place] for place in places], streams[places], rule)
            drawn |= dict(zip(places, answers, strict=True))
    return [drawn[place] for place in range(len(prompts))]


def _answer(tokenizer: Any, token_ids: list[int], ends: set[int]) -> dict[str, Any]:
    """What a record says about the tokens that were drawn."""
    finished = token_ids[-1] in ends
    content = token_ids[:-1] if finished else token_ids
    # Special tokens are kept: a policy that writes them in mid-answer should be seen to.
    output = tokenizer.decode(content, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {
        "output": output,
        "token_ids": tuple(token_ids),
        "finish_reason": "stop" if finished else "length",
        "num_tokens": len(token_ids),
        "num_chars": len(output),
    }


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    seed: int,
    progress: Progress = silent,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    samples_per_prompt: int = 1,
    batch_size: int = 128,
) -> list[Generation]:
    """`samples_per_prompt` answers to every prompt, ordered by prompt and sample.

    The same seed gives the same answers whatever the batch size, the other prompts and the device, up to rounding
    that turns a near-tie. Temperature 0 is greedy. `max_new_tokens` counts the end token; `batch_size` counts
    sequences. The model's mode and attention are as before afterwards. Raises ValueError for options out of range, a
    tokenizer without end token or chat template, and prompts for which the model has no positions.
    """
    counts = {"max_new_tokens": max_new_tokens, "samples_per_prompt": samples_per_prompt, "batch_size": batch_size}
    _check(temperature, top_p, counts)
    positions = getattr(model.config, "max_position_embeddings", None)
    prompt_ids = _encode(tokenizer, prompts, None if positions is None else positions - max_new_tokens)
    ends, device = end_of_turn_ids(tokenizer), next(model.parameters()).device
    never = never_sampled(tokenizer, model.get_output_embeddings().weight.shape[0])
    rule = Rule(temperature, top_p, max_new_tokens, torch.tensor(sorted(ends), device=device), never.to(device))
    rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples_per_prompt)]
    streams = torch.tensor(_streams(prompts, seed, samples_per_prompt), dtype=torch.int64)
    drawn = _sample(model, [prompt_ids[prompt] for prompt, _ in rows], streams, rule, batch_size, progress)
    asked = {"seed": seed, "temperature": temperature, "top_p": top_p}
    return [
        Generation(
            prompt=tuple(prompts[prompt]),
            prompt_index=prompt,
            sample_index=sample,
            prompt_ids=tuple(prompt_ids[prompt]),
            **_answer(tokenizer, ids, ends),
            **asked,
        )
        for (prompt, sample), ids in zip(rows, drawn, strict=True)
    ]
