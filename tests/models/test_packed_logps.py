"""Packed, prompt-shared, chunked log-probs equal each response scored alone with full logits."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_ref.data.packing import collate
from dpo_ref.models import attention, logps
from tests.support.tiny import naive_logps, random_groups, tiny_model

SHORT = ((5, (4, 7)), (1, (6, 1)), (12, (3, 2, 8)), (9, (11,)))
LONG = ((150, (60, 90)), (1, (220, 1)), (30, (40,)))
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "phi": {},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
}


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def both_ways(model, groups):
    """(values, gradients) of a weighted sum of token log-probs, packed and one at a time."""
    weights = torch.linspace(-1, 1, sum(len(r) for g in groups for r in g.response_ids), dtype=torch.float64)
    packed = logps.response_logps(model, collate(groups)).token_logps
    (packed.double() * weights).sum().backward()
    packed_gradients = gradients(model)
    model.zero_grad()
    alone = torch.cat([value for group in groups for value in naive_logps(model, group)])
    (alone.double() * weights).sum().backward()
    return packed, alone, packed_gradients, gradients(model)


@pytest.mark.parametrize("layout", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_equals_alone(model_type, layout):
    model = tiny_model(model_type, **ARCHITECTURES[model_type])
    packed, alone, packed_gradients, alone_gradients = both_ways(model, random_groups(layout))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert (packed_gradients - alone_gradients).norm() <= 1e-5 * alone_gradients.norm()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_float64_to_1e_9(backend):
    """GPT-NeoX computes nothing in float32 inside, so the layout's own error shows."""
    model = tiny_model("gpt_neox", backend=backend, dtype=torch.float64)
    packed, alone, packed_gradients, alone_gradients = both_ways(model, random_groups(SHORT))
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=1e-10)
    assert (packed_gradients - alone_gradients).norm() <= 1e-9 * alone_gradients.norm()


