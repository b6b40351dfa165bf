"""What a study found, as it is committed, shown and compared with what a later run finds."""

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_ref.files.writing import write_text
from studies.intervals import Interval
from studies.runner import ROOT, Runs

RESULTS = ROOT / "studies" / "results"
PAGES = ROOT / "docs" / "studies"
INDEX = PAGES / "index.md"


@dataclass(frozen=True, slots=True)
class Finding:
    """A statement of the plan, the number that it is about with its interval, and whether that bears it out."""

    statement: str
    estimate: Interval
    holds: bool


@dataclass(frozen=True, slots=True)
class Record:
    """Rows of each table, by the words of a cell; what the plan's tests came to; and what else the pictures show."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    findings: Sequence[Finding]
    also: Mapping[str, Any] = field(default_factory=dict)

    def row(self, table: str, **words: Any) -> Mapping[str, Any]:
        """The row of a table with these words. Raises ValueError where there is not one."""
        (found,) = [row for row in self.rows[table] if all(row[key] == value for key, value in words.items())]
        return found


def row_of(runs: Runs, metrics: Sequence[str], **words: Any) -> dict[str, Any]:
    """The row of a cell: its words, how many policies it joins and how many of them are degenerate, and of each metric
    the mean with its interval."""
    means = {metric: rounded(runs.mean(metric)) for metric in metrics}
    return {**words, "runs": len(runs.runs), "degenerate": runs.num_degenerate, **means}


def rounded(interval: Interval) -> Interval:
    """To six decimals, which is what is committed."""
    return Interval(*(round(value, 6) for value in interval))


def above(statement: str, estimate: Interval, bound: float = 0.0) -> Finding:
    """Borne out where the whole interval lies above the bound."""
    return Finding(statement, rounded(estimate), estimate.low > bound)


def below(statement: str, estimate: Interval, bound: float = 0.0) -> Finding:
    """Borne out where the whole interval lies below the bound."""
    return Finding(statement, rounded(estimate), estimate.high < bound)


def apart(statement: str, estimate: Interval) -> Finding:
    """Borne out where the interval does not hold 0."""
    return Finding(statement, rounded(estimate), not estimate.low <= 0 <= estimate.high)


# --- as it is committed


def write(name: str, record: Record) -> None:
    """Write `studies/results/<name>.json`, a row a line."""
    head = {"versions": {package: version(package) for package in ("torch", "transformers")}}
    content = head | asdict(record)
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.json", re.sub(r"\n {4,}", " ", text) + "\n")


def _without_nan(content: Any) -> Any:
    """nan, which JSON has not, as null: the ends of what has no interval."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return list(map(_without_nan, content))
    return None if isinstance(content, float) and math.isnan(content) else content


def read(name: str) -> Record | None:
    """What was committed; None where nothing was yet."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {table: [_row(row) for row in rows] for table, rows in content["rows"].items()}
    findings = [Finding(each["statement"], _interval(each["estimate"]), each["holds"]) for each in content["findings"]]
    return Record(rows, findings, content["also"])


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _interval(value) if isinstance(value, list) else value for key, value in row.items()}


def _interval(values: Sequence[float | None]) -> Interval:
    mean, low, high = (math.nan if value is None else value for value in values)
    return Interval(mean, low, high)


def differences(committed: Record, found: Record) -> list[str]:
    """Where a later run is not what was committed: a mean outside of the committed interval, a row that is lacking,
    and a test of the plan that ends otherwise or stands on one side alone. Empty where it is repeated."""
    told = []
    for table, rows in committed.rows.items():
        others = {_words(row): row for row in found.rows.get(table, [])}
        for row in rows:
            words = _words(row)
            told += [f"{table}, {words}: lacking"] if words not in others else _outside(table, row, others[words])
    ends, before = ({test.statement: test.holds for test in each.findings} for each in (found, committed))
    told += [f"test: {statement}" for statement in ends | before if ends.get(statement) is not before.get(statement)]
    return told


def _words(row: Mapping[str, Any]) -> str:
    """What a row is about."""
    numbers = ("runs", "degenerate")
    named = {key: value for key, value in row.items() if key not in numbers and not isinstance(value, Interval)}
    return ", ".join(f"{key}={value}" for key, value in named.items())


def _outside(table: str, row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    told = []
    for key, interval in row.items():
        if isinstance(interval, Interval) and not math.isnan(interval.low):
            value = found[key].mean
            if not interval.low <= value <= interval.high:
                told.append(f"{table}, {_words(row)}: {key} {value:.4g} is outside of {interval}")
    return told


# --- as it is shown


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def findings_table(record: Record, decimals: int = 3) -> str:
    """The tests of the plan."""
    rows = [
        [test.statement, shown(test.estimate, decimals), "yes" if test.holds else "**no**"] for test in record.findings
    ]
    return markdown(["fixed beforehand", "estimate [interval]", "borne out"], rows)


def shown(interval: Interval, decimals: int = 3) -> str:
    """A mean with its interval, where it has one."""
    mean, low, high = (f"{value:.{decimals}f}".replace("-", "−") for value in interval)
    return f"{mean} [{low}, {high}]" if interval.low < interval.high else mean


def percent(interval: Interval) -> str:
    """A share with its interval, in percent."""
    return shown(Interval(*(100 * value for value in interval)), 1)


def wrap(paragraph: str) -> str:
    """A paragraph in lines of a page."""
    return "\n".join(textwrap.wrap(paragraph, 119, break_long_words=False, break_on_hyphens=False))


def filled(page: Path, parts: Mapping[str, str]) -> str:
    """A page with what stands between its marks replaced. Raises ValueError for a mark that it lacks."""
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no place <!-- {name} -->")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text
