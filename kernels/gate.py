"""Compile any kernel for any NVIDIA GPU on a machine without one, and read the machine code.

Triton brings `ptxas` and the disassemblers along. What they show is not time, but decides it: registers that spill,
weights that take a detour through shared memory, instructions per weight.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmquant.kernels.tiles import Tiles
from llmquant.kernels.triton_w4a16 import dequantize_kernel, w4a16_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA")
"""Opcodes of the matrix units: sm_90, sm_100, and the `mma.sync` of all others."""


SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, by compute capability: those that are checked."""

HOPPER_BUDGET = {(True, 128): 2.8, (True, 64): 3.9, (False, 128): 4.1, (False, 64): 4.9}
"""Machine instructions per weight in the loop on sm_90, by (post, features); one more for tiles of 128 rows, which have
more of x to fetch. An H100 can issue 5.2 per weight at 3.0 TB/s, which matters up to some fifty rows. The numbers are
what the present kernels need and a little to spare, so that a loss is noticed."""


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """What a compiled kernel needs and what its innermost loop around the matrix units consists of."""

    registers: int
    spills: int
    """Instructions that move registers to local memory or back, anywhere in the kernel."""
    shared_bytes: int
    loop: Counter[str]
    """Opcode -> how often it stands in the loop; empty where there is none."""

    @property
    def loop_length(self) -> int:
        return sum(self.loop.values())

    @property
    def tensor_core(self) -> int:
        return sum(self.loop[opcode] for opcode in TENSOR_CORE)


def compile_tiles(
    tiles: Tiles,
    capability: int,
    *,
    dtype: str = "bfloat16",
    blocks_per_tile: int = 1,
    ragged: bool = False,
    planes: int = 1,
) -> MachineCode:
    """`w4a16_kernel` as `gpu.launch` would run it; `ragged` where K is not a multiple of 128, 2 planes for 8 bits."""
    element = {"bfloat16": "*bf16", "float16": "*fp16"}[dtype]
    constants = {
        "RAGGED_K": ragged,
        "P": planes,
        "B": blocks_per_tile,
        "BM": tiles.rows,
        "BN": tiles.features,
        "SPLIT_K": tiles.parts > 1,
        "POST": tiles.post,
        "STAGES": tiles.stages,
        "HAS_BIAS": True,
        "BF16": dtype == "bfloat16",
        "INTERPRET": False,
    }
    pointers = {"x_ptr": element, "bias_ptr": element, "y_ptr": element, "partial_ptr": "*fp32"}
    pointers |= {"w_ptr": "*i32", "meta_ptr": "*i32", "done_ptr": "*i32"}
    return compile_for(w4a16_kernel, pointers, constants, capability, tiles.warps, tiles.stages)


def compile_dequantize(
    capability: int, *, dtype: str = "bfloat16", blocks_per_tile: int = 1, planes: int = 1
) -> MachineCode:
    """`dequantize_kernel` as `gpu` would run it. It has no loop; what can be read off is whether it spills."""
    pointers = {"w_ptr": "*i32", "meta_ptr": "*i32", "out_ptr": {"bfloat16": "*bf16", "float16": "*fp16"}[dtype]}
    constants = {"P": planes, "B": blocks_per_tile, "BF16": dtype == "bfloat16", "INTERPRET": False}
    return compile_for(dequantize_kernel, pointers, constants, capability, num_warps=4, num_stages=3)


def objections(code: MachineCode, tiles: Tiles, capability: int) -> list[str]:
    """What is wrong with the machine code of these tiles; nothing, if it may ship."""
    found = []
    if not code.tensor_core:
        return ["no matrix instruction in any loop"]
    if (moves := code.loop["LDL"] + code.loop["STL"]) > 2:  # an address that is fetched again costs nothing
        found.append(f"{moves} register spills in the loop")
    if code.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{code.shared_bytes} bytes of shared memory, {SHARED_BYTES[capability]} is the limit")
    if not code.loop["LDGSTS"]:
        found.append("no asynchronous loads in the loop")
    if capability == 90:
        per_weight = instructions_per_weight(code, tiles)
        if not code.loop["HGMMA"]:
            found.append("no wgmma")
        if code.spills:
            found.append(f"{code.spills} register spills")
        if code.loop["LDG"]:
            found.append(f"{code.loop['LDG']} loads in the loop that are not asynchronous")
        if code.loop["STS"]:
            found.append(f"{code.loop['STS']} stores to shared memory: weights take a detour")
        if code.loop["I2F"] or code.loop["PRMT"]:
            found.append("conversions or permutations: codes do not become floats in place")
        if per_weight > (budget := HOPPER_BUDGET[tiles.post, tiles.features] + (tiles.rows == 128)):
            found.append(f"{per_weight:.2f} instructions per weight, {budget} is the budget")
    return found


def instructions_per_weight(code: MachineCode, tiles: Tiles) -> float:
    """Per thread and weight; the loop handles a tile of `features` x 128 in all threads together."""
    return code.loop_length * tiles.warps * 32 / (tiles.features * 128)


def compile_for(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, num_warps: int, num_stages: int
) -> MachineCode:
    """Compile `kernel` for compute capability 10 * major + minor.

    `pointers` gives the type of each pointer argument (`*bf16`); other arguments that are not constants are `i32`, and
    taken for multiples of 16 as sizes are, unless the kernel says that it does not care. Raises whatever Triton raises
    for a program the GPU cannot run.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    # What a launch would find out by itself: allocations are aligned, and most sizes are multiples of 16.
    general = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    known = [i for i, name in enumerate(names) if signature[name] != "constexpr" and name not in general]
    aligned = {(i,): [["tt.divisibility", 16]] for i in known}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_machine_code(compiled.asm["cubin"], compiled.metadata.shared)


def read_machine_code(cubin: bytes, shared_bytes: int) -> MachineCode:
    """Disassemble a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        assembly = _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    lines, labels = _instructions(assembly)
    return MachineCode(
        registers=int(found.group(1)),
        spills=sum(_opcode(line) in ("LDL", "STL") for line in lines),
        shared_bytes=shared_bytes,
        loop=_matrix_loop(lines, labels),
    )


def _instructions(assembly: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and which of them each label stands before."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction.group(1))
    return lines, labels


def _matrix_loop(lines: list[str], labels: dict[str, int]) -> Counter[str]:
    """The shortest loop (a label and a later jump back to it) with a matrix instruction."""
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA\S*\s+.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump.group(1), end + 1) <= end:
            opcodes = Counter(_opcode(line) for line in lines[labels[jump.group(1)] : end + 1])
            if any(opcodes[name] for name in TENSOR_CORE):
                loops.append(opcodes)
    return min(loops, key=lambda loop: sum(loop.values()), default=Counter())


def _opcode(line: str) -> str:
    """`@!P0 LDGSTS.E.BYPASS.128 [...]` -> `LDGSTS`."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout
