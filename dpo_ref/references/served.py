"""A reference behind an OpenAI-compatible server (vLLM and its kin), for models too large for the training machine.

It is asked once, before training, and its log-probs are kept in the same tables as every other reference's. What it
scores are token ids, never text, so the server cannot tokenise them differently; with a tokenizer or template other
than the policy's they are those of the same text (`other_tokenizer.py`).

Which model answers behind a name is told by a digest of its scores on fixed texts. A server's log-probs differ in
their last digits from one time to the next (batches, bfloat16). So what it says about the texts is compared with what
was said under the same name before, and a close answer takes over the earlier digest.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_ref.data.chat_templates import install_template, text_identity
from dpo_ref.data.encoding import Encoder
from dpo_ref.files.cache import in_use
from dpo_ref.files.digests import Damaged, sealed, unsealed
from dpo_ref.files.writing import write_json
from dpo_ref.models.server import ServedModel, Server, ServerRefused, ServerUnavailable, check_url
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.other_tokenizer import ReferenceText, from_text
from dpo_ref.references.table import PrecomputedReference, Rows, Scorer, row_key, rows_of
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Message, PromptGroup, TokenGroup, digest

# --- log-probs of token ids, asked for


class Sequences(NamedTuple):
    """Token ids to score, and how each is called in messages to the user."""

    ids: Sequence[Sequence[int]]
    name: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class CompletionsClient:
    """Asks a server for the log-probs of token ids: `batch_size` sequences in a request, `concurrency` requests under
    way at once."""

    model: ServedModel
    protocol: str
    batch_size: int
    concurrency: int

    def logps(self, wanted: Sequences) -> list[np.ndarray]:
        """Log-probs, in nats, of every token of every sequence given those before it, from the second token on.

        Raises `ServerRefused` and `ServerUnavailable`, and ValueError for a key or model that the server does not know
        and for answers without a finite log-prob for every token.
        """
        starts = range(0, len(wanted.ids), self.batch_size)
        with ThreadPoolExecutor(self.concurrency) as pool:
            parts = pool.map(lambda start: self._batch(wanted, start), starts)
            return [values for part in parts for values in part]

    def _batch(self, wanted: Sequences, start: int) -> list[np.ndarray]:
        ids = [list(sequence) for sequence in wanted.ids[start : start + self.batch_size]]
        options = {"prompt": ids, "max_tokens": 1, "temperature": 0, **PROTOCOLS[self.protocol].options}
        answer = self.model.complete(options)
        return values_of(answer, self.protocol, ids, lambda place: wanted.name(start + place))


# --- the reference


TOLERANCE = 1.0  # nats on a token: bfloat16 logits of 32 and more are 0.25 apart, and a server's batches vary


def _response_logps(values: np.ndarray, group: TokenGroup, index: int) -> np.ndarray:
    """Of a sequence's log-probs those of the response's tokens that count."""
    response = values[len(group.prompt_ids) - 1 :]
    return response if group.scored is None else np.fromiter(compress(response, group.scored[index]), np.float64)


def score(client: CompletionsClient, context: ReferenceContext, groups: Sequence[TokenGroup]) -> Rows:
    """Per-token log-probs of the groups' responses, from the server. ValueError if it is lost or refuses a row."""
    owners = [(group, response) for group in groups for response in range(len(group.response_ids))]
    ids = [[*group.prompt_ids, *group.response_ids[response]] for group, response in owners]

    def name(owner: int) -> str:
        (group, response), keys = owners[owner], (each.group_index for each in context.groups)
        index = next(index for index, key in enumerate(keys) if key == group.group_index)
        return f"{context.groups.text(index).origin}, response {response + 1}"

    server = client.model.server
    try:
        logps = client.logps(Sequences(ids, name))
    except ServerUnavailable as error:
        raise ValueError(
            f"the server at {server.url} gave no answer in {server.retries + 1} attempts ({error}); everything scored "
            "so far is kept: start the same command again when it is up"
        ) from None
    except ServerRefused as error:
        longest = max(range(len(ids)), key=lambda number: len(ids[number]))
        raise ValueError(
            f"the server at {server.url} refused a request ({error}). The longest row asked for is {name(longest)}, "
            f"with {len(ids[longest])} tokens; a server must take that and 1 more: raise its --max-model-len, or "
            "lower data.max_length"
        ) from None
    parts = [_response_logps(values, *owner) for values, owner in zip(logps, owners, strict=True)]
    ends = np.cumsum([len(group.response_ids) for group in groups]).tolist()
    spans = pairwise([0, *ends])
    return {
        row_key(group): np.concatenate(parts[start:end]).astype(np.float32)
        for group, (start, end) in zip(groups, spans, strict=True)
    }


