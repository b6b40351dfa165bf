"""Makes alpaca_eval_winrates.json: what alpaca_eval itself returns for invented preferences and gamed rows.

In an environment of its own, since its pins are not ours:

    python -m venv oracle && oracle/bin/pip install alpaca_eval==0.6.6 "scikit-learn<1.10"
    oracle/bin/python tests/support/golden/make_alpaca_eval.py
"""

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from alpaca_eval.metrics import get_winrate, glm_winrate

warnings.filterwarnings("ignore")
OUT = Path(__file__).with_name("alpaca_eval_winrates.json")
WIN_RATES = {
    "soft": [1.9, 1.0, 1.5, 0, None, 1.2, 1.500001, 1.4999999],
    "hard": [1, 2, 2, 0, 1, 2, 2, 1.5],
    "all won": [2.0, 2.0, 2.0],
    "mostly missing": [None, None, 1.25, 1.75],
}


def plain(found):
    return {name: float(value) for name, value in found.items()}


def gamed_rows(generator, difficulties):
    """Two gamed baselines on every prompt: one shorter than the baseline, one longer."""
    frames = []
    for name, shift in (("concise", 1.0), ("verbose", -1.0)):
        scaled = np.round(shift + generator.normal(size=len(difficulties)), 4)
        logits = -1.2 * np.tanh(scaled) + 0.9 * difficulties
        frames.append(
            pd.DataFrame(
                {
                    "model": f"baseline_{name}",
                    "preference": np.round(1 / (1 + np.exp(-logits)), 4),
                    "index": range(len(difficulties)),
                    "std_delta_len": scaled,
                    "instruction_difficulty": difficulties,
                    "not_gamed_baseline": False,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def annotations(generator, difficulties, theta, phi, psi, hard, missing):
    """One model's judged rows."""
    lengths_1, lengths_2 = generator.integers(5, 400, size=(2, len(difficulties)))
    delta = lengths_1 - lengths_2
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(delta / delta.std(ddof=1)) + psi * difficulties)))
    p = np.where(generator.uniform(size=len(p)) < p, 1.0, 0.0) if hard else np.round(p, 6)
    preferences = [None if row in missing else 1 + value for row, value in enumerate(p.tolist())]
    return preferences, lengths_1.tolist(), lengths_2.tolist()


def length_controlled(folder, name, num, theta, phi, psi, hard=False, missing=()):
    generator = np.random.default_rng(len(name))
    difficulties = np.round(generator.normal(size=num), 4)
    frame = gamed_rows(generator, difficulties)
    frame.to_csv(folder / "df_gamed.csv", index=False)
    pd.Series(difficulties).to_csv(folder / "instruction_difficulty.csv")
    preferences, lengths_1, lengths_2 = annotations(generator, difficulties, theta, phi, psi, hard, missing)
    rows = pd.DataFrame(
        {
            "preference": preferences,
            "output_1": ["x" * n for n in lengths_1],
            "output_2": ["x" * n for n in lengths_2],
            "generator_1": "baseline",
            "generator_2": name,
            "annotator": "invented",
        }
    )
    weights = folder / name
    found = glm_winrate.get_length_controlled_winrate(rows, save_weights_dir=weights)
    stored = pd.read_csv(next(weights.rglob("*.csv")), index_col=0)
    theirs = pd.DataFrame([[0.3, -0.1, 0.4]], columns=stored.columns, index=["other"])
    predicted = glm_winrate.predict_winrate(name, "other", pd.concat([stored, theirs]))
    columns = ("preference", "std_delta_len", "instruction_difficulty")
    return {
        "name": name,
        "preferences": preferences,
        "baseline_lengths": lengths_1,
        "policy_lengths": lengths_2,
        "difficulties": difficulties.tolist(),
        "gamed": {column: frame[column].tolist() for column in columns},
        "expected": plain(found) | dict(zip(("phi", "psi", "theta"), stored.iloc[0].tolist(), strict=True)),
        "predicted_against": {"phi": 0.3, "psi": -0.1, "theta": 0.4, "win_rate": float(predicted)},
    }


def main():
    cases = [
        {
            "name": name,
            "preferences": preferences,
            "expected": plain(get_winrate([{"preference": p} for p in preferences])),
        }
        for name, preferences in WIN_RATES.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        glm_winrate.hf_hub_download = lambda filename, **_: str(Path(folder) / filename)
        controlled = [
            length_controlled(Path(folder), "soft", 70, -0.8, -0.9, 0.7),
            length_controlled(Path(folder), "hard labels", 90, 0.6, -1.5, -0.2, hard=True),
            length_controlled(Path(folder), "with missing", 60, -1.5, 0.4, 1.1, missing=(3, 17, 44)),
        ]
    versions = {"alpaca_eval": "0.6.6", "scikit-learn": sklearn.__version__}
    OUT.write_text(json.dumps({"versions": versions, "cases": cases, "length_controlled": controlled}) + "\n")


main()
