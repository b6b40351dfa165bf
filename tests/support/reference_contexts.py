"""What references are built from, on tiny models and random groups."""

from functools import partial

import torch

from dpo_ref.cli.command_line import typed_words
from dpo_ref.cli.resolve import component
from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import pack
from dpo_ref.models.asked import ModelLoader, Workspace
from dpo_ref.references.interface import ReferenceContext
from dpo_ref.types import silent
from tests.support.command import composed
from tests.support.tiny import policy_of, random_groups, tiny_model
from tests.support.tokenizers_here import byte_bpe

LAYOUT = ((5, (4, 7)), (1, (6, 1)), (12, (3, 8)), (2, (2, 2)))
TOKENIZER = byte_bpe(bos="<s>")


class Models(ModelLoader):
    """Gives the models that a function makes of a source, all with one tokenizer."""

    def __init__(self, make, tokenizer):
        super().__init__(torch.device("cpu"))
        self._make, self._tokenizer = make, tokenizer

    def fresh(self, source):
        return self._make(source)

    def tokenizer(self, path, revision=None, key="reference.path"):
        return self._tokenizer


def workspace(cache, make, tokenizer, progress=silent):
    """Where references are built for tests."""
    return Workspace(cache, cache, 0, progress, Models(make, tokenizer))


def context_for(cache, policy=None, tokenizer=TOKENIZER, make=None, progress=silent, theirs=None, **changes):
    """A context whose policy is `tiny_model(seed=0)` and whose models are numbered by their seeds."""
    make = make or (lambda source: tiny_model(seed=int(source.path)))
    options = {
        "work": workspace(cache, make, theirs or tokenizer, progress),
        "policy": policy_of(policy or tiny_model(seed=0), tokenizer),
        "groups": from_groups(random_groups(LAYOUT)),
        "pack": partial(pack, tokens_per_batch=25),
    }
    return ReferenceContext(**(options | changes))


def mixed(context, *parts, **options):
    """A mixture as it is configured: each part a name, or {reference: <kind>, and its options}."""
    words = typed_words({f"reference.{name}": value for name, value in (options | {"parts": list(parts)}).items()})
    return component("reference", composed("reference=mixture", *words)[0].reference, "mixture")(context)
