"""`evaluate.py stage=compatibility`: candidate references beside a policy, before any training.

Every candidate is built as `train.py` would build it, for a random part of the training pairs and through the same
cache, so that a run that follows finds these log-probs. A candidate that cannot be built is a finding: it keeps its
reason, and the others go on.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from dpo_ref.cli.build import build_reference, check_paths, say_which, tokenise_data, workspace
from dpo_ref.cli.command_line import compose_command, reference_words
from dpo_ref.cli.resolve import RunConfig, resolve
from dpo_ref.component import Component
from dpo_ref.data.chat_templates import install_template
from dpo_ref.data.encoding import Encoder
from dpo_ref.data.groups import Groups, TokenGroups
from dpo_ref.data.packing import collate, pack
from dpo_ref.data.tokenise import encode_prompts, tokenise, within
from dpo_ref.distributed import evaluation_memory
from dpo_ref.evaluation import compatibility as numbers
from dpo_ref.evaluation.compatibility import (
    Candidate,
    CompatibilityOptions,
    CompatibilityReport,
    Pairs,
    RefusedCandidate,
    TokenOverlap,
    metrics_of,
)
from dpo_ref.evaluation.kl import NOT_NORMALISED, Divergence, Scored, both_by_text, by_tokens
from dpo_ref.files.holding import held
from dpo_ref.files.writing import plain, write_json
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import generate
from dpo_ref.models.asked import ModelSource, Workspace
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.folders import positions_of
from dpo_ref.models.loading import Policy
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.interface import Reference
from dpo_ref.reports.compatibility import cells, entries, headline, terminal_table, verdict, write_page
from dpo_ref.tracking.terminal import progress, run_summary, say, show
from dpo_ref.tracking.tracker import RunInfo
from dpo_ref.types import Asked, Message, PromptGroup, ResponseLogps, TokenGroup, asked, silent

# --- a candidate: built, and asked about pairs and samples


@dataclass(frozen=True, slots=True)
class Bench:
    """What all candidates are measured on: the policy, pairs drawn from the training data, prompts to answer."""

    run: RunConfig  # the training run that would follow, with reference=initial
    work: Workspace
    policy: Policy
    groups: TokenGroups
    prompts: Sequence[Asked]
    max_new_tokens: int

    def build(self, component: Component, groups: Groups) -> Reference:
        """The reference for these groups; says which one it is."""
        reference = build_reference(replace(self.run, reference=component), self.work, self.policy, groups)
        say_which(reference)
        return reference

    def rebuild(self, component: Component, groups: Groups) -> Reference:
        """The reference for other groups than before, in silence."""
        work = replace(self.work, progress=silent)
        return build_reference(replace(self.run, reference=component), work, self.policy, groups)

    def samples(self, model: nn.Module, tokenizer: Any, prompts: Sequence[Asked]) -> list[Generation]:
        """One answer of a model to each prompt that leaves room for it, at temperature 1."""
        causal_lm: Any = model
        positions = positions_of(causal_lm.config) or math.inf
        sizes = map(len, encode_prompts(tokenizer, prompts))
        fits = [index for index, size in enumerate(sizes) if size + self.max_new_tokens <= positions]
        if not fits:
            raise ValueError(f"no prompt leaves room for compatibility.max_new_tokens={self.max_new_tokens}")
        answers = generate(
            model, tokenizer, [prompts[index] for index in fits], self.work.seed, progress,
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        return [replace(sample, prompt_index=fits[sample.prompt_index]) for sample in answers]


def draw(groups: TokenGroups, num_pairs: int, seed: int) -> TokenGroups:
    """Groups at random until they hold `num_pairs` pairs, in the data's order. ValueError for data without pairs."""
    paired = groups.where(groups.have_pairs)
    if not len(paired):
        raise ValueError("the data has no preference pairs to look at: choose other data=")
    chosen, count = np.zeros(len(paired), dtype=bool), 0
    for index in np.random.default_rng(seed).permutation(len(paired)).tolist():
        if count >= num_pairs:
            break
        chosen[index] = True
        count += len(paired[index].pairs)
    return paired.where(chosen)


