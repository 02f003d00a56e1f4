"""Checkpoints with random changes in their JSON, tensors or bytes are read as they are, or end in a one-line error."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_files import INDEX, SHARDS, good_checkpoint, raw_safetensors, write_json
from safetensors.torch import load_file, save_file

from llmquant.checkpoints.quantized import validate_quantized
from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.formats.registry import FORMATS

pytestmark = pytest.mark.slow

FUZZ = int(os.environ.get("LLMQUANT_FUZZ", "30"))
"""Number of examples of each test."""
NAMES = ["", "layers.0.up", "layers.0.up.qweight", "*", "re:.*", "F16", "I32", "gptq", "\ud800", "\n", "../x", "9" * 40]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**62, 2**64, -(2**63), 10**40]),
    st.floats(),
    st.sampled_from(NAMES),
    st.text(max_size=4),
)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=3)), inner)
    ),
    max_leaves=6,
)


def mutate(data: st.DataObject, value: Any) -> Any:
    """Return JSON with one value replaced, added, renamed or removed at any depth."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value)))
        change = data.draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "rename", "add"]))
        if change == "deeper":
            return value | {key: mutate(data, value[key])}
        rest = {other: inner for other, inner in value.items() if other != key}
        if change == "remove":
            return rest
        if change == "rename":
            return rest | {data.draw(st.sampled_from([*NAMES, *sorted(value)])): value[key]}
        return value | {data.draw(st.sampled_from(NAMES)): data.draw(ANY_JSON)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 4)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutate(data, value[place]), *value[place + 1 :]]
    return data.draw(ANY_JSON)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=FUZZ, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_is_read_as_it_is_or_ends_in_a_one_line_error(tmp_path_factory, format, data):
    """Change the headers, the index and the configuration, in valid JSON."""
    folder = fuzzed_folder(tmp_path_factory, format)
    good = {name: (folder / name).read_bytes() for name in (*SHARDS, INDEX, "config.json")}
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from([*SHARDS, INDEX, "config.json", "config.json"]))
            if name in SHARDS:
                length = struct.unpack("<Q", (content := (folder / name).read_bytes())[:8])[0]
                header = mutate(data, json.loads(content[8 : 8 + length]))
                (folder / name).write_bytes(raw_safetensors(json.dumps(header).encode(), content[8 + length :]))
            else:
                write_json(folder / name, mutate(data, json.loads((folder / name).read_bytes())))
        validate_quantized(CheckpointReader(folder))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        str(error).encode("utf-8", "backslashreplace")
    finally:
        for name, content in good.items():
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=FUZZ, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_tensor_is_read_as_it_is_or_ends_in_a_one_line_error(tmp_path_factory, format, data):
    """Replace a tensor by one of any dtype, shape and content, in a valid file."""
    folder = fuzzed_folder(tmp_path_factory, format)
    good = (folder / SHARDS[0]).read_bytes()
    tensors = load_file(folder / SHARDS[0])
    name = data.draw(st.sampled_from(sorted(tensors)))
    dtype = data.draw(st.sampled_from([tensors[name].dtype, torch.int32, torch.int64, torch.float16, torch.uint8]))
    shape = data.draw(st.sampled_from([tuple(tensors[name].shape), (2,), (32,), (32, 32), (2, 32), (1, 4, 32), ()]))
    content = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=8, max_size=64)), dtype=torch.uint8)
    num_bytes = math.prod(shape) * dtype.itemsize
    tensors[name] = content.repeat(num_bytes // len(content) + 1)[:num_bytes].view(dtype).reshape(shape)
    try:
        save_file(tensors, folder / SHARDS[0])
        validate_quantized(CheckpointReader(folder))
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (folder / SHARDS[0]).write_bytes(good)


FUZZED: dict[str, Path] = {}


def fuzzed_folder(tmp_path_factory: pytest.TempPathFactory, format: str) -> Path:
    """Return a valid checkpoint that all examples share. Each example restores its changes."""
    if format not in FUZZED:
        FUZZED[format] = good_checkpoint(tmp_path_factory.mktemp(format) / "model", format)
    return FUZZED[format]


@settings(max_examples=max(FUZZ, 300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_bytes_are_read_as_they_are_or_end_in_a_one_line_error(tmp_path, data):
    """Replace, remove and insert bytes in a shard, the index or the configuration."""
    folder = tmp_path / "model"
    if not folder.exists():
        good_checkpoint(folder)
    file = folder / data.draw(st.sampled_from([*SHARDS, INDEX, "config.json"]))
    good = file.read_bytes()
    position = data.draw(st.integers(0, min(len(good) - 1, 900)))
    junk = data.draw(st.binary(max_size=8))
    removed = data.draw(st.integers(0, 8))
    file.write_bytes(good[:position] + junk + good[position + removed :])
    try:
        validate_quantized(CheckpointReader(folder))
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(good)
