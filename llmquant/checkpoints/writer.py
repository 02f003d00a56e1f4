"""A checkpoint that is written part by part and survives a crash at any point.

The run writes into a folder `<out>.partial` beside OUT (its layout is in `unfinished.py`). Every step leaves only
complete files, so a run may be killed at any point, and the next run continues it. A part is complete or does not
exist. Shards are copied from the files of the parts. A part is removed when the shards that hold it are on the disk.
OUT appears by one rename. The bytes of OUT depend only on the parts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoints.atomic import TEMPORARY_SUFFIX, disk_errors, make_folder, sync_folder, write_atomically
from llmquant.checkpoints.files import INDEX_FILE, SINGLE_FILE
from llmquant.checkpoints.header import TensorInfo, build_header, layout_order, read_header
from llmquant.checkpoints.journal import CHECKPOINT, PARTS, REPLACED, SCRATCH, FileRecord, Journal, ShardPlan, as_json
from llmquant.checkpoints.lock import acquire_lock
from llmquant.checkpoints.manifest import MANIFEST_FILE, REPORT_FILES, build_manifest
from llmquant.checkpoints.out_folder import check_location, check_replaceable
from llmquant.checkpoints.reader import file_sha256, read_tensor, tensor_chunks
from llmquant.checkpoints.shards import plan_shards, shard_name
from llmquant.checkpoints.unfinished import (
    check_needed_files,
    check_same_request,
    find_journal,
    is_intact,
    is_published,
    needed_parts,
    part_file,
    remove_contents,
    remove_if_empty,
    restore_replaced,
)
from llmquant.errors import UserError
from llmquant.paths import partial_folder, real_path
from llmquant.spec import Options

MAX_SHARD_BYTES = Options().max_shard_bytes


@dataclass(frozen=True, kw_only=True)
class StreamedTensor:
    """A tensor that is copied in chunks, without holding it in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]
    """Function that returns the bytes of the tensor in order, for example from `CheckpointReader.chunks`."""


