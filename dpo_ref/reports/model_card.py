"""`policy/README.md`: the model card of a trained policy, as the Hugging Face hub shows it.

It is written at the end of training and filled in by every evaluation of the run. Its last line holds a digest of the
others: a card that somebody has written or edited is recognised by it, and stays as it is.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_ref.evaluation.results import ACCURACY, ENDED, KL, LENGTH, SCORE, WIN_RATE, Evaluation
from dpo_ref.files.writing import write_text
from dpo_ref.models.folders import CARD
from dpo_ref.reports.tables import block, code, columns, in_markdown, settings
from dpo_ref.tracking.redaction import PathRedactor, Redactor
from dpo_ref.tracking.terminal import say

MARK = re.compile(r"<!-- dpo_ref ([0-9a-f]{64}) -->\n\Z")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*/[\w.-]+")
ABOUT_THE_MACHINE = ("output_dir", "resume", "stage", "tracking")  # of a run's configuration
MEASURED = (SCORE, WIN_RATE, KL, LENGTH, ENDED, ACCURACY)  # in the front matter


def on_hub(path: Any) -> list[str]:
    """The path of a model or data set if it is a name on the hub and no folder here."""
    return [path] if isinstance(path, str) and HUB_NAME.fullmatch(path) and not Path(path).exists() else []


def _datasets(data: Mapping[str, Any]) -> list[str]:
    path = data.get("path")
    return on_hub((data.get("hub") or {}).get("path") if path is None and data.get("folder") is None else path)


def front_matter(name: str, about: Mapping[str, Any], config: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """The card's metadata as YAML: what the model derives from, and its results as a model index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if evaluation is not None:
        keys = [evaluation.key(metric) for metric in MEASURED]
        data = about["choices"]["data"]
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data,
                dataset_name=f"{data}, {evaluation.num_prompts} held-out prompts",
                metric_type=key,
                metric_value=evaluation.metrics[key],
                metric_name=key,
            )
            for key in keys
            if key in evaluation.metrics
        ]
    base, datasets = on_hub(config["model"].get("path")), _datasets(config["data"])
    card = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo_ref", "preference-optimisation", about["objective"]],
        base_model=base[0] if base else None,
        datasets=datasets or None,
        eval_results=results or None,
    )
    return f"---\n{card.to_yaml()}\n---"


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _steps(about: Mapping[str, Any]) -> str:
    """How far the policy was trained, and by what it was chosen among those of its run if it was."""
    best = about.get("best")
    if best is None:
        return str(about["steps"])
    return f"{best['step']}, where {best['metric']} was best in the run ({best['value']:.4g})"


