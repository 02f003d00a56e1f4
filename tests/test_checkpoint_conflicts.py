"""An existing OUT, the folder of another run and foreign files are never overwritten or removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_parts import EXTRA, MANIFEST, PARTS, REQUEST, contents, write_checkpoint

from llmquant.checkpoints import manifest
from llmquant.checkpoints.journal import LAYOUT, REPLACED
from llmquant.checkpoints.manifest import MANIFEST_FILE
from llmquant.checkpoints.reader import file_sha256
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a checkpoint that was written without interruption."""
    out = tmp_path_factory.mktemp("expected") / "out"
    write_checkpoint(out)
    return contents(out)


# --- an existing OUT -------------------------------------------------------------------------------------------------


def test_an_existing_out_is_refused_and_unchanged(tmp_path):
    write_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match=r"exists; .* --overwrite"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match=r"exists; choose another OUT \(it holds config.json, model-00001"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_becomes_out(tmp_path, expected):
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_checkpoint_only_at_the_end(tmp_path, expected):
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
def test_overwrite_keeps_anything_but_a_finished_checkpoint(tmp_path, name):
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


USER_CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
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
"""Case -> (what a user did to a finished checkpoint, the name of the file that would be lost)."""


@pytest.mark.parametrize("case", USER_CHANGES)
def test_overwrite_names_files_that_would_be_lost_and_keeps_them(tmp_path, case):
    change, lost = USER_CHANGES[case]
    out = tmp_path / "out"
    write_checkpoint(out)
    change(out)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        PartialCheckpoint.open(out, REQUEST, overwrite=True)
    assert str(error.value).endswith(f"choose another OUT, or move away {lost}")
    assert contents(tmp_path) == before


def test_overwrite_hashes_a_large_file_only_if_it_is_newer_than_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SMALL_FILE_BYTES", 0)
    out = tmp_path / "out"
    write_checkpoint(out, max_shard_bytes=10**9)
    hashed = []
    monkeypatch.setattr(manifest, "file_sha256", lambda file: (hashed.append(file.name), file_sha256(file))[1])
    assert manifest.unlisted_or_changed(out) == [] and hashed == []
    shard = out / "model.safetensors"
    content = shard.read_bytes()
    later = (out / MANIFEST_FILE).stat().st_mtime_ns + 1
    os.utime(shard, ns=(later, later))
    assert manifest.unlisted_or_changed(out) == [] and hashed == [shard.name]
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(shard, ns=(later, later))
    assert manifest.unlisted_or_changed(out) == ["model.safetensors (changed)"]


def test_a_file_that_is_added_to_out_during_the_run_is_kept(tmp_path, expected):
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


# --- an unfinished run -----------------------------------------------------------------------------------------------
def test_the_target_of_a_link_in_the_partial_folder_is_never_removed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    partial = PartialCheckpoint.open(tmp_path / "out", REQUEST)
    partial.close()
    (partial.folder / "parts").symlink_to(tmp_path / "data")
    for options in ({}, {"restart": True}):
        with pytest.raises(UserError, match=r"not left by llmquant \(it holds parts\)"):
            PartialCheckpoint.open(tmp_path / "out", REQUEST, **options)
    assert (tmp_path / "data" / "mine").exists()


def test_other_options_are_named_and_restart_starts_over(tmp_path, expected):
    out = tmp_path / "out"
    with PartialCheckpoint.open(out, {"options": {"bits": 8, "method": "gptq"}, "version": "1"}) as partial:
        partial.add_part("block-0", {"wrong": torch.ones(2)})
    with pytest.raises(UserError, match=r"options.bits was 8, is 4\); .*--restart"):
        PartialCheckpoint.open(out, REQUEST)
    write_checkpoint(out, restart=True)
    assert contents(out) == expected


def test_restart_after_a_crash_between_the_last_renames_restores_the_old_checkpoint(tmp_path):
    out = tmp_path / "out"
    write_checkpoint(out)
    old = contents(out)
    with PartialCheckpoint.open(out, REQUEST, overwrite=True) as partial:
        partial.add_part("block-0", PARTS["block-0"])
    out.rename(partial.folder / REPLACED)
    with pytest.raises(UserError, match="exists"):
        PartialCheckpoint.open(out, REQUEST, restart=True)
    assert contents(out) == old


def test_a_second_run_for_the_same_out_is_refused(tmp_path):
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        with pytest.raises(UserError, match=f"process {os.getpid()} is writing it"):
            PartialCheckpoint.open(tmp_path / "out", REQUEST)
        partial.add_part("block-0", PARTS["block-0"])
    PartialCheckpoint.open(tmp_path / "out", REQUEST).close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"layout": %d}' % LAYOUT, b"[]", b'{"layout": %d, "request": {}, "parts": {"a": 3}}' % LAYOUT],
)
def test_a_damaged_journal_is_refused_and_restart_starts_over(tmp_path, expected, content):
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        partial.add_part("block-0", PARTS["block-0"])
    (partial.folder / "journal.json").write_bytes(content)
    with pytest.raises(UserError, match=r"journal.json: damaged; add --restart"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    write_checkpoint(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == expected


def test_the_journal_of_another_version_is_refused_and_restart_starts_over(tmp_path, expected):
    with PartialCheckpoint.open(tmp_path / "out", REQUEST) as partial:
        partial.add_part("block-0", PARTS["block-0"])
    journal = partial.folder / "journal.json"
    journal.write_text(journal.read_text().replace(f'"layout": {LAYOUT}', f'"layout": {LAYOUT - 1}'))
    with pytest.raises(UserError) as error:
        PartialCheckpoint.open(tmp_path / "out", REQUEST)
    assert str(error.value) == (
        f"{journal}: an unfinished run of another version of llmquant (layout {LAYOUT - 1}, not {LAYOUT}), which this "
        "version cannot continue; add --restart to begin anew, or choose another OUT"
    )
    write_checkpoint(tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_part_counts_as_missing(tmp_path, expected, damage):
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
        assert partial.damaged_parts == ["block-1"]
        assert [partial.has_part(name) for name in PARTS] == [True, False, True]
        assert not (partial.folder / "parts" / "foreign.safetensors").exists()
    write_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("options", [{}, {"restart": True}])
def test_a_foreign_partial_folder_is_unchanged(tmp_path, options):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "download.part").write_text("")
    with pytest.raises(UserError, match="not left by llmquant"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, **options)
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["download.part"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_partial_path_that_is_not_a_folder_is_unchanged(tmp_path, kind):
    (tmp_path / "data").mkdir()
    partial = tmp_path / "out.partial"
    partial.write_text("mine") if kind == "file" else partial.symlink_to("data")
    with pytest.raises(UserError, match="not a folder that llmquant made"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, restart=True)
    assert partial.is_symlink() if kind == "link" else partial.read_text() == "mine"
    assert list((tmp_path / "data").iterdir()) == []


def test_foreign_files_beside_a_damaged_journal_are_unchanged(tmp_path):
    partial = PartialCheckpoint.open(tmp_path / "out", REQUEST)
    partial.close()
    (partial.folder / "journal.json").write_text("{}")
    (partial.folder / "diary").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"not left by llmquant \(it holds diary\)"):
        PartialCheckpoint.open(tmp_path / "out", REQUEST, restart=True)
    assert contents(tmp_path) == before


def test_an_out_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder; choose another OUT"):
        PartialCheckpoint.open(tmp_path / "file" / "out", REQUEST)
