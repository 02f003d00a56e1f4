"""scripts/gpu_check.py without a GPU: sections that fail, crash, hang or pass, and the tables of their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT
from script_modules import load_script

SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "scripts")!r})
import gpu_check

def passes(run):
    run.log.write("answer", value=42)

def raises(run):
    run.log.write("answer", value=1)
    raise ValueError("a planted error")

def hangs(run):
    run.log.write("answer", value=2)
    os.system("sleep 300")

def dies(run):
    os.kill(os.getpid(), 9)

def finds(run):
    run.log.finding("a planted problem")

def stops(run):
    run.log.write("process", pid=os.getpid())
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(300)

def waits(run):
    run.log.write("process", pid=os.getpid())
    time.sleep(300)

functions = [raises, hangs, dies, finds, passes, stops]
gpu_check.SECTIONS = {{
    f.__name__: gpu_check.Section(run=f, seconds=3 if f is hangs else 60, timed=f is passes) for f in functions
}}
gpu_check.BACKGROUND = {{"waits": gpu_check.Section(run=waits, seconds=60)}}
gpu_check.BACKGROUND_SECONDS = 3
gpu_check.NEEDED_BY = {{"waits": {{"stops"}}}}
gpu_check.refuse_this_machine = lambda: None
raise SystemExit(gpu_check.main())
"""
"""A script with sections of its own, each in a process that this script is started in again."""


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return load_script("gpu_check.py")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "planted.py"
    file.write_text(SCRIPT)
    return file