def test_varlen_layout_with_a_kernel_written_out():
    """The layout handed to FlashAttention, checked with a bottom-right causal kernel in plain torch."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window):
        runs = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
        outputs = []
        for q0, q1, k0, k1 in runs:
            assert q1 - q0 <= max_q
            assert k1 - k0 <= max_k
            scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * scaling
            shift = (k1 - k0) - (q1 - q0)
            distance = torch.arange(q1 - q0)[:, None] + shift - torch.arange(k1 - k0)[None]
            hidden = (distance < 0) | (distance >= (window or 10**6))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[k0:k1]))
        return torch.cat(outputs)

    packed = attention.PackedLayout(SHORT, torch.device("cpu"))
    total = sum(prompt + sum(responses) for prompt, responses in SHORT)
    q, k, v = torch.randn(3, 1, 2, total, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for window in (None, 4):
        expected = attention._dense(attention._sdpa, q, k, v, packed, window, 0.3)
        torch.testing.assert_close(attention.run_varlen(kernel, q, k, v, packed, window, 0.3), expected)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attend", [attention._sdpa, attention._formula(None, None)], ids=["sdpa", "formula"])
def test_a_short_group_in_one_call_is_what_its_pieces_are(monkeypatch, attend, window):
    total = sum(prompt + sum(responses) for prompt, responses in SHORT)
    states = torch.randn(3, 1, 2, total, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for limit, num_calls in ((attention.SHORT, len(SHORT)), (0, sum(len(responses) for _, responses in SHORT))):
        monkeypatch.setattr(attention, "SHORT", limit)
        packed = attention.PackedLayout(SHORT, torch.device("cpu"))
        assert len(packed.runs) == num_calls
        leaf = states.clone().requires_grad_()
        out = attention._dense(attend, *leaf, packed, window, 0.3)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for whole, by_piece in zip(*outcomes, strict=True):
        torch.testing.assert_close(whole, by_piece, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("heads", [(2, 2, 8), (4, 2, 8), (2, 2, 6)], ids=["each", "grouped", "narrow values"])
@pytest.mark.parametrize("window", [None, 4])
def test_long_responses_go_without_a_large_mask_as_under_one(monkeypatch, window, heads):
    """Narrow values are what the kernel does not take."""
    num_queries, num_keys, of_values = heads
    total = sum(prompt + sum(responses) for prompt, responses in SHORT)
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, 8), (num_keys, 8), (num_keys, of_values))
    states = [torch.randn(1, h, total, d, dtype=torch.float64, generator=generator) for h, d in sizes]
    monkeypatch.setattr(attention, "SHORT", 0)
    outcomes, largest = [], []
    for limit in (attention.LARGEST_MASK, 0):
        monkeypatch.setattr(attention, "LARGEST_MASK", limit)
        packed = attention.PackedLayout(SHORT, torch.device("cpu"))
        leaves = [leaf.clone().requires_grad_() for leaf in states]
        out = attention._dense(attention._sdpa, *leaves, packed, window, 0.3)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        largest.append(max((mask.numel() for mask in packed._masks.values()), default=0))
    for masked, without in zip(*outcomes, strict=True):
        torch.testing.assert_close(masked, without, atol=1e-12, rtol=1e-12)
    assert largest[1] <= (0 if window is None else 2 * window**2) < largest[0]


def test_changing_one_response_leaves_the_others_untouched():
    model = tiny_model()
    groups = random_groups(SHORT)
    before = logps.response_logps(model, collate(groups)).token_logps
    changed = random_groups(SHORT, seed=1)
    mixed = type(groups[0])(
        0, "x", groups[0].prompt_ids, (changed[0].response_ids[0], groups[0].response_ids[1]), (1, 1), ((0, 1),)
    )
    after = logps.response_logps(model, collate([mixed, *groups[1:]])).token_logps
    torch.testing.assert_close(before[4:], after[4:], atol=1e-6, rtol=0)
    assert (before[:4] - after[:4]).abs().max() > 1e-2


def test_hidden_states_are_kept_where_that_is_said_and_there_is_room(monkeypatch):
    model, other = tiny_model(), tiny_model(seed=1)
    batch, longer = collate(random_groups(SHORT)), collate(random_groups(LONG))
    passes = []
    for asked in (model, other):
        asked.base_model.register_forward_hook(lambda *_: passes.append(0))

    @torch.no_grad()
    def num_passes(*questions):
        passes.clear()
        answers = [logps.response_hidden(*question) for question in questions]
        return len(passes), answers

    plain = num_passes((model, batch), (model, batch), (other, batch))
    with logps.hidden_states_kept():
        kept = num_passes((model, batch), (model, batch), (other, batch))
        assert num_passes((model, longer), (model, batch), (model, longer))[0] == 1
        assert not torch.equal(
            logps.hidden_at(model, batch, batch.head_index[:3], batch.response_index[:3]), kept[1][2][:3]
        )
    assert (plain[0], kept[0]) == (3, 2)
    assert all(map(torch.equal, plain[1], kept[1]))
    assert num_passes((model, batch))[0] == 1
    monkeypatch.setattr(logps, "KEPT_BYTES", kept[1][0].nbytes)
    with logps.hidden_states_kept():
        assert num_passes((model, batch), (model, longer), (model, longer), (model, batch))[0] == 3


@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 3.0)])
def test_chunked_head_equals_full_logits(monkeypatch, bias, scale, softcap):
    rows, hidden_size, vocab = 13, 7, 29
    monkeypatch.setattr(logps, "CHUNK_LOGITS", 5 * vocab)
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)  # noqa: E731
    hidden, weight, bias_v = make(rows, hidden_size), make(vocab, hidden_size), make(vocab) if bias else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    leaves = [leaf for leaf in (hidden, weight, bias_v) if leaf is not None]
    outer = torch.randn(rows, dtype=torch.float64, generator=generator)

    got = logps.token_logps(hidden, logps.Head(weight, bias_v, scale, softcap), targets)
    full = torch.nn.functional.linear(hidden, weight, bias_v) * scale
    full = full if softcap is None else softcap * torch.tanh(full / softcap)
    want = full.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got_gradients = torch.autograd.grad(got @ outer, leaves)
    want_gradients = torch.autograd.grad(want @ outer, leaves)
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_entropy_comes_from_the_same_pass(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_LOGITS", 5 * 29)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7, dtype=torch.float64, generator=generator) for n in (13, 29))
    targets = torch.randint(29, (13,), generator=generator)
    token_logps, entropy = logps.token_logps_and_entropy(hidden, logps.Head(weight), targets)
    full = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(token_logps, full.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))


LAYOUTS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS, window=st.sampled_from([None, 1, 4]))
@example(layout=[(1, (1, 1))], window=None)
@example(layout=[(200, (1, 120))], window=None)
@example(layout=[(1, (150, 1)), (90, (3, 80))], window=4)
def test_any_layout(layout, window):
    """Prompts and responses of one token, huge imbalance, one to four responses, with and without a window."""
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=window)
    groups = random_groups(layout)
    with torch.no_grad():
        packed = logps.response_logps(model, collate(groups)).token_logps
        alone = torch.cat([value for group in groups for value in naive_logps(model, group)])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-6)  # its norms compute in float32


MORE_ARCHITECTURES = {
    "qwen2": {},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mixtral": {"num_local_experts": 2, "sliding_window": 5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": {"pad_token_id": 0, "sliding_window": 5},
    "starcoder2": {"sliding_window": 5},
    "smollm3": {},
    "glm": {"head_dim": 8, "pad_token_id": 0},
    "ministral": {"head_dim": 8, "sliding_window": 5},
}


@pytest.mark.parametrize("model_type", MORE_ARCHITECTURES)
def test_packed_equals_alone_in_more_architectures(model_type):
    model = tiny_model(model_type, **MORE_ARCHITECTURES[model_type])
    packed, alone, packed_gradients, alone_gradients = both_ways(model, random_groups(SHORT))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert (packed_gradients - alone_gradients).norm() <= 1e-5 * alone_gradients.norm()


def test_sums_are_float64_sums_of_their_own_tokens():
    model = tiny_model()
    batch = collate(random_groups(SHORT))
    scored = logps.response_logps(model, batch)
    by_hand = torch.stack([part.double().sum() for part in scored.token_logps.split(batch.lengths.tolist())])
    assert scored.sums.dtype == torch.float64
    torch.testing.assert_close(scored.sums, by_hand)
    pairs = scored.pairs(batch.chosen, batch.rejected)
    torch.testing.assert_close(pairs.chosen, by_hand[[0, 2, 4, 5]])
    torch.testing.assert_close(pairs.rejected, by_hand[[1, 3, 5, 6]])
