"""Numbers and gradients of two models' next-token distributions are those of full logits, whatever the chunks; and no
[tokens, vocabulary] tensor is made."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.packing import collate
from dpo_ref.models import logps
from dpo_ref.models.adapters import BELOW
from dpo_ref.models.logps import Head, response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.next_token import BesideReference, NextTokens, next_tokens, vocabulary_of
from dpo_ref.objectives.divergences import FORWARD_KL, REVERSE_KL, RenyiSum
from dpo_ref.references.policies import AdapterBase
from tests.support.tiny import disturbed, random_groups, tiny_model

HIDDEN, VOCAB = 7, 29
LAYOUTS = st.lists(
    st.tuples(st.integers(1, 4), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=6
)
HEADS = [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 3.0)]
ASKED = (FORWARD_KL, REVERSE_KL, RenyiSum(1.3), RenyiSum(0.6))


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what is measured at a token


def test_by_hand_on_three_words():
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2)."""
    logp, logq = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert float(FORWARD_KL.values(logp, logq)) == pytest.approx(math.log(2) / 4)
    assert float(REVERSE_KL.values(logp, logq)) == pytest.approx(math.log(2) / 4)
    assert float(REVERSE_KL.values(logp, logp)) == 0
    squares = 0.5**2 / 0.25 + 0.25 + 0.25**2 / 0.5  # sum of p^2 / q
    assert float(RenyiSum(2.0).values(logp, logq)) == pytest.approx(math.log(squares))
    roots = 2 * math.sqrt(0.125) + 0.25
    assert float(RenyiSum(0.5).values(logp, logq)) == pytest.approx(math.log(roots))
    assert FORWARD_KL.gradient(logp, logq, FORWARD_KL.values(logp, logq)).tolist() == [[0.25, 0.0, -0.25]]
    third = math.log(2) / 4  # the KL, by which each word's log(p / q), log 2, 0 and -log 2, is compared
    expected = [0.5 * (math.log(2) - third), -0.25 * third, 0.25 * (-math.log(2) - third)]
    assert REVERSE_KL.gradient(logp, logq, REVERSE_KL.values(logp, logq))[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("asked", ASKED)
def test_gradients_are_those_of_the_values(asked):
    logits, logq = drawn(5, VOCAB).mul_(3).requires_grad_(), drawn(5, VOCAB, seed=1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    values, weights = asked.values(logp.clone(), logq), drawn(5, seed=2)
    plain = {
        FORWARD_KL: (logq.exp() * (logq - logp)).sum(-1),
        REVERSE_KL: (logp.exp() * (logp - logq)).sum(-1),
        RenyiSum(1.3): (1.3 * logp - 0.3 * logq).exp().sum(-1).log(),
        RenyiSum(0.6): (0.6 * logp + 0.4 * logq).exp().sum(-1).log(),
    }[asked]
    torch.testing.assert_close(values, plain, atol=1e-12, rtol=1e-12)
    (want,) = torch.autograd.grad(plain @ weights, logits)
    got = asked.gradient(logp.detach(), logq, values.detach()) * weights[:, None]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_a_small_kl_keeps_its_digits_in_float32():
    """Logits that differ by 1e-3: the KL is half their variance under p, about 5e-7, of entropies of 10 nats."""
    logits, change = drawn(50_000)[None], drawn(50_000, seed=1)[None]
    exact = [(logits + x).log_softmax(-1) for x in (0, 1e-3 * change)]
    wanted = float(REVERSE_KL.values(*exact))
    assert wanted == pytest.approx(0.5e-6, rel=0.1)
    got = REVERSE_KL.values(*(logp.float() for logp in exact)), FORWARD_KL.values(*(logp.float() for logp in exact))
    assert [float(value) for value in got] == pytest.approx([wanted] * 2, rel=0.2)


# --- of a pack, in chunks


def beside(num_tokens, bias, scale, softcap):
    """The policy's hidden states and head as leaves, and the same of a reference with a head of its own."""
    leaves = [drawn(num_tokens, HIDDEN), drawn(VOCAB, HIDDEN, seed=1), *([drawn(VOCAB, seed=2)] if bias else [])]
    theirs = Head(drawn(VOCAB, HIDDEN + 2, seed=3), None, 0.7, 2.5)
    head = Head(leaves[1], leaves[2] if bias else None, scale, softcap)
    return [leaf.requires_grad_() for leaf in leaves], head, NextTokens(drawn(num_tokens, HIDDEN + 2, seed=4), theirs)


def of_logits(head, hidden):
    full = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return (full if head.softcap is None else head.softcap * torch.tanh(full / head.softcap)).log_softmax(-1)


def some_loss(outputs):
    """Of every number that is told, the last of them held fixed, each response on its own."""
    sums = outputs.divergences
    weights = torch.sigmoid(outputs.sums * sums[FORWARD_KL]) + sums[RenyiSum(1.3)].cos() * sums[RenyiSum(0.6)].detach()
    return (weights * sums[REVERSE_KL]).sum() + outputs.token_logps.square().sum()


@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
@settings(max_examples=20, deadline=None)
@given(layout=LAYOUTS, tokens_per_chunk=st.integers(1, 40))
def test_fused_equals_full_logits(bias, scale, softcap, layout, tokens_per_chunk):
    batch = collate(random_groups(layout, vocab=VOCAB))
    inputs, head, theirs = beside(len(batch.target_ids), bias, scale, softcap)
    view = BesideReference(torch.nn.Identity(), theirs, ASKED)

    logp, logq = of_logits(head, inputs[0]), of_logits(theirs.head, theirs.hidden)
    tokens = logp.gather(1, batch.target_ids[:, None]).squeeze(1)
    plain = [tokens, (logq.exp() * (logq - logp)).sum(-1), (logp.exp() * (logp - logq)).sum(-1)]
    plain += [(a * logp + (1 - a) * logq).exp().sum(-1).log() for a in (1.3, 0.6)]
    (whole,) = batch.spans(len(batch.target_ids))
    want = some_loss(view.told(plain, batch, whole))
    want_gradients = torch.autograd.grad(0.3 * want, inputs)

    before, logps.CHUNK_LOGITS = logps.CHUNK_LOGITS, tokens_per_chunk * VOCAB
    try:
        arguments = (inputs[0], head.weight, head.bias, head, batch, lambda part, span: some_loss(part), view)
        got, *values = logps.FusedLoss.apply(*arguments)
        got_gradients = torch.autograd.grad(0.3 * got, inputs)
    finally:
        logps.CHUNK_LOGITS = before
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    for ours, wanted in zip(values, plain, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-10)
    for ours, wanted in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tokens_per_chunk", [3, 10_000])
def test_with_and_without_gradient_the_numbers_are_the_same(tokens_per_chunk, monkeypatch):
    """Without gradient chunks end anywhere, with it at the borders of groups."""
    model, other = tiny_model(dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64)
    monkeypatch.setattr(logps, "CHUNK_LOGITS", 2 * tokens_per_chunk * model.config.vocab_size)
    batch = collate(random_groups([(5, (4, 7)), (1, (6, 1)), (12, (3, 2, 8))]))
    view = BesideReference(model, next_tokens(other, batch), ASKED)
    outputs = view.outputs(batch)
    _, told = view.loss(batch, lambda part, span: some_loss(part))
    torch.testing.assert_close(told.token_logps, outputs.token_logps)
    torch.testing.assert_close(outputs.sums, response_logps(model, batch).sums)
    torch.testing.assert_close(view.reference.logps(batch).sums, response_logps(other, batch).sums)
    for asked in ASKED:
        torch.testing.assert_close(told.divergences[asked], outputs.divergences[asked])


# --- whose distributions they are


ADAPTERS = {
    "linear layers": {},
    "the head too": {"lora_targets": ["q_proj", "lm_head"]},
    "a head trained whole": {"lora_modules_to_save": ["lm_head"]},
    "a head that came with the adapter": {},  # what was there before stands beside it, see `adapters.py`
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_those_below_an_adapter_are_the_base_models(kind):
    """Whatever of the head is trained; the model is as it was afterwards."""
    batch = collate(random_groups([(5, (4, 7)), (2, (3, 3))]))
    plain, model = tiny_model(), tiny_model()
    AdapterOptions(lora_rank=3, **ADAPTERS[kind]).put_on(model)
    if kind == "a head trained whole":
        with torch.no_grad():
            model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    if kind == "a head that came with the adapter":
        model.lm_head.register_buffer(f"weight{BELOW}", model.lm_head.weight.detach().clone(), persistent=False)
        model.lm_head.weight.data.mul_(1.5)
    disturbed(model)
    before = response_logps(model, batch).sums
    reference = AdapterBase(model, "id", "weights")
    below, expected = reference.next_tokens(batch), next_tokens(plain, batch)
    torch.testing.assert_close(below.log_softmax(slice(0, 9)), expected.log_softmax(slice(0, 9)))
    torch.testing.assert_close(below.logps(batch).sums, reference.logps(batch).sums)
    assert torch.equal(response_logps(model, batch).sums, before)
    assert reference.vocabulary == vocabulary_of(plain) == plain.config.vocab_size
    assert not below.hidden.requires_grad
    assert not below.head.weight.requires_grad


def test_a_reference_in_half_precision_is_close():
    batch = collate(random_groups([(5, (4, 7)), (2, (3, 3))]))
    model, other = tiny_model(), tiny_model(seed=1)
    exact = BesideReference(model, next_tokens(other, batch), (REVERSE_KL,)).outputs(batch)
    half = BesideReference(model, next_tokens(other.bfloat16(), batch), (REVERSE_KL,)).outputs(batch)
    assert half.divergences[REVERSE_KL].dtype == torch.float64
    torch.testing.assert_close(half.divergences[REVERSE_KL], exact.divergences[REVERSE_KL], rtol=0.05, atol=0.05)


def test_half_precision_computes_divergences_in_float32():
    """Under autocast, as on CUDA: products in bfloat16, everything of the vocabulary in float32."""
    model, other = tiny_model(), tiny_model(seed=1)
    batch, found = collate(random_groups([(5, (4, 7)), (2, (3, 3))])), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
            view = BesideReference(model, next_tokens(other, batch), ASKED)
            loss, told = view.loss(batch, lambda part, span: part.divergences[FORWARD_KL].sum() - part.sums.sum())
            outputs = view.outputs(batch)
        loss.backward()
        found.append((told, torch.cat([p.grad.flatten() for p in model.parameters()])))
        model.zero_grad()
        assert view.reference.hidden.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert told.token_logps.dtype == torch.float32
        for asked in ASKED:
            torch.testing.assert_close(outputs.divergences[asked], told.divergences[asked], rtol=1e-3, atol=1e-3)
    (exact, gradient), (half, half_gradient) = found
    for asked in ASKED:
        torch.testing.assert_close(half.divergences[asked], exact.divergences[asked], rtol=0.05, atol=0.05)
    assert (half_gradient - gradient).norm() < 0.05 * gradient.norm()


def test_nothing_is_measured_between_equal_models():
    """Exactly 0, value and gradient."""
    model, batch = tiny_model(), collate(random_groups([(5, (4, 7)), (2, (3, 3))]))
    view = BesideReference(model, next_tokens(tiny_model(), batch), (FORWARD_KL, REVERSE_KL))
    loss, told = view.loss(
        batch,
        lambda part, span: (part.divergences[FORWARD_KL] + part.divergences[REVERSE_KL]).sum() + 0 * part.sums.sum(),
    )
    loss.backward()
    assert loss.item() == 0
    assert told.divergences[FORWARD_KL].abs().max() == 0
    assert all(parameter.grad is None or parameter.grad.abs().max() == 0 for parameter in model.parameters())


# --- memory


def peak_of(step):
    """Bytes that torch's allocator gave out at most, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_no_tensor_of_tokens_by_vocabulary_is_made(monkeypatch):
    """10 groups of 30 response tokens over 20,011 words: 24 MB of float32 logits of a model in all, where as many may
    be alive as four groups have. In chunks of one group they are five tensors; then there is the head's gradient."""
    vocabulary, asked = 20_011, (FORWARD_KL, REVERSE_KL)
    model, other = (tiny_model(seed=seed, vocab_size=vocabulary) for seed in (0, 1))
    batch = collate(random_groups([(3, (15, 15))] * 10))
    monkeypatch.setattr(logps, "CHUNK_LOGITS", 4 * 30 * vocabulary)
    chunk, head = 4 * 30 * vocabulary, model.lm_head.weight.nbytes

    def step():
        view = BesideReference(model, next_tokens(other, batch), asked)
        view.loss(batch, lambda part, span: sum(part.divergences.sums.values()).sum() + part.sums.sum())

    @torch.no_grad()
    def without_gradient():
        BesideReference(model, next_tokens(other, batch), asked).outputs(batch)

    assert peak_of(without_gradient) < 5 * chunk
    assert peak_of(step) < 6 * chunk + 2 * head < 10 * chunk
