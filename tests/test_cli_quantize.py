"""`llmquant quantize`, `generate`, `inspect` and `verify` print what the Python functions return."""

from __future__ import annotations

import inspect as signatures
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import command
from paths import ROOT
from short_text import short_manual

import llmquant
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.summary import inspect
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.cli.quantize import quantize_command
from llmquant.formats.registry import FORMATS
from llmquant.kernels.dispatch import BACKENDS
from llmquant.module_names import block_of, kind_of
from llmquant.pipeline.quantize import quantize
from llmquant.runtime.generate import SamplingParams, generate

FEW = ("--calibration", "python-docs", "--samples", "4", "--seq-len", "32", "--no-verify")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory) -> Path:
    """Return a quantized tiny model, which tests must not write into."""
    out = tmp_path_factory.mktemp("small") / "out"
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32), skip=("*.o_proj",))
    quantize(tiny_model("llama"), out, recipe)
    return out


# --- quantize --------------------------------------------------------------------------------------------------------


def test_the_command_has_the_defaults_of_the_options():
    parameters = signatures.signature(quantize_command).parameters
    names = {"num_samples": "samples", "engines": "engine", "max_memory_bytes": "max_memory"}
    for field in fields(llmquant.Options):
        if field.name != "max_shard_bytes":  # only from Python
            default = parameters[names.get(field.name, field.name)].default
            assert default == field.default or (default is None and not field.default), field.name


@pytest.mark.slow
def test_quantize_prints_the_report_of_the_function(tiny_model, tmp_path, monkeypatch, capsys):
    model = tiny_model("llama")
    capsys.readouterr()
    assert command(monkeypatch, "quantize", model, tmp_path / "a", *FEW, "--group-size", "32", "--json", "--quiet") == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    printed = json.loads(streams.out)
    recipe = llmquant.Recipe(spec=llmquant.QuantSpec(group_size=32))
    report = quantize(
        model, tmp_path / "b", recipe, llmquant.Options(calibration="python-docs", num_samples=4, seq_len=32)
    ).to_dict()
    for key in ("linears", "unquantized_linears", "fallbacks", "output_bytes", "bits_per_weight", "format", "recipe"):
        assert printed[key] == json.loads(json.dumps(report[key])), key
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


