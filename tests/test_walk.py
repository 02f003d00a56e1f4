"""The walk: one pass in lockstep has to give what many plain passes give."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.quantized import read_quantized, validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.hub import load_tokenizer
from llmquant.models.blocks import find_blocks, watch
from llmquant.models.skeleton import Skeleton, read_config
from llmquant.models.walk import Walk
from llmquant.pipeline.calibration import calibration_tokens
from llmquant.pipeline.quantize import quantize
from llmquant.pipeline.ranks import half_of
from llmquant.pipeline.solve import Stored, solve_stage
from llmquant.spec import Options, QuantSpec, Recipe

SAMPLES, LENGTH = 6, 24


def open_skeleton(path):
    reader = CheckpointReader(path)
    return Skeleton.open(reader, read_config(path), torch.device("cpu"), torch.float32, False)


def stages_of(path, block=0):
    skeleton = open_skeleton(path)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) + 5
    with torch.no_grad(), Walk(skeleton, tokens, with_original=False) as walk:
        walk.enter(block)
        return [(stage.linears, stage.residual_source) for stage in walk.plan(block).stages]


def test_shared_inputs_and_the_residual_stream_are_seen(tiny_model):
    assert stages_of(tiny_model("llama")) == [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), ""),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), "post_attention_layernorm"),
    ]


def test_output_that_passes_a_norm_first_does_not_write_to_the_residual_stream(tiny_model):
    assert all(source is None for _, source in stages_of(tiny_model("gemma2")))


def test_fused_projections_are_one_linear(tiny_model):
    assert [linears for linears, _ in stages_of(tiny_model("phi3"))] == [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ]


def test_linear_called_twice_is_left_out_and_told():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    block = Twice()
    plan = watch(block, lambda: block(torch.ones(1, 4)))
    assert [stage.linears for stage in plan.stages] == [("once",)]
    assert plan.repeated == ("twice",)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon", "gpt2"])
def test_walking_is_the_models_own_forward_pass(architecture, tiny_model):
    path = tiny_model(architecture)
    tokens = torch.randint(3, 500, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    skeleton = open_skeleton(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    _, names = find_blocks(model)
    doors = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, index=index: doors.__setitem__(index, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
        for index, name in enumerate(names)
    ]
    with torch.no_grad(), Walk(skeleton, tokens, with_original=True) as walk:
        for index in range(len(names)):
            walk.enter(index)
            for number, sequence in enumerate(walk.quantized):
                model(tokens[number : number + 1], use_cache=False)
                args, kwargs = sequence.call
                assert torch.equal((*args, *kwargs.values())[0], doors[index])
            walk.pass_through(index, {})
            walk.leave(index)
    for handle in handles:
        handle.remove()
    assert all(parameter.is_meta for parameter in skeleton.model.get_submodule(names[0]).parameters())


def test_one_walk_equals_a_pass_per_stage(tiny_model, tmp_path):
    """The slow form of the main loop: whole models in memory, and two fresh forward passes for every stage."""
    path, spec = tiny_model("llama"), QuantSpec(group_size=32, symmetric=False)
    recipe = Recipe(spec=spec)
    options = Options(format="gptq_v2", calibration="python-docs", num_samples=SAMPLES, seq_len=LENGTH, verify=False)
    quantize(path, tmp_path / "out", recipe, options)
    reader = CheckpointReader(tmp_path / "out")
    walked = {name: read_quantized(reader, packed) for name, packed in validate_quantized(reader).items()}

    tokens = calibration_tokens(load_tokenizer(path), "python-docs", SAMPLES, LENGTH).tokens_SL
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def inputs(model, names):
        """What the named modules are called with, over all tokens, [T, K] each."""
        seen = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: seen[name].append((*args, *kwargs.values())[0][0]),
                with_kwargs=True,
            )
            for name in names
        ]
        for row in tokens:
            model(row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return [torch.cat(seen[name]) for name in names]

    stages = stages_of(path)
    for block in (f"model.layers.{index}" for index in range(2)):
        for linears, source in stages:
            watched = [f"{block}.{linears[0]}"]
            if source is not None:
                watched.append(f"{block}.{source}".rstrip("."))
            here, there = inputs(quantized, watched), inputs(original, watched)
            writer = quantized.get_submodule(watched[0]).weight.detach() if source is not None else None
            statistics = None
            for sample in range(SAMPLES):  # each is a lane of its own
                rows = slice(sample * LENGTH, (sample + 1) * LENGTH)
                lane = InputStatistics(here[0].shape[1], torch.device("cpu"), writer_NK=writer)
                lane.half = half_of(sample, SAMPLES)
                gap = (there[1] - here[1])[rows] if source is not None else None
                lane.add(here[0][rows], there[0][rows], gap)
                if statistics is None:
                    statistics = lane
                else:
                    statistics.merge(lane)
            weights = {name: quantized.get_submodule(f"{block}.{name}").weight.detach() for name in linears}
            solved = solve_stage(weights, dict.fromkeys(weights, spec), statistics, recipe, Stored(torch.float16))
            for name, result in solved.items():
                quantized.get_submodule(f"{block}.{name}").weight.data.copy_(result.weight.dequantize())
                ours = walked[f"{block}.{name}"]
                assert torch.equal(ours.codes_NK, result.weight.codes_NK), name
                assert torch.equal(ours.scale_NG, result.weight.scale_NG), name
