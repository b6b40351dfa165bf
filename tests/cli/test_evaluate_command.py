"""`python evaluate.py` as a user runs it, on tiny models: stages, repeatability, sweeps with holes."""

import csv
import json
import shutil
from dataclasses import replace

import pytest

from dpo_ref.cli import evaluate as evaluate_command
from dpo_ref.evaluation import results, stages
from dpo_ref.evaluation.results import Evaluated, Evaluation
from dpo_ref.lab.models import locate
from dpo_ref.models.loading import load_tokenizer
from dpo_ref.reports.diagnostics import diagnostics_section
from tests.support.command import train, typed_afresh
from tests.support.evaluate_command import DATA, PLAIN, QUICK, TRAIN, evaluate, measure, numbers
from tests.support.faults import forge_summary, summary
from tests.support.metric_table import ROWS, unlisted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(*TRAIN, f"output_dir={folder}", "beta=0.1").returncode == 0
    evaluate(f"policy={folder}", *QUICK)
    return folder


def test_what_is_measured(run):
    evaluation = numbers(run / "evaluation")
    assert evaluation["baseline"] == "initial"
    assert (evaluation["num_prompts"], evaluation["num_generations"], evaluation["beta"]) == (10, 20, 0.1)
    metrics = evaluation["metrics"]
    expected = ("gold/mean", "winrate/initial", "winrate/initial_low", "lengths/response", "ended/share")
    expected += (
        "repetition/seq_rep_4",
        "kl/initial",
        "kl/initial_se",
        "rewards/accuracies",
        "rewards/length_baseline",
    )
    assert all(metrics[key] is not None for key in (*expected, "eos/chosen_logratio"))
    assert metrics["kl/initial"] > 0
    assert unlisted(metrics) == set()
    elsewhere = {results.PAIR_FILE, results.AT_TEMPERATURE, results.DEGENERATE, results.SECONDS, results.LOSS}
    missing = set(results.METRICS) - {ROWS[key] for key in metrics} - elsewhere
    assert not [metric.key for metric in missing if not metric.by_judge]


def test_all_checkpoints_of_a_run_are_evaluated(tmp_path):
    run = tmp_path / "run"
    steps = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.keep_checkpoints=null"]
    assert train(*TRAIN, *steps, f"output_dir={run}", "beta=0.1").returncode == 0
    measure(f"policy={run}", *QUICK)
    evaluate(f"sweep={run}/checkpoints", *QUICK)
    folder = run / "evaluation" / "checkpoints"
    rows = list(csv.DictReader((folder / "frontier.csv").read_text().splitlines()))
    assert [(row["series"], row["step"]) for row in rows] == [("dpo, beta 0.1", "2"), ("dpo, beta 0.1", "4")]
    last = numbers(folder / "step-00000004")["metrics"]
    assert last == pytest.approx(numbers(run / "evaluation")["metrics"], nan_ok=True)  # its weights are the policy's
    assert numbers(folder / "step-00000002")["metrics"]["kl/initial"] < last["kl/initial"]
    assert "optimiser step" in (folder / "report.html").read_text()


def test_twice_is_the_same_and_scoring_again_generates_nothing(run, monkeypatch):
    before = numbers(run / "evaluation")
    stamp = (run / "evaluation" / "generations.jsonl").stat().st_mtime_ns

    def no_generation(*arguments):
        raise AssertionError("generated again")

    monkeypatch.setattr(stages, "write_generations", no_generation)
    for stage in ("all", "score", "report"):
        measure(f"policy={run}", *QUICK, f"stage={stage}")
        assert numbers(run / "evaluation") == before
    assert (run / "evaluation" / "generations.jsonl").stat().st_mtime_ns == stamp


