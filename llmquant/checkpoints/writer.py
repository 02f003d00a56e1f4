"""A checkpoint that grows part by part and cannot be lost.

While it is made it is a folder `<out>.partial` beside OUT:

    journal.json     what was asked, and which files are complete
    lock             held by the one run that writes here; the system frees it when that run dies
    parts/           one safetensors file per part (the tensors of one decoder block, say)
    scratch/         what a run has put aside for itself; nothing that a later one could use
    checkpoint/      what OUT will be, filled by `finish`
    replaced/        the old OUT, between the last two renames of a run with overwrite

Every step leaves complete files only, so a run may die anywhere and the next one goes on: parts are there or not,
shards are copied from parts file to file, parts go once the shards that hold them are on the disk, and OUT appears by
one rename. The bytes depend on the parts and on nothing else.
"""

from __future__ import annotations

import fcntl
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

from llmquant.checkpoints.durable import TEMPORARY_SUFFIX, disk_errors, make_folder, sync_folder, write_atomically
from llmquant.checkpoints.files import INDEX_FILE, SINGLE_FILE
from llmquant.checkpoints.header import TensorInfo, build_header, layout_order, read_header
from llmquant.checkpoints.journal import JOURNAL_FILE, FileRecord, Journal, Plan, as_json, differences
from llmquant.checkpoints.manifest import MANIFEST_FILE, REPORT_FILES, build_manifest
from llmquant.checkpoints.out_folder import check_apart, check_place, check_replaceable
from llmquant.checkpoints.reader import file_sha256, read_tensor, tensor_chunks
from llmquant.errors import UserError
from llmquant.paths import listed, partial_folder, real_path
from llmquant.spec import Options

MAX_SHARD_BYTES = Options().max_shard_bytes
LOCK_FILE = "lock"
PARTS, SCRATCH, CHECKPOINT, REPLACED = FOLDERS = ("parts", "scratch", "checkpoint", "replaced")


