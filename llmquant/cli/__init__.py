"""The command line. Each subcommand is a thin wrapper of a function that Python code can call too.

Heavy packages are imported only inside the commands, so `llmquant --help` loads neither torch nor transformers.
A `UserError`, and the name of a package that is not installed, is printed as one line on stderr, with exit code 2.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from typer import Option

from llmquant.cli.bench import bench_command, tune_command
from llmquant.cli.convert import convert_command
from llmquant.cli.evaluate import eval_command
from llmquant.cli.generate import generate_command
from llmquant.cli.inspect import inspect_command, report_command, verify_command
from llmquant.cli.missing import missing_package
from llmquant.cli.output import Interrupted, is_main_process, print_error
from llmquant.cli.quantize import quantize_command
from llmquant.errors import UserError
from llmquant.paths import check_encoding
from llmquant.remote_code import failure_of_remote_code, failure_to_call_remote_code
from llmquant.version import __version__

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""

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
"""The subcommands in the order of `llmquant --help`."""

app = typer.Typer(
    name="llmquant",
    help="Quantize the weights of Hugging Face causal language models, run the result and measure it.",
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
        with contextlib.nullcontext() if is_main_process() else contextlib.redirect_stdout(None):
            app()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except Interrupted as stop:
        print_error(stop)
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = failure_of_remote_code(error) or failure_to_call_remote_code(error) or missing_package(error)
        if line is None:
            raise
        print_error(line)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C during a command into this exit code without a message. Ctrl-C before the command begins
        # raises KeyboardInterrupt here.
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            if (line := failure_of_remote_code(stop)) is None:
                raise
            print_error(line)
            sys.exit(2)
        print_error("interrupted")
        sys.exit(INTERRUPTED)
