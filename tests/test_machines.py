"""Predictions for named machines, without those machines: models of 8 and 70 billion parameters as sparse files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import assert_one_line_error, command
from paths import ROOT

from llmquant.console.plan import print_plan
from llmquant.errors import UserError
from llmquant.estimates.machine_duration import MachineDuration, _Model, predict_duration
from llmquant.estimates.machines import MACHINES, Machine, Rate, largest_share, on_machine, parse_machine
from llmquant.estimates.memory import estimate_memory
from llmquant.pipeline import block_loop
from llmquant.pipeline.distributed import Ranks
from llmquant.pipeline.quantize import dry_run
from llmquant.solver.reduction import piece_of
from llmquant.spec import EFFORTS, Options, Recipe

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Sizes of Llama 3."""
SHARD_BYTES = 5 * 10**9


def write_sparse_checkpoint(folder: Path, config: object, tokenizer: Path) -> Path:
    """Write a checkpoint of bfloat16 zeros that takes no space on a disk with sparse files: only the headers are real.

    tokenizer: folder whose tokenizer is copied.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        if sum(each.numel() * 2 for each in shards[-1].values()) + tensor.numel() * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, tensor in shard.items():
            end = offset + tensor.numel() * 2
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            weight_map[name], offset = file.name, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Llama-shaped checkpoints by name in SHAPES."""
    from transformers import LlamaConfig

    parent = tmp_path_factory.mktemp("sparse")
    return {
        name: write_sparse_checkpoint(
            parent / name, LlamaConfig(**sizes, dtype="bfloat16", tie_word_embeddings=False), tiny_model("llama")
        )
        for name, sizes in SHAPES.items()
    }


@pytest.fixture(scope="module")
def plans(checkpoints, tmp_path_factory) -> Callable:
    """Return a function: plans("8b", recipe, machine) -> plan of a dry run."""
    made = {}
    out = tmp_path_factory.mktemp("plans") / "out"

    def plan(name: str, recipe: Recipe | None = None, machine: str | None = None, **options):
        if name not in made:
            # The disk of this machine need not hold the result, because the plan is for another one.
            made[name] = dry_run(checkpoints[name], out, None, Options(calibration="python-docs", machine="h100"))
        base = made[name]
        return replace(base, recipe=recipe or Recipe(), options=replace(base.options, machine=machine, **options))

    return plan


@pytest.fixture(scope="module")
def predicted(plans) -> Callable[..., MachineDuration]:
    """Return a function: predicted("8b", "2xh100", effort) -> duration."""

    def predict(name: str, machine: str | Machine = "h100", effort: str = "default", **options) -> MachineDuration:
        recipe = Recipe(method="rtn") if effort == "rtn" else Recipe(**EFFORTS[effort])
        machine = machine if isinstance(machine, Machine) else parse_machine(machine)
        return predict_duration(plans(name, recipe, **options), machine)

    return predict


def machine_bound_by(**rates: float) -> Machine:
    """Return an H100 whose rates are all unlimited but these."""
    unlimited = {name: Rate(float("inf"), "test") for name in MACHINES["h100"].rates}
    return replace(MACHINES["h100"], **(unlimited | {name: Rate(value, "test") for name, value in rates.items()}))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_is_a_card_or_several_of_them():
    assert parse_machine("H100") == MACHINES["h100"]
    eight = parse_machine("8xa100-80gb")
    assert (eight.name, eight.cards, eight.title) == ("a100-80gb", 8, "8xa100-80gb")


@pytest.mark.parametrize("name", ["h1000", "", "0xh100", "9xh100", "xh100", "1.5xh100", "h100x8"])
def test_other_names_are_one_line(name, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "quantize", tmp_path, tmp_path / "out", "--dry-run", "--machine", name) == 2
    assert_one_line_error(capsys.readouterr().err, f"machine '{name}'", "use --machine")


def test_a_machine_needs_a_dry_run_and_no_device(tmp_path, monkeypatch, capsys):
    arguments = ("quantize", tmp_path, tmp_path / "out", "--machine", "h100")
    assert command(monkeypatch, *arguments) == 2
    assert_one_line_error(capsys.readouterr().err, "machine 'h100'", "add --dry-run")
    assert command(monkeypatch, *arguments, "--dry-run", "--device", "cpu") == 2
    assert_one_line_error(capsys.readouterr().err, "machine 'h100'", "leave out --device cpu")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_rate_has_a_source_and_every_machine_is_in_the_help_and_the_guide(machine, monkeypatch, capsys):
    for name, rate in machine.rates.items():
        known = rate.source.startswith(("NVIDIA ", "measured: ", "guess: "))
        assert known and rate.nominal > 0 and 0 < rate.efficiency <= 1, name
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "quantize", "--help") == 0
    assert machine.name in capsys.readouterr().out
    assert f"`{machine.name}`" in (ROOT / "llmquant" / "cli" / "README.md").read_text()


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cards", [1, 2, 3, 5, 8])
def test_cards_divide_samples_like_ranks(cards):
    for num_samples in (8, 100, 128):
        shares = [
            sum(piece_of(sample, num_samples) in Ranks(rank, cards).pieces for sample in range(num_samples))
            for rank in range(cards)
        ]
        assert largest_share(num_samples, cards) == max(shares)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(128, 512), (128, 4096), (256, 128), (64, 512), (8, 512)])
