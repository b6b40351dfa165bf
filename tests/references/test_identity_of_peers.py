"""Which model is the reference: each test is a report on another trainer, in which it was another than was asked for.
The threads: NVIDIA-NeMo/RL#2955, modelscope/ms-swift#9934, hiyouga/LLaMA-Factory#8459, marin-community/marin#4637,
huggingface/trl#6043.
"""

import json
from dataclasses import replace

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.models.adapters import adapter_off, load_adapter
from dpo_ref.models.asked import ModelLoader
from dpo_ref.models.loading import Policy
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.moving import moving
from dpo_ref.references.policies import adapter_base, auto, initial, other
from tests.support.adapters import EXPERTS, save_adapter, save_base
from tests.support.command import train
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for
from tests.support.tiny import random_groups, tiny_model

BATCH = collate(random_groups(LAYOUT))
SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.02", "optim.schedule=constant"]


def sums(model):
    with torch.no_grad():
        return response_logps(model, BATCH).sums


def context_with(model, layers, cache):
    """With a policy that trains an adapter."""
    return replace(context_for(cache), policy=Policy(lambda: model, TOKENIZER, adapter=layers))


def going_on(tmp_path, kind="llama", **options):
    """A policy that goes on from a saved adapter."""
    shape = EXPERTS if kind == "mixtral" else {}
    base = save_base(tmp_path / "base", kind, **shape)
    adapter = save_adapter(tmp_path / "adapter", base, **options)
    model = tiny_model(kind, tie_word_embeddings=False, **shape)
    below = sums(model)
    layers = load_adapter(model, str(adapter), "model.adapter", trainable=True)
    return context_with(model, layers, tmp_path / "cache"), below


def moved(model):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [[], ["model.lora_rank=4"]], ids=["all weights", "an adapter"])
def test_nemo_rl_2955_a_resumed_run_keeps_the_reference_it_began_with(options, tmp_path):
    """There it was taken after the checkpoint had been loaded: each restart set the anchor anew, and KL fell to 0."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    options = [*SMALL, *options, "optim.warmup_ratio=0", "reference.cache=off", "trainer.save_every=1"]
    assert train(*options, "trainer.max_steps=1", f"output_dir={parts}").returncode == 0
    assert train(f"resume={parts}", "trainer.max_steps=2", "tracking=none").returncode == 0
    assert train(*options, "trainer.max_steps=2", f"output_dir={whole}").returncode == 0
    rows = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (parts, whole)]
    margins = [row["eval/rewards/margins"] for row in rows]
    assert margins[0] == margins[1] != 0
    identities = [json.loads((folder / "summary.json").read_text())["reference"] for folder in (parts, whole)]
    assert identities[0] == identities[1]


def test_ms_swift_9934_the_adapter_that_was_asked_for_is_the_references(tmp_path):
    """There it was never loaded, and a fresh one used without an error."""
    shape = {"tie_word_embeddings": False, "vocab_size": len(TOKENIZER)}
    base = save_base(tmp_path / "base", **shape)
    TOKENIZER.save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base)
    context = context_for(tmp_path / "cache")
    context = replace(context, work=replace(context.work, loader=ModelLoader(torch.device("cpu"))))
    plain, adapted = (other(context, path=str(base), adapter=a, cache="off") for a in (None, str(adapter)))
    model = tiny_model(**shape)
    close(plain.logps(BATCH).sums, sums(model))
    load_adapter(model, str(adapter), "reference.adapter", trainable=False)
    close(adapted.logps(BATCH).sums, sums(model))
    assert (adapted.logps(BATCH).sums - plain.logps(BATCH).sums).abs().max() > 0.1
    assert plain.identity != adapted.identity


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_llama_factory_8459_the_reference_of_an_adapter_is_that_adapter(cache, tmp_path):
    """There it was silently the base: the loss began away from ln 2."""
    context, below = going_on(tmp_path)
    begun = sums(context.policy.model)
    reference = auto(context, cache=cache)
    moved(context.policy.model)
    close(reference.logps(BATCH).sums, begun)
    assert (begun - below).abs().max() > 0.1
    assert reference.notes == (
        "reference: the model with its adapter, as both are before training; reference=adapter_base is the model "
        "below the adapter",
    )
    close(adapter_base(context, cache=cache).logps(BATCH).sums, below)


@pytest.mark.parametrize("start", ["default", "pissa", "olora"])
def test_marin_4637_whatever_an_adapter_begins_with_the_policy_begins_as_the_reference(start, tmp_path):
    """There its product was not zero, so that policy and reference differed at step 0."""
    model = tiny_model()
    expected = sums(model)
    layers = AdapterOptions(lora_rank=3, lora_init=start).put_on(model)
    context = context_with(model, layers, tmp_path)
    references = [initial(context), initial(context, cache="off"), adapter_base(context, cache="off")]
    assert len({reference.weights for reference in references}) == 1
    assert initial(context_for(tmp_path)).weights == references[0].weights
    assert references[0].notes == ()
    close(sums(model), expected)
    moved(model)
    for reference in references:
        close(reference.logps(BATCH).sums, expected)


@pytest.mark.parametrize("make", [initial, moving], ids=["initial", "moving"])
def test_trl_6043_the_reference_keeps_an_adapter_on_experts(make, tmp_path):
    """There peft held one adapter on expert parameters only, and the reference became the base."""
    context, below = going_on(tmp_path, "mixtral", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    begun = sums(context.policy.model)
    reference = make(context, cache="off")
    theirs = dict(reference.model.named_parameters())
    for name, weight in context.policy.model.named_parameters():
        assert (weight is theirs[name]) == (".lora_" not in name)
    close(reference.logps(BATCH).sums, begun)
    moved(context.policy.model)
    close(reference.logps(BATCH).sums, begun)
    with adapter_off(context.policy.model):
        close(sums(context.policy.model), below)
    assert (begun - below).abs().max() > 0.1
