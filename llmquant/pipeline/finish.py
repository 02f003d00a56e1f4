"""The last step of a run: verify the finished folder, generate sample texts with it, and write its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmquant.checkpoints.manifest import REPORT_HTML
from llmquant.errors import one_line
from llmquant.pipeline.next_steps import next_steps
from llmquant.pipeline.output import part_names, rounded_at_load, verify_copies
from llmquant.pipeline.run import Run
from llmquant.pipeline.sample_texts import generate_sample_texts
from llmquant.pipeline.verify import verify_codes, verify_texts, within_time_limit
from llmquant.planning.held_out import held_out_texts
from llmquant.progress import Phase
from llmquant.report.page import write_page
from llmquant.report.schema import read_report
from llmquant.report.verdict import BANDS, NOT_MEASURED, Verification


def finish(run: Run, folder: Path, out: Path) -> None:
    """Verify the folder that becomes OUT and write the report into it.

    Raises UserError if a weight does not hold the codes that were chosen, or a copied tensor differs.
    """
    plan, log = run.plan, run.log
    run.report_progress(Phase.VERIFYING, run.num_blocks)
    with log.timed("verifying"):
        verify_codes(folder, plan, {linear.name: linear.digest for linear in log.linears})
        verify_copies(folder, plan, _folded_digests(run))
        if plan.recipe.needs_data or plan.options.verify:
            for name, what in rounded_at_load(plan).items():
                log.fallback(name, what)
        if plan.options.verify:
            log.verification = _compare_with_original(run, folder)
    if plan.options.verify:
        run.report_progress(Phase.SAMPLE_TEXTS, run.num_blocks)
        _generate_sample_texts(run, folder)
        log.verification = _with_conclusions(run, log.verification)
    log.to_report(folder, out).write(folder)
    write_page(read_report(folder), folder / REPORT_HTML)


def _folded_digests(run: Run) -> dict[str, str]:
    """Return the SHA-256 of the parameters that AWQ's scales changed and that are not quantized, by tensor name."""
    notes = (run.checkpoint.part_note(part) for part in part_names(run.plan))
    return {run.plan.skeleton.names[name]: sha for note in notes for name, sha in note.get("folded", {}).items()}


def _compare_with_original(run: Run, folder: Path) -> Verification:
    """Compare the finished folder with the original on held-out text. If that fails, a fallback is recorded."""
    try:
        texts = within_time_limit(run.plan, held_out_texts(run.plan, run.tokens), sum(run.log.seconds.values()))
        verification = verify_texts(folder, run.plan, texts)
    # There may be no text or too little memory for the head, or the model may not run here. The checkpoint is finished
    # nevertheless, and its codes are verified.
    except Exception as error:
        verification = Verification(verdict=NOT_MEASURED, reason=one_line(error))
    if verification.verdict == NOT_MEASURED:
        run.log.fallback("verification", f"not measured on text: {verification.reason}")
    return verification


def _generate_sample_texts(run: Run, folder: Path) -> None:
    log = run.log
    with log.timed("sample texts"):
        log.sample_texts = generate_sample_texts(folder, run.plan)
    if log.sample_texts.failure:
        log.fallback("sample texts", f"the quantized model does not run here: {log.sample_texts.failure}")
    if log.sample_texts.template_failure:
        log.note("sample texts", f"texts instead of questions: {log.sample_texts.template_failure}")
    if log.sample_texts.original_failure:
        log.note("sample texts", f"the original does not run here: {log.sample_texts.original_failure}")


def _with_conclusions(run: Run, verification: Verification) -> Verification:
    """Add the findings of the sample texts to the verification, and next steps if the verdict is worse than good."""
    log = run.log
    steps: tuple[tuple[str, str], ...] = ()
    if verification.verdict in BANDS[1:]:
        try:
            errors = [(linear.kind, linear.error) for linear in log.linears]
            steps = next_steps(run.plan, errors, log.num_windows)
        except Exception as error:  # next steps make new plans, and a failure there must not fail the run
            log.note("verification", f"next steps could not be planned: {one_line(error)}")
    texts = log.sample_texts
    return replace(verification, failure=texts.failure, repetition=texts.repetition, next_steps=steps)
