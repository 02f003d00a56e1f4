"""Tests of the kernels of a decode step on the CPU, in Triton's interpreter. `test_fused_step.py` runs this file.

It runs in a process of its own, because TRITON_INTERPRET=1 must be set before the kernels are imported. The interpreter
does not compute with bfloat16.
"""

from __future__ import annotations

from typing import Any

import pretend_kernels
import pytest
import torch
import torch.nn.functional as F
from quantized_linears import quantized_model
from tiny_models import ARCHITECTURES, random_model
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from llmquant.kernels import decode, gpu
from llmquant.runtime import decode_graph, decoding, fused_step
from llmquant.runtime.decode_graph import graphs_of
from llmquant.runtime.generate import SamplingParams, run_timed, settings_of
from llmquant.runtime.shared_launch import share_launches

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def _nan_memory_and_seed() -> None:
    """Fill new tensors with NaN, so that memory which a kernel does not write is noticed; and set a seed."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def heads(num_sequences: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return states [S, H, 1, D] with the strides of a model, in which a projection [S, 1, H * D] was transposed."""
    return torch.randn(num_sequences, 1, num_heads, head_dim).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("kind", "norm_class"), [(0, LlamaRMSNorm), (1, Gemma3RMSNorm), (2, Olmo2RMSNorm)])
