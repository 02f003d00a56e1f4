"""Settings of PyTorch for reproducible arithmetic on a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from llmquant.models.reproducible import (
    CUBLAS_WORKSPACE,
    has_reproducible_attention,
    reproducible_arithmetic,
    reproducible_attention,
)
from llmquant.pipeline.quantize import _note_irreproducible
from llmquant.report.run_log import RunLog
from llmquant.report.schema import Message


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(autouse=True)
def unreproducible(monkeypatch):
    """Settings under which a GPU would compute in TF32 and by atomic additions."""
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    before = settings()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_deterministic_debug_mode(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.set_deterministic_debug_mode(before[2])
    torch.utils.deterministic.fill_uninitialized_memory = before[3]


def test_a_gpu_computes_float32_products_in_float32_and_sums_in_a_fixed_order(monkeypatch):
    outside = settings()
    with reproducible_arithmetic(torch.device("cuda"), print):
        assert settings() == ("highest", False, 1, False)
        assert torch.are_deterministic_algorithms_enabled()
    assert settings() == outside


def test_settings_are_restored_after_an_error():
    outside = settings()
    with pytest.raises(ValueError, match="planted"), reproducible_arithmetic(torch.device("cuda", 1), print):
        raise ValueError("planted")
    assert settings() == outside


def test_cublas_gets_its_workspace_unless_the_user_has_set_it(monkeypatch):
    import os

    with reproducible_arithmetic(torch.device("cuda"), print):
        assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    with reproducible_arithmetic(torch.device("cuda"), print):
        assert os.environ[CUBLAS_WORKSPACE] == ":16:8"


def test_a_cpu_keeps_its_settings():
    outside = settings()
    with reproducible_arithmetic(torch.device("cpu"), print):
        assert settings() == outside


def test_gradients_use_plain_attention_if_its_scores_fit_in_the_gpus_memory(monkeypatch):
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    gpu, few, many = torch.device("cuda"), 512**2 * 32, 64 * 8192**2 * 32
    assert has_reproducible_attention(gpu, few) and not has_reproducible_attention(gpu, many)
    assert has_reproducible_attention(torch.device("cpu"), many)

    def is_fused_allowed(device, num_scores):
        with reproducible_attention(device, num_scores):
            return torch.backends.cuda.flash_sdp_enabled()

    assert is_fused_allowed(gpu, many) and is_fused_allowed(torch.device("cpu"), few)
    assert not is_fused_allowed(gpu, few)
    assert torch.backends.cuda.flash_sdp_enabled(), "the setting is restored"


def test_an_operation_without_a_deterministic_kernel_is_told_and_other_warnings_are_shown(recwarn):
    told = []
    with reproducible_arithmetic(torch.device("cuda"), told.append):
        warnings.warn("foo_backward does not have a deterministic implementation, but you set it. More", stacklevel=1)
        warnings.filterwarnings("always", message="something else")
        warnings.warn("something else", stacklevel=1)
    assert told == ["foo_backward does not have a deterministic implementation, but you set it. More"]
    assert [str(warning.message) for warning in recwarn] == ["something else"]
    log = RunLog.__new__(RunLog)
    log.notes = []
    for _ in range(2):
        _note_irreproducible(log, told[0])
    assert log.notes == [
        Message(
            "reproducibility",
            "runs may differ in last bits: foo_backward does not have a deterministic implementation, but you set it",
        )
    ]
