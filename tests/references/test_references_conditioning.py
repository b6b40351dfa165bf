"""What a reference reads besides the response: a system prompt of its own, earlier turns; and what is refused."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch

from dpo_ref.cli import resolve
from dpo_ref.data.groups import MappedGroups
from dpo_ref.data.packing import collate
from dpo_ref.data.scoring import Scoring
from dpo_ref.data.tokenise import tokenise
from dpo_ref.lab.models import locate
from dpo_ref.references import policies
from dpo_ref.types import Message, PromptGroup
from tests.support.command import composed, train
from tests.support.reference_texts import OTHERS, POLICY, SIZE, TEXTS, context_of, data, plain_sum
from tests.support.tiny import tiny_model
from tests.support.tokenizer_families import FAMILIES

LIMITS = {"max_length": 10**6}


def sums(reference, context):
    return reference.logps(collate(list(context.groups))).sums.tolist()


def expected_sums(groups, tokenizer, **options):
    """The groups as tokenised for a policy with this tokenizer, each scored by full logits in float64."""
    model, expected = tiny_model(seed=5, vocab_size=SIZE), []
    for group in tokenise(groups, tokenizer, **LIMITS, **options).groups:
        expected += [plain_sum(model, group.prompt_ids, ids) for ids in group.response_ids]
    return expected


@pytest.mark.parametrize("own", [False, True], ids=["same tokenizer", "its own"])
@pytest.mark.parametrize("before", [(), (Message(role="system", content="Rhyme."),)], ids=["none before", "replaced"])
def test_a_system_prompt_of_its_own(own, before, tmp_path):
    tokenizer = FAMILIES["llama 3: byte-level, BOS"]().tokenizer if own else POLICY
    groups = [replace(group, prompt=(*before, *group.prompt)) for group in data(TEXTS[:3])]
    context = context_of(groups, tmp_path, tokenizer)
    reference = policies.other(context, path="5", system_prompt="Be brief.")
    read = [
        replace(group, prompt=(Message(role="system", content="Be brief."), *group.prompt[len(before) :]))
        for group in groups
    ]
    assert sums(reference, context) == pytest.approx(expected_sums(read, tokenizer), abs=2e-4)
    tokens = reference.logps(collate(list(context.groups))).token_logps
    assert (tokens is None) == own  # the same tokenizer writes the same response: its tokens have values
    assert reference.identity != policies.other(context, path="5").identity


def test_every_turn_is_scored_by_both(tmp_path):
    """data.score=all: the reference's own template decides where the assistant's turns stand in its text."""
    family = FAMILIES["mistral: SentencePiece with a prefix on the first"]()
    groups = data(TEXTS[:2])  # user, assistant, user, then two responses
    context = replace(
        context_of(groups, tmp_path, family.tokenizer),
        groups=tokenise(groups, POLICY, **LIMITS, score="all").groups,
        scoring=Scoring("all"),
    )
    reference_sums = sums(policies.other(context, path="5"), context)
    model, expected = tiny_model(seed=5, vocab_size=SIZE), []
    for group in tokenise(groups, family.tokenizer, **LIMITS, score="all").groups:
        assert group.scored is not None
        for ids, mask in zip(group.response_ids, group.scored, strict=True):
            used = model.config._attn_implementation
            model.set_attn_implementation("eager")
            whole = torch.tensor([[*group.prompt_ids, *ids]])
            with torch.no_grad():
                logps = model.double()(whole).logits[0].log_softmax(-1)
            model.float().set_attn_implementation(used)
            start = len(group.prompt_ids)
            positions = [start + index for index, kept in enumerate(mask) if kept]
            expected.append(sum(logps[position - 1, whole[0, position]].item() for position in positions))
    assert reference_sums == pytest.approx(expected, abs=3e-4)
    cut = tokenise(
        groups, POLICY, score="all", max_length=10**6, max_response_length=30, over_length="truncate_response"
    )
    with pytest.raises(ValueError, match="row 1 was cut, and more than one turn of words is scored"):
        policies.other(replace(context, groups=cut.groups), path="5")


def test_the_end_token_of_another_tokenizer_is_compared(tmp_path):
    """Log-probs carried to the policy's tokens keep each response's sum; the last is the reference's end token."""
    family = OTHERS["llama 3: byte-level, BOS"]
    groups = data(TEXTS[:3])
    context = context_of(groups, tmp_path, family.tokenizer)
    batch = collate(list(context.groups))
    logps = policies.other(context, path="5").logps(batch)
    assert logps.token_logps is None
    parts = logps.aligned.double().split(batch.lengths.tolist())
    assert [float(part.sum()) for part in parts] == pytest.approx(logps.sums.tolist(), abs=1e-3)
    skipped = policies.other(context, path="5", terminator="skip").logps(batch)
    ends = [float(part[-1]) for part in parts]
    assert [a - b for a, b in zip(logps.sums.tolist(), skipped.sums.tolist(), strict=True)] == pytest.approx(
        ends, abs=1e-3
    )
    assert all(math.isnan(float(part[-1])) for part in skipped.aligned.split(batch.lengths.tolist()))


