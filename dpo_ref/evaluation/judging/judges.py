"""The judges of `conf/judge/`: handed a context, they return whom to ask and how.

A served one is asked over OpenAI's chat completions. A local one is a causal model on this machine: not what it writes
is read, but how likely each label is.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch

from dpo_ref.component import component
from dpo_ref.data.encoding import Encoder
from dpo_ref.data.packing import collate, pack
from dpo_ref.distributed import best_device
from dpo_ref.evaluation.judging.answers import JudgeAnswer, JudgeRefused, JudgeRequest, Store
from dpo_ref.evaluation.judging.judge import Judge, Shown
from dpo_ref.evaluation.judging.templates import load_template
from dpo_ref.models.asked import ModelLoader, ModelPath
from dpo_ref.models.loading import check_folder, compute_dtype
from dpo_ref.models.logps import response_logps
from dpo_ref.models.server import Server, ServerRefused, check_url
from dpo_ref.types import Progress, PromptGroup, TokenGroup

# --- the components


SAID_ELSEWHERE = {"messages", "model", "max_tokens", "temperature", "logprobs", "top_logprobs"}


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge needs of the evaluation: its name on the command line, the folder of caches, and how models are
    loaded."""

    name: str
    cache: Path
    loader: ModelLoader
    progress: Progress


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
    if reserved := sorted(SAID_ELSEWHERE & (request or {}).keys()):
        raise ValueError(f"judge.request.{reserved[0]} is said elsewhere: by the template or judge.{reserved[0]}")
    verdict = load_template(template).verdict
    if base_url is not None:
        check_url(base_url, "judge.base_url", KEY_GOES)
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


