"""Names of tensors that a training wrapper left in a checkpoint.

A state dict that was saved from within a wrapper carries its attribute names: `module.` (DataParallel), `_orig_mod.`
(torch.compile), `base_model.model.` (PEFT), a second `model.`. They say nothing about the model, so the tensors are
read without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PREFIXES = {
    "base_model.model.": ("base_model.model.",),
    "module.": ("module.",),
    "_forward_module.": ("_forward_module.",),
    # A class of one's own that holds the model as `self.model`.
    "model.": ("model.model.", "model.lm_head."),
}
"""Prefix that is removed -> the beginnings of names that show it. Every tensor's name must have one of them."""
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Removed wherever they stand between dots: no model has modules of these names."""
ADAPTER_PARTS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer",
    "modules_to_save",
)
"""Modules and parameters of an adapter that is not merged."""


def unwrapped_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Stored name -> name without wrappers, for all tensors of a checkpoint; and the wrappers that were removed."""
    plain = {name: name for name in names}
    removed: dict[str, None] = {}
    for name in plain:
        parts = name.split(".")
        kept = [part for part in parts if part not in PARTS]
        removed |= dict.fromkeys(f"{part}." for part in parts if part in PARTS)
        plain[name] = ".".join(kept)
    while prefix := _shared_prefix(plain.values()):
        plain = {name: rest.removeprefix(prefix) for name, rest in plain.items()}
        removed[prefix] = None
    return plain, tuple(removed)


def _shared_prefix(names: Collection[str]) -> str | None:
    """The prefix of a wrapper that all names have, or None."""
    shared = (prefix for prefix, starts in PREFIXES.items() if names and all(name.startswith(starts) for name in names))
    return next(shared, None)


def adapter_tensor(names: Iterable[str]) -> str | None:
    """The first of these tensors that belongs to an adapter, or None."""
    return next((name for name in names if any(part in ADAPTER_PARTS for part in name.split("."))), None)
