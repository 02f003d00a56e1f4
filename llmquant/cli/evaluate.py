"""`llmquant eval`."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import Device, Dtype, Json, Quiet, RemoteCode, integer_option
from llmquant.cli.output import print_result
from llmquant.errors import UserError


def eval_command(
    models: Annotated[list[str], Argument(help="Checkpoint folders or hub ids, quantized or not.", metavar="MODEL...")],
    against: Annotated[str | None, Option(help="The original model, for KL divergence and top-1 agreement.")] = None,
    dataset: Annotated[
        str | None, Option(help="wikitext2 (default), c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.")
    ] = None,
    join: Annotated[
        str, Option(help="Separator of rows: rows (a blank line), text (nothing), auto (by source).")
    ] = "auto",
    chat: Annotated[
        bool, Option("--chat", help="Rows are conversations; apply the chat template to their messages.")
    ] = False,
    seq_len: Annotated[
        int | None, Option(help="Tokens of a window; by default 2048, or the model's context if shorter.")
    ] = None,
    stride: Annotated[
        int | None,
        integer_option("Tokens from the start of one window to the next; by default windows do not overlap."),
    ] = None,
    windows: Annotated[int | None, integer_option("Use only the first N windows.")] = None,
    batch_size: Annotated[int, integer_option("Windows, or questions of a task, in a batch.")] = 1,
    tasks: Annotated[
        str | None, Option(help="Tasks of lm-evaluation-harness, such as arc_easy,hellaswag.", metavar="NAMES")
    ] = None,
    task_folder: Annotated[Path | None, Option(help="Folder with .yaml files of more tasks.")] = None,
    examples: Annotated[int | None, integer_option("Use only the first N questions of each task.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, KL divergence from the original (--against), and scores in --tasks."""
    if tasks is None and (task_folder is not None or examples is not None):
        raise UserError("eval: --task-folder and --examples go with --tasks; name the tasks")
    from llmquant.console.evaluate import print_evaluation
    from llmquant.console.progress import quiet_libraries, show_progress

    quiet_libraries()
    from llmquant.runtime.evaluate import evaluate

    # The progress bars of lm-evaluation-harness write to stderr and cannot be switched off.
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    with show_progress(quiet=quiet) as on_progress, silence:
        result = evaluate(
            models,
            against,
            dataset=dataset,
            join=join,
            chat=chat,
            seq_len=seq_len,
            stride=stride,
            num_windows=windows,
            batch_size=batch_size,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else (),
            task_folder=task_folder,
            num_examples=examples,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
    print_result(result, print_evaluation, as_json=as_json)
