"""Compare what two runs wrote."""

from pathlib import Path

from llmquant.checkpoints.manifest import REPORT_FILES


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below the folder by relative name, without the reports: they hold times.

    Sub-folders are entries of their own, without content. A dangling link raises FileNotFoundError.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.name not in REPORT_FILES]
    return {str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes() for path in paths}


def assert_same_bytes(one: Path, other: Path) -> None:
    """Assert that two folders hold the same bytes, and that both hold the reports, which may differ."""
    first, second = artifact_bytes(one), artifact_bytes(other)
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert content == second[name], name
    for file in REPORT_FILES:
        assert (one / file).exists() and (other / file).exists(), file
