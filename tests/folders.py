"""Comparing what runs have written."""

from pathlib import Path

from llmquant.checkpoints.manifest import REPORT_FILES


def assert_same_bytes(one: Path, other: Path) -> None:
    """The same files with the same bytes, but for the two that tell of the run: they hold times and memory."""
    files = sorted(file.name for file in one.iterdir())
    assert files == sorted(file.name for file in other.iterdir())
    assert set(REPORT_FILES) <= set(files)
    for name in sorted(set(files) - set(REPORT_FILES)):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
