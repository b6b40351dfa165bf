"""A served reference equals the model itself, over a real server that fails, restarts, and is asked no row twice."""

import json
import time
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ref.data.groups import from_groups
from dpo_ref.data.packing import collate
from dpo_ref.lab.models import locate
from dpo_ref.models import server as model_server
from dpo_ref.references import policies, table
from dpo_ref.references.served import EXCHANGES
from tests.support.command import train
from tests.support.completions_server import SLOW
from tests.support.served_references import (  # noqa: F401
    KEY,
    NUM_GROUPS,
    NUM_PROBE_REQUESTS,
    POLICY,
    SMALL,
    Served,
    big,
    context_of,
    sequences,
    serve,
    surroundings,
)
from tests.support.tokenizer_families import FAMILIES


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo"])
def test_equals_the_model_itself_token_by_token(protocol, serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    batch = collate(list(context.groups))
    logps = Served(context, url=serve().url, protocol=protocol).logps(batch)
    live = policies.other(context, path="big", cache="off").logps(batch)
    torch.testing.assert_close(logps.tokens(), live.tokens(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logps.sums, live.sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama 3: byte-level, BOS", "mistral: SentencePiece with a prefix on the first", "the policy's own"]
)
def test_equals_the_model_itself_with_another_tokenizer(name, serve, tmp_path):  # noqa: F811
    tokenizer = FAMILIES[name]().tokenizer if name in FAMILIES else POLICY
    terminator = "count" if name in FAMILIES else "skip"
    context = context_of(tmp_path, tokenizer)
    batch = collate(list(context.groups))
    logps = Served(context, url=serve().url, terminator=terminator).logps(batch)
    live = policies.other(context, path="big", cache="off", terminator=terminator).logps(batch)
    assert logps.token_logps is None
    torch.testing.assert_close(logps.sums, live.sums, atol=1e-4, rtol=0)


def test_only_scored_tokens_are_kept(serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    masked = [
        replace(group, scored=tuple([index % 2 == 0 for index in range(len(ids))] for ids in group.response_ids))
        for group in context.groups
    ]
    context = replace(context, groups=from_groups(masked))
    batch = collate(masked)
    logps = Served(context, url=serve().url).logps(batch)
    live = policies.other(context, path="big", cache="off").logps(batch)
    torch.testing.assert_close(logps.tokens(), live.tokens(), atol=1e-4, rtol=0)


FAULTY = ["429", "500", "slow", "cut", "malformed", "dropped", "503"]


def test_faults_are_survived_and_rows_are_asked_for_as_often_as_needed(serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    batch = collate(list(context.groups))
    server = serve(faults=FAULTY, healthy=NUM_PROBE_REQUESTS)
    reference = Served(context, url=server.url, concurrency=1, timeout=SLOW / 2, retries=len(FAULTY))
    refused, again, _, after_slow = server.times[NUM_PROBE_REQUESTS:][:4]
    assert again - refused >= 0.3  # what Retry-After asked for; the pause would have been 0.006 at most
    assert after_slow - server.times[NUM_PROBE_REQUESTS + 2] >= SLOW / 2
    assert not server.faults
    live = policies.other(context, path="big", cache="off").logps(batch)
    torch.testing.assert_close(reference.logps(batch).sums, live.sums, atol=1e-4, rtol=0)
    assert set(server.answered.values()) == {1}
    assert sum(server.asked.values()) == sum(server.answered.values()) + 4 * len(FAULTY)


def test_what_retry_after_says():
    in_15_minutes = model_server.seconds_asked(formatdate(time.time() + 900, usegmt=True))
    assert in_15_minutes == pytest.approx(900, abs=2)
    values = ["7.5", None, "soon", "-3", formatdate(0), "inf"]
    assert [model_server.seconds_asked(text) for text in values] == [7.5, 0, 0, 0, 0, 3600]


def test_requests_are_under_way_at_once(serve, tmp_path):  # noqa: F811
    server = serve(faults=["together"] * 3, healthy=NUM_PROBE_REQUESTS)
    Served(context_of(tmp_path), url=server.url, retries=0)
    assert not server.faults


def test_a_lost_server_costs_no_row_that_it_answered(serve, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(table, "WINDOW", 2)  # groups: four responses, one request
    context = context_of(tmp_path)
    server = serve()
    server.dies_after = NUM_PROBE_REQUESTS + 3
    with pytest.raises(ValueError, match=r"no answer in 3 attempts .*is kept: start the same command again"):
        Served(context, url=server.url, concurrency=1, retries=2)
    again = serve()
    reference = Served(context, url=again.url)
    first, rest = sequences(context.groups[:6]), sequences(context.groups[6:])
    assert set(first) <= set(server.answered)
    assert {ids: again.asked[ids] for ids in rest} == dict.fromkeys(rest, 1)
    assert sum(again.asked[ids] for ids in first) == 2 * table.PROBES  # the stored rows that are verified
    assert sum(again.asked.values()) == len(rest) + 2 * table.PROBES + len(EXCHANGES)
    batch = collate(list(context.groups))
    live = policies.other(context, path="big", cache="off").logps(batch)
    torch.testing.assert_close(reference.logps(batch).sums, live.sums, atol=1e-4, rtol=0)


def test_the_identity_is_that_of_the_model_not_of_the_server(serve, tmp_path):  # noqa: F811
    """Last digits and addresses do not matter; other weights, another name, template or tokenizer do."""
    context = context_of(tmp_path)
    first = Served(context, url=serve(noise=0.01).url)
    again = Served(context, url=serve(noise=0.01).url)  # its table is verified and reused, too
    assert again.identity == first.identity
    assert again.values_digest == first.values_digest
    others = [
        Served(context, url=serve(model=big(seed=6)).url),
        Served(context, url=serve(name="large").url, model="large"),
        Served(context, url=serve().url, template="plain"),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 4
    assert all(other.weights == "" for other in others)


def test_a_table_of_other_values_is_refused(serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    server = serve()
    folder = context.work.cache / "reference" / Served(context, url=server.url).identity
    rows = table.read_shards(folder)[0]
    for path in folder.glob("*"):
        path.unlink()
    table.write_shard(folder, {key: values - np.float32(1.5) for key, values in rows.items()})
    with pytest.raises(ValueError, match=r"differ from the reference by 1\.5 nats.*stale"):
        Served(context, url=server.url)


def files_with(text, *folders):
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_the_key_is_sent_and_told_to_nobody(serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    context = context_of(tmp_path)
    server = serve(key=KEY, faults=["tells"] * 9, healthy=NUM_PROBE_REQUESTS)
    with pytest.raises(ValueError, match=r"\(401\) wants a key: set DPO_REF_SERVED_KEY"):
        Served(context, url=server.url)
    monkeypatch.setenv(model_server.KEY, f"{KEY}-wrong")
    with pytest.raises(ValueError, match=r"\(401\) does not accept the key in DPO_REF_SERVED_KEY$"):
        Served(context, url=server.url)
    monkeypatch.setenv(model_server.KEY, KEY)
    with pytest.raises(ValueError, match=r"500: bad Bearer \*\*\*\); everything"):
        Served(context, url=server.url, retries=1, concurrency=1)
    server.faults.clear()
    assert len(Served(context, url=server.url).logps(collate(list(context.groups))).sums) == 2 * NUM_GROUPS
    assert files_with(b"-wrong", tmp_path) == files_with(KEY.encode(), tmp_path) == []
    assert KEY not in "".join(capsys.readouterr())


def test_a_run_against_a_server(serve, tmp_path, monkeypatch):  # noqa: F811
    """The policy served to itself: a loss of ln 2 at the start; what one stage cached is not asked for again."""
    policy = AutoModelForCausalLM.from_pretrained(locate("lab:tiny"), dtype=torch.float32)
    server = serve(model=policy, key=KEY)
    monkeypatch.setenv(model_server.KEY, KEY)
    reference = [f"reference.url={server.url}", "reference.model=big", "reference.tokenizer=lab:tiny"]
    run = tmp_path / "run"
    overrides = [*SMALL, "reference=served", *reference, f"output_dir={run}"]
    cached = train(*overrides, "stage=cache_reference")
    assert cached.returncode == 0, cached.stderr
    assert "cached 56 groups" in cached.stdout
    asked = sum(server.asked.values())
    assert asked <= 2 * 56 + len(EXCHANGES)
    done = train(*overrides)
    assert done.returncode == 0, done.stderr
    assert sum(server.asked.values()) - asked <= 2 * table.PROBES + len(EXCHANGES)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert "train/eos/chosen_logratio" in rows[1]
    assert json.loads((run / "summary.json").read_text())["reference"] == "served big"
    assert files_with(KEY.encode(), run) == []
    assert KEY not in done.stdout + done.stderr + cached.stdout
