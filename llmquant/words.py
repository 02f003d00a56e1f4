"""Numbers as people read them, the same on the terminal and in the report."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def short(value: float) -> str:
    """An error, three digits."""
    return f"{value:.3g}" if value < 1e-4 else f"{value:.5f}"[:7]


def clock(seconds: float) -> str:
    """Minutes and seconds, as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def spent(seconds: float) -> str:
    """A duration."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def percentage(share: float) -> str:
    """A share 0 … 1 in percent; what is only near none or all is never rounded to it."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    digits = 2 if share < 0.001 or share > 0.999 else 1
    return f"{100 * min(max(share, 0.0001), 0.9999):.{digits}f} %"
