"""The report of a run as plain data: `Report`, and `quantize_report.json` inside OUT.

The file holds one JSON object: the fields of `Report` by name, nested as the classes here describe, and

    schema   SCHEMA, the version of this description. It is raised when a field is renamed, removed or changes its
             meaning. New fields may appear without a new version; readers ignore unknown fields.
             2: `rtn_error` refers to the original weight also under AWQ; linears have `rows`, `rtn_rows` and the
                shrinkage of their correction.
             3: `verification` has one entry per text (`texts`), with intervals, and one of four verdicts.
             4: fields have the names that the literature uses (`RENAMED`).
             Schemas 2 and 3 are still read. The verdict of a report of schema 2 is kept as it was, and its numbers
             become those of one text.

Numbers are plain: bytes, seconds, fractions from 0 to 1, relative squared errors, divergences in nats per token. A
value that was not measured is null; nothing is NaN or infinite. Times and memory differ from run to run, so this file
and the HTML page (`page.py`) are the only files whose bytes differ in a repeated run. OUT's manifest has no hash of
either.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from llmquant.checkpoints.atomic import write_atomically
from llmquant.checkpoints.header import parse_json
from llmquant.checkpoints.manifest import REPORT_JSON
from llmquant.errors import UserError
from llmquant.paths import check_readable
from llmquant.planning.coverage import UnquantizedParameters
from llmquant.report.histograms import Histogram
from llmquant.report.verdict import Measurement, Verification
from llmquant.spec import QuantSpec

T = TypeVar("T")
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float, which is null in JSON if it is not finite."""
SCHEMA = 4
READABLE = (2, 3, SCHEMA)
"""Schemas that `read_report` accepts."""
MAX_NEW_TOKENS, MAX_GENERATION_SECONDS = 48, 20.0
"""Largest number of tokens of one sample text, and of seconds for all sample texts of one model."""
REPEATED_TOKENS, REPETITIVE = 4, 0.3
"""Length of the counted token sequences, and the fraction of repeated ones from which a text is repetitive: eight
tokens that occur four times in MAX_NEW_TOKENS, apart from each other, give a third."""


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """One prompt with its continuation, or one question with its answer, by both models."""

    prompt: str
    """The prompt or question."""
    quantized: str
    """The text of the quantized model."""
    original: str | None
    """The text of the original; None if the original was left out."""
    is_chat: bool = False
    """Whether the prompt went through the chat template."""
    quantized_repeats: float = 0.0
    """Fraction of the sequences of REPEATED_TOKENS tokens in the quantized model's text that repeat an earlier one."""
    original_repeats: float | None = None
    """The same fraction in the original's text; None if the original was left out."""


@dataclass(frozen=True, kw_only=True)
class SampleTexts:
    """The sample texts of a run, and the failures while they were generated."""

    texts: tuple[SampleText, ...] = ()
    """The sample texts of both models."""
    note: str = ""
    """Which sample texts were left out, with the reason; empty if none were."""
    failure: str = ""
    """The reason why the quantized model does not run; empty if it does, or if that was not tried."""
    original_failure: str = ""
    """The reason why the original does not run; empty if it does, or if that was not tried."""
    template_failure: str = ""
    """The reason why the chat template refuses the questions; empty if it accepts them, or if there is none."""

    @property
    def repetition(self) -> str:
        """A sentence about the texts in which only the quantized model is repetitive; empty if there are none."""
        pairs = [(one.quantized_repeats, one.original_repeats) for one in self.texts]
        looping = sum(ours >= REPETITIVE and theirs is not None and theirs < REPETITIVE for ours, theirs in pairs)
        if not looping:
            return ""
        return f"it repeats itself in {looping} of {len(pairs)} sample texts where the original does not"


@dataclass(frozen=True)
class LinearReport:
    """The result of one quantized linear."""

    name: str
    """Module name in the model."""
    kind: str
    """The name within its decoder block, which linears with the same role share."""
    grid: str
    """Description of its grid (`QuantSpec.describe`)."""
    weights: int
    """Number of weights."""
    rows: int
    """Number of output features, each a row of the weight."""
    error: Number
    """Squared error of the output relative to the squared output, over the calibration inputs. If the recipe corrects
    earlier errors, it is measured against the corrected weight. Without data, it is the same ratio of the weight."""
    rtn_error: Number
    """The same error if the original weight is rounded to nearest on the same grid, without AWQ's scales."""
    digest: str
    """SHA-256 of its codes, scales, zero-points and groups, to which the finished checkpoint is compared."""
    rtn_rows: int | None = None
    """Rows that are rounded to nearest because this gives a smaller error than the search; None without a search."""
    correction_shrinkage: float | None = None
    """Shrinkage factor, 0 to 1, of the correction of earlier errors: an estimate of the best factor on other text. None
    if there was nothing to correct."""
    cross_row_cost_ratio: float | None = None
    """Cost of the rounding errors after cross-row compensation, relative to the cost before, on other text. It is the
    cost for the block, or for the predictions if `Recipe.output_hessian` is network. None without compensation."""
    outlier_ratio: float | None = None
    """Root mean square of the largest input channel, relative to the median channel, in the quantized model."""
    unscaled_outlier_ratio: float | None = None
    """The same ratio before AWQ scaled the channels; None without AWQ."""


