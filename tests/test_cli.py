"""The command line starts quickly, prints one line for a user error, and prints the figures of the functions."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from commands import command
from paths import ROOT
from transformers import AutoModelForCausalLM

from llmquant import __version__
from llmquant.eval.data import token_windows
from llmquant.eval.divergence import divergence
from llmquant.eval.perplexity import perplexity

START = [sys.executable, "-c", "from llmquant.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*START, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)


@pytest.fixture
def plain_loader(monkeypatch):
    """Replace the loader of `evaluate` with that of transformers, and return it."""

    def load(path, *, device="auto", dtype="auto", backend="auto", trust_remote_code=False):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)

    module = types.ModuleType("llmquant.runtime.load")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmquant.runtime.load", module)
    return load


@pytest.fixture
def two_models(tiny_model):
    return str(tiny_model("llama")), str(tiny_model("llama", seed=1))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("for x in range(10): print(x)\n" * 100)
    return str(path)


def cpu_seconds(*command: str | Path) -> float:
    """Return the CPU time of a command in seconds: other work on the machine must not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_little_more_than_the_import_of_the_library_that_draws_it():
    # Both are measured in turn, because the speed of one machine changes by a factor of two with its load. The import
    # takes 0.22 to 0.28 seconds on an idle machine, so the limit there is below half a second.
    ours, library = [], []
    for _ in range(5):
        library.append(cpu_seconds(sys.executable, "-c", "import typer.rich_utils"))
        ours.append(cpu_seconds(sys.executable, "-m", "llmquant", "--help"))
    assert min(ours) < 1.75 * min(library)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["eval", "--help"], ["--version"]])
