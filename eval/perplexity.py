"""Perplexity by the protocol of the GPTQ paper (Frantar et al. 2022, section 4): lower is better.

Windows of L tokens that do not overlap; in each, every token but the first is predicted from those before it in the
window. Perplexity = exp(mean over windows of the mean negative log likelihood), in float32 whatever the model runs in.

Letters: W windows, L tokens of a window, T predicted positions (L - 1), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmquant.errors import UserError

CHUNK_POSITIONS = 256
"""Positions whose logits are in float32 at one time: 256 x 128k vocabulary x 4 bytes = 128 MiB."""

OnWindow = Callable[[int, int], None]
"""Called with (windows done, windows in all) after each window."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The result, and how sure it is."""

    perplexity: float
    """exp(mean_loss)."""
    standard_error: float | None
    """Of the perplexity, from the spread of the windows' losses; None for a single window."""
    mean_loss: float
    """Mean negative log likelihood of a token, nats."""
    num_windows: int
    """W."""
    seq_len: int
    """L."""
    num_tokens: int
    """Tokens predicted, W * (L - 1)."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, for JSON."""
        return asdict(self)


def perplexity(model: nn.Module, windows_WL: Tensor, on_window: OnWindow | None = None) -> Perplexity:
    """Perplexity of a causal language model on int64 windows [W, L], run one window at a time on the model's device.

    Raises UserError where a loss is not finite: an average over the rest would hide it.
    """
    losses = []
    for index, tokens_L in enumerate(windows_WL):
        losses.append(window_loss(window_logits(model, tokens_L), tokens_L, index))
        if on_window:
            on_window(index + 1, len(windows_WL))
    return summarize(losses, seq_len=windows_WL.shape[1])


@torch.inference_mode()
def window_logits(model: nn.Module, tokens_L: Tensor) -> Tensor:
    """[T, V] in the model's dtype: row t predicts token t + 1. The prediction after the last token is not used."""
    device = next(model.parameters()).device
    return model(input_ids=tokens_L[None].to(device), use_cache=False).logits[0, :-1]


@torch.inference_mode()
def window_loss(logits_TV: Tensor, tokens_L: Tensor, index: int, chunk: int = CHUNK_POSITIONS) -> float:
    """Mean negative log likelihood of tokens 1 … L - 1 given logits_TV, nats; `index` names the window in an error."""
    targets_T = tokens_L[1:].to(logits_TV.device)
    total = torch.zeros((), dtype=torch.float64)
    for logits_CV, targets_C in zip(logits_TV.split(chunk), targets_T.split(chunk), strict=True):
        logits_CV = logits_CV.float()
        # logsumexp, not cross_entropy: on CPU torch sums a softmax one by one, which with 49k tokens in the vocabulary
        # moves the mean loss by 1e-5.
        losses_C = logits_CV.logsumexp(-1) - logits_CV.gather(-1, targets_C[:, None])[:, 0]
        total += losses_C.double().sum().cpu()
    loss = total.item() / len(targets_T)
    if not math.isfinite(loss):
        raise UserError(
            f"window {index}: the loss is {loss}; the model's numbers overflow or its weights are damaged: "
            f"try --dtype float32, and check the checkpoint"
        )
    return loss


def summarize(losses: list[float], seq_len: int) -> Perplexity:
    """From each window's mean loss; the error is that of their mean, carried through exp (delta method).

    The spread of windows is used, not of tokens: the losses of neighbouring tokens are not independent.
    """
    losses_W = torch.tensor(losses, dtype=torch.float64)
    mean = losses_W.mean().item()
    value = math.exp(mean)
    count = len(losses)
    return Perplexity(
        perplexity=value,
        standard_error=value * losses_W.std().item() / math.sqrt(count) if count > 1 else None,
        mean_loss=mean,
        num_windows=count,
        seq_len=seq_len,
        num_tokens=count * (seq_len - 1),
    )
