"""A cache of a test's own."""

from pathlib import Path


def empty_cache(monkeypatch, folder: Path) -> Path:
    """Point the cache at a new folder."""
    folder.mkdir()
    monkeypatch.setenv("DPO_REF_CACHE", str(folder))
    return folder
