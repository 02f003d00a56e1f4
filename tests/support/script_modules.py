"""Scripts of the checkout, as modules whose functions tests can call."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from paths import ROOT


def load_script(name: str) -> ModuleType:
    """Import `scripts/<name>` as a module."""
    path = ROOT / "scripts" / name
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
