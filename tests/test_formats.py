"""Formats store a weight exactly, in the same words as other tools, and refuse damaged tensors by name."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS
from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.weight import QuantizedWeight

ALL_FORMATS = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def golden_weight(
    bits: int, out_features: int, in_features: int, group_size: int, *, first_zero: int
) -> QuantizedWeight:
    """Return a weight with codes (k + 2n) mod 2^b and zero-points (n + g) mod (2^b - first_zero) + first_zero."""
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=False)
    row_N1, num_groups = torch.arange(out_features)[:, None], spec.num_groups(in_features)
    zero_NG = (row_N1 + torch.arange(num_groups)) % (2**bits - first_zero) + first_zero
    return QuantizedWeight(
        codes_NK=((torch.arange(in_features) + 2 * row_N1) % 2**bits).to(torch.uint8),
        scale_NG=torch.ones(out_features, num_groups, dtype=torch.float16),
        zero_NG=zero_NG.to(torch.uint8),
        spec=spec,
    )


def random_weight(
    spec: QuantSpec,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    min_zero: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (out_features, spec.num_groups(in_features))
    zero_NG = torch.randint(min_zero, spec.max_code + 1, groups, generator=generator).to(torch.uint8)
    codes_NK = torch.randint(0, spec.max_code + 1, (out_features, in_features), generator=generator)
    return QuantizedWeight(
        codes_NK=codes_NK.to(torch.uint8),
        scale_NG=(torch.rand(groups, generator=generator) + 0.01).to(torch.bfloat16).to(dtype),
        zero_NG=torch.full_like(zero_NG, spec.mid_code) if spec.symmetric else zero_NG,
        spec=spec,
    )


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert a.spec == b.spec
    assert torch.equal(a.codes_NK, b.codes_NK) and torch.equal(a.zero_NG, b.zero_NG)
    assert a.scale_NG.dtype == b.scale_NG.dtype and torch.equal(a.scale_NG, b.scale_NG)
    assert torch.equal(a.group_of_column_K, b.group_of_column_K)


def hex_words(words: Tensor) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08X}" for word in words.flatten().tolist())


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "column", "next_column", "zeros", "next_zero"),
    [
        (4, "76543210 FEDCBA98 76543210", "98765432", "76543210 0EDCBA98 87654321", "87654321"),
        (3, "88FAC688 C688FAC6 FAC688FA", "1A23EB1A", "D11AC688 6B1A2358 688D6344", "1A2358D1"),
        (8, "03020100 07060504 0B0A0908", "05040302", "03020100 07060504 0B0A0908", "04030201"),
        (2, "E4E4E4E4 E4E4E4E4", "4E4E4E4E", "24924924 49249249", "49249249"),
    ],
)
def test_gptq_words_match_golden(bits, column, next_column, zeros, next_zero):
    tensors = FORMATS["gptq"].pack(golden_weight(bits, 32, 32, 16, first_zero=1))
    assert hex_words(tensors["qweight"][:3, 0]) == column
    assert hex_words(tensors["qweight"][0, 1]) == next_column
    assert hex_words(tensors["qzeros"][0, :3]) == zeros
    assert hex_words(tensors["qzeros"][1, 0]) == next_zero
    assert tensors["g_idx"].tolist() == [0] * 16 + [1] * 16


@pytest.mark.parametrize(
    ("name", "bits", "word"),
    [("gptq", 4, "77777777"), ("gptq", 8, "7F7F7F7F"), ("gptq_v2", 4, "88888888"), ("gptq_v2", 8, "80808080")],
)
def test_gptq_symmetric_zeros_match_golden(name, bits, word):
    tensors = FORMATS[name].pack(random_weight(QuantSpec(bits=bits, group_size=32), 32, 64))
    assert set(hex_words(tensors["qzeros"]).split()) == {word}


def test_awq_words_match_golden():
    weight = golden_weight(4, 32, 32, 16, first_zero=0)
    tensors = FORMATS["awq"].pack(weight)
    assert hex_words(tensors["qweight"][:2, 0]) == "EA62C840 FB73D951"
    assert hex_words(tensors["qzeros"][0, :2]) == "75316420 FDB9ECA8"
    assert hex_words(tensors["qzeros"][1, 0]) == "86427531"


@pytest.mark.parametrize(
    ("bits", "in_features", "rows"),
    [
        (4, 16, ["76543210 FEDCBA98", "98765432 10FEDCBA"]),
        (4, 20, ["76543210 FEDCBA98 00003210"]),
        (3, 32, ["88FAC688 C688FAC6 FAC688FA"]),
    ],
)
def test_compressed_tensors_words_match_golden(bits, in_features, rows):
    packed = FORMATS["compressed-tensors"].pack(golden_weight(bits, 8, in_features, -1, first_zero=0))["weight_packed"]
    assert [hex_words(row) for row in packed[: len(rows)]] == rows


def test_compressed_tensors_zero_points_match_golden():
    pack = FORMATS["compressed-tensors"].pack
    assert hex_words(pack(golden_weight(4, 8, 32, 16, first_zero=0))["weight_zero_point"]) == "76543210 87654321"
    twelve = pack(golden_weight(4, 12, 32, 16, first_zero=0))["weight_zero_point"]
    assert hex_words(twelve[1, 0]) == "0000BA98"


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_compressed_tensors_is_the_transpose_of_gptq_v2(bits):
    weight = random_weight(QuantSpec(bits=bits, group_size=32, symmetric=False), 64, 96)
    gptq, compressed = FORMATS["gptq_v2"].pack(weight), FORMATS["compressed-tensors"].pack(weight)
    assert torch.equal(compressed["weight_packed"], gptq["qweight"].T)
    assert torch.equal(compressed["weight_zero_point"], gptq["qzeros"].T)
    assert torch.equal(compressed["weight_scale"], gptq["scales"].T)


@pytest.mark.slow
@ALL_FORMATS
@given(data=st.data())
def test_packing_round_trips_or_is_refused_with_a_reason(format, data):
    spec = QuantSpec(
        bits=data.draw(st.sampled_from(SUPPORTED_BITS)),
        group_size=data.draw(st.sampled_from([-1, 8, 32, 40, 128])),
        symmetric=data.draw(st.booleans()),
    )
    out_features = data.draw(st.one_of(st.integers(1, 5).map(lambda n: 32 * n), st.integers(1, 100)))
    in_features = data.draw(st.one_of(st.integers(1, 5).map(lambda n: 32 * n), st.integers(1, 200)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
    weight = random_weight(
        spec,
        out_features,
        in_features,
        dtype=format.scale_dtype(dtype),
        seed=data.draw(st.integers(0, 9)),
        min_zero=format.min_zero,
    )
    reason = format.refuses(spec, out_features, in_features, weight.scale_NG.dtype)
    if reason is not None:
        assert "use " in reason
        with pytest.raises(UserError, match=re.escape(reason)):
            format.pack(weight)
        return
    tensors = format.pack(weight)
    shapes = format.tensor_shapes(spec, out_features, in_features, weight.scale_NG.dtype)
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == shapes
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert set(tensors) <= set(format.suffixes)
    assert format.features(tensors, spec) == (out_features, in_features)
    assert_same(format.unpack(tensors, spec, out_features, in_features), weight)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_act_order_groups_round_trip_in_gptq(name):
    spec = QuantSpec(bits=4, group_size=16)
    base = random_weight(spec, 32, 64)
    order_K = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16
    weight = QuantizedWeight(
        codes_NK=base.codes_NK, scale_NG=base.scale_NG, zero_NG=base.zero_NG, spec=spec, group_index_K=order_K
    )
    again = FORMATS[name].unpack(FORMATS[name].pack(weight), spec, 32, 64)
    assert again.group_index_K is not None
    assert_same(again, weight)
    for other in ("awq", "compressed-tensors"):
        with pytest.raises(UserError, match="act-order groups"):
            FORMATS[other].pack(weight)


def test_gptq_v1_refuses_a_zero_point_of_zero_and_v2_stores_it():
    weight = golden_weight(4, 32, 32, 16, first_zero=0)
    with pytest.raises(UserError, match="gptq_v2"):
        FORMATS["gptq"].pack(weight)
    assert_same(FORMATS["gptq_v2"].unpack(FORMATS["gptq_v2"].pack(weight), weight.spec, 32, 32), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v1_zero_points_that_gptqmodel_computed_by_subtraction_are_restored(bits):
    """GPTQModel subtracts 0x1111… from whole words. A zero-point of 0 then borrows from the next field."""
    weight = random_weight(QuantSpec(bits=bits, group_size=16, symmetric=False), 32, 32)
    tensors = FORMATS["gptq_v2"].pack(weight)
    tensors["qzeros"] = tensors["qzeros"] - sum(1 << shift for shift in range(0, 32, bits))
    assert_same(FORMATS["gptq"].unpack(tensors, weight.spec, 32, 32), weight)


def test_symmetric_v2_tensors_read_as_v1_are_refused():
    weight = random_weight(QuantSpec(bits=4, group_size=32), 32, 32)
    with pytest.raises(UserError, match=r"qzeros: .* checkpoint_format"):
        FORMATS["gptq"].unpack(FORMATS["gptq_v2"].pack(weight), weight.spec, 32, 32)


def test_scales_are_never_rounded_again():
    spec = QuantSpec(bits=4, group_size=32)
    weight = random_weight(spec, 32, 32, dtype=torch.bfloat16)
    assert FORMATS["gptq"].pack(weight)["scales"].dtype == torch.bfloat16
    exact = FORMATS["awq"].pack(weight)["scales"]
    assert exact.dtype == torch.float16 and torch.equal(exact.T.to(torch.bfloat16), weight.scale_NG)
    tiny = QuantizedWeight(
        codes_NK=weight.codes_NK, scale_NG=weight.scale_NG * 2**-20, zero_NG=weight.zero_NG, spec=spec
    )
    with pytest.raises(UserError, match="not exact in float16"):
        FORMATS["awq"].pack(tiny)
    single = random_weight(spec, 32, 32, dtype=torch.float32)
    assert FORMATS["gptq"].pack(single)["scales"].dtype == torch.float16
    assert FORMATS["compressed-tensors"].pack(single)["weight_scale"].dtype == torch.float32


def test_compressed_tensors_reads_zero_points_of_one_byte():
    weight = random_weight(QuantSpec(bits=4, group_size=16, symmetric=False), 8, 32)
    tensors = FORMATS["compressed-tensors"].pack(weight)
    tensors["weight_zero_point"] = (weight.zero_NG.int() - 8).to(torch.int8)
    assert_same(FORMATS["compressed-tensors"].unpack(tensors, weight.spec, 8, 32), weight)
    tensors["weight_zero_point"][3, 1] = 8
    with pytest.raises(UserError, match="weight_zero_point: outside -8 … 7"):
        FORMATS["compressed-tensors"].unpack(tensors, weight.spec, 8, 32)


def test_compressed_tensors_reads_legacy_act_order_groups():
    spec = QuantSpec(bits=4, group_size=16)
    weight = random_weight(spec, 8, 32)
    tensors = FORMATS["compressed-tensors"].pack(weight)
    tensors["weight_g_idx"] = torch.arange(32, dtype=torch.int32) % 2
    assert FORMATS["compressed-tensors"].unpack(tensors, spec, 8, 32).group_of_column_K.tolist() == [0, 1] * 16


@ALL_FORMATS
def test_negative_scales_are_read_only_with_the_middle_zero_point(format):
    weight = random_weight(QuantSpec(bits=4, group_size=32, symmetric=True), 32, 64)
    weight.scale_NG[::2] *= -1
    assert_same(format.unpack(format.pack(weight), weight.spec, 32, 64), weight)
    moved = random_weight(QuantSpec(bits=4, group_size=32, symmetric=False), 32, 64)
    moved.zero_NG[:] = 7
    moved.scale_NG[3, 1] *= -1
    with pytest.raises(UserError, match="1 of 64 scales are zero or negative"):
        format.unpack(format.pack(moved), moved.spec, 32, 64)


# --- damaged tensors -------------------------------------------------------------------------------------------------


def damaged_tensors() -> dict[str, tuple[str, str, object]]:
    """Return name -> (format, suffix, function that damages the tensor; None removes it)."""
    cases: dict[str, tuple[str, str, object]] = {}
    for name, format in FORMATS.items():
        packed, scale = format.suffixes[0], "weight_scale" if name == "compressed-tensors" else "scales"
        zero = "weight_zero_point" if name == "compressed-tensors" else "qzeros"
        cases |= {
            f"{name} codes of int64": (name, packed, lambda t: t.long()),
            f"{name} codes of one dimension": (name, packed, lambda t: t.flatten()),
            f"{name} codes without rows": (name, packed, lambda t: t[:0]),
            f"{name} scales missing": (name, scale, None),
            f"{name} scales of a wrong shape": (name, scale, lambda t: t[:, :1]),
            f"{name} scales transposed": (name, scale, lambda t: t.T),
            f"{name} scales of int32": (name, scale, lambda t: t.int()),
            f"{name} scales in float64": (name, scale, lambda t: t.double()),
            f"{name} zeros missing": (name, zero, None),
            f"{name} zeros too few": (name, zero, lambda t: t[:, :-1]),
            f"{name} zeros of float": (name, zero, lambda t: t.float()),
        }
        for value in (float("nan"), float("inf"), -1.0, 0.0):
            cases[f"{name} scale {value}"] = (name, scale, lambda t, v=value: t.index_fill(0, torch.tensor([1]), v))
    for value in (-1, 2, 2**31 - 1, -(2**31)):
        cases[f"g_idx {value}"] = ("gptq", "g_idx", lambda t, v=value: t.index_fill(0, torch.tensor([5]), v))
    cases["g_idx too short"] = ("gptq", "g_idx", lambda t: t[:-1])
    cases["g_idx of float"] = ("gptq", "g_idx", lambda t: t.float())
    shape = "weight_shape"
    cases["weight_shape missing"] = ("compressed-tensors", shape, None)
    cases["weight_shape of three"] = ("compressed-tensors", shape, lambda t: torch.tensor([32, 32, 1]))
    cases["weight_shape absurd"] = ("compressed-tensors", shape, lambda t: torch.tensor([32, 2**62]))
    cases["weight_shape negative"] = ("compressed-tensors", shape, lambda t: torch.tensor([32, -32]))
    cases["weight_shape transposed"] = ("compressed-tensors", shape, lambda t: torch.tensor([64, 32]))
    return cases


@pytest.mark.parametrize("case", damaged_tensors().values(), ids=list(damaged_tensors()))
def test_damaged_tensors_are_refused_by_name(case):
    name, suffix, damage = case
    weight = golden_weight(4, 32, 64, 32, first_zero=1)
    tensors = FORMATS[name].pack(weight)
    assert_same(FORMATS[name].unpack(tensors, weight.spec, 32, 64), weight)
    good = tensors.pop(suffix)
    if callable(damage):
        tensors[suffix] = damage(good)
    with pytest.raises(UserError, match=r"^(qweight|qzeros|scales|g_idx|weight_\w+): ") as error:
        FORMATS[name].unpack(tensors, weight.spec, 32, 64)
    assert suffix in str(error.value) and "\n" not in str(error.value)


@ALL_FORMATS
def test_a_weight_of_another_size_is_refused(format):
    weight = golden_weight(4, 32, 64, 32, first_zero=1)
    with pytest.raises(UserError, match=r"holds a weight of \[32, 64\], but the model's is \[64, 64\]"):
        format.unpack(format.pack(weight), weight.spec, 64, 64)
