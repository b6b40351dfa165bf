"""`scorer=judge`: answers to one prompt ranked by a judge on the loopback interface; rounds trained on the ranks."""

import json
import math

import pytest

from dpo_ref.cli import resolve
from dpo_ref.generation.records import read_generations
from tests.support.cache import empty_cache
from tests.support.command import composed, train
from tests.support.judge_server import JudgeServer, longer_wins
from tests.support.on_policy import SMALL

WORDS = ["scorer@data.scorer=judge", "data.scorer.judge.model=big", "objective=dpo"]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    """The session's models, and nothing that a judge ever said."""
    empty_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def share(ours, theirs):
    """The judge's P(ours is better), averaged over both orders."""
    return 0.5 if ours == theirs else (longer_wins(ours, theirs) + 1 - longer_wins(theirs, ours)) / 2


def test_rounds_of_a_judge_s_ranks(tmp_path):
    """Rewards are the mean shares against a prompt's other answers; going on asks nothing twice."""
    with JudgeServer() as server:
        words = [*SMALL, *WORDS, f"data.scorer.judge.base_url={server.url}", "data.samples_per_prompt=3"]
        done = train(*words, f"output_dir={tmp_path / 'run'}")
        assert done.returncode == 0, done.stderr
        num_questions = server.asked.total()
        assert max(server.asked.values()) == 1
        assert train(*words, f"output_dir={tmp_path / 'again'}").returncode == 0
        assert server.asked.total() == num_questions
    generations = read_generations(tmp_path / "run" / "rounds" / "0001" / "generations.jsonl")
    record = json.loads((tmp_path / "run" / "rounds" / "0001" / "record.json").read_text())
    for start in range(0, 36, 3):
        texts = [generation.output for generation in generations[start : start + 3]]
        expected = [sum(share(t, o) for p, o in enumerate(texts) if p != n) / 2 for n, t in enumerate(texts)]
        assert record["rewards"][start : start + 3] == pytest.approx(expected, abs=1e-6)
        assert sum(expected) == pytest.approx(1.5)


def test_a_local_judge_ranks(tmp_path):
    words = [*SMALL, "scorer@data.scorer=judge", "judge@data.scorer.judge=local", "data.scorer.judge.model=lab:tiny"]
    done = train(*words, "objective=dpo", "data.rounds=1", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    rewards = json.loads((tmp_path / "run" / "rounds" / "0001" / "record.json").read_text())["rewards"]
    assert all(math.isfinite(reward) and 0 < reward < 1 for reward in rewards)


def test_an_answer_alone_cannot_be_ranked(tmp_path):
    words = [
        *SMALL,
        *WORDS,
        "objective=rwr",
        "data.samples_per_prompt=1",
        "data.scorer.judge.base_url=http://127.0.0.1:9/v1",
    ]
    done = train(*words, f"output_dir={tmp_path / 'run'}")
    assert "scorer=judge compares answers to the same prompt, and prompt 0 has one; draw at least two" in done.stderr


def test_policies_are_not_compared_by_ranks():
    words = ["scorer=judge", "scorer.judge.model=big"]
    cfg, choices = composed("policy=lab:tiny", *words, kind="evaluate")
    with pytest.raises(ValueError, match=r"scorer=judge ranks a policy's answers among themselves.*judge=\.\.\."):
        resolve.components(cfg, choices, "evaluate")
    words = ["evaluation.every=5", "scorer@evaluation.scorer=judge", "evaluation.scorer.judge.model=big"]
    cfg, choices = composed(*words)
    with pytest.raises(ValueError, match="scorer=judge ranks a policy's answers among themselves"):
        resolve.resolve(cfg, choices, words)
