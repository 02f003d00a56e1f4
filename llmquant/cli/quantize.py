"""`llmquant quantize`."""

import json
import shlex
import sys
from typing import Annotated

import typer
from typer import Argument, Option

from llmquant.cli.options import Device, Json, NewFolder, Overwrite, Quiet, RemoteCode, Restart, count
from llmquant.cli.voice import Interrupted, say, show, speaks
from llmquant.errors import UserError
from llmquant.paths import partial_folder, typed_path
from llmquant.spec import EFFORTS, METHODS, SUPPORTED_BITS, Options, Override, QuantSpec, Recipe, parse_size

RECIPE, SPEC, OPTIONS = Recipe(), Recipe().spec, Options()
"""Where the defaults come from."""


def quantize_command(
    model: Annotated[str, Argument(help="Checkpoint folder or hub id; not quantized yet.")],
    out: NewFolder,
    method: Annotated[str, Option(help=f"How codes are chosen: {', '.join(METHODS)}.")] = RECIPE.method,
    effort: Annotated[str, Option(help=f"How much is searched: {', '.join(EFFORTS)}.")] = "default",
    bits: Annotated[int, Option(help=f"Bits of a weight: {', '.join(map(str, SUPPORTED_BITS))}.")] = SPEC.bits,
    group_size: Annotated[
        int, Option(help="Input columns that share a scale; -1 for one scale per output.")
    ] = SPEC.group_size,
    symmetric: Annotated[
        bool, Option("--sym/--asym", help="Zero in the middle, or a zero-point per group.")
    ] = SPEC.symmetric,
    format: Annotated[
        str, Option(help="gptq, gptq_v2, awq, compressed-tensors; auto: gptq, or compressed-tensors with --asym.")
    ] = "auto",
    dtype: Annotated[
        str, Option(help="What stays unquantized: auto (as it is), float32, bfloat16 or float16.")
    ] = "auto",
    calibration: Annotated[
        str, Option(help="wikitext2, c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.")
    ] = "auto",
    samples: Annotated[int, count("Windows of calibration text.")] = OPTIONS.num_samples,
    seq_len: Annotated[int, count("Tokens of a window.")] = OPTIONS.seq_len,
    seed: Annotated[int, count("Of the draw of windows.")] = OPTIONS.seed,
    skip: Annotated[
        list[str] | None, Option(help="Leave linears in 16 bit: '*.down_proj'. May be repeated.", metavar="PATTERN")
    ] = None,
    override: Annotated[
        list[str] | None,
        Option(
            help="Another grid for some linears: '*.down_proj:bits=8,group_size=64,asym', or 'PATTERN:skip'. May be "
            "repeated; the last word counts.",
            metavar="PATTERN:CHANGES",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        Option(help="Choose grids linear by linear, so that they average this many bits per weight.", metavar="BITS"),
    ] = None,
    target_size: Annotated[
        str | None, Option(help="The same by the size of the result: 5GB, 750MB, 4.5GiB.", metavar="SIZE")
    ] = None,
    target: Annotated[
        list[str] | None,
        Option(
            help="Refuse what this engine would not load: vllm, sglang, transformers. May be repeated.",
            metavar="ENGINE",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, count("GPUs over which the targets will split the model.")
    ] = OPTIONS.tensor_parallel,
    device: Device = "auto",
    verify: Annotated[
        bool, Option("--verify/--no-verify", help="Compare the result with MODEL on held-out text.")
    ] = OPTIONS.verify,
    max_memory: Annotated[
        str | None,
        Option(
            help="Most memory to take (of the GPU with --device cuda): 3GB, 800MiB. Activations that do not fit go to "
            "the disk.",
            metavar="SIZE",
        ),
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Exit with 1 when anything fell back.")] = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would be done.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into the folder OUT."""
    out = typed_path(out)
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    if effort not in EFFORTS:
        raise UserError(f"effort '{effort}': not one of {', '.join(EFFORTS)}; use --effort default")
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
    from llmquant.console.progress import block_progress, quiet_libraries
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
            max_memory_bytes=None if max_memory is None else parse_size(max_memory, "max_memory"),
            targets=tuple(target or ()),
            tensor_parallel=tensor_parallel,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            verify=verify,
        )
        if dry_run:
            plan = pipeline.dry_run(model, out, recipe, options)
            if as_json:
                from llmquant.pipeline.coverage import coverage_of
                from llmquant.pipeline.duration import estimate
                from llmquant.pipeline.footprint import footprint_of

                predictions = (coverage_of(plan), footprint_of(plan), estimate(plan))
                print(
                    json.dumps({key: value for part in (plan, *predictions) for key, value in part.to_dict().items()})
                )
            else:
                print_plan(plan, out)
            return
        is_quiet = quiet or not speaks()
        with block_progress(quiet=is_quiet) as on_step:
            command = shlex.join(["llmquant", *sys.argv[1:]])
            on_calibration = None if is_quiet else print_calibration
            report = pipeline.quantize(
                model, out, recipe, options, on_step, on_calibration=on_calibration, command=command
            )
    except KeyboardInterrupt:
        if not partial_folder(out).exists():
            raise
        without = " without --restart" if restart else ""
        raise Interrupted(f"interrupted; the same command{without} continues the run") from None
    show(report, print_report, as_json=as_json)
    if report.verification.verdict == "broken":
        say("the result is broken, see the verdict")
        raise typer.Exit(1)
    if strict and report.incidents:
        say(f"--strict: {len(report.incidents)} incidents")
        raise typer.Exit(1)