def served(
    context: ReferenceContext,
    *,
    url: str,
    model: str,
    tokenizer: str,
    template: str = "auto",
    template_options: dict[str, Any] | None = None,
    system_prompt: str | None = None,
    terminator: Literal["count", "skip"] = "count",
    max_altered: float = 0.02,
    protocol: Literal["prompt_logprobs", "echo"] = "prompt_logprobs",
    batch_size: int = 16,
    concurrency: int = 8,
    retries: int = 6,
    timeout: float = 120.0,
    cache: Literal["auto"] = "auto",
) -> Reference:
    """A causal language model behind a server that gives log-probs of prompts.

    `url` is the server's base, such as http://host:8000/v1; `model` the name it serves the model under; `tokenizer` a
    local folder or hub name of that model's tokenizer. `template`, `template_options`, `system_prompt`, `terminator`
    and `max_altered` are as for `reference=other`. `protocol` is how log-probs of the prompt are asked for:
    `prompt_logprobs` (vLLM) or `echo` (the older OpenAI way). `batch_size` responses go into a request, `concurrency`
    requests are under way at once; one that fails is repeated `retries` times with growing pauses; `timeout` is in
    seconds. A key is read from
    the environment variable DPO_REF_SERVED_KEY. Raises ValueError for a server that does not answer, refuses, or
    gives no finite log-prob for every token.
    """
    for option, value in {"batch_size": batch_size, "concurrency": concurrency, "timeout": timeout}.items():
        if not value > 0:
            raise ValueError(f"reference.{option}={value} must be positive")
    if retries < 0:
        raise ValueError(f"reference.retries={retries} must not be negative")
    server = Server(check_url(url, "reference.url"), timeout, retries)
    served_model = ServedModel(server, model, "reference", "set reference.model")
    client = CompletionsClient(served_model, protocol, batch_size, concurrency)
    theirs = context.work.loader.tokenizer(tokenizer, key="reference.tokenizer")
    install_template(theirs, template, template_options, "reference")
    hasty = replace(server, retries=min(retries, FIRST_RETRIES))  # a wrong address is known within seconds
    first = replace(client, model=replace(served_model, server=hasty))
    identity = identity_of(first, theirs, context.work.cache)
    scorer = Scorer(partial(score, client, context), TOLERANCE)
    whole = replace(context, pack=lambda groups: [list(groups)])  # many requests are under way at once
    own = ReferenceText(theirs, system_prompt, terminator, max_altered)
    if own.differs(context):
        return from_text("served", scorer, own, identity, "", whole, cache)
    rows = rows_of(scorer, context.groups, identity, whole)
    return PrecomputedReference("served", identity, "", context.groups, rows, context.work.device)


# --- which model answers behind a name


