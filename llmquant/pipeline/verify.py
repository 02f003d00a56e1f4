"""Is what lies on the disk what was meant, and how far is it from the original?

Two questions, asked of the finished files before they become OUT. Every packed linear is read back and compared with
what was solved, code for code. Then the reopened model and the original read the same held-out text side by side, one
block of each in memory at a time, and their predictions are compared:

    held-out windows -> block 0 of both, block 1 of both, … -> the head, window by window -> KL, losses, first choices

The verdict rests on two factors, both of perplexity: by how much it grew on the held-out text, and exp(KL), by how much
it grows on text that the original itself would write (KL is the expected difference of the two log-likelihoods there).
Up to GOOD is what care can reach: SmolLM2-135M, a model as small and as easily hurt as they come, is at 1.09 in 4 bits
by the default recipe, and beyond 1.3 by plain rounding. From BROKEN on it is, at every token, as unsure as if it had
twice as many to choose from; so much is lost only where something went wrong, or where there are too few bits. In
between it depends on what the model is for.

Letters: W windows, L tokens of a window, T predicted positions (L - 1), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
from llmquant.errors import UserError
from llmquant.eval.divergence import token_divergence
from llmquant.hub import load_tokenizer
from llmquant.models.blocks import first_tensor, weight_as_NK
from llmquant.models.skeleton import Skeleton, compute_dtype, max_positions, read_config, stored_dtype
from llmquant.models.walk import Walk
from llmquant.pipeline.calibration import MIN_HELD_OUT, CalibrationTokens, calibration_tokens
from llmquant.pipeline.footprint import COMPARED_POSITIONS
from llmquant.pipeline.plan import Plan, check_tokens
from llmquant.textdata import PYTHON_DOCS

WORDS = ("good", "worth a look", "broken", "not measured")
"""The verdicts."""
GOOD, BROKEN = 1.15, 2.0
"""Largest growth of perplexity that is called good, and the one from which on a model is called broken."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The finished model against the original, on text that it was not fitted to."""

    verdict: str
    """One of WORDS."""
    reason: str
    """The verdict's reason, in words."""
    source: str | None = None
    """Preset or path of the text."""
    num_windows: int = 0
    seq_len: int = 0
    num_tokens: int = 0
    """Tokens predicted."""
    kl_mean: float | None = None
    """Mean of KL(original || quantized), nats per token."""
    kl_p99: float | None = None
    """99th percentile over the tokens."""
    top1_agreement: float | None = None
    """Share of tokens where both hold the same one most likely."""
    perplexity: float | None = None
    original_perplexity: float | None = None
    drift: tuple[float, ...] = ()
    """Behind each block: squared distance of the hidden states from the original's, relative to theirs."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Text to measure on."""

    tokens_WL: Tensor
    """int64 [W, L]."""
    source: str
    note: str = ""
    """Why it is another text than the calibration's; empty where that was to be expected."""


def verify_codes(folder: Path, plan: Plan, digests: dict[str, str]) -> None:
    """Reopen a finished folder as any reader would and compare every packed linear with what was solved.

    digests: of the solved weights, by name in the model. UserError if one differs.
    """
    check_digests(folder, {linear.source: digests[linear.name] for linear in plan.quantized})


def held_out(plan: Plan, tokens: CalibrationTokens | None) -> HeldOut:
    """Windows that calibration did not draw; where none are left, and without calibration, of Python's manual.

    Raises UserError where there is no such text, or the tokenizer does not fit the model.
    """
    note, seq_len = "", plan.options.seq_len
    if tokens is not None:
        if len(tokens.held_out_WL) and seq_len > 1:
            return HeldOut(tokens_WL=tokens.held_out_WL, source=tokens.source)
        note = f"measured on {PYTHON_DOCS}: calibration leaves no window of {tokens.source} over"
        if tokens.source == PYTHON_DOCS:
            raise UserError(
                f"calibration leaves no window of {PYTHON_DOCS} over; use fewer --samples, or a longer text"
            )
    context = max_positions(plan.config)
    tokenizer = load_tokenizer(plan.path)
    drawn = calibration_tokens(
        tokenizer, PYTHON_DOCS, MIN_HELD_OUT, min(max(seq_len, 2), context or seq_len), plan.options.seed
    )
    check_tokens(plan, drawn.tokens_SL)
    return HeldOut(tokens_WL=drawn.tokens_SL, source=PYTHON_DOCS, note=note)


