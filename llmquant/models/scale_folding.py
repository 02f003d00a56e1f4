"""Scale folding: find inputs of a block's linears that can be divided by a scale without changing the block's output.

AWQ (Lin et al. 2023) divides the input of a linear by a scale per channel and multiplies the columns of its weight by
the same scale. The division is folded into the weights of the module that produces the input: a norm, or an earlier
linear (smooth_layer and balance_layers in llm-compressor; producer and consumers here). There is no table of producers.
Runs of the block on its calibration activations show which module produces which input:

    find     Multiply the rows of one producer by markers, numbers that all differ, and run the block. If each channel
             of a group's input is its former value times one of the markers, that marker shows which row of the
             producer makes the channel: `row_K`. With grouped-query attention several channels share a row.
    verify   Divide the rows by random scales, multiply the columns of the consumers by them, and run the block. Its
             output must stay the same. It changes if anything else reads the producer's output.

Fused projections need two more steps, because markers on their other rows hide the rows that qualify. First, only the
first token is compared. It attends only to itself, so its input to the output projection is its own value vector for
any query and key. This shows the value rows of a fused q/k/v projection. Second, the rows of a fused gate/up projection
are marked by halves, and by odd and even rows. Both only suggest rows; a run with only these rows marked confirms them.

Everything runs in float32. The block does not change: it runs with other parameters by `functional_call`.

Letters: T tokens, K in_features of the consumers, R rows of a producer (elements of a norm's weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.algorithms.awq import scale_of_channels
from llmquant.hooks import hooked
from llmquant.models.blocks import BlockStructure, first_tensor, is_linear, linear_shape, weight_as_NK

CHANNEL_TOLERANCE = 1e-3
"""Largest relative deviation of a channel from a multiple of its former value. A channel that is only multiplied keeps
its values over the tokens to float32 accuracy; any other channel deviates far more."""
RATIO_TOLERANCE = 1e-4
"""Largest difference between the logarithms of a channel's ratio and of the marker that explains it."""
OUTPUT_TOLERANCE = 1e-3
"""Largest change of the block's output at a token, relative to what the block adds to that token's hidden state."""


@dataclass(frozen=True)
class Producer:
    """A norm or linear whose rows each make one or more input channels of consumers (the smooth layer)."""

    name: str
    """Name of the module within the block."""
    num_rows: int
    """R: rows of a linear's weight, or elements of a norm's weight."""
    offset: float
    """Number that the module adds to its weight: 1 for norms that compute `(1 + weight) * x`, else 0."""


@dataclass(frozen=True)
class Consumer:
    """An input group that reads the output of a producer (its linears are the balance layers)."""

    input_group: int
    """Index of the input group in the block's structure."""
    row_K: Tensor
    """Producer's row that makes each input channel, int64; -1 if the row is unknown."""

    def scale_K(self, scale_R: Tensor) -> Tensor:
        """Return the scale of every input channel from the scales of the producer's rows; 1 if the row is unknown."""
        return scale_of_channels(scale_R, self.row_K)


@dataclass(frozen=True)
class Fold:
    """A producer and all input groups that read it."""

    producer: Producer
    consumers: tuple[Consumer, ...]

    @property
    def rows_R(self) -> Tensor:
        """Rows of the producer that make a channel, bool; the other rows are never scaled."""
        used_R = torch.zeros(self.producer.num_rows, dtype=torch.bool, device=self.consumers[0].row_K.device)
        for consumer in self.consumers:
            used_R[consumer.row_K[consumer.row_K >= 0]] = True
        return used_R

    def changed_parameters(self, block: nn.Module, structure: BlockStructure) -> set[str]:
        """Return the names within the block of the parameters that folding changes."""
        owned = {f"{self.producer.name}.{leaf}" for leaf in block.get_submodule(self.producer.name)._parameters}
        owned &= {name for name, _ in block.named_parameters(remove_duplicate=False)}
        return owned | {
            f"{name}.weight"
            for consumer in self.consumers
            for name in structure.input_groups[consumer.input_group].linears
        }


# --- folding ---------------------------------------------------------------------------------------------------------


