"""`llmquant quantize`."""

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from llmquant.cli.options import Device, Json, NewFolder, Overwrite, Quiet, RemoteCode, Restart, integer_option
from llmquant.cli.output import Interrupted, is_main_process, print_error, print_result
from llmquant.errors import UserError
from llmquant.paths import parse_path, partial_folder
from llmquant.spec import EFFORTS, METHODS, SUPPORTED_BITS, Options, Override, QuantSpec, Recipe, parse_size

if TYPE_CHECKING:
    from llmquant.planning.plan import Plan

RECIPE, SPEC, OPTIONS = Recipe(), Recipe().spec, Options()
"""Objects with the default values of the options below."""


def quantize_command(
    model: Annotated[str, Argument(help="Checkpoint folder or hub id; not quantized yet.")],
    out: NewFolder,
    method: Annotated[str, Option(help=f"Quantization method: {', '.join(METHODS)}.")] = RECIPE.method,
    effort: Annotated[str, Option(help=f"Search effort: {', '.join(EFFORTS)}.")] = "default",
    bits: Annotated[int, Option(help=f"Bits per weight: {', '.join(map(str, SUPPORTED_BITS))}.")] = SPEC.bits,
    group_size: Annotated[
        int, Option(help="Input columns per scale; -1 for one scale per output channel.")
    ] = SPEC.group_size,
    symmetric: Annotated[
        bool, Option("--sym/--asym", help="Symmetric grid, or a zero-point for each group.")
    ] = SPEC.symmetric,
    format: Annotated[
        str, Option(help="gptq, gptq_v2, awq, compressed-tensors; auto is gptq, or compressed-tensors with --asym.")
    ] = "auto",
    dtype: Annotated[
        str, Option(help="Dtype of unquantized tensors: auto (unchanged), float32, bfloat16 or float16.")
    ] = "auto",
    calibration: Annotated[
        str,
        Option(
            help="Calibration text: wikitext2, c4, ptb, python-docs, or a .txt, .jsonl or .parquet file; auto is c4, "
            "or python-docs without the hub."
        ),
    ] = "auto",
    samples: Annotated[int, integer_option("Number of calibration samples.")] = OPTIONS.num_samples,
    seq_len: Annotated[int, integer_option("Tokens of each calibration sample.")] = OPTIONS.seq_len,
    seed: Annotated[int, integer_option("Seed of the random choice of samples.")] = OPTIONS.seed,
    skip: Annotated[
        list[str] | None,
        Option(help="Do not quantize linears that match, such as '*.down_proj'. May be repeated.", metavar="PATTERN"),
    ] = None,
    override: Annotated[
        list[str] | None,
        Option(
            help="Another grid for linears that match: '*.down_proj:bits=8,group_size=64,asym', or 'PATTERN:skip'. "
            "May be repeated; the last match wins.",
            metavar="PATTERN:CHANGES",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        Option(help="Choose a grid for each linear, with at most this average of bits per weight.", metavar="BITS"),
    ] = None,
    target_size: Annotated[
        str | None,
        Option(
            help="Choose a grid for each linear, for a result of at most this size: 5GB, 750MB, 4.5GiB.", metavar="SIZE"
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        Option(
            help="Refuse a run whose result this engine cannot load: vllm, sglang, transformers. May be repeated.",
            metavar="ENGINE",
        ),
    ] = None,
    target: Annotated[list[str] | None, Option(hidden=True, help="Deprecated alias of --engine.")] = None,
    tensor_parallel: Annotated[
        int, integer_option("Number of GPUs that will share the model in the engines.")
    ] = OPTIONS.tensor_parallel,
    device: Device = "auto",
    verify: Annotated[
        bool, Option("--verify/--no-verify", help="Compare the result with MODEL on held-out text.")
    ] = OPTIONS.verify,
    max_memory: Annotated[
        str | None,
        Option(
            help="Memory limit (of the GPU with --device cuda): 3GB, 800MiB. Activations that do not fit are "
            "written to disk.",
            metavar="SIZE",
        ),
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Exit with code 1 if there was any fallback.")] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and predictions only.")] = False,
    machine: Annotated[
        str | None,
        Option(
            help="With --dry-run: predict memory and time for another machine, from data sheets: h100, h200, "
            "a100-80gb, a100-40gb, l40s, l4, rtx4090; 8xh100 for 8 cards.",
            metavar="NAME",
        ),
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into the folder OUT."""
    out = parse_path(out)
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    if effort not in EFFORTS:
        raise UserError(f"effort '{effort}': not one of {', '.join(EFFORTS)}; use --effort default")
    if machine is not None:
        _check_machine(machine, device, dry_run=dry_run)
    overrides = tuple(Override.parse(text) for text in override or ())
    recipe = Recipe(
        method=method,
        spec=spec,
        skip=tuple(skip or ()),
        overrides=overrides,
        target_bpw=target_bpw,
        target_bytes=None if target_size is None else parse_size(target_size, "target_size"),
        **EFFORTS[effort],
    )
    from llmquant.console.calibration import print_calibration
    from llmquant.console.plan import print_plan
    from llmquant.console.progress import quiet_libraries, show_block_progress
    from llmquant.console.report import print_report

    try:
        quiet_libraries()
        from llmquant.pipeline import quantize as pipeline

        options = Options(
            format=format,
            dtype=dtype,
            calibration=calibration,
            num_samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            machine=machine,
            max_memory_bytes=None if max_memory is None else parse_size(max_memory, "max_memory"),
            engines=(*(engine or ()), *(target or ())),
            tensor_parallel=tensor_parallel,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            verify=verify,
        )
        if dry_run:
            plan = pipeline.dry_run(model, out, recipe, options)
            if as_json:
                print(json.dumps(_predictions(plan)))
            else:
                print_plan(plan, out)
            return
        is_quiet = quiet or not is_main_process()
        with show_block_progress(quiet=is_quiet) as on_progress:
            command = shlex.join(["llmquant", *sys.argv[1:]])
            on_calibration = None if is_quiet else print_calibration
            report = pipeline.quantize(
                model, out, recipe, options, on_progress, on_calibration=on_calibration, command=command
            )
    except KeyboardInterrupt:
        if not partial_folder(out).exists():
            raise
        without = " without --restart" if restart else ""
        raise Interrupted(f"interrupted; the same command{without} continues the run") from None
    print_result(report, print_report, as_json=as_json)
    if report.verification.verdict == "broken":
        print_error("the result is broken, see the verdict")
        raise typer.Exit(1)
    if strict and report.fallbacks:
        print_error(f"--strict: {len(report.fallbacks)} fallbacks")
        raise typer.Exit(1)


def _check_machine(machine: str, device: str, *, dry_run: bool) -> None:
    """Raise UserError if --machine is not the name of a machine, or does not go with the other options."""
    from llmquant.estimates.machines import parse_machine

    parse_machine(machine)
    if not dry_run:
        raise UserError(f"machine '{machine}': predictions for a machine are made by a dry run; add --dry-run")
    if device != "auto":
        raise UserError(f"machine '{machine}': predictions are for its GPU; leave out --device {device}")


def _predictions(plan: "Plan") -> dict[str, Any]:
    """Return a plan and its predictions as plain values, for JSON."""
    from llmquant.estimates.duration import estimate_duration
    from llmquant.estimates.machine_duration import predict_duration
    from llmquant.estimates.machines import parse_machine
    from llmquant.estimates.memory import estimate_memory
    from llmquant.planning.coverage import coverage_of

    machine = plan.options.machine
    # The memory is estimated before the timings, which add to it.
    memory = estimate_memory(plan)
    duration = estimate_duration(plan) if machine is None else predict_duration(plan, parse_machine(machine))
    parts = (plan, coverage_of(plan), memory, duration)
    predictions = {key: value for part in parts for key, value in part.to_dict().items()}
    if machine is not None:
        predictions["fits_in_memory"] = memory.peak_bytes <= parse_machine(machine).memory_bytes
    return predictions
