"""`llmquant convert` changes the format without rounding again, or refuses with a line that names the loss."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.checkpoints.manifest import MANIFEST_FILE, REPORT_FILES, verify_files
from llmquant.checkpoints.quantized import parsed_quantization, read_quantized, validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.conversion import convert
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.pipeline.quantize import quantize
from llmquant.spec import Options, Override, QuantSpec, Recipe
from llmquant.weight import QuantizedWeight

SYM, ASYM = QuantSpec(group_size=32), QuantSpec(group_size=32, symmetric=False)
NAMES = list(FORMATS)


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    """A function that returns a folder written by `quantize`. Tests share the folders and must not write into them."""
    folders: dict[object, Path] = {}

    def make(format: str, architecture: str = "llama", spec: QuantSpec = SYM, dtype=torch.float16, **recipe) -> Path:
        key = (format, architecture, spec, dtype, repr(recipe))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("quantized") / "out"
            model = tiny_model(architecture, dtype=dtype)
            quantize(
                model, folders[key], Recipe(method="rtn", spec=spec, **recipe), Options(format=format, verify=False)
            )
        return folders[key]

    return make


def assert_same(a: Path, b: Path) -> None:
    """Assert that two checkpoints have equal tensors, and equal other files except for the manifest and reports."""
    ignored = {MANIFEST_FILE, *REPORT_FILES}
    names = {file.name for file in a.iterdir()} - ignored
    assert names == {file.name for file in b.iterdir()} - ignored
    for name in names - {"model.safetensors"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    tensors, others = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [*itertools.pairwise([*NAMES, *NAMES[::-1]])])
def test_converting_equals_quantizing_to_the_format(source, target, quantized, tmp_path):
    recipe = {"skip": ("*.1.self_attn.o_proj",)}
    converted = convert(quantized(source, **recipe), tmp_path / "out", target)
    assert_same(tmp_path / "out", quantized(target, **recipe))
    assert verify_files(tmp_path / "out") == []
    assert (converted.source_format, converted.format, converted.num_linears) == (source, target, 13)
    assert converted.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize(("source", "target"), [("awq", "compressed-tensors"), ("compressed-tensors", "awq")])
def test_asymmetric_grids_of_transposed_and_renamed_linears_and_tied_heads(
    architecture, source, target, quantized, tmp_path
):
    convert(quantized(source, architecture, ASYM), tmp_path / "out", target)
    assert_same(tmp_path / "out", quantized(target, architecture, ASYM))


@pytest.mark.slow
def test_mixed_precision_and_a_quantized_head_are_kept(quantized, tmp_path):
    recipe = {"overrides": (Override(pattern="*.mlp.*", bits=8), Override(pattern="lm_head", bits=3))}
    convert(quantized("gptq", **recipe), tmp_path / "out", "compressed-tensors")
    assert_same(tmp_path / "out", quantized("compressed-tensors", **recipe))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dense_weights_are_dequantized_and_load_in_transformers(architecture, quantized, tmp_path):
    small = quantized("gptq", architecture)
    convert(small, tmp_path / "dense", "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    reader, stored = CheckpointReader(small), load_file(tmp_path / "dense" / "model.safetensors")
    for name, module in validate_quantized(reader).items():
        dense_NK = read_quantized(reader, module).dequantize(torch.float16)
        assert torch.equal(stored[f"{name}.weight"], dense_NK.T if architecture == "gpt2" else dense_NK)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        dense = model.float()(tokens).logits
        ours = llmquant.load(small, device="cpu", dtype="float32", backend="torch")(tokens).logits
    assert torch.allclose(dense, ours, atol=2e-3 * ours.abs().max().item())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_dense_in_another_dtype_casts_everything(quantized, tmp_path):
    convert(quantized("awq"), tmp_path / "dense", "dense", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense" / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


# --- checkpoints of other tools --------------------------------------------------------------------------------------


def rewrite(folder: Path, out: Path, edit, format: str, **config: object) -> Path:
    """Return a copy of a checkpoint with `edit(name, weight)` applied to its linears, packed like another tool."""
    reader = CheckpointReader(folder)
    modules = validate_quantized(reader)
    packed = {tensor for module in modules.values() for tensor in module.tensors.values()}
    tensors = {name: reader.read(name) for name in reader.tensors if name not in packed}
    specs = {}
    for name, module in modules.items():
        weight = edit(name, read_quantized(reader, module))
        specs[name] = weight.spec
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in FORMATS[format].pack(weight).items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    default = next(iter(specs.values()))
    quantization = FORMATS[format].config(default, specs | {"lm_head": None}) | config
    for file in folder.iterdir():
        if file.suffix == ".json" and file.name not in ("llmquant.json", "quantize_config.json"):
            (out / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(content))
    return out


def shuffled(name: str, weight: QuantizedWeight) -> QuantizedWeight:
    index_K = weight.group_of_column_K[torch.randperm(weight.in_features, generator=torch.Generator().manual_seed(0))]
    return replace(weight, group_index_K=index_K)


@pytest.mark.slow
def test_act_order_stays_in_gptq_and_is_refused_elsewhere(quantized, tmp_path):
    other = rewrite(quantized("gptq"), tmp_path / "other", shuffled, "gptq", desc_act=True)
    convert(other, tmp_path / "out", "gptq_v2")
    parsed = parsed_quantization(CheckpointReader(tmp_path / "out"))
    assert parsed.grid_of("model.layers.0.mlp.up_proj").act_order_groups
    before, after = CheckpointReader(other), CheckpointReader(tmp_path / "out")
    theirs, ours = validate_quantized(before), validate_quantized(after)
    assert theirs.keys() == ours.keys()
    assert all(read_quantized(before, theirs[n]).digest() == read_quantized(after, ours[n]).digest() for n in ours)
    for format, word in (("compressed-tensors", "weight_g_idx"), ("awq", "g_idx")):
        with pytest.raises(UserError, match=rf"down_proj: cannot be converted to {format} exactly: {word}: "):
            convert(other, tmp_path / format, format)
        assert not (tmp_path / format).exists() and not (tmp_path / f"{format}.partial").exists()
    convert(other, tmp_path / "dense", "dense")


@pytest.mark.slow
def test_a_weight_that_the_format_cannot_hold_is_refused_before_anything_is_written(quantized, tmp_path):
    def zero_zero(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        weight.zero_NG[0, 0] = 0
        return weight

    def fine_scales(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, scale_NG=(weight.scale_NG.float() * 2.0**-12).to(torch.bfloat16))

    asym = rewrite(quantized("gptq_v2", spec=ASYM), tmp_path / "asym", zero_zero, "gptq_v2")
    fine = rewrite(quantized("compressed-tensors"), tmp_path / "fine", fine_scales, "compressed-tensors")
    eight = quantized("gptq", spec=QuantSpec(bits=8, group_size=32))
    mixed = quantized("compressed-tensors", overrides=(Override(pattern="*.mlp.*", group_size=16),))
    cases = [
        (asym, "gptq", "down_proj: cannot be converted to gptq exactly: qzeros: a zero-point of 0 .* gptq_v2"),
        (fine, "awq", "down_proj: cannot be converted to awq exactly: scales: .* not exact in float16"),
        (eight, "awq", "bits 8: the AWQ format holds 4 bits only"),
        (mixed, "awq", "4-bit g16 sym beside 4-bit g32 sym: the AWQ format has one grid"),
    ]
    for source, format, message in cases:
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "out", format)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_scales_that_engines_would_round_are_noted(quantized, tmp_path):
    def float16_scales(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return replace(weight, scale_NG=(weight.scale_NG.float() * 1.0009765625).half())

    other = rewrite(quantized("awq", dtype=torch.bfloat16), tmp_path / "other", float16_scales, "awq")
    converted = convert(other, tmp_path / "out", "compressed-tensors")
    assert "scales that are not exact in bfloat16" in converted.notes[0]
    assert CheckpointReader(tmp_path / "out").info("model.layers.0.mlp.up_proj.weight_scale").dtype == torch.float16


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_conversion_is_continued_to_the_same_bytes(quantized, tmp_path, monkeypatch):
    source, add = quantized("gptq"), PartialCheckpoint.add_part
    convert(source, tmp_path / "whole", "awq")

    class Interrupted(Exception):
        pass

    def interrupt(self, name, *more):
        if name == "block-00001":
            raise Interrupted
        return add(self, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(PartialCheckpoint, "add_part", interrupt)
        with pytest.raises(Interrupted):
            convert(source, tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.conversion.read_quantized", None)  # refused before any linear is read
        with pytest.raises(UserError, match=r"convert was 'awq', is 'gptq_v2'.*--restart"):
            convert(source, tmp_path / "out", "gptq_v2")
    written = []
    monkeypatch.setattr(
        PartialCheckpoint, "add_part", lambda self, name, *more: (written.append(name), add(self, name, *more))
    )
    hashes, hashed = CheckpointReader.file_hashes, []
    monkeypatch.setattr(CheckpointReader, "file_hashes", lambda self: (hashed.append(self.path), hashes(self))[1])
    convert(source, tmp_path / "out", "awq")
    assert written == ["block-00001"] and hashed == [source], "the source is hashed once"
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_result_that_reads_back_differently_is_not_published(quantized, tmp_path, monkeypatch):
    from llmquant.checkpoints import writer

    good = writer._tensor_bytes

    def flip(tensor):
        content = bytearray(good(tensor))
        content[0] ^= 1
        return memoryview(content)

    source = quantized("gptq")
    monkeypatch.setattr(writer, "_tensor_bytes", flip)
    with pytest.raises(UserError, match="read back from the disk differs"):
        convert(source, tmp_path / "awq", "awq")
    with pytest.raises(UserError, match="read back from the disk differs"):
        convert(source, tmp_path / "dense", "dense")
    assert not (tmp_path / "awq").exists() and not (tmp_path / "dense").exists()


def test_the_manifest_includes_that_of_the_source(quantized, tmp_path):
    convert(quantized("gptq"), tmp_path / "out", "awq")
    manifest = json.loads((tmp_path / "out" / "llmquant.json").read_text())
    assert manifest["request"]["convert"] == "awq"
    assert manifest["source"]["request"]["recipe"]["method"] == "rtn"


def test_only_one_linear_at_a_time_is_held(quantized, tmp_path, monkeypatch):
    """The packed tensors of a block are held until they are written, but the weights of other linears are not."""
    alive: set[int] = set()
    most = 0
    from llmquant import conversion as module

    real = module.read_quantized

    def counted(reader, packed):
        nonlocal most
        import weakref

        weight = real(reader, packed)
        alive.add(id(weight.codes_NK))
        weakref.finalize(weight.codes_NK, alive.discard, id(weight.codes_NK))
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr(module, "read_quantized", counted)
    convert(quantized("gptq"), tmp_path / "out", "awq")
    assert most <= 2


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_result_of_the_function(quantized, tmp_path, monkeypatch, capsys):
    source = quantized("gptq")
    capsys.readouterr()
    assert command(monkeypatch, "convert", source, tmp_path / "a", "--format", "awq") == 0
    streams = capsys.readouterr()
    text = " ".join(streams.out.split())
    assert "format gptq -> awq" in text and "14 x 4-bit g32 sym: read back, equal" in text
    assert "converting 14/14" in streams.err
    assert command(monkeypatch, "convert", source, tmp_path / "b", "--format", "awq", "--quiet", "--json") == 0
    streams = capsys.readouterr()
    assert streams.err == "" and json.loads(streams.out)["grids"] == {"4-bit g32 sym": 14}
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "format 'gguf': not one of gptq, gptq_v2, awq, compressed-tensors, dense"),
        (["--format", "awq", "--dtype", "float16"], "dtype 'float16': only --format dense"),
        (["--format", "dense", "--dtype", "int8"], "dtype 'int8': not one of auto"),
    ],
)
def test_bad_arguments_are_a_one_line_error(arguments, message, quantized, tmp_path, monkeypatch, capsys):
    source = quantized("gptq")
    capsys.readouterr()
    assert command(monkeypatch, "convert", source, tmp_path / "out", *arguments, "--quiet") == 2
    assert capsys.readouterr().err.startswith(f"llmquant: {message}")


def test_a_source_that_is_not_quantized_and_an_existing_out_are_refused(quantized, tiny_model, tmp_path):
    with pytest.raises(UserError, match="not quantized, so there is nothing to convert"):
        convert(tiny_model("llama"), tmp_path / "out", "gptq")
    convert(quantized("gptq"), tmp_path / "out", "awq")
    with pytest.raises(UserError, match="add --overwrite"):
        convert(quantized("gptq"), tmp_path / "out", "gptq_v2")
    convert(quantized("gptq"), tmp_path / "out", "gptq_v2", overwrite=True)
    assert parsed_quantization(CheckpointReader(tmp_path / "out")).format.name == "gptq_v2"
