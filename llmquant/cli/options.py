"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def integer_option(help: str) -> Any:
    """Return an option whose value is an integer."""
    return Option(help=help, metavar="N")


AnyModel = Annotated[str, Argument(help="Checkpoint folder or hub id, quantized or not.")]
NewFolder = Annotated[Path, Argument(help="Folder to create.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
Dtype = Annotated[str, Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace a finished checkpoint OUT once the new one is complete.")
]
Restart = Annotated[bool, Option("--restart", help="Discard an unfinished run and start again.")]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run the Python code in the checkpoint.")]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print the result only, no progress.")]
