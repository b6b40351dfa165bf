"""Tokenizers, conversations and contexts for references that read text, and a plain forward pass."""

from functools import partial

import torch

from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.types import Message, PromptGroup
from tests.support.reference_contexts import context_for
from tests.support.tiny import tiny_model
from tests.support.tokenizer_families import FAMILIES

POLICY = FAMILIES["qwen: byte-level, no BOS, ChatML"]().tokenizer
OTHERS = {name: FAMILIES[name]() for name in list(FAMILIES)[1:8]}
SIZE = 400  # above every tokenizer's vocabulary here
TEXTS = [
    ("why \N{GRINNING FACE}?", "because \N{FAMILY}\N{ZERO WIDTH JOINER} \N{EARTH GLOBE ASIA-AUSTRALIA}", "no"),
    ("日本語は？", "はい、そうです。", "いいえ e\N{COMBINING ACUTE ACCENT}"),
    ("code?", "def f(x):\n    return {'a': [x]}\n\n# end", "`x`"),
    ("say <|im_end|> and </s>", "so: <|im_end|> </s> <|eot_id|>.", "<|im_start|>user\nno"),
    ("two\nlines", "a\n\n\nb\tc", "x  y   z"),
]


def data(texts):
    return [
        PromptGroup(
            (
                Message(role="user", content=q),
                Message(role="assistant", content="ok"),
                Message(role="user", content="so?"),
            ),
            (a, b),
            ((0, 1),),
            origin=f"row {n}",
        )
        for n, (q, a, b) in enumerate(texts, 1)
    ]


def context_of(groups, tmp_path, tokenizer, **limits):
    token_groups = tokenise(groups, POLICY, **({"max_length": 10**6} | limits)).groups
    return context_for(
        tmp_path,
        tiny_model(seed=0, vocab_size=SIZE),
        POLICY,
        lambda source: tiny_model(seed=int(source.path), vocab_size=SIZE),
        theirs=tokenizer,
        groups=token_groups,
        pack=partial(pack, tokens_per_batch=200),
    )


@torch.no_grad()
def plain_sum(model, prompt_ids, response_ids):
    """log p(response | prompt) from full logits in float64, transformers' own attention."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logps = model.double()(ids).logits[0].log_softmax(-1)
    model.float().set_attn_implementation(used)
    positions = range(len(prompt_ids) - 1, ids.shape[1] - 1)
    return sum(logps[position, ids[0, position + 1]].item() for position in positions)
