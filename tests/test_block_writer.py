"""Finished blocks are written at once on a CPU, and beside the next block on a GPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from llmquant.errors import UserError
from llmquant.pipeline import block_writer
from llmquant.pipeline.block_writer import BlockWriter


class FakeCheckpoint:
    """Records the parts, with the thread that wrote each."""

    def __init__(self):
        self.parts, self.dropped, self.threads = [], [], []
        self.may_write = threading.Event()
        self.may_write.set()
        self.full_at = None

    def add_part(self, name, tensors, note):
        assert self.may_write.wait(20)
        if name == self.full_at:
            raise UserError("disk is full")
        self.parts.append((name, tensors, note))
        self.threads.append(threading.current_thread())

    def drop_part(self, name):
        self.dropped.append(name)


@pytest.fixture
def make_run(monkeypatch):
    monkeypatch.setattr(block_writer, "pack_part", lambda plan, index, linears, results, folded: {"results": results})

    def make(device):
        @contextmanager
        def timed(step):
            yield

        plan = SimpleNamespace(
            skeleton=SimpleNamespace(device=torch.device(device)), linears_of_block=lambda index: {index: index}
        )
        log = SimpleNamespace(timed=timed, record_of=lambda linears: {"linears": list(linears)})
        return SimpleNamespace(plan=plan, log=log, checkpoint=FakeCheckpoint())

    return make


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_are_written_in_order_with_their_notes(make_run, device):
    run = make_run(device)
    with BlockWriter(run) as writer:
        for index in range(3):
            writer.write(index, f"block-{index}", {index: index}, {})
    written = run.checkpoint
    assert written.parts == [(f"block-{i}", {"results": {i: i}}, {"linears": [i], "folded": {}}) for i in range(3)]
    assert written.dropped == [f"cross-row-{i:05}" for i in range(3)]
    assert all((thread is threading.main_thread()) == (device == "cpu") for thread in written.threads)


def test_on_a_gpu_the_caller_does_not_wait_for_the_block_that_is_being_written(make_run):
    run = make_run("cuda")
    run.checkpoint.may_write.clear()
    with BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})
        assert run.checkpoint.parts == [], "the disk is still busy"
        run.checkpoint.may_write.set()
        writer.write(1, "block-1", {}, {})
        assert [name for name, *_ in run.checkpoint.parts][:1] == ["block-0"], "at most one block waits"
    assert [name for name, *_ in run.checkpoint.parts] == ["block-0", "block-1"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_full_disk_ends_the_run(make_run, device):
    run = make_run(device)
    run.checkpoint.full_at = "block-1"
    with pytest.raises(UserError, match="disk is full"), BlockWriter(run) as writer:
        for index in range(3):
            writer.write(index, f"block-{index}", {}, {})
    assert [name for name, *_ in run.checkpoint.parts] == ["block-0"]


def test_a_full_disk_at_the_last_block_is_not_lost(make_run):
    run = make_run("cuda")
    run.checkpoint.full_at = "block-0"
    with pytest.raises(UserError, match="disk is full"), BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})


def test_an_error_of_the_computation_is_not_replaced_by_one_of_the_disk(make_run):
    run = make_run("cuda")
    run.checkpoint.full_at = "block-0"
    with pytest.raises(UserError, match="NaN in block 1"), BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})
        raise UserError("NaN in block 1")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("NaN in block 1")])
def test_an_interruption_waits_for_the_block_on_the_disk_and_is_reported(make_run, error):
    run = make_run("cuda")
    with pytest.raises(type(error)), BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})
        raise error
    assert [name for name, *_ in run.checkpoint.parts] == ["block-0"]


def test_a_fault_in_the_thread_does_not_replace_an_interruption(make_run, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(block_writer, "pack_part", fail)
    run = make_run("cuda")
    with pytest.raises(KeyboardInterrupt), BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="out of memory"), BlockWriter(run) as writer:
        writer.write(0, "block-0", {}, {})
