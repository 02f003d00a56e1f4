"""Run `llmquant` commands that are killed or find a full disk, quickly enough that one test can kill twenty of them.

A process that has imported everything (the fork server) forks a child for each command, so that a command on a tiny
model takes a fraction of a second.

    test process                 fork server                       children, one for each rank
    ────────────                 ───────────                       ───────────────────────────
    ForkServer(model)  ──────>   import torch, transformers, …
                       <──────   "ready"
    run("quantize", …) ──────>   fork ──────────────────────────>  set the limits of this command
       one line of JSON          listen to stdout and stderr <───  run the command line in this process
                                 send the signal at its time ───>  (dies)
    [CommandResult, …] <──────   wait for the children <─────────  exit
       one line of JSON

    with ForkServer(model) as server:
        result = server.run("quantize", model, out, "--method", "rtn")
        server.run(…, stop_after=0.3, signal=SIGKILL)             # kill it after 0.3 seconds
        server.run(…, ranks=2, rank=1, dies_at_input_group=5)     # rank 1 dies when its fifth input group begins
        server.run(…, ranks=2, join_seconds=2)                    # ranks wait 2 seconds for each other at the start
        server.run(…, file_bytes=20_000)                          # writing more than that to a file fails: disk full
        server.run(…, linear_log=folder)                          # write the linears that each rank quantizes

This file is imported by tests, and is also the program that the fork server runs.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from folders import artifact_bytes

from llmquant import cli

TORCH_WARNING = re.compile(r"^\[W\d{4} .*\n", re.MULTILINE)
"""A warning of torch's C++ code, which appears if its sockets cannot look up the name of the machine."""


@dataclass(frozen=True)
class CommandResult:
    """How a command ended; the first three fields are those of `subprocess.CompletedProcess`."""

    returncode: int
    """Exit code, or the negative number of the signal that ended the process."""
    stdout: str
    stderr: str
    seconds: float
    """Seconds from the start of the command to its end."""
    peak_bytes: int
    """Largest resident memory of the process, as the system counted it."""


class ForkServer:
    """A running fork server; leaving the `with` block ends it."""

    def __init__(self, model: Path, html_report: bool = True, timeout_seconds: float = 300.0) -> None:
        """Start the server and wait until it is ready.

        model: a checkpoint that is planned once, so that everything is imported before the first fork.
        html_report: whether commands draw report.html, which takes longer than all else about a tiny model.
        timeout_seconds: a command that takes longer is killed.
        """
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        }
        self._timeout_seconds = timeout_seconds
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), "html report" if html_report else "no html report"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._receive()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, *arguments: object, ranks: int = 1, **fault: Any) -> Any:
        """Run `llmquant` with these arguments; return its CommandResult, or with several ranks the list of theirs.

        Faults of the rank `rank` (default 0): after `stop_after` seconds it receives `signal` (default SIGKILL), or it
        dies when its input group number `dies_at_input_group` (from 1) begins. Faults of all ranks: they wait
        `join_seconds` for each other at the start; a file cannot grow beyond `file_bytes`. With `linear_log`, a folder,
        each rank writes a file there, named by its number, with one line for each linear that it quantizes. With
        `nodes`, a list of folders, the ranks are divided among as many nodes; the folder is the working directory of
        the ranks of a node.
        """
        assert self._process.stdin is not None
        job = {
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "timeout_seconds": self._timeout_seconds,
        } | fault
        print(json.dumps(job), file=self._process.stdin, flush=True)
        results = [CommandResult(**fields) for fields in self._receive()]
        return results if ranks > 1 else results[0]

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has died"
        return json.loads(line)


# --- twenty kills ----------------------------------------------------------------------------------------------------


def survive_kills(
    server: ForkServer,
    arguments: Sequence[object],
    folder: Path,
    kills: int = 20,
    seed: int = 0,
    on_kill: Callable[[int, float, str], None] = lambda number, fraction, problem: None,
) -> int:
    """Kill a run at random moments, run the same command again, and return how often that ended in the right bytes.

    arguments: of `llmquant`; "OUT" stands for the output folder. The right bytes are those of a run that is not killed.
    The run is divided into as many equal parts as there are kills, and each kill falls into its own part.
    on_kill: called after each with its number, the fraction of the run at which it fell, and the problem, or "".
    """
    out = folder / "out"
    command = [out if argument == "OUT" else argument for argument in arguments]
    expected: dict[str, bytes] = {}
    for _ in range(2):  # the first run is slower: it does what is done only once, such as compiling
        whole = server.run(*command)
        assert whole.returncode == 0, whole.stderr
        assert expected in ({}, artifact_bytes(out)), "two runs gave different bytes"
        expected = artifact_bytes(out)
        shutil.rmtree(out)
    draw = random.Random(seed)
    survived = 0
    for number in range(kills):
        fraction = (number + draw.random()) / kills
        while True:
            killed = server.run(*command, stop_after=fraction * whole.seconds, signal=signal.SIGKILL)
            if killed.returncode != 0:
                break
            shutil.rmtree(out)  # it had finished, sooner than the first time
            fraction *= 0.9
        problem = _continue_killed_run(server, command, out, expected)
        survived += problem == ""
        on_kill(number, fraction, problem)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
    return survived