FIRST_RETRIES = 2
# Nats per token, in the mean. On the lab's model computing in bfloat16 instead of float32 makes 0.02 (0.11 on a single
# token), ten steps of AdamW at a learning rate of 1e-5 make 0.3.
SAME = 0.05
EXCHANGES = (
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("Compute 17 + 25, then double it.", "17 + 25 = 42, and 2 * 42 = 84."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Translate into German: Good morning!", "Guten Morgen! (It can be said until about ten.)"),
    ("Is it fine to lie to a friend?", "I would rather not, though a kind silence is no lie."),
    ("Name three birds.", "1. sparrow\n2. heron\n3. albatross"),
)


def _probe_ids(tokenizer: Any) -> list[list[int]]:
    """The fixed texts in the reference's template and tokens."""
    groups = [PromptGroup((Message(role="user", content=question),), (reply,)) for question, reply in EXCHANGES]
    return [[*ids.prompt, *ids.responses[0]] for ids in Encoder(tokenizer).last_turns(groups)]


def _answers(client: CompletionsClient, ids: list[list[int]]) -> np.ndarray:
    """Log-probs of all texts, one after the other."""
    server = client.model.server
    try:
        logps = client.logps(Sequences(ids, lambda number: f"probe text {number + 1}"))
    except ServerUnavailable as error:
        raise ValueError(
            f"the server at reference.url={server.url} gave no answer to a first question ({error}); start it, such "
            f"as with `vllm serve {client.model.name}`, or correct the address"
        ) from None
    except ServerRefused as error:
        raise ValueError(
            f"the server at {server.url} refused a first, short question ({error}); if it does not give log-probs of "
            f"prompts in the way of reference.protocol={client.protocol}, choose the other one"
        ) from None
    return np.concatenate(logps)


def _known(folder: Path, values: np.ndarray) -> str | None:
    """The earliest digest stored whose scores are those found now; None if there is none."""
    stored = [(content, path.stem) for path in folder.glob("*.json") if (content := _stored(path)) is not None]
    for content, name in sorted(stored, key=lambda entry: (entry[0]["stored"], entry[1])):
        before = np.array(content["token_logps"])
        if len(before) == len(values) and float(np.abs(before - values).mean()) <= SAME:
            return name
    return None


def _stored(path: Path) -> dict[str, Any] | None:
    """What `_store` wrote; a damaged file is told of and deleted: what it said was measured again just now."""
    try:
        return unsealed(path.read_bytes(), str(path), "")
    except Damaged as damage:
        say(f"{damage.what}: what the server said before is forgotten")
        path.unlink(missing_ok=True)
        return None


def _store(folder: Path, model: str, values: np.ndarray) -> None:
    content = {"model": model, "stored": time.time(), "token_logps": values.tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    name = digest([folder.name, content["token_logps"]])
    write_json(folder / f"{name}.json", sealed(content))


def identity_of(client: CompletionsClient, tokenizer: Any, cache: Path) -> str:
    """Digest of the model's name, its tokenizer and template, and its scores on the fixed texts.

    Raises ValueError if the server does not answer or refuses.
    """
    ids = _probe_ids(tokenizer)
    values = _answers(client, ids)
    folder = cache / "served" / digest([client.model.name, text_identity(tokenizer), ids])
    in_use(folder)
    if (identity := _known(folder, values)) is not None:
        return identity
    _store(folder, client.model.name, values)
    earliest = _known(folder, values)  # of runs that start at once, all take the earliest
    assert earliest is not None
    return earliest


# --- how servers are asked for the log-probs of a prompt, and how they answer


LEAST = -9999.0  # what vLLM writes for -inf, which JSON cannot say

Read = Callable[[Mapping[str, Any], Sequence[int]], list[Any]]


class Lacking(Exception):
    """An answer without log-probs of the prompt."""


class Mismatch(Exception):
    """Log-probs that are not those of the tokens that were sent; the message says how."""


def _vllm(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
    """`prompt_logprobs`: for every token of the prompt {token id: {"logprob": ...}}, null for the first."""
    entries = choice.get("prompt_logprobs")
    if entries is None:
        raise Lacking
    if len(entries) != len(ids):
        raise Mismatch(f"log-probs of {len(entries)} tokens for {len(ids)}")
    lacking = [token for entry, token in zip(entries[1:], ids[1:], strict=True) if str(token) not in (entry or ())]
    if lacking:
        raise Mismatch(f"no log-prob of token {lacking[0]}: it scored other tokens than were sent")
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]


def _echo(choice: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
    """`logprobs.token_logprobs`: those of the prompt, null for the first, then of what was generated."""
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    if logps is None or len(logps) <= 1 < len(ids):  # only of what was generated
        raise Lacking
    if len(logps) not in (len(ids), len(ids) + 1):
        raise Mismatch(f"log-probs of {len(logps)} tokens for {len(ids)} and one that is generated")
    if logps[0] is not None:
        raise Mismatch("a log-prob of the first token, which has none: it put tokens before those that were sent")
    return logps[1 : len(ids)]


class Protocol(NamedTuple):
    """What is added to a request, and how its answer is read."""

    options: Mapping[str, Any]
    read: Read


PROTOCOLS = {
    "prompt_logprobs": Protocol({"prompt_logprobs": 0}, _vllm),  # 0: of the token itself, and no others
    "echo": Protocol({"echo": True, "logprobs": 1}, _echo),
}


def values_of(
    answer: Any, protocol: str, ids: Sequence[Sequence[int]], name: Callable[[int], str]
) -> list[np.ndarray]:
    """The log-probs in an answer, float64, for every sequence from its second token on.

    Raises ValueError, naming the row, for log-probs that are missing, not finite or of other tokens.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != len(ids) or not all(isinstance(c, Mapping) for c in choices):
        count = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"the server gave {count} choices for {len(ids)} prompts; does it take lists of token ids?")
    ordered = sorted(choices, key=lambda choice: choice.get("index", 0))  # a stable sort keeps what has no index
    return [_check(choice, protocol, ids[index], name, index) for index, choice in enumerate(ordered)]


def _check(
    choice: Mapping[str, Any], protocol: str, ids: Sequence[int], name: Callable[[int], str], index: int
) -> np.ndarray:
    try:
        logps = PROTOCOLS[protocol].read(choice, ids)
        values = np.array([np.nan if value is None else value for value in logps], dtype=np.float64)
    except (TypeError, AttributeError, LookupError, OverflowError, ValueError) as error:
        raise ValueError(f"{name(index)}: the server gave what is no log-probs ({error})") from None
    except Lacking:
        others = " or ".join(f"reference.protocol={other}" for other in PROTOCOLS if other != protocol)
        raise ValueError(
            f"the server gives no log-probs of the prompt (reference.protocol={protocol}); try {others}, "
            "or serve the model with vLLM"
        ) from None
    except Mismatch as error:
        raise ValueError(
            f"{name(index)}: the server gave {error}; reference.tokenizer must be the tokenizer of the model it serves"
        ) from None
    bad = np.flatnonzero(~np.isfinite(values) | (values <= LEAST))
    if len(bad):
        raise ValueError(
            f"{name(index)}: the server gives token {ids[bad[0] + 1]} the log-prob {logps[bad[0]]}, which is not "
            "finite; the model may be broken (its quantisation, its dtype), or the token is none of its vocabulary"
        )
    return values
