"""What the rows of a block's linears mean to each other: the feedback of `algorithms/feedback.py`, measured.

By the block (`block_feedback`): at the block's door, with the weights of the checkpoint loaded, a few sequences run
through the block forward and backward. What matters is taken to be the block's output, each channel of it alike: the
gradient at its end is drawn at random, so that g g^T at a linear's outputs averages to J^T J, J what its outputs do to
those of the block. Whatever the rest of the network makes of the block's output is left out. So one half of the
sequences draws for the even channels and the other for the odd ones, and feedback is used only where either half bears
the other out: where it is a matter of the block itself, as with queries and keys, whose only use is each other. (On
SmolLM2-135M a third of their cost is left, and the feedback of no other linear stands the test.)

By the network (`network_feedback`): before any block is quantized, all calibration text runs through the network
forward and backward (`backward.py`), and g is the gradient of the loss, whose mean square is what an error costs the
predictions. That is what counts, so feedback is used wherever it lowers the cost on text it was not measured with. The
sums of all linears do not fit in memory: those of a block wait in a file while the next sequences run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmquant.algorithms.feedback import Feedback, OutputMoments, RowFactor
from llmquant.checkpoints.durable import disk_errors, make_folder
from llmquant.errors import first_words
from llmquant.models.blocks import first_tensor, linear_shape, with_first_tensor
from llmquant.models.folding import tensors_in
from llmquant.models.walk import Walk
from llmquant.pipeline.backward import READS, BothWays
from llmquant.pipeline.footprint import GRADIENT_TOKENS, MEASURED_TOKENS
from llmquant.pipeline.plan import LinearPlan, Plan
from llmquant.pipeline.ranks import LANES, lane_of
from llmquant.pipeline.report import ReportBuilder

MOST_LEFT_OF_BLOCK = 0.7
"""The share of the block's cost that feedback may leave, where it is to hold for the network's too."""


def block_feedback(
    plan: Plan, walk: Walk, index: int, linears: Mapping[str, LinearPlan], num_samples: int, report: ReportBuilder
) -> dict[str, Feedback]:
    """The feedback of those linears that have any, by name within a block that all sequences stand in front of.

    num_samples: of all ranks. It comes from sequences of the first lane, which the first rank has however many there
    are.
    """
    name = plan.block_names[index]
    calls = walk.calls(num_sequences(num_samples, plan.options.seq_len))
    if len(calls) < 2:
        return {}
    block = plan.skeleton.model.get_submodule(name)
    draw = torch.Generator().manual_seed(index)
    moments: dict[str, OutputMoments] = {}
    try:
        for number, (args, kwargs) in enumerate(calls):
            _count(block, args, kwargs, linears, draw, number % 2, moments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        report.remark(name, f"no feedback between rows: the block has no gradient ({first_words(error)})")
        return {}
    return _feedback(moments, MOST_LEFT_OF_BLOCK, name, report)


def _feedback(
    moments: Mapping[str, OutputMoments], most_left: float, block: str, report: ReportBuilder
) -> dict[str, Feedback]:
    for name, moment in moments.items():
        if not moment.is_finite:
            report.remark(f"{block}.{name}", "no feedback between rows: gradients at its outputs overflow")
    found = {name: moment.feedback(most_left) for name, moment in moments.items()}
    # Other ranks have other devices.
    return {name: feedback.to("cpu") for name, feedback in found.items() if feedback is not None}


class _Gradients(BothWays):
    """Adds up the output moments of all linears, in a file for each block."""

    def __init__(self, plan: Plan, folder: Path, on_block: Callable[[], None]) -> None:
        super().__init__(plan, on_block)
        self.half = 0
        self._folder = folder
        self._names = {linear.name for linear in plan.quantized}
        self._moments: dict[str, OutputMoments] = {}

    def wants(self, full: str) -> bool:
        """Linears that will be quantized."""
        return full in self._names

    def output(self, full: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """Count a linear's gradients."""
        if full not in self._moments:
            self._moments[full] = OutputMoments(gradient_TN.shape[-1], gradient_TN.device)
        self._moments[full].add(gradient_TN, self.half)

    def backward(self, name: str, block: nn.Module) -> None:
        """Add a block's sums to those in its file."""
        moments = self.take(name, self._moments)
        make_folder(self._folder)
        tensors = {
            f"{full}:{key}": value for full, moment in moments.items() for key, value in moment.tensors().items()
        }
        with disk_errors(self._folder):
            save_file({key: value.cpu() for key, value in tensors.items()}, self._file(name))
        self._moments = {}

    def take(self, name: str, moments: dict[str, OutputMoments] | None = None) -> dict[str, OutputMoments]:
        """The sums of a block's file, added to those that are given."""
        moments = dict(moments or {})
        if self._file(name).exists():
            stored: dict[str, dict[str, Tensor]] = {}
            for key, value in load_file(self._file(name)).items():
                full, _, place = key.partition(":")
                stored.setdefault(full, {})[place] = value
            for full, tensors in stored.items():
                if full not in moments:
                    device = self.plan.skeleton.device
                    moments[full] = OutputMoments(linear_shape(self.plan.skeleton.model.get_submodule(full))[0], device)
                moments[full].add_tensors(tensors)
        return moments

    def forget(self, name: str) -> None:
        """Delete a block's file."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def network_feedback(
    plan: Plan,
    tokens_SL: Tensor,
    folder: Path,
    report: ReportBuilder,
    on_block: Callable[[float], None] = lambda share: None,
) -> Iterator[dict[str, Feedback]]:
    """The feedback of every block's linears, by name within the block, block by block.

    folder: for sums that have to wait; it goes. on_block: called whenever a block is read, with the share that is done.
    """
    at_once = max(1, min(MEASURED_TOKENS // tokens_SL.shape[1], len(tokens_SL) // 2))
    chunks = tokens_SL.split(at_once)
    read, reads = count(), READS * len(plan.block_names) * len(chunks)
    gradients = _Gradients(plan, folder, lambda: on_block(next(read) / reads))
    for number, some_SL in enumerate(chunks):
        gradients.half = number % 2
        gradients.run(some_SL, seed=number)
    for name in plan.block_names:
        moments = {full.removeprefix(f"{name}."): moment for full, moment in gradients.take(name).items()}
        gradients.forget(name)
        yield _feedback(moments, 1.0, name, report)
    shutil.rmtree(folder, ignore_errors=True)


def feedback_part(index: int) -> str:
    """The part that holds a block's `network_feedback` until the block is done."""
    return f"feedback-{index:05}"


