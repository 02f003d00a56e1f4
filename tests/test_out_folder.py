"""OUT is checked before any work: it must not overlap with inputs, must be writable, and must fit an unfinished run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_parts import contents
from commands import command

import llmquant
from llmquant.checkpoints.journal import CHECKPOINT, REPLACED, FileRecord
from llmquant.checkpoints.manifest import build_manifest
from llmquant.checkpoints.reader import file_sha256
from llmquant.checkpoints.unfinished import check_out_folder
from llmquant.checkpoints.writer import PartialCheckpoint
from llmquant.errors import UserError

RTN = ("--method", "rtn", "--no-verify", "--quiet", "--group-size", "32")
FEW = ("--effort", "fast", "--samples", "4", "--seq-len", "32", "--no-verify", "--quiet", "--group-size", "32")


@pytest.fixture
def place(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds a model. The home folder is beside it."""
    folder = tmp_path / "place"
    shutil.copytree(tiny_model("llama"), folder / "model")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def copy(source: str, target: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(folder / source, folder / target) and None


OVERLAPS: dict[str, tuple[Callable[[Path], None] | None, str, str, str]] = {
    "itself": (None, "model", "model", "model: this command reads it (as model)"),
    "itself, by another name": (None, "model/", "../place/./model", "model: this command reads it (as model)"),
    "a folder that holds it": (None, "model", "../place", "place: holds model, which this command reads"),
    "the current folder": (None, "model", ".", "place: holds model, which this command reads"),
    "the root": (None, "model", "/", "/: holds model, which this command reads"),
    "a link to it": (link("out", "model"), "model", "out", "out: this command reads it (as model)"),
    "what a link leads to": (link("m", "model"), "m", "model", "model: this command reads it (as m)"),
    "behind a link": (link("here", "."), "model", "here/model", "model: this command reads it (as model)"),
    "its partial folder": (copy("model", "m.partial"), "m.partial", "m", "m.partial: this command reads it"),
    "a folder in its partial folder": (
        copy("model", "m.partial/checkpoint"),
        "m.partial/checkpoint",
        "m",
        "m.partial: holds m.partial/checkpoint, which this command reads",
    ),
}
"""Case -> (preparation or None, MODEL, OUT, the error)."""


@pytest.mark.parametrize("flags", [(), ("--overwrite", "--restart"), ("--overwrite", "--dry-run")])
@pytest.mark.parametrize("case", OVERLAPS)
def test_out_that_is_or_holds_an_input_is_refused(case, flags, place, monkeypatch, capsys):
    prepare, model, out, message = OVERLAPS[case]
    if prepare is not None:
        prepare(place)
    before = contents(place)
    capsys.readouterr()
    assert command(monkeypatch, "quantize", model, out, *RTN, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.endswith("choose another OUT\n")
    assert error.count("\n") == 1 and "--overwrite" not in error
    assert contents(place) == before


def test_out_that_holds_the_target_of_a_linked_shard_is_refused(place, monkeypatch, capsys):
    store, weights = place / "store", place / "model" / "model.safetensors"
    store.mkdir()
    weights.rename(store / "w")
    record = FileRecord(bytes=(store / "w").stat().st_size, sha256=file_sha256(store / "w"))
    (store / "llmquant.json").write_bytes(build_manifest({}, {"w": record}))
    store.rename(place / "model" / "store")
    weights.symlink_to("store/w")
    for dry in ((), ("--dry-run",)):
        assert command(monkeypatch, "quantize", "model", "model/store", *RTN, "--overwrite", *dry) == 2
        assert "store: holds model/model.safetensors, which this command reads" in capsys.readouterr().err
    assert (place / "model" / "store" / "w").exists()


def test_out_that_holds_the_calibration_text_is_refused(place, monkeypatch, capsys):
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text("x = 1\n" * 999)
    arguments = ("--calibration", "texts/a.txt", *FEW, "--overwrite", "--dry-run")
    for out, message in (("texts", "texts: holds texts/a.txt"), ("texts/a.txt", "a.txt: this command reads it")):
        assert command(monkeypatch, "quantize", "model", out, *arguments) == 2
        assert message in capsys.readouterr().err
    assert command(monkeypatch, "quantize", "model", "texts/out", *arguments) == 0


def test_convert_and_the_python_api_refuse_an_overlap(place, monkeypatch, capsys):
    assert command(monkeypatch, "quantize", "model", "own", *RTN) == 0
    before = contents(place)
    for flags in ((), ("--overwrite", "--restart")):
        assert command(monkeypatch, "convert", "own", "./own/", "--format", "awq", *flags) == 2
        assert "own: this command reads it (as own); choose another OUT" in capsys.readouterr().err
    with pytest.raises(UserError, match="this command reads it"):
        llmquant.quantize("model", "model", llmquant.Recipe(method="rtn"), llmquant.Options(overwrite=True))
    assert contents(place) == before


def test_out_in_the_hub_cache_of_the_model_is_refused(place, monkeypatch, capsys):
    snapshot = place / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for index, file in enumerate(sorted((place / "model").iterdir())):
        shutil.copy(file, snapshot.parents[1] / "blobs" / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    before = contents(place)
    for out in (snapshot / "out", snapshot.parents[1] / "blobs", snapshot.parent, place / "hub"):
        assert command(monkeypatch, "quantize", snapshot, out, *RTN, "--overwrite") == 2
        assert "choose another OUT" in capsys.readouterr().err
    assert contents(place) == before
    assert command(monkeypatch, "quantize", snapshot, "out", *RTN) == 0
    assert {file.name for file in (place / "model").iterdir()} < {file.name for file in (place / "out").iterdir()}


def test_out_may_be_a_sub_folder_of_the_model(place, monkeypatch, capsys):
    before = contents(place / "model")
    assert command(monkeypatch, "quantize", "model", "model/q4", *RTN) == 0
    assert command(monkeypatch, "quantize", "model", "model/q4", *RTN, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["notes"] == []
    assert {name: content for name, content in contents(place / "model").items() if "q4/" not in name} == before


# --- locations -------------------------------------------------------------------------------------------------------


def unwritable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != folder)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/out", "file is not a folder"),
        ("file/deep/out", "file is not a folder"),
        ("dead", "dead: a link to nowhere; give the folder that it leads to"),
        ("loop/out", "loop is not a folder"),
        ("locked/out", "locked cannot be written; check its permissions"),
        ("locked/deep/out", "locked cannot be written; check its permissions"),
        ("n" * 248, "a name of more than 247 bytes"),
        ("n" * 256, "longer than a name may be"),
        ("n" * 300 + "/out", "longer than a name may be"),
        (os.fsdecode(b"\xff"), r"\udcff: holds bytes that are not UTF-8"),
        ("~no-such-user/out", "~no-such-user/out: no such user"),
        ("z", "z.partial: not a folder that llmquant made"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_location_that_is_not_usable_is_refused_before_any_work(out, message, flags, place, monkeypatch, capsys):
    (place / "file").write_text("mine")
    (place / "z.partial").write_text("mine")
    (place / "dead").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    (place / "locked").mkdir()
    unwritable(monkeypatch, place / "locked")
    monkeypatch.setattr("llmquant.pipeline.quantize.make_plan", lambda *a: pytest.fail("the model was opened"))
    before = sorted(place.rglob("*"))
    assert command(monkeypatch, "quantize", "model", out, *RTN, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_a_mount_point_and_the_current_folder_are_refused(place, monkeypatch):
    (place / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(UserError, match=r"disk: a mount point, .* choose a folder inside it"):
        check_out_folder("disk")
    monkeypatch.chdir(place / "disk")
    with pytest.raises(UserError, match="the current folder is in it"):
        check_out_folder(".")


def test_out_that_is_the_current_folder_is_not_replaced(place, monkeypatch, capsys):
    assert command(monkeypatch, "quantize", "model", "out", *RTN) == 0
    monkeypatch.chdir(place / "out")
    for dry in ((), ("--dry-run",)):
        assert command(monkeypatch, "quantize", "../model", "../out", *RTN, "--overwrite", *dry) == 2
        assert "out: the current folder is in it" in capsys.readouterr().err


@pytest.mark.slow
def test_an_empty_out_and_out_in_missing_folders_are_accepted(place, monkeypatch):
    (place / "empty").mkdir()
    for out in ("empty", "deep/er/out", "link/../other"):
        (place / "link").mkdir(exist_ok=True)
        assert command(monkeypatch, "quantize", "model", out, *RTN, "--dry-run") == 0
        assert not list((place / "empty").iterdir()) or out != "empty"
        assert command(monkeypatch, "quantize", "model", out, *RTN) == 0
        assert (place / out / "llmquant.json").exists()
    assert command(monkeypatch, "quantize", "model", "empty", *RTN) == 2


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path_argument(place, monkeypatch, capsys):
    home = Path(os.environ["HOME"])
    shutil.copytree(place / "model", home / "m")
    (home / "a.txt").write_text("x = 1\n" * 999)
    (home / "prompts.txt").write_text("x = 1\n")
    assert command(monkeypatch, "quantize", "~/m", "~/q", "--calibration", "~/a.txt", *FEW) == 0
    assert command(monkeypatch, "convert", "~/q", "~/awq", "--format", "awq", "--quiet") == 0
    assert command(monkeypatch, "verify", "~/awq") == 0
    assert command(monkeypatch, "report", "~/q", "--output", "~/q.html") == 0
    prompts = ("--prompts", "~/prompts.txt", "--max-new-tokens", "1", "--json", "--quiet", "--device", "cpu")
    assert command(monkeypatch, "generate", "~/q", *prompts) == 0
    evaluated = ("--dataset", "~/a.txt", "--seq-len", "32", "--windows", "1", "--device", "cpu", "--quiet", "--json")
    assert command(monkeypatch, "eval", "~/q", *evaluated) == 0
    report = llmquant.quantize(
        "~/m",
        "~/p",
        llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=32)),
        llmquant.Options(verify=False),
    )
    assert report.out == home / "p"
    assert {"q", "awq", "q.html", "p"} < {file.name for file in home.iterdir()}
    assert [file.name for file in place.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "arguments", [("inspect", "X"), ("report", "q", "--output", "X"), ("eval", "m", "--dataset", "X")]
)
def test_bytes_that_are_not_utf_8_are_a_one_line_error_in_every_command(arguments, place, monkeypatch, capsys):
    typed = [os.fsdecode(b"\xff") if argument == "X" else argument for argument in arguments]
    assert command(monkeypatch, *typed) == 2
    assert (
        capsys.readouterr().err == "llmquant: \\udcff: holds bytes that are not UTF-8; use another name, or rename it\n"
    )


# --- a dry run beside an unfinished run -----------------------------------------------------------------------------


def leave_unfinished(
    place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, stops_in: str = "extra_files"
) -> None:
    """Stop a run before it writes its shards (`extra_files`) or afterwards (`finish`), which leaves OUT.partial."""
    with monkeypatch.context() as patch:
        patch.setattr(f"llmquant.pipeline.quantize.{stops_in}", lambda *a: (_ for _ in ()).throw(UserError("stopped")))
        assert command(monkeypatch, "quantize", "model", "out", *arguments) == 2
    assert (place / "out.partial").exists()


def refusal_of_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error of a dry run, after checking that the run without --dry-run has the same."""
    errors = []
    for dry in (("--dry-run",), ()):
        capsys.readouterr()
        assert command(monkeypatch, "quantize", *arguments, *dry) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    return errors[0]


TEXT = ("--calibration", "python-docs", *FEW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "change"),
    [
        ((*TEXT, "--bits", "8"), "recipe.spec.bits was 4, is 8"),
        ((*TEXT, "--seed", "1"), "calibration.seed was 0, is 1"),
        ((*TEXT, "--skip", "*.o_proj"), "recipe.skip was [], is ['*.o_proj']"),
        (RTN, "recipe.method was 'gptq', is 'rtn'"),
    ],
)
def test_dry_run_refuses_an_unfinished_run_with_other_options_like_the_run(now, change, place, monkeypatch, capsys):
    leave_unfinished(place, monkeypatch, *TEXT)
    before = contents(place)
    error = refusal_of_both(monkeypatch, capsys, "model", "out", *now)
    assert "out.partial: left by a run with other options (" in error and change in error
    assert contents(place) == before
    assert command(monkeypatch, "quantize", "model", "out", *TEXT, "--dry-run") == 0
    assert command(monkeypatch, "quantize", "model", "out", *now, "--restart", "--dry-run") == 0
    assert contents(place) == before


@pytest.mark.slow
def test_dry_run_refuses_an_unfinished_run_with_another_model_or_text(place, monkeypatch, capsys):
    leave_unfinished(place, monkeypatch, *TEXT)
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "model.model.safetensors was '" in refusal_of_both(monkeypatch, capsys, "model", "out", *TEXT)
    # The real function downloads the first row from the hub.
    monkeypatch.setattr("llmquant.data.calibration.check_preset", lambda name, split: None)
    fetched = ("--calibration", "ptb", *FEW, "--dry-run")
    assert command(monkeypatch, "quantize", "model", "out", *fetched) == 2
    assert "calibration.source was 'python-docs', is 'ptb'" in capsys.readouterr().err


def test_dry_run_refuses_a_locked_or_damaged_unfinished_run(place, monkeypatch, capsys):
    with PartialCheckpoint.open(place / "out", {"a": 1}):
        assert f"process {os.getpid()} is writing it" in refusal_of_both(monkeypatch, capsys, "model", "out", *RTN)
    shutil.rmtree(place / "out.partial")
    leave_unfinished(place, monkeypatch, *RTN, stops_in="finish")
    shard = place / "out.partial" / CHECKPOINT / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model.safetensors: damaged since it was written" in refusal_of_both(
        monkeypatch, capsys, "model", "out", *RTN
    )
    (place / "out.partial" / "journal.json").write_text("{")
    assert "journal.json: damaged" in refusal_of_both(monkeypatch, capsys, "model", "out", *RTN)
    (place / "out.partial" / "diary").write_text("mine")
    for flags in ((), ("--restart",)):
        assert "(it holds diary)" in refusal_of_both(monkeypatch, capsys, "model", "out", *RTN, *flags)


def test_restart_does_not_lose_an_out_that_was_about_to_be_replaced(place, monkeypatch, capsys):
    assert command(monkeypatch, "quantize", "model", "out", *RTN) == 0
    before = contents(place / "out")
    leave_unfinished(place, monkeypatch, *RTN, "--bits", "8", "--overwrite", stops_in="finish")
    (place / "out").rename(place / "out.partial" / REPLACED)
    assert "replaced: the OUT that an unfinished run was about to replace" in refusal_of_both(
        monkeypatch, capsys, "model", "out", *RTN, "--restart"
    )
    (place / "out.partial" / REPLACED / "notes.md").write_text("mine")
    assert "out: holds more than llmquant wrote" in refusal_of_both(
        monkeypatch, capsys, "model", "out", *RTN, "--restart", "--overwrite"
    )
    assert {**before, "notes.md": b"mine"} == contents(place / "out.partial" / REPLACED)


# --- the other files that commands write -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("report", "out", "--output"), "out/config.json"),
        (("report", "out", "--output"), "mine.html"),
        (("report", "out", "--output"), "out"),
        (("bench", "out", "--plot"), "photo.png"),
        (("bench", "out", "--plot"), "folder.svg"),
        (("tune", "out", "--out"), "out/config.json"),
        (("tune", "out", "--out"), "mine.json"),
    ],
)
def test_a_file_that_a_command_did_not_write_is_not_overwritten(arguments, file, place, monkeypatch, capsys):
    assert command(monkeypatch, "quantize", "model", "out", *RTN) == 0
    for name in ("mine.html", "photo.png", "mine.json"):
        (place / name).write_text('{"entries": 1}')
    (place / "folder.svg").mkdir()
    before = contents(place)
    capsys.readouterr()
    assert command(monkeypatch, *arguments, file) == 2
    error = capsys.readouterr().err
    message = f"{file}: a folder" if (place / file).is_dir() else f"{file}: exists, and this command did not write it"
    assert message in error and error.count("\n") == 1
    assert contents(place) == before


@pytest.mark.slow
def test_pages_plots_and_tables_of_earlier_calls_are_replaced(place, monkeypatch):
    from llmquant.console.bench import PLOT_SUFFIXES, check_plot_path, plot_bench
    from llmquant.kernels.tiles import is_table, write_table
    from llmquant.report.page import check_page_path
    from llmquant.runtime.bench import BenchmarkResult, BenchmarkRun, Workload

    page = '<!doctype html>\n<html lang="en">\n<title>m: good · llmquant</title>'
    monkeypatch.setattr("llmquant.report.page.page", lambda report: page)
    assert command(monkeypatch, "quantize", "model", "out", *RTN) == 0
    for _ in range(2):
        assert command(monkeypatch, "report", "out") == 0
        assert command(monkeypatch, "report", "out", "--output", "page.html") == 0
    check_page_path(place / "page.html")
    values = dict.fromkeys(BenchmarkRun.__dataclass_fields__, 1.0) | {"model": "m", "kernel": "cpu"}
    bench = BenchmarkResult(
        runs=(BenchmarkRun(**values),), against=None, workload=Workload(), device="cpu", dtype="float32", torch="2"
    )
    for suffix in PLOT_SUFFIXES:
        plot_bench(bench, place / f"plot{suffix}")
        check_plot_path(place / f"plot{suffix}")
    write_table(place / "table.json", {"entries": {}, "dense_from_rows": {}})
    assert is_table((place / "table.json").read_bytes())
