"""Settings and fixtures of every test file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import settings

# Tests use no network: a stand-in gives what the hub would give.
os.environ["HF_HUB_OFFLINE"] = "1"

# Hypothesis fails an example that takes over 200 ms. On a busy machine, any example may take that long.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def no_html_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every run write an empty report.html, because drawing it takes longer than quantizing a tiny model.

    Tests marked `html_report` draw it.
    """
    if request.node.get_closest_marker("html_report") is None:
        from llmquant.report import page

        monkeypatch.setattr(page, "page", lambda report: "")


@pytest.fixture(autouse=True)
def short_held_out_text(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare quantized models with their originals on 512 tokens of the held-out text instead of 4,096.

    Tests marked `full_held_out_text` use 4,096.
    """
    if request.node.get_closest_marker("full_held_out_text") is None:
        from llmquant.planning import held_out

        monkeypatch.setattr(held_out, "MIN_TOKENS", 512)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the README's commands first: they take longest, and the other worker runs all else beside them."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of the small real model that scripts/smollm2.py makes; skip the test if it is missing."""
    from paths import ROOT

    folder = Path(os.environ.get("LLMQUANT_TEST_MODEL", ROOT / ".cache" / "SmolLM2-135M-Instruct"))
    if not folder.exists():
        pytest.skip(f"{folder}: no such folder; run scripts/smollm2.py")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function: `tiny_model("llama", dtype=…, seed=…, **config_fields)` -> checkpoint folder.

    Tests share the folders and must not write into them.
    """
    from tiny_models import save_tiny_model

    folders: dict[tuple[object, ...], Path] = {}

    def make(architecture: str, **options: object) -> Path:
        key = (architecture, *sorted((name, repr(value)) for name, value in options.items()))
        if key not in folders:
            with redirect_stderr(io.StringIO()):  # else the progress bar of saving is part of the output under test
                folders[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function for any model type of transformers: `small_model("granitemoe", num_local_experts=4)` -> folder.

    Tests share the folders and must not write into them.
    """
    from tiny_models import save_small_model

    folders: dict[tuple[object, ...], Path] = {}

    def make(model_type: str, **fields: object) -> Path:
        key = (model_type, repr(sorted(fields.items())))
        if key not in folders:
            with redirect_stderr(io.StringIO()):
                folders[key] = save_small_model(tmp_path_factory.mktemp(model_type), model_type, **fields)
        return folders[key]

    return make
