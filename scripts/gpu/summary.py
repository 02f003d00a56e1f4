"""The tables that gpu_check prints last, made from the log. They fit into MAX_CHARACTERS."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 8800
"""Limit of all tables together. The text ends before the first line that does not fit."""

Lines = list[dict[str, Any]]


def summarize(log: Lines) -> str:
    """Return the tables, the most important first, up to the first line that does not fit."""
    text = ""
    for part in PARTS:
        try:
            lines = part(log)
        except Exception as error:  # a line of the log that is not as expected
            lines = [f"{part.__name__}: {type(error).__name__}: {error!s:.100}"]
        for line in lines:
            added = line[:170].rstrip() + "\n"
            if len(text) + len(added) > MAX_CHARACTERS:
                return text
            text += added
    return text


def of_kind(log: Lines, what: str) -> Lines:
    """Return the lines of one kind."""
    return [line for line in log if line["what"] == what]


def section_lines(log: Lines) -> list[str]:
    """Return a line for each section: how it ended, what ran beside it, and its last output if it failed."""
    lines = ["sections"]
    for line in of_kind(log, "section"):
        last = "" if line["status"] in ("ok", "findings") else "; ".join(line.get("last_lines", [])[-1:])
        of_section = [one for one in log if one.get("section") == line["name"]]
        beside = sorted({name for one in of_section for name in one.get("beside", [])})
        note = f"beside {', '.join(beside)}  " if beside else ""
        lines.append(f"  {line['name']:<12} {line['status']:<10} {line['seconds']:>6.1f} s  {note}{last:.120}")
    return lines


def finding_lines(log: Lines) -> list[str]:
    """Return the first findings."""
    found = of_kind(log, "finding")
    lines = [f"findings: {len(found)}"]
    lines += [f"  {line['section']}: {line['text']:.150}" for line in found[:12]]
    return lines + (["  ..."] if len(found) > 12 else [])


def machine_lines(log: Lines) -> list[str]:
    """Return the machine in a few lines."""
    rates = {key: value for line in of_kind(log, "rates") for key, value in line.items()}
    lines = ["machine"]
    lines += [
        f"  {line.get('name')}, {line.get('processors')} processors, {line.get('nvidia_smi', '')}"
        for line in of_kind(log, "gpu")
    ]
    names = ("python", "torch", "triton", "transformers", "numpy", "cuda")
    lines += ["  " + ", ".join(f"{name} {line.get(name)}" for name in names) for line in of_kind(log, "versions")]
    lines += [f"  missing packages: {', '.join(line['names']) or 'none'}" for line in of_kind(log, "missing packages")]
    lines += [
        f"  compiler {line['compiler']}, ncu {line['ncu']}, nvcc {line['nvcc']}" for line in of_kind(log, "tools")
    ]
    numbers = [f"copy {rates['copy_bytes_per_second'] / 1e12:.2f} TB/s"] if "copy_bytes_per_second" in rates else []
    for key, name in (("bf16_flops", "bf16"), ("float32_flops", "float32"), ("bf16_to_float32_flops", "bf16->float32")):
        numbers += [f"{name} {rates[key] / 1e12:.0f} TFLOP/s"] if key in rates else []
    numbers += [f"float64 factor {rates['float64_factor_seconds']} s"] if "float64_factor_seconds" in rates else []
    return [*lines, "  " + ", ".join(numbers)]


def speed_lines(log: Lines) -> list[str]:
    """Return a line for each shape and group size with, for each number of rows: microseconds, the speed-up over
    cuBLAS, the part of the copy bandwidth, and the microseconds of torch's int4 kernel.
    """
    records = of_kind(log, "speed")
    by_shape: dict[str, list[str]] = {}
    for one in records:
        shape = f"{one['in_features']}x{one['out_features']} g{one.get('group_size', 128)}"
        missed = "!" if one["goal"] is not None and one["speed_up"] < one["goal"] else ""
        other = f" ({one['tinygemm_us']:.1f})" if "tinygemm_us" in one else ""
        by_shape.setdefault(shape, []).append(
            f"{one['rows']}: {one['us']:.1f} {one['speed_up']:.2f}x{missed} {one['bandwidth_share']:.0%}{other}"
        )
    lines = ["speed, rows: us, times cuBLAS (! below the goal), part of the copy bandwidth (us of tinygemm)"]
    lines = (
        [*lines, *(f"  {shape:<15} {' | '.join(numbers)}" for shape, numbers in by_shape.items())] if records else []
    )
    return lines + [
        f"CPU time of a call: QuantizedLinear {line['QuantizedLinear']} us, nn.Linear {line['Linear']} us"
        for line in of_kind(log, "call microseconds")
    ]


def correctness_lines(log: Lines) -> list[str]:
    """Return how many cases were checked, and how fast the programs were compiled."""
    lines = [f"correctness: {one['checked']} of {one['of']} cases" for one in of_kind(log, "correctness")]
    compiled = of_kind(log, "compiled share")
    if compiled:
        programs, longest = sum(one["programs"] for one in compiled), max(one["seconds"] for one in compiled)
        lines.append(f"compiled {programs} programs in {longest} s in the background")
    return lines


def quantize_lines(log: Lines) -> list[str]:
    """Return the seconds of each quantization by step."""
    lines = []
    reports = {one["name"]: one for one in of_kind(log, "quantize report")}
    for line in of_kind(log, "quantize"):
        line = line | reports.get(line["name"], {})
        steps = sorted(line.get("steps", {}).items(), key=lambda pair: -pair[1])[:9]
        peak = line.get("peak_device_bytes", 0) / 1e9
        verdict = line.get("verdict", line.get("last_progress", ""))
        lines.append(
            f"quantize {line['name']}: exit {line['exit']}, {line['seconds']} s, GPU peak {peak:.1f} GB, "
            f"blocks done at {line.get('block_seconds')}, {verdict}"
        )
        lines.append("  " + ", ".join(f"{step} {seconds}" for step, seconds in steps))
    lines += [f"two runs of a quantization, same bytes: {one['same_bytes']}" for one in of_kind(log, "two runs")]
    return lines


def profile_lines(log: Lines) -> list[str]:
    """Return the first kernels, functions and operators of the profiles."""
    lines = []
    for line in of_kind(log, "profile kernels"):
        lines.append(
            f"profile of a block: {line['wall_seconds']} s, {line['launches']} launches, "
            f"{line['device_ms']} ms on the GPU"
        )
        lines += [f"  {ms:>9} ms {calls:>7}  {name:.70}" for name, calls, ms in line["kernels"][:9]]
        lines += [f"  host {ms:>6} ms {calls:>7}  {name:.50}" for name, calls, ms in line["host_calls"][:3]]
    for line in of_kind(log, "profile functions"):
        lines.append(f"functions by own time ({line['wall_seconds']} s)")
        lines += [f"  {own:>8} s {calls:>7}  {name:.70}" for name, calls, own, _ in line["own"][:7]]
    return lines


def goal_lines(log: Lines) -> list[str]:
    """Return the speed of a decode step with CUDA graphs beside its goals, and the checks of its tokens."""
    lines = []
    for line in of_kind(log, "decode goal"):
        goals, marks = line["goals"], ["" if reached else "!" for reached in line["reached"]]
        lines.append(
            f"decode step, batch 1, {line['blocks']} blocks, CUDA graphs: {line['ms_per_step']} ms, bf16 "
            f"{line['dense_ms_per_step']} ms: {line['speed_up']:.2f}x{marks[0]} (goal {goals['speed_up']}x), "
            f"{line['bandwidth_share']:.0%}{marks[1]} of the copy bandwidth (goal {goals['bandwidth_share']:.0%})"
        )
        if (whole := line.get("goal_blocks")) is not None:
            lines.append(f"  computed for {whole['blocks']} blocks: {whole['ms']} ms, {whole['speed_up']:.2f}x bf16")
    for line in of_kind(log, "decode graph"):
        for key in ("fused", "unfused"):
            if f"{key} ms_per_step" in line:
                lines.append(
                    f"  {line['model']:<9} {key:<7} {line[f'{key} ms_per_step']} ms a step, "
                    f"{line.get(f'{key} ms_per_block')} ms a block, {line[f'{key} bandwidth_share']:.0%}, "
                    f"capture {line[f'{key} capture_seconds']} s"
                )
            else:
                lines.append(f"  {line['model']:<9} {key:<7} {line.get(f'{key} decoding', '')}")
        lines.append(f"  {line['model']:<9} kernels {', '.join(line.get('fused kernels', [])) or 'none'}")
    return lines + [
        f"  checked {line['model']}, prompts of {line['lengths']}: logits differ by {line['logits_error']:.1e}, "
        f"tokens {line['first_different_tokens'] or 'equal'}"
        for line in of_kind(log, "decode checked")
        if "logits_error" in line
    ]


def decode_lines(log: Lines) -> list[str]:
    """Return the speed of the models, eager and as the commands report it."""
    lines = [
        f"eager {line['model']:<9} batch {line['batch']}, {line['blocks']} blocks: {line['ms_per_token']} ms a "
        f"token, prefill of {line['prompt']} {line['prefill_ms']} ms"
        for line in of_kind(log, "decode")
    ]
    lines += [
        f"eager {line['model']:<9} {line['ms_per_block']} ms a token and block"
        for line in of_kind(log, "decode of a block")
    ]
    lines += [
        f"eager {line['model']:<9} {line['launches_per_step']} launches a step, "
        f"{line['device_ms'] / line['steps']:.3f} ms on the GPU"
        for line in of_kind(log, "decode profile")
    ]
    for line in of_kind(log, "bench"):
        bound = f", the CPU limits it: a replay takes {line['ms_per_replay']} ms" if line.get("cpu_bound") else ""
        lines.append(f"bench batch {line['batch']}: exit {line['exit']}, {line['seconds']} s{bound}")
        lines += [f"  {describe_bench(one)}" for one in line.get("runs", [])]
    lines += [
        f"generate {line['prompt_characters']} characters: exit {line['exit']}, "
        f"{line.get('decode_tokens_per_second')} tokens/s"
        for line in of_kind(log, "generate")
    ]
    return lines + [
        f"eval: exit {line['exit']}, {line['seconds']} s, {str(line.get('result', ''))[:120]}"
        for line in of_kind(log, "eval")
    ]


def describe_bench(one: dict[str, Any]) -> str:
    """Return an entry of the result of `llmquant bench` as a line."""
    decode, prefill = one["decode_tokens_per_second"], one["prefill_tokens_per_second"]
    rates = f"decode {decode:.1f} ({one.get('decode_speedup', 0):.2f}x), "
    rates += f"prefill {prefill:.0f} ({one.get('prefill_speedup', 0):.2f}x) tokens/s"
    return f"{one['kernel']}: {rates}, {one.get('decoding', '')}"


def rounding_lines(log: Lines) -> list[str]:
    """Return all results of section `rounding`."""
    lines = []
    for line in log:
        if line["section"] == "rounding" and line["what"] not in ("finding", "section"):
            values = {key: value for key, value in line.items() if key not in ("at", "section", "what", "beside")}
            text = f"{line['what']}: " + json.dumps(values).replace('"', "")
            lines += textwrap.wrap(text, 165, subsequent_indent="  ")
    return lines


def counter_lines(log: Lines) -> list[str]:
    """Return the GPU's counters of each measured launch."""
    return [
        f"ncu {line['kernel']:.20} grid {line['grid']}: {line.get('duration')}, DRAM {line.get('dram_percent')}, "
        f"issue {line.get('issue_percent')}"
        for line in of_kind(log, "ncu")
        if "kernel" in line
    ]


PARTS: tuple[Callable[[Lines], list[str]], ...] = (
    section_lines, machine_lines, finding_lines, goal_lines, speed_lines, correctness_lines, quantize_lines,
    decode_lines, rounding_lines, counter_lines, profile_lines,
)  # fmt: skip
"""The tables in the order in which they are printed."""
