#!/usr/bin/env python3
"""Check that each malformed checkpoint of the tests is refused with an error of one line.

    .venv/bin/python scripts/dev/malformed.py [--all]

The script prints a table of counts for each format; --all first prints a line for each malformed file. It exits with 1
unless every file is refused with a UserError of one line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from llmquant.checkpoints.quantized import validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS / "support"), str(TESTS)]

from malformed_files import good_checkpoint  # noqa: E402
from test_hostile_checkpoints import HOSTILE, HOSTILE_BY_FORMAT  # noqa: E402


def read_damaged(format: str, damage: Callable[[Path], object]) -> tuple[str, str]:
    """Damage a good checkpoint and read it; return the kind of outcome and the error message."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = good_checkpoint(Path(temporary) / "model", format)
        damage(folder)
        try:
            validate_quantized(CheckpointReader(folder))
        except UserError as error:
            message = str(error).replace(str(folder), "…")
            return ("one line" if "\n" not in message else "several lines"), message
        except Exception as error:
            return type(error).__name__, str(error)
        return "read without an error", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="print a line for each malformed file")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    cases = {"gptq": HOSTILE} | HOSTILE_BY_FORMAT
    for format, damages in cases.items():
        for name, (damage, _) in damages.items():
            outcome, message = read_damaged(format, damage)
            counts[format, outcome] += 1
            if options.all:
                print(f"{format} | {name} | {outcome} | {message}")
    print("| format | malformed files | refused in one line | others |\n|---|---|---|---|")
    for format, damages in cases.items():
        refused = counts[format, "one line"]
        print(f"| {format} | {len(damages)} | {refused} | {len(damages) - refused} |")
    total, refused = counts.total(), sum(count for (_, outcome), count in counts.items() if outcome == "one line")
    print(f"| all | {total} | {refused} | {total - refused} |")
    sys.exit(total != refused)


if __name__ == "__main__":
    main()
