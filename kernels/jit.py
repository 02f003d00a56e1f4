"""LLVM's assembly made a function of this process, without a compiler on the machine.

llvmlite (the LLVM of Numba, a wheel) turns the text into machine code for the processor at hand. Work is shared among
torch's own OpenMP threads, so that a kernel and torch's operators do not fight for cores.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

LLVM_TYPE = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
"""LLVM's names of the dtypes that programs are made for."""

OLDEST_LLVM = 20
"""Older ones spell the dot product of bfloat16 otherwise and cannot round to it."""


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"written for x86-64 Linux, not for {platform.machine()} {platform.system()}"
    try:
        import llvmlite
        from llvmlite import binding
    except ImportError as error:
        return f"llvmlite cannot be imported ({error}); pip install 'llvmlite>=0.45'"
    if binding.llvm_version_info[0] < OLDEST_LLVM:
        found = binding.llvm_version_info[0]
        return (
            f"llvmlite {llvmlite.__version__} has LLVM {found}, {OLDEST_LLVM} is needed; pip install 'llvmlite>=0.45'"
        )
    if missing := {"avx2", "fma", "f16c"} - processor_features():
        return f"the processor has no {', '.join(sorted(missing))}"
    if openmp() is None:
        return "torch does not run on OpenMP here"
    return None


@lru_cache(maxsize=1)
def processor_features() -> frozenset[str]:
    """LLVM's names of what the processor can do and the system lets it."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


def multiplies_bfloat16() -> bool:
    """Whether vectors hold pairs of bfloat16 and the processor multiplies them."""
    return {"avx512bf16", "avx512vl"} <= processor_features()


def has_matrix_units() -> bool:
    """Whether there is more than vectors for bfloat16, which torch's own operators use."""
    return "amx-bf16" in processor_features()


@lru_cache(maxsize=1)
def openmp() -> Any:
    """The OpenMP library that torch has brought into this process, or None."""
    if not torch.backends.openmp.is_available():
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    found = [path for path in mapped if re.match(r"lib(gomp|iomp5|omp)[-.]", path.name)]
    # Other packages bring their own; torch's lies in its folder, or beside it in torch.libs.
    home = str(Path(torch.__file__).parent)
    for path in sorted(found, key=lambda path: (not str(path).startswith(home), str(path))):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # replaced since it was loaded
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is a tensor with memory that somebody wants read now: no fake one, and nobody who watches operators."""
    return (
        type(x) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class Compiled:
    """Functions of one text; each takes one pointer. Lives as long as the process."""

    def __init__(self, text: str, names: Iterable[str]) -> None:
        """Raises RuntimeError for text that LLVM refuses."""
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        library = openmp()
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            binding.add_symbol(name, _address(getattr(library, name)))
        self._parallel = library.GOMP_parallel
        self._parallel.restype, self._parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_char_p] + [ctypes.c_uint] * 2
        present, known = processor_features(), binding.get_host_cpu_features()
        self._machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(),
            features=",".join(f"{'+' if name in present else '-'}{name}" for name in known),
            opt=3,
            jit=True,
        )
        module = binding.parse_assembly(text)
        module.verify()
        # The text is unrolled and vectorized as it should be: more of either only takes registers from the sums.
        options = binding.create_pipeline_tuning_options(speed_level=2)
        options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
        builder = binding.create_pass_builder(self._machine, options)
        builder.getModulePassManager().run(module, builder)
        self._module = module
        self._engine = binding.create_mcjit_compiler(module, self._machine)
        self._engine.finalize_object()
        self._address = {name: self._engine.get_function_address(name) for name in names}
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        self._function = {name: prototype(address) for name, address in self._address.items()}

    def assembly(self) -> str:
        """What the processor runs, to be read."""
        return self._machine.emit_assembly(self._module)

    def run(self, name: str, arguments: bytes, num_threads: int) -> None:
        """Call a function with the address of its packed arguments, once in each of so many threads."""
        if num_threads == 1:
            self._function[name](arguments)
        else:
            self._parallel(self._address[name], arguments, num_threads, 0)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
