"""The main pipeline, from the checkpoint to the finished folder.

    plan -> calibration samples -> the tensors outside the blocks -> the loop over the blocks (`block_loop.py`) -> the
    configuration and the tokenizer -> verification and report (`finish.py`) -> OUT, by one rename

Every finished part is on disk. The same command continues a run that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmquant.algorithms.gptq import refuses_column_loops
from llmquant.algorithms.statistics import sums_in_float32
from llmquant.checkpoints.out_folder import check_no_overlap
from llmquant.checkpoints.unfinished import check_out_folder, unfinished_request
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.data.calibration import AUTO_SOURCE, CalibrationTokens, calibration_tokens, preview_calibration
from llmquant.data.sources import preset_names
from llmquant.errors import UserError
from llmquant.estimates.disk import check_disk
from llmquant.estimates.memory import estimate_memory
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.memory import trim_heap
from llmquant.models.finite import DamagedWeights
from llmquant.models.reproducible import has_reproducible_attention, reproducible_arithmetic
from llmquant.paths import existing_paths, parse_path
from llmquant.pipeline.block_loop import quantize_blocks, round_blocks
from llmquant.pipeline.budget import ALLOCATION, choose_allocation, grids_of_allocation, plan_provisionally, with_grids
from llmquant.pipeline.distributed import Ranks
from llmquant.pipeline.finish import finish
from llmquant.pipeline.nodes import checkpoint_facts, has_several_nodes
from llmquant.pipeline.output import (
    OUTSIDE,
    extra_files,
    note_side_files,
    part_names,
    quantization_config,
    side_files,
    write_outside,
)
from llmquant.pipeline.request import describe_request, requested_calibration
from llmquant.pipeline.run import Run
from llmquant.planning.engines import check_engines
from llmquant.planning.plan import Plan, check_tokens, make_plan
from llmquant.progress import OnProgress, Phase, ignore_progress
from llmquant.report.run_log import RunLog
from llmquant.report.schema import Message, Report, read_report
from llmquant.runtime.attention import use_attention
from llmquant.solver.gradients import num_scores, tokens_at_once
from llmquant.solver.output_hessian import cross_row_part, network_cross_row_factors, pack_factors
from llmquant.spec import Options, QuantSpec, Recipe

OnCalibration = Callable[[dict[str, Any]], None]
"""Called with the summary of the calibration text (`CalibrationTokens.summary`)."""


@dataclass(frozen=True)
class _RemainingWork:
    """The message of rank 0 to the other ranks: the work that remains to be done together."""

    runs_blocks: bool
    """Whether the ranks run the samples through the blocks together."""
    grids: dict[str, QuantSpec] | None
    """The grids that were chosen for a budget, by full name; None without a budget."""


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    options: Options | None = None,
    on_progress: OnProgress = ignore_progress,
    *,
    on_calibration: OnCalibration | None = None,
    command: str = "",
) -> Report:
    """Quantize a checkpoint (a local folder or hub id) into the folder OUT, which appears when it is complete.

    on_calibration: called with the summary of the calibration text before any work is done on the model.
    command: the command line, for the report.
    Raises UserError for every problem that the user can solve. Once it is solved, the same call continues the run.
    """
    if options is not None and options.machine is not None:
        raise UserError(f"machine '{options.machine}': a run uses this machine; give a machine to a dry run only")
    ranks = Ranks.join()
    with ranks.session():
        recipe, options, out = recipe or Recipe(), ranks.options(options or Options()), parse_path(out)
        with ranks.raising_on_all():
            if ranks.is_main:
                plan = checked_plan(model, out, recipe, options)
            else:
                plan = make_plan(resolve_model(str(model), options.trust_remote_code), recipe, options)
        ranks.check_alike(lambda: checkpoint_facts(plan))
        use_attention(plan.skeleton.model, plan.skeleton.device)
        log = RunLog(plan, str(model), command)
        on_progress = on_progress if ranks.is_main else ignore_progress
        run = Run(plan=plan, log=log, on_progress=on_progress, ranks=ranks, tokens=None)
        if ranks.is_main:
            _note_checkpoint(run, out)
            _note_device(run)
        run = replace(run, tokens=_calibration_tokens(run, on_calibration))
        with reproducible_arithmetic(plan.skeleton.device, partial(_note_irreproducible, log)):
            return _run_main_rank(run, out) if ranks.is_main else _run_other_rank(run)


def _calibration_tokens(run: Run, on_calibration: OnCalibration | None) -> CalibrationTokens | None:
    """Draw the calibration tokens on rank 0 and send them to all ranks; None if the recipe needs no data."""
    plan, ranks, log = run.plan, run.ranks, run.log
    if not plan.recipe.needs_data:
        return None
    run.report_progress(Phase.CALIBRATION_TEXT, 0)
    with log.timed("calibration text"):
        tokens = ranks.on_main(lambda: draw_tokens(plan))
        trim_heap()
    log.calibration(tokens)
    if on_calibration is not None and ranks.is_main:
        on_calibration(tokens.summary())
    with ranks.raising_on_all():
        check_tokens(plan, tokens.tokens_SL)
    return tokens


def _run_other_rank(run: Run) -> Report:
    """Run the samples through the blocks on a rank other than 0, if rank 0 runs them too, and return the report."""
    if has_several_nodes():
        run.ranks.check_alike(run.plan.reader.file_hashes if run.ranks.compares_files else None)
    work: _RemainingWork = run.ranks.receive()
    if work.grids is not None:
        run = replace(run, plan=with_grids(run.plan, work.grids))
    if work.runs_blocks:
        with torch.no_grad():
            quantize_blocks(run)
    return run.ranks.receive()


def _run_main_rank(run: Run, out: Path) -> Report:
    """Do everything that only rank 0 does, run the blocks together with the other ranks, and return the report."""
    plan, log = run.plan, run.log
    run.report_progress(Phase.HASHING, 0)
    with log.timed("hashing"):
        summary, tokens_SL = (None, None) if run.tokens is None else (run.tokens.summary(), run.tokens.tokens_SL)
        request = describe_request(plan, summary, tokens_SL)
        if has_several_nodes():
            run.ranks.check_alike(lambda: request["model"])
    options = plan.options
    with PartialCheckpoint.open(out, request, restart=options.restart, overwrite=options.overwrite) as partial:
        run = replace(run, partial=partial)
        run = replace(run, plan=_choose_grids(run))
        _measure_output_hessians(run)
        parts = [OUTSIDE, *([ALLOCATION] if run.plan.recipe.has_budget else []), *part_names(run.plan)]
        if partial.is_finishing:
            _send_remaining_work(run, runs_blocks=False)
            for part in parts:
                log.restore(partial.part_note(part))
        else:
            _write_parts(run)
        run.report_progress(Phase.FINISHING, run.num_blocks)
        with log.timed("finishing"):
            manifest = {"request": request}
            folder = partial.assemble(
                parts, extra_files(run.plan), manifest=manifest, max_shard_bytes=options.max_shard_bytes
            )
        with _discarded_if_damaged(run):
            finish(run, folder, out)
        partial.publish()
    report = read_report(out)
    run.ranks.send(report)
    return report


def _note_device(run: Run) -> None:
    """Record the steps that a GPU runs in a slower way, or not reproducibly."""
    plan, device = run.plan, run.plan.skeleton.device
    if device.type != "cuda":
        return
    if plan.recipe.uses_gptq and (reason := refuses_column_loops(device)) is not None:
        run.log.fallback("solver", f"rounds column by column in PyTorch, which is far slower: {reason}")
    if plan.recipe.needs_data and not sums_in_float32(torch.empty(0, dtype=plan.skeleton.dtype, device=device)):
        run.log.note("statistics", "products are computed in float32: this PyTorch cannot sum 16-bit ones in float32")
    together = max(1, tokens_at_once(plan) // plan.options.seq_len) if plan.recipe.runs_backward else 1
    scores = num_scores(plan, together, plan.options.seq_len)
    if plan.recipe.compensates_across_rows and not has_reproducible_attention(device, scores):
        run.log.note("gradients", "may differ in last bits between runs: plain attention would take too much memory")


def _note_irreproducible(log: RunLog, warning: str) -> None:
    """Record, once, an operation without a deterministic kernel. warning: PyTorch's text."""
    text = " ".join(warning.split()).partition(". ")[0]
    note = Message("reproducibility", f"runs may differ in last bits: {text}")
    if note not in log.notes:
        log.note(note.where, note.what)


