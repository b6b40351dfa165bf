"""The engine for a policy that another process serves: `vllm serve <policy folder>`, or what speaks as it does.

Prompts are sent as token ids, so that the server's template and tokenizer have no say, and the tokens that were drawn
come back as ids: KL can be measured on them. Where a server gives texts alone they are encoded again, and every such
answer says so.
"""

import hashlib
import math
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from dpo_ref.component import LEFT_OPEN, RunPlan, component
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.distributed import ranks
from dpo_ref.generation.engine import (
    Answer,
    Engine,
    KeptInFile,
    Request,
    SampledPolicy,
    Sampling,
    answer,
    check_positive,
    check_temperatures,
    held_out,
)
from dpo_ref.generation.records import Generation, line_of, record_of
from dpo_ref.generation.sampling import answer_of
from dpo_ref.generation.weight_sync import AdapterLoading, RestartCommand, WeightSync, restart_words
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import Policy
from dpo_ref.models.server import ServedModel, Server, ServerRefused, ServerUnavailable, check_url
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Asked, Progress, digest

WEIGHTS = ("*.safetensors", "*.bin", "config.json")


def folder_digest(location: str) -> str:
    """What stands for the weights of a model that is not loaded here: the content of its files; the name of one that
    is on the hub alone."""
    folder, hasher = Path(location), hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(f"hub {location}".encode()).hexdigest()[:32]
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        with path.open("rb") as stream:
            hasher.update(f"{path.name}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()[:32]


def _finished_futures(pool: ThreadPoolExecutor, futures: Collection[Future[Answer]]) -> Iterator[Future[Answer]]:
    """Requests as they end. After one that failed no other begins, and those under way are waited for."""
    pending = set(futures)
    for future in as_completed(futures):
        pending.remove(future)
        yield future
        if future.exception() is not None:
            break
    pool.shutdown(cancel_futures=True)
    yield from (future for future in pending if not future.cancelled())


@dataclass(frozen=True, slots=True)
class Served:
    """A policy behind the first server of `models` that has it. `concurrency` requests are under way at once.

    `besides` is asked for in every request. `again` is what to do once a server is there again, `lacking` where none
    has the policy, and `limit` the option that is the limit on an answer's tokens.
    """

    policy: Policy
    sampling: Sampling
    models: tuple[ServedModel, ...]
    protocol: str
    concurrency: int
    lacking: str
    besides: Mapping[str, Any] = field(default_factory=dict)
    again: str = "run the same command again"
    limit: str = "generation.max_new_tokens"
    draws: int = field(default=1, init=False)

    @property
    def tokenizer(self) -> Any:
        return self.policy.tokenizer

    def weights(self) -> str:
        """Digest of the policy's files, from which the server has it."""
        return folder_digest(self.policy.folder)

    def chosen(self, generations: Sequence[Generation]) -> list[Generation]:
        """Every sample."""
        return list(generations)

    def answers(
        self, requests: Sequence[Request], skip: Set[int], progress: Progress
    ) -> Generator[Mapping[int, Answer], None, None]:
        """An answer at a time, in the order they come. What was under way when one failed comes before the failure.

        Raises ValueError, naming the remedy, for servers that are lost, refuse, or do not serve the policy.
        """
        indices = [index for index in range(len(requests)) if index not in skip]
        if not indices:
            return
        model, failures = self._serving_model(), []
        ends = Ends(end_of_turn_ids(self.tokenizer), self.tokenizer.eos_token_id)
        pool = ThreadPoolExecutor(self.concurrency)
        futures = {pool.submit(self._answer, model, requests[index], ends): index for index in indices}
        try:
            for future in progress(_finished_futures(pool, futures), "generating", len(futures)):
                if (error := future.exception()) is None:
                    yield {futures[future]: future.result()}
                else:
                    failures.append((futures[future], error))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            self._fail(model.server, requests[failures[0][0]], failures[0][1])

    def _answer(self, model: ServedModel, request: Request, ends: "Ends") -> Answer:
        options = sampling_options(self.protocol, request, self.sampling, ends, self.tokenizer)
        content = model.complete({**options, **self.besides})
        return read_answer(content, self.tokenizer, ends, self.sampling.max_new_tokens, self.limit)

    def _serving_model(self) -> ServedModel:
        """The policy at the first server that has it. One that does not say what it serves is believed."""
        names_by_url: dict[str, list[str]] = {}
        for model in self.models:
            try:
                names = model.server.models()
            except ServerUnavailable as error:
                names = [f"nothing: {error}"]
            if names is None or model.name in names:
                return model
            names_by_url[model.server.url] = names
        offers = "; ".join(f"{url} serves {', '.join(names)}" for url, names in names_by_url.items())
        raise ValueError(f"no server has {self.models[0].name}: {offers}. {self.lacking}; what was answered is kept")

    def _fail(self, server: Server, request: Request, error: BaseException) -> None:
        place = request.place
        who = f"{server.url} (prompt {place.prompt_index}, sample {place.sample_index}, turn {place.turn})"
        if isinstance(error, ServerUnavailable):
            raise ValueError(
                f"{who} gave no answer in {server.retries + 1} attempts ({error}); every answer so far is kept: "
                f"{self.again} when it is up"
            ) from error
        if isinstance(error, ServerRefused):
            size = len(request.prompt_ids)
            raise ValueError(
                f"{who} refused a prompt of {size} tokens ({error}); a server must take that and "
                f"{self.limit}={self.sampling.max_new_tokens} more (--max-model-len), and the options of "
                f"generation.protocol={self.protocol}"
            ) from error
        raise ValueError(f"{who}: {error}") from error


# --- the policy that is trained, before each round handed over to the server


@dataclass(frozen=True, slots=True)
class RoundModel(ServedModel):
    """The policy before one round, whose name no other weights have: what answers under another is refused."""

    def complete(self, options: Mapping[str, Any]) -> Any:
        """As `ServedModel` does. Raises ValueError too for an answer of another policy, and for texts without the
        tokens that were drawn: encoded again they may be others, which the policy never drew."""
        answer = ServedModel.complete(self, options)
        told = answer if isinstance(answer, Mapping) else {}
        if told.get("model") != self.name:
            raise ValueError(
                f"{told.get('model')} answered where {self.name} was asked for: that is another policy's sample, such "
                "as an earlier round's; nothing between here and the server may choose the model"
            )
        choices = told.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, Mapping) and _token_ids(choice) is None:
                raise ValueError(
                    "the server gave text without the tokens that it drew, on which rounds are trained: it must know "
                    "return_token_ids, as vLLM does from 0.10.2 on"
                )
        return answer


