"""Chat templates of these tests are harmless and many: they need no copy of the process; tests/faults has that."""

import pytest

from dpo_ref.data import chat_templates


@pytest.fixture(autouse=True, scope="module")
def templates_run_here():
    """As inside of the copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_templates, "_APART", [True])
        yield
