"""How the weights of an original are stored: plain tensors are accepted, and anything else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import command
from malformed_files import edit_json
from model_folders import WEIGHTS, edit_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoints.quantized import parsed_quantization, storage_notes
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.summary import inspect
from llmquant.conversion import convert
from llmquant.errors import UserError
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.runtime.load import load
from llmquant.spec import Options, QuantSpec, Recipe

RTN = Recipe(method="rtn", spec=QuantSpec(group_size=32))
QUICK = Options(verify=False)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tiny_model, tmp_path: Path) -> Path:
    """A plain bfloat16 checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))


# --- tensors outside the model ---------------------------------------------------------------------------------------


def test_buffers_outside_the_model_are_copied_and_not_checked(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model("gpt_neox", dtype=torch.float16), tmp_path / "model"))
    extra = {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9).half(),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        "mtp.fc.weight": torch.full((3, 3), torch.nan).half(),
    }
    edit_tensors(model, lambda tensors: tensors.update(extra))
    report = quantize(model, tmp_path / "out", RTN, QUICK)
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name].nan_to_num(), tensor.nan_to_num())
    (note,) = report.notes
    assert note.what.startswith("3 tensors ('gpt_neox.layers.0.attention.bias', …) not part of the model")


@pytest.mark.slow
def test_parameters_are_checked_for_inf_and_buffers_for_nan(tiny_model, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    # The shared model must be saved before the class is changed.
    model = Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))
    original = LlamaRMSNorm.__init__

    def with_buffer(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.register_buffer("mask", torch.zeros(2))

    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_buffer)
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.tensor([-torch.inf, 0]).bfloat16()}))
    assert quantize(model, tmp_path / "out", RTN, QUICK).notes == ()
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.tensor([torch.nan, 0]).bfloat16()}))
    with pytest.raises(UserError, match=r"'model\.norm\.mask' holds NaN"):
        quantize(model, tmp_path / "other", RTN, QUICK)
    edit_tensors(model, lambda t: t.update({"model.norm.mask": torch.zeros(2).bfloat16()}))
    edit_tensors(model, lambda t: t["model.norm.weight"].__setitem__(0, torch.inf))
    with pytest.raises(UserError, match=r"'model\.norm\.weight' holds NaN or inf"):
        quantize(model, tmp_path / "other", RTN, QUICK)


# --- how weights are stored ------------------------------------------------------------------------------------------

BYTES, FP8 = torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 8).to(torch.float8_e4m3fn)
UNSUPPORTED_STORAGE: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "fp8 without scales": ("FP8", f"{Q_PROJ}.weight", {f"{Q_PROJ}.weight": FP8}),
    "fp8 e5m2": ("FP8", f"{Q_PROJ}.weight", {f"{Q_PROJ}.weight": torch.zeros(8, 8).to(torch.float8_e5m2)}),
    "fp8 blocks": (
        "FP8",
        f"{Q_PROJ}.weight",
        {f"{Q_PROJ}.weight": FP8, f"{Q_PROJ}.weight_scale_inv": torch.ones(1, 1)},
    ),
    "fp8 experts": ("FP8", "mlp.experts.gate_up_proj", {"mlp.experts.gate_up_proj": FP8[None]}),
    "mxfp8": ("FP8", f"{Q_PROJ}.weight", {f"{Q_PROJ}.weight": FP8, f"{Q_PROJ}.weight_scale": BYTES}),
    "cast without its scales": (
        "scales",
        f"{Q_PROJ}.weight_scale_inv",
        {f"{Q_PROJ}.weight": torch.ones(8, 8).bfloat16(), f"{Q_PROJ}.weight_scale_inv": torch.ones(1, 1)},
    ),
    "scales beside plain weights": (
        "scales",
        f"{Q_PROJ}.weight_scale",
        {f"{Q_PROJ}.weight": torch.ones(8, 8).bfloat16(), f"{Q_PROJ}.weight_scale": torch.ones(8, 1)},
    ),
    "gpt-oss": (
        "MXFP4",
        "mlp.experts.down_proj_blocks",
        {"mlp.experts.down_proj_blocks": BYTES, "mlp.experts.down_proj_scales": BYTES.clone()},
    ),
    "mxfp4 of compressed-tensors": (
        "MXFP4",
        f"{Q_PROJ}.weight_packed",
        {f"{Q_PROJ}.weight_packed": BYTES, f"{Q_PROJ}.weight_scale": BYTES.clone()},
    ),
    "nvfp4 of compressed-tensors": (
        "NVFP4",
        f"{Q_PROJ}.weight_packed",
        {
            f"{Q_PROJ}.weight_packed": BYTES,
            f"{Q_PROJ}.weight_scale": FP8,
            f"{Q_PROJ}.weight_global_scale": torch.ones(1),
        },
    ),
    "nvfp4 of modelopt": (
        "NVFP4",
        f"{Q_PROJ}.weight",
        {f"{Q_PROJ}.weight": BYTES, f"{Q_PROJ}.weight_scale": FP8, f"{Q_PROJ}.weight_scale_2": torch.ones(())},
    ),
    "bitsandbytes nf4": (
        "bitsandbytes",
        f"{Q_PROJ}.weight.absmax",
        {f"{Q_PROJ}.weight": BYTES.reshape(-1, 1), f"{Q_PROJ}.weight.absmax": torch.ones(2)},
    ),
    "bitsandbytes int8": (
        "bitsandbytes",
        f"{Q_PROJ}.SCB",
        {f"{Q_PROJ}.weight": BYTES.to(torch.int8), f"{Q_PROJ}.SCB": torch.ones(8)},
    ),
    "mlx": (
        "MLX",
        f"{Q_PROJ}.weight",
        {f"{Q_PROJ}.weight": BYTES.to(torch.uint32), f"{Q_PROJ}.scales": torch.ones(8, 1).half()},
    ),
    "hqq": ("HQQ", f"{Q_PROJ}.W_q", {f"{Q_PROJ}.W_q": BYTES, f"{Q_PROJ}.scale": torch.ones(8, 1)}),
    "aqlm": (
        "codebook",
        f"{Q_PROJ}.codes",
        {f"{Q_PROJ}.codes": BYTES.to(torch.int8), f"{Q_PROJ}.codebooks": torch.ones(1, 2)},
    ),
    "torchao": ("torchao", f"{Q_PROJ}._weight_qdata", {f"{Q_PROJ}._weight_qdata": BYTES.to(torch.int8)}),
    "int8": ("integer", f"{Q_PROJ}.weight", {f"{Q_PROJ}.weight": BYTES.to(torch.int8)}),
    "boolean": ("integer", f"{Q_PROJ}.weight", {f"{Q_PROJ}.weight": torch.ones(8, 8, dtype=torch.bool)}),
}