@dataclass
class ServedPolicy:
    """The policy that is trained, behind a server to which `sync` hands it over before each round."""

    policy: Policy
    sampling: Sampling
    sync: WeightSync
    concurrency: int
    work: Workspace
    name: str = field(default="", init=False)  # as the server has it

    def hand_over(self, index: int) -> dict[str, float]:
        """What answers from here on is the policy as it is now, before the round with this 0-based index; returns how
        many seconds that took."""
        started = time.perf_counter()
        self.name = self.sync.hand_over(index)
        return {"handover_seconds": time.perf_counter() - started}

    def answer(self, prompts: Sequence[Asked], seed: int, folder: Path) -> list[Generation]:
        """`sampling.samples_per_prompt` answers to every prompt, ordered by prompt and sample; what came before a
        server was lost is kept in `folder`."""
        remedy = f"It was restarted meanwhile, perhaps: {self._again}"
        engine = Served(
            self.policy,
            self.sampling,
            (RoundModel(self.sync.server, self.name, "generation", remedy),),
            "vllm",
            self.concurrency,
            remedy,
            besides={"logprobs": 0},  # of the token that was drawn, and no others
            again=self._again,
            limit="data.max_new_tokens",
        )
        kept = KeptInFile(folder, digest([self.name, seed]))

        def lines() -> list[str]:
            return [line_of(told) for told in answer(engine, held_out(prompts), seed, self.work.progress, kept)]

        return [record_of(line.encode(), "an answer of the first rank") for line in ranks().first(lines)]

    @property
    def _again(self) -> str:
        return f"go on with python train.py resume={self.work.directory}"

    def close(self) -> None:
        """No further round is sampled."""
        self.sync.close()


