"""Which files and tensors of a folder are read, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from malformed_files import INDEX, SHARDS, edit_json
from model_folders import WEIGHTS, edit_tensors, split_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.summary import inspect
from llmquant.conversion import convert
from llmquant.errors import UserError
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load
from llmquant.spec import Options, QuantSpec, Recipe

RTN = Recipe(method="rtn", spec=QuantSpec(group_size=32))
QUICK = Options(verify=False)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tiny_model, tmp_path: Path) -> Path:
    """A plain bfloat16 checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))


# --- index and shards ------------------------------------------------------------------------------------------------


def test_the_index_decides_which_tensors_are_read(model, tmp_path):
    original = load_file(model / WEIGHTS)
    first = sorted(original)[0]
    split_into_shards(
        model,
        extra={"mtp.fc.weight": torch.full((4, 4), torch.nan), first: torch.full_like(original[first], torch.nan)},
        index={"model.rotary_emb.inv_freq": SHARDS[0]},
    )
    reader = CheckpointReader(model)
    assert set(reader.tensors) == set(original) and torch.equal(reader.read(first), original[first])
    assert reader.notes == (
        f"1 tensor ('mtp.fc.weight') stored, but not listed in {INDEX}: not read",
        f"1 tensor ('{first}') stored twice: read from where {INDEX} says",
        f"1 tensor ('model.rotary_emb.inv_freq') listed in {INDEX}, but stored nowhere",
    )
    report = quantize(model, tmp_path / "out", RTN, QUICK)
    assert [note.what for note in report.notes] == list(reader.notes)
    assert not any(name.startswith("mtp") for name in load_file(tmp_path / "out" / WEIGHTS))


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"model.norm.weight": None}, f"{SHARDS[1]} holds it, but {INDEX} does not list it"),
        ({"model.norm.weight": SHARDS[0]}, f"holds 'model.norm.weight', but {INDEX} says {SHARDS[0]}"),
    ],
)
def test_a_needed_tensor_must_be_in_the_shard_that_the_index_names(model, index, why):
    split_into_shards(model, index=index)
    with pytest.raises(UserError, match=why):
        dry_run(model, model.parent / "out", RTN, QUICK)
    with pytest.raises(UserError, match=why):
        load(model)


