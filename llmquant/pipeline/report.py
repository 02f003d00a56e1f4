"""What a run did, as plain data: `quantize_report.json` inside OUT, and the `Report` it is read from and written to.

The file holds one JSON object: the fields of `Report` by name, nested as the classes here and their docstrings say, and

    schema   SCHEMA, the version of this description: raised when a field changes its meaning or goes. New fields may
             come without; a reader takes what it knows. 2: `rtn_error` is of the original weight also under AWQ,
             and linears tell their `rows`, `rtn_rows` and `correction_share`. 3: `verification` has its numbers
             text by text (`texts`), with intervals, and a verdict of four bands. Schema 2 is still read: its verdict
             keeps its words, and its numbers become those of one text.

Numbers are plain: bytes, seconds, shares from 0 to 1, errors squared and relative, divergences in nats per token. What
was not measured is null; nothing is NaN or infinite. Times and memory differ from run to run, so this file and the page
that is made of it (`page.py`) are the two that a repeated run does not write to the same bytes, and neither has a hash
in OUT's manifest.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import psutil
import torch

from llmquant import __version__
from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.durable import write_atomically
from llmquant.checkpoints.header import parse_json
from llmquant.checkpoints.manifest import REPORT_JSON, read_manifest
from llmquant.errors import UserError
from llmquant.memory import peak_resident_bytes
from llmquant.paths import check_readable
from llmquant.pipeline.coverage import Unquantized, coverage_of
from llmquant.pipeline.histograms import NUM_LINEARS, Histogram, histograms
from llmquant.pipeline.plan import LinearPlan, Plan
from llmquant.pipeline.samples import Sample, Samples
from llmquant.pipeline.verdict import NOT_MEASURED, Measurement, Verification
from llmquant.spec import QuantSpec

if TYPE_CHECKING:
    from llmquant.pipeline.calibration import CalibrationTokens
    from llmquant.pipeline.solve import Solved

SCHEMA = 3
READABLE = (2, SCHEMA)
"""Schemas that are read."""
LIBRARIES = ("torch", "transformers", "safetensors")
"""Whose versions a report names, beside Python's and ours."""


InputPeaks = tuple[float | None, float | None]
"""`LinearReport.input_peak` and `unscaled_input_peak`."""


@dataclass(frozen=True)
class LinearReport:
    """One linear, quantized."""

    name: str
    kind: str
    grid: str
    weights: int
    rows: int
    """Its outputs: each is a row of the weight."""
    error: float
    """Squared error of the output relative to the squared output, over the calibration inputs; against the weight that
    makes up for the error before it, where the recipe corrects its targets."""
    rtn_error: float
    """The same for plain round-to-nearest of the original weight on the same grid: without AWQ's scales, on the inputs
    as they were before AWQ divided them."""
    digest: str
    """SHA-256 of its codes, scales and zero-points, with which the finished checkpoint is compared."""
    rtn_rows: int | None = None
    """Rows where nothing that was searched measured better than plain rounding, and that hold its codes (of the weight
    with AWQ's scales, where there are any); None where nothing was searched."""
    correction_share: float | None = None
    """How much of the correction for the error before it was taken, 0 … 1: what holds on text that the correction was
    not fitted to. None where there was nothing to correct."""
    feedback_left: float | None = None
    """What feedback between its rows leaves of what their errors cost the block, or the predictions where the recipe's
    `output_feedback` is network; judged by other text. None where rows do not make up for each other."""
    input_peak: float | None = None
    """Its loudest input channel against the middle one (root mean squares), as the quantized model sees them."""
    unscaled_input_peak: float | None = None
    """The same before AWQ divided the channels; None where it did not."""


@dataclass(frozen=True)
class Incident:
    """Something that did not go as asked."""

    where: str
    what: str