def pairs_of(groups: Sequence[TokenGroup]) -> Pairs:
    """The pairs of groups as positions among all their responses."""
    starts = np.cumsum([0, *(len(group.response_ids) for group in groups)])[:-1].tolist()
    chosen = [start + pair[0] for start, group in zip(starts, groups, strict=True) for pair in group.pairs]
    rejected = [start + pair[1] for start, group in zip(starts, groups, strict=True) for pair in group.pairs]
    names: dict[tuple[int, ...], int] = {}
    prompts = [names.setdefault(tuple(g.prompt_ids), len(names)) for g in groups for _ in g.response_ids]
    num_bytes = [size for group in groups for size in group.num_bytes]
    return Pairs(np.array(chosen), np.array(rejected), np.array(num_bytes), np.array(prompts))


def _in_order(groups: Sequence[TokenGroup], tokens_per_batch: int) -> Iterator[Sequence[TokenGroup]]:
    """Runs of groups of at most so many tokens (a longer group alone)."""
    start, tokens = 0, 0
    for at, group in enumerate(groups):
        if at > start and tokens + group.num_tokens > tokens_per_batch:
            yield groups[start:at]
            start, tokens = at, 0
        tokens += group.num_tokens
    yield groups[start:]


@torch.no_grad()
def responses(reference: Reference, groups: Sequence[TokenGroup], bench: Bench) -> list[ResponseLogps]:
    """What a reference says about groups, in their order and in packs as training's are large."""
    packs = _in_order(groups, bench.run.data.bound(pack).keywords["tokens_per_batch"])
    with bench.policy.precision():
        return [reference.logps(collate(members).to(bench.work.device)) for members in packs]


def sums_of(outputs: Sequence[ResponseLogps]) -> Float[np.ndarray, " N"]:
    """Log-probs of all responses, in order."""
    return np.concatenate([logps.sums.cpu().numpy() for logps in outputs])


def divergences(
    bench: Bench, component: Component, reference: Reference, by_token: bool, ours: Sequence[Generation]
) -> tuple[Divergence, Divergence]:
    """KL(policy || reference) on `ours`, the policy's samples, and KL(reference || policy). `by_token` says that the
    reference has values for the policy's tokens."""
    if not reference.normalised:
        return Divergence(reason=NOT_NORMALISED), Divergence(reason=NOT_NORMALISED)
    model = _own_model(bench, component, reference) if by_token else None
    policy, tokenizer = bench.policy.model, bench.policy.tokenizer
    with bench.policy.precision():
        if model is not None and _outputs(model) == _outputs(policy):
            theirs = ours if reference.equals(bench.policy) else bench.samples(model, tokenizer, bench.prompts)
            return by_tokens(policy, model, tokenizer, ours), by_tokens(model, policy, tokenizer, theirs)
        theirs_by_text = _drawn_by(bench, component, reference)
    return both_by_text(ours, theirs_by_text, bench.prompts, lambda texts: _score_texts(bench, component, texts))


