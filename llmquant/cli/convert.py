"""`llmquant convert`."""

from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import Json, NewFolder, Overwrite, Quiet, RemoteCode, Restart
from llmquant.cli.voice import show


def convert_command(
    model: Annotated[str, Argument(help="Quantized checkpoint, of any tool: a folder or hub id.")],
    out: NewFolder,
    format: Annotated[str, Option(help="gptq, gptq_v2, awq, compressed-tensors, or dense: plain weights.")],
    dtype: Annotated[str, Option(help="Of dense weights: auto (config.json's), float32, bfloat16, float16.")] = (
        "auto"
    ),
    overwrite: Overwrite = False,
    restart: Restart = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantized MODEL in another format, without a new rounding, or refuse and say what would be lost."""
    from llmquant.console.convert import print_converted
    from llmquant.console.progress import progress, quiet_libraries

    quiet_libraries()
    from llmquant.pipeline.convert import convert

    with progress(quiet=quiet) as on_step:
        converted = convert(
            model,
            out,
            format,
            dtype=dtype,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            on_step=on_step,
        )
    show(converted, print_converted, as_json=as_json)
