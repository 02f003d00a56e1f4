"""AWQ's part of the loop: before a block is quantized, its channels are scaled where that makes rounding hurt less.

At the block's door, with the weights of the checkpoint loaded:

    pairs that can be scaled (`models/folding.py`: found once for blocks of one kind, proven in every block)
    -> one plain pass of a few sequences: second moments of every stage's input, and the block's output
    -> a scale for every pair (`algorithms/awq.py`)
    -> the block's output with its linears rounded to nearest, with and without the scales: the scales must win
    -> folded into the block's parameters

All scales of a block are chosen before any of its linears is rounded, since they change the producers too. What is
folded is computed in float32 from the checkpoint's values and rounded once. Norms stay in 16 bit, where that rounding
would change the network; so their scale is taken from the rounded norm, which makes the fold exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.algorithms.affine import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.awq import Reader, search_scale
from llmquant.algorithms.statistics import InputStatistics
from llmquant.models.blocks import BlockPlan, first_tensor, is_linear, weight_as_NK
from llmquant.models.folding import Bench, Fold, find_folds, fold, prove_folds, tensors_in
from llmquant.models.walk import Walk
from llmquant.pipeline.plan import LinearPlan, Plan, read_finite
from llmquant.pipeline.report import ReportBuilder

SEARCH_SEQUENCES = 8
"""Sequences whose activations choose the scales."""
RANGE_STEPS = 0
"""Shrink factors of each group's range while scales are compared; 0 takes the extremes."""
CHECK_STEPS = 8
"""Shrink factors when the block is checked with and without its scales."""

Choice = tuple[Fold, Tensor]
"""A pair and its scale_R."""


@dataclass(frozen=True)
class Folded:
    """What was folded into a block."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    """New values by parameter name within the block: weights to quantize in float32, the rest as it is stored."""
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    """The checkpoint's parameters, whose place they took."""
    scales: dict[int, Tensor] = field(default_factory=dict)
    """scale_K of every stage whose input is divided by one."""


