"""Compile the Triton kernels for any NVIDIA GPU on a machine without one, and read the machine code (SASS).

Triton's wheel contains `ptxas` and the disassemblers. They do not show the time of a kernel, but they show what
determines it: register spills, weights that pass through shared memory, and instructions per weight.
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

from llmquant.kernels import solver
from llmquant.kernels.tiles import Tiles
from llmquant.kernels.triton_solver import round_panel_kernel, search_range_kernel
from llmquant.kernels.triton_w4a16 import dequantize_kernel, w4a16_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""Folder of the disassemblers in Triton's wheel."""

TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA")
"""Opcodes of the matrix units: on sm_90, on sm_100, and `mma.sync` on all other GPUs."""

SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may use, in bytes, by compute capability."""

HOPPER_BUDGET = {
    (True, 128, False): 2.8, (True, 64, False): 3.6, (False, 128, False): 3.6, (False, 64, False): 4.3,
    (False, 128, True): 4.1, (False, 64, True): 5.2,
}  # fmt: skip
"""Limit of machine instructions per weight in the loop on sm_90, by (post, features, more than 32 rows).

While it reads weights at full speed, an H200 can issue 3.6 instructions per weight and an H100 5.2. Tiles of 128
features, which large linears take, stay below the first number with few rows, and all tiles of up to 64 rows below the
second. Tiles of 128 rows may have one more, because they load more of x; there the matrix units are the limit, at 8
instructions per weight. The other numbers are slightly above the present counts, so that a regression is noticed."""


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """The resources of a compiled kernel, and the instructions of its innermost loop with matrix instructions."""

    registers: int
    """Registers of each thread."""
    spills: int
    """Instructions that move registers to local memory or back, anywhere in the kernel."""
    shared_bytes: int
    """Shared memory of one program, in bytes."""
    loop: Counter[str]
    """Opcode -> number of its instructions in the loop; empty if there is no such loop."""

    @property
    def loop_length(self) -> int:
        """Number of instructions in the loop."""
        return sum(self.loop.values())

    @property
    def tensor_core(self) -> int:
        """Number of matrix instructions in the loop."""
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
    """Compile `w4a16_kernel` as `gpu.launch` does.

    ragged: whether K is not a multiple of 128. planes: 2 for 8-bit codes, else 1.
    """
    element = {"bfloat16": "*bf16", "float16": "*fp16"}[dtype]
    constants = {
        "RAGGED_K": ragged,
        "P": planes,
        "B": blocks_per_tile,
        "BM": tiles.rows,
        "BN": tiles.features,
        "SPLIT_K": tiles.split_k > 1,
        "POST": tiles.post,
        "STAGES": tiles.stages,
        "HAS_BIAS": True,
        "BF16": dtype == "bfloat16",
        "INTERPRET": False,
    }
    pointers = {"x_ptr": element, "bias_ptr": element, "y_ptr": element, "partial_ptr": "*fp32"}
    pointers |= {"w_ptr": "*i32", "meta_ptr": "*i32", "done_ptr": "*i32"}
    return compile_kernel(w4a16_kernel, pointers, constants, capability, tiles.warps, tiles.stages)


def compile_dequantize(
    capability: int, *, dtype: str = "bfloat16", blocks_per_tile: int = 1, planes: int = 1
) -> MachineCode:
    """Compile `dequantize_kernel` as `gpu` does. It has no loop, so only its spills can be checked."""
    pointers = {"w_ptr": "*i32", "meta_ptr": "*i32", "out_ptr": {"bfloat16": "*bf16", "float16": "*fp16"}[dtype]}
    constants = {"P": planes, "B": blocks_per_tile, "BF16": dtype == "bfloat16", "INTERPRET": False}
    return compile_kernel(dequantize_kernel, pointers, constants, capability, num_warps=4, num_stages=3)


def compile_solver(capability: int) -> dict[str, MachineCode]:
    """Compile the kernels of the quantizer as `llmquant.kernels.solver` does; return their machine code by name."""
    floats = dict.fromkeys(("values", "old_q", "matrix", "scales", "zeros", "q", "errors"), "*fp32")
    floats |= dict.fromkeys(("weights", "importance", "shrinks"), "*fp32")
    limits = ("max_code", "min_zero", "mid_code", "smallest", "largest")
    types = floats | dict.fromkeys(limits, "fp32") | {"groups": "*i64"}
    codes = {}
    for descend, name in ((False, "GPTQ"), (True, "coordinate descent")):
        constants = {"DESCEND": descend, "B": solver.PANEL_COLUMNS, "R": solver.PANEL_ROWS}
        codes[name] = compile_kernel(round_panel_kernel, types, constants, capability, num_warps=1, num_stages=3)
    for dtype, number in solver.SCALE_DTYPES.items():
        sizes = {"C": solver.SEARCH_COLUMNS, "R": solver.SEARCH_ROWS}
        constants = {"SYMMETRIC": False, "DTYPE": number, **sizes}
        name = f"range search, {str(dtype).removeprefix('torch.')} scales"
        codes[name] = compile_kernel(search_range_kernel, types, constants, capability, num_warps=1, num_stages=3)
    return codes


def find_problems(code: MachineCode, tiles: Tiles, capability: int) -> list[str]:
    """Return the problems of the machine code for these tiles, a few words each; [] if there are none."""
    problems = []
    if not code.tensor_core:
        return ["no matrix instruction in any loop"]
    if (moves := code.loop["LDL"] + code.loop["STL"]) > 2:  # reloading an address costs nothing
        problems.append(f"{moves} register spills in the loop")
    if code.shared_bytes > SHARED_BYTES[capability]:
        problems.append(f"{code.shared_bytes} bytes of shared memory, {SHARED_BYTES[capability]} is the limit")
    if not code.loop["LDGSTS"]:
        problems.append("no asynchronous loads in the loop")
    if capability == 90:
        per_weight = instructions_per_weight(code, tiles)
        if not code.loop["HGMMA"]:
            problems.append("no wgmma")
        if code.spills:
            problems.append(f"{code.spills} register spills")
        if tiles.rows <= 32 and code.loop["WARPGROUP"] > code.loop["HGMMA"] // 2:
            problems.append("each wgmma waits for the one before (ptxas warning C7515)")
        if code.loop["LDG"]:
            problems.append(f"{code.loop['LDG']} loads in the loop that are not asynchronous")
        if code.loop["STS"]:
            problems.append(f"{code.loop['STS']} stores to shared memory: weights pass through it")
        # One permutation may join the halves of a scale or zero-point. Converting codes takes one for every two codes.
        if code.loop["I2F"] or code.loop["PRMT"] > tiles.features // 16:
            problems.append("conversions or permutations: codes do not become floats in place")
        if per_weight > (budget := HOPPER_BUDGET[tiles.post, tiles.features, tiles.rows > 32] + (tiles.rows == 128)):
            problems.append(f"{per_weight:.2f} instructions per weight, {budget} is the budget")
    return problems


def instructions_per_weight(code: MachineCode, tiles: Tiles) -> float:
    """Return the loop's instructions per weight. All threads together handle a tile of `features` x 128 weights."""
    return code.loop_length * tiles.warps * 32 / (tiles.features * 128)


