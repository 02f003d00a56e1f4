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

A few calibration sequences run forward and backward, side by side. Block by block: weights are read, the block runs,
its linears are rounded on every grid, weights go; on the way back each block is run again from its kept input, for the
gradients. So the memory holds one block, the activations inside it, and the inputs of all blocks.

Letters: S sequences, L tokens of a sequence, T tokens, C tokens of a chunk, N out_features, K in_features, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.algorithms.affine import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.gptq import column_order, damped_diagonal, factor_inverse
from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.eval.halves import Halves
from llmquant.memory import give_back
from llmquant.models.blocks import first_tensor, linears_of, watch, weight_of
from llmquant.pipeline.footprint import CHUNK_TOKENS, MEASURED_TOKENS
from llmquant.pipeline.plan import Plan, damaged_weights
from llmquant.pipeline.solve import damping_ladder
from llmquant.spec import QuantSpec

SEARCH_STEPS = 8
"""Shrink factors tried for a range: enough to compare grids."""
TOKENS_AT_ONCE = 2048
"""Tokens whose second moments are added together."""

OnBlock = Callable[[int, str], None]
"""Called with (index of a block, what is done with it)."""


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
    grids_of: Callable[[Sequence[str]], Sequence[QuantSpec]],
    on_block: OnBlock = lambda index, what: None,
) -> list[SharedInput]:
    """The inputs of every block in the order they are met, with the linears that read them.

    tokens_SL: calibration tokens, of which the first `MEASURED_TOKENS` are used. grids_of: full names of linears with
    one input -> the grids to try, none to leave them out. Linears that the tokens do not reach are left out.
    """
    tokens_SL = tokens_SL[: max(1, MEASURED_TOKENS // tokens_SL.shape[1])]
    skeleton = plan.skeleton
    run = _Run(plan, grids_of, on_block, tokens_SL.numel())
    with _outside_loaded(plan), run.in_place():
        halves = Halves(skeleton.model, skeleton.device)
        with torch.no_grad():
            halves.find_body(tokens_SL)
        run.is_measuring = True
        with torch.enable_grad():
            hidden_SLD = halves.hidden(tokens_SL)
            gradient_SLD = _loss_gradient(halves, hidden_SLD.detach())
            give_back()
            hidden_SLD.backward(gradient_SLD)
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


def _loss_gradient(halves: Halves, hidden_SLD: Tensor) -> Tensor:
    """Gradient of the summed loss in the hidden states in front of the head; tokens drawn from the predictions."""
    draw = torch.Generator(device=hidden_SLD.device).manual_seed(0)
    pieces = []
    for hidden_CD in hidden_SLD.flatten(0, 1).split(CHUNK_TOKENS):
        hidden_CD = hidden_CD.detach().requires_grad_()
        log_p_CV = halves.logits(hidden_CD).float().log_softmax(-1)
        drawn_C1 = torch.multinomial(log_p_CV.detach().exp(), 1, generator=draw)
        pieces += torch.autograd.grad(-log_p_CV.gather(-1, drawn_C1).sum(), hidden_CD)
    return torch.cat(pieces).view_as(hidden_SLD)


@contextmanager
def _outside_loaded(plan: Plan) -> Iterator[None]:
    """The weights that belong to no block, for as long as this lasts."""
    model = plan.skeleton.model
    inside = {module for name in plan.block_names for module in model.get_submodule(name).modules()}
    names = [
        name
        for name, module in model.named_modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        for name in names:
            plan.skeleton.load(name, recurse=False)
        yield
    finally:
        for name in names:
            plan.skeleton.drop(name, recurse=False)


class _Through(torch.autograd.Function):
    """A block whose inside is not recorded, but run again for its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable, run_back: Callable) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden)
        ctx.run_back = run_back
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        return ctx.run_back(hidden, gradient), None, None


@dataclass(frozen=True)
class _Columns:
    """What is known of a linear's input before there are gradients."""

    specs: Sequence[QuantSpec]
    """Grids to try."""
    importance_K: Tensor
    """What an error of each column costs where ranges are searched, float32."""
    left_K: Tensor
    """The part of a column's error that later columns cannot make up for, float32."""


@dataclass
class _Run:
    """The blocks of a model, made to read their weights when they run; and what was measured of their linears."""

    plan: Plan
    grids_of: Callable[[Sequence[str]], Sequence[QuantSpec]]
    on_block: OnBlock
    num_tokens: int
    """All that are measured; not every one reaches every linear."""
    is_measuring: bool = False
    """Until then the blocks only run."""
    shared: list[tuple[str, ...]] = field(default_factory=list)
    columns: dict[str, _Columns] = field(default_factory=dict)
    """By full name of a linear."""
    losses: dict[str, dict[QuantSpec, float]] = field(default_factory=dict)
    """Nats per token, by full name and grid; empty until a gradient has reached the linear."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model's blocks, replaced for as long as this lasts."""
        blocks = [self.plan.skeleton.model.get_submodule(name) for name in self.plan.block_names]
        for index, block in enumerate(blocks):
            block.forward = self._forward(index, block, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _forward(self, index: int, block: nn.Module, own: Callable) -> Callable:
        name = self.plan.block_names[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_tensor(args, kwargs)
            assert hidden is not None
            outputs: list[Any] = []

            def call(replaced: Tensor) -> Tensor:
                swap = lambda value: replaced if value is hidden else value  # noqa: E731
                outputs.append(own(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()}))
                tensor = first_tensor((outputs[-1],) if isinstance(outputs[-1], Tensor) else tuple(outputs[-1]), {})
                assert tensor is not None
                return tensor

            def run(replaced: Tensor) -> Tensor:
                with self._loaded(index, "sensitivity"):
                    return self._measure(name, block, lambda: call(replaced)) if self.is_measuring else call(replaced)

            def run_back(replaced: Tensor, gradient: Tensor) -> Tensor:
                with self._loaded(index, "gradient"), torch.enable_grad(), self._counting(name, block):
                    replaced = replaced.detach().requires_grad_()
                    (result,) = torch.autograd.grad(call(replaced), replaced, gradient)
                outputs.clear()
                return result

            # The first block's input is where the gradient ends.
            leaf = hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.detach().requires_grad_()
            output = _Through.apply(leaf, run, run_back)
            whole = outputs.pop()
            if isinstance(whole, Tensor):
                return output
            first = next(at for at, value in enumerate(whole) if isinstance(value, Tensor))
            return (*whole[:first], output, *whole[first + 1 :])

        return forward

    @contextmanager
    def _loaded(self, index: int, what: str) -> Iterator[None]:
        self.on_block(index, what)
        self.plan.skeleton.load(self.plan.block_names[index])
        try:
            yield
        finally:
            self.plan.skeleton.drop(self.plan.block_names[index])
            give_back()

    def _measure(self, name: str, block: nn.Module, call: Callable[[], Tensor]) -> Tensor:
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

    def _count(self, full: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
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

    @contextmanager
    def _counting(self, name: str, block: nn.Module) -> Iterator[None]:
        """Count the linears of a block when the gradients reach their outputs."""

        def hook(full: str) -> Callable:
            def called(linear: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                x = first_tensor(args, kwargs)
                assert x is not None
                x_TK = x.detach().flatten(0, -2)
                output.register_hook(lambda gradient: self._count(full, linear, x_TK, gradient.flatten(0, -2)))

            return called

        handles = [
            linear.register_forward_hook(hook(f"{name}.{key}"), with_kwargs=True)
            for key, linear in linears_of(block).items()
            if f"{name}.{key}" in self.columns
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
