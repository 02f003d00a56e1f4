"""What is written is complete or absent, whenever a run dies, and nothing that is dear to someone is written over."""

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

from llmquant.checkpoints import manifest, writer
from llmquant.checkpoints.journal import FileRecord
from llmquant.checkpoints.manifest import MANIFEST_FILE, build_manifest, verify_files
from llmquant.checkpoints.reader import CheckpointReader, file_sha256
from llmquant.checkpoints.writer import PartialCheckpoint, TensorStream, plan_shards
from llmquant.errors import UserError


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    write_checkpoint(out)
    return contents(out)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
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
def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path, max_shard_bytes: int) -> None:
    """Readers that map files in place need it, and the format has no padding to give it otherwise."""
    write_checkpoint(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    for info in CheckpointReader(tmp_path / "out").tensors.values():
        assert info.start % info.dtype.itemsize == 0, info


def test_shards_and_index_agree(tmp_path: Path, expected: dict[str, bytes]) -> None:
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    write_checkpoint(tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in ALL_TENSORS.items())
    index = json.loads(expected["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == reader.total_bytes
    assert index["weight_map"]["layers.1.half"] == "model-00002-of-00003.safetensors"


def test_bytes_depend_on_the_parts_alone(tmp_path: Path, expected: dict[str, bytes]) -> None:
    with PartialCheckpoint.open(tmp_path / "out", REQUEST | {"seed": 5}) as partial:
        for name in reversed(PARTS):
            partial.add_part(name, PARTS[name])
        partial.finish(list(PARTS), EXTRA, manifest=MANIFEST, max_shard_bytes=100)
    assert contents(tmp_path / "out") == expected


def test_a_part_is_split_only_if_it_is_larger_than_a_shard() -> None:
    parts = {"a": {"a1": 40, "a2": 30}, "b": {"b1": 40}, "c": {"c1": 90, "c2": 60, "c3": 40, "c4": 10}, "d": {"d1": 5}}
    shards = plan_shards(parts, 100)
    assert [list(shard) for shard in shards] == [["a1", "a2"], ["b1"], ["c1"], ["c2", "c3"], ["c4", "d1"]]
    assert shards[4] == {"c4": "c", "d1": "d"}


def test_streamed_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    save_file(ALL_TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)

    def stream(name: str) -> TensorStream:
        info = reader.info(name)
        return TensorStream(dtype=info.dtype, shape=info.shape, chunks=lambda: reader.chunks(name))

    outs = [tmp_path / "streamed", tmp_path / "held"]
    for out, values in zip(outs, ({name: stream(name) for name in ALL_TENSORS}, ALL_TENSORS), strict=True):
        with PartialCheckpoint.open(out, REQUEST) as partial:
            partial.add_part("all", values)
            partial.finish(["all"], EXTRA)
    assert contents(outs[0]) == contents(outs[1])


def test_parts_are_read_back_before_and_after_they_became_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# --- dying -----------------------------------------------------------------------------------------------------------

DISK_CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir", "rename", "write")


def die_at(call: int) -> None:
    """Lets the process vanish, without cleaning up, at the call-th operation that changes a disk."""
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
    """Runs work in a forked process; its exit status (0 for a clean end, 9 for a death, 1 for an exception)."""
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
    """The files of a checkpoint, with the manifest that lists them."""
    records = {
        name: FileRecord(bytes=len(content), sha256=sha256(content).hexdigest()) for name, content in files.items()
    }
    return files | {MANIFEST_FILE: build_manifest({}, records)}


def die_while_writing(out: Path, call: int, overwrite: bool) -> int:
    """The exit status of a run that dies at that call, if it gets there."""

    def run() -> None:
        die_at(call)
        write_checkpoint(out, overwrite=overwrite)

    return in_child(run)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "overwrite"])
def test_a_run_that_dies_at_any_step_is_continued_to_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], replaces: bool
) -> None:
    old = finished({"config.json": b"{}", "model.safetensors": b"old"})
    deaths = 0
    while True:
        out = tmp_path / f"out-{deaths}"
        if replaces:
            out.mkdir()
            for name, content in old.items():
                (out / name).write_bytes(content)
        status = die_while_writing(out, deaths + 1, replaces)
        assert status in (0, 9)
        if out.exists():
            assert contents(out) in ([expected, old] if replaces else [expected])
        if status == 0:
            break
        if deaths % 3 == 0:
            # A second death on the way back, at a step of its own.
            die_while_writing(out, deaths // 2 + 2, replaces)
        journal = out.with_name(out.name + ".partial") / "journal.json"
        if journal.exists() or not out.exists() or contents(out) != expected:
            write_checkpoint(out, overwrite=replaces)
        else:
            # It died after its very last file was gone: the checkpoint is there, and is treated as any other.
            with pytest.raises(UserError, match="exists"):
                PartialCheckpoint.open(out, REQUEST)
        assert contents(out) == expected
        assert not out.with_name(out.name + ".partial").exists()
        deaths += 1
    assert deaths > 60


def test_a_run_that_is_killed_by_the_system_is_continued(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """SIGKILL between two parts, in a process of its own: its lock is free again, and its part counts."""

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
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    tmp_path: Path, expected: dict[str, bytes], limit_bytes: int
) -> None:
    out = tmp_path / "out"

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        try:
            write_checkpoint(out)
        except UserError as error:
            message = str(error)
            fine = "no space left" in message and "same command" in message and "\n" not in message
            os._exit(77 if fine else 1)

    assert in_child(run) == 77
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    write_checkpoint(out)
    assert contents(out) == expected


def test_a_full_disk_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- refusing --------------------------------------------------------------------------------------------------------


def test_existing_out_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists; .* --overwrite"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match=r"exists; choose another OUT \(it holds config.json, model-00001"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_becomes_out(tmp_path: Path, expected: dict[str, bytes]) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_checkpoint_at_the_end_only(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    write_checkpoint(out, max_shard_bytes=10**9)
    old = contents(out)
    with PartialCheckpoint.open(out, REQUEST, overwrite=True) as partial:
        partial.add_part("block-0", PARTS["block-0"])
        assert contents(out) == old
    with pytest.raises(UserError, match="exists"):
        PartialCheckpoint.open(out, REQUEST)
    write_checkpoint(out, overwrite=True)
    assert contents(out) == expected


@pytest.mark.parametrize("name", ["thesis", "other tool", "damaged", "file", "link", "dead link"])
def test_overwrite_spares_what_is_not_a_finished_checkpoint(tmp_path: Path, name: str) -> None:
    held = {"thesis": {"thesis.tex": b"dear"}, "other tool": {"config.json": b"{}"}, "damaged": {MANIFEST_FILE: b"{"}}
    out = tmp_path / name
    if name in held:
        out.mkdir()
        for file, content in held[name].items():
            (out / file).write_bytes(content)
    elif name == "file":
        out.write_text("dear")
    else:
        write_checkpoint(tmp_path / "target")
        out.symlink_to("target" if name == "link" else "nowhere")
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        PartialCheckpoint.open(out, REQUEST, overwrite=True)
    assert "choose another OUT" in str(error.value)
    assert all(file in str(error.value) for file in held.get(name, {}))
    assert contents(tmp_path) == before and not (tmp_path / f"{name}.partial").exists()


# What a user did to a finished checkpoint -> the name of what would be lost.
WORK: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda out: (out / "notes.md").write_text("mine"), "notes.md"),
    "a hidden file": (lambda out: (out / ".notes").write_text("mine"), ".notes"),
    "a folder": (lambda out: (out / "checkpoint-500").mkdir(), "checkpoint-500/"),
    "a file in a listed folder": (
        lambda out: (out / "templates" / "own.jinja").write_text("mine"),
        "templates/own.jinja",
    ),
    "a link": (lambda out: (out / "base").symlink_to("/"), "base/"),
    "a listed file that is a link": (
        lambda out: (out / "config.json").rename(out.parent / "saved") and (out / "config.json").symlink_to("../saved"),
        "config.json",
    ),
    "a longer file": (lambda out: (out / "config.json").write_text(" " * 99), "config.json (changed)"),
    "other bytes": (
        lambda out: (out / "config.json").write_bytes(EXTRA["config.json"].replace(b"tiny", b"TINY")),
        "config.json (changed)",
    ),
    "a folder that is called like the page": (lambda out: (out / "report.html").mkdir(), "report.html/"),
    "a name that is not UTF-8": (lambda out: (out / os.fsdecode(b"\xff")).write_text(""), "\\udcff"),
}


