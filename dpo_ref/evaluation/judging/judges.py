"""The judges of `conf/judge/`: handed a context, they return whom to ask and how.

A served one is asked over OpenAI's chat completions, through the openai package. The key is read from an environment
variable when the first question is sent, goes to the stated server alone, and is cut out of everything the server
says. A local one is a causal model on this machine: not what it writes is read, but how likely each label is.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from dpo_ref.data.encoding import Encoder
from dpo_ref.data.packing import collate, pack
from dpo_ref.distributed import best_device
from dpo_ref.evaluation.judging.judge import Answer, Judge, Refused, Request, Store, Unavailable
from dpo_ref.evaluation.judging.templates import load_template
from dpo_ref.models.loading import compute_dtype
from dpo_ref.models.logps import response_logps
from dpo_ref.models.server import RETRIED, pause, seconds_asked
from dpo_ref.types import Progress, PromptGroup, TokenGroup

# --- the components


SAID_ELSEWHERE = {"messages", "model", "max_tokens", "temperature", "logprobs", "top_logprobs"}


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge needs of the evaluation: its name on the command line, the folder of caches, and how models are
    loaded (`load` takes a path, a hub name or a model of the lab)."""

    name: str
    cache: Path
    load: Callable[[str], Any]
    progress: Progress


def served(
    context: JudgeContext,
    *,
    template: str,
    model: str,
    base_url: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    both_orders: bool = True,
    max_tokens: int | None = None,
    temperature: float | None = 0.0,
    logprobs: int | None = None,
    request: dict[str, Any] | None = None,
    max_workers: int = 16,
    timeout: float = 120.0,
    retries: int = 6,
    prompt_price: float | None = None,
    completion_price: float | None = None,
) -> Judge:
    """A model behind OpenAI's chat completions or a server that speaks them.

    `template` is a name (alpaca_eval, mt_bench, tldr, dialogue) or a file. `base_url` is the server's base, OpenAI's
    unless given; a key is read from the environment variable `key_variable` and from nowhere else. `both_orders` asks
    twice about a pair, with either answer first. `max_tokens`, `temperature` and `logprobs`, the number of likeliest
    first tokens whose log-probs are asked for, are left out of the request where they are null; `request` holds
    further parameters of it. `max_workers` questions are under way at once; each gets `timeout` seconds and is
    repeated `retries` times with growing pauses. Prices are per million tokens; without them no cost is reported.
    """
    parameters = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    if logprobs is not None:
        parameters |= {"logprobs": True, "top_logprobs": logprobs}
    given = {name: value for name, value in parameters.items() if value is not None} | (request or {})
    server = ChatServer((base_url or OPENAI).rstrip("/"), key_variable, max_workers, timeout, retries)
    return Judge(
        name=context.name,
        model=model,
        template=load_template(template),
        parameters=given,
        both_orders=both_orders,
        soft=logprobs is not None,
        ask=server.ask,
        cache=context.cache,
        prices=None if prompt_price is None or completion_price is None else (prompt_price, completion_price),
    )


def _check_served_options(
    template: str,
    base_url: str | None,
    logprobs: int | None,
    max_tokens: int | None,
    max_workers: int,
    timeout: float,
    retries: int,
    prompt_price: float | None,
    completion_price: float | None,
    request: Mapping[str, Any] | None,
    **rest: Any,
) -> None:
    """Raise ValueError for options that are out of range or would have no effect, before anything is loaded."""
    if taken := sorted(SAID_ELSEWHERE & (request or {}).keys()):
        raise ValueError(f"judge.request.{taken[0]} is said elsewhere: by the template or judge.{taken[0]}")
    verdict = load_template(template).verdict
    if base_url is not None:
        check_url(base_url)
    positive = {"logprobs": logprobs, "max_tokens": max_tokens, "max_workers": max_workers, "timeout": timeout}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"judge.{name}={value} must be positive")
    if retries < 0:
        raise ValueError(f"judge.retries={retries} must not be negative")
    if logprobs is not None and verdict.pattern is not None:
        raise ValueError(
            f"judge.logprobs={logprobs} has no effect: in template {template} other words stand before the label; "
            "leave it out"
        )
    if (prompt_price is None) != (completion_price is None):
        raise ValueError("judge.prompt_price and judge.completion_price make a cost together; give both or neither")


served.check_options = _check_served_options  # pyright: ignore[reportFunctionMemberAccess]


# --- questions to a server


OPENAI = "https://api.openai.com/v1"
SHOWN = 300  # characters of a server's own message
HIDDEN = "***"
NO_KEY = "none"  # what servers without keys are sent; the package insists on one
REFUSALS_WITHOUT_ANSWER = 8  # so many, and not one answer: the request is wrong, not the texts


class _Passing(Exception):
    """A failure that may pass; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def check_url(url: str) -> None:
    """Raise ValueError for what is no base address of a server, and for a key inside it."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "judge.base_url must hold no user, password or query; name the key's variable in judge.key_variable"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"judge.base_url={url} must be the base of a server, such as http://host:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"judge.base_url={url} must be the base, without /chat/completions")