class PartialCheckpoint:
    """An unfinished checkpoint. Use `open` to create or continue it. It holds a lock until `finish`, `close` or the end
    of a `with` block."""

    def __init__(self, out: Path, journal: Journal, lock: int, overwrite: bool) -> None:
        self.out = out
        self.folder = journal.folder
        self.damaged_parts: list[str] = []
        """Names of parts whose files were missing or changed when this run began. They count as missing."""
        self._journal = journal
        self._lock: int | None = lock
        self._overwrite = overwrite

    @classmethod
    def open(
        cls, out: str | os.PathLike[str], request: Mapping[str, Any], *, restart: bool = False, overwrite: bool = False
    ) -> PartialCheckpoint:
        """Create `<out>.partial`, or continue the unfinished run in it.

        request: everything that the result depends on. Raises UserError if OUT exists and is not empty (overwrite
        replaces a finished checkpoint, at the very end), if another run is writing it, or if the unfinished run has
        another request (restart discards that run).
        """
        out, folder = real_path(Path(out)), partial_folder(Path(out))
        check_location(out)
        find_journal(folder, restart)
        if not folder.exists():
            check_replaceable(out, out, overwrite)
        requested = as_json(dict(request))
        lock = acquire_lock(folder)
        try:
            journal = find_journal(folder, restart)
            if journal is None or (journal.request != requested and is_published(journal, out)):
                # There is no unfinished run, or only the cleanup of a run with another request is left.
                if journal is not None:
                    remove_contents(folder)
                try:
                    restore_replaced(out, folder)
                    check_replaceable(out, out, overwrite)
                except UserError:
                    remove_if_empty(folder)
                    raise
                journal = Journal(folder=folder, request=requested)
                journal.save()
            check_same_request(folder, journal.request, requested)
            partial = cls(out, journal, lock, overwrite)
            if not partial.is_finished:
                check_replaceable(out, out, overwrite)
                partial._check_files()
            return partial
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> PartialCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Complete files stay for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove all files of this run and release the lock."""
        remove_contents(self.folder)
        remove_if_empty(self.folder)
        self.close()

    @property
    def scratch(self) -> Path:
        """Path of a folder for temporary files. The caller creates the folder; it is removed when the run finishes, or
        when the next run begins."""
        return self.folder / SCRATCH

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def is_finishing(self) -> bool:
        """Whether all parts are complete and the shards are planned, so that `complete` can do the rest."""
        return self._journal.plan is not None

    @property
    def is_finished(self) -> bool:
        """Whether OUT exists and `complete` has only temporary files to remove."""
        return is_published(self._journal, self.out)

    def has_part(self, name: str) -> bool:
        """Whether a part is complete."""
        return name in self._journal.parts

    def add_part(
        self, name: str, tensors: Mapping[str, Tensor | StreamedTensor], note: dict[str, Any] | None = None
    ) -> None:
        """Write the tensors of one part. When the method returns, the part is complete and survives a power failure.

        note: JSON values that `part_note` returns. Raises UserError if the disk is full.
        """
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) and not self.is_finishing, name
        order = layout_order((key, tensor.dtype) for key, tensor in tensors.items())
        header = build_header({key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in order}, {})

        def pieces() -> Iterator[bytes | memoryview]:
            yield header
            for key in order:
                tensor = tensors[key]
                if isinstance(tensor, StreamedTensor):
                    yield from tensor.chunks()
                else:
                    yield _tensor_bytes(tensor)

        make_folder(self.folder / PARTS)
        sizes = [torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors.values()]
        num_bytes = len(header) + sum(sizes)
        digest = write_atomically(self._part_file(name), pieces(), num_bytes)
        self._journal.parts[name] = FileRecord(bytes=num_bytes, sha256=digest, note=note)
        self._journal.save()

    def drop_part(self, name: str) -> None:
        """Remove a part that is no longer needed, if it exists."""
        if self._journal.parts.pop(name, None) is not None:
            self._journal.save()
            self._part_file(name).unlink(missing_ok=True)

    def part_note(self, name: str) -> dict[str, Any]:
        """Return the note of a complete part, or an empty dict."""
        return self._journal.parts[name].note or {}

    def read_part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a complete part, even if they have already been moved into shards."""
        assert self.has_part(name), name
        infos = self._part_infos(name)
        return {key: read_tensor(info) for key, info in infos.items()}

    # --- finishing ---------------------------------------------------------------------------------------------------

    def finish(self, part_order: Sequence[str], extra_files: Mapping[str, bytes], **options: Any) -> None:
        """Call `assemble`, then `publish`."""
        self.assemble(part_order, extra_files, **options)
        self.publish()

    def complete(self) -> None:
        """Do the remaining steps of `finish`, from the journal alone."""
        self._assemble()
        self.publish()

    def assemble(
        self,
        part_order: Sequence[str],
        extra_files: Mapping[str, bytes],
        *,
        manifest: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> Path:
        """Write shards, index and manifest from the parts, in this order, and return the folder that becomes OUT.

        extra_files: contents of config.json, the tokenizer and so on, by file name. A part is split only if it is
        larger than max_shard_bytes. After a crash, the call may be repeated. The caller may add only `REPORT_FILES` to
        the folder before `publish`.
        """
        if not self.is_finishing:
            self._begin_finishing(
                part_order, extra_files, manifest or {}, metadata or {"format": "pt"}, max_shard_bytes
            )
        return self._assemble()

    def publish(self) -> None:
        """Rename the assembled folder to OUT, replacing an old OUT, and remove all other files of the run."""
        if not self.is_finished:
            self._publish()
        self.discard()

    def _assemble(self) -> Path:
        if self.is_finished:
            return self.out
        for shard in self._plan.shards:
            if shard not in self._journal.shards:
                self._write_shard(shard)
            self._remove_consumed_parts()
        self._write_index()
        self._write_manifest()
        return self.folder / CHECKPOINT

    def _begin_finishing(
        self,
        part_order: Sequence[str],
        extra_files: Mapping[str, bytes],
        manifest: Mapping[str, Any],
        metadata: Mapping[str, str],
        max_shard_bytes: int,
    ) -> None:
        parts = {name: self._part_infos(name) for name in part_order}
        names = [key for infos in parts.values() for key in infos]
        assert len(set(names)) == len(names), "a tensor is in two parts"
        assert set(part_order) == set(self._journal.parts), "part_order must name all parts"
        shards = plan_shards(
            {part: {k: i.nbytes for k, i in infos.items()} for part, infos in parts.items()}, max_shard_bytes
        )
        checkpoint = self.folder / CHECKPOINT
        with disk_errors(checkpoint):
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
        make_folder(checkpoint)
        for name, content in extra_files.items():
            file = checkpoint / name
            assert file.resolve().is_relative_to(checkpoint.resolve()) and name != MANIFEST_FILE, name
            make_folder(file.parent)
            write_atomically(file, [content], len(content))
        self._journal.plan = ShardPlan(
            shards={shard_name(index, len(shards)): shard for index, shard in enumerate(shards)},
            metadata=dict(metadata),
            manifest=as_json(dict(manifest)),
        )
        self._journal.save()

    def _write_shard(self, shard: str) -> None:
        plan = self._plan
        parts = {part: self._part_infos(part) for part in dict.fromkeys(plan.shards[shard].values())}
        infos = {key: parts[part][key] for key, part in plan.shards[shard].items()}
        order = layout_order((key, info.dtype) for key, info in infos.items())
        header = build_header({key: (infos[key].dtype, infos[key].shape) for key in order}, plan.metadata)

        def pieces() -> Iterator[bytes | memoryview]:
            yield header
            for key in order:
                yield from tensor_chunks(infos[key])

        num_bytes = len(header) + sum(info.nbytes for info in infos.values())
        digest = write_atomically(self.folder / CHECKPOINT / shard, pieces(), num_bytes)
        self._journal.shards[shard] = FileRecord(bytes=num_bytes, sha256=digest)
        self._journal.save()

    def _remove_consumed_parts(self) -> None:
        for part in self._journal.parts.keys() - needed_parts(self._journal, self._plan):
            self._part_file(part).unlink(missing_ok=True)

    def _write_index(self) -> None:
        plan = self._plan
        if list(plan.shards) == [SINGLE_FILE]:
            return
        total = 0
        for shard in plan.shards:
            total += sum(info.nbytes for info in _file_infos(self.folder / CHECKPOINT / shard).values())
        weight_map = {key: shard for shard, parts in plan.shards.items() for key in parts}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(
            self.folder / CHECKPOINT / INDEX_FILE, [json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"]
        )

    def _write_manifest(self) -> None:
        plan = self._plan
        checkpoint = self.folder / CHECKPOINT
        files = dict(self._journal.shards)
        for file in checkpoint.rglob("*"):
            name = file.relative_to(checkpoint).as_posix()
            unlisted = name in (MANIFEST_FILE, *REPORT_FILES) or name.endswith(TEMPORARY_SUFFIX)
            if file.is_file() and name not in files and not unlisted:
                files[name] = FileRecord(bytes=file.stat().st_size, sha256=file_sha256(file))
        write_atomically(checkpoint / MANIFEST_FILE, [build_manifest(plan.manifest, files)])

    def _publish(self) -> None:
        checkpoint = self.folder / CHECKPOINT
        with disk_errors(self.out):
            check_location(self.out)
            check_replaceable(self.out, self.out, self._overwrite)
            if self.out.exists():
                self.out.replace(self.folder / REPLACED)
            checkpoint.replace(self.out)
            sync_folder(self.out.parent)

    @property
    def _plan(self) -> ShardPlan:
        assert self._journal.plan is not None, "finish was not called"
        return self._journal.plan

    # --- files -------------------------------------------------------------------------------------------------------

    def _part_file(self, name: str) -> Path:
        return part_file(self.folder, name)

    def _part_infos(self, name: str) -> dict[str, TensorInfo]:
        """Return the positions of the tensors of a part, in its own file or in the shards that hold them."""
        if self._part_file(name).exists():
            return _file_infos(self._part_file(name))
        plan = self._plan
        infos: dict[str, TensorInfo] = {}
        for shard, parts in plan.shards.items():
            keys = [key for key, part in parts.items() if part == name]
            if keys:
                in_shard = _file_infos(self.folder / CHECKPOINT / shard)
                infos |= {key: in_shard[key] for key in keys}
        return infos

    def _check_files(self) -> None:
        """Drop damaged parts from the journal, and remove all files of the run that the journal does not list."""
        journal = self._journal
        if journal.plan is not None:
            check_needed_files(journal, journal.plan)
            return
        self.damaged_parts = [p for p, record in journal.parts.items() if not is_intact(self._part_file(p), record)]
        for part in self.damaged_parts:
            del journal.parts[part]
        if self.damaged_parts:
            journal.save()
        with disk_errors(self.folder):
            for name in (SCRATCH, CHECKPOINT, REPLACED):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            known = {self._part_file(part) for part in journal.parts}
            for file in (self.folder / PARTS).glob("*"):
                if file not in known:
                    file.unlink()


def _file_infos(file: Path) -> dict[str, TensorInfo]:
    with file.open("rb") as handle:
        return read_header(file, handle, os.fstat(handle.fileno()).st_size)


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
