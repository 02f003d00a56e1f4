"""A process that has imported everything, and forks once per command: what starts in milliseconds can be killed often.

    with Warm(model) as warm:
        done = warm.run("quantize", model, out, "--method", "rtn")
        warm.run(…, stop_after=0.3, signal=SIGKILL)     # dies in the middle
        warm.run(…, ranks=2, rank=1, dies_at_stage=5)   # the second rank dies as it begins its fifth stage
        warm.run(…, ranks=2, meeting_seconds=3)         # ranks give up looking for each other after that long
        warm.run(…, file_bytes=20_000)                  # on a disk that takes no larger file
        warm.run(…, notes=folder)                       # a file of each rank: the linears that it solves

The command line runs in the child as it would in a process of its own: its exit code, stdout and stderr come back.
Run as a program, this file is that process.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmquant import cli
from llmquant.checkpoints.manifest import REPORT_FILES

TORCH_WARNING = re.compile(r"^\[W\d{4} .*\n", re.MULTILINE)
"""What torch's C++ says of a machine whose names its sockets cannot look up."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    """Exit code; the negative number of the signal that ended it."""
    out: str
    error: str
    seconds: float
    """From its start to its end."""
    peak_bytes: int
    """Largest resident memory, as the system counted it."""


class Warm:
    """A warm process and the commands that are run in its children."""

    def __init__(self, model: Path, page: bool = True, longest_seconds: float = 300.0) -> None:
        """page: whether runs draw the figures of their report, which takes longer than all else about a tiny model.
        longest_seconds: a command that takes longer is killed."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        }
        self._longest = longest_seconds
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model), "page" if page else "no page"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(self, *arguments: object, ranks: int = 1, **fault: Any) -> list[Done] | Any:
        """Run `llmquant` with these arguments; the `Done` of the one process, or a list of them for several ranks.

        fault: stop_after (seconds), signal and rank say what is sent when to which process, or dies_at_stage (from 1)
        where that rank is killed; meeting_seconds replaces `ranks.MEETING`; file_bytes is the largest file that the
        disk takes. notes: a folder with a file for each rank's number, a line for each linear it solves.
        """
        assert self._process.stdin is not None
        job = {
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "longest_seconds": self._longest,
        } | fault
        print(json.dumps(job), file=self._process.stdin, flush=True)
        done = [Done(**one) for one in self._answer()]
        return done if ranks > 1 else done[0]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warm process has died"
        return json.loads(line)


# --- twenty kills ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but the report: it holds times."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in REPORT_FILES]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def survive_kills(
    warm: Warm,
    arguments: Sequence[object],
    folder: Path,
    kills: int = 20,
    seed: int = 0,
    on_kill: Callable[[int, float, str], None] = lambda number, share, what: None,
) -> int:
    """SIGKILL a run at random moments, each time run the same command again, and count how often OUT has the same bytes
    as that of a run left alone.

    arguments: of `llmquant`; "OUT" stands for the folder that is made. Each kill falls into its own twentieth (of the
    time that the run left alone took), so that all of the run is hit. on_kill: told (number, moment as a share of the
    run, what came of it).
    """
    out = folder / "out"
    command = [out if argument == "OUT" else argument for argument in arguments]
    expected: dict[str, bytes] = {}
    for _ in range(2):  # the second is not slowed down by what is done once
        whole = warm.run(*command)
        assert whole.code == 0, whole.error
        assert expected in ({}, contents(out)), "two runs gave different bytes"
        expected = contents(out)
        shutil.rmtree(out)
    draw = random.Random(seed)
    survived = 0
    for number in range(kills):
        share = (number + draw.random()) / kills
        while True:
            died = warm.run(*command, stop_after=share * whole.seconds, signal=signal.SIGKILL)
            if died.code != 0:
                break
            shutil.rmtree(out)  # it was done sooner than the first time
            share *= 0.9
        what = _continued(warm, command, out, expected)
        survived += what == ""
        on_kill(number, share, what)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
    return survived


def _continued(warm: Warm, command: Sequence[object], out: Path, expected: dict[str, bytes]) -> str:
    """What is wrong after a kill and the same command again; "" for nothing."""
    partial = out.with_name(out.name + ".partial")
    if out.exists() and contents(out) != expected:
        return "the killed run left an OUT that is not complete"
    if out.exists() and not (partial / "journal.json").exists():
        return ""  # it died after all was done, while it tidied up or told
    again = warm.run(*command)
    if again.code != 0:
        return f"exit code {again.code}: {again.error.strip()}"
    return "" if contents(out) == expected and not partial.exists() else "other bytes"


# --- the warm process ------------------------------------------------------------------------------------------------


def _serve(model: str, page: str) -> None:
    import torch

    from llmquant.console.progress import quiet_libraries
    from llmquant.hub import load_tokenizer
    from llmquant.pipeline import quantize as pipeline
    from llmquant.spec import Recipe

    torch.set_num_threads(1)
    if page == "no page":
        pipeline.write_page = lambda report, file: None
    quiet_libraries()
    pipeline.dry_run(model, Path(model) / "never", Recipe(method="rtn"))
    load_tokenizer(Path(model))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


def _run(
    arguments: list[str],
    longest_seconds: float,
    ranks: int = 1,
    stop_after: float | None = None,
    signal: int = signal.SIGKILL,
    rank: int = 0,
    **faults: Any,
) -> list[dict[str, Any]]:
    environment = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    start = time.monotonic()
    children = []
    for number in range(ranks):
        place = environment | {"RANK": str(number), "LOCAL_RANK": str(number)} if ranks > 1 else {}
        children.append(_fork(arguments, place, lambda number=number: _bring_about(number, rank, **faults)))
    kills = [(longest_seconds, process, 9) for process, _ in children]
    if stop_after is not None:
        kills.append((stop_after, children[rank][0], signal))
    texts = _listen([reader for _, readers in children for reader in readers], sorted(kills), start)
    done = []
    for process, (out, error) in children:
        _, status, used = os.wait4(process, 0)
        done.append(
            {
                "code": os.waitstatus_to_exitcode(status),
                "out": texts[out].decode(),
                "error": TORCH_WARNING.sub("", texts[error].decode()),
                "seconds": time.monotonic() - start,
                "peak_bytes": used.ru_maxrss * 1024,
            }
        )
    return done


def _listen(readers: list[int], kills: list[tuple[float, int, int]], start: float) -> dict[int, bytes]:
    """What processes write until they end; on the way they are sent signals.

    kills: (seconds after the start, process, signal), in order. None of the processes has been waited for, so a signal
    to one that has ended goes nowhere.
    """
    texts = dict.fromkeys(readers, b"")
    while readers:
        while kills and time.monotonic() - start >= kills[0][0]:
            os.kill(*kills.pop(0)[1:])
        left = max(kills[0][0] - (time.monotonic() - start), 0) if kills else None
        for reader in select.select(readers, [], [], left)[0]:
            piece = os.read(reader, 65536)
            texts[reader] += piece
            if not piece:  # the end of its output is the end of the process
                readers.remove(reader)
                os.close(reader)
    return texts


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _bring_about(
    number: int,
    rank: int,
    file_bytes: int | None = None,
    notes: str | None = None,
    dies_at_stage: int | None = None,
    meeting_seconds: float | None = None,
) -> None:
    """In the child: what will go wrong there, or be noted. number: of this child; rank: of the one that dies."""
    from llmquant.pipeline import loop
    from llmquant.pipeline import ranks as meeting

    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if meeting_seconds is not None:
        meeting.MEETING = timedelta(seconds=meeting_seconds)
    solve_stage, stages = loop.solve_stage, 0

    def watched(*arguments: Any) -> Any:
        nonlocal stages
        stages += 1
        if number == rank and stages == dies_at_stage:
            os.kill(os.getpid(), signal.SIGKILL)
        if notes is not None:
            with (Path(notes) / str(number)).open("a") as lines:
                lines.writelines(f"{name}\n" for name in arguments[5])
        return solve_stage(*arguments)

    loop.solve_stage = watched


def _fork(
    arguments: list[str], environment: dict[str, str], prepare: Callable[[], None]
) -> tuple[int, tuple[int, int]]:
    """A child that runs the command line: its process id, and where its stdout and stderr can be read."""
    out, error = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        os.close(out[1])
        os.close(error[1])
        return child, (out[0], error[0])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out[1], 1)
        os.dup2(error[1], 2)
        os.closerange(3, 256)
        os.environ.update(environment)
        prepare()
        sys.argv = ["llmquant", *arguments]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # the child must not return into the loop of its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
