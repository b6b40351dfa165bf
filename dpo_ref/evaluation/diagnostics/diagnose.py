"""The members of the group `diagnostic`: what is looked at once the policy's answers have been sampled; and a
diagnosis as values, as JSON, and as the flat numbers that stand in `evaluation.json`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from dpo_ref.component import component
from dpo_ref.evaluation import results
from dpo_ref.evaluation.diagnostics.examples import Looks, TokenExample, drawn_answers, drawn_pairs
from dpo_ref.evaluation.diagnostics.logratios import (
    EndShift,
    Hazard,
    LogRatios,
    TokenRanks,
    Vocabulary,
    classes_of,
    end_shift,
    hazard,
    ranks_of,
    relative_hazard,
    shift_of,
)
from dpo_ref.evaluation.diagnostics.pairs import Displacements, Ranking, check_pairs, displacements, read_pairs
from dpo_ref.evaluation.diagnostics.pairs import ranking as ranking_of
from dpo_ref.evaluation.diagnostics.token_statistics import (
    SAME,
    DiagnosticContext,
    PairPlaces,
    Read,
    margins,
    pair_places,
    read,
)
from dpo_ref.evaluation.kl import sample_groups
from dpo_ref.evaluation.statistics.estimates import Estimate

# --- a diagnosis


HELD_OUT, FILES = "held-out pairs", "all files"  # names of rankings beside the files' subsets


@dataclass(frozen=True, slots=True)
class Entropy:
    """Mean next-token entropy at the tokens of a set of responses, nats; the loss reference's where it is a model."""

    policy: Estimate
    initial: Estimate
    reference: Estimate | None


