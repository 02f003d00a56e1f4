"""`llmquant convert`."""

from typing import Annotated

from typer import Argument, Option

from llmquant.cli.options import Json, NewFolder, Overwrite, Quiet, RemoteCode, Restart
from llmquant.cli.output import print_result


def convert_command(
    model: Annotated[str, Argument(help="Quantized checkpoint of any tool: a folder or hub id.")],
    out: NewFolder,
    format: Annotated[str, Option(help="gptq, gptq_v2, awq, compressed-tensors, or dense for dequantized weights.")],
    dtype: Annotated[
        str, Option(help="Dtype of dense weights: auto (from config.json), float32, bfloat16, float16.")
    ] = ("auto"),
    overwrite: Overwrite = False,
    restart: Restart = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a quantized MODEL to another format without rounding again; refuse if anything would be lost."""
    from llmquant.console.convert import print_converted
    from llmquant.console.progress import quiet_libraries, show_progress

    quiet_libraries()
    from llmquant.conversion import convert

    with show_progress(quiet=quiet) as on_progress:
        converted = convert(
            model,
            out,
            format,
            dtype=dtype,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
    print_result(converted, print_converted, as_json=as_json)