def multiply_rows(
    parameters: Mapping[str, Tensor], block: nn.Module, producer: Producer, factor_R: Tensor
) -> dict[str, Tensor]:
    """Return the producer's parameters, by name within the block, with its rows multiplied by factor_R; float32."""
    module = block.get_submodule(producer.name)
    weight = parameters[f"{producer.name}.weight"].float()
    if is_linear(module):
        scaled = weight_as_NK(module, weight_as_NK(module, weight) * factor_R[:, None])
    else:
        scaled = (weight + producer.offset) * factor_R - producer.offset
    changed = {f"{producer.name}.weight": scaled.contiguous()}
    if (bias := parameters.get(f"{producer.name}.bias")) is not None:
        changed[f"{producer.name}.bias"] = bias.float() * factor_R
    return changed


def fold_scales(
    parameters: Mapping[str, Tensor],
    block: nn.Module,
    structure: BlockStructure,
    choices: Iterable[tuple[Fold, Tensor]],
) -> dict[str, Tensor]:
    """Return the parameters that folding changes, by name within the block; float32.

    parameters: all parameters of the block. choices: folds with their scale_R; folding divides the inputs by it and
    multiplies the columns by it.
    """
    changed: dict[str, Tensor] = {}
    for fold, scale_R in choices:
        changed |= multiply_rows({**parameters, **changed}, block, fold.producer, 1 / scale_R)
        for consumer in fold.consumers:
            scale_K = consumer.scale_K(scale_R)
            for name in structure.input_groups[consumer.input_group].linears:
                linear, key = block.get_submodule(name), f"{name}.weight"
                weight_NK = weight_as_NK(linear, changed.get(key, parameters[key]).float())
                changed[key] = weight_as_NK(linear, weight_NK * scale_K).contiguous()
    return changed


# --- running a block with other parameters ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRun:
    """The inputs and outputs of one run of a block."""

    inputs: dict[int, Tensor]
    """x_TK of every input group, by the group's index."""
    outputs: list[Tensor]
    """Floating-point tensors that the block returned."""


class BlockProbe:
    """A block in float32 with the arguments of one call, to run with changed parameters."""

    def __init__(self, block: nn.Module, structure: BlockStructure, call: tuple[tuple, dict]) -> None:
        self.block, self.structure = block, structure
        self.args, self.kwargs = _to_float32(call[0]), _to_float32(call[1])
        self.parameters = {name: parameter.detach().float() for name, parameter in block.named_parameters()}
        self.baseline = self.run({})

    @torch.no_grad()
    def run(self, changed: Mapping[str, Tensor]) -> BlockRun:
        """Run the block with some of its parameters changed, given by name within the block."""
        inputs: dict[int, Tensor] = {}

        def keep_input(module: nn.Module, args: tuple, kwargs: dict, number: int) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            inputs[number] = x.flatten(0, -2).clone()

        groups = self.structure.input_groups
        hooks = [
            (self.block.get_submodule(group.linears[0]), partial(keep_input, number=number))
            for number, group in enumerate(groups)
        ]
        with hooked(hooks, before=True):
            output = functional_call(self.block, {**self.parameters, **changed}, self.args, self.kwargs)
        return BlockRun(inputs, floating_tensors_in(output))


def floating_tensors_in(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a block's output, at any depth."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return (
        [tensor for item in value for tensor in floating_tensors_in(item)] if isinstance(value, (tuple, list)) else []
    )


def _to_float32(value: Any) -> Any:
    """Return the same arguments with every floating-point tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _to_float32(item) for key, item in value.items()}
    return type(value)(_to_float32(item) for item in value) if type(value) in (tuple, list) else value


# --- finding folds ---------------------------------------------------------------------------------------------------


def find_folds(probe: BlockProbe) -> list[Fold]:
    """Return the candidate folds, found by runs with marked rows, for `verify_folds`; no two share an input group."""
    folds: list[Fold] = []
    unexplained = set(range(len(probe.structure.input_groups)))
    candidates = list(_candidate_producers(probe))

    def find(forms: list[tuple[Producer, int]], search: Callable[..., Fold | None]) -> None:
        for producer, first_group in forms:
            groups = {number for number in unexplained if number >= first_group}
            fold = search(probe, producer, groups) if groups else None
            if fold is not None:
                folds.append(fold)
                unexplained.difference_update(consumer.input_group for consumer in fold.consumers)
                break

    for forms in candidates:
        find(forms, _find_fold)
    for forms in candidates:
        if is_linear(probe.block.get_submodule(forms[0][0].name)):
            find(forms, _find_fold_of_fused)
    return folds


def _candidate_producers(probe: BlockProbe) -> Iterable[list[tuple[Producer, int]]]:
    """Yield, for each module that may produce an input, its forms as (producer, first group that could read it).

    A norm has two forms, with an offset of 0 and of 1; a linear has one.
    """
    for name, module in probe.block.named_modules():
        weight = probe.parameters.get(f"{name}.weight")
        if weight is not None and weight.ndim == 1 and not is_linear(module):
            yield [(Producer(name, len(weight), offset), 0) for offset in (0.0, 1.0)]
    for number, input_group in enumerate(probe.structure.input_groups[:-1]):
        for name in input_group.linears:
            yield [(Producer(name, linear_shape(probe.block.get_submodule(name))[0], 0.0), number + 1)]


def _markers(num_rows: int, device: torch.device) -> Tensor:
    """Return marker_R: different numbers between 2 and 8, evenly spaced in their logarithm, in random order."""
    generator = torch.Generator().manual_seed(num_rows)
    position_R = (torch.randperm(num_rows, generator=generator) + 0.5) / num_rows
    return torch.exp2(1 + 2 * position_R).to(device)


def _matched_rows(before_TK: Tensor, after_TK: Tensor, marker_R: Tensor) -> Tensor:
    """Return the row whose marker each channel was multiplied by, int64 [K]; -1 if no marker explains the change."""
    power_K = before_TK.square().sum(0)
    ratio_K = (after_TK * before_TK).sum(0) / power_K.clamp(min=torch.finfo(torch.float32).tiny)
    rest_K = (after_TK - ratio_K * before_TK).square().sum(0)
    sorted_R, row_of_R = marker_R.log().sort()
    log_K = ratio_K.clamp(min=0.5).log()
    right_K = torch.searchsorted(sorted_R, log_K).clamp(max=len(sorted_R) - 1)
    left_K = (right_K - 1).clamp(min=0)
    nearest_K = torch.where((sorted_R[right_K] - log_K).abs() < (log_K - sorted_R[left_K]).abs(), right_K, left_K)
    tolerance = min(RATIO_TOLERANCE, 2 * torch.log(torch.tensor(2.0)).item() / len(sorted_R) / 4)
    matches_K = (power_K > 0) & (rest_K <= CHANNEL_TOLERANCE**2 * ratio_K.square() * power_K)
    matches_K &= (sorted_R[nearest_K] - log_K).abs() <= tolerance
    return torch.where(matches_K, row_of_R[nearest_K], -1)


def _run_marked(probe: BlockProbe, producer: Producer, rows_R: Tensor | None = None) -> tuple[BlockRun, Tensor]:
    """Run with the producer's rows, or some of them, multiplied by their markers; return the run and marker_R."""
    marker_R = _markers(producer.num_rows, next(iter(probe.parameters.values())).device)
    factor_R = marker_R if rows_R is None else torch.where(rows_R, marker_R, 1.0)
    return probe.run(multiply_rows(probe.parameters, probe.block, producer, factor_R)), marker_R


def _is_explained(row_K: Tensor) -> bool:
    """Whether the rows of at least half of the channels are known.

    Channels that are always 0 (behind a ReLU that is never active) stay unknown.
    """
    return (row_K >= 0).float().mean().item() >= 0.5


def _find_fold(probe: BlockProbe, producer: Producer, input_groups: set[int]) -> Fold | None:
    """Return the fold of a producer with those of the input groups that a run with marked rows explains."""
    run, marker_R = _run_marked(probe, producer)
    consumers, guesses = [], []
    for number in sorted(input_groups):
        before_TK, after_TK = probe.baseline.inputs[number], run.inputs.get(number)
        # An expert may get other tokens if the input of its router changed.
        if after_TK is None or after_TK.shape != before_TK.shape:
            continue
        row_K = _matched_rows(before_TK, after_TK, marker_R)
        if _is_explained(row_K):
            consumers.append(Consumer(number, row_K))
        elif is_linear(probe.block.get_submodule(producer.name)):
            guess_K = _matched_rows(before_TK[:1], after_TK[:1], marker_R)
            if _is_explained(guess_K):
                guesses.append(Consumer(number, guess_K))
    if consumers:
        return Fold(producer, tuple(consumers))
    return _first_confirmed(probe, producer, guesses)


def _find_fold_of_fused(probe: BlockProbe, producer: Producer, input_groups: set[int]) -> Fold | None:
    """Return the fold of a fused projection, found by marking one half of its rows at a time."""
    index_R = torch.arange(producer.num_rows, device=next(iter(probe.parameters.values())).device)
    first_half_R, odd_R = index_R < producer.num_rows // 2, index_R % 2 == 1
    row_of: dict[int, Tensor] = {}
    for rows_R in (first_half_R, ~first_half_R, odd_R, ~odd_R):
        run, marker_R = _run_marked(probe, producer, rows_R)
        for number in input_groups:
            before_TK, after_TK = probe.baseline.inputs[number], run.inputs.get(number)
            if after_TK is None or after_TK.shape != before_TK.shape:
                continue
            row_K = _matched_rows(before_TK, after_TK, marker_R)
            row_of[number] = torch.where(row_K >= 0, row_K, row_of.get(number, row_K))
    guesses = [Consumer(number, row_K) for number, row_K in sorted(row_of.items()) if _is_explained(row_K)]
    return _first_confirmed(probe, producer, guesses)


def _first_confirmed(probe: BlockProbe, producer: Producer, guesses: Iterable[Consumer]) -> Fold | None:
    """Return a fold with the first guess that is confirmed by a run in which only its rows are marked."""
    for guess in guesses:
        run, marker_R = _run_marked(probe, producer, Fold(producer, (guess,)).rows_R)
        row_K = _matched_rows(probe.baseline.inputs[guess.input_group], run.inputs[guess.input_group], marker_R)
        if _is_explained(row_K):
            return Fold(producer, (Consumer(guess.input_group, row_K),))
    return None


# --- verifying folds -------------------------------------------------------------------------------------------------


def verify_folds(probe: BlockProbe, folds: Sequence[Fold]) -> list[Fold]:
    """Return the folds that can be used: with random scales in all of them, the block's output stays the same."""
    verified = list(folds)
    if verified and not _keep_output(probe, verified):
        verified = [fold for fold in verified if _keep_output(probe, [fold])]
        while verified and not _keep_output(probe, verified):
            verified.pop()
    return verified


def _keep_output(probe: BlockProbe, folds: Sequence[Fold]) -> bool:
    """Whether the block's output stays the same with random scales folded in."""
    device = next(iter(probe.parameters.values())).device
    choices = []
    for number, fold in enumerate(folds):
        generator = torch.Generator().manual_seed(number)
        scale_R = torch.exp2(2 * torch.rand(fold.producer.num_rows, generator=generator) - 1).to(device)
        choices.append((fold, torch.where(fold.rows_R, scale_R, 1.0)))
    outputs = probe.run(fold_scales(probe.parameters, probe.block, probe.structure, choices)).outputs
    hidden = first_tensor(probe.args, probe.kwargs)
    for before, after in zip(probe.baseline.outputs, outputs, strict=True):
        # The change is relative to what the block adds: the residual stream may be a thousand times larger.
        added = before - hidden if hidden is not None and hidden.shape == before.shape else before
        allowed = OUTPUT_TOLERANCE * added.norm(dim=-1) + 1e-6 * before.norm(dim=-1)
        if not ((after - before).norm(dim=-1) <= allowed).all():
            return False
    return bool(outputs)
