"""What references are built from, on tiny models and random groups."""

from functools import partial

import torch

from dpo_ref.data.chat_templates import text_identity
from dpo_ref.data.groups import gathered
from dpo_ref.data.packing import pack
from dpo_ref.references.interface import ReferenceContext
from dpo_ref.types import silent
from tests.support.tiny import random_groups, tiny_model
from tests.support.tokenizers_here import byte_bpe

LAYOUT = ((5, (4, 7)), (1, (6, 1)), (12, (3, 8)), (2, (2, 2)))
TOKENIZER = byte_bpe(bos="<s>")


def context_for(cache, **changes):
    """A context whose policy is `tiny_model(seed=0)` and whose models are numbered by their seeds."""
    options = {
        "policy": tiny_model(seed=0),
        "uses_reference": True,
        "tokenizer": TOKENIZER,
        "load": lambda source: tiny_model(seed=int(source.path)),
        "load_tokenizer": lambda path, revision=None: TOKENIZER,
        "text_identity": text_identity(TOKENIZER),
        "groups": gathered(random_groups(LAYOUT)),
        "pack": partial(pack, tokens_per_batch=25),
        "progress": silent,
        "device": torch.device("cpu"),
        "cache": cache,
    }
    return ReferenceContext(**(options | changes))
