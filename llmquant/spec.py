"""The settings of a run: `QuantSpec`, `Override`, `Recipe` and `Options`.

`QuantSpec` is the grid of a linear, `Recipe` chooses grids and methods (with an `Override` for some linears), and
`Options` holds input, output and device. This module does not import torch: the command line reads the defaults before
anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import string
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from llmquant.errors import UserError

SUPPORTED_BITS = (2, 3, 4, 8)
"""Values of `QuantSpec.bits`."""
SIZE_UNITS = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
"""Bytes of each unit, by its name."""


def parse_size(text: str, name: str) -> int:
    """Return the bytes of a size such as "3GB", "1.5 GiB" or "800000000".

    Raises UserError, which names the option by `name`, if the text is not a size.
    """
    number = text.strip().rstrip(string.ascii_letters).rstrip()
    unit = text.strip()[len(number) :].strip() or "B"
    with contextlib.suppress(ValueError):
        units = {key.lower(): factor for key, factor in SIZE_UNITS.items()}
        if unit.lower() in units and 0 < float(number) < float("inf"):
            return int(float(number) * units[unit.lower()])
    raise UserError(f"{name} '{text}': not a size; write a number and one of {', '.join(SIZE_UNITS)}, as in 3GB")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """The integer grid of one linear: `weight = scale * (code - zero)`, code and zero in 0 … 2**bits - 1."""

    bits: int = 4
    """Bits of a code."""
    group_size: int = 128
    """Input columns that share one scale and zero-point; -1 for all columns of a row. The last group may be shorter."""
    symmetric: bool = True
    """Whether the zero-point is fixed at 2**(bits-1); otherwise each group has its own integer zero-point."""

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UserError(f"bits {self.bits}: not one of {', '.join(map(str, SUPPORTED_BITS))}; use --bits 4")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(
                f"group_size {self.group_size}: must be positive, or -1 for one group; use --group-size 128"
            )

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return 2**self.bits - 1

    @property
    def mid_code(self) -> int:
        """The symmetric zero-point, 2**(bits-1)."""
        return 2 ** (self.bits - 1)

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups along in_features, a shorter last group included."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def effective_group_size(self, in_features: int) -> int:
        """Return the columns of a full group: group_size, but at most in_features."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Return the stored bits per weight: code, scale and, if asymmetric, zero-point."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + self.num_groups(in_features) * (scale_bits + zero_bits) / in_features

    def describe(self) -> str:
        """Return a short form for humans, such as `4-bit g128 sym`."""
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, kw_only=True)
class Override:
    """A change of the grid for the linears whose full name matches a pattern."""

    pattern: str
    """Shell pattern for the full name of a linear: `*.down_proj`, `model.layers.0.*`, `lm_head`."""
    bits: int | None = None
    """Bits of a code; None does not change them."""
    group_size: int | None = None
    """Input columns that share one scale; None does not change it."""
    symmetric: bool | None = None
    """Whether the zero-point is fixed; None does not change it."""
    skip: bool = False
    """Whether the linears stay in 16 bits."""

    def __post_init__(self) -> None:
        changes = self.skip + any(value is not None for value in (self.bits, self.group_size, self.symmetric))
        if not self.pattern or changes != 1:
            raise UserError(
                f"override '{self.pattern}': must change bits, group_size or symmetric, or skip, and not both; "
                "use --override '*.down_proj:bits=8,group_size=64', or --override '*.down_proj:skip'"
            )
        try:
            self.on(QuantSpec())
        except UserError as error:
            raise UserError(f"override '{self.pattern}': {error}") from None

    @classmethod
    def parse(cls, text: str) -> Override:
        """Return the override of a command-line value: `PATTERN:bits=8,group_size=64,asym`, or `PATTERN:skip`.

        Raises UserError if the value has another form.
        """
        pattern, _, changes = text.rpartition(":")
        values: dict[str, Any] = {}
        for change in changes.split(","):
            key, is_number, number = (part.strip() for part in change.partition("="))
            try:
                value = int(number) if is_number and key in ("bits", "group_size") else _OVERRIDE_WORDS[change.strip()]
            except (ValueError, KeyError):
                raise UserError(
                    f"override '{text}': '{change.strip()}' is none of bits=N, group_size=N, sym, asym, skip; "
                    "use --override '*.down_proj:bits=8,group_size=64'"
                ) from None
            key = {"sym": "symmetric", "asym": "symmetric"}.get(key, key)
            if key in values:
                raise UserError(f"override '{text}': {key} is given twice; keep one of them")
            values[key] = value
        return cls(pattern=pattern, **values)

    def __str__(self) -> str:
        """Return the command-line form, such as `--override '*.down_proj:bits=8'`."""
        words = [f"{key}={value}" for key in ("bits", "group_size") if (value := getattr(self, key)) is not None]
        words += [word for word, value in _OVERRIDE_WORDS.items() if value is self.symmetric and word != "skip"]
        return f"--override '{self.pattern}:{','.join(words) or 'skip'}'"

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the full name of a linear."""
        return fnmatchcase(name, self.pattern)

    def on(self, spec: QuantSpec) -> QuantSpec:
        """Return a grid with the changes of this override."""
        changes: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return replace(spec, **{key: value for key, value in changes.items() if value is not None})


_OVERRIDE_WORDS = {"sym": True, "asym": False, "skip": True}


EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "correct_input_error": False,
        "correct_residual_error": False,
        "output_hessian": "none",
        "exact_hessian": False,
    },
    "default": {},
    "best": {"output_hessian": "network", "descent_sweeps": 4, "refit_scales": True},
}
"""`Recipe` fields that each `--effort` sets. More effort means more computation in the search for codes."""
METHODS = ("rtn", "gptq", "awq", "awq+gptq")
"""Values of `Recipe.method`."""
RANGE_SEARCHES = ("minmax", "mse", "hessian")
"""Values of `Recipe.range_search`."""
OUTPUT_HESSIANS = ("none", "block", "network")
"""Values of `Recipe.output_hessian`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized: the grid of each linear, and the steps that choose its codes.

    The fields from `range_search` on are switches of the search; the values of `EFFORTS` are tested combinations.
    """

    method: str = "gptq"
    """rtn (round to nearest, no data), gptq, awq (scale channels, then round to nearest) or awq+gptq."""
    spec: QuantSpec = QuantSpec()
    """Grid of every linear that no override changes."""
    skip: tuple[str, ...] = ()
    """Shell patterns for the full names of linears that stay in 16 bits: `*.down_proj`, `model.layers.0.*`."""
    overrides: tuple[Override, ...] = ()
    """Changes of the grid for some linears. All that match apply in order, so the last one wins. A linear outside the
    decoder blocks, such as the head, is quantized only if an override gives it a grid."""
    target_bpw: float | None = None
    """Upper limit of the average stored bits per quantized weight. Grids are then chosen linear by linear, and `spec`
    decides only whether they are symmetric."""
    target_bytes: int | None = None
    """Upper limit of the bytes of all written tensors. It works like `target_bpw`; only one of the two can be set."""
    range_search: str = "hessian"
    """How the range of a group is chosen: the extremes of its weights (minmax), or the multiple of that range that
    minimises their squared rounding error, unweighted (mse) or weighted by the diagonal of the Hessian (hessian)."""
    activation_order: bool = True
    """Whether GPTQ rounds the columns with the largest inputs first (with static groups), not in their stored order."""
    damping: float = 0.2
    """The diagonal of the Hessian is raised by this fraction of its mean, or by more if the Hessian cannot be factored.
    Damping reduces overfitting to the calibration text."""
    exact_hessian: bool = True
    """Whether the Hessian's products are computed in float32; otherwise they are rounded to the model's dtype."""
    correct_input_error: bool = True
    """Whether GPTQ rounds a weight that is corrected for the error of its quantized input, not the original weight."""
    correct_residual_error: bool = True
    """Whether the correction also covers the error of the residual stream to which the linear's output is added."""

    output_hessian: str = "block"
    """How the rows of a linear compensate for each other's rounding errors: not at all (none), by their effect on the
    output of the decoder block (block), or by their effect on the predictions, for which the whole model runs backward
    (network). With AWQ, block and network have no effect."""
    descent_sweeps: int = 0
    """Number of sweeps of coordinate descent that improve the codes after GPTQ."""
    refit_scales: bool = False
    """Whether the scales are fitted to the codes by least squares between the sweeps of coordinate descent."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method '{self.method}': not one of {', '.join(METHODS)}; use --method gptq")
        if self.range_search not in RANGE_SEARCHES:
            raise UserError(f"range_search '{self.range_search}': not one of {', '.join(RANGE_SEARCHES)}")
        if self.output_hessian not in OUTPUT_HESSIANS:
            raise UserError(
                f"output_hessian '{self.output_hessian}': not one of {', '.join(OUTPUT_HESSIANS)}; use block"
            )
        if self.target_bpw is not None and self.target_bytes is not None:
            raise UserError(
                "target_bpw, target_bytes: only one of them can limit the size of the result; leave out the other"
            )
        if self.has_budget and not self.needs_data:
            raise UserError(
                f"method '{self.method}': grids are chosen for a budget by measurements on calibration text; "
                "use --method gptq, or leave out --target-bpw and --target-size"
            )
        if not 0 < self.damping < 1:
            raise UserError(f"damping {self.damping}: must lie between 0 and 1; 0.2 is the default")

    def overrides_of(self, name: str) -> list[Override]:
        """Return the overrides that match a linear's full name, in order."""
        return [override for override in self.overrides if override.matches(name)]

    def spec_of(self, name: str) -> QuantSpec | None:
        """Return the grid that the recipe gives a linear, or None if the last override that matches it is a skip."""
        spec, skipped = self.spec, False
        for override in self.overrides_of(name):
            spec, skipped = override.on(spec), override.skip
        return None if skipped else spec

    @property
    def is_symmetric(self) -> bool:
        """Whether every grid of the recipe is symmetric."""
        return self.spec.symmetric and not any(override.symmetric is False for override in self.overrides)

    @property
    def has_budget(self) -> bool:
        """Whether grids are chosen linear by linear to fit a budget."""
        return self.target_bpw is not None or self.target_bytes is not None

    @property
    def needs_data(self) -> bool:
        """Whether the model must run on calibration text."""
        return self.method != "rtn"

    @property
    def uses_awq(self) -> bool:
        """Whether AWQ scales input channels before rounding."""
        return self.method.startswith("awq")

    @property
    def uses_gptq(self) -> bool:
        """Whether GPTQ compensates the rounding error of each column in the columns that are not rounded yet."""
        return self.method.endswith("gptq")

    @property
    def compensates_across_rows(self) -> bool:
        """Whether rows compensate for each other's errors, in the linears for which a test confirms that it helps."""
        return self.output_hessian != "none" and self.uses_gptq and not self.uses_awq

    @property
    def runs_backward(self) -> bool:
        """Whether cross-row compensation needs the gradients of the whole model."""
        return self.compensates_across_rows and self.output_hessian == "network"

    @property
    def needs_original(self) -> bool:
        """Whether the original model must run beside the quantized one."""
        return self.uses_gptq and (self.correct_input_error or self.correct_residual_error)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Input, output and device of a run."""

    format: str = "auto"
    """Name of the format in `FORMATS`; auto is gptq, or compressed-tensors for an asymmetric grid."""
    dtype: str = "auto"
    """Dtype of the tensors that are not quantized: auto (the checkpoint's), float32, bfloat16 or float16."""
    calibration: str = "auto"
    """Preset or text file of the calibration text; auto is c4, or python-docs if the hub cannot be reached."""
    num_samples: int = 128
    """Number of windows of calibration text."""
    seq_len: int = 512
    """Number of tokens of a window."""
    seed: int = 0
    """Seed for drawing the windows."""
    device: str = "auto"
    """Device of the computation: auto, cpu, cuda or cuda:N."""
    machine: str | None = None
    """Name of the machine for which a dry run predicts memory and time (`estimates/machines.py`); None for this one."""
    engines: tuple[str, ...] = ()
    """Names of the inference engines that must load the result (`planning.engines.ENGINES`). A plan that one of them
    would not load is refused."""
    tensor_parallel: int = 1
    """Number of GPUs over which the engines split the model."""
    overwrite: bool = False
    """Whether an existing OUT is replaced once the new one is complete."""
    restart: bool = False
    """Whether the parts of an unfinished run are deleted instead of continued."""
    trust_remote_code: bool = False
    """Whether the Python code that comes with the checkpoint may run."""
    verify: bool = True
    """Whether the finished model is compared with the original on held-out text, and both continue a few prompts."""
    max_memory_bytes: int | None = None
    """Maximum memory of the run (GPU memory if it computes on a GPU). Activations that do not fit are written to disk;
    None keeps them all in memory."""
    max_shard_bytes: int = 5 * 10**9
    """Maximum bytes of the tensors in one written file. A single larger tensor is not split."""