@pytest.mark.parametrize(("kind", "tensor", "tensors"), UNSUPPORTED_STORAGE.values(), ids=UNSUPPORTED_STORAGE)
@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}])
def test_unsupported_storage_is_refused_by_name(tmp_path, kind, tensor, tensors, config):
    save_file(tensors | {"lm_head.weight": torch.ones(4, 4)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        parsed_quantization(CheckpointReader(tmp_path))
    assert f"holds {kind}" in str(error.value) and f"('{tensor}', " in str(error.value)
    assert str(error.value).endswith("give the model's checkpoint in 16 bits") and "\n" not in str(error.value)


def test_plain_tensors_of_any_name_and_dtype_are_not_mistaken_for_quantized_ones(tmp_path):
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


COMMAND_LINES = {
    "quantize": ("quantize", "MODEL", "OUT", "--method", "rtn"),
    "dry run": ("quantize", "MODEL", "OUT", "--method", "rtn", "--dry-run"),
    "generate": ("generate", "MODEL", "--prompt", "x"),
    "eval": ("eval", "MODEL", "--dataset", "python-docs"),
    "bench": ("bench", "MODEL"),
    "convert": ("convert", "MODEL", "OUT", "--format", "dense"),
    "inspect": ("inspect", "MODEL"),
}


@pytest.mark.parametrize("arguments", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_every_command_refuses_fp8_in_one_line(model, monkeypatch, capsys, arguments):
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


@pytest.mark.slow
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
def test_a_quantization_config_beside_plain_weights_is_ignored_and_noted(model, stale):
    edit_json(model / "config.json", lambda c: c.update(quantization_config=stale, compression_config=stale or None))
    out = model.parent / "out"
    report = quantize(model, out, RTN, QUICK)
    notes = [note.what for note in report.notes]
    assert notes == list(storage_notes(CheckpointReader(model)))
    if stale:
        method = stale["quant_method"]
        assert notes[0].startswith(
            f"config.json describes a quantization (quant_method '{method}'), but the weights are"
        )
    else:
        assert not notes
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and "compression_config" not in config
    assert load(model).config.model_type == "llama" and load(out).config.model_type == "llama"


@pytest.mark.slow
def test_eval_notes_a_quantization_config_that_it_ignores(model, monkeypatch, capsys):
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
def test_scales_and_tensor_names_of_the_format_beside_plain_weights_are_refused(
    model, suffix, format, message, monkeypatch, capsys
):
    edit_tensors(model, lambda tensors: tensors.update({f"{Q_PROJ}.{suffix}": torch.ones(2, 2)}))
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
        assert f"'{Q_PROJ}.{suffix}' is not part of the model, and" in line and message in line


def test_packed_weights_without_a_configuration_are_refused(model):
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


def test_an_unknown_quant_method_is_named_if_weights_are_missing(model):
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
def test_a_quantization_config_that_is_not_an_object_is_refused(model, value):
    edit_json(model / "config.json", lambda config: config.update(quantization_config=value))
    with pytest.raises(UserError, match=r"config\.json: quantization_config .*; must be an object"):
        CheckpointReader(model)
