"""Measure the loss that each candidate grid of a linear would cause, before anything is rounded.

If the outputs z_n of a linear change by dz_n, the divergence of the model from the original is, to second order,
1/2 mean((g . dz)^2), with g the gradient of the loss with respect to z for labels drawn from the model's own
predictions (the Fisher information). For a rounding error E of the weight whose entries are independent of each other,

    loss = 1/2 sum_nk F_nk E_nk^2        F_nk = mean(g_n^2 x_k^2)

These losses can be compared between layers. Relative errors of layers cannot: an allocation by them is worse than one
grid for all. F is the mean of the product, not the product of the means: a token with massive inputs hardly matters to
the predictions, and the product of the means would overestimate it (eval/EXPERIMENTS.md). E is the error of rounding to
nearest on searched ranges. If GPTQ is used, a column's squared error is multiplied by the part that later columns
cannot compensate for, 1 / (U_kk^2 H_kk), with U the factor of `gptq.py` and H damped.

A few calibration sequences run forward and backward, side by side (`gradients.py`).

Letters: S sequences, L tokens of a sequence, T tokens, N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.algorithms.gptq import column_order, damped_diagonal, factor_inverse
from llmquant.algorithms.grid import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.hooks import hooked
from llmquant.models.blocks import first_tensor, linears_of, trace_structure, weight_of
from llmquant.models.finite import damaged_weights_error
from llmquant.planning.plan import Plan
from llmquant.solver.gradients import MEASURED_TOKENS, BlockwiseBackprop
from llmquant.solver.quantize_linear import dampings_to_try
from llmquant.spec import QuantSpec

SEARCH_STEPS = 8
"""Number of shrink factors tried for a range: enough to compare grids."""
TOKENS_AT_ONCE = 2048
"""Number of tokens whose second moments are added at one time."""

CandidateGrids = Callable[[Sequence[str]], Sequence[QuantSpec]]
"""Function from the full names of linears that share an input to the grids to try; without grids, they are skipped."""


@dataclass(frozen=True)
class InputGroupLosses:
    """Linears that read one tensor, and their total loss for each candidate grid."""

    names: tuple[str, ...]
    """Names of the linears in the model."""
    losses: dict[QuantSpec, float]
    """Loss in nats per token, by the grid that all of the linears get."""


def measure_sensitivities(
    plan: Plan,
    tokens_SL: Tensor,
    candidate_grids: CandidateGrids,
    on_block_read: Callable[[], None] = lambda: None,
) -> list[InputGroupLosses]:
    """Measure the losses of all linears of the blocks, by input, in the order in which the model runs them.

    tokens_SL: calibration tokens; the first `MEASURED_TOKENS` are used. Linears that the tokens do not reach are left
    out. Raises UserError if a loss is not finite.
    """
    tokens_SL = tokens_SL[: max(1, MEASURED_TOKENS // tokens_SL.shape[1])]
    sensitivities = _Sensitivities(plan, candidate_grids, on_block_read, tokens_SL.numel())
    sensitivities.run(tokens_SL)
    losses_of_groups = []
    for names in sensitivities.input_groups:
        if not all(sensitivities.losses[name] for name in names):
            continue
        specs = sensitivities.losses[names[0]]
        losses = {spec: sum(sensitivities.losses[name][spec] for name in names) for spec in specs}
        if not all(map(math.isfinite, losses.values())):
            raise UserError(
                f"{names[0]}: its sensitivity is {next(iter(losses.values()))}: the model's activations or gradients "
                f"overflow; use --dtype float32, or leave out --target-bpw and --target-size"
            )
        losses_of_groups.append(InputGroupLosses(names, losses))
    return losses_of_groups


@dataclass(frozen=True)
class _ColumnWeights:
    """The grids to try and the column weights of one input, which are computed before there are gradients."""

    specs: Sequence[QuantSpec]
    """Grids to try."""
    importance_K: Tensor
    """Weight of each column's squared error in the range search, float32."""
    uncompensated_K: Tensor
    """Part of each column's squared error that the later columns cannot compensate for, float32."""


