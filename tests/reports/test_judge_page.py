"""The report's part about the judge, its columns and sentences, on invented answers and a judge who likes length."""

import pytest
import torch

from dpo_ref.evaluation.judging.judge import Judgment, Opinion, Pair
from dpo_ref.evaluation.judging.judges import JudgeContext, served
from dpo_ref.evaluation.stages import judge_stage
from dpo_ref.models.asked import ModelLoader
from dpo_ref.reports import tables
from dpo_ref.reports.judge import judge_section, outcome
from dpo_ref.reports.policy import report, write_report
from dpo_ref.reports.tables import results_table
from dpo_ref.types import Message, silent
from tests.support import evaluations as invented
from tests.support.judge_server import JudgeServer
from tests.support.pages import parsed


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    baseline = invented.initial(root / "initial", 30)
    policy = invented.trained(root / "policy", baseline, 0.3, 0)
    context = JudgeContext("alpaca_eval", root, ModelLoader(torch.device("cpu")), silent)
    with pytest.MonkeyPatch.context() as patch, JudgeServer() as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        options = {"template": "alpaca_eval", "max_tokens": 1, "logprobs": 5}
        judge = served(context, model="<big>", base_url=server.url, **options)
        evaluated = judge_stage(root / "policy", judge, policy, baseline, 0, silent)
    return root / "policy", baseline, evaluated


def test_the_section_says_what_the_record_says(judged):
    folder, _, policy = judged
    texts = " ".join(parsed(judge_section(folder)).texts)
    mean = 100 * policy.evaluation.metrics["judge_winrate/initial"]
    assert f"Against initial, <big> (template alpaca_eval) gives the policy {mean:.1f}" in texts
    assert "over 60 of 60 pairs with a verdict" in texts
    assert f"{100 * policy.evaluation.metrics['judge/position_consistency']:.1f}" in texts
    assert "initial shown first" in texts
    assert judge_section(folder / "nowhere") == ""


def test_the_page_holds_it_and_tables_get_its_columns(judged):
    folder, baseline, policy = judged
    texts = " ".join(parsed(write_report(folder, [baseline, policy]).read_text()).texts)
    assert "What the judge says" in texts
    assert "Judge's win rate" in texts
    assert "alpaca_eval, <big>" in texts
    assert "What the judge says" not in report([baseline])
    assert "Judge's win rate" not in report([baseline])
    shown = [str(column.header) for column in results_table([baseline.evaluation, policy.evaluation]).columns]
    assert "judge" in shown
    assert "judge" not in [column.header for column in results_table([baseline.evaluation]).columns]


def test_without_a_scorer_the_judge_is_spoken_of(judged):
    _, baseline, policy = judged
    headline = tables.headline([baseline.evaluation, policy.evaluation])
    assert "judge" not in headline
    del policy.evaluation.metrics["winrate/initial"]
    headline = tables.headline([baseline.evaluation, policy.evaluation])
    assert f"{100 * policy.evaluation.metrics['judge_winrate/initial']:.1f}" in headline
    assert "judge <big>" in headline


OUTCOMES = {  # shares of the policy's win: shown second, shown first
    "wins in both orders": (0.9, 0.6),
    "loses in both orders": (0.1, 0.4),
    "tie in both orders": (0.5, 0.5),
    "shown first, wins": (0.3, 0.6),
    "shown second, wins": (0.7, 0.2),
    "tie in one order only": (0.5, 1.0),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes(name):
    pair = Pair((Message(role="user", content="?"),), 0, 0, "a", "b")
    second, first = OUTCOMES[name]
    opinions = (Opinion(False, second, "", None, 1, 1), Opinion(True, first, "", None, 1, 1))
    assert outcome(Judgment(pair, opinions, (first + second) / 2)) == name
    assert outcome(Judgment(pair, opinions, None)) == "no verdict"
    assert outcome(Judgment(Pair(pair.prompt, 0, 0, "a", "a"), (), 0.5)) == "identical answers"
    assert outcome(Judgment(pair, opinions[1:], first)) == (
        "loses" if first < 0.5 else "tie" if first == 0.5 else "wins"
    )
