"""Attention of a loaded model on the CPU: ours for one new token and for whole texts, torch's for everything else.

transformers keeps a registry of attention functions and lets a model name the one it uses. Ours is registered when the
first model asks for it; where `kernels.llvm_attention` cannot take a call, it does what "sdpa" does.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.kernels import jit, llvm_attention

NAME = "llmquant"


def use_attention(model: Any, device: torch.device | None = None) -> None:
    """Let a model whose attention is "sdpa" on a CPU use ours; any other model is left alone, and so is one that makes
    its masks or its choices by that name.

    device: where it will run, if it is not there yet.
    """
    names = {getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") for module in model.modules()}
    on_cpu = (device or model.device).type == "cpu"
    if names != {"sdpa"} or not on_cpu or not model.is_backend_compatible() or jit.why_not() is not None:
        return
    if asks_for_its_attention(model):
        return
    register()
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads and width else None)
    if isinstance(head_dim, int):
        llvm_attention.prepare(model.dtype, head_dim)


def register() -> None:
    """Make our attention known to transformers in this process."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def asks_for_its_attention(model: Any) -> bool:
    """Whether the code of the model compares the name of its attention with something: under another name it would do
    something else. Code that cannot be read counts as code that does."""
    for name in {type(module).__module__ for module in model.modules()}:
        if name.split(".")[0] in ("torch", "llmquant"):
            continue
        try:
            source = inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            return True
        if re.search(r"_attn_implementation\b[\s)\]]*(?:#[^\n]*\s*)*(?:==|!=|in\b|not\s+in\b)", source):
            return True
    return False


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [S, H, L, D], key and value [S, G, T, D] -> y [S, L, H, D]; the signature is that of the registry."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    wants_gradient = any(tensor.requires_grad for tensor in (query, key, value)) and torch.is_grad_enabled()
    asked = dropout or any(options.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    watched = torch.compiler.is_compiling() or not all(map(jit.is_plain, (query, key, value)))
    if not (wants_gradient or asked or watched):
        factor = query.shape[3] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1:
            if llvm_attention.refuses_one(query, key, value, attention_mask) is None:
                return llvm_attention.attend_one(query, key, value, attention_mask, factor), None
        elif _is_causal(module, is_causal) and llvm_attention.refuses_causal(query, key, value, attention_mask) is None:
            return llvm_attention.attend_causal(query, key, value, factor), None
    options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if asked is None else asked)
