"""Write the random Llama checkpoints that the sections quantize and run.

A few channels of the embedding and a few input columns of each weight are larger than the others, as in trained models,
so that the inputs of the linears have outliers and the methods differ. Both checkpoints share their weight files.
"""

from __future__ import annotations

import itertools
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gpu.runs import Run, Sizes

LARGE, SMALL = "checkpoint", "checkpoint-1-block"
"""Folders of the two checkpoints in the scratch folder."""

READY, FAILED = "checkpoints.ready", "checkpoints.failed"
"""Files that say that both checkpoints are complete, or that they never will be."""

NUM_OUTLIERS = 8
"""Larger channels of the embedding, and larger input columns of each weight."""


def section_checkpoints(run: Run) -> None:
    """Write both checkpoints into the scratch folder, unless an earlier run has left them there."""
    if (run.scratch / READY).exists():
        run.log.write("checkpoints", note="those of an earlier run are used")
        return
    began = time.monotonic()
    try:
        num_tokens = write_checkpoints(run.scratch, run.sizes, run.device)
    except BaseException:
        (run.scratch / FAILED).touch()
        raise
    (run.scratch / READY).touch()
    size = sum(file.stat().st_size for file in (run.scratch / LARGE).iterdir())
    run.log.write(
        "checkpoints", seconds=round(time.monotonic() - began, 1), bytes=size, blocks=run.sizes.num_blocks,
        tokenizer_tokens=num_tokens,
    )  # fmt: skip


def wait_for_checkpoints(run: Run) -> tuple[Path, Path]:
    """Return the folders of the checkpoints with all blocks and with one block, once they are complete.

    Raises RuntimeError if they are not complete 15 seconds before the section ends.
    """
    began = time.monotonic()
    while not (run.scratch / READY).exists():
        if (run.scratch / FAILED).exists() or run.seconds_left < 15:
            raise RuntimeError("the random checkpoints were not written")
        time.sleep(0.1)
    run.log.write("waited", seconds=round(time.monotonic() - began, 1))
    return run.scratch / LARGE, run.scratch / SMALL


def write_checkpoints(folder: Path, sizes: Sizes, device: torch.device) -> int:
    """Write both checkpoints into a folder, and return the number of tokens of their tokenizer.

    Raises FileExistsError if the folder holds them already.
    """
    from safetensors.torch import save_file

    large, small = folder / LARGE, folder / SMALL
    for each in (large, small):
        each.mkdir(parents=True)
    num_shards = 1 + sizes.num_blocks
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(sizes, device), 1):
        name = _shard_name(number, num_shards)
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, large / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    _write_index(large, weight_map)
    shared = {_shard_name(number, num_shards): _shard_name(number, 2) for number in (1, 2)}
    for old, new in shared.items():
        os.link(large / old, small / new)
    _write_index(small, {key: shared[name] for key, name in weight_map.items() if name in shared})
    _write_config(large, sizes, sizes.num_blocks)
    _write_config(small, sizes, 1)
    return write_tokenizer((large, small), sizes.vocab_size)


def write_tokenizer(folders: tuple[Path, ...], vocab_size: int) -> int:
    """Train a byte-level BPE on Python's own documentation and sources, write it into each of the folders, and return
    its number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    max_bytes = 4_000_000 if vocab_size > 1000 else 100_000
    tokenizer.train_from_iterator(_texts(max_bytes), trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    for folder in folders:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _texts(max_bytes: int) -> Iterator[str]:
    """Yield texts that come with Python: its language reference, and the sources of its library."""
    try:
        from pydoc_data.topics import topics

        documentation = list(topics.values())
    except ImportError:  # some distributions leave it out
        documentation = []
    folder = Path(sysconfig.get_path("stdlib"))
    sources = (file.read_text(errors="replace") for file in sorted(folder.glob("*.py")))
    for text in itertools.chain(documentation, sources):
        yield text
        max_bytes -= len(text)
        if max_bytes < 0:
            return


def _shards(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each weight file: embedding, head and last norm, then one file for each block."""
    generator = torch.Generator(device).manual_seed(0)

    def weight(out_features: int, in_features: int) -> Tensor:
        weight_NK = torch.randn(out_features, in_features, generator=generator, device=device, dtype=torch.bfloat16)
        weight_NK *= 0.02
        weight_NK[:, torch.randperm(in_features, generator=generator, device=device)[:NUM_OUTLIERS]] *= 4
        return weight_NK

    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    kv_features = hidden // sizes.num_heads * sizes.num_kv_heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    yield {
        "model.embed_tokens.weight": weight(sizes.vocab_size, hidden),
        "lm_head.weight": weight(sizes.vocab_size, hidden),
        "model.norm.weight": ones,
    }
    for index in range(sizes.num_blocks):
        tensors = {
            "self_attn.q_proj": weight(hidden, hidden),
            "self_attn.k_proj": weight(kv_features, hidden),
            "self_attn.v_proj": weight(kv_features, hidden),
            "self_attn.o_proj": weight(hidden, hidden),
            "mlp.gate_proj": weight(inner, hidden),
            "mlp.up_proj": weight(inner, hidden),
            "mlp.down_proj": weight(hidden, inner),
            "input_layernorm": ones,
            "post_attention_layernorm": ones.clone(),
        }
        yield {f"model.layers.{index}.{name}.weight": tensor for name, tensor in tensors.items()}


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Write the index of the weight files."""
    size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_config(folder: Path, sizes: Sizes, num_blocks: int) -> None:
    """Write config.json and generation_config.json."""
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        num_hidden_layers=num_blocks,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
