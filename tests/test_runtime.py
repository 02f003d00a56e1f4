"""A loaded model with a packed head: logits, gradients and pickles equal those of the plain head."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmquant
from llmquant.kernels.dispatch import DENSE_KERNELS
from llmquant.runtime import load as loading
from llmquant.runtime.linear import PackedDenseLinear

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


@pytest.mark.parametrize("kernel", DENSE_KERNELS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_packed_head_gives_the_same_logits(architecture, kernel, quantized, monkeypatch):
    """The head of llama has its own weight; the heads of the others are tied to the embedding."""
    if not DENSE_KERNELS[kernel].usable():
        pytest.skip("this processor does not support the kernel")
    for other in set(DENSE_KERNELS) - {kernel}:
        monkeypatch.setitem(DENSE_KERNELS, other, replace(DENSE_KERNELS[other], usable=lambda: False))
    folder = quantized(architecture)
    model = llmquant.load(folder, device="cpu")
    monkeypatch.setattr(loading, "pack_head", lambda model: None)
    plain = llmquant.load(folder, device="cpu")
    head = model.get_output_embeddings()
    assert isinstance(head, PackedDenseLinear) and head.kernel_name == kernel
    assert isinstance(plain.get_output_embeddings(), nn.Linear)
    tolerance = {"rtol": 0, "atol": 0} if kernel == "onednn" else {}
    with torch.inference_mode():
        for tokens in (TOKENS, TOKENS[:, :1]):
            logits = model(tokens).logits
            torch.testing.assert_close(logits, plain(tokens).logits, **tolerance)
            assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, logits)
    assert torch.equal(model.get_output_embeddings().weight.T, plain.get_output_embeddings().weight.T)
    embeddings = [each.get_input_embeddings()(TOKENS).detach().requires_grad_() for each in (model, plain)]
    for each, x in zip((model, plain), embeddings, strict=True):
        each(inputs_embeds=x).logits.float().square().sum().backward()
    assert torch.equal(embeddings[0].grad, embeddings[1].grad)
