"""The request of a run: everything that its result depends on. It identifies a run that can be continued."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor

from llmquant.checkpoints.reader import file_sha256
from llmquant.checkpoints.side_files import code_files
from llmquant.data.calibration import AUTO_SOURCE
from llmquant.humanize import dtype_name
from llmquant.planning.plan import Plan
from llmquant.report.schema import SCHEMA
from llmquant.spec import Options
from llmquant.version import __version__


def describe_request(plan: Plan, summary: dict[str, Any] | None, tokens_SL: Tensor | None) -> dict[str, Any]:
    """Return the request as plain values, which the journal and the manifest of OUT hold.

    summary: the summary of the calibration text (`CalibrationTokens.summary`). tokens_SL: the calibration samples,
    int64 [S, L], if they are known.
    """
    request: dict[str, Any] = {
        "llmquant": __version__,
        "report_schema": SCHEMA,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format": plan.format.name,
        "dtype": dtype_name(plan.dtype),
        "casts": plan.options.dtype != "auto",
        "device": plan.skeleton.device.type,
        "recipe": asdict(plan.recipe),
        "max_shard_bytes": plan.options.max_shard_bytes,
        "model": plan.reader.file_hashes(),
        "code": _code_hashes(plan),
    }
    if summary is not None and tokens_SL is not None:
        digest = hashlib.sha256(tokens_SL.contiguous().numpy().tobytes()).hexdigest()
        # Fallbacks may quote a network error, whose text differs every time.
        counts = {name: value for name, value in summary.items() if name not in ("fallbacks", "notes")}
        request["calibration"] = counts | {"sha256": digest}
    return request


def _code_hashes(plan: Plan) -> dict[str, str]:
    """Return the SHA-256 of the checkpoint's Python files by name, if they may run; they change the model."""
    names = sorted(code_files(plan.path)) if plan.options.trust_remote_code else []
    return {name: file_sha256(plan.path / name) for name in names}


def requested_calibration(options: Options) -> dict[str, Any]:
    """Return the entries of a request's calibration that are known before the text is read."""
    counts = {"num_samples": options.num_samples, "seq_len": options.seq_len, "seed": options.seed}
    return counts if options.calibration == AUTO_SOURCE else counts | {"source": options.calibration}