OF_ROUNDS = {  # what says for rounds of training what these options say for an evaluation
    "temperature": "data.temperature says how rounds are sampled",
    "samples_per_prompt": "data.samples_per_prompt says how many",
    "max_new_tokens": "data.max_new_tokens says how long",
    "top_p": "rounds are sampled from the whole vocabulary",
    "protocol": "rounds need the tokens that were drawn, so that they speak vLLM's",
}
NOT_LOADED = ("lora_dora", "lora_modules_to_save", "lora_rank_pattern", "lora_alpha_pattern", "lora_parameters")


def check_rounds(objective: Any, plan: RunPlan) -> None:
    """Refuse a server for a run that samples nothing, options without effect on rounds, and weights that do not come
    to the server. Raises ValueError with the remedy."""
    options, data = plan.components["generation"].options, plan.components["data"]
    if data.hooks.rounds is None:
        raise ValueError(
            f"generation=served has no effect: data={data.name} has its answers already; add data=on_policy, or leave "
            "it out (evaluate.py has it too)"
        )
    for name, instead in OF_ROUNDS.items():
        if f"generation.{name}" in plan.given:
            raise ValueError(f"generation.{name} has no effect on rounds of training: {instead}; leave it out")
    if "data.generation_batch_size" in plan.given:
        raise ValueError(
            "data.generation_batch_size has no effect with generation=served: generation.concurrency says how many "
            "requests are under way at once"
        )
    if isinstance(options["url"], list):
        raise ValueError("generation.url: rounds are sampled from one server, which is handed the policy; give one")
    if options["restart"] is None:
        _check_adapter(options, plan)
    else:
        restart_words(options["restart"])


def _check_adapter(options: Mapping[str, Any], plan: RunPlan) -> None:
    """That the policy is an adapter that vLLM loads."""
    restart = "generation.restart='<command that serves {folder} as {name}>' serves the whole policy instead"
    if "generation.restart_timeout" in plan.given:
        raise ValueError("generation.restart_timeout has no effect without generation.restart; leave it out")
    adapter = plan.components["model"].options
    if adapter["adapter"] is None and adapter["lora_rank"] is None:
        raise ValueError(
            "generation=served: a running server takes adapters alone (model.lora_rank=16), and this run trains all "
            f"weights; {restart}"
        )
    for name in NOT_LOADED:
        if adapter[name]:
            raise ValueError(f"model.{name}: vLLM loads no such adapter, or computes another one; {restart}")


def served_policy(
    policy: Policy,
    sampling: Sampling,
    work: Workspace,
    *,
    url: str | list[str],
    concurrency: int = 32,
    retries: int = 6,
    timeout: float = 600.0,
    folder: str | None = None,
    restart: str | None = None,
    restart_timeout: float = 600.0,
) -> SampledPolicy:
    """The policy that is trained answers elsewhere: behind vLLM, to which it is handed over before each round.

    An adapter is loaded by `/v1/load_lora_adapter` (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora). Whole
    weights, and adapters that vLLM does not load, are written as a model folder, and `restart` is a command that
    serves it: {folder} in its words is that folder and {name} what it must be served as, for which it has
    `restart_timeout` seconds. Both lie in `folder`, served/ in the run's own unless given, which the server must see
    under the same path. `url`, `concurrency`, `retries` and `timeout` are as for an evaluation. Raises ValueError for
    a saved adapter that vLLM does not load.
    """
    assert isinstance(url, str)
    server = Server(check_url(url, "generation.url"), timeout, retries)
    root = Path(folder) if folder else work.directory / "served"
    if restart is not None:
        sync: WeightSync = RestartCommand(policy, server, root, work.directory, restart, restart_timeout)
    else:
        sync = AdapterLoading(policy, server, root, work.directory)
    say(f"rounds are sampled by the server at {server.url}, which is handed the policy in {root}")
    return ServedPolicy(policy, sampling, sync, concurrency, work)


