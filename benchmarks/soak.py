"""Does a long run stay as it began? `train.py` watched from outside, every second, through /proc.

    python benchmarks/soak.py --minutes 30     one run on 100,000 pairs: evaluations, checkpoints, W&B offline
    python benchmarks/soak.py --sweep 200      so many small jobs of one sweep, in one process, and their evaluation

Memory is what the processes have written and no file holds, swapped or not; what they have mapped of files, which the
kernel takes back when it likes, is drawn beside it, and so is W&B's background process, which is not judged. A tenth
is a tenth of the time since the first step; the first tenth is warm-up. Exit status 1 where

- the memory in use in the last tenth is more than 2 % above that of the second,
- the median number of open files or of threads is not that of the second tenth,
- the run, old by then, takes more CPU seconds a pair than a young one of the same command: by more than 2 %, and by
  more than chance does (95 % bootstrap interval), or the interval is too wide to tell.

Memory in use is the lowest that was seen, twentieth part aside: held-out evaluations leave free blocks on the heap, up
to a tenth of all, until W&B's messages (protobuf) trim it after some 470 steps, and a median says how many of either
fell into a tenth.

Old and young are compared in turn, a few seconds each, while the other is stopped: what a CPU second does changes by a
fifth within minutes on shared hardware, so that two tenths of one run say more of their hours than of the run. CPU
seconds are counted in windows of five seconds in which steps alone were made, without evaluations. What others used
of the machine meanwhile is in the result.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import page
from common import ROOT, write

PAIRS, HELD_OUT = 100_000, 512
BATCH = 32  # pairs a step
EVALUATED_EVERY = 400  # steps
GROWTH = 1.02  # of memory and of CPU seconds a pair: so much is within noise
WIDEST = 0.1  # an interval of the ratio that is wider says nothing
WINDOW = 5  # seconds of steps alone
WARM_UP = 60  # seconds of the young run before it is compared
TURNS = 40  # windows of the old run, each with one of the young
POINTS = 600  # of a curve in the result file
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")

# --- what /proc says


def tree(root):
    """Process ids of a process and all below it."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    members = [root]
    for member in members:
        members += children.get(member, [])
    return members


def stat_fields(process):
    """Of /proc/<pid>/stat what follows the name; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def command_of(process):
    """What was typed, or b"" for a process that is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def memory_of(process):
    """MiB: what is in no file, swapped or not, a page shared with others in part; and all that is resident."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0.0, 0.0
    sizes = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"] + sizes["SwapPss"], sizes["Rss"]


def count(process, kind):
    """How many entries /proc/<pid>/<kind> has."""
    try:
        return len(os.listdir(f"/proc/{process}/{kind}"))
    except OSError:
        return 0


def busy_seconds():
    """CPU seconds that the whole machine has worked."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICK


def sample(root):
    """What a process and those below it use now, or the evaluation alone that it has started; CPU seconds of all, with
    those of children that have ended."""
    members = tree(root)
    commands = {member: command_of(member) for member in members}
    wandb = [member for member, command in commands.items() if b"wandb-core" in command]
    evaluating = [member for member, command in commands.items() if b"evaluate.py" in command]
    ours = evaluating or [member for member in members if member not in wandb]
    memory = [memory_of(member) for member in ours]
    times = [stat_fields(member) for member in members]
    return {
        "memory": sum(own for own, _ in memory),
        "resident": sum(resident for _, resident in memory),
        "wandb": sum(memory_of(member)[0] for member in wandb),
        "files": sum(count(member, "fd") for member in ours),
        "threads": sum(count(member, "task") for member in ours),
        "cpu": sum(sum(map(int, fields[11:15])) for fields in times if fields) / TICK,
        "busy": busy_seconds(),
    }


