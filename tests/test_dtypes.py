"""Copied tensors keep their dtype and bytes, and models load in the same dtypes as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import command
from safetensors.torch import load_file, save_file
from short_text import short_manual
from tiny_models import random_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from llmquant.checkpoints.copies import check_copies, tensor_digest
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.writer import StreamedTensor
from llmquant.conversion import convert
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.humanize import dtype_name
from llmquant.models.skeleton import Skeleton, read_config
from llmquant.pipeline import finish
from llmquant.pipeline import quantize as pipeline
from llmquant.pipeline.output import verify_copies
from llmquant.pipeline.quantize import quantize
from llmquant.pipeline.verify import reopen
from llmquant.runtime.load import load
from llmquant.spec import EFFORTS, Options, QuantSpec, Recipe

SPEC = QuantSpec(group_size=32)
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32, verify=False)
WEIGHTS = "model.safetensors"
FLOAT32 = ("layernorm.weight", "model.norm.weight")


@pytest.fixture(autouse=True, scope="module")
def manual():
    """Use a short calibration text for every run in this module."""
    with short_manual():
        yield


@pytest.fixture
def mixed(tiny_model, tmp_path: Path) -> Path:
    """A bfloat16 checkpoint whose norms are float32 values that bfloat16 would round."""
    model = Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))
    tensors = load_file(model / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(FLOAT32):
            tensors[name] = tensor.float() + 1e-3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, model / WEIGHTS)
    return model


def recipe(method: str) -> Recipe:
    return Recipe(method=method, spec=SPEC, **EFFORTS["fast"])


def is_copied(name: str) -> bool:
    return "_proj" not in name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_copied_tensors_keep_their_dtype(mixed, tmp_path, method):
    original = load_file(mixed / WEIGHTS)
    plan = pipeline.checked_plan(mixed, tmp_path / "out", recipe(method), FEW)
    quantize(mixed, tmp_path / "out", recipe(method), FEW)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert plan.output_bytes == sum(tensor.nbytes for tensor in written.values())
    changed = set()
    for name in filter(is_copied, original):
        assert written[name].dtype == original[name].dtype, name
        if not torch.equal(written[name], original[name]):
            changed.add(name)
    assert all(name.endswith(FLOAT32) for name in changed) and bool(changed) == (method == "awq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and written["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16


@pytest.mark.slow
def test_folded_norms_in_float32_are_exact_in_the_dtype_of_the_model(mixed, tmp_path):
    original = load_file(mixed / WEIGHTS)
    quantize(mixed, tmp_path / "out", recipe("awq"), FEW)
    written = load_file(tmp_path / "out" / WEIGHTS)
    folded = [name for name in original if name.endswith("layernorm.weight")]
    scaled = torch.cat([written[name][written[name] != original[name]] for name in folded])
    assert len(scaled) > 50
    assert ((scaled.bfloat16().float() - scaled) / scaled).abs().max() < 1e-6


def test_the_dtype_option_applies_to_every_floating_point_tensor(mixed, tmp_path):
    options = Options(verify=False, dtype="bfloat16")
    plan = pipeline.checked_plan(mixed, tmp_path / "out", recipe("rtn"), options)
    report = quantize(mixed, tmp_path / "out", recipe("rtn"), options)
    original, written = load_file(mixed / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert plan.output_bytes == sum(tensor.nbytes for tensor in written.values())
    assert not report.fallbacks
    for name in filter(is_copied, original):
        assert torch.equal(written[name], original[name].bfloat16()), name


def test_values_that_overflow_the_dtype_option_are_refused(mixed, tmp_path):
    tensors = load_file(mixed / WEIGHTS)
    tensors["model.norm.weight"][3] = 1e6
    tensors["mtp.norm.weight"] = torch.tensor([1e6])
    save_file(tensors, mixed / WEIGHTS)
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has values up to 1e\+06, which float16 cannot hold"):
        quantize(mixed, tmp_path / "out", recipe("rtn"), Options(verify=False, dtype="float16"))
    tensors["model.norm.weight"][3] = 1
    save_file(tensors, mixed / WEIGHTS)
    quantize(mixed, tmp_path / "other", recipe("rtn"), Options(verify=False, dtype="float16"))
    assert load_file(tmp_path / "other" / WEIGHTS)["mtp.norm.weight"].item() == torch.inf, (
        "the model does not use this tensor, so it is not checked"
    )


def test_a_run_with_another_dtype_option_is_not_continued(mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "round_blocks", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(mixed, tmp_path / "out", recipe("rtn"), Options(verify=False))
    monkeypatch.undo()
    with pytest.raises(UserError, match="other options"):
        quantize(mixed, tmp_path / "out", recipe("rtn"), Options(verify=False, dtype="bfloat16"))


@pytest.mark.slow
def test_rounding_a_tensor_to_the_dtype_of_the_model_is_a_fallback(mixed, tmp_path, monkeypatch):
    few = (
        "--calibration",
        "python-docs",
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--group-size",
        "32",
        "--effort",
        "fast",
    )
    arguments = ("quantize", mixed, tmp_path / "out", *few, "--no-verify", "--strict")
    assert command(monkeypatch, *arguments) == 1
    content = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    what_of = {fallback["where"]: fallback["what"] for fallback in content["fallbacks"]}
    assert sorted(what_of) == sorted(name for name in load_file(mixed / WEIGHTS) if name.endswith(FLOAT32))
    assert set(what_of.values()) == {
        "stored in float32; calibration and comparison used it rounded to bfloat16, as transformers loads it"
    }


@pytest.mark.slow
def test_float32_tensors_that_bfloat16_represents_exactly_are_no_fallback(mixed, tmp_path):
    tensors = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in load_file(mixed / WEIGHTS).items()}
    save_file(tensors, mixed / WEIGHTS)
    assert not quantize(mixed, tmp_path / "out", recipe("gptq"), FEW).fallbacks


# --- byte for byte ---------------------------------------------------------------------------------------------------


def change_byte(file: Path, name: str) -> None:
    """Flip the lowest bit of a tensor's first byte."""
    info = CheckpointReader(file.parent).info(name)
    with file.open("r+b") as handle:
        handle.seek(info.start)
        (byte,) = handle.read(1)
        handle.seek(info.start)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_one_changed_byte_of_a_copied_tensor_is_detected(mixed, tmp_path, dtype):
    out, options = tmp_path / "out", Options(verify=False, dtype=dtype)
    plan = pipeline.checked_plan(mixed, tmp_path / "other", recipe("rtn"), options)
    quantize(mixed, out, recipe("rtn"), options)
    verify_copies(out, plan, {})
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"):
        change_byte(out / WEIGHTS, name)
        with pytest.raises(UserError, match=f"tensor '{name}' read back from the disk differs from the copied one"):
            verify_copies(out, plan, {})
        change_byte(out / WEIGHTS, name)
    verify_copies(out, plan, {})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_run_whose_copies_are_damaged_does_not_finish(mixed, tmp_path, monkeypatch, method):
    """The byte changes after the shards are written. The check covers the folded norms of AWQ too."""
    verify_codes, name = finish.verify_codes, "model.layers.1.input_layernorm.weight"

    def damaged(folder, *arguments) -> None:
        verify_codes(folder, *arguments)
        change_byte(folder / WEIGHTS, name)

    monkeypatch.setattr(finish, "verify_codes", damaged)
    with pytest.raises(UserError, match=f"tensor '{name}' read back from the disk differs"):
        quantize(mixed, tmp_path / "out", recipe(method), FEW)
    assert not (tmp_path / "out").exists()


