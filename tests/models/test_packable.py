"""Architectures that can be packed are recognised, and those that cannot run one response at a time, with a reason."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ref.data.packing import collate
from dpo_ref.generation.sampling import decoding_mode
from dpo_ref.models import logps
from dpo_ref.models.attention import REGISTERED
from dpo_ref.models.logps import response_logps
from dpo_ref.models.packable import install
from tests.support.quick import only
from tests.support.tiny import SHAPE, naive_logps, random_groups, tiny_model

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = {"head_dim": 8, "sliding_window": 5}
LAYOUT = ((9, (13, 11)), (1, (5, 8)), (17, (1, 4)))
PACKABLE = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "olmo2": {},
    "stablelm": {},  # its attention layers are handed nothing but the mask
    "nemotron": {},
    "gpt2": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    "mixtral": {"num_local_experts": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
}
REFUSED = {
    "bloom": ({}, "keeps its own attention"),
    "gptj": (GPT | {"rotary_dim": 4}, "keeps its own attention"),
    "mamba": ({}, "0 of its 2 layers are attention"),
    "falcon_h1": ({}, "responses see each other"),
    "doge": ({"keep_window_size": 64}, "computes with the mask itself"),
    "qwen2_moe": (
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 3, "num_experts": 4},
        "hide tokens that its attention layers are not told about",
    ),
}


def made(model_type, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SHAPE | options))
    return AutoModelForCausalLM.from_config(config).eval()


def compare(model):
    groups = random_groups(LAYOUT)
    with torch.no_grad():
        token_logps = response_logps(model, collate(groups)).token_logps
        alone = torch.cat([value for group in groups for value in naive_logps(model, group)])
    torch.testing.assert_close(token_logps, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packable(model_type):
    model = made(model_type, **PACKABLE[model_type])
    native = model.config._attn_implementation
    assert install(model, "sdpa") is None
    assert model.config._attn_implementation == REGISTERED["sdpa"]
    with decoding_mode(model):
        assert model.config._attn_implementation == native
    assert model.config._attn_implementation == REGISTERED["sdpa"]
    if model_type != "gpt_oss":  # its own eager attention has no plain path to compare with here
        compare(model)


@pytest.mark.parametrize("model_type", only(REFUSED, *REFUSED.keys() - {"falcon_h1"}))  # ten seconds
def test_refused_with_a_reason_and_run_separately(model_type):
    options, reason = REFUSED[model_type]
    model = made(model_type, **options)
    native = model.config._attn_implementation
    assert reason in install(model, "sdpa")
    assert model.config._attn_implementation == native
    groups = random_groups(LAYOUT)
    with torch.no_grad():
        token_logps = response_logps(model, collate(groups)).token_logps
        for group, values in zip(
            groups, token_logps.split([sum(map(len, g.response_ids)) for g in groups]), strict=True
        ):
            ids = torch.tensor([[*group.prompt_ids, *group.response_ids[0]]])
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            size, start = len(group.response_ids[0]), len(group.prompt_ids) - 1
            want = logps[start:-1].gather(1, ids[0, start + 1 :, None]).squeeze(1)
            torch.testing.assert_close(values[:size], want, atol=2e-5, rtol=1e-5)


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4
    },
    "original_max_position_embeddings": 21,  # LAYOUT's longest sequence has 22 tokens, all others at most 21
}  # fmt: skip


def test_positions_that_depend_on_the_longest_sequence(monkeypatch):
    """A pack with a sequence beyond the original length runs one response at a time; as one pack it would be wrong."""
    assert install(made("phi3", **LONGROPE), "sdpa") is None
    model = tiny_model("phi3", **LONGROPE)
    compare(model)
    monkeypatch.setattr(logps, "_within_reach", lambda *_: True)
    with pytest.raises(AssertionError, match="not close"):
        compare(model)


def test_positions_that_depend_on_what_came_before():
    """Packed as far as they do not, refused beyond."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = made("llama", rope_parameters=dynamic, max_position_embeddings=22)
    assert install(model, "sdpa") is None
    compare(model)
    model.config.max_position_embeddings = 21
    with pytest.raises(ValueError, match=r"beyond 21 tokens .* a sequence has 22; use data.max_length=21"):
        compare(model)
