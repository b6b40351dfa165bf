"""Adapters that others made, of every kind that peft saves: what they compute, what is trained of them and what is
saved, held to peft itself; those that cannot be held are refused."""

import json

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file

from dpo_ref.data.packing import collate
from dpo_ref.models.adapters import adapter_off, base_weights, load_adapter, merge, other_base
from dpo_ref.models.adapters import save_adapter as save_ours
from dpo_ref.models.checkpoint import state_digest, weights_digest
from dpo_ref.models.loading import load_model
from dpo_ref.models.logps import response_logps
from tests.support.adapters import KINDS, load_base, load_with_peft, save_adapter, save_base
from tests.support.tiny import naive_logps, policy_of, random_groups

GROUPS = random_groups([(4, (3, 5)), (2, (1, 4))])
BATCH = collate(GROUPS)
KEY = "model.adapter"


def ours(folder):
    return load_model(str(folder), torch.device("cpu"), "auto").model


def sums(model):
    """Each response's log-prob by the model's own forward pass, full logits."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    return torch.stack([values.sum() for group in GROUPS for values in naive_logps(causal_lm.eval(), group)]).double()


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def made(tmp_path):
    def make(kind):
        base, adapter = KINDS[kind]
        return save_base(tmp_path / "base", **base), save_adapter(tmp_path / "adapter", tmp_path / "base", **adapter)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peft_does_and_so_does_all_that_is_saved_of_it(kind, made, tmp_path):
    base, adapter = made(kind)
    model = ours(base)
    below, weights = sums(load_base(base)).detach(), weights_digest(model)
    layers = load_adapter(model, str(adapter), KEY, trainable=True)
    with torch.no_grad():
        close(response_logps(model, BATCH).sums, sums(load_with_peft(base, adapter)))
        assert (response_logps(model, BATCH).sums - below).abs().max() > 0.1
    assert state_digest(base_weights(model)) == weights != weights_digest(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
        trained = response_logps(model, BATCH).sums
        with adapter_off(model):
            close(response_logps(model, BATCH).sums, below)
        merge(model).save_pretrained(tmp_path / "policy")
        save_ours(layers, tmp_path / "again")
        close(sums(load_base(tmp_path / "policy")), trained)
        close(sums(load_with_peft(base, tmp_path / "again")), trained)
    assert state_digest(base_weights(model)) == weights


GRADIENTS = (
    "on the head",
    "on a tied head",
    "DoRA on the head",
    "whole modules",
    "some tokens, tied",
    "biases of its own",
)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_gradient_reaches_all_that_peft_trains(kind, made):
    """Also what lies on the head, which is applied apart from the model's forward pass."""
    base, adapter = made(kind)
    model, peft_model = ours(base), load_with_peft(base, adapter, is_trainable=True)
    layers = load_adapter(model, str(adapter), KEY, trainable=True)
    loss, _ = policy_of(model).loss(BATCH, lambda outputs, span: -outputs.sums.sum())
    loss.backward()
    (-sums(peft_model).sum()).backward()
    expected = {name: weight.grad for name, weight in peft_model.named_parameters() if weight.requires_grad}
    assert all(gradient is not None for gradient in expected.values())
    gradients = {name: weight.grad for name, weight in layers.named_parameters() if weight.requires_grad}
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)


