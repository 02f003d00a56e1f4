"""BlockwiseForward: one forward pass of all sequences in lockstep equals many plain forward passes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.quantized import read_quantized, validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.data.calibration import calibration_tokens
from llmquant.hooks import hooked
from llmquant.hub import load_tokenizer
from llmquant.models.blocks import find_blocks, trace_structure
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.models.skeleton import Skeleton, read_config
from llmquant.pipeline.block_loop import _passes
from llmquant.pipeline.quantize import quantize
from llmquant.solver.quantize_linear import StorageLimits, quantize_linears
from llmquant.solver.reduction import NUM_PIECES, piece_of, split_of
from llmquant.spec import Options, QuantSpec, Recipe

SAMPLES, LENGTH = 6, 24


def open_skeleton(path):
    reader = CheckpointReader(path)
    return Skeleton.open(reader, read_config(path), torch.device("cpu"), torch.float32, False)


def groups_of(path, block=0):
    skeleton = open_skeleton(path)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) + 5
    with torch.no_grad(), BlockwiseForward(skeleton, tokens, with_original=False) as forward:
        forward.enter(block)
        return [
            (input_group.linears, input_group.residual_source) for input_group in forward.structure(block).input_groups
        ]


def test_shared_inputs_and_residual_streams_are_found(tiny_model):
    assert groups_of(tiny_model("llama")) == [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), ""),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), "post_attention_layernorm"),
    ]


def test_linear_whose_output_passes_a_norm_does_not_write_to_the_residual_stream(tiny_model):
    assert all(source is None for _, source in groups_of(tiny_model("gemma2")))


def test_fused_projections_are_one_linear(tiny_model):
    assert [linears for linears, _ in groups_of(tiny_model("phi3"))] == [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ]


def test_linear_that_is_called_twice_is_in_no_group_and_listed_as_repeated():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    block = Twice()
    structure = trace_structure(block, lambda: block(torch.ones(1, 4)))
    assert [input_group.linears for input_group in structure.input_groups] == [("once",)]
    assert structure.repeated == ("twice",)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon", "gpt2"])
def test_block_inputs_equal_those_of_the_models_own_forward_pass(architecture, tiny_model):
    path = tiny_model(architecture)
    tokens = torch.randint(3, 500, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    skeleton = open_skeleton(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    _, names = find_blocks(model)
    block_inputs = {}
    hooks = [
        (
            model.get_submodule(name),
            lambda module, args, kwargs, index=index: block_inputs.__setitem__(index, (*args, *kwargs.values())[0]),
        )
        for index, name in enumerate(names)
    ]
    with (
        torch.no_grad(),
        hooked(hooks, before=True),
        BlockwiseForward(skeleton, tokens, with_original=True) as forward,
    ):
        for index in range(len(names)):
            forward.enter(index)
            for number, calibration_pass in enumerate(forward.quantized_passes):
                model(tokens[number : number + 1], use_cache=False)
                args, kwargs = calibration_pass.block_call
                assert torch.equal((*args, *kwargs.values())[0], block_inputs[index])
            forward.pass_through(index, {})
            forward.leave(index)
    assert all(parameter.is_meta for parameter in skeleton.model.get_submodule(names[0]).parameters())


@pytest.mark.slow
def test_one_blockwise_pass_equals_two_plain_passes_per_input_group(tiny_model, tmp_path):
    """The slow form of the main loop: whole models in memory, and two forward passes for every input group."""
    path, spec = tiny_model("llama"), QuantSpec(group_size=32, symmetric=False)
    recipe = Recipe(spec=spec)
    options = Options(format="gptq_v2", calibration="python-docs", num_samples=SAMPLES, seq_len=LENGTH, verify=False)
    quantize(path, tmp_path / "out", recipe, options)
    reader = CheckpointReader(tmp_path / "out")
    blockwise = {name: read_quantized(reader, packed) for name, packed in validate_quantized(reader).items()}

    tokens_SL = calibration_tokens(load_tokenizer(path), "python-docs", SAMPLES, LENGTH).tokens_SL
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    quantized = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def inputs(model, names):
        """Inputs of the named modules over all tokens, [T, K] each."""
        seen = {name: [] for name in names}
        hooks = [
            (
                model.get_submodule(name),
                lambda module, args, kwargs, name=name: seen[name].append((*args, *kwargs.values())[0][0]),
            )
            for name in names
        ]
        with hooked(hooks, before=True):
            for tokens_L in tokens_SL:
                model(tokens_L[None], use_cache=False)
        return [torch.cat(seen[name]) for name in names]

    input_groups = groups_of(path)
    for block in (f"model.layers.{index}" for index in range(2)):
        for linears, source in input_groups:
            modules = [f"{block}.{linears[0]}"]
            if source is not None:
                modules.append(f"{block}.{source}".rstrip("."))
            ours, originals = inputs(quantized, modules), inputs(original, modules)
            writer_NK = quantized.get_submodule(modules[0]).weight.detach() if source is not None else None
            statistics = None
            for sample in range(SAMPLES):  # each sample is a chunk of its own
                rows = slice(sample * LENGTH, (sample + 1) * LENGTH)
                chunk = InputStatistics(ours[0].shape[1], torch.device("cpu"), writer_NK=writer_NK)
                drift_TR = (originals[1] - ours[1])[rows] if source is not None else None
                chunk.add(ours[0][rows], originals[0][rows], drift_TR, split=split_of(sample, SAMPLES))
                if statistics is None:
                    statistics = chunk
                else:
                    statistics.merge(chunk)
            weights = {name: quantized.get_submodule(f"{block}.{name}").weight.detach() for name in linears}
            results = quantize_linears(
                weights, dict.fromkeys(weights, spec), statistics, recipe, StorageLimits(torch.float16)
            )
            for name, result in results.items():
                quantized.get_submodule(f"{block}.{name}").weight.data.copy_(result.weight.dequantize())
                weight = blockwise[f"{block}.{name}"]
                assert torch.equal(weight.codes_NK, result.weight.codes_NK), name
                assert torch.equal(weight.scale_NG, result.weight.scale_NG), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon", "gpt2"])
def test_several_sequences_in_one_pass_give_the_inputs_of_single_passes(architecture, tiny_model):
    path = tiny_model(architecture)
    tokens = torch.randint(3, 500, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def group_inputs(pieces, samples):
        found = []
        with BlockwiseForward(open_skeleton(path), pieces, with_original=True, samples=samples) as forward:
            forward.enter(0)
            for _, inputs in forward.input_groups(0, forward.structure(0)):
                inputs = list(inputs)
                joined = (torch.cat([getattr(each, name) for each in inputs]) for name in ("x_TK", "original_x_TK"))
                found.append(([number for each in inputs for number in each.samples], *joined))
            forward.leave(0)
        return found

    single = group_inputs(list(tokens), [range(number, number + 1) for number in range(SAMPLES)])
    together = group_inputs([tokens[0], tokens[1:5], tokens[5:]], [range(1), range(1, 5), range(5, 6)])
    assert len(single) == len(together) > 2
    for (numbers, *alone), (others, *batched) in zip(single, together, strict=True):
        assert numbers == others == list(range(SAMPLES))
        for x, y in zip(alone, batched, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_samples", [3, 8, 20, 128])
@pytest.mark.parametrize("ranks", [1, 3])
def test_passes_on_a_gpu_hold_samples_of_one_piece_for_any_number_of_ranks(num_samples, ranks):
    def plan_on(device):
        return SimpleNamespace(
            options=SimpleNamespace(seq_len=512), skeleton=SimpleNamespace(device=torch.device(device))
        )

    run = SimpleNamespace(num_samples=num_samples)
    whole = _passes(plan_on("cuda"), range(num_samples), run)
    assert [sample for samples in whole for sample in samples] == list(range(num_samples))
    assert all(len({piece_of(sample, num_samples) for sample in samples}) == 1 for samples in whole)
    assert all(len(samples) == 1 for samples in whole if samples[0] < 8)
    later = Counter(piece_of(sample, num_samples) for sample in range(8, num_samples))
    assert max(map(len, whole)) == min(8, max(later.values(), default=1))
    bounds = [NUM_PIECES * rank // ranks for rank in range(ranks + 1)]
    owned = [
        [sample for sample in range(num_samples) if first <= piece_of(sample, num_samples) < last]
        for first, last in pairwise(bounds)
    ]
    divided = [_passes(plan_on("cuda"), range(own[0], own[-1] + 1), run) for own in owned if own]
    assert [samples for passes in divided for samples in passes] == whole
    assert all(len(samples) == 1 for samples in _passes(plan_on("cpu"), range(num_samples), run))