@torch.no_grad()
def verify_text(folder: Path, plan: Plan, text: HeldOut) -> Verification:
    """Compare the predictions of a finished folder with those of the original, block by block."""
    windows_WL = text.tokens_WL
    with (
        Walk(plan.skeleton, windows_WL, with_original=False, to_the_end=True) as original,
        Walk(reopen(folder, plan), windows_WL, with_original=False, to_the_end=True) as quantized,
    ):
        drift = tuple(_drift(original, quantized, len(plan.block_names)))
        compared = [_compare(original, quantized, number, tokens_L) for number, tokens_L in enumerate(windows_WL)]
    kl_T, agrees_T, loss_T, original_loss_T = (torch.cat(values).double() for values in zip(*compared, strict=True))
    num_windows, seq_len = windows_WL.shape
    measured = Verification(
        verdict="not measured",
        reason=f"the original's own predictions are not finite in {plan.skeleton.dtype}",
        source=text.source,
        num_windows=num_windows,
        seq_len=seq_len,
        num_tokens=len(kl_T),
    )
    if not original_loss_T.isfinite().all():
        return measured
    if not (kl_T.isfinite() & loss_T.isfinite()).all():
        return replace(measured, verdict="broken", reason="its predictions are not finite")
    loss, original_loss = loss_T.mean().item(), original_loss_T.mean().item()
    verdict, reason = judge(kl_T.mean().item(), loss - original_loss)
    return replace(
        measured,
        verdict=verdict,
        reason=reason,
        kl_mean=kl_T.mean().item(),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        top1_agreement=agrees_T.mean().item(),
        perplexity=_exp(loss),
        original_perplexity=_exp(original_loss),
        drift=drift,
    )


def judge(kl: float, loss_growth: float) -> tuple[str, str]:
    """The verdict on a mean KL and a difference of mean losses, both finite, nats per token; and its reason."""
    growth, own_growth = _exp(loss_growth), _exp(kl)
    reason = f"perplexity {growth:.2f} times the original's on held-out text, {own_growth:.2f} times by the divergence"
    worst = max(growth, own_growth)
    return ("good" if worst <= GOOD else "worth a look" if worst < BROKEN else "broken"), reason


def reopen(folder: Path, plan: Plan) -> Skeleton:
    """A finished folder as a model whose weights are read while they are needed, packed ones dequantized."""
    reader = CheckpointReader(folder)
    config = read_config(folder, plan.options.trust_remote_code)
    # transformers must not look for a quantizer of its own.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    device = plan.skeleton.device
    dtype = compute_dtype(stored_dtype(config, reader), device)
    skeleton = Skeleton.open(reader, config, device, dtype, plan.options.trust_remote_code)
    packed = _packed(reader)
    for linear in plan.quantized:
        module = skeleton.model.get_submodule(linear.name)
        skeleton.computed[f"{linear.name}.weight"] = partial(_dense, reader, packed[linear.source], module, dtype)
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


def _compare(original: Walk, quantized: Walk, number: int, tokens_L: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, same first choice, and both losses of one window's tokens, [T] each; its logits live no longer than this."""
    logits_TV, original_TV = quantized.outcome(number).logits[0, :-1], original.outcome(number).logits[0, :-1]
    targets_T = tokens_L[1:].to(logits_TV.device)
    chunks = zip(*(values.split(COMPARED_POSITIONS) for values in (logits_TV, original_TV, targets_T)), strict=True)
    compared = [
        (*token_divergence(theirs_CV, ours_CV), _losses(ours_CV, targets_C), _losses(theirs_CV, targets_C))
        for ours_CV, theirs_CV, targets_C in chunks
    ]
    kl_T, agrees_T, loss_T, original_loss_T = (torch.cat(values) for values in zip(*compared, strict=True))
    return kl_T, agrees_T, loss_T, original_loss_T


def _losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Negative log likelihood of some tokens, float32 [C] on the CPU."""
    logits_CV = logits_CV.float()
    return (logits_CV.logsumexp(-1) - logits_CV.gather(-1, targets_C[:, None])[:, 0]).cpu()


def _exp(nats: float) -> float:
    """exp, without an overflow: what is that large is told as it is."""
    return math.exp(min(nats, 700.0))
