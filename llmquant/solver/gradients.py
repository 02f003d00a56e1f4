"""Backpropagation through the whole model with one decoder block in memory (activation checkpointing, block by block).

The labels of the loss are drawn from the model's own predictions. So the mean of squared gradients is the Fisher
information, which gives the divergence that an error causes, to second order.

A few calibration sequences run side by side. Each block is read from the checkpoint, run, and freed. In the backward
pass, each block is read again and run again from its stored input, to get its gradients. So memory holds one block, the
activations inside it, and the inputs of all blocks.

Letters: S sequences, L tokens of a sequence, T tokens, C tokens of a chunk, N out_features, K in_features, D hidden
size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import UserError, one_line
from llmquant.eval.body_and_head import BodyAndHead
from llmquant.hooks import hooked
from llmquant.memory import trim_heap
from llmquant.models.blocks import (
    first_tensor,
    linears_of,
    modules_outside,
    run_model_code,
    weight_of,
    with_first_tensor,
)
from llmquant.models.reproducible import reproducible_attention
from llmquant.planning.plan import Plan

MEASURED_TOKENS = 4096
"""Number of calibration tokens that run side by side on a CPU, in whole sequences; the least number on a GPU."""
GPU_MEMORY_FRACTION = 0.25
"""Fraction of a GPU's memory that the tokens that run side by side may take. More tokens at a time need fewer reads."""
CHUNK_TOKENS, GPU_CHUNK_TOKENS = 64, 512
"""Number of tokens whose logits are in memory at one time, for the gradient of the loss, on a CPU and on a GPU."""
READS_PER_BLOCK = 2
"""Number of times that a run reads each block, once forward and once backward. The first run reads each once more, to
find the body of the model (`BodyAndHead`)."""


def tokens_at_once(plan: Plan, gpu_bytes: int | None = None) -> int:
    """Return how many calibration tokens run side by side: MEASURED_TOKENS, or more on a GPU without `--max-memory`.

    The number depends on the size of the GPU and not on its free memory, so the same GPU always gives the same result.
    gpu_bytes: memory of the GPU; None for the plan's own GPU.
    """
    device = plan.skeleton.device
    if device.type != "cuda" or plan.options.max_memory_bytes is not None:
        return MEASURED_TOKENS
    if gpu_bytes is None:
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    return max(MEASURED_TOKENS, int(GPU_MEMORY_FRACTION * gpu_bytes / bytes_per_token(plan)))


def bytes_per_token(plan: Plan) -> int:
    """Return the memory of one token: the inputs of all blocks, and the activations inside one block, twice.

    Inside a block, the activations and the gradients of the linears' inputs and outputs take about the same memory.
    """
    blocks = [plan.linears_of_block(index).values() for index in range(len(plan.block_names))]
    features = max(sum(linear.in_features + linear.out_features for linear in linears) for linears in blocks)
    hidden = weight_of(plan.skeleton.model.get_input_embeddings()).shape[-1]
    return plan.skeleton.dtype.itemsize * (len(blocks) * hidden + 2 * features)


def num_scores(plan: Plan, num_sequences: int, seq_len: int) -> int:
    """Return the attention scores of one block for some sequences: pairs of tokens times heads."""
    config = plan.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    return num_sequences * seq_len**2 * (heads if isinstance(heads, int) else 1)


