"""A summary of the calibration text, for dry runs and for the start of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def calibration_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the source and size of a calibration text, its contents, fallbacks and notes as lines of text.

    summary: the result of `preview_calibration` or `CalibrationTokens.summary`.
    """
    lines = [f"{summary['source']}, {summary['num_samples']} x {summary['seq_len']} tokens"]
    if "num_tokens_available" in summary:
        lines.append(
            f"rows: {summary['num_rows']:,}, of which {summary['num_blank_rows']:,} without text, "
            f"{summary['num_duplicate_rows']:,} repeated; tokens: {summary['num_tokens_available']:,}, windows: "
            f"{summary['num_windows_available']:,}, tokens left over: {summary['num_tokens_left_over']:,}"
        )
    else:
        lines.append(
            "the first row was fetched from the Hugging Face hub; the run fetches the others and counts the tokens"
        )
    return [*lines, *summary.get("fallbacks", ()), *summary.get("notes", ())]


def print_calibration(summary: Mapping[str, Any]) -> None:
    """Print the lines of a summary on stderr, like progress."""
    for line in calibration_lines(summary):
        print(f"calibration text: {line}", file=sys.stderr, flush=True)