# --- the engine as a component


def _check_options(url: str | list[str], retries: int, timeout: float, **options: Any) -> None:
    check_temperatures(options["temperature"], options["samples_per_prompt"])
    check_positive(concurrency=options["concurrency"])
    for base in url if isinstance(url, list) else [url]:
        check_url(base, "generation.url")
    if retries < 0 or not timeout > 0:
        raise ValueError(f"generation.retries={retries} must not be negative, generation.timeout={timeout} positive")
    if not options["restart_timeout"] > 0:
        raise ValueError(f"generation.restart_timeout={options['restart_timeout']} must be positive (seconds)")


@component(check=_check_options, check_run=check_rounds, sampled=served_policy)
def served(
    policy: Policy,
    *,
    url: str | list[str],
    temperature: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    samples_per_prompt: int = 1,
    protocol: Literal["vllm", "openai"] = "vllm",
    concurrency: int = 32,
    retries: int = 6,
    timeout: float = 600.0,
) -> Engine:
    """The policy answers elsewhere: behind a server that speaks OpenAI's completions API.

    `url` is the server's base, such as http://host:8000/v1, or several: every policy is asked where it is served under
    its path. `protocol` says which options the server knows: vLLM's, so that it samples as the engine here does and
    gives token ids, or OpenAI's alone. The other options are those of `transformers`; a server's samples depend on its
    batches, so the same seed gives nearly the same answers. `concurrency` requests are under way at once; one that
    fails is repeated `retries` times with growing pauses; `timeout` is in seconds. A key is read from the environment
    variable DPO_REF_SERVED_KEY. Raises ValueError for options out of range and for a policy whose weights are more
    than its folder's.
    """
    if policy.on_top is not None:
        raise ValueError(
            f"generation=served: what a server has under {policy.folder} lacks {policy.on_top}; write the whole model "
            "into a folder, serve that, and give it, or use generation=transformers"
        )
    assert not isinstance(temperature, list)
    urls = url if isinstance(url, list) else [url]
    remedy = f"serve the policy as {policy.path} (--served-model-name)"
    models = tuple(
        ServedModel(Server(check_url(base, "generation.url"), timeout, retries), policy.path, "generation", remedy)
        for base in urls
    )
    sampling = Sampling(temperature, top_p, max_new_tokens, samples_per_prompt)
    lacking = (
        f"Start one with `vllm serve {policy.folder} --generation-config vllm --served-model-name {policy.path}`, add "
        "its address to generation.url, and run the same command again"
    )
    return Served(policy, sampling, models, protocol, concurrency, lacking)


# --- how servers are asked for an answer, and how they give it


SEEDS = 2**53  # servers read a seed as a JSON number
TOKEN_ID = "token_id:"  # how vLLM writes token ids where texts of tokens are expected


class Ends(NamedTuple):
    """Tokens that end a turn, and the one to write where a server does not say which it was."""

    ids: set[int]
    eos: int


def _openai(request: Request, sampling: Sampling, ends: Ends, tokenizer: Any) -> dict[str, Any]:
    """What every completions API knows."""
    return {
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": request.temperature,
        "top_p": sampling.top_p,
        "seed": request.stream % SEEDS,
    }


