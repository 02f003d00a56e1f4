"""Verification of the finished files before they become OUT.

Every packed linear is read back and compared with the chosen codes. Then the reopened model and the original run the
same held-out texts side by side (`held_out.py`), with one block of each in memory at a time:

    held-out windows -> block 0 of both, block 1 of both, … -> the head, window by window -> KL, losses, top-1 tokens

`verdict.py` derives the verdict from the measurements.

Letters: W windows, L tokens of a window, T predicted positions (L - 1), C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

from llmquant.checkpoints.quantized import (
    QuantizedModule,
    check_digests,
    find_quantized_modules,
    parsed_quantization,
    read_quantized,
)
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.eval.divergence import COMPARED_POSITIONS, mean_interval, token_divergence
from llmquant.eval.perplexity import token_losses
from llmquant.humanize import dtype_name, format_clock
from llmquant.models.blocks import first_tensor, weight_as_NK, weight_of
from llmquant.models.blockwise_forward import BlockwiseForward
from llmquant.models.skeleton import Skeleton, comparison_dtype, compute_dtype, read_config, stored_dtype
from llmquant.planning.held_out import MIN_WINDOWS, HeldOutText
from llmquant.planning.plan import Plan
from llmquant.report.verdict import BANDS, NOT_MEASURED, Measurement, Verification, bounded_exp, judge

RUN_FRACTION, ALWAYS_SECONDS = 0.1, 120.0
"""Windows are left out if the comparison would take more than this fraction of the run's time and this many seconds."""


@dataclass(frozen=True)
class WindowComparison:
    """Both models' predictions of the tokens of one window, [T] each, on the CPU."""

    kl_T: Tensor
    """KL(original || quantized), float32, nats."""
    changed_T: Tensor
    """Whether the most likely token differs from the original's, bool."""
    loss_T: Tensor
    """Negative log likelihood under the quantized model, float32, nats."""
    original_loss_T: Tensor
    """Negative log likelihood under the original, float32, nats."""


def verify_codes(folder: Path, plan: Plan, digests: dict[str, str]) -> None:
    """Reopen a finished folder and compare every packed linear with the chosen codes.

    digests: SHA-256 of the chosen codes, scales and zero-points, by name in the model. Raises UserError if one differs.
    """
    check_digests(
        folder, {linear.checkpoint_name: digests[linear.name] for linear in plan.quantized}, plan.skeleton.device
    )


@torch.no_grad()
def within_time_limit(plan: Plan, texts: Sequence[HeldOutText], run_seconds: float) -> tuple[HeldOutText, ...]:
    """Return the texts, with fewer windows if all would take too long (RUN_FRACTION, ALWAYS_SECONDS).

    run_seconds: time of the run so far. At least MIN_WINDOWS windows of each text remain.
    """
    num_tokens = sum(text.tokens_WL.numel() for text in texts)
    seconds = _seconds_per_token(plan, texts[0].tokens_WL[0]) * num_tokens
    fraction = max(run_seconds * RUN_FRACTION, ALWAYS_SECONDS) / max(seconds, 1e-9)
    if fraction >= 1:
        return tuple(texts)
    thinned = []
    for text in texts:
        available = len(text.tokens_WL)
        count = min(max(int(fraction * available), MIN_WINDOWS), available)
        note = f"{count} of {available} windows, because all would take about {format_clock(seconds)} here"
        thinned.append(text.with_fewer_windows(count, note if count < available else ""))
    return tuple(thinned)


def _seconds_per_token(plan: Plan, tokens_L: Tensor) -> float:
    """Return the seconds per token of both models together, estimated from the second of two runs of block 0."""
    skeleton, device = _original(plan), plan.skeleton.device
    block = skeleton.model.get_submodule(plan.block_names[0])
    with BlockwiseForward(skeleton, [tokens_L], with_original=False) as forward:
        forward.enter(0)
        ((args, kwargs),) = forward.block_calls(1)
        block(*args, **kwargs)
        start = _seconds(device)
        block(*args, **kwargs)
        seconds = _seconds(device) - start
        forward.leave(0)
    # The head is assumed to take as long as blocks with the same number of weights.
    block_weights = sum(parameter.numel() for parameter in block.parameters())
    head = weight_of(plan.skeleton.model.get_input_embeddings()).numel() / max(block_weights, 1)
    return 2 * seconds * (len(plan.block_names) + head) / len(tokens_L)


def _seconds(device: torch.device) -> float:
    """Return the wall time on a GPU, or the CPU time per thread, which other processes do not affect."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return perf_counter()
    return process_time() / torch.get_num_threads()


@torch.no_grad()
def verify_texts(folder: Path, plan: Plan, texts: Sequence[HeldOutText]) -> Verification:
    """Compare the predictions of a finished folder with the original's, block by block. texts: the fixed text first."""
    windows = [tokens_L for text in texts for tokens_L in text.tokens_WL]
    with (
        BlockwiseForward(_original(plan), windows, with_original=False, with_head=True) as original,
        BlockwiseForward(reopen(folder, plan), windows, with_original=False, with_head=True) as quantized,
    ):
        drift = tuple(_drift(original, quantized, len(plan.block_names)))
        compared = (_compare(original, quantized, number, tokens_L) for number, tokens_L in enumerate(windows))
        by_text = [[next(compared) for _ in text.tokens_WL] for text in texts]
    if not all(window.original_loss_T.isfinite().all() for compared_W in by_text for window in compared_W):
        measured = tuple(_unmeasured(text) for text in texts)
        dtype = dtype_name(comparison_dtype(plan.skeleton.dtype, plan.skeleton.device))
        reason = f"the original's own predictions are not finite in {dtype}; compare with --dtype float32"
        return Verification(verdict=NOT_MEASURED, reason=reason, texts=measured)
    if not all(_is_finite(window) for compared_W in by_text for window in compared_W):
        measured = tuple(_unmeasured(text) for text in texts)
        return Verification(verdict=BANDS[-1], reason="its predictions are not finite", texts=measured)
    return judge([_measured(text, compared_W) for text, compared_W in zip(texts, by_text, strict=True)], drift)


