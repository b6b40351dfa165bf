"""Fresh adapters: with every option the policy begins as the model, and what is saved computes what was trained."""

import re

import pytest
import torch
from torch import nn

from dpo_ref.cli import resolve
from dpo_ref.component import configuration
from dpo_ref.data.packing import collate
from dpo_ref.models.adapters import STARTS, adapter_off, copy_of_trained, merge, save_adapter
from dpo_ref.models.checkpoint import base_digest, weights_digest
from dpo_ref.models.frozen import hold_in_bfloat16
from dpo_ref.models.loading import load_model
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions, held_in, trained_summary
from tests.support.adapters import EXPERTS, GPT2, load_base, load_with_peft, save_base
from tests.support.command import ROOT, composed
from tests.support.tiny import naive_logps, policy_of, random_groups, tiny_model

GROUPS = random_groups([(4, (3, 5)), (2, (1, 4))])
BATCH = collate(GROUPS)

OPTIONS = {
    "rank alone": ({}, {}),
    "named targets": ({}, {"lora_targets": ["q_proj", "down_proj"], "lora_alpha": 3.0}),
    "one name": ({}, {"lora_targets": "v_proj"}),
    "a regular expression": ({}, {"lora_targets": r"model\.layers\.1\..*_proj"}),
    "head and embedding": ({"tie_word_embeddings": True}, {"lora_targets": ["lm_head", "embed_tokens"]}),
    "patterns": ({}, {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"layers.0.*": 9.0}}),
    "rank-stabilised": ({}, {"lora_rslora": True}),
    "DoRA": ({}, {"lora_dora": True}),
    "gaussian": ({}, {"lora_init": "gaussian"}),
    "PiSSA": ({}, {"lora_init": "pissa", "lora_rank_pattern": {"q_proj": 2}}),
    "PiSSA, rank-stabilised": ({}, {"lora_init": "pissa", "lora_rslora": True}),
    "OLoRA": ({}, {"lora_init": "olora", "lora_alpha_pattern": {"q_proj": 2.0}}),
    "PiSSA on GPT-2": (GPT2, {"lora_init": "pissa", "lora_targets": ["c_attn"]}),
    "OLoRA on GPT-2": (GPT2, {"lora_init": "olora", "lora_targets": ["c_attn"]}),
    "whole modules": ({}, {"lora_modules_to_save": ["norm", "lm_head"]}),
    "experts": (EXPERTS | {"kind": "mixtral"}, {"lora_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"]}),
}  # fmt: skip


def ours(folder):
    return load_model(str(folder), torch.device("cpu"), "auto").model


def sums(model):
    return torch.stack([values.sum() for group in GROUPS for values in naive_logps(model.eval(), group)]).double()


