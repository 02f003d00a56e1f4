"""Every hostile or damaged checkpoint ends in one line that names the file or tensor, before any large allocation."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from malformed_files import (
    INDEX,
    SHARDS,
    SPEC,
    at_five,
    deep_json,
    edit_json,
    entry,
    filled,
    good_checkpoint,
    header_bytes,
    in_index,
    link_shard,
    only_pickles,
    overlap,
    quantization,
    rename_tensor,
    row_of,
    shape_of,
    shrink,
    swap_shards,
    tensor,
    weights,
    write_json,
)
from safetensors.torch import save_file

from llmquant.checkpoints.quantized import validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS, parse_quantization_config

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ABSURD = 2**62

HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    # the folder
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is a list": (lambda f: write_json(f / "config.json", [1]), "config.json: a JSON list"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not valid JSON"),
    "config has a key twice": (lambda f: (f / "config.json").write_text('{"a":1,"a":2}'), "'a' occurs twice"),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json: cannot be read",
    ),
    "config outside": (
        lambda f: ((f / "config.json").rename(f.parent / "c"), (f / "config.json").symlink_to("../c")),
        "config.json: a link to",
    ),
    "only pickles": (only_pickles, "pytorch_model.bin, whose pickle could run code"),
    "no weights": (
        lambda f: [(f / name).unlink() for name in (*SHARDS, INDEX)],
        f"no model.safetensors and no {INDEX}",
    ),
    # shards
    "empty shard": (lambda f: (f / SHARDS[0]).write_bytes(b""), f"{SHARDS[0]}: 0 bytes, too short"),
    "shard cut in its header": (lambda f: os.truncate(f / SHARDS[0], 40), f"{SHARDS[0]}: header of"),
    "shard cut by a byte": (lambda f: shrink(f, 1), f"{SHARDS[1]}: .* it is truncated"),
    "shard cut by much": (lambda f: shrink(f, 300), f"{SHARDS[1]}: .* it is truncated"),
    "shard with more bytes": (
        lambda f: (f / SHARDS[0]).write_bytes((f / SHARDS[0]).read_bytes() + b"x"),
        f"{SHARDS[0]}: .* followed by foreign bytes",
    ),
    "shard is a pickle": (
        lambda f: (f / SHARDS[0]).write_bytes(b"\x80\x02cbuiltins\nexit\n."),
        f"{SHARDS[0]}: header of",
    ),
    "shard is a folder": (
        lambda f: ((f / SHARDS[0]).unlink(), (f / SHARDS[0]).mkdir()),
        f"{SHARDS[0]}: cannot be read",
    ),
    "shard missing": (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]}: missing"),
    "header of 2^64 - 1 bytes": (header_bytes(b"{}", length=2**64 - 1), f"{SHARDS[0]}: header of 18446744073709551615"),
    "header of 2^40 bytes": (header_bytes(b"{}", length=2**40), f"{SHARDS[0]}: header of 1099511627776"),
    "header is a list": (header_bytes(b"[]"), f"{SHARDS[0]}: header: a JSON list"),
    "header is not JSON": (header_bytes(b"{]"), f"{SHARDS[0]}: header: not valid JSON"),
    "header is not UTF-8": (header_bytes(b'{"\xff":1}'), f"{SHARDS[0]}: header: not valid JSON"),
    "header nested deeply": (deep_json, f"{SHARDS[0]}: header: not valid JSON"),
    "header with a number of 5000 digits": (
        header_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        f"{SHARDS[0]}: header: not valid JSON",
    ),
    "header with a tensor twice": (
        header_bytes(b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", bytes(8)),
        "'a' occurs twice",
    ),
    "entry is a number": (header_bytes(b'{"a":3}'), "'a': header entry must be"),
    "entry without offsets": (header_bytes(b'{"a":{"dtype":"F32","shape":[0]}}'), "'a': header entry must be"),
    "dtype unknown": (entry(dtype="F31"), "'layers.0.norm.weight': dtype 'F31'"),
    "dtype a list": (entry(dtype=["F32"]), "'layers.0.norm.weight': dtype"),
    "dtype of another size": (entry(dtype="F64"), "F64 .* takes 256 bytes"),
    "shape of another size": (entry(shape=[33]), r"F32 \[33\] takes 132 bytes"),
    "shape absurd": (entry(shape=[ABSURD]), f"shape .{ABSURD}. is not a shape"),
    "shape whose product overflows to the right size": (entry(shape=[2**32, 2**32, 2**5]), "takes .* bytes"),
    "shape absurd but empty": (entry(shape=[0, ABSURD], data_offsets=[0, 0]), "is not a shape"),
    "shape negative": (entry(shape=[-32]), "is not a shape"),
    "shape of floats": (entry(shape=[32.0]), "is not a shape"),
    "shape of truths": (entry(shape=[True] * 3), "is not a shape"),
    "shape of a thousand dimensions": (entry(shape=[1] * 1000), "is not a shape"),
    "shape a number": (entry(shape=32), "is not a shape"),
    "offsets absurd": (entry(data_offsets=[ABSURD, ABSURD + 128]), "leaves a gap"),
    "offsets beyond 64 bit": (entry(data_offsets=[2**70, 2**70 + 128]), "are not two positions"),
    "offsets backwards": (entry(data_offsets=[128, 0]), "hold -128"),
    "offsets negative": (entry(data_offsets=[-128, 0]), "are not two positions"),
    "offsets of strings": (entry(data_offsets=["0", "128"]), "are not two positions"),
    "offsets of three": (entry(data_offsets=[0, 1, 2]), "are not two positions"),
    "tensors overlap": (overlap, "overlaps the tensor before it"),
    "tensor name of two lines": (rename_tensor("a\nb"), "is not a name"),
    "tensor name of a megabyte": (rename_tensor("a" * 2**20), "is not a name"),
    # the index
    "index not JSON": (lambda f: (f / INDEX).write_text("weight_map"), f"{INDEX}: not valid JSON"),
    "index without a map": (lambda f: write_json(f / INDEX, {"metadata": {}}), f"{INDEX}: weight_map None"),
    "index with an empty map": (lambda f: write_json(f / INDEX, {"weight_map": {}}), f"{INDEX}: weight_map"),
    "index names a parent": (in_index("../secret.safetensors"), f"{INDEX}: 'layers.0.norm.weight' lies in '../secret"),
    "index names an absolute path": (in_index("/etc/shadow.safetensors"), f"{INDEX}: .*'/etc/shadow"),
    "index names a subfolder": (in_index("a/b.safetensors"), f"{INDEX}: .*'a/b.safetensors'"),
    "index names a Windows path": (in_index("..\\b.safetensors"), f"{INDEX}: .*plain name"),
    "index names a pickle": (in_index("pytorch_model.bin"), f"{INDEX}: .*plain name"),
    "index names a NUL": (in_index("a\0.safetensors"), f"{INDEX}: .*plain name"),
    "index names a number": (in_index(7), f"{INDEX}: .*lies in 7"),
    "index names an empty string": (in_index(""), f"{INDEX}: .*plain name"),
    "index names another shard": (
        in_index(SHARDS[1]),
        f"{SHARDS[0]}: holds 'layers.0.norm.weight', but .* says {SHARDS[1]}",
    ),
    "index names a shard that is missing": (
        in_index("c.safetensors"),
        "index and shards disagree|c.safetensors: missing",
    ),
    "index leaves a packed tensor out": (
        lambda f: edit_json(f / INDEX, lambda index: index["weight_map"].pop("layers.1.up.scales")),
        "layers.1.up.scales: missing",
    ),
    "shards swapped": (swap_shards, f"{SHARDS[0]}: holds 'layers.1"),
    # links
    "shard links outside": (link_shard("../outside.safetensors"), f"{SHARDS[0]}: a link to .*outside the checkpoint"),
    "shard links to nothing": (link_shard("nowhere"), f"{SHARDS[0]}: a link that leads nowhere"),
    "shard links to itself": (link_shard(SHARDS[0]), f"{SHARDS[0]}: a link that leads nowhere"),
    "shard links to a device": (link_shard("/dev/zero"), f"{SHARDS[0]}: a link to /dev/zero"),
    # quantization_config against the tensors
    "bits unknown": (quantization(bits=5), "config.json: quantization_config .* bits 5"),
    "bits of another packing": (quantization(bits=8), r"layers.0.up.qzeros: int32 \[2, 4\]"),
    "bits that do not divide the words": (quantization(bits=3), "layers.0.up.qweight: 4 words"),
    "group size 0": (quantization(group_size=0), "group_size 0"),
    "another group size": (quantization(group_size=32), r"layers.0.up.qzeros: int32 \[2, 4\]"),
    "keys of two formats": (quantization(zero_point=True), "'zero_point' is a key of awq"),
    "method of another format": (
        lambda f: edit_json(
            f / "config.json",
            lambda c: c.update(quantization_config=FORMATS["compressed-tensors"].config(SPEC, {"layers.0.up": SPEC})),
        ),
        "layers.0.up.g_idx belongs to gptq|layers.0.up.q.* belongs to",
    ),
    "symmetric with other zero-points": (quantization(sym=True), "layers.0.up.qzeros: zero-points from"),
    "a packed linear is excluded": (
        quantization(dynamic={"-:layers.0": {}}),
        "layers.0.up.* is packed, but config.json",
    ),
    "quantization_config is a list": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(quantization_config=[1])),
        "config.json: quantization_config",
    ),
    "act-order without its index": (
        lambda f: (quantization(desc_act=True)(f), tensor("g_idx", lambda good: None)(f)),
        "layers.0.up.g_idx: missing",
    ),
    # values
    "g_idx negative": (tensor("g_idx", at_five(-1)), "layers.0.up.g_idx: groups from -1"),
    "g_idx beyond the groups": (tensor("g_idx", at_five(2)), "layers.0.up.g_idx: groups from 0 to 2"),
    "g_idx absurd": (tensor("g_idx", at_five(2**31 - 1)), "layers.0.up.g_idx"),
    "g_idx too long": (tensor("g_idx", lambda good: good.repeat(2)), "layers.0.up.g_idx"),
    "g_idx of int64": (tensor("g_idx", lambda good: good.long()), "layers.0.up.g_idx: int64"),
    "scales NaN": (tensor("scales", filled(float("nan"))), "layers.0.up.scales: 2 of 64 scales are NaN or inf"),
    "scales inf": (tensor("scales", filled(float("-inf"))), "layers.0.up.scales: .* NaN or inf"),
    "scales negative": (tensor("scales", filled(-1.0)), "layers.0.up.scales: .* zero or negative"),
    "scales zero": (tensor("scales", filled(0.0)), "layers.0.up.scales: .* zero or negative"),
    "scales missing": (tensor("scales", lambda good: None), "layers.0.up.scales: missing"),
    "scales of int": (tensor("scales", lambda good: good.int()), "layers.0.up.scales: int32"),
    "scales for fewer rows": (tensor("scales", lambda good: good[:, :16]), "layers.0.up.scales"),
    "qweight missing": (tensor("qweight", lambda good: None), "layers.0.up.qweight: missing"),
    "qweight of float": (tensor("qweight", lambda good: good.float()), "layers.0.up.qweight: float32"),
    "qweight empty": (tensor("qweight", lambda good: good[:, :0]), "layers.0.up.qweight"),
    "qweight a number": (tensor("qweight", lambda good: good[0, 0]), r"layers.0.up.qweight: int32 \[\]"),
    "qzeros missing": (tensor("qzeros", lambda good: None), "layers.0.up.qzeros: missing"),
    "qzeros for one group": (tensor("qzeros", lambda good: good[:1]), "layers.0.up.qzeros"),
    "scales denormal to zero": (tensor("scales", filled(1e-9)), "layers.0.up.scales: .* zero or negative"),
    "scales of float64": (tensor("scales", lambda good: good.double()), "layers.0.up.scales: float64"),
    "scales of float8": (tensor("scales", lambda good: good.to(torch.float8_e4m3fn)), "layers.0.up.scales: float8"),
    "qweight of int64": (tensor("qweight", lambda good: good.long()), "layers.0.up.qweight: int64"),
    "qweight with a dimension more": (tensor("qweight", lambda good: good[None]), "layers.0.up.qweight: int32"),
    "qzeros of int64": (tensor("qzeros", lambda good: good.long()), "layers.0.up.qzeros: int64"),
    "qzeros for more columns": (tensor("qzeros", lambda good: good.repeat(1, 2)), "layers.0.up.qzeros"),
    "g_idx of float": (tensor("g_idx", lambda good: good.float()), "layers.0.up.g_idx: float32"),
    "g_idx a matrix": (tensor("g_idx", lambda good: good[None]), "layers.0.up.g_idx: int32"),
    "g_idx lowest int32": (tensor("g_idx", at_five(-(2**31))), "layers.0.up.g_idx: groups from -2147483648"),
    "a tensor of another format beside": (
        tensor("weight_packed", lambda good: torch.zeros(4, 4, dtype=torch.int32)),
        "layers.0.up.weight_packed belongs to compressed-tensors",
    ),
    "bits a string": (quantization(bits="4"), "bits '4'"),
    "bits a truth": (quantization(bits=True), "bits True"),
    "bits absurd": (quantization(bits=10**30), "bits 1000"),
    "group size a float": (quantization(group_size=16.0), "group_size 16.0"),
    "group size -2": (quantization(group_size=-2), "group_size -2"),
    "group size absurd": (quantization(group_size=10**30), "group_size 1000|layers.0.up"),
    "sym a number": (quantization(sym=1), "sym 1"),
    "bits missing": (
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].pop("bits")),
        "bits is missing",
    ),
    "checkpoint_format unknown": (quantization(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "pack_dtype unknown": (quantization(pack_dtype="int64"), "pack_dtype 'int64'"),
    "quant_method a list": (quantization(quant_method=["gptq"]), "quant_method .'gptq'. cannot be read"),
    "quant_method unknown": (quantization(quant_method="exl3"), "quant_method 'exl3' cannot be read"),
    "unknown key": (quantization(rotation="hadamard"), "unknown key 'rotation'"),
    "dynamic with bits of its own packing": (quantization(dynamic={"layers.0": {"bits": 8}}), "layers.0.up.q"),
    "exponential dynamic": (quantization(dynamic={"(a+)+$": {}}), "could take forever"),
    "exponential dynamic behind a comment": (quantization(dynamic={"(?#[)((.|.)*)*x": {}}), "could take forever"),
    "dynamic of many stars": (quantization(dynamic={".*" * 30 + "x": {}}), "could take forever"),
    "dynamic of many optional characters": (quantization(dynamic={"l?" * 30 + "l" * 30: {}}), "could take forever"),
    "dynamic of a megabyte": (quantization(dynamic={"(" * 2**20: {}}), "not a regular expression|forever"),
    "dynamic beyond repeats": (quantization(dynamic={"a{99999999999}": {}}), "not a regular expression"),
    "a megabyte of a value": (quantization(sym="x" * 2**20), "sym 'xxx"),
    "config of 100,000 brackets": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json: not valid JSON",
    ),
    "config with NaN for bits": (
        lambda f: (f / "config.json").write_text('{"quantization_config":{"quant_method":"gptq","bits":NaN}}'),
        "config.json: quantization_config",
    ),
    "config with half a character": (
        lambda f: (f / "config.json").write_text('{"quantization_config":{"quant_method":"\\ud800"}}'),
        "config.json: quantization_config",
    ),
    "tensor name with half a character": (rename_tensor("a\ud800"), "is not a name"),
    "tensor without a module's name": (
        lambda f: (
            rename_tensor("qweight")(f),
            edit_json(f / INDEX, lambda index: index["weight_map"].update({"qweight": SHARDS[0]})),
        ),
        "qweight",
    ),
    "single file and no config key": (
        lambda f: ((f / "model.safetensors").write_bytes(b"{}" * 50),),
        "model.safetensors: header of",
    ),
    "weight beside qweight": (tensor("weight", lambda good: torch.zeros(32, 32)), "layers.0.up has both weight and"),
}
"""Case -> (function that damages a valid GPTQ checkpoint, regular expression for the message)."""


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_checkpoints_end_in_one_line(tmp_path, monkeypatch, damage, message):
    ends_in_one_line(tmp_path, monkeypatch, "gptq", damage, message)


def ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, damage: Callable[[Path], object], message: str
) -> None:
    """Damage a valid checkpoint, and check that reading it raises a one-line UserError without a large allocation."""
    folder = good_checkpoint(tmp_path / "model", format)
    validate_quantized(CheckpointReader(folder))
    damage(folder)
    empty = torch.empty

    def small_empty(size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs.get("device") == "meta" or not isinstance(size, int) or size < 10_000, (
            "allocated before it was checked"
        )
        return empty(size, *args, **kwargs)

    monkeypatch.setattr(torch, "empty", small_empty)
    with pytest.raises(UserError, match=message) as error:
        validate_quantized(CheckpointReader(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert str(folder) in str(error.value)


HOSTILE_BY_FORMAT: dict[str, dict[str, tuple[Callable[[Path], object], str]]] = {
    "awq": {
        "scales NaN": (tensor("scales", filled(float("nan"))), "layers.0.up.scales: .* NaN or inf"),
        "scales negative": (tensor("scales", filled(-0.5)), "layers.0.up.scales: .* zero or negative"),
        "scales missing": (tensor("scales", lambda good: None), "layers.0.up.scales: missing"),
        "qzeros missing": (tensor("qzeros", lambda good: None), "layers.0.up.qzeros: missing"),
        "qzeros of another shape": (tensor("qzeros", lambda good: good.T), "layers.0.up.qzeros: int32"),
        "qweight too narrow": (tensor("qweight", lambda good: good[:, :1]), "layers.0.up.q"),
        "qweight of float": (tensor("qweight", lambda good: good.float()), "layers.0.up.qweight: float32"),
        "g_idx of gptq beside": (
            tensor("g_idx", lambda good: torch.zeros(32, dtype=torch.int32)),
            "layers.0.up.g_idx belongs to gptq",
        ),
        "bits 3": (quantization(bits=3), "bits 3"),
        "group size 0": (quantization(group_size=0), "group_size 0"),
        "group size that splits nothing": (quantization(group_size=24), "not a multiple of group_size 24"),
        "version gemv": (quantization(version="gemv"), "version 'gemv'"),
        "two group sizes": (quantization(q_group_size=64), "group_size 16 contradicts q_group_size 64"),
        "zero_point that contradicts sym": (quantization(sym=True), "contradicts sym"),
        "modules_to_not_convert a string": (quantization(modules_to_not_convert="lm_head"), "list of strings"),
        "desc_act": (quantization(desc_act=True), "desc_act is a key of gptq"),
    },
    "compressed-tensors": {
        "scales inf": (tensor("weight_scale", row_of(float("inf"))), "layers.0.up.weight_scale: .* NaN or inf"),
        "scales negative": (tensor("weight_scale", row_of(-0.5)), "layers.0.up.weight_scale: .* zero or negative"),
        "scales missing": (tensor("weight_scale", lambda good: None), "layers.0.up.weight_scale: missing"),
        "shape missing": (tensor("weight_shape", lambda good: None), "layers.0.up.weight_shape: missing"),
        "shape of other words": (tensor("weight_shape", shape_of(32, 64)), "weight_shape: .32, 64. does not fit"),
        "shape turned round": (tensor("weight_shape", shape_of(16, 64)), "weight_shape: .16, 64. does not fit"),
        "shape absurd": (tensor("weight_shape", shape_of(2**62, 2**62)), "weight_shape: .* does not fit"),
        "shape negative": (tensor("weight_shape", shape_of(32, -32)), "weight_shape: .* does not fit"),
        "shape of overflowing product": (tensor("weight_shape", shape_of(32, 2**61)), "weight_shape: .* does not fit"),
        "shape of three": (tensor("weight_shape", shape_of(32, 32, 1)), "weight_shape: .* must be int64"),
        "shape of float": (tensor("weight_shape", lambda good: good.float()), "weight_shape: .* must be int64"),
        "shape of a megabyte": (tensor("weight_shape", lambda good: torch.zeros(2**17).long()), "weight_shape"),
        "zero-points missing": (
            tensor("weight_zero_point", lambda good: None),
            "layers.0.up.weight_zero_point: missing",
        ),
        "zero-points of bytes out of range": (
            tensor("weight_zero_point", lambda good: torch.full((32, 2), 100, dtype=torch.int8)),
            "weight_zero_point: outside -8",
        ),
        "zero-points of another shape": (
            tensor("weight_zero_point", lambda good: good[:1]),
            "weight_zero_point: int32",
        ),
        "packed of int64": (tensor("weight_packed", lambda good: good.long()), "weight_packed: int64"),
        "g_idx beyond the groups": (
            tensor("weight_g_idx", lambda good: torch.full((32,), 2, dtype=torch.int32)),
            "weight_g_idx: groups from 2 to 2; must lie in 0",
        ),
        "g_idx negative": (
            tensor("weight_g_idx", lambda good: torch.full((32,), -1, dtype=torch.int32)),
            "weight_g_idx: groups from -1",
        ),
        "g_idx too short": (
            tensor("weight_g_idx", lambda good: torch.zeros(31, dtype=torch.int32)),
            "weight_g_idx: int32 .31.",
        ),
        "bits 6": (weights(num_bits=6), "bits 6"),
        "group size 0": (weights(group_size=0), "group_size 0"),
        "group size -1 by group": (weights(group_size=-1), "contradicts strategy group"),
        "strategy block": (weights(strategy="block"), "strategy 'block'"),
        "type float": (weights(type="float"), "only static integer weights"),
        "dynamic": (weights(dynamic=True), "only static integer weights"),
        "symmetric with zero-points": (weights(symmetric=True), "layers.0.up.weight_zero_point: zero-points from"),
        "actorder unknown": (weights(actorder="sideways"), "actorder 'sideways'"),
        "actorder without its index": (weights(actorder="group"), "layers.0.up.weight_g_idx: missing"),
        "unknown key of a group": (weights(codebook=[1]), "unknown key 'codebook'"),
        "ignored and packed": (quantization(ignore=["layers.0.up"]), "config.json leaves layers.0.up in 16 bit"),
        "exponential ignore": (quantization(ignore=["re:(l+)+$"]), "could take forever"),
        "sparse": (quantization(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is set"),
        "keys of gptq": (quantization(bits=4), "'bits' is a key of gptq"),
    },
}
"""Format -> case -> (function that damages a valid checkpoint of the format, regular expression for the message)."""
OTHER_FORMATS = [(format, *case) for format, cases in HOSTILE_BY_FORMAT.items() for case in cases.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "damage", "message"),
    OTHER_FORMATS,
    ids=[f"{f}: {name}" for f, cases in HOSTILE_BY_FORMAT.items() for name in cases],
)
def test_hostile_checkpoints_of_other_formats_end_in_one_line(tmp_path, monkeypatch, format, damage, message):
    ends_in_one_line(tmp_path, monkeypatch, format, damage, message)


SLOW_PATTERNS = {
    "back reference": r"(.*)a(.*)a(.*)a(.*)b\1",
    "many alternatives": ".*.*[!?]|" * 9000 + "[!?]",
}
"""Patterns that `is_excessive` accepts, although they match some names slowly."""


@pytest.mark.slow
@pytest.mark.parametrize("pattern", SLOW_PATTERNS.values(), ids=SLOW_PATTERNS)
def test_slow_patterns_end_in_one_line_within_seconds(pattern):
    """The time limit is for all names and patterns together."""
    config = FORMATS["gptq"].config(SPEC, {}) | {"dynamic": {f"-:x{pattern}": {}, pattern: {}}}
    parsed = parse_quantization_config(config)
    start = time.thread_time()
    with pytest.raises(UserError, match=r"matching module names took .* seconds") as error:
        for i in range(3000):
            parsed.grid_of("a" * 123 + f"{i:05d}")
    assert time.thread_time() - start < 10
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.slow
def test_a_slow_match_against_a_name_of_absurd_length_is_interrupted(tmp_path):
    save_file({"a" * 900 + ".qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = FORMATS["gptq"].config(SPEC, {}) | {"dynamic": {SLOW_PATTERNS["back reference"]: {}}}
    write_json(tmp_path / "config.json", {"quantization_config": config})
    with pytest.raises(
        UserError, match=r"config\.json: quantization_config .* matching module names took 1 seconds"
    ) as error:
        validate_quantized(CheckpointReader(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_there_are_enough_hostile_files():
    assert len(HOSTILE) + len(OTHER_FORMATS) >= 60
