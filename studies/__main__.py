"""Run studies: `python -m studies` says which there are; `python -m studies strength` runs what is left of one, shows
what came out, and compares it with what is committed."""

import argparse
import sys
from importlib import import_module

from dpo_ref.files.writing import write_text
from dpo_ref.reports.plots import write_png
from dpo_ref.tracking.terminal import say
from studies.records import PAGES, Record, differences, filled, read, write
from studies.runner import OUTPUTS

STUDIES = ("strength", "necessity")


def show(name: str, found: Record) -> None:
    """The tests of a study in the terminal, and how it stands to what is committed."""
    for test in found.tests:
        say(f"{'borne out ' if test.holds else 'NOT borne out'} {test.statement}: {test.estimate}")
    committed = read(name)
    if committed is None:
        say(f"nothing is committed of it yet; python -m studies {name} --write")
        return
    told = differences(committed, found)
    say(f"{name}: " + (f"{len(told)} numbers are not the committed ones" if told else "as committed"), *told)
    if told:
        sys.exit(1)


def write_pages(name: str, found: Record) -> None:
    """The page and the picture of a study."""
    module, page = import_module(f"studies.{name}"), PAGES / f"{name}.md"
    write_png(PAGES / f"{name}.png", module.panels(found))
    write_text(page, filled(page, module.parts(found)))
    say(f"wrote {page} and {name}.png")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("names", nargs="*", choices=STUDIES, metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--write", action="store_true", help="make what comes out the committed result")
    parser.add_argument("--pages", action="store_true", help="write the pages of what is committed, and run nothing")
    args = parser.parse_args()
    if not args.names:
        for name in STUDIES:
            module = import_module(f"studies.{name}")
            say(f"{name:<12} {module.MINUTES:>4} minutes on 2 cores  {module.__doc__}")
    for name in args.names:
        try:
            found = read(name) if args.pages else import_module(f"studies.{name}").record(OUTPUTS / name)
        except ValueError as error:
            sys.exit(f"error: {error}")
        if args.write and found:
            write(name, found)
        if found:
            show(name, found) if not args.pages else None
            if args.write or args.pages:
                write_pages(name, found)


if __name__ == "__main__":
    main()