@dataclass(frozen=True, kw_only=True)
class TensorStream:
    """A tensor that is copied piece by piece because it is too large to hold; `CheckpointReader.chunks` gives the
    pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]


class PartialCheckpoint:
    """A checkpoint in the making. Open it with `open`; it holds a lock until `finish`, `close` or the end of a
    `with`."""

    def __init__(self, out: Path, journal: Journal, lock: int, overwrite: bool) -> None:
        self.out = out
        self.folder = journal.folder
        self.discarded: list[str] = []
        """Parts that were damaged since they were written, and count as absent."""
        self._journal = journal
        self._lock: int | None = lock
        self._overwrite = overwrite

    @classmethod
    def open(
        cls, out: str | os.PathLike[str], request: Mapping[str, Any], *, restart: bool = False, overwrite: bool = False
    ) -> PartialCheckpoint:
        """Begins `<out>.partial`, or continues the one that is there.

        request is everything the result depends on. UserError if OUT exists and is not empty (unless overwrite, which
        replaces a finished checkpoint at the very end), if another run is writing it, or if what is there was begun
        with another request (unless restart, which throws it away).
        """
        out, folder = real_path(Path(out)), partial_folder(Path(out))
        check_place(out)
        _find_journal(folder, restart)
        if not folder.exists():
            check_replaceable(out, out, overwrite)
        wanted = as_json(dict(request))
        lock = _acquire_lock(folder)
        try:
            journal = _find_journal(folder, restart)
            if journal is None or (journal.request != wanted and _is_published(journal, out)):
                # Nothing was begun, or a run with other options finished and died while it was tidying up.
                if journal is not None:
                    _remove_contents(folder)
                try:
                    _restore_replaced(out, folder)
                    check_replaceable(out, out, overwrite)
                except UserError:
                    _remove_if_empty(folder)
                    raise
                journal = Journal(folder=folder, request=wanted)
                journal.save()
            _check_request(folder, journal.request, wanted)
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
        """Lets go of the lock. What is complete stays, for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Throws away what is there, because no run could ever continue it."""
        _remove_contents(self.folder)
        _remove_if_empty(self.folder)
        self.close()

    @property
    def scratch(self) -> Path:
        """A folder for what only this run needs; it may be made. It goes when the run ends, or when the next begins."""
        return self.folder / SCRATCH

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def is_finishing(self) -> bool:
        """True once `finish` has all it needs: `complete` does the rest, and no part has to be made again."""
        return self._journal.plan is not None

    @property
    def is_finished(self) -> bool:
        """True if OUT is there, and only tidying up is left to `complete`."""
        return _is_published(self._journal, self.out)

    def has_part(self, name: str) -> bool:
        """Whether that part is complete."""
        return name in self._journal.parts

    def add_part(
        self, name: str, tensors: Mapping[str, Tensor | TensorStream], note: dict[str, Any] | None = None
    ) -> None:
        """Writes the tensors of one part; afterwards it is complete, whatever happens. `part_note` gives the note back.
        UserError if the disk is full."""
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) and not self.is_finishing, name
        order = layout_order((key, tensor.dtype) for key, tensor in tensors.items())
        header = build_header({key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in order}, {})

        def pieces() -> Iterator[bytes | memoryview]:
            yield header
            for key in order:
                tensor = tensors[key]
                if isinstance(tensor, TensorStream):
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
        """Forgets a part that has served its purpose, if it is there."""
        if self._journal.parts.pop(name, None) is not None:
            self._journal.save()
            self._part_file(name).unlink(missing_ok=True)

    def part_note(self, name: str) -> dict[str, Any]:
        """What was noted with a complete part."""
        return self._journal.parts[name].note or {}

    def read_part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a complete part, also when `finish` has already moved them into shards."""
        assert self.has_part(name), name
        infos = self._part_infos(name)
        return {key: read_tensor(info) for key, info in infos.items()}

    # --- finishing ---------------------------------------------------------------------------------------------------

    def finish(self, part_order: Sequence[str], extra_files: Mapping[str, bytes], **options: Any) -> None:
        """`assemble` and `publish`."""
        self.assemble(part_order, extra_files, **options)
        self.publish()

    def complete(self) -> None:
        """Does what is left of `finish`, from the journal alone."""
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
        """Turns the parts, in this order, into the folder that `publish` will make OUT, and gives it.

        extra_files (config.json, tokenizer) go beside the shards. A part is split only if it is larger than a shard
        may be. May be called again after it died. `REPORT_FILES` may be added to the folder, and nothing else.
        """
        if not self.is_finishing:
            self._begin_finishing(
                part_order, extra_files, manifest or {}, metadata or {"format": "pt"}, max_shard_bytes
            )
        return self._assemble()

    def publish(self) -> None:
        """OUT appears, in place of what was there, and nothing else is left."""
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
        assert len(set(names)) == len(names), "a tensor in two parts"
        assert set(part_order) == set(self._journal.parts), "parts that have no place in the order"
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
        self._journal.plan = Plan(
            shards={_shard_name(index, len(shards)): shard for index, shard in enumerate(shards)},
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
        plan = self._plan
        needed = {
            part for shard, parts in plan.shards.items() if shard not in self._journal.shards for part in parts.values()
        }
        for part in self._journal.parts.keys() - needed:
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
            check_place(self.out)
            check_replaceable(self.out, self.out, self._overwrite)
            if self.out.exists():
                self.out.replace(self.folder / REPLACED)
            checkpoint.replace(self.out)
            sync_folder(self.out.parent)

    @property
    def _plan(self) -> Plan:
        assert self._journal.plan is not None, "finish was not called"
        return self._journal.plan

    # --- files -------------------------------------------------------------------------------------------------------

    def _part_file(self, name: str) -> Path:
        return _part_file(self.folder, name)

    def _part_infos(self, name: str) -> dict[str, TensorInfo]:
        """Where the tensors of a part lie: in its own file, or in the shards it was copied into."""
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
        """Compares the disk with what the journal names: a damaged part counts as absent, and all else goes."""
        journal = self._journal
        if journal.plan is not None:
            _check_finishing(journal, journal.plan)
            return
        self.discarded = [p for p, record in journal.parts.items() if not _is_intact(self._part_file(p), record)]
        for part in self.discarded:
            del journal.parts[part]
        if self.discarded:
            journal.save()
        with disk_errors(self.folder):
            for name in (SCRATCH, CHECKPOINT, REPLACED):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
            known = {self._part_file(part) for part in journal.parts}
            for file in (self.folder / PARTS).glob("*"):
                if file not in known:
                    file.unlink()


def check_out(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    restart: bool = False,
    reads: Iterable[Path] = (),
    request: Mapping[str, Any] | None = None,
) -> None:
    """What `PartialCheckpoint.open` would refuse, before any work is done. Writes nothing.

    reads: the files and folders that OUT is made of, from which it must lie apart. request: as for
    `PartialCheckpoint.open`; None: what an unfinished run has left is not compared with it.
    """
    out, folder = real_path(Path(out)), partial_folder(Path(out))
    check_apart(out, reads)
    check_place(out)
    journal = _find_journal(folder, restart)
    _check_lock(folder)
    published = journal is not None and _is_published(journal, out)
    if journal is None and (folder / REPLACED).exists() and not out.exists():
        if not overwrite:
            raise UserError(
                f"{folder / REPLACED}: the OUT that an unfinished run was about to replace; leave out --restart to "
                "finish that run, or add --overwrite"
            )
        check_replaceable(folder / REPLACED, out, overwrite)
    elif not published:
        check_replaceable(out, out, overwrite)
    if journal is None or request is None:
        return
    wanted = as_json(dict(request))
    if not published:
        _check_request(folder, journal.request, wanted)
        if journal.plan is not None:
            _check_finishing(journal, journal.plan)
    elif journal.request != wanted:
        check_replaceable(out, out, overwrite)


def begun_request(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The request of the unfinished run whose work is there; None if there is none. UserError if it is damaged."""
    journal = _find_journal(partial_folder(Path(out)), restart=False)
    return None if journal is None else journal.request


def plan_shards(parts: Mapping[str, Mapping[str, int]], max_shard_bytes: int) -> list[dict[str, str]]:
    """{part: {tensor: bytes}} -> per shard {tensor: part}, filled in order; only a part larger than a shard is
    split."""
    shards: list[dict[str, str]] = [{}]
    filled = 0
    for part, sizes in parts.items():
        pieces = [sizes] if sum(sizes.values()) <= max_shard_bytes else [{key: size} for key, size in sizes.items()]
        for piece in pieces:
            num_bytes = sum(piece.values())
            if shards[-1] and filled + num_bytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1].update(dict.fromkeys(piece, part))
            filled += num_bytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _file_infos(file: Path) -> dict[str, TensorInfo]:
    with file.open("rb") as handle:
        return read_header(file, handle, os.fstat(handle.fileno()).st_size)


def _is_intact(file: Path, record: FileRecord) -> bool:
    return file.is_file() and file.stat().st_size == record.bytes and file_sha256(file) == record.sha256


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _is_published(journal: Journal, out: Path) -> bool:
    return journal.plan is not None and not (journal.folder / CHECKPOINT).exists() and out.exists()


def _part_file(folder: Path, name: str) -> Path:
    return folder / PARTS / f"{name}.safetensors"


def _check_request(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """UserError if the request of the run that was begun is not the one that is made now."""
    if begun != wanted:
        changes = "; ".join(differences(begun, wanted))
        raise UserError(
            f"{folder}: left by a run with other options ({changes}); repeat those to continue it, "
            "add --restart to begin anew, or choose another OUT"
        )


def _check_finishing(journal: Journal, plan: Plan) -> None:
    """UserError if a file is damaged that finishing needs."""
    needed = {part for shard, parts in plan.shards.items() if shard not in journal.shards for part in parts.values()}
    files = {journal.folder / CHECKPOINT / shard: record for shard, record in journal.shards.items()}
    files |= {_part_file(journal.folder, part): journal.parts[part] for part in needed}
    for file, record in files.items():
        if not _is_intact(file, record):
            raise UserError(f"{file}: damaged since it was written; add --restart to begin anew")


def _find_journal(folder: Path, restart: bool) -> Journal | None:
    """The journal, or None if nothing was begun or restart says to forget it; UserError if the folder is not ours."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: not a folder that llmquant made; move it away, or choose another OUT")
    _check_ours(folder)
    return None if restart or not (folder / JOURNAL_FILE).exists() else Journal.load(folder)


def _check_ours(folder: Path) -> None:
    """UserError if a folder was not left by a run: our files would be removed from it without asking. Other files are
    left alone beside a journal that can be read, and make a folder without one a foreign one."""
    own = {LOCK_FILE, JOURNAL_FILE + TEMPORARY_SUFFIX}
    if (folder / JOURNAL_FILE).is_file():
        own |= {JOURNAL_FILE, *FOLDERS}
    foreign = sorted(file.name for file in folder.glob("*") if file.name not in own)
    links = sorted(name for name in own if (folder / name).is_symlink())
    if links or (foreign and not _has_journal(folder)):
        raise UserError(
            f"{folder}: not left by llmquant (it holds {listed(links or foreign)}); move it away, or choose another OUT"
        )


def _has_journal(folder: Path) -> bool:
    try:
        Journal.load(folder)
    except UserError:
        return False
    return True


def _restore_replaced(out: Path, folder: Path) -> None:
    """Undoes the first of the two renames of `_publish`."""
    if (folder / REPLACED).exists() and not os.path.lexists(out):
        with disk_errors(out):
            (folder / REPLACED).replace(out)


def _remove_contents(folder: Path) -> None:
    """Removes everything of ours but the lock; the journal last, because it tells that the rest is ours."""
    with disk_errors(folder):
        for name in FOLDERS:
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        for name in (JOURNAL_FILE + TEMPORARY_SUFFIX, JOURNAL_FILE):
            (folder / name).unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    """Removes the folder if it holds nothing but the lock."""
    if [file.name for file in folder.iterdir()] == [LOCK_FILE]:
        (folder / LOCK_FILE).unlink()
        folder.rmdir()


def _acquire_lock(folder: Path) -> int:
    """The file descriptor that holds the lock; the folder exists afterwards. UserError if another run holds it."""
    file = folder / LOCK_FILE
    with disk_errors(folder):
        while True:
            make_folder(folder)
            try:
                lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run that held it may have finished, and removed the file, between our two calls.
                if file.exists() and os.path.samestat(os.fstat(lock), file.stat()):
                    os.truncate(lock, 0)
                    os.write(lock, str(os.getpid()).encode())
                    return lock
            except BlockingIOError:
                error = _locked(folder, lock)
                os.close(lock)
                raise error from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _check_lock(folder: Path) -> None:
    """UserError if a run that is still going on holds the lock. Nothing is written."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _locked(folder, lock) from None
    finally:
        os.close(lock)


def _locked(folder: Path, lock: int) -> UserError:
    holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
    return UserError(f"{folder}: process {holder} is writing it; wait until it ends, or choose another OUT")
