"""Distribute the tensors of all parts over the shards of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from llmquant.checkpoints.files import SINGLE_FILE


def plan_shards(parts: Mapping[str, Mapping[str, int]], max_shard_bytes: int) -> list[dict[str, str]]:
    """Return {tensor: part} for each shard.

    parts: {part: {tensor: bytes}}. Shards are filled in the order of the parts, and a part is split only if it is
    larger than max_shard_bytes. A single tensor may exceed the limit.
    """
    shards: list[dict[str, str]] = [{}]
    filled = 0
    for part, sizes in parts.items():
        pieces = [sizes] if sum(sizes.values()) <= max_shard_bytes else [{key: size} for key, size in sizes.items()]
        for piece in pieces:
            num_bytes = sum(piece.values())
            if shards[-1] and filled + num_bytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1].update(dict.fromkeys(piece, part))
            filled += num_bytes
    return shards


def shard_name(index: int, count: int) -> str:
    """Return the file name of a shard: `model.safetensors` if it is the only one."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
