"""`llmquant bench` and `llmquant tune`: how fast, and how to make it faster."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import AnyModel, Device, Dtype, Json, Quiet, RemoteCode, count
from llmquant.cli.voice import show
from llmquant.paths import typed_path


def bench_command(
    model: AnyModel,
    against: Annotated[str | None, Option(help="The original, or another model, to compare with.")] = None,
    backend: Annotated[
        list[str] | None,
        Option(help="Kernel of MODEL's linears; may be repeated; all: each that takes them.", metavar="NAME"),
    ] = None,
    prompt_tokens: Annotated[int, count("Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, count("Tokens that follow.")] = 64,
    batch_size: Annotated[int, count("Prompts that run together.")] = 1,
    repeats: Annotated[int, count("Turns, of which the median counts.")] = 3,
    plot: Annotated[Path | None, Option(help="Also draw it: an .svg, .png or .pdf file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How fast MODEL runs and what memory it takes, by kernel, beside its original."""
    from llmquant.console.bench import check_plot_path, plot_bench, print_bench
    from llmquant.console.progress import progress, quiet_libraries

    if plot is not None:
        plot = typed_path(plot)
        check_plot_path(plot)
    quiet_libraries()
    from llmquant.runtime.bench import Workload, bench

    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats)
    with progress(quiet=quiet) as on_step:
        result = bench(
            model,
            against,
            backends=backend or ("auto",),
            workload=workload,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_step=on_step,
        )
    if plot is not None:
        plot_bench(result, plot)
    show(result, print_bench, as_json=as_json)


def tune_command(
    model: Annotated[str, Argument(help="A quantized checkpoint folder or hub id, for its shapes.")],
    out: Annotated[Path | None, Option(help="The table; by default the one that is read.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Find the best tiles for MODEL's shapes on the GPU that is here, and keep them in a table."""
    from llmquant.console.progress import quiet_libraries

    quiet_libraries()
    from llmquant.runtime.explain import tune_model

    report = (lambda line: None) if quiet else partial(print, file=sys.stderr, flush=True)
    table = tune_model(model, device=device, dtype=dtype, path=out, trust_remote_code=trust_remote_code, report=report)
    print(table)
