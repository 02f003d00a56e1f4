"""Mixed precision: overrides give some linears another grid, in every format that can store it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
from commands import command
from transformers import AutoModelForCausalLM

from llmquant.checkpoints.quantized import parsed_quantization, validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.formats.fused import fused_sets
from llmquant.formats.registry import FORMATS, parse_quantization_config
from llmquant.pipeline.output import quantization_config
from llmquant.pipeline.quantize import dry_run, quantize
from llmquant.runtime.linear import QuantizedLinear
from llmquant.runtime.load import load
from llmquant.spec import Options, Override, QuantSpec, Recipe

GROUP_32 = QuantSpec(group_size=32)
FEW = Options(calibration="python-docs", num_samples=4, seq_len=32, verify=False)
QUICK = Options(verify=False)
MIXED = (Override(pattern="*.self_attn.?_proj", bits=8), Override(pattern="*.1.mlp.*", group_size=16))


def rtn(*overrides: Override, **fields: object) -> Recipe:
    return Recipe(method="rtn", spec=GROUP_32, overrides=overrides, **fields)  # type: ignore[arg-type]


# --- parsing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("*.down_proj:bits=8", Override(pattern="*.down_proj", bits=8)),
        (
            "a:b.*:bits=8, group_size=-1, asym",
            Override(pattern="a:b.*", bits=8, group_size=-1, symmetric=False),
        ),
        ("lm_head:sym", Override(pattern="lm_head", symmetric=True)),
        ("*:skip", Override(pattern="*", skip=True)),
    ],
)
def test_an_override_is_parsed_and_printed_in_the_form_of_the_command_line(text, override):
    assert Override.parse(text) == override
    assert Override.parse(str(override).removeprefix("--override '").removesuffix("'")) == override


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.down_proj", "'\\*.down_proj' is none of"),
        ("*.down_proj:", "'' is none of"),
        (":bits=8", "override '': must change"),
        ("*:bits=eight", "'bits=eight' is none of"),
        ("*:bits", "'bits' is none of"),
        ("*:bits=5", "override '\\*': bits 5: not one of"),
        ("*:group_size=0", "override '\\*': group_size 0"),
        ("*:sym=1", "'sym=1' is none of"),
        ("*:sym,asym", "symmetric is given twice"),
        ("*:bits=8,bits=4", "bits is given twice"),
        ("*:bits=8,skip", "and not both"),
        ("*:method=rtn", "'method=rtn' is none of"),
    ],
)
def test_bad_overrides_are_one_line(text, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=message) as error:
        Override.parse(text)
    assert "\n" not in str(error.value)
    assert command(monkeypatch, "quantize", tmp_path, tmp_path / "out", "--override", text) == 2
    assert capsys.readouterr().err == f"llmquant: {error.value}\n"


def test_the_last_matching_override_wins_field_by_field():
    recipe = Recipe(
        overrides=(
            Override(pattern="*.mlp.*", bits=8, group_size=64),
            Override(pattern="*.down_proj", bits=3),
            Override(pattern="*.up_proj", skip=True),
            Override(pattern="*.1.*", symmetric=False),
        )
    )
    assert recipe.spec_of("0.q_proj") == QuantSpec()
    assert recipe.spec_of("0.mlp.down_proj") == QuantSpec(bits=3, group_size=64)
    assert recipe.spec_of("0.mlp.up_proj") is None
    assert recipe.spec_of("a.1.mlp.up_proj") == QuantSpec(bits=8, group_size=64, symmetric=False)


def test_an_override_is_plain_data():
    recipe = Recipe(overrides=MIXED)
    assert hash(recipe) == hash(Recipe(overrides=tuple(Override(**each) for each in asdict(recipe)["overrides"])))
    assert json.loads(json.dumps(asdict(recipe)))["overrides"][0]["bits"] == 8
    assert {field.name for field in fields(Override)} >= {field.name for field in fields(QuantSpec)}


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "method"), [("gptq", "gptq"), *((name, "rtn") for name in FORMATS if name != "awq")]
)
def test_mixed_precision_is_stored_and_runs(format, method, tiny_model, tmp_path):
    out = tmp_path / "out"
    recipe = Recipe(method=method, spec=GROUP_32, overrides=(*MIXED, Override(pattern="lm_head", bits=8)))
    report = quantize(tiny_model("llama"), out, recipe, Options(**asdict(FEW) | {"format": format}))
    assert not report.fallbacks
    modules = validate_quantized(CheckpointReader(out))
    assert modules["model.layers.0.self_attn.v_proj"].spec == QuantSpec(bits=8, group_size=32)
    assert modules["model.layers.0.mlp.up_proj"].spec == GROUP_32
    assert modules["model.layers.1.mlp.up_proj"].spec == QuantSpec(group_size=16)
    assert modules["lm_head"].spec == QuantSpec(bits=8, group_size=32)
    assert [note.where for note in report.notes] == (["lm_head", "calibration"] if method == "gptq" else [])
    model = load(out, device="cpu", backend="torch", dtype="float32")
    assert isinstance(model.lm_head, QuantizedLinear)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = model(tokens).logits
        reference = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))(tokens).logits
    assert 0 < (logits - reference).norm() / reference.norm() < 0.5


def test_awq_refuses_mixed_precision_in_the_plan(tiny_model, tmp_path):
    with pytest.raises(
        UserError, match=r"^model\.layers\.1\.mlp\.gate_proj: 4-bit g16 sym beside .*compressed-tensors"
    ):
        dry_run(tiny_model("llama"), tmp_path / "out", rtn(MIXED[1]), Options(format="awq"))
    with pytest.raises(UserError, match=r"q_proj: --override '\*.self_attn.\?_proj:bits=8': bits 8: the AWQ format"):
        dry_run(tiny_model("llama"), tmp_path / "out", rtn(MIXED[0]), Options(format="awq"))


def test_an_asymmetric_override_decides_the_default_format(tiny_model, tmp_path):
    recipe = rtn(Override(pattern="*.o_proj", symmetric=False))
    assert dry_run(tiny_model("llama"), tmp_path / "out", recipe).format.name == "compressed-tensors"


@pytest.mark.parametrize(
    ("overrides", "fields", "message"),
    [
        ((Override(pattern="*.nonesuch", bits=8),), {}, r"override pattern '\*\.nonesuch': matches no linear"),
        (
            (Override(pattern="*", bits=3, group_size=-1),),
            {},
            "--override '.*bits=3,group_size=-1': out_features 72 .* 32",
        ),
    ],
)
def test_impossible_overrides_are_refused_in_the_plan(overrides, fields, message, tiny_model, tmp_path):
    model = tiny_model("llama", intermediate_size=72)
    with pytest.raises(UserError, match=message):
        dry_run(model, tmp_path / "out", rtn(*overrides, **fields))


def test_a_tied_head_is_refused_with_the_option_to_skip_it(tiny_model, tmp_path):
    tied = tiny_model("qwen2")
    everything = Override(pattern="*", bits=8)
    with pytest.raises(
        UserError, match=r"^lm_head: .* shares its weight 'model.embed_tokens.weight' .*\(--skip 'lm_head'"
    ):
        dry_run(tied, tmp_path / "out", rtn(everything))
    plan = dry_run(tied, tmp_path / "out", rtn(everything, skip=("lm_head",)))
    assert {linear.quant_spec.bits for linear in plan.quantized} == {8}


@pytest.mark.parametrize("format", FORMATS)
def test_a_tied_head_is_listed_as_unquantized_by_its_own_name(format, tiny_model, tmp_path):
    """A loader that replaces every Linear would otherwise look for packed weights of the head."""
    quantize(tiny_model("qwen2"), tmp_path / "out", rtn(), Options(format=format, verify=False))
    assert parsed_quantization(CheckpointReader(tmp_path / "out")).spec_of("lm_head") is None


def test_the_head_rounded_in_row_blocks_has_the_same_codes(tiny_model, tmp_path, monkeypatch):
    from llmquant.solver import quantize_linear as solve

    head = Override(pattern="lm_head", bits=8)
    whole = quantize(tiny_model("llama"), tmp_path / "whole", rtn(head), QUICK)
    monkeypatch.setattr(solve, "ROWS_AT_ONCE", 100)
    pieces = quantize(tiny_model("llama"), tmp_path / "pieces", rtn(head), QUICK)
    assert [linear.digest for linear in whole.linears] == [linear.digest for linear in pieces.linears]
    assert whole.linears[0].name == "lm_head"


def test_a_continued_run_reports_the_head_too(tiny_model, tmp_path):
    class Died(Exception):
        pass

    def die(progress):
        if progress.done == 1:
            raise Died

    recipe = rtn(Override(pattern="lm_head", bits=8))
    whole = quantize(tiny_model("llama"), tmp_path / "whole", recipe, QUICK)
    with pytest.raises(Died):
        quantize(tiny_model("llama"), tmp_path / "out", recipe, QUICK, on_progress=die)
    continued = quantize(tiny_model("llama"), tmp_path / "out", recipe, QUICK)
    assert continued.linears == whole.linears and whole.linears[0].name == "lm_head"


def test_dry_run_predicts_the_size(tiny_model, tmp_path):
    recipe = rtn(*MIXED, Override(pattern="lm_head", bits=8))
    plan = dry_run(tiny_model("llama"), tmp_path / "out", recipe)
    report = quantize(tiny_model("llama"), tmp_path / "out", recipe, QUICK)
    assert plan.bits_per_weight == report.bits_per_weight
    assert 0 <= report.output_bytes - plan.output_bytes < 10_000


def test_the_most_frequent_grid_is_the_default(tiny_model, tmp_path):
    """transformers' gptq loader ignores exceptions and AWQ has none, so linears must have the default grid."""
    for format in FORMATS:
        model = tiny_model("llama", intermediate_size=192)
        plan = dry_run(model, tmp_path / "out", Recipe(method="rtn"), Options(format=format))
        parsed = parse_quantization_config(quantization_config(plan))
        assert parsed.default.group_size == 64, format


