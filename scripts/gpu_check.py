#!/usr/bin/env python
"""Check llmquant on the GPU of this machine: the kernels, their speed, and quantizing and running a model.

    scripts/gpu_check.py --out results               # under 8 minutes on an H100 or H200
    scripts/gpu_check.py --only machine,speed --plot speed.png
    scripts/gpu_check.py --rehearse --out results    # the same steps with tiny problems on a CPU, in minutes

It runs from a checkout; the package need not be installed. Each section is a process of its own with a time limit. A
section that fails, crashes or hangs is recorded, and the next one starts. Every result is a line of OUT/log.jsonl the
moment it is known, and OUT/sections.log holds all that the sections print. The tables at the end are in
OUT/summary.txt too, and the last line of stdout is JSON; both also come after SIGTERM or Ctrl-C. A random Llama
checkpoint with the blocks of an 8B model is written and the kernels are compiled in the background. Sections that
measure times wait for that, or say in each result that it was still running.

Exit code: 0 if all is well, 1 if a section failed or found a problem, 2 if the machine has no GPU that the backend
supports. A speed below its goal is reported, but is no problem.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import processes, summary
from gpu.runs import CONSOLE_FILE, LOG_FILE, REHEARSAL_PATIENCE, SUMMARY_FILE, Log, Run, one_line, read_log

FUNCTIONS = {
    "check_case": "gpu.correctness",
    "correctness_cases": "gpu.correctness",
    "draw": "gpu.speed",
    "graph_microseconds": "llmquant.kernels.tune",
    "print_table": "gpu.speed",
    "speed_limit_microseconds": "gpu.speed",
    "time_linear": "gpu.speed",
}
"""Functions that the tests call, and their modules. An import error in one of those costs its section only, so they are
imported at the first use."""


def __getattr__(name: str) -> Any:
    """Return one of `FUNCTIONS`."""
    if name in FUNCTIONS:
        return getattr(import_module(FUNCTIONS[name]), name)
    raise AttributeError(name)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the check, which runs in a process of its own."""

    run: Callable[[Run], None] | str
    """The function that does the work and logs the results, or `module:name` of it. A module is imported in the process
    of its section alone, so that an error in it costs this section only."""
    seconds: float
    """Limit of its time."""
    interprets: bool = False
    """Whether a rehearsal runs it with Triton's interpreter."""
    reproducible: bool = False
    """Whether cuBLAS must work in torch's deterministic mode."""
    timed: bool = False
    """Whether it measures times, so that it starts after the sections of the background."""


SECTIONS: dict[str, Section] = {
    "machine": Section(run="gpu.machine:section_machine", seconds=20),
    "first": Section(run="gpu.correctness:section_first", seconds=40, interprets=True, reproducible=True),
    "rounding": Section(run="gpu.rounding:section_rounding", seconds=40, interprets=True, timed=True),
    "quantize": Section(run="gpu.quantization:section_quantize", seconds=190, timed=True),
    "decode": Section(run="gpu.decoding:section_decode", seconds=90, timed=True),
    "speed": Section(run="gpu.speed:section_speed", seconds=70, interprets=True, timed=True),
    "profile": Section(run="gpu.profiling:section_profile", seconds=60, timed=True),
    "correctness": Section(run="gpu.correctness:section_correctness", seconds=60, interprets=True, reproducible=True),
    "best": Section(run="gpu.quantization:section_best", seconds=60, timed=True),
    "ncu": Section(run="gpu.counters:section_ncu", seconds=40, interprets=True),
}
"""The sections in the order in which they run."""

BACKGROUND: dict[str, Section] = {
    "checkpoints": Section(run="gpu.checkpoints:section_checkpoints", seconds=120),
    "compile": Section(run="gpu.compiling:section_compile", seconds=120, interprets=True),
}
"""Sections that run beside the others. They start after section `machine`, which measures the rates of the GPU."""

INNER: dict[str, Section] = {
    "compile_share": Section(run="gpu.compiling:section_compile_share", seconds=120, interprets=True),
    "ncu_target": Section(run="gpu.counters:section_ncu_target", seconds=40, interprets=True),
}
"""Sections that other sections start."""

NEEDED_BY = {
    "checkpoints": {"quantize", "profile", "decode", "best"},
    "compile": {"first", "rounding", "decode", "speed", "correctness"},
}
"""Section of the background -> the sections that need it."""

BACKGROUND_SECONDS = 75
"""Seconds after the start of the sections of the background, after which no timed section waits for them any more."""

MIN_SECONDS = 4
"""Time left under which no section is started."""


