"""An example of the data on the terminal: what is masked is dim, what is scored is coloured."""

from typing import Any

from dpo_ref.tracking.terminal import on_terminal

SHOWN = 400  # characters of each part


def _short(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}"


def show_example(rows: list[list[str]]) -> None:
    """Print parts of an example: (part, text, "yes" if it is scored)."""
    if not on_terminal():
        print("example (what is scored is marked with |):")
        for part, text, scored in rows:
            mark = "|" if scored == "yes" else " "
            print("\n".join(f"  {part:9} {mark} {line}" for line in _short(text).split("\n")))
        return
    from rich.console import Console
    from rich.text import Text

    styles = {"chosen": "green", "rejected": "red"}
    whole: Any = Text("example: what is masked is dim, what is scored is coloured\n")
    for part, text, scored in rows:
        style = styles.get(part, "cyan") if scored == "yes" else "dim"
        whole.append(f"{part:9} ", style="bold")
        whole.append(_short(text) + "\n", style=style)
    Console().print(whole)
