"""What lies in the repository is about the project and not about the machine it was made on."""

import subprocess
from pathlib import Path

import pytest

from tests.support.command import ROOT


def test_no_file_names_a_folder_of_this_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    folders = [f"{folder}/".encode() for folder in (Path.home(), ROOT) if len(folder.parts) > 1]
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 100
    assert [
        str(path.relative_to(ROOT)) for path in files if any(folder in path.read_bytes() for folder in folders)
    ] == []
