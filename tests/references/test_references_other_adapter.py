"""reference=other with an adapter alone: on the policy's own base, beside whatever the policy trains, without a second
model; equal to a second model with the adapter on it."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_ref.cli import resolve
from dpo_ref.data.packing import collate
from dpo_ref.lab.models import locate
from dpo_ref.models.adapters import adapter_off, copy_of_base, load_adapter
from dpo_ref.models.asked import ModelLoader, on_base_of
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.frozen import hold_in_bfloat16
from dpo_ref.models.loading import Policy, load_model
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.policies import other
from tests.support.adapters import KINDS, load_with_peft, save_adapter, save_base
from tests.support.command import composed, train
from tests.support.evaluate_command import measure
from tests.support.exported import COMMON, LAB, certificate_in, exported
from tests.support.on_policy import SMALL as SAMPLED
from tests.support.quick import only
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for
from tests.support.tiny import disturbed, naive_logps, random_groups

GROUPS = random_groups(LAYOUT)
BATCH = collate(GROUPS)
# One of each way in which an adapter lies on a model; the others are combined with a second one by hand: -m slow.
VARIED = ("plain", "on a tied head", "on both, tied", "whole modules, tied", "some tokens", "all biases", "PiSSA")
SOME_KINDS = only(KINDS, *VARIED, "biases of its own", "GPT-2 with DoRA", "experts")
PLAIN, HEAD = {}, {"target_modules": ["q_proj", "lm_head"], "r": 2}


def sums(model):
    with torch.no_grad():
        return response_logps(model, BATCH).sums


def loaded(folder):
    return load_model(str(folder), torch.device("cpu"), "sdpa").model


def by_peft(base, adapter):
    """A second model, by transformers and peft alone, asked one response at a time."""
    with torch.no_grad():
        return torch.stack(
            [values.double().sum() for group in GROUPS for values in naive_logps(load_with_peft(base, adapter), group)]
        )


class Counted(ModelLoader):
    """Counts the models that are loaded."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.loads = 0

    def _announce(self, loaded):
        self.loads += 1
        return super()._announce(loaded)


def context_of(model, layers, cache):
    """With a policy, which trains all of its weights or an adapter."""
    context = context_for(cache)
    policy = Policy(lambda: model, TOKENIZER, adapter=layers)
    return replace(context, policy=policy, work=replace(context.work, loader=Counted()))


