"""The model's own forward pass over all calibration sequences, side by side, paused between and inside the blocks.

Each sequence runs the whole forward pass, from the token ids on, in a greenlet of its own (`CalibrationPass`). Hooks
pause it at the input of every decoder block, and inside a block in front of the linears that are about to be quantized.
So the model itself computes masks, position embeddings, per-layer arguments and everything else between the blocks. One
forward pass is enough: when all sequences have reached the input of some linears, the statistics of that input are
complete. Then the linears are quantized, and the sequences continue through the new weights. Only one greenlet runs at
a time, always in the same order.

    with BlockwiseForward(skeleton, tokens_SL, with_original=...) as forward:
        for index in range(num_blocks):
            forward.enter(index)                 loads the block; every pass runs to the block's input
            structure = forward.structure(index)              runs the block once more to find its input groups
            for group, group_inputs in forward.input_groups(index, structure):
                for group_input in group_inputs:              one pass after the other runs to the input of the group
                    add group_input to the statistics
                replace the weights of the group's linears
            after the last group                              every pass has left the block
            forward.leave(index)                              frees the block's weights

A block that is already finished needs `enter`, `pass_through` and `leave`. A block that only has to run needs
`advance_past`. After the last block, `run_head` runs one pass to its end.

Each sequence can run twice: as a quantized pass, on the weights that the block holds, and as an original pass, on the
weights of the checkpoint. Both run to an input group when the caller takes the sequence's group input. At the last
group, and at one whose linear writes to the residual stream, the original pass then continues at once; at other groups
it waits. So few of the tensors inside a sublayer exist at the same time. While an original pass runs, the block
temporarily gets back the checkpoint's weights that were replaced.

Letters: S sequences, L tokens of a sequence, T tokens, K in_features, R width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.hooks import hooked
from llmquant.memory import trim_heap
from llmquant.models.blocks import (
    BlockStructure,
    decoder_of,
    find_blocks,
    first_tensor,
    modules_outside,
    run_model_code,
    trace_structure,
)
from llmquant.models.skeleton import Skeleton
from llmquant.models.spill import OwnedStorages, Spill

SEQUENCES_BETWEEN_TRIMS = 8
"""Number of passes that run before freed memory is returned to the operating system again."""
SEQUENCES_AT_ONCE = 4
"""Number of group inputs that the caller of `BlockwiseForward.input_groups` holds while it adds their statistics."""
PASS_TOKENS = 4096
"""Largest number of tokens of a pass with several sequences, which run together on a GPU."""
AFTER_LAST_BLOCK = -1
"""`CalibrationPass.block` of a pass that has left the last block."""
NO_GROUP = -1
"""`CalibrationPass.input_group` of a pass that has not reached an input group of its block."""


class CalibrationPass(greenlet):
    """The forward pass of one calibration sequence, or of a few of equal length, which pauses and resumes."""

    def __init__(self, run: Callable[[], Any], is_original: bool) -> None:
        super().__init__(run)
        self.is_original = is_original
        """Whether the pass runs through the checkpoint's weights instead of the quantized ones."""
        self.block: int | None = None
        """Index of the block that the pass is in or in front of; None before the first; AFTER_LAST_BLOCK at the end."""
        self.block_call: tuple[tuple, dict] = ((), {})
        """(args, kwargs) for the block in front of which the pass waits; after the last block, (its outputs, {})."""
        self.input_group = NO_GROUP
        """Index of the last input group of the block that the pass has reached."""
        self.group_input: Tensor | None = None
        """Input of the group at which the pass waits; None if it does not wait at a group."""
        self.residual_streams: dict[str, Tensor] = {}
        """Inputs of the modules that are sources of a residual stream, by module name within the block."""
        self.storages = OwnedStorages()
        """Activations that the pass holds while it waits."""

    def resume(self) -> None:
        """Run until the next pause. Called from outside the pass."""
        self.group_input = None
        self.switch()

    def pause(self) -> None:
        """Return control to the caller of `resume`. Called from inside the pass."""
        assert self.parent is not None
        self.parent.switch()


