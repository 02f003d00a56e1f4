"""CPU attention: the kernels for one token and for whole prompts, and their use by a loaded model."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import relative_error

import llmquant
from llmquant.kernels import jit, llvm_attention
from llmquant.runtime import attention

pytest_plugins = ("processors",)
pytestmark = pytest.mark.skipif(jit.unavailable_reason() is not None, reason=str(jit.unavailable_reason()))

SHAPES = {
    "one token in the cache": (1, 4, 4, 1, 64),
    "heads share keys": (1, 9, 3, 130, 64),
    "a batch": (3, 4, 2, 16, 32),
    "one group, odd vectors": (2, 4, 1, 33, 80),
    "widest heads, long": (1, 2, 2, 3000, 256),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q as attention code creates it, k a slice of a longer cache, v transposed."""
    num_sequences, num_heads, num_groups, length, head_dim = shape
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(num_sequences, 1, num_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(num_sequences, num_groups, length + 7, head_dim, generator=generator).to(dtype)[:, :, :length]
    v = torch.randn(num_sequences, length, num_groups, head_dim, generator=generator).to(dtype).transpose(1, 2)
    return q, k, v


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """The exact result: softmax and sums in float64 [S, L, H, D]."""
    shared = q.shape[1] // k.shape[1]
    k, v = (value.double().repeat_interleave(shared, dim=1) for value in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("processor")
def test_error_is_at_most_that_of_torch(dtype, shape):
    q, k, v = inputs(shape, dtype)
    mask = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., -1] = True
    for scaling, seen in ((shape[4] ** -0.5, None), (2.0, None), (0.1, mask)):
        exact = truth(q, k, v, seen, scaling)
        plain = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        assert llvm_attention.refuses_one(q, k, v, seen) is None
        y = llvm_attention.attend_one(q, k, v, seen, scaling)
        assert y.dtype == dtype and y.shape == exact.shape
        # In 16 bits, only the result is rounded. In float32, the error of the polynomial counts too.
        bound = 1.05 * relative_error(plain, exact) if dtype != torch.float32 else 2e-6
        assert relative_error(y, exact) <= max(bound, 1e-9)


CAUSAL = {
    "as many tokens as rows": (1, 3, 3, 6, 16),
    "a tile and a bit": (2, 4, 2, 77, 80),
    "heads share keys": (2, 9, 3, 256, 64),
    "wide heads": (1, 2, 1, 130, 256),
    "three rows of values at a time": (1, 2, 2, 193, 128),
}


@pytest.mark.parametrize("shape", CAUSAL.values(), ids=CAUSAL)
def test_causal_error_is_at_most_that_of_torch_and_rows_are_independent(shape):
    q, k, v = inputs(shape, torch.bfloat16)
    q = torch.randn(shape[0], shape[3], shape[1], shape[4]).bfloat16().transpose(1, 2)
    if not jit.has_bfloat16_dot_product():
        pytest.skip("this processor does not multiply bfloat16")
    later = torch.ones(shape[3], shape[3], dtype=torch.bool).tril()
    for scaling in (shape[4] ** -0.5, 1.5):
        exact = truth(q, k, v, later, scaling)
        plain = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
        y = llvm_attention.attend_causal(q, k, v, scaling)
        assert relative_error(y, exact) <= 1.05 * relative_error(plain, exact)
        # The outputs of the first tokens do not depend on the number of tokens that follow.
        for length in {6, 7, shape[3] // 2, shape[3] - 1} & set(range(6, shape[3])):
            start = llvm_attention.attend_causal(q[:, :, :length], k[:, :, :length], v[:, :, :length], scaling)
            assert torch.equal(start, y[:, :length]), length


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k, v: (q, k, v, torch.ones(3, 1, 64, 64, dtype=torch.bool)), "takes no mask"),
        (lambda q, k, v: (q.half(), k.half(), v.half(), None), "float16"),
        (lambda q, k, v: (q[:, :, :39], k[:, :, :39], v[:, :, :39], None), "39 new tokens over 39 in all"),
        (lambda q, k, v: (q[:, :, :60], k, v, None), "60 new tokens over 64 in all"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8], None), "head dimensions 8"),
        (lambda q, k, v: (q[:, :3], k, v, None), "3 heads share 2"),
    ],
)
def test_causal_kernel_refuses_other_attention(change, why):
    _, k, v = inputs((3, 4, 2, 64, 32), torch.bfloat16)
    q = torch.randn(3, 4, 64, 32).bfloat16()
    with pytest.raises(AssertionError, match=why):
        refusal = llvm_attention.refuses_causal(*change(q, k, v))
        assert refusal is None, refusal


