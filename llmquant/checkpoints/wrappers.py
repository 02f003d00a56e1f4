"""Remove the names of training wrappers from tensor names.

The state dict of a wrapped model contains attribute names of the wrapper: `module.` (DataParallel), `_orig_mod.`
(torch.compile), `base_model.model.` (PEFT), or a second `model.`. They are not part of the model's own names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PREFIXES = {
    "base_model.model.": ("base_model.model.",),
    "module.": ("module.",),
    "_forward_module.": ("_forward_module.",),
    # A user's class that holds the model as `self.model`.
    "model.": ("model.model.", "model.lm_head."),
}
"""Removed prefix -> possible starts of tensor names. The prefix is removed if every name begins with one of these."""
WRAPPER_MODULES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Module names that are removed anywhere in a tensor name. No model has modules of these names."""
ADAPTER_MODULES = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer",
    "modules_to_save",
)
"""Names of modules and parameters of an unmerged adapter."""


def unwrapped_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return {stored name: name without wrappers} for all tensors of a checkpoint, and the removed names."""
    plain = {name: name for name in names}
    removed: dict[str, None] = {}
    for name in plain:
        parts = name.split(".")
        plain[name] = ".".join(part for part in parts if part not in WRAPPER_MODULES)
        removed |= dict.fromkeys(f"{part}." for part in parts if part in WRAPPER_MODULES)
    while prefix := _shared_prefix(plain.values()):
        plain = {name: rest.removeprefix(prefix) for name, rest in plain.items()}
        removed[prefix] = None
    return plain, tuple(removed)


def _shared_prefix(names: Collection[str]) -> str | None:
    """Return the prefix of a wrapper that all names have, or None."""
    shared = (prefix for prefix, starts in PREFIXES.items() if names and all(name.startswith(starts) for name in names))
    return next(shared, None)


def adapter_tensor(names: Iterable[str]) -> str | None:
    """Return the first of these tensors that belongs to an adapter, or None."""
    return next((name for name in names if any(part in ADAPTER_MODULES for part in name.split("."))), None)
