"""Divergence of a model's predictions from a reference's: Kullback-Leibler divergence and top-1 agreement.

KL divergence is less noisy than a difference of perplexities. It compares whole distributions at every position, so
errors that lower the loss by chance cannot hide errors that raise it. With the probabilities p of the reference and q
of the model, KL(reference || model) = sum_v p_v (log p_v - log q_v), in nats, computed in float32.

A reference runs once for any number of models. Its hidden states in front of the head are kept, and its logits are
computed from them again when they are needed (`body_and_head.py`). No logits are kept.

Letters: W windows, L tokens of a window, T scored positions of a window, C positions of a chunk, D hidden size,
V vocabulary, B blocks of neighbouring tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.eval.body_and_head import BodyAndHead
from llmquant.eval.perplexity import (
    CHUNK_POSITIONS,
    OnWindow,
    Perplexity,
    checked_loss,
    scored_windows,
    summarize_losses,
    token_losses,
    window_loss,
)

COMPARED_POSITIONS = 64
"""Number of positions at which the predictions of two models are compared at a time."""
BLOCK_TOKENS = 64
"""Number of neighbouring tokens whose mean counts as one observation of a confidence interval. Single tokens are not
independent: a model that is wrong at one token is often wrong at the next."""
MIN_BLOCKS = 4
"""Smallest number of observations for which a confidence interval is computed."""
NORMAL_975 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of a model from a reference, on the same positions as their perplexities."""

    kl_mean: float
    """Mean of KL(reference || model) over the scored tokens, nats per token; 0 for equal models."""
    kl_median: float
    """Median of the KL divergence over the scored tokens, which describes a typical position."""
    kl_p99: float
    """99th percentile of the KL divergence over the scored tokens, which describes the bad positions."""
    top1_agreement: float
    """Fraction of the positions at which both models predict the same most likely token, 0 … 1."""
    model: Perplexity
    """Perplexity of the model."""
    reference: Perplexity
    """Perplexity of the reference."""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RecordedReference:
    """Hidden states of a reference on some windows, from which its logits are computed chunk by chunk."""

    body_and_head: BodyAndHead
    """The reference; its head computes the logits."""
    hidden: list[Tensor]
    """Input of the head at the scored positions of each window, [T, D] in the reference's dtype, on the CPU."""
    perplexity: Perplexity
    """Perplexity of the reference."""


def record_reference(
    reference: nn.Module,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> RecordedReference:
    """Run a reference on int64 windows [W, L] and record its hidden states, T x D numbers per window."""
    body_and_head = BodyAndHead(reference)
    hidden, losses = [], []
    for scored in scored_windows(body_and_head, windows_WL, stride, batch_size):
        losses.append(window_loss(body_and_head, scored))
        # Without the copy, the whole batch would stay in memory.
        hidden.append(scored.hidden_TD.cpu().clone())
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    return RecordedReference(body_and_head, hidden, summarize_losses(losses, windows_WL, stride, body_and_head.seconds))


@torch.inference_mode()
def divergence(
    model: nn.Module,
    reference: nn.Module | RecordedReference,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> Divergence:
    """Return the divergence of a model from a reference on int64 windows [W, L].

    reference: a model, or the result of `record_reference` on the same windows with the same stride.
    The logits of at most CHUNK_POSITIONS positions are in memory at a time.
    Raises UserError if the vocabularies differ, or if a loss or a KL divergence is not finite.
    """
    if not isinstance(reference, RecordedReference):
        reference = record_reference(reference, windows_WL, stride=stride, batch_size=batch_size)
    body_and_head = BodyAndHead(model)
    kls, agreements, losses = [], [], []
    for scored in scored_windows(body_and_head, windows_WL, stride, batch_size):
        window_losses = []
        reference_chunks = reference.hidden[scored.index].split(CHUNK_POSITIONS)
        for (hidden_CD, targets_C), reference_CD in zip(scored.chunks(), reference_chunks, strict=True):
            logits_CV, reference_CV = body_and_head.logits(hidden_CD), reference.body_and_head.logits(reference_CD)
            if logits_CV.shape != reference_CV.shape:
                raise UserError(
                    f"vocabulary of {logits_CV.shape[1]} against {reference_CV.shape[1]}: the two models predict "
                    f"different tokens; compare a model with the one it was made from"
                )
            kl_C, same_C = token_divergence(reference_CV, logits_CV)
            kls.append(kl_C)
            agreements.append(same_C)
            window_losses.append(token_losses(logits_CV, targets_C))
        losses.append(checked_loss(torch.cat(window_losses), scored.index))
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    kl_T, same_T = torch.cat(kls).double(), torch.cat(agreements)
    if not kl_T.isfinite().all():
        raise UserError(
            f"KL divergence is {kl_T[~kl_T.isfinite()][0].item()} at a token: the model gives probability 0 to "
            f"a token that is possible for the reference; check that the vocabularies match"
        )
    return Divergence(
        kl_mean=kl_T.mean().item(),
        kl_median=kl_T.median().item(),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        top1_agreement=same_T.double().mean().item(),
        model=summarize_losses(losses, windows_WL, stride, body_and_head.seconds),
        reference=reference.perplexity,
    )


@torch.inference_mode()
def token_divergence(reference_CV: Tensor, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence, float32 [C], and whether the most likely tokens are equal, bool [C], on the CPU.

    reference_CV, logits_CV: logits in any dtype, on any device.
    """
    log_p_CV = log_probabilities(reference_CV)
    log_q_CV = log_probabilities(logits_CV.to(reference_CV.device))
    # A token with probability 0 (-inf) in the reference adds p log p -> 0, but the formula would compute 0 * inf.
    difference_CV = torch.where(log_p_CV == -torch.inf, 0.0, log_p_CV - log_q_CV)
    return (log_p_CV.exp() * difference_CV).sum(-1).cpu(), (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).cpu()


def log_probabilities(logits_CV: Tensor) -> Tensor:
    """Return the log softmax in float32. logsumexp is more exact than torch's log_softmax (see `token_losses`)."""
    logits_CV = logits_CV.float()
    return logits_CV - logits_CV.logsumexp(-1, keepdim=True)


def mean_interval(values: Sequence[Tensor]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a mean over the tokens, or None for fewer than MIN_BLOCKS blocks.

    values: one finite value per token, [T] for each window.
    The interval uses Student's t over the means of blocks of BLOCK_TOKENS tokens, weighted by their length. For
    differences between two models on the same tokens, it is a paired interval: both models share the difficulty of the
    text, which cancels.
    """
    blocks = [block.double() for values_T in values for block in values_T.split(BLOCK_TOKENS)]
    if len(blocks) < MIN_BLOCKS:
        return None
    lengths_B = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
    means_B = torch.stack([block.mean() for block in blocks])
    mean = ((means_B * lengths_B).sum() / lengths_B.sum()).item()
    spread = ((means_B - mean) * lengths_B).square().sum().sqrt().item() / lengths_B.sum().item()
    error = spread * math.sqrt(len(blocks) / (len(blocks) - 1))
    half_width = student_975(len(blocks) - 1) * error
    return mean - half_width, mean + half_width


def student_975(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by a series around the normal quantile.

    The error is below 1 % from 3 degrees of freedom on.
    """
    z, n = NORMAL_975, degrees_of_freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
