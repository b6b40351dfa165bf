"""A policy behind a server answers as it does here, over real HTTP, whatever fails on the way."""

import pytest
import torch

from dpo_ref.evaluation.stages import deciding, generate_stage, generation_key
from dpo_ref.generation.engine import PromptSet, Question, Sampling, answer
from dpo_ref.generation.records import read_generations
from dpo_ref.generation.sampling import Local
from dpo_ref.generation.served import folder_digest, served
from dpo_ref.models import server as model_server
from dpo_ref.models.asked import ModelLoader, ModelPath
from dpo_ref.models.loading import Policy
from dpo_ref.types import Message, silent
from tests.support.evaluate_command import evaluate
from tests.support.generation_server import GenerationServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.quick import only
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import byte_bpe

TOKENIZER = byte_bpe()
ASKED = PromptSet(
    "",
    tuple(
        Question((Message(role="user", content=f"{n} cats " * (n % 3 + 1)),), ("why?",) * (n % 2)) for n in range(8)
    ),
)
GREEDY = Sampling(0.0, 1.0, 12, 1)
NUM_ANSWERS = 12  # 8 first turns and 4 second ones
KEY = "sk-not-a-real-key-0123456789"


def model():
    return tiny_model("llama", vocab_size=len(TOKENIZER), seed=3)


@pytest.fixture
def serve():
    """Servers that are closed at the end."""
    started = []

    def start(name="my/policy", **options):
        started.append(GenerationServer(model(), TOKENIZER, name, **options))
        return started[-1]

    yield start
    for server in started:
        server.__exit__()


def unneeded():
    raise AssertionError("a policy that is served elsewhere is not loaded here")


def engine(*servers, **options):
    policy = Policy(unneeded, TOKENIZER, path="my/policy", folder="my/policy")
    defaults = {"temperature": 0.0, "max_new_tokens": 12, "concurrency": 3, "retries": 3, "timeout": 20.0}
    return served(policy, url=[server.url for server in servers], **(defaults | options))


def here(sampling=GREEDY):
    return answer(Local(TOKENIZER, sampling, 4, model), ASKED, 7)


@pytest.mark.parametrize("tells", ["ids", "ids without the end", "log-probs"])
def test_greedy_answers_are_those_of_the_model_here(tells, serve):
    generations = answer(engine(serve(tells=tells)), ASKED, 7)
    assert generations == here()
    assert {g.finish_reason for g in generations} == {"stop", "length"}


def test_texts_alone_are_encoded_and_say_so(serve):
    generations = answer(engine(serve(tells="text"), protocol="openai"), ASKED, 7)
    expected = {(g.prompt_index, g.turn): g for g in here()}
    assert {g.tokens for g in generations} == {"text"}
    for g in generations:
        theirs = expected[g.prompt_index, g.turn]
        assert (g.output, g.finish_reason) == (theirs.output, theirs.finish_reason)
        ids = TOKENIZER.encode(g.output, add_special_tokens=False)
        assert list(g.token_ids) == [*ids, *([TOKENIZER.eos_token_id] if g.finished else [])]


