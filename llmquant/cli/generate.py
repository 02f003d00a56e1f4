"""`llmquant generate`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from llmquant.cli.options import AnyModel, Device, Dtype, Json, Quiet, RemoteCode, integer_option
from llmquant.cli.output import print_error
from llmquant.data.files import text_lines
from llmquant.errors import UserError
from llmquant.paths import parse_path


def generate_command(
    model: AnyModel,
    prompt: Annotated[str | None, Option(help="Text to continue.")] = None,
    prompts: Annotated[Path | None, Option(help="File with one prompt per line, run in batches.")] = None,
    batch_size: Annotated[int, integer_option("Prompts of the file in a batch.")] = 8,
    chat: Annotated[bool, Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    max_new_tokens: Annotated[int, integer_option("Largest number of new tokens.")] = 128,
    greedy: Annotated[bool, Option("--greedy", help="Always take the most likely token.")] = False,
    temperature: Annotated[float | None, Option(help="Sampling temperature; lower is closer to greedy.")] = None,
    top_p: Annotated[
        float | None, Option(help="Sample from the most likely tokens with this total probability.")
    ] = None,
    top_k: Annotated[int | None, Option(help="Sample from the K most likely tokens.", metavar="K")] = None,
    seed: Annotated[int, integer_option("Seed of the sampling.")] = 0,
    backend: Annotated[str, Option(help="Kernel of the quantized linears (see inspect --backends).")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    cuda_graph: Annotated[bool, Option(help="On a GPU: decode with a CUDA graph.")] = True,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text with MODEL, or answer a prompt with --chat."""
    if (prompt is None) == (prompts is None):
        raise UserError("generate: give one of --prompt TEXT and --prompts FILE")
    lines = [str(prompt)] if prompts is None else _lines(prompts)
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1; use --batch-size 8")
    from llmquant.console.generate import print_piece, print_speed, print_texts
    from llmquant.console.progress import quiet_libraries

    quiet_libraries()
    from llmquant.checkpoints.quantized import parsed_quantization, storage_notes
    from llmquant.checkpoints.reader import CheckpointReader
    from llmquant.hub import load_tokenizer, resolve_model
    from llmquant.runtime.decode_graph import CUDA_GRAPH
    from llmquant.runtime.generate import SamplingParams, generate
    from llmquant.runtime.load import load

    sampling = SamplingParams(
        max_new_tokens=max_new_tokens, greedy=greedy, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    path = resolve_model(model, trust_remote_code)
    reader = CheckpointReader(path)
    parsed_quantization(reader)
    if not quiet:
        for note in storage_notes(reader):
            print_error(note)
    tokenizer = load_tokenizer(path, trust_remote_code)
    loaded = load(path, device=device, dtype=dtype, backend=backend, trust_remote_code=trust_remote_code)
    results = []
    streams = prompt is not None and not as_json
    for start in range(0, len(lines), batch_size):
        batch = lines[start : start + batch_size]
        on_text = print_piece if streams else None
        result = generate(loaded, tokenizer, batch, sampling, chat=chat, cuda_graph=cuda_graph, on_text=on_text)
        results.append(result)
        if streams:
            print()
        elif not as_json:
            print_texts(batch, result.texts)
    if as_json:
        print(json.dumps({"prompts": lines, "batches": [result.to_dict() for result in results]}))
    if not quiet:
        if cuda_graph and loaded.device.type == "cuda":
            for reason in dict.fromkeys(result.decoding for result in results if result.decoding != CUDA_GRAPH):
                print_error(f"decoded without a CUDA graph ({reason.removeprefix('eager: ')})")
        print_speed(results)


def _lines(file: Path) -> list[str]:
    file = parse_path(file)
    lines = [line.rstrip("\r\n") for line in text_lines(file) if line.strip()]
    if not lines:
        raise UserError(f"{file}: holds no prompt; write one per line")
    return lines
