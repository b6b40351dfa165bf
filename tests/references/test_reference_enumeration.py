"""Every kind's log-probs confirmed by enumeration: all responses of a toy vocabulary, from trees of next-token
distributions that are computed prefix by prefix in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references import policies
from dpo_ref.references.interface import tempered
from dpo_ref.references.moving import bema, moving
from dpo_ref.references.policies import adapter_base
from dpo_ref.references.trajectory import trajectory
from dpo_ref.types import TokenGroup, digest
from tests.support.reference_contexts import TOKENIZER, context_for, mixed, workspace
from tests.support.tiny import disturbed, policy_of, tiny_model

V, END, LONGEST = 6, 2, 3
PROMPT = [3, 5, 4, 1]
BEGIN = 1  # of the tokenizer: what `prior` starts from
WORDS = [token for token in range(V) if token != END]
# Every response there is: words and the end, or words up to the limit, the last of which may be the end.
RESPONSES = [[*words, END] for size in range(LONGEST) for words in itertools.product(WORDS, repeat=size)]
RESPONSES += [list(words) for words in itertools.product(WORDS, repeat=LONGEST)]


class Toy:
    """A tokenizer of six tokens, as far as references ask."""

    bos_token_id, eos_token_id = BEGIN, END

    def __len__(self):
        return V


def model(seed):
    return tiny_model(seed=seed, vocab_size=V, pad_token_id=0)


@torch.no_grad()
def tree(net, start):
    """log p of every response, one forward pass of the whole prefix a token, full logits in float64."""
    net = net.double()
    used = net.config._attn_implementation
    net.set_attn_implementation("eager")
    prefixes = {tuple(response[:size]) for response in RESPONSES for size in range(len(response))}
    tables = {p: net(torch.tensor([[*start, *p]])).logits[0, -1].log_softmax(-1) for p in prefixes}
    net.set_attn_implementation(used)
    net.float()
    return torch.stack([sum(tables[tuple(r[:i])][token] for i, token in enumerate(r)) for r in RESPONSES])


@pytest.fixture
def context(tmp_path):
    ids = tuple(map(list, RESPONSES))
    group = TokenGroup(0, digest("all"), PROMPT, ids, (1,) * len(ids), ((0, 1),))
    make, policy = (lambda source: model(int(source.path))), policy_of(model(0), Toy(), "toy")
    return replace(context_for(tmp_path, tokenizer=Toy(), make=make, groups=from_groups([group])), policy=policy)


def between(share):
    """Weights between model 0 and model 3."""
    net, other = model(0), model(3)
    with torch.no_grad():
        for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
            ours.mul_(1 - share).add_(share * theirs)
    return net


def moved(context):
    reference = moving(context, share=0.25, every=1)
    reference.update(model(3), 1, torch.tensor(True))
    return reference


def averaged(context):
    """beta = (1 + 3)^-1/2 and alpha = (1 + 3)^-1: three quarters of the way to the policy."""
    reference = bema(context, bias_power=1.0, lag=1, multiplier=3.0, every=1)
    reference.update(model(3), 1, torch.tensor(True))
    return reference


def reset(context):
    reference = moving(context, reset="round")
    reference.begin_round(model(3))
    return reference


def burning_in(context):
    reference = moving(context, share=1.0, every=1, burn_in=1)
    reference.update(model(3), 1, torch.tensor(True))
    return reference


def came_through(context):
    """Of folders, whose tokenizer is nobody's: the texts are said to be the same. Our loader wants larger models."""
    folders = [context.work.cache / str(seed) for seed in (0, 3)]
    for folder in folders:
        model(int(folder.name)).save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
    work = workspace(context.work.cache, lambda source: LlamaForCausalLM.from_pretrained(source.path), TOKENIZER)
    return trajectory(replace(context, work=work), path=[*map(str, folders)], shares=[0.7, 0.3])


