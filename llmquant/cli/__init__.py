"""The command line: one function per subcommand, each a thin skin over a function that Python can call too.

Nothing heavy is imported here, only inside the commands: `llmquant --help` loads neither torch nor transformers.
What a user can cause (`UserError`) is one line on stderr and exit code 2.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer import Option

from llmquant import __version__
from llmquant.cli.bench import bench_command, tune_command
from llmquant.cli.convert import convert_command
from llmquant.cli.evaluate import eval_command
from llmquant.cli.folder import inspect_command, report_command, verify_command
from llmquant.cli.generate import generate_command
from llmquant.cli.quantize import quantize_command
from llmquant.cli.voice import Interrupted, say, speaks
from llmquant.errors import UserError
from llmquant.paths import check_encoding
from llmquant.remote_code import failure_of_remote_code, failure_to_call_remote_code

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize_command,
    "convert": convert_command,
    "generate": generate_command,
    "bench": bench_command,
    "tune": tune_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "report": report_command,
    "eval": eval_command,
}
"""In the order of `llmquant --help`."""

app = typer.Typer(
    name="llmquant",
    help="Quantize the weights of Hugging Face causal language models, run them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `llmquant` command."""
    try:
        for argument in sys.argv[1:]:
            check_encoding(argument)
        with contextlib.nullcontext() if speaks() else contextlib.redirect_stdout(None):
            app()
    except UserError as error:
        say(error)
        sys.exit(2)
    except Interrupted as stop:
        say(stop)
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = failure_of_remote_code(error) or failure_to_call_remote_code(error)
        if line is None:
            raise
        say(line)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C into this code, without a word; before its command has begun, it lets it through.
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            if (line := failure_of_remote_code(stop)) is None:
                raise
            say(line)
            sys.exit(2)
        say("interrupted")
        sys.exit(INTERRUPTED)
