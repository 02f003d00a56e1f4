"""What is accepted as an original: which files are read, which tensors count, and what is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import command
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoints.quantized import parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.pipeline.convert import convert
from llmquant.pipeline.inspect import inspect
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load
from llmquant.spec import Options, QuantSpec, Recipe

RTN = Recipe(method="rtn", spec=QuantSpec(group_size=32))
QUICK = Options(verify=False)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tiny_model, tmp_path: Path) -> Path:
    """A plain bfloat16 checkpoint that may be changed."""
    return Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def into_shards(folder: Path, *, extra: dict[str, Tensor] | None = None, index: dict[str, str | None] | None = None):
    """The checkpoint in two files. extra: tensors that the second holds too. index: changes of the weight map."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {name: tensors[name] for name in names[:10]}, {name: tensors[name] for name in names[10:]}
    weight_map = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    for name, file in (index or {}).items():
        weight_map.pop(name, None)
        if file is not None:
            weight_map[name] = file
    save_file(halves[0], folder / SHARDS[0])
    save_file(halves[1] | (extra or {}), folder / SHARDS[1])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


# --- index and shards ------------------------------------------------------------------------------------------------


def test_the_index_decides_which_tensors_there_are(model: Path, tmp_path: Path) -> None:
    original = load_file(model / WEIGHTS)
    first = sorted(original)[0]
    into_shards(
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
    assert [remark.what for remark in report.remarks] == list(reader.notes)
    assert not any(name.startswith("mtp") for name in load_file(tmp_path / "out" / WEIGHTS))


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"model.norm.weight": None}, f"{SHARDS[1]} holds it, but {INDEX} does not list it"),
        ({"model.norm.weight": SHARDS[0]}, f"holds 'model.norm.weight', but {INDEX} says {SHARDS[0]}"),
    ],
)
def test_a_tensor_that_the_model_needs_must_be_where_the_index_says(model: Path, index: dict, why: str) -> None:
    into_shards(model, index=index)
    with pytest.raises(UserError, match=why):
        dry_run(model, model.parent / "out", RTN, QUICK)
    with pytest.raises(UserError, match=why):
        load(model)


def test_a_tensor_that_the_model_needs_and_no_shard_holds_is_named(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop("model.norm.weight"))
    into_shards(model, index={"model.norm.weight": SHARDS[1]})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' .*says that it lies in .*, which does not hold it"):
        dry_run(model, model.parent / "out", RTN, QUICK)


# --- tensors that the model does not have ----------------------------------------------------------------------------


def test_buffers_that_the_model_does_not_have_are_copied_and_not_checked(tiny_model, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("gpt_neox", dtype=torch.float16), tmp_path / "model"))
    strangers = {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9).half(),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "mtp.fc.weight": torch.full((3, 3), torch.nan).half(),
    }
    edit_tensors(model, lambda tensors: tensors.update(strangers))
    report = quantize(model, tmp_path / "out", RTN, QUICK)
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in strangers.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name].nan_to_num(), tensor.nan_to_num())
    (remark,) = report.remarks
    assert remark.what.startswith("3 tensors ('gpt_neox.layers.0.attention.bias', …) not part of the model")


def test_parameters_are_checked_for_inf_and_buffers_for_nan(tiny_model, tmp_path: Path, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    made = LlamaRMSNorm.__init__

    def with_buffer(self, *args, **kwargs) -> None:
        made(self, *args, **kwargs)
        self.register_buffer("mask", torch.zeros(2))

    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_buffer)
    model = Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.tensor([-torch.inf, 0]).bfloat16()}))
    assert quantize(model, tmp_path / "out", RTN, QUICK).remarks == ()
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.tensor([torch.nan, 0]).bfloat16()}))
    with pytest.raises(UserError, match=r"'model\.norm\.mask' holds NaN"):
        quantize(model, tmp_path / "other", RTN, QUICK)
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.zeros(2).bfloat16()}))
    edit_tensors(model, lambda t: t["model.norm.weight"].__setitem__(0, torch.inf))
    with pytest.raises(UserError, match=r"'model\.norm\.weight' holds NaN or inf"):
        quantize(model, tmp_path / "other", RTN, QUICK)