def _vllm(request: Request, sampling: Sampling, ends: Ends, tokenizer: Any) -> dict[str, Any]:
    """Also what makes vLLM sample from the whole distribution: without these it takes the defaults that a model's
    generation_config.json recommends, top-k and penalties among them, and ends at that file's tokens."""
    never = [] if tokenizer.pad_token_id in (None, *ends.ids) else [tokenizer.pad_token_id]
    return _openai(request, sampling, ends, tokenizer) | {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(ends.ids),
        "logit_bias": {str(token): -100.0 for token in never},
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    }


PROTOCOLS = {"vllm": _vllm, "openai": _openai}


def sampling_options(
    protocol: str, request: Request, sampling: Sampling, ends: Ends, tokenizer: Any
) -> dict[str, Any]:
    """The body of a request for one answer, without the model's name."""
    return PROTOCOLS[protocol](request, sampling, ends, tokenizer)


def _token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The tokens that were drawn, where the server says so: as ids, or among the log-probs as vLLM writes them."""
    if isinstance(choice.get("token_ids"), list):
        return list(choice["token_ids"])
    tokens = (choice.get("logprobs") or {}).get("tokens") or [""]
    are_ids = all(isinstance(token, str) and token.startswith(TOKEN_ID) for token in tokens)
    return [int(token.removeprefix(TOKEN_ID)) for token in tokens] if are_ids else None


def _logps(choice: Mapping[str, Any], num_tokens: int) -> tuple[float, ...] | None:
    """Log-probs of the tokens that the server wrote down, in nats; None where it gives none."""
    values = (choice.get("logprobs") or {}).get("token_logprobs")
    if values is None:
        return None
    finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if not len(values) == len(finite) == num_tokens:
        raise ValueError(f"the server gave {len(finite)} finite log-probs of {num_tokens} tokens")
    return tuple(map(float, values))


def read_answer(
    content: Any, tokenizer: Any, ends: Ends, max_new_tokens: int, limit: str = "generation.max_new_tokens"
) -> Answer:
    """A server's answer to one request; `limit` is the option that says `max_new_tokens`. Raises ValueError for what
    is none, and for one that was cut too early.

    A server may leave out the token that ended the turn: it is put back. Texts without token ids are encoded.
    """
    choices = content.get("choices") if isinstance(content, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, Mapping) or not isinstance(choice.get("text"), str):
        raise ValueError(f"the server's answer is no completion: {str(content)[:200]}")
    reason, token_ids = choice.get("finish_reason"), _token_ids(choice)
    if reason not in ("stop", "length"):
        raise ValueError(f"the server ended an answer with finish_reason {reason!r}, which is neither stop nor length")
    if token_ids is None:
        return _from_text(choice["text"], reason, tokenizer, ends)
    if not all(type(token) is int and 0 <= token < len(tokenizer) for token in token_ids):
        raise ValueError("the server gave tokens that are none of the policy's: it serves another model")
    if len(token_ids) > max_new_tokens:
        raise ValueError(f"the server gave {len(token_ids)} tokens, more than {limit}={max_new_tokens}")
    logps = _logps(choice, len(token_ids))
    if reason == "stop" and (not token_ids or token_ids[-1] not in ends.ids):
        stop_id = choice.get("stop_reason")
        token_ids.append(stop_id if stop_id in ends.ids else ends.eos)
    if not token_ids:
        raise ValueError("the server gave an answer of no tokens that did not end by itself")
    if reason == "length" and len(token_ids) < max_new_tokens:
        raise ValueError(
            f"the server cut an answer at {len(token_ids)} tokens, before {limit}={max_new_tokens}: "
            "start it with --generation-config vllm and a --max-model-len that leaves room"
        )
    return answer_of(tokenizer, token_ids, ends.ids)._replace(logps=logps)


def _from_text(text: str, reason: Any, tokenizer: Any, ends: Ends) -> Answer:
    ids = tokenizer.encode(text, add_special_tokens=False)
    closing = [ends.eos] if reason == "stop" else []
    if not (ids or closing):
        raise ValueError("the server gave an empty answer that did not end by itself")
    return Answer((*ids, *closing), text, reason, "text")
