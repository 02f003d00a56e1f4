"""The plan refuses checkpoints that a requested engine does not load, and names the linear, the rule and the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from commands import command

from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.pipeline.quantize import dry_run
from llmquant.planning.engines import ENGINES, RULES_DATE, check_engines
from llmquant.spec import Options, Override, QuantSpec, Recipe

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
SAFE = QuantSpec(group_size=64)


@pytest.fixture(scope="module")
def plan_of(tiny_model, tmp_path_factory):
    """(recipe, options) -> the plan of a model whose sizes every kernel supports, without engines."""
    import torch

    model = tiny_model("llama", dtype=torch.bfloat16, **WIDE)
    out = tmp_path_factory.mktemp("engines") / "out"

    def plan_with(format="gptq", spec=SAFE, overrides=(), skip=(), **options):
        recipe = Recipe(method="rtn", spec=spec, overrides=overrides, skip=skip)
        plan = dry_run(model, out, recipe, Options(format=format))
        return replace(plan, options=Options(format=format, **options))

    return plan_with


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("format", FORMATS)
def test_4_bit_checkpoint_of_group_size_64_is_loaded_by_every_engine(engine, format, plan_of):
    if format == "gptq_v2":
        with pytest.raises(UserError, match=r"format gptq_v2: .* loads gptq, awq.*; use --format gptq"):
            check_engines(plan_of(format, engines=(engine,)))
    else:
        check_engines(plan_of(format, engines=(engine,), tensor_parallel=1))


ASYM = QuantSpec(group_size=64, symmetric=False)
G16, G64_8 = QuantSpec(group_size=16), {"bits": 8, "group_size": 64}
HEAD, Q_PROJ = (Override(pattern="lm_head", bits=8),), (Override(pattern="*.q_proj", bits=8),)
REFUSED = [
    (
        "vllm",
        "gptq",
        {"spec": ASYM},
        r"q_proj \(and 13 more\): vLLM 0.33 loads gptq with 4-bit sym, 8-bit sym, and this linear is 4-bit g64 asym; "
        "use --format compressed-tensors",
    ),
    ("sglang", "gptq", {"spec": ASYM}, "SGLang 0.5.23 loads gptq with"),
    ("vllm", "gptq", {"spec": QuantSpec(bits=3, group_size=64)}, "this linear is 3-bit g64 sym; use --bits 4"),
    ("vllm", "gptq", {"spec": QuantSpec(bits=2, group_size=64)}, "this linear is 2-bit g64 sym"),
    ("sglang", "compressed-tensors", {"spec": QuantSpec(bits=3, group_size=64)}, "loads compressed-tensors with 4-bit"),
    ("vllm", "compressed-tensors", {"spec": QuantSpec(symmetric=False, **G64_8)}, "8-bit g64 asym"),
    ("vllm", "gptq", {"spec": G16}, "kernels for group sizes -1, 32, 64, 128, and this linear is 4-bit g16"),
    ("sglang", "awq", {"spec": G16}, "use --group-size 64"),
    (
        "vllm",
        "gptq",
        {"overrides": Q_PROJ},
        r"0\.self_attn\.k_proj \(and 3 more\): vLLM 0.33 runs q_proj, k_proj, v_proj as one qkv_proj, and this linear "
        "is 4-bit g64 sym beside 8-bit g64 sym; give all of them one --override",
    ),
    (
        "sglang",
        "compressed-tensors",
        {"skip": ("*.up_proj",)},
        r"0\.mlp\.up_proj \(and 1 more\): .* gate_up_proj, and this linear is 16 bit beside 4-bit g64 sym",
    ),
    (
        "transformers",
        "gptq",
        {"skip": ("*.1.mlp.up_proj",)},
        r"1\.mlp\.up_proj: transformers 5.23 loads one grid for all linears in gptq, and this linear is 16 bit .* --f",
    ),
    ("transformers", "gptq", {"overrides": HEAD}, "lm_head: .* cannot load a quantized head"),
    ("vllm", "compressed-tensors", {"overrides": HEAD}, "--skip 'lm_head'"),
    (
        "vllm",
        "gptq",
        {"tensor_parallel": 8},
        r"o_proj \(and 3 more\): .* splits its 128 inputs over 8 ranks, and a group of 64 would straddle two of them; "
        "use a --group-size that divides 16",
    ),
    ("sglang", "awq", {"tensor_parallel": 3}, "that divides 42.6667"),
]


@pytest.mark.parametrize(("engine", "format", "arguments", "message"), REFUSED)
def test_checkpoint_that_an_engine_does_not_load_is_refused(engine, format, arguments, message, plan_of):
    with pytest.raises(UserError, match=message) as error:
        check_engines(plan_of(format, engines=(engine,), **arguments))
    assert f"rules of {RULES_DATE}" in str(error.value) and "\n" not in str(error.value)
    check_engines(plan_of(format, **arguments | {"tensor_parallel": 1}))


def test_one_grid_per_fused_set_is_enough(plan_of):
    eight = (Override(pattern="*.[qkv]_proj", bits=8), Override(pattern="*.mlp.*", group_size=32))
    for engine in ("vllm", "sglang"):
        for format in ("gptq", "compressed-tensors"):
            check_engines(plan_of(format, overrides=eight, engines=(engine,), tensor_parallel=2))
    check_engines(plan_of("gptq", overrides=(Override(pattern="lm_head", bits=8),), engines=("vllm", "sglang")))


def test_sizes_without_a_kernel_are_refused(tiny_model, tmp_path):
    narrow = tiny_model("llama")  # hidden 64, feed-forward 96
    for options, message in (
        (
            Options(engines=("sglang",)),
            "needs in_features to be a multiple of 128 in 4-bit gptq, and it is 64; "
            "use --format compressed-tensors, or --sk",
        ),
        (Options(engines=("vllm",), format="compressed-tensors"), "dtype float32: .* use --dtype bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run(narrow, tmp_path / "out", Recipe(method="rtn", spec=QuantSpec(group_size=32)), options)
    eight = Recipe(method="rtn", spec=QuantSpec(bits=8, group_size=32))
    with pytest.raises(UserError, match="8-bit gptq"):
        dry_run(narrow, tmp_path / "out", eight, Options(engines=("vllm",)))
    dry_run(narrow, tmp_path / "out", replace(eight, spec=QuantSpec(group_size=32)), Options(engines=("vllm",)))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_row_parallel_linears_are_known_with_and_without_a_tp_plan(architecture, tiny_model, tmp_path):
    recipe = Recipe(method="rtn", spec=QuantSpec(group_size=32))
    refusal = {"llama": r"self_attn\.o_proj \(and 3 more\)", "opt": r"self_attn\.out_proj \(and 1 more\)"}[architecture]
    with pytest.raises(UserError, match=refusal):
        dry_run(tiny_model(architecture), tmp_path / "out", recipe, Options(engines=("vllm",), tensor_parallel=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tgi"], "engine 'tgi': not one of vllm, sglang, transformers"),
        (["--tensor-parallel", "0", "--engine", "vllm"], "tensor_parallel 0: must be at least 1"),
        (
            ["--tensor-parallel", "2"],
            "tensor_parallel 2: no requested engine supports tensor parallelism; add --engine vllm or",
        ),
        (["--tensor-parallel", "2", "--engine", "transformers"], "no requested engine supports tensor parallelism"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_engines_are_checked_by_a_run_and_by_a_dry_run(
    options, message, dry, tiny_model, tmp_path, monkeypatch, capsys
):
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", "--method", "rtn", "--group-size", "32"]
    assert command(monkeypatch, *arguments, *options, *dry) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_the_requested_engines_and_the_packages_they_need(tiny_model, tmp_path, monkeypatch, capsys):
    options = ("--method", "rtn", "--group-size", "32", "--dry-run")
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", *options]
    assert command(monkeypatch, *arguments, "--engine", "vllm", "--engine", "transformers") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"engine vLLM 0.33 loads the result, by its rules of {RULES_DATE}" in text
    assert "transformers 5.23 needs optimum and gptqmodel for this format" in text


def test_the_old_name_of_the_engine_option_still_works(tiny_model, tmp_path, monkeypatch, capsys):
    options = ("--method", "rtn", "--group-size", "32", "--dry-run")
    arguments = ["quantize", tiny_model("llama"), tmp_path / "out", *options]
    assert command(monkeypatch, *arguments, "--target", "sglang", "--engine", "vllm") == 2
    old_and_new = capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--engine", "vllm", "--engine", "sglang") == 2
    assert old_and_new == capsys.readouterr().err and old_and_new