# --- how weights are stored ------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"
BYTES, FP8 = torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 8).to(torch.float8_e4m3fn)
OTHER_STORAGE: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "fp8 without scales": ("FP8", f"{Q}.weight", {f"{Q}.weight": FP8}),
    "fp8 e5m2": ("FP8", f"{Q}.weight", {f"{Q}.weight": torch.zeros(8, 8).to(torch.float8_e5m2)}),
    "fp8 blocks": ("FP8", f"{Q}.weight", {f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": torch.ones(1, 1)}),
    "fp8 experts": ("FP8", "mlp.experts.gate_up_proj", {"mlp.experts.gate_up_proj": FP8[None]}),
    "mxfp8": ("FP8", f"{Q}.weight", {f"{Q}.weight": FP8, f"{Q}.weight_scale": BYTES}),
    "cast without its scales": (
        "scales",
        f"{Q}.weight_scale_inv",
        {f"{Q}.weight": torch.ones(8, 8).bfloat16(), f"{Q}.weight_scale_inv": torch.ones(1, 1)},
    ),
    "scales beside plain weights": (
        "scales",
        f"{Q}.weight_scale",
        {f"{Q}.weight": torch.ones(8, 8).bfloat16(), f"{Q}.weight_scale": torch.ones(8, 1)},
    ),
    "gpt-oss": (
        "MXFP4",
        "mlp.experts.down_proj_blocks",
        {"mlp.experts.down_proj_blocks": BYTES, "mlp.experts.down_proj_scales": BYTES.clone()},
    ),
    "mxfp4 of compressed-tensors": (
        "MXFP4",
        f"{Q}.weight_packed",
        {f"{Q}.weight_packed": BYTES, f"{Q}.weight_scale": BYTES.clone()},
    ),
    "nvfp4 of compressed-tensors": (
        "NVFP4",
        f"{Q}.weight_packed",
        {f"{Q}.weight_packed": BYTES, f"{Q}.weight_scale": FP8, f"{Q}.weight_global_scale": torch.ones(1)},
    ),
    "nvfp4 of modelopt": (
        "NVFP4",
        f"{Q}.weight",
        {f"{Q}.weight": BYTES, f"{Q}.weight_scale": FP8, f"{Q}.weight_scale_2": torch.ones(())},
    ),
    "bitsandbytes nf4": (
        "bitsandbytes",
        f"{Q}.weight.absmax",
        {f"{Q}.weight": BYTES.reshape(-1, 1), f"{Q}.weight.absmax": torch.ones(2)},
    ),
    "bitsandbytes int8": ("bitsandbytes", f"{Q}.SCB", {f"{Q}.weight": BYTES.to(torch.int8), f"{Q}.SCB": torch.ones(8)}),
    "mlx": ("MLX", f"{Q}.weight", {f"{Q}.weight": BYTES.to(torch.uint32), f"{Q}.scales": torch.ones(8, 1).half()}),
    "hqq": ("HQQ", f"{Q}.W_q", {f"{Q}.W_q": BYTES, f"{Q}.scale": torch.ones(8, 1)}),
    "aqlm": ("codebook", f"{Q}.codes", {f"{Q}.codes": BYTES.to(torch.int8), f"{Q}.codebooks": torch.ones(1, 2)}),
    "torchao": ("torchao", f"{Q}._weight_qdata", {f"{Q}._weight_qdata": BYTES.to(torch.int8)}),
    "int8": ("integer", f"{Q}.weight", {f"{Q}.weight": BYTES.to(torch.int8)}),
    "boolean": ("integer", f"{Q}.weight", {f"{Q}.weight": torch.ones(8, 8, dtype=torch.bool)}),
}


@pytest.mark.parametrize(("kind", "tensor", "tensors"), OTHER_STORAGE.values(), ids=OTHER_STORAGE)
@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}])
def test_weights_that_nothing_decodes_are_refused_by_their_name(tmp_path, kind, tensor, tensors, config) -> None:
    save_file(tensors | {"lm_head.weight": torch.ones(4, 4)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        parsed_quantization(CheckpointReader(tmp_path))
    assert f"holds {kind}" in str(error.value) and f"('{tensor}', " in str(error.value)
    assert str(error.value).endswith("give the model's checkpoint in 16 bits") and "\n" not in str(error.value)


def test_plain_tensors_of_any_name_and_dtype_are_not_taken_for_quantized_ones(tmp_path: Path) -> None:
    plain = {
        "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e9),
        "embeddings.position_ids": torch.arange(8)[None],
        "h.0.norm.num_batches_tracked": torch.tensor(1),
        "h.0.attn.k_scale": torch.ones(1),
        "h.0.attn.q_proj.input_scale": torch.ones(1),
        "h.0.per_dim_scale": torch.ones(8),
        "h.0.router.scales": torch.ones(8, 1),
        "h.0.weight_scale": torch.ones(8),
        "h.0.attn.q_proj.weight": torch.ones(8, 8).half(),
    }
    save_file(plain, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    assert parsed_quantization(CheckpointReader(tmp_path)) is None


COMMANDS = {
    "quantize": ("quantize", "MODEL", "OUT", "--method", "rtn"),
    "dry run": ("quantize", "MODEL", "OUT", "--method", "rtn", "--dry-run"),
    "generate": ("generate", "MODEL", "--prompt", "x"),
    "eval": ("eval", "MODEL", "--dataset", "python-docs"),
    "bench": ("bench", "MODEL"),
    "convert": ("convert", "MODEL", "OUT", "--format", "dense"),
    "inspect": ("inspect", "MODEL"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_fp8_in_one_line(model: Path, monkeypatch, capsys, arguments) -> None:
    def to_fp8(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name]:
            tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    edit_tensors(model, to_fp8)
    out = model.parent / "out"
    names = {"MODEL": model, "OUT": out}
    assert command(monkeypatch, *(names.get(argument, argument) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "FP8 weights ('model.layers.0.mlp.down_proj.weight', float8_e4m3fn [64, 96])" in line
    assert not list(model.parent.glob("out*"))


@pytest.mark.parametrize(
    "stale",
    [
        {},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=lambda stale: stale.get("quant_method", "empty"),
)
def test_a_quantization_config_beside_plain_weights_is_ignored_and_told(model: Path, stale: dict) -> None:
    edit_json(model / "config.json", lambda c: c.update(quantization_config=stale, compression_config=stale or None))
    out = model.parent / "out"
    report = quantize(model, out, RTN, QUICK)
    told = [remark.what for remark in report.remarks]
    assert told == list(storage_notes(CheckpointReader(model)))
    if stale:
        method = stale["quant_method"]
        assert told[0].startswith(
            f"config.json describes a quantization (quant_method '{method}'), but the weights are"
        )
    else:
        assert not told
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and "compression_config" not in config
    assert load(model).config.model_type == "llama" and load(out).config.model_type == "llama"


def test_eval_names_what_it_ignores_in_a_checkpoint(model: Path, monkeypatch, capsys) -> None:
    edit_json(model / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    arguments = ("eval", model, "--dataset", "python-docs", "--windows", "1", "--seq-len", "32")
    assert command(monkeypatch, *arguments, "--json") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(
        f"{model}: config.json describes a quantization (quant_method 'bitsandbytes'), but the weights"
    )
    assert command(monkeypatch, *arguments) == 0
    assert "quant_method 'bitsandbytes'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("suffix", "format", "message"),
    [
        ("scales", "gptq", "its name says that weights are scaled or packed"),
        ("qzeros", "awq", "its name says that weights are scaled or packed"),
        ("scale_weight", "gptq", "its name says that weights are scaled or packed"),
        ("weight_scales", "gptq", "its name says that weights are scaled or packed"),
        ("weight_shape", "compressed-tensors", "the compressed-tensors format writes a tensor of that name"),
    ],
)
def test_scales_and_names_of_the_format_beside_plain_weights_are_refused(
    model: Path, suffix: str, format: str, message: str, monkeypatch, capsys
) -> None:
    edit_tensors(model, lambda tensors: tensors.update({f"{Q}.{suffix}": torch.ones(2, 2)}))
    for dry in ((), ("--dry-run",)):
        arguments = [
            "quantize",
            model,
            model.parent / "out",
            "--method",
            "rtn",
            "--group-size",
            "32",
            "--format",
            format,
        ]
        assert command(monkeypatch, *arguments, *dry) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmquant: ")]
        assert f"'{Q}.{suffix}' is not part of the model, and" in line and message in line


def test_packed_weights_without_a_configuration_are_refused(model: Path) -> None:
    out = model.parent / "out"
    quantize(model, out, RTN, QUICK)
    edit_json(out / "config.json", lambda config: config.pop("quantization_config"))
    (out / "quantize_config.json").unlink()
    for use in (load, inspect, lambda path: convert(path, model.parent / "dense", "dense")):
        with pytest.raises(
            UserError, match=r"q_proj\.\w+' is packed, but config.json has no quantization_config|qweight"
        ):
            use(out)
    with pytest.raises(UserError, match="already quantized"):
        dry_run(out, model.parent / "again", RTN, QUICK)


def test_a_quantization_that_is_not_known_is_named_where_weights_are_missing(model: Path) -> None:
    def hide(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace("weight", "magic")] = tensors.pop(name)

    edit_tensors(model, hide)
    edit_json(model / "config.json", lambda config: config.update(quantization_config={"quant_method": "magic"}))
    for use in (load, lambda path: dry_run(path, model.parent / "out", RTN, QUICK)):
        with pytest.raises(
            UserError, match=r"no tensor holds .*config\.json says .* \(quant_method 'magic'\), in a way"
        ):
            use(model)


@pytest.mark.parametrize("value", [["gptq"], "gptq", 4])
def test_a_quantization_config_that_is_no_object_is_refused(model: Path, value: object) -> None:
    edit_json(model / "config.json", lambda config: config.update(quantization_config=value))
    with pytest.raises(UserError, match=r"config\.json: quantization_config .*; must be an object"):
        CheckpointReader(model)


# --- which files -----------------------------------------------------------------------------------------------------


def test_weights_under_another_name_are_read_if_there_is_only_one_file(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model.fp16.safetensors")
    report = quantize(model, model.parent / "out", RTN, QUICK)
    (remark,) = report.remarks
    assert remark.what == f"read from model.fp16.safetensors, the only safetensors file: there is no {WEIGHTS}"


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
def test_downloads_of_old_tools_are_recognised(model: Path, format, weights, old_config, changes) -> None:
    out = model.parent / "out"
    quantize(model, out, RTN, Options(verify=False, format=format))
    new = dense_weights(out)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    old = {name: value for name, value in said.items() if format == "gptq"} | changes
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
    """The weights of all packed linears as the model runs them."""
    modules = load(folder).named_modules()
    dense = {name: module.dequantize() for name, module in modules if isinstance(module, QuantizedLinear)}
    assert len(dense) == 14
    return dense


def rename(*names: str) -> Callable[[Path], None]:
    """The weights as copies under other names."""

    def change(folder: Path) -> None:
        for name in names:
            shutil.copy(folder / WEIGHTS, folder / name)
        (folder / WEIGHTS).unlink()

    return change


def as_adapter(*, config: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rename("adapter_model.safetensors")(folder)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
        (folder / "training_args.bin").write_bytes(b"x")
        if not config:
            (folder / "config.json").unlink()

    return change


def as_variant(folder: Path) -> None:
    into_shards(folder)
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "two files": (
        rename("a.safetensors", "b.safetensors"),
        "2 safetensors files (a.safetensors, b.safetensors, …), but no",
    ),
    "one of several files": (
        rename("model-00001-of-00003.safetensors"),
        "only model-00001-of-00003.safetensors, one file of 3",
    ),
    "the index of a variant": (as_variant, "only model.safetensors.index.fp16.json, the index of a variant"),
    "gguf": (rename("model-q4_k.gguf"), "only model-q4_k.gguf, which is already quantized or of another tool"),
    "an adapter": (
        as_adapter(config=False),
        "a LoRA adapter of some/base, without the weights of its base model; merge it",
    ),
    "an adapter with a config": (as_adapter(config=True), "a LoRA adapter of some/base, without the weights"),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_folders_whose_weights_are_not_clear_are_refused(model: Path, change, message: str) -> None:
    change(model)
    with pytest.raises(UserError) as error:
        CheckpointReader(model)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_index_under_another_name_is_read(model: Path) -> None:
    names = set(load_file(model / WEIGHTS))
    into_shards(model)
    (model / INDEX).rename(model / "gptq_model-4bit-128g.safetensors.index.json")
    reader = CheckpointReader(model)
    assert set(reader.tensors) == names
    assert reader.notes == (f"read by gptq_model-4bit-128g.safetensors.index.json: there is no {INDEX}",)


def test_an_adapter_beside_the_weights_is_told(model: Path) -> None:
    save_file({"x.lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors")
    assert CheckpointReader(model).notes == (
        "the adapter adapter_model.safetensors beside the weights is not merged into them: it is not used",
    )


# --- names that wrappers leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "told"),
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
def test_names_of_wrappers_are_removed_and_told(model: Path, wrapped, told: str, sharded: bool) -> None:
    plain, out = model.parent / "plain", model.parent / "out"
    quantize(model, plain, RTN, QUICK)

    def wrap(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[wrapped(name)] = tensors.pop(name)

    edit_tensors(model, wrap)
    if sharded:
        into_shards(model)
    (remark,) = quantize(model, out, RTN, QUICK).remarks
    assert remark.what == f"names of tensors are read without '{told}', which a training wrapper added to them"
    assert (out / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert load(model).config.model_type == "llama"


def test_a_prefix_that_only_some_names_have_is_kept(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"module.extra": torch.ones(2)}))
    assert "module.extra" in CheckpointReader(model).tensors


def test_two_tensors_of_one_name_without_wrappers_are_refused(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model._orig_mod.norm.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"two tensors would be called 'model\.norm\.weight' without '_orig_mod\.'"):
        CheckpointReader(model)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("renames", [False, True])
def test_unmerged_lora_weights_are_refused(model: Path, prefix: str, renames: bool) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.lora_A.default.weight"] = torch.ones(8, 64)
        tensors[f"{Q}.lora_B.default.weight"] = torch.ones(64, 8)
        if renames:
            tensors[f"{Q}.base_layer.weight"] = tensors.pop(f"{Q}.weight")
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    edit_tensors(model, add)
    for use in (load, lambda path: dry_run(path, model.parent / "out", RTN, QUICK)):
        with pytest.raises(UserError, match=r"q_proj\.(lora_A|base_layer)\S+ belongs to an adapter that is not merged"):
            use(model)
