"""Each format writes and reads its `quantization_config`, reads other tools', and refuses bad ones in one line."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmquant.errors import UserError
from llmquant.formats import awq, compressed_tensors, gptq
from llmquant.formats.patterns import MatchTimer, Pattern, is_excessive
from llmquant.formats.registry import FORMATS, parse_quantization_config
from llmquant.spec import SUPPORTED_BITS, QuantSpec

ALL_FORMATS = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))

LINEARS = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.gate", "mlp.down_proj")]


@ALL_FORMATS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [128, -1])
def test_configuration_round_trips(format, symmetric, group_size):
    spec = QuantSpec(bits=4, group_size=group_size, symmetric=symmetric)
    specs: dict[str, QuantSpec | None] = dict.fromkeys(LINEARS, spec) | {"lm_head": None}
    parsed = parse_quantization_config(format.config(spec, specs))
    assert parsed.format is format
    if format.name == "awq":
        # AWQ stores zero-points for symmetric grids too, and its configuration cannot express a symmetric grid.
        spec = QuantSpec(bits=4, group_size=group_size, symmetric=False)
    assert parsed.default == spec
    assert {name: parsed.spec_of(name) for name in specs} == {name: s and spec for name, s in specs.items()}


@pytest.mark.slow
@ALL_FORMATS
@given(data=st.data())
def test_mixed_precision_round_trips_or_is_refused(format, data):
    choices = [
        QuantSpec(bits=4, group_size=64, symmetric=False),
        QuantSpec(bits=8, group_size=32, symmetric=False),
        None,
    ]
    if format.name == "awq":
        choices.pop(1)
    per_kind = data.draw(st.lists(st.sampled_from(choices), min_size=3, max_size=3))
    specs = {name: per_kind[i % 3] for i, name in enumerate(LINEARS)}
    specs |= data.draw(st.dictionaries(st.sampled_from([*LINEARS, "lm_head"]), st.sampled_from(choices), max_size=4))
    default = next((spec for spec in specs.values() if spec is not None), choices[0])
    assert default is not None
    try:
        config = format.config(default, specs)
    except UserError as error:
        assert format.name == "awq" and "substring" in str(error)
        return
    parsed = parse_quantization_config(config)
    assert {name: parsed.spec_of(name) for name in specs} == specs


def test_mixed_precision_in_awq_is_refused_by_name():
    spec = QuantSpec(bits=4, group_size=64)
    with pytest.raises(UserError, match=r"^b: 4-bit g32 sym beside 4-bit g64 sym: .*compressed-tensors"):
        FORMATS["awq"].config(spec, {"a": spec, "b": QuantSpec(bits=4, group_size=32)})


def test_gptq_exceptions_are_short_and_do_not_overmatch():
    spec, eight = QuantSpec(), QuantSpec(bits=8)
    specs: dict[str, QuantSpec | None] = {name: eight if name.endswith("down_proj") else spec for name in LINEARS}
    specs["model.layers.1.mlp.gate"] = None
    config = FORMATS["gptq"].config(spec, specs)
    assert config["dynamic"] == {
        r"-:^(?:model\.layers\.1\.mlp\.gate)$": {},
        r"+:^(?:model\.layers\.\d+\.mlp\.down_proj)$": {"bits": 8},
    }
    assert parse_quantization_config(config).spec_of("model.layers.11.mlp.gate") == spec


def test_mixed_compressed_tensors_never_targets_the_class():
    spec, eight = QuantSpec(), QuantSpec(bits=8)
    groups = FORMATS["compressed-tensors"].config(spec, {"a": spec, "b": eight, "c": None})["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a"], ["b"]]


@pytest.mark.parametrize("name", FORMATS)
def test_configuration_is_the_documented_one(name):
    spec = QuantSpec(bits=4, group_size=128, symmetric=True)
    config = FORMATS[name].config(spec, {"model.layers.0.q": spec, "lm_head": None})
    quantizer = config.get("meta", {}).pop("quantizer", ["llmquant:"])
    assert quantizer[0].startswith("llmquant:")
    gptq = {
        "quant_method": "gptq",
        "checkpoint_format": name,
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {},
    }
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }
    expected = {
        "gptq": gptq,
        "gptq_v2": gptq,
        "awq": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        },
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "output_activations": None,
                    "weights": weights,
                }
            },
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        },
    }
    assert config == expected[name]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}


def compressed(weights: dict[str, object] | None = None, **keys: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {})}
    config: dict[str, object] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return config | {"format": "pack-quantized", "ignore": ["lm_head"]} | keys


@pytest.mark.parametrize(
    ("config", "module", "spec"),
    [
        (GPTQ, "model.layers.0.q", QuantSpec()),
        (GPTQ, "lm_head", None),
        (GPTQ | {"lm_head": True}, "lm_head", QuantSpec()),
        (GPTQ | {"dynamic": {"+:.*q$": {"bits": 8, "group_size": 32}}}, "a.q", QuantSpec(bits=8, group_size=32)),
        (GPTQ | {"dynamic": {".*q$": {"sym": False}}}, "a.q", QuantSpec(symmetric=False)),
        (GPTQ | {"dynamic": {"-:.*vision": {}, "+:.*": {"bits": 2}}}, "a.vision.q", None),
        (GPTQ | {"dynamic": {"-:vision": {}}}, "a.vision.q", QuantSpec()),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q"], ["mlp.up"]]}, "l.0.self_attn.k", None),
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q"], ["mlp.up"]]}, "l.0.mlp.up", QuantSpec()),
        (GPTQ | {"checkpoint_format": "gptq_v2", "damp_percent": 0.05, "future": None}, "a", QuantSpec()),
        ({"bits": 4, "group_size": -1, "desc_act": True}, "a", QuantSpec(group_size=-1)),
        (AWQ, "a", QuantSpec(symmetric=False)),
        (AWQ | {"zero_point": False, "sym": True, "version": "GEMM"}, "a", QuantSpec()),
        (AWQ | {"modules_to_not_convert": ["visual", "lm_head"]}, "model.visual.q", None),
        ({"w_bit": 4, "q_group_size": 64, "zero_point": True}, "a", QuantSpec(group_size=64, symmetric=False)),
        (compressed(), "a", QuantSpec()),
        (compressed(), "lm_head", None),
        (compressed(ignore=["re:.*lm_head", "re:visual.*"]), "visual.q", None),
        (compressed({"strategy": "channel", "group_size": None}), "a", QuantSpec(group_size=-1)),
        (compressed({"symmetric": False, "num_bits": 8, "observer": "mse"}), "a", QuantSpec(bits=8, symmetric=False)),
        (compressed({"actorder": "static"}, sparsity_config={}, transform_config={}, version="0.12"), "a", QuantSpec()),
    ],
)
def test_configurations_of_other_tools_are_read(config, module, spec):
    assert parse_quantization_config(config).spec_of(module) == spec


def test_names_come_before_classes_in_config_groups():
    groups = {
        "group_0": {"targets": ["Linear"], "weights": WEIGHTS},
        "group_1": {"targets": ["re:.*down$"], "weights": WEIGHTS | {"num_bits": 8}},
    }
    parsed = parse_quantization_config(compressed(config_groups=groups))
    assert parsed.spec_of("a.down") == QuantSpec(bits=8) and parsed.spec_of("a.up") == QuantSpec()


@pytest.mark.parametrize(
    ("config", "act_order_groups"),
    [
        (GPTQ | {"desc_act": True}, True),
        (GPTQ, False),
        (compressed({"actorder": "group"}), True),
        (compressed({"actorder": "weight"}), False),
    ],
)
def test_act_order_groups_are_read_from_the_configuration(config, act_order_groups):
    grid = parse_quantization_config(config).grid_of("a")
    assert grid is not None and grid.act_order_groups is act_order_groups


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no quant_method"),
        ({"zero_point": True, "desc_act": False, "bits": 4}, "fit awq and gptq"),
        ({"quant_method": "gptq_v2"}, "quant_method 'gptq_v2' cannot be read"),
        ({"quant_method": "bitsandbytes"}, "supported: gptq, awq, compressed-tensors"),
        ({"quant_method": ["gptq"]}, "cannot be read"),
        (GPTQ | {"bits": 5}, "bits 5"),
        (GPTQ | {"bits": "4"}, "bits '4'"),
        (GPTQ | {"bits": True}, "bits True"),
        (GPTQ | {"bits": [4]}, r"bits \[4\]"),
        ({"quant_method": "gptq", "bits": 4}, "group_size is missing"),
        (GPTQ | {"group_size": 0}, "group_size 0"),
        (GPTQ | {"group_size": -2}, "group_size -2"),
        (GPTQ | {"group_size": 128.0}, "group_size 128.0"),
        (GPTQ | {"sym": "yes"}, "sym 'yes'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format"),
        (GPTQ | {"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        (GPTQ | {"zero_point": True}, "'zero_point' is a key of awq"),
        (GPTQ | {"config_groups": {}}, "'config_groups' is a key of compressed-tensors"),
        (GPTQ | {"rotation": "hadamard"}, "unknown key 'rotation'"),
        (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "not a regular expression"),
        (GPTQ | {"dynamic": {"a": {"bits": 7}}}, "dynamic 'a': bits 7"),
        (GPTQ | {"dynamic": {"a": {"bites": 8}}}, "unknown key 'bites'"),
        (GPTQ | {"dynamic": {"a": 8}}, "must be an object of overrides"),
        (GPTQ | {"dynamic": ["a"]}, "dynamic"),
        (GPTQ | {"modules_in_block_to_quantize": [[1]]}, "list of strings"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"group_size": 0}, "group_size 0"),
        (AWQ | {"w_bit": 3}, "bits 4 contradicts w_bit 3"),
        (AWQ | {"sym": True}, "zero_point True contradicts sym True"),
        (AWQ | {"desc_act": True}, "desc_act"),
        (AWQ | {"dynamic": {}}, "'dynamic' is a key of gptq"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "list of strings"),
        (compressed({"num_bits": 6}), "bits 6"),
        (compressed({"type": "float"}), "integer"),
        (compressed({"dynamic": True}), "static"),
        (compressed({"strategy": "tensor"}), "strategy 'tensor'"),
        (compressed({"strategy": "channel"}), "group_size 128 contradicts strategy channel"),
        (compressed({"group_size": -1}), "group_size -1 contradicts"),
        (compressed({"group_size": 0}), "group_size 0"),
        (compressed({"group_size": None}), "group_size None"),
        (compressed({"actorder": "sideways"}), "actorder 'sideways'"),
        (compressed(format="int-quantized"), "format 'int-quantized'"),
        (compressed(format="mixed-precision"), "format None"),
        (compressed(quantization_status="initialized"), "quantization_status"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (compressed(config_groups={}), "config_groups"),
        (compressed(config_groups={"g": {"targets": ["Linear"]}}), "weights None"),
        (compressed(config_groups={"g": {"targets": "Linear", "weights": WEIGHTS}}), "list of strings"),
        (compressed(ignore=["re:("]), "not a regular expression"),
        (compressed(desc_act=False), "'desc_act' is a key of gptq"),
        (compressed(future_key=3), "unknown key 'future_key'"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        parse_quantization_config(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text("ab:(*-", max_size=4),
        st.sampled_from(["Linear", "re:(", "gptq"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["bits", "-:a", "+:(", "group_size"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(data=st.data(), base=st.sampled_from([GPTQ, AWQ, compressed()]))
def test_any_json_is_read_or_refused_in_one_line(data, base):
    known = sorted(gptq.KNOWN_KEYS | awq.KNOWN_KEYS | compressed_tensors.KNOWN_KEYS)
    config = base | data.draw(st.dictionaries(st.sampled_from(known), JSON, max_size=3))
    if "config_groups" in base and data.draw(st.booleans()):
        group_keys = sorted(compressed_tensors.GROUP_KEYS)
        group = {"targets": ["Linear"], "weights": WEIGHTS} | data.draw(
            st.dictionaries(st.sampled_from(group_keys), JSON)
        )
        if isinstance(group["weights"], dict):
            weight_keys = sorted(compressed_tensors.WEIGHT_KEYS)
            group["weights"] = group["weights"] | data.draw(st.dictionaries(st.sampled_from(weight_keys), JSON))
        config["config_groups"] = {"group_0": group}
    try:
        spec = parse_quantization_config(config).spec_of("model.layers.0.q")
        assert spec is None or spec.bits in SUPPORTED_BITS
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^(?:model\.layers\.\d+\.mlp\.up|model\.layers\.\d+\.mlp\.gate)$", False),
        (r"^(?!.*layers\.[0-9]+\.mlp).*proj$", False),
        (r"|".join([r"a\.\d+\.b\.\d+"] * 50), False),
        (r"(?:.*\.)?q_proj", False),
        (r"\(a+\)+[)*+]", False),
        (r"(a|a)*$", True),
        (r"(?:a?){30}", True),
        (r".*.*.*(|).*.*.*.*", True),
        (r"(?x)(a #[\n+)+", True),
        (r"a?" * 30 + r"a" * 30, True),
        (r".*self_attn.*proj.*", False),
        (r"(\d+\.?)" * 20 + r"x", True),
        (r"(?!.*lm_head)(?!.*visual)(?!.*mtp).*_proj.*", False),
        (r".*layers\.[0-9]{1,2}\..*experts\.[0-9]{1,3}\..*", False),
        (r".*\.(?:" + "|".join(map(str, range(48))) + r")\..*(?:q_proj|k_proj|v_proj|o_proj|gate|up|down).*", False),
        (r".*layers.*\d+.*mlp.*down.*", False),
        (r"a{1000000}", True),
    ],
)
def test_patterns_that_could_run_forever_are_distinguished_from_those_that_tools_write(pattern, expected):
    assert is_excessive(pattern) == expected


@pytest.mark.slow
def test_a_single_slow_match_is_interrupted():
    pattern = Pattern(r"(.*)a(.*)a(.*)a(.*)b\1", "here", MatchTimer())
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"here: .* matching module names took 1 seconds; write simpler"):
        pattern.matches("a" * 1000)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("pattern", [".*" * 6 + "[!?]", "a?" * 24 + "a" * 24 + "!", ".*" * 4 + "[!?]"])
def test_patterns_on_which_python_backtracks_for_ages_end_at_once(pattern):
    start = time.perf_counter()
    assert not Pattern(pattern, "here", MatchTimer()).matches("a" * 1000)
    assert time.perf_counter() - start < 0.5


def test_many_patterns_and_names_take_no_noticeable_time():
    timer = MatchTimer()
    patterns = [Pattern(rf"model\.layers\.{index}\..*", "here", timer) for index in range(168)]
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(336)]
    assert sum(pattern.matches(name) for name in names for pattern in patterns) == 168
