"""Perplexity by the protocol of the GPTQ paper (Frantar et al. 2022, section 4): lower is better.

The text is cut into windows of L tokens that do not overlap. In each window, every token except the first is predicted
from the tokens before it. The perplexity is exp(mean negative log likelihood of the scored tokens), computed in float32
for a model of any dtype. With a stride shorter than the window, a window scores only the tokens that no earlier window
has scored (`eval/data.py`).

Letters: W windows, L tokens of a window, T scored positions of a window (L - 1 without overlap), C positions of a
chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from llmquant.errors import UserError
from llmquant.eval.body_and_head import BodyAndHead
from llmquant.eval.data import first_scored_token

CHUNK_POSITIONS = 256
"""Number of positions whose logits are in memory at a time: in float32, 256 x 128k vocabulary x 4 bytes = 128 MiB."""

OnWindow = Callable[[int, int], None]
"""Function that is called with (windows done, all windows) after each window."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of a model on some windows, with its standard error."""

    perplexity: float
    """exp(mean_loss)."""
    standard_error: float | None
    """Standard error of the perplexity, from the spread of the windows' losses; None for a single window."""
    mean_loss: float
    """Mean negative log likelihood of a scored token, nats."""
    num_windows: int
    """Number of windows, W."""
    seq_len: int
    """Tokens of a window, L."""
    stride: int
    """Tokens from the start of a window to the start of the next; seq_len if they do not overlap."""
    num_tokens: int
    """Number of scored tokens: W * (L - 1) without overlap."""
    tokens_per_second: float = field(compare=False)
    """W * L, divided by the wall time of the model's forward passes."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Return the perplexity of a causal language model on int64 windows [W, L], run on the model's device.

    stride: the stride with which the windows were cut; None if they do not overlap. batch_size: number of windows that
    run together. Raises UserError if a loss is not finite, because an average over the other losses would hide it.
    """
    body_and_head = BodyAndHead(model)
    losses = []
    for scored in scored_windows(body_and_head, windows_WL, stride, batch_size):
        losses.append(window_loss(body_and_head, scored))
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    return summarize_losses(losses, windows_WL, stride, body_and_head.seconds)


@dataclass(frozen=True)
class ScoredWindow:
    """The positions of one window whose next tokens are scored."""

    index: int
    """Index of the window."""
    hidden_TD: Tensor
    """Hidden states in front of the head, in the model's dtype on its device."""
    targets_T: Tensor
    """Token that follows each position, int64 on the same device."""

    def chunks(self, chunk: int = CHUNK_POSITIONS) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (hidden_CD, targets_C) for at most `chunk` positions at a time."""
        return zip(self.hidden_TD.split(chunk), self.targets_T.split(chunk), strict=True)


def scored_windows(
    body_and_head: BodyAndHead, windows_WL: Tensor, stride: int | None, batch_size: int = 1
) -> Iterator[ScoredWindow]:
    """Run the body on int64 windows [W, L], `batch_size` of them at a time, and yield each window in order.

    Raises UserError if batch_size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1; use --batch-size 1")
    seq_len = windows_WL.shape[1]
    for start in range(0, len(windows_WL), batch_size):
        tokens_BL = windows_WL[start : start + batch_size]
        with torch.inference_mode():
            hidden_BLD = body_and_head.hidden_states(tokens_BL)
        for index, (tokens_L, hidden_LD) in enumerate(zip(tokens_BL, hidden_BLD, strict=True), start=start):
            first = first_scored_token(index, seq_len, stride or seq_len)
            # A token is predicted at the position before it; the prediction at the last position is not used.
            yield ScoredWindow(index, hidden_LD[first - 1 : -1], tokens_L[first:].to(hidden_LD.device))


@torch.inference_mode()
def window_loss(body_and_head: BodyAndHead, scored: ScoredWindow) -> Tensor:
    """Return the loss of every scored token of a window, nats, float64 [T] on the CPU.

    Raises UserError if a loss is not finite.
    """
    losses = [token_losses(body_and_head.logits(hidden_CD), targets_C) for hidden_CD, targets_C in scored.chunks()]
    return checked_loss(torch.cat(losses), scored.index)


@torch.inference_mode()
def token_losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the negative log likelihood of each target, nats, float32 [C], from logits in any dtype."""
    logits_CV = logits_CV.float()
    # logsumexp replaces cross_entropy, because torch adds up the terms of a softmax one by one on a CPU. With a
    # vocabulary of 49k tokens, that changes the mean loss by 1e-5.
    return logits_CV.logsumexp(-1) - logits_CV.gather(-1, targets_C[:, None])[:, 0]


def checked_loss(loss_T: Tensor, index: int) -> Tensor:
    """Return the losses of window `index` as float64 on the CPU. Raises UserError if their mean is not finite."""
    loss_T = loss_T.double().cpu()
    if not math.isfinite(mean := loss_T.mean().item()):
        raise UserError(
            f"window {index}: the loss is {mean}; the model's numbers overflow or its weights are damaged: "
            f"try --dtype float32, and check the checkpoint"
        )
    return loss_T


def summarize_losses(losses: list[Tensor], windows_WL: Tensor, stride: int | None, seconds: float) -> Perplexity:
    """Compute the perplexity from the token losses of each window, float64 [T].

    seconds: wall time of the model's forward passes.
    The standard error of the mean loss comes from the spread of the windows, weighted by their tokens. The spread of
    single tokens would be wrong, because the losses of neighbouring tokens are not independent. The delta method
    converts the standard error of the mean loss to that of the perplexity.
    """
    count, seq_len = windows_WL.shape
    tokens_W = torch.tensor([len(loss_T) for loss_T in losses], dtype=torch.float64)
    loss_W = torch.stack([loss_T.mean() for loss_T in losses])
    mean = ((loss_W * tokens_W).sum() / tokens_W.sum()).item()
    value = math.exp(mean)
    spread = ((loss_W - mean) * tokens_W).square().sum().sqrt().item() / tokens_W.sum().item()
    return Perplexity(
        perplexity=value,
        standard_error=value * spread * math.sqrt(count / (count - 1)) if count > 1 else None,
        mean_loss=mean,
        num_windows=count,
        seq_len=seq_len,
        stride=stride or seq_len,
        num_tokens=int(tokens_W.sum()),
        tokens_per_second=windows_WL.numel() / max(seconds, 1e-9),
    )
