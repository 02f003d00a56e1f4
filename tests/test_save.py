"""A loaded quantized model is written again: `save_pretrained`, `push_to_hub`, state dicts, copies and pickles."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import Options, Override, QuantSpec, Recipe, UserError
from llmquant.checkpoints.manifest import MANIFEST_FILE, read_manifest
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.formats.registry import FORMATS
from llmquant.kernels.dispatch import DENSE_KERNELS, DenseKernel
from llmquant.runtime.linear import PackedLinear

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def small(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`small("llama", "gptq", bits=…, symmetric=…, overrides=…, dtype=…, seed=…)` -> a quantized tiny model; not to be
    written into."""
    made: dict[object, Path] = {}

    def make(
        architecture: str = "llama",
        format: str = "gptq",
        *,
        bits: int = 4,
        symmetric: bool = True,
        overrides: tuple[Override, ...] = (),
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Path:
        key = (architecture, format, bits, symmetric, overrides, dtype, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("small") / "out"
            spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
            recipe = Recipe(method="rtn", spec=spec, overrides=overrides)
            model = tiny_model(architecture, dtype=dtype, seed=seed)
            llmquant.quantize(model, made[key], recipe, Options(format=format, verify=False))
        return made[key]

    return make


def load(folder: Path, backend: str = "torch", **options: str) -> Any:
    """The backend that is ready at once; what the others hold is compared in `test_kernels.py`."""
    return llmquant.load(folder, device="cpu", backend=backend, **options)


def load_with_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=llmquant.transformers_config(folder, backend="torch"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def assert_same_tensors(folder: Path, other: Path) -> None:
    tensors, others = tensors_of(folder), tensors_of(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def changed(
    folder: Path,
    to: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    config: Callable[[dict[str, Any]], None] = lambda quantization: None,
) -> Path:
    """A copy of a checkpoint with other tensors, as another tool would have written it."""
    to.mkdir()
    content = json.loads((folder / "config.json").read_text())
    config(content["quantization_config"])
    (to / "config.json").write_text(json.dumps(content))
    save_file(tensors(load_file(folder / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() if file.exists() else b"" for file in folder.iterdir()}


HEAD = (Override(pattern="lm_head", bits=8),)
MIXED = (Override(pattern="*.0.*", bits=8),)


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
def test_saving_gives_the_checkpoint_back(architecture, format, options, small, tmp_path):
    """Every tensor to the bit, by its name; and the same config, whichever of the two ways opened the model."""
    folder = small(architecture, format, **options)
    model, theirs = load(folder), load_with_transformers(folder)
    for index, each in enumerate((model, theirs)):
        saved = tmp_path / f"saved-{index}"
        each.save_pretrained(saved)
        assert_same_tensors(folder, saved)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((saved / name).read_text()) == json.loads((folder / name).read_text())
        config_file = FORMATS[format].config_file
        assert config_file is None or files_of(saved)[config_file]
    assert torch.equal(logits(load(tmp_path / "saved-0")), logits(model))
    assert torch.equal(logits(load_with_transformers(tmp_path / "saved-1")), logits(model))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_act_order_of_another_tool_is_saved(backend, small, tmp_path):
    def move(tensors):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("g_idx"):
                tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)]
        return tensors

    folder = changed(small(), tmp_path / "moved", move, lambda config: config.update(desc_act=True))
    model = load(folder, backend=backend)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(folder, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", backend=backend)), logits(model))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_config_that_names_linears_without_the_prefix_is_made_anew(format, small, tmp_path):
    """transformers writes the base model's prefix; the rules for single linears have to follow."""

    def rename(config):
        text = json.dumps(config).replace(r"transformer\\.", "").replace("transformer.", "")
        config.update(json.loads(text))
        if "dynamic" in config:
            config["dynamic"] = {key.replace(r"transformer\.", ""): value for key, value in config["dynamic"].items()}

    folder = changed(
        small("gpt2", format, overrides=(Override(pattern="*.0.mlp.*", bits=8),)),
        tmp_path / "bare",
        lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        rename,
    )
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))
    assert saved.transformer.h[0].mlp.c_fc.spec.bits == 8 and saved.transformer.h[1].mlp.c_fc.spec.bits == 4


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_another_dtype_leaves_codes_and_scales_alone(format, dtype, small, tmp_path):
    folder = small("llama", format)
    model = load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert str(saved.dtype) == f"torch.{dtype}" and torch.equal(logits(saved), logits(model))
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    packed = [name for name in before if name.rpartition(".")[2] in FORMATS[format].suffixes]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)
    assert all(before[name].dtype == after[name].dtype for name in packed)


def test_the_model_of_one_expression_is_saved_and_a_model_that_is_deleted_frees_its_memory(small, tmp_path):
    load(small()).save_pretrained(tmp_path / "saved")
    assert_same_tensors(small(), tmp_path / "saved")
    model = load(small())
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_copies_and_pickles_are_saved_too(small, tmp_path):
    model = load(small())
    expected = logits(model)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu").train())
    del model
    for index, twin in enumerate(twins):
        assert torch.equal(logits(twin), expected)
        twin.save_pretrained(tmp_path / str(index))
        assert_same_tensors(small(), tmp_path / str(index))


def test_the_class_is_still_that_of_transformers(small):
    model = load(small())
    assert (
        type(model).__name__ == "LlamaForCausalLM"
        and type(model).__module__ == "transformers.models.llama.modeling_llama"
    )
    assert model.can_generate() and not model.is_remote_code()


# --- state dicts -----------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_the_packed_tensors_and_is_loaded(small, tmp_path):
    model, other = load(small()), load(small(seed=1))
    expected = logits(model)
    assert not torch.equal(logits(other), expected)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert set(model.state_dict()) == set(tensors_of(small()))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(other), expected)


def test_tools_that_go_by_the_state_dict_write_all_of_it(small, tmp_path):
    model, other = load(small()), load(small(seed=1))
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(logits(other), logits(model))
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"), max_shard_size="50KB")
    model.config.save_pretrained(tmp_path / "accelerate")
    assert torch.equal(logits(load(tmp_path / "accelerate")), logits(model))


def test_a_state_dict_that_lacks_or_damages_a_tensor_is_refused(small):
    model, name = load(small()), "model.layers.0.mlp.up_proj.scales"
    expected, state = logits(model), model.state_dict()
    damaged = state | {name: torch.full_like(state[name], torch.nan)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj\.scales: .* NaN or inf"):
        model.load_state_dict(damaged)
    lacking = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
        model.load_state_dict(lacking)
    assert model.load_state_dict(lacking, strict=False).missing_keys == [name]
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(1)})


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is packed whatever the processor: its weight lies transposed."""
    for name in DENSE_KERNELS:
        monkeypatch.setitem(
            DENSE_KERNELS,
            name,
            DenseKernel(
                usable=lambda: True,
                pack=lambda weight_NK: weight_NK.T.contiguous(),
                unpack=lambda packed, out_features, in_features: packed.T.contiguous(),
                multiply=lambda x, packed, bias_N, out_features: F.linear(x, packed.T, bias_N),
            ),
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_a_packed_head_is_saved_as_it_was_read_and_once_if_it_is_tied(architecture, any_processor, small, tmp_path):
    """The head of llama and gpt_neox is its own, that of qwen2 is the embedding."""
    model = load(small(architecture))
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    for index, each in enumerate((model, copy.deepcopy(model))):
        each.save_pretrained(tmp_path / str(index))
        assert_same_tensors(small(architecture), tmp_path / str(index))
    assert torch.equal(logits(load(tmp_path / "0")), logits(model))


def test_a_packed_head_takes_the_weight_of_a_state_dict(any_processor, small):
    model, other = load(small()), load(small(seed=1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: \[3, 64\]; must be \[512, 64\]"):
        other.load_state_dict(model.state_dict() | {"lm_head.weight": torch.zeros(3, 64)})
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert other.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_saving_over_the_source_and_over_other_checkpoints_leaves_no_old_weights(small, tmp_path):
    """A single file and shards, in any order; what described the old weights goes, what is the user's stays."""
    folder = tmp_path / "folder"
    shutil.copytree(small(), folder)
    (folder / "notes.txt").write_text("mine")
    model, other = load(folder), load(small("llama", "awq", seed=1))
    expected = logits(model)
    for each, limit in ((model, "60KB"), (model, "50GB"), (other, "60KB"), (model, "100KB"), (other, "50GB")):
        each.save_pretrained(folder, max_shard_size=limit)
        assert torch.equal(logits(load(folder)), expected if each is model else logits(other))
        names = files_of(folder).keys()
        assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names)
        assert ("quantize_config.json" in names) == (each is model)
        assert {"notes.txt", "tokenizer.json"} <= names and not names & {"report.html", "quantize_report.json"}
        with pytest.raises(UserError, match=f"no {MANIFEST_FILE}"):
            read_manifest(folder)