def test_what_a_server_is_asked(serve):
    """vLLM samples as the engine here does only if it is told so; others are told what OpenAI's API knows."""
    server = serve()
    answer(engine(server, temperature=0.5, samples_per_prompt=2), ASKED, 7)
    body = server.bodies[0]
    assert body["prompt"] in [list(g.prompt_ids) for g in here()]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"], body["max_tokens"]) == (
        0.5,
        1,
        -1,
        0,
        12,
    )
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (1, 0, 0)
    ends = {TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|im_end|>")}
    assert (body["ignore_eos"], set(body["stop_token_ids"])) == (True, ends)
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == 2 * NUM_ANSWERS
    answer(engine(server, protocol="openai"), ASKED, 7)
    assert set(server.bodies[-1]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


def test_an_answer_that_the_server_cut_before_the_limit_is_refused(serve):
    """A server may have a limit of its own; what it cut would count as too long for ours."""
    server = serve(most=10)
    with pytest.raises(ValueError, match=r"cut an answer at 10 tokens, before generation.max_new_tokens=12: start it"):
        answer(engine(server), ASKED, 7)
    short = {g.prompt_index: g for g in answer(engine(server, max_new_tokens=10), ASKED, 7)}
    assert {g.num_tokens for g in short.values() if not g.finished} == {10}


def test_samples_differ_and_come_again_with_the_seed(serve):
    runs = [
        answer(engine(serve(), temperature=1.0, samples_per_prompt=3, max_new_tokens=8), ASKED, seed)
        for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1]
    first = [[g.output for g in run if g.turn == 1] for run in runs]
    assert len(set(first[0])) > 12
    assert sum(a == b for a, b in zip(first[0], first[2], strict=True)) < 6


def test_faults_are_survived(serve):
    server = serve(faults=["429", "500", "slow", "cut", "malformed", "dropped", "503"])
    assert answer(engine(server, retries=7), ASKED, 7) == here()
    assert set(server.answered.values()) == {1}


def stage(folder, engine):
    return generate_stage(folder, "0123456789abcdef-key", lambda kept: answer(engine, ASKED, 7, silent, kept))


@pytest.mark.parametrize("dies_after", only([1, 5, 10], 5))
def test_a_server_that_is_lost_costs_no_answer(dies_after, serve, tmp_path):
    first, second = serve(), serve()
    first.dies_after = dies_after
    with pytest.raises(
        ValueError, match=r"no answer in 4 attempts .*; every answer so far is kept: run the same|no serv"
    ):
        stage(tmp_path, engine(first))
    kept = sum(first.answered.values())
    assert stage(tmp_path, engine(second)) == here()
    assert sum(second.answered.values()) == NUM_ANSWERS - kept
    assert not {*first.answered} & {*second.answered}


def test_an_interrupted_generation_asks_no_further(serve, tmp_path):
    server = serve()

    def interrupted(items, description, total):
        for index, item in enumerate(items):
            if index == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        generate_stage(tmp_path, "k" * 16, lambda kept: answer(engine(server), ASKED, 7, interrupted, kept))
    (partial,) = tmp_path.glob("*.partial.jsonl")
    assert len([line for line in partial.read_text().splitlines() if line]) == 2
    assert len(server.bodies) < 8


def test_a_server_of_another_model_is_refused(serve):
    other, silent_one = serve("another/policy"), serve("another/policy", lists=False)
    with pytest.raises(ValueError) as error:
        answer(engine(other), ASKED, 7)
    assert f"no server has my/policy: {other.url} serves another/policy. Start one with `vllm serve" in str(
        error.value
    )
    with pytest.raises(ValueError, match=r"generation\.url must be the base of a completions server"):
        answer(engine(silent_one), ASKED, 7)
    assert answer(engine(other, serve()), ASKED, 7) == here()
    assert not other.bodies


def test_a_prompt_too_long_for_the_server_is_named(serve, tmp_path):
    server = serve(limit=60)
    with pytest.raises(
        ValueError, match=r"prompt \d, sample 0, turn [12]\) refused a prompt of \d+ tokens .*length is 60"
    ):
        stage(tmp_path, engine(server))
    assert stage(tmp_path, engine(serve())) == here()


ANSWERS = {
    "aborted": ({"finish_reason": "abort"}, "ended an answer with finish_reason 'abort', which is neither stop nor"),
    "empty": ({"token_ids": [], "finish_reason": "length"}, "an answer of no tokens that did not end by itself"),
    "no text": ({"text": None}, "the server's answer is no completion"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_is_none_is_named(case, serve):
    changed, message = ANSWERS[case]
    server = serve(alter=lambda answer: answer | {"choices": [answer["choices"][0] | changed]})
    with pytest.raises(ValueError) as error:
        answer(engine(server), ASKED, 7)
    assert message in str(error.value)
    assert "(prompt " in str(error.value)


def test_a_key_is_sent_and_appears_nowhere(serve, monkeypatch, tmp_path):
    server = serve(key=KEY)
    with pytest.raises(ValueError, match=rf"wants a key: set {model_server.KEY}"):
        stage(tmp_path, engine(server))
    monkeypatch.setenv(model_server.KEY, KEY)
    stage(tmp_path, engine(server))
    assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_weights_that_the_server_lacks_are_refused():
    policy = Policy(unneeded, TOKENIZER, path="p", folder="p", on_top="the adapter my/adapter")
    with pytest.raises(ValueError, match="what a server has under p lacks the adapter my/adapter; write the whole"):
        served(policy, url="http://127.0.0.1:1/v1")


def test_the_address_changes_no_sample_and_the_weights_do(tmp_path):
    options = {"temperature": 1.0, "url": "http://a:1/v1", "concurrency": 3, "protocol": "vllm"}
    assert deciding(options) == {"temperature": 1.0, "protocol": "vllm"}
    keys = {generation_key("w", "t", ASKED, 0, options | {"url": url}) for url in ("http://a:1/v1", ["http://b:1/v1"])}
    assert len(keys) == 1
    model().save_pretrained(tmp_path)
    before = folder_digest(str(tmp_path))
    replaced = tiny_model("llama", vocab_size=len(TOKENIZER), seed=4)
    (tmp_path / "README.md").write_text("a card")
    assert folder_digest(str(tmp_path)) == before
    replaced.save_pretrained(tmp_path)
    assert folder_digest(str(tmp_path)) != before


def test_evaluate_with_a_served_policy(tmp_path):
    """The whole command; the lab's smallest model behind a server, against itself here."""
    policy = ModelLoader(torch.device("cpu")).policy(ModelPath("lab:tiny"))
    few = [
        "prompts=lab",
        "prompts.num_prompts=6",
        "tracking=none",
        "generation.max_new_tokens=12",
        "data.num_pairs=16",
    ]
    few += ["data.num_eval_pairs=4", "data.num_test_prompts=4", "policy=lab:tiny", "stage=generate"]
    with GenerationServer(policy.model, policy.tokenizer, "lab:tiny") as server:
        asked = ["generation=served", f"generation.url={server.url}", "generation.temperature=0"]
        evaluate(*few, *asked, "generation.samples_per_prompt=1", f"output_dir={tmp_path / 'served'}")
    evaluate(*few, "generation=greedy", f"output_dir={tmp_path / 'here'}")
    generations = [read_generations(tmp_path / name / "generations.jsonl") for name in ("served", "here")]
    assert generations[0] == generations[1]


REFUSED = {
    "no address": ("url=nowhere", "generation.url=nowhere must be the base of a server, such as http://host:8000/v1"),
    "key in it": ("url=http://me:secret@host/v1", f"set the environment variable {model_server.KEY}"),
    "concurrency": ("concurrency=0", "generation.concurrency=0 must be at least 1"),
    "retries": ("retries=-1", "generation.retries=-1 must not be negative"),
    "protocol": ("protocol=tgi", "generation.protocol=tgi is none of vllm, openai"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case, tmp_path):
    override, message = REFUSED[case]
    url = [] if override.startswith("url=") else ["generation.url=http://host:8000/v1"]
    with pytest.raises(ValueError) as error:
        evaluate("policy=lab:tiny", "generation=served", *url, f"generation.{override}", f"output_dir={tmp_path}")
    assert message in str(error.value)
    assert "secret" not in str(error.value)
