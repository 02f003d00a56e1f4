"""Which modules are decoder blocks, linears and routers, and which models are refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from llmquant.errors import UserError
from llmquant.models.blocks import find_blocks, is_linear, routers_of, run_model_code
from llmquant.pipeline.quantize import dry_run
from llmquant.spec import Options, QuantSpec, Recipe

ROUND = Recipe(method="rtn", spec=QuantSpec(group_size=32))


# --- linears ---------------------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Scores(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.softmax(-1)


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[1]))


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Factored(nn.Linear):
    def forward(self, x, factor=1.0):
        return factor * super().forward(x)


class Plain(nn.Linear):
    """A subclass that changes nothing."""


def changed_instance() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.T


def parametrized() -> nn.Linear:
    linear = nn.Linear(8, 8)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(8, 4), True),
        (nn.Linear(8, 4, bias=False, device="meta"), True),
        (Conv1D(4, 8), True),
        (Plain(8, 4), True),
        (Spelled(8, 4), True),
        (Spelled(8, 4, bias=False, device="meta"), True),
        (Doubled(8, 4), False),
        (Clamped(8, 4), False),
        (Called(8, 4), False),
        (Factored(8, 4), False),
        (Scores(8, 4), False),
        (Scaled(8, 4), False),
        (changed_instance(), False),
        (parametrized(), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), False),
        (nn.MultiheadAttention(8, 2).out_proj, False),
        (nn.Conv1d(8, 4, 1), False),
        (nn.Bilinear(8, 8, 4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_linear_only_if_the_module_computes_a_linear_and_nothing_else(module, expected):
    assert is_linear(module) is expected
    with torch.device("meta"):  # as when transformers builds models
        assert is_linear(module) is expected


def layer(**children: nn.Module) -> nn.Module:
    block = nn.Module()
    for name, child in children.items():
        block.add_module(name, child)
    return block


def experts(count: int) -> nn.Module:
    stacked = nn.Module()
    stacked.num_experts = count
    stacked.gate_up_proj = nn.Parameter(torch.empty(count, 16, 8))
    return stacked


def expert() -> nn.Module:
    return layer(up=nn.Linear(8, 16), down=nn.Linear(16, 8))


def test_routers_and_gates_next_to_experts_are_found():
    block = layer(
        attention=layer(q=nn.Linear(8, 8), k=nn.Linear(8, 4), o=nn.Linear(8, 8)),
        mlp=layer(
            gate=nn.Linear(8, 4),
            experts=experts(4),
            shared=expert(),
            shared_gate=nn.Linear(8, 1),
            chooser=layer(down=nn.Linear(8, 6), out=nn.Linear(6, 4)),
        ),
    )
    assert routers_of(block).keys() == {"mlp.gate", "mlp.shared_gate", "mlp.chooser.down", "mlp.chooser.out"}


def test_router_of_a_list_of_experts_is_found():
    block = layer(mlp=layer(gate=nn.Linear(8, 3), experts=nn.ModuleList(expert() for _ in range(3))))
    assert routers_of(block).keys() == {"mlp.gate"}


def test_router_is_found_by_its_name_if_its_outputs_are_not_the_experts():
    block = layer(mlp=layer(router_gate=nn.Linear(8, 6), up=nn.Linear(8, 16)))
    assert routers_of(block).keys() == {"mlp.router_gate"}


def test_linears_without_experts_are_not_routers():
    block = layer(
        attention=layer(k=nn.Linear(8, 4), relative=layer(q=nn.Linear(8, 4))),
        convolution=nn.Conv1d(4, 4, 3),
        mlp=layer(up=nn.Linear(8, 4), down=nn.Linear(4, 8)),
    )
    block.attention.relative.table = nn.Parameter(torch.empty(4, 8, 8))
    assert routers_of(block) == {}


# --- lists of blocks -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(self.up(x))


class TowerBlock(Block):
    pass


def listed(*blocks: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(blocks)


class Network(nn.Module):
    def __init__(self, decoder: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        for name, other in others.items():
            self.add_module(name, other)

    def get_decoder(self) -> nn.Module:
        return self.decoder


def test_blocks_are_searched_below_the_text_decoder():
    tower = layer(layers=listed(*(TowerBlock(64) for _ in range(4))))
    model = Network(layer(layers=listed(Block(), Block())), tower=tower)
    assert find_blocks(model) == ("decoder.layers", ["decoder.layers.0", "decoder.layers.1"])


def test_vision_tower_inside_the_decoder_is_not_its_list_of_blocks():
    tower = layer(layers=listed(TowerBlock()))
    model = Network(layer(layers=listed(Block(), Block()), image=layer(tower=tower)))
    assert find_blocks(model)[0] == "decoder.layers"


def test_list_of_plain_linears_is_not_a_list_of_blocks():
    model = Network(layer(layers=listed(Block(), Block()), projections=listed(nn.Linear(64, 64))))
    assert find_blocks(model)[0] == "decoder.layers"


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (
            layer(attentions=listed(Block()), ffns=listed(TowerBlock())),
            r"more than one .*\(decoder.attentions, decoder",
        ),
        (layer(low=layer(layers=listed(Block())), high=layer(layers=listed(Block()))), r"more than one .*decoder.high"),
        (
            layer(layers=listed(listed(Block()), listed(Block()))),
            r"decoder.layers.0: .* is a ModuleList, which has no",
        ),
        (layer(layers=listed()), "no list of decoder blocks"),
        (layer(layers=nn.ModuleDict({"0": Block()})), "no list of decoder blocks"),
    ],
)
def test_blocks_that_cannot_run_in_order_are_refused_by_name(decoder, message):
    with pytest.raises(UserError, match=message):
        find_blocks(Network(decoder))


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("xlm", {"n_words": 512, "emb_dim": 64, "causal": True, "n_layers": 2, "n_heads": 4}, "transformer.attentions"),
        (
            "zamba2",
            {
                "num_hidden_layers": 4,
                "layers_block_type": ["linear_attention", "hybrid"] * 2,
                "n_mamba_heads": 8,
                "mamba_d_state": 16,
                "mamba_ngroups": 1,
                "num_key_value_heads": 4,
                "num_mem_blocks": 1,
                "adapter_rank": 8,
            },
            r"blocks 'model.layers.1' and 'model.layers.3' share the weight 'model.layers.1.*weight'",
        ),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
            r"parameter 'model.layers.0.mlp.experts.gate_up_proj' .* \(8 such\), .* 'qwen3_moe' cannot be quantized",
        ),
    ],
)
def test_models_that_cannot_be_quantized_are_refused_by_a_dry_run(small_model, tmp_path, model_type, values, message):
    with pytest.raises(UserError, match=message):
        dry_run(small_model(model_type, **values), tmp_path / "out", ROUND)


def test_architecture_name_that_transformers_writes_is_accepted_as_a_language_model(small_model, tmp_path):
    model = small_model("bert-generation", is_decoder=True)
    assert json.loads((model / "config.json").read_text())["architectures"] == ["BertGenerationDecoder"]
    assert dry_run(model, tmp_path / "out", ROUND).quantized


@pytest.mark.slow
def test_model_without_a_bound_on_positions_accepts_any_seq_len(small_model, tmp_path):
    model = small_model("xlnet", max_position_embeddings=None, d_inner=128, d_head=16)
    plan = dry_run(model, tmp_path / "out", Recipe(spec=QuantSpec(group_size=32)), Options(calibration="python-docs"))
    assert plan.config.max_position_embeddings == -1 and plan.options.seq_len > 1


# --- a forward pass that fails ---------------------------------------------------------------------------------------


def test_error_in_the_models_code_becomes_a_user_error():
    with pytest.raises(UserError, match=r"Linear: the model's own forward pass fails \(RuntimeError: ") as caught:
        run_model_code(nn.Linear(2, 2), lambda: nn.Linear(2, 2)(torch.ones(3)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_error_in_a_hook_of_llmquant_does_not_become_a_user_error():
    module = nn.Linear(2, 2)
    llmquant_globals = {"__name__": "llmquant.models.blockwise_forward"}
    exec("def hook(module, args):\n    raise KeyError('hook')", llmquant_globals)
    module.register_forward_pre_hook(llmquant_globals["hook"])
    with pytest.raises(KeyError):
        run_model_code(module, lambda: module(torch.ones(2)))
