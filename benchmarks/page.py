"""Fill docs/performance.md, data.md, conversations.md, lab.md, references.md, real_model.md, adapters.md, the README
and pictures in docs/images from benchmarks/results."""

import json
import re
import statistics

from common import RESULTS, ROOT
from real_model_page import REAL_MODEL, adapter_memory_table, real_curves

DATA_PAGE, CONVERSATIONS_PAGE = ROOT / "docs" / "data.md", ROOT / "docs" / "conversations.md"
README = ROOT / "README.md"
LAB_PAGE, REFERENCES_PAGE = ROOT / "docs" / "lab.md", ROOT / "docs" / "references.md"
REAL_PAGE, ADAPTERS_PAGE = ROOT / "docs" / "real_model.md", ROOT / "docs" / "adapters.md"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "performance.png"
OURS, OTHERS = "#2563eb", ("#94a3b8", "#475569")


def read(name):
    """A committed result, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def title(row):
    """A cell in words."""
    extra = f", batch {row['batch']}" if row["batch"] != 4 else ""
    extra += f", vocabulary {row['vocab'] // 1000}k" if row["vocab"] != 8192 else ""
    return row["case"].replace("_", " ") + extra


def steps_table(result):
    """Pairs per second, ratios with their spread, memory."""
    head = ("lengths", "allocator", "dpo_ref pairs/s", "× TRL default", "× TRL best", "× with live references")
    lines = ["| " + " | ".join((*head, "peak MiB: ours, default, best", "losses differ by")) + " |", "|---" * 8 + "|"]
    for row in result["rows"]:
        tools = row["tools"]
        ratios = [
            f"{tools[t]['ours_is_faster']:.1f} [{tools[t]['ratio_low']:.1f}, {tools[t]['ratio_high']:.1f}]"
            for t in ("trl-default", "trl-best")
        ]
        memory = ", ".join(f"{tools[t]['peak_mib']:.0f}" for t in ("ours", "trl-default", "trl-best"))
        speed = f"{tools['ours']['pairs_per_second']:.2f}"
        gap = f"{row['largest_loss_difference']:.0e}"
        cells = (title(row), row["allocator"], speed, *ratios, live(tools), memory, gap)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def live(tools):
    """How much faster our step is when both sides ask their reference at every step, without checkpointing."""
    if "ours-live" not in tools or "trl-nogc" not in tools:
        return ""
    return f"{tools['ours-live']['pairs_per_second'] / tools['trl-nogc']['pairs_per_second']:.1f}"


def scaling_table(result):
    """The exponents."""
    lines = ["| against | sizes | time grows with exponent |", "|---|---|---|"]
    names = {"pairs": "pairs", "response_tokens": "response", "vocabulary": "vocab", "prompt_share": "prompt"}
    for row in result["rows"]:
        sizes = [point[names[row["against"]]] for point in row["points"]]
        lines.append(f"| {row['against'].replace('_', ' ')} | {sizes[0]} to {sizes[-1]} | {row['exponent']:.2f} |")
    return "\n".join(lines)


def long_context_table(result):
    """Peaks by length and way of keeping activations, and the lines through them."""
    lengths = [point["response"] for point in result["rows"][0]["points"]]
    head = ("activations", "MiB at its peak", *(f"{length:,} tokens" for length in lengths), "bytes a token", "R²")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        for how, key in (("measured", "peak_mib"), ("counted", "counted_mib")):
            if how in row:
                sizes = (f"{point[key]:,.0f}" for point in row["points"])
                fit = (f"{row[how]['bytes_a_token']:,.0f}", f"{row[how]['r2']:.4f}")
                lines.append("| " + " | ".join((f"`{row['how']}`", how, *sizes, *fit)) + " |")
    logits = 2 * lengths[-1] * result["vocab"] * 4 / 2**30
    lines.append(
        f"\n{result['layers']} layers of hidden size {result['hidden']}, vocabulary {result['vocab']:,}, a prompt of "
        f"{result['prompt']} tokens and two responses of so many each; all logits of the longest pair would be "
        f"{logits:.0f} GiB. {result['machine']['processor']}, torch {result['versions']['torch']}."
    )
    return "\n".join(lines)


def sweep_text(result):
    """One sentence."""
    wall = result["wall_seconds"]
    return (
        f"Five runs over beta took {wall['table']:.0f} s with the shared table and {wall['live']:.0f} s with a live "
        f"reference: {result['ratio']:.2f} of the time, starting Python five times included."
    )


def small_models_table(result):
    """This checkout, and how many times as fast it is as the one beside it."""
    names = {"step": "training step", "sampling": "sampling", "job": "a job of 2,048 pairs, from its start"}
    names |= {"evaluation": "its evaluation, with the initial policy's"}
    lines = ["| one thread | | × before |", "|---|---|---|"]
    for what, row in result["rows"].items():
        low, high = row["from_to"]
        lines.append(f"| {names[what]} | {row['here']:g} {row['unit']} | {row['times_as_fast']} [{low}, {high}] |")
    return "\n".join(lines)


def data_text(result):
    """Two sentences."""
    cold, warm = result["cold"], result["warm"]
    cores, parts = result["machine"]["cores"], cold["seconds"]
    start = sum(warm["seconds"][part] for part in ("imports", "read", "tokenise"))
    return (
        f"{result['pairs']:,} pairs of UltraFeedback's lengths ({result['file_mib']:.0f} MiB of JSON lines, "
        f"{cold['tokens'] / 1e6:.0f} M tokens) are read in {parts['read']:.0f} s, rendered and tokenised in "
        f"{parts['tokenise']:.0f} s and packed in {parts['pack an epoch']:.0f} s on {cores} cores; "
        f"memory peaks at {cold['peak_mib'] / 1024:.1f} GiB. With a warm cache the first pack is ready {start:.1f} s "
        "after the start of Python."
    )


def conversations_table(result):
    """Milliseconds to tokenise a pair by the tokens of its conversation, and by its turns."""
    lines = []
    for against, unit in (("tokens", "tokens, turns of some 80"), ("exchanges", "exchanges, 32,000 tokens in all")):
        rows = [row for row in result["rows"] if row["against"] == against]
        lines += ["", "| " + " | ".join((unit, *(f"{size:,}" for size in rows[0]["sizes"]), "exponent")) + " |"]
        lines.append("|---" * (len(rows[0]["sizes"]) + 2) + "|")
        for row in rows:
            cells = (f"{1000 * seconds:.0f} ms" for seconds in row["seconds"])
            lines.append("| " + " | ".join((f"score {row['score']}", *cells, f"{row['exponent']:.2f}")) + " |")
    return "\n".join(lines[1:])


def gpu_text(result):
    """What one card did: full fine-tuning by shape and option, and real pairs beside TRL."""
    lines = ["| shape | option | pairs/s | useful FLOPs of 989 TFLOP/s | GiB | new graphs |", "|---" * 6 + "|"]
    for part in ("gpu_1b", "gpu_8b"):
        for row in result[part]["rows"]:
            speed = (
                f"{row['pairs_per_second']:.1f} | {row['mfu']:.0%} | {row['peak_gib']:.0f} | {row['recompilations']}"
            )
            lines.append(f"| {row['shape'].upper()} | {row['variant']} | {speed} |")
    machine, beside = result["machine"], result["side_by_side"]["tools"]
    ours = beside["ours"]["pairs_per_second"]
    ratios = {tool: ours / beside[tool]["pairs_per_second"] for tool in ("trl-best", "trl-default")}
    versions = machine["packages"]
    lines.append(
        f"\n{result['card']}, torch {versions['torch']}, transformers {versions['transformers']}, full fine-tuning "
        "with `optim=adamw_bf16`, UltraFeedback's lengths, 8,192 tokens a micro-batch. A product of 8,192² matrices "
        f"reaches {machine['tflops_bf16']:.0f} TFLOP/s there. SmolLM2-135M-Instruct with float32 weights on real "
        f"pairs, 32 a step: {ours:.0f} pairs/s, {ratios['trl-best']:.1f} times TRL {versions['trl']} at its best and "
        f"{ratios['trl-default']:.1f} times TRL as shipped."
    )
    return "\n".join(lines)


def picture(result):
    """Speed beside TRL, one group of bars per cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["allocator"] == "shipped"] or result["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    tools = {"ours": (OURS, "dpo_ref"), "trl-best": (OTHERS[0], "TRL best"), "trl-default": (OTHERS[1], "TRL default")}
    for offset, (tool, (colour, label)) in enumerate(tools.items()):
        speeds = [row["tools"][tool]["pairs_per_second"] for row in rows]
        places = [cell + 0.27 * (offset - 1) for cell in range(len(speeds))]
        axes.bar(places, speeds, 0.25, color=colour, label=label)
        for x, y in zip(places, speeds, strict=True):
            axes.text(x, y, f"{y:.2g}", ha="center", va="bottom", fontsize=8, color="#334155")
    names = [title(row).replace(", ", "\n") for row in rows]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("pairs per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)


def stays(names, rows):
    """A table of what was so at first and at last, and what it may become."""
    lines = ["| " + " | ".join(("", *names, "allowed")) + " |", "|---" * (len(names) + 2) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


ALLOWED = {
    "memory": ("memory, MiB", "+ 2 %"),
    "files": ("open files", "the same"),
    "threads": ("threads", "the same"),
}


def rows_of(both):
    """Rows of memory, open files and threads."""
    return [(title, *(f"{value:,.0f}" for value in both[name]), limit) for name, (title, limit) in ALLOWED.items()]


def soak_text(result):
    """What a long run was, and what it was like at first and at last."""
    (old, young), shares = result["cpu_seconds_per_pair"], result["others_share"]
    low, high = result["ratio_interval"]
    rows = rows_of(result["second_and_last_tenth"])
    rows.append(("what others used of the machine", *(f"{share:.0%}" for share in shares), ""))
    before, after = result["folder_mib"]
    return (
        f"{result['minutes']:g} minutes on {result['pairs']:,} pairs of the lab: {result['steps']:,} steps, an "
        f"evaluation every {result['evaluated_every']} of them, a checkpoint a minute, W&B offline. The run's folder "
        f"grew from {before:.0f} to {after:.0f} MiB. At its end a pair took {old / young:.3f} times the CPU seconds "
        f"that it took a young run, in turn with it (95 % interval {low:.3f} to {high:.3f}); allowed is 1.02, or "
        "chance.\n\n" + stays(("second tenth", "last tenth"), rows)
    )


def soak_sweep_text(result):
    """What many jobs of one process took and left."""
    parts = []
    for name in ("training", "evaluation"):
        part = result[name]
        rows = rows_of(part["first_and_last"])
        rows.append(("seconds a job", *(f"{value:.2f}" for value in part["seconds_per_job"]), ""))
        rows.append(("CPU seconds a job", *(f"{value:.2f}" for value in part["cpu_per_job"]), ""))
        rows = [(f"{name}: {title}", *rest) for title, *rest in rows]
        parts += rows
    return f"{result['jobs']} jobs in {result['seconds'] / 60:.0f} minutes.\n\n" + stays(
        ("after 50 jobs", "the last tenth of them"), parts
    )


def digests_table(result):
    """What checking takes of loading, from memory and from the disk."""
    lines = ["| loaded | MiB | from | checking, s | all of it, s | share |", "|---" * 6 + "|"]
    for row in result["rows"]:
        for place in ("memory", "disk"):
            times = row[place]
            cells = (f"{row['mib']:,.0f}", place, *(f"{times[name]:.3f}" for name in ("checking", "loading")))
            lines.append("| " + " | ".join((row["what"], *cells, f"{times['share']:.1%}")) + " |")
    return "\n".join(lines)


def soak_picture(result):
    """Memory, open files and threads, cost of a pair and size of the folder over the minutes of a run."""
    from dpo_ref.reports.plots import INITIAL, SERIES, figure_of, save

    curves = result["curves"]
    minutes = [seconds / 60 for seconds in curves["seconds"]]
    with figure_of(2, 2) as (figure, (memory, counts, cost, folder)):
        memory.plot(minutes, curves["memory"], color=SERIES[0], label="its own")
        memory.plot(minutes, curves["resident"], color=INITIAL, label="with mapped files")
        memory.plot(minutes, curves["wandb"], color=SERIES[1], label="W&B's process")
        counts.plot(minutes, curves["files"], color=SERIES[0], label="open files")
        counts.plot(minutes, curves["threads"], color=SERIES[1], label="threads")
        for age, costs, colour in zip(("old", "young"), zip(*result["turns"], strict=True), SERIES, strict=False):
            cost.plot([1000 * each for each in costs], ".", color=colour, label=age)
        folder.plot(minutes, curves["folder"], color=SERIES[0])
        titles = ("Memory, MiB", "Open files and threads", "CPU milliseconds a pair", "The run's folder, MiB")
        for axes, title in zip((memory, counts, cost, folder), titles, strict=True):
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("turn" if axes is cost else "minutes since the first step")
        for axes in (memory, counts, cost):
            axes.legend(loc="lower right")
        save(figure, PICTURE.with_name("soak.png"), dpi=130, metadata={"Software": None})


def soak_sweep_picture(result):
    """Memory and open files over the jobs of a sweep, then over their evaluation."""
    from dpo_ref.reports.plots import INITIAL, SERIES, figure_of, save

    curves = result["curves"]
    done = [jobs + evaluated for jobs, evaluated in zip(curves["jobs"], curves["evaluated"], strict=True)]
    with figure_of(1, 2) as (figure, panels):
        for axes, name, title in zip(panels, ("memory", "files"), ("Memory, MiB", "Open files"), strict=True):
            axes.plot(done, curves[name], color=SERIES[0])
            axes.axvline(result["jobs"], color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.set_title(title)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("jobs trained, then evaluated (behind the line)")
        save(figure, PICTURE.with_name("soak_sweep.png"), dpi=130, metadata={"Software": None})


def lab_models_table(result):
    """What the lab's models' answers are worth; of the two initial policies by family too."""
    models = result["models"]
    lines = ["| model | gold, sampled | greedy | best of 16 |", "|---|---|---|---|"]
    for name, row in models.items():
        gold = f"{row['gold']:.3f} ± {row['gold_error']:.3f}"
        lines.append(f"| `lab:{name}` | {gold} | {row['greedy']:.3f} | {row['best_of_16']:.3f} |")
    families = models["initial"]["by_family"]
    lines += ["", "`lab:initial` by family:", "", "| | " + " | ".join(f"`{name}`" for name in families) + " |"]
    lines.append("|---" * (len(families) + 1) + "|")
    for key, title in {"gold": "sampled", "greedy": "greedy", "best_of_16": "best of 16"}.items():
        lines.append(f"| {title} | " + " | ".join(f"{row[key]:.2f}" for row in families.values()) + " |")
    return "\n".join(lines)


def lab_effects_text(result):
    """The targets with how many seeds met each, and the sweeps' cells as means and standard deviations over seeds."""
    seeds, initial = len(result["seeds"]), result["initial"]
    lines = ["| target | seeds that meet it |", "|---|---|"]
    lines += [f"| {target} | {sum(met)} of {seeds} |" for target, met in result["met"].items()]
    lines += [
        "",
        "| sweep | beta | gold | win rate | tokens | ended | KL | end token | degenerate |",
        "|---" * 9 + "|",
    ]
    start = f"| initial policy | | {initial['gold']:.3f} ± {initial['gold_error']:.3f} | |"
    lines.append(f"{start} {initial['tokens']:.1f} | | | | |")
    for sweep, cells in result["sweeps"].items():
        for beta in sorted({cell["beta"] for cell in cells}):
            alike = [cell for cell in cells if cell["beta"] == beta]
            lines.append(f"| {sweep.replace('_', ' ')} | {beta:g} | {effects_row(alike)} |")
    return "\n".join(lines)


def effects_row(cells):
    """Means and standard deviations over seeds."""
    digits = {"gold": 3, "win_rate": 3, "tokens": 1, "ended": 3, "kl": 2, "end_shift": 2}
    broken = f"{sum(cell['degenerate'] for cell in cells)} of {len(cells)}"
    return " | ".join([*(spread(cells, key, 1, number) for key, number in digits.items()), broken])


def references_table(result):
    """References at their betas: means over seeds ± standard deviations of seeds."""
    lines = [
        "| reference | β | gold reward | win rate, % | tokens | KL to initial | KL to the reference | degenerate |",
        "|---" * 8 + "|",
    ]
    cells = {}
    for row in result["rows"]:
        cells.setdefault((row["series"], float(row["beta"])), []).append(row)
    for (series, beta), rows in cells.items():
        name = series.removeprefix("dpo, reference ").replace("other ", "")
        keys = {"gold/mean": (1, 3), "winrate/initial": (100, 1), "lengths/response": (1, 1), "kl/initial": (1, 2)}
        numbers = [spread(rows, key, *scale) for key, scale in (keys | {"kl/loss_reference": (1, 1)}).items()]
        broken = f"{sum(bool(row['degenerate']) for row in rows)} of {len(rows)}"
        lines.append(" | ".join([f"| {name}", f"{beta:g}", *numbers, f"{broken} |"]))
    return "\n".join(lines)


def spread(rows, key, factor, digits):
    """Mean ± standard deviation of a column, a dash where it was not measured."""
    values = [factor * float(row[key]) for row in rows if row.get(key) not in (None, "")]
    if not values:
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def fill(text, name, content):
    """Replace what stands between two markers."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)


def main():
    text = PAGE.read_text()
    makers = {"step_vs_trl": steps_table, "scaling": scaling_table, "sweep_cost": sweep_text, "gpu_h200": gpu_text}
    makers |= {"small_models": small_models_table, "long_context": long_context_table}
    makers |= {"soak": soak_text, "soak_sweep": soak_sweep_text, "digests": digests_table}
    for name, make in makers.items():
        if (result := read(name)) is not None:
            text = fill(text, name, make(result))
    if (steps := read("step_vs_trl")) is not None:
        machine, versions = steps["machine"], steps["versions"]
        about = f"{machine['processor']}, {steps['threads']} threads; torch {versions['torch']}, "
        text = fill(text, "machine", about + f"transformers {versions['transformers']}, TRL {steps['trl']}.")
        picture(steps)
    PAGE.write_text(text)
    for name, draw in {"soak": soak_picture, "soak_sweep": soak_sweep_picture, "real_model_runs": real_curves}.items():
        if (result := read(name)) is not None:
            draw(result)
    if (data := read("data")) is not None:
        DATA_PAGE.write_text(fill(DATA_PAGE.read_text(), "data", data_text(data)))
    lab = LAB_PAGE.read_text()
    for name, make in {"lab_models": lab_models_table, "lab_effects": lab_effects_text}.items():
        if (result := read(name)) is not None:
            lab = fill(lab, name, make(result))
    LAB_PAGE.write_text(lab)
    if (effects := read("lab_effects")) is not None:
        README.write_text(fill(README.read_text(), "demo", f"```text\n{effects['told']}\n```"))
    if (references := read("references")) is not None:
        REFERENCES_PAGE.write_text(fill(REFERENCES_PAGE.read_text(), "references", references_table(references)))
    if (memory := read("adapter_memory")) is not None:
        ADAPTERS_PAGE.write_text(fill(ADAPTERS_PAGE.read_text(), "adapter_memory", adapter_memory_table(memory)))
    real = REAL_PAGE.read_text()
    for name, (source, make) in REAL_MODEL.items():
        if (result := read(source)) is not None:
            real = fill(real, name, make(result))
    REAL_PAGE.write_text(real)
    if (turns := read("conversations")) is not None:
        page = fill(CONVERSATIONS_PAGE.read_text(), "conversations", conversations_table(turns))
        CONVERSATIONS_PAGE.write_text(page)


if __name__ == "__main__":
    main()