def run_script(script: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def log_lines(out: Path, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["what"] == what]


@pytest.fixture(scope="module")
def planted(script: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("results")
    return run_script(script, out, "--skip", "stops"), out


@pytest.mark.slow
def test_every_section_is_recorded_however_it_ends(planted):
    done, out = planted
    ended = {line["name"]: (line["status"], line["exit"]) for line in log_lines(out, "section")}
    assert ended == {
        "raises": ("failed", 3),
        "hangs": ("timed out", None),
        "dies": ("failed", -9),
        "finds": ("findings", 1),
        "passes": ("ok", 0),
    }
    assert done.returncode == 1


@pytest.mark.slow
def test_results_before_a_failure_are_kept(planted):
    _, out = planted
    assert {line["section"]: line["value"] for line in log_lines(out, "answer")} == {
        "raises": 1,
        "hangs": 2,
        "passes": 42,
    }
    findings = {line["section"]: line["text"] for line in log_lines(out, "finding")}
    assert findings == {"raises": "ValueError: a planted error", "finds": "a planted problem"}
    assert "ValueError: a planted error" in (out / "sections.log").read_text()


@pytest.mark.slow
def test_the_last_table_names_every_section(planted):
    done, out = planted
    table = done.stdout[done.stdout.index("\nsections") :]
    assert (out / "summary.txt").read_text().strip() in table
    for name, status in (("raises", "failed"), ("hangs", "timed out"), ("dies", "failed"), ("passes", "ok")):
        assert any(line.split()[: 1 + len(status.split())] == [name, *status.split()] for line in table.splitlines())
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["sections"]["hangs"] == "timed out" and last["findings"] == 2


@pytest.mark.slow
def test_after_sigterm_all_processes_are_ended_and_the_results_reported(script, tmp_path):
    done = run_script(script, tmp_path, "--only", "passes,stops")
    ended = {line["name"]: line["status"] for line in log_lines(tmp_path, "section")}
    assert ended == {"passes": "ok", "stops": "ended early", "waits": "still running"} and done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["sections"] == ended
    for line in log_lines(tmp_path, "process"):
        with pytest.raises(ProcessLookupError):
            os.kill(line["pid"], 0)
    # `passes` is timed: it waited for the background, which did not end, and its results say so.
    (answer,) = log_lines(tmp_path, "answer")
    assert answer["beside"] == ["waits"] and answer["at"] > 3
    assert "passes       ok" in done.stdout and "beside waits" in done.stdout


def options_of(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--out", str(out), *options])
    return gpu_check.parse_options()


def test_chosen_sections_keep_their_order_without_the_skipped_ones(gpu_check, monkeypatch, tmp_path):
    options = options_of(gpu_check, monkeypatch, tmp_path, "--only", "speed,best,first", "--skip", "best")
    assert gpu_check.chosen_names(options) == ["first", "speed"]


def test_no_section_starts_after_the_time_of_the_run(gpu_check, monkeypatch, tmp_path):
    options = options_of(gpu_check, monkeypatch, tmp_path, "--only", "speed", "--seconds", "1", "--scratch", "unused")
    gpu_check.run_section("speed", options, time.time() + 1)
    (line,) = log_lines(tmp_path, "section")
    assert (line["name"], line["status"]) == ("speed", "not started") and gpu_check.report(options) == 0


def test_the_rates_are_measured_before_the_background_starts(gpu_check, monkeypatch, tmp_path):
    options = options_of(gpu_check, monkeypatch, tmp_path, "--scratch", str(tmp_path))
    order = []
    process = SimpleNamespace(poll=lambda: 0)
    monkeypatch.setattr(gpu_check, "start_section", lambda name, *_: order.append(name) or process)
    monkeypatch.setattr(gpu_check, "run_section", lambda name, *_: order.append(name))
    monkeypatch.setattr(gpu_check, "finish_background", lambda name, *_: order.append(f"end of {name}"))
    gpu_check.run_all(["machine", "first", "quantize"], options)
    background = ["checkpoints", "compile"]
    assert order == ["machine", *background, "first", "quantize", *(f"end of {name}" for name in background)]


def test_a_file_is_locked_as_long_as_the_process_runs(gpu_check, tmp_path):
    lock = tmp_path / "lock"
    assert not gpu_check.processes.is_locked(lock)
    process = gpu_check.processes.start(["sleep", "300"], dict(os.environ), tmp_path / "console", lock)
    assert gpu_check.processes.is_locked(lock)
    gpu_check.processes.end(process)
    assert not gpu_check.processes.is_locked(lock)


def test_damaged_lines_of_the_log_are_left_out(gpu_check, tmp_path):
    good = {"at": 1.0, "section": "speed", "what": "note"}
    (tmp_path / "log.jsonl").write_text('{"at": 1,, }\n[1]\n{"what": "speed"}\n' + json.dumps(good) + '\n{"at": 2')
    assert gpu_check.read_log(tmp_path) == [good]


@pytest.fixture
def run(gpu_check: ModuleType, tmp_path: Path) -> Any:
    log = gpu_check.Log(tmp_path / "log.jsonl", "a section", time.time())
    return gpu_check.Run(out=tmp_path, scratch=tmp_path, rehearse=True, ends=time.time() + 100, log=log)


def test_a_quantization_without_a_report_does_not_end_the_section(run, monkeypatch):
    from gpu import quantization
    from gpu.processes import CommandResult

    monkeypatch.setattr(quantization, "run_command", lambda *_: CommandResult(0, 1.0, "", []))
    monkeypatch.setattr(quantization, "wait_for_checkpoints", lambda run: (run.scratch, run.scratch))
    quantization.section_best(run)
    assert [line["name"] for line in log_lines(run.out, "quantize")] == ["best", "target-bpw"]
    assert [line["text"][:35] for line in log_lines(run.out, "finding")] == ["quantize report: FileNotFoundError:"] * 2


def test_a_kernel_that_raises_costs_one_record(run, monkeypatch):
    from gpu import correctness

    calls = []

    def fail(x_MK: torch.Tensor, *_: Any) -> torch.Tensor:
        calls.append(len(x_MK))
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(correctness, "BACKENDS", {"triton": SimpleNamespace(matmul=fail)})
    monkeypatch.setattr(correctness.gpu, "dequantize", fail)
    shape = correctness.LinearShape.of_sizes(64, 128, correctness.QuantSpec(group_size=64))
    problems = correctness.check_case(shape, torch.bfloat16, torch.device("cpu"), (1, 3))
    assert calls[1:] == [1, 3] and len(problems) == 3 and all("shared memory" in line for line in problems)

    def check() -> list[str]:
        raise ValueError("a compile error")

    correctness.find_problems(run, "a case", check)
    assert [line["text"] for line in log_lines(run.out, "finding")] == ["a case: ValueError: a compile error"]


def test_refused_and_missing_fused_kernels_are_named(gpu_check):
    from gpu.graphs import EXPECTED_KERNELS, kernel_problems

    assert kernel_problems(EXPECTED_KERNELS) == []
    problems = kernel_problems(("attend", "rms_norm", "rotate", "silu_product", "-store: its results differ"))
    assert problems == ["fused kernel refused: store: its results differ", "fused kernel add_rms_norm is not used"]
    assert len(kernel_problems(("-all: ImportError: no triton",))) == 1


@pytest.mark.slow
def test_graph_decoding_is_compared_with_eager_decoding(run, monkeypatch):
    from gpu import graphs
    from gpu.rehearsal import capture_on_cpu
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmquant.runtime import decoding

    monkeypatch.setattr(decoding, "CAPTURES", dict(decoding.CAPTURES))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=97)).eval()
    capture_on_cpu()
    right = graphs.check_graph(run, "tiny", model, (9, 5))
    assert right["logits_error"] < 1e-5 and right["first_different_tokens"] == []
    run.log.write("rates", copy_bytes_per_second=1e9, bf16_flops=1e9)
    timed = graphs.time_graph(run, "tiny", model)
    assert timed["fused ms_per_step"] > 0 and "unfused ms_per_block" in timed
    embedding = 97 * 32
    assert timed["step_bytes"] >= 4 * (sum(each.numel() for each in model.parameters()) - embedding)
    assert log_lines(run.out, "finding") == []
    # A replay that computes nothing leaves the logits of the capture.
    decoding.CAPTURES["cpu"] = lambda step, device: step() or (lambda: None)
    graphs.check_graph(run, "tiny", model, (9, 5))
    texts = [line["text"] for line in log_lines(run.out, "finding")]
    assert "the logits of the first step differ" in texts[0] and "another token" in texts[1]


def test_the_goals_of_decoding_are_logged_and_shown(gpu_check, run):
    from gpu.graphs import log_goal

    quantized = {"blocks": 4, "fused ms_per_step": 0.4, "fused bandwidth_share": 0.55, "fused ms_of_goal": 2.0}
    log_goal(run, quantized, {"unfused ms_per_step": 1.2, "unfused ms_of_goal": 6.4})
    (goal,) = log_lines(run.out, "decode goal")
    assert goal["speed_up"] == 3.0 and goal["reached"] == [True, False] and goal["goal_blocks"]["speed_up"] == 3.2
    text = gpu_check.summary.summarize(gpu_check.read_log(run.out))
    assert "0.4 ms, bf16 1.2 ms: 3.00x (goal 2.5x), 55%! of the copy bandwidth (goal 60%)" in text


def test_unknown_section_is_refused_in_one_line(gpu_check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--rehearse", "--only", "speed,sped", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("gpu_check: section 'sped': not one of machine, first,")


def test_tables_fit_into_the_limit_and_keep_the_first_lines(gpu_check):
    log = [{"what": "section", "section": "gpu_check", "name": "speed", "status": "ok", "exit": 0, "seconds": 1.0}]
    numbers = {"us": 4.0, "dense_us": 11.2, "speed_up": 2.8, "limit_us": 3.0, "limit_speed_up": 3.73}
    shape = {"in_features": 4096, "out_features": 4096, "bandwidth_share": 0.74, "goal": 2.8}
    log += [{"what": "speed", "rows": rows, **shape, **numbers} for rows in range(400)]
    log += [{"what": "finding", "section": "first", "text": "x" * 500} for _ in range(50)]
    text = gpu_check.summary.summarize(log)
    assert len(text) <= gpu_check.summary.MAX_CHARACTERS
    assert text.startswith("sections\n  speed        ok ")


def test_the_tables_end_before_the_first_line_that_does_not_fit(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check.summary, "MAX_CHARACTERS", 60)
    monkeypatch.setattr(gpu_check.summary, "PARTS", (lambda log: ["a" * 40, "b" * 40, "c"], lambda log: ["d"]))
    assert gpu_check.summary.summarize([]) == "a" * 40 + "\n"


def test_a_damaged_line_of_the_log_costs_one_table(gpu_check):
    log = [{"what": "decode", "model": "dense"}, {"what": "finding", "section": "first", "text": "a problem"}]
    text = gpu_check.summary.summarize(log)
    assert "decode_lines: KeyError" in text and "first: a problem" in text


@pytest.mark.parametrize(
    ("rows", "sizes", "group_size", "expected"),
    [
        (1, (4096, 4096), 128, 2.8),
        (1, (4096, 14336), 128, 3.4),
        (1, (8192, 28672), 128, 3.5),
        (16, (8192, 28672), 128, 2.8),
        (64, (4096, 4096), 128, 1.8),
        (256, (4096, 4096), 128, 0.9),
        (2048, (4096, 4096), 128, 0.8),
        (1, (4096, 4096), 64, None),
        (1, (4096, 1024), 128, None),
    ],
)
def test_goals(gpu_check, rows, sizes, group_size, expected):
    from gpu.speed import goal

    from llmquant.kernels.layout import LinearShape
    from llmquant.spec import QuantSpec

    assert goal(rows, LinearShape.of_sizes(sizes[1], sizes[0], QuantSpec(group_size=group_size))) == expected


def test_every_grid_is_checked_once_before_any_is_checked_twice(gpu_check):
    from gpu.correctness import ordered_cases

    cases = ordered_cases()
    assert sorted(map(str, cases)) == sorted(map(str, gpu_check.correctness_cases()))
    grids = [(shape.bits, shape.group_size, shape.act_order_groups, dtype) for shape, dtype in cases]
    assert len(set(grids[: len(set(grids))])) == len(set(grids))


def test_counters_are_read_from_the_csv_of_ncu(gpu_check):
    from gpu.counters import METRICS, parse_csv

    header = '"ID","Process ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"'
    rows = [
        f'"{launch}","7","w4a16_kernel","(128, 1, 1)","(1, 64, 4)","{metric}","%","{launch}.{number}"'
        for launch in range(2)
        for number, metric in enumerate(METRICS)
    ]
    text = "\n".join(["==PROF== Connected to process 7", header, *rows])
    first, second = parse_csv(text)
    assert first["dram_percent"] == "0.0 %" and second["issue_percent"] == "1.1 %"
    assert first["grid"] == "(1, 64, 4)"


def event(name: str, start: int, duration: int, thread: int = 1, device: str = "CPU") -> SimpleNamespace:
    """Return an event with the methods of those of torch's profiler."""
    values = {"name": name, "start_ns": start, "duration_ns": duration, "start_thread_id": thread}
    values["device_type"] = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in values.items()})