@dataclass(frozen=True, slots=True)
class ChatServer:
    """Asks `base_url` with `max_workers` questions under way at once. Each is tried 1 + `retries` times with growing
    pauses and given `timeout` seconds; `key_variable` is the environment variable that holds the key."""

    base_url: str
    key_variable: str
    max_workers: int
    timeout: float
    retries: int

    def ask(self, requests: Sequence[Request], store: Store) -> Iterator[Request]:
        """Every request, in the order in which their answers come. Raises `Unavailable` when one got no answer after
        all retries, ValueError for a key, address, model or parameter that the server does not take; what is under
        way then is waited for and stored.
        """
        session = _Session(self, store)
        pool = ThreadPoolExecutor(self.max_workers, thread_name_prefix="judge")
        try:
            waiting = [pool.submit(session.settle, request) for request in requests]
            for done in as_completed(waiting):
                yield done.result()
        finally:
            session.stop.set()
            pool.shutdown(cancel_futures=True)
            session.client.close()


class _Session:
    """One round of questions, shared by its threads."""

    def __init__(self, server: ChatServer, store: Store) -> None:
        import openai

        for library in ("httpx", "httpx2"):  # whichever the package uses; at INFO, Hydra's level, a line a question
            logging.getLogger(library).setLevel(logging.WARNING)
        self.server, self.store, self.stop = server, store, threading.Event()
        self._key = os.environ.get(server.key_variable, "")
        if not self._key and server.base_url == OPENAI:
            raise ValueError(f"the judge wants a key: set the environment variable {server.key_variable}")
        self._openai, self._refusals, self._answered = openai, 0, False
        self.client = openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=server.base_url,
            timeout=server.timeout,
            max_retries=0,  # ours also repeat answers that are no answers
            http_client=openai.DefaultHttpxClient(follow_redirects=False),  # the key is for the stated server
        )

    def settle(self, request: Request) -> Request:
        """Ask until there is an answer or a refusal, and store it."""
        try:
            answer: Answer | Refused = self._answer(request)
        except Refused as refusal:
            self._count(refusal)
            answer = refusal
        self._answered |= isinstance(answer, Answer)
        self.store(request, answer)
        return request

    def _count(self, refusal: Refused) -> None:
        self._refusals += 1
        if not self._answered and self._refusals >= REFUSALS_WITHOUT_ANSWER:
            raise ValueError(f"the judge at {self.server.base_url} refuses every question: {refusal}")

    def _answer(self, request: Request) -> Answer:
        for attempt in range(self.server.retries + 1):
            try:
                return self._tried(request)
            except _Passing as failure:
                if attempt == self.server.retries or self.stop.wait(pause(attempt, failure.wait)):
                    raise Unavailable(str(failure)) from None
        raise AssertionError("every attempt returns or raises")

    def _tried(self, request: Request) -> Answer:
        raw = self._sent(request)
        if isinstance(raw, Exception):  # raised here, where it has no context: the package's errors may show the key
            raise raw
        try:
            return self._read(json.loads(raw.content), wants_logprobs="top_logprobs" in request.parameters)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            start = self._without_key(raw.content[:80].decode(errors="replace"))
            raise _Passing(f"{error or type(error).__name__}; the answer begins with {start!r}") from None

    def _sent(self, request: Request) -> Any:
        """The server's response, or what is to be raised instead."""
        content: Any = {"messages": list(request.messages), "extra_body": dict(request.parameters)}
        try:
            return self.client.chat.completions.with_raw_response.create(model=request.parameters["model"], **content)
        except self._openai.APIStatusError as error:
            return self._failure(error)
        except self._openai.APIConnectionError as error:
            reason = error.__cause__ or error
            return _Passing(self._without_key(f"{type(reason).__name__}: {reason}"))

    def _read(self, body: Any, wants_logprobs: bool) -> Answer:
        """An answer from the body of a chat completion; ValueError, LookupError, TypeError or AttributeError for what
        is none."""
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"].get("content") or ""
        return Answer(
            text=self._without_key(str(text)),
            candidates=_candidates(choice) if wants_logprobs else None,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            finish_reason=choice.get("finish_reason"),
        )

    def _failure(self, error: Any) -> Exception:
        """What an HTTP error means."""
        status, server = error.status_code, self.server
        said = f"{status}: {self._message(error)}"
        if status in (401, 403):  # the body may repeat the key
            had = "does not accept the key in" if self._key else "wants a key: set"
            return ValueError(f"the judge at {server.base_url} ({status}) {had} {server.key_variable}")
        if status == 404 or 300 <= status < 400:
            return ValueError(
                f"the judge at {server.base_url} was not found ({said}): check judge.base_url and judge.model"
            )
        if error.code == "insufficient_quota":
            return Unavailable(said)
        if status in RETRIED or status == 409 or status > 504:
            return _Passing(said, seconds_asked(error.response.headers.get("Retry-After")))
        return Refused(said)

    def _message(self, error: Any) -> str:
        body = error.body if isinstance(error.body, Mapping) else {}
        return self._without_key(" ".join(str(body.get("message") or error.response.text).split()))[:SHOWN]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, HIDDEN) if self._key else text


