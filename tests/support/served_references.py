"""Servers of a tiny model's log-probs, and references that ask them; for the tests of reference=served."""

from dataclasses import replace
from functools import partial

import pytest

from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.references.served import served
from dpo_ref.types import Message, PromptGroup
from tests.support.completions_server import CompletionsServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.reference_contexts import context_for
from tests.support.tiny import tiny_model
from tests.support.tokenizer_families import FAMILIES

POLICY = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
SIZE = 400  # above every tokenizer's vocabulary here
KEY = "sk-not-a-real-key-0123456789"
NUM_GROUPS = 12
NUM_PROBE_REQUESTS = 2  # six texts, four in a request
SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1"]
Served = partial(served, model="big", tokenizer="theirs", batch_size=4, concurrency=3, timeout=20.0)


@pytest.fixture
def serve():
    """Servers that are closed at the end."""
    started = []

    def start(**options):
        started.append(CompletionsServer(options.pop("model", None) or big(), **options))
        return started[-1]

    yield start
    for server in started:
        server.__exit__()


def big(seed=5):
    return tiny_model(seed=seed, vocab_size=SIZE)


def context_of(tmp_path, tokenizer=POLICY, **changed):
    groups = [
        PromptGroup(
            (Message(role="user", content=f"what is {index}?"),),
            (f"it is {index}, of course", "no cat"[: 3 + index % 4].strip() + "!"),
            ((0, 1),),
            origin=f"pairs.jsonl row {index + 1}",
        )
        for index in range(NUM_GROUPS)
    ]
    context = context_for(
        tmp_path / "cache",
        tiny_model(seed=0, vocab_size=SIZE),
        POLICY,
        lambda _: big(),
        theirs=tokenizer,
        groups=tokenise(groups, POLICY, max_length=10**6).groups,
        pack=partial(pack, tokens_per_batch=200),
    )
    return replace(context, **changed)


def sequences(groups):
    """What a server is asked for some groups."""
    return [(*group.prompt_ids, *ids) for group in groups for ids in group.response_ids]
