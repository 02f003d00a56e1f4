"""Who may import whom: the rooms of the library, and the doors between them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

# Room -> what it may import: rooms of ours, and packages of others (the standard library is open to all).
CORE = {"llmquant.__version__", "llmquant.spec", "llmquant.errors", "llmquant.paths", "llmquant.weight"}
ALLOWED: dict[str, set[str]] = {
    "llmquant.algorithms": CORE | {"torch"},
    "llmquant.kernels": CORE | {"torch", "triton", "llvmlite"},
    "llmquant.formats": CORE | {"llmquant.algorithms", "torch"},
    "llmquant.checkpoints": CORE | {"llmquant.algorithms", "llmquant.formats", "torch", "safetensors"},
    "llmquant.models": CORE
    | {
        "llmquant.algorithms",
        "llmquant.formats",
        "llmquant.checkpoints",
        "torch",
        "safetensors",
        "llmquant.memory",
        "transformers",
        "accelerate",
        "greenlet",
        "llmquant.remote_code",
    },
    "llmquant.eval": {"llmquant.errors", "llmquant.tokens", "torch", "transformers", "lm_eval"},
    # The command line is on top of everything, and shows what the pipeline and the runtime have found.
    "llmquant.console": CORE
    | {"llmquant.words", "llmquant.checkpoints", "llmquant.pipeline", "llmquant.textdata"}
    | {"rich", "transformers", "matplotlib"},
    "llmquant.cli": CORE
    | {"llmquant.console", "llmquant.hub", "llmquant.checkpoints", "llmquant.pipeline", "llmquant.runtime", "typer"}
    | {"llmquant.remote_code", "llmquant.textfiles"},
}
NOT_ALLOWED: dict[str, set[str]] = {
    # The kernels are reached through the runtime alone.
    "llmquant.pipeline": {"llmquant.kernels", "llmquant.cli", "llmquant.console"},
    "llmquant.runtime": {"llmquant.pipeline", "llmquant.cli", "llmquant.console"},
}
LIGHT = {"llmquant.cli", "llmquant.console", "llmquant.spec", "llmquant.errors", "llmquant.textdata", "llmquant.hub"}
"""Modules and rooms that load before it is known what the user wants: nothing heavy at import."""
LIGHT_ALLOWED = {"llmquant", "typer", "rich"}


def library_files() -> dict[str, Path]:
    """Module name -> file."""
    folders = {"llmquant": ROOT / "llmquant", "llmquant.kernels": ROOT / "kernels", "llmquant.eval": ROOT / "eval"}
    files = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder).with_suffix("")
            # The links llmquant/kernels and llmquant/eval are the same files again.
            if package == "llmquant" and relative.parts[0] in ("kernels", "eval"):
                continue
            files[".".join([package, *relative.parts]).removesuffix(".__init__")] = path
    return files


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(path: Path, *, at_import_only: bool) -> set[str]:
    """Full names of imported modules (`from a import b` gives a and a.b), those for type checkers left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if not is_type_checking(child) and not (at_import_only and in_function):
                visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", library_files())
def test_module_imports_only_what_its_room_may(module):
    imported = imports_of(library_files()[module], at_import_only=False)
    room = room_of(module)
    if room in ALLOWED:
        strangers = {name for name in imported if not within(name, ALLOWED[room] | {room})}
    else:
        strangers = {name for name in imported if within(name, NOT_ALLOWED.get(room, set()))}
    assert not strangers, f"{module} imports {sorted(strangers)}"


@pytest.mark.parametrize("module", [module for module in library_files() if within(module, LIGHT)])
def test_light_module_loads_nothing_heavy(module):
    imported = imports_of(library_files()[module], at_import_only=True)
    assert {name.split(".")[0] for name in imported} <= LIGHT_ALLOWED
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_forbidden_import_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import os, torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets\n"
        "def f():\n    from llmquant.kernels import dispatch\n"
    )
    assert imports_of(path, at_import_only=True) == {"torch"}
    assert imports_of(path, at_import_only=False) == {"torch", "llmquant.kernels.dispatch"}
    assert within("llmquant.kernels.dispatch", NOT_ALLOWED["llmquant.pipeline"])
