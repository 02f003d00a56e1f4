"""Numbers and dtypes as text, written the same way on the terminal and in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def format_bytes(num_bytes: float) -> str:
    """Return a number of bytes with three digits and a unit: `1.23 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            value = num_bytes / scale
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes:.0f} B"


def format_error(error: float) -> str:
    """Return a relative error in seven characters, or with three digits if it is below 1e-4."""
    return f"{error:.3g}" if error < 1e-4 else f"{error:.5f}"[:7]


def format_clock(seconds: float) -> str:
    """Return seconds as `m:ss`, or as `h:mm:ss` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_seconds(seconds: float) -> str:
    """Return seconds with their unit, and with one decimal below 10 s."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def format_percentage(fraction: float) -> str:
    """Return a fraction 0 … 1 in percent. Only exactly 0 and 1 are written as 0 % and 100 %."""
    if fraction in (0.0, 1.0):
        return f"{100 * fraction:.0f} %"
    digits = 2 if fraction < 0.001 or fraction > 0.999 else 1
    return f"{100 * min(max(fraction, 0.0001), 0.9999):.{digits}f} %"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without its module: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
