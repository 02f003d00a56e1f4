"""Scale folding: folds of every architecture are found without a table, are exact, and are refused if they are not."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, random_model
from torch import nn
from torch.nn import functional as F

from llmquant.hooks import hooked
from llmquant.models.blocks import find_blocks, trace_structure
from llmquant.models.scale_folding import BlockProbe, find_folds, fold_scales, verify_folds

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# Producer -> (rows that can be scaled, linears that read them).
ATTENTION_AND_MLP = {"self_attn.v_proj": (32, ("self_attn.o_proj",)), "mlp.up_proj": (96, ("mlp.down_proj",))}
LLAMA = ATTENTION_AND_MLP | {"input_layernorm": (64, QKV), "post_attention_layernorm": (64, GATE_UP)}
WIDE_HEADS = LLAMA | {"self_attn.v_proj": (64, ("self_attn.o_proj",))}
GEMMA = {name: fold for name, fold in WIDE_HEADS.items() if name != "post_attention_layernorm"} | {
    "pre_feedforward_layernorm": (64, GATE_UP)
}
FOLDS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {
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


def probe_of(block: nn.Module, *args: object, **kwargs: object) -> BlockProbe:
    with torch.no_grad():
        return BlockProbe(block, trace_structure(block, lambda: block(*args, **kwargs)), (args, kwargs))


def probes_of(model: nn.Module, num_tokens: int = 48) -> dict[str, BlockProbe]:
    """A probe of every decoder block of a model, on the arguments of a forward pass over random tokens."""
    calls = {}
    tokens = torch.randint(3, 500, (1, num_tokens), generator=torch.Generator().manual_seed(0))

    def record(name):
        return lambda module, args, kwargs: calls.__setitem__(name, (args, kwargs))

    hooks = [(model.get_submodule(name), record(name)) for name in find_blocks(model)[1]]
    with torch.no_grad(), hooked(hooks, before=True):
        model(tokens, use_cache=False)
    return {name: probe_of(model.get_submodule(name), *args, **kwargs) for name, (args, kwargs) in calls.items()}


def random_choices(folds):
    generator = torch.Generator().manual_seed(7)
    choices = []
    for fold in folds:
        scale_R = torch.exp(torch.randn(fold.producer.num_rows, generator=generator))
        choices.append((fold, torch.where(fold.rows_R, scale_R, 1.0)))
    return choices


def test_every_architecture_has_its_folds_listed_here():
    assert FOLDS.keys() == ARCHITECTURES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folds_of_every_architecture_are_found_and_do_not_change_the_logits(architecture):
    model = random_model(ARCHITECTURES[architecture]())
    tokens = torch.randint(3, 500, (2, 60), generator=torch.Generator().manual_seed(1))
    folded_model = copy.deepcopy(model)
    for name, probe in probes_of(model).items():
        found = find_folds(probe)
        folds = verify_folds(probe, found)
        assert folds == found
        # The row of a ReLU that no token opens stays unknown.
        slack = 8 if architecture == "opt" else 0
        input_groups = probe.structure.input_groups
        assert len(folds) == len(FOLDS[architecture])
        for fold in folds:
            rows, linears = FOLDS[architecture][fold.producer.name]
            assert rows - slack <= int(fold.rows_R.sum()) <= rows
            assert (
                tuple(linear for consumer in fold.consumers for linear in input_groups[consumer.input_group].linears)
                == linears
            )
        with torch.no_grad():
            changed = fold_scales(probe.parameters, probe.block, probe.structure, random_choices(folds))
            for key, value in changed.items():
                folded_model.get_parameter(f"{name}.{key}").copy_(value)
    with torch.no_grad():
        expected, got = model(tokens).logits, folded_model(tokens).logits
    assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_bfloat16_blocks_have_the_same_folds_and_do_not_change(architecture):
    model = random_model(ARCHITECTURES[architecture](), dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    for probe in probes_of(model).values():
        verified = verify_folds(probe, find_folds(probe))
        assert {fold.producer.name for fold in verified} == FOLDS[architecture].keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_query_heads_that_share_a_value_head_share_its_rows():
    probe = next(iter(probes_of(random_model(ARCHITECTURES["llama"]())).values()))
    fold = next(fold for fold in find_folds(probe) if fold.producer.name == "self_attn.v_proj")
    # Four heads of 16 channels on two value heads.
    row_K = fold.consumers[0].row_K
    assert torch.equal(row_K.view(2, 2, 16), torch.arange(32).view(2, 1, 16).expand(2, 2, 16))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:]) * self.weight


class FeedForward(nn.Module):
    """A block with a norm and a fused gate/up projection; `leak` names a module whose output something else reads."""

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
    probe = probe_of(FeedForward(interleaved=interleaved), torch.randn(1, 40, 32))
    folds = verify_folds(probe, find_folds(probe))
    fold = next(fold for fold in folds if fold.producer.name == "up")
    expected_K = 2 * torch.arange(48) + 1 if interleaved else torch.arange(48) + 48
    assert torch.equal(fold.consumers[0].row_K, expected_K)


@pytest.mark.parametrize(("leak", "verified"), [("", {"norm", "up"}), ("norm", {"up"}), ("up", {"norm"})])
def test_a_producer_that_something_else_reads_is_found_but_not_verified(leak, verified):
    probe = probe_of(FeedForward(leak), torch.randn(1, 40, 32))
    found = find_folds(probe)
    assert {fold.producer.name for fold in found} == {"norm", "up"}
    assert {fold.producer.name for fold in verify_folds(probe, found)} == verified


def test_a_leak_is_detected_although_one_token_is_huge():
    x = torch.randn(1, 40, 32)
    x[0, 0] *= 1e4
    probe = probe_of(FeedForward("norm"), x)
    assert {fold.producer.name for fold in verify_folds(probe, find_folds(probe))} == {"up"}
