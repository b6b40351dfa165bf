"""KL from samples against enumeration of every answer of a toy model, and the end token against the model itself."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from dpo_ref.evaluation.heldout import heldout_metrics, reference_pairs, score_pairs
from dpo_ref.evaluation.kl import SampleKl, SequenceK1, sample_kl
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import Rule, decode, decoding_mode
from dpo_ref.references.policies import NoReference
from tests.support.tiny import naive_logps, random_groups, tiny_model

END, PAD, VOCAB, LONGEST = 2, 4, 5, 3
NEVER = torch.tensor([PAD])
PROMPTS = [list(prompt) for prompt in product((0, 1, 3), repeat=3)]
POLICY = tiny_model(vocab_size=VOCAB, seed=1)
INITIAL = tiny_model(vocab_size=VOCAB, seed=2)


@torch.no_grad()
def next_logps(model, ids):
    """One prefix through the model as transformers runs it; the pad token taken out."""
    with decoding_mode(model):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    logits[PAD] = -torch.inf
    return logits.log_softmax(dim=0).tolist()


def enumerate_kl(prompt):
    """sum_y pi(y) (log pi(y) - log ref(y)) over every answer of at most three tokens."""

    def below(answer, logp, logq):
        if len(answer) == LONGEST or (answer and answer[-1] == END):
            return math.exp(logp) * (logp - logq)
        ours, theirs = next_logps(POLICY, prompt + answer), next_logps(INITIAL, prompt + answer)
        tokens = (token for token in range(VOCAB) if token != PAD)
        return sum(below([*answer, t], logp + ours[t], logq + theirs[t]) for t in tokens)

    return below([], 0.0, 0.0)


def sampled(prompts, samples, seed, temperature=1.0, top_p=1.0):
    rows = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    streams = torch.from_numpy(np.random.default_rng(seed).integers(-(2**63), 2**63, size=len(rows)))
    rule = Rule(temperature, top_p, LONGEST, torch.tensor([END]), NEVER)
    with decoding_mode(POLICY):
        answers = decode(POLICY, [prompts[index] for index, _ in rows], streams, rule)
    return [
        Generation(
            prompt=({"role": "user", "content": str(prompts[index])},),
            prompt_index=index,
            sample_index=sample,
            output="",
            prompt_ids=tuple(prompts[index]),
            token_ids=tuple(ids),
            finish_reason="stop" if ids[-1] == END else "length",
            num_tokens=len(ids),
            num_chars=0,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
        )
        for (index, sample), ids in zip(rows, answers, strict=True)
    ]


def test_estimator_is_the_exact_formula_at_every_prefix():
    answers = sampled(PROMPTS[:7], 3, seed=0)
    estimates = sample_kl(POLICY, INITIAL, answers, NEVER, tokens_per_batch=16)
    assert 0 < np.isnan(estimates.end_logratio).sum() < len(answers)
    for row, answer in enumerate(answers):
        kl = k1 = 0.0
        for position, token in enumerate(answer.token_ids):
            prefix = [*answer.prompt_ids, *answer.token_ids[:position]]
            ours, theirs = next_logps(POLICY, prefix), next_logps(INITIAL, prefix)
            kl += sum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True) if p > -math.inf)
            k1 += ours[token] - theirs[token]
            last = ours[token] - theirs[token]
        assert estimates.kl[row] == pytest.approx(kl, abs=1e-5)
        assert estimates.k1[row] == pytest.approx(k1, abs=1e-5)
        expected_end = last if answer.finished else math.nan
        assert estimates.end_logratio[row] == pytest.approx(expected_end, abs=1e-5, nan_ok=True)


REPETITIONS = 200


def coverage_bounds(count, level, error):
    """The fewest and the most of `count` intervals that cover with probability `level` each may do so: outside lies
    a count with probability at most `error` on either side, summed from the binomial distribution."""
    mass = [math.comb(count, k) * level**k * (1 - level) ** (count - k) for k in range(count + 1)]
    return (
        next(k for k in range(count + 1) if sum(mass[: k + 1]) > error),
        next(k for k in range(count, -1, -1) if sum(mass[k:]) > error),
    )


def test_estimates_cover_the_enumerated_kl_as_often_as_their_errors_say():
    """200 repetitions: prompts drawn from a population whose mean KL enumeration knows, samples from the policy."""
    truth = float(np.mean([enumerate_kl(prompt) for prompt in PROMPTS]))
    drawn = np.random.default_rng(7).integers(len(PROMPTS), size=(REPETITIONS, 40))
    answers = sampled([PROMPTS[i] for i in drawn.flat], 2, seed=0)  # at once: all are independent
    distinct = list({(a.prompt_ids, a.token_ids): a for a in answers}.values())
    indices = {(a.prompt_ids, a.token_ids): index for index, a in enumerate(distinct)}
    every = sample_kl(POLICY, INITIAL, distinct, NEVER)
    rows = []
    for part in np.array_split(np.arange(len(answers)), REPETITIONS):
        values = SampleKl(*(v[[indices[answers[i].prompt_ids, answers[i].token_ids] for i in part]] for v in every))
        metrics = values._replace(prompt_index=part // 2).metrics("initial")
        rows.append([metrics[f"kl/initial{name}"] for name in ("", "_se", "_k1", "_k1_se")])
    fewest, most = coverage_bounds(REPETITIONS, 0.95, 0.001)
    assert (fewest, most) == (179, 198)  # 89.5 to 99 %
    for means, errors in np.array(rows).T.reshape(2, 2, REPETITIONS):
        scores = (means - truth) / errors
        assert fewest <= (np.abs(scores) < 1.959964).sum() <= most
        spread = means.std(ddof=1)
        assert abs(means.mean() - truth) < 3.29 * spread / math.sqrt(REPETITIONS)  # unbiased, at 0.1 %
        assert abs(errors.mean() / spread - 1) < 3.29 / math.sqrt(2 * REPETITIONS)  # s.e. of a standard deviation


def test_a_model_does_not_differ_from_itself_and_errors_shrink():
    answers = sampled(PROMPTS, 4, seed=3)
    estimates = sample_kl(POLICY, POLICY, answers, NEVER)
    same = estimates.metrics("initial") | estimates.end_metrics()
    assert same["kl/initial"] == same["kl/initial_k1"] == same["eos/own_logratio"] == 0.0
    metrics = sample_kl(POLICY, INITIAL, answers, NEVER).metrics("initial")
    assert 0 < metrics["kl/initial_se"] < metrics["kl/initial_k1_se"]
    assert metrics["kl/initial_per_token"] < metrics["kl/initial"]
    assert metrics["kl/initial_share_cut"] == np.mean([not a.finished for a in answers])


def test_pack_size_changes_nothing():
    answers = sampled(PROMPTS, 3, seed=4)
    small, large = (sample_kl(POLICY, INITIAL, answers, NEVER, tokens_per_batch=size) for size in (5, 500))
    np.testing.assert_allclose(small.kl, large.kl, atol=1e-6)
    np.testing.assert_allclose(small.end_logratio, large.end_logratio, atol=1e-6)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    answers = sampled(PROMPTS[:5], 2, seed=5)
    whole = sample_kl(POLICY, INITIAL, answers, NEVER)
    monkeypatch.setattr("dpo_ref.evaluation.kl.CHUNK_LOGITS", 3 * 8 * VOCAB)  # three tokens at a time
    np.testing.assert_allclose(sample_kl(POLICY, INITIAL, answers, NEVER).kl, whole.kl, atol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_p": 0.9}])
def test_samples_of_another_distribution_are_refused(options):
    with pytest.raises(ValueError, match="KL is measured on samples of the policy itself"):
        sample_kl(POLICY, INITIAL, sampled(PROMPTS[:2], 1, seed=0, **options), NEVER)


def test_no_samples_and_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="no generations"):
        sample_kl(POLICY, INITIAL, [], NEVER)
    with pytest.raises(ValueError, match="have 5 and 7 entries"):
        sample_kl(POLICY, tiny_model(vocab_size=7), sampled(PROMPTS[:2], 1, seed=0), NEVER)


def test_held_out_pairs_against_each_response_alone():
    policy, initial = tiny_model(seed=1), tiny_model(seed=2)
    groups = random_groups([(5, (4, 6)), (3, (7, 2, 5)), (6, (3, 3))], seed=1)  # four pairs: (0,1) (0,1) (1,2) (0,1)
    for group, response in ((0, 0), (1, 1), (2, 1)):
        groups[group].response_ids[response][-1] = END
    ours, theirs = (
        score_pairs(model, groups, {END}, tokens_per_batch=size) for model, size in ((policy, 12), (initial, 99))
    )
    expected = [
        (mine[a], mine[b], other[a], other[b])
        for group in groups
        for mine, other in [(naive_logps(policy, group), naive_logps(initial, group))]
        for a, b in group.pairs
    ]
    for row, (chosen, rejected, _, rejected_0) in enumerate(expected):
        assert ours.chosen[row] == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert ours.rejected[row] == pytest.approx(rejected.sum().item(), abs=1e-4)
        assert theirs.rejected[row] == pytest.approx(rejected_0.sum().item(), abs=1e-4)
        assert ours.chosen_end[row] == pytest.approx(chosen[-1].item(), abs=1e-4)
        assert (ours.chosen_lengths[row], ours.rejected_lengths[row]) == (len(chosen), len(rejected))
    assert ours.chosen_ended.tolist() == [True, False, True, False]
    metrics = heldout_metrics(ours, theirs, reference_pairs(NoReference(), groups, ours, torch.device("cpu")))
    ends = [(chosen[-1] - chosen_0[-1]).item() for chosen, _, chosen_0, _ in expected]
    assert metrics["eos/chosen_logratio"] == pytest.approx((ends[0] + ends[2]) / 2, abs=1e-4)
    margins = [(chosen.sum() - rejected.sum()).item() for chosen, rejected, *_ in expected]
    assert metrics["rewards/accuracies"] == np.mean([margin > 0 for margin in margins])
    assert metrics["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-4)
    moved = [(chosen.sum() - chosen_0.sum()).item() for chosen, _, chosen_0, _ in expected]
    assert metrics["logratios/chosen"] == pytest.approx(np.mean(moved), abs=1e-4)
    assert metrics["rewards/length_baseline"] == (0 + 1 + 0 + 0.5) / 4  # lengths 4-6, 7-2, 2-5, 3-3


def test_rewards_are_measured_against_the_loss_reference():
    model = tiny_model(seed=1)
    groups = random_groups([(4, (5, 3)), (2, (4, 6))])
    pairs = score_pairs(model, groups, {END})
    assert heldout_metrics(pairs, pairs, pairs)["rewards/ties"] == 1.0
    assert (
        heldout_metrics(pairs, pairs, reference_pairs(NoReference(), groups, pairs, torch.device("cpu")))[
            "rewards/ties"
        ]
        == 0.0
    )
    with pytest.raises(ValueError, match="no held-out pairs"):
        heldout_metrics(*[score_pairs(model, [], {END})] * 3)


def test_k1_of_answers_that_were_all_cut_is_unknown():
    none = SequenceK1(np.empty(0), np.empty(0, dtype=int), np.empty(0, dtype=int), 1.0)
    metrics = none.metrics("loss_reference")
    assert metrics.pop("kl/loss_reference_share_cut") == 1
    assert len(metrics) == 3
    assert all(math.isnan(value) for value in metrics.values())