@dataclass(frozen=True, slots=True)
class TextDiagnosis:
    """One set of responses: chosen, rejected, or the policy's own answers."""

    num_responses: int
    shift: LogRatios  # against the initial policy
    reference_shift: LogRatios | None  # against the loss reference, where that is another and knows tokens
    end: EndShift
    hazard: Hazard
    relative_hazard: Hazard
    ranks: TokenRanks
    entropy: Entropy


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found. `absent` says why a part is not there, by its name."""

    reference: str
    ends: tuple[str, ...]  # texts of the tokens that end a turn
    texts: dict[str, TextDiagnosis]
    displacement: Displacements | None
    rankings: dict[str, Ranking]
    absent: dict[str, str]


class Diagnosed(NamedTuple):
    """A diagnosis, and responses to look at."""

    diagnosis: Diagnosis
    examples: tuple[TokenExample, ...]


def restore(hint: Any, value: Any) -> Any:
    """What `files.plain` made of a value of this type; a null where a number belongs is nan. Raises KeyError or
    TypeError for other content."""
    if isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields")):
        return hint(**{name: restore(inner, value[name]) for name, inner in get_type_hints(hint).items()})
    origin, parts = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return None if value is None else restore(parts[0], value)
    if origin is tuple:
        return tuple(restore(parts[0], inner) for inner in value)
    if origin in (dict, Mapping):
        return {name: restore(parts[1], inner) for name, inner in value.items()}
    return math.nan if hint is float and value is None else value


def _of_texts(name: str, text: TextDiagnosis) -> dict[str, float]:
    entropy = results.ENTROPY.of(text=name)
    values = {
        results.TOKEN_SHIFT.of(text=name): text.shift.mean_abs,
        results.TOP_1.of(text=name): text.shift.top_1_percent,
        results.TOP_10.of(text=name): text.shift.top_10_percent,
        entropy: text.entropy.policy.mean,
        f"{entropy}_se": text.entropy.policy.se,
        f"{entropy}_initial": text.entropy.initial.mean,
        f"{entropy}_initial_se": text.entropy.initial.se,
    }
    if text.entropy.reference is not None:
        values[f"{entropy}_reference"] = text.entropy.reference.mean
    return values


def _of_displacement(displacements: Displacements) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, side in (("chosen", displacements.chosen), ("rejected", displacements.rejected)):
        down, per_token = (metric.of(side=name) for metric in (results.MOVED_DOWN, results.MOVED_PER_TOKEN))
        values |= {
            results.MOVED_MEDIAN.of(side=name): side.median,
            down: side.share_down.mean,
            f"{down}_se": side.share_down.se,
            per_token: side.per_token.mean,
            f"{per_token}_se": side.per_token.se,
        }
    return values | {
        results.BOTH_UP.key: displacements.both_up,
        results.CHOSEN_UP.key: displacements.chosen_up_rejected_down,
        results.CHOSEN_DOWN.key: displacements.chosen_down_rejected_up,
        results.BOTH_DOWN.key: displacements.both_down,
    }


def _of_file(name: str, ranking: Ranking) -> dict[str, float]:
    return {
        f"{results.PAIR_FILE.of(file=name, score=score)}{suffix}": value
        for score, estimate in ranking.accuracy.items()
        for suffix, value in (("", estimate.mean), ("_se", estimate.se))
    }


def metrics_of(diagnosis: Diagnosis) -> dict[str, float]:
    """The flat numbers; what was not measured is left out."""
    values: dict[str, float] = {}
    for name, text in diagnosis.texts.items():
        values |= _of_texts(name, text)
    if "rejected" in diagnosis.texts:
        end = diagnosis.texts["rejected"].end.logratio
        values |= {results.END_REJECTED.key: end.mean, f"{results.END_REJECTED.key}_se": end.se}
    values |= _of_displacement(diagnosis.displacement) if diagnosis.displacement else {}
    for name, ranking in diagnosis.rankings.items():
        if name == HELD_OUT:
            above, key = ranking.above_length, results.ABOVE_LENGTH.key
            values |= {key: above.mean, f"{key}_se": above.se} if above else {}
        else:
            values |= _of_file(name, ranking)
    return {name: value for name, value in values.items() if math.isfinite(value)}


# --- the components


class _Findings:
    """What is found one part after the other."""

    def __init__(self, context: DiagnosticContext, top_tokens: int, min_count: int, examples: int) -> None:
        self.context, self.top, self.least, self.num_examples = context, top_tokens, min_count, examples
        self.vocabulary = Vocabulary(context.policy.tokenizer)
        self.texts: dict[str, TextDiagnosis] = {}
        self.rankings: dict[str, Ranking] = {}
        self.absent: dict[str, str] = {}
        self.examples: list[TokenExample] = []
        self.displacement = None

    def text(self, name: str, readings: Read, responses: np.ndarray | None = None) -> None:
        """All about one set of responses: those at these places, or all."""
        whole = np.arange(readings.tokens.num_responses) if responses is None else np.unique(responses)
        tokens = readings.tokens.of(whole)
        classes = classes_of(tokens, self.vocabulary)
        arguments = (tokens, classes, self.vocabulary, self.top, self.least)
        theirs, entropy = tokens.reference, readings.beside.entropy
        mask = np.isin(readings.tokens.response, whole)
        self.texts[name] = TextDiagnosis(
            num_responses=tokens.num_responses,
            shift=shift_of(tokens.logratios, *arguments),
            reference_shift=None if theirs is None else shift_of(tokens.policy.logps - theirs, *arguments),
            end=end_shift(tokens),
            hazard=hazard(tokens),
            relative_hazard=relative_hazard(tokens),
            ranks=ranks_of(tokens),
            entropy=Entropy(
                tokens.per_token(tokens.policy.entropy),
                tokens.per_token(tokens.initial.entropy),
                None if entropy is None else tokens.per_token(entropy[mask]),
            ),
        )
        if readings.beside.why not in (None, SAME):
            self.absent[f"loss reference, token by token, on {name}"] = str(readings.beside.why)

    def heldout(self) -> None:
        """Chosen and rejected responses held out from training."""
        context = self.context
        groups = [group for group in context.heldout if group.pairs]
        if not groups:
            self.absent[HELD_OUT] = "the data holds none out: data.eval_fraction or data.eval_path"
            return
        readings = read(context, groups, context.never[:0], lambda: context.reference, HELD_OUT)
        pairs = pair_places(groups)
        self.text("chosen", readings, pairs.chosen)
        self.text("rejected", readings, pairs.rejected)
        self.displacement = displacements(readings.tokens, pairs)
        self._rank(HELD_OUT, readings, pairs)
        looks = Looks(context.policy.tokenizer, groups, readings.tokens)
        self.examples += drawn_pairs(looks, self.num_examples, context.work.seed)

    def own(self) -> None:
        """The policy's own answers."""
        context = self.context
        drawn = {(generation.temperature, generation.top_p) for generation in context.generations}
        if drawn != {(1.0, 1.0)}:
            self.absent["own answers"] = _other_samples(drawn)
            return
        samples = sample_groups(context.generations)[0]
        readings = read(context, samples, context.never, lambda: context.reference_on(samples), "own answers")
        self.text("own", readings)
        looks = Looks(context.policy.tokenizer, samples, readings.tokens)
        self.examples += drawn_answers(looks, self.num_examples, context.work.seed)

    def files(self, paths: Sequence[str]) -> None:
        """Pairs of files, and those of each subset."""
        context, labelled = self.context, read_pairs(paths)
        groups = context.tokenise(labelled.groups)
        if len(groups) < len(labelled.groups):
            dropped = Counter(labelled.subsets) - Counter(labelled.subsets[group.group_index] for group in groups)
            listed = ", ".join(f"{count} of {name}" for name, count in dropped.items())
            self.absent["pairs of files"] = f"{listed} are longer than data.max_length and were left out"
        if not groups:
            return
        readings = read(
            context, groups, context.never[:0],
            lambda: context.reference_on(groups), "pairs of files",
        )  # fmt: skip
        pairs = pair_places(groups)
        owners = np.array([labelled.subsets[group.group_index] for group in groups for _ in group.pairs])
        if readings.beside.sums is None:
            self.absent["implicit reward on files"] = str(readings.beside.why)
        for name in dict.fromkeys(owners.tolist()):
            inside = owners == name
            self._rank(name, readings, PairPlaces(pairs.chosen[inside], pairs.rejected[inside]))
        if len(set(owners.tolist())) > 1:
            self._rank(FILES, readings, pairs)

    def _rank(self, name: str, readings: Read, pairs: PairPlaces) -> None:
        lengths = readings.tokens.lengths
        gaps = lengths[pairs.chosen] - lengths[pairs.rejected]
        prompts = readings.tokens.prompts[pairs.chosen].tolist()
        self.rankings[name] = ranking_of(margins(readings, pairs), gaps, prompts)


