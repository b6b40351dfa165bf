"""Programs in benchmarks/ time the step that train.py takes; those that cannot run here keep what they measured."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import count

import pytest
import torch

from tests.support.command import ROOT
from tests.support.programs import program  # noqa: F401
from tests.support.tiny import random_groups, tiny_model


@pytest.fixture
def gpu(program, monkeypatch):  # noqa: F811
    """benchmarks/gpu.py as on a machine with a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79 * 2**30)
    return program("gpu")


def test_one_shape_out_of_memory_loses_no_other(gpu, monkeypatch, tmp_path, capsys):
    def measure(shape, lengths, variant, args):
        if variant == "compiled":
            raise torch.OutOfMemoryError
        speed = {"pairs_per_second": 2.0, "tokens_per_second": 9.0, "mfu": 0.5, "peak_gib": 7.0, "recompilations": 0}
        return {"shape": shape, "lengths": lengths, "variant": variant} | speed

    monkeypatch.setattr(gpu, "measure", measure)
    path = tmp_path / "gpu.json"
    variants = ["as shipped", "compiled", "sdpa by piece"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--variants", *variants, "--out", str(path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert rows[1]["failure"] == "out of memory, at 79.0 GiB"
    assert [row.get("pairs_per_second") for row in rows] == [2.0, None, 2.0]
    assert "out of memory" in capsys.readouterr().out


def test_the_step_that_is_timed_trains_the_model(gpu):
    model, groups = tiny_model(), random_groups([(5, (4, 6)), (7, (3, 3))])
    before = model.lm_head.weight.detach().clone()
    step = gpu.Stepper(model, groups)
    assert step(groups) > 0
    assert step.steps == 1
    assert not torch.equal(model.lm_head.weight, before)


@pytest.fixture
def soak(program):  # noqa: F811
    """benchmarks/soak.py."""
    return program("soak")


def watched_run(memory=lambda second: 500.0, files=lambda second: 40, step=lambda second: 4 * second):
    """Ten minutes as benchmarks/soak.py sees them: four steps a second, an evaluation a minute."""
    samples = []
    for second in range(600):
        cpu = 0.2 * second
        shared = {"threads": 9, "wandb": 15.0, "folder": 1.0, "busy": cpu, "evaluations": second // 60}
        own = {"memory": memory(second), "files": files(second), "cpu": cpu, "steps": step(second)}
        samples.append({"seconds": float(second), **shared, **own})
    return samples


def turns(old=1.0, noise=0.05, num=40):
    """CPU seconds a pair of an old run and a young one, on a machine whose speed doubles and halves meanwhile."""
    drift = [0.004 * 2 ** ((index // 10) % 2) for index in range(num)]
    return [[old * cost * (1 + noise * (-1) ** index), cost] for index, cost in enumerate(drift)]


def test_a_run_that_stays_as_it_began_is_told_from_one_that_does_not(soak):
    assert soak.judged_run(watched_run(), turns())["faults"] == []
    assert soak.judged_run(watched_run(memory=lambda second: 500 + 0.02 * second), turns())["faults"] == []  # 2 %
    (grown,) = soak.judged_run(watched_run(memory=lambda second: 500 + 0.03 * second), turns())["faults"]
    assert "memory grew from 502 to 516 MiB" in grown
    trimmed = watched_run(memory=lambda second: 500 + 40 * (second > 300 and second % 60 > 20))
    assert soak.judged_run(trimmed, turns())["faults"] == []
    (leaking,) = soak.judged_run(watched_run(files=lambda second: 40 + second // 100), turns())["faults"]
    assert leaking == "files: 40 before, 45 after"
    (slower,) = soak.judged_run(watched_run(), turns(old=1.05))["faults"]
    assert slower.startswith("a pair takes 1.05")
    assert soak.judged_run(watched_run(), turns(old=1.015))["faults"] == []
    (unclear,) = soak.judged_run(watched_run(), turns(noise=0.5))["faults"]
    assert "run longer, or alone" in unclear


def test_a_window_counts_steps_alone(soak):
    def costs(samples):
        return [cost for _, cost in soak.windows(samples[:9])]

    assert costs(watched_run()) == [pytest.approx(0.2 / (4 * soak.BATCH))]
    assert costs(watched_run(step=lambda second: 4 * min(second, 5))) == []  # an evaluation that has not ended
    assert costs(watched_run()[56:]) == []  # one that has


@pytest.mark.slow  # by the clock of a machine that does nothing else
def test_every_turn_has_its_window(soak, monkeypatch):
    monkeypatch.setattr(soak, "WINDOW", 1)
    steps = ({"steps": step, "evaluations": 0} for step in count())
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        process.send_signal(signal.SIGSTOP)
        cost = soak.cost_alone(process, partial(next, steps))
        process.kill()
    assert 0.2 < cost * soak.BATCH < 1.1  # a step a second


@pytest.fixture
def effects(program):  # noqa: F811
    """benchmarks/lab_effects.py."""
    return program("lab_effects")


def policy_of(beta, gold, **also):
    """A policy whose answers to four prompts are worth `gold` a hundredth more or less: two differ by a standard error
    of 0.012 if one of them is that of beta 0.3."""
    row = {"beta": beta, "gold": gold, "win_rate": 0.65, "tokens": 12.0, "degenerate": False, "end_shift": -0.1}
    noise = 0.01 if beta == 0.3 else -0.01
    return row | also | {"by_prompt": [gold + noise, gold - noise, gold + noise, gold - noise]}


def test_the_targets_of_the_lab_are_met_and_missed_by_hand(effects):
    loose = policy_of(0.02, 0.6, tokens=30.0, degenerate=True, end_shift=-1.5)
    cells = {
        "demo": [loose, policy_of(0.3, 0.7), policy_of(3, 0.62)],
        "none": [policy_of(0.02, 0.5), policy_of(3, 0.4)],
        "no_length_bias": [policy_of(0.02, 0.6), policy_of(3, 0.6, tokens=90.0)],
    }
    initial = {"gold": 0.5, "tokens": 11.0}
    assert set(effects.targets_of(cells, initial).values()) == {True}
    missed = [
        ({"demo": [loose, policy_of(0.3, 0.61), policy_of(3, 0.6)]}, 3),  # gain 0.11; both ends too near
        ({"demo": [loose, policy_of(0.3, 0.7, win_rate=0.59), policy_of(3, 0.62)]}, 1),
        ({"demo": [loose | {"degenerate": False}, policy_of(0.3, 0.7), policy_of(3, 0.62)]}, 1),
        ({"none": [policy_of(0.02, 0.5), policy_of(3, 0.7)]}, 1),
        ({"no_length_bias": [policy_of(0.02, 0.6, tokens=14.0)]}, 1),
    ]
    for changed, number in missed:
        assert list(effects.targets_of(cells | changed, initial).values()).count(False) == number, changed


@pytest.fixture
def pages(program):  # noqa: F811
    """benchmarks/page.py."""
    return program("page")


@pytest.mark.parametrize(
    ("name", "page", "table"),
    [
        ("lab_effects", "README.md", lambda _: lambda result: result["told"]),
        ("lab_effects", "docs/lab.md", lambda pages: pages.lab_effects_text),
        ("lab_models", "docs/lab.md", lambda pages: pages.lab_models_table),
        ("references", "docs/references.md", lambda pages: pages.references_table),
        ("adapter_memory", "docs/adapters.md", lambda pages: pages.adapter_memory_table),
    ],
)
def test_tables_of_results_are_what_was_measured(pages, name, page, table):
    assert f"{table(pages)(pages.read(name))}\n" in (ROOT / page).read_text()


def test_the_page_of_the_real_model_is_what_was_measured(pages):
    text = (ROOT / "docs" / "real_model.md").read_text()
    for name, (source, make) in pages.REAL_MODEL.items():
        assert f"<!-- {name} -->\n{make(pages.read(source))}\n<!-- end -->" in text


# --- make gpu-check


@pytest.fixture
def check(program):  # noqa: F811
    """benchmarks/gpu_check.py."""
    return program("gpu_check")


def test_what_sees_what_in_a_pack_by_hand(check):
    # a prompt of two tokens with responses of two and one, and a second group of one and one
    seen = check.visible(((2, (2, 1)), (1, (1,))), None).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],  # the second response: the prompt and itself
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert check.visible(((2, (2, 1)),), 2)[3:].int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_attention_is_compared_with_the_formula(check, monkeypatch):
    monkeypatch.setattr(check, "LAYOUTS", {"pairs": ((3, (2, 5)), (1, (4, 1)))})
    found = check.attention("cpu")
    assert found["ok"]
    assert {row["backend"] for row in found["rows"]} == {"sdpa", "eager"}
    assert len(found["rows"]) == 2 * 2 * 1 * 2  # backends, heads, layouts, windows
    formula = check.by_formula
    monkeypatch.setattr(check, "by_formula", lambda q, k, v, seen: formula(q, k, v, seen.roll(1, 1) | seen))
    assert not check.attention("cpu")["ok"]
    monkeypatch.setattr(check, "HEADS", [(4, 2, 8), (3, 2, 8)])  # three heads cannot share two
    monkeypatch.setattr(check, "by_formula", formula)
    rows = check.attention("cpu")["rows"]
    assert {row["heads"] for row in rows if row["ok"]} == {(4, 2, 8)}
    assert {row["heads"] for row in rows if "raised" in row} == {(3, 2, 8)}


def test_a_whole_model_is_compared_with_float32(check, monkeypatch):
    assert check.whole_model("cpu")["ok"]
    monkeypatch.setattr(check, "GRADIENT_BOUND", 1e-4)  # of bfloat16: it must not be met
    assert not check.whole_model("cpu")["ok"]


def test_a_part_that_fails_or_takes_too_long_ends_no_other(check, monkeypatch, tmp_path, capsys):
    def part(code, seconds=20.0):
        result, log = tmp_path / "result.json", tmp_path / "log"
        return check.run_part([sys.executable, "-c", code.format(result)], seconds, result, log)

    assert part("import sys; print('one'); sys.exit('no such kernel')")["said"] == "status 1: no such kernel"
    assert part("import time; time.sleep(60)", 0.5) == {"ok": False, "said": "not done after 0 s", "seconds": 0.5}
    good = part("open('{}', 'w').write('{{\"ok\": true, \"said\": \"fine\"}}')")
    assert (good["ok"], good["said"]) == (True, "fine")
    kept = []
    found = check.run_all(["whole_model", "attention"], "cpu", tmp_path, 0.0, lambda parts: kept.append(dict(parts)))
    assert [each["said"] for each in found.values()] == ["no time was left"] * 2
    assert [list(parts) for parts in kept] == [["whole_model"], ["whole_model", "attention"]]
    assert "FAILED  whole_model" in capsys.readouterr().out


def test_results_stand_beside_what_else_is_known_of_a_card(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    path = check.card_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "gpu_h100_80gb_hbm3.json"
    path.write_text('{"card": "NVIDIA H100 80GB HBM3", "gpu_1b": 7}')
    check.kept_in(path)({"attention": {"ok": True}})
    kept = json.loads(path.read_text())
    assert (kept["gpu_1b"], kept["check"]["parts"]) == (7, {"attention": {"ok": True}})


def test_without_a_device_a_line_says_so():
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # on any machine: else the whole check would run
    command = [sys.executable, "benchmarks/gpu_check.py"]
    ended = subprocess.run(command, cwd=ROOT, env=without, text=True, capture_output=True, check=True)
    assert ended.stdout == "gpu-check: no CUDA device is here, so nothing was checked\n"
