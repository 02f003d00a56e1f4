"""The verdict on a quantized model, one of four words, from measurements on held-out texts.

Each text gives two perplexity ratios: the ratio on the text itself, and exp(KL), the ratio on text that is sampled from
the original (KL is the expected difference of the log-likelihoods there). The larger ratio decides. Errors that happen
to help can lower the first ratio, but not the second. The limits come from SmolLM2-135M, which is small and therefore
sensitive. Rounding to nearest gives it a ratio of 1.002 at 8 bits, 1.6 at 4 bits, 3.0 at 3 bits with groups
of 32, and 9.1 at 3 bits with groups of 64; GPTQ at 4 bits with 16 samples gives 1.20. At 3.0 the model still answers in
sentences, at 9.1 it repeats one word. At BROKEN, the model is as uncertain about every token as if it had four times as
many tokens to choose from.

The fixed text (`held_out.py`) decides the verdict. It is the same for all recipes. The calibration text can only make
the verdict worse, and only if its whole confidence interval lies in a worse band. So a few windows cannot change a
verdict by chance, and a model that is certainly bad on its calibration text is not called good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GOOD, SLIGHT, BROKEN = 1.05, 1.25, 4.0
"""The largest ratio that is good, the largest that is a slight loss, and the smallest at which a model is broken."""
BANDS = ("good", "slight loss", "clear loss", "broken")
"""The verdicts, best first."""
NOT_MEASURED = "not measured"
"""The verdict if there is no measurement."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measurements of both models on one held-out text. Intervals have 95 % confidence and are paired by token."""

    source: str
    """The name of the text: `held_out.FIXED_SOURCE`, or the preset or path of the calibration text."""
    num_windows: int
    """Number of windows."""
    seq_len: int
    """Tokens of a window."""
    num_tokens: int
    """Number of predicted tokens."""
    perplexity: float | None = None
    """Perplexity of the quantized model; None, like all values below, if a model's predictions are not finite."""
    original_perplexity: float | None = None
    """Perplexity of the original on the same tokens."""
    ratio: float | None = None
    """Perplexity as a multiple of the original's."""
    ratio_interval: tuple[float, float] | None = None
    """Confidence interval of `ratio`; None if there are too few tokens."""
    kl_mean: float | None = None
    """Mean of KL(original || quantized), nats per token."""
    kl_interval: tuple[float, float] | None = None
    """Confidence interval of `kl_mean`; None if there are too few tokens."""
    kl_p99: float | None = None
    """99th percentile of the KL divergence over the tokens."""
    changed_share: float | None = None
    """Fraction of tokens whose most likely prediction differs from the original's."""
    worst_window: int | None = None
    """Index of the window where perplexity grew most."""
    worst_ratio: float | None = None
    """Perplexity as a multiple of the original's in that window."""
    worst_opening: str = ""
    """The first words of that window; empty for the calibration text, which reports do not quote."""
    note: str = ""
    """A remark on the text, such as fewer windows than intended or unknown tokens; else empty."""

    @property
    def factor(self) -> float | None:
        """The larger of the two ratios, which decides the verdict."""
        return None if self.ratio is None or self.kl_mean is None else max(self.ratio, bounded_exp(self.kl_mean))

    @property
    def factor_interval(self) -> tuple[float, float] | None:
        """Confidence interval of `factor`; None if there are too few tokens."""
        if self.ratio_interval is None or self.kl_interval is None:
            return None
        low, high = (
            max(ratio, bounded_exp(kl)) for ratio, kl in zip(self.ratio_interval, self.kl_interval, strict=True)
        )
        return low, high


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The comparison of the finished model with the original."""

    verdict: str
    """One of BANDS, or NOT_MEASURED."""
    reason: str
    """The measurements behind the verdict, or the reason why there are none, in words."""
    may_be: str = ""
    """The worse band that the confidence interval reaches; empty if there is none."""
    texts: tuple[Measurement, ...] = ()
    """The fixed text first, then held-out windows of the calibration text, if there are any."""
    decided_by: int = 0
    """Index of the text that decides the verdict."""
    drift: tuple[float | None, ...] = ()
    """Relative squared distance of the hidden states from the original's after each block."""
    failure: str = ""
    """The reason why the quantized model does not run on this machine; empty if it does, or if that was not tried."""
    repetition: str = ""
    """How often the quantized model repeats itself and the original does not, in words; empty if it never does."""
    next_steps: tuple[tuple[str, str], ...] = ()
    """Options that this run did not use and that should help, best first, each with its effect."""

    @property
    def measured(self) -> Measurement | None:
        """The measurement that decides the verdict."""
        return self.texts[self.decided_by] if self.texts else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the quantized model on the deciding text; None, like those below, if nothing was measured."""
        return self.measured.perplexity if self.measured else None

    @property
    def original_perplexity(self) -> float | None:
        """Perplexity of the original on the same tokens."""
        return self.measured.original_perplexity if self.measured else None

    @property
    def kl_mean(self) -> float | None:
        """Mean of KL(original || quantized) on the deciding text, nats per token."""
        return self.measured.kl_mean if self.measured else None


def band_of(factor: float) -> str:
    """Return the verdict for a ratio."""
    return BANDS[0 if factor <= GOOD else 1 if factor <= SLIGHT else 2 if factor < BROKEN else 3]


def judge(texts: Sequence[Measurement], drift: tuple[float, ...] = ()) -> Verification:
    """Return the verdict on finite measurements. The first measurement is of the fixed text."""
    decided_by = max(range(len(texts)), key=lambda index: (BANDS.index(_certain_band(texts, index)), -index))
    text = texts[decided_by]
    assert text.factor is not None
    verdict = band_of(text.factor)
    upper = band_of(text.factor_interval[1]) if text.factor_interval else verdict
    return Verification(
        verdict=verdict,
        reason=describe(text),
        may_be=upper if BANDS.index(upper) > BANDS.index(verdict) else "",
        texts=tuple(texts),
        decided_by=decided_by,
        drift=drift,
    )


def _certain_band(texts: Sequence[Measurement], index: int) -> str:
    """Return the verdict for the first text; for another text, the best verdict that its interval reaches."""
    text = texts[index]
    assert text.factor is not None
    if index == 0:
        return band_of(text.factor)
    return band_of(text.factor_interval[0]) if text.factor_interval else BANDS[0]


def describe(text: Measurement) -> str:
    """Return the measurements on a text as one sentence without a full stop."""
    assert text.ratio is not None and text.kl_mean is not None and text.changed_share is not None
    interval = ""
    if text.ratio_interval:
        interval = f" (95 % interval {format_ratio(text.ratio_interval[0])} to {format_ratio(text.ratio_interval[1])})"
    parts = [
        f"perplexity {format_ratio(text.ratio)} times the original's{interval}",
        f"KL divergence {text.kl_mean:.4f} (a factor of {format_ratio(bounded_exp(text.kl_mean))})",
        f"top-1 token changed at {text.changed_share:.1%} of tokens",
    ]
    if text.worst_ratio is not None and text.num_windows > 1:
        opening = f" (“{text.worst_opening} …”)" if text.worst_opening else ""
        parts.append(f"worst of {text.num_windows} windows {format_ratio(text.worst_ratio)} times{opening}")
    sentence = ", ".join(parts) + f"; on {text.num_tokens:,} tokens of {text.source}"
    return sentence + (f", {text.note}" if text.note else "")


def format_ratio(value: float) -> str:
    """Format a ratio: three decimals, or three digits if it is large."""
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def bounded_exp(nats: float) -> float:
    """Return exp(nats), bounded so that it does not overflow."""
    return math.exp(min(nats, 700.0))
