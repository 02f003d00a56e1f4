"""Compile LLVM assembly into functions of this process, without a compiler on the machine.

llvmlite (the LLVM of Numba, a wheel) turns the text into machine code for this processor. The functions run in torch's
own OpenMP threads, so that kernels and torch's operators do not compete for cores.
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
"""LLVM types of the dtypes that programs can be compiled for."""

OLDEST_LLVM = 20
"""Oldest supported version of LLVM. Older versions have another name for the bfloat16 dot product and cannot round to
bfloat16."""


@lru_cache(maxsize=1)
def unavailable_reason() -> str | None:
    """Return why nothing can be compiled in this process, or None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"written for x86-64 Linux, not for {platform.machine()} {platform.system()}"
    try:
        import llvmlite
        from llvmlite import binding
    except ImportError as error:
        return f"llvmlite cannot be imported ({error}); pip install 'llvmlite>=0.45'"
    if binding.llvm_version_info[0] < OLDEST_LLVM:
        version = binding.llvm_version_info[0]
        return (
            f"llvmlite {llvmlite.__version__} has LLVM {version}, {OLDEST_LLVM} is needed; pip install 'llvmlite>=0.45'"
        )
    if missing := {"avx2", "fma", "f16c"} - processor_features():
        return f"the processor has no {', '.join(sorted(missing))}"
    if openmp() is None:
        return "torch does not run on OpenMP here"
    return None


@lru_cache(maxsize=1)
def processor_features() -> frozenset[str]:
    """Return LLVM's names of the features that the processor has and the operating system enables."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


def has_bfloat16_dot_product() -> bool:
    """Whether the processor has a dot product of bfloat16 pairs (AVX512-BF16)."""
    return {"avx512bf16", "avx512vl"} <= processor_features()


def has_matrix_units() -> bool:
    """Whether the processor has matrix units for bfloat16 (AMX). torch's operators use them; our programs do not."""
    return "amx-bf16" in processor_features()


@lru_cache(maxsize=1)
def openmp() -> Any:
    """Return the OpenMP library that torch has loaded into this process, or None if there is none."""
    if not torch.backends.openmp.is_available():
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    candidates = [path for path in mapped if re.match(r"lib(gomp|iomp5|omp)[-.]", path.name)]
    # Other packages load their own copy. The copy of torch is in torch's folder, or beside it in torch.libs.
    torch_folder = str(Path(torch.__file__).parent)
    for path in sorted(candidates, key=lambda path: (not str(path).startswith(torch_folder), str(path))):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # its file was replaced after it was loaded
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def is_plain(x: torch.Tensor) -> bool:
    """Whether a kernel may read the memory of x now: x is a plain tensor, and no tracing, dispatch mode or forward-mode
    differentiation is active."""
    return (
        type(x) is torch.Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class Compiled:
    """The compiled functions of one LLVM text. Each function takes one pointer. Objects live as long as the process."""

    def __init__(self, text: str, names: Iterable[str]) -> None:
        """Compile `text`; `names` are its entry points. Raises RuntimeError if LLVM refuses the text."""
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
        # The text is already unrolled and vectorized. More of either would leave fewer registers for the sums.
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
        """Return the machine code as readable assembly."""
        return self._machine.emit_assembly(self._module)

    def run(self, name: str, arguments: bytes, num_threads: int) -> None:
        """Call a function once in each of `num_threads` threads, with the address of its packed arguments."""
        if num_threads == 1:
            self._function[name](arguments)
        else:
            self._parallel(self._address[name], arguments, num_threads, 0)


def _address(function: Any) -> int:
    """Return the address of a function of a shared library."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
