"""Several ranks make the bytes that one process makes; what ends one ends all, and any number of them goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import Warm, contents
from safetensors.torch import load_file, save_file
from test_faults import command, one_line

from llmquant.pipeline.ranks import LANES, LOOPBACK, Ranks, divided, half_of, lane_of

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
    """Skips where processes cannot talk to each other at all: torch's own two lines say so."""
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
def warm(model, loopback) -> Iterator[Warm]:
    with Warm(model, page=False) as process:
        yield process


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_every_sample_has_one_lane_and_every_lane_one_rank():
    for size in range(1, LANES + 1):
        ranks = [Ranks(rank, size) for rank in range(size)]
        assert [lane for rank in ranks for lane in rank.lanes] == list(range(LANES))
        for num_samples in (8, 13, 128):
            lanes = [lane_of(sample, num_samples) for sample in range(num_samples)]
            assert lanes == sorted(lanes)
            assert set(lanes) == set(range(LANES))


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 7, 8, 9, 13, 128])
def test_lanes_are_of_either_half_in_turn_also_where_there_are_few_samples(num_samples):
    lanes = {(lane_of(sample, num_samples), half_of(sample, num_samples)) for sample in range(num_samples)}
    assert len(lanes) == min(num_samples, LANES), "a lane is of one half"
    assert [half for _, half in sorted(lanes)] == [0, 1] * (len(lanes) // 2) + [0] * (len(lanes) % 2)


def test_the_largest_linears_go_first_each_to_the_rank_with_least_to_do():
    sizes = {"q": 16, "k": 4, "v": 4, "gate": 20, "up": 20}
    assert divided(sizes, 1) == [["gate", "up", "q", "k", "v"]]
    assert divided(sizes, 3) == [["gate", "v"], ["up"], ["q", "k"]]
    assert divided({"down": 7}, 2) == [["down"], []]


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
def test_ranks_make_the_bytes_of_one_process(ranks, options, warm, model, text, tmp_path):
    arguments = [*command(model, tmp_path / "one", text), *options]
    one = warm.run(*arguments)
    assert one.code == 0, one.error
    arguments[2] = tmp_path / "many"
    many = warm.run(*arguments, ranks=ranks)
    assert [done.code for done in many] == [0] * ranks, many
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert many[0].out
    assert all(done.out == done.error == "" for done in many[1:]), "only the first speaks"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["many", "one", "text.txt"]


def test_the_linears_of_a_block_are_solved_on_different_ranks(warm, model, text, tmp_path):
    done = warm.run(*command(model, tmp_path / "out", text), ranks=2, notes=str(tmp_path))
    assert [one.code for one in done] == [0, 0], done
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first == 3 * ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert second == 3 * ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]


def test_a_damaged_linear_that_the_second_rank_solves_ends_both_with_one_line(warm, model, text, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(damaged / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    done = warm.run(*command(damaged, tmp_path / "out", text), ranks=2)
    assert [one.code for one in done] == [2, 2], done
    one_line(done[0].error, f"tensor '{name}' holds NaN or inf")
    assert done[1].error == ""
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_another_number_continues(rank, warm, model, text, tmp_path):
    out = tmp_path / "out"
    whole = warm.run(*command(model, tmp_path / "whole", text), ranks=2)
    assert [done.code for done in whole] == [0, 0], whole
    killed = warm.run(*command(model, out, text), ranks=2, rank=rank, dies_at_stage=5)
    assert [done.code for done in killed] == ([-9, 2] if rank == 0 else [2, -9]), killed
    if rank == 1:
        one_line(killed[0].error, "another rank has ended; the same command continues the run")
    assert not out.exists()
    done = warm.run(*command(model, out, text))
    assert done.code == 0, done.error
    assert contents(out) == contents(tmp_path / "whole")


def test_a_rank_that_never_comes_is_waited_for_only_so_long(warm, model, text, tmp_path):
    first, second = warm.run(
        *command(model, tmp_path / "out", text), ranks=2, rank=1, stop_after=0.0, meeting_seconds=2
    )
    assert (first.code, second.code) == (2, -9), (first, second)
    one_line(first.error, "ranks 2: rank 0 could not join the others at 127.0.0.1:")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.txt"]


def test_an_error_of_one_rank_is_one_line_and_ends_all(warm, model, text, tmp_path):
    """The first rank alone finds OUT taken, and each rank that the samples are too few."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = warm.run(*command(model, tmp_path / "out", text), ranks=2)
    assert [one.code for one in done] == [2, 2]
    one_line(done[0].error, "out: exists")
    assert done[1].error == ""
    shutil.rmtree(tmp_path / "out")
    done = warm.run(*command(model, tmp_path / "out", text), "--samples", "1", ranks=2)
    assert [one.code for one in done] == [2, 2]
    one_line(done[0].error, "samples 1: too few for 2 ranks")
    assert done[1].error == ""
