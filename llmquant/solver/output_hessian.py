"""Measure the output-side Hessians of a model's linears, for cross-row error compensation (`algorithms/cross_row.py`).

The output Hessian G of a linear is the mean of g g^T over gradients g at its outputs. It is measured in two ways, named
as in `Recipe.output_hessian`:

block (`block_cross_row_factors`): a few sequences run forward and backward through one block with the checkpoint's
weights. All channels of the block's output count equally: the gradient at this output is drawn at random, so that
g g^T at a linear's outputs averages to J^T J, with J the Jacobian of the block's output with respect to the linear's
outputs. The rest of the model is left out. Therefore one split of the sequences has gradients at the even channels of
the block's output, and the other split at the odd ones. Compensation is used only if the splits confirm each other.
They do if errors interact inside the block, as those of queries and keys do. (On SmolLM2-135M, compensation leaves a
third of the cost of queries and keys, and the factors of no other linear are confirmed.)

network (`network_cross_row_factors`): before any block is quantized, all calibration text runs through the whole model
forward and backward (`gradients.py`). The gradient g is that of the loss, so G gives the cost of an error for the
predictions. This is the cost that counts, so compensation is used if it lowers the cost on text that G was not
measured on. The sums of all linears do not fit in memory, so a file holds the sums of a block while other blocks and
sequences run.

Letters: S sequences, L tokens of a sequence, T tokens, N out_features, K in_features.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmquant.algorithms.cross_row import CrossRowFactors, OutputHessian, RowFactor
from llmquant.checkpoints.atomic import disk_errors, make_folder
from llmquant.errors import one_line
from llmquant.hooks import hooked
from llmquant.models.blocks import first_tensor, linear_shape, with_first_tensor
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.models.reproducible import reproducible_attention
from llmquant.models.scale_folding import floating_tensors_in
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.report.run_log import RunLog
from llmquant.solver.gradients import READS_PER_BLOCK, BlockwiseBackprop, num_scores, tokens_at_once
from llmquant.solver.reduction import NUM_CHUNKS, chunk_of

GRADIENT_TOKENS = 2048
"""Number of calibration tokens that run forward and backward through a block."""
MAX_COST_RATIO = 0.7
"""Upper limit of `CrossRowFactors.cost_ratio` for factors that are measured on the block. Compensation that lowers the
cost for the block by less may not lower the cost for the predictions."""


def too_few_samples(plan: Plan, num_samples: int) -> str:
    """Return why the samples are too few for cross-row compensation; "" if they suffice or the recipe uses none."""
    needed = 2 if plan.recipe.runs_backward else NUM_CHUNKS + 1
    if not plan.recipe.compensates_across_rows or num_samples >= needed:
        return ""
    return f"{num_samples} samples are too few for cross-row error compensation, which needs {needed}"


# --- by the block ----------------------------------------------------------------------------------------------------


def block_cross_row_factors(
    plan: Plan, forward: BlockwiseForward, index: int, linears: Mapping[str, LinearPlan], num_samples: int, log: RunLog
) -> dict[str, CrossRowFactors]:
    """Measure a block that all sequences have reached; return the confirmed factors by linear name within the block.

    num_samples: samples of all ranks. Only sequences of the first chunk (`reduction.py`) are used: rank 0 has them with
    any number of ranks.
    """
    name = plan.block_names[index]
    calls = forward.block_calls(num_gradient_sequences(num_samples, plan.options.seq_len))
    if len(calls) < 2:
        return {}
    hessians = _BlockHessians(plan.skeleton.model.get_submodule(name), linears, seed=index)
    scores = num_scores(plan, 1, plan.options.seq_len)
    try:
        with reproducible_attention(plan.skeleton.device, scores):
            for number, (args, kwargs) in enumerate(calls):
                hessians.add_gradients(args, kwargs, split=number % 2)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.note(name, f"no cross-row compensation: the block has no gradient ({one_line(error)})")
        return {}
    return _validated_factors(hessians.of_linears, MAX_COST_RATIO, name, log)


def num_gradient_sequences(num_samples: int, seq_len: int) -> int:
    """Return how many sequences run forward and backward through a block."""
    first_chunk = sum(chunk_of(sample, num_samples) == 0 for sample in range(num_samples))
    return min(first_chunk, max(2, GRADIENT_TOKENS // seq_len))


class _BlockHessians:
    """The output Hessians of the linears of one block, for random gradients at the block's output."""

    def __init__(self, block: nn.Module, linears: Mapping[str, LinearPlan], seed: int) -> None:
        self._block, self._linears = block, linears
        self._draw = torch.Generator().manual_seed(seed)
        self.of_linears: dict[str, OutputHessian] = {}
        """Output Hessians by the linears' names within the block; a linear that no gradient has reached has none."""

    def add_gradients(self, args: tuple, kwargs: dict, split: int) -> None:
        """Run one sequence forward and backward, and add the gradients at the linears' outputs to split 0 or 1."""
        hidden = first_tensor(args, kwargs)
        assert hidden is not None
        hooks = [(self._block.get_submodule(name), self._add_gradient_of(name, split)) for name in self._linears]
        with hooked(hooks), torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            args, kwargs = with_first_tensor(args, kwargs, leaf)
            output = floating_tensors_in(self._block(*args, **kwargs))[0]
            drawn = torch.randn(output.shape, generator=self._draw)
            drawn[..., 1 - split :: 2] = 0
            torch.autograd.grad(output, leaf, drawn.to(output))

    def _add_gradient_of(self, name: str, split: int) -> Callable:
        def add(gradient: Tensor) -> None:
            if name not in self.of_linears:
                out_features, _ = linear_shape(self._block.get_submodule(name))
                self.of_linears[name] = OutputHessian(out_features, gradient.device)
            self.of_linears[name].add(gradient.flatten(0, -2), split)

        def hook(linear: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook


def _validated_factors(
    hessians: Mapping[str, OutputHessian], max_cost_ratio: float, block: str, log: RunLog
) -> dict[str, CrossRowFactors]:
    """Return the factors of those linears of a block whose splits confirm each other, in main memory."""
    for name, hessian in hessians.items():
        if not hessian.is_finite:
            log.note(f"{block}.{name}", "no cross-row compensation: gradients at its outputs overflow")
    factors = {name: hessian.validated_factors(max_cost_ratio) for name, hessian in hessians.items()}
    # The result is sent to other ranks, which have other devices.
    return {name: confirmed.to("cpu") for name, confirmed in factors.items() if confirmed is not None}


# --- by the whole model ----------------------------------------------------------------------------------------------


def network_cross_row_factors(
    plan: Plan,
    tokens_SL: Tensor,
    folder: Path,
    log: RunLog,
    on_block_read: Callable[[float], None] = lambda fraction: None,
) -> Iterator[dict[str, CrossRowFactors]]:
    """Measure the whole model; yield the confirmed factors of one block after another, by name within the block.

    folder: holds the sums on disk, and is deleted at the end. on_block_read: called with the finished fraction of the
    work whenever a block is read.
    """
    at_once = max(1, min(tokens_at_once(plan) // tokens_SL.shape[1], len(tokens_SL) // 2))
    batches = tokens_SL.split(at_once)
    read, reads = count(), len(plan.block_names) * (READS_PER_BLOCK * len(batches) + 1)
    hessians = _ModelHessians(plan, folder, lambda: on_block_read(next(read) / reads))
    for number, batch_SL in enumerate(batches):
        hessians.add_batch(batch_SL, number)
    for name in plan.block_names:
        of_linears = {full_name.removeprefix(f"{name}."): hessian for full_name, hessian in hessians.load(name).items()}
        hessians.delete(name)
        yield _validated_factors(of_linears, 1.0, name, log)
    shutil.rmtree(folder, ignore_errors=True)


class _ModelHessians(BlockwiseBackprop):
    """The output Hessians of all quantized linears of a model, in one file for each block."""

    def __init__(self, plan: Plan, folder: Path, on_block_read: Callable[[], None]) -> None:
        super().__init__(plan, on_block_read)
        self._split = 0
        self._folder = folder
        self._names = {linear.name for linear in plan.quantized}
        self._current: dict[str, OutputHessian] = {}
        """Sums of the current batch and block, by the linears' names in the model."""

    def add_batch(self, tokens_SL: Tensor, number: int) -> None:
        """Run a batch of sequences forward and backward; even and odd batches are the two splits."""
        self._split = number % 2
        self.run(tokens_SL, seed=number)

    def needs_gradients_of(self, full_name: str) -> bool:
        """Whether a linear will be quantized."""
        return full_name in self._names

    def on_gradient(self, full_name: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """Add a linear's gradients."""
        if full_name not in self._current:
            self._current[full_name] = OutputHessian(gradient_TN.shape[-1], gradient_TN.device)
        self._current[full_name].add(gradient_TN, self._split)

    def on_block_done(self, name: str) -> None:
        """Add a block's sums to the sums in its file."""
        hessians = self.load(name, self._current)
        make_folder(self._folder)
        tensors = {
            f"{full_name}:{key}": value
            for full_name, hessian in hessians.items()
            for key, value in hessian.tensors().items()
        }
        with disk_errors(self._folder):
            save_file({key: value.cpu() for key, value in tensors.items()}, self._file(name))
        self._current = {}

    def load(self, name: str, hessians: Mapping[str, OutputHessian] | None = None) -> dict[str, OutputHessian]:
        """Return the sums in a block's file, added to those in hessians; by the linears' names in the model."""
        loaded = dict(hessians or {})
        if self._file(name).exists():
            stored: dict[str, dict[str, Tensor]] = {}
            for key, value in load_file(self._file(name)).items():
                full_name, _, place = key.partition(":")
                stored.setdefault(full_name, {})[place] = value
            for full_name, tensors in stored.items():
                if full_name not in loaded:
                    out_features, _ = linear_shape(self.plan.skeleton.model.get_submodule(full_name))
                    loaded[full_name] = OutputHessian(out_features, self.plan.skeleton.device)
                loaded[full_name].add_tensors(tensors)
        return loaded

    def delete(self, name: str) -> None:
        """Delete a block's file."""
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


# --- parts of the unfinished checkpoint ------------------------------------------------------------------------------


def cross_row_part(index: int) -> str:
    """Return the name of the part that holds a block's `network_cross_row_factors` until the block is finished."""
    return f"cross-row-{index:05}"


def pack_factors(block_factors: Mapping[str, CrossRowFactors]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a block's factors as the tensors and the note of a part (`unpack_factors` reads them)."""
    tensors = {}
    for name, cross_row in block_factors.items():
        for number, factor in enumerate(cross_row.factors):
            tensors[f"{name}:{number}:lower"], tensors[f"{name}:{number}:order"] = factor.lower_NN, factor.order_N
    return tensors, {name: cross_row.cost_ratio for name, cross_row in block_factors.items()}


def unpack_factors(tensors: Mapping[str, Tensor], cost_ratios: Mapping[str, float]) -> dict[str, CrossRowFactors]:
    """Return a block's factors from the tensors and the note that `pack_factors` returned."""
    block_factors = {}
    for name, cost_ratio in cost_ratios.items():
        numbers = sum(key.startswith(f"{name}:") for key in tensors) // 2
        factors = (RowFactor(tensors[f"{name}:{n}:lower"], tensors[f"{name}:{n}:order"]) for n in range(numbers))
        block_factors[name] = CrossRowFactors(tuple(factors), cost_ratio)
    return block_factors
