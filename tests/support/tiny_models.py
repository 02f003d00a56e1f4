"""Tiny random models of many families, for tests that must pass for every architecture.

`ARCHITECTURES` maps the name of a family to a function that returns its configuration: two or three decoder blocks, a
hidden size of 64, a feed-forward size of 96 or 128 (all multiples of 32), and fewer key-value heads than heads if the
family can have that. The tokenizer is a byte-level BPE trained on a page of Python's manual, so nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 512
MAX_POSITIONS = 256
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_SPECIAL = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
_LLAMA_LIKE = _SPECIAL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}


def _config(model_type: str, **values: object) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **values)


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _config("llama", **_LLAMA_LIKE),
    "qwen2": _config("qwen2", **_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": _config("qwen3", **_LLAMA_LIKE, head_dim=32),
    "mistral": _config("mistral", **_LLAMA_LIKE | {"num_hidden_layers": 3}, sliding_window=None),
    "gemma2": _config("gemma2", **_LLAMA_LIKE, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    # It has two kinds of attention; each block has one of them.
    "gemma3": _config(
        "gemma3_text",
        **_LLAMA_LIKE,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
    # One linear computes q, k and v, and one computes gate and up.
    "phi3": _config("phi3", **_LLAMA_LIKE, sliding_window=None),
    # It has learned positions, biases and ReLU.
    "opt": _config(
        "opt",
        **_SPECIAL,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        do_layer_norm_before=True,
    ),
    # Attention and feed-forward are parallel; q, k and v are interleaved by head.
    "gpt_neox": _config(
        "gpt_neox",
        **_SPECIAL,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
    ),
    # All heads share one key-value head; attention and feed-forward share one layer norm.
    "falcon": _config(
        "falcon",
        **_SPECIAL,
        hidden_size=64,
        ffn_hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
        alibi=False,
        max_position_embeddings=MAX_POSITIONS,
    ),
    # Its linears are Conv1D modules, whose weights are [in, out].
    "gpt2": _config("gpt2", **_SPECIAL, n_embd=64, n_inner=128, n_layer=2, n_head=4, n_positions=MAX_POSITIONS),
    "stablelm": _config("stablelm", **_LLAMA_LIKE, partial_rotary_factor=0.25),
    # Its norms come after attention and feed-forward, not before.
    "olmo2": _config("olmo2", **_LLAMA_LIKE),
    # Attention and feed-forward are parallel and share one norm.
    "cohere2": _config(
        "cohere2",
        **_LLAMA_LIKE,
        logit_scale=1.0,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def random_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model with random weights, larger than the usual initialization, so that its outputs vary.

    Norms and biases are random too.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                else:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


@functools.cache
def _trained_tokenizer() -> str:
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["assignment"]], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCAB_SIZE tokens with a chat template; it adds no BOS token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(
    folder: Path, architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> Path:
    """Write a checkpoint of an architecture with its tokenizer and return the folder.

    overrides: set fields of the configuration, which must exist.
    """
    config = ARCHITECTURES[architecture]()
    for name, value in overrides.items():
        assert hasattr(config, name), f"{architecture} has no {name}"
        setattr(config, name, value)
    random_model(config, seed, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_small_model(folder: Path, model_type: str, **fields: object) -> Path:
    """Write a checkpoint of any model type of transformers with a tokenizer and return the folder.

    fields: of the configuration, in addition to those that most types have or in place of them; None omits a field.
    """
    values = _LLAMA_LIKE | {"intermediate_size": 64} | fields
    config = AutoConfig.for_model(model_type, **{name: value for name, value in values.items() if value is not None})
    random_model(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