def _is_finite(window: WindowComparison) -> bool:
    return bool((window.kl_T.isfinite() & window.loss_T.isfinite()).all())


def _unmeasured(text: HeldOutText) -> Measurement:
    num_windows, seq_len = text.tokens_WL.shape
    num_tokens = num_windows * (seq_len - 1)
    return Measurement(
        source=text.source, num_windows=num_windows, seq_len=seq_len, num_tokens=num_tokens, note=text.note
    )


def _measured(text: HeldOutText, windows: Sequence[WindowComparison]) -> Measurement:
    """Return the measurement of a text from its windows, all of them finite."""
    kl_T, changed_T, loss_T, original_loss_T = (
        torch.cat([getattr(window, name) for window in windows]).double()
        for name in ("kl_T", "changed_T", "loss_T", "original_loss_T")
    )
    growths = [window.loss_T.double() - window.original_loss_T.double() for window in windows]
    ratio_W = [bounded_exp(growth_T.mean().item()) for growth_T in growths]
    worst = max(range(len(windows)), key=lambda index: ratio_W[index])
    nats = mean_interval(growths)
    return replace(
        _unmeasured(text),
        perplexity=bounded_exp(loss_T.mean().item()),
        original_perplexity=bounded_exp(original_loss_T.mean().item()),
        ratio=bounded_exp((loss_T - original_loss_T).mean().item()),
        ratio_interval=None if nats is None else (bounded_exp(nats[0]), bounded_exp(nats[1])),
        kl_mean=kl_T.mean().item(),
        kl_interval=mean_interval([window.kl_T for window in windows]),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        changed_share=changed_T.mean().item(),
        worst_window=worst,
        worst_ratio=ratio_W[worst],
        worst_opening=text.openings[worst] if text.openings else "",
    )


def _original(plan: Plan) -> Skeleton:
    """Return the original model in the dtype of the comparison."""
    skeleton, trust = plan.skeleton, plan.options.trust_remote_code
    dtype = comparison_dtype(skeleton.dtype, skeleton.device)
    if dtype == skeleton.dtype:
        return skeleton
    return Skeleton.open(plan.reader, read_config(plan.path, trust), skeleton.device, dtype, trust)


def reopen(folder: Path, plan: Plan) -> Skeleton:
    """Return a finished folder as a `Skeleton`, whose weights are read and dequantized only when needed."""
    reader = CheckpointReader(folder)
    config = read_config(folder, plan.options.trust_remote_code)
    device = plan.skeleton.device
    dtype = comparison_dtype(compute_dtype(stored_dtype(config, reader), device), device)
    skeleton = Skeleton.open(reader, config, device, dtype, plan.options.trust_remote_code)
    packed = _packed(reader)
    for linear in plan.quantized:
        module = skeleton.model.get_submodule(linear.name)
        name = f"{linear.name}.weight"
        skeleton.computed_parameters[name] = partial(
            _dense, reader, packed[linear.checkpoint_name], module, skeleton.dtypes[name], device
        )
    return skeleton


def _dense(
    reader: CheckpointReader, packed: QuantizedModule, module: nn.Module, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Dequantize a packed linear into the layout of its module, on the device."""
    return weight_as_NK(module, read_quantized(reader, packed, device).dequantize(dtype)).contiguous()


def _packed(reader: CheckpointReader) -> dict[str, QuantizedModule]:
    parsed = parsed_quantization(reader)
    return {} if parsed is None else find_quantized_modules(reader, parsed)


def _drift(original: BlockwiseForward, quantized: BlockwiseForward, num_blocks: int) -> Iterator[float]:
    """Run both models through their blocks; yield the relative squared distance of the hidden states after each block.

    Each token's distance is divided by the length of its own state before the mean is taken, because the first token's
    state is often a hundred times as long as the others.
    """
    for index in range(num_blocks):
        original.advance_past(index)
        quantized.advance_past(index)
        distances = []
        for theirs, ours in zip(original.quantized_passes, quantized.quantized_passes, strict=True):
            x, y = first_tensor(*theirs.block_call), first_tensor(*ours.block_call)
            if x is not None and y is not None:
                lengths = x.float().square().sum(-1).clamp(min=1e-30)
                distances.append(((y.float() - x.float()).square().sum(-1) / lengths).mean().item())
        yield sum(distances) / max(len(distances), 1)


def _compare(
    original: BlockwiseForward, quantized: BlockwiseForward, number: int, tokens_L: Tensor
) -> WindowComparison:
    """Compare the predictions of both models for one window. The logits are freed on return."""
    logits_TV, original_TV = quantized.run_head(number).logits[0, :-1], original.run_head(number).logits[0, :-1]
    targets_T = tokens_L[1:].to(logits_TV.device)
    chunks = zip(*(values.split(COMPARED_POSITIONS) for values in (logits_TV, original_TV, targets_T)), strict=True)
    compared = []
    for ours_CV, theirs_CV, targets_C in chunks:
        kl_C, same_C = token_divergence(theirs_CV, ours_CV)
        compared.append((kl_C, ~same_C, *(token_losses(logits, targets_C).cpu() for logits in (ours_CV, theirs_CV))))
    return WindowComparison(*(torch.cat(values) for values in zip(*compared, strict=True)))
