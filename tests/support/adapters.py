"""Adapters as others make them: tiny ones of every kind, saved by peft, moved away from where they start."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.tiny import tiny_model

STARTS_AT_REST = ("lora_B", "lora_embedding_A", "modules_to_save", "magnitude", "trainable_tokens", "bias")
TIED = {"tie_word_embeddings": True}
GPT2 = TIED | {"kind": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def save_base(folder, kind="llama", **options):
    """A model folder; tied or not as `tie_word_embeddings` says."""
    model = tiny_model(kind, **({"tie_word_embeddings": False} | options))
    model.set_attn_implementation("eager")
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def load_base(folder):
    """The model of a folder, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_with_peft(base, adapter, **options):
    """The model of a folder with a saved adapter, by transformers and peft alone."""
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(load_base(base), adapter, **options)


def save_adapter(folder, base, config=None, at_rest=False, **options):
    """An adapter of the model in `base`, as peft saves it: one that has learnt something, or a fresh one."""
    usual = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        model = get_peft_model(load_base(base), config or LoraConfig(**(usual | options)))
        for name, weight in model.named_parameters():
            if weight.requires_grad and not at_rest and any(part in name for part in STARTS_AT_REST):
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder)
    return folder


# What `save_base` and `save_adapter` are told; each kind is computed, trained, merged and saved again exactly.
KINDS = {
    "plain": ({}, {}),
    "on the head": ({}, {"target_modules": ["q_proj", "lm_head"]}),
    "on a tied head": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "on the embedding": ({}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "on a tied embedding": (TIED, {"target_modules": ["embed_tokens"]}),
    "on both, tied": (TIED, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA": ({}, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA on the head": ({}, {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}),
    "whole modules": ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole modules, tied": (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "a whole head, tied": (TIED, {"modules_to_save": ["lm_head"]}),
    "a whole norm": ({}, {"modules_to_save": ["norm"]}),
    "some tokens": ({}, {"trainable_token_indices": {"embed_tokens": [5, 6, 7]}}),
    "some tokens, tied": (TIED, {"trainable_token_indices": [5, 6, 7]}),
    "biases of its layers": ({"attention_bias": True}, {"bias": "lora_only"}),
    "all biases": ({"attention_bias": True}, {"bias": "all"}),
    "biases of its own": ({"attention_bias": True}, {"lora_bias": True}),
    "patterns": ({}, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}),
    "rank-stabilised": ({}, {"use_rslora": True}),
    "some layers": ({}, {"layers_to_transform": [1]}),
    "a regular expression": ({}, {"target_modules": r".*\.0\..*_proj"}),
    "excluded modules": ({}, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "PiSSA": ({}, {"init_lora_weights": "pissa"}),
    "OLoRA": ({}, {"init_lora_weights": "olora", "use_rslora": True}),
    "orthogonal": ({}, {"init_lora_weights": "orthogonal"}),
    "GPT-2": (GPT2, {"target_modules": ["c_attn", "c_proj"]}),
    "GPT-2 with DoRA": (GPT2, {"target_modules": ["c_attn"], "use_dora": True}),
    "experts": ({"kind": "mixtral"} | EXPERTS, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
}  # fmt: skip
