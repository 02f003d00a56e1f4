"""Checks for NaN and inf in the weights of a checkpoint, made when they are read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmquant.errors import UserError
from llmquant.models.skeleton import Skeleton


class DamagedWeights(UserError):
    """A weight holds NaN or inf; the output of the run is useless and is removed."""


def damaged_weights_error(path: Path, name: str) -> DamagedWeights:
    """Return the error that names a tensor with NaN or inf."""
    return DamagedWeights(
        f"{path}: tensor '{name}' holds NaN or inf; the checkpoint is damaged, download it again "
        "(the output of this run is removed)"
    )


def read_finite(skeleton: Skeleton, name: str) -> Tensor:
    """Read a tensor of the checkpoint. Raises DamagedWeights if it holds NaN or inf (`check_finite`)."""
    tensor = skeleton.reader.read(name)
    check_finite(skeleton, name, tensor)
    return tensor


def check_finite(skeleton: Skeleton, name: str, tensor: Tensor) -> None:
    """Raise DamagedWeights if a parameter holds NaN or inf, or a buffer holds NaN; unused tensors are skipped.

    tensor: the tensor called `name`, or a piece of it. Tensors with one byte per element (float8) are skipped, too.
    Allocates no memory of the tensor's size.
    """
    if not tensor.is_floating_point() or tensor.itemsize == 1 or name not in skeleton.used_tensors:
        return
    if not (all_finite(tensor) if name in skeleton.parameter_tensors else has_no_nan(tensor)):
        raise damaged_weights_error(skeleton.reader.path, name)


def all_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. Unlike isfinite, this allocates no memory of the tensor's size."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return `all_finite` as a tensor, bool [], on the tensor's device. The caller need not wait for a GPU."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def has_no_nan(tensor: Tensor) -> bool:
    """Whether no element is NaN. Allocates no memory of the tensor's size."""
    return tensor.numel() == 0 or not bool(torch.isnan(torch.stack(torch.aminmax(tensor))).any())
