"""From conversations to token ids: the prompt as in generation, the response exactly as the model would produce it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dpo_ref.types import Message, PromptGroup, TokenGroup, conversation

CHUNK = 4096  # texts handed to the tokenizer at once


class Tokenised(NamedTuple):
    """Token groups in the order of their rows, and how often what happened to rows on the way."""

    groups: list[TokenGroup]
    counts: dict[str, int]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError, naming the remedy, for a tokenizer without an end-of-turn token or a chat template."""
    where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: no EOS token, so responses could not end; set eos_token in tokenizer_config.json")
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: no chat template; put chat_template.jinja into the model's folder")


def render(tokenizer: Any, prompt: Sequence[Message], responses: Sequence[str]) -> tuple[str, list[str]]:
    """The prompt's text up to where the assistant begins, and what the template puts after it for each response."""
    start = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    rest = []
    for response in responses:
        full = tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False)
        if not full.startswith(start):
            raise ValueError(
                "the chat template writes the prompt differently once it is answered, so the response has no definite "
                f"beginning: {start[-60:]!r} is not how {full[: len(start)][-60:]!r} goes on"
            )
        rest.append(full[len(start) :])
    return start, rest


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Tokens that may end the assistant's turn: EOS and the special token that the template writes there."""
    _, (rest,) = render(tokenizer, [Message(role="user", content="a")], ["b"])
    return {
        tokenizer.eos_token_id,
        _through_terminator(tokenizer(rest, add_special_tokens=False).input_ids, tokenizer)[-1],
    }


def _through_terminator(ids: list[int], tokenizer: Any) -> list[int]:
    """Cut the template's text after the first special token, which ends the assistant's turn."""
    specials = _special_ids(tokenizer)
    for place, token in enumerate(ids):
        if token in specials:
            return ids[: place + 1]
    raise ValueError(
        "the chat template does not end the assistant's turn with a special token; EOS would never be learnt"
    )


def _special_ids(tokenizer: Any) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        encoded += tokenizer(texts[start : start + CHUNK], add_special_tokens=False, verbose=False).input_ids
    return encoded


def _response_ids(prompt_ids: list[int], full_ids: list[int], alone_ids: list[int], counts: Counter) -> list[int]:
    """The response's ids in the context of its prompt; where a token straddles the boundary, the response's own ids,
    because generation starts from the prompt's ids and cannot merge backwards."""
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids[len(prompt_ids) :]
    counts["merged at the boundary"] += 1
    return alone_ids


def _cut_prompt(ids: list[int], size: int, bos: int | None) -> list[int]:
    """The last `size` tokens of the prompt, keeping a leading BOS."""
    if len(ids) <= size:
        return ids
    return [ids[0], *ids[len(ids) - size + 1 :]] if ids[0] == bos else ids[len(ids) - size :]


def _fit(
    prompt: list[int], responses: list[list[int]], limits: tuple[int, int], over_length: str, bos: int | None
) -> tuple[list[int], list[list[int]]] | None:
    """Prompt and responses within the limits under the named policy, or None for a group to drop."""
    max_length, max_prompt_length = limits
    longest = max(map(len, responses))
    if len(prompt) <= max_prompt_length and len(prompt) + longest <= max_length:
        return prompt, responses
    if over_length == "truncate_prompt":
        room = min(max_prompt_length, max_length - longest)
        return (_cut_prompt(prompt, room, bos), responses) if room >= 2 else None
    if over_length == "truncate_response":
        prompt = _cut_prompt(prompt, max_prompt_length, bos)
        room = max_length - len(prompt)
        return (prompt, [response[:room] for response in responses]) if room >= 1 else None
    return None


def tokenise(
    groups: Sequence[PromptGroup],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    over_length: Literal["drop", "truncate_prompt", "truncate_response"] = "drop",
) -> Tokenised:
    """Token ids of every group under the tokenizer's chat template.

    Scored are the response's tokens and the token that ends the assistant's turn, nothing the template writes after
    it. Groups longer than `max_length` (prompt plus longest response, tokens) or with a prompt longer than
    `max_prompt_length` follow `over_length`: dropped; the prompt's beginning cut (a leading BOS kept); or both
    responses cut, to which no end token is added. Raises ValueError for a tokenizer without EOS or chat template and
    for responses that contain special tokens.
    """
    check_tokenizer(tokenizer)
    specials, counts = _special_ids(tokenizer), Counter()
    rendered = [render(tokenizer, group.prompt, group.responses) for group in groups]
    prompts = _encode(tokenizer, [start for start, _ in rendered])
    rests = [(start, rest) for start, all_rest in rendered for rest in all_rest]
    full = iter(_encode(tokenizer, [start + rest for start, rest in rests]))
    alone = iter(_encode(tokenizer, [rest for _, rest in rests]))
    limits = (max_length, max_length if max_prompt_length is None else max_prompt_length)
    kept = []
    for index, (group, prompt) in enumerate(zip(groups, prompts, strict=True)):
        responses = []
        for text in group.responses:
            ids = _through_terminator(_response_ids(prompt, next(full), next(alone), counts), tokenizer)
            if len(ids) == 1 or any(token in text for token in _texts(tokenizer, specials)):
                raise ValueError(
                    f"{group.origin}: the response is empty or contains a special token's text: {text[:80]!r}"
                )
            responses.append(ids)
        fitted = _fit(prompt, responses, limits, over_length, tokenizer.bos_token_id)
        if fitted is None:
            counts["dropped: too long"] += 1
            continue
        counts["prompts cut"] += len(fitted[0]) < len(prompt)
        counts["responses cut"] += sum(len(a) < len(b) for a, b in zip(fitted[1], responses, strict=True))
        sizes = tuple(len(text.encode()) for text in group.responses)
        kept.append(TokenGroup(index, group.group_id, fitted[0], tuple(fitted[1]), sizes, group.pairs))
    return Tokenised(kept, {"groups": len(kept), **{name: count for name, count in counts.items() if count}})


def _texts(tokenizer: Any, ids: set[int]) -> list[str]:
    """The texts of special tokens; cached on the tokenizer because it is asked for every response."""
    if not hasattr(tokenizer, "_dpo_ref_special_texts"):
        tokenizer._dpo_ref_special_texts = [text for text in tokenizer.convert_ids_to_tokens(sorted(ids)) if text]
    return tokenizer._dpo_ref_special_texts
