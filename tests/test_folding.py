"""Smoothing pairs: those of every family, found without its name; exact once folded; and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, random_model
from torch import nn
from torch.nn import functional as F

from llmquant.models.blocks import find_blocks, watch
from llmquant.models.folding import Bench, find_folds, fold, prove_folds

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# Producer -> (rows that can be scaled, linears that read them).
ATTENTION_AND_MLP = {"self_attn.v_proj": (32, ("self_attn.o_proj",)), "mlp.up_proj": (96, ("mlp.down_proj",))}
LLAMA = ATTENTION_AND_MLP | {"input_layernorm": (64, QKV), "post_attention_layernorm": (64, GATE_UP)}
WIDE_HEADS = LLAMA | {"self_attn.v_proj": (64, ("self_attn.o_proj",))}
GEMMA = {name: pair for name, pair in WIDE_HEADS.items() if name != "post_attention_layernorm"} | {
    "pre_feedforward_layernorm": (64, GATE_UP)
}
PAIRS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": WIDE_HEADS,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "stablelm": LLAMA,
    "olmo2": ATTENTION_AND_MLP,
    "cohere2": ATTENTION_AND_MLP | {"input_layernorm": (64, (*QKV, *GATE_UP))},
    "phi3": {
        "input_layernorm": (64, ("self_attn.qkv_proj",)),
        "self_attn.qkv_proj": (32, ("self_attn.o_proj",)),
        "post_attention_layernorm": (64, ("mlp.gate_up_proj",)),
        "mlp.gate_up_proj": (96, ("mlp.down_proj",)),
    },
    "opt": {
        "self_attn_layer_norm": (64, QKV),
        "self_attn.v_proj": (64, ("self_attn.out_proj",)),
        "final_layer_norm": (64, ("fc1",)),
        "fc1": (128, ("fc2",)),
    },
    "gpt_neox": {
        "input_layernorm": (64, ("attention.query_key_value",)),
        "attention.query_key_value": (64, ("attention.dense",)),
        "post_attention_layernorm": (64, ("mlp.dense_h_to_4h",)),
    },
    "falcon": {
        "input_layernorm": (64, ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        "self_attention.query_key_value": (16, ("self_attention.dense",)),
    },
    "gpt2": {
        "ln_1": (64, ("attn.c_attn",)),
        "attn.c_attn": (64, ("attn.c_proj",)),
        "ln_2": (64, ("mlp.c_fc",)),
    },
}


def bench_of(block: nn.Module, *args: object, **kwargs: object) -> Bench:
    with torch.no_grad():
        return Bench(block, watch(block, lambda: block(*args, **kwargs)), (args, kwargs))


def benches_of(model: nn.Module, num_tokens: int = 48) -> dict[str, Bench]:
    """Every decoder block of a model with what it is called with."""
    calls = {}
    tokens = torch.randint(3, 500, (1, num_tokens), generator=torch.Generator().manual_seed(0))

    def note(name):
        return lambda module, args, kwargs: calls.__setitem__(name, (args, kwargs))

    names = find_blocks(model)[1]
    handles = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: bench_of(model.get_submodule(name), *args, **kwargs) for name, (args, kwargs) in calls.items()}


def random_choices(folds):
    generator = torch.Generator().manual_seed(7)
    choices = []
    for pair in folds:
        scale_R = torch.exp(torch.randn(pair.producer.num_rows, generator=generator))
        choices.append((pair, torch.where(pair.rows_R, scale_R, 1.0)))
    return choices


def test_every_architecture_has_its_pairs_listed_here():
    assert PAIRS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pairs_of_every_architecture_are_found_and_folding_keeps_the_model(architecture):
    model = random_model(ARCHITECTURES[architecture]())
    tokens = torch.randint(3, 500, (2, 60), generator=torch.Generator().manual_seed(1))
    folded_model = copy.deepcopy(model)
    for name, bench in benches_of(model).items():
        found = find_folds(bench)
        folds = prove_folds(bench, found)
        assert folds == found
        # A ReLU that no token opens leaves its row unknown.
        slack = 8 if architecture == "opt" else 0
        stages = bench.plan.stages
        assert len(folds) == len(PAIRS[architecture])
        for pair in folds:
            rows, readers = PAIRS[architecture][pair.producer.name]
            assert rows - slack <= int(pair.rows_R.sum()) <= rows
            assert tuple(linear for reading in pair.readings for linear in stages[reading.stage].linears) == readers
        with torch.no_grad():
            changed = fold(bench.parameters, bench.block, bench.plan, random_choices(folds))
            for key, value in changed.items():
                folded_model.get_parameter(f"{name}.{key}").copy_(value)
    with torch.no_grad():
        expected, got = model(tokens).logits, folded_model(tokens).logits
    assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_bfloat16_blocks_show_the_same_pairs_and_are_left_as_they_were(architecture):
    model = random_model(ARCHITECTURES[architecture](), dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    for bench in benches_of(model).values():
        proven = prove_folds(bench, find_folds(bench))
        assert {pair.producer.name for pair in proven} == PAIRS[architecture].keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_heads_that_share_a_value_head_share_its_rows():
    bench = next(iter(benches_of(random_model(ARCHITECTURES["llama"]())).values()))
    pair = next(pair for pair in find_folds(bench) if pair.producer.name == "self_attn.v_proj")
    # Four heads of 16 channels on two value heads.
    row_K = pair.readings[0].row_K
    assert torch.equal(row_K.view(2, 2, 16), torch.arange(32).view(2, 1, 16).expand(2, 2, 16))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * self.weight


class FeedForward(nn.Module):
    """A block with one norm, a gated feed-forward whose two halves are laid out as asked, and something that leaks."""

    def __init__(self, leak: str = "", interleaved: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leak, self.interleaved = leak, interleaved
        self.norm, self.up, self.down = Norm(32), nn.Linear(32, 96), nn.Linear(48, 32)
        self.table = nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        normed = self.norm(x)
        both = self.up(normed)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
        hidden = F.silu(gate) * up
        out = x + self.down(hidden)
        if self.leak == "norm":
            out = out + 0.1 * normed @ self.table
        if self.leak == "up":
            out = out + 0.1 * up[..., :32]
        return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_up_rows_of_a_fused_projection_are_found(interleaved):
    bench = bench_of(FeedForward(interleaved=interleaved), torch.randn(1, 40, 32))
    folds = prove_folds(bench, find_folds(bench))
    pair = next(pair for pair in folds if pair.producer.name == "up")
    expected_K = 2 * torch.arange(48) + 1 if interleaved else torch.arange(48) + 48
    assert torch.equal(pair.readings[0].row_K, expected_K)


@pytest.mark.parametrize(("leak", "left"), [("", {"norm", "up"}), ("norm", {"up"}), ("up", {"norm"})])
def test_a_producer_that_something_else_reads_is_found_but_not_proven(leak, left):
    bench = bench_of(FeedForward(leak), torch.randn(1, 40, 32))
    found = find_folds(bench)
    assert {pair.producer.name for pair in found} == {"norm", "up"}
    assert {pair.producer.name for pair in prove_folds(bench, found)} == left


def test_a_leak_shows_beside_a_huge_token():
    x = torch.randn(1, 40, 32)
    x[0, 0] *= 1e4
    bench = bench_of(FeedForward("norm"), x)
    assert {pair.producer.name for pair in prove_folds(bench, find_folds(bench))} == {"up"}