def main() -> int:
    """Run the chosen sections, or the one of `--section` in this process."""
    options = parse_options()
    if options.section:
        return run_in_this_process(options)
    if not options.rehearse and (reason := refuse_this_machine()):
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    names = chosen_names(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (LOG_FILE, CONSOLE_FILE, SUMMARY_FILE):
        (options.out / name).unlink(missing_ok=True)
    with (
        sigterm_raises(),
        tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as temporary,
    ):
        options.scratch = (options.scratch or Path(temporary)).resolve()
        options.scratch.mkdir(parents=True, exist_ok=True)
        try:
            run_all(names, options)
        except (KeyboardInterrupt, SystemExit):
            print("gpu_check: ended early", file=sys.stderr)
            report(options)
            return 1
    return report(options)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let the signal SIGTERM raise SystemExit once, so that what was started is ended and the results are reported."""

    def end_early(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end_early)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_results"), help="folder of the results")
    parser.add_argument("--only", metavar="NAMES", help=f"sections to run: {','.join(SECTIONS)}")
    parser.add_argument("--skip", metavar="NAMES", help="sections to leave out")
    parser.add_argument("--quick", action="store_true", help="the kernels only: --only machine,first,speed")
    parser.add_argument("--seconds", type=float, default=480, help="limit of the whole run")
    parser.add_argument("--scratch", type=Path, help="folder of checkpoints and caches; by default a temporary one")
    parser.add_argument("--rehearse", action="store_true", help="run all sections with tiny problems on a CPU")
    parser.add_argument("--plot", type=Path, help="draw speed-up over rows to this file")
    parser.add_argument("--gemlite", action="store_true", help="time gemlite too, if installed (it tunes for minutes)")
    for name in ("--section", "--share", "--began", "--ends"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.began = float(options.began or time.time())
    return options


def chosen_names(options: argparse.Namespace) -> list[str]:
    """Return the names of the sections to run. A wrong name ends the script with exit code 2."""
    only = options.only or ("machine,first,speed" if options.quick else ",".join(SECTIONS))
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    skipped = [name.strip() for name in (options.skip or "").split(",") if name.strip()]
    for name in (*chosen, *skipped):
        if name not in SECTIONS:
            print(f"gpu_check: section '{name}': not one of {', '.join(SECTIONS)}", file=sys.stderr)
            raise SystemExit(2)
    return [name for name in SECTIONS if name in chosen and name not in skipped]


def refuse_this_machine() -> str | None:
    """Return why the check cannot run on this machine, or None if it can.

    An import error is no reason: the sections find it too, and those that can run do.
    """
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {one_line(error)}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; run this on a machine with an NVIDIA GPU, or with --rehearse"
    try:
        from llmquant.kernels import gpu as backend
        from llmquant.kernels.layout import LinearShape
        from llmquant.spec import QuantSpec
    except ImportError as error:
        print(f"gpu_check: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    refusal = backend.refuses(LinearShape.of_sizes(64, 128, QuantSpec()), device, torch.bfloat16)
    return None if refusal is None else f"the triton backend refuses this machine: {refusal}"


def run_all(names: list[str], options: argparse.Namespace) -> None:
    """Run the sections one after the other, with those of the background beside them."""
    ends = options.began + options.seconds
    patience = REHEARSAL_PATIENCE if options.rehearse else 1
    background: dict[str, subprocess.Popen[bytes]] = {}
    waits_until = 0.0
    try:
        for number, name in enumerate(names):
            if not background and (number > 0 or name != "machine"):
                needed = [other for other in BACKGROUND if NEEDED_BY[other] & set(names)]
                for other in needed:
                    background[other] = start_section(other, options, ends, options.scratch / f"{other}.log")
                waits_until = min(time.time() + BACKGROUND_SECONDS * patience, ends - MIN_SECONDS)
            if SECTIONS[name].timed:
                wait_for_background(background, waits_until)
            run_section(name, options, ends)
    finally:
        for name, process in background.items():
            finish_background(name, process, options)


def wait_for_background(background: dict[str, subprocess.Popen[bytes]], until: float) -> None:
    """Wait for the sections of the background, but no longer than until this `time.time()`.

    A time that is measured beside them is too long.
    """
    while time.time() < until and any(process.poll() is None for process in background.values()):
        time.sleep(0.05)


def run_section(name: str, options: argparse.Namespace, ends: float) -> None:
    """Run a section in a process of its own, and record how it ended."""
    left = ends - time.time()
    if left < MIN_SECONDS:
        record(options, name, "not started", None, 0.0, ["the time of the run is over"])
        return
    console = options.out / CONSOLE_FILE
    seconds = min(SECTIONS[name].seconds * (REHEARSAL_PATIENCE if options.rehearse else 1), left)
    with console.open("a") as output:
        print(f"\n===== {name}, at most {seconds:.0f} s", file=output)
    offset, began = console.stat().st_size, time.monotonic()
    try:
        ended = processes.wait(start_section(name, options, time.time() + seconds, console), seconds)
    except BaseException:  # Ctrl-C or SIGTERM
        record(options, name, "ended early", None, time.monotonic() - began, [])
        raise
    last = processes.last_lines(console, offset) if ended.status in ("failed", "timed out") else []
    record(options, name, ended.status, ended.exit_code, ended.seconds, last)


def start_section(name: str, options: argparse.Namespace, ends: float, console: Path) -> subprocess.Popen[bytes]:
    """Start the process of a section."""
    section = find_section(name)
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--section", name, "--out", str(options.out)]
    command += ["--scratch", str(options.scratch), "--began", str(options.began), "--ends", str(ends)]
    command += [*(["--rehearse"] if options.rehearse else []), *(["--gemlite"] if options.gemlite else [])]
    environment = processes.environment(
        options.scratch, interpret=section.interprets and options.rehearse, reproducible=section.reproducible
    )
    return processes.start(command, environment, console, lock_file(options, name) if name in BACKGROUND else None)


def lock_file(options: argparse.Namespace, name: str) -> Path:
    """Return the file that is locked while a section of the background runs."""
    return Path(options.scratch) / f"{name}.lock"


def running_background(options: argparse.Namespace) -> list[str]:
    """Return the names of the sections of the background that are running."""
    return [name for name in BACKGROUND if processes.is_locked(lock_file(options, name))]


def finish_background(name: str, process: subprocess.Popen[bytes], options: argparse.Namespace) -> None:
    """End a section of the background if it is still running, record it, and keep its output."""
    code = process.poll()
    processes.end(process)
    status = {None: "still running", 0: "ok", 1: "findings"}.get(code, "failed")
    file = options.scratch / f"{name}.log"
    last_result = max((line["at"] for line in read_log(options.out) if line["section"] == name), default=0.0)
    record(options, name, status, code, last_result, processes.last_lines(file, 0))
    with (options.out / CONSOLE_FILE).open("a") as output:
        print(f"\n===== {name}, in the background\n{file.read_text(errors='replace')[-500_000:]}", file=output)


def record(
    options: argparse.Namespace, name: str, status: str, code: int | None, seconds: float, last_lines: list[str]
) -> None:
    """Log how a section ended, and print it."""
    log = Log(options.out / LOG_FILE, "gpu_check", options.began)
    values = {"name": name, "status": status, "exit": code, "seconds": round(seconds, 1)}
    log.write("section", **values, **({"last_lines": last_lines} if last_lines else {}))


def find_section(name: str) -> Section:
    """Return a section of any kind by its name."""
    return (SECTIONS | BACKGROUND | INNER)[name]


def load_function(section: Section) -> Callable[[Run], None]:
    """Return the function of a section."""
    if not isinstance(section.run, str):
        return section.run
    module, _, name = section.run.partition(":")
    function: Callable[[Run], None] = getattr(import_module(module), name)
    return function


def run_in_this_process(options: argparse.Namespace) -> int:
    """Run one section. Return 0, 1 if it found problems, or 3 if it raised an exception."""
    if options.rehearse:
        from gpu.rehearsal import use_cpu

        use_cpu()
    section = find_section(options.section)
    beside = partial(running_background, options) if section.timed or options.section == "machine" else None
    log = Log(options.out / LOG_FILE, options.section, options.began, beside)
    run = Run(
        out=options.out,
        scratch=options.scratch.resolve(),
        rehearse=options.rehearse,
        ends=float(options.ends or time.time() + section.seconds) - 1,
        log=log,
        share=options.share or "0/1",
        gemlite=options.gemlite,
    )
    try:
        load_function(section)(run)
    except Exception as error:
        traceback.print_exc()
        log.finding(f"{type(error).__name__}: {one_line(error)}")
        return 3
    return 1 if log.num_findings else 0


def report(options: argparse.Namespace) -> int:
    """Print and write the tables and the last line, draw the plot, and return the exit code."""
    log = read_log(options.out)
    speeds = summary.of_kind(log, "speed")
    ended = {line["name"]: line["status"] for line in summary.of_kind(log, "section")}
    findings = len(summary.of_kind(log, "finding"))
    text = summary.summarize(log)
    (options.out / SUMMARY_FILE).write_text(text)
    missed = [one for one in speeds if one.get("goal") is not None and one["speed_up"] < one["goal"]]
    last = {
        "check": "gpu",
        "torch": installed_torch(),
        "sections": ended,
        "findings": findings,
        "goals_missed": len(missed) + sum(line["reached"].count(False) for line in summary.of_kind(log, "decode goal")),
        "seconds": round(time.time() - options.began),
    }
    print(text)
    print(json.dumps(last), flush=True)
    try:
        if options.plot is not None and speeds:
            from gpu.speed import draw

            name = next((line["name"] for line in summary.of_kind(log, "gpu") if "name" in line), "")
            draw(speeds, options.plot, f"4-bit linear, {name}")
        processes.keep_the_end(options.out / CONSOLE_FILE)
    except Exception as error:
        print(f"gpu_check: after the report: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    failed = [name for name, status in ended.items() if status not in ("ok", "still running", "not started")]
    return 1 if failed or findings else 0


def installed_torch() -> str | None:
    """Return the version of torch, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    # A process that ends with a lost GPU can hang in the destructors.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if "--section" in sys.argv else sys.exit(code)
