"""Attention of a loaded model on the CPU: ours for one new token, transformers' for everything else.

transformers keeps a registry of attention functions and lets a model name the one it uses. Ours is registered when the
first model asks for it; where `kernels.llvm_attention` cannot take a call, it does what "sdpa" does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmquant.kernels import jit, llvm_attention

NAME = "llmquant"


def use_attention(model: Any) -> None:
    """Let a model whose attention is "sdpa" on a CPU use ours; any other model is left alone."""
    is_sdpa = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if not is_sdpa or model.device.type != "cpu" or not model.is_backend_compatible() or jit.why_not() is not None:
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [S, H, L, D], key and value [S, G, T, D] -> y [S, L, H, D]; the signature is that of the registry."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wants_gradient = any(tensor.requires_grad for tensor in (query, key, value)) and torch.is_grad_enabled()
    asked = dropout or any(options.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    ours = not (wants_gradient or asked or torch.compiler.is_compiling())
    if ours and llvm_attention.refuses(query, key, value, attention_mask) is None:
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        return llvm_attention.attend(query, key, value, attention_mask, scaling), None
    options |= {"dropout": dropout, "scaling": scaling}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
