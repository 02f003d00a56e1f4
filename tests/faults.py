"""A process that has imported everything, and forks once per command: what starts in milliseconds can be killed often.

    with Warm(model) as warm:
        done = warm.run("quantize", model, out, "--method", "rtn")
        warm.run(…, stop_after=0.3, signal=SIGKILL)   # dies in the middle
        warm.run(…, file_bytes=20_000)                # on a disk that takes no larger file
        warm.run(…, notes=folder)                     # each rank notes in a file of its number which linears it solves

The command line runs in the child as it would in a process of its own: its exit code, stdout and stderr come back.
Run as a program, this file is that process.
"""

from __future__ import annotations

import json
import os
import random
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
from pathlib import Path
from typing import Any

from llmquant import cli
from llmquant.checkpoints.manifest import REPORT_FILES

LONGEST_RUN_SECONDS = 3600.0


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

    def __init__(self, model: Path, page: bool = True) -> None:
        """page: whether runs draw the figures of their report, which takes longer than all else about a tiny model."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        }
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

        fault: stop_after (seconds), signal and rank say what is sent when to which process; file_bytes is the largest
        file that the disk takes. notes: a folder with a file for each rank's number, a line for each linear it solves.
        """
        assert self._process.stdin is not None
        job = {"arguments": [str(argument) for argument in arguments], "ranks": ranks} | fault
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
    ranks: int = 1,
    stop_after: float | None = None,
    signal: int = signal.SIGKILL,
    rank: int = 0,
    file_bytes: int | None = None,
    notes: str | None = None,
) -> list[dict[str, Any]]:
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    start = time.monotonic()
    children = []
    for number in range(ranks):
        place = environment | {"RANK": str(number), "LOCAL_RANK": str(number)} if ranks > 1 else {}
        children.append(_fork(arguments, place, file_bytes, None if notes is None else Path(notes) / str(number)))
    deadline = start + (LONGEST_RUN_SECONDS if stop_after is None else stop_after)
    reader, child = children[rank][1][0], children[rank][0]
    # The end of its output is the end of the process.
    texts: dict[int, bytes] = {reader: b""}
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            piece = os.read(reader, 65536)
            if not piece:
                break
            texts[reader] += piece
    else:
        os.kill(child, signal if stop_after is not None else 9)
    done = []
    for process, (out, error) in children:
        text, words = texts.get(out, b"") + _read_all(out), _read_all(error)
        _, status, used = os.wait4(process, 0)
        done.append(
            {
                "code": os.waitstatus_to_exitcode(status),
                "out": text.decode(),
                "error": words.decode(),
                "seconds": time.monotonic() - start,
                "peak_bytes": used.ru_maxrss * 1024,
            }
        )
    return done


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _read_all(reader: int) -> bytes:
    with os.fdopen(reader, "rb") as file:
        return file.read()


def _note_solved(file: Path) -> None:
    from llmquant.pipeline import loop

    solve_stage = loop.solve_stage

    def noting(*arguments: Any) -> Any:
        with file.open("a") as lines:
            lines.writelines(f"{name}\n" for name in arguments[-1])
        return solve_stage(*arguments)

    loop.solve_stage = noting


def _fork(
    arguments: list[str], environment: dict[str, str], file_bytes: int | None, notes: Path | None
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
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if notes is not None:
            _note_solved(notes)
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
