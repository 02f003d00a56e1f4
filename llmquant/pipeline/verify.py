"""Is the content of the disk what was solved, and how far is it from the original?

Two questions, asked of the finished files before they become OUT. Every packed linear is read back and compared with
what was solved, code for code. Then the reopened model and the original read the same held-out texts side by side
(`held_out.py`), one block of each in memory at a time, and their predictions are compared:

    held-out windows -> block 0 of both, block 1 of both, … -> the head, window by window -> KL, losses, first choices

`verdict.py` judges what comes out of it.

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
from llmquant.eval.divergence import mean_interval, token_divergence
from llmquant.models.blocks import first_tensor, weight_as_NK, weight_of
from llmquant.models.skeleton import Skeleton, compute_dtype, measuring_dtype, read_config, stored_dtype
from llmquant.models.walk import Walk
from llmquant.pipeline.footprint import COMPARED_POSITIONS
from llmquant.pipeline.held_out import MIN_WINDOWS, HeldOut
from llmquant.pipeline.plan import Plan
from llmquant.pipeline.verdict import BANDS, NOT_MEASURED, Measurement, Verification, exp, judge
from llmquant.words import clock

SHARE_OF_RUN, ALWAYS_SECONDS = 0.1, 120.0
"""Share of the run's time that comparing may take before windows are left out, and a time that it may always take."""


@dataclass(frozen=True)
class Compared:
    """The tokens of one window, [T] each, on the CPU."""

    kl_T: Tensor
    """float32, nats."""
    changed_T: Tensor
    """bool: the most likely token is another one than the original's."""
    loss_T: Tensor
    """Negative log likelihood by the quantized model, float32, nats."""
    original_loss_T: Tensor
    """The same by the original."""


def verify_codes(folder: Path, plan: Plan, digests: dict[str, str]) -> None:
    """Reopen a finished folder as any reader would and compare every packed linear with what was solved.

    digests: of the solved weights, by name in the model. UserError if one differs.
    """
    check_digests(folder, {linear.source: digests[linear.name] for linear in plan.quantized})


@torch.no_grad()
def affordable(plan: Plan, texts: Sequence[HeldOut], run_seconds: float) -> tuple[HeldOut, ...]:
    """The texts, with fewer windows if all of them would take more than SHARE_OF_RUN of the run's time.

    run_seconds: time of the run so far. MIN_WINDOWS of each text stay, and whatever ALWAYS_SECONDS suffice for.
    """
    num_tokens = sum(text.tokens_WL.numel() for text in texts)
    seconds = _seconds_per_token(plan, texts[0].tokens_WL[0]) * num_tokens
    share = max(run_seconds * SHARE_OF_RUN, ALWAYS_SECONDS) / max(seconds, 1e-9)
    if share >= 1:
        return tuple(texts)
    thinned = []
    for text in texts:
        available = len(text.tokens_WL)
        kept = min(max(int(share * available), MIN_WINDOWS), available)
        note = f"{kept} of {available} windows, because all would take about {clock(seconds)} here"
        thinned.append(text.thinned(kept, note if kept < available else ""))
    return tuple(thinned)


def _seconds_per_token(plan: Plan, tokens_L: Tensor) -> float:
    """Time that a token takes in both networks, from the first block, which runs twice to be timed once."""
    skeleton, device = _original(plan), plan.skeleton.device
    block = skeleton.model.get_submodule(plan.block_names[0])
    with Walk(skeleton, [tokens_L], with_original=False) as walk:
        walk.enter(0)
        ((args, kwargs),) = walk.calls(1)
        block(*args, **kwargs)
        start = _seconds(device)
        block(*args, **kwargs)
        seconds = _seconds(device) - start
        walk.leave(0)
    # The head takes as long as the blocks that have its number of weights.
    block_weights = sum(parameter.numel() for parameter in block.parameters())
    head = weight_of(plan.skeleton.model.get_input_embeddings()).numel() / max(block_weights, 1)
    return 2 * seconds * (len(plan.block_names) + head) / len(tokens_L)


