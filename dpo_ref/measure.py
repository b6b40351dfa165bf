"""What an evaluation measures with several models: KL on the policy's own samples, held-out pairs."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dpo_ref import checkpoint, lab_models
from dpo_ref.cache import cache_folder
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.evaluation.heldout import heldout_metrics, reference_pairs, score_pairs
from dpo_ref.evaluation.kl import SampleKl, sample_groups, sample_kl, sequence_k1
from dpo_ref.evaluation.records import read_json
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.models import best_device, load_tokenizer
from dpo_ref.reference_models import load_reference
from dpo_ref.references.interface import ModelSource, Reference, ReferenceContext
from dpo_ref.schemas import annotations, choices_of
from dpo_ref.subjects import Loaded, Settings, Subject, loaded
from dpo_ref.tracking.terminal import progress
from dpo_ref.types import PromptGroup, TokenGroup, digest


def measured(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> dict[str, float]:
    """KL to the initial policy and to the loss reference, where the samples allow it, and the held-out pairs."""
    with loaded(subject.path).precision():
        return _measured(subject, settings, generations)


def _measured(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> dict[str, float]:
    ours, initial = loaded(subject.path), initial_of(subject)
    groups = settings.data_options.bound(tokenise)(settings.data.eval, ours.tokenizer).groups
    reference = loss_reference(subject, settings, groups, lambda number: settings.data.eval[number])
    found: dict[str, float] = {}
    own = "best_of" not in settings.generation.options  # else they are not the policy's own samples
    if own and all(g.temperature == g.top_p == 1 and g.tokens == "drawn" for g in generations):
        never = never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0])
        to_initial = sample_kl(ours.model, initial.model, generations, never, progress)
        found |= to_initial.metrics("initial") | to_initial.end_metrics()
        found |= _kl_to_reference(subject, settings, generations, reference, to_initial, never)
    if any(group.pairs for group in groups):
        ends = end_of_turn_ids(ours.tokenizer)
        policy, start = (score_pairs(m.model, groups, ends, progress) for m in (ours, initial))
        found |= heldout_metrics(policy, start, reference_pairs(reference, groups, start, best_device()))
    return found


def measure_key(subject: Subject, settings: Settings) -> str:
    """Digest of what measurements depend on: the answers, the models they are compared with, the held-out pairs."""
    assert subject.loss_reference is not None
    answers = read_json(subject.folder / "generations.key.json")["key"]
    others = [initial_of(subject).weights, subject.loss_reference.name, subject.loss_reference.options]
    pairs = [(group.group_id, group.logps) for group in settings.data.eval]
    return digest([answers, others, pairs, settings.data_options.plain()])


def initial_of(subject: Subject) -> Loaded:
    """The policy as it was before training."""
    assert subject.initial is not None
    return loaded(subject.initial, subject.initial_text, subject.initial_adapter)


def loss_reference(
    subject: Subject, settings: Settings, groups: Sequence[TokenGroup], texts: Callable[[int], PromptGroup]
) -> Reference:
    """The loss reference for these groups, by the run's own configuration of it. Raises ValueError if it is not what
    the run was trained against."""
    assert subject.loss_reference is not None
    initial = initial_of(subject)
    context = ReferenceContext(
        policy=initial.model,
        tokenizer=initial.tokenizer,
        uses_reference=subject.reference != "none",
        load=_load,
        load_tokenizer=lambda path, revision=None: load_tokenizer(lab_models.locate(path), revision),
        text_identity=initial.text_identity,
        groups=groups,
        texts=texts,
        pack=settings.data_options.bound(pack),
        progress=progress,
        device=best_device(),
        cache=cache_folder(),
    )
    reference: Reference = subject.loss_reference(context)
    reference.load_state_dict(checkpoint.read_reference(subject.checkpoint) if subject.checkpoint else {})
    subject.check_reference(reference)
    return reference


def live_reference(
    subject: Subject, settings: Settings, groups: Sequence[TokenGroup], texts: Callable[[int], PromptGroup]
) -> Reference:
    """The same reference, asked for what no table holds: sampled answers, texts of other files."""
    assert subject.loss_reference is not None
    may_be_live = "off" in choices_of(annotations(subject.loss_reference.function).get("cache"))
    options = subject.loss_reference.options | ({"cache": "off"} if may_be_live else {})
    live = replace(subject.loss_reference, options=options)
    return loss_reference(replace(subject, loss_reference=live), settings, groups, texts)


def is_initial(reference: Reference, subject: Subject) -> bool:
    """Whether the loss reference is the initial policy, reading the same text."""
    same = reference.weights == initial_of(subject).weights
    return same and not reference.own_text and not reference.state_dict()


def _load(source: ModelSource) -> torch.nn.Module:
    if source == ModelSource(source.path):
        return loaded(source.path).model
    return load_reference(source, lab_models.locate(source.path), best_device(), "auto")


def _kl_to_reference(
    subject: Subject,
    settings: Settings,
    generations: Sequence[Generation],
    reference: Reference,
    to_initial: SampleKl,
    never: torch.Tensor,
) -> dict[str, float]:
    """KL(policy || loss reference) on the same samples: Rao-Blackwellised where the reference is a model of the same
    vocabulary, else the mean log-ratio of whole answers (k1). Empty where it is no distribution."""
    assert subject.loss_reference is not None
    if not reference.normalised:
        return {}
    ours = loaded(subject.path)
    if is_initial(reference, subject):
        return to_initial.metrics("loss_reference")
    groups, places = sample_groups(generations)
    texts = [PromptGroup(generations[at[0]].prompt, tuple(generations[i].output for i in at)) for at in places]
    on_samples = live_reference(subject, settings, groups, lambda number: texts[number])
    model = getattr(on_samples, "model", None)
    if model is not None:
        return sample_kl(ours.model, model, generations, never, progress).metrics("loss_reference")
    return sequence_k1(ours.model, on_samples, generations).metrics("loss_reference")
