"""`data.html`: what the data is like, with pictures and examples in which every scored token can be seen."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ref.data.inspection import Example, Hygiene, concerns, quantiles
from dpo_ref.reports import page
from dpo_ref.reports.plots import INITIAL, SERIES, Panel


def _bins(*values: np.ndarray) -> np.ndarray:
    """Bins of equal width on a logarithmic axis, which holds short and long texts alike."""
    highest = max((int(lengths.max()) for lengths in values if len(lengths)), default=1)
    lowest = min((int(lengths.min()) for lengths in values if len(lengths)), default=1)
    return np.unique(np.geomspace(max(lowest, 1), highest + 1, 40).round())


def _lengths(hygiene: Hygiene) -> Panel:
    parts = {
        "prompt": hygiene.prompts,
        "chosen": hygiene.chosen,
        "rejected": hygiene.rejected,
        "response": hygiene.alone,
    }
    lengths = {name: values for name, values in parts.items() if len(values)}

    def draw(axes: Any) -> None:
        bins = _bins(*lengths.values())
        for (name, values), colour in zip(lengths.items(), (INITIAL, *SERIES), strict=False):
            axes.hist(values, bins=bins, histtype="step", linewidth=1.8, color=colour, label=name)
        axes.set(title="Lengths", xlabel="tokens", ylabel="texts", xscale="log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.legend()

    medians = ", ".join(f"{name} {quantiles(values)}" for name, values in lengths.items())
    return Panel(f"Tokens of each part; medians: {medians}.", draw)


def _differences(hygiene: Hygiene) -> Panel:
    gap = hygiene.chosen - hygiene.rejected

    def draw(axes: Any) -> None:
        reach = max(1.0, float(np.quantile(np.abs(gap), 0.98)))
        bins = np.linspace(-reach, reach, 41)
        axes.hist(np.clip(gap, -reach, reach), bins=bins, color=SERIES[0], alpha=0.75)
        axes.axvline(0, color=INITIAL, linewidth=1)
        axes.set(title="Is the longer one chosen?", xlabel="tokens of chosen - tokens of rejected", ylabel="pairs")

    return Panel(
        f"The longer response is chosen in {hygiene.longer_chosen:.1%} of pairs (ties count half): as often would a "
        "judge agree who looks at length alone. The outermost bars hold all that lies beyond.",
        draw,
    )


def _margins(margins: np.ndarray) -> Panel:
    def draw(axes: Any) -> None:
        axes.hist(margins, bins=40, color=SERIES[2], alpha=0.75)
        axes.axvline(0, color=INITIAL, linewidth=1)
        axes.set(title="Scores", xlabel="score of chosen - score of rejected", ylabel="pairs")

    wrong = float(np.mean(margins < 0))
    return Panel(f"Differences of the scores that came with the rows; {wrong:.1%} prefer the lower score.", draw)


def panels(hygiene: Hygiene, margins: np.ndarray) -> list[Panel]:
    """The pictures of a data page; `margins` are score differences, empty where rows have no scores."""
    pairs = [_differences(hygiene)] if len(hygiene.chosen) else []
    return [_lengths(hygiene), *pairs, *([_margins(margins)] if len(margins) else [])]


def _example(example: Example) -> str:
    parts = [f'<p><b>prompt</b><span class="masked">{page.text(example.prompt)}</span></p>']
    for name, pieces in example.responses.items():
        tokens = "".join(
            f'<span class="{"token" if piece.scored else "masked"}">{page.text(piece.text)}</span>' for piece in pieces
        )
        parts.append(f'<p class="{page.text(name)}"><b>{page.text(name)}</b>{tokens}</p>')
    return f'<article class="sample example">{"".join(parts)}</article>'


def _counts(hygiene: Hygiene) -> list[tuple[str, str]]:
    reading = hygiene.reading
    rows = [("rows read", f"{reading.num_rows:,} ({', '.join(reading.formats)})")] if reading.num_rows else []
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in reading.dropped.items()]
    rows += [(name, f"{count:,}") for name, count in hygiene.counts.items() if name != "groups"]
    rows += [("groups to train on", f"{hygiene.num_train:,}"), ("groups held out", f"{hygiene.num_eval:,}")]
    return rows + [(name, f"{count:,}") for name, count in concerns(hygiene).items()]


def data_page(hygiene: Hygiene, margins: np.ndarray, examples: Sequence[Example], title: str) -> str:
    """The page as HTML, readable without a network."""
    worrying = [f"{count:,} {concern}" for concern, count in concerns(hygiene).items() if count]
    lead = f"The longer response is chosen in {hygiene.longer_chosen:.0%} of the pairs." if len(hygiene.chosen) else ""
    skipped = "".join(f"<li>{page.text(example)}</li>" for example in hygiene.reading.examples)
    parts = [
        '<p class="over">Data</p>',
        f"<h1>{page.text(title)}: {hygiene.num_train:,} groups to train on</h1>",
        f'<p class="lead">{lead}</p>' if lead else "",
        page.alerts(worrying),
        page.pictures(panels(hygiene, margins)),
        "<h2>What became of the rows</h2>",
        page.definitions(_counts(hygiene)),
        f"<ul>{skipped}</ul>" if skipped else "",
        "<h2>Examples</h2>",
        '<p class="small">Grey text is read, coloured tokens are scored; their borders are the tokens\' borders.</p>',
        *map(_example, examples),
    ]
    return page.page(title, "\n".join(filter(None, parts)))
