"""Perplexity by the protocol of the GPTQ paper (Frantar et al. 2022, section 4): lower is better.

Windows of L tokens that do not overlap; in each, every token but the first is predicted from those before it in the
window. Perplexity = exp(mean negative log likelihood of the scored tokens), in float32 whatever the model runs in.
With a stride shorter than the window, a window scores only tokens that no window before has scored (`eval/data.py`).

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
from llmquant.eval.data import first_target
from llmquant.eval.halves import Halves

CHUNK_POSITIONS = 256
"""Positions whose logits are there at one time: in float32, 256 x 128k vocabulary x 4 bytes = 128 MiB."""

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
    stride: int
    """Tokens from the beginning of a window to that of the next; seq_len where they do not overlap."""
    num_tokens: int
    """Tokens predicted and scored: W * (L - 1) without overlap."""
    tokens_per_second: float = field(compare=False)
    """Tokens that ran through the model, W * L, by the wall time of its forward passes."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, for JSON."""
        return asdict(self)


def perplexity(
    model: nn.Module,
    windows_WL: Tensor,
    on_window: OnWindow | None = None,
    *,
    stride: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity of a causal language model on int64 windows [W, L], run on the model's device.

    stride: by which the windows were cut; None where they do not overlap. batch_size: windows that run side by side.
    Raises UserError where a loss is not finite: an average over the rest would hide it.
    """
    halves = Halves(model)
    losses = []
    for scored in scored_windows(halves, windows_WL, stride, batch_size):
        losses.append(window_loss(halves, scored))
        if on_window:
            on_window(scored.index + 1, len(windows_WL))
    return summarize(losses, windows_WL, stride, halves.seconds)


@dataclass(frozen=True)
class ScoredWindow:
    """The positions of one window that are scored."""

    index: int
    """Of the window."""
    hidden_TD: Tensor
    """In front of the head, on the model's device."""
    targets_T: Tensor
    """int64, the token that follows each position; on the same device."""

    def chunks(self, chunk: int = CHUNK_POSITIONS) -> Iterator[tuple[Tensor, Tensor]]:
        """(hidden_CD, targets_C) of a few positions at a time."""
        return zip(self.hidden_TD.split(chunk), self.targets_T.split(chunk), strict=True)


def scored_windows(
    halves: Halves, windows_WL: Tensor, stride: int | None, batch_size: int = 1
) -> Iterator[ScoredWindow]:
    """The windows in order, `batch_size` of them run side by side."""
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1; use --batch-size 1")
    seq_len = windows_WL.shape[1]
    for start in range(0, len(windows_WL), batch_size):
        tokens_BL = windows_WL[start : start + batch_size]
        with torch.inference_mode():
            hidden_BLD = halves.hidden(tokens_BL)
        for index, (tokens_L, hidden_LD) in enumerate(zip(tokens_BL, hidden_BLD, strict=True), start=start):
            first = first_target(index, seq_len, stride or seq_len)
            # What the position before a token makes of it is that token's prediction; that of the last is not used.
            yield ScoredWindow(index, hidden_LD[first - 1 : -1], tokens_L[first:].to(hidden_LD.device))


@torch.inference_mode()
def window_loss(halves: Halves, scored: ScoredWindow) -> Tensor:
    """The loss of every scored token of a window, nats, float64 [T] on the CPU; UserError where one is not finite."""
    parts = [token_losses(halves.logits(hidden_CD), targets_C) for hidden_CD, targets_C in scored.chunks()]
    return checked(torch.cat(parts), scored.index)


@torch.inference_mode()
def token_losses(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Negative log likelihood of each target, nats, float32 [C], from logits in any dtype."""
    logits_CV = logits_CV.float()
    # logsumexp, not cross_entropy: on CPU torch sums a softmax one by one, which with 49k tokens in the vocabulary
    # moves the mean loss by 1e-5.
    return logits_CV.logsumexp(-1) - logits_CV.gather(-1, targets_C[:, None])[:, 0]


def checked(loss_T: Tensor, index: int) -> Tensor:
    """The losses of window `index` as float64 on the CPU; UserError where their mean is not finite."""
    loss_T = loss_T.double().cpu()
    if not math.isfinite(mean := loss_T.mean().item()):
        raise UserError(
            f"window {index}: the loss is {mean}; the model's numbers overflow or its weights are damaged: "
            f"try --dtype float32, and check the checkpoint"
        )
    return loss_T


def summarize(losses: list[Tensor], windows_WL: Tensor, stride: int | None, seconds: float) -> Perplexity:
    """From the token losses of each window, float64 [T]; `seconds` is what the model took for all of them.

    The error is that of the mean of the windows, weighted by their tokens, carried through exp (delta method). The
    spread of windows is used, not of tokens: the losses of neighbouring tokens are not independent.
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
