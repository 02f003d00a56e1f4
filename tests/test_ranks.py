"""Several ranks write the same bytes as one process. An error ends all of them, and any number of ranks continues."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest
import torch
from commands import assert_one_line_error
from fault_injection import ForkServer
from folders import artifact_bytes
from paths import ROOT
from safetensors.torch import load_file, save_file
from short_runs import short_command

from llmquant.algorithms.statistics import InputStatistics
from llmquant.errors import UserError
from llmquant.pipeline import nodes
from llmquant.pipeline.block_loop import _num_searched
from llmquant.pipeline.distributed import Ranks, _pickled_without_tensors, _unpickled
from llmquant.pipeline.nodes import LOOPBACK
from llmquant.solver.division import divide_tasks
from llmquant.solver.reduction import NUM_CHUNKS, NUM_PIECES, chunk_of, piece_of, split_of
from llmquant.spec import Options, Recipe

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


def test_every_sample_has_one_piece_and_every_piece_one_rank():
    for size in range(1, NUM_PIECES + 1):
        ranks = [Ranks(rank, size) for rank in range(size)]
        assert [piece for rank in ranks for piece in rank.pieces] == list(range(NUM_PIECES))
        for num_samples in (16, 21, 128):
            pieces = [piece_of(sample, num_samples) for sample in range(num_samples)]
            assert pieces == sorted(pieces)
            assert set(pieces) == set(range(NUM_PIECES))


def test_the_first_rank_also_runs_the_samples_that_it_needs():
    assert Ranks(0, 1).samples(128, at_least=200) == range(128)
    first, last = Ranks(0, 16), Ranks(15, 16)
    for rank in (first, last):
        rank.raising_on_all = nullcontext
    assert first.samples(128, at_least=0) == range(8)
    assert first.samples(128, at_least=11) == range(11)
    assert last.samples(128, at_least=11) == range(120, 128)
    with pytest.raises(UserError, match=r"samples 15: too few for 16 ranks \(rank 15 gets none\)"):
        last.samples(15, at_least=0)


@pytest.mark.parametrize(
    ("recipe", "seq_len", "expected"),
    [
        (Recipe(), 512, 4),
        (Recipe(), 128, 16),
        (Recipe(output_hessian="network"), 128, 0),
        (Recipe(method="awq+gptq"), 128, 8),
        (Recipe(output_hessian="none"), 512, 0),
    ],
)
def test_the_samples_that_the_first_rank_needs_do_not_depend_on_the_number_of_ranks(recipe, seq_len, expected):
    run = SimpleNamespace(num_samples=128, plan=SimpleNamespace(recipe=recipe, options=Options(seq_len=seq_len)))
    assert _num_searched(run) == expected


class _Wires:
    """Passes tensors between ranks that run in threads of this process."""

    def __init__(self, size: int) -> None:
        self._queues = {pair: Queue() for pair in product(range(-1, size), range(size))}
        self._size = size

    def passing(self, rank: Ranks):
        def passing(call, other):
            def send(tensor):
                self._queues[rank.rank, other].put(tensor.clone())

            def receive(tensor, source=other):
                tensor.copy_(self._queues[source, rank.rank].get(timeout=30))

            def broadcast(tensor):
                if rank.rank != other:
                    return receive(tensor, -1)
                for receiver in range(self._size):
                    self._queues[-1, receiver].put(tensor.clone())

            return {"send": send, "recv": receive, "broadcast": broadcast}[call.__name__]

        return passing


@pytest.mark.parametrize("missing", [(), (0, 3, 4, 5, 14, 15), range(16)])
def test_the_sum_of_statistics_has_the_same_bits_for_any_number_of_ranks(missing):
    features = 5

    def empty():
        return InputStatistics(features, torch.device("cpu"))

    def pieces_of(rank):
        for piece in rank.pieces:
            if piece not in missing:
                draw = torch.Generator().manual_seed(piece)
                x, y = torch.randn(2, 7 + piece, features, generator=draw)
                statistics = empty()
                statistics.add(x, y if piece not in (1, 8) else None, split=piece // 2 % 2)
                yield piece, statistics

    def sums(size):
        wires, ranks = _Wires(size), [Ranks(rank, size) for rank in range(size)]
        for rank in ranks:
            rank.raising_on_all, rank._passing = nullcontext, wires.passing(rank)
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda rank: rank.sum_statistics(pieces_of(rank), empty), ranks))

    def bits(statistics):
        moments = statistics.moments_KN(torch.eye(features))
        assert statistics.num_tokens == sum(7 + piece for piece in range(16) if piece not in missing)
        assert len(moments) == (0 if len(missing) == 16 else 2)
        return torch.cat([statistics.hessian_KK, statistics.mean_abs_K[None], *moments])

    (one,) = sums(1)
    for size in range(2, NUM_PIECES + 1):
        for other in sums(size):
            assert torch.equal(bits(other), bits(one)), size


def test_a_value_and_its_tensors_survive_the_way_to_another_rank():
    value = {
        "weights": [torch.arange(6).view(2, 3).T, torch.tensor(True), torch.empty(0, 4), torch.ones(2).bfloat16()],
        "text": ("a", 1.5),
    }
    tensors: list[torch.Tensor] = []
    pickled = _pickled_without_tensors(value, tensors)
    received = _unpickled(pickled, [tensor.clone() for tensor in tensors])
    assert received["text"] == value["text"]
    for theirs, ours in zip(received["weights"], value["weights"], strict=True):
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)
    assert b"torch" not in pickled


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(3, 4)._device("auto") == Ranks(3, 4)._device("cuda") == "cuda:1"
    assert Ranks(3, 4)._device("cpu") == "cpu"
    with pytest.raises(UserError, match="device 'cuda:1': 4 ranks cannot share one GPU; use --device cuda"):
        Ranks(3, 4)._device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 needs GPU 2 of its node, which has 2; use --nproc-per-node 2"):
        Ranks(2, 4)._device("auto")


def test_too_many_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "17")
    with pytest.raises(UserError, match="ranks 17: at most 16 can share the samples; use --nnodes and --nproc-per-nod"):
        Ranks.join()


def test_the_network_interface_leads_to_the_other_nodes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert nodes.gloo_interface() == LOOPBACK
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert nodes.gloo_interface() == LOOPBACK
    routes = {"node0": "127.0.1.1", nodes.ANY_REMOTE_ADDRESS: "10.0.0.7", "node9": None}
    monkeypatch.setattr(nodes, "_own_address", routes.get)
    monkeypatch.setattr(nodes, "_interface_of", {"10.0.0.7": "eth7"}.get)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert nodes.gloo_interface() == "eth7"
    monkeypatch.setenv("MASTER_ADDR", "node9")
    assert nodes.gloo_interface() is None


def test_a_node_that_does_not_hold_out_spills_into_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    (tmp_path / "out.partial").mkdir()
    monkeypatch.setenv("GROUP_RANK", "1")
    shared, absent = tmp_path / "out.partial" / "scratch", tmp_path / "elsewhere.partial" / "scratch"
    assert Ranks(3, 4).scratch(shared) == shared / "rank-3"
    assert Ranks(3, 4).scratch(absent).parent == tmp_path / "own"
    monkeypatch.setenv("GROUP_RANK", "0")
    assert Ranks(1, 4).scratch(absent) == absent / "rank-1"


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
        (9, ("--method", "awq+gptq", "--samples", "20")),
        (16, ("--samples", "32")),
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


@pytest.fixture
def two_nodes(model, text, tmp_path) -> list[Path]:
    """Return the working directories of two nodes. Both hold the model and the text; nothing else is shared."""
    folders = [tmp_path / "node-0", tmp_path / "node-1"]
    for folder in folders:
        shutil.copytree(model, folder / "model")
        shutil.copy(text, folder / "text.txt")
    return folders


def run_on(nodes_, server, out, *options, ranks=4):
    command = [*short_command(Path("model"), Path(out), Path("text.txt")), "--samples", "9", *options]
    return server.run(*command, ranks=ranks, nodes=[str(folder) for folder in nodes_])


@pytest.mark.parametrize("spills", [False, True])
def test_two_nodes_make_the_bytes_of_one_process(spills, server, two_nodes):
    one = run_on(two_nodes[:1], server, "one", ranks=1)
    assert one.returncode == 0, one.stderr
    options = ()
    if spills:
        refused = run_on(two_nodes[:1], server, "refused", "--max-memory", "100MB", ranks=1)
        options = ("--max-memory", refused.stderr.split("--max-memory ")[1].strip())
    done = run_on(two_nodes, server, "out", *options)
    assert [rank.returncode for rank in done] == [0] * 4, done
    assert artifact_bytes(two_nodes[0] / "out") == artifact_bytes(two_nodes[0] / "one")
    assert sorted(file.name for file in two_nodes[1].iterdir()) == ["model", "text.txt"]
    assert all(rank.stdout == rank.stderr == "" for rank in done[1:]), "only rank 0 prints"


def test_a_node_without_the_checkpoint_or_with_another_is_named(server, two_nodes):
    where = f"rank 2 on node 1 ({socket.gethostname()}): "

    def refusal():
        done = run_on(two_nodes, server, "out")
        assert [rank.returncode for rank in done] == [2] * 4, done
        assert all(rank.stderr == "" for rank in done[1:])
        assert not (two_nodes[0] / "out").exists()
        return done[0].stderr

    there = two_nodes[1] / "model"
    weights = load_file(there / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(changed, there / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(refusal(), where + "model.safetensors: ")
    fewer = {name: tensor for name, tensor in weights.items() if "layers.2" not in name}
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    save_file(fewer, there / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(refusal(), where + "config.json: ")
    shutil.rmtree(there)
    assert_one_line_error(refusal(), where + "model: ")


def test_two_launchers_of_torchrun_make_the_bytes_of_one_process(server, two_nodes):
    one = run_on(two_nodes[:1], server, "one", ranks=1)
    assert one.returncode == 0, one.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = ["-m", "llmquant", *short_command(Path("model"), Path("out"), Path("text.txt")), "--samples", "9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [*map(str, [*launch, "--node-rank", number, *command])],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(two_nodes)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert artifact_bytes(two_nodes[0] / "out") == artifact_bytes(two_nodes[0] / "one")
    assert sorted(file.name for file in two_nodes[1].iterdir()) == ["model", "text.txt"]
