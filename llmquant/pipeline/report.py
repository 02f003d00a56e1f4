"""What a run did: the error of every linear beside RTN's, what fell back, sizes, time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from llmquant.memory import peak_resident_bytes
from llmquant.pipeline.plan import LinearPlan, Plan

if TYPE_CHECKING:
    from llmquant.pipeline.calibration import CalibrationTokens
    from llmquant.pipeline.solve import Solved


@dataclass(frozen=True)
class LinearReport:
    """One linear, quantized."""

    name: str
    kind: str
    grid: str
    weights: int
    error: float
    """Squared output error relative to the squared output, over the calibration inputs."""
    rtn_error: float
    """The same for plain round-to-nearest on the same grid."""
    digest: str
    """SHA-256 of its codes, scales and zero-points, with which the finished checkpoint is compared."""


@dataclass(frozen=True)
class Incident:
    """Something that did not go as asked."""

    where: str
    what: str


@dataclass(frozen=True)
class Report:
    """A finished run."""

    out: Path
    recipe: dict[str, Any]
    format: str
    linears: tuple[LinearReport, ...]
    kept: dict[str, str]
    """Linears in 16 bit, and why."""
    incidents: tuple[Incident, ...]
    remarks: tuple[Incident, ...]
    """What is worth knowing and was to be expected: inputs that AWQ cannot scale, scales that did not help."""
    calibration: dict[str, Any] | None
    original_bytes: int
    output_bytes: int
    bits_per_weight: float
    """Stored bits per quantized weight."""
    seconds: dict[str, float]
    """Wall time of each step."""
    peak_bytes: int
    """Largest resident memory of the process."""
    peak_device_bytes: int
    """Largest memory allocated on the GPU; 0 without one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"out": str(self.out)}


@dataclass
class ReportBuilder:
    """Collects the report while the run goes on."""

    plan: Plan
    linears: list[LinearReport] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    remarks: list[Incident] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _calibration: CalibrationTokens | None = None

    def __post_init__(self) -> None:
        if self.plan.skeleton.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.plan.skeleton.device)
        inside = tuple(f"{name}." for name in self.plan.block_names)
        for linear in self.plan.linears:
            if linear.spec is not None and linear.reason:
                self.incident(linear.name, linear.reason)
            elif linear.spec is None and linear.name.startswith(inside) and not linear.reason.startswith("--"):
                self.incident(linear.name, f"left in 16 bit: {linear.reason}")

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of what happens inside to one step."""
        start = perf_counter()
        try:
            yield
        finally:
            if self.plan.skeleton.device.type == "cuda":
                torch.cuda.synchronize(self.plan.skeleton.device)
            self.seconds[step] = self.seconds.get(step, 0.0) + perf_counter() - start

    def calibration(self, tokens: CalibrationTokens) -> None:
        """Note where the calibration text came from."""
        self._calibration = tokens
        for incident in tokens.incidents:
            self.incident("calibration", incident)

    def incident(self, where: str, what: str) -> None:
        """Note something that did not go as asked."""
        self.incidents.append(Incident(where, what))

    def remark(self, where: str, what: str) -> None:
        """Note something worth knowing that is as it should be."""
        self.remarks.append(Incident(where, what))

    def linear(self, linear: LinearPlan, solved: Solved) -> None:
        """Note the result of one linear."""
        assert linear.spec is not None
        self.linears.append(
            LinearReport(
                linear.name,
                linear.kind,
                linear.spec.describe(),
                linear.out_features * linear.in_features,
                solved.error,
                solved.rtn_error,
                solved.weight.digest(),
            )
        )
        for what in solved.incidents:
            self.incident(linear.name, what)

    def note(self, linears: Iterable[LinearPlan]) -> dict[str, Any]:
        """What to remember of finished linears, so that a continued run reports them too."""
        names = {linear.name for linear in linears}
        return {
            "linears": [asdict(linear) for linear in self.linears if linear.name in names],
            "incidents": [asdict(incident) for incident in self.incidents if incident.where in names],
            "remarks": [
                asdict(remark)
                for remark in self.remarks
                if any(f"{name}.".startswith(f"{remark.where}.") for name in names)
            ],
        }

    def recall(self, note: dict[str, Any]) -> None:
        """Take over what an earlier run noted."""
        self.linears += [LinearReport(**linear) for linear in note.get("linears", [])]
        known = set(self.incidents)
        self.incidents += [new for entry in note.get("incidents", []) if (new := Incident(**entry)) not in known]
        self.remarks += [Incident(**entry) for entry in note.get("remarks", [])]

    def finish(self, out: Path) -> Report:
        """The report of the finished run."""
        device = self.plan.skeleton.device
        return Report(
            out=out,
            recipe=asdict(self.plan.recipe),
            format=self.plan.format.name,
            linears=tuple(self.linears),
            kept={linear.name: linear.reason for linear in self.plan.linears if linear.spec is None},
            incidents=tuple(self.incidents),
            remarks=tuple(self.remarks),
            calibration=None if self._calibration is None else self._calibration.audit(),
            original_bytes=self.plan.reader.total_bytes,
            output_bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
            bits_per_weight=self.plan.bits_per_weight,
            seconds=self.seconds,
            peak_bytes=peak_resident_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        )
