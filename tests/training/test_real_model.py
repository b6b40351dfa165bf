"""A pretrained model that nobody here trained, from end to end: losses, resume, export, evaluation.

    DPO_REF_REAL_MODEL=<folder of SmolLM2-135M-Instruct> python -m pytest -m slow tests/training/test_real_model.py

Some minutes on two cores and 4 GiB. `benchmarks/real_model.py` compares the same with TRL on more pairs.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.data.packing import epoch_order
from tests.support import microdpo
from tests.support.command import train, typed

MODEL = os.environ.get("DPO_REF_REAL_MODEL")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MODEL is None, reason="DPO_REF_REAL_MODEL names no folder")]

PAIRS = [
    ("Name a river in France.", "The Loire is a river in France.", "Berlin."),
    ("What is 7 times 6?", "7 times 6 is 42.", "I think that it might be something like 40, or maybe 44."),
    (
        "Why is the sky blue?",
        "Air scatters blue light more than red light.",
        "Because the sea is blue, and it shines.",
    ),
    ("Translate 'good morning' to German.", "Guten Morgen!", "Good morning in German is good morning."),
    ("Give me a synonym of quick.", "Fast.", "A synonym of quick is the word quick itself."),
    ("Write a line about rain.", "Rain taps on the tin roof like a patient friend.", "rain rain rain rain"),
    ("Is a whale a fish?", "No, a whale is a mammal.", "Yes."),
    ("Count to five.", "1, 2, 3, 4, 5", "1, 2, 3, 5, 8, 13"),
]
BATCH, STEPS, BETA, LR = 2, 3, 0.1, 1e-5
FORMATS = {
    "text": lambda x, chosen, rejected: {"prompt": x, "chosen": chosen, "rejected": rejected},
    "hh": lambda x, chosen, rejected: {
        side: f"\n\nHuman: {x}\n\nAssistant: {answer}" for side, answer in (("chosen", chosen), ("rejected", rejected))
    },
}
DATA = {"text": "jsonl", "hh": "hh"}


@pytest.fixture(params=FORMATS)
def rows(request, tmp_path):
    """The words that name the pairs in a layout, and their file as the one-page method reads it, in training order."""
    make = FORMATS[request.param]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(make(*pair)) + "\n" for pair in PAIRS))
    ordered = [FORMATS["text"](*PAIRS[index]) for index in epoch_order(len(PAIRS), 0, 0)]
    (tmp_path / "ordered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
    return [f"data={DATA[request.param]}", f"data.path={tmp_path / 'pairs.jsonl'}"], tmp_path / "ordered.jsonl"


def run(words, folder, *more):
    done = train(
        "model=smollm2_135m", f"model.path={MODEL}", "tracking=none", f"output_dir={folder}", *words,
        f"trainer.batch_size={BATCH}", f"beta={BETA}", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_losses_are_those_of_the_method_on_one_page(rows, tmp_path):
    words, ordered = rows
    constant = ["optim.schedule=constant", "optim.warmup_ratio=0", "optim.max_grad_norm=null", f"optim.lr={LR}"]
    run(words, tmp_path / "run", *constant, f"trainer.max_steps={STEPS}")
    said = StringIO()
    with redirect_stdout(said):
        microdpo.main([
            f"--model={MODEL}", f"--pairs={ordered}", "--objective=dpo", "--reference=initial", f"--beta={BETA}",
            f"--lr={LR}", f"--batch={BATCH}", f"--steps={STEPS}",
        ])  # fmt: skip
    expected = [float(line) for line in said.getvalue().split()]
    assert losses_of(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 1e-3  # it learns, so a reference or an update that is missing would show


def test_losses_are_trl_s(tmp_path):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    messages = [
        {"prompt": [{"role": "user", "content": x}], "chosen": [{"role": "assistant", "content": chosen}],
         "rejected": [{"role": "assistant", "content": rejected}]}
        for x, chosen, rejected in PAIRS
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in messages))
    program = Path(__file__).parents[2] / "benchmarks" / "real_model.py"
    words = ["--model", MODEL, "--rows", str(tmp_path / "rows.jsonl"), "--tools", "ours", "trl-default"]
    words += ["--batch", "2", "--steps", "3", "--threads", "1", "--out", str(tmp_path / "result.json")]
    subprocess.run([sys.executable, str(program), *words], check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["largest_loss_difference"] < 1e-4
    assert max(abs(loss - math.log(2)) for loss in result["tools"]["ours"]["losses"]) > 1e-3  # it has moved


@pytest.mark.parametrize("more", [[], ["model.lora_rank=4"]], ids=["full", "LoRA"])
def test_a_run_with_default_settings_goes_on_ends_and_loads_elsewhere(rows, more, tmp_path):
    words, _ = rows
    words = [*words, *more, "optim.schedule=constant", "optim.warmup_ratio=0"]
    said = run(words, tmp_path / "whole", "trainer.max_steps=2").stdout
    assert "optim.lr=1e-0" in said
    run(words, tmp_path / "parts", "trainer.max_steps=1")
    assert train(f"resume={tmp_path / 'parts'}", "trainer.max_steps=2", "tracking=none").returncode == 0
    whole, parts = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    initial = load_file(Path(MODEL) / "model.safetensors")
    assert any(not torch.equal(value.float(), whole[name]) for name, value in initial.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "policy")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_run_is_evaluated(tmp_path):
    held_out = [FORMATS["text"](*pair) for pair in PAIRS[:3]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(FORMATS["text"](*pair)) + "\n" for pair in PAIRS))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    words = ["data=jsonl", f"data.path={tmp_path / 'pairs.jsonl'}", f"data.eval_path={tmp_path / 'held_out.jsonl'}"]
    run(words, tmp_path / "run", "trainer.max_steps=2")
    done = typed(
        "evaluate.py", f"policy={tmp_path / 'run'}", "tracking=none", "generation.samples_per_prompt=1",
        "generation.max_new_tokens=24",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert 0 <= evaluation["metrics"]["kl/initial"] < 1
    assert (tmp_path / "run" / "evaluation" / "report.html").is_file()
