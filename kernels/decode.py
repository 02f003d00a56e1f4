"""The small operations of a decode step as Triton kernels, each of which replaces several of PyTorch's.

A decode step of an 8B model reads its weights in a millisecond, so even two microseconds for each of a thousand small
kernels would dominate. All kernels except `attend` round to the dtype of their inputs where the modules of transformers
round, so their results differ from those modules only by the order of sums. `attend` also rounds the probabilities to
the dtype of the values before it multiplies them. The jit functions are in `triton_decode.py`; both files need Triton
when they are imported.

    rms_norm     root mean square norm; add_rms_norm: of a sum, which is returned too
    rotate       rotary position embedding of queries and keys
    silu_product silu(gate) * up
    store        write the newest key and value into a cache
    attend       attention of one query per sequence over the used places of a cache, split along the places

Letters: S sequences, H query heads, G key and value heads, R = H / G, T places of the cache, D head dimension, P parts
into which the places are split, W width of a norm, I width of a feed-forward layer.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from llmquant.kernels import triton_decode

BLOCK_PLACES = 64
"""Places of the cache that one iteration of `attend` reads."""
MAX_PARTS = 32
"""Largest number of parts into which `attend` splits the places."""
NUM_PROGRAMS = 264
"""Number of programs that `attend` starts if the cache is long enough: two for each multiprocessor of an H100."""
SILU_COLUMNS = 512
"""Columns of one program of `silu_product`."""
NORM_KINDS = (0, 1, 2)
"""Kinds of `rms_norm`: weight * round(x / rms); round(x / rms * (1 + weight)); round(x / rms * weight)."""


def rms_norm(x: Tensor, weight_W: Tensor, eps: float, kind: int) -> Tensor:
    """Return the norm of the rows of x [..., W] in the dtype of x. kind: one of `NORM_KINDS`."""
    return _launch_norm(x, None, weight_W, eps, kind)[1]


def add_rms_norm(x: Tensor, added: Tensor, weight_W: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    """Return (x + added, the norm of that) for two tensors [..., W] of one dtype. kind: one of `NORM_KINDS`."""
    return _launch_norm(x, added.contiguous(), weight_W, eps, kind)


def _launch_norm(x: Tensor, added: Tensor | None, weight_W: Tensor, eps: float, kind: int) -> tuple[Tensor, Tensor]:
    # The heads of a query are rows with one distance, and the queries of several sequences have another distance.
    inner = x.shape[-2] if x.ndim > 1 else 1
    width = x.shape[-1]
    rows = x.reshape(-1, inner, width)
    out = x.new_empty(x.shape)
    total = x if added is None else torch.empty_like(out)
    block = triton.next_power_of_2(width)
    triton_decode.rms_norm_kernel[(rows.shape[0] * inner,)](
        rows, rows if added is None else added, total, weight_W, out, width, inner, rows.stride(0), rows.stride(1), eps,
        KIND=kind, BLOCK=block, ADD=added is not None, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return total, out


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether `rotate` supports these tensors."""
    head_dim = q.shape[-1]
    return (
        q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
        and q.shape[2] == k.shape[2] == cos.shape[1] == 1
        and k.shape[-1] == cos.shape[-1] == sin.shape[-1] == head_dim
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape == sin.shape
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        and cos.stride(0) == sin.stride(0)
        and head_dim == triton.next_power_of_2(head_dim)
        and head_dim >= 32
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotary position embedding of q [S, H, 1, D] and k [S, G, 1, D], as transformers computes it.

    cos, sin: [S, 1, D] or [1, 1, D]; both halves of D have the same angles.
    """
    num_sequences, num_heads, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    triton_decode.rotate_kernel[(num_sequences, num_heads + num_kv_heads)](
        q, k, cos, sin, q_out, k_out, num_heads, num_kv_heads, q.stride(0), k.stride(0), q.stride(1), k.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0, HALF=head_dim // 2, num_warps=1,
    )  # fmt: skip
    return q_out, k_out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors [..., I] of one dtype."""
    width = gate.shape[-1]
    gates, ups = gate.reshape(-1, width), up.reshape(-1, width)
    out = gate.new_empty(gate.shape)
    triton_decode.silu_product_kernel[(gates.shape[0], triton.cdiv(width, SILU_COLUMNS))](
        gates, ups, out, width, gates.stride(0), ups.stride(0), BLOCK=SILU_COLUMNS, num_warps=4
    )
    return out


def can_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether `store` supports these tensors."""
    head_dim = key.shape[-1]
    return (
        key.shape == value.shape
        and key.shape[2] == 1
        and keys.is_contiguous()
        and values.is_contiguous()
        and keys.shape == values.shape
        and key.dtype == value.dtype == keys.dtype == values.dtype
        and key.stride(-1) == value.stride(-1) == 1
        and head_dim == triton.next_power_of_2(head_dim)
    )


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> None:
    """Write the key and the value [S, G, 1, D] of one token into place `length` (int64 [1]) of caches [S, G, T, D]."""
    num_sequences, num_heads, num_places, head_dim = keys.shape
    triton_decode.store_kernel[(num_sequences, num_heads)](
        key, value, keys, values, length, num_places, num_heads, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), D=head_dim, num_warps=1,
    )  # fmt: skip


def can_attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Return whether `attend` supports these tensors."""
    head_dim = q.shape[-1]
    return (
        mask is not None
        and mask.dtype == torch.bool
        and mask.shape == (q.shape[0], 1, 1, keys.shape[2])
        and mask.stride(-1) == 1
        and q.shape[2] == 1
        and keys.shape == values.shape
        and keys.shape[-1] == head_dim
        and q.shape[1] % keys.shape[1] == 0
        and q.dtype == keys.dtype == values.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and head_dim in (32, 64, 128, 256)
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, length: Tensor, scale: float) -> Tensor:
    """Return the attention [S, 1, H, D] of q [S, H, 1, D] over the first `length + 1` places of a cache [S, G, T, D].

    mask: bool [S, 1, 1, T], True where a place is seen; each sequence must see at least one. length: int64 [1].
    """
    num_sequences, num_heads, _, head_dim = q.shape
    num_kv_heads, num_places = keys.shape[1], keys.shape[2]
    per_head = num_heads // num_kv_heads
    num_pairs = num_sequences * num_kv_heads
    most = min(triton.cdiv(num_places, BLOCK_PLACES), MAX_PARTS)
    blocks_per_part = triton.cdiv(triton.cdiv(num_places, BLOCK_PLACES), min(most, max(NUM_PROGRAMS // num_pairs, 1)))
    places_per_part = blocks_per_part * BLOCK_PLACES
    num_parts = triton.cdiv(num_places, places_per_part)
    sums = q.new_empty((num_pairs, num_parts, per_head, head_dim), dtype=torch.float32)
    maxima = q.new_empty((2, num_pairs, num_parts, per_head), dtype=torch.float32)
    out = q.new_empty((num_sequences, 1, num_heads, head_dim))
    q = q.contiguous()
    triton_decode.attend_kernel[(num_pairs, num_parts)](
        q, keys, values, mask, length, sums, maxima[0], maxima[1], num_kv_heads, num_places, places_per_part,
        mask.stride(0), scale, R=per_head, ROWS=max(16, triton.next_power_of_2(per_head)), D=head_dim,
        BLOCK=BLOCK_PLACES, num_warps=4, num_stages=2,
    )  # fmt: skip
    triton_decode.combine_kernel[(num_pairs, per_head)](
        sums, maxima[0], maxima[1], out, num_parts, R=per_head, PARTS=triton.next_power_of_2(num_parts), D=head_dim,
        num_warps=2,
    )  # fmt: skip
    return out