def test_own_time_of_an_operator_is_without_the_operators_inside(gpu_check):
    from gpu.profiling import self_times

    events = [event("outer", 0, 100), event("inner", 10, 30), event("inner", 50, 20), event("deep", 12, 5)]
    events += [event("outer", 0, 7, thread=2), event("after", 100, 9)]
    self_ns, calls, complete = self_times(events)
    assert self_ns == {"outer": 100 - 30 - 20 + 7, "inner": 30 + 20 - 5, "deep": 5, "after": 9}
    assert calls == {"outer": 2, "inner": 2, "deep": 1, "after": 1} and complete


def test_kernels_and_launches_are_summed_up(gpu_check):
    from gpu.profiling import kernel_table

    events = [event("cudaLaunchKernel", 0, 2), event("cuLaunchKernelEx", 0, 2), event("cudaMemcpyAsync", 0, 9)]
    events += [event("add", 0, 3_000_000, device="CUDA"), event("add", 0, 2_000_000, device="CUDA")]
    table = kernel_table(events)
    assert table["launches"] == 2 and table["device_ms"] == 5.0 and table["kernels"] == [["add", 2, 5.0]]


def test_random_checkpoints_are_complete_and_share_their_weights(gpu_check, tmp_path):
    from gpu.checkpoints import LARGE, SMALL, write_checkpoints
    from gpu.runs import REHEARSAL_SIZES
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_checkpoints(tmp_path, REHEARSAL_SIZES, torch.device("cpu"))
    large, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in (LARGE, SMALL))
    assert len(large.model.layers) == REHEARSAL_SIZES.num_blocks and len(small.model.layers) == 1
    states = large.state_dict(), small.state_dict()
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in states[1].items())
    outliers = large.model.embed_tokens.weight.float().square().mean(dim=0).sqrt()
    assert outliers.max() > 3 * outliers.median()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / SMALL)
    text = "def f(x):\n    return naïve + 'ü'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= REHEARSAL_SIZES.vocab_size


def test_the_end_of_a_long_console_file_is_kept(gpu_check, tmp_path):
    file = tmp_path / "sections.log"
    file.write_text("".join(f"{number:9}\n" for number in range(100)))
    gpu_check.processes.keep_the_end(file, 50)
    assert file.read_text().split() == ["95", "96", "97", "98", "99"]