@dataclass(frozen=True)
class Message:
    """A fallback or a note about one module, tensor or step."""

    where: str
    """The module, tensor or step."""
    what: str
    """The message."""


@dataclass(frozen=True)
class Report:
    """The report of a finished run."""

    model: str
    """Folder or hub id of the original model."""
    out: Path
    """The folder of the result."""
    command: str
    """The command line; empty if the run was started from Python."""
    finished: str
    """Local date and time of the end of the run, ISO 8601."""
    machine: str
    """Name of the processor or GPU."""
    versions: dict[str, str]
    """Versions of the software, by name."""
    recipe: dict[str, Any]
    """The fields of the `Recipe`."""
    format: str
    """Name of the storage format."""
    dtype: str
    """Dtype of the tensors that are not quantized."""
    verification: Verification
    """Comparison of the result with the original."""
    linears: tuple[LinearReport, ...]
    """The quantized linears in order."""
    unquantized_linears: dict[str, str]
    """Linears that are not quantized, by name, with the reason."""
    fallbacks: tuple[Message, ...]
    """Deviations from the request, such as a smaller group size. `--strict` turns them into exit code 1."""
    notes: tuple[Message, ...]
    """Expected facts that are useful to know, such as inputs that AWQ cannot scale."""
    calibration: dict[str, Any] | None
    """Summary of the calibration text; None if no data was used."""
    original_bytes: int
    """Bytes of the original's tensors."""
    output_bytes: int
    """Bytes of the result's safetensors files."""
    bits_per_weight: Number
    """Stored bits per quantized weight."""
    seconds: dict[str, float]
    """Wall time of each step, in seconds."""
    memory: dict[str, int]
    """Resident bytes of the process at the end of each step, or its peak if it was reached in that step."""
    peak_bytes: int
    """Largest resident memory of the process, in bytes."""
    peak_device_bytes: int
    """Largest memory allocated on the GPU, in bytes; 0 without a GPU."""
    histograms: tuple[Histogram, ...]
    """Weight and code histograms of the linears with the largest errors, worst first."""
    sample_texts: tuple[SampleText, ...]
    """Short texts of both models."""
    sample_texts_note: str
    """Which sample texts were left out, with the reason; empty if none were."""
    original_hashes: dict[str, str]
    """SHA-256 of the original's config.json and weights, by file name."""
    hashes: dict[str, str]
    """SHA-256 of OUT's files, by name."""
    allocation: dict[str, Any] | None = None
    """The grids that were chosen for a budget, and the trade-off between size and loss (`budget.choose_allocation`)."""
    coverage: float | None = None
    """Fraction of the decoder blocks' weights that is quantized, 0 to 1; None in reports of older versions."""
    unquantized_parameters: tuple[UnquantizedParameters, ...] = ()
    """Parameters with two or more dimensions inside the decoder blocks that are not quantized, by kind."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `quantize_report.json` as plain values."""
        return {"schema": SCHEMA} | _plain(asdict(self) | {"out": str(self.out)})

    def write(self, folder: Path) -> None:
        """Write `quantize_report.json` into a folder."""
        content = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / REPORT_JSON, [content.encode() + b"\n"])


def read_report(folder: Path) -> Report:
    """Read the report inside OUT. Raises UserError if there is none, or if it is damaged."""
    check_readable(folder)
    file = folder / REPORT_JSON
    if not file.is_file():
        raise UserError(f"{folder}: no {REPORT_JSON}; only `llmquant quantize` writes one, run it again")
    content = parse_json(file.read_bytes(), str(file))
    schema = content.get("schema")
    if schema not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise UserError(
            f"{file}: schema {schema!r:.20}, and this llmquant reads {known}; use the version that wrote it"
        )
    try:
        if schema < 4:
            content = _with_names_of_schema_4(content)
        if schema == 2:
            content["verification"] = _verification_of_schema_2(content["verification"])
        report = _parse(Report, content | {"out": str(folder)})
        _check_shown_values(report)
        return report
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: damaged ({place}: {first['msg']:.80}); quantize again") from None
    # A UserError comes from a grid that does not exist.
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{file}: damaged ({error!r:.80}); quantize again") from None


