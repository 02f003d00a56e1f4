"""Running the command line inside a test's own process."""

from __future__ import annotations

import pytest

from llmquant import cli


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `llmquant` with these arguments; gives the exit code."""
    monkeypatch.setattr("sys.argv", ["llmquant", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0
