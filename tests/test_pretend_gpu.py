"""Every command runs on a pretend GPU, which refuses to mix tensors of the CPU with its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import command
from pretend_gpu import CudaTensor, MixedDevicesError, pretend_gpu
from safetensors.torch import load_file
from short_text import short_manual

from llmquant.hub import load_tokenizer
from llmquant.pipeline import sample_texts
from llmquant.planning import held_out
from llmquant.runtime.generate import SamplingParams, generate
from llmquant.runtime.load import load

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

DATA = ("--calibration", "python-docs", "--samples", "10", "--seq-len", "32")
RUNS: dict[str, tuple[str, ...]] = {
    "rtn": ("--method", "rtn"),
    "gptq": DATA,
    "fast": (*DATA, "--effort", "fast"),
    "awq": (*DATA, "--method", "awq"),
    "awq+gptq": (*DATA, "--method", "awq+gptq", "--effort", "fast"),
    "best": (*DATA, "--effort", "best"),
    "budget": (*DATA, "--target-bpw", "5", "--effort", "fast"),
    "8 bits": (*DATA, "--bits", "8", "--asym", "--effort", "fast"),
}
"""Options of `quantize` for each path through the code."""

WORKLOAD = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1")


@pytest.fixture
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


# --- the pretend GPU itself ------------------------------------------------------------------------------------------


def test_tensors_report_the_device_and_compute(gpu):
    x = torch.arange(6.0).view(2, 3)
    on_gpu = x.to("cuda")
    assert isinstance(on_gpu, CudaTensor) and on_gpu.device == torch.device("cuda:0") and on_gpu.is_cuda
    assert (on_gpu @ on_gpu.T).device.type == "cuda"
    assert torch.equal((on_gpu @ on_gpu.T).cpu(), x @ x.T)
    assert type(on_gpu.cpu()) is torch.Tensor and on_gpu.cpu().device.type == "cpu"
    for made in (torch.zeros(2, device="cuda"), torch.tensor([1], device="cuda"), on_gpu.new_zeros(2), on_gpu[0]):
        assert made.device.type == "cuda"
    on_gpu += 1
    assert on_gpu.tolist() == (x + 1).tolist()


@pytest.mark.parametrize(
    "mix",
    [
        lambda cpu, gpu: gpu + cpu,
        lambda cpu, gpu: cpu @ gpu,
        lambda cpu, gpu: torch.cat([cpu, gpu]),
        lambda cpu, gpu: cpu.add_(gpu.sum()),
        lambda cpu, gpu: cpu[gpu.argmax(0)],
        lambda cpu, gpu: gpu.index_select(0, cpu.argmax(0)),
        lambda cpu, gpu: torch.nn.functional.linear(gpu, cpu),
        lambda cpu, gpu: torch.randn(2, device="cuda", generator=torch.Generator().manual_seed(0)),
    ],
)
def test_mixtures_that_cuda_refuses_are_refused(gpu, mix):
    cpu = torch.eye(2)
    with pytest.raises(MixedDevicesError):
        mix(cpu, cpu.to("cuda"))


def test_mixtures_that_cuda_allows_are_allowed(gpu):
    cpu = torch.eye(2)
    on_gpu = cpu.to("cuda")
    assert (on_gpu * torch.tensor(2.0)).tolist() == [[2, 0], [0, 2]]
    assert on_gpu[cpu.argmax(0)].tolist() == cpu.tolist()
    assert torch.zeros(2, 2).copy_(on_gpu).tolist() == cpu.tolist()
    draw = torch.Generator("cuda").manual_seed(0)
    assert torch.randn(2, device="cuda", generator=draw).device.type == "cuda"


def test_gradients_stay_on_the_gpu(gpu):
    leaf = torch.eye(2).to("cuda").requires_grad_()
    (leaf @ leaf).log_softmax(-1).gather(-1, leaf.argmax(-1, keepdim=True)).sum().backward()
    assert isinstance(leaf.grad, CudaTensor)


def test_a_graph_reads_its_inputs_at_each_replay_and_refuses_to_wait(gpu):
    x, y = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_((x * 3).view(2) + 1)
        with pytest.raises(RuntimeError, match="capturing"):
            x.sum().item()
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [16, 16]


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_runs(monkeypatch) -> Iterator[None]:
    """Shorten what a run does beside quantizing."""
    monkeypatch.setattr(held_out, "MIN_TOKENS", 64)
    monkeypatch.setattr(sample_texts, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(sample_texts, "MIN_NEW_TOKENS", 2)
    with short_manual():
        yield


def quantize(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, device: str) -> None:
    options = ("--group-size", "32", "--device", device, "--quiet", *RUNS[name])
    assert command(monkeypatch, "quantize", model, out, *options) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_quantize(name, gpu, short_runs, tiny_model, tmp_path, monkeypatch):
    quantize(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "out", monkeypatch, name, "cuda")
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["machine"] == "pretend GPU"
    assert report["verification"] is not None
    assert all(linear["error"] < 0.02 for linear in report["linears"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_the_codes_are_those_of_the_cpu(name, short_runs, tiny_model, tmp_path, monkeypatch):
    """With float32 inputs, the arithmetic is the same, but a sum may have another order.

    With bfloat16 inputs, a GPU sums the moments of the corrections in float32, and a CPU rounds each to bfloat16.
    """
    model = tiny_model("llama", dtype=torch.float32)
    monkeypatch.setitem(RUNS, name, (*RUNS[name], "--no-verify"))
    quantize(model, tmp_path / "cpu", monkeypatch, name, "cpu")
    with pretend_gpu():
        quantize(model, tmp_path / "gpu", monkeypatch, name, "cuda")
    expected, found = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "gpu"))
    words = [key for key in expected if key.endswith("qweight")]
    same = sum(int((expected[key] == found[key]).sum()) for key in words)
    assert same >= 0.99 * sum(expected[key].numel() for key in words)


@pytest.fixture(scope="module")
def small(tiny_model, tmp_path_factory) -> Path:
    """Return a quantized tiny model, which tests must not write into."""
    out = tmp_path_factory.mktemp("pretend") / "out"
    with pytest.MonkeyPatch.context() as patch:
        options = ("--method", "rtn", "--group-size", "32", "--device", "cpu", "--no-verify", "--quiet")
        assert command(patch, "quantize", tiny_model("llama", dtype=torch.bfloat16), out, *options) == 0
    return out


@pytest.mark.slow
def test_generate_with_and_without_a_cuda_graph(gpu, small):
    model, tokenizer = load(small, device="cuda"), load_tokenizer(small)
    assert model.device.type == "cuda"
    prompts = ["Hello", "A longer prompt of some words"]
    by_graph = generate(model, tokenizer, prompts, SamplingParams(max_new_tokens=6, temperature=0.0))
    eager = generate(model, tokenizer, prompts, SamplingParams(max_new_tokens=6, temperature=0.0), cuda_graph=False)
    assert by_graph.decoding == "cuda graph", by_graph.decoding
    assert by_graph.texts == eager.texts


@pytest.mark.slow
def test_the_loaded_model_predicts_what_it_predicts_on_the_cpu(small):
    """This also checks the layout of the Triton kernels, whose replacement reads the words that they would read."""
    tokens_SL = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        expected = load(small, device="cpu", dtype="float32", backend="torch")(tokens_SL).logits
        with pretend_gpu():
            found = load(small, device="cuda")(tokens_SL.to("cuda")).logits.float().cpu()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "SMALL", "--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "0.7", "--seed", "1"),
        ("eval", "SMALL", "--against", "MODEL", "--dataset", "python-docs", "--seq-len", "32", "--windows", "2"),
        ("bench", "SMALL", "--against", "MODEL", "--backend", "triton", "--backend", "torch", *WORKLOAD),
        ("inspect", "SMALL", "--backends"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(arguments, gpu, short_runs, small, tiny_model, monkeypatch, capsys):
    folders = {"SMALL": small, "MODEL": tiny_model("llama", dtype=torch.bfloat16)}
    words = [folders.get(word, word) for word in arguments]
    assert command(monkeypatch, *words, "--device", "cuda", "--json") == 0
    assert json.loads(capsys.readouterr().out)
