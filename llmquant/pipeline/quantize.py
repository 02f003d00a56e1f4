"""The main job, from the checkpoint to the finished folder.

    plan -> calibration tokens -> the loop over the blocks (`loop.py`) -> the tensors that stay as they are, config and
    tokenizer files -> reopen, compare with the original on held-out text, report -> atomic finish

What a run has finished is on the disk; a run that died is continued by the same command.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmquant import __version__
from llmquant.checkpoints.manifest import REPORT_HTML
from llmquant.checkpoints.out_folder import check_apart
from llmquant.checkpoints.reader import file_sha256
from llmquant.checkpoints.side_files import code_files
from llmquant.checkpoints.writer import PartialCheckpoint, begun_request, check_out
from llmquant.errors import first_words
from llmquant.hub import load_tokenizer, resolve_model
from llmquant.memory import give_back
from llmquant.paths import typed_inputs, typed_path
from llmquant.pipeline.budget import ALLOCATION, choose, grids_in, provisional, with_grids
from llmquant.pipeline.calibration import AUTO, CalibrationTokens, calibration_tokens, preview
from llmquant.pipeline.disk import check_disk
from llmquant.pipeline.feedback import feedback_part, network_feedback, packed
from llmquant.pipeline.footprint import footprint_of
from llmquant.pipeline.held_out import held_out
from llmquant.pipeline.loop import OnStep, quantize_without_data, walk_and_quantize
from llmquant.pipeline.next_steps import next_steps
from llmquant.pipeline.page import write_page
from llmquant.pipeline.parts import (
    OUTSIDE,
    extra_files,
    note_side_files,
    part_names,
    quantization_config,
    rounded_at_load,
    side_files,
    verify_copies,
    write_outside,
)
from llmquant.pipeline.plan import (
    DamagedWeights,
    Plan,
    check_tokens,
    make_plan,
)
from llmquant.pipeline.ranks import Ranks
from llmquant.pipeline.report import SCHEMA, Report, ReportBuilder, read_report
from llmquant.pipeline.samples import samples
from llmquant.pipeline.targets import check_targets
from llmquant.pipeline.verdict import BANDS, NOT_MEASURED, Verification
from llmquant.pipeline.verify import affordable, verify_codes, verify_texts
from llmquant.spec import Options, Recipe
from llmquant.textdata import preset_names

SENSITIVITY = "sensitivity"
"""The step that comes before the blocks where grids are chosen."""
GRADIENTS = "gradients"
"""The step that comes before the blocks where the network runs backward."""
OnCalibration = Callable[[dict[str, Any]], None]
"""Called with the account of the calibration text (`CalibrationTokens.audit`)."""


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    options: Options | None = None,
    on_step: OnStep | None = None,
    *,
    on_calibration: OnCalibration | None = None,
    command: str = "",
) -> Report:
    """Quantize a checkpoint (a local folder or hub id) into the folder OUT, which does not exist until it is complete.

    on_calibration: called with the account of the calibration text before any work is done on the model.
    command: what was typed, for the report.
    Raises UserError for whatever the user can mend; a run that was begun is then continued by the same call.
    """
    ranks = Ranks.join()
    with ranks.leading():
        return _quantize(
            str(model),
            typed_path(out),
            recipe or Recipe(),
            ranks.options(options or Options()),
            (ranks.is_first and on_step) or (lambda *_: None),
            (ranks.is_first and on_calibration) or (lambda _: None),
            command,
            ranks,
        )


def _quantize(
    model: str,
    out: Path,
    recipe: Recipe,
    options: Options,
    step: OnStep,
    on_calibration: OnCalibration,
    command: str,
    ranks: Ranks,
) -> Report:
    with ranks.together():
        plan = (
            prepare(model, out, recipe, options)
            if ranks.is_first
            else make_plan(resolve_model(model, options.trust_remote_code), recipe, options)
        )
    total = len(plan.block_names)
    builder = ReportBuilder(plan, model, command)
    if ranks.is_first:
        note_side_files(builder, side_files(plan.reader, out))
    for note in plan.notes:
        builder.remark("checkpoint", note)
    tokens = None
    if plan.recipe.needs_data:
        step(0, total, "calibration text", None)
        with builder.timed("calibration text"):
            tokens = ranks.share(lambda: draw_tokens(plan))
            give_back()
        builder.calibration(tokens)
        on_calibration(tokens.audit())
        with ranks.together():
            check_tokens(plan, tokens.tokens_SL)
    if not ranks.is_first:
        walks, grids = ranks.share(lambda: (False, None))  # what `share_course` says on the first
        if grids is not None:
            plan = with_grids(plan, grids)
        if tokens is not None and walks:
            with torch.no_grad():
                walk_and_quantize(plan, tokens, None, builder, step, ranks)
        return ranks.share(lambda: read_report(out))
    step(0, total, "hashing the checkpoint", None)
    with builder.timed("hashing"):
        account, tokens_SL = (None, None) if tokens is None else (tokens.audit(), tokens.tokens_SL)
        request = describe_request(plan, account, tokens_SL)
    with PartialCheckpoint.open(out, request, restart=options.restart, overwrite=options.overwrite) as partial:
        plan = settle(plan, tokens, partial, builder, step)
        measure_feedback(plan, tokens, partial, builder, step)
        parts = [OUTSIDE, *([ALLOCATION] if plan.recipe.has_budget else []), *part_names(plan)]
        if not partial.is_finishing:
            for part in partial.discarded:
                builder.incident(part, "damaged since it was written: made again")
            try:
                with torch.no_grad():
                    write_outside(plan, partial, builder)
                    if tokens is None:
                        share_course(ranks, partial, plan, walks=False)
                        quantize_without_data(plan, partial, builder, step)
                    else:
                        share_course(ranks, partial, plan, walks=True)
                        walk_and_quantize(plan, tokens, partial, builder, step, ranks)
            except DamagedWeights:
                # The hash of the damaged file is part of the request: a mended checkpoint could not go on from here.
                partial.discard()
                raise
        else:
            share_course(ranks, partial, plan, walks=False)
            for part in parts:
                builder.recall(partial.part_note(part))
        step(total, total, "finishing", None)
        with builder.timed("finishing"):
            folder = partial.assemble(
                parts,
                extra_files(plan),
                manifest={"request": request},
                max_shard_bytes=options.max_shard_bytes,
            )
        check(folder, out, plan, tokens, builder, step, folded_digests(plan, partial))
        partial.publish()
    return ranks.share(lambda: read_report(out))


def share_course(ranks: Ranks, partial: PartialCheckpoint, plan: Plan, *, walks: bool) -> None:
    """Tell the other ranks whether they are to walk, and on which grids where those were chosen to a budget."""
    chosen = partial.part_note(ALLOCATION)["allocation"] if plan.recipe.has_budget else None
    ranks.share(lambda: (walks, None if chosen is None else grids_in(chosen)))


def measure_feedback(
    plan: Plan, tokens: CalibrationTokens | None, partial: PartialCheckpoint, report: ReportBuilder, on_step: OnStep
) -> None:
    """Measure what the outputs of all linears mean to the predictions, where the recipe asks for it; once, also if the
    run is continued."""
    needed = {index for index, part in enumerate(part_names(plan)) if not partial.has_part(part)}
    there = all(partial.has_part(feedback_part(index)) for index in needed)
    if not plan.recipe.runs_backward or there or partial.is_finishing:
        return
    assert tokens is not None
    total = len(plan.block_names)

    def on_block(share: float) -> None:
        on_step(int(share * total), total, GRADIENTS, None)

    try:
        with report.timed("gradients"):
            found = network_feedback(plan, tokens.tokens_SL, partial.scratch / "outputs", report, on_block)
            for index, feedback in enumerate(found):
                if index in needed:
                    partial.add_part(feedback_part(index), *packed(feedback))
    except DamagedWeights:
        partial.discard()
        raise


def settle(
    plan: Plan, tokens: CalibrationTokens | None, partial: PartialCheckpoint, report: ReportBuilder, on_step: OnStep
) -> Plan:
    """The plan with its grids chosen to the budget, where there is one; chosen once, also if the run is continued."""
    if not plan.recipe.has_budget:
        return plan
    assert tokens is not None
    total = len(plan.block_names)
    if not partial.has_part(ALLOCATION):
        try:
            with report.timed("sensitivity"):
                chosen = choose(plan, tokens.tokens_SL, lambda: on_step(0, total, SENSITIVITY, None))
        except DamagedWeights:
            partial.discard()
            raise
        partial.add_part(ALLOCATION, {}, {"allocation": chosen})
    chosen = partial.part_note(ALLOCATION)["allocation"]
    plan = with_grids(plan, grids_in(chosen))
    check_targets(plan)
    quantization_config(plan)
    report.settle(plan, chosen)
    return plan


def folded_digests(plan: Plan, partial: PartialCheckpoint) -> dict[str, str]:
    """SHA-256 of the parameters that AWQ's scales changed and that are not quantized, by tensor name."""
    notes = (partial.part_note(part) for part in part_names(plan))
    return {plan.skeleton.names[name]: sha for note in notes for name, sha in note.get("folded", {}).items()}


