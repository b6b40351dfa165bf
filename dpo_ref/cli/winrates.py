"""`evaluate.py stage=winrate`: win rates of models that were judged before, by AlpacaEval's judges or ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_ref.component import Component
from dpo_ref.evaluation.statistics.length_control import length_control
from dpo_ref.evaluation.winrates import WinRates, annotation_files, read_matches, win_rates
from dpo_ref.files.holding import held
from dpo_ref.files.writing import write_json, write_text
from dpo_ref.reports.plots import write_png
from dpo_ref.reports.winrates import columns, csv_text, headline, panels, rates_table, strengths_table, summary_metrics
from dpo_ref.tracking.terminal import progress, run_summary, say, show
from dpo_ref.tracking.tracker import RunInfo

STAGE = "winrate"
HAVE_AN_EFFECT = {"stage", "annotations", "df_gamed", "seed", "output_dir", "tracking", "hydra"}


@dataclass(frozen=True, slots=True)
class WinRateRequest:
    """What was asked for. `annotations` are files and folders, `df_gamed` is a path, `hub` or None."""

    annotations: tuple[str, ...]
    df_gamed: str | None
    tracking: Component
    seed: int
    output_dir: str | None
    config: dict[str, Any]


def check_words(words: set[str]) -> None:
    """Refuse what has no effect on win rates of models that were judged before."""
    for key in sorted(words - HAVE_AN_EFFECT):
        raise ValueError(f"{key} has no effect on stage=winrate, which reads annotations=... alone; leave it out")


def annotation_words(annotations: Any) -> tuple[str, ...]:
    """`annotations=` as a list. Raises ValueError for anything but a path or a list of paths."""
    listed = annotations if isinstance(annotations, list) else [annotations]
    if not listed or not all(isinstance(path, str) and path for path in listed):
        raise ValueError(
            "stage=winrate needs annotations=<annotations.json, judgments.jsonl or a folder with such files>, or a "
            "list of them: annotations='[a.json, b.json]'"
        )
    return tuple(listed)


def _write(folder: Path, results: WinRates, request: WinRateRequest, files: Sequence[Path]) -> dict[str, str]:
    """The files, and their names for the summary."""
    sources = {"annotations": list(map(str, files)), "df_gamed": request.df_gamed, "seed": request.seed}
    write_json(folder / "winrates.json", {**sources, **results.plain()})
    write_text(folder / "winrates.csv", csv_text(results))
    paths = {"numbers": str(folder / "winrates.json"), "table": str(folder / "winrates.csv")}
    if pictures := panels(results):
        write_png(folder / "winrates.png", pictures)
        paths["plot"] = str(folder / "winrates.png")
    return paths


def _track(folder: Path, results: WinRates, request: WinRateRequest) -> None:
    info = RunInfo(folder, request.config, f"winrate {folder.name}", None, "winrate", resume=False)
    tracker = request.tracking(info)
    table_columns = columns(results.rates)
    rows = [[rate.model, *(column.text(rate) for column in table_columns)] for rate in results.rates]
    tracker.table("winrates", ["model", *(column.title for column in table_columns)], rows, step=0)
    if (folder / "winrates.png").is_file():
        tracker.image("winrates", folder / "winrates.png")
    tracker.file(folder / "winrates.json")
    tracker.summary({f"winrate/{name}": value for name, value in summary_metrics(results).items()})
    tracker.finish(0)


def run_winrates(request: WinRateRequest) -> None:
    """Read, compute, write and show. Raises ValueError for what cannot be read, and for what may not be called
    length-controlled AlpacaEval, and where another process writes into the folder."""
    files = annotation_files(request.annotations)
    matches = read_matches(files)
    control = request.df_gamed and length_control(request.df_gamed, [match.prompts for match in matches])
    results = win_rates(matches, control or None, request.seed, progress)
    default = f"outputs/winrates/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = Path(request.output_dir or default).expanduser()
    with held(folder, say):
        paths = _write(folder, results, request, files)
        show(rates_table(results))
        show(*(strengths_table(judge, part) for judge, parts in results.strengths.items() for part in parts))
        _track(folder, results, request)
    run_summary(headline(results), paths)
