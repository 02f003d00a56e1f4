"""The state that the steps of one quantization share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmquant.algorithms.statistics import InputStatistics
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.data.calibration import CalibrationTokens
from llmquant.pipeline.distributed import Ranks
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.progress import OnProgress, Phase, Progress
from llmquant.report.run_log import RunLog
from llmquant.report.schema import LinearReport
from llmquant.solver.quantize_linear import LinearResult


@dataclass(frozen=True, kw_only=True)
class Run:
    """The state of one quantization on one rank."""

    plan: Plan
    log: RunLog
    """The record from which the report is made. Only rank 0 writes the report."""
    on_progress: OnProgress
    ranks: Ranks
    tokens: CalibrationTokens | None
    """The calibration tokens of all ranks together; None if the recipe needs no data."""
    partial: PartialCheckpoint | None = None
    """The unfinished checkpoint on disk; None on all ranks except rank 0, because only rank 0 reads and writes it."""

    @property
    def num_blocks(self) -> int:
        """Decoder blocks of the model."""
        return len(self.plan.block_names)

    @property
    def num_samples(self) -> int:
        """Calibration samples of all ranks together."""
        return 0 if self.tokens is None else len(self.tokens.tokens_SL)

    @property
    def checkpoint(self) -> PartialCheckpoint:
        """The unfinished checkpoint, on rank 0."""
        assert self.partial is not None, "only rank 0 reads and writes the unfinished checkpoint"
        return self.partial

    def report_progress(self, phase: Phase, done: int, detail: str = "", error: float | None = None) -> None:
        """Report the phase and the number of finished decoder blocks (`Progress`)."""
        self.on_progress(Progress(phase, done, self.num_blocks, detail, error))

    def stored_part(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the note of a part that an earlier run has finished; None if there is none."""
        checkpoint = self.checkpoint
        return (checkpoint.read_part(part), checkpoint.part_note(part)) if checkpoint.has_part(part) else None

    def record_linear(
        self, linear: LinearPlan, result: LinearResult, digest: str, statistics: InputStatistics | None = None
    ) -> None:
        """Record the result of one linear in the log.

        digest: that of the quantized weight. statistics: the statistics of its input, if any.
        """
        ratio, unscaled_ratio = (None, None) if statistics is None else _outlier_ratios(statistics)
        report = LinearReport(
            name=linear.name,
            kind=linear.kind,
            grid=linear.quant_spec.describe(),
            weights=linear.out_features * linear.in_features,
            rows=linear.out_features,
            error=result.error,
            rtn_error=result.rtn_error,
            digest=digest,
            rtn_rows=result.rtn_rows,
            correction_shrinkage=result.correction_shrinkage,
            cross_row_cost_ratio=result.cross_row_cost_ratio,
            outlier_ratio=ratio,
            unscaled_outlier_ratio=unscaled_ratio,
        )
        self.log.linear(report, result.fallbacks)


def _outlier_ratios(statistics: InputStatistics) -> tuple[float, float | None]:
    """Return `LinearReport.outlier_ratio` and `unscaled_outlier_ratio` for an input group."""
    rms_K = statistics.hessian_KK.diagonal().clamp(min=0).sqrt()
    scale_K = statistics.scale_K
    return _outlier_ratio(rms_K), None if scale_K is None else _outlier_ratio(rms_K * scale_K)


def _outlier_ratio(rms_K: Tensor) -> float:
    return (rms_K.max() / rms_K.median().clamp(min=rms_K.max() / 1e6).clamp(min=1e-30)).item()
