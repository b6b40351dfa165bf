"""What a run costs: operations against a counter of torch's, steps against the trainer's own, cadences by counting."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate, pack
from dpo_ref.models.sharding import Parts
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.references.policies import NoReference
from dpo_ref.training.cost import (
    Card,
    ModelShape,
    Speed,
    StepTime,
    Stopwatch,
    answers_seconds,
    estimated_speed,
    forward_speed,
    speed_of,
    timed_steps,
    times_due,
    within,
)
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig
from dpo_ref.training.trainer import train
from tests.support.tiny import policy_of, random_groups, tiny_model

GROUPS = random_groups([(9, (7, 5)), (4, (6, 11)), (3, (2, 2)), (12, (5, 9))])
PACK = partial(pack, tokens_per_batch=1000)


def test_operations_are_those_that_torch_counts():
    """Of products: torch counts the whole square of attention, we the half of it that is looked at."""
    model = tiny_model(vocab_size=503)
    shape, batch = ModelShape.of(model), collate(GROUPS[:1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy_of(model).outputs(batch)
    attention = 4 * shape.layers * shape.hidden * (9 * 10 / 2 + (9 * 7 + 7 * 8 / 2) + (9 * 5 + 5 * 6 / 2))
    products = sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    )
    norms = 2 * 21 * 5 * shape.hidden  # of five norms, whose weights are parameters of no product
    assert shape.forward_flops(GROUPS[0]) - attention == pytest.approx(products + norms, rel=1e-9)


def test_of_experts_those_count_that_are_chosen():
    dense = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1}
    shape = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 48, **dense}
    model = tiny_model("mixtral", **shape)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    tables = 2 * 61 * 32
    rest = sum(p.numel() for p in model.parameters()) - experts - tables
    assert experts == 4 * 3 * 32 * 48
    assert ModelShape.of(model).body == experts // 4 + rest


def test_a_card_takes_as_long_as_its_operations():
    """1 M parameters in the body, nothing else: 6 operations a token, at 37 % of 1 TFLOP/s."""
    shape = ModelShape(hidden=0, layers=0, vocabulary=0, body=1_000_000)
    speed = estimated_speed(shape, GROUPS, Card("toy", 1.0, 1.0))
    assert speed.tokens_per_second == pytest.approx(0.37e12 / 6e6)


def test_timed_steps_are_those_of_the_trainer():
    """The same weights after the same batches."""
    ours, theirs = tiny_model(), tiny_model()
    batches = [GROUPS[:2], GROUPS[2:]]

    def optim(model):
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return Optimisation(optimizer, Parts(optimizer), lambda step: 1e-2 / (step + 1), 1.0)

    config = TrainerConfig(batch_size=2)
    rounds = OfflineRounds(from_groups(GROUPS), config, PACK, 0)
    objective, nothing = bind(dpo, beta=0.3), NoReference()
    order = [step.groups for step in train(policy_of(theirs), nothing, objective, optim(theirs), rounds)]
    times = list(timed_steps(policy_of(ours), nothing, objective, optim(ours), order, PACK))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert [time.num_groups for time in times] == [2, 2]
    assert sum(time.num_tokens for time in times) == sum(group.num_tokens for group in GROUPS)
    assert all(time.gradient_seconds > 0 and time.update_seconds > 0 for time in times)
    assert len(batches) == len(times)


def test_the_speed_of_steps_is_their_tokens_by_their_seconds():
    times = [StepTime(2, 300, 1.0, 0.5), StepTime(2, 500, 3.0, 0.1)]
    speed = speed_of(times, batch_size=8)
    assert speed.tokens_per_second == 200
    assert speed.step_seconds(1000.0) == pytest.approx(5.3)
    assert speed.how == "measured on 2 steps, of 2 of a batch's 8 groups"
    assert speed_of(times, batch_size=2).how == "measured on 2 steps of 2 groups"
    assert Speed(10.0, 0.0, "").step_seconds(5.0) == 0.5


def test_the_forward_pass_leaves_the_policy_as_it_is():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    assert forward_speed(policy_of(model), GROUPS, PACK) > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_groups_within_a_number_of_tokens():
    """21, 21, 7 and 26 tokens."""
    assert [len(within(GROUPS, size)) for size in (1.0, 41.0, 42.0, 48.0, 49.0, 1e3)] == [1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("num_steps", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("every", [None, 1, 4, 50])
def test_how_often_something_is_due_is_counted_step_by_step(num_steps, every):
    between = [step for step in range(1, num_steps) if every and step % every == 0]
    assert times_due(num_steps, every) == 2 + len(between)


def test_a_cpu_takes_longer_for_more_answers_and_a_card_at_first_does_not():
    """0.1 s a token of two: 16 together take eight times that; of 20 in batches of 16 there are two."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert answers_seconds(0.1, 16, 16, 10, cpu) == pytest.approx(8.0)
    assert answers_seconds(0.1, 20, 16, 10, cpu) == pytest.approx(16.0)
    assert answers_seconds(0.1, 16, 16, 10, cuda) == pytest.approx(1.0)
    assert answers_seconds(0.1, 1, 16, 10, cpu) == pytest.approx(1.0)


def test_a_stopwatch_shows_what_it_times():
    shown = []

    def show(items, description, total):
        shown.append((description, total))
        return iter(items)

    watch = Stopwatch(show)
    assert list(watch([1, 2], "this", 2)) + list(watch([3], "this", 1)) == [1, 2, 3]
    assert shown == [("this", 2), ("this", 1)]
    assert list(watch.seconds) == ["this"]
