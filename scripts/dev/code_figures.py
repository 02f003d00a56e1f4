#!/usr/bin/env python3
"""Print figures about the shape of the code: its size, long functions, long parameter lists, imports, repeated names.

    scripts/dev/code_figures.py                  of the working tree
    scripts/dev/code_figures.py --ref GIT_REF    of a commit, to compare with

The script reads the source without importing it. The library is llmquant/, kernels/ and eval/. It prints a table and,
last, one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("llmquant", "kernels", "eval")
MANY_PARAMETERS = 7
LONG_FUNCTION_LINES = 60
NUM_LONGEST_FILES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", help="a commit, branch or tag instead of the working tree")
    options = parser.parse_args()
    if options.ref is None:
        figures = figures_of(ROOT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            extract(options.ref, Path(folder))
            figures = figures_of(Path(folder))
    print("| figure | value |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {in_words(value)} |")
    print(json.dumps({"ref": options.ref or "working tree", **figures}))


def extract(ref: str, folder: Path) -> None:
    """Write the files of a commit into the folder."""
    archive = subprocess.run(["git", "archive", "--format=tar", ref], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        for member in files.getmembers():
            if member.isfile():
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = files.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())


def in_words(value: Any) -> str:
    """Return a value of the table: numbers as they are, lists and dicts on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return f"{len(value)}" + (f": {', '.join(value)}" if value else "")
    return str(value)


def figures_of(root: Path) -> dict[str, Any]:
    """Return the figures of the code in a folder: name -> number, list of places, or dict of numbers."""
    library = {path: path.read_text() for folder in LIBRARY for path in python_files(root / folder)}
    modules = {module_name(path.relative_to(root)): ast.parse(text) for path, text in library.items()}
    tests = {path: path.read_text() for path in python_files(root / "tests")}
    scripts = {path: path.read_text() for path in python_files(root / "scripts")}
    readme = (root / "README.md").read_text()
    functions = [
        (name, qualified, function)
        for name, tree in modules.items()
        for qualified, function in functions_in(tree, name.removeprefix("llmquant."))
    ]
    with_many = [
        (name, f"{place} {num_parameters(function)}")
        for name, place, function in functions
        if num_parameters(function) >= MANY_PARAMETERS
    ]
    is_command = {name: name.startswith("llmquant.cli") for name in modules}
    chain = longest_chain(import_graph(modules), "llmquant.cli", "llmquant.weight")
    longest = sorted(library, key=lambda path: -num_lines(library[path]))[:NUM_LONGEST_FILES]
    return {
        "README lines": num_lines(readme),
        "README words": len(readme.split()),
        "library lines": sum(map(num_lines, library.values())),
        "lines per package": lines_per_package(root, library)
        | {"tests": sum(map(num_lines, tests.values())), "scripts": sum(map(num_lines, scripts.values()))},
        "longest files": {str(path.relative_to(root)): num_lines(library[path]) for path in longest},
        "functions": len(functions),
        f"functions with {MANY_PARAMETERS} parameters or more": [p for name, p in with_many if not is_command[name]],
        "functions with 7 parameters or more, cli/ (typer commands)": [p for name, p in with_many if is_command[name]],
        f"functions over {LONG_FUNCTION_LINES} lines": [
            f"{place} {lines}" for _, place, function in functions if (lines := span(function)) > LONG_FUNCTION_LINES
        ],
        "longest import chain, cli to weight": max(len(chain) - 1, 0),
        "modules of the longest import chain": " > ".join(name.removeprefix("llmquant.") for name in chain),
        "public names of several modules": repeated_names(modules),
        "test functions": sum(
            function.name.startswith("test_")
            for text in tests.values()
            for _, function in functions_in(ast.parse(text), "")
        ),
    }


def python_files(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder in order, also scripts without a suffix; links are not followed."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts:
            continue
        if path.suffix == ".py" or (path.suffix == "" and path.read_bytes().startswith(b"#!/usr/bin/env python")):
            yield path


def module_name(path: Path) -> str:
    """Return the name by which the file is imported: kernels/ and eval/ are packages of llmquant."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "llmquant" else ("llmquant", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def num_lines(text: str) -> int:
    return len(text.splitlines())


def lines_per_package(root: Path, library: Mapping[Path, str]) -> dict[str, int]:
    """Return package -> lines of its modules, largest first."""
    lines: dict[str, int] = defaultdict(int)
    for path, text in library.items():
        lines[".".join(path.relative_to(root).parts[:-1])] += num_lines(text)
    return dict(sorted(lines.items(), key=lambda item: -item[1]))


def functions_in(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield (qualified name, function) of all functions, methods and nested functions."""
    for node in ast.iter_child_nodes(tree):
        name = (
            f"{prefix}.{node.name}"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            else prefix
        )
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from functions_in(node, name)


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters without self and cls."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    collecting = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len([each for each in named if each.arg not in ("self", "cls")]) + len(collecting)


def span(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, with its docstring and without its decorators."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def repeated_names(modules: Mapping[str, ast.Module]) -> list[str]:
    """Return the public names that several modules define at their top level, each with the modules."""
    places: dict[str, set[str]] = defaultdict(set)
    for module, tree in modules.items():
        for node in tree.body:
            for name in defined_names(node):
                if not name.startswith("_"):
                    places[name].add(module.removeprefix("llmquant."))
    return [f"{name} ({', '.join(sorted(where))})" for name, where in sorted(places.items()) if len(where) > 1]


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines, if it is a function, a class or an assignment."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]


def import_graph(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return module -> the modules of llmquant that it imports, also inside functions but not for type checkers."""
    graph: dict[str, set[str]] = {}
    for module, tree in modules.items():
        imported: set[str] = set()
        for node in without_type_checking(tree):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module)
                imported.update(f"{node.module}.{alias.name}" for alias in node.names)
        graph[module] = {name for name in imported if name in modules and name not in ("llmquant", module)}
    return graph


def without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from without_type_checking(node)


def longest_chain(graph: Mapping[str, set[str]], start: str, end: str) -> list[str]:
    """Return the longest chain of imports between two modules, both included; empty if there is none.

    An import that would close a cycle is ignored.
    """
    chains: dict[str, list[str]] = {end: [end]}
    open_modules: list[str] = []

    def visit(module: str) -> list[str]:
        if module not in chains:
            open_modules.append(module)
            rest = [visit(name) for name in sorted(graph[module]) if name not in open_modules]
            best = max(rest, key=len, default=[])
            chains[module] = [module, *best] if best else []
            open_modules.pop()
        return chains[module]

    return visit(start)


if __name__ == "__main__":
    main()
