"""The command line: one function per subcommand, each a thin skin over a function that Python can call too.

Nothing heavy is imported here, only inside the commands: `llmquant --help` loads neither torch nor transformers.
What a user can cause (`UserError`) is one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmquant import __version__
from llmquant.errors import UserError
from llmquant.spec import EFFORTS, METHODS, SUPPORTED_BITS, Options, Override, QuantSpec, Recipe, parse_size

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

DEFAULT, DEFAULT_OPTIONS = Recipe(), Options()
"""Where the defaults of `llmquant quantize` come from."""


class Interrupted(Exception):
    """Ctrl-C, with something to say about it."""


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
        with contextlib.nullcontext() if speaks() else contextlib.redirect_stdout(None):
            app()
    except UserError as error:
        say(error)
        sys.exit(2)
    except Interrupted as stop:
        say(stop)
        sys.exit(INTERRUPTED)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns Ctrl-C into this code, without a word; before its command has begun, it lets it through.
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        say("interrupted")
        sys.exit(INTERRUPTED)


def speaks() -> bool:
    """Whether this is the process that tells what happens: of several ranks that torchrun started, the first."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def say(words: object) -> None:
    """One line on stderr."""
    if speaks():
        print(f"llmquant: {words}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def common(
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
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the checkpoint.")
]


@app.command("quantize")
def quantize_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; not quantized yet.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    method: Annotated[str, typer.Option(help=f"How codes are chosen: {', '.join(METHODS)}.")] = DEFAULT.method,
    effort: Annotated[str, typer.Option(help=f"How much is searched: {', '.join(EFFORTS)}.")] = "default",
    bits: Annotated[int, typer.Option(help=f"Bits of a weight: {', '.join(map(str, SUPPORTED_BITS))}.")] = (
        DEFAULT.spec.bits
    ),
    group_size: Annotated[
        int, typer.Option(help="Input columns that share a scale; -1 for one scale per output.")
    ] = DEFAULT.spec.group_size,
    symmetric: Annotated[
        bool, typer.Option("--sym/--asym", help="Zero in the middle, or a zero-point per group.")
    ] = DEFAULT.spec.symmetric,
    format: Annotated[
        str,
        typer.Option(
            help="gptq, gptq_v2, awq, compressed-tensors; auto: gptq, or compressed-tensors with --asym.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What stays unquantized: auto (as it is), float32, bfloat16 or float16.")
    ] = "auto",
    calibration: Annotated[
        str, typer.Option(help="wikitext2, c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.")
    ] = "auto",
    samples: Annotated[
        int, typer.Option(help="Windows of calibration text.", metavar="N")
    ] = DEFAULT_OPTIONS.num_samples,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", metavar="N")] = DEFAULT_OPTIONS.seq_len,
    seed: Annotated[int, typer.Option(help="Of the draw of windows.", metavar="N")] = DEFAULT_OPTIONS.seed,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave linears in 16 bit: '*.down_proj'. May be repeated.", metavar="PATTERN"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Another grid for some linears: '*.down_proj:bits=8,group_size=64,asym', or 'PATTERN:skip'. May be "
            "repeated; the last word counts.",
            metavar="PATTERN:CHANGES",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Choose grids linear by linear, so that they average this many bits per weight.",
            metavar="BITS",
            show_default=False,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="The same by the size of the result: 5GB, 750MB, 4.5GiB.", metavar="SIZE", show_default=False
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Refuse what this engine would not load: vllm, sglang, transformers. May be repeated.",
            metavar="ENGINE",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="GPUs over which the targets will split the model.", metavar="N")
    ] = DEFAULT_OPTIONS.tensor_parallel,
    device: Device = "auto",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result with MODEL on held-out text.")
    ] = DEFAULT_OPTIONS.verify,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory to take (of the GPU with --device cuda): 3GB, 800MiB. Activations that do not fit go to "
            "the disk.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when anything fell back.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, once the new one is complete.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an unfinished run has left.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into the folder OUT."""
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    if effort not in EFFORTS:
        raise UserError(f"effort '{effort}': not one of {', '.join(EFFORTS)}; use --effort default")
    overrides = tuple(Override.parse(text) for text in override or ())
    from llmquant import console, console_budget

    recipe = Recipe(
        method=method,
        spec=spec,
        skip=tuple(skip or ()),
        overrides=overrides,
        target_bpw=target_bpw,
        target_bytes=None if target_size is None else console_budget.parse_size(target_size),
        **EFFORTS[effort],
    )

    try:
        console.quiet_libraries()
        from llmquant.pipeline import quantize as pipeline

        options = Options(
            format=format,
            dtype=dtype,
            calibration=calibration,
            num_samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            max_memory_bytes=None if max_memory is None else parse_size(max_memory, "max_memory"),
            targets=tuple(target or ()),
            tensor_parallel=tensor_parallel,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            verify=verify,
        )
        if dry_run:
            plan = pipeline.dry_run(model, out, recipe, options)
            if as_json:
                print(json.dumps(plan.to_dict()))
            else:
                console.print_plan(plan, out)
            return
        with console.block_progress(quiet=quiet or not speaks()) as on_step:
            command = shlex.join(["llmquant", *sys.argv[1:]])
            report = pipeline.quantize(model, out, recipe, options, on_step, command=command)
    except KeyboardInterrupt:
        if not out.with_name(out.name + ".partial").exists():
            raise
        without = " without --restart" if restart else ""
        raise Interrupted(f"interrupted; the same command{without} continues the run") from None
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        console.print_report(report)
    if report.verification.verdict == "broken":
        say("the result is broken, see the verdict")
        raise typer.Exit(1)
    if strict and report.incidents:
        say(f"--strict: {len(report.incidents)} incidents")
        raise typer.Exit(1)


