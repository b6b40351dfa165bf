"""What a diagnosis needs of a subject and its settings: models, held-out groups, answers, the loss reference."""

from collections.abc import Callable, Sequence

from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.diagnostics.context import DiagnosticContext
from dpo_ref.diagnostics.pair_files import content_of
from dpo_ref.diagnostics.records import Diagnosed
from dpo_ref.evaluation.kl import sample_groups
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.measure import initial_of, is_initial, live_reference, loss_reference, measure_key
from dpo_ref.models import best_device
from dpo_ref.references.interface import Reference
from dpo_ref.subjects import Settings, Subject, loaded
from dpo_ref.tracking.terminal import progress
from dpo_ref.types import PromptGroup, TokenGroup, digest


def diagnose_key(subject: Subject, settings: Settings) -> str:
    """Digest of what a diagnosis depends on: what measurements do, its options, the content of its pair files."""
    options = settings.diagnostic.plain()
    files = content_of(options["pairs"]) if options.get("pairs") else None
    return digest([measure_key(subject, settings), settings.diagnostic.name, options, files, settings.seed])


def diagnosed(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> Diagnosed | None:
    """The configured diagnosis of a policy that a run has trained."""
    with loaded(subject.path).precision():
        return settings.diagnostic(_context(subject, settings, generations))


def _context(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> DiagnosticContext:
    ours, initial = loaded(subject.path), initial_of(subject)
    prepare = settings.data_options.bound(tokenise)
    groups = prepare(settings.data.eval, ours.tokenizer).groups
    with_pairs = [group for group in groups if group.pairs]
    samples, places = sample_groups(generations)
    texts = [PromptGroup(generations[at[0]].prompt, tuple(generations[i].output for i in at)) for at in places]
    reference = loss_reference(subject, settings, with_pairs, settings.data.eval.__getitem__)

    def on(of: Sequence[TokenGroup], text: Callable[[int], PromptGroup]) -> Reference:
        return live_reference(subject, settings, of, text)

    temperatures = {(g.temperature, g.top_p) for g in generations}
    return DiagnosticContext(
        policy=ours.model,
        initial=initial.model,
        tokenizer=ours.tokenizer,
        ends=frozenset(end_of_turn_ids(ours.tokenizer)),
        never=never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0]),
        heldout=with_pairs,
        samples=samples,
        why_no_samples=None if temperatures == {(1.0, 1.0)} else _other_samples(temperatures),
        reference_name=reference.name,
        same_as_initial=is_initial(reference, subject),
        heldout_reference=lambda: reference,
        samples_reference=lambda: on(samples, texts.__getitem__),
        reference_on=on,
        tokenise=lambda of: prepare(of, ours.tokenizer).groups,
        device=best_device(),
        seed=settings.seed,
        progress=progress,
    )


def _other_samples(found: set[tuple[float, float]]) -> str:
    drawn = ", ".join(f"temperature {temperature:g} and top-p {top_p:g}" for temperature, top_p in sorted(found))
    return f"they were drawn with {drawn}, not from the policy itself: generation.temperature=1 generation.top_p=1"
