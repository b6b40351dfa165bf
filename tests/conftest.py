"""Shared by all tests: types checked as the code runs, one thread per worker, no network, no W&B service, caches in a
folder of the session."""

import atexit
import gc
import os
import re
import shutil
import tempfile
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
if "DPO_REF_CACHE" not in os.environ:
    os.environ["DPO_REF_CACHE"] = tempfile.mkdtemp(prefix="dpo_ref_cache_")
    atexit.register(shutil.rmtree, os.environ["DPO_REF_CACHE"], ignore_errors=True)

# The gate's verdict depends on the code alone; `pytest --hypothesis-profile=random` looks for what nobody has seen.
hypothesis.settings.register_profile("gate", derandomize=True)
hypothesis.settings.register_profile("random")
hypothesis.settings.load_profile("gate")

# Every function's arguments and result are checked by beartype. The shapes that jaxtyping compares between them are
# followed only by functions that write shapes (or names that are imported for type checkers alone, which beartype
# cannot resolve): following them everywhere took a fifth of the tests' time.
ROOT = Path(__file__).parents[1]
SIGN = re.compile(r"^from jaxtyping import|^if TYPE_CHECKING:", re.MULTILINE)
SHAPED = [
    path for path in (ROOT / "dpo_ref").rglob("*.py") if SIGN.search(path.read_text()) and path.name != "kernels.py"
]
SHAPES = re.compile(r"\b(Float|Int|Bool|UInt8|Num|Shaped)\[")
KERNELS = ("dpo_ref.models.kernels",)  # Triton reads their source
CONF = BeartypeConf(
    claw_is_pep526=False,
    claw_skip_package_names=KERNELS,
    violation_type=TypeError,  # what Python and jaxtyping raise
)
follow_shapes = jaxtyping.jaxtyped


def _as_far_as_written(*, typechecker):
    """jaxtyping's decorator of all that its hook imports."""

    def decorate(decorated):
        hints = getattr(decorated, "__annotations__", {}).values()
        if isinstance(decorated, type) or any(isinstance(hint, str) or SHAPES.search(str(hint)) for hint in hints):
            return follow_shapes(typechecker=typechecker)(decorated)
        return beartype(conf=CONF)(decorated)

    return decorate


jaxtyping.jaxtyped = _as_far_as_written
install_import_hook([".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED], "beartype.beartype")
beartype_package("dpo_ref", conf=CONF)


@pytest.fixture
def undrawn_pictures():
    """A picture is its words (see tests/support/pictures.py)."""
    from tests.support.pictures import undrawn

    with undrawn():
        yield


def pytest_collection_finish():
    """What was imported stays to the end: the garbage collector need not look at it again and again, nor at every 700
    new objects (a tenth of the time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