def test_other_options_generate_anew(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    stamp = (copy / "evaluation" / "generations.jsonl").read_text()
    measure(f"policy={copy}", *PLAIN, "seed=1")
    assert (copy / "evaluation" / "generations.jsonl").read_text() != stamp
    page = copy / "evaluation" / "report.html"
    page.unlink()
    evaluate(f"policy={copy}", *QUICK, "stage=report")
    assert page.is_file()


def test_against_another_run_and_for_a_model_folder(run, tmp_path):
    measure(f"policy={run}", *PLAIN, f"baseline={run}", f"output_dir={tmp_path / 'itself'}")
    metrics = numbers(tmp_path / "itself")["metrics"]
    assert metrics["winrate/run"] == 0.5
    evaluate("policy=lab:tiny", *PLAIN, f"output_dir={tmp_path / 'plain'}", *DATA)
    plain = numbers(tmp_path / "plain")
    assert plain["baseline"] is None
    assert "kl/initial" not in plain["metrics"]


def test_a_base_model_gets_its_template_from_the_run(tmp_path, monkeypatch):
    """Its folder has none: policy and initial policy are asked in the words that training used."""
    monkeypatch.chdir(tmp_path)
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(locate("lab:tiny"), base)
    for name in ("chat_template.jinja", "digests.json"):
        (base / name).unlink()
    overrides = [*DATA, f"model.path={base}", "trainer.max_steps=1", "tracking=none", f"output_dir={run}"]
    refused = train(*overrides)
    assert refused.returncode == 1
    assert "no chat template; choose one with model.template=" in refused.stderr
    shutil.rmtree(run)
    done = train(*overrides, "model.template=plain")
    assert done.returncode == 0, done.stderr
    assert "Human: " in (run / "policy" / "chat_template.jinja").read_text()
    measure(f"policy={run}", *PLAIN)
    generations = [json.loads(line) for line in (run / "evaluation" / "generations.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(str(run / "policy"))
    assert tokenizer.decode(generations[0]["prompt_ids"]).endswith("\n\nAssistant:")
    assert numbers(run / "evaluation")["metrics"]["winrate/initial"] is not None


def test_greedy_answers_have_no_kl(run, tmp_path):
    measure(f"policy={run}", "generation=greedy", *QUICK[:2], f"output_dir={tmp_path / 'greedy'}")
    metrics = numbers(tmp_path / "greedy")["metrics"]
    assert "kl/initial" not in metrics
    assert metrics["rewards/accuracies"] is not None
    assert "they were drawn with temperature 0 and top-p 1, not from the policy" in diagnostics_section(
        tmp_path / "greedy"
    )


def test_a_sweep_with_a_failed_job_and_a_hole(run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    shutil.copytree(run, sweep / "0_beta-0.1", ignore=shutil.ignore_patterns("evaluation"))
    (sweep / "1_beta--1").mkdir()
    (sweep / "1_beta--1" / "summary.json").write_text(json.dumps({"status": "failed", "error": "beta=-1 is no beta"}))
    (sweep / "2_beta-1").mkdir()
    evaluate(f"sweep={sweep}", *PLAIN)
    shown = capsys.readouterr().out
    assert "beta=-1 is no beta" in shown
    assert "2_beta-1" in shown
    assert {"sweep.csv", "sweep.png", "report.html"} <= {path.name for path in sweep.iterdir()}
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 4


def test_against_another_reference_on_purpose(run, tmp_path):
    """A run whose reference has changed since is refused, unless another one is asked for by name."""
    measure(f"policy={run}", *PLAIN, "reference=none", f"output_dir={tmp_path / 'none'}")
    free, own = (numbers(folder)["metrics"] for folder in (tmp_path / "none", run / "evaluation"))
    assert free["rewards/margins"] != own["rewards/margins"]
    assert "kl/loss_reference" not in free
    changed = shutil.copytree(run, tmp_path / "changed", ignore=shutil.ignore_patterns("evaluation"))
    record = summary(changed)
    record["identities"] |= {"loss_reference": "0" * 32, "loss_reference_weights": "1" * 32}
    forge_summary(changed, record)
    with pytest.raises(
        ValueError, match=r"was trained against reference=initial 000000000000, and that is \w{12} now"
    ):
        measure(f"policy={changed}", *PLAIN)
    measure(f"policy={changed}", *PLAIN, "reference=initial")
    assert numbers(changed / "evaluation")["metrics"]["rewards/margins"] == own["rewards/margins"]


def test_thresholds_are_options_and_are_kept(run, tmp_path):
    """With 12 tokens a tiny model ends some of its answers: between the two thresholds lies the verdict."""
    copy = shutil.copytree(run, tmp_path / "run")
    share = numbers(run / "evaluation")["metrics"]["ended/share"]
    assert numbers(run / "evaluation")["thresholds"]["min_ended_share"] == 0.8
    for limit, broken in ((share / 2, False), ((1 + share) / 2, True)):
        asked = ("degeneration.max_seq_rep_4=1", "degeneration.max_length_ratio=99")
        measure(f"policy={copy}", *QUICK, "stage=score", f"degeneration.min_ended_share={limit}", *asked)
        evaluation = numbers(copy / "evaluation")
        assert bool(evaluation["degenerate"]) == broken
        assert evaluation["thresholds"] == {"min_ended_share": limit, "max_seq_rep_4": 1.0, "max_length_ratio": 99.0}


BAD = {
    "threshold": (["policy=lab:tiny", "degeneration.min_ended_share=80"], "min_ended_share=80.0 is a share: it must"),
    "threshold of a ratio": (["policy=lab:tiny", "degeneration.max_length_ratio=0"], "max_length_ratio=0.0 must be"),
    "threshold without effect": (
        ["policy=lab:tiny", "stage=report", "degeneration.max_seq_rep_4=0.4"],
        "degeneration has no effect on stage=report: it belongs to stage=all and score",
    ),
    "nothing": ([], "give policy=<run or model folder> or sweep=<multirun folder, runs, patterns>"),
    "reference of no run": (
        ["policy=lab:tiny", "reference=none"],
        "reference=none has no effect: policy=lab:tiny is no",
    ),
    "no such model": (["policy=./nowhere"], "policy=./nowhere does not exist"),
    "no jobs": (["sweep=tests"], "sweep=tests holds no jobs"),
    "stage": (["policy=lab:tiny", "stage=skore"], "stage=skore is none of all, generate, diagnose, score"),
    "nothing generated": (["policy=lab:tiny", "stage=score", "output_dir=tests"], "generations.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    overrides, message = BAD[case]
    with pytest.raises((ValueError, OSError)) as error:
        evaluate(*overrides, *QUICK, *DATA)
    assert message in str(error.value)


def test_the_command_itself_exits_with_one_line():
    done = typed_afresh("evaluate.py", "policy=./nowhere", "tracking=none", *DATA)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: policy=./nowhere does not exist"


def test_baselines_without_a_scorer_are_the_same_baseline(capsys):
    """What no scorer measured is nan, which is not equal to itself."""
    first, second = (
        Evaluated(Evaluation("initial", "none", {"gold/mean": float("nan"), "lengths/response": 3.0}), [], [])
        for _ in range(2)
    )
    assert evaluate_command._shared_baseline([first, second]) is first
    other = Evaluated(replace(first.evaluation, metrics={"gold/mean": 0.5, "lengths/response": 3.0}), [], [])
    assert evaluate_command._shared_baseline([first, other]) is None
    assert "different baselines" in capsys.readouterr().err