def _seconds(device: torch.device) -> float:
    """A clock: of the GPU's work; or of the processor's by thread, which other work on the machine does not change."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return perf_counter()
    return process_time() / torch.get_num_threads()


@torch.no_grad()
def verify_texts(folder: Path, plan: Plan, texts: Sequence[HeldOut]) -> Verification:
    """Compare the predictions of a finished folder with those of the original, block by block; the fixed text first."""
    windows = [tokens_L for text in texts for tokens_L in text.tokens_WL]
    with (
        Walk(_original(plan), windows, with_original=False, to_the_end=True) as original,
        Walk(reopen(folder, plan), windows, with_original=False, to_the_end=True) as quantized,
    ):
        drift = tuple(_drift(original, quantized, len(plan.block_names)))
        compared = (_compare(original, quantized, number, tokens_L) for number, tokens_L in enumerate(windows))
        by_text = [[next(compared) for _ in text.tokens_WL] for text in texts]
    if not all(window.original_loss_T.isfinite().all() for compared_W in by_text for window in compared_W):
        measured = tuple(_unmeasured(text) for text in texts)
        reason = f"the original's own predictions are not finite in {plan.skeleton.dtype}"
        return Verification(verdict=NOT_MEASURED, reason=reason, texts=measured)
    if not all(_is_finite(window) for compared_W in by_text for window in compared_W):
        measured = tuple(_unmeasured(text) for text in texts)
        return Verification(verdict=BANDS[-1], reason="its predictions are not finite", texts=measured)
    return judge([_measured(text, compared_W) for text, compared_W in zip(texts, by_text, strict=True)], drift)


def _is_finite(window: Compared) -> bool:
    return bool((window.kl_T.isfinite() & window.loss_T.isfinite()).all())


def _unmeasured(text: HeldOut) -> Measurement:
    num_windows, seq_len = text.tokens_WL.shape
    num_tokens = num_windows * (seq_len - 1)
    return Measurement(
        source=text.source, num_windows=num_windows, seq_len=seq_len, num_tokens=num_tokens, note=text.note
    )


def _measured(text: HeldOut, windows: Sequence[Compared]) -> Measurement:
    """The numbers of a text from its windows, all finite."""
    kl_T, changed_T, loss_T, original_loss_T = (
        torch.cat([getattr(window, name) for window in windows]).double()
        for name in ("kl_T", "changed_T", "loss_T", "original_loss_T")
    )
    growths = [window.loss_T.double() - window.original_loss_T.double() for window in windows]
    ratio_W = [exp(growth_T.mean().item()) for growth_T in growths]
    worst = max(range(len(windows)), key=lambda index: ratio_W[index])
    nats = mean_interval(growths)
    return replace(
        _unmeasured(text),
        perplexity=exp(loss_T.mean().item()),
        original_perplexity=exp(original_loss_T.mean().item()),
        ratio=exp((loss_T - original_loss_T).mean().item()),
        ratio_interval=None if nats is None else (exp(nats[0]), exp(nats[1])),
        kl_mean=kl_T.mean().item(),
        kl_interval=mean_interval([window.kl_T for window in windows]),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        changed_share=changed_T.mean().item(),
        worst_window=worst,
        worst_ratio=ratio_W[worst],
        worst_opening=text.openings[worst] if text.openings else "",
    )


def _original(plan: Plan) -> Skeleton:
    """The original in the dtype that models are compared in."""
    skeleton, trust = plan.skeleton, plan.options.trust_remote_code
    dtype = measuring_dtype(skeleton.dtype, skeleton.device)
    if dtype == skeleton.dtype:
        return skeleton
    return Skeleton.open(plan.reader, read_config(plan.path, trust), skeleton.device, dtype, trust)


def reopen(folder: Path, plan: Plan) -> Skeleton:
    """A finished folder as a model whose weights are read while they are needed, packed ones dequantized."""
    reader = CheckpointReader(folder)
    config = read_config(folder, plan.options.trust_remote_code)
    device = plan.skeleton.device
    dtype = measuring_dtype(compute_dtype(stored_dtype(config, reader), device), device)
    skeleton = Skeleton.open(reader, config, device, dtype, plan.options.trust_remote_code)
    packed = _packed(reader)
    for linear in plan.quantized:
        module = skeleton.model.get_submodule(linear.name)
        name = f"{linear.name}.weight"
        skeleton.computed[name] = partial(_dense, reader, packed[linear.source], module, skeleton.dtypes[name])
    return skeleton


def _dense(reader: CheckpointReader, packed: QuantizedModule, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight that a packed linear stands for, laid out as its module wants it."""
    return weight_as_NK(module, read_quantized(reader, packed).dequantize(dtype)).contiguous()


def _packed(reader: CheckpointReader) -> dict[str, QuantizedModule]:
    parsed = parsed_quantization(reader)
    return {} if parsed is None else find_quantized_modules(reader, parsed)


def _drift(original: Walk, quantized: Walk, num_blocks: int) -> Iterator[float]:
    """Lead both networks through their blocks; behind each, how far the hidden states are apart.

    The mean over the tokens of their own relative distance: the first token's is often a hundred times as long.
    """
    for index in range(num_blocks):
        original.cross(index)
        quantized.cross(index)
        distances = []
        for theirs, ours in zip(original.quantized, quantized.quantized, strict=True):
            x, y = first_tensor(*theirs.call), first_tensor(*ours.call)
            if x is not None and y is not None:
                lengths = x.float().square().sum(-1).clamp(min=1e-30)
                distances.append(((y.float() - x.float()).square().sum(-1) / lengths).mean().item())
        yield sum(distances) / max(len(distances), 1)


def _compare(original: Walk, quantized: Walk, number: int, tokens_L: Tensor) -> Compared:
    """The predictions of both models for one window; its logits live no longer than this."""
    logits_TV, original_TV = quantized.outcome(number).logits[0, :-1], original.outcome(number).logits[0, :-1]
    targets_T = tokens_L[1:].to(logits_TV.device)
    chunks = zip(*(values.split(COMPARED_POSITIONS) for values in (logits_TV, original_TV, targets_T)), strict=True)
    compared = []
    for ours_CV, theirs_CV, targets_C in chunks:
        kl_C, same_C = token_divergence(theirs_CV, ours_CV)
        compared.append((kl_C, ~same_C, _losses(ours_CV, targets_C), _losses(theirs_CV, targets_C)))
    return Compared(*(torch.cat(values) for values in zip(*compared, strict=True)))


def _losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Negative log likelihood of some tokens, float32 [C] on the CPU."""
    logits_CV = logits_CV.float()
    return (logits_CV.logsumexp(-1) - logits_CV.gather(-1, targets_C[:, None])[:, 0]).cpu()