def test_rms_norm_rounds_as_the_module(kind: int, norm_class: Any, dtype: torch.dtype) -> None:
    norm = norm_class(200).to(dtype)
    norm.weight.data = torch.randn(200).to(dtype)
    x = torch.randn(3, 1, 200).to(dtype)
    eps = 1e-6
    result = decode.rms_norm(x, norm.weight, eps, kind)
    torch.testing.assert_close(result, norm(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if dtype == torch.float16:
        assert (result == norm(x)).float().mean() > 0.99
    added = torch.randn_like(x)
    total, result = decode.add_rms_norm(x, added, norm.weight, eps, kind)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(result, norm(x + added), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_outputs_of_linears_that_share_a_launch_are_read_where_they_lie() -> None:
    """They are columns of one tensor, so the distance between the rows of two sequences exceeds their width."""
    shared = torch.randn(3, 1, 900).half()
    weight_W = torch.randn(64).half()
    query, gate, up = shared[..., :256], shared[..., 256:506], shared[..., 506:756]
    heads_of_query = query.view(3, 1, 4, 64)
    result = decode.rms_norm(heads_of_query, weight_W, 1e-6, 0)
    assert torch.equal(result, decode.rms_norm(heads_of_query.contiguous(), weight_W, 1e-6, 0))
    assert torch.equal(decode.silu_product(gate, up), decode.silu_product(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_rotation_and_silu_product_have_the_bits_of_torch(num_sequences: int, dtype: torch.dtype) -> None:
    q, k = heads(num_sequences, 8, 64, dtype), heads(num_sequences, 2, 64, dtype)
    angles = torch.randn(num_sequences, 1, 32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert decode.can_rotate(q, k, cos, sin)
    for result, truth in zip(decode.rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(result, truth)
    gate, up = torch.randn(2, num_sequences, 1, 700).to(dtype)
    result = decode.silu_product(gate, up)
    torch.testing.assert_close(result, F.silu(gate) * up, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("num_sequences", "num_heads", "num_kv_heads", "head_dim", "num_places", "last"),
    [(1, 8, 2, 64, 512, 301), (3, 4, 4, 32, 512, 511), (2, 6, 1, 128, 1536, 700), (1, 2, 2, 64, 512, 0)],
)
def test_attention_over_a_cache(
    num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int, num_places: int, last: int, dtype: torch.dtype
) -> None:
    q = heads(num_sequences, num_heads, head_dim, dtype)
    key, value = (heads(num_sequences, num_kv_heads, head_dim, dtype) for _ in range(2))
    size = (num_sequences, num_kv_heads, num_places, head_dim)
    keys, values = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    length = torch.tensor([last])
    expected = [cache.index_copy(2, length, new) for cache, new in ((keys, key), (values, value))]
    decode.store(key, value, keys, values, length)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    keys[:, :, last + 1 :] = float("nan")  # places that were never written are not read
    mask = (torch.arange(num_places) <= last).repeat(num_sequences, 1, 1, 1)
    mask[-1, ..., : last // 2] = False
    result = decode.attend(q, keys, values, mask, length, 0.2)
    seen_keys, seen_values = (tensor[:, :, : last + 1].double() for tensor in (keys, values))
    truth = F.scaled_dot_product_attention(
        q.double(), seen_keys, seen_values, attn_mask=mask[..., : last + 1], scale=0.2, enable_gqa=True
    )
    error = (result.double() - truth.transpose(1, 2)).abs().max() / truth.abs().max()
    assert result.shape == (num_sequences, 1, num_heads, head_dim) and error < max(2 * torch.finfo(dtype).eps, 4e-6)


def run(family: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Any, fused_step.FusedStep]:
    """Decode with a random model with and without replaced kernels, and return (run, replacements)."""
    config = ARCHITECTURES[family]()
    for name, value in fields.items():
        setattr(config, name, value)
    return run_model(random_model(config), monkeypatch)


def run_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, fused_step.FusedStep]:
    """Decode with and without replaced kernels, compare the tokens, and return (run, replacements)."""

    def call_again(step: Any, device: torch.device) -> Any:
        step()
        return step

    monkeypatch.setitem(decoding.CAPTURES, "cpu", call_again)
    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(decode_graph, "MIN_PLACES", 128)  # the interpreter is slow
    torch.use_deterministic_algorithms(False)
    settings = settings_of(model, SamplingParams(max_new_tokens=3, greedy=True))
    settings.eos_token_id, settings.pad_token_id, settings.repetition_penalty = None, 1, 1.3
    tokens_SL, mask_SL = torch.randint(2, 500, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask_SL[0, :4] = 0
    fused = run_timed(model, tokens_SL, mask_SL, settings)
    assert fused.decoding == "cuda graph"
    assert torch.equal(fused.tokens_SL, run_timed(model, tokens_SL, mask_SL, settings, cuda_graph=False).tokens_SL)
    (graph,) = graphs_of(model).graphs.values()
    return fused, graph.fused


def test_a_model_decodes_with_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run("qwen3", monkeypatch)
    assert result.fused == ("add_rms_norm", "attend", "rms_norm", "rotate", "silu_product", "store")


def test_models_with_other_formulas_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of this llama are too small for two kernels; an activation is not silu."""
    result, fused = run("llama", monkeypatch, hidden_act="gelu")
    assert fused.used == {"add_rms_norm", "rms_norm", "store"}
    assert [name for name in result.fused if name.startswith("-")] == [
        "-attend: the model's attention has extras, or a mask or shape of another kind",
        "-rotate: the model's rotary embedding has further inputs or other shapes",
    ]


def test_fused_kernels_and_shared_launches_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step of two sequences launches one kernel for q, k and v of a block, and one for gate and up."""
    launches: list[int] = []

    def launch(x_MK: torch.Tensor, prepared: Any, bias_N: Any, shape: Any, *tiles: Any) -> torch.Tensor:
        launches.append(shape.out_features)
        return pretend_kernels.launch(x_MK, prepared, bias_N, shape, *tiles)

    monkeypatch.setattr(gpu, "launch", launch)
    model = quantized_model("qwen3", torch.float16)
    config = model.config
    assert len(share_launches(model)) == 2 * config.num_hidden_layers
    result, _ = run_model(model, monkeypatch)
    assert result.fused == ("add_rms_norm", "attend", "rms_norm", "rotate", "silu_product", "store")
    launches.clear()
    (graph,) = graphs_of(model).graphs.values()
    with torch.inference_mode():  # as in `run_timed`, which made the tensors of the graph
        graph.replay()
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    block = [qkv, config.hidden_size, 2 * 96 + 32, config.hidden_size]  # up starts at a multiple of 64
    assert launches == block * config.num_hidden_layers
