"""AWQ scaling of a decoder block: scale its channels before it is quantized, if that lowers the output error.

For a block that all sequences have reached, with the checkpoint's weights loaded:

    folds that the block allows (`models/scale_folding.py`: found once per kind of block, verified in every block)
    -> one forward pass of a few sequences: second moments of every input group's input, and the block's output
    -> a scale for every fold (`algorithms/awq.py`)
    -> the block's output with its linears rounded to nearest: the error must be lower with the scales than without
    -> the scales are folded into the block's parameters

All scales of a block are chosen before any of its linears is rounded, since they change the producers too. Folded
values are computed in float32 from the checkpoint's values and rounded once. If a norm's weight is stored in 16 bits,
rounding the folded weight would change the model. So the scale is computed from the rounded weight, which makes
the fold exact.

Letters: N out_features, K in_features, R rows of a producer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.algorithms.awq import ConsumerLinears, search_scale
from llmquant.algorithms.grid import find_grid, round_to_grid, values_on_grid
from llmquant.algorithms.statistics import InputStatistics
from llmquant.hooks import hooked
from llmquant.models.blocks import BlockStructure, first_tensor, is_linear, weight_as_NK
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.models.finite import read_finite
from llmquant.models.scale_folding import BlockProbe, Fold, find_folds, floating_tensors_in, fold_scales, verify_folds
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.report.run_log import RunLog

SEARCH_SEQUENCES = 8
"""Number of sequences on whose activations the scales are searched."""
RANGE_STEPS = 0
"""Number of shrink factors tried for each range while scales are compared; 0 takes the extremes of the group."""
CHECK_STEPS = 8
"""Number of shrink factors tried for each range when the block is compared with and without its scales."""

ScaleChoice = tuple[Fold, Tensor]
"""A fold and its scale_R."""
BlockCall = tuple[tuple, dict]
"""(args, kwargs) of one call of a block."""


@dataclass(frozen=True)
class FoldedBlock:
    """The folded parameters and scales of a block; empty if nothing is folded."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Folded values by parameter name within the block: float32 for weights to quantize, else the stored dtype."""
    checkpoint_parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """The checkpoint's parameters that the folded values replaced, by the same names."""
    scales: dict[int, Tensor] = field(default_factory=dict)
    """scale_K of every input group whose input is divided by a scale, by the group's index."""


@dataclass(frozen=True)
class _Block:
    """A block whose weights are loaded."""

    prefix: str
    """Name of the block in the model."""
    module: nn.Module
    """The block."""
    structure: BlockStructure
    """Input groups of the block."""
    linears: Mapping[str, LinearPlan]
    """Linears to quantize, by name within the block."""


