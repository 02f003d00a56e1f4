"""`llmquant bench` and `llmquant tune`."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import AnyModel, Device, Dtype, Json, Quiet, RemoteCode, integer_option
from llmquant.cli.output import print_result
from llmquant.paths import parse_path


def bench_command(
    model: AnyModel,
    against: Annotated[str | None, Option(help="The original, or another model, to compare with.")] = None,
    backend: Annotated[
        list[str] | None,
        Option(
            help="Kernel of the quantized linears. May be repeated; 'all' runs every kernel that supports them.",
            metavar="NAME",
        ),
    ] = None,
    prompt_tokens: Annotated[int, integer_option("Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, integer_option("New tokens after each prompt.")] = 64,
    batch_size: Annotated[int, integer_option("Prompts in a batch.")] = 1,
    repeats: Annotated[int, integer_option("Repetitions; the median is reported.")] = 3,
    plot: Annotated[Path | None, Option(help="Write a plot to this .svg, .png or .pdf file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cuda_graph: Annotated[bool, Option(help="On a GPU: decode with CUDA graphs.")] = True,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the speed and memory of MODEL, by kernel, beside its original."""
    from llmquant.console.bench import check_plot_path, plot_bench, print_bench
    from llmquant.console.progress import quiet_libraries, show_progress

    if plot is not None:
        plot = parse_path(plot)
        check_plot_path(plot)
    quiet_libraries()
    from llmquant.runtime.bench import Workload, bench

    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats)
    with show_progress(quiet=quiet) as on_progress:
        result = bench(
            model,
            against,
            backends=backend or ("auto",),
            workload=workload,
            device=device,
            dtype=dtype,
            cuda_graph=cuda_graph,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
    if plot is not None:
        plot_bench(result, plot)
    print_result(result, print_bench, as_json=as_json)


def tune_command(
    model: Annotated[str, Argument(help="Quantized checkpoint folder or hub id, whose shapes are tuned.")],
    rows: Annotated[
        str | None, Option(help="Numbers of rows of x to tune for, such as 1,16,64. [default: 1 to 512]")
    ] = None,
    seconds: Annotated[float | None, Option(help="Start no measurement after this many seconds.")] = None,
    out: Annotated[Path | None, Option(help="Write the table to this file instead of the cache.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest kernel tiles for MODEL's shapes on this GPU, and store them in a table."""
    from llmquant.console.progress import quiet_libraries

    quiet_libraries()
    from llmquant.runtime.explain import parse_rows, tune_model

    report = (lambda line: None) if quiet else partial(print, file=sys.stderr, flush=True)
    table = tune_model(
        model,
        device=device,
        dtype=dtype,
        rows=parse_rows(rows),
        max_seconds=seconds,
        path=out,
        trust_remote_code=trust_remote_code,
        report=report,
    )
    print(table)
