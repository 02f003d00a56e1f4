"""A pretend GPU: tensors that say that they are on `cuda:0`, and an error when a tensor on the CPU is mixed with them.

A missing `.to(device)` or `.cpu()` shows only on a GPU, where torch refuses to mix devices. Here a `CudaTensor` wraps a
CPU tensor and reports `cuda:0` as its device; a dispatch mode sees every operator, refuses the mixtures that CUDA
refuses, and computes on the CPU. For the C++ code of torch, a `CudaTensor` is on the CPU, so autograd works without a
device guard.

    with pretend_gpu():
        quantize(model, out, recipe, Options(device="cuda"))

Not covered: kernel launches, streams, memory, and the random numbers of a GPU's generator.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pretend_kernels
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
EXPLICIT_CPU = torch.device("cpu:0")
"""The CPU where the caller names it. C++ code passes `cpu` for the device of a `CudaTensor`."""

MIXING_ALLOWED = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_"}
"""Operators that take tensors on different devices."""

GPU_SEEDS = 1 << 62
"""Number that the generators of the GPU add to their seeds."""

INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_"}
"""Operators whose indices may be on the CPU when the indexed tensor is on a GPU."""


WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators that wait for the GPU, which is not permitted during the capture of a CUDA graph. So are copies from it."""


class MixedDevicesError(RuntimeError):
    """The error for operands on different devices, with the text of torch."""


