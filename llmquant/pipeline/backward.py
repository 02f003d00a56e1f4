"""The whole network run forward and backward with one block of weights in memory: for those who want its gradients.

The loss is that of tokens drawn from the model's own predictions, so that the mean of squared gradients is the Fisher
information: to second order, what an error costs in divergence.

A few calibration sequences run side by side. Block by block: weights are read, the block runs, weights go; on the way
back each block is run again from its kept input, for the gradients. So the memory holds one block, the activations
inside it, and the inputs of all blocks.

Letters: S sequences, L tokens of a sequence, T tokens, C tokens of a chunk, N out_features, K in_features, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import UserError, first_words
from llmquant.eval.halves import Halves
from llmquant.memory import give_back
from llmquant.models.blocks import first_tensor, linears_of, modules_outside, run_own, with_first_tensor
from llmquant.pipeline.footprint import CHUNK_TOKENS
from llmquant.pipeline.plan import Plan

READS = 3
"""How often a run reads every block: to see where the body of the model ends, forward, and backward."""


class BothWays:
    """Runs a network forward and backward; a subclass says what it wants to see on the way."""

    def __init__(self, plan: Plan, on_block: Callable[[], None] = lambda: None) -> None:
        """on_block: called whenever a block is read."""
        self.plan, self.on_block = plan, on_block
        self._is_counting = False

    def forward(self, name: str, block: nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """Run a block on the way forward, by `call`."""
        return call()

    def wants(self, full: str) -> bool:
        """Whether `output` is to be told about the linear of that full name."""
        raise NotImplementedError

    def output(self, full: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """On the way back: the gradients at a linear's outputs, and its inputs."""
        raise NotImplementedError

    def backward(self, name: str, block: nn.Module) -> None:
        """On the way back, when the gradients of a block are complete."""

    def run(self, tokens_SL: Tensor, seed: int = 0) -> None:
        """Run some sequences forward and backward. seed: of the draw of the tokens that are predicted."""
        skeleton = self.plan.skeleton
        with _outside_loaded(self.plan), self._in_place():
            halves = Halves(skeleton.model, skeleton.device)
            self._is_counting = False
            with torch.no_grad():
                run_own(skeleton.model, lambda: halves.find_body(tokens_SL))
            self._is_counting = True
            with torch.enable_grad():
                hidden_SLD = run_own(skeleton.model, lambda: halves.hidden(tokens_SL))
                gradient_SLD = _loss_gradient(halves, hidden_SLD.detach(), seed)
                give_back()
                try:
                    hidden_SLD.backward(gradient_SLD)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise UserError(
                        f"{self.plan.path}: cannot be run backward ({first_words(error)}); use --effort default, "
                        "without --target-bpw and --target-size"
                    ) from error

    @contextmanager
    def _in_place(self) -> Iterator[None]:
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
                swapped_args, swapped_kwargs = with_first_tensor(args, kwargs, replaced)
                outputs.append(run_own(self.plan.skeleton.model, lambda: own(*swapped_args, **swapped_kwargs)))
                tensor = first_tensor((outputs[-1],) if isinstance(outputs[-1], Tensor) else tuple(outputs[-1]), {})
                assert tensor is not None
                return tensor

            def run(replaced: Tensor) -> Tensor:
                with self._loaded(index):
                    return self.forward(name, block, lambda: call(replaced)) if self._is_counting else call(replaced)

            def run_back(replaced: Tensor, gradient: Tensor) -> Tensor:
                with self._loaded(index), torch.enable_grad(), self._counting(name, block):
                    replaced = replaced.detach().requires_grad_()
                    (result,) = torch.autograd.grad(call(replaced), replaced, gradient)
                    self.backward(name, block)
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
    def _loaded(self, index: int) -> Iterator[None]:
        self.on_block()
        self.plan.skeleton.load(self.plan.block_names[index])
        try:
            yield
        finally:
            self.plan.skeleton.drop(self.plan.block_names[index])
            give_back()

    @contextmanager
    def _counting(self, name: str, block: nn.Module) -> Iterator[None]:
        """Pass on what reaches the outputs of a block's linears."""

        def hook(full: str) -> Callable:
            def called(linear: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                x = first_tensor(args, kwargs)
                assert x is not None
                x_TK = x.detach().flatten(0, -2)
                if not output.requires_grad:
                    return
                output.register_hook(lambda gradient: self.output(full, linear, x_TK, gradient.flatten(0, -2)))

            return called

        handles = [
            linear.register_forward_hook(hook(f"{name}.{key}"), with_kwargs=True)
            for key, linear in linears_of(block).items()
            if self.wants(f"{name}.{key}")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _loss_gradient(halves: Halves, hidden_SLD: Tensor, seed: int) -> Tensor:
    """Gradient of the summed loss in the hidden states in front of the head; tokens drawn from the predictions."""
    draw = torch.Generator(device=hidden_SLD.device).manual_seed(seed)
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
    names = modules_outside(plan.skeleton.model, plan.block_names)
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