@pytest.mark.slow
def test_every_option_reaches_the_recipe(tiny_model, tmp_path, monkeypatch, capsys):
    options = ["--method", "rtn", "--bits", "8", "--group-size", "-1", "--asym", "--skip", "*.o_proj", "--dtype"]
    options += ["bfloat16", "--skip", "*.down_proj", "--effort", "best", "--override", "*.up_proj:bits=4,sym"]
    assert command(monkeypatch, "quantize", tiny_model("llama"), tmp_path / "out", *options, "--json", "--quiet") == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["method"] == "rtn"
    assert recipe["spec"] == {"bits": 8, "group_size": -1, "symmetric": False}
    assert recipe["skip"] == ["*.o_proj", "*.down_proj"]
    assert [(each["pattern"], each["bits"], each["symmetric"]) for each in recipe["overrides"]] == [
        ("*.up_proj", 4, True)
    ]
    assert recipe["descent_sweeps"] > 0
    assert CheckpointReader(tmp_path / "out").info("model.embed_tokens.weight").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [([], "gptq"), (["--asym"], "compressed-tensors"), *((["--format", name], name) for name in FORMATS)],
)
def test_format_follows_the_grid_unless_it_is_named(options, name, tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32", *options]
    assert command(monkeypatch, *arguments, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["format"] == name
    assert inspect(tmp_path / "out").format == name


@pytest.mark.slow
def test_quantize_prints_errors_fallbacks_and_the_next_commands(tiny_model, tmp_path, monkeypatch, capsys):
    model, out = tiny_model("llama"), tmp_path / "out"
    capsys.readouterr()  # drop what making the model printed
    assert command(monkeypatch, "quantize", model, out, *FEW, "--skip", "*.o_proj") == 0
    streams = capsys.readouterr()
    text = " ".join(streams.out.split())
    assert "self_attn.q_proj 4-bit g32 sym 2" in text
    assert "in 16 bit --skip '*.o_proj': 2 x self_attn.o_proj (13.3 %)" in text
    assert "corrections mean shrinkage factor: self_attn " in text and "; mlp gate_proj " in text
    # A fallback of all linears takes one line.
    one_size = "group size 128 -> 32, the largest that divides the in_features of all linears (64, 96)"
    places = "12 x self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj and 2 more"
    assert f"fallbacks {places}: {one_size}" in text
    for word in ("size", "bits", "time", "peak memory", "calibration python-docs, 4 x 32 tokens"):
        assert word in text
    assert f"  llmquant eval {out} --against {model}\n" in streams.out
    lines = streams.err.splitlines()
    assert lines[0] == "calibration text"
    assert any(line.startswith("block 2/2  error ") for line in lines)
    assert "\x1b" not in streams.err + streams.out


@pytest.mark.slow
def test_strict_turns_fallbacks_into_exit_code_1(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), "--method", "rtn", "--strict", "--quiet"]
    assert command(monkeypatch, *arguments, tmp_path / "reduced") == 1
    assert "llmquant: --strict: " in capsys.readouterr().err
    assert (tmp_path / "reduced").exists(), "the checkpoint is written nevertheless"
    assert command(monkeypatch, *arguments, tmp_path / "plain", "--group-size", "32") == 0


@pytest.mark.slow
def test_overwrite_replaces_a_checkpoint_and_restart_an_unfinished_one(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32", "--quiet"]
    assert command(monkeypatch, *arguments) == 0
    assert command(monkeypatch, *arguments, "--bits", "8") == 2
    assert command(monkeypatch, *arguments, "--bits", "8", "--overwrite") == 0
    assert inspect(tmp_path / "out").quantized[0].storage == "8-bit g32 sym"

    from llmquant.pipeline import quantize as pipeline

    def fail(*arguments, **options):
        raise llmquant.UserError("failed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "extra_files", fail)
        assert command(monkeypatch, *arguments[:2], tmp_path / "new", *arguments[3:]) == 2
    assert command(monkeypatch, *arguments[:2], tmp_path / "new", *arguments[3:], "--bits", "3") == 2
    assert "add --restart to begin anew" in capsys.readouterr().err
    assert command(monkeypatch, *arguments[:2], tmp_path / "new", *arguments[3:], "--bits", "3", "--restart") == 0
    assert inspect(tmp_path / "new").quantized[0].storage == "3-bit g32 sym"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "without"), [((), ""), (("--restart",), " without --restart")])
def test_an_interrupted_run_prints_how_to_continue_and_continues(
    options, without, tiny_model, tmp_path, monkeypatch, capsys
):
    from llmquant.models.blockwise_forward import BlockwiseForward

    def interrupted(walk, index):
        os.kill(os.getpid(), signal.SIGINT)

    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", *FEW, "--group-size", "32", "--quiet"]
    capsys.readouterr()
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background commands ignore it
    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseForward, "leave", interrupted)
        assert command(monkeypatch, *arguments, *options) == 128 + signal.SIGINT
    signal.signal(signal.SIGINT, ignored)
    assert capsys.readouterr().err == f"llmquant: interrupted; the same command{without} continues the run\n"
    assert not (tmp_path / "out").exists()
    part = tmp_path / "out.partial" / "parts" / "block-00000.safetensors"
    assert part.exists()
    added: list[str] = []
    add = PartialCheckpoint.add_part
    monkeypatch.setattr(
        PartialCheckpoint, "add_part", lambda self, name, *more: (added.append(name), add(self, name, *more))[1]
    )
    assert command(monkeypatch, *arguments) == 0
    assert added == ["block-00001"], "the first block is not quantized again"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_dry_run_writes_nothing_reads_no_weight_and_predicts_the_size(tiny_model, tmp_path, monkeypatch, capsys):
    from llmquant.checkpoints import reader

    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", *FEW, "--skip", "*.o_proj"]

    def read(*arguments):
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_tensor", read)
        patch.setattr(reader, "tensor_chunks", read)
        assert command(monkeypatch, *arguments, "--dry-run", "--json") == 0
        planned = json.loads(capsys.readouterr().out)
        assert command(monkeypatch, *arguments, "--dry-run") == 0
        text = " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []
    assert "calibration python-docs, 4 x 32 tokens rows: 79, of which 0 without text, 1 repeated; tokens: " in text
    account = planned["calibration"]
    assert f"tokens: {account['num_tokens_available']:,}, windows: {account['num_windows_available']:,}, " in text
    assert "in 16 bit --skip '*.o_proj': 2 x self_attn.o_proj" in text
    assert "group size 128 -> 32, the largest that divides the in_features of all linears (64, 96)" in text
    assert command(monkeypatch, *arguments, "--json", "--quiet") == 0
    done = json.loads(capsys.readouterr().out)
    assert planned["bits_per_weight"] == done["bits_per_weight"]
    assert account == done["calibration"]
    # The file has a header, too.
    assert 0 <= done["output_bytes"] - planned["output_bytes"] < 10_000
    assert {linear["name"] for linear in planned["linears"] if linear["spec"]} == {x["name"] for x in done["linears"]}


