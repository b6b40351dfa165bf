"""Checkpoints of runs, as tests find and change them."""

import json
from pathlib import Path

from dpo_ref.files.digests import file_digest


def changed_state(run: Path, **changes) -> Path:
    """The run's only checkpoint with another state, under whose step and digest it stands."""
    (folder,) = run.glob("checkpoints/step-*")
    state, digests = folder / "state.json", folder / "digests.json"
    content = json.loads(state.read_text()) | changes
    state.write_text(json.dumps(content))
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {"state.json": file_digest(state)}))
    return folder.rename(folder.with_name(f"step-{content['step']:08d}"))


def lines(run: Path) -> list[dict]:
    """Metrics without what depends on the clock and the process."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "throughput" not in k and "memory" not in k} for row in rows]