def _outputs(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _own_model(bench: Bench, component: Component, reference: Reference) -> nn.Module | None:
    """The model behind a reference of the policy's tokens; None where it is no single one that can be asked."""
    if reference.model is not None or component.live is None:
        return reference.model
    return bench.rebuild(component.live, bench.groups[:1]).model


def _drawn_by(bench: Bench, component: Component, reference: Reference) -> list[Generation] | None:
    """Samples of the model that the reference's options name, if its weights are the reference's."""
    options = component.options
    if component.model_path is None or not reference.weights:
        return None
    source = ModelSource(**{f.name: options[f.name] for f in fields(ModelSource) if f.name in options})
    model = bench.work.loader.fresh(source)
    if weights_digest(model) != reference.weights:
        return None
    system = options.get("system_prompt")
    prompts = bench.prompts if system is None else [_under(system, prompt) for prompt in bench.prompts]
    return bench.samples(model, tokenizer_of(bench, component), prompts)


def _under(system: str, prompt: Asked) -> PromptGroup:
    group = asked(prompt)
    turns = group.prompt[1:] if group.prompt and group.prompt[0]["role"] == "system" else group.prompt
    return replace(group, prompt=(Message(role="system", content=system), *turns))


def _score_texts(bench: Bench, component: Component, texts: Sequence[PromptGroup]) -> Scored:
    """Log-probs of texts under policy and reference, and which of them fit the data's limits."""
    write = within(bench.run.data.bound(tokenise), bench.policy.tokenizer, bench.policy.positions)
    groups = write(texts, bench.policy.tokenizer).groups
    if not len(groups):
        return np.zeros(0), np.zeros(0), []
    both = [bench.rebuild(reference, groups) for reference in (bench.run.reference, component)]
    scored = [sums_of(responses(reference, groups, bench)) for reference in both]
    return scored[0], scored[1], groups.rows.tolist()


def tokenizer_of(bench: Bench, component: Component) -> Any:
    """The tokenizer of the model that a reference's options name, with the template it is used with."""
    options = component.options
    tokenizer = bench.work.loader.tokenizer(options["path"], options.get("revision"))
    install_template(tokenizer, options.get("template", "auto"), options.get("template_options"), "reference")
    return tokenizer


def _words(tokenizer: Any) -> set[str]:
    """The vocabulary without special tokens. A word's leading blank is ▁ in SentencePiece and Ġ in byte-level BPE."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {word.replace("\N{LOWER ONE EIGHTH BLOCK}", "Ġ") for word in tokenizer.get_vocab() if word not in special}


def tokenizer_overlap(bench: Bench, component: Component) -> TokenOverlap | None:
    """How a model's tokenizer differs from the policy's; None where it does not, or the reference is no model."""
    if component.model_path is None:
        return None
    ours, theirs = bench.policy.tokenizer, tokenizer_of(bench, component)
    if ours.get_vocab() == theirs.get_vocab():
        return None
    texts = [bench.groups.text(index) for index in range(len(bench.groups))]
    encoded = Encoder(theirs).last_turns(texts)
    reference_tokens = sum(len(ids) for text in encoded for ids in text.responses)
    policy_tokens = sum(len(ids) for group in bench.groups for ids in group.response_ids)
    words = _words(ours)
    return TokenOverlap(len(words & _words(theirs)) / len(words), reference_tokens / policy_tokens)


# --- the stage


@dataclass(frozen=True, slots=True)
class CompatibilityRequest:
    """What was asked for. `words` are the policy, the data and its seed as one types them after train.py."""

    name: str
    words: tuple[str, ...]
    data: Component
    tracking: Component
    options: CompatibilityOptions
    seed: int
    output_dir: str | None
    config: dict[str, Any]  # all that was composed, the `references` to look at among it


def title_of(entry: Any) -> str:
    """A short name of an entry of `references`."""
    if isinstance(entry, str):
        parts = entry.rstrip("/").split("/")
        return "/".join(parts[-2:])
    options = {key: value for key, value in entry.items() if key != "reference"}
    listed = sorted((_told(key, value) for key, value in options.items()), key=lambda text: "=" in text)
    return f"{entry['reference']} ({', '.join(listed)})" if listed else entry["reference"]


def _told(key: str, value: Any) -> str:
    if key == "path":
        return title_of(value)
    if isinstance(value, list) and all(isinstance(part, Mapping) and "reference" in part for part in value):
        return " + ".join(_part(part) for part in value)
    return f"{key}={value}"


def _part(entry: Mapping[str, Any]) -> str:
    return title_of(entry["path"]) if set(entry) == {"reference", "path"} else title_of(entry)


def _runs(request: CompatibilityRequest) -> dict[str, tuple[list[str], RunConfig]]:
    """For every candidate by title the words that select it and the training run it would be in; all options are
    checked before anything is loaded. Raises ValueError for one that is named twice."""
    runs: dict[str, tuple[list[str], RunConfig]] = {}
    for entry in request.config["references"]:
        words = reference_words(entry)
        cfg, choices = compose_command([*request.words, *words])
        run = replace(resolve(cfg, choices, words), data=request.data)
        check_paths(run)
        title = title_of(entry)
        if title in runs:
            raise ValueError(f"references: {title} is there twice")
        runs[title] = words, run
    return runs


def _bench(request: CompatibilityRequest) -> Bench:
    """Load the policy and draw the pairs."""
    cfg, choices = compose_command([*request.words, "reference=initial"])
    run = replace(resolve(cfg, choices), data=request.data)
    work = replace(workspace(run, Path(request.output_dir or ".")), seed=request.seed)
    data = run.data(run.seed, progress)
    policy: Policy = run.model(work.device, run.model.bound(AdapterOptions)())
    say(*policy.notes)
    groups = draw(
        tokenise_data(run, data, policy.tokenizer, policy.positions)[0].groups, request.options.num_pairs, request.seed
    )
    texts = [groups.text(index) for index in range(len(groups))]
    prompts = list({text.prompt_id: text.asked for text in texts if text.prompt}.values())
    return Bench(run, work, policy, groups, prompts[: request.options.num_prompts], request.options.max_new_tokens)


MEMORY = (
    "a smaller data.tokens_per_batch, a smaller data.max_length or compatibility.max_new_tokens, a reference in "
    "bfloat16 or elsewhere (references=[{reference: other, path: ..., dtype: bfloat16, device: cpu}]), and nothing "
    "else on the device. Log-probs that a table keeps are not computed again"
)


def _report(request: CompatibilityRequest, runs: Mapping[str, tuple[list[str], RunConfig]]) -> CompatibilityReport:
    bench = _bench(request)
    pairs = pairs_of(bench.groups)
    policy = sums_of(responses(bench.build(bench.run.reference, bench.groups), bench.groups, bench))
    with bench.policy.precision():
        samples = bench.samples(bench.policy.model, bench.policy.tokenizer, bench.prompts)
    candidates, refused = [], []

    def candidate(title: str, words: Sequence[str], component: Component) -> Candidate:
        reference = bench.build(component, bench.groups)
        outputs = responses(reference, bench.groups, bench)
        logps, by_token = sums_of(outputs), outputs[0].token_logps is not None
        margins = pairs.margins(logps)
        forward, reverse = divergences(bench, component, reference, by_token, samples)
        return Candidate(
            title=title,
            kind=component.name,
            words=tuple(words),
            margins=margins,
            alone=numbers.alone(logps, pairs),
            beside=numbers.beside(policy, logps, pairs, request.seed),
            start=numbers.start(pairs.margins(policy) - margins, request.options.betas, pairs.clusters),
            forward=forward,
            reverse=reverse,
            tokens=tokenizer_overlap(bench, component),
            audit=None if reference.audit is None else reference.audit.line(),
        )

    for title, (words, run) in runs.items():
        say(f"{title}:")
        try:
            with evaluation_memory("measuring this reference", MEMORY):
                candidates.append(candidate(title, words, run.reference))
        except ValueError as error:
            refused.append(RefusedCandidate(title, str(error)))
    if not candidates:
        raise ValueError("; ".join(f"{entry.title}: {entry.reason}" for entry in refused))
    return CompatibilityReport(
        policy=request.name,
        policy_alone=numbers.alone(policy, pairs),
        policy_margins=pairs.margins(policy),
        candidates=tuple(candidates),
        refused=tuple(refused),
        options=request.options,
        data=request.data.name,
        num_pairs=len(pairs.chosen),
        num_prompts=len(samples),
        seed=request.seed,
    )


def next_command(request: CompatibilityRequest, candidate: Candidate) -> str:
    """How to train with a candidate and the beta suggested for it."""
    beta = candidate.start.listed if candidate.start.listed is not None else candidate.start.unit
    chosen = [] if candidate.start.unit is None else [f"beta={beta:.2g}"]
    return shlex.join(["python", "train.py", *request.words, *candidate.words, *chosen])


def _track(request: CompatibilityRequest, folder: Path, report: CompatibilityReport) -> None:
    info = RunInfo(
        folder, request.config, f"compatibility {request.name}", request.name, "compatibility", resume=False
    )
    tracker = request.tracking(info)
    names, rows = cells(report, entries(report))
    tracker.table("compatibility", names, rows, step=0)
    tracker.image("compatibility", folder / "compatibility.png")
    for name in ("compatibility.html", "compatibility.json"):
        tracker.file(folder / name)
    tracker.summary({f"compatibility/{name}": value for name, value in metrics_of(report).items()})
    tracker.finish(0)


def run_compatibility(request: CompatibilityRequest) -> None:
    """Measure, write and show the report. Raises ValueError for bad options, for data without pairs, if none of the
    references can be built, and where another process writes into the folder."""
    folder = Path(request.output_dir or f"outputs/compatibility/{datetime.now():%Y-%m-%d_%H-%M-%S}").expanduser()
    with held(folder, say):
        with evaluation_memory("measuring the policy", MEMORY):
            report = _report(request, _runs(request))
        _write(folder, report)
        _track(request, folder, report)
    run_summary(
        headline(report),
        {name: str(folder / f"compatibility.{end}") for name, end in
         (("report", "html"), ("plot", "png"), ("numbers", "json"))},
        [next_command(request, candidate) for candidate in report.candidates],
    )  # fmt: skip


def _write(folder: Path, report: CompatibilityReport) -> None:
    write_page(folder, report)
    verdicts = {candidate.title: verdict(candidate, report) for candidate in report.candidates}
    write_json(folder / "compatibility.json", {**plain(report), "verdicts": verdicts})
    show(terminal_table(report))
    say(*(f"{title}: {sentence}" for title, sentence in verdicts.items()))