def _note_checkpoint(run: Run, out: Path) -> None:
    """Record what is unusual about the checkpoint."""
    note_side_files(run.log, side_files(run.plan.reader, out))
    for note in run.plan.notes:
        run.log.note("checkpoint", note)


def _write_parts(run: Run) -> None:
    """Write the missing parts of the unfinished checkpoint: first the tensors outside the blocks, then each block."""
    for part in run.checkpoint.damaged_parts:
        run.log.fallback(part, "damaged since it was written: made again")
    with _discarded_if_damaged(run), torch.no_grad():
        write_outside(run)
        _send_remaining_work(run, runs_blocks=run.tokens is not None)
        if run.tokens is None:
            round_blocks(run)
        else:
            quantize_blocks(run)


@contextmanager
def _discarded_if_damaged(run: Run) -> Iterator[None]:
    """Discard the unfinished checkpoint if a weight turns out to hold NaN or inf.

    The request holds the hash of the damaged file, so a run on the repaired checkpoint could not continue this one.
    """
    try:
        yield
    except DamagedWeights:
        run.checkpoint.discard()
        raise


def _send_remaining_work(run: Run, *, runs_blocks: bool) -> None:
    grids = None
    if run.plan.recipe.has_budget:
        grids = grids_of_allocation(run.checkpoint.part_note(ALLOCATION)["allocation"])
    run.ranks.send(_RemainingWork(runs_blocks, grids))


