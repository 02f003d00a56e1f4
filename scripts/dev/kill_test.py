#!/usr/bin/env python3
"""Kill a quantization at random moments and check that the same command then continues to the same bytes.

    .venv/bin/python scripts/dev/kill_test.py MODEL [--kills 20] [--seed 0] [OPTIONS]

OPTIONS go to `llmquant quantize` in place of DEFAULT_OPTIONS. The script prints one line for each kill and, last, how
many runs continued, such as "20/20". It exits with 1 unless all did.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from fault_injection import ForkServer, survive_kills

DEFAULT_OPTIONS = ["--calibration=python-docs", "--samples=4", "--seq-len=128", "--group-size=64", "--effort=fast"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, ForkServer(options.model, timeout_seconds=3600) as server:
        command = ["quantize", options.model, "OUT", *(others or DEFAULT_OPTIONS), "--quiet"]
        survived = survive_kills(server, command, Path(folder), options.kills, options.seed, print_kill)
    print(f"{survived}/{options.kills}")
    sys.exit(survived != options.kills)


def print_kill(number: int, fraction: float, problem: str) -> None:
    """Print one line for a kill."""
    print(f"kill {number + 1} at {fraction:.0%} of the run: {problem or 'continued to the same bytes'}", flush=True)


if __name__ == "__main__":
    main()
