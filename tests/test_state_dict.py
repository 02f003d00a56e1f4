"""State dicts of a loaded quantized model: packed tensors, missing and damaged tensors, and the packed head."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from saved_models import assert_same_tensors, load, logits, tensors_of

from llmquant.kernels.dispatch import DENSE_KERNELS, DenseKernel
from llmquant.runtime.linear import PackedDenseLinear

pytest_plugins = ("quantized_folders",)


def test_a_state_dict_holds_the_packed_tensors_and_can_be_loaded(quantized, tmp_path):
    model, other = load(quantized()), load(quantized(seed=1))
    expected = logits(model)
    assert not torch.equal(logits(other), expected)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert set(model.state_dict()) == set(tensors_of(quantized()))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(other), expected)


def test_tools_that_save_the_state_dict_save_all_tensors(quantized, tmp_path):
    model, other = load(quantized()), load(quantized(seed=1))
    save_model(model, str(tmp_path / "model.safetensors"))
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(logits(other), logits(model))
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "accelerate"), max_shard_size="50KB")
    model.config.save_pretrained(tmp_path / "accelerate")
    assert torch.equal(logits(load(tmp_path / "accelerate")), logits(model))


def test_a_state_dict_with_a_missing_or_damaged_tensor_is_refused(quantized):
    model, name = load(quantized()), "model.layers.0.mlp.up_proj.scales"
    expected, state = logits(model), model.state_dict()
    damaged = state | {name: torch.full_like(state[name], torch.nan)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj\.scales: .* NaN or inf"):
        model.load_state_dict(damaged)
    incomplete = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
        model.load_state_dict(incomplete)
    assert model.load_state_dict(incomplete, strict=False).missing_keys == [name]
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(1)})


@pytest.fixture
def dense_kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the dense kernels by one that runs on every processor and stores the transposed weight."""
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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_a_packed_head_is_saved_unchanged_and_a_tied_head_only_once(
    architecture, dense_kernels_everywhere, quantized, tmp_path
):
    """The heads of llama and gpt_neox have their own weight; the head of qwen2 is tied to the embedding."""
    model = load(quantized(architecture))
    assert isinstance(model.get_output_embeddings(), PackedDenseLinear)
    for index, each in enumerate((model, copy.deepcopy(model))):
        each.save_pretrained(tmp_path / str(index))
        assert_same_tensors(quantized(architecture), tmp_path / str(index))
    assert torch.equal(logits(load(tmp_path / "0")), logits(model))


def test_a_packed_head_loads_the_weight_of_a_state_dict(dense_kernels_everywhere, quantized):
    model, other = load(quantized()), load(quantized(seed=1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: \[3, 64\]; must be \[512, 64\]"):
        other.load_state_dict(model.state_dict() | {"lm_head.weight": torch.zeros(3, 64)})
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert other.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
