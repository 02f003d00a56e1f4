"""Reading the next block's weights in a thread."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from llmquant.checkpoints.reader import CheckpointReader
from llmquant.errors import UserError
from llmquant.models.prefetch import Prefetcher


@pytest.fixture
def reader(tmp_path):
    tensors = {f"layers.{index}.weight": torch.full((3, 5), float(index)) for index in range(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return CheckpointReader(tmp_path)


def test_prefetched_tensor_is_taken_once(reader):
    prefetcher = Prefetcher(reader)
    prefetcher.start(["layers.1.weight"])
    assert torch.equal(prefetcher.take("layers.1.weight"), reader.read("layers.1.weight"))
    assert prefetcher.take("layers.1.weight") is None
    assert prefetcher.take("layers.2.weight") is None, "it was not prefetched"


def test_another_start_forgets_what_nobody_took(reader):
    prefetcher = Prefetcher(reader)
    prefetcher.start(["layers.0.weight"])
    prefetcher.start(["layers.2.weight"])
    assert prefetcher.take("layers.0.weight") is None
    assert torch.equal(prefetcher.take("layers.2.weight"), torch.full((3, 5), 2.0))


def test_error_of_the_reader_is_raised_by_take(reader):
    prefetcher = Prefetcher(reader)
    next(iter(reader.shards)).write_bytes(b"")
    prefetcher.start(["layers.0.weight"])
    with pytest.raises(UserError, match=r"layers\.0\.weight"):
        prefetcher.take("layers.0.weight")
