"""When the table of a reference is used again, and when it must not be: every cacheable kind, every cause."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references import policies
from dpo_ref.references.policies import adapter_base
from tests.support.cache import empty_cache
from tests.support.command import train
from tests.support.quick import only
from tests.support.reference_contexts import mixed
from tests.support.reference_texts import OTHERS, POLICY, SIZE, TEXTS, context_of, data
from tests.support.tiny import disturbed, policy_of, tiny_model

FOREIGN = OTHERS["llama 3: byte-level, BOS"].tokenizer
KINDS = {
    "initial": (POLICY, policies.initial),
    "other by ids": (POLICY, partial(policies.other, path="5")),
    "other by text": (FOREIGN, partial(policies.other, path="5")),
    "prior": (POLICY, policies.prior),
    "interpolate": (POLICY, partial(policies.interpolate, path="5", share=0.5)),
    "mixture": (POLICY, lambda context: mixed(context, "initial", "prior")),
    "adapter_base": (POLICY, adapter_base),
}
SOME = only(KINDS, "other by ids", "other by text", "mixture", "adapter_base")


class Counted:
    """A context whose passes that fill tables are counted."""

    def __init__(self, groups, folder, tokenizer, **limits):
        self.passes = 0
        context = context_of(groups, folder, tokenizer, **limits)
        self.context = replace(context, work=replace(context.work, progress=self._progress))

    def _progress(self, items, description, total=None):
        self.passes += description == "reference log-probs"
        return items


def filled(kind, folder, texts=TEXTS, policy=None, tokenizer=None, options=None, limits=None):
    """Tables filled while a reference of this kind was built, and its log-probs of the first group."""
    default_tokenizer, make = KINDS[kind]
    counted = Counted(data(texts), folder, tokenizer or default_tokenizer, **(limits or {}))
    context = counted.context if policy is None else replace(counted.context, policy=policy_of(policy, POLICY))
    if kind == "adapter_base":
        AdapterOptions(lora_rank=2).put_on(context.policy.model)
        disturbed(context.policy.model)
    reference = make(context, **(options or {}))
    return counted.passes, reference.logps(collate(list(context.groups)[:1])).sums


@pytest.mark.parametrize("kind", SOME)
def test_the_second_run_fills_nothing(kind, tmp_path):
    first, values = filled(kind, tmp_path)
    again, same = filled(kind, tmp_path)
    assert first >= 1
    assert again == 0
    assert torch.equal(values, same)


@pytest.mark.parametrize("kind", SOME)
def test_other_weights_miss(kind, tmp_path):
    filled(kind, tmp_path)
    policy = {"policy": tiny_model(seed=1, vocab_size=SIZE)}
    by_path = kind.startswith("other")
    changed, _ = filled(kind, tmp_path, **({"options": {"path": "6"}} if by_path else policy))
    assert changed >= 1


CAUSES = {
    "tokenizer": {"tokenizer": OTHERS["olmo: byte-level, tulu"].tokenizer},
    "template": {"options": {"template": "plain"}},
    "truncation of the response": {
        "limits": {"max_response_length": 9, "over_length": "truncate_response"},
        "options": {"max_altered": 0.2},  # the template trims the blank that a cut left at the end
    },
    "conditioning: a system prompt": {"options": {"system_prompt": "Be brief."}},
    "conditioning: the prompt": {"texts": [("who", *texts[1:]) for texts in TEXTS]},
    "the response": {"texts": [(*texts[:2], "never") for texts in TEXTS]},
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_change_of_meaning_misses(cause, tmp_path):
    template = FOREIGN.chat_template
    try:
        first, before = filled("other by text", tmp_path)
        changed, after = filled("other by text", tmp_path, **CAUSES[cause])
    finally:
        FOREIGN.chat_template = template
    assert first == changed == 1
    if cause != "the response":
        assert not torch.equal(before, after)


@pytest.mark.parametrize("cause", ["truncation of the prompt", "truncation of the response"])
def test_truncation_misses_by_ids(cause, tmp_path):
    cut = {"max_response_length": 9, "over_length": "truncate_response"}
    if cause.endswith("prompt"):
        cut = {"max_prompt_length": 20, "over_length": "truncate_prompt_start"}
    filled("initial", tmp_path)
    changed, _ = filled("initial", tmp_path, limits=cut)
    assert changed == 1


RUN = ["model.path=lab:tiny", "data.num_pairs=32", "data.num_eval_pairs=4", "data.num_test_prompts=2"]
RUN += ["trainer.max_steps=1", "tracking=none", "reference=prior"]


def test_a_sweep_over_beta_seed_and_lr_pays_one_pass(tmp_path, monkeypatch):
    """As a user runs it: other betas, objectives and learning rates leave every file of the table as it is."""
    cache = empty_cache(monkeypatch, tmp_path / "cache")

    def table():
        return {path: path.stat().st_mtime_ns for path in (cache / "reference").rglob("*.safetensors")}

    tables = []
    for index, options in enumerate((["beta=0.1"], ["beta=3"], ["optim.lr=0.01"], ["objective=ipo_sum"])):
        done = train(*RUN, *options, f"output_dir={tmp_path / str(index)}")
        assert done.returncode == 0, done.stderr
        tables.append(table())
    assert len(tables[0]) >= 1
    assert tables[1:] == tables[:1] * 3
    assert train(*RUN, "seed=5", f"output_dir={tmp_path / 'seed'}").returncode == 0
    assert len(table()) > len(tables[0])  # the lab's pairs are drawn by the seed