class _Sensitivities(BlockwiseBackprop):
    """Measures the losses of the linears of a model."""

    def __init__(
        self, plan: Plan, candidate_grids: CandidateGrids, on_block_read: Callable[[], None], num_tokens: int
    ) -> None:
        """num_tokens: number of all tokens that run; some linears receive only a part of them."""
        super().__init__(plan, on_block_read)
        self.candidate_grids, self.num_tokens = candidate_grids, num_tokens
        self.input_groups: list[tuple[str, ...]] = []
        """Full names of the measured linears of each input."""
        self.columns: dict[str, _ColumnWeights] = {}
        """Column weights by full name of a linear."""
        self.losses: dict[str, dict[QuantSpec, float]] = {}
        """Nats per token by full name and grid; empty until a gradient has reached the linear."""

    def needs_gradients_of(self, full_name: str) -> bool:
        """Whether a linear has grids to try."""
        return full_name in self.columns

    def run_block(self, name: str, block: nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """Run a block; find the linears that share an input, and compute the column weights of each input."""
        inputs: dict[str, Tensor] = {}

        def record_input_of(key: str) -> Callable:
            def hook(linear: nn.Module, args: tuple, kwargs: dict) -> None:
                x = first_tensor(args, kwargs)
                if x is not None:
                    inputs[key] = x

            return hook

        output: list[Tensor] = []
        with hooked([(linear, record_input_of(key)) for key, linear in linears_of(block).items()], before=True):
            structure = trace_structure(block, lambda: output.append(call()))
        for input_group in structure.input_groups:
            specs = self.candidate_grids([f"{name}.{key}" for key in input_group.linears])
            keys = {f"{name}.{key}": key for key in input_group.linears if self.candidate_grids([f"{name}.{key}"])}
            if not specs or not keys:
                continue
            self.input_groups.append(tuple(keys))
            columns = self._input_columns(specs, inputs[input_group.linears[0]].flatten(0, -2))
            for full_name, key in keys.items():
                if not torch.isfinite(weight_of(block.get_submodule(key))).all():
                    raise damaged_weights_error(self.plan.path, self.plan.skeleton.names[f"{full_name}.weight"])
                self.columns[full_name], self.losses[full_name] = columns, {}
        return output[0]

    def _input_columns(self, specs: Sequence[QuantSpec], x_TK: Tensor) -> _ColumnWeights:
        """Return the column weights of an input; a column that is always 0 costs nothing."""
        recipe = self.plan.recipe
        statistics = InputStatistics(x_TK.shape[1], x_TK.device)
        for piece in x_TK.split(TOKENS_AT_ONCE):
            statistics.add(piece)
        hessian_KK = statistics.hessian_KK
        diagonal_K = hessian_KK.diagonal()
        damped_K = damped_diagonal(diagonal_K, recipe.damping)
        importance_K = damped_K.clone()
        if recipe.uses_gptq:
            order_K = column_order(hessian_KK, recipe.activation_order)
            factor = factor_inverse(hessian_KK, order_K, dampings_to_try(recipe))
            if factor is not None:
                importance_K[factor.order_K] = factor.upper_KK.diagonal().square().reciprocal()
        return _ColumnWeights(specs, importance_K.masked_fill(diagonal_K == 0, 0.0), importance_K / damped_K)

    def on_gradient(self, full_name: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """Add the loss of each grid of a linear, from its inputs and the gradients at its outputs."""
        plan, columns, losses = self.plan, self.columns[full_name], self.losses[full_name]
        fisher_KN = x_TK.float().square().T @ gradient_TN.float().square()
        fisher_KN *= columns.uncompensated_K[:, None] / self.num_tokens
        weight_KN = weight_of(linear).float().T.contiguous()
        for spec in columns.specs:
            grid = find_grid(
                weight_KN, columns.importance_K, spec, plan.scale_dtype, plan.format.min_zero, SEARCH_STEPS
            )
            error_KN = values_on_grid(round_to_grid(weight_KN, grid, spec), grid, spec) - weight_KN
            losses[spec] = losses.get(spec, 0.0) + 0.5 * (fisher_KN * error_KN.square_()).sum().item()