def test_all_linears_share_the_group_size_if_one_needs_smaller_groups(tiny_model, tmp_path):
    """Hidden size 128 fits groups of 128, and intermediate size 192 only groups of 64."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=192, head_dim=32)

    def sizes(**options):
        plan = dry_run(model, tmp_path / "out", Recipe(method="rtn", overrides=overrides), Options(**options))
        return {linear.kind.rpartition(".")[2]: linear.quant_spec.group_size for linear in plan.quantized}

    overrides = ()
    for format in ("gptq", "gptq_v2", "awq"):
        assert set(sizes(format=format).values()) == {64}, format
    assert set(sizes(engines=("transformers",)).values()) == {64}
    assert sizes(format="compressed-tensors") == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 128
    ) | {"down_proj": 64}
    # A group size from an override is kept, and does not affect the other linears.
    overrides = (Override(pattern="*.down_proj", group_size=32),)
    assert sizes()["down_proj"] == 32 and sizes()["q_proj"] == 128


def test_gptq_exceptions_contain_the_fused_names_that_engines_look_up():
    spec, eight = QuantSpec(), QuantSpec(bits=8)
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkv"]
    mixed = dict.fromkeys(names, eight) | {"model.layers.0.mlp.gate_proj": spec, "model.layers.0.mlp.up_proj": eight}
    parsed = FORMATS["gptq"].parse(FORMATS["gptq"].config(spec, mixed))
    assert parsed.spec_of("model.layers.1.self_attn.qkv_proj") == eight
    assert parsed.spec_of("model.layers.0.mlp.gate_up_proj") == spec
    assert list(fused_sets(mixed)) == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
    ]