@pytest.mark.parametrize("case", WORK)
def test_overwrite_names_what_would_be_lost_and_spares_it(tmp_path: Path, case: str) -> None:
    do, lost = WORK[case]
    out = tmp_path / "out"
    write_checkpoint(out)
    do(out)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        PartialCheckpoint.open(out, REQUEST, overwrite=True)
    assert str(error.value).endswith(f"choose another OUT, or move away {lost}")
    assert contents(tmp_path) == before


def test_overwrite_reads_a_large_file_again_only_if_it_is_younger_than_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SMALL_FILE_BYTES", 0)
    out = tmp_path / "out"
    write_checkpoint(out, max_shard_bytes=10**9)
    hashed = []
    monkeypatch.setattr(manifest, "file_sha256", lambda file: (hashed.append(file.name), file_sha256(file))[1])
    assert manifest.unreplaceable(out) == [] and hashed == []
    shard = out / "model.safetensors"
    content = shard.read_bytes()
    later = (out / MANIFEST_FILE).stat().st_mtime_ns + 1
    os.utime(shard, ns=(later, later))
    assert manifest.unreplaceable(out) == [] and hashed == [shard.name]
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(shard, ns=(later, later))
    assert manifest.unreplaceable(out) == ["model.safetensors (changed)"]


def test_work_that_comes_into_out_while_it_is_replaced_is_spared(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    write_checkpoint(out)
    partial = PartialCheckpoint.open(out, REQUEST, overwrite=True)
    for name, tensors in PARTS.items():
        partial.add_part(name, tensors)
    (out / "notes.md").write_text("mine")
    with partial, pytest.raises(UserError, match=r"move away notes\.md"):
        partial.finish(list(PARTS), EXTRA, manifest=MANIFEST, max_shard_bytes=100)
    (out / "notes.md").rename(tmp_path / "notes.md")
    write_checkpoint(out, overwrite=True)
    assert contents(out) == expected
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_what_a_link_in_out_leads_to_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    partial = PartialCheckpoint.open(tmp_path / "out", REQUEST)
    partial.close()
    (partial.folder / "parts").symlink_to(tmp_path / "data")
    for options in ({}, {"restart": True}):
        with pytest.raises(UserError, match=r"not left by llmquant \(it holds parts\)"):
            PartialCheckpoint.open(tmp_path / "out", REQUEST, **options)
    assert (tmp_path / "data" / "mine").exists()


def test_other_options_are_named_and_restart_begins_anew(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with PartialCheckpoint.open(out, {"options": {"bits": 8, "method": "gptq"}, "version": "1"}) as partial:
        partial.add_part("block-0", {"wrong": torch.ones(2)})
    with pytest.raises(UserError, match=r"options.bits was 8, is 4\); .*--restart"):
        PartialCheckpoint.open(out, REQUEST)
    write_checkpoint(out, restart=True)
    assert contents(out) == expected


def test_restart_after_a_death_between_the_last_renames_gives_the_old_checkpoint_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(out)
    old = contents(out)
    with PartialCheckpoint.open(out, REQUEST, overwrite=True) as partial:
        partial.add_part("block-0", PARTS["block-0"])
    out.rename(partial.folder / writer.REPLACED)
    with pytest.raises(UserError, match="exists"):
        PartialCheckpoint.open(out, REQUEST, restart=True)
    assert contents(out) == old


def test_two_runs_on_one_out_are_told_apart(tmp_path: Path) -> None:
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        with pytest.raises(UserError, match=f"process {os.getpid()} is writing it"):
            PartialCheckpoint.open(tmp_path / "out", REQUEST)
        partial.add_part("block-0", PARTS["block-0"])
    PartialCheckpoint.open(tmp_path / "out", REQUEST).close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"layout": 1}', b"[]", b'{"layout": 1, "request": {}, "parts": {"a": 3}}']
)
def test_a_torn_journal_is_refused_and_restart_begins_anew(
    tmp_path: Path, expected: dict[str, bytes], content: bytes
) -> None:
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        partial.add_part("block-0", PARTS["block-0"])
    (partial.folder / "journal.json").write_bytes(content)
    with pytest.raises(UserError, match=r"journal.json: damaged; add --restart"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    write_checkpoint(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == expected


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    partial = PartialCheckpoint.open(tmp_path / "out", REQUEST)
    partial.close()
    (partial.folder / "journal.json").write_text('{"layout": 99}')
    with pytest.raises(UserError, match=r"another version .*layout 99"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_part_counts_as_absent(tmp_path: Path, expected: dict[str, bytes], damage: str) -> None:
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        for name, tensors in PARTS.items():
            partial.add_part(name, tensors)
    file = partial.folder / "parts" / "block-1.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-1] if damage == "torn" else content[:-1] + bytes([content[-1] ^ 1]))
    (partial.folder / "parts" / "foreign.safetensors").write_bytes(b"")
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        assert partial.discarded == ["block-1"]
        assert [partial.has_part(name) for name in PARTS] == [True, False, True]
        assert not (partial.folder / "parts" / "foreign.safetensors").exists()
    write_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("options", [{}, {"restart": True}])
def test_a_partial_folder_of_somebody_else_is_left_alone(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "download.part").write_text("")
    with pytest.raises(UserError, match="not left by llmquant"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, **options)
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["download.part"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_partial_that_is_no_folder_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    partial = tmp_path / "out.partial"
    partial.write_text("mine") if kind == "file" else partial.symlink_to("data")
    with pytest.raises(UserError, match="not a folder that llmquant made"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, restart=True)
    assert partial.is_symlink() if kind == "link" else partial.read_text() == "mine"
    assert list((tmp_path / "data").iterdir()) == []


def test_foreign_files_beside_a_damaged_journal_are_left_alone(tmp_path: Path) -> None:
    partial = PartialCheckpoint.open(tmp_path / "out", REQUEST)
    partial.close()
    (partial.folder / "journal.json").write_text("{}")
    (partial.folder / "diary").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"not left by llmquant \(it holds diary\)"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, restart=True)
    assert contents(tmp_path) == before


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder; choose another OUT"):
        PartialCheckpoint.open(tmp_path / "file" / "out", REQUEST)


def test_verify_finds_every_change(tmp_path: Path) -> None:
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
