"""Shared by all tests: one thread per worker, no network, no W&B service, caches in a folder of the session."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
if "DPO_REF_CACHE" not in os.environ:
    os.environ["DPO_REF_CACHE"] = tempfile.mkdtemp(prefix="dpo_ref_cache_")
    atexit.register(shutil.rmtree, os.environ["DPO_REF_CACHE"], ignore_errors=True)


def pytest_collection_finish():
    """What was imported stays to the end: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