def test_scaling_is_part_of_the_identity(made):
    """It is not among the adapter's tensors."""
    base, adapter = made("plain")

    def digest():
        model = ours(base)
        load_adapter(model, str(adapter), KEY, trainable=True)
        return weights_digest(model)

    digests = {digest()}
    for change in ({"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}, {}):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
        digests.add(digest())
    assert len(digests) == 4


@pytest.mark.parametrize("start", ["gaussian", "eva", "mica", False])
def test_what_it_began_with_is_of_no_matter_where_that_left_the_weights_alone(start, made):
    base, adapter = made("plain")
    expected = sums(load_with_peft(base, adapter)).detach()
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": start}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    model = ours(base)
    load_adapter(model, str(adapter), KEY, trainable=True)
    close(response_logps(model, BATCH).sums.detach(), expected)


def test_embeddings_that_were_saved_with_it_are_its_own(made, tmp_path):
    """peft saves the embedding where an adapter targets it; where that is another than the model's, the model below
    keeps its own."""
    base, adapter = made("on the head")
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = "base_model.model.lm_head.base_layer.weight"
    tensors[head] = tensors[head] + 0.1
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = ours(base)
    below, weights = response_logps(model, BATCH).sums.detach(), weights_digest(model)
    layers = load_adapter(model, str(adapter), KEY, trainable=True)
    with torch.no_grad():
        expected = sums(load_with_peft(base, adapter))
        close(response_logps(model, BATCH).sums, expected)
        with adapter_off(model):
            close(response_logps(model, BATCH).sums, below)
        save_ours(layers, tmp_path / "again")
        close(sums(load_with_peft(base, tmp_path / "again")), expected)
    assert state_digest(base_weights(model)) == weights


@pytest.mark.parametrize("kind", ["plain", "on the embedding", "whole modules", "some tokens", "DoRA", "PiSSA"])
def test_without_dropout_and_at_rest_it_changes_nothing(kind, tmp_path):
    base, options = KINDS[kind]
    base = save_base(tmp_path / "base", **base)
    save_adapter(tmp_path / "adapter", base, at_rest=True, lora_dropout=0.5, **options)
    model = ours(base)
    weights, expected = weights_digest(model), response_logps(model, BATCH).sums.detach()
    load_adapter(model, str(tmp_path / "adapter"), KEY, trainable=True)
    model.train()
    close(response_logps(model, BATCH).sums.detach(), expected, atol=1e-5)
    assert weights_digest(model) == weights


# --- refused


NEVER = {
    "IA3": (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), {}, "peft_type: IA3"),
    "LoHa": (LoHaConfig(target_modules=["k_proj"]), {}, "peft_type: LOHA"),
    "a prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), {}, "peft_type: PROMPT_TUNING"),
    "a classifier's": (None, {"task_type": "SEQ_CLS"}, "task_type: SEQ_CLS, and adapters here are of causal"),
    "activated LoRA": (None, {"alora_invocation_tokens": [3]}, "says alora_invocation_tokens: .* merge it with peft"),
    "fast PiSSA": (None, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4, so it belongs to"),
    "LoftQ": (None, {"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    "PiSSA with DoRA": (None, {"init_lora_weights": "pissa", "use_dora": True}, "lora_magnitude_vector|of plain LoRA"),
    "a layer without a bias": (None, {"lora_bias": True}, "bias"),
    "a whole module it lacks": (None, {"modules_to_save": ["lm_head"]}, "lm_head"),
}


@pytest.mark.parametrize("case", NEVER)
def test_refused(case, tmp_path):
    config, settings, message = NEVER[case]
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=rf"^{KEY}=.*{message}"):
        load_adapter(ours(base), str(adapter), KEY, trainable=True)


def test_the_folder_above_names_it(made):
    base, adapter = made("plain")
    with pytest.raises(ValueError, match=f"it has no adapter_config.json; one is in {adapter}"):
        load_adapter(ours(base), str(adapter.parent), KEY, trainable=True)


NAMED = {"base": "base", "meta-llama/Base": "meta-llama", "/gone/base": "moved", None: "none"}


@pytest.mark.parametrize("named", NAMED)
def test_a_base_of_the_same_name_is_the_same(named, made):
    base, adapter = made("plain")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = named
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert other_base(str(adapter), KEY, ours(base)) == ()


def test_a_base_of_another_name_is_said_once_its_weights_are_others(made, tmp_path):
    base, adapter = made("plain")
    (line,) = other_base(str(adapter), KEY, ours(save_base(tmp_path / "other", seed=3)))
    assert line == f"{KEY}={adapter} was made on {base}, by its adapter_config.json, and is put on {tmp_path}/other"
    assert other_base(str(adapter), KEY, ours(save_base(tmp_path / "copy"))) == ()
