"""All calibration sequences walk through the network side by side, block by block, and pause where there is work to do.

The model's own forward pass does the walking: each sequence runs it, from the token ids on, in a greenlet of its own,
which hooks suspend at the door of every decoder block and in front of the linears that are about to be quantized. So
masks, position embeddings, per-layer arguments and whatever else happens between blocks are the model's business, and
one pass is enough: when all sequences wait in front of a linear, its input statistics are complete, it is quantized,
and they go on from there with its new weight. Only one greenlet runs at a time, always in the same order.

Each sequence can walk twice: as `quantized`, through the blocks as they are stored, and as `original`, through the
weights of the checkpoint. The two come to a stage one sequence after the other, when it is asked for. An original goes
on at once from a linear that writes to the residual stream, and waits in front of the others: so, of what a sublayer
holds on its way, there is little at a time. The weights that it still needs are lent to the block while it runs.

Letters: S sequences, L tokens of a sequence, T tokens, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.memory import give_back
from llmquant.models.blocks import BlockPlan, decoder_of, find_blocks, first_tensor, modules_outside, run_own, watch
from llmquant.models.skeleton import Skeleton
from llmquant.models.spill import Kept, Spill

SEQUENCES_BETWEEN_TRIMS = 8
SEQUENCES_AT_ONCE = 4
"""Arrivals that the caller of `Walk.stages` keeps at a time, to add up their statistics together."""
END = -1
"""`Sequence.block` of a sequence that has left the last block."""


class Sequence(greenlet):
    """One sequence on its way through the network."""

    def __init__(self, run: Callable[[], Any], is_original: bool) -> None:
        super().__init__(run)
        self.is_original = is_original
        self.block: int | None = None
        """Index of the block it is in or waits in front of; END behind the last one; None before the first."""
        self.call: tuple[tuple, dict] = ((), {})
        """What the block it waits in front of was called with; behind the last one, what that gave."""
        self.stage = END
        """Index of the last stage of that block it has come to."""
        self.x: Tensor | None = None
        """The input of the stage it waits in front of; None when it does not wait in front of one."""
        self.streams: dict[str, Tensor] = {}
        """Inputs of modules that are sources of a residual stream, by module name within the block."""
        self.kept = Kept()

    def go_on(self) -> None:
        """Run until the next pause."""
        self.x = None
        self.switch()

    def pause(self) -> None:
        """Called from inside: give control back to whoever called `go_on`."""
        assert self.parent is not None
        self.parent.switch()


@dataclass(frozen=True)
class Arrival:
    """One sequence in front of a stage."""

    sample: int
    """Which sequence it is."""
    x_TK: Tensor
    """Its input in the quantized network."""
    original_x_TK: Tensor | None
    """Its input in the original network, when that walks along."""
    residual_gap_TR: Tensor | None
    """h_fp - h of the residual stream that the stage is added to, when both are known."""


class Walk:
    """A set of sequences in front of the network; call `enter`, then `stages`, block after block.

    tokens_SL: int64; a list may hold sequences of several lengths. to_the_end: behind the last block, `outcome` lets a
    sequence go on through the head. spill: where activations go that do not fit in memory. first_sample: the number of
    the first of the sequences.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens_SL: Tensor | list[Tensor],
        *,
        with_original: bool,
        to_the_end: bool = False,
        spill: Spill | None = None,
        first_sample: int = 0,
    ) -> None:
        self.skeleton = skeleton
        self._spill, self._first_sample = spill, first_sample
        _, self.block_names = find_blocks(skeleton.model)
        self._blocks = [skeleton.model.get_submodule(name) for name in self.block_names]
        # Without its head where that is not asked for: nothing behind the last block is run then.
        self._network = skeleton.model if to_the_end else skeleton.model.base_model
        self.quantized = [self._start(tokens_L, False) for tokens_L in tokens_SL]
        self.original = [self._start(tokens_L, True) for tokens_L in tokens_SL] if with_original else []
        self._handles: list[Any] = []
        self._own: dict[str, nn.Parameter] = {}
        """Parameters that the originals walk through, by name within the block, where it holds others by now."""
        head = skeleton.model.get_output_embeddings()
        self._head = next((name for name, module in skeleton.model.named_modules() if module is head), None)
        self._filled: set[str] = set()
        """Modules outside the blocks whose weights are loaded."""
        self._called: set[str] = set()
        """Modules outside the blocks that were called, and that a further call would fill again."""
        self._hook_outside()
        for index, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_pre_hook(self._at_door(index), with_kwargs=True))
        self._handles.append(self._blocks[-1].register_forward_hook(self._behind_last))

    def _start(self, tokens_L: Tensor, is_original: bool) -> Sequence:
        tokens = tokens_L[None].to(self.skeleton.device)
        return Sequence(
            lambda: run_own(self.skeleton.model, lambda: self._network(input_ids=tokens, use_cache=False)), is_original
        )

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every sequence, take the hooks away, and give back the weights outside the blocks."""
        for sequence in (*self.quantized, *self.original):
            if sequence and not sequence.dead:
                sequence.throw()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._drop_outside(modules_outside(self.skeleton.model, self.block_names))
        if self._spill is not None:
            self._spill.close()

    # --- between blocks ----------------------------------------------------------------------------------------------

    def enter(self, index: int) -> None:
        """Bring every sequence to the door of block `index`, which must be next, and load its weights."""
        waiting = [sequence for sequence in (*self.original, *self.quantized) if sequence.block is None]
        if waiting:
            for name in self._needed_outside():
                self._fill(name)
        self._advance(waiting)
        self._drop_outside(self._called)
        if any(sequence.block != index for sequence in (*self.original, *self.quantized)):
            raise UserError(
                f"{self.block_names[index]}: the forward pass of {type(self.skeleton.model).__name__} does not come to "
                f"this decoder block after block {index - 1}; only models that run each block once, in order, can be "
                "quantized"
            )
        self.skeleton.load(self.block_names[index])

    def leave(self, index: int) -> None:
        """Give back the weights of a block that every sequence has left."""
        self.skeleton.drop(self.block_names[index])

    def cross(self, index: int) -> None:
        """Bring every sequence behind block `index`, which must be next, on its weights as they are loaded."""
        self.enter(index)
        self._advance([*self.original, *self.quantized])
        self.leave(index)

    def outcome(self, number: int) -> Any:
        """Behind the last block: let one sequence run to its end; gives what the network returns."""
        if self._head is not None:
            self._fill(self._head)
        sequence = self.quantized[number]
        result = sequence.switch()
        if not sequence.dead:
            raise UserError(
                f"{type(self.skeleton.model).__name__} runs its decoder blocks more than once per forward pass; only "
                "their first run is calibrated"
            )
        return result

    def pass_through(self, index: int, replacements: Mapping[str, Tensor]) -> None:
        """Walk through a finished block: the originals with the checkpoint's weights, the others with replacements."""
        self._advance(self.original)
        self.skeleton.load(self.block_names[index], replacements)
        self._advance(self.quantized)

    def _at_door(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            sequence = getcurrent()
            if isinstance(sequence, Sequence):
                if any(isinstance(value, Tensor) and value.is_meta for value in (*args, *kwargs.values())):
                    raise UserError(
                        f"{self.block_names[index]}: the forward pass of {type(self.skeleton.model).__name__} uses a "
                        "weight outside the decoder blocks that was not loaded; such a model cannot be quantized"
                    )
                sequence.block, sequence.stage, sequence.streams = index, END, {}
                sequence.call = (args, kwargs)
                sequence.pause()
                sequence.call = ((), {})

        return hook

    def _behind_last(self, module: nn.Module, args: tuple, output: Any) -> None:
        sequence = getcurrent()
        if isinstance(sequence, Sequence):
            sequence.block = END
            sequence.call = (output if isinstance(output, tuple) else (output,), {})
            sequence.pause()
            sequence.call = ((), {})

    # --- inside a block ----------------------------------------------------------------------------------------------

    def plan(self, index: int) -> BlockPlan:
        """Watch one sequence run the block that all of them stand in front of."""
        ((args, kwargs),) = self.calls(1)
        block = self._blocks[index]
        return watch(block, lambda: run_own(self.skeleton.model, lambda: block(*args, **kwargs)))

    def calls(self, count: int) -> list[tuple[tuple, dict]]:
        """What the first sequences call the block with that all of them stand in front of."""
        if self._spill is not None:
            for sequence in self.quantized[:count]:
                self._spill.fetch(sequence.kept)
        return [sequence.call for sequence in self.quantized[:count]]

    def stages(
        self, index: int, plan: BlockPlan, own: Mapping[str, nn.Parameter] | None = None
    ) -> Iterator[tuple[int, Iterator[Arrival]]]:
        """Lead all sequences through a block, stage by stage: yields (stage index, arrivals).

        own: parameters of the checkpoint by name within the block, where the block now holds others: the original
        network walks through these. The caller goes through the arrivals, keeping few of them (they come as they
        are asked for, and there is none where no sequence comes by), then replaces the weights of the stage's linears,
        then asks for the next stage.
        """
        block = self._blocks[index]
        self._own = dict(own or {})
        handles = []
        for number, stage in enumerate(plan.stages):
            for name in stage.linears:
                linear = block.get_submodule(name)
                handles.append(linear.register_forward_pre_hook(self._at_stage(number), with_kwargs=True))
            if stage.residual_source:
                source = block.get_submodule(stage.residual_source)
                handles.append(
                    source.register_forward_pre_hook(self._at_stream(stage.residual_source), with_kwargs=True)
                )
        try:
            for sequence in (*self.original, *self.quantized):
                sequence.streams = {"": tensor} if (tensor := first_tensor(*sequence.call)) is not None else {}
            for number, stage in enumerate(plan.stages):
                # The weights that the caller is about to replace.
                replaced = {
                    f"{name}.weight": weight
                    for name in (stage.linears if self.original else ())
                    if isinstance(weight := block.get_submodule(name).weight, nn.Parameter)
                }
                yield number, self._arrivals(index, number, plan)
                self._own = replaced | self._own
            for count, sequence in enumerate((*self.quantized, *self.original)):
                if count % SEQUENCES_BETWEEN_TRIMS == 0:
                    give_back()
                self._lead(sequence, index, len(plan.stages))
            self._own = {}
        finally:
            for handle in handles:
                handle.remove()

    def _lead(self, sequence: Sequence, index: int, number: int) -> None:
        """Lead a sequence to a stage of a block, or out of it, unless it is there or farther, or at its end."""
        with self._own_parameters(self._blocks[index]) if sequence.is_original else nullcontext():
            while sequence.block == index and sequence.stage < number and not sequence.dead:
                self._go_on(sequence)

    @contextmanager
    def _own_parameters(self, block: nn.Module) -> Iterator[None]:
        """Lend the block the parameters that the original network walks through."""
        present = []
        for name, own in self._own.items():
            owner, _, leaf = name.rpartition(".")
            parameters = block.get_submodule(owner)._parameters
            present.append((parameters, leaf, parameters[leaf]))
            parameters[leaf] = own
        try:
            yield
        finally:
            for parameters, leaf, parameter in present:
                parameters[leaf] = parameter

    def _advance(self, sequences: list[Sequence]) -> None:
        for count, sequence in enumerate(sequences):
            if count % SEQUENCES_BETWEEN_TRIMS == 0:
                give_back()
            self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        with self._running(sequence):
            sequence.go_on()
        if self._spill is not None:
            self._spill.settle(sequence.kept)

    def _running(self, sequence: Sequence | None) -> AbstractContextManager[None]:
        """Around all that computes with the tensors of sequences; what is made inside belongs to this one, if any."""
        return nullcontext() if self._spill is None else self._spill.running(sequence.kept if sequence else None)

    def _arrivals(self, index: int, number: int, plan: BlockPlan) -> Iterator[Arrival]:
        source = plan.stages[number].residual_source
        goes_on = source is not None or number == len(plan.stages) - 1
        originals: list[Sequence | None] = list(self.original) or [None] * len(self.quantized)
        for sample, (sequence, original) in enumerate(zip(self.quantized, originals, strict=True)):
            if sample % SEQUENCES_BETWEEN_TRIMS == 0:
                give_back()
            self._lead(sequence, index, number)
            if original is not None:
                self._lead(original, index, number)
            if sequence.x is None or sequence.stage != number:
                continue
            with self._running(None):
                arrival = self._arrival(self._first_sample + sample, sequence, original, source)
            if self._spill is not None:
                self._spill.settle(sequence.kept)
                if original is not None:
                    self._spill.settle(original.kept)
            yield arrival
            del arrival
            if original is not None and goes_on:
                self._lead(original, index, number + 1)

    def _arrival(self, sample: int, sequence: Sequence, original: Sequence | None, source: str | None) -> Arrival:
        # What goes to the disk is emptied in place: a copy remains.
        copied = (lambda x: x.clone()) if self._spill is not None else (lambda x: x)
        assert sequence.x is not None
        x_TK = copied(sequence.x.flatten(0, -2))
        original_x_TK = gap_TR = None
        if original is not None and original.x is not None and original.stage == sequence.stage:
            if original.x.shape == sequence.x.shape:
                original_x_TK = copied(original.x.flatten(0, -2))
            if source is not None and source in sequence.streams and source in original.streams:
                here, there = sequence.streams[source], original.streams[source]
                if here.shape == there.shape and here.shape[:-1] == sequence.x.shape[:-1]:
                    gap_TR = (there - here).flatten(0, -2)
        return Arrival(sample, x_TK, original_x_TK, gap_TR)

    def _at_stage(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            sequence = getcurrent()
            if isinstance(sequence, Sequence) and sequence.stage < number:
                sequence.stage, sequence.x = number, first_tensor(args, kwargs)
                sequence.pause()

        return hook

    def _at_stream(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            sequence = getcurrent()
            tensor = first_tensor(args, kwargs)
            if isinstance(sequence, Sequence) and tensor is not None:
                sequence.streams[name] = tensor

        return hook

    # --- outside the blocks ------------------------------------------------------------------------------------------

    def _hook_outside(self) -> None:
        """Modules with weights of their own outside the blocks are filled whenever they are called."""
        running = set(self._network.modules())
        for name in modules_outside(self.skeleton.model, self.block_names):
            module = self.skeleton.model.get_submodule(name)
            if module in running:
                self._handles.append(module.register_forward_pre_hook(self._before_call(name)))

    def _needed_outside(self) -> list[str]:
        """Modules outside the blocks whose weights the network may read before, or without, calling them.

        These are the modules of the text decoder but the head, those that hold it, and the first of every model that
        holds the blocks: transformers takes a model's device from its first parameter.
        """
        model, blocks = self.skeleton.model, set(self._blocks)
        holders = [module for module in model.modules() if not blocks.isdisjoint(module.modules())]
        needed = set(decoder_of(model).modules()) | set(holders)
        for holder in holders:
            needed |= set(islice((module for module in holder.modules() if module._parameters), 1))
        names = modules_outside(model, self.block_names)
        return [name for name in names if name != self._head and model.get_submodule(name) in needed]

    def _before_call(self, name: str) -> Callable:
        holds_blocks = any(block.startswith(f"{name}." if name else "") for block in self.block_names)

        def hook(module: nn.Module, args: tuple) -> None:
            self._fill(name)
            # What holds the blocks is still running while they are worked on.
            if not holds_blocks:
                self._called.add(name)

        return hook

    def _fill(self, name: str) -> None:
        """Load a module's own parameters and buffers unless they are there; sequences do not own them."""
        if name not in self._filled:
            with nullcontext() if self._spill is None else self._spill.nobodys():
                self.skeleton.load(name, recurse=False)
            self._filled.add(name)

    def _drop_outside(self, names: Iterable[str]) -> None:
        for name in names:
            self.skeleton.drop(name, recurse=False)
            self._filled.discard(name)
