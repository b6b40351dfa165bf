"""The report: it says what the numbers carry, escapes what it is given, and needs nothing but itself."""

import base64
import hashlib
import math
import re
from dataclasses import replace

import pytest

from dpo_ref.evaluation.results import Evaluated, Evaluation
from dpo_ref.reports import tables
from dpo_ref.reports.page import samples, select
from dpo_ref.reports.plots import comparison_panels, svg, write_panels, write_png
from dpo_ref.reports.policy import report, write_report
from dpo_ref.reports.tables import MISSING, columns, number, percent, titles
from tests.support import evaluations as invented
from tests.support.evaluations import answer
from tests.support.pages import parsed


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    baseline = invented.initial(root / "initial", 60)
    return [baseline, *(invented.trained(root / f"{beta}", baseline, beta, 0) for beta in (0.005, 0.3, 3.0))]


def compared(mean, low, high, **changes):
    metrics = {
        "winrate/initial": mean,
        "winrate/initial_low": low,
        "winrate/initial_high": high,
        "lengths/response": 9.0,
    }
    return Evaluation("run", "gold", metrics, baseline="initial", objective="dpo", beta=0.1, **changes)


def test_the_page_is_well_formed_and_fetches_nothing(evaluated):
    page = report(evaluated)
    structure = parsed(page)
    assert structure.fetched == []
    assert structure.tags.count("script") == 1
    links = set(re.findall(r"(?:https?:)?//[\w./-]+", page))
    assert all("w3.org" in link or "purl.org" in link or "creativecommons.org" in link for link in links), links
    assert not re.search(r"url\((?!#)|@import", page)
    assert page.count("<figure>") == 4


def test_the_policy_names_the_one_script_by_its_digest(evaluated):
    page = report(evaluated)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'; style-src" in page
    assert "</" not in script[1]  # nothing in it could end it


def test_hostile_text_is_shown_and_never_becomes_markup(evaluated):
    attack = '<script>alert("x")</script><img src=http://evil/>&amp; $\\bad{$ </p>'

    def poisoned(policy, name):
        generations = [
            replace(
                g, output=attack + "\u202e\x00", prompt=({"role": attack, "content": f"{attack} {g.prompt_index}"},)
            )
            for g in policy.generations
        ]
        evaluation = replace(
            policy.evaluation, name=name, objective=None, degenerate=[attack], generation={attack: attack}
        )
        return replace(policy, generations=generations, evaluation=evaluation)

    structure = parsed(report([poisoned(evaluated[0], "initial"), poisoned(evaluated[1], attack)]))
    assert structure.tags.count("script") == 1
    assert "img" not in structure.tags
    assert structure.fetched == []
    assert "".join(structure.texts).count(attack) > 30


def test_the_headline_claims_what_the_interval_carries():
    assert tables.headline([compared(0.6, 0.55, 0.65)]) == (
        "DPO (β = 0.1) beats the initial policy in 60.0\u00a0% of comparisons (95 % interval 55.0–65.0\u00a0%)."
    )
    assert "cannot be told from the initial policy" in tables.headline([compared(0.52, 0.49, 0.55)])
    assert "loses to the initial policy" in tables.headline([compared(0.4, 0.35, 0.45)])
    assert "no baseline" in tables.headline([Evaluation("x", "gold", {})])


def test_the_best_policy_is_the_best_healthy_one():
    healthy, broken = compared(0.55, 0.5, 0.6), compared(0.7, 0.6, 0.8, degenerate=["loops"])
    assert tables.best([broken, healthy]) is healthy
    assert tables.best([broken]) is broken
    assert tables.headline([healthy, broken]).startswith("Best of 2: ")
    assert tables.headline([broken, broken]) == "Every policy is degenerate, so none is the best."


