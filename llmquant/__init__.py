"""Weight-only quantization of Hugging Face causal language models.

    import llmquant

    llmquant.quantize("folder or hub id", "out", llmquant.Recipe(spec=llmquant.QuantSpec(group_size=64)))
    model = llmquant.load("out")

Importing this package loads nothing heavy: each name is imported from its module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmquant.version import __version__

if TYPE_CHECKING:
    from llmquant.conversion import convert
    from llmquant.errors import UserError
    from llmquant.pipeline.quantize import quantize
    from llmquant.runtime.load import load
    from llmquant.runtime.plugin import transformers_config
    from llmquant.spec import Options, Override, QuantSpec, Recipe

__all__ = [
    "Options",
    "Override",
    "QuantSpec",
    "Recipe",
    "UserError",
    "__version__",
    "convert",
    "load",
    "quantize",
    "transformers_config",
]

_MODULE_OF = {
    "quantize": "llmquant.pipeline.quantize",
    "convert": "llmquant.conversion",
    "load": "llmquant.runtime.load",
    "transformers_config": "llmquant.runtime.plugin",
    "Recipe": "llmquant.spec",
    "Options": "llmquant.spec",
    "Override": "llmquant.spec",
    "QuantSpec": "llmquant.spec",
    "UserError": "llmquant.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'llmquant' has no attribute '{name}'")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
