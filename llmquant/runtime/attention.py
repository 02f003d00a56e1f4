"""CPU attention of a loaded model, with our kernels for one new token and for whole prompts.

transformers keeps a registry of attention functions, and a model's config names the function that the model uses.
`use_attention` registers the function `attention` and switches a model to it. For every call that
`kernels.llvm_attention` does not support, `attention` calls PyTorch's scaled dot-product attention ("sdpa").

Letters: S sequences, H query heads, G key and value heads, L query tokens, T cached tokens, D head dimension.
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
"""The name of our attention function in transformers' registry."""
PROGRAM_BYTES = 38 * 2**20
"""Memory that compiling the attention kernels takes once LLVM is loaded, measured on x86-64."""


def use_attention(model: Any, device: torch.device | None = None) -> None:
    """Switch a model from "sdpa" to our attention function, and compile its kernels.

    The model does not change if `can_use_attention` returns False.
    device: the device on which the model will run; None for the device it is on.
    """
    if not can_use_attention(model, device):
        return
    register_attention()
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads and width else None)
    if isinstance(head_dim, int):
        llvm_attention.compile_programs(model.dtype, head_dim)


def can_use_attention(model: Any, device: torch.device | None = None) -> bool:
    """Return whether `use_attention` would replace the attention of a model. The model does not change.

    device: the device on which the model will run; None for the device it is on.
    """
    names = {getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") for module in model.modules()}
    on_cpu = (device or model.device).type == "cpu"
    if names != {"sdpa"} or not on_cpu or not model.is_backend_compatible() or jit.unavailable_reason() is not None:
        return False
    return not depends_on_attention_name(model)


def attention_bytes(model: Any, device: torch.device) -> int:
    """Load LLVM, and return the bytes of memory that `use_attention` will take in addition.

    The result is 0 if `use_attention` would not change the model, or if a kernel was compiled before.
    """
    return 0 if llvm_attention.is_compiled() or not can_use_attention(model, device) else PROGRAM_BYTES


def register_attention() -> None:
    """Add our attention function to transformers' registry in this process. Repeated calls are harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def depends_on_attention_name(model: Any) -> bool:
    """Return whether the model's source branches on `_attn_implementation`, or is unavailable.

    If it branches, another name of the attention function would change the model's behaviour.
    """
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
    """Return the output [S, L, H, D] of the attention of query [S, H, L, D], key and value [S, G, T, D].

    transformers' registry requires this signature. The second result is None instead of the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    needs_gradient = any(tensor.requires_grad for tensor in (query, key, value)) and torch.is_grad_enabled()
    extras = ("position_bias", "cache", "softcap", "s_aux")
    has_extras = dropout or any(options.get(name) is not None for name in extras)
    is_traced = torch.compiler.is_compiling() or not all(map(jit.is_plain, (query, key, value)))
    if not (needs_gradient or has_extras or is_traced):
        factor = query.shape[3] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1:
            if llvm_attention.refuses_one(query, key, value, attention_mask) is None:
                return llvm_attention.attend_one(query, key, value, attention_mask, factor), None
        elif _is_causal(module, is_causal) and llvm_attention.refuses_causal(query, key, value, attention_mask) is None:
            return llvm_attention.attend_causal(query, key, value, factor), None
    options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _is_causal(module: nn.Module, requested: bool | None) -> bool:
    """Return the `is_causal` argument of a call, or the module's own attribute if the argument is None."""
    return bool(getattr(module, "is_causal", True) if requested is None else requested)