class BlockwiseBackprop(ABC):
    """Runs a model forward and backward, block by block. A subclass chooses linears and receives their gradients."""

    def __init__(self, plan: Plan, on_block_read: Callable[[], None] = lambda: None) -> None:
        """on_block_read: called whenever a block is read."""
        self.plan, self.on_block_read = plan, on_block_read
        self._body_and_head = BodyAndHead(plan.skeleton.model, plan.skeleton.device)
        self._finds_body = False
        """Whether the current pass only finds the body of the model (`BodyAndHead`), and is not measured."""

    def run_block(self, name: str, block: nn.Module, call: Callable[[], Tensor]) -> Tensor:
        """Run a block in the forward pass with `call`, and return its output."""
        return call()

    @abstractmethod
    def needs_gradients_of(self, full_name: str) -> bool:
        """Whether `on_gradient` is called for the linear of that name in the model."""

    @abstractmethod
    def on_gradient(self, full_name: str, linear: nn.Module, x_TK: Tensor, gradient_TN: Tensor) -> None:
        """Receive a linear's inputs and the gradients at its outputs, in the backward pass."""

    def on_block_done(self, name: str) -> None:  # noqa: B027 — overriding it is optional
        """Finish a block in the backward pass, after the gradients of all its linears."""

    def run(self, tokens_SL: Tensor, seed: int = 0) -> None:
        """Run some sequences forward and backward. seed: for drawing the labels of the loss."""
        skeleton, body_and_head = self.plan.skeleton, self._body_and_head
        with (
            _outside_loaded(self.plan),
            self._blocks_replaced(),
            reproducible_attention(skeleton.device, num_scores(self.plan, *tokens_SL.shape)),
        ):
            self._finds_body = True
            with torch.no_grad():
                run_model_code(skeleton.model, lambda: body_and_head.find_body(tokens_SL))
            self._finds_body = False
            with torch.enable_grad():
                hidden_SLD = run_model_code(skeleton.model, lambda: body_and_head.hidden_states(tokens_SL))
                gradient_SLD = _loss_gradient(body_and_head, hidden_SLD.detach(), seed)
                trim_heap()
                try:
                    hidden_SLD.backward(gradient_SLD)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise UserError(
                        f"{self.plan.path}: backpropagation through the model fails ({one_line(error)}); use --effort "
                        "default, without --target-bpw and --target-size"
                    ) from error

    @contextmanager
    def _blocks_replaced(self) -> Iterator[None]:
        """Replace the forward of every block by `_recomputed_forward` for the duration of a `with` block."""
        blocks = [self.plan.skeleton.model.get_submodule(name) for name in self.plan.block_names]
        for index, block in enumerate(blocks):
            block.forward = self._recomputed_forward(index, block, block.forward)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _recomputed_forward(self, index: int, block: nn.Module, block_forward: Callable) -> Callable:
        """Return a forward that loads the block's weights while it runs, and runs the block again for its gradients."""
        name = self.plan.block_names[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_tensor(args, kwargs)
            assert hidden is not None
            outputs: list[Any] = []

            def call(replaced: Tensor) -> Tensor:
                swapped_args, swapped_kwargs = with_first_tensor(args, kwargs, replaced)
                outputs.append(
                    run_model_code(self.plan.skeleton.model, lambda: block_forward(*swapped_args, **swapped_kwargs))
                )
                tensor = first_tensor((outputs[-1],) if isinstance(outputs[-1], Tensor) else tuple(outputs[-1]), {})
                assert tensor is not None
                return tensor

            def run(replaced: Tensor) -> Tensor:
                with self._loaded(index):
                    return call(replaced) if self._finds_body else self.run_block(name, block, lambda: call(replaced))

            def run_back(replaced: Tensor, gradient: Tensor) -> Tensor:
                with self._loaded(index), torch.enable_grad(), self._gradients_observed(name, block):
                    replaced = replaced.detach().requires_grad_()
                    (result,) = torch.autograd.grad(call(replaced), replaced, gradient)
                    self.on_block_done(name)
                outputs.clear()
                return result

            # The gradient ends at the first block's input.
            leaf = hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.detach().requires_grad_()
            output = _RecomputedBlock.apply(leaf, run, run_back)
            whole = outputs.pop()
            if isinstance(whole, Tensor):
                return output
            first = next(at for at, value in enumerate(whole) if isinstance(value, Tensor))
            return (*whole[:first], output, *whole[first + 1 :])

        return forward

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        """Hold the weights of a block for the duration of a `with` block."""
        self.on_block_read()
        self.plan.skeleton.load(self.plan.block_names[index])
        try:
            yield
        finally:
            self.plan.skeleton.drop(self.plan.block_names[index])
            trim_heap()

    @contextmanager
    def _gradients_observed(self, name: str, block: nn.Module) -> Iterator[None]:
        """Call `on_gradient` for the linears of a block for the duration of a `with` block."""

        def observe(full_name: str) -> Callable:
            def hook(linear: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
                x = first_tensor(args, kwargs)
                assert x is not None
                x_TK = x.detach().flatten(0, -2)
                if not output.requires_grad:
                    return
                output.register_hook(
                    lambda gradient: self.on_gradient(full_name, linear, x_TK, gradient.flatten(0, -2))
                )

            return hook

        hooks = [
            (linear, observe(f"{name}.{key}"))
            for key, linear in linears_of(block).items()
            if self.needs_gradients_of(f"{name}.{key}")
        ]
        with hooked(hooks):
            yield


def _loss_gradient(body_and_head: BodyAndHead, hidden_SLD: Tensor, seed: int) -> Tensor:
    """Return the gradient of the summed loss with respect to the hidden states before the head, [S, L, D].

    The labels are drawn from the predictions.
    """
    draw = torch.Generator(device=hidden_SLD.device).manual_seed(seed)
    pieces = []
    chunk = GPU_CHUNK_TOKENS if hidden_SLD.is_cuda else CHUNK_TOKENS
    for hidden_CD in hidden_SLD.flatten(0, 1).split(chunk):
        hidden_CD = hidden_CD.detach().requires_grad_()
        log_p_CV = body_and_head.logits(hidden_CD).float().log_softmax(-1)
        drawn_C1 = torch.multinomial(log_p_CV.detach().exp(), 1, generator=draw)
        pieces += torch.autograd.grad(-log_p_CV.gather(-1, drawn_C1).sum(), hidden_CD)
    return torch.cat(pieces).view_as(hidden_SLD)


@contextmanager
def _outside_loaded(plan: Plan) -> Iterator[None]:
    """Hold the weights outside the blocks for the duration of a `with` block."""
    names = modules_outside(plan.skeleton.model, plan.block_names)
    try:
        for name in names:
            plan.skeleton.load(name, recurse=False)
        yield
    finally:
        for name in names:
            plan.skeleton.drop(name, recurse=False)


class _RecomputedBlock(torch.autograd.Function):
    """A block that stores only its input in the forward pass, and runs again for its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable, run_back: Callable) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden)
        ctx.run_back = run_back
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        return ctx.run_back(hidden, gradient), None, None
