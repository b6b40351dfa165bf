"""Chat templates of these tests are harmless and many: they need no copy of the process; tests/faults has that."""

import pytest

from dpo_ref.data import chat_templates
from dpo_ref.files.cache import releasing


@pytest.fixture(autouse=True, scope="module")
def templates_run_here():
    """As inside of the copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_templates, "_APART", [True])
        yield


@pytest.fixture(autouse=True)
def entries_are_let_go():
    """Each entry of the cache that a test reads is an open file, and these tests read thousands."""
    with releasing():
        yield