def check(
    folder: Path,
    out: Path,
    plan: Plan,
    tokens: CalibrationTokens | None,
    report: ReportBuilder,
    on_step: OnStep,
    folded: Mapping[str, str],
) -> None:
    """What comes last: reopen the folder that becomes OUT, measure it, and put the report into it.

    Raises UserError where a weight does not come back as it was solved, or a tensor as it was copied.
    """
    total = len(plan.block_names)
    on_step(total, total, "verifying", None)
    with report.timed("verifying"):
        verify_codes(folder, plan, {linear.name: linear.digest for linear in report.linears})
        verify_copies(folder, plan, folded)
        if plan.recipe.needs_data or plan.options.verify:
            for name, what in rounded_at_load(plan).items():
                report.incident(name, what)
        if plan.options.verify:
            report.verification = measure(folder, plan, tokens, report)
    if plan.options.verify:
        on_step(total, total, "samples", None)
        with report.timed("samples"):
            report.samples = samples(folder, plan)
        if report.samples.failure:
            report.incident("samples", f"the quantized model does not run here: {report.samples.failure}")
        if report.samples.template_failure:
            report.remark("samples", f"texts instead of questions: {report.samples.template_failure}")
        if report.samples.original_failure:
            report.remark("samples", f"the original does not run here: {report.samples.original_failure}")
        report.verification = concluded(report.verification, plan, report)
    report.finish(folder, out).write(folder)
    write_page(read_report(folder), folder / REPORT_HTML)


