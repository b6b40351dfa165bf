"""The table of metrics in `evaluation/results.py`: what it says is what the page says, and keys stand nowhere else."""

import re

import pytest

from dpo_ref.cli.docs_tables import metrics_page
from dpo_ref.evaluation.judging.judge import Judge, judge_metrics
from dpo_ref.evaluation.judging.templates import load_template
from dpo_ref.evaluation.results import METRICS
from dpo_ref.reports.tables import STYLES, brief_columns, columns
from tests.support.command import ROOT
from tests.support.judgments import JUDGMENTS
from tests.support.metric_table import ROWS, key_literals, unlisted

PACKAGE = ROOT / "dpo_ref"
FILES = sorted(
    path for room in ("evaluation", "reports", "cli", "tracking") for path in (PACKAGE / room).rglob("*.py")
)
TABLE = PACKAGE / "evaluation" / "results.py"
ELSEWHERE = {  # what looks like a key and is none of an evaluation's
    "cli/train.py": {"train/rewards/accuracies", "eval/rewards/accuracies"},  # of a training step
    "cli/winrates.py": {"winrate/{}"},  # of a table of win rates, behind which a model's name stands
    "tracking/run_record.py": {"logratios/chosen", "logratios/rejected", "rewards/margins"},  # of a training step
    "tracking/terminal.py": {"rewards/accuracies"},  # of a training step
}


def test_the_page_is_up_to_date():
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == metrics_page(), "run: python -m dpo_ref.cli.docs_tables metrics > docs/metrics.md"


def test_every_key_has_one_row():
    assert len({metric.key for metric in METRICS}) == len(METRICS) > 40
    assert all(metric.title and metric.unit for metric in METRICS)
    listed = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert [re.sub(r"<(\w+)>", r"{\1}", key) for key in listed] == [metric.key for metric in METRICS]
    assert {"gold/mean_se", "winrate/initial_low", "kl/loss_reference_k1_se", "pairs/Natural/length_se"} <= ROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_keys_are_read_from_the_table(path):
    expected = ELSEWHERE.get(str(path.relative_to(PACKAGE)), set())
    assert path == TABLE or key_literals(path) == expected, "write results.<ROW>.key, or .of(...)"


def test_a_key_in_code_is_noticed(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(
        '"""Of ended/share."""\nx = ["ended/share_se", f"{scorer}/mean", "kl/" + name, "train/eos/chosen_logratio"]\n'
    )
    assert key_literals(path) == {"ended/share_se", "{}/mean", "kl/", "train/eos/chosen_logratio"}
    path.write_text('"""Of ended/share."""\nx = ["share", f"{key}_se", "outputs/mean.json", "train/loss"]\n')
    assert key_literals(path) == set()


def test_the_judges_keys_are_listed():
    judge = Judge("x", "y", load_template("alpaca_eval"), {}, True, True, lambda *_: iter(()), ROOT, (1.0, 1.0))
    measured = judge_metrics(judge, JUDGMENTS, "initial", 0)
    assert unlisted(measured) == set()
    assert {metric for metric in METRICS if metric.by_judge} == {ROWS[key] for key in measured}


def test_a_row_with_a_heading_is_a_column():
    headed = [metric for metric in METRICS if metric.column and not metric.by_judge]
    assert [column.title for column in columns("gold")] == [
        "Gold reward", "Win rate", "Length", "Ended", "seq-rep-4", "KL to initial", "End-token shift", "Pair accuracy"
    ]  # fmt: skip
    assert len(headed) == 8
    assert [column.title for column in brief_columns("gold")] == [
        "gold", "win rate", "judge", "tokens", "ended", "KL", "end Δ"
    ]  # fmt: skip
    used = {heading.style for metric in METRICS for heading in (metric.column, metric.brief) if heading}
    assert used == STYLES.keys()
