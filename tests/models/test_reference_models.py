"""Models that are only asked: another precision, quantised, elsewhere, with an adapter, too large."""

import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ref.data.packing import collate
from dpo_ref.models.asked import ModelSource, load_reference
from dpo_ref.references import policies
from tests.support.command import forked
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for
from tests.support.tiny import naive_logps, random_groups, tiny_model

CPU = torch.device("cpu")
GROUPS = random_groups(LAYOUT)
BATCH = collate(GROUPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model on disk, wide enough for quantisation in blocks of 64."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(
        seed=3, hidden_size=64, intermediate_size=128, vocab_size=len(TOKENIZER), pad_token_id=0
    ).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def other(folder, cache_folder, **options):
    context = context_for(cache_folder, make=lambda source: load_reference(source, source.path, CPU, "auto").model)
    return policies.other(context, path=str(folder), **options)


def plain(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.tensor(
        [
            float(values.double().sum())
            for group in GROUPS
            for values in naive_logps(model.requires_grad_(False), group)
        ]
    )


def test_half_precision_is_close_and_another_reference(folder, tmp_path):
    exact, half = other(folder, tmp_path), other(folder, tmp_path, dtype="bfloat16")
    torch.testing.assert_close(exact.logps(BATCH).sums.float(), plain(folder), atol=1e-3, rtol=0)
    gap = (half.logps(BATCH).tokens() - exact.logps(BATCH).tokens()).abs()
    assert 0 < gap.max() < 0.5
    assert half.identity != exact.identity
    again = other(folder, tmp_path, dtype="bfloat16")
    assert torch.equal(again.logps(BATCH).sums, half.logps(BATCH).sums)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_take_less_and_say_nearly_the_same(bits, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    exact, small = other(folder, tmp_path), other(folder, tmp_path, quantisation=bits, cache="off")
    gap = (small.logps(BATCH).tokens() - exact.logps(BATCH).tokens()).abs()
    assert 0 < gap.mean() < 1.0
    assert small.identity != exact.identity
    stored = {weight.dtype for weight in small.model.parameters()}
    assert stored & {torch.int8, torch.uint8}


@pytest.mark.parametrize("device", ["cpu", "spread"])
def test_elsewhere_changes_nothing(device, folder, tmp_path):
    reference = other(folder, tmp_path, device=device, cache="off")
    torch.testing.assert_close(reference.logps(BATCH).sums.float(), plain(folder), atol=1e-3, rtol=0)


def test_an_adapter_equals_its_merged_weights(folder, tmp_path):
    """Against peft's own merge, asked by full logits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    options = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), options).save_pretrained(tmp_path / "adapter")
    reference = other(folder, tmp_path, adapter=str(tmp_path / "adapter"))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    model = merged.merge_and_unload()
    expected = [
        float(values.double().sum()) for group in GROUPS for values in naive_logps(model.requires_grad_(False), group)
    ]
    assert reference.logps(BATCH).sums.tolist() == pytest.approx(expected, abs=1e-3)
    assert reference.identity != other(folder, tmp_path).identity
    with pytest.raises(ValueError, match=r"reference.adapter=.* cannot be put on this model"):
        other(folder, tmp_path, adapter=str(folder))


def test_a_model_that_does_not_fit_names_what_would(folder, tmp_path):
    """A real shortage: a process that may take 200 MB more loads 400 MB."""
    wide = tmp_path / "wide"
    config = tiny_model(pad_token_id=0).config
    config.update({"hidden_size": 1024, "vocab_size": 100_000, "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)

    def load():
        load_reference(ModelSource(str(folder)), str(folder), CPU, "auto")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
        load_reference(ModelSource(str(wide)), str(wide), CPU, "auto")

    forked(tmp_path, load).join(timeout=120)
    message = "does not fit into memory beside the policy: reference.device=cpu, reference.dtype=bfloat16"
    assert message in (tmp_path / "err").read_text()
