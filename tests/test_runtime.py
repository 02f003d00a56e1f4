"""A loaded model: what it computes, holds, and how it travels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmquant
from llmquant.kernels.cpu import multiplies_bfloat16
from llmquant.runtime import load as loading
from llmquant.runtime.linear import PackedLinear

RECIPE = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def quantized(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`quantized("llama")` -> a quantized bfloat16 checkpoint of that family."""

    def make(architecture: str) -> Path:
        out = tmp_path_factory.mktemp(architecture) / "out"
        llmquant.quantize(tiny_model(architecture, dtype=torch.bfloat16), out, RECIPE)
        return out

    return make


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_packed_head_gives_the_same_bits(architecture: str, quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of llama is its own, that of the others is the embedding."""
    folder = quantized(architecture)
    model = llmquant.load(folder, device="cpu")
    monkeypatch.setattr(loading, "pack_head", lambda model: None)
    plain = llmquant.load(folder, device="cpu")
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert isinstance(plain.get_output_embeddings(), nn.Linear)
    with torch.inference_mode():
        for tokens in (TOKENS, TOKENS[:, :1]):
            assert torch.equal(model(tokens).logits, plain(tokens).logits)
            assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, plain(tokens).logits)
    assert torch.equal(model.get_output_embeddings().weight.T, plain.get_output_embeddings().weight.T)
    embeddings = [each.get_input_embeddings()(TOKENS).detach().requires_grad_() for each in (model, plain)]
    for each, x in zip((model, plain), embeddings, strict=True):
        each(inputs_embeds=x).logits.float().square().sum().backward()
    assert torch.equal(embeddings[0].grad, embeddings[1].grad)