@dataclass(frozen=True)
class Report:
    """A finished run."""

    model: str
    """The original: folder or hub id."""
    out: Path
    command: str
    """What was typed; empty when the run was started from Python."""
    finished: str
    """Local date and time, ISO 8601."""
    machine: str
    """Processor or GPU."""
    versions: dict[str, str]
    """Of the software, by name."""
    recipe: dict[str, Any]
    format: str
    dtype: str
    """Of what is not quantized."""
    verification: Verification
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
    memory: dict[str, int]
    """Resident bytes of the process in each step: when it ended, or the peak of the process where that fell into it."""
    peak_bytes: int
    """Largest resident memory of the process."""
    peak_device_bytes: int
    """Largest memory allocated on the GPU; 0 without one."""
    histograms: tuple[Histogram, ...]
    """Of the linears with the largest errors, worst first."""
    samples: tuple[Sample, ...]
    samples_note: str
    """Which samples were left out, and why; empty where none were."""
    original_hashes: dict[str, str]
    """SHA-256 of the original's config.json and weights, by file name."""
    hashes: dict[str, str]
    """SHA-256 of OUT's files."""
    allocation: dict[str, Any] | None = None
    """How grids were chosen to a budget, and the trade-off they were chosen from (`budget.choose`)."""
    coverage: float | None = None
    """Part of the decoder blocks' weights that is quantized, 0 … 1; None in reports of older versions."""
    unquantized: tuple[Unquantized, ...] = ()
    """Parameters of two and more dimensions inside the decoder blocks that stay in 16 bit, by kind."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the content of `quantize_report.json`."""
        return {"schema": SCHEMA} | _plain(asdict(self) | {"out": str(self.out)})

    def write(self, folder: Path) -> None:
        """Put `quantize_report.json` into a folder."""
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / REPORT_JSON, [content.encode() + b"\n"])


def read_report(folder: Path) -> Report:
    """The report inside OUT; UserError where there is none, or none that can be read."""
    check_readable(folder)
    file = folder / REPORT_JSON
    if not file.is_file():
        raise UserError(f"{folder}: no {REPORT_JSON}; only `llmquant quantize` writes one, run it again")
    content = parse_json(file.read_bytes(), str(file))
    schema = content.get("schema")
    if schema not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UserError(
            f"{file}: schema {schema!r:.20}, and this llmquant reads {known}; use the version that wrote it"
        )
    try:
        values = {field.name: content[field.name] for field in fields(Report) if field.name in content}
        for name, kind in LISTS.items():
            if name in values or name not in OPTIONAL_LISTS:
                values[name] = tuple(_made(kind, entry) for entry in values[name])
        verification = values["verification"]
        read = _verification(verification) if schema == SCHEMA else _verification_of_schema_2(verification)
        values |= {"out": folder, "verification": read}
        report = Report(**values)
        _check(report)
        return report
    # UserError: a grid that there is not.
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{file}: damaged ({error!r:.80}); quantize again") from None


NOT_VERIFIED = Verification(verdict=NOT_MEASURED, reason="the run was told not to verify")
NO_SAMPLES = Samples(note="no samples: the run was told not to verify")


