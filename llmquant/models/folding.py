"""Smoothing pairs of a decoder block: where linears' input can be scaled without changing what the block does.

AWQ (Lin et al. 2023) divides the input of a linear by a scale per channel and multiplies the weight's columns by it.
The division has to be folded into the weights that produce the input: a norm's, or the rows of an earlier linear. Which
those are is not looked up, it is tried out, on the activations that stand at the block's door:

    probe    multiply the rows of one producer by numbers that are all different, run the block, and see whether the
             input of a stage is the one of before with every channel multiplied by one of those numbers. Which one it
             is says which row makes the channel: `row_K`. Under grouped-query attention several channels share a row.
    prove    divide the rows by random scales, multiply the readers' columns by them, run the block: its output must be
             the same. Whatever else reads the producer's output, in whatever way, shows here.

A fused projection needs two more ideas, because scaling its other rows hides those that qualify. The first token
attends to nothing but itself, so its input to the output projection is its own value vector whatever queries and keys
are: it tells the value rows of a fused q/k/v projection. And a fused gate/up projection is probed by halves and by odd
and even rows. Either is only a guess at the rows, which a further probe of just them confirms.

Everything runs in float32. Nothing of the block is changed; other parameters are lent to it for a run.

Letters: T tokens, K in_features of the readers, R rows of a producer (elements of a norm's weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.models.blocks import BlockPlan, first_tensor, is_linear, linear_shape, weight_as_NK

# A channel that is only multiplied keeps its shape over the tokens to float32 accuracy; anything else is far off.
CHANNEL_TOLERANCE = 1e-3
RATIO_TOLERANCE = 1e-4
PROOF_TOLERANCE = 1e-3
"""Change of a token's output, relative to what the block adds to that token."""


@dataclass(frozen=True)
class Producer:
    """A norm or linear whose rows make channels."""

    name: str
    """Module within the block."""
    num_rows: int
    offset: float
    """What the module adds to its weight before it multiplies: 1 in norms that compute `(1 + weight) * x`, else 0."""


@dataclass(frozen=True)
class Reading:
    """How a stage reads a producer."""

    stage: int
    """Index in the block's plan."""
    row_K: Tensor
    """int64, the producer's row that makes each input channel; -1 for channels that none is known for."""

    def scale_K(self, scale_R: Tensor) -> Tensor:
        """The scale of every input channel, given those of the producer's rows; 1 where the row is not known."""
        return torch.where(self.row_K >= 0, scale_R[self.row_K.clamp(min=0)], 1.0)


@dataclass(frozen=True)
class Fold:
    """A producer and everything that reads it."""

    producer: Producer
    readings: tuple[Reading, ...]

    @property
    def rows_R(self) -> Tensor:
        """bool, the rows of the producer that make a channel; the others are never scaled."""
        used_R = torch.zeros(self.producer.num_rows, dtype=torch.bool, device=self.readings[0].row_K.device)
        for reading in self.readings:
            used_R[reading.row_K[reading.row_K >= 0]] = True
        return used_R

    def touched(self, block: nn.Module, plan: BlockPlan) -> set[str]:
        """Names within the block of the parameters that folding changes."""
        owned = {f"{self.producer.name}.{leaf}" for leaf in block.get_submodule(self.producer.name)._parameters}
        owned &= {name for name, _ in block.named_parameters(remove_duplicate=False)}
        return owned | {f"{name}.weight" for reading in self.readings for name in plan.stages[reading.stage].linears}


# --- folding ---------------------------------------------------------------------------------------------------------


def multiply_rows(
    parameters: Mapping[str, Tensor], block: nn.Module, producer: Producer, factor_R: Tensor
) -> dict[str, Tensor]:
    """The producer's parameters with its output's rows multiplied, by name within the block; float32."""
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


def fold(
    parameters: Mapping[str, Tensor],
    block: nn.Module,
    plan: BlockPlan,
    choices: Iterable[tuple[Fold, Tensor]],
) -> dict[str, Tensor]:
    """The parameters that folding changes, by name within the block; float32.

    parameters: all of the block's. choices: folds with their scale_R; inputs are divided by it, columns multiplied.
    """
    changed: dict[str, Tensor] = {}
    for choice, scale_R in choices:
        changed |= multiply_rows({**parameters, **changed}, block, choice.producer, 1 / scale_R)
        for reading in choice.readings:
            scale_K = reading.scale_K(scale_R)
            for name in plan.stages[reading.stage].linears:
                linear, key = block.get_submodule(name), f"{name}.weight"
                weight_NK = weight_as_NK(linear, changed.get(key, parameters[key]).float())
                changed[key] = weight_as_NK(linear, weight_NK * scale_K).contiguous()
    return changed


# --- running a block on lent parameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """One run of a block."""

    inputs: dict[int, Tensor]
    """x_TK of every stage, by its index."""
    outputs: list[Tensor]


