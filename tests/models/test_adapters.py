"""Policies that train an adapter, and the model below it as reference."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_ref.cli import resolve
from dpo_ref.data.packing import collate
from dpo_ref.lab.models import locate
from dpo_ref.models.adapters import merge
from dpo_ref.models.attention import register
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.policies import adapter_base, initial
from tests.support.adapters import load_base, load_with_peft, save_adapter
from tests.support.command import composed, train
from tests.support.evaluate_command import measure
from tests.support.reference_contexts import LAYOUT, context_for
from tests.support.tiny import disturbed, random_groups, tiny_model

BATCH = collate(random_groups(LAYOUT))
SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.02"]


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_adapter_base_is_the_model_below(cache, tmp_path):
    plain = response_logps(tiny_model(seed=0), BATCH).sums
    context = context_for(tmp_path)
    AdapterOptions(lora_rank=3).put_on(context.policy.model)
    assert weights_digest(context.policy.model) == weights_digest(
        tiny_model(seed=0)
    )  # a fresh adapter changes nothing
    disturbed(context.policy.model)
    reference = adapter_base(context, cache=cache)
    torch.testing.assert_close(reference.logps(BATCH).sums, plain, atol=1e-5, rtol=0)
    assert reference.weights == weights_digest(tiny_model(seed=0))
    assert weights_digest(context.policy.model) != reference.weights
    with_adapter = initial(replace(context, work=replace(context.work, cache=tmp_path / "other"))).logps(BATCH).sums
    assert (with_adapter - plain).abs().max() > 0.1
    torch.testing.assert_close(with_adapter, response_logps(context.policy.model, BATCH).sums, atol=1e-5, rtol=0)


def test_merged_weights_compute_the_same(tmp_path):
    model = tiny_model(seed=0)
    AdapterOptions(lora_rank=3, lora_alpha=12.0).put_on(model)
    expected = response_logps(disturbed(model), BATCH).sums
    plain = merge(model)
    assert plain.state_dict().keys() == tiny_model(seed=0).state_dict().keys()
    plain.set_attn_implementation(register("sdpa"))
    torch.testing.assert_close(response_logps(plain, BATCH).sums, expected, atol=1e-4, rtol=1e-6)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_fresh_adapter(tmp_path):
    """Only the adapter moves; the policy's folder is a plain model, which evaluation measures as any other."""
    run, again = tmp_path / "run", tmp_path / "again"
    options = [*SMALL, "model.lora_rank=4", "reference=adapter_base", "trainer.save_every=2"]
    done = train(*options, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    assert rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert rows[-1]["eval/loss"] != rows[0]["eval/loss"]
    assert train(*options, f"output_dir={again}", "trainer.max_steps=2", "optim.schedule=constant").returncode == 0
    base = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32).state_dict()
    policy = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    changed = {name for name in base if not torch.equal(base[name], policy[name])}
    assert changed == {name for name in base if "_proj" in name}
    overrides = [f"policy={run}", "tracking=none", "generation.max_new_tokens=8"]
    measure(*overrides)
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert evaluation["rewards/margins"] == pytest.approx(rows[-1]["eval/rewards/margins"] / 0.1, abs=1e-3)
    assert evaluation["kl/loss_reference"] == evaluation["kl/initial"] > 0


def test_going_on_from_a_saved_adapter(tmp_path):
    """initial is the model with its adapter, adapter_base the model below; a resumed run repeats the whole one."""
    run, parts, saved = tmp_path / "run", tmp_path / "parts", tmp_path / "adapter"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"]),
    )
    disturbed(model).save_pretrained(saved)
    options = [*SMALL, f"model.adapter={saved}", "optim.schedule=constant", "optim.warmup_ratio=0"]
    assert train(*options, "reference=initial", f"output_dir={run}").returncode == 0
    assert metrics(run)[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    below = [*options, "reference=adapter_base", f"output_dir={parts}", "trainer.save_every=1"]
    assert train(*below, "trainer.max_steps=1").returncode == 0
    assert metrics(parts)[0]["eval/loss"] != pytest.approx(0.693147, abs=1e-3)
    resumed = train(f"resume={parts}", "trainer.max_steps=2", "tracking=none")
    assert resumed.returncode == 0, resumed.stderr
    whole = tmp_path / "whole"
    assert train(*below[:-2], f"output_dir={whole}", "trainer.max_steps=2").returncode == 0
    losses = [[row["train/loss"] for row in metrics(folder) if "train/loss" in row] for folder in (parts, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_an_adapter_on_the_head_is_used_and_trained_without_its_dropout(cache, tmp_path):
    run, saved, base = tmp_path / "run", tmp_path / "adapter", locate("lab:tiny")
    save_adapter(saved, base, target_modules=["q_proj", "lm_head"], lora_dropout=0.3)
    options = [*SMALL, f"model.adapter={saved}", f"reference.cache={cache}", "trainer.max_steps=2"]
    done = train(*options, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    assert "trained: rank 4 on q_proj (2), lm_head: " in done.stdout
    assert "reference: the model with its adapter, as both are before training" in done.stdout
    assert metrics(run)[1]["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (saved, run / "policy" / "adapter"))
    head = "base_model.model.lm_head.lora_B.weight"
    assert (after[head] - before[head]).abs().max() > 1e-3
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        merged, apart = load_base(run / "policy"), load_with_peft(base, run / "policy" / "adapter")
        torch.testing.assert_close(merged(ids).logits, apart(ids).logits, atol=1e-4, rtol=0)


def test_an_adapter_that_is_given_as_a_model_is_told(tmp_path):
    save_adapter(tmp_path / "adapter", locate("lab:tiny"))
    done = train(*SMALL, f"model.path={tmp_path}/adapter")
    assert "it is an adapter: name its base here and it with model.adapter" in done.stderr
    done = train(*SMALL, "reference=other", f"reference.path={tmp_path}/adapter")
    assert "it is an adapter: name its base here and it with reference.adapter" in done.stderr


REFUSED = {
    "no adapter": (["reference=adapter_base"], "the policy has no adapter; train one with model.lora_rank=..."),
    "rank of its own": (["model.adapter=x", "model.lora_rank=2"], "has a rank and an alpha of its own"),
    "alpha alone": (["model.lora_alpha=8"], "model.lora_alpha=8 has no effect without model.lora_rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_compose_time(case):
    overrides, message = REFUSED[case]
    cfg, choices = composed(*overrides)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)
