"""What to do with each linear: the grid (`QuantSpec`), the recipe that assigns grids and methods (`Recipe`, with an
`Override` for some linears), and how a run goes about it (`Options`).

Plain data, without torch: the command line reads the defaults from here before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import string
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from llmquant.errors import UserError

SUPPORTED_BITS = (2, 3, 4, 8)
SIZE_UNITS = {"B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_size(text: str, name: str) -> int:
    """Bytes that "3GB", "1.5 GiB" or "800000000" stand for; name is that of the option, for the UserError."""
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
    """Input columns that share one scale and zero; -1 = all of them. The last group may be shorter."""
    symmetric: bool = True
    """Zero-point fixed at 2**(bits-1); otherwise each group has an integer zero-point of its own."""

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
        """Groups along in_features; a shorter last group counts."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def effective_group_size(self, in_features: int) -> int:
        """Columns of a full group: group_size, or all of in_features."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Bits stored per weight: the code, and its share of the scale and (asymmetric) the zero-point."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + self.num_groups(in_features) * (scale_bits + zero_bits) / in_features

    def describe(self) -> str:
        """Short human form, as in `4-bit g128 sym`."""
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, kw_only=True)
class Override:
    """What is different for the linears whose full name matches a pattern."""

    pattern: str
    """A shell pattern: `*.down_proj`, `model.layers.0.*`, `lm_head`."""
    bits: int | None = None
    """Bits of a code; None leaves them as they are."""
    group_size: int | None = None
    """Input columns that share one scale; None leaves it as it is."""
    symmetric: bool | None = None
    """Whether the zero-point is fixed; None leaves it as it is."""
    skip: bool = False
    """Leave them in 16 bit."""

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
        """An override as the command line has it: `PATTERN:bits=8,group_size=64,asym`, or `PATTERN:skip`."""
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
                raise UserError(f"override '{text}': says {key} twice; keep one of them")
            values[key] = value
        return cls(pattern=pattern, **values)

    def __str__(self) -> str:
        """The command line's form, as in `--override '*.down_proj:bits=8'`."""
        words = [f"{key}={value}" for key in ("bits", "group_size") if (value := getattr(self, key)) is not None]
        words += [word for word, value in _OVERRIDE_WORDS.items() if value is self.symmetric and word != "skip"]
        return f"--override '{self.pattern}:{','.join(words) or 'skip'}'"

    def matches(self, name: str) -> bool:
        """Whether it is about the linear of that full name."""
        return fnmatchcase(name, self.pattern)

    def on(self, spec: QuantSpec) -> QuantSpec:
        """The grid with what this changes."""
        changes: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return replace(spec, **{key: value for key, value in changes.items() if value is not None})


_OVERRIDE_WORDS = {"sym": True, "asym": False, "skip": True}


EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "input_error_target": False,
        "residual_target": False,
        "output_feedback": "none",
        "exact_hessian": False,
    },
    "default": {},
    "best": {"output_feedback": "network", "descent_sweeps": 4, "refit_scales": True},
}
"""Steps of a recipe by how much search is spent on it."""
METHODS = ("rtn", "gptq", "awq", "awq+gptq")
RANGE_SEARCHES = ("minmax", "mse", "hessian")
OUTPUT_FEEDBACKS = ("none", "block", "network")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized: which grid each linear gets, and which steps choose its codes."""

    method: str = "gptq"
    """rtn (round to nearest, no data), gptq, awq (scale channels, then round to nearest) or awq+gptq."""
    spec: QuantSpec = QuantSpec()
    """The grid of every linear."""
    skip: tuple[str, ...] = ()
    """Shell patterns of linears left in 16 bit, matched against the full name: `*.down_proj`, `model.layers.0.*`."""
    overrides: tuple[Override, ...] = ()
    """What is different for some linears, in order: each changes what those before it left, so the last word counts. A
    linear outside the decoder blocks, such as the head, is quantized only if one of these gives it a grid."""
    target_bpw: float | None = None
    """Average stored bits per quantized weight: grids are then chosen linear by linear, by what they cost the model,
    and `spec` only says whether they are symmetric."""
    target_bytes: int | None = None
    """The same by the bytes of all tensors that are written."""
    range_search: str = "hessian"
    """How a group's range is chosen: minmax, mse, or hessian (weighted by the diagonal of the Hessian)."""
    activation_order: bool = True
    """Round the columns with the largest inputs first (static groups), not in their own order."""
    damping: float = 0.2
    """Added to the diagonal of the Hessian, as a fraction of its mean; raised where the Hessian cannot be factored.
    It keeps a solution from fitting the calibration text instead of the language."""
    exact_hessian: bool = True
    """Multiply the inputs in float32; otherwise in the dtype of the network, whose products are rounded to it."""
    input_error_target: bool = True
    """Round the weight that makes up for the error already in the linear's input, not the original weight."""
    residual_target: bool = True
    """Also make up for the error already in the residual stream that the linear's output is added to."""

    output_feedback: str = "block"
    """Whether rows make up for each other's errors, where the outputs of a linear do not matter each by itself: none;
    block, by what they mean to the block (queries and keys); or network, by what they mean to the predictions, for
    which the network runs backward too. Not with AWQ's scales."""
    descent_sweeps: int = 0
    """Sweeps of coordinate descent over the codes after GPTQ."""
    refit_scales: bool = False
    """Fit the scales to the codes by least squares between sweeps."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method '{self.method}': not one of {', '.join(METHODS)}; use --method gptq")
        if self.range_search not in RANGE_SEARCHES:
            raise UserError(f"range_search '{self.range_search}': not one of {', '.join(RANGE_SEARCHES)}")
        if self.output_feedback not in OUTPUT_FEEDBACKS:
            raise UserError(
                f"output_feedback '{self.output_feedback}': not one of {', '.join(OUTPUT_FEEDBACKS)}; use block"
            )
        if self.target_bpw is not None and self.target_bytes is not None:
            raise UserError(
                "target_bpw, target_bytes: one of them says how large the result may be; leave out the other"
            )
        if self.has_budget and not self.needs_data:
            raise UserError(
                f"method '{self.method}': grids are chosen to a budget by what the network makes of calibration text; "
                "use --method gptq, or leave out --target-bpw and --target-size"
            )
        if not 0 < self.damping < 1:
            raise UserError(f"damping {self.damping}: must lie between 0 and 1; 0.2 is the default")

    def overrides_of(self, name: str) -> list[Override]:
        """The overrides that a linear's full name matches, in order."""
        return [override for override in self.overrides if override.matches(name)]

    def spec_of(self, name: str) -> QuantSpec | None:
        """The grid that is asked for a linear, or None where the last override it matches says skip."""
        spec, skipped = self.spec, False
        for override in self.overrides_of(name):
            spec, skipped = override.on(spec), override.skip
        return None if skipped else spec

    @property
    def is_symmetric(self) -> bool:
        """Whether every grid it can give is symmetric."""
        return self.spec.symmetric and not any(override.symmetric is False for override in self.overrides)

    @property
    def has_budget(self) -> bool:
        """Whether grids are chosen linear by linear."""
        return self.target_bpw is not None or self.target_bytes is not None

    @property
    def needs_data(self) -> bool:
        """Whether the network has to be run on calibration text."""
        return self.method != "rtn"

    @property
    def smooths(self) -> bool:
        """Whether input channels are scaled before anything is rounded."""
        return self.method.startswith("awq")

    @property
    def compensates(self) -> bool:
        """Whether GPTQ moves each column's rounding error onto the columns still to come."""
        return self.method.endswith("gptq")

    @property
    def feeds_back(self) -> bool:
        """Whether rows make up for each other's errors, where that holds."""
        return self.output_feedback != "none" and self.compensates and not self.smooths

    @property
    def runs_backward(self) -> bool:
        """Whether that takes the gradients of the whole network."""
        return self.feeds_back and self.output_feedback == "network"

    @property
    def needs_original(self) -> bool:
        """Whether the original network has to walk beside the quantized one."""
        return self.compensates and (self.input_error_target or self.residual_target)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is done: what it reads, what it writes, and where it computes."""

    format: str = "auto"
    """A name of `FORMATS`, or auto: gptq; compressed-tensors for an asymmetric grid."""
    dtype: str = "auto"
    """Of what is not quantized: auto (as it is), float32, bfloat16 or float16."""
    calibration: str = "auto"
    """A preset or a text file (`textdata.load_rows`); auto: c4, or python-docs where the hub cannot be reached."""
    num_samples: int = 128
    """Windows of calibration text."""
    seq_len: int = 512
    """Tokens of a window."""
    seed: int = 0
    """Of the draw of windows."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    targets: tuple[str, ...] = ()
    """Engines that are to load the result (`pipeline.targets.TARGETS`); what one of them would not is refused."""
    tensor_parallel: int = 1
    """GPUs over which those engines will split the model."""
    overwrite: bool = False
    """Replace OUT, once the new one is complete."""
    restart: bool = False
    """Forget what an unfinished run has left."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the checkpoint."""
    verify: bool = True
    """Compare the finished model with the original on held-out text, and let both continue a few prompts."""
    max_memory_bytes: int | None = None
    """Most memory that the run may take (of the GPU, where it computes there). Activations that do not fit go to the
    disk; None lets them all stay."""
    max_shard_bytes: int = 5 * 10**9
    """Largest size of a written file."""