class Bench:
    """A block in float32 with the arguments of one call, to be run with other parameters than its own."""

    def __init__(self, block: nn.Module, plan: BlockPlan, call: tuple[tuple, dict]) -> None:
        self.block, self.plan = block, plan
        self.args, self.kwargs = _floats(call[0]), _floats(call[1])
        self.parameters = {name: parameter.detach().float() for name, parameter in block.named_parameters()}
        self.before = self.run({})

    @torch.no_grad()
    def run(self, changed: Mapping[str, Tensor]) -> Trace:
        """Run the block with its own parameters but for those in changed."""
        inputs: dict[int, Tensor] = {}
        handles = []
        for number, stage in enumerate(self.plan.stages):

            def note(module: nn.Module, args: tuple, kwargs: dict, number: int = number) -> None:
                x = first_tensor(args, kwargs)
                assert x is not None
                inputs[number] = x.flatten(0, -2).clone()

            handles.append(self.block.get_submodule(stage.linears[0]).register_forward_pre_hook(note, with_kwargs=True))
        try:
            output = functional_call(self.block, {**self.parameters, **changed}, self.args, self.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return Trace(inputs, tensors_in(output))


def tensors_in(value: Any) -> list[Tensor]:
    """The floating tensors of a block's output, however they are nested."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _floats(value: Any) -> Any:
    """The same arguments with every floating tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) is dict:
        return {key: _floats(item) for key, item in value.items()}
    return type(value)(_floats(item) for item in value) if type(value) in (tuple, list) else value


# --- probing ---------------------------------------------------------------------------------------------------------


def find_folds(bench: Bench) -> list[Fold]:
    """The pairs that a block's input channels show; each stage is in one fold at most. They are still to be proven."""
    stages, folds = bench.plan.stages, []
    unexplained = set(range(len(stages)))
    producers = list(_producers(bench))
    for producers_of_one in producers:
        for producer, first_reader in producers_of_one:
            found = _probe(bench, producer, {number for number in unexplained if number >= first_reader})
            if found is not None:
                folds.append(found)
                unexplained -= {reading.stage for reading in found.readings}
                break
    for producers_of_one in producers:
        for producer, first_reader in producers_of_one:
            later = {number for number in unexplained if number >= first_reader}
            if later and is_linear(bench.block.get_submodule(producer.name)):
                found = _probe_parts(bench, producer, later)
                if found is not None:
                    folds.append(found)
                    unexplained -= {reading.stage for reading in found.readings}
    return folds


def _producers(bench: Bench) -> Iterable[list[tuple[Producer, int]]]:
    """Modules that may produce an input, each with the first stage that could read it; a norm in both its forms."""
    for name, module in bench.block.named_modules():
        weight = bench.parameters.get(f"{name}.weight")
        if weight is not None and weight.ndim == 1 and not is_linear(module):
            yield [(Producer(name, len(weight), offset), 0) for offset in (0.0, 1.0)]
    for number, stage in enumerate(bench.plan.stages[:-1]):
        for name in stage.linears:
            yield [(Producer(name, linear_shape(bench.block.get_submodule(name))[0], 0.0), number + 1)]


def _codes(num_rows: int, device: torch.device) -> Tensor:
    """Numbers between 2 and 8, evenly apart in their logarithm and in random order; none is 1."""
    generator = torch.Generator().manual_seed(num_rows)
    position_R = (torch.randperm(num_rows, generator=generator) + 0.5) / num_rows
    return torch.exp2(1 + 2 * position_R).to(device)


def _rows_seen(before_TK: Tensor, after_TK: Tensor, code_R: Tensor) -> Tensor:
    """The row whose code each channel was multiplied by, int64 [K]; -1 where it is no such product."""
    power_K = before_TK.square().sum(0)
    ratio_K = (after_TK * before_TK).sum(0) / power_K.clamp(min=torch.finfo(torch.float32).tiny)
    rest_K = (after_TK - ratio_K * before_TK).square().sum(0)
    sorted_R, row_of_R = code_R.log().sort()
    log_K = ratio_K.clamp(min=0.5).log()
    right_K = torch.searchsorted(sorted_R, log_K).clamp(max=len(sorted_R) - 1)
    left_K = (right_K - 1).clamp(min=0)
    nearest_K = torch.where((sorted_R[right_K] - log_K).abs() < (log_K - sorted_R[left_K]).abs(), right_K, left_K)
    tolerance = min(RATIO_TOLERANCE, 2 * torch.log(torch.tensor(2.0)).item() / len(sorted_R) / 4)
    clean_K = (power_K > 0) & (rest_K <= CHANNEL_TOLERANCE**2 * ratio_K.square() * power_K)
    clean_K &= (sorted_R[nearest_K] - log_K).abs() <= tolerance
    return torch.where(clean_K, row_of_R[nearest_K], -1)