def measure(folder: Path, plan: Plan, tokens: CalibrationTokens | None, report: ReportBuilder) -> Verification:
    """The finished folder against the original, on held-out text; where that cannot be done, it is an incident."""
    try:
        texts = affordable(plan, held_out(plan, tokens), sum(report.seconds.values()))
        measured = verify_texts(folder, plan, texts)
    # No text, no memory for the head, a model that cannot run here: the checkpoint is finished and its codes are right.
    except Exception as error:
        measured = Verification(verdict=NOT_MEASURED, reason=first_words(error))
    if measured.verdict == NOT_MEASURED:
        report.incident("verification", f"not measured on text: {measured.reason}")
    return measured


def concluded(measured: Verification, plan: Plan, report: ReportBuilder) -> Verification:
    """The verification with what the samples have shown, and with what to try next if the verdict is not good."""
    steps: tuple[tuple[str, str], ...] = ()
    if measured.verdict in BANDS[1:]:
        try:
            errors = [(linear.kind, linear.error) for linear in report.linears]
            steps = next_steps(plan, errors, report.num_windows)
        except Exception as error:  # plans are made anew: a failure must not cost the run that is done
            report.remark("verification", f"what to try next could not be planned: {first_words(error)}")
    return replace(measured, failure=report.samples.failure, repetition=report.samples.repetition, next_steps=steps)


