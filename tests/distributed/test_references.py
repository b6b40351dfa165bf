"""Every kind of reference on two ranks is the one of a single process."""

import pytest
from transformers import AutoModelForCausalLM

from dpo_ref.lab.models import locate
from dpo_ref.references.served import EXCHANGES
from tests.distributed.test_runs import check_same, on_two
from tests.support.cache import empty_cache
from tests.support.command import train
from tests.support.reference_kinds import KINDS, written
from tests.support.served_references import serve, surroundings  # noqa: F401

RUN = ["model.path=lab:initial", "data=jsonl", "objective=dpo", "trainer.batch_size=5", "trainer.max_steps=3"]
RUN += ["optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_ratio=0", "tracking=none", "data.eval_fraction=0.2"]


def check_two_are_one(folder, monkeypatch, parallel, *words):
    """Each fills tables of its own."""
    words = [*RUN, f"data.path={written(folder / 'pairs.jsonl')}", *words]
    empty_cache(monkeypatch, folder / "cache-of-one")
    done = train(*words, f"output_dir={folder / 'one'}")
    assert done.returncode == 0, done.stderr
    empty_cache(monkeypatch, folder / "cache-of-two")
    on_two(folder / "ranks", *words, f"parallel={parallel}", f"output_dir={folder / 'two'}")
    check_same(folder / "two", folder / "one")


QUICK = ("mixture",)
CASES = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", CASES)
def test_two_ranks_of_fsdp_are_one(kind, tmp_path, monkeypatch):
    check_two_are_one(tmp_path, monkeypatch, "fsdp", *KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_of_ddp_are_one(kind, tmp_path, monkeypatch):
    check_two_are_one(tmp_path, monkeypatch, "ddp", *KINDS[kind])


def test_a_served_reference_is_asked_once_by_all(serve, tmp_path, monkeypatch):  # noqa: F811
    """Ranks share what there is to ask: together as much as one process."""
    server = serve(model=AutoModelForCausalLM.from_pretrained(locate("lab:strong")))
    words = ["reference=served", f"reference.url={server.url}", "reference.model=big", "reference.tokenizer=lab:tiny"]
    check_two_are_one(tmp_path, monkeypatch, "fsdp", *words)
    of_exchange = 2 * len(EXCHANGES)  # asked by each process that looks how the server answers
    assert 0 < sum(server.asked.values()) <= 2 * 2 * 12 + 3 * of_exchange
    assert max(server.asked.values()) <= 3
