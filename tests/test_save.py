"""Saving a loaded quantized model gives its checkpoint back: tensors, configuration, dtypes, copies and pickles."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from saved_models import (
    assert_same_tensors,
    changed_copy,
    files_of,
    load,
    load_with_transformers,
    logits,
    tensors_of,
)

from llmquant import Override
from llmquant.formats.registry import FORMATS

pytest_plugins = ("quantized_folders",)

HEAD = (Override(pattern="lm_head", bits=8),)
MIXED = (Override(pattern="*.0.*", bits=8),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "format", "options"),
    [
        *(("llama", format, {}) for format in FORMATS),
        *((architecture, "gptq", {}) for architecture in ("qwen2", "gpt2", "gpt_neox", "opt")),
        *(("llama", format, {"symmetric": False}) for format in FORMATS if format != "gptq"),
        *(("llama", "gptq_v2", {"bits": bits, "symmetric": False}) for bits in (2, 3, 8)),
        *(("llama", format, {"overrides": MIXED + HEAD}) for format in ("gptq", "compressed-tensors")),
        ("gpt_neox", "gptq", {"overrides": HEAD}),
        ("llama", "gptq", {"dtype": torch.float32}),
        ("llama", "awq", {"dtype": torch.float16}),
    ],
)
def test_saving_gives_the_checkpoint_back(architecture, format, options, quantized, tmp_path):
    """`load` and `from_pretrained` both save every tensor to the bit, under its name, and the same config."""
    folder = quantized(architecture, format, **options)
    model = load(folder)
    for index, each in enumerate((model, load_with_transformers(folder))):
        saved = tmp_path / f"saved-{index}"
        each.save_pretrained(saved)
        assert_same_tensors(folder, saved)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((saved / name).read_text()) == json.loads((folder / name).read_text())
        config_file = FORMATS[format].config_file
        assert config_file is None or files_of(saved)[config_file]
    assert torch.equal(logits(load(tmp_path / "saved-0")), logits(model))
    assert torch.equal(logits(load_with_transformers(tmp_path / "saved-1")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_act_order_of_another_tool_is_saved(backend, quantized, tmp_path):
    def permute_groups(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("g_idx"):
                tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)]
        return tensors

    folder = changed_copy(
        quantized(), tmp_path / "permuted", permute_groups, lambda config: config.update(desc_act=True)
    )
    model = load(folder, backend=backend)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", backend=backend)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_config_that_names_linears_without_the_prefix_is_rewritten(format, quantized, tmp_path):
    """transformers saves names with the base model's prefix, so the rules for single linears must have it too."""

    def rename(config):
        text = json.dumps(config).replace(r"transformer\\.", "").replace("transformer.", "")
        config.update(json.loads(text))
        if "dynamic" in config:
            config["dynamic"] = {key.replace(r"transformer\.", ""): value for key, value in config["dynamic"].items()}

    folder = changed_copy(
        quantized("gpt2", format, overrides=(Override(pattern="*.0.mlp.*", bits=8),)),
        tmp_path / "bare",
        lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        rename,
    )
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))
    assert saved.transformer.h[0].mlp.c_fc.spec.bits == 8 and saved.transformer.h[1].mlp.c_fc.spec.bits == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_another_dtype_does_not_change_codes_and_scales(format, dtype, quantized, tmp_path):
    folder = quantized("llama", format)
    model = load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert str(saved.dtype) == f"torch.{dtype}" and torch.equal(logits(saved), logits(model))
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    packed = [name for name in before if name.rpartition(".")[2] in FORMATS[format].suffixes]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)
    assert all(before[name].dtype == after[name].dtype for name in packed)


@pytest.mark.slow
def test_a_temporary_model_is_saved_and_a_deleted_model_frees_its_memory(quantized, tmp_path):
    load(quantized()).save_pretrained(tmp_path / "saved")
    assert_same_tensors(quantized(), tmp_path / "saved")
    model = load(quantized())
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_copies_and_pickles_can_be_saved(quantized, tmp_path):
    model = load(quantized())
    expected = logits(model)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu").train())
    del model
    for index, twin in enumerate(twins):
        assert torch.equal(logits(twin), expected)
        twin.save_pretrained(tmp_path / str(index))
        assert_same_tensors(quantized(), tmp_path / str(index))


def test_the_class_looks_like_the_class_of_transformers(quantized):
    model = load(quantized())
    assert (
        type(model).__name__ == "LlamaForCausalLM"
        and type(model).__module__ == "transformers.models.llama.modeling_llama"
    )
    assert model.can_generate() and not model.is_remote_code()
