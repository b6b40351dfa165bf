"""Rounds that a server samples: what is handed over to it and how, whose answers are taken, what is said where it does
not work, and runs from end to end, over real HTTP against a server that loads adapters as vLLM does."""

import json
import shlex
import shutil
import sys
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.cli.saved_run import check_servers
from dpo_ref.generation import weight_sync
from dpo_ref.generation.engine import Sampling
from dpo_ref.generation.records import Generation, read_generations
from dpo_ref.generation.served import served_policy
from dpo_ref.lab import models as lab_models
from dpo_ref.lab.preferences import draw_prompts
from dpo_ref.models.asked import ModelLoader, Workspace
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.training.on_policy import Samples, read_samples, server_differences
from dpo_ref.types import TokenGroup, silent
from tests.support.command import composed, resolved, train
from tests.support.evaluate_command import evaluate
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.on_policy import SMALL
from tests.support.round_server import RoundServer
from tests.support.tiny import disturbed, naive_logps

PROMPTS = draw_prompts("test", 3)
SAMPLING = Sampling(1.0, 1.0, 8, 2)
LORA = ["model.path=lab:tiny", "model.lora_rank=4"]
RESTARTED = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), method='POST'))"


@pytest.fixture
def serve():
    """Servers of lab:tiny that are closed at the end."""
    started = []

    def start(**options):
        started.append(RoundServer(lab_models.locate("lab:tiny"), **options))
        return started[-1]

    yield start
    for server in started:
        server.__exit__()


def trained_policy(*words):
    model = resolved(*words).model
    return model(torch.device("cpu"), model.bound(AdapterOptions)())


def workspace(folder):
    return Workspace(folder, folder / "cache", 0, silent, ModelLoader(torch.device("cpu")))


def served(policy, folder, url, **options):
    defaults = {"concurrency": 3, "retries": 2, "timeout": 20.0}
    return served_policy(policy, SAMPLING, workspace(folder), url=url, **(defaults | options))


def sampled(policy, folder, index, seed=7):
    policy.hand_over(index)
    return policy.answer(PROMPTS, seed, folder / f"round {index}")


def gap(policy, generations):
    """The largest difference of the server's log-probs to those of the policy by transformers alone, in nats."""
    gaps = []
    for each in generations:
        group = TokenGroup(0, "", list(each.prompt_ids), (list(each.token_ids),), (1,), ())
        with torch.no_grad():
            (ours,) = naive_logps(policy.model, group)
        gaps.append((torch.tensor(each.logps) - ours).abs().max().item())
    return max(gaps)


# --- an adapter


SLOW = pytest.mark.slow
KINDS = [[], pytest.param(["model.lora_rslora=true"], marks=SLOW), ["model.lora_init=pissa"]]


@pytest.mark.parametrize("words", KINDS, ids=["plain", "rank-stabilised", "pissa"])
def test_an_adapter_is_loaded_before_each_round(words, serve, tmp_path):
    """A fresh one, which changes nothing yet, and one that has learnt something: the server's log-probs are ours."""
    server, policy = serve(), trained_policy(*LORA, *words)
    rounds = served(policy, tmp_path / "run", server.url)
    first = sampled(rounds, tmp_path, 0)
    name = rounds.name
    assert gap(policy, first) < 1e-4
    disturbed(policy.model)
    assert gap(policy, first) > 0.01
    second = sampled(rounds, tmp_path, 1)
    assert gap(policy, second) < 1e-4
    assert server.names() == [server.name, rounds.name]
    assert name.startswith("run-")
    assert ["-round-00001-" in name, "-round-00002-" in rounds.name] == [True, True]
    assert [path.name for path in (tmp_path / "run" / "served").iterdir()] == [rounds.name]
    assert len({body["seed"] for body in server.bodies}) == 6
    rounds.close()
    assert server.names() == [server.name]


def test_what_a_killed_process_left_is_unloaded_and_others_adapters_stay(serve, tmp_path):
    server, policy = serve(), trained_policy(*LORA)
    killed, other = (served(policy, tmp_path / name, server.url) for name in ("run", "other"))
    killed.hand_over(0)
    other.hand_over(0)
    goes_on = served(policy, tmp_path / "run", server.url)
    goes_on.hand_over(3)
    assert server.names() == [server.name, other.name, goes_on.name]