class CudaTensor(Tensor):
    """A tensor that reports `cuda:0` as its device; `values` holds its elements, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        assert type(values) is Tensor, type(values)
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cpu",
        )
        wrapper.values = values
        return wrapper

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.values!r})"

    # Without this, every operator would be called through Python once more.
    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        other = next((value for value in (*args, kwargs.pop("other", None)) if isinstance(value, Tensor)), None)
        if other is not None:
            return self.to(other.device, other.dtype)
        copy = kwargs.pop("copy", False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        on_gpu, dtype = device is None or device.type == "cuda", dtype or self.dtype
        if on_gpu and dtype == self.dtype and memory_format is None and not copy:
            return self
        device = CUDA if on_gpu else EXPLICIT_CPU
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device, memory_format=memory_format)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def pin_memory(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


class _PretendGpuMode(TorchDispatchMode):
    """Sees every operator, also those without a `CudaTensor`, such as `torch.empty(…, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU and return tensors on the device where CUDA would leave them.

    Raises MixedDevicesError where torch would refuse the devices.
    """
    name = func._schema.name
    if name in OWN_OPERATORS:
        with _PretendGpuMode():
            return OWN_OPERATORS[name](*args, **kwargs)
    tensors: list[Tensor] = []
    cpu_args, cpu_kwargs = _on_cpu(args, tensors), _on_cpu(kwargs, tensors)
    has_cuda_operand = any(isinstance(tensor, CudaTensor) for tensor in tensors)
    on_gpu = has_cuda_operand
    if has_cuda_operand and name not in MIXING_ALLOWED:
        check_devices(name, args, tensors)
    elif has_cuda_operand and name != "aten::_to_copy":
        on_gpu = isinstance(args[0], CudaTensor)
    if (requested := kwargs.get("device")) is not None:
        on_gpu = requested.type == "cuda" or (has_cuda_operand and requested == torch.device("cpu"))
        cpu_kwargs["device"] = torch.device("cpu") if on_gpu or requested == EXPLICIT_CPU else requested
    if cpu_kwargs.get("pin_memory"):
        cpu_kwargs["pin_memory"] = False
    if _CUDA.waiting_is_forbidden and has_cuda_operand and (name in WAITING or not on_gpu):
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
    generator = kwargs.get("generator")
    if generator is not None and (generator.initial_seed() >= GPU_SEEDS) != on_gpu:
        raise MixedDevicesError(f"{name}: the generator is not on the device of the tensor")
    if name == "aten::histc":  # CUDA also counts integers
        cpu_args[0] = cpu_args[0].float()
    result = func(*cpu_args, **cpu_kwargs)
    if not on_gpu and not has_cuda_operand:
        return result
    _CUDA.record(func, cpu_args, cpu_kwargs, result)
    wrapper_of = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}

    def wrapped(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(wrapped, value))
        if not isinstance(value, Tensor):
            return value
        # An operator that writes into its argument returns it.
        if id(value) in wrapper_of:
            return wrapper_of[id(value)]
        return CudaTensor(value) if on_gpu else value

    return wrapped(result)


def _on_cpu(value: Any, tensors: list[Tensor]) -> Any:
    """Return the arguments of an operator with the values of each `CudaTensor`, and append their tensors to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.values if isinstance(value, CudaTensor) else value
    if isinstance(value, (list, tuple)):
        items = [_on_cpu(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else items
    if isinstance(value, dict):
        return {name: _on_cpu(item, tensors) for name, item in value.items()}
    return value


def check_devices(name: str, args: tuple, tensors: list[Tensor]) -> None:
    """Raise MixedDevicesError if CUDA would refuse an operator's tensors: a CPU tensor with dimensions beside others.

    A CPU tensor without dimensions counts as a number, and CPU indices are moved to the GPU.
    """
    if name in INDEXED and isinstance(args[0], CudaTensor):
        tensors = [tensor for tensor in tensors if not any(tensor is index for index in args[1])]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor) and tensor.device.type == "cpu"]
    writes_to_cpu = name.endswith("_") and bool(args) and any(args[0] is tensor for tensor in on_cpu)
    if writes_to_cpu or any(tensor.ndim > 0 for tensor in on_cpu):
        raise MixedDevicesError(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            + ", ".join(f"{list(t.shape)} on {'cuda:0' if isinstance(t, CudaTensor) else t.device}" for t in tensors)
        )


def _matmul(x: Tensor, prepared: list[Tensor], bias: Tensor | None, backend: str, shape: list[int]) -> Tensor:
    from llmquant.kernels.dispatch import BACKENDS
    from llmquant.kernels.layout import LinearShape

    return BACKENDS[backend].matmul(x, tuple(prepared), bias, LinearShape.from_ints(shape))


def _dequantize(prepared: list[Tensor], backend: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    from llmquant.kernels.dispatch import BACKENDS
    from llmquant.kernels.layout import LinearShape

    return BACKENDS[backend].dequantize(tuple(prepared), LinearShape.from_ints(shape), dtype)


OWN_OPERATORS: dict[str, Callable] = {"llmquant::matmul": _matmul, "llmquant::dequantize": _dequantize}
"""Operators whose Python code runs with the `CudaTensor`s themselves."""


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Let torch report one GPU, on which everything computes as described above."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, replacement in _cuda_functions().items():
            patch.setattr(torch.cuda, name, replacement, raising=False)
        patch.setattr(Tensor, "to", _to_with_index(Tensor.to))
        patch.setattr(Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(CUDA))
        patch.setattr(Tensor, "pin_memory", lambda tensor, *args, **kwargs: tensor.clone())
        for name in ("tensor", "as_tensor", "asarray"):
            patch.setattr(torch, name, _built_on_cpu(getattr(torch, name)))
        # A wrapper cannot be an inference tensor.
        patch.setattr(torch.inference_mode, "__enter__", lambda mode: torch.no_grad.__enter__(mode))
        patch.setattr(torch.inference_mode, "__exit__", lambda mode, *error: torch.no_grad.__exit__(mode, *error))
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch, "addmm", _addmm(torch.addmm))
        patch.setattr(threading.Thread, "run", _run_in_mode(threading.Thread.run))
        _replace_kernels(patch)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(_PretendGpuMode())
        yield


def _cuda_functions() -> dict[str, Callable]:
    """Return the functions of `torch.cuda` that need a driver, for one GPU with the properties of an H100."""
    properties = SimpleNamespace(
        name="pretend GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        warp_size=32,
    )

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def no_bytes(*args: Any, **kwargs: Any) -> int:
        return 0

    def no_context(*args: Any, **kwargs: Any) -> Any:
        return nullcontext()

    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
        "memory_allocated": no_bytes,
        "max_memory_allocated": no_bytes,
        "memory_reserved": no_bytes,
        "max_memory_reserved": no_bytes,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": nothing,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: _CUDA.graph is not None,
        "get_sync_debug_mode": lambda: _CUDA.sync_debug_mode,
        "set_sync_debug_mode": _CUDA.set_sync_debug_mode,
        "CUDAGraph": _CudaGraph,
        "graph": _capture,
        "device": no_context,
        "device_of": no_context,
        "stream": no_context,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _Stream,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
    }


def _to_with_index(to: Callable) -> Callable:
    """Return `Tensor.to` that takes `cuda` as `cuda:0`; torch would ask the driver for the current GPU."""

    def with_index(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
        return CUDA if is_device else value

    def to_with_index(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], CudaTensor):
            args = (CUDA, args[0].dtype, *args[1:])
        return to(tensor, *map(with_index, args), **{name: with_index(value) for name, value in kwargs.items()})

    return to_with_index


def _built_on_cpu(build: Callable) -> Callable:
    """Return `torch.tensor` or a similar function that makes a tensor on the CPU and then moves it.

    C++ code makes these tensors, and no operator is called.
    """

    def build_and_move(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, CudaTensor):
            return data.to(*(value for value in (device, kwargs.get("dtype")) if value is not None))
        on_gpu = device is not None and torch.device(device).type == "cuda"
        tensor = build(data, *args, device="cpu" if on_gpu else device, **kwargs)
        return tensor.to(CUDA) if on_gpu else tensor

    return build_and_move


class _CudaState:
    """What the pretend GPU remembers between operators."""

    def __init__(self) -> None:
        self.graph: _CudaGraph | None = None
        """The graph that is being captured."""
        self.sync_debug_mode: Any = 0

    @property
    def waiting_is_forbidden(self) -> bool:
        return self.graph is not None or self.sync_debug_mode == "error"

    def record(self, run: Callable, args: Any, kwargs: Any, result: Any) -> None:
        """Append an operation on CPU tensors to the graph that is being captured."""
        if self.graph is not None:
            self.graph.operations.append((run, args, kwargs, tree_leaves(result)))

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.sync_debug_mode = mode


_CUDA = _CudaState()


class _CudaGraph:
    """A CUDA graph: the operations of a capture, which `replay` runs again on the same tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.operations: list[tuple[Callable, Any, Any, list[Any]]] = []

    def replay(self) -> None:
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            for run, args, kwargs, recorded in self.operations:
                for old, new in zip(recorded, tree_leaves(run(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def _capture(graph: _CudaGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Do what `torch.cuda.graph` does. During a real capture, operations do not run; here they run too."""
    _CUDA.graph = graph
    try:
        yield
    finally:
        _CUDA.graph = None


class _Stream:
    """A stream whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """An event that records the time at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.seconds - self.seconds)


class _Generator(torch.Generator):
    """A generator for the CPU or the GPU; all of them draw on the CPU.

    C++ code gives operators another object for the same generator, without attributes of ours. Seeds from GPU_SEEDS on
    therefore mean that it is for the GPU.
    """

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls, device="cpu")
        generator.first_seed = GPU_SEEDS if torch.device(device).type == "cuda" else 0
        return generator if generator.first_seed == 0 else generator.manual_seed(0)

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    def manual_seed(self, seed: int) -> _Generator:
        super().manual_seed(self.first_seed + seed)
        return self


def _run_in_mode(run: Callable) -> Callable:
    """Return `Thread.run` inside the dispatch mode, because a mode belongs to the thread that entered it."""

    def run_in_mode(thread: threading.Thread) -> None:
        with _PretendGpuMode():
            run(thread)

    return run_in_mode


def _addmm(addmm: Callable) -> Callable:
    """Return `torch.addmm` with `out_dtype`, which torch has only on CUDA: products of float16 or bfloat16 tensors."""

    def addmm_with_out_dtype(bias: Tensor, left: Tensor, right: Tensor, **options: Any) -> Tensor:
        dtype = options.pop("out_dtype", None)
        if dtype is None:
            return addmm(bias, left, right, **options)
        assert isinstance(left, CudaTensor) and isinstance(right, CudaTensor), "out_dtype on the CPU"
        assert left.dtype == right.dtype != torch.float32 and bias.dtype == dtype, (bias.dtype, left.dtype, right.dtype)
        return addmm(bias, left.to(dtype), right.to(dtype), **options)

    return addmm_with_out_dtype


def _replace_kernels(patch: pytest.MonkeyPatch) -> None:
    """Replace the launches of Triton kernels by PyTorch."""
    from llmquant.algorithms import coordinate_descent, gptq
    from llmquant.kernels import gpu, solver
    from llmquant.models import reproducible
    from llmquant.runtime import fused_step

    patch.setattr(fused_step, "FUSED_DEVICES", set())
    # Plain attention makes its causal mask in C++, on the CPU for a pretend tensor.
    patch.setattr(reproducible, "sdpa_kernel", lambda backends: nullcontext())
    patch.setattr(gpu, "launch", _as_kernel(pretend_kernels.launch))
    patch.setattr(gpu, "_dense_weight", _as_kernel(pretend_kernels.dense_weight))
    patch.setattr(solver, "round_panel", _as_kernel(gptq.round_panel_torch))
    patch.setattr(solver, "descend_panel", _as_kernel(coordinate_descent.descend_panel_torch))
    patch.setattr(solver, "search_ranges", _as_kernel(pretend_kernels.search_ranges))
    gpu.gpu_of.cache_clear()


def _as_kernel(run: Callable) -> Callable:
    """Return a function that asserts that all tensors are on the GPU, as a kernel needs them, and runs on the CPU.

    What it returns is on the GPU.
    """

    def launch(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []
        cpu_args, cpu_kwargs = _on_cpu(args, tensors), _on_cpu(kwargs, tensors)
        assert all(isinstance(tensor, CudaTensor) for tensor in tensors), "a kernel would read a tensor on the CPU"
        with torch._C._DisableTorchDispatch():
            result = run(*cpu_args, **cpu_kwargs)
        _CUDA.record(run, cpu_args, cpu_kwargs, result)
        return tree_map(lambda value: CudaTensor(value) if isinstance(value, Tensor) else value, result)

    return launch
