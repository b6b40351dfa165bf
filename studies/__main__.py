"""Run studies: `python -m studies` says which there are; `python -m studies strength` runs what is left of one, shows
what came out, and compares it with what is committed."""

import argparse
import signal
import sys
from importlib import import_module
from typing import Any

from dpo_ref.files.writing import write_text
from dpo_ref.reports.plots import write_png
from dpo_ref.tracking.terminal import say
from studies.records import INDEX, PAGES, Record, differences, filled, read, write
from studies.runner import OUTPUTS

IN_THE_LAB = ("strength", "necessity", "likelihood", "stronger", "frontier", "on_policy", "beyond")
STUDIES = (*IN_THE_LAB, "real_model")  # for which a model and pairs are needed


def show(name: str, found: Record) -> bool:
    """The findings of a study in the terminal, and how it stands to what is committed; whether that is repeated."""
    for finding in found.findings:
        say(f"{'yes' if finding.holds else 'NO ':<3} {finding.statement}: {finding.estimate}")
    committed = read(name)
    if committed is None:
        say(f"{name}: nothing is committed of it yet; to do so: python -m studies {name} --write")
        return True
    told = differences(committed, found)
    say(f"{name}: {f'{len(told)} numbers are not as committed' if told else 'as committed'}", *told)
    return not told


def write_pages(name: str, found: Record) -> None:
    """The page and the picture of a study."""
    study, page = import_module(f"studies.{name}"), PAGES / f"{name}.md"
    write_png(PAGES / f"{name}.png", study.panels(found))
    write_text(page, filled(page, study.parts(found)))
    write_text(INDEX, filled(INDEX, {f"{name} answer": study.answer(found)}))
    say(f"wrote {page}, {name}.png and {INDEX.name}")


def _time_is_over(*_: Any) -> None:
    raise TimeoutError


def _study(name: str, args: argparse.Namespace) -> bool:
    """Run one study; whether it repeats what is committed."""
    found = read(name) if args.pages else import_module(f"studies.{name}").record(OUTPUTS / name)
    if found is None:
        raise ValueError(f"nothing is committed of {name}; without --pages it is run")
    if args.write:
        write(name, found)
    if args.write or args.pages:
        write_pages(name, found)
    return args.pages or show(name, found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*STUDIES, "all", []], metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--minutes", type=int, default=0, help="stop after so many; the same command goes on")
    parser.add_argument("--write", action="store_true", help="make what comes out the committed result")
    parser.add_argument("--pages", action="store_true", help="write the pages of what is committed, and run nothing")
    args = parser.parse_args()
    for name in STUDIES if not args.names else ():
        study = import_module(f"studies.{name}")
        say(f"{name:<12} {study.MINUTES:>4} minutes on 2 cores  {study.__doc__}")
    signal.signal(signal.SIGALRM, _time_is_over)
    signal.alarm(60 * args.minutes)
    try:
        repeated = [_study(name, args) for name in (IN_THE_LAB if "all" in args.names else args.names)]
    except TimeoutError:
        sys.exit(f"{args.minutes} minutes are over; the same command goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(not all(repeated))


if __name__ == "__main__":
    main()
