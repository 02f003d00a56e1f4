"""README.md and the guides: their commands and examples run, options are documented, links and figures are right."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from filelock import FileLock
from paths import ROOT
from safetensors.torch import load_file, save_file

from llmquant.cli import app
from llmquant.module_names import block_of

GUIDES = (
    "llmquant/cli/README.md",
    "llmquant/pipeline/README.md",
    "llmquant/runtime/README.md",
    "llmquant/formats/README.md",
    "eval/README.md",
    "kernels/README.md",
)
COMMANDS_GUIDE = GUIDES[0]
DOCUMENTS = ("README.md", *GUIDES)
PROSE = (*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md", "eval/EXPERIMENTS.md")
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(bash|python)\n(.*?)\n```", re.DOTALL)
FEWER_TOKENS = "from llmquant.planning import held_out\nheld_out.MIN_TOKENS = 512\n"
"""As the fixture `short_held_out_text` does for other tests: models are compared on fewer tokens."""
EXAMPLE_MODEL = ".cache/SmolLM2-135M-Instruct"
"""Where `scripts/smollm2.py` leaves the model that the README quantizes."""
SHORT_MODEL, NUM_BLOCKS = "short-model", 2
"""The folder of the model that the guides call MODEL in this test, and its number of decoder blocks."""


def blocks(document: str) -> list[tuple[int, str, str]]:
    """(line, language, text) of the bash and python blocks of a document in order, without those after
    `<!-- not run: reason -->`."""
    text = (ROOT / document).read_text()
    return [
        (text[: match.start(3)].count("\n") + 1, match[2], match[3])
        for match in BLOCK.finditer(text)
        if match[1] is None
    ]


# --- commands and examples -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def documents_folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A folder that all processes of pytest-xdist share, with one folder per document."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "documents"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        for document in DOCUMENTS:
            make_folder(folder / document.replace("/", "-"), smollm2)
    return folder


def make_folder(folder: Path, model: Path) -> None:
    """Create the folder in which the blocks of a document run: it looks like a checkout with an activated
    environment."""
    if folder.exists():
        return
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    command = binaries / "llmquant"
    command.write_text(f"#!{sys.executable}\n{FEWER_TOKENS}from llmquant.cli import main\nmain()\n")
    command.chmod(0o755)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / EXAMPLE_MODEL).parent.mkdir()
    (folder / EXAMPLE_MODEL).symlink_to(model)
    save_first_blocks(model, folder / SHORT_MODEL)


def save_first_blocks(model: Path, out: Path) -> None:
    """Copy a model with its first NUM_BLOCKS decoder blocks only, so that the commands of the guides take seconds."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": NUM_BLOCKS}))
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if (block_of(name) or 0) < NUM_BLOCKS}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def run_block(folder: Path, language: str, text: str) -> dict[str, object]:
    """Run one block and return its exit code and output."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "MODEL": str(folder / SHORT_MODEL),
        "OMP_NUM_THREADS": "1",
    }
    if language == "bash":
        arguments = ["bash", "-euo", "pipefail", "-c", text]
    else:
        arguments = [sys.executable, "-c", f"import os\n{FEWER_TOKENS}MODEL = os.environ['MODEL']\n{text}"]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def result_of(folder: Path, document: str, index: int) -> dict[str, object]:
    """The result of a block, after all earlier blocks of its document.

    A later block finds the files of an earlier one. Each block runs once, whichever process and test is first, and a
    failed block does not keep later ones from running.
    """
    with FileLock(folder / "lock"):
        for number, (_, language, text) in enumerate(blocks(document)[: index + 1]):
            file = folder / f"result-{number}.json"
            if not file.exists():
                file.write_text(json.dumps(run_block(folder, language, text)))
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(2700)
@pytest.mark.parametrize(
    ("document", "index"),
    [
        pytest.param(document, index, id=f"{document}:{line}")
        for document in DOCUMENTS
        for index, (line, _, _) in enumerate(blocks(document))
    ],
)
def test_every_command_and_example_runs(documents_folder, document, index):
    result = result_of(documents_folder / document.replace("/", "-"), document, index)
    assert result["returncode"] == 0, result["stderr"]
    assert str(result["stdout"]).strip(), "prints nothing"


def test_most_documents_have_commands():
    assert sum(len(blocks(document)) > 0 for document in DOCUMENTS) > 5


def test_failed_block_is_reported_and_the_next_one_runs(tmp_path, monkeypatch):
    document = "guide.md"
    (tmp_path / document).write_text(
        "```bash\nexit 3\n```\n\n<!-- not run: x -->\n```bash\nx\n```\n```bash\necho 1\n```\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "save_first_blocks", lambda model, out: None)
    assert [line for line, _, _ in blocks(document)] == [2, 10]
    make_folder(tmp_path / "folder", tmp_path)
    assert result_of(tmp_path / "folder", document, 1)["stdout"] == "1\n"
    assert result_of(tmp_path / "folder", document, 0)["returncode"] == 3


# --- options ---------------------------------------------------------------------------------------------------------


def commands() -> dict[str, object]:
    """Name -> click command; the empty name is `llmquant` itself."""
    group = typer.main.get_command(app)
    return {"": group} | dict(group.commands)


def options_of(name: str) -> set[str]:
    """The options of a command, without hidden ones."""
    return {
        option
        for parameter in commands()[name].params
        if not getattr(parameter, "hidden", False)
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    }


def section_of(name: str) -> str:
    """The part of the guide that is about one command; all of it for `llmquant` itself."""
    text = (ROOT / COMMANDS_GUIDE).read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return text if not name else "".join(part for part in sections if name in re.findall(r"\w+", part.splitlines()[0]))


@pytest.mark.parametrize("name", commands())
def test_every_option_is_documented(name):
    missing = {
        option for option in options_of(name) if not re.search(rf"(?<![\w-]){option}(?![\w-])", section_of(name))
    }
    assert not missing, f"{name}: {sorted(missing)} not in {COMMANDS_GUIDE}"


def test_options_are_seen_and_hidden_ones_are_not():
    assert "--against" in options_of("eval")
    assert {"--engine", "--sym", "--asym"} <= options_of("quantize")
    assert "--target" not in options_of("quantize")


# --- text ------------------------------------------------------------------------------------------------------------


def test_readme_is_a_landing_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PROSE)
def test_links_lead_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", path.read_text())
    for link in (first or second for first, second in links):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{document}: {link}"
        assert not anchor or anchor in anchors(target), f"{document}: {link}"


@pytest.mark.parametrize("document", [name for name in PROSE if name != "CHANGELOG.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    names = set(re.findall(r"(?<![\w./-])(?:scripts|tests|llmquant|eval|kernels)/[\w/.-]*\w", text))
    missing = {name for name in names if not (ROOT / name).exists()}
    assert not missing, f"{document}: {sorted(missing)}"


def test_pictures_and_tables_show_the_committed_numbers():
    rows = json.loads((ROOT / "eval" / "results.json").read_text())["rows"]
    tables = (ROOT / "eval" / "README.md").read_text()
    for row in rows:
        assert f"| {row['kl']:.3f} |" in tables or f"| {row['kl']:.4f} |" in tables, row["recipe"]
    last = {}
    for row in sorted(rows, key=lambda row: (row["bits"], ", asymmetric" in row["recipe"])):
        last[row["series"]] = row["kl"]
    for name in ("light", "dark"):
        picture = (ROOT / "eval" / f"kl_{name}.svg").read_text()
        for series, kl in last.items():
            assert f">{kl:.3f} {series}<" in picture or series == "AutoRound", series


def test_first_line_of_every_module_says_what_it_is():
    folders = ("llmquant", "eval", "kernels", "scripts")
    wrong = {}
    for path in {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}:
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        if not summary.endswith("."):
            wrong[str(path.relative_to(ROOT))] = summary
    assert not wrong, "the first line of these docstrings is not a sentence: " + json.dumps(wrong, indent=1)
