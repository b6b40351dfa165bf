"""A judge behind a real server on the loopback interface: whatever goes wrong, every question is answered once."""

import json
import logging
import sqlite3
from contextlib import closing
from multiprocessing import get_context

import pytest
import torch

from dpo_ref.evaluation.judging.answers import FILE, AnswerCache, JudgeAnswer, JudgeRequest
from dpo_ref.evaluation.judging.judge import Pair, first_wins, judge_pairs
from dpo_ref.evaluation.judging.judges import JudgeContext, served
from dpo_ref.models import server as model_server
from dpo_ref.models.asked import ModelLoader
from dpo_ref.types import Message, silent
from tests.support.judge_server import JudgeServer, longer_wins

KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(model_server, "FIRST_PAUSE", 0.004)


def pairs(count, **changes):
    message = Message(role="user", content="Name birds.")
    return [Pair((message,), i, 0, f"{i} " + "owl, " * (i % 7), f"{i} " + "bat, " * 3) for i in range(count)]


def judge(tmp_path, url, **changes):
    options = {"template": "alpaca_eval", "model": "big", "max_tokens": 1, "logprobs": 5, "max_workers": 4} | changes
    context = JudgeContext("alpaca_eval", tmp_path, ModelLoader(torch.device("cpu")), silent)
    return served(context, **{"base_url": url, "timeout": 5.0} | options)


def rows(tmp_path):
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        return connection.execute("SELECT key, answer FROM answers").fetchall()


PASSING = ["429", "500", "503", "cut", "dropped", "half json", "no choices", "html", "no logprobs"]


@pytest.mark.parametrize("fault", [*PASSING, "slow"])
def test_a_fault_that_passes_costs_one_more_request(tmp_path, fault):
    with JudgeServer(faults=[fault]) as server:
        server_judge = judge(tmp_path, server.url, timeout=0.4 if fault == "slow" else 5.0)
        judged = judge_pairs(server_judge, pairs(3), silent)
    assert all(judgment.preference is not None for judgment in judged.judgments)
    assert server.asked.total() == 7
    assert len(server.asked) == len(rows(tmp_path)) == judged.num_asked == 6


def test_every_pair_is_judged_exactly_once_whatever_fails(tmp_path):
    faults = [fault for start in range(5) for fault in (*PASSING[start:], *PASSING[:start])]
    with JudgeServer(faults=faults) as server:
        judged = judge_pairs(judge(tmp_path, server.url, max_workers=8), pairs(40), silent)
        unheard = faults.count("no logprobs")  # answers that could not be used
        assert server.asked.total() == 80 + len(faults)
        assert server.answered.total() == 80 + unheard
        assert len(server.asked) == len(rows(tmp_path)) == 80
        again = judge_pairs(judge(tmp_path, server.url), pairs(40), silent)
        assert server.asked.total() == 80 + len(faults)
    assert again.judgments == judged.judgments
    assert again.num_asked == 0
    for judgment in judged.judgments:  # the mean over both orders of what the server's taste says
        ours, theirs = judgment.pair.output, judgment.pair.baseline_output
        by_hand = (longer_wins(ours, theirs) + 1 - longer_wins(theirs, ours)) / 2
        assert judgment.preference == pytest.approx(by_hand, abs=1e-12)


def test_a_server_that_dies_loses_nothing_and_the_rest_is_asked_once(tmp_path):
    asked = pairs(30)
    with JudgeServer(dies_after=25) as server:
        with pytest.raises(ValueError, match=r"(\d+) of 30 pairs are judged") as lost:
            judge_pairs(judge(tmp_path, server.url, retries=1), asked, silent)
        assert server.answered.total() == 25
    assert len(rows(tmp_path)) == 25
    done = int(str(lost.value).split()[0])
    with AnswerCache(tmp_path / FILE) as cache:
        server_judge = judge(tmp_path, server.url)
        keys = [[server_judge.request(pair, first).key for first in (False, True)] for pair in asked]
        answers = cache.known(server_judge.request(pair, first) for pair in asked for first in (False, True))
        assert done == sum(all(key in answers for key in both) for both in keys)
    assert "type the same command again" in str(lost.value)
    assert str(tmp_path / FILE) in str(lost.value)
    with JudgeServer() as other:
        judged = judge_pairs(judge(tmp_path, other.url), asked, silent)
        assert other.asked.total() == judged.num_asked == 60 - 25
        assert not other.asked.keys() & server.answered.keys()
    assert len(rows(tmp_path)) == 60


