"""What the README says can be done: its commands and examples run, its options exist, its file tree is the real one."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from paths import ROOT

from llmquant.cli import app

README = (ROOT / "README.md").read_text()


def blocks() -> list[tuple[int, str, str]]:
    """(line, language, text) of every fenced block in order, without those after `<!-- not run: reason -->`."""
    pattern = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(bash|python)\n(.*?)\n```", re.DOTALL)
    return [
        (README[: match.start(3)].count("\n") + 1, match[2], match[3])
        for match in pattern.finditer(README)
        if not match[1]
    ]


@pytest.mark.timeout(2700)
@pytest.mark.model
def test_every_command_and_example_runs_in_the_order_it_stands(tmp_path, smollm2):
    """One test, in one folder: a later block finds what an earlier one made. `llmquant` is the checkout's; it compares
    models on fewer tokens (`few_held_out_windows`)."""
    fewer = "from llmquant.pipeline import held_out\nheld_out.MIN_TOKENS = 512\n"
    binaries = tmp_path / "bin"
    binaries.mkdir()
    command = binaries / "llmquant"
    command.write_text(f"#!{sys.executable}\n{fewer}from llmquant.cli import main\nmain()\n")
    command.chmod(0o755)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MODEL": str(smollm2), "OMP_NUM_THREADS": "1"}
    assert len(blocks()) > 5
    for line, language, text in blocks():
        if language == "bash":
            arguments = ["bash", "-euo", "pipefail", "-c", text]
        else:
            arguments = [sys.executable, "-c", f"import os\n{fewer}MODEL = os.environ['MODEL']\n{text}"]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"README line {line}: {done.stderr}"
        assert done.stdout.strip(), f"README line {line}: prints nothing"


def commands() -> dict[str, object]:
    """Name -> click command, the top level included."""
    group = typer.main.get_command(app)
    return {"llmquant": group} | {f"llmquant {name}": command for name, command in group.commands.items()}


@pytest.mark.parametrize("name", commands())
def test_every_option_is_in_the_readme(name):
    assert name in README
    options = {option for parameter in commands()[name].params for option in parameter.opts if option.startswith("-")}
    missing = {option for option in options if f"`{option}`" not in README and f"{name} {option}" not in README}
    assert not missing, f"{name}: {sorted(missing)} not in README.md"


def test_file_tree_of_the_readme_is_the_real_one():
    tree = re.search(r"## What is where\n\n```text\n(.*?)```", README, re.DOTALL)[1]
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name]
        named.add("".join(folders))
    missing = {name for name in named if not name.endswith("/") and not (ROOT / name).is_file()}
    assert not missing, f"named in README.md and not there: {sorted(missing)}"
    files = [
        path.relative_to(ROOT) for folder in ("eval", "kernels", "llmquant", "scripts") for path in walk(ROOT / folder)
    ]
    unnamed = {str(path) for path in files if str(path) not in named}
    assert not unnamed, f"not named in README.md: {sorted(unnamed)}"


def walk(folder: Path) -> Iterator[Path]:
    """Files below folder, without links, caches and empty `__init__.py`."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        is_linked = any(parent.is_symlink() for parent in [path, *path.parents])
        if (
            path.is_file()
            and not is_linked
            and "__pycache__" not in path.parts
            and path.name not in ("__init__.py", "py.typed")
        ):
            yield path


def test_every_option_test_sees_an_option_that_is_not_documented():
    assert "--against" in {option for parameter in commands()["llmquant eval"].params for option in parameter.opts}
