"""A cache of a test's own."""

from pathlib import Path

from dpo_ref.lab import models as lab_models


def empty_cache(monkeypatch, folder: Path) -> Path:
    """Point the cache at a new folder that holds the session's models, which take long to build, and nothing else."""
    models = Path(lab_models.locate("lab:tiny")).parent
    folder.mkdir()
    (folder / "models").symlink_to(models)
    monkeypatch.setenv("DPO_REF_CACHE", str(folder))
    return folder
