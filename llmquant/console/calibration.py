"""The calibration text in a few lines, for the dry run and for the start of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def calibration_lines(account: Mapping[str, Any]) -> list[str]:
    """Source and size of a calibration text, what it holds, what fell back, and what is worth knowing.

    account: as `pipeline.calibration.preview` and `CalibrationTokens.audit` give it.
    """
    lines = [f"{account['source']}, {account['num_samples']} x {account['seq_len']} tokens"]
    if "num_tokens_available" in account:
        lines.append(
            f"rows: {account['num_rows']:,}, of which {account['num_blank_rows']:,} without text, "
            f"{account['num_duplicate_rows']:,} repeated; tokens: {account['num_tokens_available']:,}, windows: "
            f"{account['num_windows_available']:,}, tokens left over: {account['num_tokens_left_over']:,}"
        )
    else:
        lines.append("the Hugging Face hub gives its first row; the run fetches the others and counts the tokens")
    return [*lines, *account.get("incidents", ()), *account.get("remarks", ())]


def print_calibration(account: Mapping[str, Any]) -> None:
    """The lines on stderr, where progress is shown."""
    for line in calibration_lines(account):
        print(f"calibration text: {line}", file=sys.stderr, flush=True)
