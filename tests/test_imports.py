"""The order of the packages: each imports only from packages on lower floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import llmquant

FLOORS: tuple[tuple[str, ...], ...] = (
    ("version", "errors"),
    ("spec", "paths", "humanize", "memory", "module_names", "remote_code", "hooks", "progress", "grouping"),
    ("weight",),
    ("kernels", "formats", "data"),
    ("algorithms",),
    ("checkpoints",),
    ("hub", "eval"),
    ("models",),
    ("runtime",),
    ("planning",),
    ("report",),
    ("solver",),
    ("estimates",),
    ("pipeline",),
    ("conversion",),
    ("console",),
    ("cli",),
)
"""The packages and top-level modules of llmquant, lowest first. Each may import those on lower floors."""
ALLOWED: dict[str, set[str]] = {
    # Formats meet the algorithms and the kernels in `weight.py` alone. The algorithms run the kernels of the solver.
    "algorithms": {"errors", "kernels", "spec", "weight"},
    "kernels": {"errors", "spec", "weight"},
    "formats": {"errors", "humanize", "spec", "version", "weight"},
    "checkpoints": {"errors", "formats", "grouping", "humanize", "module_names", "paths", "spec", "weight"},
    "models": {"algorithms", "checkpoints", "errors", "hooks", "memory", "remote_code", "weight"},
    # An evaluation sees a model and tokens, not how the model was made.
    "eval": {"data", "errors", "hooks"},
    # The output of the commands shows plans, estimates and reports; it does not run models.
    "console": {"checkpoints", "errors", "estimates", "grouping", "humanize", "module_names", "paths", "pipeline"}
    | {"planning", "progress", "report", "spec"},
    "cli": {"checkpoints", "console", "conversion", "data", "errors", "estimates", "hub", "paths", "pipeline"}
    | {"planning", "progress", "remote_code", "report", "runtime", "spec", "version"},
}
"""The only packages and modules that these may import. The others may import everything on lower floors except what
NOT_ALLOWED names."""
NOT_ALLOWED: dict[str, set[str]] = {
    # Only the runtime calls the kernels.
    **{name: {"kernels"} for name in ("planning", "report", "solver", "estimates", "pipeline", "conversion")},
    # Models run and are planned without the algorithms that quantize them.
    "runtime": {"algorithms"},
}
"""Exceptions to the floors: what a package may not import although it is on a lower floor."""
PACKAGES: dict[str, set[str]] = {
    "algorithms": {"torch"},
    "kernels": {"torch", "triton", "llvmlite"},
    "formats": {"torch", "regex"},
    "checkpoints": {"torch", "safetensors"},
    "models": {"torch", "safetensors", "transformers", "accelerate", "greenlet"},
    "eval": {"torch", "transformers", "lm_eval"},
    "console": {"rich", "transformers", "matplotlib"},
    "cli": {"typer"},
}
"""Packages of others that these may import, beside the standard library. The rest may import any dependency."""
FACES = {"llmquant", "llmquant.__main__"}
"""The modules on top of all floors."""
LIGHT = {
    "llmquant.cli",
    "llmquant.console",
    "llmquant.spec",
    "llmquant.errors",
    "llmquant.data.sources",
    "llmquant.hub",
}
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
    """The package or top-level module of llmquant that a module belongs to."""
    return module.split(".")[1]


def misplaced(module: str, imported: set[str]) -> set[str]:
    """Those imports of a module that its room does not allow."""
    room = room_of(module)
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = set()
    for name in imported:
        package = name.split(".")[0]
        if package != "llmquant":
            if room in PACKAGES and package not in PACKAGES[room]:
                wrong.add(name)
        elif name != "llmquant" and room_of(name) != room:
            other = room_of(name)
            is_excluded = other in NOT_ALLOWED.get(room, set()) or other not in ALLOWED.get(room, {other})
            if floor_of[other] >= floor_of[room] or is_excluded:
                wrong.add(name)
    return wrong


@pytest.mark.parametrize("module", [module for module in library_files() if module not in FACES])
def test_module_imports_only_from_lower_floors(module):
    wrong = misplaced(module, imports_of(library_files()[module], at_import_only=False))
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_every_room_has_a_floor():
    named = [name for names in FLOORS for name in names]
    assert sorted(named) == sorted({room_of(module) for module in library_files() if module not in FACES})


def test_no_module_shadows_a_public_function():
    assert not {room_of(module) for module in library_files() if module not in FACES} & set(llmquant.__all__)


@pytest.mark.slow
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
    assert misplaced("llmquant.pipeline.quantize", {"llmquant.kernels.dispatch"})
    assert misplaced("llmquant.planning.plan", {"llmquant.pipeline.quantize", "llmquant.spec"}) == {
        "llmquant.pipeline.quantize"
    }