def test_help_loads_no_large_library(arguments):
    code = (
        "import sys; sys.argv = ['llmquant', *sys.argv[1:]]\n"
        "from llmquant.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version():
    assert run("--version").stdout == __version__ + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/no/such/model"], "/no/such/model: no such folder"),
        (["eval", ".", "--dataset", "nonesuch"], "nonesuch: not a known data set"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"llmquant: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["nonesuch"], ["eval"], ["eval", ".", "--windows", "few"], ["eval", ".", "--nope"]]
)
def test_usage_errors_have_exit_code_2_and_no_traceback(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_interrupt_is_one_line():
    code = (
        "import sys, os, signal, llmquant.hub\n"
        "def interrupted(*model): os.kill(os.getpid(), signal.SIGINT)\n"
        "llmquant.hub.resolve_model = interrupted\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells make background commands ignore it
        "sys.argv = ['llmquant', 'eval', 'x']\n"
        "from llmquant.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "llmquant: interrupted\n"


def without_times(measured):
    """Return the figures that do not change from run to run."""
    if isinstance(measured, dict):
        return {key: without_times(value) for key, value in measured.items() if key != "tokens_per_second"}
    return measured


@pytest.mark.slow
def test_eval_prints_the_figures_of_the_functions(two_models, tiny_model, text_file, plain_loader, monkeypatch, capsys):
    from transformers import AutoTokenizer

    original, other = two_models
    third = str(tiny_model("llama", seed=2))
    tokenizer = AutoTokenizer.from_pretrained(original)
    windows_WL = token_windows(tokenizer, "for x in range(10): print(x)\n" * 100, 64, 4)
    expected = [divergence(plain_loader(model), plain_loader(original), windows_WL) for model in (other, third)]

    options = ["--dataset", text_file, "--seq-len", "64", "--windows", "4"]
    assert command(monkeypatch, "eval", other, third, "--against", original, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["dataset"] == text_file
    for row, name, compared in zip(printed["models"], (other, third), expected, strict=True):
        assert without_times(row["divergence"]) == without_times(compared.to_dict())
        assert without_times(row["perplexity"]) == without_times(compared.model.to_dict())
        assert row["perplexity"]["tokens_per_second"] > 0
        assert (row["model"], row["device"], row["dtype"]) == (name, "cpu", "float32")
        assert 0 < row["stored_bytes"] <= (Path(name) / "model.safetensors").stat().st_size
    assert printed["against"]["model"] == original
    assert without_times(printed["against"]["perplexity"]) == without_times(expected[0].reference.to_dict())

    assert command(monkeypatch, "eval", original, *options, "--json", "--quiet") == 0
    alone = json.loads(capsys.readouterr().out)
    assert without_times(alone["models"][0]["perplexity"]) == without_times(expected[0].reference.to_dict())
    assert (alone["against"], alone["models"][0]["divergence"]) == (None, None)

    assert command(monkeypatch, "eval", other, third, "--against", original, *options) == 0
    table = " ".join(capsys.readouterr().out.split())
    for compared in expected:
        values = (f"{compared.model.perplexity:.2f} ±", f"{compared.kl_mean:.4f}", f"{compared.top1_agreement:.1%}")
        assert all(value in table for value in values)
    assert "4 windows of 64 tokens, float32 on cpu" in table

    assert command(monkeypatch, "eval", original, *options, "--stride", "32", "--batch-size", "2", "--json") == 0
    strided = json.loads(capsys.readouterr().out)["models"][0]["perplexity"]
    assert (strided["stride"], strided["num_tokens"]) == (32, 63 + 3 * 32)


@pytest.mark.slow
def test_eval_holds_one_model_at_a_time(two_models, text_file, plain_loader, monkeypatch):
    alive = []
    present = weakref.WeakSet()

    def load(path, **options):
        alive.append(sum(len(list(model.model.children())) > 0 for model in present))
        model = plain_loader(path, **options)
        present.add(model)
        return model

    monkeypatch.setattr(sys.modules["llmquant.runtime.load"], "load", load)
    options = ["--against", two_models[0], "--dataset", text_file, "--seq-len", "64", "--windows", "1"]
    assert command(monkeypatch, "eval", *two_models, two_models[1], *options) == 0
    assert alive == [0, 0, 0, 0]


@pytest.mark.slow
def test_eval_of_conversations_applies_the_chat_template(two_models, tmp_path, plain_loader, monkeypatch, capsys):
    from transformers import AutoTokenizer

    talk = [{"role": "user", "content": "for x in"}, {"role": "assistant", "content": "range(10)"}]
    file = tmp_path / "talks.jsonl"
    file.write_text((json.dumps({"messages": talk}) + "\n") * 40)
    tokens = AutoTokenizer.from_pretrained(two_models[0])("user: for x in\nassistant: range(10)\n" * 40)["input_ids"]
    windows_WL = torch.tensor(tokens)[: len(tokens) // 64 * 64].view(-1, 64)
    expected = perplexity(plain_loader(two_models[0]), windows_WL)
    options = ["eval", two_models[0], "--dataset", str(file), "--seq-len", "64", "--json"]
    assert command(monkeypatch, *options, "--chat") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["perplexity"]["mean_loss"] == expected.mean_loss
    assert command(monkeypatch, *options) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["perplexity"]["mean_loss"] != expected.mean_loss

    parts = [{"role": "user", "content": [{"type": "text", "text": "for x in"}, {"type": "image"}]}, talk[1]]
    shared = [{"from": "human", "value": "for x in"}, {"from": "gpt", "value": "range(10)"}]
    by_other_names = json.dumps({"messages": parts}) + "\n" + json.dumps({"conversations": shared}) + "\n"
    lone = r'{"messages": [{"role": "user", "content": "\ud83d"}]}'
    file.write_text(by_other_names * 20 + lone)
    assert command(monkeypatch, *options, "--chat") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"][0]["perplexity"]["mean_loss"] == expected.mean_loss
    assert printed["text_notes"] == ["lone surrogates (halves of characters that were cut in two) read as U+FFFD: 1"]
    assert command(monkeypatch, *options[:-1], "--chat") == 0
    assert "read as U+FFFD: 1" in " ".join(capsys.readouterr().out.split())

    file.write_text('{"text": "for x in"}\n')
    assert command(monkeypatch, *options, "--chat") == 2
    assert 'talks.jsonl line 1: holds no "messages"' in capsys.readouterr().err
    assert command(monkeypatch, "eval", two_models[0], "--dataset", "python-docs", "--chat") == 2
    assert "python-docs: holds no conversations" in capsys.readouterr().err


def test_eval_of_a_conversation_that_the_template_rejects_is_one_line(two_models, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(two_models[0], model)
    (model / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Begin with the user.') }}{% endif %}x"
    )
    file = tmp_path / "talks.jsonl"
    roles = [json.dumps({"messages": [{"role": role, "content": "Hi"}]}) for role in ("user", "system")]
    file.write_text("\n".join(roles))
    assert command(monkeypatch, "eval", str(model), "--dataset", str(file), "--chat") == 2
    assert capsys.readouterr().err == (
        f"llmquant: {file}: the model's chat template does not take conversation 2 (Begin with the user.); "
        "change or delete it, or leave out --chat\n"
    )


def test_eval_of_models_with_different_tokenizers_is_refused(two_models, tmp_path, text_file, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(two_models[1], other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert command(monkeypatch, "eval", two_models[0], str(other), "--dataset", text_file) == 2
    assert "its tokenizer splits the text into other tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_progress_is_plain_lines_without_a_terminal_and_nothing_when_quiet(
    two_models, text_file, plain_loader, monkeypatch, capsys
):
    options = ["eval", two_models[0], "--dataset", text_file, "--seq-len", "64", "--windows", "4"]
    assert command(monkeypatch, *options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("loading 1/1 (")
    assert lines[-1].startswith("windows 4/4 (")
    assert not any("\x1b" in line for line in lines)
    assert command(monkeypatch, *options, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_eval_windows_are_no_longer_than_the_context_of_the_model(
    two_models, text_file, plain_loader, monkeypatch, capsys
):
    assert command(monkeypatch, "eval", two_models[0], "--dataset", text_file, "--windows", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["perplexity"]["seq_len"] == 256
    assert command(monkeypatch, "eval", two_models[0], "--dataset", text_file, "--seq-len", "257") == 2
    assert "seq_len 257: the model's context is 256 tokens; use --seq-len 256 or less" in capsys.readouterr().err


def test_eval_of_damaged_weights_is_refused(tiny_model, tmp_path, text_file, plain_loader, monkeypatch, capsys):
    from tiny_models import ARCHITECTURES, random_model, tiny_tokenizer

    model = random_model(ARCHITECTURES["llama"]())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    tiny_tokenizer().save_pretrained(tmp_path / "damaged")
    assert command(monkeypatch, "eval", str(tmp_path / "damaged"), "--dataset", text_file, "--quiet") == 2
    assert "window 0: the loss is nan" in capsys.readouterr().err