def test_a_needed_tensor_that_no_shard_holds_is_named(model):
    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    split_into_shards(model, index={"model.norm.weight": SHARDS[1]})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' .*says that it lies in .*, which does not hold it"):
        dry_run(model, model.parent / "out", RTN, QUICK)


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_single_weight_file_is_read_under_any_name(model):
    (model / WEIGHTS).rename(model / "model.fp16.safetensors")
    report = quantize(model, model.parent / "out", RTN, QUICK)
    (note,) = report.notes
    assert note.what == f"read from model.fp16.safetensors, the only safetensors file: there is no {WEIGHTS}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "weights", "old_config", "changes"),
    [
        ("gptq", "gptq_model-4bit-32g.safetensors", "quantize_config.json", {"quant_method": None, "meta": None}),
        (
            "awq",
            "awq_model_w4_g32.safetensors",
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
    ],
)
def test_checkpoints_of_old_tools_are_recognized(model, format, weights, old_config, changes):
    out = model.parent / "out"
    quantize(model, out, RTN, Options(verify=False, format=format))
    new = dense_weights(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    old = {name: value for name, value in config.items() if format == "gptq"} | changes
    (out / "quantize_config.json").unlink(missing_ok=True)
    edit_json(out / "config.json", lambda config: config.pop("quantization_config"))
    edit_json(out / old_config, lambda config: config.update({k: v for k, v in old.items() if v is not None}))
    (out / WEIGHTS).rename(out / weights)
    for name, weight in dense_weights(out).items():
        assert torch.equal(new[name], weight), name
    assert inspect(out).format == format
    assert inspect(out).notes == (f"read from {weights}, the only safetensors file: there is no {WEIGHTS}",)
    assert convert(out, model.parent / "dense", "dense").num_linears == 14
    with pytest.raises(UserError, match=f"already quantized \\(quant_method '{format}'\\)"):
        dry_run(out, model.parent / "again", RTN, QUICK)
    (out / old_config).write_text("{}")
    with pytest.raises(UserError, match=f"{old_config}: quantization_config .{format}.: "):
        inspect(out)


def dense_weights(folder: Path) -> dict[str, Tensor]:
    """Return the dequantized weights of all packed linears of the loaded model."""
    modules = load(folder).named_modules()
    dense = {name: module.dequantize() for name, module in modules if isinstance(module, QuantizedLinear)}
    assert len(dense) == 14
    return dense


def rename_weights(*names: str) -> Callable[[Path], None]:
    """Return a function that replaces the weights by copies under other names."""

    def change(folder: Path) -> None:
        for name in names:
            shutil.copy(folder / WEIGHTS, folder / name)
        (folder / WEIGHTS).unlink()

    return change


def as_adapter(*, config: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rename_weights("adapter_model.safetensors")(folder)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
        (folder / "training_args.bin").write_bytes(b"x")
        if not config:
            (folder / "config.json").unlink()

    return change


def as_variant(folder: Path) -> None:
    split_into_shards(folder)
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")


UNCLEAR_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "two files": (
        rename_weights("a.safetensors", "b.safetensors"),
        "2 safetensors files (a.safetensors, b.safetensors, …), but no",
    ),
    "one of several files": (
        rename_weights("model-00001-of-00003.safetensors"),
        "only model-00001-of-00003.safetensors, one file of 3",
    ),
    "the index of a variant": (as_variant, "only model.safetensors.index.fp16.json, the index of a variant"),
    "gguf": (rename_weights("model-q4_k.gguf"), "only model-q4_k.gguf, a GGUF file"),
    "an adapter": (
        as_adapter(config=False),
        "a LoRA adapter of some/base, without the weights of its base model; merge it",
    ),
    "an adapter with a config": (as_adapter(config=True), "a LoRA adapter of some/base, without the weights"),
}


@pytest.mark.parametrize(("change", "message"), UNCLEAR_FOLDERS.values(), ids=UNCLEAR_FOLDERS)
def test_folders_without_clear_weights_are_refused(model, change, message):
    change(model)
    with pytest.raises(UserError) as error:
        CheckpointReader(model)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_index_under_another_name_is_read(model):
    names = set(load_file(model / WEIGHTS))
    split_into_shards(model)
    (model / INDEX).rename(model / "gptq_model-4bit-128g.safetensors.index.json")
    reader = CheckpointReader(model)
    assert set(reader.tensors) == names
    assert reader.notes == (f"read by gptq_model-4bit-128g.safetensors.index.json: there is no {INDEX}",)


def test_an_adapter_beside_the_weights_is_noted(model):
    save_file({"x.lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors")
    assert CheckpointReader(model).notes == (
        "the adapter adapter_model.safetensors beside the weights is not merged into them: it is not used",
    )


# --- names of training wrappers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapped", "removed"),
    [
        (lambda name: f"module.{name}", "module."),
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: name.replace("self_attn.", "_orig_mod.self_attn."), "_orig_mod."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: f"module._orig_mod.{name}", "_orig_mod.' and 'module."),
        (lambda name: f"model.{name}", "model."),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_wrapper_names_are_removed_and_noted(model, wrapped, removed, sharded):
    plain, out = model.parent / "plain", model.parent / "out"
    quantize(model, plain, RTN, QUICK)

    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[wrapped(name)] = tensors.pop(name)

    edit_tensors(model, wrap)
    if sharded:
        split_into_shards(model)
    (note,) = quantize(model, out, RTN, QUICK).notes
    assert note.what == f"names of tensors are read without '{removed}', which a training wrapper added to them"
    assert (out / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert load(model).config.model_type == "llama"


def test_a_prefix_that_only_some_names_have_is_kept(model):
    edit_tensors(model, lambda tensors: tensors.update({"module.extra": torch.ones(2)}))
    assert "module.extra" in CheckpointReader(model).tensors


def test_two_tensors_of_one_name_without_wrappers_are_refused(model):
    edit_tensors(model, lambda tensors: tensors.update({"model._orig_mod.norm.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"two tensors would be called 'model\.norm\.weight' without '_orig_mod\.'"):
        CheckpointReader(model)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("renames", [False, True])
def test_unmerged_lora_weights_are_refused(model, prefix, renames):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_A.default.weight"] = torch.ones(8, 64)
        tensors[f"{Q_PROJ}.lora_B.default.weight"] = torch.ones(64, 8)
        if renames:
            tensors[f"{Q_PROJ}.base_layer.weight"] = tensors.pop(f"{Q_PROJ}.weight")
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit_tensors(model, add)
    for use in (load, lambda path: dry_run(path, model.parent / "out", RTN, QUICK)):
        with pytest.raises(UserError, match=r"q_proj\.(lora_A|base_layer)\S+ belongs to an adapter that is not merged"):
            use(model)
