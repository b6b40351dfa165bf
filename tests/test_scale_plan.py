"""benchmarks/scale_plan.py: numbers derived by hand, peaks measured on one card, and the page of its tables."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ref.models.attention import register
from dpo_ref.models.layers import CHECKPOINTING
from dpo_ref.models.loading import Policy
from dpo_ref.models.memory import ACTIVATIONS, step_memory
from dpo_ref.types import TokenGroup
from tests.support.command import ROOT
from tests.support.programs import program  # noqa: F401


@pytest.fixture
def plan(program):  # noqa: F811
    """benchmarks/scale_plan.py."""
    return program("scale_plan")


def mean_pair():
    """A pair of the page's lengths."""
    return TokenGroup(0, "", [1] * 170, ([1] * 300, [1] * 300), (1, 1), ((0, 1),))


def test_the_page_has_the_tables_that_are_printed(plan):
    page = plan.PAGE.read_text()
    assert plan.filled(page, plan.Assumed()) == page
    assert plan.filled(page, plan.Assumed(price=3.0)) != page
    with pytest.raises(ValueError, match="0 places for plan_parameters"):
        plan.filled("", plan.Assumed())


def test_shapes_are_those_of_the_published_models(plan):
    assert [shape.total for shape in plan.SHAPES.values()] == [1_235_814_400, 8_030_261_248, 70_553_706_496]
    # rank 16 on q, o: 8192 each; k, v: 5120 each; gate, up, down: 18432 each
    assert plan.SHAPES["8 B"].adapter() == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_useful_operations_are_those_of_the_benchmark(plan, program):  # noqa: F811
    gpu = program("gpu")
    for name, shape in (("1 B", "1b"), ("8 B", "8b")):
        assert plan.useful_flops(plan.SHAPES[name]) == pytest.approx(
            gpu.useful_flops([mean_pair()], gpu.SHAPES[shape]), rel=1e-12
        )


def test_lengths_are_spread_as_the_benchmarks_draw_them(plan, program):  # noqa: F811
    case = program("pairs").CASES["ultrafeedback"]
    assert {"prompt": case.prompt, "response": case.response} == plan.SPREAD


def test_states_of_a_rank(plan):
    shape = plan.SHAPES["8 B"]
    assert plan.states(shape, "adamw", 8) == 16 * 8_030_261_248 / 8
    assert plan.states(shape, "adamw_bf16", 64) == 8 * 8_030_261_248 / 64
    assert plan.states(shape, "LoRA 16") == 2 * 8_030_261_248 + 16 * 41_943_040


@pytest.mark.parametrize(
    ("size", "checkpointing", "gib"), [("8 B", "off", 117), ("8 B", "selective", 89), ("1 B", "off", 28)]
)
def test_memory_is_what_one_card_was_measured_to_take(plan, size, checkpointing, gib):
    """Of docs/performance.md, whose 1 B has a head of its own."""
    shape = plan.SHAPES[size] if size == "8 B" else plan.Shape(2048, 8192, 16, 512)
    size = plan.memory(shape, "adamw_bf16", False, 1, checkpointing, repeated=True)
    assert size / 2**30 == pytest.approx(gib, rel=0.02)


def test_those_measurements_are_in_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "gpu_h200.json").read_text())
    peaks = [round(row["peak_gib"]) for key in ("gpu_1b", "gpu_8b") for row in results[key]["rows"]]
    assert {28, 117} <= set(peaks)


def test_a_layer_keeps_what_tensors_without_values_keep(plan):
    """Of bfloat16 weights, which is what flows under fsdp too."""
    kept = {}
    for layers in (2, 3):
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=100, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.set_attn_implementation(register("sdpa"))
        CHECKPOINTING["off"](model)
        policy = Policy(lambda model=model: model, None, torch.bfloat16)
        kept[layers] = step_memory(policy, [mean_pair()] * 4, 1, torch.device("cpu")).parts[ACTIVATIONS]
    by_token = (kept[3] - kept[2]) / (4 * 770)
    assert plan.kept_of_layer(plan.SHAPES["8 B"], "bfloat16") == pytest.approx(by_token, rel=0.01)


def test_bytes_of_a_step(plan):
    shape = plan.SHAPES["8 B"]
    assert plan.sent_by_ddp(shape, 8, shape.total) == pytest.approx(2 * 7 / 8 * 4 * 8_030_261_248)
    sent, head = plan.sent_by_fsdp(shape, 8), 128256 * 4096
    layers = 8_030_261_248 - 2 * head - 4096
    assert sent.layers_forward + sent.layers_backward + sent.layers_reduced == pytest.approx(7 / 8 * 8 * layers)
    assert sent.head + sent.head_reduced == pytest.approx(7 / 8 * 8 * head)
    assert sent.of_pass() - sent.of_pass(reduced=False) == pytest.approx(7 / 8 * 4 * (layers + head + 4096))
    assert plan.sent_by_fsdp(plan.SHAPES["1 B"], 8).head == 0


def test_from_the_break_even_on_nothing_of_the_layers_waits(plan):
    assumed, shape = plan.Assumed(), plan.SHAPES["8 B"]
    tokens = plan.break_even(assumed, plan.NVLINK, 8)
    assert tokens["forward"] == pytest.approx(7 / 8 * 0.5 * 989e12 / (0.8 * 450e9))
    exposed = 7 / 8 * (8 + 6) * shape.head / (0.8 * 450e9)  # head, embedding
    above, below = (plan.pass_of(shape, 8, factor * tokens["every_pass"], assumed).waiting for factor in (1.01, 0.9))
    assert above == pytest.approx(exposed, rel=1e-3)
    assert below > 1.1 * exposed


def test_pairs_that_are_shared_are_as_balanced_as_they_can_be(plan):
    assert plan.imbalance(128, 1) == 1
    assert plan.imbalance(1024, 8) < 1.01 < plan.imbalance(128, 64) < plan.imbalance(128, 128)


def test_hours_and_euros(plan):
    assumed = plan.Assumed(price=2.0)
    assert assumed.euros(8, 1800) == 8.0
    filled, trained = plan.epoch(plan.SHAPES["8 B"], 8, 128, plan.Assumed())
    least = 61135 * plan.useful_flops(plan.SHAPES["8 B"]) / (8 * 0.5 * 989e12)
    assert least < trained < 1.1 * least
    assert least / 3 < filled < 1.2 * least / 3


def test_the_script_for_a_cluster_is_one_and_its_commands_compose():
    """Bash reads it, and Hydra both command lines that it may come to."""
    import re
    import subprocess

    from tests.support.command import composed

    script = (ROOT / "examples" / "train.slurm").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lists = [" ".join(words.split()) for words in re.findall(r"words=\(([^)]*)\)", script)]
    for words in lists:
        assert composed(*words.replace('"$run"', "outputs/run").split())[0].parallel["_target_"].endswith(".fsdp")
    assert len(lists) == 2
