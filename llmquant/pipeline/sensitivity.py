"""What each grid that a linear could get would cost the model: measured before anything is rounded.

To second order, the divergence of a model whose outputs z_n of a linear are off by dz_n is 1/2 E[(g . dz)^2], g the
gradient of the loss in z for tokens drawn from the model's own predictions (the Fisher information). For a rounding
error E of the weight, whose entries do not depend on each other,

    loss = 1/2 sum_nk F_nk E_nk^2        F_nk = E[g_n^2 x_k^2]

so that layers are comparable, which their relative errors are not: allocating by those is worse than one grid for all.
The mean is over the product: a token with massive inputs hardly matters to the predictions, and the product of the two
means would count what it must not (CONTRIBUTING.md). E is that of rounding to nearest on searched ranges. Where GPTQ
will round, of each column counts the part that the columns behind it in the order cannot make up for: 1 / U_kk^2 of its
factor, over the damped H_kk.

A few calibration sequences run forward and backward, side by side (`backward.py`).

Letters: S sequences, L tokens of a sequence, T tokens, N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquant.algorithms.affine import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.gptq import column_order, damped_diagonal, factor_inverse
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.models.blocks import first_tensor, linears_of, watch, weight_of
from llmquant.pipeline.backward import BothWays
from llmquant.pipeline.footprint import MEASURED_TOKENS
from llmquant.pipeline.plan import Plan, damaged_weights
from llmquant.pipeline.solve import damping_ladder
from llmquant.spec import QuantSpec

SEARCH_STEPS = 8
"""Shrink factors tried for a range: enough to compare grids."""
TOKENS_AT_ONCE = 2048
"""Tokens whose second moments are added together."""

GridsOf = Callable[[Sequence[str]], Sequence[QuantSpec]]


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one tensor, and what they would cost the model together."""

    names: tuple[str, ...]
    """Full names."""
    losses: dict[QuantSpec, float]
    """Nats per token, by the grid they would all get."""


def measure(
    plan: Plan,
    tokens_SL: Tensor,
    grids_of: GridsOf,
    on_block: Callable[[], None] = lambda: None,
) -> list[SharedInput]:
    """The inputs of every block in the order they are met, with the linears that read them.

    tokens_SL: calibration tokens, of which the first `MEASURED_TOKENS` are used. grids_of: full names of linears with
    one input -> the grids to try, none to leave them out. Linears that the tokens do not reach are left out.
    """
    tokens_SL = tokens_SL[: max(1, MEASURED_TOKENS // tokens_SL.shape[1])]
    run = _Sensitivities(plan, grids_of, on_block, tokens_SL.numel())
    run.run(tokens_SL)
    shared = []
    for names in run.shared:
        if not all(run.losses[name] for name in names):
            continue
        losses = {spec: sum(run.losses[name][spec] for name in names) for spec in run.losses[names[0]]}
        if not all(map(math.isfinite, losses.values())):
            raise UserError(
                f"{names[0]}: its sensitivity is {next(iter(losses.values()))}: the network's numbers or gradients "
                f"overflow; use --dtype float32, or leave out --target-bpw and --target-size"
            )
        shared.append(SharedInput(names, losses))
    return shared


@dataclass(frozen=True)
class _Columns:
    """What is known of a linear's input before there are gradients."""

    specs: Sequence[QuantSpec]
    """Grids to try."""
    importance_K: Tensor
    """What an error of each column costs where ranges are searched, float32."""
    left_K: Tensor
    """The part of a column's error that later columns cannot make up for, float32."""


class _Sensitivities(BothWays):
    """What was measured of the linears of a model."""

    def __init__(self, plan: Plan, grids_of: GridsOf, on_block: Callable[[], None], num_tokens: int) -> None:
        """num_tokens: all that are measured; not every one reaches every linear."""
        super().__init__(plan, on_block)
        self.grids_of, self.num_tokens = grids_of, num_tokens
        self.shared: list[tuple[str, ...]] = []
        self.columns: dict[str, _Columns] = {}
        """By full name of a linear."""
        self.losses: dict[str, dict[QuantSpec, float]] = {}
        """Nats per token, by full name and grid; empty until a gradient has reached the linear."""

    def wants(self, full: str) -> bool:
        """Linears that have grids to try."""
        return full in self.columns

    def forward(self, name: str, block: nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """Run a block, and see which linears share an input and what an error of each column costs."""
        inputs: dict[str, Tensor] = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda module, args, kwargs, key=key: inputs.update({key: first_tensor(args, kwargs)}), with_kwargs=True
            )
            for key, linear in linears_of(block).items()
        ]
        output: list[Tensor] = []
        try:
            block_plan = watch(block, lambda: output.append(call()))
        finally:
            for handle in handles:
                handle.remove()
        for stage in block_plan.stages:
            specs = self.grids_of([f"{name}.{key}" for key in stage.linears])
            keys = {f"{name}.{key}": key for key in stage.linears if self.grids_of([f"{name}.{key}"])}
            if not specs or not keys:
                continue
            self.shared.append(tuple(keys))
            columns = self._columns(specs, inputs[stage.linears[0]].flatten(0, -2))
            for full, key in keys.items():
                if not torch.isfinite(weight_of(block.get_submodule(key))).all():
                    raise damaged_weights(self.plan.path, self.plan.skeleton.names[f"{full}.weight"])
                self.columns[full], self.losses[full] = columns, {}
        return output[0]

    def _columns(self, specs: Sequence[QuantSpec], x_TK: Tensor) -> _Columns:
        """Of linears that read an input; a column that is never an input costs nothing."""
        recipe = self.plan.recipe
        statistics = InputStatistics(x_TK.shape[1], x_TK.device)
        for piece in x_TK.split(TOKENS_AT_ONCE):
            statistics.add(piece)
        hessian_KK = statistics.hessian_KK
        diagonal_K = hessian_KK.diagonal()
        damped_K = damped_diagonal(diagonal_K, recipe.damping)
        importance_K = damped_K.clone()
        if recipe.compensates:
            order_K = column_order(hessian_KK, recipe.activation_order)
            factor = factor_inverse(hessian_KK, order_K, damping_ladder(recipe))
            if factor is not None:
                importance_K[factor.order_K] = factor.upper_KK.diagonal().square().reciprocal()
        return _Columns(specs, importance_K.masked_fill(diagonal_K == 0, 0.0), importance_K / damped_K)

    def output(self, full: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """Add what each grid of a linear costs, by its inputs and the gradients at its outputs."""
        plan, columns, losses = self.plan, self.columns[full], self.losses[full]
        fisher_KN = x_TK.float().square().T @ gradient_TN.float().square()
        fisher_KN *= columns.left_K[:, None] / self.num_tokens
        weight_KN = weight_of(linear).float().T.contiguous()
        for spec in columns.specs:
            grid = find_grid(
                weight_KN, columns.importance_K, spec, plan.scale_dtype, plan.format.min_zero, SEARCH_STEPS
            )
            error_KN = values_on_grid(round_to_grid(weight_KN, grid, spec), grid, spec) - weight_KN
            losses[spec] = losses.get(spec, 0.0) + 0.5 * (fisher_KN * error_KN.square_()).sum().item()
