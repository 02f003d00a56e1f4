"""What several commands take, declared once: arguments, options, and the shape that most other options have."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def count(help: str) -> Any:
    """An option that is a whole number."""
    return Option(help=help, metavar="N")


AnyModel = Annotated[str, Argument(help="Checkpoint folder or hub id, quantized or not.")]
NewFolder = Annotated[Path, Argument(help="The folder to make.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N; auto takes the GPU where there is one.")]
Dtype = Annotated[str, Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace OUT, a finished checkpoint, once the new one is complete.")
]
Restart = Annotated[bool, Option("--restart", help="Forget what an unfinished run has left.")]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run the Python code that comes with the checkpoint.")]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress, only the result.")]