def prepare(model: str | Path, out: Path, recipe: Recipe, options: Options) -> Plan:
    """The plan of a run, once nothing that can be known without reading a weight speaks against it."""
    has_preset = options.calibration in (AUTO, *preset_names())
    reads = typed_inputs(model) if has_preset else typed_inputs(model, options.calibration)
    check_out(out, overwrite=options.overwrite, restart=options.restart, reads=reads)
    plan = make_plan(resolve_model(str(model), options.trust_remote_code), recipe, options)
    if recipe.has_budget:
        plan = provisional(plan)
    check_targets(plan)
    quantization_config(plan)
    beside = side_files(plan.reader, out)
    check_apart(out, [plan.path, *plan.reader.shards, *(plan.path / name for name in beside.kept)])
    footprint_of(plan).check()
    check_disk(plan, out)
    return plan


def dry_run(model: str | Path, out: str | Path, recipe: Recipe | None = None, options: Options | None = None) -> Plan:
    """What `quantize` would do, with the calibration text that it would use; refuses what it would refuse.

    Writes nothing, reads no weight, and of a text that would be fetched only the first row. Only if an unfinished run
    could be continued, the weights are hashed: its journal holds their hashes.
    """
    out = typed_path(out)
    plan = prepare(model, out, recipe or Recipe(), options or Options())
    account, tokens_SL = None, None
    if plan.recipe.needs_data:
        account, tokens_SL = preview(load_tokenizer(plan.path, plan.options.trust_remote_code), *_draw(plan))
        if tokens_SL is not None:
            check_tokens(plan, tokens_SL)
    begun = None if plan.options.restart else begun_request(out)
    if begun is not None:
        request = describe_request(plan, account, tokens_SL)
        if plan.recipe.needs_data and tokens_SL is None:
            request["calibration"] = (begun.get("calibration") or {}) | asked_calibration(plan.options)
        check_out(out, overwrite=plan.options.overwrite, request=request)
    return replace(plan, calibration=account)


def draw_tokens(plan: Plan) -> CalibrationTokens:
    """The calibration tokens of a run."""
    return calibration_tokens(load_tokenizer(plan.path, plan.options.trust_remote_code), *_draw(plan))


def _draw(plan: Plan) -> tuple[str, int, int, int]:
    """Source, samples, tokens of a sample, and seed."""
    options = plan.options
    return options.calibration, options.num_samples, options.seq_len, options.seed


def describe_request(plan: Plan, account: dict[str, Any] | None, tokens_SL: Tensor | None) -> dict[str, Any]:
    """Everything the result depends on: it identifies a run that is continued, and is kept in OUT's manifest.

    account: that of the calibration text (`CalibrationTokens.audit`). tokens_SL: its samples, int64 [S, L], if known.
    """
    request: dict[str, Any] = {
        "llmquant": __version__,
        "report_schema": SCHEMA,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format": plan.format.name,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "casts": plan.options.dtype != "auto",
        "device": plan.skeleton.device.type,
        "recipe": asdict(plan.recipe),
        "max_shard_bytes": plan.options.max_shard_bytes,
        "model": plan.reader.file_hashes(),
        "code": _code_hashes(plan),
    }
    if account is not None and tokens_SL is not None:
        digest = hashlib.sha256(tokens_SL.contiguous().numpy().tobytes()).hexdigest()
        # The words of a network error are different every time.
        counts = {name: value for name, value in account.items() if name not in ("incidents", "remarks")}
        request["calibration"] = counts | {"sha256": digest}
    return request


def _code_hashes(plan: Plan) -> dict[str, str]:
    """SHA-256 of the checkpoint's Python files by name, if they are trusted: other code makes another network."""
    names = sorted(code_files(plan.path)) if plan.options.trust_remote_code else []
    return {name: file_sha256(plan.path / name) for name in names}


def asked_calibration(options: Options) -> dict[str, Any]:
    """What of a request's calibration is known before the text is read."""
    counts = {"num_samples": options.num_samples, "seq_len": options.seq_len, "seed": options.seed}
    return counts if options.calibration == AUTO else counts | {"source": options.calibration}
