"""Uninitialized memory does not affect the output: with NaN in every empty tensor, the bytes stay the same."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from llmquant.pipeline.quantize import quantize
from llmquant.report.schema import SampleTexts
from llmquant.spec import EFFORTS, Options, QuantSpec, Recipe

pytestmark = pytest.mark.slow

READ_WITHOUT_A_CALL = {
    # Its code moves the token ids to the device of the embedding's weight.
    "llama4_text": {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 128, "moe_layers": []},
    # Its code reads the weight of an embedding that it never calls.
    "prophetnet": {
        "decoder_ffn_dim": 128,
        "num_hidden_layers": None,
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
    },
}


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every uninitialized tensor with NaN, or with the smallest number of its integer dtype."""

    def poison(create):
        def create_poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype not in (torch.bool, torch.uint8):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return create_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    monkeypatch.setattr(nn.Module, "to_empty", None)
    assert torch.empty(2).isnan().all()


def quantized(model: Path, out: Path) -> tuple[str, object]:
    """Quantize: return the SHA-256 of the written weights, and the verification."""
    recipe = Recipe(spec=QuantSpec(group_size=32), **EFFORTS["fast"])
    options = Options(calibration="python-docs", num_samples=2, seq_len=16)
    report = quantize(model, out, recipe, options)
    assert all(math.isfinite(linear.error) for linear in report.linears)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return digest, report.verification


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Generate no sample texts: that takes longer than the rest and has its own tests."""
    monkeypatch.setattr("llmquant.pipeline.finish.generate_sample_texts", lambda folder, plan: SampleTexts())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", *READ_WITHOUT_A_CALL])
def test_bytes_and_verdict_do_not_depend_on_uninitialized_memory(
    architecture, tiny_model, small_model, tmp_path, request
):
    fields = READ_WITHOUT_A_CALL.get(architecture)
    model = tiny_model(architecture) if fields is None else small_model(architecture, **fields)
    plain = quantized(model, tmp_path / "plain")
    request.getfixturevalue("poisoned")
    assert quantized(model, tmp_path / "poisoned") == plain
    assert plain[1].verdict in ("good", "slight loss", "clear loss") and math.isfinite(plain[1].measured.kl_mean)