def hub_of(rows: list[str], requested: list[int | None]) -> Callable[..., list[str]]:
    """Return a replacement of `_hub_rows` that gives these rows and appends each requested number of rows."""

    def hub_rows(name: str, split: str, max_rows: int | None = None) -> list[str]:
        requested.append(max_rows)
        return rows[:max_rows]

    return hub_rows


@pytest.mark.slow
@pytest.mark.parametrize(("given", "source"), [((), "c4"), (("--calibration", "ptb"), "ptb")])
def test_dry_run_fetches_one_row_of_a_text_of_the_hub(given, source, tiny_model, tmp_path, monkeypatch, capsys):
    from llmquant.data import sources as textdata

    requested: list[int | None] = []
    monkeypatch.setattr(textdata, "_hub_rows", hub_of(["some words"] * 50, requested))
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--dry-run", "--seq-len", "64", *given]
    assert command(monkeypatch, *arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"calibration {source}, 128 x 64 tokens the first row was fetched from the Hugging Face hub; the run fetches"
        in text
    )
    assert requested == [1]
    assert command(monkeypatch, *arguments, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["calibration"] == {"source": source, "num_samples": 128, "seq_len": 64}


@pytest.mark.slow
def test_a_substituted_calibration_text_is_reported_by_the_dry_run_and_at_the_start(
    tiny_model, tmp_path, monkeypatch, capsys
):
    few = ("--samples", "4", "--seq-len", "32", "--group-size", "32", "--effort", "fast", "--no-verify")
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", *few]
    reason = "calibrated on python-docs, because c4 cannot be read from the Hugging Face hub ("
    with short_manual():
        assert command(monkeypatch, *arguments, "--dry-run") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "calibration python-docs, 4 x 32 tokens rows: " in text
        assert reason in text
        assert command(monkeypatch, *arguments) == 0
        lines = capsys.readouterr().err.splitlines()
        start = lines.index("calibration text: python-docs, 4 x 32 tokens")
        assert lines[start + 2].startswith(f"calibration text: {reason}")
        assert lines[start + 3] == "hashing the checkpoint"
        assert command(monkeypatch, *arguments, "--overwrite", "--quiet", "--strict") == 1
        assert capsys.readouterr().err == "llmquant: --strict: 1 fallbacks\n"


@pytest.mark.slow
def test_row_counts_of_a_hub_data_set_are_printed_at_the_start(tiny_model, tmp_path, monkeypatch, capsys):
    from llmquant.data import sources as textdata

    monkeypatch.setattr(textdata, "_hub_rows", hub_of([*(f"some words, row {n}" for n in range(200)), " "], []))
    few = ("--samples", "4", "--seq-len", "32", "--group-size", "32", "--effort", "fast", "--no-verify")
    assert command(monkeypatch, "quantize", tiny_model("llama"), tmp_path / "out", *few) == 0
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("calibration text: c4, 4 x 32 tokens")
    assert lines[start + 1].startswith("calibration text: rows: 201, of which 1 without text, 0 repeated; tokens: ")
    assert lines[start + 2] == "hashing the checkpoint"


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_prints_the_tokens_of_transformers(small, monkeypatch, capsys):
    from transformers import AutoTokenizer

    model, tokenizer = llmquant.load(small, device="cpu"), AutoTokenizer.from_pretrained(small)
    tokens = tokenizer("for x in", return_tensors="pt")
    expected = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    arguments = ["generate", small, "--prompt", "for x in", "--max-new-tokens", "12", "--greedy", "--device", "cpu"]
    assert command(monkeypatch, *arguments) == 0
    streams = capsys.readouterr()
    assert streams.out == text + "\n"
    assert streams.err.startswith(f"prefill {tokens['input_ids'].shape[1]} tokens, ")
    assert "; decode 12 tokens, " in streams.err
    assert command(monkeypatch, *arguments, "--quiet", "--json") == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    printed = json.loads(streams.out)
    assert printed["prompts"] == ["for x in"]
    assert printed["batches"][0]["texts"] == [text]
    assert printed["batches"][0]["num_new_tokens"] == 12


def test_a_prompt_has_the_same_output_alone_and_in_a_batch(small, tmp_path, monkeypatch, capsys):
    prompts = ["for", "The statement is evaluated", "x"]
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\r\n\r\n".join(prompts) + "\r\n", encoding="utf-8")
    alone = []
    options = ["--max-new-tokens", "8", "--greedy", "--device", "cpu", "--quiet", "--json", "--dtype", "float32"]
    for prompt in prompts:
        assert command(monkeypatch, "generate", small, "--prompt", prompt, *options) == 0
        alone += json.loads(capsys.readouterr().out)["batches"][0]["texts"]
    for size, num_batches in ((8, 1), (2, 2)):
        arguments = ["generate", small, "--prompts", tmp_path / "prompts.txt", "--batch-size", size, *options]
        assert command(monkeypatch, *arguments) == 0
        batches = json.loads(capsys.readouterr().out)["batches"]
        assert len(batches) == num_batches
        assert [text for batch in batches for text in batch["texts"]] == alone


def test_the_seed_determines_the_sampled_text(small):
    from transformers import AutoTokenizer

    model, tokenizer = llmquant.load(small, device="cpu"), AutoTokenizer.from_pretrained(small)
    state = torch.random.get_rng_state()

    def text(**options: object) -> str:
        return generate(model, tokenizer, ["for x in"], SamplingParams(max_new_tokens=16, **options)).texts[0]  # type: ignore[arg-type]

    assert text(temperature=2.0, seed=1) == text(temperature=2.0, seed=1) != text(temperature=2.0, seed=2)
    assert text(temperature=0.0) == text(greedy=True) == text(top_k=1)
    assert torch.equal(state, torch.random.get_rng_state()), "the random state of the caller is unchanged"


def test_chat_applies_the_template(small):
    from transformers import AutoTokenizer

    model, tokenizer = llmquant.load(small, device="cpu"), AutoTokenizer.from_pretrained(small)
    greedy = SamplingParams(max_new_tokens=8, greedy=True)
    chat = generate(model, tokenizer, ["hello"], greedy, chat=True)
    assert chat.texts == generate(model, tokenizer, ["user: hello\nassistant: "], greedy).texts
    tokenizer.chat_template = None
    with pytest.raises(llmquant.UserError, match="no chat template"):
        generate(model, tokenizer, ["hello"], greedy, chat=True)


def test_generation_stops_at_any_end_token(small):
    from transformers import AutoTokenizer

    model, tokenizer = llmquant.load(small, device="cpu"), AutoTokenizer.from_pretrained(small)
    whole = generate(model, tokenizer, ["for", "x"], SamplingParams(max_new_tokens=8, greedy=True))
    tokens = model.generate(**tokenizer("for", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    model.generation_config.eos_token_id = [tokens[-6].item(), tokens[-5].item()]
    cut = generate(model, tokenizer, ["for", "x"], SamplingParams(max_new_tokens=8, greedy=True))
    assert whole.num_new_tokens == 16
    assert cut.num_new_tokens < 16
    assert whole.texts[0].startswith(cut.texts[0])


# --- inspect and verify ----------------------------------------------------------------------------------------------


def test_inspect_accounts_for_every_byte(small, tiny_model):
    for folder in (small, tiny_model("gpt2"), tiny_model("qwen2")):
        contents = inspect(folder)
        assert contents.total_bytes == CheckpointReader(folder).total_bytes
    contents = inspect(small)
    rows = {row.kind: row for row in contents.quantized}
    assert "self_attn.o_proj" not in rows
    up = rows["mlp.up_proj"]
    assert (up.count, up.shape, up.storage, up.weights) == (2, (96, 64), "4-bit g32 sym", 2 * 96 * 64)
    # gptq: a code, a 16-bit scale and a 4-bit zero-point for 32 weights, and the group index of each column.
    assert up.bits_per_weight == pytest.approx(4 + (16 + 4) / 32 + 32 / 96)
    assert {row.kind for row in contents.unquantized} >= {"model.embed_tokens", "self_attn.o_proj", "norms, biases"}
    assert inspect(tiny_model("llama")).format is None


def test_inspect_reads_no_weight(small, monkeypatch, capsys):
    from llmquant.checkpoints import reader

    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(reader, "read_tensor", read)
    assert command(monkeypatch, "inspect", small, "--backends", "--device", "cpu") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "mlp.up_proj 2 96 x 64 4-bit g32 sym" in text
    assert "format gptq" in text


def test_inspect_reports_the_backends_that_load_chooses(small, monkeypatch, capsys):
    from llmquant.runtime.linear import QuantizedLinear

    assert command(monkeypatch, "inspect", small, "--backends", "--device", "cpu", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] == "gptq"
    model = llmquant.load(small, device="cpu")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears.keys() == printed["backends"].keys()
    for name, choice in printed["backends"].items():
        assert choice["backend"] == linears[name].backend_name
        assert choice["reason"] == linears[name].backend_reason
        assert set(choice["refusals"]) < set(BACKENDS)


def test_verify_reports_changed_and_missing_files(small, tmp_path, monkeypatch, capsys):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(small, out)
    assert command(monkeypatch, "verify", out) == 0
    assert capsys.readouterr().out.endswith("files, all unchanged\n")
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    (out / "tokenizer.json").unlink()
    assert command(monkeypatch, "verify", out) == 1
    assert set(capsys.readouterr().out.splitlines()) == {
        "model.safetensors: content changed",
        "tokenizer.json: missing",
    }
    assert command(monkeypatch, "verify", out, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


# --- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_llmquant_loads_no_torch_and_its_names_are_the_functions():
    code = (
        "import sys, llmquant\n"
        "assert set(llmquant.__all__) <= set(dir(llmquant))\n"
        "llmquant.Recipe(); llmquant.UserError\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "from llmquant.pipeline.quantize import quantize\n"
        "from llmquant.runtime.load import load\n"
        "assert llmquant.quantize is quantize and llmquant.load is load\n"
        "try: llmquant.nonesuch\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'llmquant' has no attribute 'nonesuch'\n"


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.7.self_attn.q_proj", "self_attn.q_proj", 7),
        ("transformer.h.0.attn.c_attn", "attn.c_attn", 0),
        ("model.layers.3.mlp.experts.12.up_proj", "mlp.experts.*.up_proj", 3),
        ("lm_head", "lm_head", None),
    ],
)
def test_kind_is_the_name_without_block_and_expert_numbers(name, kind, block):
    assert (kind_of(name), block_of(name)) == (kind, block)