def _facts(about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    identities, commit = about["identities"], about["git"]["commit"]
    changed = ", with changes" if about["git"]["dirty"] else ""
    beta = "" if about["beta"] is None else f", beta {about['beta']:g}"
    counts, versions = (", ".join(f"{k} {v}" for k, v in about[of].items()) for of in ("data", "versions"))
    weights, reference, initial = (
        code(identities[name]) for name in ("initial_policy", "loss_reference", "kl_reference")
    )
    rows = [
        ("initial policy", f"{in_markdown(config['model'].get('path'))} (weights {weights})"),
        ("objective", in_markdown(f"{about['objective']}{beta}")),
        ("reference in the loss", f"{in_markdown(about['reference'])} ({reference})"),
        ("KL measured to", f"the initial policy ({initial})"),
        ("data", in_markdown(f"{about['choices']['data']}: {counts}")),
        ("optimiser steps", in_markdown(_steps(about))),
        *(
            (f"{key} on the hub", in_markdown(f"{source['path']} at commit {source['commit']}"))
            for key, source in about.get("sources", {}).items()
        ),
        ("seed", in_markdown(about["seed"])),
        ("dpo_ref", in_markdown(f"commit {commit}{changed}" if commit else "commit unknown")),
        ("versions", in_markdown(versions)),
    ]
    return _table(rows)


def _results(evaluation: Evaluation | None, run: str) -> str:
    if evaluation is None:
        return f"Not evaluated yet. {code(f'python evaluate.py policy={run}')} fills this in."
    entries = [(column.title, column.text(evaluation), column.note) for column in columns(evaluation.scorer)]
    rows = [[in_markdown(part) for part in entry] for entry in entries]
    broken = [f"**Degenerate**: {in_markdown('; '.join(evaluation.degenerate))}.\n"] if evaluation.degenerate else []
    against = f"against the policy {code(evaluation.baseline)}" if evaluation.baseline else "against no other policy"
    options = in_markdown(", ".join(f"{name} {value}" for name, value in settings(evaluation)))
    return "\n".join([*broken, _table(rows, ("metric", "value", "what it is")), "", f"Compared {against}; {options}."])


USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the repository's name on the hub
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
```
"""


def card(run: Path, summary: Mapping[str, Any], config: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """The model card of a run's policy: its configuration, what it was trained against, what was measured."""
    import yaml

    redactor, paths = Redactor(config), PathRedactor({**config, "run": str(run)})
    about, options = (paths.tree(redactor.tree(tree)) for tree in (summary, config))
    options = {name: value for name, value in options.items() if name not in ABOUT_THE_MACHINE}
    words = [word for word in about["overrides"] if word.lstrip("+").partition("=")[0] not in ABOUT_THE_MACHINE]
    words = [word for word in words if not word.lstrip("+").startswith("tracking.")]
    name = redactor.text(run.resolve().name)
    adapter = "\n`adapter/` holds the LoRA adapter by itself." if (run / "policy" / "adapter").is_dir() else ""
    body = f"""{front_matter(name, about, config, evaluation)}

# {in_markdown(name)}

{in_markdown(options["model"].get("path"))} trained with **{in_markdown(about["objective"])}** against the reference \
**{in_markdown(about["reference"])}**.

{_facts(about, options)}

## Results

{_results(evaluation, name)}

{USE}{adapter}
## Configuration

{block("bash", shlex.join(["python", "train.py", *words]))}

<details><summary>every option</summary>

{block("yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True).rstrip())}

</details>

"""
    return body + f"<!-- dpo_ref {_digest(body)} -->\n"


def average_card(name: str, record: Mapping[str, Any]) -> str:
    """The model card of an average of policies, from its `average.json`."""
    from huggingface_hub import ModelCardData

    members = record["policies"]
    bases = [base for member in members for base in on_hub(member["name"])]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo_ref", "preference-optimisation", "merge"],
        base_model=bases or None,
    )
    rows = [
        (in_markdown(_place(member["name"])), f"{member['weight']:g}", code(member["weights_digest"]))
        for member in members
    ]
    commit, versions = record["git"]["commit"], ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    body = f"""---
{data.to_yaml()}
---

# {in_markdown(name)}

The weighted average of the weights of {len(members)} policies; its own weights are {code(record["weights_digest"])}.

{_table(rows, ("policy", "weight", "digest of its weights"))}

{USE}
Made by dpo_ref, {in_markdown(f"commit {commit}" if commit else "commit unknown")}; {in_markdown(versions)}.

"""
    return body + f"<!-- dpo_ref {_digest(body)} -->\n"


def _place(name: str) -> str:
    """A policy without the folders of this machine: a hub name, or the last names of its path."""
    return name if on_hub(name) else "/".join(Path(name).parts[-3:] if "checkpoints" in name else [Path(name).name])


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def is_ours(text: str) -> bool:
    """Whether a card is as this module wrote it."""
    mark = MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def write_card(
    run: Path, summary: Mapping[str, Any], config: Mapping[str, Any], evaluation: Evaluation | None
) -> None:
    """Write `policy/README.md`, with results where there are any. One that was edited by hand is kept, and it is said
    so."""
    path = run / "policy" / CARD
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8")):
        say(f"{path} was edited by hand and stays as it is; delete it to have it written again")
        return
    write_text(path, card(run, summary, config, evaluation))