@pytest.mark.parametrize("cards", [1, 8])
def test_forward_passes_are_those_of_the_run(num_samples, seq_len, cards):
    plan = SimpleNamespace(
        options=SimpleNamespace(seq_len=seq_len), skeleton=SimpleNamespace(device=torch.device("cuda"))
    )
    own = range(largest_share(num_samples, cards))
    passes = block_loop._passes(plan, own, SimpleNamespace(num_samples=num_samples))
    model = SimpleNamespace(sequences=len(own), num_samples=num_samples, seq_len=seq_len)
    assert sum(_Model._passes.fget(model)) == len(passes)


# --- durations --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_factors_and_forward_passes_by_hand(predicted):
    llama = SHAPES["8b"]
    hidden, wide, blocks = llama["hidden_size"], llama["intermediate_size"], llama["num_hidden_layers"]
    # q, k, v; o; gate, up; down: Cholesky K^3 / 3 and the inverse of its factor, by halves, K^3 / 3.
    factors = blocks * 2 / 3 * (3 * hidden**3 + wide**3)
    steps = predicted("8b", machine_bound_by(float64=1e12)).block_steps
    assert steps["factors"] == pytest.approx(factors / 1e12)
    # Two passes per sample, and one that finds the structure of the block. The norms have 2 * hidden parameters.
    parameters = 2.5 * hidden**2 + 3 * hidden * wide + 2 * hidden
    steps = predicted("8b", machine_bound_by(bfloat16=1e12)).block_steps
    assert steps["forward"] == pytest.approx(blocks * (2 * 128 + 1) * 2 * parameters * 512 / (0.7 * 1e12))


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["rtn", *EFFORTS])
def test_no_faster_rate_makes_a_run_slower_and_all_together_make_it_faster(effort, predicted):
    base, before = MACHINES["l40s"], predicted("8b", "2xl40s", effort).seconds
    faster = {name: rate._replace(nominal=2 * rate.nominal) for name, rate in base.rates.items()}
    for name, rate in faster.items():
        after = predicted("8b", replace(base, cards=2, **{name: rate}), effort).seconds
        assert after <= before, name
        if effort == "best":
            assert after < before, name
    assert predicted("8b", replace(base, cards=2, **faster), effort).seconds < 0.75 * before


