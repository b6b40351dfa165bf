"""What is said of a chat template that does not do what is asked of it."""

from dpo_ref.data.chat_templates import ChatText, template_notes
from tests.support.command import train
from tests.support.model_folders import model_folder, pairs_file, words_for
from tests.support.tokenizers_here import CHATML, PLAIN, byte_bpe

IGNORANT = CHATML.split("{% if add")[0]
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)


def test_a_header_that_is_scored_is_told_once_with_the_template_that_mends_it(tmp_path):
    folder = model_folder(tmp_path / "model", byte_bpe(IGNORANT))
    words = words_for(folder, pairs_file(tmp_path / "pairs.jsonl"), tmp_path / "run")
    done = train(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ignores add_generation_prompt") == 1
    assert "'<|im_start|>assistant' is scored as part of every response" in done.stdout
    assert "model.template=chatml" in done.stdout
    mended = train(*words_for(folder, tmp_path / "pairs.jsonl", tmp_path / "mended", "model.template=chatml"))
    assert mended.returncode == 0, mended.stderr
    assert "add_generation_prompt" not in mended.stdout


def test_nothing_is_said_of_templates_that_write_the_header_or_have_none():
    assert ChatText(byte_bpe(IGNORANT)).scored_header == "<|im_start|>assistant"
    for template in (CHATML, PLAIN, THINKING):
        assert ChatText(byte_bpe(template, bos="<|endoftext|>")).scored_header == ""
        assert not any("add_generation_prompt" in note for note in template_notes(byte_bpe(template)))