def compile_kernel(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, num_warps: int, num_stages: int
) -> MachineCode:
    """Compile `kernel` for a GPU of this compute capability (10 * major + minor).

    `pointers` gives the type of each pointer argument (`*bf16`) and of floating-point arguments (`fp32`). All other
    arguments that are not constants are `i32`.
    They are assumed to be multiples of 16, as most sizes are, unless the kernel does not specialize on them. Triton's
    exceptions pass through if the GPU cannot run the program.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    # A launch detects these properties: allocations are aligned, and most sizes are multiples of 16.
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned_arguments = [
        i for i, name in enumerate(names) if signature[name].startswith(("*", "i")) and name not in unspecialized
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned_arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_machine_code(compiled.asm["cubin"], compiled.metadata.shared)


def read_machine_code(cubin: bytes, shared_bytes: int) -> MachineCode:
    """Disassemble a cubin (compiled machine code)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        assembly = _run("nvdisasm", "-c", path)
    register_count = re.search(r"REG:(\d+)", usage)
    assert register_count is not None, usage
    lines, labels = _instructions(assembly)
    return MachineCode(
        registers=int(register_count.group(1)),
        spills=sum(_opcode(line) in ("LDL", "STL") for line in lines),
        shared_bytes=shared_bytes,
        loop=_matrix_loop(lines, labels),
    )


def _instructions(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions in order, and for each label the index of the instruction that follows it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction.group(1))
    return lines, labels


def _matrix_loop(lines: list[str], labels: dict[str, int]) -> Counter[str]:
    """Count the opcodes of the shortest loop (a label and a later jump back to it) with a matrix instruction."""
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"BRA\S*\s+.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump.group(1), end + 1) <= end:
            opcodes = Counter(_opcode(line) for line in lines[labels[jump.group(1)] : end + 1])
            if any(opcodes[name] for name in TENSOR_CORE):
                loops.append(opcodes)
    return min(loops, key=lambda loop: sum(loop.values()), default=Counter())


def _opcode(line: str) -> str:
    """Return the opcode of a line without its modifiers: `LDGSTS` of `@!P0 LDGSTS.E.BYPASS.128 [...]`."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def _run(tool: str, *arguments: object) -> str:
    """Run one of Triton's tools and return its output."""
    return subprocess.run([str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout
