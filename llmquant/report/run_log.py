"""The record that a run keeps, from which its report is made."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psutil
import torch

from llmquant.checkpoints.manifest import read_manifest
from llmquant.humanize import dtype_name
from llmquant.memory import peak_resident_bytes
from llmquant.planning.coverage import coverage_of
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.report.histograms import NUM_LINEARS, histograms
from llmquant.report.schema import LinearReport, Message, Report, SampleTexts
from llmquant.report.verdict import NOT_MEASURED, Verification
from llmquant.version import __version__

if TYPE_CHECKING:
    from llmquant.data.calibration import CalibrationTokens

LIBRARIES = ("torch", "transformers", "safetensors")
"""Libraries whose versions a report lists, beside Python and llmquant."""
NOT_VERIFIED = Verification(verdict=NOT_MEASURED, reason="verification was switched off")
NO_SAMPLE_TEXTS = SampleTexts(note="no sample texts: verification was switched off")


@dataclass
class RunLog:
    """The contents of the report, collected during a run."""

    plan: Plan
    model: str
    command: str = ""
    verification: Verification = NOT_VERIFIED
    sample_texts: SampleTexts = NO_SAMPLE_TEXTS
    linears: list[LinearReport] = field(default_factory=list)
    fallbacks: list[Message] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    _nested_seconds: list[float] = field(default_factory=lambda: [0.0])
    _calibration: CalibrationTokens | None = None
    _allocation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.plan.skeleton.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.plan.skeleton.device)
        # One fallback for all weights of the blocks replaces a fallback for each linear.
        missed = coverage_of(self.plan).fallback()
        if missed:
            self.fallback("block weights", missed)
        for linear in self.plan.linears:
            if linear.spec is not None and linear.reason:
                self.fallback(linear.name, linear.reason)
                continue
            is_expected = linear.is_skipped_by_user or linear.is_never_quantized
            if linear.spec is None and linear.block_name and not is_expected and not missed:
                self.fallback(linear.name, f"left in 16 bit: {linear.reason}")

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of a `with` block to a step, without the time of steps inside it, and record its memory."""
        start, peak_before = perf_counter(), peak_resident_bytes()
        self._nested_seconds.append(0.0)
        try:
            yield
        finally:
            is_outermost = len(self._nested_seconds) == 2
            # The queue of a GPU keeps running between inner blocks; waiting for it once, at the end, is enough.
            if is_outermost and self.plan.skeleton.device.type == "cuda":
                torch.cuda.synchronize(self.plan.skeleton.device)
            elapsed, nested = perf_counter() - start, self._nested_seconds.pop()
            self._nested_seconds[-1] += elapsed
            self.seconds[step] = self.seconds.get(step, 0.0) + elapsed - nested
            if is_outermost:
                peak = peak_resident_bytes()
                used = peak if peak > peak_before else psutil.Process().memory_info().rss
                self.memory[step] = max(self.memory.get(step, 0), used)

    def calibration(self, tokens: CalibrationTokens) -> None:
        """Record the calibration text with its fallbacks and notes."""
        self._calibration = tokens
        for fallback in tokens.fallbacks:
            self.fallback("calibration", fallback)
        for note in tokens.notes:
            self.note("calibration", note)

    @property
    def num_windows(self) -> float:
        """Number of windows of the calibration text; infinite if none is used."""
        return math.inf if self._calibration is None else self._calibration.num_windows_available

    def set_allocation(self, plan: Plan, allocation: dict[str, Any]) -> None:
        """Replace the plan by the one whose grids were chosen for a budget, and record the choice."""
        self.plan, self._allocation = plan, allocation

    def fallback(self, where: str, what: str) -> None:
        """Record a deviation from the request."""
        self.fallbacks.append(Message(where, what))

    def note(self, where: str, what: str) -> None:
        """Record an expected fact that is useful to know."""
        self.notes.append(Message(where, what))

    def linear(self, linear: LinearReport, fallbacks: Iterable[str] = ()) -> None:
        """Record the result of one linear, with its fallbacks."""
        self.linears.append(linear)
        for what in fallbacks:
            self.fallback(linear.name, what)

    def record_of(self, linears: Iterable[LinearPlan]) -> dict[str, Any]:
        """Return the recorded results and messages of finished linears, for a continued run."""
        names = {linear.name for linear in linears}
        return {
            "linears": [asdict(linear) for linear in self.linears if linear.name in names],
            "fallbacks": [asdict(fallback) for fallback in self.fallbacks if fallback.where in names],
            "notes": [
                asdict(note) for note in self.notes if any(f"{name}.".startswith(f"{note.where}.") for name in names)
            ],
        }

    def restore(self, note: dict[str, Any]) -> None:
        """Add the results and messages that an earlier run recorded."""
        self.linears += [LinearReport(**linear) for linear in note.get("linears", [])]
        for noted, entries in ((self.fallbacks, "fallbacks"), (self.notes, "notes")):
            known = set(noted)
            noted += [new for entry in note.get(entries, []) if (new := Message(**entry)) not in known]

    def to_report(self, folder: Path, out: Path) -> Report:
        """Return the report of a finished run. folder: the finished folder, which becomes OUT."""
        device = self.plan.skeleton.device
        worst = sorted(self.linears, key=lambda linear: -linear.error)[:NUM_LINEARS]
        manifest = read_manifest(folder)
        coverage = coverage_of(self.plan)
        return Report(
            model=self.model,
            out=out,
            command=self.command,
            finished=datetime.now().astimezone().isoformat(timespec="seconds"),
            machine=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
            versions={"llmquant": __version__, "python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
            recipe=asdict(self.plan.recipe),
            format=self.plan.format.name,
            dtype=dtype_name(self.plan.dtype),
            verification=self.verification,
            linears=tuple(self.linears),
            unquantized_linears={linear.name: linear.reason for linear in self.plan.linears if linear.spec is None},
            fallbacks=tuple(self.fallbacks),
            notes=tuple(self.notes),
            calibration=None if self._calibration is None else self._calibration.summary(),
            original_bytes=self.plan.reader.total_bytes,
            output_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            bits_per_weight=self.plan.bits_per_weight,
            seconds=self.seconds,
            memory=self.memory,
            peak_bytes=peak_resident_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            histograms=histograms(folder, self.plan, [linear.name for linear in worst]),
            sample_texts=self.sample_texts.texts,
            sample_texts_note=self.sample_texts.note,
            original_hashes=manifest["request"]["model"],
            hashes={name: record["sha256"] for name, record in manifest["files"].items()},
            allocation=self._allocation,
            coverage=coverage.share,
            unquantized_parameters=coverage.unquantized,
        )


def processor_name() -> str:
    """Return the name of the processor and the number of threads that PyTorch uses."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
