"""A checkpoint is complete or does not exist, and a killed run is continued to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from checkpoint_parts import ALL_TENSORS, EXTRA, MANIFEST, PARTS, REQUEST, contents, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmquant.checkpoints.journal import FileRecord
from llmquant.checkpoints.manifest import MANIFEST_FILE, build_manifest, verify_files
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.checkpoints.shards import plan_shards
from llmquant.checkpoints.writer import PartialCheckpoint, StreamedTensor
from llmquant.errors import UserError


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a checkpoint that was written without interruption."""
    out = tmp_path_factory.mktemp("expected") / "out"
    write_checkpoint(out)
    return contents(out)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_a_written_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "out", max_shard_bytes=10**9)
    file = tmp_path / "out" / "model.safetensors"
    loaded = load_file(file)
    assert loaded.keys() == ALL_TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in ALL_TENSORS.items()
    )
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    assert contents(tmp_path / "out").keys() == {"model.safetensors", MANIFEST_FILE, *EXTRA}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("max_shard_bytes", [100, 10**9])
def test_every_tensor_is_aligned_to_its_dtype(tmp_path, max_shard_bytes):
    """Loaders that map files in place need the alignment, and the format has no padding."""
    write_checkpoint(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    for info in CheckpointReader(tmp_path / "out").tensors.values():
        assert info.start % info.dtype.itemsize == 0, info


def test_shards_and_index_agree(tmp_path, expected):
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    write_checkpoint(tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in ALL_TENSORS.items())
    index = json.loads(expected["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == reader.total_bytes
    assert index["weight_map"]["layers.1.half"] == "model-00002-of-00003.safetensors"


def test_bytes_depend_only_on_the_parts(tmp_path, expected):
    with PartialCheckpoint.open(tmp_path / "out", REQUEST | {"seed": 5}) as partial:
        for name in reversed(PARTS):
            partial.add_part(name, PARTS[name])
        partial.finish(list(PARTS), EXTRA, manifest=MANIFEST, max_shard_bytes=100)
    assert contents(tmp_path / "out") == expected


def test_a_part_is_split_only_if_it_is_larger_than_a_shard():
    parts = {"a": {"a1": 40, "a2": 30}, "b": {"b1": 40}, "c": {"c1": 90, "c2": 60, "c3": 40, "c4": 10}, "d": {"d1": 5}}
    shards = plan_shards(parts, 100)
    assert [list(shard) for shard in shards] == [["a1", "a2"], ["b1"], ["c1"], ["c2", "c3"], ["c4", "d1"]]
    assert shards[4] == {"c4": "c", "d1": "d"}


def test_streamed_tensors_are_the_same_bytes(tmp_path):
    save_file(ALL_TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)

    def stream(name: str) -> StreamedTensor:
        info = reader.info(name)
        return StreamedTensor(dtype=info.dtype, shape=info.shape, chunks=lambda: reader.chunks(name))

    outs = [tmp_path / "streamed", tmp_path / "held"]
    for out, values in zip(outs, ({name: stream(name) for name in ALL_TENSORS}, ALL_TENSORS), strict=True):
        with PartialCheckpoint.open(out, REQUEST) as partial:
            partial.add_part("all", values)
            partial.finish(["all"], EXTRA)
    assert contents(outs[0]) == contents(outs[1])


def test_parts_are_read_back_before_and_after_they_became_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(PartialCheckpoint, "_publish", lambda self: exec("raise KeyboardInterrupt"))
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        for name, tensors in PARTS.items():
            partial.add_part(name, tensors)
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in partial.read_part(name).items())
        with pytest.raises(KeyboardInterrupt):
            partial.finish(list(PARTS), EXTRA, max_shard_bytes=100)
    assert list((partial.folder / "parts").iterdir()) == []
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        assert partial.is_finishing and not partial.is_finished
        for name, tensors in PARTS.items():
            assert partial.has_part(name)
            read = partial.read_part(name)
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_verify_finds_every_change(tmp_path):
    out = tmp_path / "out"
    write_checkpoint(out)
    assert verify_files(out) == []
    shard = out / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    (out / "config.json").write_bytes(b"{}")
    (out / "templates" / "chat.jinja").unlink()
    (out / "more.safetensors").write_bytes(b"")
    assert sorted(problem.split(":")[0] for problem in verify_files(out)) == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "more.safetensors",
        "templates/chat.jinja",
    ]


# --- crashes ---------------------------------------------------------------------------------------------------------

DISK_CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir", "rename", "write")


def die_at(call: int) -> None:
    """Make the process exit without cleanup at the call-th operation that changes the disk."""
    count = 0

    def wrap(function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == call:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapped

    for name in DISK_CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process and return its exit status: 0 for success, 9 for `die_at`, 1 for an exception."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # the child must not return into pytest
            sys.__stderr__.write(f"{error!r}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a finished checkpoint: these files, and a manifest that lists them."""
    records = {
        name: FileRecord(bytes=len(content), sha256=sha256(content).hexdigest()) for name, content in files.items()
    }
    return files | {MANIFEST_FILE: build_manifest({}, records)}


def die_while_writing(out: Path, call: int, overwrite: bool) -> int:
    """Write a checkpoint in a process that exits at this call; return its exit status."""

    def run() -> None:
        die_at(call)
        write_checkpoint(out, overwrite=overwrite)

    return in_child(run)


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
def test_a_run_that_is_killed_at_any_disk_operation_is_continued_to_the_same_bytes(tmp_path, expected, replaces):
    old = finished({"config.json": b"{}", "model.safetensors": b"old"})
    kills = 0
    while True:
        out = tmp_path / f"out-{kills}"
        if replaces:
            out.mkdir()
            for name, content in old.items():
                (out / name).write_bytes(content)
        status = die_while_writing(out, kills + 1, replaces)
        assert status in (0, 9)
        if out.exists():
            assert contents(out) in ([expected, old] if replaces else [expected])
        if status == 0:
            break
        if kills % 3 == 0:
            # The continued run is killed too, at another operation.
            die_while_writing(out, kills // 2 + 2, replaces)
        journal = out.with_name(out.name + ".partial") / "journal.json"
        if journal.exists() or not out.exists() or contents(out) != expected:
            write_checkpoint(out, overwrite=replaces)
        else:
            # The run had already removed its last file, so OUT is a finished checkpoint.
            with pytest.raises(UserError, match="exists"):
                PartialCheckpoint.open(out, REQUEST)
        assert contents(out) == expected
        assert not out.with_name(out.name + ".partial").exists()
        kills += 1
    # The library of Python 3.10 makes fewer operations: 43.
    assert kills > (60 if sys.version_info >= (3, 11) else 40)


def test_a_run_that_gets_sigkill_is_continued(tmp_path, expected):
    """After SIGKILL between two parts, the lock is free again and the first part is used."""

    def run() -> None:
        with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
            partial.add_part("block-0", PARTS["block-0"])
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(run) == -signal.SIGKILL
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        assert partial.has_part("block-0") and not partial.has_part("block-1")
    write_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("limit_bytes", [0, 10, 150, 250, 400, 700])
def test_a_full_disk_is_a_one_line_error_and_the_same_command_continues(tmp_path, expected, limit_bytes):
    out = tmp_path / "out"

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            write_checkpoint(out)
        except UserError as error:
            message = str(error)
            is_clear = "no space left" in message and "same command" in message and "\n" not in message
            os._exit(77 if is_clear else 1)

    assert in_child(run) == 77
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    write_checkpoint(out)
    assert contents(out) == expected


def test_the_error_of_a_full_disk_states_the_needed_bytes(tmp_path, monkeypatch):
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        partial.add_part("block-1", PARTS["block-1"])

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"block-0.safetensors: no space left: it takes \d+ bytes, \d+ are free"):
            partial.add_part("block-0", PARTS["block-0"])
        monkeypatch.undo()
        assert not partial.has_part("block-0")
        partial.add_part("block-0", PARTS["block-0"])
