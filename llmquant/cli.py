"""The command line: one function per subcommand, each a thin skin over a function that Python can call too.

Nothing heavy is imported here, only inside the commands: `llmquant --help` loads neither torch nor transformers.
What a user can cause (`UserError`) is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from llmquant import __version__
from llmquant.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

app = typer.Typer(
    name="llmquant",
    help="Quantize the weights of Hugging Face causal language models, run them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `llmquant` command."""
    try:
        app()
    except UserError as error:
        print(f"llmquant: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        # typer turns Ctrl-C into this code, without a word.
        if stop.code == INTERRUPTED:
            print("llmquant: interrupted", file=sys.stderr)
        raise


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


# Options that several commands share.
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes the GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, quantized or not.")],
    against: Annotated[
        str | None,
        typer.Option(help="The original: adds KL divergence and top-1 agreement with it.", show_default=False),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="wikitext2, c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.")
    ] = "wikitext2",
    join: Annotated[
        str, typer.Option(help="Between rows: rows (a blank line), text (nothing), auto (the source's own rule).")
    ] = "auto",
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a window; by default 2048, or the model's context.", show_default=False),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Use only the first N windows.", metavar="N", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of MODEL, and with --against how far it is from the original."""
    from llmquant import console

    console.quiet_libraries()
    from llmquant.pipeline.evaluate import evaluate

    with console.progress(quiet=quiet) as on_step:
        result = evaluate(
            model,
            against,
            dataset=dataset,
            join=join,
            seq_len=seq_len,
            num_windows=windows,
            device=device,
            dtype=dtype,
            on_step=on_step,
        )
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        console.print_evaluation(result)


if __name__ == "__main__":
    main()