def test_threads_change_no_bit(threads, monkeypatch):
    monkeypatch.setattr(llvm_attention, "PRODUCTS_PER_THREAD", 1)
    q, k, v = inputs((2, 6, 3, 2000, 64), torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(llvm_attention.attend_one(q, k, v, None, 0.125))
    assert all(torch.equal(result, results[0]) for result in results)
    q = torch.randn(2, 6, 2000, 64).bfloat16()
    if llvm_attention.refuses_causal(q, k, v, None) is None:
        results = []
        for count in (1, 2, 5):
            threads(count)
            results.append(llvm_attention.attend_causal(q, k, v, 0.125))
        assert all(torch.equal(result, results[0]) for result in results)


def test_scores_far_apart_and_far_from_zero_stay_finite():
    q = torch.full((1, 1, 1, 16), 100.0)
    k = torch.linspace(-100, 100, 40)[None, None, :, None].expand(1, 1, 40, 16).contiguous()
    v = torch.arange(40.0)[None, None, :, None].expand(1, 1, 40, 16).contiguous()
    assert torch.equal(llvm_attention.attend_one(q, k, v, None, 1.0), torch.full((1, 1, 1, 16), 39.0))
    assert torch.equal(llvm_attention.attend_one(-q, k, v, None, 1.0), torch.zeros(1, 1, 1, 16))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v, None), "2 new tokens"),
        (lambda q, k, v: (q.double(), k, v, None), "float64"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8], None), "head dimensions 8"),
        (lambda q, k, v: (q, k, v[..., :16], None), "head dimensions 32 and 16"),
        (lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, None), "contiguous"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0], None), "cache of keys and values is empty"),
        (lambda q, k, v: (q[:, :3], k, v, None), "3 heads share 2"),
        (lambda q, k, v: (q, k[:1], v[:1], None), r"and \(1, 2, 16, 32\)"),
        (lambda q, k, v: (q, k, v[:, :, :9], None), r"and \(3, 2, 9, 32\)"),
        (lambda q, k, v: (q, k, v, torch.zeros(3, 1, 1, 16)), "a mask of torch.float32"),
        (lambda q, k, v: (q, k, v, torch.ones(3, 4, 1, 16, dtype=torch.bool)), r"\(3, 4, 1, 16\)"),
    ],
)
def test_one_token_kernel_refuses_unsupported_inputs(change, why):
    with pytest.raises(AssertionError, match=why):
        refusal = llvm_attention.refuses_one(*change(*inputs((3, 4, 2, 16, 32), torch.bfloat16)))
        assert refusal is None, refusal


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of q in all calls of the kernels."""
    seen: list[tuple[int, ...]] = []
    for name in ("attend_one", "attend_causal"):
        attend = getattr(llvm_attention, name)
        wrapped = partial(lambda attend, q, *rest: seen.append(tuple(q.shape)) or attend(q, *rest), attend)
        monkeypatch.setattr(llvm_attention, name, wrapped)
    return seen


def quantized(make: Any, architecture: str, out: Path, **sizes: int) -> Path:
    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32))
    llmquant.quantize(make(architecture, dtype=torch.bfloat16, **sizes), out, recipe)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_a_loaded_model_uses_the_kernels_and_its_logits_stay_close(
    architecture, tiny_model, tmp_path, counted, monkeypatch
):
    folder = quantized(tiny_model, architecture, tmp_path / "out", head_dim=32)
    model = llmquant.load(folder, device="cpu")
    assert model.config._attn_implementation == attention.NAME
    monkeypatch.setattr("llmquant.runtime.load.use_attention", lambda model: None)
    plain = llmquant.load(folder, device="cpu")
    assert plain.config._attn_implementation == "sdpa"
    # The second text is shorter. Its padding, on the left, must be masked.
    tokens = torch.arange(5, 101).view(2, 48)
    seen = torch.ones_like(tokens)
    seen[1, :5] = 0
    logits = []
    counted.clear()
    for each in (model, plain):
        with torch.inference_mode():
            cache = each(tokens, attention_mask=seen, use_cache=True).past_key_values
            step = torch.cat([seen, torch.ones(2, 1, dtype=seen.dtype)], dim=1)
            logits.append(each(tokens[:, :1], attention_mask=step, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)
    assert counted and all(shape[0] == 2 and shape[2] == 1 for shape in counted)
    with torch.inference_mode():
        whole = [each(tokens).logits for each in (model, plain)]
    torch.testing.assert_close(*whole, rtol=0.05, atol=0.05)
    assert (2, 4, 48, 32) in counted or not jit.has_bfloat16_dot_product()
    counted.clear()
    with torch.enable_grad():
        model(inputs_embeds=torch.randn(1, 1, 64).bfloat16().requires_grad_()).logits.sum().backward()
    assert not counted


def test_a_fully_masked_sequence_gets_zeros():
    q, k, v = inputs((2, 4, 2, 16, 32), torch.bfloat16)
    seen = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    seen[1] = False
    y = llvm_attention.attend_one(q, k, v, seen, 0.2)
    assert torch.equal(y[0], llvm_attention.attend_one(q, k, v, None, 0.2)[0]) and not y[1].any()


@pytest.mark.slow
def test_a_pickled_model_runs_in_a_new_process(tiny_model, tmp_path):
    model = llmquant.load(quantized(tiny_model, "llama", tmp_path / "out", head_dim=32), device="cpu")
    tokens = torch.arange(5, 55)[None]
    torch.save((model, tokens, model(tokens).logits.detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; m, t, y = torch.load(sys.argv[1], weights_only=False); assert torch.equal(m(t).logits, y)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_models_that_compare_the_name_of_their_attention_keep_it(tiny_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    def chosen_attention(config: Any) -> str:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        attention.use_attention(model, torch.device("cpu"))
        return model.config._attn_implementation

    assert chosen_attention(AutoConfig.for_model("llama", num_hidden_layers=1)) == attention.NAME
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}
    for kind in ("deepseek_v32", "glm_moe_dsa"):
        try:
            config = AutoConfig.for_model(kind, **sizes)
        except ValueError:  # older versions of transformers lack this model
            continue
        assert chosen_attention(config) == "sdpa"


@pytest.mark.slow
def test_models_with_unsupported_attention_use_torch(tiny_model, tmp_path, counted):
    """Heads of width 8 are narrower than a vector. gemma2 caps its scores and keeps its own attention."""
    narrow = llmquant.load(quantized(tiny_model, "llama", tmp_path / "narrow", head_dim=8), device="cpu")
    capped = llmquant.load(quantized(tiny_model, "gemma2", tmp_path / "capped"), device="cpu")
    for model in (narrow, capped):
        with torch.inference_mode():
            assert model.generate(torch.arange(5, 15)[None], max_new_tokens=3, do_sample=False).shape[1] > 10
    assert not counted
