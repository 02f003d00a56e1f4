"""The plan of each linear: whether it is quantized, on which grid, and why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from llmquant.errors import UserError
from llmquant.formats.format import Format
from llmquant.models.blocks import has_hooks, is_linear, linear_likes_of, linear_shape, routers_of
from llmquant.models.skeleton import Skeleton
from llmquant.module_names import kind_of
from llmquant.spec import QuantSpec, Recipe

STANDARD_GROUPS = (128, 64, 32)
"""Group sizes for which every loader has kernels, largest first."""


@dataclass(frozen=True, kw_only=True)
class LinearPlan:
    """The plan for one linear of the model."""

    name: str
    """Full module name in the model."""
    block_name: str
    """Module name of its decoder block, or "" outside the decoder blocks."""
    checkpoint_name: str
    """Full module name in the checkpoint: the weight is the tensor `<checkpoint_name>.weight`."""
    out_features: int
    """Number of outputs, N."""
    in_features: int
    """Number of inputs, K."""
    spec: QuantSpec | None = None
    """Grid of the weight, or None if the linear stays in 16 bit."""
    reason: str = ""
    """Why the linear stays in 16 bit, or why its grid differs from the requested one; else empty."""
    is_never_quantized: bool = False
    """Whether the linear stays in 16 bit in every run: a router or a gate, which no engine loads quantized."""

    @property
    def local_name(self) -> str:
        """Module name within the decoder block, or the full name outside the decoder blocks."""
        return self.name.removeprefix(f"{self.block_name}.") if self.block_name else self.name

    @property
    def quant_spec(self) -> QuantSpec:
        """The grid of a linear that is quantized."""
        assert self.spec is not None
        return self.spec

    @property
    def is_skipped_by_user(self) -> bool:
        """Whether the linear stays in 16 bit because of `--skip` or an override."""
        return self.spec is None and self.reason.startswith("--")

    @property
    def kind(self) -> str:
        """Name without the block, such as `self_attn.q_proj`. Linears of one kind have the same role in every block."""
        return kind_of(self.name)


def block_name_of(name: str, block_names: Sequence[str]) -> str:
    """Return the decoder block that a module or parameter belongs to, or "" if it is outside the blocks."""
    depth = block_names[0].count(".") + 1
    block = ".".join(name.split(".")[:depth])
    return block if block in block_names else ""


def plan_linears(
    skeleton: Skeleton, block_names: Sequence[str], recipe: Recipe, format: Format, scale_dtype: torch.dtype
) -> tuple[LinearPlan, ...]:
    """Plan every linear of a model, in its order.

    scale_dtype: dtype in which the format stores scales. Raises UserError for a pattern of the recipe that matches no
    linear, and for an override that a linear cannot have.
    """
    linears = _LinearPlanner.of(skeleton, block_names, recipe, format, scale_dtype).plan_all()
    return linears if format.mixes_group_sizes else _with_one_group_size(linears, recipe, format, scale_dtype)


@dataclass(frozen=True, kw_only=True)
class _LinearPlanner:
    """A planner that decides for one linear at a time whether it is quantized, and on which grid."""

    skeleton: Skeleton
    block_names: Sequence[str]
    recipe: Recipe
    format: Format
    scale_dtype: torch.dtype
    routers: Mapping[str, str]
    """Reason not to quantize each router of the decoder blocks, by full name."""
    num_users: Mapping[str, int]
    """Number of parameters that are read from each tensor of the checkpoint."""
    num_names: Mapping[int, int]
    """Number of names under which each module of the model is registered, by its id."""

    @classmethod
    def of(
        cls, skeleton: Skeleton, block_names: Sequence[str], recipe: Recipe, format: Format, scale_dtype: torch.dtype
    ) -> _LinearPlanner:
        """Return a planner for the linears of a model."""
        model = skeleton.model
        return cls(
            skeleton=skeleton,
            block_names=block_names,
            recipe=recipe,
            format=format,
            scale_dtype=scale_dtype,
            routers={
                f"{block}.{name}": reason
                for block in block_names
                for name, reason in routers_of(model.get_submodule(block)).items()
            },
            num_users=Counter(skeleton.names.values()),
            num_names=Counter(id(module) for _, module in model.named_modules(remove_duplicate=False)),
        )

    def plan_all(self) -> tuple[LinearPlan, ...]:
        """Plan every linear of the model. Raises UserError for a pattern of the recipe that matches no linear."""
        linears = linear_likes_of(self.skeleton.model)
        plans = tuple(self.plan(name, linear) for name, linear in linears.items())
        unmatched = {
            "skip": {
                pattern for pattern in self.recipe.skip if not any(fnmatchcase(name, pattern) for name in linears)
            },
            "override": {each.pattern for each in self.recipe.overrides if not any(map(each.matches, linears))},
        }
        for option, patterns in unmatched.items():
            if patterns:
                raise UserError(
                    f"{option} pattern '{min(patterns)}': matches no linear; patterns are matched against full names, "
                    "such as '*.down_proj'"
                )
        return plans

    def plan(self, name: str, linear: nn.Module) -> LinearPlan:
        """Plan one linear. Raises UserError if an override gives it a grid that it cannot have."""
        out_features, in_features = linear_shape(linear)
        unquantized = LinearPlan(
            name=name,
            block_name=block_name_of(name, self.block_names),
            checkpoint_name=self.skeleton.names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"),
            out_features=out_features,
            in_features=in_features,
        )
        overrides, requested = self.recipe.overrides_of(name), self.recipe.spec_of(name)
        for pattern in self.recipe.skip:
            if fnmatchcase(name, pattern):
                return replace(unquantized, reason=f"--skip '{pattern}'")
        if requested is None:
            return replace(unquantized, reason=str(overrides[-1]))
        if not unquantized.block_name and not overrides:
            return replace(unquantized, reason="outside the decoder blocks")
        spec, reason = None, self._obstacle(unquantized, linear)
        if not reason:
            spec, reason = _fit_grid(requested, self.format, out_features, in_features, self.scale_dtype)
        if spec is None and overrides:
            raise UserError(f"{name}: {overrides[-1]}: {reason} (--skip '{name}' leaves it in 16 bit)")
        return replace(unquantized, spec=spec, reason=reason, is_never_quantized=name in self.routers)

    def _obstacle(self, plan: LinearPlan, linear: nn.Module) -> str:
        """Return why a linear cannot be quantized on any grid, or "" if it can."""
        if plan.name in self.routers:
            return self.routers[plan.name]
        if not is_linear(linear):
            return f"its class {type(linear).__name__} computes something other than x @ W.T + b"
        if has_hooks(linear):
            return "forward hooks may change its output, and no loader has them"
        if self.num_names[id(linear)] > 1:
            return "is registered under several names, and a loader replaces only one of them"
        weight = f"{plan.checkpoint_name}.weight"
        if self.num_users[weight] > 1:
            return f"shares its weight '{weight}' with another module, which uses it in 16 bit"
        return ""


def _fit_grid(
    spec: QuantSpec, format: Format, out_features: int, in_features: int, scale_dtype: torch.dtype
) -> tuple[QuantSpec | None, str]:
    """Return the requested grid, or the grid with the next smaller standard group size that fits, or None.

    The second value is the reason for a smaller group size or for None; else it is empty.
    """
    refusal = format.refuses(spec, out_features, in_features, scale_dtype)
    if refusal is None and (spec.group_size == -1 or in_features % spec.group_size == 0):
        return spec, ""
    requested = spec.group_size if spec.group_size != -1 else in_features
    for group_size in STANDARD_GROUPS:
        smaller = replace(spec, group_size=group_size)
        fits = group_size < requested and in_features % group_size == 0
        if fits and format.refuses(smaller, out_features, in_features, scale_dtype) is None:
            return smaller, f"group size {spec.group_size} -> {group_size}, because in_features is {in_features}"
    reason = refusal or (
        f"in_features {in_features} is not a multiple of group_size {spec.group_size}, nor of a smaller one of "
        f"{', '.join(map(str, STANDARD_GROUPS))}"
    )
    return None, reason


def _with_one_group_size(
    linears: tuple[LinearPlan, ...], recipe: Recipe, format: Format, scale_dtype: torch.dtype
) -> tuple[LinearPlan, ...]:
    """Return the linears with one group size if some of them cannot have the group size of the recipe.

    It is the largest standard group size that fits all of them. Linears whose group size is set by an override keep it.
    If no standard group size fits all, the linears are returned unchanged.
    """
    requested = recipe.spec.group_size
    sharing = {
        linear.name
        for linear in linears
        if linear.spec is not None and (spec := recipe.spec_of(linear.name)) and spec.group_size == requested
    }
    members = [linear for linear in linears if linear.name in sharing]
    sizes = {linear.quant_spec.group_size for linear in members}
    if requested == -1 or sizes <= {requested}:
        return linears
    for group_size in (size for size in STANDARD_GROUPS if size <= min(sizes)):
        specs = {linear.name: replace(linear.quant_spec, group_size=group_size) for linear in members}
        if all(
            linear.in_features % group_size == 0
            and format.refuses(specs[linear.name], linear.out_features, linear.in_features, scale_dtype) is None
            for linear in members
        ):
            widths = ", ".join(map(str, sorted({linear.in_features for linear in members})))
            reason = (
                f"group size {requested} -> {group_size}, the largest that divides the in_features of all linears "
                f"({widths}): not every {format.name} loader reads a group size per linear"
            )
            return tuple(
                replace(linear, spec=specs[linear.name], reason=reason) if linear.name in sharing else linear
                for linear in linears
            )
    return linears
