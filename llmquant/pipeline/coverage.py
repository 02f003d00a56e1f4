"""How much of the decoder blocks' weights a plan quantizes, and what it leaves in 16 bit.

Counted is every parameter of two or more dimensions inside the decoder blocks: linears, experts that are stored as one
stack of matrices, routers, convolutions, and anything else. A user asks for all of it, except for what `--skip` or an
override leaves out, and except for what no engine loads quantized: routers and gates, convolution kernels, and
parameters that are less than 32 wide, such as Mamba's A_log, and hold no group of the smallest size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llmquant.models.blocks import is_experts
from llmquant.pipeline.names import kind_of
from llmquant.pipeline.plan import Plan
from llmquant.words import percentage

SMALLEST_WIDTH = 32
"""Elements beside the longest side that a parameter must have to count as one that could be quantized."""
LARGEST_SHARE = 0.01
"""Share of the blocks' weights that may stay in 16 bit, without being asked for, before it is an incident."""


@dataclass(frozen=True)
class Unquantized:
    """Parameters of one kind inside the decoder blocks that stay in 16 bit for the same reason."""

    kind: str
    """Name without its block: `mlp.experts.gate_up_proj`."""
    count: int
    """Number of parameters."""
    weights: int
    share: float
    """Their part of all weights of the blocks, 0 … 1."""
    reason: str
    is_asked_for: bool
    """Whether an option of the user, or a rule for all models, leaves them in 16 bit."""


@dataclass(frozen=True)
class Coverage:
    """What of the decoder blocks' weights is quantized."""

    share: float
    """Quantized weights / all weights in parameters of two and more dimensions, 0 … 1."""
    unquantized: tuple[Unquantized, ...]
    """The rest, largest share first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        entries = [asdict(entry) for entry in self.unquantized]
        return {"coverage": self.share, "unquantized": entries, "coverage_incident": self.incident()}

    def incident(self) -> str | None:
        """One line when clearly less is quantized than was asked for; else None."""
        left = [entry for entry in self.unquantized if not entry.is_asked_for]
        missed = sum(entry.share for entry in left)
        if missed <= LARGEST_SHARE:
            return None
        named = ", ".join(f"{entry.kind} ({entry.count} x, {percentage(entry.share)})" for entry in left[:4])
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        return (
            f"only {percentage(self.share)} are quantized; {percentage(missed)} stay in 16 bit unasked: {named}{more}"
        )


def coverage_of(plan: Plan) -> Coverage:
    """What a plan quantizes of the parameters inside the decoder blocks."""
    linears = {f"{linear.name}.weight": linear for linear in plan.linears}
    total = quantized = 0
    kept: dict[tuple[str, str, bool], list[int]] = {}
    for name, owner, parameter in _matrices(plan.skeleton.model, plan.block_names):
        total += parameter.numel()
        linear = linears.get(name)
        if linear is not None and linear.spec is not None:
            quantized += parameter.numel()
            continue
        if linear is not None:
            is_asked_for = linear.is_kept_by_rule or linear.is_left_by_user
            entry = kind_of(linear.name), linear.reason, is_asked_for
        else:
            entry = kind_of(name), *_reason(owner, parameter)
        kept.setdefault(entry, []).append(parameter.numel())
    unquantized = [
        Unquantized(kind, len(sizes), sum(sizes), sum(sizes) / total, reason, is_asked_for)
        for (kind, reason, is_asked_for), sizes in kept.items()
    ]
    return Coverage(quantized / max(total, 1), tuple(sorted(unquantized, key=lambda entry: -entry.weights)))


def _matrices(model: nn.Module, block_names: Sequence[str]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, parameter) of every parameter of two and more dimensions inside the blocks."""
    for block in block_names:
        for prefix, owner in model.get_submodule(block).named_modules(prefix=block):
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.ndim >= 2:
                    yield f"{prefix}.{leaf}", owner, parameter


def _reason(owner: nn.Module, parameter: Tensor) -> tuple[str, bool]:
    """Why a parameter that is no linear's weight stays in 16 bit, and whether that is so in every model."""
    kind = type(owner).__name__
    if isinstance(owner, _ConvNd):
        return "a convolution", True
    if "router" in kind.lower():
        return f"a router ({kind}), which no engine loads quantized", True
    if "expert" in kind.lower() or (parameter.ndim > 2 and is_experts(owner, parameter.shape[0])):
        return f"experts ({kind}), stored as one tensor and not as linears", False
    if parameter.numel() < SMALLEST_WIDTH * max(parameter.shape):
        return f"a small parameter of {kind}", True
    return f"a parameter of {kind}, which is not a linear", False