@app.command("convert")
def convert_command(
    model: Annotated[str, typer.Argument(help="Quantized checkpoint, of any tool: a folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    format: Annotated[
        str, typer.Option(help="gptq, gptq_v2, awq, compressed-tensors, or dense: plain weights.", show_default=False)
    ],
    dtype: Annotated[str, typer.Option(help="Of dense weights: auto (config.json's), float32, bfloat16, float16.")] = (
        "auto"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, once the new one is complete.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an unfinished run has left.")] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a quantized MODEL in another format, without a new rounding, or refuse and say what would be lost."""
    from llmquant import console
    from llmquant.console_convert import print_converted

    console.quiet_libraries()
    from llmquant.pipeline.convert import convert

    with console.progress(quiet=quiet) as on_step:
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
    if as_json:
        print(json.dumps(converted.to_dict()))
    else:
        print_converted(converted)


@app.command("generate")
def generate_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, quantized or not.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt per line, run in batches.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts of a file that run together.", metavar="N")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which a text ends.", metavar="N")] = 128,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most likely token.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Draw at random; lower is closer to greedy.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the tokens that together have this probability.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the K most likely tokens.", metavar="K", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.", metavar="N")] = 0,
    backend: Annotated[str, typer.Option(help="Kernel of the quantized linears; see inspect --backends.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="On a GPU: decode through torch.compile and CUDA graphs.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let MODEL continue a text, or answer with --chat."""
    if (prompt is None) == (prompts is None):
        raise UserError("generate: give one of --prompt TEXT and --prompts FILE")
    lines = [prompt] if prompt is not None else _lines(prompts)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1; use --batch-size 8")
    from llmquant import console

    console.quiet_libraries()
    from llmquant.hub import load_tokenizer, resolve_model
    from llmquant.runtime.generate import Sampling, generate
    from llmquant.runtime.load import load

    sampling = Sampling(
        max_new_tokens=max_new_tokens, greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    path = resolve_model(model)
    tokenizer = load_tokenizer(path)
    loaded = load(path, device=device, dtype=dtype, backend=backend, trust_remote_code=trust_remote_code)
    results = []
    streams = prompt is not None and not as_json
    for start in range(0, len(lines), batch_size):
        batch = lines[start : start + batch_size]
        on_text = console.print_piece if streams else None
        result = generate(loaded, tokenizer, batch, sampling, chat=chat, compiled=compiled, on_text=on_text)
        results.append(result)
        if as_json:
            continue
        if streams:
            print()
        else:
            console.print_texts(batch, result.texts)
    if as_json:
        print(json.dumps({"prompts": lines, "batches": [result.to_dict() for result in results]}))
    if not quiet:
        console.print_speed(results)


def _lines(file: Path | None) -> list[str]:
    assert file is not None
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}); give a UTF-8 file, one prompt per line") from error
    if not lines:
        raise UserError(f"{file}: holds no prompt; write one per line")
    return lines


@app.command("bench")
def bench_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, quantized or not.")],
    against: Annotated[
        str | None, typer.Option(help="The original, or another model, to compare with.", show_default=False)
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Kernel of MODEL's linears; may be repeated; all: each that takes them.", metavar="NAME"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", metavar="N")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that follow.", metavar="N")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.", metavar="N")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns, of which the median counts.", metavar="N")] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it: an .svg, .png or .pdf file.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How fast MODEL runs and what memory it takes, by kernel, beside its original."""
    from llmquant import console, console_bench

    if plot is not None:
        console_bench.check_plot_path(plot)
    console.quiet_libraries()
    from llmquant.runtime.bench import Workload, bench

    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, repeats=repeats)
    with console.progress(quiet=quiet) as on_step:
        result = bench(
            model,
            against,
            backends=backend or ("auto",),
            workload=workload,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_step=on_step,
        )
    if plot is not None:
        console_bench.plot_bench(result, plot)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        console_bench.print_bench(result)


@app.command("tune")
def tune_command(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint folder or hub id, for its shapes.")],
    out: Annotated[
        Path | None, typer.Option(help="The table; by default the one that is read.", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Find the best tiles for MODEL's shapes on the GPU that is here, and keep them in a table."""
    from llmquant import console

    console.quiet_libraries()
    from llmquant.runtime.explain import tune_model

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    path = tune_model(model, device=device, dtype=dtype, path=out, report=(lambda line: None) if quiet else report)
    print(path)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, quantized or not.")],
    backends: Annotated[
        bool, typer.Option("--backends", help="Also say which kernel runs each kind of linear, and why.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """What is in MODEL: grids, sizes, bits per weight. Reads headers, no weights."""
    from llmquant import console
    from llmquant.pipeline.inspect import inspect

    contents = inspect(model)
    choices = {}
    if backends:
        console.quiet_libraries()
        from llmquant.runtime.explain import explain_backends

        choices = explain_backends(model, device=device, dtype=dtype)
    if as_json:
        told = {
            name: {"backend": choice.backend.name, "reason": choice.reason, "refusals": choice.refusals}
            for name, choice in choices.items()
        }
        print(json.dumps(contents.to_dict() | ({"backends": told} if backends else {})))
    else:
        console.print_contents(contents)
        if backends:
            console.print_backends(choices)


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(help="A folder that llmquant wrote.")],
    as_json: Json = False,
) -> None:
    """Compare the files of OUT with the hashes noted when it was written; exit with 1 if one differs."""
    from llmquant.checkpoints.manifest import read_manifest, verify_files

    manifest = read_manifest(out)
    problems = verify_files(out)
    if as_json:
        print(json.dumps({"path": str(out), "files": len(manifest["files"]), "problems": problems}))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{out}: {len(manifest['files'])} files, all as they were written")
    if problems:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    out: Annotated[Path, typer.Argument(help="A folder that llmquant quantize wrote.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes; by default report.html in OUT.", show_default=False)
    ] = None,
) -> None:
    """Make the page of a quantization again, from the quantize_report.json in OUT."""
    from llmquant.checkpoints.manifest import REPORT_HTML
    from llmquant.pipeline.page import write_page
    from llmquant.pipeline.report import read_report

    file = output or out / REPORT_HTML
    write_page(read_report(out), file)
    print(file)


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoint folders or hub ids, quantized or not.", metavar="MODEL...")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="The original: adds KL divergence and top-1 agreement with it.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="wikitext2 (default), c4, ptb, python-docs, or a .txt, .jsonl, .parquet file.", show_default=False
        ),
    ] = None,
    join: Annotated[
        str, typer.Option(help="Between rows: rows (a blank line), text (nothing), auto (the source's own rule).")
    ] = "auto",
    chat: Annotated[
        bool, typer.Option("--chat", help="Rows are conversations: put their messages into the chat template.")
    ] = False,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a window; by default 2048, or the model's context.", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between windows' beginnings; by default they do not overlap.", metavar="N", show_default=False
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Use only the first N windows.", metavar="N", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or questions, that run side by side.", metavar="N")] = 1,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness: arc_easy,hellaswag.", metavar="NAMES", show_default=False),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with .yaml files of further tasks.", show_default=False)
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Ask only the first N questions of a task.", metavar="N", show_default=False)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of models, how far they are from the original (--against), and their scores in --tasks."""
    if tasks is None and (task_folder is not None or examples is not None):
        raise UserError("eval: --task-folder and --examples go with --tasks; name the tasks")
    from llmquant import console, console_evaluation

    console.quiet_libraries()
    from llmquant.pipeline.evaluate import evaluate

    # The bars of lm-evaluation-harness write to stderr, and have no switch.
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    with console.progress(quiet=quiet) as on_step, silence:
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
            on_step=on_step,
        )
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        console_evaluation.print_evaluation(result)


if __name__ == "__main__":
    main()