def test_words_that_its_tokenizer_does_not_know(tmp_path):
    """Unknown tokens are counted, in prompt and response, and stop the run above the threshold."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "</s>": 1, "yes": 2, "why": 3, "?": 4, "so": 5, "ok": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' + eos_token }}{% endfor %}"
    prompt = (Message(role="user", content="why ?"),)
    groups = [PromptGroup(prompt, (response, "yes"), ((0, 1),), origin="row 1") for response in ("ok", "never")]
    context = context_of(groups, tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"25\.0% of the responses are not what they were .*'never' became"):
        policies.other(context, path="5")
    reference = policies.other(context, path="5", max_altered=0.3)
    assert reference.audit.unknown == 1
    assert reference.audit.altered == 1


def test_spans_stand_for_tokens_unless_only_parts_are_scored(tmp_path):
    tokenizer = OTHERS["olmo: byte-level, tulu"].tokenizer
    context = replace(context_of(data(TEXTS), tmp_path, tokenizer), needs_tokens=True)
    masked = [replace(g, scored=tuple([True] * len(ids) for ids in g.response_ids)) for g in context.groups]
    where = MappedGroups(context.groups, lambda group: masked[group.group_index])
    with pytest.raises(ValueError, match="looks at single tokens of the reference, and the tokens of reference=other"):
        policies.other(replace(context, groups=where), path="5")
    assert not list(tmp_path.iterdir())  # nothing was scored
    assert policies.initial(context).logps(collate(list(context.groups))).token_logps is not None


def test_a_geometric_mixture_is_refused_where_its_constant_matters():
    parts = "reference.parts=[{reference: initial}, {reference: prior}]"
    for objective in ("nca", "ipo_mean"):  # per-token means of a constant differ with the lengths
        cfg, choices = composed(f"objective={objective}", "reference=mixture", parts)
        with pytest.raises(
            ValueError, match=f"not cancel in objective={objective}; reference.mean=arithmetic is a di"
        ):
            resolve.resolve(cfg, choices)
    for words in (["objective=nca", "reference.mean=arithmetic"], ["objective=dpo"], ["objective=ipo_sum"]):
        cfg, choices = composed("reference=mixture", parts, *words)
        resolve.resolve(cfg, choices)


FOLDERS = {
    "no weights": ("model.safetensors", r"reference\.path=.*: no model could be loaded"),
    "no tokenizer": ("tokenizer.json", r"reference\.path=.*: no tokenizer could be loaded"),
    "no configuration": ("config.json", r"reference\.path=.* is not a model folder: it has no config\.json"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_whole(case, tmp_path):
    lacking, message = FOLDERS[case]
    folder = tmp_path / "reference"
    shutil.copytree(locate("lab:tiny"), folder)
    for path in folder.glob(lacking.partition(".")[0] + "*" if lacking == "tokenizer.json" else lacking):
        path.unlink()
    options = ["model.path=lab:tiny", "data.num_pairs=8", "data.num_eval_pairs=2", "data.num_test_prompts=1"]
    done = train(*options, "reference=other", f"reference.path={folder}", "tracking=none", f"output_dir={tmp_path}/r")
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("error: ")


def test_the_policys_own_weights_under_a_system_prompt_are_another_reference(tmp_path):
    """The same weights are not the same function of another text: step 0 is not the identity, and is not checked."""
    options = ["model.path=lab:tiny", "data.num_pairs=8", "data.num_eval_pairs=2", "data.num_test_prompts=1"]
    options += ["trainer.max_steps=1", "tracking=none", "reference=other", "reference.path=lab:tiny", "beta=0.1"]
    for index, words in enumerate((["reference.terminator=skip"], ["model.template=plain"])):
        done = train(*options, *words, f"output_dir={tmp_path / str(index)}")
        assert done.returncode == 0, done.stderr


def test_group_without_a_prompt_is_text(tmp_path):
    """Plain text has no template on either side."""
    groups = [PromptGroup((), ("one two", "three"), ((0, 1),), origin="row 1")]
    tokenizer = OTHERS["olmo: byte-level, tulu"].tokenizer
    context = context_of(groups, tmp_path, tokenizer)
    assert sums(policies.other(context, path="5"), context) == pytest.approx(
        expected_sums(groups, tokenizer), abs=2e-4
    )