def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(small, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    shutil.copytree(small(), folder)
    before, model = files_of(folder), load(folder)

    def fill(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fill)
    for target in (folder, tmp_path / "new" / "deep"):
        with pytest.raises(UserError, match=r"cannot be written .*No space left"):
            model.save_pretrained(target)
    assert files_of(folder) == before and not (tmp_path / "new").exists()


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def as_shard_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights-1.safetensors")
    names = load_file(folder / "weights-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "weights-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def beside_a_packed_shard(folder: Path) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    save_file(packed, folder / "model-00001-of-00002.safetensors")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")


def linked_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize(
    "change",
    [lambda folder: None, as_pickle, as_shard_of_another_name, beside_a_packed_shard, damaged, linked_to_nothing],
)
def test_weights_that_are_not_a_quantized_checkpoint_are_never_replaced(change, small, tiny_model, tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(tiny_model("llama"), folder)
    change(folder)
    before, model = files_of(folder), load(small())
    with pytest.raises(UserError, match="holds weights, and save_pretrained replaces only a quantized checkpoint"):
        model.save_pretrained(folder)
    assert files_of(folder) == before


def test_paths_are_those_that_were_typed(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = load(small())
    with pytest.raises(UserError, match="path '': not a path"):
        model.save_pretrained("")
    model.save_pretrained("~/saved")
    assert [file.name for file in tmp_path.iterdir()] == ["home"]
    assert torch.equal(logits(load(tmp_path / "home" / "saved")), logits(model))


def test_settings_that_transformers_would_warn_of_are_saved_as_they_were_read(small, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(small(), folder)
    for settings in ({"do_sample": False, "temperature": 0.5}, {"early_stopping": True}, {"pad_token_id": -1}):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        load(folder).save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert settings.items() <= written.items()


def test_a_cast_that_is_refused_changes_nothing(small):
    model = load(small())
    expected = logits(model)
    for cast in (model.half, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(UserError, match="cannot be cast"):
            cast()
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model), expected)


def test_a_part_of_a_model_is_not_saved_by_itself(small, tmp_path):
    model = load(small())
    with pytest.raises(UserError, match="a part of a quantized model cannot be saved by itself; save the whole model"):
        model.model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_file_in_the_way_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="a file; give a folder"):
        load(small()).save_pretrained(tmp_path / "file")


def test_another_process_than_the_main_one_writes_nothing(small, tmp_path):
    load(small()).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_a_model_that_is_not_quantized_is_saved_by_transformers(tiny_model, tmp_path):
    model = load(tiny_model("llama"), backend="auto")
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tiny_model("llama"), tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(model: Any, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        model.save_pretrained(folder, **options)
    assert not folder.exists()


def test_a_weight_that_the_format_cannot_hold_is_named(small, tmp_path):
    def finer(tensors):
        return {
            name: tensor.float() * 1.0001 if name.endswith("scales") else tensor for name, tensor in tensors.items()
        }

    model = load(changed(small(), tmp_path / "finer", finer))
    match = r"^model\.layers\.0\.self_attn\.q_proj: cannot be saved as gptq \(scales: .*run `llmquant convert`"
    refused(model, tmp_path / "saved", match)
    with pytest.raises(UserError, match=match):
        model.state_dict()


def test_act_order_in_compressed_tensors_is_refused(small, tmp_path):
    def with_index(tensors):
        index = {
            name.replace("weight_shape", "weight_g_idx"): torch.arange(int(shape[1])).flip(0).int() // 32
            for name, shape in tensors.items()
            if name.endswith("weight_shape")
        }
        return tensors | index

    def says_so(config):
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    model = load(changed(small("llama", "compressed-tensors"), tmp_path / "moved", with_index, says_so))
    refused(model, tmp_path / "saved", r"q_proj: cannot be saved as compressed-tensors \(weight_g_idx")


def test_options_and_models_that_would_not_open_are_refused(small, tmp_path):
    model, folder = load(small()), tmp_path / "saved"
    refused(model, folder, "variant does not go", variant="fp16")
    refused(model, folder, "distributed_checkpoint does not go", distributed_checkpoint=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.0.mlp" not in name}
    refused(model, folder, r"'model\.layers\.0\.mlp\.down_proj' is missing", state_dict=state)

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

    model.model.layers[0].mlp.up_proj = Wrapped(model.model.layers[0].mlp.up_proj)
    refused(model, folder, r"'model\.layers\.0\.mlp\.up_proj\.base' is not a quantized linear of the loaded model")
    model = load(small())
    del model.config.quantization_config
    refused(model, folder, "quantization_config is gone")


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Repository -> options of the calls; the uploaded files are in `tmp_path / "hub" / repository`."""
    done: dict[str, dict[str, Any]] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            done[repo_id] = options
            return type("Repository", (), {"repo_id": repo_id})

    class Card:
        def save(self, file: str) -> None:
            Path(file).write_text("card")

    def upload(self: Any, working_dir: str, repo_id: str, files_timestamps: Any, **options: Any) -> None:
        shutil.copytree(working_dir, tmp_path / "hub" / repo_id)
        done[repo_id] |= options

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    return done


def test_a_pushed_model_is_a_whole_checkpoint(small, hub, tmp_path):
    model = load(small())
    model.push_to_hub("me/pushed", max_shard_size="60KB", commit_message="first")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/too", private=True)
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert hub["me/pushed"]["commit_message"] == "first" and hub["me/too"]["private"] is True
    for name in ("hub/me/pushed", "hub/me/too", "hub/named", "named", "saved"):
        assert_same_tensors(small(), tmp_path / name)
        assert torch.equal(logits(load(tmp_path / name)), logits(model))
    with pytest.raises(TypeError, match="nonsense"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, nonsense=1)