def _run_coded(bench: Bench, producer: Producer, rows_R: Tensor | None = None) -> tuple[Trace, Tensor]:
    """Run with the producer's rows multiplied by their codes, the others by 1; the codes too."""
    code_R = _codes(producer.num_rows, next(iter(bench.parameters.values())).device)
    factor_R = code_R if rows_R is None else torch.where(rows_R, code_R, 1.0)
    return bench.run(multiply_rows(bench.parameters, bench.block, producer, factor_R)), code_R


def _is_found(row_K: Tensor) -> bool:
    # Channels that are always 0 (a ReLU that no token opens) stay unknown; most must be known.
    return (row_K >= 0).float().mean().item() >= 0.5


def _probe(bench: Bench, producer: Producer, stages: set[int]) -> Fold | None:
    trace, code_R = _run_coded(bench, producer)
    readings, guesses = [], []
    for number in sorted(stages):
        before_TK, after_TK = bench.before.inputs[number], trace.inputs.get(number)
        # An expert's tokens are not the same ones when what chooses them was changed.
        if after_TK is None or after_TK.shape != before_TK.shape:
            continue
        row_K = _rows_seen(before_TK, after_TK, code_R)
        if _is_found(row_K):
            readings.append(Reading(number, row_K))
        elif is_linear(bench.block.get_submodule(producer.name)):
            guess_K = _rows_seen(before_TK[:1], after_TK[:1], code_R)
            if _is_found(guess_K):
                guesses.append(Reading(number, guess_K))
    if readings:
        return Fold(producer, tuple(readings))
    for guess in guesses:
        confirmed = _confirm(bench, producer, guess)
        if confirmed is not None:
            return confirmed
    return None


def _probe_parts(bench: Bench, producer: Producer, stages: set[int]) -> Fold | None:
    """Probe a fused projection by parts that may hold only the rows that qualify."""
    index_R = torch.arange(producer.num_rows, device=next(iter(bench.parameters.values())).device)
    half_R, odd_R = index_R < producer.num_rows // 2, index_R % 2 == 1
    found: dict[int, Tensor] = {}
    for rows_R in (half_R, ~half_R, odd_R, ~odd_R):
        trace, code_R = _run_coded(bench, producer, rows_R)
        for number in stages:
            before_TK, after_TK = bench.before.inputs[number], trace.inputs.get(number)
            if after_TK is None or after_TK.shape != before_TK.shape:
                continue
            row_K = _rows_seen(before_TK, after_TK, code_R)
            found[number] = torch.where(row_K >= 0, row_K, found.get(number, row_K))
    for number, row_K in sorted(found.items()):
        if _is_found(row_K):
            confirmed = _confirm(bench, producer, Reading(number, row_K))
            if confirmed is not None:
                return confirmed
    return None


def _confirm(bench: Bench, producer: Producer, guess: Reading) -> Fold | None:
    """Probe with just the rows that were guessed; the fold of those that show."""
    trace, code_R = _run_coded(bench, producer, Fold(producer, (guess,)).rows_R)
    row_K = _rows_seen(bench.before.inputs[guess.stage], trace.inputs[guess.stage], code_R)
    return Fold(producer, (Reading(guess.stage, row_K),)) if _is_found(row_K) else None


# --- proof -----------------------------------------------------------------------------------------------------------


def prove_folds(bench: Bench, folds: Sequence[Fold]) -> list[Fold]:
    """Those that may be used: with random scales folded in, all of them together leave the block's output as it is."""
    proven = list(folds)
    if proven and not _holds(bench, proven):
        proven = [fold for fold in proven if _holds(bench, [fold])]
        while proven and not _holds(bench, proven):
            proven.pop()
    return proven


def _holds(bench: Bench, folds: Sequence[Fold]) -> bool:
    device = next(iter(bench.parameters.values())).device
    choices = []
    for number, candidate in enumerate(folds):
        generator = torch.Generator().manual_seed(number)
        scale_R = torch.exp2(2 * torch.rand(candidate.producer.num_rows, generator=generator) - 1).to(device)
        choices.append((candidate, torch.where(candidate.rows_R, scale_R, 1.0)))
    outputs = bench.run(fold(bench.parameters, bench.block, bench.plan, choices)).outputs
    arrived = first_tensor(bench.args, bench.kwargs)
    for before, after in zip(bench.before.outputs, outputs, strict=True):
        # Against what the block adds: the stream it is added to may be a thousand times larger.
        added = before - arrived if arrived is not None and arrived.shape == before.shape else before
        allowed = PROOF_TOLERANCE * added.norm(dim=-1) + 1e-6 * before.norm(dim=-1)
        if not ((after - before).norm(dim=-1) <= allowed).all():
            return False
    return bool(outputs)