def _parse(kind: type[T], content: Any) -> T:
    """Return a dataclass from JSON values of exactly the declared types. Unknown fields are ignored."""
    return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)


RENAMED = {
    "incidents": "fallbacks",
    "remarks": "notes",
    "kept": "unquantized_linears",
    "unquantized": "unquantized_parameters",
    "samples": "sample_texts",
    "samples_note": "sample_texts_note",
}
"""Names of a report's fields before schema 4 -> names since schema 4."""
RENAMED_OF_LINEARS = {
    "correction_share": "correction_shrinkage",
    "feedback_left": "cross_row_cost_ratio",
    "input_peak": "outlier_ratio",
    "unscaled_input_peak": "unscaled_outlier_ratio",
}
"""Old -> new names of a linear's fields."""
RENAMED_OF_UNQUANTIZED = {"is_asked_for": "is_intended"}
"""Old -> new names of the fields of `unquantized_parameters`."""
RENAMED_OF_RECIPE = {
    "input_error_target": "correct_input_error",
    "residual_target": "correct_residual_error",
    "output_feedback": "output_hessian",
}
"""Old -> new names of the recipe's fields."""


def _with_names_of_schema_4(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a report of schema 2 or 3 under the names of schema 4."""
    renamed = {RENAMED.get(name, name): value for name, value in content.items()}
    renamed["linears"] = [
        {RENAMED_OF_LINEARS.get(name, name): value for name, value in linear.items()} for linear in content["linears"]
    ]
    renamed["unquantized_parameters"] = [
        {RENAMED_OF_UNQUANTIZED.get(name, name): value for name, value in entry.items()}
        for entry in renamed.get("unquantized_parameters", [])
    ]
    recipe = {RENAMED_OF_RECIPE.get(name, name): value for name, value in content["recipe"].items()}
    calibration = renamed.get("calibration")
    if isinstance(calibration, dict):
        renamed["calibration"] = {RENAMED.get(name, name): value for name, value in calibration.items()}
    return renamed | {"recipe": recipe}


@dataclass(frozen=True)
class _ShownCalibration:
    """The entries of `Report.calibration` that are shown."""

    source: str
    num_samples: int
    seq_len: int
    seed: int
    num_windows_available: int
    num_tokens_used: int
    num_tokens_available: int
    num_tokens_left_over: int
    num_rows: int
    num_blank_rows: int
    num_duplicate_rows: int


@dataclass(frozen=True)
class _Point:
    """A point of the trade-off between size and loss."""

    bits_per_weight: float
    loss: float


@dataclass(frozen=True)
class _ShownAllocation:
    """The entries of `Report.allocation` that are shown."""

    target_bits_per_weight: float
    chosen: _Point
    curve: tuple[_Point, ...]
    uniform: tuple[_Point, ...]


def _check_shown_values(report: Report) -> None:
    """Raise an exception if a shown value that the declared types do not cover is missing or wrong."""
    datetime.fromisoformat(report.finished)
    if report.verification.texts:
        report.verification.texts[report.verification.decided_by]
    if not isinstance(report.recipe["method"], str):
        raise TypeError("method")
    names = {linear.name for linear in report.linears}
    if not names.issuperset(histogram.name for histogram in report.histograms):
        raise KeyError("histograms")
    if report.calibration is not None:
        _parse(_ShownCalibration, report.calibration)
    if report.allocation is not None:
        _parse(_ShownAllocation, report.allocation)
        for point in report.allocation["uniform"]:
            QuantSpec(**{name: point[name] for name in ("bits", "group_size", "symmetric")})


def _verification_of_schema_2(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a verification of schema 2 to later schemas. Its numbers were those of one text, without intervals."""
    if values["source"] is None:
        return values | {"texts": []}
    text = {name: values[name] for name in Measurement.__dataclass_fields__ if name in values}
    if values["kl_mean"] is not None:
        text["ratio"] = text["perplexity"] / text["original_perplexity"]
        text["changed_share"] = 1 - values["top1_agreement"]
    return values | {"texts": [text]}


def _plain(value: Any) -> Any:
    """Convert a value to lists and dicts, with None for numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
