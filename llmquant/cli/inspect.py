"""`llmquant inspect`, `llmquant verify` and `llmquant report`, which describe a finished checkpoint."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from llmquant.cli.options import AnyModel, Device, Dtype, Json, RemoteCode
from llmquant.paths import parse_path


def inspect_command(
    model: AnyModel,
    backends: Annotated[
        bool, Option("--backends", help="Also list the kernel of each kind of linear, with the reason.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """List the tensors of MODEL by kind: grids, sizes, bits per weight. Reads headers only."""
    from llmquant.checkpoints.summary import inspect
    from llmquant.console.contents import print_backends, print_contents
    from llmquant.console.progress import quiet_libraries
    from llmquant.hub import resolve_model

    contents = inspect(resolve_model(model))
    choices = {}
    if backends:
        quiet_libraries()
        from llmquant.runtime.explain import explain_backends

        choices = explain_backends(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if as_json:
        by_linear = {
            name: {"backend": choice.backend.name, "reason": choice.reason, "refusals": choice.refusals}
            for name, choice in choices.items()
        }
        print(json.dumps(contents.to_dict() | ({"backends": by_linear} if backends else {})))
    else:
        print_contents(contents)
        if backends:
            print_backends(choices)


def verify_command(out: Annotated[Path, Argument(help="Folder that llmquant wrote.")], as_json: Json = False) -> None:
    """Compare the files of OUT with the hashes in its manifest; exit with 1 if one differs."""
    from llmquant.checkpoints.manifest import read_manifest, verify_files

    out = parse_path(out)
    manifest = read_manifest(out)
    problems = verify_files(out)
    if as_json:
        print(json.dumps({"path": str(out), "files": len(manifest["files"]), "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{out}: {len(manifest['files'])} files, all unchanged")
    if problems:
        raise typer.Exit(1)


def report_command(
    out: Annotated[Path, Argument(help="Folder that llmquant quantize wrote.")],
    output: Annotated[Path | None, Option(help="Write the page to this file; by default report.html in OUT.")] = None,
) -> None:
    """Render the report page again from quantize_report.json in OUT."""
    from llmquant.checkpoints.manifest import REPORT_HTML
    from llmquant.report.page import check_page_path, write_page
    from llmquant.report.schema import read_report

    out = parse_path(out)
    file = out / REPORT_HTML if output is None else parse_path(output)
    report = read_report(out)
    check_page_path(file)
    write_page(report, file)
    print(file)