def test_the_drift_of_the_smallest_beta_is_told(evaluated):
    sentence = tables.drift(evaluated[0].evaluation, [policy.evaluation for policy in evaluated[1:]])
    assert sentence is not None
    loosest = evaluated[1].evaluation.metrics
    assert sentence.startswith("At the smallest β, 0.005, answers grow from ")
    assert f"to {loosest['lengths/response']:.1f} tokens" in sentence
    assert f"{100 * (1 - loosest['ended/share']):.1f}\u00a0% of them never end" in sentence
    assert sentence.endswith(f"moved by −{abs(loosest['eos/chosen_logratio']):.2f}.")
    assert tables.drift(evaluated[0].evaluation, [evaluated[1].evaluation]) is None


def test_betas_of_different_objectives_are_not_compared(evaluated):
    """The tau of IPO says nothing beside the beta of DPO."""
    initial, *rest = (policy.evaluation for policy in evaluated)
    assert tables.drift(initial, rest) is not None
    mixed = [replace(rest[0], objective="ipo_sum"), *rest[1:]]
    assert tables.drift(initial, mixed) is None


def test_numbers_as_they_are_written():
    assert number(-1.234, 2) == "−1.23"
    assert number(0.5, 1, signed=True) == "+0.5"
    assert number(math.nan, 2) == MISSING
    assert percent(0.1234) == "12.3\u00a0%"
    entries = {column.title: column.text(compared(0.6, 0.55, 0.65)) for column in columns("gold")}
    assert entries["Win rate"] == "60.0\u00a0% [55.0, 65.0]"
    assert entries["Gold reward"] == entries["KL to initial"] == entries["Pair accuracy"] == MISSING
    assert entries["Length"] == "9.0"


def test_titles_tell_policies_apart():
    first, second = compared(0.6, 0.5, 0.7), compared(0.6, 0.5, 0.7)
    assert titles([Evaluation("initial", "gold", {}), first]) == ["initial policy", "DPO (β = 0.1)"]
    assert titles([first, replace(second, seed=1)]) == ["DPO (β = 0.1)", "DPO (β = 0.1, seed 1)"]
    assert titles([replace(first, reference="initial"), replace(second, reference="other")]) == [
        "DPO (β = 0.1, reference initial)",
        "DPO (β = 0.1, reference other)",
    ]
    assert titles([first, replace(second, name="second")]) == ["run", "second"]


def test_every_policy_and_every_number_of_the_table_is_on_the_page(evaluated):
    texts = "".join(parsed(report(evaluated)).texts)
    for policy in evaluated:
        for column in columns("gold"):
            assert column.text(policy.evaluation) in texts
    for title in ("initial policy", "DPO (β = 0.005)", "DPO (β = 0.3)", "DPO (β = 3)"):
        assert title in texts
    assert "is degenerate" in texts


def test_samples_are_paired_drawn_at_random_first_and_gains_and_losses_are_true(evaluated):
    baseline, policy = evaluated[0], evaluated[2]
    drawn, gains, losses = select(policy, baseline, count=4)
    assert (drawn.title, len(drawn.comparisons)) == ("Drawn at random", 4)
    for selection in (drawn, gains, losses):
        for pair in selection.comparisons:
            assert pair.baseline.prompt == pair.policy.prompt
            assert pair.gain == pair.policy_score - pair.baseline_score
    assert [pair.gain for pair in gains.comparisons] == sorted((p.gain for p in gains.comparisons), reverse=True)
    assert min(pair.gain for pair in gains.comparisons) > 0 > max(pair.gain for pair in losses.comparisons)
    shown = [pair.policy.prompt_index for s in (drawn, gains, losses) for pair in s.comparisons]
    assert len(set(shown)) == len(shown)
    assert select(policy, baseline, count=4) == [drawn, gains, losses]


def second_turn(name, before, output):
    history = [{"role": "user", "content": "Name one."}, {"role": "assistant", "content": before}]
    prompt = (*history, {"role": "user", "content": "And another?"})
    asked = replace(answer(text=output), prompt=prompt, turn=2)
    return Evaluated(Evaluation(name, "gold", {}), [asked], [0.5])