def with_adapter(context, **options):
    AdapterOptions(lora_rank=2).put_on(context.policy.model)
    disturbed(context.policy.model)
    return adapter_base(context, **options)


PARTS = [{"reference": "initial"}, {"reference": "interpolate", "path": "3", "share": 1.0}, {"reference": "prior"}]
WEIGHTS = [2.0, 1.0, 1.0]


def parts():
    return torch.stack([tree(model(0), PROMPT), tree(model(3), PROMPT), tree(model(0), [BEGIN])])


SHARES = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)[:, None]
KINDS = {
    "initial": (policies.initial, lambda: tree(model(0), PROMPT)),
    "initial, live": (lambda c: policies.initial(c, cache="off"), lambda: tree(model(0), PROMPT)),
    "interpolate": (lambda c: policies.interpolate(c, path="3", share=0.3), lambda: tree(between(0.3), PROMPT)),
    "trajectory": (came_through, lambda: tree(between(0.3), PROMPT)),
    "prior": (policies.prior, lambda: tree(model(0), [BEGIN])),
    "moving": (moved, lambda: tree(between(0.25), PROMPT)),
    "moving, at a round's beginning": (reset, lambda: tree(model(3), PROMPT)),
    "moving, in its burn-in": (burning_in, lambda: tree(model(0), PROMPT)),
    "bema": (averaged, lambda: tree(between(0.75), PROMPT)),
    "adapter_base": (with_adapter, lambda: tree(model(0), PROMPT)),
    "adapter_base, live": (lambda c: with_adapter(c, cache="off"), lambda: tree(model(0), PROMPT)),
    "arithmetic mixture": (
        lambda c: mixed(c, *PARTS, weights=WEIGHTS, mean="arithmetic"),
        lambda: (SHARES * parts().exp()).sum(0).log(),
    ),
    "geometric mixture": (
        lambda c: mixed(c, *PARTS, weights=WEIGHTS, mean="geometric"),
        lambda: (SHARES * parts()).sum(0),
    ),
    "initial, tempered": (
        lambda c: tempered(policies.initial(c), strength=0.4),
        lambda: 0.4 * tree(model(0), PROMPT),
    ),
    "mixture of a tempered part": (
        lambda c: mixed(c, PARTS[0] | {"strength": 2.0}, PARTS[2], mean="geometric"),
        lambda: tree(model(0), PROMPT) + tree(model(0), [BEGIN]) / 2,
    ),
    "uniform_token": (
        policies.uniform_token,
        lambda: torch.tensor([-len(r) * math.log(V) for r in RESPONSES], dtype=torch.float64),
    ),
    "none": (policies.none, lambda: torch.zeros(len(RESPONSES), dtype=torch.float64)),
}


@pytest.fixture(autouse=True)
def one_text(monkeypatch):
    """The toy tokenizer has no template; other models are used with the same text."""
    monkeypatch.setattr(policies, "text_identity", lambda tokenizer: "toy")


@pytest.mark.parametrize("kind", KINDS)
def test_every_response_there_is(kind, context):
    make, expected = KINDS[kind]
    reference = make(context)
    sums = reference.logps(collate(list(context.groups))).sums
    torch.testing.assert_close(sums, expected(), atol=2e-4, rtol=0)
    total = float(sums.exp().sum())
    if reference.normalised:
        assert total == pytest.approx(1.0, abs=2e-4)
    else:
        assert total < 0.99 or total > 1.01


def test_the_normaliser_of_a_geometric_mixture_cancels_within_a_pair(context):
    """pi_ref proportional to the product: its log-ratios of two responses are those of the normalised one."""
    mixed = KINDS["geometric mixture"][0](context).logps(collate(list(context.groups))).sums
    normalised = mixed - mixed.logsumexp(0)
    assert float(normalised.exp().sum()) == pytest.approx(1.0)
    torch.testing.assert_close(mixed[3] - mixed[40], normalised[3] - normalised[40])
    assert abs(float(mixed.logsumexp(0))) > 0.01
