"""Read the GPU's counters for the fused kernel with Nsight Compute: the part of the memory's and of the issue rate."""

from __future__ import annotations

import csv

import torch

from gpu.processes import environment, find_program, run_command, section_command
from gpu.runs import Run
from llmquant.kernels import gpu, tune
from llmquant.kernels.layout import LinearShape
from llmquant.spec import QuantSpec

METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "gpu__time_duration.sum": "duration",
}
"""Counter -> name in the log."""

ROWS = (1, 16, 64)
"""Rows of x of the measured launches."""


def section_ncu(run: Run) -> None:
    """Run section `ncu_target` under ncu, and log the counters of each launch."""
    program = find_program("ncu")
    if program is None:
        run.log.write("ncu", note="ncu is not installed")
        if not run.rehearse:
            return
    target = section_command(run, "ncu_target")
    command = [str(program), "--clock-control", "none", "--target-processes", "all", "-k", "regex:w4a16"]
    command += ["-c", str(2 * len(ROWS)), "--csv", "--metrics", ",".join(METRICS)]
    # The rehearsal runs the target alone.
    env = environment(run.scratch, interpret=run.rehearse)
    result = run_command(run, target if run.rehearse else [*command, *target], 40, env)
    records = parse_csv(result.stdout)
    for record in records:
        run.log.write("ncu", **record)
    if result.exit_code != 0 or not (records or run.rehearse):
        run.log.write("ncu", stdout=result.stdout[-300:], **result.describe())
        run.log.finding(f"ncu: exit code {result.exit_code}, {len(records)} launches measured")


def section_ncu_target(run: Run) -> None:
    """Run the fused kernel twice for each number of rows."""
    in_features, out_features = (128, 64) if run.rehearse else (4096, 14336)
    shape = LinearShape.of_sizes(out_features, in_features, QuantSpec(group_size=128, symmetric=False))
    generator = torch.Generator(run.device).manual_seed(0)
    prepared = gpu.prepare(tune.random_weight(shape, run.device, generator), torch.bfloat16, run.device)
    for rows in ROWS:
        x_MK = torch.randn(rows, in_features, device=run.device, dtype=torch.bfloat16)
        for _ in range(2):
            gpu.matmul(x_MK, prepared, None, shape)
    run.synchronize()


def parse_csv(text: str) -> list[dict[str, str]]:
    """Return one record per launch of the CSV that ncu prints, which has one line per launch and metric."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        record = launches.setdefault(
            row["ID"], {"kernel": row["Kernel Name"][:40], "grid": row["Grid Size"], "block": row["Block Size"]}
        )
        if (name := METRICS.get(row["Metric Name"])) is not None:
            record[name] = f"{row['Metric Value']} {row['Metric Unit']}"
    return list(launches.values())
