"""`save_pretrained` and `push_to_hub`: existing folders stay whole, and invalid checkpoints are never written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from saved_models import assert_same_tensors, changed_copy, files_of, load, logits
from torch import nn
from transformers import GenerationConfig

from llmquant import UserError
from llmquant.checkpoints.manifest import MANIFEST_FILE, read_manifest

pytest_plugins = ("quantized_folders",)


@pytest.mark.slow
def test_saving_over_other_checkpoints_leaves_no_old_weights(quantized, tmp_path):
    """Single files and shards replace each other. Files that describe old weights go; the user's files stay."""
    folder = tmp_path / "folder"
    shutil.copytree(quantized(), folder)
    (folder / "notes.txt").write_text("notes of the user")
    model, other = load(folder), load(quantized("llama", "awq", seed=1))
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


def test_a_full_disk_leaves_the_folder_as_it_was(quantized, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    shutil.copytree(quantized(), folder)
    before, model = files_of(folder), load(folder)

    def fail_to_write(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail_to_write)
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


def broken_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize(
    "change",
    [lambda folder: None, as_pickle, as_shard_of_another_name, beside_a_packed_shard, damaged, broken_link],
)
def test_weights_that_are_not_a_quantized_checkpoint_are_never_replaced(change, quantized, tiny_model, tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(tiny_model("llama"), folder)
    change(folder)
    before, model = files_of(folder), load(quantized())
    with pytest.raises(UserError, match="holds weights, and save_pretrained replaces only a quantized checkpoint"):
        model.save_pretrained(folder)
    assert files_of(folder) == before


def test_an_empty_path_is_refused_and_a_home_folder_expanded(quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = load(quantized())
    with pytest.raises(UserError, match="path '': not a path"):
        model.save_pretrained("")
    model.save_pretrained("~/saved")
    assert [file.name for file in tmp_path.iterdir()] == ["home"]
    assert torch.equal(logits(load(tmp_path / "home" / "saved")), logits(model))


def test_generation_settings_that_transformers_warns_about_are_saved_unchanged(quantized, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(quantized(), folder)
    for settings in ({"do_sample": False, "temperature": 0.5}, {"early_stopping": True}, {"pad_token_id": -1}):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        model = load(folder)
        model.save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
        assert settings.items() <= written.items()
        assert type(model.generation_config) is GenerationConfig, "its class is replaced only while it is written"
        model.generation_config.temperature = 0.25
        if not settings.get("do_sample", True):
            with pytest.raises(ValueError, match="temperature"):
                model.save_pretrained(tmp_path / "changed")
            assert not (tmp_path / "changed").exists()


def test_a_refused_cast_changes_nothing(quantized):
    model = load(quantized())
    expected = logits(model)
    for cast in (model.half, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(UserError, match="cannot be cast"):
            cast()
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model), expected)


def test_a_submodel_is_not_saved_alone(quantized, tmp_path):
    model = load(quantized())
    with pytest.raises(UserError, match="a submodel of a quantized model cannot be saved alone; save the whole model"):
        model.model.save_pretrained(tmp_path / "submodel")
    assert not (tmp_path / "submodel").exists()


def test_an_existing_file_is_refused(quantized, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file; give a folder"):
        load(quantized()).save_pretrained(tmp_path / "file")


def test_only_the_main_process_writes(quantized, tmp_path):
    load(quantized()).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_a_model_that_is_not_quantized_is_saved_by_transformers(tiny_model, tmp_path):
    model = load(tiny_model("llama"), backend="auto")
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tiny_model("llama"), tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def refused(model: Any, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        model.save_pretrained(folder, **options)
    assert not folder.exists()


def test_the_error_for_a_weight_that_the_format_cannot_store_names_it(quantized, tmp_path):
    def make_scales_finer(tensors):
        return {
            name: tensor.float() * 1.0001 if name.endswith("scales") else tensor for name, tensor in tensors.items()
        }

    model = load(changed_copy(quantized(), tmp_path / "finer", make_scales_finer))
    match = r"^model\.layers\.0\.self_attn\.q_proj: cannot be saved as gptq \(scales: .*run `llmquant convert`"
    refused(model, tmp_path / "saved", match)
    with pytest.raises(UserError, match=match):
        model.state_dict()


@pytest.mark.slow
def test_act_order_in_compressed_tensors_is_refused(quantized, tmp_path):
    def add_group_index(tensors):
        index = {
            name.replace("weight_shape", "weight_g_idx"): torch.arange(int(shape[1])).flip(0).int() // 32
            for name, shape in tensors.items()
            if name.endswith("weight_shape")
        }
        return tensors | index

    def declare_act_order(config):
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    model = load(
        changed_copy(
            quantized("llama", "compressed-tensors"), tmp_path / "act-order", add_group_index, declare_act_order
        )
    )
    refused(model, tmp_path / "saved", r"q_proj: cannot be saved as compressed-tensors \(weight_g_idx")


def test_options_and_models_that_could_not_be_loaded_are_refused(quantized, tmp_path):
    model, folder = load(quantized()), tmp_path / "saved"
    refused(model, folder, "variant does not work", variant="fp16")
    refused(model, folder, "distributed_checkpoint does not work", distributed_checkpoint=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.0.mlp" not in name}
    refused(model, folder, r"'model\.layers\.0\.mlp\.down_proj' is missing", state_dict=state)

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

    model.model.layers[0].mlp.up_proj = Wrapped(model.model.layers[0].mlp.up_proj)
    refused(model, folder, r"'model\.layers\.0\.mlp\.up_proj\.base' is not a quantized linear of the loaded model")
    model = load(quantized())
    del model.config.quantization_config
    refused(model, folder, "has no quantization_config any more")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Replace the hub. Return repository -> options of the calls; files go to `tmp_path / "hub" / repository`."""
    uploads: dict[str, dict[str, Any]] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            uploads[repo_id] = options
            return type("Repository", (), {"repo_id": repo_id})

    class Card:
        def save(self, file: str) -> None:
            Path(file).write_text("card")

    def upload(self: Any, working_dir: str, repo_id: str, files_timestamps: Any, **options: Any) -> None:
        shutil.copytree(working_dir, tmp_path / "hub" / repo_id)
        uploads[repo_id] |= options

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    return uploads


@pytest.mark.slow
def test_a_pushed_model_is_a_complete_checkpoint(quantized, hub, tmp_path):
    model = load(quantized())
    model.push_to_hub("me/pushed", max_shard_size="60KB", commit_message="first")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/too", private=True)
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert hub["me/pushed"]["commit_message"] == "first" and hub["me/too"]["private"] is True
    for name in ("hub/me/pushed", "hub/me/too", "hub/named", "named", "saved"):
        assert_same_tensors(quantized(), tmp_path / name)
        assert torch.equal(logits(load(tmp_path / name)), logits(model))
    with pytest.raises(TypeError, match="nonsense"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, nonsense=1)
