"""How far a model's predictions are from a reference's: Kullback-Leibler divergence and agreement of the first choice.

Steadier than a difference of perplexities: it compares whole distributions at every position, so errors that happen to
help cannot hide errors that harm. KL(reference || model) = sum_v p_v (log p_v - log q_v), nats, in float32.

A reference is run once for any number of models: what it made of the windows is kept as hidden states in front of its
head, from which its logits come back when they are needed (`halves.py`). No logits are kept.

Letters: W windows, L tokens of a window, T scored positions of a window, C positions of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.eval.halves import Halves
from llmquant.eval.perplexity import (
    CHUNK_POSITIONS,
    OnWindow,
    Perplexity,
    checked,
    scored_windows,
    summarize,
    token_losses,
    window_loss,
)

BLOCK_TOKENS = 64
"""Neighbouring tokens whose mean counts as one observation: what a model gets wrong at a token it often gets wrong at
the next, so the tokens themselves are not independent."""
MIN_BLOCKS = 4
"""Observations without which no interval is given."""
NORMAL_975 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The model against the reference, on the same positions as their perplexities."""

    kl_mean: float
    """Mean of KL(reference || model) over the predicted tokens, nats per token. 0 = the same model."""
    kl_median: float
    """Median over the tokens: the typical position."""
    kl_p99: float
    """99th percentile: the bad positions."""
    top1_agreement: float
    """Share of positions where both hold the same token most likely, 0 … 1."""
    model: Perplexity
    """Perplexity of the model."""
    reference: Perplexity
    """Perplexity of the reference."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Recorded:
    """What a reference made of some windows: its predictions come back from these hidden states, chunk by chunk."""

    halves: Halves
    hidden: list[Tensor]
    """Of each window, in front of the head at the scored positions, [T, D] in the model's dtype, on the CPU."""
    perplexity: Perplexity


def record(
    reference: nn.Module,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> Recorded:
    """Run a reference over int64 windows [W, L] once, for any number of models; keeps T x D numbers a window."""
    halves = Halves(reference)
    hidden, losses = [], []
    for scored in scored_windows(halves, windows_WL, stride, batch_size):
        losses.append(window_loss(halves, scored))
        # A copy: a slice would keep the states of the whole batch.
        hidden.append(scored.hidden_TD.cpu().clone())
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    return Recorded(halves, hidden, summarize(losses, windows_WL, stride, halves.seconds))


@torch.inference_mode()
def divergence(
    model: nn.Module,
    reference: nn.Module | Recorded,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> Divergence:
    """A model against a reference on int64 windows [W, L]; the logits of a few positions are held, never more.

    reference: a model, or what `record` made of one on the same windows with the same stride.
    Raises UserError where the vocabularies differ or a loss is not finite.
    """
    if not isinstance(reference, Recorded):
        reference = record(reference, windows_WL, stride=stride, batch_size=batch_size)
    halves = Halves(model)
    kls, agreements, losses = [], [], []
    for scored in scored_windows(halves, windows_WL, stride, batch_size):
        loss_parts = []
        kept = reference.hidden[scored.index].split(CHUNK_POSITIONS)
        for (hidden_CD, targets_C), reference_CD in zip(scored.chunks(), kept, strict=True):
            logits_CV, reference_CV = halves.logits(hidden_CD), reference.halves.logits(reference_CD)
            if logits_CV.shape != reference_CV.shape:
                raise UserError(
                    f"vocabulary of {logits_CV.shape[1]} against {reference_CV.shape[1]}: the two models predict "
                    f"different tokens; compare a model with the one it was made from"
                )
            kl_C, same_C = token_divergence(reference_CV, logits_CV)
            kls.append(kl_C)
            agreements.append(same_C)
            loss_parts.append(token_losses(logits_CV, targets_C))
        losses.append(checked(torch.cat(loss_parts), scored.index))
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    kl_T, same_T = torch.cat(kls).double(), torch.cat(agreements)
    if not kl_T.isfinite().all():
        raise UserError(
            f"KL divergence is {kl_T[~kl_T.isfinite()][0].item()} at a token: the model gives no chance to "
            f"what the reference holds possible; check that the vocabularies match"
        )
    return Divergence(
        kl_mean=kl_T.mean().item(),
        kl_median=kl_T.median().item(),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        top1_agreement=same_T.double().mean().item(),
        model=summarize(losses, windows_WL, stride, halves.seconds),
        reference=reference.perplexity,
    )


@torch.inference_mode()
def token_divergence(reference_CV: Tensor, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """From two sets of logits [C, V], any dtype and device: KL float32 [C], and bool [C], same first choice; on CPU."""
    log_p_CV = log_probabilities(reference_CV)
    log_q_CV = log_probabilities(logits_CV.to(reference_CV.device))
    # A token that the reference rules out (-inf) adds nothing: p log p -> 0, not 0 * inf.
    difference_CV = torch.where(log_p_CV == -torch.inf, 0.0, log_p_CV - log_q_CV)
    return (log_p_CV.exp() * difference_CV).sum(-1).cpu(), (log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).cpu()


def log_probabilities(logits_CV: Tensor) -> Tensor:
    """log softmax in float32, by logsumexp: more exact than torch's log_softmax (see `token_losses`)."""
    logits_CV = logits_CV.float()
    return logits_CV - logits_CV.logsumexp(-1, keepdim=True)


def mean_interval(values: Sequence[Tensor]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean over the tokens of several windows, each [T], finite.

    Of differences between two models on the same tokens it is a paired interval: what makes a text hard for both
    cancels. Student's t over the means of blocks of BLOCK_TOKENS tokens, weighted by their length; None for too few
    blocks.
    """
    blocks = [block.double() for values_T in values for block in values_T.split(BLOCK_TOKENS)]
    if len(blocks) < MIN_BLOCKS:
        return None
    lengths_B = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
    means_B = torch.stack([block.mean() for block in blocks])
    mean = ((means_B * lengths_B).sum() / lengths_B.sum()).item()
    spread = ((means_B - mean) * lengths_B).square().sum().sqrt().item() / lengths_B.sum().item()
    error = spread * math.sqrt(len(blocks) / (len(blocks) - 1))
    half = student_975(len(blocks) - 1) * error
    return mean - half, mean + half


def student_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal one; within 1 % from 3 degrees on."""
    z, n = NORMAL_975, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