@dataclass(frozen=True)
class GroupInput:
    """The input of an input group in the sequences of one pass."""

    samples: range
    """Numbers of the sequences among all calibration sequences."""
    x_TK: Tensor
    """The group's input in the quantized model."""
    original_x_TK: Tensor | None
    """The group's input in the original model; None without an original pass, or if the shapes differ."""
    residual_drift_TR: Tensor | None
    """h_original - h_quantized of the residual stream that the group's linear is added to; None if unknown."""


class BlockwiseForward:
    """Forward passes of several sequences that advance together, block by block (protocol: module docstring).

    tokens_SL: int64, the tokens of each pass: [L] for one sequence, [S, L] for several; a list may hold sequences of
    several lengths. with_original: each sequence also runs through the checkpoint's weights. with_head: `run_head` can
    run a pass to its end after the last block. spill: moves activations that do not fit in memory to the disk. samples:
    numbers of the sequences of each pass; None numbers passes of one sequence from 0. timer: returns a context manager,
    which is entered around each piece of forward computation, never nested.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens_SL: Tensor | list[Tensor],
        *,
        with_original: bool,
        with_head: bool = False,
        spill: Spill | None = None,
        samples: Sequence[range] | None = None,
        timer: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.skeleton = skeleton
        self._spill, self._timer = spill, timer
        self._samples = [range(number, number + 1) for number in range(len(tokens_SL))] if samples is None else samples
        _, self.block_names = find_blocks(skeleton.model)
        self._blocks = [skeleton.model.get_submodule(name) for name in self.block_names]
        # The base model has no head; the head is needed only for `run_head`.
        self._model = skeleton.model if with_head else skeleton.model.base_model
        self.quantized_passes = [self._start(tokens_L, False) for tokens_L in tokens_SL]
        self.original_passes = [self._start(tokens_L, True) for tokens_L in tokens_SL] if with_original else []
        self._checkpoint_parameters: dict[str, nn.Parameter] = {}
        """Parameters of the checkpoint that the current block no longer holds, by name within the block."""
        head = skeleton.model.get_output_embeddings()
        self._head = next((name for name, module in skeleton.model.named_modules() if module is head), None)
        self._loaded_outside: set[str] = set()
        """Modules outside the blocks whose weights are loaded."""
        self._called_outside: set[str] = set()
        """Modules outside the blocks that have run, and whose weights a further call would load again."""
        before_block = [(block, self._pause_before_block(index)) for index, block in enumerate(self._blocks)]
        self._hooks = ExitStack()
        self._hooks.enter_context(hooked([*self._outside_hooks(), *before_block], before=True))
        self._hooks.enter_context(hooked([(self._blocks[-1], self._pause_after_last_block)]))

    def _start(self, tokens_L: Tensor, is_original: bool) -> CalibrationPass:
        tokens = torch.atleast_2d(tokens_L).to(self.skeleton.device)
        return CalibrationPass(
            lambda: run_model_code(self.skeleton.model, lambda: self._model(input_ids=tokens, use_cache=False)),
            is_original,
        )

    def __enter__(self) -> BlockwiseForward:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every pass, remove the hooks, and free the weights outside the blocks."""
        for calibration_pass in (*self.quantized_passes, *self.original_passes):
            # A greenlet is false until it starts.
            if calibration_pass and not calibration_pass.dead:
                calibration_pass.throw()
        self._hooks.close()
        self.skeleton.cancel_prefetch()
        self._drop_outside(modules_outside(self.skeleton.model, self.block_names))
        if self._spill is not None:
            self._spill.close()

    # --- between blocks ----------------------------------------------------------------------------------------------

    def enter(self, index: int) -> None:
        """Run every pass to the input of block `index`, the next one, and load the block's weights."""
        passes = [*self.original_passes, *self.quantized_passes]
        with self._timer():
            if not_started := [calibration_pass for calibration_pass in passes if calibration_pass.block is None]:
                for name in self._needed_outside():
                    self._load_outside(name)
            self._resume_all(not_started)
            self._drop_outside(self._called_outside)
            if any(calibration_pass.block != index for calibration_pass in passes):
                place = f" after block {index - 1}" if index else ""
                raise UserError(
                    f"{self.block_names[index]}: the forward pass of {type(self.skeleton.model).__name__} does not "
                    f"reach this decoder block{place}; only models that run each block once, in "
                    "order, can be quantized"
                )
            self.skeleton.load(self.block_names[index])
            for following in self.block_names[index + 1 : index + 2]:
                self.skeleton.prefetch(following)

    def leave(self, index: int) -> None:
        """Free the weights of a block that every pass has left."""
        self.skeleton.drop(self.block_names[index])

    def advance_past(self, index: int) -> None:
        """Load block `index`, the next one, run every pass through it, and free its weights."""
        self.enter(index)
        with self._timer():
            self._resume_all([*self.original_passes, *self.quantized_passes])
        self.leave(index)

    def pass_through(self, index: int, replacements: Mapping[str, Tensor]) -> None:
        """Run every pass through a finished block: original passes on the checkpoint's weights, the others on new ones.

        replacements: the new weights, by full name.
        """
        with self._timer():
            self._resume_all(self.original_passes)
            self.skeleton.load(self.block_names[index], replacements)
            self._resume_all(self.quantized_passes)

    def run_head(self, number: int) -> Any:
        """Run one quantized pass from the last block to its end, and return the output of the model."""
        with self._timer():
            if self._head is not None:
                self._load_outside(self._head)
            calibration_pass = self.quantized_passes[number]
            output = calibration_pass.switch()
        if not calibration_pass.dead:
            raise UserError(
                f"{type(self.skeleton.model).__name__} runs its decoder blocks more than once per forward pass; only "
                "their first run is calibrated"
            )
        return output

    def _pause_before_block(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calibration_pass = getcurrent()
            if isinstance(calibration_pass, CalibrationPass):
                if any(isinstance(value, Tensor) and value.is_meta for value in (*args, *kwargs.values())):
                    raise UserError(
                        f"{self.block_names[index]}: the forward pass of {type(self.skeleton.model).__name__} uses a "
                        "weight outside the decoder blocks that was not loaded; such a model cannot be quantized"
                    )
                calibration_pass.block, calibration_pass.input_group = index, NO_GROUP
                calibration_pass.residual_streams = {}
                calibration_pass.block_call = (args, kwargs)
                calibration_pass.pause()
                calibration_pass.block_call = ((), {})

        return hook

    def _pause_after_last_block(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calibration_pass = getcurrent()
        if isinstance(calibration_pass, CalibrationPass):
            calibration_pass.block = AFTER_LAST_BLOCK
            calibration_pass.block_call = (output if isinstance(output, tuple) else (output,), {})
            calibration_pass.pause()
            calibration_pass.block_call = ((), {})

    # --- inside a block ----------------------------------------------------------------------------------------------

    def structure(self, index: int) -> BlockStructure:
        """Run block `index` once on the first sequence, without moving any pass, and return the block's structure."""
        with self._timer():
            ((args, kwargs),) = self.block_calls(1)
            block = self._blocks[index]
            return trace_structure(block, lambda: run_model_code(self.skeleton.model, lambda: block(*args, **kwargs)))

    def block_calls(self, count: int) -> list[tuple[tuple, dict]]:
        """Return (args, kwargs) with which the first `count` quantized passes will call their next block."""
        if self._spill is not None:
            for calibration_pass in self.quantized_passes[:count]:
                self._spill.restore(calibration_pass.storages)
        return [calibration_pass.block_call for calibration_pass in self.quantized_passes[:count]]

    def input_groups(
        self, index: int, structure: BlockStructure, checkpoint_parameters: Mapping[str, nn.Parameter] | None = None
    ) -> Iterator[tuple[int, Iterator[GroupInput]]]:
        """Run all passes through a block, one input group after the other: yield (group index, its group inputs).

        checkpoint_parameters: parameters of the checkpoint that the block no longer holds, by name within the block;
        the original passes run on these. The caller consumes the group inputs, holding few of them at a time, then
        replaces the weights of the group's linears, then goes on to the next group. The iterators are lazy: a pass runs
        when the caller takes its group input. A sequence that does not reach the group has none.
        """
        block, groups = self._blocks[index], structure.input_groups
        passes = [*self.original_passes, *self.quantized_passes]
        self._checkpoint_parameters = dict(checkpoint_parameters or {})
        hooks = []
        for number, group in enumerate(groups):
            hooks += [(block.get_submodule(name), self._pause_before_group(number)) for name in group.linears]
            if group.residual_source:
                source = block.get_submodule(group.residual_source)
                hooks.append((source, self._keep_residual_stream(group.residual_source)))
        with hooked(hooks, before=True):
            for calibration_pass in passes:
                tensor = first_tensor(*calibration_pass.block_call)
                calibration_pass.residual_streams = {} if tensor is None else {"": tensor}
            for number, group in enumerate(groups):
                # The weights that the caller is about to replace.
                replaced = {
                    f"{name}.weight": weight
                    for name in (group.linears if self.original_passes else ())
                    if isinstance(weight := block.get_submodule(name).weight, nn.Parameter)
                }
                yield number, self._group_inputs(index, number, structure)
                self._checkpoint_parameters = replaced | self._checkpoint_parameters
            with self._timer():
                for count, calibration_pass in enumerate((*self.quantized_passes, *self.original_passes)):
                    self._trim_before(count)
                    self._advance_to_group(calibration_pass, index, len(groups))
            self._checkpoint_parameters = {}

    def _group_inputs(self, index: int, number: int, structure: BlockStructure) -> Iterator[GroupInput]:
        source = structure.input_groups[number].residual_source
        original_runs_on = source is not None or number == len(structure.input_groups) - 1
        originals: list[CalibrationPass | None] = list(self.original_passes) or [None] * len(self.quantized_passes)
        for number_of_pass, (quantized, original) in enumerate(zip(self.quantized_passes, originals, strict=True)):
            with self._timer():
                self._trim_before(number_of_pass)
                self._advance_to_group(quantized, index, number)
                if original is not None:
                    self._advance_to_group(original, index, number)
                if quantized.group_input is None or quantized.input_group != number:
                    continue
                with self._computing_for(None):
                    group_input = self._group_input(self._samples[number_of_pass], quantized, original, source)
                if self._spill is not None:
                    self._spill.evict_if_over_budget(quantized.storages)
                    if original is not None:
                        self._spill.evict_if_over_budget(original.storages)
            yield group_input
            del group_input
            if original is not None and original_runs_on:
                with self._timer():
                    self._advance_to_group(original, index, number + 1)

    def _group_input(
        self, samples: range, quantized: CalibrationPass, original: CalibrationPass | None, source: str | None
    ) -> GroupInput:
        x = quantized.group_input
        assert x is not None
        # A spill empties the storages of a waiting pass in place, so the caller gets copies.
        copied = (lambda tensor: tensor.clone()) if self._spill is not None else (lambda tensor: tensor)
        x_TK = copied(x.flatten(0, -2))
        original_x_TK = residual_drift_TR = None
        original_x = None if original is None else original.group_input
        if original is not None and original_x is not None and original.input_group == quantized.input_group:
            if original_x.shape == x.shape:
                original_x_TK = copied(original_x.flatten(0, -2))
            if source is not None and source in quantized.residual_streams and source in original.residual_streams:
                h, original_h = quantized.residual_streams[source], original.residual_streams[source]
                if h.shape == original_h.shape and h.shape[:-1] == x.shape[:-1]:
                    residual_drift_TR = (original_h - h).flatten(0, -2)
        return GroupInput(samples, x_TK, original_x_TK, residual_drift_TR)

    def _pause_before_group(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calibration_pass = getcurrent()
            if isinstance(calibration_pass, CalibrationPass) and calibration_pass.input_group < number:
                calibration_pass.input_group, calibration_pass.group_input = number, first_tensor(args, kwargs)
                calibration_pass.pause()

        return hook

    def _keep_residual_stream(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calibration_pass = getcurrent()
            tensor = first_tensor(args, kwargs)
            if isinstance(calibration_pass, CalibrationPass) and tensor is not None:
                calibration_pass.residual_streams[name] = tensor

        return hook

    # --- running the passes ------------------------------------------------------------------------------------------

    def _resume_all(self, passes: list[CalibrationPass]) -> None:
        for count, calibration_pass in enumerate(passes):
            self._trim_before(count)
            self._resume(calibration_pass)

    def _trim_before(self, count: int) -> None:
        """Return freed memory to the operating system before every few passes, unless a GPU holds the activations."""
        if count % SEQUENCES_BETWEEN_TRIMS == 0 and self.skeleton.device.type == "cpu":
            trim_heap()

    def _advance_to_group(self, calibration_pass: CalibrationPass, index: int, number: int) -> None:
        """Run a pass to input group `number` of a block, or out of the block, unless it is there or farther."""
        with self._lent_parameters(self._blocks[index]) if calibration_pass.is_original else nullcontext():
            while (
                calibration_pass.block == index and calibration_pass.input_group < number and not calibration_pass.dead
            ):
                self._resume(calibration_pass)

    def _resume(self, calibration_pass: CalibrationPass) -> None:
        with self._computing_for(calibration_pass):
            calibration_pass.resume()
        if self._spill is not None:
            self._spill.evict_if_over_budget(calibration_pass.storages)

    def _computing_for(self, calibration_pass: CalibrationPass | None) -> AbstractContextManager[None]:
        """Return a context for computing on tensors of the passes; the given pass, if any, owns the new tensors."""
        if self._spill is None:
            return nullcontext()
        # A greenlet is false until it starts, so it is compared with None.
        return self._spill.computing_for(None if calibration_pass is None else calibration_pass.storages)

    @contextmanager
    def _lent_parameters(self, block: nn.Module) -> Iterator[None]:
        """Put the checkpoint's parameters into the block for the duration of a `with` block."""
        current = []
        for name, lent in self._checkpoint_parameters.items():
            owner, _, leaf = name.rpartition(".")
            parameters = block.get_submodule(owner)._parameters
            current.append((parameters, leaf, parameters[leaf]))
            parameters[leaf] = lent
        try:
            yield
        finally:
            for parameters, leaf, parameter in current:
                parameters[leaf] = parameter

    # --- outside the blocks ------------------------------------------------------------------------------------------

    def _outside_hooks(self) -> list[tuple[nn.Module, Callable]]:
        """Return hooks that load the weights of modules outside the blocks whenever these modules are called."""
        running = set(self._model.modules())
        outside = {
            name: self.skeleton.model.get_submodule(name)
            for name in modules_outside(self.skeleton.model, self.block_names)
        }
        return [(module, self._load_before_call(name)) for name, module in outside.items() if module in running]

    def _needed_outside(self) -> list[str]:
        """Return the modules outside the blocks whose weights the model may read before, or without, calling them.

        These are the modules of the text decoder except the head, the modules that contain the blocks, and the first
        module with parameters inside each of those: transformers takes a model's device from its first parameter.
        """
        model, blocks = self.skeleton.model, set(self._blocks)
        containers = [module for module in model.modules() if not blocks.isdisjoint(module.modules())]
        needed = set(decoder_of(model).modules()) | set(containers)
        for container in containers:
            needed |= set(islice((module for module in container.modules() if module._parameters), 1))
        names = modules_outside(model, self.block_names)
        return [name for name in names if name != self._head and model.get_submodule(name) in needed]

    def _load_before_call(self, name: str) -> Callable:
        contains_blocks = any(block.startswith(f"{name}." if name else "") for block in self.block_names)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._load_outside(name)
            # A module that contains the blocks is still running while they are quantized.
            if not contains_blocks:
                self._called_outside.add(name)

        return hook

    def _load_outside(self, name: str) -> None:
        """Load the parameters and buffers of one module unless they are loaded; no pass owns them."""
        if name not in self._loaded_outside:
            with nullcontext() if self._spill is None else self._spill.unowned():
                self.skeleton.load(name, recurse=False)
            self._loaded_outside.add(name)

    def _drop_outside(self, names: Iterable[str]) -> None:
        for name in names:
            self.skeleton.drop(name, recurse=False)
            self._loaded_outside.discard(name)
