"""How good a quantized model is, in one of four words, from what was measured on some texts.

Two factors count on a text, both of perplexity: its growth there, and exp(KL), its growth on text that the original
itself would write (KL is the expected difference of the two log-likelihoods there). The larger one decides; errors that
happen to help can lower the first, but not the second. The limits come from SmolLM2-135M, which is small and therefore
easily hurt. Rounding to nearest leaves it a factor of 1.002 in 8 bits, 1.6 in 4 bits, 3.0 in 3 bits with groups of 32,
and 9.1 in 3 bits with groups of 64; GPTQ in 4 bits with 16 samples leaves 1.20. At 3.0 the model still answers in
sentences, at 9.1 it repeats one word. At BROKEN a model is, at every token, as unsure as if it had four times as many
tokens to choose from.

The verdict is that of the fixed text, which is the same for all recipes and long enough. The calibration text can only
make it worse, and only if it is certain to be: its whole interval lies in a worse band. So a few windows of it cannot
change a verdict by chance, and no model is called good that is certainly bad at what it was calibrated for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GOOD, SLIGHT, BROKEN = 1.05, 1.25, 4.0
"""Largest factor that is good, largest one that is a slight loss, and the one from which on a model is broken."""
BANDS = ("good", "slight loss", "clear loss", "broken")
"""The verdicts, best first."""
NOT_MEASURED = "not measured"
"""The verdict if there is no measurement."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Both models on one text that calibration has not seen. Intervals: 95 % confidence, paired token by token."""

    source: str
    """The name of the text: `held_out.FIXED_SOURCE`, or the preset or path of the calibration text."""
    num_windows: int
    seq_len: int
    num_tokens: int
    """Predicted tokens."""
    perplexity: float | None = None
    """Perplexity of the quantized model; None, as all below, if a model's predictions are not finite."""
    original_perplexity: float | None = None
    ratio: float | None = None
    """Perplexity as a multiple of the original's."""
    ratio_interval: tuple[float, float] | None = None
    """None if there are too few tokens for one."""
    kl_mean: float | None = None
    """Mean of KL(original || quantized), nats per token."""
    kl_interval: tuple[float, float] | None = None
    """None if there are too few tokens for one."""
    kl_p99: float | None = None
    """99th percentile of the KL divergence over the tokens."""
    changed_share: float | None = None
    """Share of tokens at which the most likely token is another one than the original's."""
    worst_window: int | None = None
    """Index of the window where perplexity grew most."""
    worst_ratio: float | None = None
    """Perplexity as a multiple of the original's in that window."""
    worst_opening: str = ""
    """The first words of that window; empty for a text of the user's."""
    note: str = ""
    """What is unusual about the text: fewer windows than intended, or tokens that are unknown; else empty."""

    @property
    def factor(self) -> float | None:
        """The larger of the two factors that a verdict rests on."""
        return None if self.ratio is None or self.kl_mean is None else max(self.ratio, exp(self.kl_mean))

    @property
    def factor_interval(self) -> tuple[float, float] | None:
        """The interval of `factor`."""
        if self.ratio_interval is None or self.kl_interval is None:
            return None
        low, high = (max(ratio, exp(kl)) for ratio, kl in zip(self.ratio_interval, self.kl_interval, strict=True))
        return low, high


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The finished model against the original."""

    verdict: str
    """One of BANDS, or NOT_MEASURED."""
    reason: str
    """The reason, in words."""
    may_be: str = ""
    """A worse band that the interval reaches into; empty if there is none."""
    texts: tuple[Measurement, ...] = ()
    """The fixed text first, then the calibration text's own windows, if any are left."""
    decided_by: int = 0
    """Index of the text that the verdict rests on."""
    drift: tuple[float, ...] = ()
    """Behind each block: squared distance of the hidden states from the original's, relative to theirs."""
    failure: str = ""
    """Why the quantized model does not run on this machine; empty if it does, or if that was not tried."""
    repetition: str = ""
    """How often the quantized model repeats itself and the original does not, in words; empty if it never does."""
    next_steps: tuple[tuple[str, str], ...] = ()
    """Options that this run did not use and that should help, best first, each with its effect."""

    @property
    def measured(self) -> Measurement | None:
        """The measurement that the verdict rests on."""
        return self.texts[self.decided_by] if self.texts else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the quantized model on that text; None, as those below, if nothing was measured."""
        return self.measured.perplexity if self.measured else None

    @property
    def original_perplexity(self) -> float | None:
        """Perplexity of the original on the same tokens."""
        return self.measured.original_perplexity if self.measured else None

    @property
    def kl_mean(self) -> float | None:
        """Mean of KL(original || quantized) on that text, nats per token."""
        return self.measured.kl_mean if self.measured else None


def band_of(factor: float) -> str:
    """The band that a factor lies in."""
    return BANDS[0 if factor <= GOOD else 1 if factor <= SLIGHT else 2 if factor < BROKEN else 3]


def judge(texts: Sequence[Measurement], drift: tuple[float, ...] = ()) -> Verification:
    """The verdict on finite measurements, the fixed text first."""
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
    """The band that the first text is in; for another text, the best one that its interval reaches into."""
    text = texts[index]
    assert text.factor is not None
    if index == 0:
        return band_of(text.factor)
    return band_of(text.factor_interval[0]) if text.factor_interval else BANDS[0]


def describe(text: Measurement) -> str:
    """What was measured on a text, in one sentence without its end."""
    assert text.ratio is not None and text.kl_mean is not None and text.changed_share is not None
    interval = ""
    if text.ratio_interval:
        interval = f" (95 % interval {factor(text.ratio_interval[0])} to {factor(text.ratio_interval[1])})"
    parts = [
        f"perplexity {factor(text.ratio)} times the original's{interval}",
        f"KL divergence {text.kl_mean:.4f} (a factor of {factor(exp(text.kl_mean))})",
        f"top choice changed at {text.changed_share:.1%} of tokens",
    ]
    if text.worst_ratio is not None and text.num_windows > 1:
        opening = f" (“{text.worst_opening} …”)" if text.worst_opening else ""
        parts.append(f"worst of {text.num_windows} windows {factor(text.worst_ratio)} times{opening}")
    sentence = ", ".join(parts) + f"; on {text.num_tokens:,} tokens of {text.source}"
    return sentence + (f", {text.note}" if text.note else "")


def factor(value: float) -> str:
    """A multiple, for people: three decimals, fewer for a large one."""
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def exp(nats: float) -> float:
    """exp, without an overflow."""
    return math.exp(min(nats, 700.0))
