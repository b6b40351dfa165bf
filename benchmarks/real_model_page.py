"""What docs/real_model.md and adapters.md show of benchmarks/results: tables, answers and a picture."""

from common import ROOT

PICTURE = ROOT / "docs" / "images" / "real_model.png"


def real_model_table(result):
    """A whole process on a real model beside TRL's."""
    names = {"ours": "dpo_ref", "trl-default": "TRL as shipped", "trl-best": "TRL at its best"}
    lines = [
        "| | start-up, s | s a pair | with the reference's pass | × dpo_ref's time | peak GiB |",
        "|---" * 6 + "|",
    ]
    for tool, row in result["tools"].items():
        whole = row["seconds_per_pair"] + row["reference_pass_s_per_pair"]
        cells = (names[tool], f"{row['start_up_s']:.1f}", f"{row['seconds_per_pair']:.2f}", f"{whole:.2f}")
        cells += (f"{row['ours_is_faster']:.1f}", f"{row['peak_gib']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    machine = result["machine"]
    return "\n".join([
        *lines, "",
        f"{result['model']}, {result['batch']} pairs a step, {result['steps']} steps, medians of {result['repeats']} "
        f"turn{'s' if result['repeats'] > 1 else ''}; {machine['gpu'] or machine['processor']}, "
        f"{result['threads']} threads; torch {result['versions']['torch']}, TRL {result['trl']}. Losses of equal "
        f"steps differ by {result['largest_loss_difference']:.0e} at most. The machine's own matrix products make "
        f"{result['gemm_gflops']:.0f} GFLOP/s, at which a pair would take {result['bound_s_per_pair']:.2f} s: a step "
        f"takes {result['over_bound']:.2f} times that. What its time goes to: {shares(result['profile'])}.",
    ])  # fmt: skip


def shares(profile):
    """A profile in words."""
    rest = 1 - sum(profile.values())
    return ", ".join(f"{part} {share:.1%}" for part, share in (profile | {"all else": rest}).items())


def real_runs_table(result):
    """What the commands of the page took, and what training came to."""
    lines = ["| run | lr | minutes | peak GiB | loss | held-out accuracy | margin |", "|---" * 7 + "|"]
    for name, row in result["rows"].items():
        if "train/loss" not in row:
            continue
        loss = " → ".join(f"{value:.4f}" for value in row["train/loss"])
        accuracy, margin = (row.get(f"eval/rewards/{key}", ["", ""])[-1] for key in ("accuracies", "margins"))
        cells = (name, row["lr"], f"{row['seconds'] / 60:.1f}", f"{row['peak_gib']:.1f}", loss)
        cells += tuple(f"{value:.3f}" if value != "" else "" for value in (accuracy, margin))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real_evaluations_table(result):
    """What evaluate.py measured of them."""
    head = "| policy | minutes | accuracy | the longer answer | KL, nats | tokens | ended | end Δ |"
    lines = [head, "|---" * 8 + "|"]
    for name, row in result["rows"].items():
        if "kl/initial" not in row:
            continue
        accuracy = f"{row['rewards/accuracies']:.3f} ± {row['rewards/accuracies_se']:.3f}"
        kl = f"{row['kl/initial']:.2f} ± {row['kl/initial_se']:.2f}"
        cells = (name.removeprefix("evaluate "), f"{row['seconds'] / 60:.1f}", accuracy)
        cells += (f"{row['rewards/length_baseline']:.3f}", kl, f"{row['lengths/response']:.0f}")
        cells += (f"{row['ended/share']:.1%}", f"{row['eos/chosen_logratio']:+.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real_references(result):
    """What a look at candidate references said before any training."""
    head = "| reference | pairs ranked as labelled | s.d. of margins | start near beta | KL(policy ‖ reference) |"
    lines = [head, "|---" * 5 + "|"]
    for name, row in result["rows"]["compatibility"]["references"].items():
        accuracy = f"{row['accuracy']['mean']:.0%} ± {row['accuracy']['se']:.0%}"
        beta = f"{row['beta']:.3g}" if row["sd"] else "any"
        kl = f"{row['kl']['mean']:.2f} ± {row['kl']['se']:.2f}" if row["kl"] else ""
        lines.append(f"| {name} | {accuracy} | {row['sd']:.3g} | {beta} | {kl} |")
    return "\n".join(lines)


def real_answers(result):
    """Answers to our own questions before and after."""
    asked = {name.removeprefix("ask "): row["answers"] for name, row in result["rows"].items() if "answers" in row}
    parts = []
    for index, question in enumerate(result["questions"]):
        parts.append(f"**{question}**\n")
        parts += [f"*{name}*\n\n{quoted(answers[index])}\n" for name, answers in asked.items()]
    return "\n".join(parts)


SHOWN = 500  # characters of an answer


def quoted(text):
    """The beginning of a text as a block quotation."""
    rest = len(text) - SHOWN
    shown = text if rest <= 0 else f"{text[:SHOWN]} […] *and {rest:,} characters more*"
    return "\n".join(f"> {line}".rstrip() for line in shown.splitlines())


def real_commands(result):
    """The commands as they were typed."""
    return "```bash\n" + "\n".join(row["command"] for row in result["rows"].values()) + "\n```"


def adapter_memory_table(result):
    """The peak of a run of all weights, and of those that train an adapter."""
    arms = {name: row["peak_mib"] for name, row in result["arms"].items()}
    whole = arms["all weights"]
    rows = [f"| {name} | {peak:,.0f} | {peak / whole:.2f} |" for name, peak in arms.items()]
    return "\n".join(["| trained | peak, MiB | of that of all weights |", "|---" * 3 + "|", *rows])


def real_curves(result):
    """The longer run: loss and margin of its batches, and what held-out pairs say, beside the longer answer."""
    from dpo_ref.reports.plots import INITIAL, SERIES, figure_of, save

    rows = result["rows"]
    if "dpo_longer" not in rows:
        return
    curves, baseline = rows["dpo_longer"]["curves"], rows["evaluate dpo_longer"]["rewards/length_baseline"]
    with figure_of(1, 3) as (figure, (loss, margin, accuracy)):
        loss.plot(*zip(*curves["train/loss"], strict=True), color=INITIAL, label="batches of 8")
        loss.plot(*zip(*curves["eval/loss"], strict=True), "o-", color=SERIES[0], label="held out")
        margin.plot(*zip(*curves["train/rewards/margins"], strict=True), color=INITIAL)
        accuracy.plot(*zip(*curves["eval/rewards/accuracies"], strict=True), "o-", color=SERIES[0], label="policy")
        accuracy.axhline(baseline, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2, label="the longer answer")
        titles = ("Loss", "Margin of the batches", "Accuracy on held-out pairs")
        for axes, title in zip((loss, margin, accuracy), titles, strict=True):
            axes.set_title(title)
            axes.set_xlabel("optimiser steps")
        for axes in (loss, accuracy):
            axes.legend(loc="best")
        save(figure, PICTURE, dpi=130, metadata={"Software": None})


REAL_MODEL = {  # what stands on docs/real_model.md, by its marker: the result file, and what makes the text
    "real_model": ("real_model", real_model_table),
    "commands": ("real_model_runs", real_commands),
    "runs": ("real_model_runs", real_runs_table),
    "evaluations": ("real_model_runs", real_evaluations_table),
    "references": ("real_model_runs", real_references),
    "answers": ("real_model_runs", real_answers),
}
