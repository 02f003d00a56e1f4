"""The output of `llmquant eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant.console.tables import new_table, screen
from llmquant.humanize import format_bytes

if TYPE_CHECKING:
    from llmquant.eval.perplexity import Perplexity
    from llmquant.eval.tasks import TaskScore
    from llmquant.runtime.evaluate import Evaluation, ModelEvaluation

CHIEF_METRICS = ("acc_norm", "acc", "exact_match")
"""The metrics that tables show, most preferred first. Papers report length-normalised accuracies."""


def print_evaluation(result: Evaluation) -> None:
    """Print one row for each model, starting with the original, and the conditions below."""
    rows = [*([result.against] if result.against else []), *result.models]
    if result.dataset is not None:
        _print_text(result, rows)
    for note in result.text_notes:
        screen().print(f"{result.dataset}: {note}", style="dim")
    for note in result.notes:
        screen().print(note, style="dim")
    if any(row.tasks for row in rows):
        _print_tasks(rows)


def _print_text(result: Evaluation, rows: list[ModelEvaluation]) -> None:
    divergences = (">KL mean", ">median", ">99 %", ">top-1") if result.against else ()
    table = new_table("model", ">size", ">perplexity", *divergences, ">tokens/s")
    for row in rows:
        assert row.perplexity is not None
        cells = [format_bytes(row.stored_bytes), _plus_minus(row.perplexity)]
        if compared := row.divergence:
            cells += [f"{value:.4f}" for value in (compared.kl_mean, compared.kl_median, compared.kl_p99)]
            cells.append(f"{compared.top1_agreement:.1%}")
        else:
            cells += [""] * len(divergences)
        table.add_row(row.model, *cells, f"{row.perplexity.tokens_per_second:.0f}")
    screen().print(table)
    measured = rows[0].perplexity
    assert measured is not None
    overlap = "" if measured.stride == measured.seq_len else f", one every {measured.stride}"
    places = ", ".join(dict.fromkeys(f"{row.dtype} on {row.device}" for row in rows))
    kl = "; KL in nats per token" if result.against else ""
    screen().print(
        f"{result.dataset}: {measured.num_windows} windows of {measured.seq_len} tokens{overlap}, {places}{kl}",
        style="dim",
    )


def _print_tasks(rows: list[ModelEvaluation]) -> None:
    table = new_table("task", "metric")
    for row in rows:
        table.add_column(row.model, justify="right", overflow="fold")
    for task in rows[0].tasks:
        metric = chief_metric(rows[0].tasks[task])
        if metric is not None:
            table.add_row(task, metric, *(_score(row.tasks[task], metric) for row in rows))
    screen().print(table)


def chief_metric(score: TaskScore) -> str | None:
    """Return the metric that the table shows. The JSON output has all metrics."""
    return next((name for name in CHIEF_METRICS if name in score.metrics), next(iter(score.metrics), None))


def _score(score: TaskScore, metric: str) -> str:
    error = score.standard_errors.get(metric)
    return f"{score.metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _plus_minus(measured: Perplexity) -> str:
    error = "" if measured.standard_error is None else f" ± {measured.standard_error:.2f}"
    return f"{measured.perplexity:.2f}{error}"