def _continue_killed_run(server: ForkServer, command: Sequence[object], out: Path, expected: dict[str, bytes]) -> str:
    """Run the command of a killed run again; return what is wrong, or ""."""
    partial = out.with_name(out.name + ".partial")
    if out.exists() and artifact_bytes(out) != expected:
        return "the killed run left an OUT that is not complete"
    if out.exists() and not (partial / "journal.json").exists():
        return ""  # OUT was complete when the run died, while it removed its own files or printed
    again = server.run(*command)
    if again.returncode != 0:
        return f"exit code {again.returncode}: {again.stderr.strip()}"
    return "" if artifact_bytes(out) == expected and not partial.exists() else "the bytes of OUT differ"


# --- the process of the fork server ----------------------------------------------------------------------------------


def _serve(model: str, html_report: str) -> None:
    """Import everything, then run one command for each line of stdin and print its results as a line of JSON."""
    import torch

    from llmquant.console.progress import quiet_libraries
    from llmquant.hub import load_tokenizer
    from llmquant.pipeline.quantize import dry_run
    from llmquant.report import page
    from llmquant.spec import Recipe

    torch.set_num_threads(1)
    if html_report == "no html report":
        page.page = lambda report: ""
    quiet_libraries()
    dry_run(model, Path(model) / "never", Recipe(method="rtn"))
    load_tokenizer(Path(model))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond `file_bytes` then fails with an error
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run_ranks(**json.loads(line))), flush=True)


def _run_ranks(
    arguments: list[str],
    timeout_seconds: float,
    ranks: int = 1,
    stop_after: float | None = None,
    signal: int = signal.SIGKILL,
    rank: int = 0,
    nodes: Sequence[str] = (".",),
    **faults: Any,
) -> list[dict[str, Any]]:
    """Run the command in one child for each rank; return the fields of their CommandResults."""
    per_node = ranks // len(nodes)
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(per_node)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    start = time.monotonic()
    children = []
    for number in range(ranks):
        node, local = divmod(number, per_node)
        place = {"RANK": str(number), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
        prepare = partial(_set_faults, number, rank, folder=nodes[node], **faults)
        children.append(_fork(arguments, world | place if ranks > 1 else {}, prepare))
    signals = [(timeout_seconds, process, 9) for process, _ in children]
    if stop_after is not None:
        signals.append((stop_after, children[rank][0], signal))
    texts = _listen([pipe for _, pipes in children for pipe in pipes], sorted(signals), start)
    results = []
    for process, (stdout, stderr) in children:
        _, status, usage = os.wait4(process, 0)
        results.append(
            {
                "returncode": os.waitstatus_to_exitcode(status),
                "stdout": texts[stdout].decode(),
                "stderr": TORCH_WARNING.sub("", texts[stderr].decode()),
                "seconds": time.monotonic() - start,
                "peak_bytes": usage.ru_maxrss * 1024,
            }
        )
    return results


def _listen(pipes: list[int], signals: list[tuple[float, int, int]], start: float) -> dict[int, bytes]:
    """Send the signals at their times, read the pipes until all processes end, and return what each pipe gave.

    signals: (seconds after the start, process, signal), in this order. Every process is still unwaited for, so its
    number is not taken by another, and a signal to one that has ended does nothing.
    """
    texts = dict.fromkeys(pipes, b"")
    while pipes:
        while signals and time.monotonic() - start >= signals[0][0]:
            os.kill(*signals.pop(0)[1:])
        timeout = max(signals[0][0] - (time.monotonic() - start), 0) if signals else None
        for pipe in select.select(pipes, [], [], timeout)[0]:
            piece = os.read(pipe, 65536)
            texts[pipe] += piece
            if not piece:  # the process has ended
                pipes.remove(pipe)
                os.close(pipe)
    return texts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _set_faults(
    number: int,
    rank: int,
    folder: str,
    file_bytes: int | None = None,
    linear_log: str | None = None,
    dies_at_input_group: int | None = None,
    join_seconds: float | None = None,
) -> None:
    """Prepare the faults and logs of this child. number: its own rank; rank: the one that dies; folder: to work in."""
    from llmquant.pipeline import block_loop, distributed

    os.chdir(folder)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if join_seconds is not None:
        distributed.START_TIMEOUT = timedelta(seconds=join_seconds)
    quantize_linears, num_groups = block_loop.quantize_linears, 0
    parameters = inspect.signature(quantize_linears)

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal num_groups
        num_groups += 1
        if number == rank and num_groups == dies_at_input_group:
            os.kill(os.getpid(), signal.SIGKILL)
        if linear_log is not None:
            names = parameters.bind(*arguments, **options).arguments["names"]
            with (Path(linear_log) / str(number)).open("a") as lines:
                lines.writelines(f"{name}\n" for name in names)
        return quantize_linears(*arguments, **options)

    block_loop.quantize_linears = watched


def _fork(
    arguments: list[str], environment: dict[str, str], prepare: Callable[[], None]
) -> tuple[int, tuple[int, int]]:
    """Fork a child that runs the command line; return its process id and the pipes of its stdout and stderr."""
    stdout, stderr = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(stdout[1])
        os.close(stderr[1])
        return child, (stdout[0], stderr[0])
    returncode = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout[1], 1)
        os.dup2(stderr[1], 2)
        os.closerange(3, 256)
        os.environ.update(environment)
        prepare()
        sys.argv = ["llmquant", *arguments]
        cli.main()
        returncode = 0
    except SystemExit as stop:
        returncode = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # the child must never return into the loop of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(returncode)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
