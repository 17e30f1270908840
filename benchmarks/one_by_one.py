"""Cases that run one after another, a process each, and the record that keeps what each finds."""

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def flags(doc: str | None) -> argparse.ArgumentParser:
    """The flags of such a script, whose first line of text is `doc`'s."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--again", action="store_true", help="also those that are recorded")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def run_each(
    module: str,
    args: argparse.Namespace,
    cases: Sequence[Any],
    known: Mapping[str, Any],
    more: Sequence[str] = (),
    after: Callable[[], None] = lambda: None,
) -> list[str]:
    """Runs `python -m module --worker NAME` for each case that is asked for; who failed.

    Args:
        module: whose `--worker` does one case.
        args: of `flags`.
        cases: each has a `name`.
        known: the names of recorded cases, which are left out unless asked for `--again`.
        more: further arguments of the worker.
        after: called after each.
    """
    failed = []
    for case in [] if args.report else cases:
        wanted = set(args.only.split()) <= set(case.name.split())
        if not wanted or (case.name in known and not args.again):
            continue
        command = [sys.executable, "-m", module, "--worker", case.name, *more]
        if subprocess.run(command, cwd=Path(__file__).parent.parent).returncode:
            failed.append(case.name)
        after()
    return failed


def read(path: Path) -> dict[str, Any]:
    """A record: "versions", and "cases" by name."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, case: Any, entry: Mapping[str, Any], packages: Mapping[str, str]) -> None:
    """Puts one case into a record, which is never there by half; versions are those of packages."""
    known = read(path)
    known["versions"] = {name: importlib.metadata.version(p) for name, p in packages.items()}
    known.setdefault("cases", {})[case.name] = dataclasses.asdict(case) | dict(entry)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)