def _choose_grids(run: Run) -> Plan:
    """Return the plan with the grids chosen for the budget, if any. A continued run does not choose again."""
    plan, partial = run.plan, run.checkpoint
    if not plan.recipe.has_budget:
        return plan
    assert run.tokens is not None
    if not partial.has_part(ALLOCATION):
        with _discarded_if_damaged(run), run.log.timed("sensitivity"):
            on_block = lambda: run.report_progress(Phase.SENSITIVITY, 0)  # noqa: E731
            allocation = choose_allocation(plan, run.tokens.tokens_SL, on_block)
        partial.add_part(ALLOCATION, {}, {"allocation": allocation})
    allocation = partial.part_note(ALLOCATION)["allocation"]
    plan = with_grids(plan, grids_of_allocation(allocation))
    check_engines(plan)
    quantization_config(plan)
    run.log.set_allocation(plan, allocation)
    return plan


def _measure_output_hessians(run: Run) -> None:
    """Measure the output Hessians of all linears from gradients of the model's loss, if the recipe needs them.

    A continued run does not measure again. The factors of each block are stored in a part of their own, which is
    removed when the block is finished.
    """
    plan, partial = run.plan, run.checkpoint
    needed = {index for index, part in enumerate(part_names(plan)) if not partial.has_part(part)}
    is_done = all(partial.has_part(cross_row_part(index)) for index in needed)
    if not plan.recipe.runs_backward or is_done or partial.is_finishing:
        return
    assert run.tokens is not None

    def on_block(share: float) -> None:
        run.report_progress(Phase.GRADIENTS, int(share * run.num_blocks))

    with _discarded_if_damaged(run), run.log.timed("gradients"):
        folder = partial.scratch / "outputs"
        for index, factors in enumerate(
            network_cross_row_factors(plan, run.tokens.tokens_SL, folder, run.log, on_block)
        ):
            if index in needed:
                partial.add_part(cross_row_part(index), *pack_factors(factors))


def checked_plan(model: str | Path, out: Path, recipe: Recipe, options: Options) -> Plan:
    """Return the plan of a run, after every check that needs no weight. Raises UserError if a check fails."""
    has_preset = options.calibration in (AUTO_SOURCE, *preset_names())
    reads = existing_paths(model) if has_preset else existing_paths(model, options.calibration)
    check_out_folder(out, overwrite=options.overwrite, restart=options.restart, inputs=reads)
    plan = make_plan(resolve_model(str(model), options.trust_remote_code), recipe, options)
    if recipe.has_budget:
        plan = plan_provisionally(plan)
    check_engines(plan)
    quantization_config(plan)
    beside = side_files(plan.reader, out)
    check_no_overlap(out, [plan.path, *plan.reader.shards, *(plan.path / name for name in beside.copied)])
    estimate_memory(plan).check_limit()
    check_disk(plan, out)
    return plan


def dry_run(model: str | Path, out: str | Path, recipe: Recipe | None = None, options: Options | None = None) -> Plan:
    """Return the plan of `quantize`, with a preview of the calibration text. Raises the UserErrors of these checks.

    A dry run writes nothing, and fetches only the first row of a text on the hub. It reads the weights only if
    OUT.partial holds an unfinished run, to compare their hashes with those in its journal.
    """
    out = parse_path(out)
    plan = checked_plan(model, out, recipe or Recipe(), options or Options())
    summary, tokens_SL = None, None
    if plan.recipe.needs_data:
        tokenizer = load_tokenizer(plan.path, plan.options.trust_remote_code)
        summary, tokens_SL = preview_calibration(tokenizer, *_calibration_options(plan))
        if tokens_SL is not None:
            check_tokens(plan, tokens_SL)
    begun = None if plan.options.restart else unfinished_request(out)
    if begun is not None:
        request = describe_request(plan, summary, tokens_SL)
        if plan.recipe.needs_data and tokens_SL is None:
            request["calibration"] = (begun.get("calibration") or {}) | requested_calibration(plan.options)
        check_out_folder(out, overwrite=plan.options.overwrite, request=request)
    return replace(plan, calibration=summary)


def draw_tokens(plan: Plan) -> CalibrationTokens:
    """Draw the calibration samples of a run."""
    return calibration_tokens(load_tokenizer(plan.path, plan.options.trust_remote_code), *_calibration_options(plan))


def _calibration_options(plan: Plan) -> tuple[str, int, int, int]:
    """Return the source, the number of samples, the tokens of a sample, and the seed."""
    options = plan.options
    return options.calibration, options.num_samples, options.seq_len, options.seed