@component(check=_check_served_options)
def served(
    context: JudgeContext,
    *,
    template: str,
    model: str,
    base_url: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    both_orders: bool = True,
    shows: Shown = "answer",
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
    twice about a pair, with either answer first. Of answers it `shows` what is said behind the thought, where that can
    be told apart, or all; lengths are of what is shown. `max_tokens`, `temperature` and `logprobs`, the number of
    likeliest first tokens whose log-probs are asked for, are left out of the request where they are null; `request`
    holds further parameters of it. `max_workers` questions are under way at once; each gets `timeout` seconds and is
    repeated `retries` times with growing pauses. Prices are per million tokens; without them no cost is reported.
    """
    options = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    if logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": logprobs}
    parameters = {name: value for name, value in options.items() if value is not None} | (request or {})
    server = Server(check_url(base_url or OPENAI, "judge.base_url", KEY_GOES), timeout, retries, key_variable, "judge")
    return Judge(
        name=context.name,
        model=model,
        template=load_template(template),
        parameters=parameters,
        both_orders=both_orders,
        soft=logprobs is not None,
        ask=ChatServer(server, max_workers).ask,
        cache=context.cache,
        shows=shows,
        prices=None if prompt_price is None or completion_price is None else (prompt_price, completion_price),
    )


# --- questions to a server


OPENAI = "https://api.openai.com/v1"
KEY_GOES = "name the key's variable in judge.key_variable"
REFUSALS_WITHOUT_ANSWER = 8  # so many, and not one answer: the request is wrong, not the texts


@dataclass(frozen=True, slots=True)
class ChatServer:
    """Asks `server` with `max_workers` questions under way at once."""

    server: Server
    max_workers: int

    def ask(self, requests: Sequence[JudgeRequest], store: Store) -> Iterator[JudgeRequest]:
        """Every request, in the order in which their answers come. Raises `ServerUnavailable` when one got no answer
        after all retries, ValueError for a key, address, model or parameter that the server does not take; what is
        under way then is waited for and stored.
        """
        if self.server.url == OPENAI and not os.environ.get(self.server.key_variable):
            raise ValueError(f"the judge wants a key: set the environment variable {self.server.key_variable}")
        session = _Session(replace(self.server, stop=Event()), store)
        pool = ThreadPoolExecutor(self.max_workers, thread_name_prefix="judge")
        try:
            futures = [pool.submit(session.settle, request) for request in requests]
            for future in as_completed(futures):
                yield future.result()
        finally:
            session.server.stop.set()
            pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Session:
    """One round of questions, shared by its threads."""

    server: Server
    store: Store
    num_refusals: int = 0
    answered: bool = False

    def settle(self, request: JudgeRequest) -> JudgeRequest:
        """Ask until there is an answer or a refusal, and store it."""
        try:
            answer: JudgeAnswer | JudgeRefused = self._answer(request)
            self.answered = True
        except ServerRefused as refusal:
            self._count(refusal)
            answer = JudgeRefused(str(refusal))
        self.store(request, answer)
        return request

    def _answer(self, request: JudgeRequest) -> JudgeAnswer:
        body = {"messages": request.messages, **request.parameters}
        parse = _read_logprobs if "top_logprobs" in request.parameters else _read_text
        return self.server.post("/chat/completions", body, parse)

    def _count(self, refusal: ServerRefused) -> None:
        """Raise ValueError for a refusal that is not of this text."""
        url = self.server.url
        if refusal.status == 404 or 300 <= refusal.status < 400:
            raise ValueError(
                f"the judge at {url} was not found ({refusal}): check judge.base_url and judge.model"
            ) from None
        self.num_refusals += 1
        if not self.answered and self.num_refusals >= REFUSALS_WITHOUT_ANSWER:
            raise ValueError(f"the judge at {url} refuses every question: {refusal}") from None


def _read_text(body: Any) -> JudgeAnswer:
    """An answer from the body of a chat completion; ValueError, LookupError, TypeError or AttributeError for what is
    none."""
    choice, usage = body["choices"][0], body.get("usage") or {}
    return JudgeAnswer(
        text=str(choice["message"].get("content") or ""),
        candidates=None,
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=int(usage.get("completion_tokens", 0)),
        finish_reason=choice.get("finish_reason"),
    )


def _read_logprobs(body: Any) -> JudgeAnswer:
    """An answer with the likeliest first tokens and their log-probs."""
    content = (body["choices"][0].get("logprobs") or {}).get("content")
    if not content or not content[0].get("top_logprobs"):
        raise ValueError("there are no log-probs in the answer (judge.logprobs=null goes by the written label)")
    candidates = tuple((str(token["token"]), float(token["logprob"])) for token in content[0]["top_logprobs"])
    if not all(logp < math.inf for _, logp in candidates):
        raise ValueError("there are log-probs in the answer that are not finite")
    return replace(_read_text(body), candidates=candidates)


# --- a causal model on this machine


class LocalModel(NamedTuple):
    """A loaded model (as `policy.loaded` gives it), a template's labels and what stands before them, and how many
    tokens go into a forward pass."""

    loaded: Any
    labels: tuple[str, ...]
    lead: str
    tokens_per_batch: int

    def ask(self, requests: Sequence[JudgeRequest], store: Store) -> Iterator[JudgeRequest]:
        """Every request, batch by batch, with log p(label | prompt, lead) of each label in nats. One that is longer
        than the model's positions is refused."""
        groups = self._groups(requests)
        room = self.loaded.positions
        too_long = [group for group in groups if room is not None and _longest(group) > room]
        for group in too_long:
            store(
                requests[group.group_index], JudgeRefused(f"{_longest(group)} tokens; the model has {room} positions")
            )
            yield requests[group.group_index]
        left_out = {group.group_index for group in too_long}
        fitting = [group for group in groups if group.group_index not in left_out]
        for members in pack(fitting, tokens_per_batch=self.tokens_per_batch):
            for group, logps in zip(members, self._logps(members), strict=True):
                store(requests[group.group_index], self._answer(group, logps))
                yield requests[group.group_index]

    def _groups(self, requests: Sequence[JudgeRequest]) -> list[TokenGroup]:
        """The questions with a response per label, each without the token that would end the turn."""
        responses = tuple(self.lead + label for label in self.labels)
        questions = [
            PromptGroup(request.messages, responses, origin=f"question {i}") for i, request in enumerate(requests)
        ]
        return [
            TokenGroup(
                index, requests[index].key, ids.prompt, tuple(tokens[:-1] for tokens in ids.responses), sizes, ()
            )
            for index, ids in enumerate(Encoder(self.loaded.tokenizer).last_turns(questions))
            for sizes in [tuple(len(response.encode()) for response in responses)]
        ]

    @torch.no_grad()
    def _logps(self, members: Sequence[TokenGroup]) -> list[list[float]]:
        device = next(self.loaded.model.parameters()).device
        with self.loaded.precision():
            sums = response_logps(self.loaded.model, collate(members).to(device)).sums
        return sums.reshape(len(members), len(self.labels)).tolist()

    def _answer(self, group: TokenGroup, logps: list[float]) -> JudgeAnswer:
        candidates = tuple(zip(self.labels, logps, strict=True))
        likeliest = max(candidates, key=lambda candidate: candidate[1])[0]
        return JudgeAnswer(likeliest, candidates, len(group.prompt_ids), 0, None)


def _longest(group: TokenGroup) -> int:
    return len(group.prompt_ids) + max(map(len, group.response_ids))


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


@component(check=_check_local_options)
def local(
    context: JudgeContext,
    *,
    model: str,
    template: str = "alpaca_eval",
    both_orders: bool = True,
    shows: Shown = "answer",
    tokens_per_batch: int = 8192,
) -> Judge:
    """A causal model in a local folder, on the hub or of the lab, asked with any template.

    Nothing is generated: the log-probs of the labels behind the template's `lead` are compared, so reasons that a
    template asks for are left out. Of answers it `shows` what is said behind the thought, where that can be told
    apart, or all; lengths are of what is shown. `tokens_per_batch` bounds a forward pass. Raises ValueError for a
    template whose label has no stated lead.
    """
    check_folder(model, "judge.model")
    question, loaded = load_template(template), context.loader.policy(ModelPath(model, key="judge.model"))
    labels = tuple(question.verdict.labels)
    dtype = str(compute_dtype("auto", best_device())).removeprefix("torch.")
    return Judge(
        name=context.name,
        model=model,
        template=question,
        parameters={
            "model": loaded.weights,
            "text": loaded.text_identity,
            "dtype": dtype,
            "labels": labels,
            "lead": question.verdict.lead,
        },
        both_orders=both_orders,
        soft=True,
        ask=LocalModel(loaded, labels, question.verdict.lead, tokens_per_batch).ask,
        cache=context.cache,
        shows=shows,
    )