def test_a_run_that_is_killed_asks_again_only_what_was_under_way(tmp_path):
    with JudgeServer(wait=0.02) as server:
        server_judge = judge(tmp_path, server.url)
        process = get_context("fork").Process(target=judge_pairs, args=(server_judge, pairs(40), silent))
        process.start()
        while server.answered.total() < 20:
            assert process.is_alive()
        process.kill()
        process.join()
        kept = len(rows(tmp_path))
        assert 80 > kept >= 20 - 4  # four workers
        server.wait = 0.0
        judged = judge_pairs(server_judge, pairs(40), silent)
        assert judged.num_asked == 80 - kept
        assert server.asked.total() <= 80 + 4
        assert len(server.asked) == 80


def test_a_question_is_no_line_of_the_log(tmp_path, caplog):
    """Hydra sets the root logger to INFO."""
    caplog.set_level(logging.INFO)
    with JudgeServer() as server:
        judge_pairs(judge(tmp_path, server.url), pairs(1), silent)
    assert caplog.records == []


def test_equal_answers_and_equal_questions_cost_nothing(tmp_path):
    """Pairs of the same texts are one question each way; identical answers are a tie that nobody is asked about."""
    twins = [Pair(p.prompt, index, 0, p.output, p.baseline_output) for index, p in enumerate(pairs(1) * 3)]
    same = Pair(twins[0].prompt, 3, 0, "owl", "owl")
    with JudgeServer() as server:
        judged = judge_pairs(judge(tmp_path, server.url), [*twins, same], silent)
        assert server.asked.total() == 2
    assert len({judgment.preference for judgment in judged.judgments[:3]}) == 1
    assert (judged.judgments[3].preference, judged.judgments[3].opinions) == (0.5, ())


def test_other_parameters_and_models_are_other_questions(tmp_path):
    with JudgeServer() as server:
        for changes in ({}, {"model": "other"}, {"temperature": 0.5}, {"logprobs": 3}, {"request": {"seed": 1}}):
            assert judge_pairs(judge(tmp_path, server.url, **changes), pairs(2), silent).num_asked == 4
        unchanged = {"max_workers": 1, "timeout": 9.0, "retries": 0, "prompt_price": 1.0, "completion_price": 1.0}
        assert judge_pairs(judge(tmp_path, server.url, **unchanged), pairs(2), silent).num_asked == 0
        assert {body.get("seed") for body in server.bodies} == {None, 1}
        assert all(body["max_tokens"] == 1 for body in server.bodies)


def test_log_probs_that_never_come_are_said_so(tmp_path):
    with JudgeServer(faults=["no logprobs"] * 100) as server, pytest.raises(ValueError) as error:
        judge_pairs(judge(tmp_path, server.url, retries=2), pairs(2), silent)
    assert "there are no log-probs in the answer (judge.logprobs=null" in str(error.value)
    assert rows(tmp_path) == []


def test_written_verdicts_where_no_log_probs_are_asked_for(tmp_path):
    with JudgeServer() as server:
        judged = judge_pairs(judge(tmp_path, server.url, logprobs=None), pairs(8), silent)
        assert "logprobs" not in server.bodies[0]
    assert {judgment.preference for judgment in judged.judgments} == {0.0, 0.5, 1.0}


def test_a_text_that_is_refused_leaves_the_others(tmp_path):
    with JudgeServer(faults=[None, "too long"]) as server:
        judged = judge_pairs(judge(tmp_path, server.url, max_workers=1), pairs(3), silent)
        assert server.asked.total() == 6
    assert [judgment.preference is None for judgment in judged.judgments] == [True, False, False]
    assert "400: maximum context length is 8 tokens" in str(judged.judgments[0].opinions[1].refusal)


