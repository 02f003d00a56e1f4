"""`llmquant eval` as one function: load the models, cut the text into windows, measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmquant.errors import UserError
from llmquant.eval.data import token_windows
from llmquant.eval.divergence import Divergence, divergence
from llmquant.eval.perplexity import Perplexity, perplexity
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.textdata import load_rows

DEFAULT_SEQ_LEN = 2048
"""Tokens of a window in the GPTQ paper."""

OnStep = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, and on what."""

    model: str
    against: str | None
    dataset: str
    device: str
    """Device the model ran on."""
    dtype: str
    """dtype of the model's activations."""
    perplexity: Perplexity
    """Of the model."""
    divergence: Divergence | None
    """Of the model from `against`; None without one."""

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "against": self.against,
            "dataset": self.dataset,
            "device": self.device,
            "dtype": self.dtype,
            "perplexity": self.perplexity.to_dict(),
            "divergence": self.divergence.to_dict() if self.divergence else None,
        }


def evaluate(
    model: str,
    against: str | None = None,
    *,
    dataset: str = "wikitext2",
    join: str = "auto",
    seq_len: int | None = None,
    num_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_step: OnStep = lambda what, done, total: None,
) -> Evaluation:
    """Perplexity of a checkpoint, quantized or not, and with `against` its divergence from that one.

    model, against: folders or hub ids. dataset, join: as `textdata.load_rows`, the test split.
    seq_len: tokens of a window; None for 2048, or the model's context where that is shorter.
    num_windows: None for all that the text fills.
    Raises UserError for what cannot be read, is too short, or gives numbers that are not finite.
    """
    paths = [resolve_model(name) for name in (model, against) if name is not None]
    rows = load_rows(dataset, split="test", join=join)
    from llmquant.runtime.load import load

    tokenizer = load_tokenizer(paths[-1])
    on_step("loading", 0, len(paths))
    loaded = []
    for path in paths:
        loaded.append(load(path, device=device, dtype=dtype).eval())
        on_step("loading", len(loaded), len(paths))
    context = min(context_length(m) for m in loaded)
    if seq_len is not None and seq_len > context:
        raise UserError(f"seq_len {seq_len}: the model's context is {context} tokens; use --seq-len {context} or less")
    length = seq_len or int(min(DEFAULT_SEQ_LEN, context))
    windows_WL = token_windows(tokenizer, rows.text, length, num_windows, source=dataset)

    def on_window(done: int, total: int) -> None:
        on_step("windows", done, total)

    compared = divergence(loaded[0], loaded[1], windows_WL, on_window) if against is not None else None
    parameter = next(p for p in loaded[0].parameters() if p.is_floating_point())
    return Evaluation(
        model=model,
        against=against,
        dataset=dataset,
        device=str(parameter.device),
        dtype=str(parameter.dtype).removeprefix("torch."),
        perplexity=compared.model if compared else perplexity(loaded[0], windows_WL, on_window),
        divergence=compared,
    )


def context_length(model: object) -> float:
    """Most tokens that the model's positions allow; infinite where its configuration sets no bound."""
    config = model.config.get_text_config()  # type: ignore[attr-defined]
    bound = getattr(config, "max_position_embeddings", None)
    return bound if bound else float("inf")
