"""Mixtures of experts: the load-balancing loss against transformers' own, loads by hand, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_ref.cli.build import trained_model
from dpo_ref.data.packing import collate
from dpo_ref.models import experts
from dpo_ref.models.experts import Routing, load_balancing_loss, routers_of
from dpo_ref.models.layers import CHECKPOINTING
from dpo_ref.objectives import pairwise
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.unpaired import sft
from dpo_ref.references.policies import NoReference
from dpo_ref.training.trainer import backward
from tests.support.command import resolved, train
from tests.support.tiny import SHAPE, policy_of, random_groups, shared, tiny_model
from tests.support.tokenizers_here import byte_bpe

LAYOUT = ((5, (4, 7)), (1, (6, 1)), (12, (3, 2, 8)))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DPO = bind(pairwise.dpo, beta=0.1)


def mixtral(**options):
    return tiny_model("mixtral", **EXPERTS, **options)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_loss_is_that_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(11, 4, generator=generator) for _ in range(3))
    torch.testing.assert_close(load_balancing_loss(logits, 2), load_balancing_loss_func(logits, 4, 2))


def test_loss_by_hand():
    """Three tokens, two experts, the best one: two go to the first. f = (2/3, 1/3), P the mean of the softmax."""
    logits = torch.tensor([[0.0, -math.log(3)], [math.log(4), 0.0], [0.0, math.log(9)]])
    mean = (3 / 4 + 4 / 5 + 1 / 10) / 3
    assert load_balancing_loss([logits], 1).item() == pytest.approx(2 * (2 / 3 * mean + 1 / 3 * (1 - mean)))


def test_added_once_a_step_whatever_the_packs():
    """With one sequence a pack the gradient of the step is that of the mean of transformers' losses, weighed by
    tokens, times the coefficient, and the objective's beside it."""
    groups = random_groups(((5, (4, 7)), (3, (6, 2)), (9, (3, 8))))
    alone = [
        replace(group, response_ids=(ids,), num_bytes=(1,), pairs=(), labels=(True,))
        for group in groups
        for ids in group.response_ids
    ]
    model, likelihood = mixtral(), bind(sft)
    backward(policy_of(model), NoReference(), likelihood, shared([[group] for group in alone]))
    without = gradients(model)
    model.zero_grad()
    _, routing = backward(
        replace(policy_of(model), router_loss=0.25), NoReference(), likelihood, shared([[group] for group in alone])
    )
    added = gradients(model) - without
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    losses, sizes = [], []
    for group in alone:
        ids = torch.tensor([[*group.prompt_ids, *group.response_ids[0]]])
        output = model(input_ids=ids, use_cache=False, output_router_logits=True)
        losses.append(output.aux_loss * ids.shape[1])
        sizes.append(ids.shape[1])
    expected = torch.stack(losses).sum() / sum(sizes)
    (0.25 * expected).backward()
    assert routing.num_tokens == sum(sizes)
    assert routing.metrics()["moe/router_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    assert (added - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_packed_is_one_response_at_a_time(checkpointing):
    """A prompt's tokens count once in both, and nothing changes where activations are computed again."""
    groups, seen = random_groups(LAYOUT), []
    for attention in (None, "sdpa"):
        model = mixtral()
        if attention is not None:
            model.set_attn_implementation(attention)
            CHECKPOINTING[checkpointing](model)
        policy = replace(policy_of(model), router_loss=1.0)
        policy.train()
        values, routing = backward(policy, NoReference(), DPO, shared([groups[:2], groups[2:]]))
        seen.append((values["loss"], gradients(model), routing))
    (loss, packed, routing), (loss_alone, alone, routing_alone) = seen
    torch.testing.assert_close(loss, loss_alone, atol=1e-5, rtol=1e-5)
    assert (packed - alone).norm() <= 1e-4 * alone.norm()
    for name, value in routing.metrics().items():
        torch.testing.assert_close(value, routing_alone.metrics()[name], atol=1e-5, rtol=1e-5)
    assert routing._loads.sum(dim=-1).tolist() == [2 * routing.num_tokens] * 2


def test_loads_by_hand():
    routing = Routing((), 1, 0.0, 8)
    routing._loads = torch.tensor([[6.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    metrics = {name: value.item() for name, value in routing.metrics().items()}
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)) / math.log(4)
    assert metrics == pytest.approx({"moe/busiest": 2.0, "moe/entropy": (entropy + 1) / 2, "moe/idle": 1 / 4})
    assert list(experts.METRICS)[:3] == list(metrics)


def test_a_dense_model_has_no_routing():
    _, routing = backward(policy_of(tiny_model()), NoReference(), DPO, shared([random_groups(LAYOUT)]))
    assert routing.metrics() == {}
    assert routers_of(tiny_model()) == ()


def test_a_router_with_an_adapter():
    """peft puts itself around the router's weight: the router is found with it, and frozen with it."""
    model = mixtral()
    get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"]))
    routers = routers_of(model)
    assert [type(router.module).__name__ for router in routers] == ["MixtralTopKRouter"] * 2
    assert [type(router.block).__name__ for router in routers] == ["MixtralSparseMoeBlock"] * 2
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    experts.freeze(model, routers)
    assert len(trained) == 4
    assert not any(weight.requires_grad for weight in trained)
    with pytest.raises(ValueError, match="has no effect on MixtralForCausalLM: an adapter leaves it as it is"):
        experts.freeze(model, routers)


def test_a_router_that_draws_while_it_is_trained_does_not_here():
    """SparseMixer (Phi-3.5-MoE) samples experts in training mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("phimoe", **SHAPE, **EXPERTS)
    policy = policy_of(AutoModelForCausalLM.from_config(config))
    batch = collate(random_groups(LAYOUT))
    with torch.no_grad():
        policy.model.eval()
        expected = policy.outputs(batch).sums
        policy.train()
        assert policy.model.model.layers[0].training
        assert torch.equal(policy.outputs(batch).sums, expected)
        policy.model.train()
        assert not torch.equal(policy.outputs(batch).sums, expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made, tokenizer = {}, byte_bpe()
    kinds = {"dense": ("llama", {}), "mixtral": ("mixtral", EXPERTS), "no_loss": ("glm4_moe", {})}
    kinds["no_loss"] = (
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    )
    for name, (kind, options) in kinds.items():
        made[name] = tmp_path_factory.mktemp(name)
        tiny_model(kind, vocab_size=len(tokenizer), **options).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    rows = [
        {"prompt": "what is it?", "chosen": "a cat.", "rejected": "the dog"},
        {"prompt": "1", "chosen": "2", "rejected": "3 4"},
    ]
    (made["dense"] / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return made


REFUSED = {
    ("dense", "router_loss"): "model.router_loss=config has no effect on LlamaForCausalLM: it has no experts",
    ("dense", "freeze_router"): "model.freeze_router=true has no effect on LlamaForCausalLM: it has no experts",
    ("no_loss", "router_loss"): "Glm4MoeForCausalLM balances its experts without a loss",
}


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_refused_of_a_model(case, folders):
    name, option = case
    value = {"router_loss": "config", "freeze_router": "true"}[option]
    config = resolved("model=pretrained", f"model.path={folders[name]}", f"model.{option}={value}")
    with pytest.raises(ValueError, match=REFUSED[case]):
        trained_model(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.router_loss=yes"], "model.router_loss=yes must be a number above 0, config"),
        (["model.router_loss=-1"], "must be a number above 0"),
        (["model.router_loss=config", "model.compile=true"], "does not go with model.compile=true"),
    ],
)
def test_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolved(*overrides)


def test_runs(folders, tmp_path):
    """The coefficient of the config, a frozen router, and the metrics of both."""
    pairs = folders["dense"] / "pairs.jsonl"
    base = [
        "model=pretrained",
        f"model.path={folders['mixtral']}",
        "data=jsonl",
        f"data.path={pairs}",
        "tracking=none",
    ]
    base += [
        "trainer.batch_size=4",
        "trainer.max_steps=1",
        "optim.lr=0.01",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
    ]
    done = train(*base, "model.router_loss=config", f"output_dir={tmp_path / 'balanced'}")
    assert done.returncode == 0, done.stderr
    assert "its load-balancing loss is added with coefficient 0.001" in done.stdout
    (row,) = [json.loads(line) for line in (tmp_path / "balanced" / "metrics.jsonl").read_text().splitlines()]
    assert {f"train/{name}" for name in experts.METRICS} <= row.keys()
    assert train(*base, "model.freeze_router=true", f"output_dir={tmp_path / 'frozen'}").returncode == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (folders["mixtral"], tmp_path / "frozen" / "policy")
    )
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if "gate.weight" in name} <= same
    assert len(same) < len(before) / 2