def packed(feedback: Mapping[str, Feedback]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A block's feedback as the tensors and the note of a part (`unpacked`)."""
    tensors = {}
    for name, between in feedback.items():
        for number, factor in enumerate(between.factors):
            tensors[f"{name}:{number}:lower"], tensors[f"{name}:{number}:order"] = factor.lower_NN, factor.order_N
    return tensors, {name: between.left for name, between in feedback.items()}


def unpacked(tensors: Mapping[str, Tensor], lefts: Mapping[str, float]) -> dict[str, Feedback]:
    """What `packed` was given."""
    feedback = {}
    for name, left in lefts.items():
        numbers = sum(key.startswith(f"{name}:") for key in tensors) // 2
        factors = (RowFactor(tensors[f"{name}:{n}:lower"], tensors[f"{name}:{n}:order"]) for n in range(numbers))
        feedback[name] = Feedback(tuple(factors), left)
    return feedback


def too_few_samples(plan: Plan, num_samples: int) -> str:
    """Why there will be no feedback, in words; "" where there can be."""
    needed = 2 if plan.recipe.runs_backward else LANES + 1
    if not plan.recipe.feeds_back or num_samples >= needed:
        return ""
    return f"{num_samples} samples are too few to let rows make up for each other's errors: that takes {needed}"


def num_sequences(num_samples: int, seq_len: int) -> int:
    """How many sequences run for it."""
    lane = sum(lane_of(sample, num_samples) == 0 for sample in range(num_samples))
    return min(lane, max(2, GRADIENT_TOKENS // seq_len))


def _count(
    block: nn.Module,
    args: tuple,
    kwargs: dict,
    linears: Mapping[str, LinearPlan],
    draw: torch.Generator,
    half: int,
    moments: dict[str, OutputMoments],
) -> None:
    """Run one sequence forward and backward, and count the gradients at the outputs of linears."""

    def hook(name: str) -> Callable:
        def called(linear: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: add(name, gradient))

        return called

    def add(name: str, gradient: Tensor) -> None:
        if name not in moments:
            out_features, _ = linear_shape(block.get_submodule(name))
            moments[name] = OutputMoments(out_features, gradient.device)
        moments[name].add(gradient.flatten(0, -2), half)

    hidden = first_tensor(args, kwargs)
    assert hidden is not None
    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in linears]
    try:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            args, kwargs = with_first_tensor(args, kwargs, leaf)
            output = tensors_in(block(*args, **kwargs))[0]
            drawn = torch.randn(output.shape, generator=draw)
            drawn[..., 1 - half :: 2] = 0
            torch.autograd.grad(output, leaf, drawn.to(output))
    finally:
        for handle in handles:
            handle.remove()