class AwqScaler:
    """Chooses the scales of one block after another, and keeps the folds of each kind of block (`_kind_of`)."""

    def __init__(self, plan: Plan, log: RunLog) -> None:
        self.plan, self.log = plan, log
        self._folds_of_kind: dict[object, list[Fold]] = {}
        uses = Counter(plan.skeleton.names.values())
        self._tied = {name for name, source in plan.skeleton.names.items() if uses[source] > 1}

    def choose_scales(
        self, forward: BlockwiseForward, index: int, structure: BlockStructure, linears: Mapping[str, LinearPlan]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Choose the scales of the block that all sequences have reached; the block itself does not change.

        Returns `FoldedBlock.parameters` and `FoldedBlock.scales`, in main memory; both are empty if scales do not help.
        """
        prefix = self.plan.block_names[index]
        block = _Block(prefix, self.plan.skeleton.model.get_submodule(prefix), structure, linears)
        calls = forward.block_calls(SEARCH_SEQUENCES)
        with self.log.timed("folding"):
            folds = self._verified_folds(block, calls[0])
        with self.log.timed("forward"):
            statistics, outputs = _run_with_statistics(block, calls)
        with self.log.timed("scale search"):
            values = self._checkpoint_values(block, folds)
            choices = [choice for fold in folds if (choice := self._choose_scale(block, fold, statistics, values))]
            folded = fold_scales(values, block.module, structure, choices)
            folded = {name: self._as_stored(block, name, value) for name, value in folded.items()}
            scales = {
                consumer.input_group: consumer.scale_K(scale_R)
                for fold, scale_R in choices
                for consumer in fold.consumers
            }
        if not choices:
            return {}, {}
        if not all(torch.isfinite(value).all() for value in folded.values()):
            self.log.note(prefix, "scales not used: a folded parameter does not fit the dtype it is stored in")
            return {}, {}
        with self.log.timed("scale check"):
            importances = {number: moments.hessian_KK.diagonal() for number, moments in statistics.items()}
            unscaled = self._rounded(block, {name: values[name] for name in folded}, importances)
            importances |= {number: importances[number] / scale_K.square() for number, scale_K in scales.items()}
            scaled = self._rounded(block, folded, importances)
            helps = self._output_error(block, calls, outputs, scaled) < self._output_error(
                block, calls, outputs, unscaled
            )
        if not helps:
            self.log.note(prefix, "scales not used: the block's output error is not lower with them")
            return {}, {}
        # The result is sent to other ranks, which have other devices.
        return {name: value.cpu() for name, value in folded.items()}, {
            n: scale_K.cpu() for n, scale_K in scales.items()
        }

    def find_block_folds(self, forward: BlockwiseForward, index: int) -> None:
        """Find the folds of the block that all sequences have reached, unless those of its kind are known.

        A continued run calls this for the finished blocks, so that it finds the folds of each kind in the same block as
        the interrupted run did.
        """
        module = self.plan.skeleton.model.get_submodule(self.plan.block_names[index])
        structure = forward.structure(index)
        if _kind_of(module, structure) not in self._folds_of_kind:
            probe = BlockProbe(module, structure, forward.block_calls(1)[0])
            self._folds_of_kind[_kind_of(module, structure)] = find_folds(probe)

    def _verified_folds(self, block: _Block, call: BlockCall) -> list[Fold]:
        """Return the verified folds of a block, and log which inputs cannot be scaled."""
        probe = BlockProbe(block.module, block.structure, call)
        kind = _kind_of(block.module, block.structure)
        if kind not in self._folds_of_kind:
            self._folds_of_kind[kind] = find_folds(probe)
        candidates = self._folds_of_kind[kind]
        verified = verify_folds(probe, [fold for fold in candidates if not self._changes_tied_parameter(block, fold)])
        reasons = {
            consumer.input_group: f"a scale cannot be folded into '{fold.producer.name}' without changing the block's "
            "output or a tied tensor"
            for fold in candidates
            for consumer in fold.consumers
        }
        scaled = {consumer.input_group for fold in verified for consumer in fold.consumers}
        for number, input_group in enumerate(block.structure.input_groups):
            if number not in scaled and any(name in block.linears for name in input_group.linears):
                reason = reasons.get(number, "no norm or linear was found whose rows produce its channels")
                self.log.note(f"{block.prefix}.{input_group.linears[0]}", f"input not scaled: {reason}")
        return verified

    def _changes_tied_parameter(self, block: _Block, fold: Fold) -> bool:
        names = fold.changed_parameters(block.module, block.structure)
        return any(f"{block.prefix}.{name}" in self._tied for name in names)

    def _checkpoint_values(self, block: _Block, folds: Sequence[Fold]) -> dict[str, Tensor]:
        """Return the checkpoint's values, float32, of the parameters that folds change, by name within the block."""
        names = {name for fold in folds for name in fold.changed_parameters(block.module, block.structure)}
        sources = {name: self.plan.skeleton.names[f"{block.prefix}.{name}"] for name in sorted(names)}
        return {
            name: read_finite(self.plan.skeleton, source).to(self.plan.skeleton.device, torch.float32)
            for name, source in sources.items()
        }

    def _choose_scale(
        self, block: _Block, fold: Fold, statistics: Mapping[int, InputStatistics], values: Mapping[str, Tensor]
    ) -> ScaleChoice | None:
        """Return a fold with its scale, or None if no scale is predicted to lower the error."""
        consumers = _consumer_linears(block, fold, statistics, values)
        if not consumers:
            return None
        search = search_scale(
            consumers, fold.producer.num_rows, self.plan.scale_dtype, self.plan.format.min_zero, RANGE_STEPS
        )
        if not search.loss < search.unscaled_loss:
            return None
        scale_R = search.scale_R
        if not is_linear(block.module.get_submodule(fold.producer.name)):
            weight_R = values[f"{fold.producer.name}.weight"] + fold.producer.offset
            # The fold must be exact in the stored dtype, and in a model that is loaded in another dtype.
            stored = self._stored_dtype(block, f"{fold.producer.name}.weight")
            dtype = min(self.plan.dtype, stored, key=lambda dtype: dtype.itemsize)
            scale_R = exact_scale(weight_R, scale_R, fold.producer.offset, dtype)
        return fold, scale_R

    def _as_stored(self, block: _Block, name: str, value: Tensor) -> Tensor:
        """Return a folded parameter in the dtype it is stored in; a weight that will be quantized stays float32."""
        return value if name.removesuffix(".weight") in block.linears else value.to(self._stored_dtype(block, name))

    def _stored_dtype(self, block: _Block, name: str) -> torch.dtype:
        """Return the dtype in which a parameter of a block is written."""
        return self.plan.unquantized_dtype(self.plan.reader.info(self.plan.skeleton.names[f"{block.prefix}.{name}"]))

    def _rounded(
        self, block: _Block, parameters: Mapping[str, Tensor], importances: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Return parameters of a block with the weights of its linears rounded to nearest on searched ranges.

        importances: importance_K for the range search of each input group, by the group's index.
        """
        rounded = dict(parameters)
        scale_dtype, min_zero = self.plan.scale_dtype, self.plan.format.min_zero
        for number, input_group in enumerate(block.structure.input_groups):
            for name in input_group.linears:
                key = f"{name}.weight"
                if name in block.linears and key in rounded:
                    linear, spec = block.module.get_submodule(name), block.linears[name].quant_spec
                    weight_KN = weight_as_NK(linear, rounded[key]).T.contiguous()
                    grid = find_grid(weight_KN, importances[number], spec, scale_dtype, min_zero, CHECK_STEPS)
                    rounded_KN = values_on_grid(round_to_grid(weight_KN, grid, spec), grid, spec)
                    rounded[key] = weight_as_NK(linear, rounded_KN.T).contiguous()
        return rounded

    def _output_error(
        self, block: _Block, calls: Sequence[BlockCall], outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]
    ) -> float:
        """Return the squared difference between the given outputs and those of the block with other parameters."""
        dtypes = {name: parameter.dtype for name, parameter in block.module.named_parameters()}
        replaced = {name: value.to(dtypes[name]) for name, value in parameters.items()}
        total = 0.0
        for (args, kwargs), output in zip(calls, outputs, strict=True):
            changed = floating_tensors_in(functional_call(block.module, replaced, args, kwargs))[0]
            total += (changed.float() - output.float()).square().sum(dtype=torch.float64).item()
        return total


def install_folded(plan: Plan, index: int, parameters: dict[str, Tensor], scales: dict[int, Tensor]) -> FoldedBlock:
    """Replace a block's parameters by the folded ones that `AwqScaler.choose_scales` returned."""
    prefix, checkpoint_parameters = plan.block_names[index], {}
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        module = plan.skeleton.model.get_submodule(f"{prefix}.{owner}")
        parameter = module._parameters[leaf]
        assert parameter is not None
        checkpoint_parameters[name] = parameter
        plan.skeleton.put(f"{prefix}.{name}", module, leaf, value)
    scales = {input_group: scale_K.to(plan.skeleton.device) for input_group, scale_K in scales.items()}
    return FoldedBlock(parameters, checkpoint_parameters, scales)


def exact_scale(weight_R: Tensor, scale_R: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """Return a scale close to scale_R by which a norm's weight can be divided exactly in dtype; 1 where there is none.

    weight_R: the factor by which the norm multiplies, float32: its weight plus the offset.
    """
    rounded_R = (weight_R / scale_R - offset).to(dtype).float() + offset
    exact_R = weight_R / rounded_R
    near_R = torch.isfinite(exact_R) & (exact_R > scale_R / 2) & (exact_R < scale_R * 2)
    return torch.where(near_R, exact_R, 1.0)


def _kind_of(block: nn.Module, structure: BlockStructure) -> object:
    """Return a key that is equal for blocks of the same modules, shapes and structure."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return structure, modules, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def _consumer_linears(
    block: _Block, fold: Fold, statistics: Mapping[int, InputStatistics], values: Mapping[str, Tensor]
) -> list[ConsumerLinears]:
    """Return the linears to quantize that read a fold's producer, one entry per input group and grid."""
    consumer_linears = []
    for consumer in fold.consumers:
        moments = statistics[consumer.input_group]
        names = [name for name in block.structure.input_groups[consumer.input_group].linears if name in block.linears]
        for spec in dict.fromkeys(block.linears[name].quant_spec for name in names):
            weights = [
                weight_as_NK(block.module.get_submodule(name), values[f"{name}.weight"])
                for name in names
                if block.linears[name].quant_spec == spec
            ]
            consumer_linears.append(
                ConsumerLinears(torch.cat(weights), spec, moments.hessian_KK, moments.mean_abs_K, consumer.row_K)
            )
    return consumer_linears


def _run_with_statistics(block: _Block, calls: Sequence[BlockCall]) -> tuple[dict[int, InputStatistics], list[Tensor]]:
    """Run some calls of a block; return the statistics of every input group's input, and the block's outputs."""
    statistics: dict[int, InputStatistics] = {}

    def add_input_of(number: int) -> Callable:
        def add_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            if number not in statistics:
                statistics[number] = InputStatistics(x.shape[-1], x.device)
            statistics[number].add(x.flatten(0, -2))

        return add_input

    hooks = [
        (block.module.get_submodule(input_group.linears[0]), add_input_of(number))
        for number, input_group in enumerate(block.structure.input_groups)
    ]
    with hooked(hooks, before=True):
        outputs = [floating_tensors_in(block.module(*args, **kwargs))[0] for args, kwargs in calls]
    return statistics, outputs
