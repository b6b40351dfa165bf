"""`python evaluate.py judge=...` as a user runs it: a judge on the loopback interface, one here, refusals."""

import json
import shutil

import pytest

from dpo_ref.models import server as model_server
from tests.support.cache import empty_cache
from tests.support.command import train
from tests.support.evaluate_command import DATA, PLAIN, QUICK, TRAIN, evaluate, measure, numbers
from tests.support.judge_server import JudgeServer

KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(model_server, "FIRST_PAUSE", 0.004)


def asked(server, *more):
    return ["judge=alpaca_eval", "judge.model=big", f"judge.base_url={server.url}", *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(*TRAIN, f"output_dir={folder}", "beta=0.02", "optim.lr=3e-3").returncode == 0
    measure(f"policy={folder}", *PLAIN)
    return folder


def test_all_stages_then_judging_alone_then_scoring_again(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    with JudgeServer(key=KEY, faults=["429", "cut"]) as server:
        priced = ["judge.prompt_price=2.0", "judge.completion_price=8.0"]
        measure(f"policy={copy}", *PLAIN, *asked(server, *priced))
        first, requests = numbers(copy / "evaluation"), server.asked.total()
        lines = (copy / "evaluation" / "judgments.jsonl").read_text().splitlines()
        judged = [json.loads(line) for line in lines]
        identical = sum(row["output"] == row["baseline_output"] for row in judged)
        assert (len(judged), server.answered.total()) == (20, 2 * (20 - identical))
        assert requests == server.answered.total() + 2
        metrics = first["metrics"]
        assert metrics["judge/cost"] == pytest.approx(server.answered.total() * (100 * 2 + 1 * 8) / 1e6)
        by_prompt = [judged[start : start + 2] for start in range(0, 20, 2)]
        means = [sum(row["preference"] for row in rows) / 2 for rows in by_prompt]
        assert metrics["judge_winrate/initial"] == pytest.approx(sum(means) / 10)
        assert first["judge"]["model"] == "big"
        measure(f"policy={copy}", *QUICK, *asked(server, *priced), "stage=judge")
        assert numbers(copy / "evaluation") == first
        measure(f"policy={copy}", *QUICK, "stage=score")
        measure(f"policy={copy}", *PLAIN)
        assert numbers(copy / "evaluation") == first
        assert server.asked.total() == requests
    measure(f"policy={copy}", *PLAIN, "seed=3")
    assert "judge_winrate/initial" not in numbers(copy / "evaluation")["metrics"]  # other answers


def test_no_file_holds_the_key(run, tmp_path, monkeypatch, capfd):
    empty_cache(monkeypatch, tmp_path / "cache")
    copy = shutil.copytree(run, tmp_path / "run")
    with JudgeServer(key=KEY) as server:
        evaluate(f"policy={copy}", *(o for o in PLAIN if "tracking" not in o), *asked(server))
        server.faults.extend(["tells"] * 500)
        with pytest.raises(ValueError, match=r"bad Bearer \*\*\*"):
            evaluate(
                f"policy={copy}", *QUICK, *asked(server, "judge.temperature=0.5", "judge.retries=1"), "stage=judge"
            )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("sqlite" in path.name for path in files)
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert KEY not in "".join(capfd.readouterr())


REFUSED = {
    "no judge": (["stage=judge"], "stage=judge needs judge=<who compares the answers>"),
    "other stage": (["judge=tldr", "judge.model=x", "stage=score"], "judge has no effect on stage=score"),
    "no model": (["judge=tldr"], "judge=tldr needs judge.model=..."),
    "no template": (["judge=template", "judge.model=x"], "judge=template needs judge.template=..."),
    "template": (["judge=template", "judge.model=x", "judge.template=nowhere.yaml"], "none of alpaca_eval, dialogue"),
    "logprobs": (["judge=tldr", "judge.model=x", "judge.logprobs=5"], "judge.logprobs=5 has no effect"),
    "price": (["judge=tldr", "judge.model=x", "judge.prompt_price=1.0"], "give both or neither"),
    "url": (["judge=tldr", "judge.model=x", "judge.base_url=http://a:b@c/v1"], "must hold no user, password or query"),
    "workers": (["judge=tldr", "judge.model=x", "judge.max_workers=0"], "judge.max_workers=0 must be positive"),
    "request": (["judge=tldr", "judge.model=x", "judge.request={model: y}"], "judge.request.model is said elsewhere"),
    "key": (["judge=tldr", "judge.model=x", "+judge.api_key=x"], "judge.api_key holds what looks like a key"),
    "local model": (["judge=local", "judge.model=./nowhere"], "judge.model=./nowhere does not exist"),
    "nothing scored": (["judge=local", "judge.model=lab:tiny", "stage=judge", "output_dir=tests"], "stage="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case, run):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        evaluate(f"policy={run}", *QUICK, *overrides)
    assert message in str(error.value)


def test_a_model_folder_has_no_baseline_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="judge=local compares with a baseline; policy=lab:tiny is no run"):
        evaluate("policy=lab:tiny", *QUICK, *DATA, f"output_dir={tmp_path}", "judge=local", "judge.model=lab:tiny")


def test_a_judge_that_dies_costs_its_own_numbers_only(run, tmp_path, monkeypatch):
    """The table and the page are written, the error comes last, and the next run asks for the rest."""
    empty_cache(monkeypatch, tmp_path / "cache")
    copy = shutil.copytree(run, tmp_path / "run")
    with JudgeServer(key=KEY, dies_after=7) as server:
        with pytest.raises(ValueError, match=r"\d+ of 20 pairs are judged, then judge=alpaca_eval gave no answer"):
            evaluate(f"policy={copy}", *PLAIN, *asked(server, "judge.retries=1"))
        assert server.answered.total() == 7
    evaluation = numbers(copy / "evaluation")
    assert "winrate/initial" in evaluation["metrics"]
    assert "judge_winrate/initial" not in evaluation["metrics"]
    assert (copy / "evaluation" / "report.html").is_file()
    with JudgeServer(key=KEY) as other:
        evaluate(f"policy={copy}", *QUICK, *asked(other), "stage=judge")
        judged = [json.loads(line) for line in (copy / "evaluation" / "judgments.jsonl").read_text().splitlines()]
        assert other.asked.total() == sum(len(row["opinions"]) for row in judged) - 7
    assert "judge_winrate/initial" in numbers(copy / "evaluation")["metrics"]


def test_a_sweep_is_judged_by_a_model_here(run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    shutil.copytree(run, sweep / "0_beta-0.02", ignore=shutil.ignore_patterns("evaluation"))
    local = ["judge=local", "judge.model=lab:tiny", "judge.template=mt_bench", "judge.both_orders=false"]
    evaluate(f"sweep={sweep}", *PLAIN, *local)
    evaluation = numbers(sweep / "0_beta-0.02" / "evaluation")
    assert (evaluation["judge"]["template"], evaluation["judge"]["orders"]) == (
        "mt_bench",
        "one, drawn by the pair's digest",
    )
    assert evaluation["metrics"]["judge/num_judged"] == 20
    assert "judge/position_consistency" not in evaluation["metrics"]
    assert "judge_winrate/initial" in (sweep / "sweep.csv").read_text().splitlines()[0]
    assert "Judge&#x27;s win rate" in (sweep / "report.html").read_text()
    assert "pairs judged" in capsys.readouterr().out