def everything(model):
    """The model bit for bit: its modules, weights, buffers, what is trained, and which objects they are."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    values = {name: value.detach().clone() for name, value in named.items()}
    objects = {name: (id(value), value.requires_grad) for name, value in named.items()}
    return values, objects, [(name, id(module)) for name, module in model.named_modules()], model.training


def is_as_it_was(model, before):
    values, *rest = everything(model)
    return rest == list(before[1:]) and all(torch.equal(value, before[0][name]) for name, value in values.items())


# --- every kind of adapter, on a policy that is trained whole


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_it_is_the_second_model_with_the_adapter_and_leaves_the_policy_as_it_was(kind, tmp_path):
    shape, options = KINDS[kind]
    base = save_base(tmp_path / "base", **shape)
    adapter = str(save_adapter(tmp_path / "adapter", base, **options))
    policy = loaded(base)
    policy.train()
    context, before = context_of(policy, None, tmp_path / "cache"), everything(policy)
    reference = other(context, adapter=adapter)
    assert is_as_it_was(policy, before)
    assert context.work.loader.loads == 0
    second = loaded(base)
    load_adapter(second, adapter, "reference.adapter", trainable=False)
    torch.testing.assert_close(reference.logps(BATCH).sums, sums(second), atol=1e-5, rtol=0)
    torch.testing.assert_close(reference.logps(BATCH).sums, by_peft(base, adapter), atol=1e-4, rtol=0)
    assert (reference.logps(BATCH).sums - sums(policy)).abs().max() > 1e-3
    assert reference.weights == weights_digest(second)  # so both have one table
    assert reference.weights != context.policy.weights


# --- beside a policy that trains an adapter


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_beside_an_adapter_of_any_kind_that_is_trained(kind, cache, tmp_path):
    """The base is in memory once, the policy computes what it did, and however it moves the reference does not."""
    shape, options = KINDS[kind]
    base = save_base(tmp_path / "base", **shape)
    trained = str(save_adapter(tmp_path / "trained", base, **options))
    targets = {"target_modules": ["c_attn"]} if shape.get("kind") == "gpt2" else PLAIN
    adapter = str(save_adapter(tmp_path / "adapter", base, r=2, **targets))
    policy = loaded(base)
    layers = load_adapter(policy, trained, "model.adapter", trainable=True)
    context, before = context_of(policy, layers, tmp_path / "cache"), everything(policy)
    reference = other(context, adapter=adapter, cache=cache)
    assert is_as_it_was(policy, before)
    assert context.work.loader.loads == 0
    expected = by_peft(base, adapter)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    torch.testing.assert_close(reference.logps(BATCH).sums, expected, atol=1e-4, rtol=0)
    if reference.model is not None:
        ours = {weight.data_ptr() for weight in policy.parameters() if not weight.requires_grad}
        own = [weight for weight in reference.model.parameters() if weight.data_ptr() not in ours]
        brought = {"all biases", "biases of its layers"}
        assert sum(weight.numel() for weight in own) < 3000 or kind in brought
        assert not any(weight.requires_grad for weight in reference.model.parameters())


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_an_adapter_that_brings_weights_writes_over_nothing(kind, tmp_path):
    """Beside a fresh one that the policy trains: biases, whole modules and embeddings of the reference are its own."""
    shape, options = KINDS[kind]
    base = save_base(tmp_path / "base", **shape)
    adapter = str(save_adapter(tmp_path / "adapter", base, **options))
    policy = loaded(base)
    layers = AdapterOptions(lora_rank=2).put_on(policy)
    disturbed(policy)
    context, before, said = context_of(policy, layers, tmp_path / "cache"), everything(policy), sums(policy)
    reference = other(context, adapter=adapter, cache="off")
    torch.testing.assert_close(reference.logps(BATCH).sums, by_peft(base, adapter), atol=1e-4, rtol=0)
    assert is_as_it_was(policy, before)
    assert torch.equal(sums(policy), said)
    with adapter_off(policy):
        torch.testing.assert_close(sums(policy), sums(loaded(base)), atol=1e-5, rtol=0)


def test_a_base_that_is_held_in_bfloat16_is_shared_too(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = str(save_adapter(tmp_path / "adapter", base, **HEAD))
    policy, second = loaded(base), loaded(base)
    for model in (policy, second):
        hold_in_bfloat16(model)
    layers = AdapterOptions(lora_rank=2).put_on(policy)
    load_adapter(second, adapter, "reference.adapter", trainable=False)
    reference = other(context_of(policy, layers, tmp_path / "cache"), adapter=adapter, cache="off")
    assert torch.equal(reference.logps(BATCH).sums, sums(second))
    assert reference.weights == weights_digest(second)
    assert reference.model.lm_head.base_layer.weight.data_ptr() == policy.lm_head.weight.data_ptr()


def test_the_model_below_an_adapter_has_none_of_it(tmp_path):
    base = save_base(tmp_path / "base", attention_bias=True)
    policy = loaded(base)
    load_adapter(policy, str(save_adapter(tmp_path / "adapter", base, bias="all")), "model.adapter", trainable=True)
    below = copy_of_base(policy)
    assert dict(below.named_parameters()).keys() == dict(loaded(base).named_parameters()).keys()
    assert weights_digest(below) == weights_digest(loaded(base)) != weights_digest(policy)
    assert torch.equal(sums(below), sums(loaded(base)))
    assert "peft_config" not in vars(below)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base, another = save_base(tmp_path / "base"), save_base(tmp_path / "another", seed=4)
    adapter = str(save_adapter(tmp_path / "adapter", another))
    with pytest.raises(
        ValueError, match=r"was made on .*another, by its adapter_config.json, .*; name its base: refer"
    ):
        on_base_of(Policy(lambda: loaded(base), TOKENIZER), adapter)
    deep = save_base(tmp_path / "deep" / "base", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"reference.adapter=.*for which this model has no layer"):
        on_base_of(Policy(lambda: loaded(base), TOKENIZER), str(save_adapter(tmp_path / "of_deep", deep)))


# --- runs


SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "optim.lr=0.02", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "sft_adapter"
    model = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32)
    disturbed(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(folder)
    return folder


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["model.lora_rank=4"], marks=pytest.mark.slow),
        ["model.lora_rank=4", "reference.cache=off"],
    ],
    ids=["all weights", "an adapter", "an adapter, asked at every step"],
)
def test_a_run_is_that_against_a_second_model(options, adapter, tmp_path):
    """Loss for loss; it stops and goes on, and is evaluated."""
    options = [*SMALL, *options, "reference=other", f"reference.adapter={adapter}", "optim.warmup_ratio=0"]
    done = train(*options, f"output_dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    assert train(*options, "reference.path=lab:tiny", f"output_dir={tmp_path / 'two'}").returncode == 0
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-6)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["identities"]["loss_reference"] == summaries[1]["identities"]["loss_reference"]
    assert [summary["reference"] for summary in summaries] == [f"other {adapter}", "other lab:tiny"]
    assert train(*options, "trainer.max_steps=1", f"output_dir={tmp_path / 'parts'}").returncode == 0
    assert train(f"resume={tmp_path / 'parts'}", "trainer.max_steps=3").returncode == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "one")
    measure(f"policy={tmp_path / 'one'}", "tracking=none", "generation.max_new_tokens=8")
    metrics = json.loads((tmp_path / "one" / "evaluation" / "evaluation.json").read_text())["metrics"]
    last = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["rewards/margins"] == pytest.approx(last["eval/rewards/margins"] / 0.1, abs=1e-3)
    assert metrics["kl/loss_reference"] != pytest.approx(metrics["kl/initial"], rel=1e-3)


def test_samples_are_asked_about_beside_an_adapter(adapter, tmp_path):
    words = [*SAMPLED, "reference=other", f"reference.adapter={adapter}", "model.lora_rank=2", "data.rounds=1"]
    done = train(*words, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr


# --- what is refused at compose time


ALONE = "reference.adapter=some/adapter"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reference=other needs reference.path=<model>, or reference.adapter=<adapter> alone"),
        ([ALONE, "reference.cache=off"], "on the policy's own weights, and these are trained while it is asked"),
        ([ALONE, "data=on_policy"], "on the policy's own weights, and these are trained while it is asked"),
        ([ALONE, "reference.dtype=bfloat16"], "dtype=bfloat16 has no effect without reference.path: the adapter goes"),
        ([ALONE, "reference.revision=main"], "revision=main has no effect without reference.path"),
        ([ALONE, "reference.system_prompt=Hello"], "system_prompt=Hello has no effect without reference.path"),
        ([ALONE, "reference.device=cpu"], "device=cpu has no effect without reference.path"),
    ],
)
def test_refused_at_compose_time(words, message):
    cfg, choices = composed("reference=other", *words)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)


@pytest.mark.parametrize(
    "words", [["reference.cache=off", "model.lora_rank=4"], ["model.adapter=x", "data=on_policy"], []]
)
def test_what_stays_is_not_refused(words):
    cfg, choices = composed("reference=other", ALONE, "reference.strength=0.5", *words)
    assert resolve.resolve(cfg, choices).reference.options["path"] is None


def test_its_exported_log_probs_name_the_base_and_the_adapter(tmp_path):
    """The certificate's model is the policy's with this adapter, and scores the rows again where they are read."""
    adapter = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(locate("lab:tiny")), LoraConfig(r=2))
    disturbed(model)
    model.save_pretrained(adapter)
    table = tmp_path / "table"
    done = exported(table, *LAB, "reference=other", f"reference.adapter={adapter}")
    assert done.returncode == 0, done.stderr
    named = certificate_in(table)["model"]
    assert (named["path"], named["adapter"]) == ("lab:tiny", str(adapter))
    words = [*COMMON, "trainer.max_steps=1", "data=jsonl", f"data.path={table / 'train.jsonl'}"]
    read = train(*words, "reference=columns", "reference.certificate=auto", f"output_dir={tmp_path / 'run'}")
    assert read.returncode == 0, read.stderr
    assert "responses of the certificate the same log-probs" in read.stdout