@pytest.mark.parametrize("case", OPTIONS)
def test_the_policy_begins_as_the_model_and_ends_as_what_is_saved(case, tmp_path):
    base_options, options = OPTIONS[case]
    base = save_base(tmp_path / "base", **base_options)
    model = ours(base)
    weights, below = weights_digest(model), response_logps(model, BATCH).sums.detach()
    layers = AdapterOptions(lora_rank=4, **options).put_on(model)
    assert weights_digest(model) == weights
    torch.testing.assert_close(response_logps(model, BATCH).sums.detach(), below, atol=1e-5, rtol=0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
        trained = response_logps(model, BATCH).sums
        assert (trained - below).abs().max() > 0.01
        with adapter_off(model):
            torch.testing.assert_close(response_logps(model, BATCH).sums, below, atol=1e-5, rtol=0)
        merge(model).save_pretrained(tmp_path / "policy")
        save_adapter(layers, tmp_path / "adapter")
        torch.testing.assert_close(sums(load_base(tmp_path / "policy")), trained, atol=1e-4, rtol=0)
        again = load_with_peft(base, tmp_path / "adapter").get_base_model()
        torch.testing.assert_close(sums(again), trained, atol=1e-4, rtol=0)


def test_pissa_trains_the_principal_part():
    """s B A is the best approximation of this rank: what is left of W has its smaller singular values."""
    linear = nn.Sequential(nn.Linear(6, 5, bias=False))
    values = torch.linalg.svdvals(linear[0].weight)
    a, b = STARTS["pissa"](linear[0].weight.detach(), 2, 0.5)
    left = torch.linalg.svdvals(linear[0].weight - 0.5 * b @ a)
    torch.testing.assert_close(left[:3], values[2:], atol=1e-5, rtol=0)


def test_a_copy_shares_what_is_not_trained():
    model = tiny_model()
    AdapterOptions(lora_rank=2).put_on(model)
    theirs = dict(copy_of_trained(model).named_parameters())
    for name, weight in model.named_parameters():
        assert (weight is theirs[name]) == (".lora_" not in name)


def test_what_is_trained_is_said():
    model = tiny_model("mixtral", tie_word_embeddings=False, **EXPERTS)
    AdapterOptions(lora_rank=2, lora_targets=["q_proj", "v_proj"], lora_modules_to_save=["norm"]).put_on(model)
    trained, frozen = trained_summary(model)
    count = 2 * (2 * (32 + 32) + 2 * (32 + 16)) + 5 * 32  # A and B on 32 x 32 and 32 x 16 in two layers, five norms
    norms = "the whole of input_layernorm (2), post_attention_layernorm (2), norm"
    assert trained.startswith(f"trained: rank 2 on q_proj (2), v_proj (2); {norms}: {count} weights beside ")
    reach = "model.lora_parameters=[mlp.experts.down_proj,mlp.experts.gate_up_proj]"
    experts = 2 * 4 * (2 * 48 * 32 + 48 * 32)
    assert frozen == (
        f"not trained: the experts, {experts:,} weights that are no layers ({reach} trains them); the router; "
        "embedding and head"
    )


REFUSED = {
    "a misspelt target": ({"lora_targets": ["q_prj"]}, "model.lora_targets: q_prj matches nothing .*mean q_proj"),
    "a target that is no layer": ({"lora_targets": ["self_attn"]}, "model.lora_targets: self_attn matches nothing"),
    "a pattern without effect": ({"lora_rank_pattern": {"w_q": 2}}, "model.lora_rank_pattern: w_q matches nothing"),
    "no such experts": ({"lora_parameters": ["experts.down"]}, "lora_parameters: .* this model has none"),
    "no such module": ({"lora_modules_to_save": ["lm_heads"]}, "lora_modules_to_save: lm_heads .* mean lm_head"),
    "a regular expression of nothing": ({"lora_targets": ".*q_prj$"}, r"lora_targets=.* matches no layer; .* such as"),
    "no regular expression": ({"lora_targets": "(q_proj"}, "is no regular expression"),
    "a rank too large": (
        {"lora_rank": 20},
        r"model.lora_rank: 20 is larger than the smaller side of model.layers.0.self_attn.k_proj, 32 x 16",
    ),
    "PiSSA of an embedding": ({"lora_init": "pissa", "lora_targets": ["embed_tokens"]}, "model.lora_init=pissa: .*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_a_model(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        AdapterOptions(**({"lora_rank": 4} | options)).put_on(ours(save_base(tmp_path / "base")))


AT_COMPOSE_TIME = {
    "dropout": (["model.lora_rank=2", "model.lora_dropout=0.1"], "model.lora_dropout=0.1: dropout is noise in every"),
    "DoRA alone": (["model.lora_dora=true"], "model.lora_dora=True has no effect without model.lora_rank"),
    "targets beside an adapter": (["model.adapter=x", "model.lora_targets=q_proj"], "leave model.lora_targets out"),
    "PiSSA with DoRA": (["model.lora_rank=2", "model.lora_dora=true", "model.lora_init=pissa"], "lora_init=pissa out"),
    "an unknown start": (["model.lora_rank=2", "model.lora_init=eva"], "model.lora_init=eva is none of default, "),
    "rank of nothing": (["model.lora_rank=0"], "model.lora_rank=0 must be at least 1; null trains all weights"),
    "weights that are trained": (
        ["model.weights=bfloat16"],
        "model.weights=bfloat16 is for weights that are not trained",
    ),
    "half a rank": (["model.lora_rank=2", "model.lora_rank_pattern={q_proj: 1.5}"], "lora_rank_pattern.q_proj=1.5 is"),
}


@pytest.mark.parametrize("case", AT_COMPOSE_TIME)
def test_refused_at_compose_time(case):
    overrides, message = AT_COMPOSE_TIME[case]
    cfg, choices = composed(*overrides)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)


# --- the weights below in less memory


def test_quantised_weights_need_cuda():
    with pytest.raises(ValueError, match=r"model.weights=nf4 needs a CUDA device; write float32 or bfloat16"):
        held_in("nf4", torch.device("cpu"))


@pytest.mark.parametrize("case", ["rank alone", "head and embedding", "DoRA", "PiSSA", "whole modules", "experts"])
def test_weights_below_in_bfloat16_compute_in_float32(case, tmp_path):
    """As float32 weights of the same values do, with their identity; the adapter learns in float32."""
    base_options, options = OPTIONS[case]
    base = save_base(tmp_path / "base", **base_options)
    rounded = load_base(base)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            layer.weight.data = layer.weight.data.bfloat16().float()
    rounded.save_pretrained(tmp_path / "rounded")
    held, plain = ours(tmp_path / "rounded"), ours(tmp_path / "rounded")
    hold_in_bfloat16(held)
    sizes = [sum(weight.nbytes for weight in model.parameters()) for model in (held, plain)]
    assert sizes[0] < (0.95 if case == "experts" else 0.6) * sizes[1]
    assert weights_digest(held) == weights_digest(plain)
    gradients = []
    for model in (held, plain):
        torch.manual_seed(0)
        AdapterOptions(lora_rank=4, **options).put_on(model)
        assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = torch.sin(torch.arange(weight.numel()).float()).reshape(weight.shape) / 10
        loss, _ = policy_of(model).loss(BATCH, lambda outputs, span: -outputs.sums.sum())
        loss.backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.requires_grad})
    assert base_digest(held) == base_digest(plain)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        trained = response_logps(held, BATCH).sums
        torch.testing.assert_close(trained, response_logps(plain, BATCH).sums, atol=1e-4, rtol=0)
        merge(held).save_pretrained(tmp_path / "policy")
        torch.testing.assert_close(sums(load_base(tmp_path / "policy")), trained, atol=1e-4, rtol=0)


def test_the_page_lists_every_option_with_its_default():
    page = (ROOT / "docs" / "adapters.md").read_text()
    rows = re.findall(r"^\| `model\.(\w+)` \| `([\w.-]+)` \|", page, re.MULTILINE)
    words = {"None": "null", "False": "false"}
    defaults = {name: option.default for name, option in configuration(AdapterOptions).items()}
    assert dict(rows) == {name: words.get(str(value), str(value)) for name, value in defaults.items()}