def folder_mib(folder):
    """Size of all files below it; some may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            total += path.stat().st_size if path.exists() else 0
    return total / 2**20


def watched(root, done: Callable[[float], bool], measure, seconds=1.0):
    """Samples of a process, each with its time and what `measure` adds, until it has ended or `done` says so."""
    samples, start, due = [], time.monotonic(), time.monotonic()
    while root.poll() is None and not done(now := time.monotonic() - start):
        samples.append({"seconds": now, **sample(root.pid), **measure()})
        due += seconds
        time.sleep(max(0.0, due - time.monotonic()))
    return samples


# --- one long run


def write_pairs(path):
    """Pairs of the lab as rows of a file, as a user has them."""
    from dpo_ref.lab.preferences import SimulatedJudge, draw_pairs

    groups = draw_pairs(SimulatedJudge(0.5, 0.02, 10.0), "train", random.Random("soak"))
    with path.open("w") as file:
        for group in islice(groups, PAIRS + HELD_OUT):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in group.responses)
            file.write(json.dumps({"prompt": list(group.prompt), "chosen": chosen, "rejected": rejected}) + "\n")


class Progress:
    """What a run has written to metrics.jsonl since the last look."""

    def __init__(self, path):
        self.path, self.position = path, 0
        self.steps = self.evaluations = 0
        self.speeds = []

    def __call__(self):
        """Steps and evaluations so far, and pairs a second of the steps since the last look."""
        lines = self._lines()
        rows = [json.loads(line) for line in lines]
        trained = [row for row in rows if "train/loss" in row]
        self.steps += len(trained)
        self.evaluations += len(rows) - len(trained)
        speeds = [row["train/throughput/pairs_per_second"] for row in trained]
        speed = len(speeds) / sum(1 / value for value in speeds) if speeds else None
        return {"steps": self.steps, "evaluations": self.evaluations, "speed": speed}

    def _lines(self):
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
            self.position += len(whole) + 1 if whole else 0
        return whole.splitlines()


def soak(minutes, model, work):
    """Start the run, watch it from its first step on, compare it with a young one, stop both as a batch system does,
    and judge."""
    data, run = work / "pairs.jsonl", work / "run"
    write_pairs(data)
    words = ["train.py", f"model={model}", "objective=dpo", "data=jsonl", f"data.path={data}"]
    words += [f"data.eval_fraction={HELD_OUT / (PAIRS + HELD_OUT)}", f"trainer.batch_size={BATCH}"]
    words += ["trainer.epochs=1000", "trainer.save_minutes=1", "tracking.mode=offline"]
    words += [f"evaluation.every={EVALUATED_EVERY}", f"trainer.eval_every={EVALUATED_EVERY}"]
    progress, sized = Progress(run / "metrics.jsonl"), {"at": 0.0, "mib": 0.0}

    def measure():
        if time.monotonic() - sized["at"] > 10:
            sized.update(at=time.monotonic(), mib=folder_mib(run))
        return {**progress(), "folder": sized["mib"]}

    with started([*words, f"output_dir={run}"], work / "output") as old:
        watched(old, lambda _: progress()["steps"] > 0, dict)
        samples = watched(old, lambda seconds: seconds >= 60 * minutes, measure)
        signalled(old, signal.SIGSTOP)
        with started([*words, f"output_dir={work / 'young'}"], work / "young_output") as young:
            turns = in_turn((old, progress), (young, Progress(work / "young" / "metrics.jsonl")))
            stopped(young, work / "young_output")
        stopped(old, work / "output")
    about = {"minutes": minutes, "model": model, "pairs": PAIRS, "evaluated_every": EVALUATED_EVERY}
    thin = curves(samples, ("seconds", "memory", "resident", "wandb", "files", "threads", "folder", "steps"))
    return about | judged_run(samples, turns) | {"curves": thin}


def in_turn(*runs):
    """CPU seconds a pair of processes, each with its `Progress`, all but one of them stopped at a time: a row of each
    for every turn in which each made nothing but steps. The last has just been started, the others are stopped."""
    process, progress = runs[-1]
    watched(process, lambda _: progress()["steps"] > 0, dict)
    watched(process, lambda seconds: seconds > WARM_UP, dict)
    signalled(process, signal.SIGSTOP)
    turns = ([cost_alone(*run) for run in runs] for _ in range(3 * TURNS))
    rows = list(islice((turn for turn in turns if None not in turn), TURNS))
    if not rows:
        sys.exit(f"error: in no turn both made nothing but steps; did they end? {runs[0][1].path.parent}")
    return rows


def cost_alone(process, progress):
    """CPU seconds a pair in one window of a process that is stopped before and after; None where it did other things
    than steps."""
    signalled(process, signal.SIGCONT)
    samples = watched(process, lambda seconds: seconds > WINDOW + 4, progress)
    signalled(process, signal.SIGSTOP)
    return next((cost for _, cost in windows(samples)), None)


def signalled(process, signum):
    """Send a signal to a process and all below it."""
    for member in tree(process.pid):
        with suppress(ProcessLookupError):
            os.kill(member, signum)


def stopped(process, output):
    """End a run as a batch system does; exits where it does not end as it should, or has ended before."""
    early = process.poll()
    signalled(process, signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if early is not None or code != 130:
        sys.exit(f"error: train.py ended with {code if early is None else early}: see {output}")


@contextmanager
def started(words, output):
    """A command of the project, its output in a file; it does not outlive this one."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with output.open("w") as output:
        command = [sys.executable, *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        signalled(process, signal.SIGCONT)
        process.wait()


def curves(samples, names):
    """At most POINTS values of each."""
    thin = samples[:: max(1, len(samples) // POINTS)]
    return {name: [round(point[name], 2) for point in thin] for name in names}


def tenth(samples, which):
    """The samples of one tenth of the time; -1 is the last."""
    spans = np.linspace(0, samples[-1]["seconds"] + 1e-9, 11)
    low, high = list(pairwise(spans))[which]
    return [point for point in samples if low <= point["seconds"] < high]


def in_use(samples):
    """Memory without what is free and not yet given back; a process that is just being forked hides the lowest."""
    return float(np.quantile([point["memory"] for point in samples], 0.05))


def median(samples, name):
    """Of one quantity."""
    return statistics.median(point[name] for point in samples)


def windows(samples):
    """CPU seconds a pair, each with its time, in windows in which nothing but steps was made."""
    costs, begin = [], None
    for before, here, after in zip(samples, samples[1:], samples[2:], strict=False):
        alone = before["steps"] < here["steps"] < after["steps"] and before["evaluations"] == after["evaluations"]
        if not alone:
            begin = None
        elif begin is None:
            begin = here
        elif here["seconds"] - begin["seconds"] >= WINDOW:
            cost = (here["cpu"] - begin["cpu"]) / (BATCH * (here["steps"] - begin["steps"]))
            costs.append((here["seconds"], cost))
            begin = here
    return costs


def ratio_interval(turns):
    """95 % bootstrap interval of the ratio of the means of two columns, whose rows belong together."""
    rows = np.random.default_rng(0).integers(len(turns), size=(4000, len(turns)))
    old, young = np.array(turns)[rows].mean(axis=1).T
    return np.quantile(old / young, [0.025, 0.975]).tolist()


def of_others(samples):
    """Share of the machine that other processes used."""
    first, last = samples[0], samples[-1]
    ours = last["cpu"] - first["cpu"]
    whole = (last["seconds"] - first["seconds"]) * (os.cpu_count() or 1)
    return (last["busy"] - first["busy"] - ours) / whole


def judged_run(samples, turns):
    """The numbers by which a run is judged, and what is wrong with them; `turns` are the CPU seconds a pair of the old
    run and of a young one."""
    second, last = tenth(samples, 1), tenth(samples, -1)
    both = compared(second, last) | {"memory": [in_use(part) for part in (second, last)]}
    result = {
        "steps": samples[-1]["steps"] - samples[0]["steps"],
        "evaluations": samples[-1]["evaluations"] - samples[0]["evaluations"],
        "second_and_last_tenth": both,
        "others_share": [of_others(part) for part in (second, last)],
        "folder_mib": [samples[0]["folder"], samples[-1]["folder"]],
        "turns": turns,
    }
    old, young = means = np.mean(turns, axis=0).tolist()
    interval = ratio_interval(turns)
    faults = changed(both) + slower(old / young, *interval)
    return result | {"cpu_seconds_per_pair": means, "ratio_interval": interval, "faults": faults}


def compared(first, last, count=median):
    """What has to stay, and what W&B's process holds, in two parts of the time: medians, and `count` of files and
    threads."""
    sizes = {name: [median(part, name) for part in (first, last)] for name in ("memory", "wandb")}
    return sizes | {name: [count(part, name) for part in (first, last)] for name in ("files", "threads")}


def changed(both):
    """What is wrong with memory, open files and threads before and after."""
    before, after = both["memory"]
    faults = [f"memory grew from {before:.0f} to {after:.0f} MiB"] if after > GROWTH * before else []
    counts = {name: both[name] for name in ("files", "threads")}
    return faults + [
        f"{name}: {first:g} before, {last:g} after" for name, (first, last) in counts.items() if first != last
    ]


def slower(ratio, low, high):
    """What is wrong with the old run's cost of a pair over the young one's."""
    if high - low > WIDEST:
        return [f"the cost of a pair is known within {low:.2f} and {high:.2f} only: run longer, or alone"]
    return (
        [f"a pair takes {ratio:.3f} times the CPU seconds it takes a young run"] if low > 1 and ratio > GROWTH else []
    )


# --- many small jobs of one sweep

SEEDS = 10
AT_FIRST = 50  # jobs after which everything has to stay: W&B keeps its last 100 artifacts, two a job


def swept(jobs, work):
    """A sweep of small jobs in one process, then their evaluation in another; both watched."""
    folder = work / "sweep"
    betas = ",".join(f"{0.01 * (index + 1):.2f}" for index in range(-(-jobs // SEEDS)))
    words = [f"output_dir={folder}", f"beta={betas}", f"seed={','.join(map(str, range(SEEDS)))}"]
    words += ["data.num_pairs=32", "data.num_eval_pairs=8", "data.num_test_prompts=8", "trainer.batch_size=16"]

    def measure():
        return {
            "jobs": len(list(folder.glob("*/policy/model.safetensors"))),
            "evaluated": len(list(folder.glob("*/evaluation/evaluation.json"))),
        }

    with started(["train.py", "-m", "model=lab_tiny", "tracking.mode=offline", *words], work / "output") as process:
        samples = watched(process, lambda _: False, measure, seconds=0.5)
        code = process.wait()
    if code:
        sys.exit(f"error: the sweep ended with {code}: see {work / 'output'}")
    parts = {"training": during(samples, "jobs", jobs), "evaluation": during(samples, "evaluated", jobs)}
    faults = [f"{name}: {fault}" for name, part in parts.items() for fault in changed(part["first_and_last"])]
    thin = curves(samples, ("seconds", "memory", "resident", "wandb", "files", "threads", "jobs", "evaluated"))
    return {"jobs": jobs, **parts, "seconds": samples[-1]["seconds"], "faults": faults, "curves": thin}


def during(samples, name, jobs):
    """What the first jobs took and left, after a warm-up, and what the last ones did."""
    some = jobs // 10
    first = [point for point in samples if AT_FIRST <= point[name] < AT_FIRST + some]
    last = [point for point in samples if jobs - some <= point[name] < jobs]

    def per_job(part, kind):
        return (part[-1][kind] - part[0][kind]) / max(1, part[-1][name] - part[0][name])

    costs = {f"{kind}_per_job": [per_job(part, kind) for part in (first, last)] for kind in ("seconds", "cpu")}
    return {"first_and_last": compared(first, last, lowest), **costs}


def lowest(samples, name):
    """Of one quantity: what is there between two jobs."""
    return min(point[name] for point in samples)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sweep", type=int, metavar="JOBS")
    parser.add_argument("--model", default="lab")
    parser.add_argument("--folder", type=Path, help="keep what the run writes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = args.folder or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        result = swept(args.sweep, work) if args.sweep else soak(args.minutes, args.model, work)
    write("soak_sweep" if args.sweep else "soak", result)
    page.main()
    told = {key: value for key, value in result.items() if key not in ("curves", "turns")}
    print(json.dumps(told, indent=1))
    if result["faults"]:
        sys.exit("\n".join(["error: it did not stay as it began:", *result["faults"]]))


if __name__ == "__main__":
    main()
