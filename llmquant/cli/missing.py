"""One line for a Python package that is not installed, instead of a traceback.

An ImportError passes through every caller up to `main`, so no module checks what it imports. transformers raises errors
of its own for some imports that fail; the ImportError is then the cause of such an error.
"""

import importlib.util
import sys

from llmquant.errors import one_line

REQUIREMENTS: dict[str, tuple[str, str]] = {
    "torch": ("torch>=2.8", "every command needs it"),
    "transformers": ("transformers>=5.0", "every command needs it"),
    "safetensors": ("safetensors>=0.5", "every command needs it"),
    "datasets": ("datasets>=3", "it reads texts of the hub and .parquet files"),
    "accelerate": ("accelerate>=1.5", "transformers loads models with it"),
    "triton": ("triton>=3.4", "it compiles the kernels for NVIDIA GPUs"),
    "llvmlite": ("llvmlite>=0.45", "it compiles the kernels for CPUs"),
    "huggingface_hub": ("huggingface_hub>=1.0", "it downloads models"),
    "greenlet": ("greenlet>=3.1", "it runs a model block by block"),
    "numpy": ("numpy>=1.26", "every command needs it"),
    "sentencepiece": ("sentencepiece>=0.2", "some tokenizers need it"),
    "google": ("protobuf>=5", "some tokenizers need it"),
    "typer": ("typer>=0.15", "every command needs it"),
    "rich": ("rich>=13.9", "it prints tables and progress"),
    "psutil": ("psutil>=6", "it reads the memory of the process"),
    "pydantic": ("pydantic>=2.10", "it checks quantize_report.json"),
    "regex": ("regex>=2024.9.11", "it matches the patterns in quantized checkpoints"),
    "jinja2": ("jinja2>=3.1.6", "it fills report.html and chat templates"),
    "matplotlib": ("matplotlib>=3.9", "it draws plots"),
}
"""The packages that llmquant depends on: name of the module -> what to install, and what for."""


def missing_package(error: BaseException) -> str | None:
    """Describe an error in one line if a package that llmquant depends on cannot be imported, else return None.

    A package on which such a package depends counts too. Other modules that are missing, such as one of llmquant
    itself, are mistakes in the code, and their traceback is needed.
    """
    cause: BaseException | None = error
    found = None
    while cause is not None:  # the innermost cause counts
        if isinstance(cause, ImportError):
            found = _describe(cause) or found
        cause = cause.__cause__
    return found


def _describe(error: ImportError) -> str | None:
    module, importer = (error.name or "").partition(".")[0], _importer(error)
    if module in REQUIREMENTS:
        package, purpose = REQUIREMENTS[module]
        if not _is_installed(module):
            return f"Python package '{module}': not installed, and {purpose}; run `pip install '{package}'`"
        reason = one_line(error)
        return f"Python package '{module}': cannot be imported ({reason}); run `pip install --upgrade '{package}'`"
    if importer not in REQUIREMENTS:
        return None
    if module and not _is_installed(module):
        return f"Python package '{module}': not installed, and {importer} needs it; run `pip install {module}`"
    # Packages check some of their own requirements, and say what to install.
    return f"Python package '{importer}': {one_line(error)}"


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def _importer(error: BaseException) -> str:
    """Return the top-level package of the innermost stack frame that is not Python's import machinery."""
    names, traceback = [""], error.__traceback__
    while traceback is not None:
        names.append(str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0])
        traceback = traceback.tb_next
    return [name for name in names if name != "importlib"][-1]
