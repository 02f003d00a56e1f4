"""Fixtures that every test file may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# `--import-mode=importlib` leaves sys.path alone; the helpers beside the tests import by their plain name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

# No test reaches for a network: what a hub would give must come from a stand-in.
os.environ["HF_HUB_OFFLINE"] = "1"

# Hypothesis fails an example that takes over 200 ms, which on a busy machine any may.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def drawn_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write an empty report.html: most tests do not look at it, and its drawings take longer than a tiny run."""
    monkeypatch.setattr("llmquant.pipeline.page.page", lambda report: "")


@pytest.fixture(autouse=True)
def few_held_out_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished models are compared on 512 tokens of the fixed text, not on 4,096, which take longer than a tiny run."""
    monkeypatch.setattr("llmquant.pipeline.held_out.MIN_TOKENS", 512)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, beside all others."""
    items.sort(key=lambda item: not item.name.startswith("test_every_command_and_example"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real small model that scripts/smollm2 makes."""
    from paths import ROOT

    folder = Path(os.environ.get("LLMQUANT_TEST_MODEL", ROOT / ".cache" / "SmolLM2-135M-Instruct"))
    if not folder.exists():
        pytest.skip("SmolLM2 is not there: run scripts/smollm2")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", dtype=…, seed=…, **config fields)` -> checkpoint folder, made once. Do not write into it."""
    from tiny_models import save_tiny_model

    made: dict[tuple[object, ...], Path] = {}

    def make(architecture: str, **options: object) -> Path:
        key = (architecture, *sorted((name, repr(value)) for name, value in options.items()))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`small_model("granitemoe", num_local_experts=4)` -> a checkpoint of any model type, made once; do not write into
    it."""
    from tiny_models import save_small_model

    made: dict[tuple[object, ...], Path] = {}

    def make(model_type: str, **fields: object) -> Path:
        key = (model_type, repr(sorted(fields.items())))
        if key not in made:
            made[key] = save_small_model(tmp_path_factory.mktemp(model_type), model_type, **fields)
        return made[key]

    return make