def test_copies_of_another_shape_or_dtype_and_missing_copies_are_detected(tmp_path):
    value = torch.arange(6, dtype=torch.int16)
    save_file({"a": value}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")

    def stream(dtype: torch.dtype, *shape: int) -> StreamedTensor:
        return StreamedTensor(dtype=dtype, shape=shape, chunks=lambda: [value.view(torch.uint8).numpy().data])

    check_copies(tmp_path, {"a": stream(torch.int16, 6)})
    check_copies(tmp_path, {"a": tensor_digest(value)})
    wrong = {"a": stream(torch.int16, 2, 3)}, {"a": stream(torch.float16, 6)}, {"b": stream(torch.int16, 6)}
    for expected in (*wrong, {"a": tensor_digest(value + 1)}):
        with pytest.raises(UserError, match="read back from the disk differs"):
            check_copies(tmp_path, expected)


@pytest.mark.slow
def test_conversion_verifies_copies_too(mixed, tmp_path, monkeypatch):
    from llmquant import conversion as module

    quantize(mixed, tmp_path / "out", recipe("rtn"), Options(verify=False))
    converted = convert(tmp_path / "out", tmp_path / "ct", "compressed-tensors")
    assert converted.num_linears == 14
    original, written = load_file(mixed / WEIGHTS), load_file(tmp_path / "ct" / WEIGHTS)
    assert all(torch.equal(written[name], original[name]) for name in filter(is_copied, original))

    def damaged(folder, digests) -> None:
        change_byte(folder / WEIGHTS, "model.norm.weight")

    monkeypatch.setattr(module, "check_digests", damaged)
    with pytest.raises(UserError, match=r"tensor 'model\.norm\.weight' read back from the disk differs"):
        convert(tmp_path / "out", tmp_path / "again", "gptq_v2")


# --- loading ---------------------------------------------------------------------------------------------------------


def dtypes_of(model) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def transformers_dtypes(path: Path, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dtypes_of(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_have_the_dtypes_of_transformers(mixed, tmp_path, monkeypatch, dtype):
    """The class keeps some parameters in float32 in any 16-bit model, and others only in a float16 model."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["model.norm", "layers.*.post_attention"])
    expected = transformers_dtypes(mixed, getattr(torch, dtype))
    assert len(set(expected.values())) == (1 if dtype == "float32" else 2)
    assert dtypes_of(load(mixed, dtype=dtype)) == expected
    skeleton = Skeleton.open(
        CheckpointReader(mixed), read_config(mixed), torch.device("cpu"), getattr(torch, dtype), False
    )
    skeleton.load("")
    assert dtypes_of(skeleton.model) == expected
    out = tmp_path / "out"
    quantize(mixed, out, recipe("rtn"), Options(verify=False))
    copied = {name: dtype for name, dtype in expected.items() if is_copied(name)}
    packed = FORMATS["gptq"].suffixes
    loaded = {name: dtype for name, dtype in dtypes_of(load(out, dtype=dtype)).items() if not name.endswith(packed)}
    assert loaded == copied


@pytest.mark.slow
def test_the_reopened_model_has_the_dtypes_of_the_calibrated_model(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["input_layernorm", "1.mlp.gate_proj"])
    # CPUs without AVX-512 compare models in float32, which this test does not cover.
    monkeypatch.setattr("llmquant.pipeline.verify.comparison_dtype", lambda computed, device: computed)
    options = Options(verify=False)
    plan = pipeline.checked_plan(mixed, tmp_path / "other", recipe("rtn"), options)
    quantize(mixed, tmp_path / "out", recipe("rtn"), options)
    reopened = reopen(tmp_path / "out", plan)
    for skeleton in (plan.skeleton, reopened):
        skeleton.load("")
    assert dtypes_of(reopened.model) == dtypes_of(plan.skeleton.model) == transformers_dtypes(mixed, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_keeps_its_norms_in_float32_loads_as_in_transformers(tmp_path, dtype):
    config = AutoConfig.for_model(
        "afmoe",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_dense_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    random_model(config, dtype=dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    expected = transformers_dtypes(tmp_path / "model", dtype)
    assert (torch.float32 in expected.values()) == (dtype == torch.float16)
    assert dtypes_of(load(tmp_path / "model", dtype=dtype_name(dtype))) == expected


@pytest.mark.slow
def test_a_packed_model_loads_in_the_dtype_of_its_config(mixed, tmp_path):
    """Once the linears are packed, most floating-point bytes may belong to tensors that are stored in float32."""
    tensors = load_file(mixed / WEIGHTS)
    wide = {name: tensor.float() if is_copied(name) else tensor for name, tensor in tensors.items()}
    # In a model this small, linears have fewer bytes than embeddings.
    narrow = {
        name: tensor for name, tensor in wide.items() if name not in ("lm_head.weight", "model.embed_tokens.weight")
    }
    vocabulary = {name: wide[name][:64].contiguous() for name in ("lm_head.weight", "model.embed_tokens.weight")}
    save_file(narrow | vocabulary, mixed / WEIGHTS)
    config = json.loads((mixed / "config.json").read_text()) | {"vocab_size": 64}
    (mixed / "config.json").write_text(json.dumps(config))
    quantize(mixed, tmp_path / "out", recipe("rtn"), Options(verify=False))
    written = load_file(tmp_path / "out" / WEIGHTS)
    sizes: dict[torch.dtype, int] = {}
    for tensor in written.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    assert sizes[torch.float32] > sizes[torch.bfloat16]
    assert load(tmp_path / "out").dtype == torch.bfloat16


# --- small weights ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_scaling_all_weights_down_does_not_change_the_codes(tiny_model, tmp_path, format):
    plain = tiny_model("llama", dtype=torch.bfloat16)
    small = Path(shutil.copytree(plain, tmp_path / "small"))
    scaled = {
        name: tensor if is_copied(name) else tensor * 2.0**-20 for name, tensor in load_file(small / WEIGHTS).items()
    }
    save_file(scaled, small / WEIGHTS)
    options = Options(verify=False, format=format)
    for name, path in (("a", plain), ("b", small)):
        assert not quantize(path, tmp_path / name, recipe("rtn"), options).fallbacks
    small_tensors, plain_tensors = load_file(tmp_path / "b" / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS)
    for name, tensor in plain_tensors.items():
        assert torch.equal(small_tensors[name], tensor * 2.0**-20 if "scale" in name else tensor), name
    # A bfloat16 model stays finite with activations of 1e-6.
    assert load(tmp_path / "b")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_weights_too_small_for_float16_scales_are_a_fallback_that_names_the_linear(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "model"))
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-6
    save_file(tensors, model / WEIGHTS)
    report = quantize(model, tmp_path / "out", recipe("rtn"), Options(verify=False, format="awq"))
    (fallback,) = report.fallbacks
    assert fallback.where == "model.layers.1.mlp.up_proj"
    assert fallback.what.startswith("192 of 192 groups hold weights too small for float16 scales")
