"""Where built models and reference tables are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """DPO_REF_CACHE, or dpo_ref in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_ref"
    return Path(os.environ.get("DPO_REF_CACHE") or default).expanduser()
