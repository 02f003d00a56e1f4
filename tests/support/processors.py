"""Fixtures of the tests of LLVM programs: processors with fewer features, and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from llmquant.kernels import jit, llvm

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
PROCESSORS: dict[str, Callable[[frozenset[str]], frozenset[str]]] = {
    "bfloat16 dot product": lambda features: features,
    "AVX-512": lambda features: features - {"avx512bf16"},
    "AVX2": lambda features: frozenset(name for name in features if not name.startswith("avx512")),
}
"""The features of each simulated processor, from the features of this one."""

COMPILED = {name: cache(llvm._compiled.__wrapped__) for name in PROCESSORS}
"""`llvm._compiled` for each simulated processor. A program takes a second to compile, so tests share them."""


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Hide the features that the simulated processor does not have; skip if this processor lacks one that it has."""
    features = jit.processor_features()
    remaining = PROCESSORS[request.param](features)
    if request.param != "AVX2" and not remaining >= AVX512:
        pytest.skip("this processor has no AVX-512")
    if request.param == "bfloat16 dot product" and "avx512bf16" not in features:
        pytest.skip("this processor has no dot product of bfloat16 pairs")
    monkeypatch.setattr(jit, "processor_features", lambda: remaining)
    monkeypatch.setattr(llvm, "_compiled", COMPILED[request.param])
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads; the previous number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
