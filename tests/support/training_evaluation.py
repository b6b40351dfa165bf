"""The options of small runs that are evaluated while they train, and their metrics."""

import json

DATA = ["data.num_pairs=96", "data.num_eval_pairs=16", "data.num_test_prompts=24"]
SMALL = [*DATA, "model.path=lab:tiny", "trainer.batch_size=8", "tracking=none"]
CLOCK = ("throughput", "memory", "seconds")


def lines(folder, prefix=""):
    """Metrics without what depends on the clock and the process, of the keys that begin with `prefix`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {
            k: v
            for k, v in row.items()
            if not any(word in k for word in CLOCK) and (k == "step" or k.startswith(prefix))
        }
        for row in rows
    ]
    return [row for row in kept if len(row) > 1]
