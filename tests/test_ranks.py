"""Several ranks write the same bytes as one process. An error ends all of them, and any number of ranks continues."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import assert_one_line_error
from fault_injection import ForkServer
from folders import artifact_bytes
from safetensors.torch import load_file, save_file
from short_runs import short_command

from llmquant.pipeline.distributed import LOOPBACK, Ranks, divide_tasks
from llmquant.solver.reduction import NUM_CHUNKS, chunk_of, split_of

pytestmark = pytest.mark.slow

TEXT = " ".join(f"It was a dark and stormy night, the {number}th in a row." for number in range(200))


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama", num_hidden_layers=3)


MEET = """
import sys
from datetime import timedelta
import torch.distributed as dist
dist.init_process_group("gloo", "file://" + sys.argv[1], timedelta(seconds=60), 2, int(sys.argv[2]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def loopback(tmp_path_factory) -> None:
    """Skip the tests if two processes of plain torch.distributed cannot connect on this machine."""
    store = str(tmp_path_factory.mktemp("store") / "file")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": LOOPBACK}
    both = [subprocess.Popen([sys.executable, "-c", MEET, store, rank], env=environment) for rank in "01"]
    try:
        codes = [process.wait(120) for process in both]
    except subprocess.TimeoutExpired:
        codes = []
        for process in both:
            process.kill()
            process.wait()
    if codes != [0, 0]:
        pytest.skip("two processes of plain torch.distributed do not meet on this machine's loopback")


@pytest.fixture(scope="module")
def server(model, loopback) -> Iterator[ForkServer]:
    with ForkServer(model, html_report=False) as server:
        yield server


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_every_sample_has_one_chunk_and_every_chunk_one_rank():
    for size in range(1, NUM_CHUNKS + 1):
        ranks = [Ranks(rank, size) for rank in range(size)]
        assert [chunk for rank in ranks for chunk in rank.chunks] == list(range(NUM_CHUNKS))
        for num_samples in (8, 13, 128):
            chunks = [chunk_of(sample, num_samples) for sample in range(num_samples)]
            assert chunks == sorted(chunks)
            assert set(chunks) == set(range(NUM_CHUNKS))


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 7, 8, 9, 13, 128])
def test_chunks_alternate_between_the_splits_even_with_few_samples(num_samples):
    chunks = {(chunk_of(sample, num_samples), split_of(sample, num_samples)) for sample in range(num_samples)}
    assert len(chunks) == min(num_samples, NUM_CHUNKS), "a chunk belongs to one split"
    assert [split for _, split in sorted(chunks)] == [0, 1] * (len(chunks) // 2) + [0] * (len(chunks) % 2)


def test_the_largest_linears_go_first_each_to_the_rank_with_the_least_work():
    sizes = {"q": 16, "k": 4, "v": 4, "gate": 20, "up": 20}
    assert divide_tasks(sizes, 1) == [["gate", "up", "q", "k", "v"]]
    assert divide_tasks(sizes, 3) == [["gate", "v"], ["up"], ["q", "k"]]
    assert divide_tasks({"down": 7}, 2) == [["down"], []]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ()),
        (3, ("--samples", "13")),
        (2, ("--effort", "best", "--samples", "16")),
        (2, ("--method", "awq+gptq", "--samples", "16")),
        (2, ("--method", "rtn")),
    ],
)
def test_ranks_make_the_bytes_of_one_process(ranks, options, server, model, text, tmp_path):
    arguments = [*short_command(model, tmp_path / "one", text), *options]
    one = server.run(*arguments)
    assert one.returncode == 0, one.stderr
    arguments[2] = tmp_path / "many"
    many = server.run(*arguments, ranks=ranks)
    assert [done.returncode for done in many] == [0] * ranks, many
    assert artifact_bytes(tmp_path / "many") == artifact_bytes(tmp_path / "one")
    assert many[0].stdout
    assert all(done.stdout == done.stderr == "" for done in many[1:]), "only rank 0 prints"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["many", "one", "text.txt"]


def test_the_linears_of_a_block_are_solved_on_different_ranks(server, model, text, tmp_path):
    done = server.run(*short_command(model, tmp_path / "out", text), ranks=2, linear_log=str(tmp_path))
    assert [one.returncode for one in done] == [0, 0], done
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first == 3 * ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert second == 3 * ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]


def test_a_damaged_linear_that_the_second_rank_solves_ends_both_with_one_line(server, model, text, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(damaged / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    done = server.run(*short_command(damaged, tmp_path / "out", text), ranks=2)
    assert [one.returncode for one in done] == [2, 2], done
    assert_one_line_error(done[0].stderr, f"tensor '{name}' holds NaN or inf")
    assert done[1].stderr == ""
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_another_number_continues(rank, server, model, text, tmp_path):
    out = tmp_path / "out"
    whole = server.run(*short_command(model, tmp_path / "whole", text), ranks=2)
    assert [done.returncode for done in whole] == [0, 0], whole
    killed = server.run(*short_command(model, out, text), ranks=2, rank=rank, dies_at_input_group=5)
    assert [done.returncode for done in killed] == ([-9, 2] if rank == 0 else [2, -9]), killed
    if rank == 1:
        assert_one_line_error(killed[0].stderr, "another rank has ended; the same command continues the run")
    assert not out.exists()
    done = server.run(*short_command(model, out, text))
    assert done.returncode == 0, done.stderr
    assert artifact_bytes(out) == artifact_bytes(tmp_path / "whole")


def test_a_rank_that_never_comes_is_waited_for_only_so_long(server, model, text, tmp_path):
    first, second = server.run(
        *short_command(model, tmp_path / "out", text), ranks=2, rank=1, stop_after=0.0, join_seconds=2
    )
    assert (first.returncode, second.returncode) == (2, -9), (first, second)
    assert_one_line_error(first.stderr, "ranks 2: rank 0 could not join the others at 127.0.0.1:")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.txt"]


def test_an_error_of_one_rank_is_one_line_and_ends_all(server, model, text, tmp_path):
    """The first rank alone finds OUT taken, and each rank that the samples are too few."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = server.run(*short_command(model, tmp_path / "out", text), ranks=2)
    assert [one.returncode for one in done] == [2, 2]
    assert_one_line_error(done[0].stderr, "out: exists")
    assert done[1].stderr == ""
    shutil.rmtree(tmp_path / "out")
    done = server.run(*short_command(model, tmp_path / "out", text), "--samples", "1", ranks=2)
    assert [one.returncode for one in done] == [2, 2]
    assert_one_line_error(done[0].stderr, "samples 1: too few for 2 ranks")
    assert done[1].stderr == ""
