"""Coverage: the fraction of the decoder blocks' weights that a plan quantizes, and the parameters it leaves in 16 bit.

All parameters with two or more dimensions inside the decoder blocks count: linears, experts that are stored as one
stack of matrices, routers, convolutions, and anything else. A parameter stays in 16 bit as intended if `--skip` or an
override excludes it, or if no engine loads it quantized. No engine loads quantized routers and gates, convolution
kernels, or parameters less than 32 wide; the last (such as Mamba's A_log) hold no group of the smallest size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llmquant.humanize import format_percentage
from llmquant.models.blocks import is_experts
from llmquant.module_names import kind_of
from llmquant.planning.plan import Plan

MIN_WIDTH = 32
"""Smallest width (number of elements / longest side) of a quantizable parameter."""
MAX_UNINTENDED_SHARE = 0.01
"""Share of the blocks' weights that may stay in 16 bit unintentionally without a fallback."""


@dataclass(frozen=True)
class UnquantizedParameters:
    """Parameters of one kind inside the decoder blocks that stay in 16 bit for the same reason."""

    kind: str
    """Name of the parameters without their block: `mlp.experts.gate_up_proj`."""
    count: int
    """Number of parameters."""
    weights: int
    """Number of weights in all of these parameters."""
    share: float
    """These weights / all weights of the blocks, 0 … 1."""
    reason: str
    """Why the parameters stay in 16 bit."""
    is_intended: bool
    """Whether an option of the user or a rule for all models leaves the parameters in 16 bit."""


@dataclass(frozen=True)
class Coverage:
    """The quantized share of the decoder blocks' weights, and the unquantized parameters."""

    share: float
    """Quantized weights / all weights of the blocks, in parameters with two or more dimensions, 0 … 1."""
    unquantized: tuple[UnquantizedParameters, ...]
    """The unquantized parameters, largest share first."""

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as plain values, for JSON."""
        entries = [asdict(entry) for entry in self.unquantized]
        return {"coverage": self.share, "unquantized": entries, "coverage_fallback": self.fallback()}

    def fallback(self) -> str | None:
        """Return a line for the report if clearly fewer weights are quantized than requested, else None."""
        unintended = [entry for entry in self.unquantized if not entry.is_intended]
        share = sum(entry.share for entry in unintended)
        if share <= MAX_UNINTENDED_SHARE:
            return None
        kinds = [f"{entry.kind} ({entry.count} x, {format_percentage(entry.share)})" for entry in unintended]
        more = f" and {len(kinds) - 4} more" if len(kinds) > 4 else ""
        return (
            f"only {format_percentage(self.share)} are quantized; {format_percentage(share)} stay in 16 bit "
            f"unintentionally: {', '.join(kinds[:4])}{more}"
        )


def coverage_of(plan: Plan) -> Coverage:
    """Return the coverage of a plan."""
    linears = {f"{linear.name}.weight": linear for linear in plan.linears}
    total = quantized = 0
    sizes_of: dict[tuple[str, str, bool], list[int]] = {}
    for name, owner, parameter in _matrices(plan.skeleton.model, plan.block_names):
        total += parameter.numel()
        linear = linears.get(name)
        if linear is not None and linear.spec is not None:
            quantized += parameter.numel()
            continue
        if linear is not None:
            is_intended = linear.is_never_quantized or linear.is_skipped_by_user
            entry = kind_of(linear.name), linear.reason, is_intended
        else:
            entry = kind_of(name), *_reason(owner, parameter)
        sizes_of.setdefault(entry, []).append(parameter.numel())
    unquantized = [
        UnquantizedParameters(kind, len(sizes), sum(sizes), sum(sizes) / total, reason, is_intended)
        for (kind, reason, is_intended), sizes in sizes_of.items()
    ]
    return Coverage(quantized / max(total, 1), tuple(sorted(unquantized, key=lambda entry: -entry.weights)))


def _matrices(model: nn.Module, block_names: Sequence[str]) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, module, parameter) for each parameter with two or more dimensions inside the blocks."""
    for block in block_names:
        for prefix, owner in model.get_submodule(block).named_modules(prefix=block):
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.ndim >= 2:
                    yield f"{prefix}.{leaf}", owner, parameter


def _reason(owner: nn.Module, parameter: Tensor) -> tuple[str, bool]:
    """Return why a parameter that is not the weight of a linear stays in 16 bit, and whether that is intended."""
    kind = type(owner).__name__
    if isinstance(owner, _ConvNd):
        return "a convolution", True
    if "router" in kind.lower():
        return f"a router ({kind}), which no engine loads quantized", True
    if "expert" in kind.lower() or (parameter.ndim > 2 and is_experts(owner, parameter.shape[0])):
        return f"experts ({kind}), stored as one tensor and not as linears", False
    if parameter.numel() < MIN_WIDTH * max(parameter.shape):
        return f"a small parameter of {kind}", True
    return f"a parameter of {kind}, which is not a linear", False
