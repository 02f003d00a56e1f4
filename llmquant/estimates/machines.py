"""GPU machines by name, for the predictions of `llmquant quantize --dry-run --machine NAME`.

Each rate has a source. A rate of a data sheet is multiplied by an efficiency, because no program reaches it. On H100
and H200, copies reached 0.90 of the bandwidth on the data sheet, and bfloat16 matmuls 0.80 of the rate on it; other
cards are assumed to reach the same fractions. The remaining efficiencies, the disk and the rate of hashing are guesses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmquant.errors import UserError

if TYPE_CHECKING:
    from llmquant.planning.plan import Plan

MAX_CARDS = 8
"""Largest number of cards of one machine."""
TERA, GIGA = 1e12, 1e9


class Rate(NamedTuple):
    """A rate per second, and where it comes from."""

    nominal: float
    """Bytes or floating-point operations per second."""
    source: str
    """Data sheet, measurement or guess."""
    efficiency: float = 1.0
    """Fraction of the nominal rate that a run is assumed to reach."""

    @property
    def per_second(self) -> float:
        """The rate that a run is assumed to reach."""
        return self.nominal * self.efficiency


def describe_rate(name: str, rate: Rate) -> str:
    """Return a rate, the fraction of it that is assumed, and its source, in words. name: its field in `Machine`."""
    unit = "FLOP/s" if name.endswith(("16", "32", "64")) else "B/s"
    factor, prefix = (TERA, "T") if rate.nominal >= TERA else (GIGA, "G")
    fraction = "" if rate.efficiency == 1 else f", {rate.efficiency:.0%} of it (guess)"
    return f"{rate.nominal / factor:.4g} {prefix}{unit} ({rate.source}){fraction}"


DISK_READ, DISK_WRITE = Rate(3 * GIGA, "guess: one NVMe disk"), Rate(1.5 * GIGA, "guess: one NVMe disk")
"""Rates of the disk of every machine in `MACHINES`."""
HASHING = Rate(1.0 * GIGA, "guess: SHA-256 on one core")
"""Rate of hashing of every machine in `MACHINES`."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One or several equal GPUs of one machine, with its disk and processor."""

    name: str
    """Name of the card in `MACHINES`."""
    cards: int = 1
    """Number of cards, each with a rank of its own."""
    memory_bytes: int
    """Memory of one card, by its data sheet."""
    memory: Rate
    """Bytes per second between one card and its memory."""
    bfloat16: Rate
    """Operations per second of bfloat16 matmuls with float32 sums, without sparsity."""
    float32: Rate
    """Operations per second of float32 matmuls, without TF32."""
    float64: Rate
    """Operations per second of float64 factorizations."""
    host: Rate
    """Bytes per second from main memory to a card."""
    link: Rate
    """Bytes per second from one card to another."""
    disk_read: Rate = DISK_READ
    """Bytes per second that the disk reads."""
    disk_write: Rate = DISK_WRITE
    """Bytes per second that the disk writes, until they are safe."""
    hashing: Rate = HASHING
    """Bytes per second of SHA-256 on one core."""

    @property
    def title(self) -> str:
        """The name with the number of cards, as in `8xh100`."""
        return self.name if self.cards == 1 else f"{self.cards}x{self.name}"

    @property
    def rates(self) -> dict[str, Rate]:
        """All rates by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Rate)}

    def to_dict(self) -> dict[str, Any]:
        """Return the name, the memory, and all rates with their sources, for JSON."""
        rates = {
            name: {"nominal": rate.nominal, "efficiency": rate.efficiency, "source": rate.source}
            for name, rate in self.rates.items()
        }
        return {"name": self.name, "cards": self.cards, "memory_bytes": self.memory_bytes, "rates_per_second": rates}


def _card(
    name: str,
    sheet: str,
    memory_gb: int,
    *,
    memory: float | Rate,
    bfloat16: float | Rate,
    float32: float,
    float64: Rate,
    host: float,
    link: float | None = None,
) -> Machine:
    """Return a card from the figures of its data sheet, or from measured rates.

    link: rate of NVLink in one direction; None for a card that reaches others over PCIe through main memory.
    """
    return Machine(
        name=name,
        memory_bytes=int(memory_gb * GIGA),
        memory=memory if isinstance(memory, Rate) else Rate(memory, sheet, 0.90),
        bfloat16=bfloat16 if isinstance(bfloat16, Rate) else Rate(bfloat16, sheet, 0.80),
        float32=Rate(float32, sheet, 0.7),
        float64=float64,
        host=Rate(host, sheet, 0.8),
        link=Rate(link, sheet, 0.7) if link else Rate(host, f"{sheet}; through main memory", 0.4),
    )


def _ada_float64(float32: float) -> Rate:
    return Rate(float32 / 64, "NVIDIA Ada architecture white paper: 1/64 of float32", 0.7)


_A100 = "NVIDIA A100 data sheet (SXM)"
_COPIES, _MATMULS = "measured: copies within the memory", "measured: large matmuls"
_HOPPER: dict[str, Any] = {
    "float32": 67 * TERA,
    "float64": Rate(67 * TERA, "NVIDIA H100 data sheet (SXM), tensor cores", 0.4),
    "host": 64 * GIGA,
    "link": 450 * GIGA,
}
_AMPERE: dict[str, Any] = {
    "bfloat16": 312 * TERA,
    "float32": 19.5 * TERA,
    "float64": Rate(19.5 * TERA, f"{_A100}, tensor cores", 0.4),
    "host": 32 * GIGA,
    "link": 300 * GIGA,
}
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _card(
            "h100",
            "NVIDIA H100 data sheet (SXM)",
            80,
            memory=Rate(3.0 * TERA, _COPIES),
            bfloat16=Rate(798 * TERA, _MATMULS),
            **_HOPPER,
        ),
        _card(
            "h200",
            "NVIDIA H200 data sheet (SXM)",
            141,
            memory=Rate(4.3 * TERA, _COPIES),
            bfloat16=Rate(788 * TERA, _MATMULS),
            **_HOPPER,
        ),
        _card("a100-80gb", _A100, 80, memory=2.039 * TERA, **_AMPERE),
        _card("a100-40gb", _A100, 40, memory=1.555 * TERA, **_AMPERE),
        _card(
            "l40s",
            "NVIDIA L40S data sheet",
            48,
            memory=0.864 * TERA,
            bfloat16=362 * TERA,
            float32=91.6 * TERA,
            float64=_ada_float64(91.6 * TERA),
            host=32 * GIGA,
        ),
        _card(
            "l4",
            "NVIDIA L4 data sheet",
            24,
            memory=0.300 * TERA,
            bfloat16=121 * TERA,
            float32=30.3 * TERA,
            float64=_ada_float64(30.3 * TERA),
            host=32 * GIGA,
        ),
        _card(
            "rtx4090",
            "NVIDIA Ada architecture white paper (GeForce RTX 4090)",
            24,
            memory=1.008 * TERA,
            bfloat16=165.2 * TERA,
            float32=82.6 * TERA,
            float64=_ada_float64(82.6 * TERA),
            host=32 * GIGA,
        ),
    )
}
"""Machines with one card, by name."""


def parse_machine(text: str) -> Machine:
    """Return the machine of a name such as `h100`, or of several cards such as `8xh100`.

    Raises UserError if there is no such machine.
    """
    match = re.fullmatch(r"(?:(\d{1,4})x)?(.+)", text.strip().lower())
    cards, name = (match[1], match[2]) if match else (None, text)
    if name not in MACHINES:
        raise UserError(
            f"machine '{text}': not one of {', '.join(MACHINES)}; use --machine h100, or --machine 8xh100 for 8 cards"
        )
    if not 1 <= int(cards or 1) <= MAX_CARDS:
        raise UserError(f"machine '{text}': has from 1 to {MAX_CARDS} cards; use --machine {MAX_CARDS}x{name}")
    return replace(MACHINES[name], cards=int(cards or 1))


def on_machine(plan: Plan, machine: Machine) -> Plan:
    """Return the plan as it would be on a machine: on its GPU, in the dtype of the stored model.

    Nothing is moved to a GPU. The options hold the samples of the rank with the most samples.
    """
    import torch

    from llmquant.models.skeleton import compute_dtype

    device = torch.device("cuda")
    skeleton = replace(plan.skeleton, device=device, dtype=compute_dtype(plan.dtype, device))
    options = replace(plan.options, num_samples=largest_share(plan.options.num_samples, machine.cards))
    return replace(plan, skeleton=skeleton, options=options)


def largest_share(num_samples: int, cards: int) -> int:
    """Return the number of samples of the rank that has most of them. Ranks divide whole pieces of the samples."""
    from llmquant.solver.division import pieces_of_rank
    from llmquant.solver.reduction import NUM_PIECES, piece_of

    counts = [0] * NUM_PIECES
    for sample in range(num_samples):
        counts[piece_of(sample, num_samples)] += 1
    return max(sum(counts[piece] for piece in pieces_of_rank(rank, cards)) for rank in range(cards))
