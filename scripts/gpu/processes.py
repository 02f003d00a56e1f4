"""Run sections and commands in processes of their own, each with a time limit.

A section may crash, hang, or lose the GPU; the script records it and goes on. A section and all processes that it
starts form one process group, which ends with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.runs import Run, one_line

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the checkout."""

MAX_CONSOLE_BYTES = 15 << 20
"""Limit of the file with the sections' output, of which the end is kept."""

GRACE_SECONDS = 1.5
"""Time between the two signals that end a section."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: str
    """`ok`, `findings`, `failed` or `timed out`."""
    exit_code: int | None
    """Exit code; negative for a signal; None after a timeout."""
    seconds: float
    """Wall seconds."""


def environment(scratch: Path, *, interpret: bool = False, reproducible: bool = False) -> dict[str, str]:
    """Return the environment of a process that imports llmquant from the checkout, with its caches in `scratch`.

    interpret: run Triton kernels in Triton's interpreter. reproducible: let cuBLAS work in torch's deterministic mode.
    """
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    values = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    values |= {"TRITON_INTERPRET": "1"} if interpret else {}
    values |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if reproducible else {}
    return {**os.environ, **values}


def start(
    command: Sequence[str], environment: dict[str, str], console: Path, lock: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a new group in the checkout's root. Its output is appended to the file `console`.

    lock: a file that stays locked as long as the process runs (`is_locked`).
    """
    with console.open("ab") as output, (lock or Path(os.devnull)).open("ab") as held:
        if lock is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            start_new_session=True, pass_fds=() if lock is None else (held.fileno(),),
        )  # fmt: skip


def is_locked(lock: Path) -> bool:
    """Return whether the process still runs that `start` was given this file for."""
    if not lock.exists():
        return False
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that `start` returned, with its whole group."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def wait(process: subprocess.Popen[bytes], seconds: float) -> Ended:
    """Wait for a process that `start` returned, and end its group when it exits or after this many seconds."""
    began = time.monotonic()
    try:
        code = process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        end(process)
        return Ended("timed out", None, time.monotonic() - began)
    except BaseException:  # Ctrl-C
        end(process)
        raise
    end(process)  # the section may have left processes running
    status = {0: "ok", 1: "findings"}.get(code, "failed")
    return Ended(status, code, time.monotonic() - began)


def last_lines(file: Path, offset: int, count: int = 4) -> list[str]:
    """Return the last lines that are not blank in a file, from an offset on."""
    with file.open("rb") as content:
        content.seek(max(offset, file.stat().st_size - 8192))
        lines = content.read().decode(errors="replace").splitlines()
    return [one_line(line, 240) for line in lines if line.strip()][-count:]


def keep_the_end(file: Path, size: int = MAX_CONSOLE_BYTES) -> None:
    """Cut a file to its last bytes if it is larger than `size`."""
    if file.exists() and file.stat().st_size > size:
        with file.open("rb") as content:
            content.seek(-size, os.SEEK_END)
            rest = content.read()
        file.write_bytes(rest)


@dataclass(frozen=True)
class CommandResult:
    """The result of a command that a section ran."""

    exit_code: int | None
    """Exit code; None if the time limit ended it."""
    seconds: float
    """Wall seconds."""
    stdout: str
    """What it wrote to stdout."""
    lines: list[tuple[float, str]]
    """(seconds after the start, line) of what it wrote to stderr."""

    def describe(self) -> dict[str, Any]:
        """Return the entries for the log: exit code, seconds and, after a failure, the last lines of stderr."""
        values: dict[str, Any] = {"exit": self.exit_code, "seconds": round(self.seconds, 2)}
        if self.exit_code != 0:
            values["last_lines"] = [one_line(line, 240) for _, line in self.lines if line.strip()][-6:]
        return values


def run_command(run: Run, command: Sequence[str], seconds: float, env: dict[str, str] | None = None) -> CommandResult:
    """Run a command for at most this many seconds, or until the section ends. What it prints is printed too."""
    print("$", " ".join(command), flush=True)
    seconds = min(run.patience * seconds, run.seconds_left - 2)
    if seconds < 1:
        return CommandResult(None, 0.0, "", [(0.0, "not started: the time of the section is over")])
    began = time.monotonic()
    lines: list[tuple[float, str]] = []
    output = run.scratch / f"stdout-{os.getpid()}"
    with output.open("wb") as stdout:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env or environment(run.scratch), stdout=stdout, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    reader = threading.Thread(target=_stamp_lines, args=(process.stderr, lines, began), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    elapsed = time.monotonic() - began
    reader.join(1)
    text = output.read_text(errors="replace")
    print(text[-20_000:], flush=True)
    return CommandResult(code, elapsed, text, lines)


def _stamp_lines(stream: Any, lines: list[tuple[float, str]], began: float) -> None:
    """Collect the lines of a stream with the seconds at which they arrive, and print them."""
    for line in stream:
        elapsed = time.monotonic() - began
        lines.append((round(elapsed, 2), line.decode(errors="replace").rstrip()))
        print(f"[{elapsed:7.2f}] {lines[-1][1]}", flush=True)


def section_command(run: Run, name: str, *options: str) -> list[str]:
    """Return the command line that runs another section with the folders of this run."""
    command = [sys.executable, sys.argv[0], "--section", name, "--out", str(run.out), "--scratch", str(run.scratch)]
    return [*command, "--began", str(run.log.began), *(["--rehearse"] if run.rehearse else []), *options]


def llmquant_command(*arguments: object, every_block: bool = False) -> list[str]:
    """Return a command line of `python -m llmquant`. every_block: its progress has a line for each block."""
    if not every_block:
        return [sys.executable, "-m", "llmquant", *map(str, arguments)]
    code = "from llmquant.console import progress; progress.SECONDS_BETWEEN_LINES = 0; "
    code += "from llmquant.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def find_program(*names: str) -> str | None:
    """Return the path of the first of these programs that is installed, or None."""
    return next((path for name in names if (path := shutil.which(name))), None)
