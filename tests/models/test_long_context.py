"""Memory of a step on one long pair, counted with tensors that have shapes and no values: it grows with tokens however
activations are kept, and no tensor is made of tokens by tokens or of tokens by vocabulary."""

from functools import cache

import pytest
import torch

from dpo_ref.models import layers, logps, memory
from tests.support.tiny import policy_of, random_groups, tiny_model

LAYERS, HIDDEN, VOCAB = 6, 64, 4096
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 176, "vocab_size": VOCAB}
PROMPT, RESPONSES = 512, (4096, 8192)
TOKENS = [PROMPT + 2 * length for length in RESPONSES]
OF_FLOAT32 = 4


def pair(length):
    return random_groups([(PROMPT, (length, length))])


def policy(how, kind="llama", **options):
    model = tiny_model(kind, **(SIZES | options))
    layers.CHECKPOINTING[how](model)
    return policy_of(model)


@pytest.fixture
def small_chunks(monkeypatch):
    """Of logits: 12 MB, less than what a layer computes again, so that this is the peak at every length."""
    for module in (logps, memory):
        monkeypatch.setattr(module, "CHUNK_LOGITS", 3 * 10**6)


@cache
def growing(how, length):
    """Bytes of activations and of what comes and goes, without a chunk of logits."""
    counted = memory.step_memory(policy(how), pair(length), 1, torch.device("cpu"))
    return counted.by_token * counted.num_tokens - counted.parts.get(memory.LIBRARY, 0)


@pytest.mark.parametrize("how", layers.CHECKPOINTING)
def test_memory_grows_with_tokens(how, small_chunks):
    """With a mask of tokens by tokens, twice as many would take four times as much."""
    short, long = (growing(how, length) for length in RESPONSES)
    assert long / short == pytest.approx(TOKENS[1] / TOKENS[0], rel=0.03)


def test_full_keeps_the_inputs_of_layers_and_offload_two_of_them(small_chunks):
    """That of the layer under way, and the one that is leaving or coming."""
    kept = growing("full", RESPONSES[-1]) - growing("offload", RESPONSES[-1])
    assert kept / (TOKENS[-1] * HIDDEN * OF_FLOAT32) == pytest.approx(LAYERS - 2, abs=0.5)


def test_each_way_keeps_less_than_the_one_before(small_chunks):
    sizes = [growing(how, RESPONSES[-1]) for how in ("off", "selective", "full", "offload")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[2]


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("mistral", {"sliding_window": 512})])
def test_no_tensor_is_of_tokens_by_tokens_or_vocabulary(kind, options, monkeypatch):
    """The largest is a chunk of logits; all of them would be 16 times that, a mask of a response by itself twice."""
    sizes, vocab = [], 32768

    class Noting(memory._LiveBytes):
        def note(self, tensor, what):
            sizes.append(tensor.untyped_storage().nbytes() // OF_FLOAT32)
            super().note(tensor, what)

    monkeypatch.setattr(memory, "_LiveBytes", Noting)
    memory.step_memory(policy("full", kind, vocab_size=vocab, **options), pair(RESPONSES[-1]), 1, torch.device("cpu"))
    assert max(sizes) == logps.CHUNK_LOGITS
    assert 2 * RESPONSES[-1] * vocab == 16 * max(sizes)
    assert RESPONSES[-1] ** 2 == 2 * max(sizes)