def test_a_policy_that_is_there_already_is_not_loaded_again(serve, tmp_path):
    server, policy = serve(), trained_policy(*LORA)
    for _ in range(2):
        served(policy, tmp_path / "run", server.url).hand_over(0)
    assert [order for order, _ in server.orders] == ["load_lora_adapter"]


def test_an_adapter_whose_loading_was_answered_by_nothing_is_there(serve, tmp_path):
    """The connection was cut once it was loaded; asked again, vLLM refuses a name that it has."""
    server = serve(forgets=True)
    rounds = served(trained_policy(*LORA), tmp_path / "run", server.url)
    sampled(rounds, tmp_path, 0)
    assert [order for order, _ in server.orders] == ["load_lora_adapter"] * 2


def earlier(answer):
    return answer | {"model": answer["model"].replace("-round-00002-", "-round-00001-")}


def with_choices(change):
    return lambda answer: answer | {"choices": [change(choice) for choice in answer["choices"]]}


OTHERS = {
    "stale": (earlier, r"run-\w+-round-00001-\w+ answered where run-\w+-round-00002-\w+ was asked for"),
    "base": (lambda answer: answer | {"model": "base"}, "base answered where run-"),
    "nobody": (lambda answer: answer | {"model": None}, "None answered where run-"),
    "text alone": (
        with_choices(lambda choice: {key: value for key, value in choice.items() if key != "token_ids"}),
        "text without the tokens that it drew, on which rounds are trained: it must know return_token_ids",
    ),
    "log-probs of other tokens": (
        with_choices(lambda choice: choice | {"logprobs": {"token_logprobs": [-1.0]}}),
        r"the server gave 1 finite log-probs of \d tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_answers_of_another_policy_are_refused(case, serve, tmp_path):
    alter, message = OTHERS[case]
    server = serve(alter=alter)
    with pytest.raises(ValueError, match=message):
        sampled(served(trained_policy(*LORA), tmp_path / "run", server.url), tmp_path, 1)


def test_a_server_without_log_probs_is_taken(serve, tmp_path):
    server = serve(alter=with_choices(lambda choice: choice | {"logprobs": None}))
    generations = sampled(served(trained_policy(*LORA), tmp_path / "run", server.url), tmp_path, 0)
    assert {generation.logps for generation in generations} == {None}
    assert not Samples(generations, [], 0.0, 0.0).have_server_logps


def test_a_server_that_was_restarted_is_named_with_what_to_type(serve, tmp_path):
    server = serve()
    rounds = served(trained_policy(*LORA), tmp_path / "run", server.url)
    rounds.hand_over(0)
    server.policies.clear()
    with pytest.raises(
        ValueError, match=rf"no server has {rounds.name}: .* It was restarted meanwhile, perhaps: go on"
    ):
        rounds.answer(PROMPTS, 7, tmp_path)


NOT_LOADED = {
    "no runtime loading": ({"updating": False}, r"loads no adapters while it runs \(404: .*Not Found.*; start it w"),
    "another machine": ({"blind": True}, r"does not find the adapter .*: it must see /.*/served/.* generation.folder"),
    "rank": ({"rank": 2}, r"LoRA rank 4 is greater than max_lora_rank 2.*--enable-lora --max-lora-rank 8 --gen"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_LOADED)
def test_a_server_that_loads_no_adapter_is_told_of_with_the_remedy(case, serve, tmp_path):
    options, message = NOT_LOADED[case]
    with pytest.raises(ValueError, match=message):
        served(trained_policy(*LORA), tmp_path / "run", serve(**options).url).hand_over(0)


def test_a_server_that_is_not_there_is_told_of_with_the_command(serve, tmp_path):
    with pytest.raises(
        ValueError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve \S+ --enable-lora --max-lor"
    ):
        served(trained_policy(*LORA), tmp_path / "run", "http://127.0.0.1:9/v1").hand_over(0)


def test_a_saved_adapter_that_vllm_does_not_load_is_refused(tmp_path):
    policy = trained_policy(*LORA, "model.lora_dora=true")
    with pytest.raises(ValueError, match=r"vLLM does not load an adapter with use_dora=True; generation.restart="):
        served(policy, tmp_path / "run", "http://127.0.0.1:9/v1")


# --- whole weights


def command(server):
    """Has the server on this port serve a folder, as a user's script would."""
    body = '{"folder": "{folder}", "name": "{name}"}'
    return shlex.join([sys.executable, "-c", RESTARTED, f"{server.url}/restart", body])


@pytest.mark.parametrize(
    "words", [LORA[:1], pytest.param([*LORA, "model.lora_dora=true"], marks=SLOW)], ids=["all", "DoRA"]
)
def test_whole_weights_go_by_a_folder_and_a_command(words, serve, tmp_path):
    server, policy = serve(), trained_policy(*words)
    rounds = served(policy, tmp_path / "a run", server.url, restart=command(server))
    sampled(rounds, tmp_path, 0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.02 * torch.randn_like(weight) if weight.requires_grad else 0)
    generations = sampled(rounds, tmp_path, 1)
    assert gap(policy, generations) < 1e-4
    assert server.names() == [rounds.name]
    assert [path.name for path in (tmp_path / "a run" / "served").iterdir() if path.is_dir()] == [rounds.name]
    assert len(server.orders) == 2


FAILING = {
    "fails": (
        "print('no such device'); sys.exit(3)",
        r"ended with status 3; \S+restart.log ends with: no such device",
    ),
    "another name": ("print('up'); sys.exit(0)", r"after 0.3 seconds .* does not serve run-.* but lab.*ends with: up"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_command_that_brings_up_no_server_is_told_of_with_its_last_lines(case, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "POLL", 0.05)
    code, message = FAILING[case]
    words = shlex.join([sys.executable, "-c", f"import sys; {code}", "{folder}", "{name}"])
    server, seconds = serve(name="lab"), 20.0 if case == "fails" else 0.3
    rounds = served(trained_policy(*LORA), tmp_path / "run", server.url, restart=words, restart_timeout=seconds)
    with pytest.raises(ValueError, match=message):
        rounds.hand_over(0)


LISTS = """
import sys
from http.server import *
class Lists(BaseHTTPRequestHandler):
    def do_GET(self):
        body = ('{"data": [{"id": "%s"}]}' % sys.argv[2]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Lists).serve_forever()
"""


def test_a_command_that_is_the_server_is_ended_before_the_next_and_at_the_end(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "POLL", 0.05)
    with serve() as free:
        port = free.server_port
    words = shlex.join([sys.executable, "-c", LISTS, str(port), "{name}", "{folder}"])
    policy = trained_policy(*LORA)
    rounds = served(policy, tmp_path / "run", f"http://127.0.0.1:{port}/v1", restart=words, restart_timeout=20.0)
    for index in range(2):
        rounds.hand_over(index)
        assert rounds.name in urlopen(f"http://127.0.0.1:{port}/v1/models").read().decode()
    rounds.close()
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{port}/v1/models")


# --- what is reported


def test_differences_by_hand():
    """d = 0.1, -0.3, 0: mean |d| 0.4/3; exp(-d) - 1 + d is 0.0048374, 0.0498588 and 0. The end token that a
    server leaves out does not count."""
    generation = Generation((), 0, 0, "", (1,), (5, 6, 7, 2), "stop", 4, 0, 0, 1.0, 1.0, logps=(-1.0, -2.0, -0.5))
    here = [np.array([-1.1, -1.7, -0.5, -9.0], np.float32)]
    values = server_differences(Samples([generation], [], 0.0, 0.0), here)
    assert values["server_gap"] == pytest.approx(0.4 / 3, abs=1e-6)
    assert values["server_gap_max"] == pytest.approx(0.3, abs=1e-6)
    assert values["server_kl"] == pytest.approx((0.0048374 + 0.0498588) / 3, abs=1e-6)


# --- runs from end to end


FEW = [*SMALL, *LORA, "data.rounds=2", "data.prompts_per_round=4", "data.max_new_tokens=8", "trainer.batch_size=4"]
DPO = ["objective=dpo", "data.pairs=bradley_terry", "data.samples_per_prompt=2"]  # equal rewards give a pair too
GREEDY = ["objective=sft", "data.temperature=0", "data.samples_per_prompt=1", "optim.lr=0.02"]


def run(folder, *words):
    return train(*FEW, f"output_dir={folder}", *words)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rounds_of(folder):
    return [row for row in rows(folder) if "on_policy/round" in row]


def generations_of(folder):
    return [read_generations(folder / "rounds" / name / "generations.jsonl") for name in ("0001", "0002")]


def by_server(server):
    return ["generation=served", f"generation.url={server.url}", "generation.timeout=20", "generation.retries=1"]


@pytest.mark.parametrize("weights", ["adapter", pytest.param("whole", marks=SLOW)])
def test_a_served_run_is_the_one_in_memory(weights, serve, tmp_path):
    """Greedy answers say what the policy is before each round; both runs train on the same, and end with the same."""
    server = serve()
    restart = (
        ["model.lora_rank=null", f"generation.restart={json.dumps(command(server))}"] if weights == "whole" else []
    )
    done = run(tmp_path / "served", *GREEDY, *by_server(server), *restart)
    assert done.returncode == 0, done.stderr
    assert f"rounds are sampled by the server at {server.url}, which is handed the policy in " in done.stdout
    done = run(tmp_path / "here", *GREEDY, *restart[:1])
    assert done.returncode == 0, done.stderr
    served_answers, answers = (generations_of(tmp_path / name) for name in ("served", "here"))
    assert [[g.token_ids for g in each] for each in served_answers] == [
        [g.token_ids for g in each] for each in answers
    ]
    assert not any("on_policy/server_gap" in row for row in rounds_of(tmp_path / "served"))  # at temperature 0
    initial = run(tmp_path / "still", *GREEDY, "optim.lr=1e-12", *restart[:1])
    assert initial.returncode == 0
    assert generations_of(tmp_path / "still")[1] != answers[1]  # the second round is of a policy that has moved
    ours, theirs = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("served", "here"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_a_run_reports_how_the_server_differs(serve, tmp_path):
    """With the policy's own model by rounding alone; with another base by what the user is told."""
    server = serve()
    done = run(tmp_path / "run", *DPO, *by_server(server))
    assert done.returncode == 0, done.stderr
    assert server.names() == [server.name]
    assert "differ from the policy's" not in done.stdout
    for row in rounds_of(tmp_path / "run"):
        assert 0 < row["on_policy/server_gap"] <= row["on_policy/server_gap_max"] < 1e-4
        assert 0 <= row["on_policy/server_kl"] < 1e-8
        assert row["on_policy/handover_seconds"] > 0
    here = run(tmp_path / "here", *DPO)
    assert here.returncode == 0, here.stderr
    only = {key for row in rounds_of(tmp_path / "run") for key in row} ^ {
        k for row in rounds_of(tmp_path / "here") for k in row
    }
    assert only == {f"on_policy/{name}" for name in ("server_gap", "server_gap_max", "server_kl", "handover_seconds")}
    another = serve()
    with torch.no_grad():
        for weight in another.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    done = run(tmp_path / "other", *DPO, "data.rounds=1", *by_server(another))
    assert "round 1: the server's log-probs differ from the policy's by " in done.stdout


def test_a_run_whose_server_was_lost_goes_on_with_another(serve, tmp_path):
    """Lost in round 2 after 3 of its 8 answers: these are asked for no more, nor are those of round 1."""
    first, second = serve(), serve()
    words = ["objective=ppo_clip", "data.samples_per_prompt=2", "trainer.save_every=1", "generation.concurrency=1"]
    first.dies_after = 8 + 3
    failed = run(tmp_path / "run", *words, *by_server(first))
    assert failed.returncode == 1
    assert (
        f"every answer so far is kept: go on with python train.py resume={tmp_path / 'run'} when it is up"
        in failed.stderr
    )
    resumed = [f"resume={tmp_path / 'run'}", "generation=served", f"generation.url={second.url}", "tracking=none"]
    done = train(*resumed)
    assert done.returncode == 0, done.stderr
    assert len(second.bodies) == 5
    whole = run(tmp_path / "whole", *words, *by_server(serve()))
    assert whole.returncode == 0, whole.stderr
    asked = [[(g.prompt_ids, g.sample_index, g.token_ids) for g in each] for each in generations_of(tmp_path / "run")]
    assert asked == [
        [(g.prompt_ids, g.sample_index, g.token_ids) for g in e] for e in generations_of(tmp_path / "whole")
    ]
    assert rounds_of(tmp_path / "run")[1]["on_policy/server_gap"] < 1e-4
    assert not list((tmp_path / "run" / "rounds").glob("*/*.partial.jsonl"))


def test_rounds_that_are_sampled_at_once_are_of_one_policy(serve, tmp_path):
    server = serve()
    done = run(tmp_path / "run", *DPO, "data.sample_every=2", *by_server(server))
    assert done.returncode == 0, done.stderr
    assert [order for order, _ in server.orders] == ["load_lora_adapter", "unload_lora_adapter"]
    assert len({body["model"] for body in server.bodies}) == 1


def test_a_round_that_is_on_disk_is_not_asked_for_again(serve, tmp_path):
    server = serve()
    assert run(tmp_path / "run", "objective=ppo_clip", "data.rounds=1", *by_server(server)).returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    asked, before = len(server.bodies), read_samples(tmp_path / "run" / "rounds" / "0001")
    done = train(f"resume={tmp_path / 'run'}", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert len(server.bodies) == asked
    assert read_samples(tmp_path / "run" / "rounds" / "0001") == before


# --- what is refused before anything is loaded


URL = ["generation=served", "generation.url=http://host:8000/v1"]
ROUNDS = ["data=on_policy", *LORA, *URL]
WHOLE = ["data=on_policy", *URL]
REFUSED = {
    "offline": ([*LORA, *URL], "generation=served has no effect: data=lab has its answers already; add data=on"),
    "here": (["data=on_policy", "generation=greedy"], "generation=greedy belongs to evaluate.py: rounds of data=o"),
    "no address": (["data=on_policy", *LORA, "generation=served"], "generation=served needs generation.url=..."),
    "two": ([*ROUNDS[:-1], "generation.url=[http://a/v1,http://b/v1]"], "rounds are sampled from one server, which"),
    "temperature": ([*ROUNDS, "generation.temperature=0.5"], "generation.temperature has no effect on rounds of tr"),
    "protocol": ([*ROUNDS, "generation.protocol=openai"], "so that they speak vLLM's; leave it out"),
    "batch size": ([*ROUNDS, "data.generation_batch_size=8"], "data.generation_batch_size has no effect with gen"),
    "whole weights": (WHOLE, "a running server takes adapters alone (model.lora_rank=16), and this run trains all w"),
    "DoRA": ([*ROUNDS, "model.lora_dora=true"], "model.lora_dora: vLLM loads no such adapter, or computes another on"),
    "ranks": ([*ROUNDS, "model.lora_rank_pattern={q_proj: 8}"], "model.lora_rank_pattern: vLLM loads no such adapter"),
    "seconds": ([*ROUNDS, "generation.restart_timeout=9"], "restart_timeout has no effect without generation.restart"),
    "no folder": ([*WHOLE, "generation.restart='serve {name}'"], "does not say {folder}: {folder} is the model"),
    "no name": ([*WHOLE, "generation.restart='serve {folder}'"], "does not say {name}: {folder} is the model"),
    "quotes": ([*WHOLE, 'generation.restart="serve \'{folder} {name}"'], "No closing quotation"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case):
    words, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        resolved(*words)
    assert message in str(error.value)


def test_options_of_rounds_are_refused_in_evaluations(tmp_path):
    words = ["policy=lab:tiny", *URL, "generation.folder=/shared", f"output_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"generation.folder has no effect on an evaluation: it belongs to rounds of"):
        evaluate(*words)


def test_a_command_that_a_saved_run_alone_names_is_not_run():
    words = "'serve {folder} {name}'"
    saved, _ = composed(
        "data=on_policy", "generation=served", "generation.url=http://localhost/v1", f"generation.restart={words}"
    )
    with pytest.raises(
        ValueError, match=r"generation.restart=serve {folder} {name}, and that command would be run; if"
    ):
        check_servers(saved, None, "resume=run")
    check_servers(saved, "serve {folder} {name}", "resume=run")
