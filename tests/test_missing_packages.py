"""A package that is not installed ends a command with one line that names the package and how to install it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from commands import assert_one_line_error
from paths import ROOT

from llmquant.cli.missing import REQUIREMENTS, missing_package

RUN_WITHOUT = (
    "import sys; sys.modules[sys.argv[1]] = None; sys.argv[:2] = ['llmquant']\nfrom llmquant.cli import main\nmain()"
)
"""A program whose first argument names a module that it cannot import. The others are those of `llmquant`."""


def run_without(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, module, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def error_of(statement: str) -> ImportError:
    with pytest.raises(ImportError) as caught:
        exec(statement, {"__name__": "llmquant.somewhere"})
    return caught.value


def test_the_table_lists_the_dependencies_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    start = text.index("dependencies = [") + len("dependencies = ")
    declared = ast.literal_eval(text[start : text.index("\n]", start) + 2])
    assert [package for package, _ in REQUIREMENTS.values()] == [line.partition(";")[0] for line in declared]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("greenlet", "greenlet>=3.1"),
        ("annotated_types", "annotated_types"),  # pydantic needs it
    ],
)
def test_quantize_names_a_missing_package(module, package, tiny_model, tmp_path):
    done = run_without(module, "quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--quiet")
    assert done.returncode == 2
    assert_one_line_error(done.stderr, f"'{module}'", "not installed", "pip install", package)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_calibration_falls_back_to_the_offline_text_without_datasets(tiny_model, tmp_path):
    options = ["--group-size", "32", "--samples", "4", "--seq-len", "32", "--dry-run"]
    done = run_without("datasets", "quantize", tiny_model("llama"), tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "python-docs" in done.stdout and "datasets" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_preset_of_the_hub_names_datasets_as_missing(tiny_model):
    done = run_without("datasets", "eval", tiny_model("llama"), "--dataset", "wikitext2")
    assert done.returncode == 2
    assert_one_line_error(done.stderr, "wikitext2", "pip install datasets", "python-docs")


def test_a_package_that_is_too_old_is_to_be_upgraded():
    line = missing_package(error_of("from rich.text import Fortran"))
    assert line is not None and "Fortran" in line and "pip install --upgrade 'rich>=13.9'" in line


def test_the_cause_of_another_error_counts():
    error = RuntimeError("could not load the model")
    error.__cause__ = error_of("import greenlet.absent")
    assert "'greenlet'" in (missing_package(error) or "")


@pytest.mark.parametrize("statement", ["import llmquant.absent", "from llmquant.errors import Absent", "import absent"])
def test_a_mistake_in_the_code_keeps_its_traceback(statement):
    assert missing_package(error_of(statement)) is None
    assert missing_package(ValueError("greenlet")) is None
