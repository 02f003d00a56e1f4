"""How far a model's predictions are from a reference's: Kullback-Leibler divergence and agreement of the first choice.

Steadier than a difference of perplexities: it compares whole distributions at every position, so errors that happen to
help cannot hide errors that harm. KL(reference || model) = sum_v p_v (log p_v - log q_v), nats, in float32.

Letters: W windows, L tokens of a window, T predicted positions (L - 1), V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.eval.perplexity import CHUNK_POSITIONS, OnWindow, Perplexity, summarize, window_logits, window_loss


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


def divergence(
    model: nn.Module, reference: nn.Module, windows_WL: Tensor, on_window: OnWindow | None = None
) -> Divergence:
    """Both models over int64 windows [W, L], window by window: the logits of one window are held, never more.

    Raises UserError where the vocabularies differ or a loss is not finite.
    """
    kls, agreements, model_losses, reference_losses = [], [], [], []
    for index, tokens_L in enumerate(windows_WL):
        reference_logits_TV = window_logits(reference, tokens_L)
        logits_TV = window_logits(model, tokens_L)
        if logits_TV.shape != reference_logits_TV.shape:
            raise UserError(
                f"vocabulary of {logits_TV.shape[1]} against {reference_logits_TV.shape[1]}: the two models predict "
                f"different tokens; compare a model with the one it was made from"
            )
        reference_losses.append(window_loss(reference_logits_TV, tokens_L, index))
        model_losses.append(window_loss(logits_TV, tokens_L, index))
        kl_T, same_T = token_divergence(reference_logits_TV, logits_TV)
        kls.append(kl_T)
        agreements.append(same_T)
        if on_window:
            on_window(index + 1, len(windows_WL))
    kl_T, same_T = torch.cat(kls).double(), torch.cat(agreements)
    if not kl_T.isfinite().all():
        raise UserError(
            f"KL divergence is {kl_T[~kl_T.isfinite()][0].item()} at a token: the model gives no chance to "
            f"what the reference holds possible; check that the vocabularies match"
        )
    seq_len = windows_WL.shape[1]
    return Divergence(
        kl_mean=kl_T.mean().item(),
        kl_median=kl_T.median().item(),
        kl_p99=kl_T.kthvalue(max(1, round(0.99 * len(kl_T)))).values.item(),
        top1_agreement=same_T.double().mean().item(),
        model=summarize(model_losses, seq_len),
        reference=summarize(reference_losses, seq_len),
    )


@torch.inference_mode()
def token_divergence(reference_TV: Tensor, logits_TV: Tensor, chunk: int = CHUNK_POSITIONS) -> tuple[Tensor, Tensor]:
    """From two sets of logits [T, V], any dtype and device: KL float32 [T], and bool [T], same first choice; on CPU."""
    kls, agreements = [], []
    for reference_CV, logits_CV in zip(reference_TV.split(chunk), logits_TV.split(chunk), strict=True):
        log_p_CV = log_probabilities(reference_CV)
        log_q_CV = log_probabilities(logits_CV.to(reference_CV.device))
        # A token that the reference rules out (-inf) adds nothing: p log p -> 0, not 0 * inf.
        difference_CV = torch.where(log_p_CV == -torch.inf, 0.0, log_p_CV - log_q_CV)
        kls.append((log_p_CV.exp() * difference_CV).sum(-1).cpu())
        agreements.append((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).cpu())
    return torch.cat(kls), torch.cat(agreements)


def log_probabilities(logits_CV: Tensor) -> Tensor:
    """log softmax in float32, by logsumexp: more exact than torch's log_softmax (see `window_loss`)."""
    logits_CV = logits_CV.float()
    return logits_CV - logits_CV.logsumexp(-1, keepdim=True)