@dataclass
class ReportBuilder:
    """Collects the report while the run goes on."""

    plan: Plan
    model: str
    command: str = ""
    verification: Verification = NOT_VERIFIED
    samples: Samples = NO_SAMPLES
    linears: list[LinearReport] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    remarks: list[Incident] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    _calibration: CalibrationTokens | None = None
    _allocation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.plan.skeleton.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.plan.skeleton.device)
        # One incident for all of the blocks' weights takes the place of one for each linear.
        missed = coverage_of(self.plan).incident()
        if missed:
            self.incident("block weights", missed)
        inside = tuple(f"{name}." for name in self.plan.block_names)
        for linear in self.plan.linears:
            if linear.spec is not None and linear.reason:
                self.incident(linear.name, linear.reason)
                continue
            is_expected = linear.is_left_by_user or linear.is_kept_by_rule
            if linear.spec is None and linear.name.startswith(inside) and not is_expected and not missed:
                self.incident(linear.name, f"left in 16 bit: {linear.reason}")

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of what happens inside to one step, and note the memory."""
        start, peak_before = perf_counter(), peak_resident_bytes()
        try:
            yield
        finally:
            if self.plan.skeleton.device.type == "cuda":
                torch.cuda.synchronize(self.plan.skeleton.device)
            self.seconds[step] = self.seconds.get(step, 0.0) + perf_counter() - start
            peak = peak_resident_bytes()
            used = peak if peak > peak_before else psutil.Process().memory_info().rss
            self.memory[step] = max(self.memory.get(step, 0), used)

    def calibration(self, tokens: CalibrationTokens) -> None:
        """Note where the calibration text came from."""
        self._calibration = tokens
        for incident in tokens.incidents:
            self.incident("calibration", incident)
        for remark in tokens.remarks:
            self.remark("calibration", remark)

    @property
    def num_windows(self) -> float:
        """Windows that the calibration text has; infinite where there is none."""
        return math.inf if self._calibration is None else self._calibration.num_windows_available

    def settle(self, plan: Plan, allocation: dict[str, Any]) -> None:
        """Take over the plan whose grids were chosen to a budget, and how."""
        self.plan, self._allocation = plan, allocation

    def incident(self, where: str, what: str) -> None:
        """Note something that did not go as asked."""
        self.incidents.append(Incident(where, what))

    def remark(self, where: str, what: str) -> None:
        """Note something worth knowing that is as it should be."""
        self.remarks.append(Incident(where, what))

    def linear(self, linear: LinearPlan, solved: Solved, peaks: InputPeaks = (None, None)) -> None:
        """Note the result of one linear; peaks: `input_peaks` of its input, where that is known."""
        assert linear.spec is not None
        self.linears.append(
            LinearReport(
                name=linear.name,
                kind=linear.kind,
                grid=linear.spec.describe(),
                weights=linear.out_features * linear.in_features,
                rows=linear.out_features,
                error=solved.error,
                rtn_error=solved.rtn_error,
                digest=solved.weight.digest(),
                rtn_rows=solved.rtn_rows,
                correction_share=solved.correction_share,
                feedback_left=solved.feedback_left,
                input_peak=peaks[0],
                unscaled_input_peak=peaks[1],
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
        for noted, entries in ((self.incidents, "incidents"), (self.remarks, "remarks")):
            known = set(noted)
            noted += [new for entry in note.get(entries, []) if (new := Incident(**entry)) not in known]

    def finish(self, folder: Path, out: Path) -> Report:
        """The report of the run that has filled a folder, which becomes OUT."""
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
            dtype=str(self.plan.dtype).removeprefix("torch."),
            verification=self.verification,
            linears=tuple(self.linears),
            kept={linear.name: linear.reason for linear in self.plan.linears if linear.spec is None},
            incidents=tuple(self.incidents),
            remarks=tuple(self.remarks),
            calibration=None if self._calibration is None else self._calibration.audit(),
            original_bytes=self.plan.reader.total_bytes,
            output_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            bits_per_weight=self.plan.bits_per_weight,
            seconds=self.seconds,
            memory=self.memory,
            peak_bytes=peak_resident_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            histograms=histograms(folder, self.plan, [linear.name for linear in worst]),
            samples=self.samples.samples,
            samples_note=self.samples.note,
            original_hashes=manifest["request"]["model"],
            hashes={name: record["sha256"] for name, record in manifest["files"].items()},
            allocation=self._allocation,
            coverage=coverage.share,
            unquantized=coverage.unquantized,
        )


LISTS: dict[str, type] = {
    "linears": LinearReport,
    "incidents": Incident,
    "remarks": Incident,
    "histograms": Histogram,
    "samples": Sample,
    "unquantized": Unquantized,
}
"""Fields of a report that are lists of other classes."""
OPTIONAL_LISTS = ("unquantized",)
"""Those that reports of older versions lack."""


def _made(kind: type, values: dict[str, Any]) -> Any:
    """An instance of a dataclass from JSON, the reverse of `_plain`; what it has no field for is left out."""
    made = {}
    for entry in fields(kind):
        if entry.name in values:
            value = values[entry.name]
            made[entry.name] = _tuples(value)
            if value is None and entry.type == "float":
                made[entry.name] = math.nan
    return kind(**made)


CALIBRATION_COUNTS = (
    *("num_samples", "seq_len", "seed", "num_windows_available", "num_tokens_used", "num_tokens_available"),
    *("num_tokens_left_over", "num_rows", "num_blank_rows", "num_duplicate_rows"),
)
"""Entries of `Report.calibration` that are shown."""


def _check(report: Report) -> None:
    """KeyError, TypeError, IndexError or ValueError if a value is not of the type that its field was declared with, or
    if an entry that is shown is missing."""
    for name, kind in get_type_hints(Report).items():
        _check_type(getattr(report, name), kind, name)
    datetime.fromisoformat(report.finished)
    if report.verification.texts:
        report.verification.texts[report.verification.decided_by]
    _check_type(report.recipe["method"], str, "method")
    names = {linear.name for linear in report.linears}
    if not names.issuperset(histogram.name for histogram in report.histograms):
        raise KeyError("histograms")
    if report.calibration is not None:
        _check_type(report.calibration["source"], str, "source")
        for name in CALIBRATION_COUNTS:
            _check_type(report.calibration[name], int, name)
    if report.allocation is not None:
        _check_type(report.allocation["target_bits_per_weight"], float, "target_bits_per_weight")
        for point in (report.allocation["chosen"], *report.allocation["curve"], *report.allocation["uniform"]):
            for name in ("bits_per_weight", "loss"):
                _check_type(point[name], float, name)
        for point in report.allocation["uniform"]:
            QuantSpec(**{name: point[name] for name in ("bits", "group_size", "symmetric")})


def _check_type(value: Any, kind: Any, name: str) -> None:
    if not _fits(value, kind):
        raise TypeError(name)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type that a field was declared with."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments == (float, ...):  # null stands for a number that is not finite
            return all(entry is None or _fits(entry, float) for entry in value)
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, arguments[1]) for entry in value.values())
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return type(value) is kind and all(_fits(getattr(value, name), hints[name]) for name in hints)
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _tuples(value: Any) -> Any:
    """A value from JSON with tuples for its lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _verification(values: dict[str, Any]) -> Verification:
    texts = tuple(_made(Measurement, text) for text in values["texts"])
    return _made(Verification, values | {"texts": texts})


def _verification_of_schema_2(values: dict[str, Any]) -> Verification:
    """Its numbers were those of one text, without intervals."""
    text = _made(Measurement, values)
    if values["kl_mean"] is not None:
        ratio = text.perplexity / text.original_perplexity
        text = replace(text, ratio=ratio, changed_share=1 - values["top1_agreement"])
    return _made(Verification, values | {"texts": () if text.source is None else (text,)})


def _plain(value: Any) -> Any:
    """Lists and dicts with null for numbers that JSON has no form for."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def input_peaks(statistics: InputStatistics) -> InputPeaks:
    """`LinearReport.input_peak` and `unscaled_input_peak`."""
    loudness_K = statistics.hessian_KK.diagonal().clamp(min=0).sqrt()
    scale_K = statistics.scale_K
    return _peak(loudness_K), None if scale_K is None else _peak(loudness_K * scale_K)


def _peak(loudness_K: torch.Tensor) -> float:
    return (loudness_K.max() / loudness_K.median().clamp(min=loudness_K.max() / 1e6).clamp(min=1e-30)).item()


def processor_name() -> str:
    """What the processor calls itself, and how many threads torch uses of it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
