"""`llmquant eval`."""

import contextlib
import io
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import Device, Dtype, Json, Quiet, RemoteCode, count
from llmquant.cli.voice import show
from llmquant.errors import UserError


def eval_command(
    models: Annotated[list[str], Argument(help="Checkpoint folders or hub ids, quantized or not.", metavar="MODEL...")],
    against: Annotated[str | None, Option(help="The original: adds KL divergence and top-1 agreement with it.")] = None,
    dataset: Annotated[
        str | None, Option(help="wikitext2 (default), c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.")
    ] = None,
    join: Annotated[
        str, Option(help="Between rows: rows (a blank line), text (nothing), auto (the source's own rule).")
    ] = "auto",
    chat: Annotated[
        bool, Option("--chat", help="Rows are conversations: put their messages into the chat template.")
    ] = False,
    seq_len: Annotated[int | None, Option(help="Tokens of a window; by default 2048, or the model's context.")] = None,
    stride: Annotated[int | None, count("Tokens between windows' beginnings; by default they do not overlap.")] = None,
    windows: Annotated[int | None, count("Use only the first N windows.")] = None,
    batch_size: Annotated[int, count("Windows, or questions, that run side by side.")] = 1,
    tasks: Annotated[
        str | None, Option(help="Tasks of lm-evaluation-harness: arc_easy,hellaswag.", metavar="NAMES")
    ] = None,
    task_folder: Annotated[Path | None, Option(help="Folder with .yaml files of further tasks.")] = None,
    examples: Annotated[int | None, count("Ask only the first N questions of a task.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of models, how far they are from the original (--against), and their scores in --tasks."""
    if tasks is None and (task_folder is not None or examples is not None):
        raise UserError("eval: --task-folder and --examples go with --tasks; name the tasks")
    from llmquant.console.evaluate import print_evaluation
    from llmquant.console.progress import progress, quiet_libraries

    quiet_libraries()
    from llmquant.pipeline.evaluate import evaluate

    # The bars of lm-evaluation-harness write to stderr, and have no switch.
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    with progress(quiet=quiet) as on_step, silence:
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
            on_step=on_step,
        )
    show(result, print_evaluation, as_json=as_json)