FATAL = {
    "nothing listens": ([], "http://127.0.0.1:9/v1", 30, "Connection refused"),
    "wrong address": ([], "{url}/elsewhere", 30, "was not found (404: Not Found): check judge.base_url"),
    "quota": (["quota"], "{url}", 30, "429: You exceeded your current quota"),
    "moved": (["moved"], "{url}", 30, "was not found (307: elsewhere): check judge.base_url"),
    "all refused": (["too long"] * 99, "{url}", 30, "refuses every question: 400: maximum context length"),
    "few, all refused": (["too long"] * 99, "{url}", 2, "refuses every question: 400: maximum context length"),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_does_not_pass_ends_at_once(tmp_path, case):
    faults, url, num_pairs, message = FATAL[case]
    with JudgeServer(faults=faults) as server:
        server_judge = judge(tmp_path, url.format(url=server.url), retries=1)
        with pytest.raises(ValueError) as error:
            judge_pairs(server_judge, pairs(num_pairs), silent)
    assert message in str(error.value)
    assert server.asked.total() <= 16


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    errors = []
    with JudgeServer(key=KEY, faults=["tells"]) as server:
        judge_pairs(judge(tmp_path, server.url, key_variable="JUDGE_KEY"), pairs(2), silent)
        server.faults.extend(["tells"] * 50)
        for changes, fault in (({"retries": 1}, "tells"), ({}, "tells nobody")):
            server.faults.clear()
            server.faults.extend([fault] * 50)
            with pytest.raises(ValueError) as error:
                judge_pairs(judge(tmp_path, server.url, key_variable="JUDGE_KEY", **changes), pairs(20), silent)
            errors.append(error.value)
            assert "bad Bearer ***" in str(error.value)
        server.faults.clear()
        for variable, message in (("NO_SUCH", "(401) wants a key: set NO_SUCH"), ("WRONG", "does not accept the key")):
            monkeypatch.setenv("WRONG", KEY + "0")
            with pytest.raises(ValueError) as error:
                judge_pairs(judge(tmp_path, server.url, key_variable=variable, temperature=0.1), pairs(2), silent)
            assert message in str(error.value)
            errors.append(error.value)
    monkeypatch.setenv("JUDGE_KEY", "")
    with pytest.raises(ValueError, match="the judge wants a key: set the environment variable OPENAI_API_KEY"):
        judge_pairs(judge(tmp_path, None), pairs(3), silent)
    for error in errors:
        while error is not None:
            assert KEY not in f"{error!r} {error}"
            assert error.__cause__ is None
            error = error.__context__
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in "".join(capfd.readouterr())


def test_an_answer_is_read_back_as_it_was_stored(tmp_path):
    with JudgeServer() as server:
        server_judge = judge(tmp_path, server.url)
        judge_pairs(server_judge, pairs(1), silent)
    request = server_judge.request(pairs(1)[0], policy_first=True)
    with AnswerCache(tmp_path / FILE) as cache:
        answer = cache.known([request])[request.key]
    assert answer.candidates is not None
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (100, 1, "stop")
    assert first_wins(server_judge.template.verdict, answer) == pytest.approx(
        longer_wins(pairs(1)[0].output, "0 " + "bat, " * 3)
    )


def _fill(path):
    with AnswerCache(path) as cache:
        for index in range(50):
            request = JudgeRequest((Message(role="user", content=str(index)),), {"model": "m"})
            cache.store(request, JudgeAnswer("x", None, 1, 1, None))


def test_processes_share_one_cache(tmp_path):
    """All of them open it at once, when it is not there yet."""
    running = [get_context("fork").Process(target=_fill, args=(tmp_path / FILE,)) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    assert len(rows(tmp_path)) == 50
    assert {json.loads(answer)["text"] for _, answer in rows(tmp_path)} == {"x"}


def test_a_file_that_is_no_cache_is_set_aside(tmp_path, capsys):
    content = "no database, and longer than the head of one would be, which is a hundred bytes " * 3
    (tmp_path / FILE).write_text(content)
    _fill(tmp_path / FILE)
    assert "file is not a database): 0 answers are kept" in capsys.readouterr().out
    assert [path.read_text() for path in tmp_path.glob("*.damaged-*")] == [content]
    assert len(rows(tmp_path)) == 50