def _other_samples(drawn: set[tuple[float, float]]) -> str:
    each = ", ".join(f"temperature {temperature:g} and top-p {top_p:g}" for temperature, top_p in sorted(drawn))
    return f"they were drawn with {each}, not from the policy itself: generation.temperature=1 generation.top_p=1"


def _check(*, pairs: list[str] | None, examples: int, top_tokens: int, min_count: int) -> None:
    for name, value, least in (("examples", examples, 0), ("top_tokens", top_tokens, 1), ("min_count", min_count, 1)):
        if value < least:
            raise ValueError(f"diagnostic.{name}={value} must be at least {least}")
    check_pairs(pairs)


@component(check=_check)
def tokens(
    context: DiagnosticContext,
    *,
    pairs: list[str] | None = None,
    examples: int = 3,
    top_tokens: int = 12,
    min_count: int = 5,
) -> Diagnosed:
    """Log-ratios of single tokens against the initial policy and the loss reference, on held-out chosen and rejected
    responses and on the policy's own answers; when answers end; entropy; what became of held-out pairs as wholes.

    `pairs` are files of labelled pairs, or folders of them, that are ranked as well (RewardBench's layout, LLMBar's,
    or any that `data` reads). `examples` pairs and as many answers are shown token by token. Of the vocabulary's
    entries that moved most `top_tokens` are listed, by mean those that occur at least `min_count` times. Raises
    ValueError for files that are no pairs.
    """
    findings = _Findings(context, top_tokens, min_count, examples)
    findings.heldout()
    findings.own()
    if pairs:
        findings.files(pairs)
    texts = tuple(findings.vocabulary.text(token) for token in sorted(context.ends))
    parts = (findings.texts, findings.displacement, findings.rankings, findings.absent)
    return Diagnosed(Diagnosis(context.reference.name, texts, *parts), tuple(findings.examples))


def none(context: DiagnosticContext) -> None:
    """No diagnosis."""
