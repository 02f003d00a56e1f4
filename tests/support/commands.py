"""Run the command line inside the test's process, and check its error messages."""

from __future__ import annotations

import pytest

from llmquant import cli


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `llmquant` with these arguments and return its exit code."""
    monkeypatch.setattr("sys.argv", ["llmquant", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def assert_one_line_error(stderr: str, *words: str) -> None:
    """Assert that stderr is one error message of llmquant which contains all the words."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("llmquant: "), stderr
    assert all(word in stderr for word in words), stderr
