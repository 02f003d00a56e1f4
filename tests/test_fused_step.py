"""The fused kernels of a decode step are used if they agree with the model's own code, else refused with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_cases import assert_same_tokens, call_again, run
from paths import ROOT
from tiny_models import ARCHITECTURES, random_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as plain_rotation

from llmquant.runtime import decode_graph, decoding, fused_step
from llmquant.runtime.decode_graph import graphs_of, release_graphs
from llmquant.runtime.fused_step import FusedStep

SUPPORT = Path(__file__).parent / "support"


@pytest.fixture(autouse=True)
def captured_on_cpu(monkeypatch):
    monkeypatch.setitem(decoding.CAPTURES, "cpu", call_again)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_model(ARCHITECTURES["llama"]())


class TorchKernels:
    """What `kernels.decode` computes, in PyTorch."""

    NORM_KINDS = (0, 1, 2)

    def __init__(self, **wrong: Callable) -> None:
        self.threads: set[int] = set()
        vars(self).update({name: wrong.get(name, getattr(self, name)) for name in KERNEL_NAMES})
        for name in ("can_attend", "can_rotate", "can_store"):
            setattr(self, name, lambda *arguments: True)

    def rms_norm(self, x: torch.Tensor, weight_W: torch.Tensor, eps: float, kind: int) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        if kind == 0:
            return weight_W * normed.to(x.dtype)
        return (normed * (weight_W.float() + (kind == 1))).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, added: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return x + added, self.rms_norm(x + added, *rest)

    def silu_product(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return plain_rotation(q, k, cos, sin)

    def store(self, key: torch.Tensor, value: torch.Tensor, keys: Any, values: Any, length: torch.Tensor) -> None:
        keys.index_copy_(2, length, key)
        values.index_copy_(2, length, value)

    def attend(self, q: torch.Tensor, keys: Any, values: Any, mask: Any, length: Any, scale: float) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        ).transpose(1, 2)


KERNEL_NAMES = ("add_rms_norm", "attend", "rms_norm", "rotate", "silu_product", "store")
RIGHT = TorchKernels()


def visible(change: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable:
    """Return an attention whose mask a function of (places [T] as bool, length [1]) changes."""

    def attend(q: torch.Tensor, keys: Any, values: Any, mask: torch.Tensor, length: Any, scale: float) -> torch.Tensor:
        mask = mask.clone()
        change(mask, length)
        return RIGHT.attend(q, keys, values, mask, length, scale)

    return attend


WRONG: dict[str, dict[str, Callable]] = {
    "add_rms_norm": {
        "total": lambda x, added, *rest: (x * 1.05 + added, RIGHT.rms_norm(x + added, *rest)),
        "branch": lambda x, added, *rest: (x + 0.5 * added, RIGHT.rms_norm(x + 0.5 * added, *rest)),
    },
    "attend": {
        "scale": lambda q, keys, values, mask, length, scale: RIGHT.attend(q, keys, values, mask, length, 1.1 * scale),
        "newest": visible(lambda mask, length: mask.index_fill_(-1, length, False)),
        "after": visible(lambda mask, length: mask.index_fill_(-1, length + 1, True)),
        "first": visible(lambda mask, length: mask.index_fill_(-1, torch.tensor([3]), False)),
        "padding": visible(lambda mask, length: mask.index_fill_(-1, torch.tensor([2]), True)),
    },
    "rms_norm": {"eps": lambda x, weight_W, eps, kind: RIGHT.rms_norm(x, weight_W, eps + 0.1, kind)},
    "rotate": {"order": lambda q, k, cos, sin: RIGHT.rotate(q, k, sin, cos)},
    "silu_product": {"order": lambda gate, up: RIGHT.silu_product(up, gate)},
    "store": {"place": lambda key, value, keys, values, length: RIGHT.store(key, value, keys, values, length - 1)},
}


@pytest.mark.parametrize(("name", "mistake"), [("none", ""), *((name, each) for name in WRONG for each in WRONG[name])])
def test_a_kernel_with_a_mistake_is_not_used(name, mistake, monkeypatch):
    """In bfloat16 and with a long cache, where rounding hides more."""
    kernels = TorchKernels(**({name: WRONG[name][mistake]} if mistake else {}))
    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_step, "_import_kernels", lambda: kernels)
    monkeypatch.setattr(decode_graph, "MIN_PLACES", 4096)
    model = random_model(ARCHITECTURES["llama"]()).bfloat16()
    result = run(model, (6, 9), 4)
    assert result.decoding == "cuda graph"
    (graph,) = graphs_of(model).graphs.values()
    wrong = {name} if mistake else set()
    if name == "rms_norm":
        wrong |= {"add_rms_norm"}  # which needs the kind of its norm
    assert set(graph.fused.refusals) == wrong and graph.fused.used == set(KERNEL_NAMES) - wrong


def test_a_kernel_that_fails_is_not_used(monkeypatch):
    def fail(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_step, "_import_kernels", lambda: TorchKernels(silu_product=fail))
    model = random_model(ARCHITECTURES["llama"]())
    assert "-silu_product: RuntimeError: no compiler" in run(model, (9,), 3).fused
    monkeypatch.setattr(fused_step, "_import_kernels", lambda: "ImportError: no Triton")
    release_graphs(model)
    result = run(model, (9,), 3)
    assert result.decoding == "cuda graph" and result.fused == ("-all: ImportError: no Triton",)


def test_modules_with_other_numbers_are_checked_again(monkeypatch):
    """A second layer with another factor keeps its own formula."""
    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_step, "_import_kernels", TorchKernels)
    model = random_model(ARCHITECTURES["llama"]())
    layer = model.model.layers[1]

    class Scaled(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
            added = super().forward(hidden_states, **options) - hidden_states
            return hidden_states + self.factor * added

    for each, factor in zip(model.model.layers, (1.0, 0.5), strict=True):
        each.__class__, each.factor = Scaled, factor
    assert_same_tokens(model, repetition_penalty=1.3)
    (graph,) = graphs_of(model).graphs.values()
    assert "add_rms_norm" in graph.fused.used and set(graph.fused.refusals) == {"add_rms_norm"}


def test_norms_and_feed_forwards_with_further_inputs_keep_their_own(llama, monkeypatch):
    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_step, "_import_kernels", TorchKernels)
    fused = FusedStep(llama, torch.device("cpu"))
    x = torch.randn(1, 1, 64)
    calls: list[Any] = []
    for replacement, module in ((fused._norm, llama.model.norm), (fused._feed_forward, llama.model.layers[0].mlp)):
        replacement(module, lambda *args, **options: calls.append((args, options)), x, "gate", more=1)
        assert calls.pop() == ((x, "gate"), {"more": 1})
    assert set(fused.refusals) == {"rms_norm", "silu_product"}


def test_other_threads_and_caches_keep_the_functions_of_transformers(llama, monkeypatch):
    kernels = TorchKernels()
    monkeypatch.setattr(fused_step, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(fused_step, "_import_kernels", lambda: kernels)
    fused = FusedStep(llama, torch.device("cpu"))
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    states = [torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)]
    mask, module = torch.ones(1, 1, 1, 8, dtype=torch.bool), llama.model.layers[0].self_attn
    expected = attend(module, *states, mask)[0]
    with torch.inference_mode(), fused.active(torch.tensor([7])):
        thread = threading.Thread(target=lambda: llama(torch.tensor([[3, 4]])))
        thread.start()
        thread.join()
        assert not kernels.threads
        llama.model.norm(torch.randn(1, 1, 64))
        assert kernels.threads == {threading.get_ident()}
        assert torch.equal(ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, mask)[0], expected)
        assert "attend" in fused.refusals and "attend" not in fused.used
        fused.add_cache(states[1])
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, mask)
        assert "attend" in fused.used
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend


@pytest.mark.slow
def test_fused_kernels_agree_with_the_model_in_the_interpreter():
    """Run `decode_kernel_cases.py` in its own process: TRITON_INTERPRET must be set before kernels are imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    cases = SUPPORT / "decode_kernel_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