def _candidates(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The likeliest first tokens with their log-probs."""
    content = (choice.get("logprobs") or {}).get("content")
    if not content or not content[0].get("top_logprobs"):
        raise ValueError("there are no log-probs in the answer (judge.logprobs=null goes by the written label)")
    return tuple((str(one["token"]), float(one["logprob"])) for one in content[0]["top_logprobs"])


# --- a causal model on this machine


class LocalModel(NamedTuple):
    """A loaded model (as `policy.loaded` gives it), a template's labels and what stands before them, and how many
    tokens go into a forward pass."""

    loaded: Any
    labels: tuple[str, ...]
    lead: str
    tokens_per_batch: int

    def ask(self, requests: Sequence[Request], store: Store) -> Iterator[Request]:
        """Every request, batch by batch, with log p(label | prompt, lead) of each label in nats. One that is longer
        than the model's positions is refused."""
        groups = self._groups(requests)
        room = getattr(self.loaded.model.config, "max_position_embeddings", None)
        too_long = [group for group in groups if room is not None and _longest(group) > room]
        for group in too_long:
            store(requests[group.group_index], Refused(f"{_longest(group)} tokens; the model has {room} positions"))
            yield requests[group.group_index]
        left_out = {group.group_index for group in too_long}
        fitting = [group for group in groups if group.group_index not in left_out]
        for members in pack(fitting, tokens_per_batch=self.tokens_per_batch):
            for group, logps in zip(members, self._logps(members), strict=True):
                store(requests[group.group_index], self._answer(group, logps))
                yield requests[group.group_index]

    def _groups(self, requests: Sequence[Request]) -> list[TokenGroup]:
        """The questions with a response per label, each without the token that would end the turn."""
        responses = tuple(self.lead + label for label in self.labels)
        asked = [
            PromptGroup(request.messages, responses, origin=f"question {i}") for i, request in enumerate(requests)
        ]
        return [
            TokenGroup(number, requests[number].key, ids.prompt, tuple(one[:-1] for one in ids.responses), sizes, ())
            for number, ids in enumerate(Encoder(self.loaded.tokenizer).last_turns(asked))
            for sizes in [tuple(len(response.encode()) for response in responses)]
        ]

    @torch.no_grad()
    def _logps(self, members: Sequence[TokenGroup]) -> list[list[float]]:
        device = next(self.loaded.model.parameters()).device
        with self.loaded.precision():
            sums = response_logps(self.loaded.model, collate(members).to(device)).sums
        return sums.reshape(len(members), len(self.labels)).tolist()

    def _answer(self, group: TokenGroup, logps: list[float]) -> Answer:
        candidates = tuple(zip(self.labels, logps, strict=True))
        likeliest = max(candidates, key=lambda candidate: candidate[1])[0]
        return Answer(likeliest, candidates, len(group.prompt_ids), 0, None)


def _longest(group: TokenGroup) -> int:
    return len(group.prompt_ids) + max(map(len, group.response_ids))


def local(
    context: JudgeContext,
    *,
    model: str,
    template: str = "alpaca_eval",
    both_orders: bool = True,
    tokens_per_batch: int = 8192,
) -> Judge:
    """A causal model in a local folder, on the hub or of the lab, asked with any template.

    Nothing is generated: the log-probs of the labels behind the template's `lead` are compared, so reasons that a
    template asks for are left out. `tokens_per_batch` bounds a forward pass. Raises ValueError for a template whose
    label has no stated lead.
    """
    asked, loaded = load_template(template), context.load(model)
    labels = tuple(asked.verdict.labels)
    dtype = str(compute_dtype("auto", best_device())).removeprefix("torch.")
    return Judge(
        name=context.name,
        model=model,
        template=asked,
        parameters={
            "model": loaded.weights,
            "text": loaded.text_identity,
            "dtype": dtype,
            "labels": labels,
            "lead": asked.verdict.lead,
        },
        both_orders=both_orders,
        soft=True,
        ask=LocalModel(loaded, labels, asked.verdict.lead, tokens_per_batch).ask,
        cache=context.cache,
    )


def _check_local_options(template: str, tokens_per_batch: int, **rest: Any) -> None:
    """Raise ValueError for a template that cannot be used, before anything is loaded."""
    verdict = load_template(template).verdict
    if verdict.pattern is not None and not verdict.lead:
        raise ValueError(
            f"judge.template={template}: a local judge writes no answer to search with verdict.pattern; say in "
            "verdict.lead what stands before the label"
        )
    if tokens_per_batch < 1:
        raise ValueError(f"judge.tokens_per_batch={tokens_per_batch} must be at least 1")


local.check_options = _check_local_options  # pyright: ignore[reportFunctionMemberAccess]
