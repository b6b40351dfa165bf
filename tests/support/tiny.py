"""Tiny random models and random packs, small enough to check by brute force."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ref.data.packing import Pass, Share
from dpo_ref.models.attention import register
from dpo_ref.models.loading import Policy
from dpo_ref.types import TokenGroup

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(model_type: str = "llama", seed: int = 0, backend: str = "sdpa", dtype=torch.float32, **options):
    """A random model of any architecture with weights large enough that mistakes show."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SHAPE | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    model.set_attn_implementation(register(backend))
    return model


def random_groups(layout, seed: int = 0, vocab: int = VOCAB) -> list[TokenGroup]:
    """Groups with the given (prompt length, response lengths), tokens at random, pairs (0, 1), (1, 2), ..."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randint(3, vocab, (size,), generator=generator).tolist()

    return [
        TokenGroup(
            group_index=index,
            group_id=f"{seed:016x}{index:016x}",
            prompt_ids=draw(prompt),
            response_ids=tuple(draw(size) for size in responses),
            num_bytes=tuple(3 * size for size in responses),
            pairs=tuple((i, i + 1) for i in range(len(responses) - 1)),
        )
        for index, (prompt, responses) in enumerate(layout)
    ]


def naive_logps(model: nn.Module, group: TokenGroup) -> list[torch.Tensor]:
    """Each response's token log-probs alone: unpacked, full logits, transformers' own
    attention."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager" if model.config.model_type == "gemma2" else "sdpa")
    values = []
    for response in group.response_ids:
        ids = torch.tensor([[*group.prompt_ids, *response]])
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        start = len(group.prompt_ids) - 1
        values.append(logps[start:-1].gather(1, ids[0, start + 1 :, None]).squeeze(1))
    model.set_attn_implementation(used)
    return values


def disturbed(model):
    """The model with its adapter away from zero."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def policy_of(model: nn.Module, tokenizer=None, text_identity: str | None = None) -> Policy:
    """A model at hand as what training and references take; what its text is may be said, where that is not read off
    a tokenizer."""
    policy = Policy(lambda: model, tokenizer)
    if text_identity is not None:
        vars(policy)["text_identity"] = text_identity
    return policy


def shared(packs) -> Share:
    """What one rank of one does of these packs."""
    packs = list(packs)
    return Share([group for groups in packs for group in groups], [Pass(groups) for groups in packs], len(packs), 1.0)