@pytest.mark.slow
def test_larger_models_and_more_effort_take_longer(predicted):
    for machine in ("h100", "8xh100", "rtx4090"):
        small, large = ([predicted(name, machine, effort) for effort in ("rtn", *EFFORTS)] for name in SHAPES)
        for durations in (small, large):
            seconds = [duration.seconds for duration in durations]
            assert seconds == sorted(seconds) and len(set(seconds)) == 4
        assert all(a.seconds_per_block < b.seconds_per_block for a, b in zip(small, large, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["default", "best"])
def test_more_cards_are_faster_but_do_not_divide_the_work_of_rank_0(effort, predicted):
    one, two, eight = (predicted("8b", name, effort) for name in ("h100", "2xh100", "8xh100"))
    assert one.seconds > two.seconds > eight.seconds > one.seconds / 8
    assert one.other_steps == two.other_steps == eight.other_steps
    slow = machine_bound_by(bfloat16=1e12)
    alone, shared = (predicted("8b", replace(slow, cards=cards), effort).block_steps["forward"] for cards in (1, 8))
    assert shared == pytest.approx(alone * (2 * 16 + 1) / (2 * 128 + 1))
    assert "exchange" not in one.block_steps and two.block_steps["exchange"] > 0
    assert (one.samples_per_card, two.samples_per_card, eight.samples_per_card) == (128, 64, 16)


@pytest.mark.slow
def test_twice_the_samples_double_the_statistics_but_not_the_solving(predicted):
    few, many = (predicted("8b", num_samples=samples).block_steps for samples in (128, 256))
    assert many["forward"] == pytest.approx(2 * few["forward"], rel=0.01)
    assert 1.8 * few["statistics"] < many["statistics"] <= 2 * few["statistics"]
    for step in ("factors", "corrections", "column loops", "digests and copies"):
        assert many[step] == few[step], step


@pytest.mark.slow
def test_a_slow_disk_is_hidden_until_it_is_slower_than_the_computation(predicted):
    base = MACHINES["h100"]
    fast, slow = (replace(base, disk_read=Rate(rate, "test")) for rate in (3e9, 1e8))
    copied = predicted("8b", replace(base, disk_read=Rate(float("inf"), "test"))).block_steps["reading"]
    assert predicted("8b", fast).block_steps["reading"] == copied
    waits = predicted("8b", slow)
    assert sum(waits.block_steps.values()) >= 2 * 32 * 218_112_000 / 1e8  # bytes of the blocks


@pytest.mark.slow
def test_the_time_of_awq_is_not_predicted(plans):
    with pytest.raises(UserError, match="machine '2xh100': the time of method 'awq'"):
        predict_duration(plans("8b", Recipe(method="awq")), parse_machine("2xh100"))


# --- memory and disk --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_that_of_the_gpu_and_not_of_this_process(plans):
    def memory(name, machine, effort="default"):
        return estimate_memory(plans(name, Recipe(**EFFORTS[effort]), machine))

    one = memory("8b", "h100")
    assert one.runtime_bytes == one.peak_so_far_bytes == 0
    assert memory("8b", "8xh100").peak_bytes < one.peak_bytes < memory("70b", "h100").peak_bytes
    # The factor of the 28672 inputs of down_proj alone takes more than the memory of an RTX 4090.
    assert memory("70b", "rtx4090").peak_bytes > 2 * 8 * 28672**2 > 0.5 * MACHINES["rtx4090"].memory_bytes
    assert memory("70b", "rtx4090").least_bytes > MACHINES["rtx4090"].memory_bytes
    # A larger GPU runs more tokens side by side for `best`.
    assert memory("8b", "h100", "best").peak_bytes < memory("8b", "h200", "best").peak_bytes


@pytest.mark.slow
def test_a_float16_model_computes_in_float16_on_a_gpu(tiny_model, tmp_path):
    options = Options(calibration="python-docs", num_samples=8, seq_len=32, dtype="float16", machine="h100")
    plan = dry_run(tiny_model("llama"), tmp_path / "out", None, options)
    assert on_machine(plan, MACHINES["h100"]).skeleton.dtype == torch.float16
    assert on_machine(plan, MACHINES["h100"]).skeleton.device.type == "cuda"
    assert plan.skeleton.device.type in ("cpu", "cuda")


@pytest.mark.slow
def test_the_disk_of_this_machine_does_not_matter(tiny_model, tmp_path, monkeypatch):
    from llmquant.estimates import disk

    monkeypatch.setattr(disk, "free_bytes", lambda out: 0)
    options = Options(calibration="python-docs", num_samples=8, seq_len=32)
    with pytest.raises(UserError, match="free some space"):
        dry_run(tiny_model("llama"), tmp_path / "out", None, options)
    dry_run(tiny_model("llama"), tmp_path / "out", None, replace(options, machine="h100"))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gigabytes", "verdict"),
    [
        (80, "fits in the 80 GB of h100"),
        (11, "only with a limit, such as --max-memory 9GB"),
        (5, "does not fit in the 5 GB of h100"),
    ],
)
def test_the_dry_run_says_whether_the_memory_is_enough(gigabytes, verdict, plans, monkeypatch, capsys, tmp_path):
    machine = replace(MACHINES["h100"], memory_bytes=gigabytes * 10**9)
    monkeypatch.setitem(MACHINES, "h100", machine)
    monkeypatch.setenv("COLUMNS", "200")
    plan = plans("8b", None, "h100")
    memory = estimate_memory(plan)
    assert 5e9 < memory.least_bytes < 11e9 < memory.peak_bytes < 80e9
    print_plan(plan, tmp_path / "out")
    text = " ".join(capsys.readouterr().out.split())
    assert verdict in text
    if gigabytes == 11:  # the advice is right
        limit = int(re.search(r"--max-memory (\d+)GB", text)[1]) * 10**9
        assert estimate_memory(plans("8b", None, "h100", max_memory_bytes=limit)).peak_bytes <= limit <= 11e9


@pytest.mark.slow
def test_dry_run_of_70_billion_parameters(checkpoints, tmp_path, monkeypatch, capsys):
    folder = checkpoints["70b"]
    files = [file.stat() for file in folder.glob("*.safetensors")]
    assert sum(file.st_size for file in files) > 140e9
    arguments = ("quantize", folder, tmp_path / "out", "--calibration", "python-docs", "--dry-run")
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, *arguments, "--machine", "2xh100") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "step on 2xh100 (predicted) s per block s in all share" in text
    assert (
        "all 80 blocks" in text
        and "a prediction from shapes, data sheets and guesses, not a measurement" in text
        and "fits in the 80 GB of h100" in text
    )
    assert "memory: 3 TB/s (measured: copies within the memory)" in text
    assert "each of 2 runs 64 samples or fewer" in text
    assert " free" not in text  # the disk of this machine
    assert command(monkeypatch, *arguments, "--machine", "rtx4090", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits_in_memory"] is False and result["peak_bytes"] > 24e9
    steps, of_block = result["predicted_seconds_of_steps"], result["predicted_seconds_of_steps_per_block"]
    assert sum(steps.values()) == pytest.approx(result["predicted_seconds"])
    assert all(steps[name] == pytest.approx(80 * seconds) for name, seconds in of_block.items())
    assert result["machine"]["rates_per_second"]["float64"]["source"].startswith("NVIDIA Ada")
    assert list(tmp_path.iterdir()) == []