def test_a_second_turn_stands_beside_the_baselines_with_what_each_said_before():
    baseline, policy = second_turn("initial", "A fig.", "A pear."), second_turn("run", "A lime.", "A plum.")
    shown = parsed(samples(select(policy, baseline), ("initial policy", "ours"), "gold", True)).texts
    texts = [text.strip() for text in shown if text.strip()]
    begin = texts.index("user")
    assert texts[begin : begin + 8] == [
        "user", "Name one.", "initial policy", "A fig.", "ours", "A lime.", "user", "And another?",
    ]  # fmt: skip
    assert ("A pear." in texts, "A plum." in texts) == (True, True)


def test_report_files_are_equal_when_made_twice(evaluated, tmp_path):
    first, second = (write_report(tmp_path / name, evaluated) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    pictures = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*") if path.suffix != ".html"]
    assert len(pictures) == 1 + 4 * 2 + 1
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in pictures)


def test_every_picture_is_a_file_of_its_own_at_the_size_of_a_column(evaluated, tmp_path):
    from PIL import Image

    stale = tmp_path / "panels" / "9_of_another_time.svg"
    stale.parent.mkdir()
    stale.write_text("old")
    (tmp_path / "panels" / "notes.svg").write_text("mine")
    write_panels(tmp_path / "panels", comparison_panels(evaluated)[:2])
    names = {f"{name}.{kind}" for name in ("1_gold_reward", "2_win_rate_against_initial") for kind in ("png", "svg")}
    assert {path.name for path in stale.parent.iterdir()} == names | {"notes.svg", "panels.pdf"}
    with Image.open(tmp_path / "panels" / "1_gold_reward.png") as picture:
        assert picture.size == (1020, 735)  # 3.4 x 2.45 inches at 300 dots
    document = (tmp_path / "panels" / "panels.pdf").read_bytes()
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", document)) == 2


def test_a_policy_alone_has_a_report_without_comparison(evaluated):
    alone = [evaluated[0]]
    structure = parsed(report(alone))
    assert "Answers side by side" not in "".join(structure.texts)
    with pytest.raises(ValueError, match="nothing to report"):
        report([])


def test_a_picture_shows_the_numbers_it_is_given(evaluated, tmp_path):
    from matplotlib.figure import Figure

    drawn = comparison_panels(evaluated)
    axes = Figure().subplots()
    drawn[0].draw(axes)
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None"]
    assert dots == [policy.evaluation.metrics["gold/mean"] for policy in evaluated]
    markers = [line.get_marker() for line in axes.lines if line.get_linestyle() == "None"]
    assert markers == ["o", "X", "o", "o"]  # beta 0.005 is degenerate
    assert svg(drawn[0]).startswith("<svg")
    write_png(tmp_path / "p.png", drawn)
    assert (tmp_path / "p.png").stat().st_size > 20_000


def test_the_last_point_of_the_length_curve_is_the_share_that_was_cut(evaluated):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    comparison_panels(evaluated)[-1].draw(axes)
    for policy, line in zip(evaluated, axes.lines, strict=True):
        assert line.get_ydata()[0] == 100
        assert line.get_ydata()[-1] == pytest.approx(100 * (1 - policy.evaluation.metrics["ended/share"]))


def test_policies_that_nobody_scored_are_told_by_the_pairs_they_rank():
    ranked = {
        "rewards/accuracies": 0.83,
        "rewards/length_baseline": 0.79,
        "kl/initial": 0.25,
        "lengths/response": 30.0,
    }
    plain = Evaluation("initial", "none", {"lengths/response": 28.0}, None)
    policy = Evaluation("run", "none", ranked, "initial", objective="dpo", beta=0.1)
    said = tables.headline([plain, policy])
    assert said.startswith("DPO (β = 0.1) ranks 83.0\u00a0% of held-out pairs as they are labelled")
    assert "79.0\u00a0%" in said
    assert "0.25 nats" in said
    titles_ = [str(column.header) for column in tables.results_table([plain, policy]).columns]
    assert "pairs (longer)" in titles_
    won = {"winrate/initial": 0.6, "winrate/initial_low": 0.55, "winrate/initial_high": 0.7}
    scored = replace(policy, metrics=ranked | won)
    assert "pairs (longer)" not in [str(column.header) for column in tables.results_table([plain, scored]).columns]