class Smoother:
    """Chooses and folds the scales of one block after the other; remembers the pairs of each kind of block."""

    def __init__(self, plan: Plan, report: ReportBuilder) -> None:
        self.plan, self.report = plan, report
        self._found: dict[object, list[Fold]] = {}
        uses = Counter(plan.skeleton.names.values())
        self._tied = {name for name, source in plan.skeleton.names.items() if uses[source] > 1}

    def choose(
        self, walk: Walk, index: int, block_plan: BlockPlan, linears: Mapping[str, LinearPlan]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Choose scales for a block that all sequences stand in front of, and fold them into its parameters.

        `Folded.parameters` and `Folded.scales`; both empty where scales do not help. The block itself is as it was.
        """
        prefix = self.plan.block_names[index]
        block = self.plan.skeleton.model.get_submodule(prefix)
        calls = walk.calls(SEARCH_SEQUENCES)
        with self.report.timed("folding"):
            folds = self._pairs(block, block_plan, calls[0], prefix, linears)
        with self.report.timed("forward"):
            statistics, outputs = _survey(block, block_plan, calls)
        with self.report.timed("scale search"):
            values = self._values(block, block_plan, folds, prefix)
            choices = [
                choice
                for pair in folds
                if (choice := self._choose(block, block_plan, pair, statistics, linears, values, prefix))
            ]
            new = fold(values, block, block_plan, choices)
            new = {name: self._as_stored(prefix, name, value, linears) for name, value in new.items()}
            scales = {reading.stage: reading.scale_K(scale_R) for pair, scale_R in choices for reading in pair.readings}
        if not choices:
            return {}, {}
        if not all(torch.isfinite(value).all() for value in new.values()):
            self.report.remark(prefix, "scales undone: a folded parameter does not fit the dtype it is stored in")
            return {}, {}
        with self.report.timed("scale check"):
            importances = {number: moments.hessian_KK.diagonal() for number, moments in statistics.items()}
            plain = self._rounded(block, block_plan, linears, {name: values[name] for name in new}, importances)
            importances |= {number: importances[number] / scale_K.square() for number, scale_K in scales.items()}
            scaled = self._rounded(block, block_plan, linears, new, importances)
            helps = self._error(block, calls, outputs, scaled) < self._error(block, calls, outputs, plain)
        if not helps:
            self.report.remark(prefix, "scales undone: the block's output error is not lower with them")
            return {}, {}
        # Other ranks have other devices.
        return {name: value.cpu() for name, value in new.items()}, {n: scale_K.cpu() for n, scale_K in scales.items()}

    def learn(self, walk: Walk, index: int) -> None:
        """Find the pairs of a block that all sequences stand in front of, unless such a block was seen before.

        A run that is continued finds them where the one before it did, in blocks that it only passes through.
        """
        block, block_plan = self.plan.skeleton.model.get_submodule(self.plan.block_names[index]), walk.plan(index)
        if _kind(block, block_plan) not in self._found:
            self._found[_kind(block, block_plan)] = find_folds(Bench(block, block_plan, walk.calls(1)[0]))

    def _pairs(
        self,
        block: nn.Module,
        block_plan: BlockPlan,
        call: tuple[tuple, dict],
        prefix: str,
        linears: Mapping[str, LinearPlan],
    ) -> list[Fold]:
        """The proven pairs of a block; stages that are left without are listed in the report."""
        bench = Bench(block, block_plan, call)
        kind = _kind(block, block_plan)
        if kind not in self._found:
            self._found[kind] = find_folds(bench)
        found = self._found[kind]
        proven = prove_folds(
            bench,
            [
                pair
                for pair in found
                if not any(f"{prefix}.{name}" in self._tied for name in pair.touched(block, block_plan))
            ],
        )
        reasons = {
            reading.stage: f"folding into '{pair.producer.name}' changes the block's output or a shared tensor"
            for pair in found
            for reading in pair.readings
        }
        scaled = {reading.stage for pair in proven for reading in pair.readings}
        for number, stage in enumerate(block_plan.stages):
            if number not in scaled and any(name in linears for name in stage.linears):
                reason = reasons.get(number, "no norm or linear makes its channels one by one")
                self.report.remark(f"{prefix}.{stage.linears[0]}", f"input not scaled: {reason}")
        return proven

    def _values(self, block: nn.Module, block_plan: BlockPlan, folds: Sequence[Fold], prefix: str) -> dict[str, Tensor]:
        """The checkpoint's values, float32, of every parameter that the pairs touch, by name within the block."""
        names = {name for pair in folds for name in pair.touched(block, block_plan)}
        sources = {name: self.plan.skeleton.names[f"{prefix}.{name}"] for name in sorted(names)}
        return {
            name: read_finite(self.plan, source).to(self.plan.skeleton.device, torch.float32)
            for name, source in sources.items()
        }

    def _choose(
        self,
        block: nn.Module,
        block_plan: BlockPlan,
        pair: Fold,
        statistics: Mapping[int, InputStatistics],
        linears: Mapping[str, LinearPlan],
        values: Mapping[str, Tensor],
        prefix: str,
    ) -> Choice | None:
        """The scale of one pair, or None when no scale is predicted to help."""
        readers = []
        for reading in pair.readings:
            names = [name for name in block_plan.stages[reading.stage].linears if name in linears]
            for spec in dict.fromkeys(linears[name].grid for name in names):
                weights = [
                    weight_as_NK(block.get_submodule(name), values[f"{name}.weight"])
                    for name in names
                    if linears[name].grid == spec
                ]
                moments = statistics[reading.stage]
                readers.append(Reader(torch.cat(weights), spec, moments.hessian_KK, moments.mean_abs_K, reading.row_K))
        if not readers:
            return None
        search = search_scale(
            readers, pair.producer.num_rows, self.plan.scale_dtype, self.plan.format.min_zero, RANGE_STEPS
        )
        if not search.loss < search.plain_loss:
            return None
        scale_R = search.scale_R
        if not is_linear(block.get_submodule(pair.producer.name)):
            weight_R = values[f"{pair.producer.name}.weight"] + pair.producer.offset
            # Exact as it is stored, and as it is loaded into a model of another dtype.
            stored = self._stored_dtype(prefix, f"{pair.producer.name}.weight")
            dtype = min(self.plan.dtype, stored, key=lambda dtype: dtype.itemsize)
            scale_R = exact_scale(weight_R, scale_R, pair.producer.offset, dtype)
        return pair, scale_R

    def _as_stored(self, prefix: str, name: str, value: Tensor, linears: Mapping[str, LinearPlan]) -> Tensor:
        """What the written model will hold of a folded parameter; a weight yet to be quantized stays float32."""
        return value if name.removesuffix(".weight") in linears else value.to(self._stored_dtype(prefix, name))

    def _stored_dtype(self, prefix: str, name: str) -> torch.dtype:
        """The dtype in which a parameter of a block is written."""
        return self.plan.kept_dtype(self.plan.reader.info(self.plan.skeleton.names[f"{prefix}.{name}"]))

    def _rounded(
        self,
        block: nn.Module,
        block_plan: BlockPlan,
        linears: Mapping[str, LinearPlan],
        parameters: Mapping[str, Tensor],
        importances: Mapping[int, Tensor],
    ) -> dict[str, Tensor]:
        """Parameters of a block with the weights of linears rounded to nearest, on ranges searched by importance_K."""
        rounded = dict(parameters)
        scale_dtype, min_zero = self.plan.scale_dtype, self.plan.format.min_zero
        for number, stage in enumerate(block_plan.stages):
            for name in stage.linears:
                key = f"{name}.weight"
                if name in linears and key in rounded:
                    linear, spec = block.get_submodule(name), linears[name].grid
                    weight_KN = weight_as_NK(linear, rounded[key]).T.contiguous()
                    grid = find_grid(weight_KN, importances[number], spec, scale_dtype, min_zero, CHECK_STEPS)
                    rounded_KN = values_on_grid(round_to_grid(weight_KN, grid, spec), grid, spec)
                    rounded[key] = weight_as_NK(linear, rounded_KN.T).contiguous()
        return rounded

    def _error(
        self,
        block: nn.Module,
        calls: Sequence[tuple[tuple, dict]],
        outputs: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
    ) -> float:
        """Squared difference of the block's output when it runs on other parameters."""
        dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
        lent = {name: value.to(dtypes[name]) for name, value in parameters.items()}
        total = 0.0
        for (args, kwargs), output in zip(calls, outputs, strict=True):
            changed = tensors_in(functional_call(block, lent, args, kwargs))[0]
            total += (changed.float() - output.float()).square().sum(dtype=torch.float64).item()
        return total


def put_folded(plan: Plan, index: int, parameters: dict[str, Tensor], scales: dict[int, Tensor]) -> Folded:
    """Replace a block's parameters by what `Smoother.choose` has made of them."""
    prefix, own = plan.block_names[index], {}
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        module = plan.skeleton.model.get_submodule(f"{prefix}.{owner}")
        parameter = module._parameters[leaf]
        assert parameter is not None
        own[name] = parameter
        plan.skeleton.put(f"{prefix}.{name}", module, leaf, value)
    scales = {stage: scale_K.to(plan.skeleton.device) for stage, scale_K in scales.items()}
    return Folded(parameters, own, scales)


def _kind(block: nn.Module, plan: BlockPlan) -> object:
    """Equal for blocks that are built and run alike."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return plan, modules, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def exact_scale(weight_R: Tensor, scale_R: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The scale next to scale_R that divides a norm's weight to a number of dtype exactly; 1 where there is none.

    weight_R: what the norm multiplies by, offset included; float32.
    """
    rounded_R = (weight_R / scale_R - offset).to(dtype).float() + offset
    exact_R = weight_R / rounded_R
    near_R = torch.isfinite(exact_R) & (exact_R > scale_R / 2) & (exact_R < scale_R * 2)
    return torch.where(near_R, exact_R, 1.0)


def _survey(
    block: nn.Module, plan: BlockPlan, calls: Sequence[tuple[tuple, dict]]
) -> tuple[dict[int, InputStatistics], list[Tensor]]:
    """Second moments of every stage's input over some calls of a block, and the block's outputs."""
    statistics: dict[int, InputStatistics] = {}
    handles = []
    for number, stage in enumerate(plan.stages):

        def add(module: nn.Module, args: tuple, kwargs: dict, number: int = number) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            if number not in statistics:
                statistics[number] = InputStatistics(x.shape[-1], x.device)
            statistics[number].add(x.flatten(0, -2))

        handles.append(block.get_submodule(stage.linears[0]).register_forward_pre_hook(add, with_kwargs=True))
    try:
        outputs = [tensors_in(block(*args, **kwargs))[0] for args, kwargs in calls]
    finally:
        for handle in handles:
            handle.remove()
    return statistics, outputs
