"""A prediction of the duration of a run on a named machine (`machines.py`), without that machine.

Nothing is measured. The operations and bytes of each step follow from the shapes of the model, and the rates from data
sheets. The constants below, and the efficiencies in `machines.py`, are guesses unless they name a source. A step takes
the longest of three times: its operations, its bytes, and the launches that the processor makes.

The ranks of several cards divide the samples (whole pieces of them) and the linears of each input group. Each rank
computes the factor and the error corrections of a group by itself. Gradients, output-side Hessians, hashing, writing
and verification are work of rank 0.

Letters: K in_features, N out_features, T tokens, L tokens of a sequence, G groups of columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmquant.algorithms.coordinate_descent import BLOCK_COLUMNS
from llmquant.algorithms.cross_row import MAX_ROW_BLOCKS, MAX_SLICE_ROWS, row_slices
from llmquant.algorithms.grid import SHRINK_STEPS
from llmquant.checkpoints.reader import HASHING_THREADS
from llmquant.data.calibration import num_held_out
from llmquant.errors import UserError
from llmquant.estimates.duration import FORWARD_BACKWARD, input_groups
from llmquant.estimates.machines import Machine, largest_share, on_machine
from llmquant.models.blocks import weight_of
from llmquant.models.blockwise_forward import PASS_TOKENS, SEQUENCES_AT_ONCE
from llmquant.planning.held_out import num_windows, window_length
from llmquant.planning.linears import LinearPlan
from llmquant.planning.plan import Plan
from llmquant.solver.division import divide_tasks
from llmquant.solver.gradients import MEASURED_TOKENS, READS_PER_BLOCK, tokens_at_once
from llmquant.solver.output_hessian import num_gradient_sequences
from llmquant.solver.reduction import NUM_CHUNKS, NUM_PIECES, piece_of

COLUMN_SECONDS = 0.4e-6
"""Time of one column in the kernel of the column loop, which handles all rows at once: the latency of its chain of
dependent instructions (computed)."""
PANEL_SECONDS = 60e-6
"""Time that the processor takes to launch the kernel of a panel and its matmul."""
LAUNCH_SECONDS = 10e-6
"""Time that the processor takes to launch one operation of PyTorch."""
BLOCK_PASS_SECONDS = 1.0e-3
"""Time that the processor takes to launch a decoder block for one pass. A Llama block alone takes half of that."""
LINEAR_LAUNCHES = 150
"""Operations of PyTorch for a linear besides its panels."""
STATISTICS_LAUNCHES = 25
"""Operations of PyTorch to add the inputs of a few sequences."""
FACTORING_SECONDS = 8e-3
"""Time to factor the output-side Hessians of a linear's row slices of one size, and to test them on the other split:
six batches of Cholesky factorizations or triangular solves of at most 1024 rows, which are bound by latency."""
COMPENSATED = ("q_proj", "k_proj")
"""Linears for which cross-row compensation by the block is assumed to be confirmed, as on SmolLM2-135M."""
MATMUL_EFFICIENCY = 0.7
"""Rate of the model's matmuls / rate of large matmuls."""
SEARCH_OPERATIONS, SEARCH_EFFICIENCY = 12, 0.25
"""Operations per weight and candidate range, and the fraction of the float32 rate at which they run."""
BATCHED_SOLVE_EFFICIENCY = 0.05
"""Fraction of the float64 rate at which many small systems are solved."""
STATISTICS_BYTES, SOLVING_BYTES, ROUNDING_BYTES = 30, 150, 60
"""Bytes moved per input value for its statistics, per weight of a linear besides matmuls, and per weight that is
rounded without data."""
PAGEABLE_FRACTION = 0.3
"""Rate of copies between the GPU and memory that is not pinned / rate of pinned memory."""
RESULTS_PER_SECOND = 2.0e9
"""Bytes per second of results that a rank sends to the others (gloo)."""
DRAWN_PER_SECOND = 1.0e8
"""Normal random numbers per second that the processor draws."""
START_SECONDS = 30.0
"""Imports, the first use of the GPU, tokenizing, the sample texts and the report."""


@dataclass(frozen=True)
class MachineDuration:
    """The predicted duration of a run on a machine, without downloads."""

    machine: Machine
    """The machine."""
    num_blocks: int
    """Number of decoder blocks."""
    block_steps: Mapping[str, float]
    """Seconds of each step in all blocks together, by name."""
    other_steps: Mapping[str, float]
    """Seconds of each step before and after the blocks, by name."""
    samples_per_card: int
    """Samples of the rank that has most of them."""

    @property
    def basis(self) -> str:
        """What the prediction rests on."""
        return "a prediction from shapes, data sheets and guesses, not a measurement of a run"

    @property
    def seconds_per_block(self) -> float:
        """Mean seconds of one block."""
        return sum(self.block_steps.values()) / self.num_blocks

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(self.block_steps.values()) + sum(self.other_steps.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain values, for JSON."""
        blocks = {name: seconds / self.num_blocks for name, seconds in self.block_steps.items()}
        return {
            "machine": {**self.machine.to_dict(), "samples_per_card": self.samples_per_card, "basis": self.basis},
            "predicted_seconds": self.seconds,
            "predicted_seconds_of_steps": {**self.other_steps, **self.block_steps},
            "predicted_seconds_of_steps_per_block": blocks,
        }


def predict_duration(plan: Plan, machine: Machine) -> MachineDuration:
    """Predict the duration of a run on a machine. Raises UserError for a recipe that cannot be predicted."""
    if plan.recipe.uses_awq:
        raise UserError(
            f"machine '{machine.title}': the time of method '{plan.recipe.method}' on another machine cannot be "
            "predicted yet; use --method gptq or rtn, or leave out --machine"
        )
    model = _Model(on_machine(plan, machine), machine, plan.options.num_samples)
    blocks = _added(model.block(index) for index in range(len(plan.block_names)))
    return MachineDuration(machine, len(plan.block_names), blocks, model.other_steps(), model.sequences)


class _Model:
    """The times of the steps of one run on one machine."""

    def __init__(self, plan: Plan, machine: Machine, num_samples: int) -> None:
        """plan: the plan on the machine (`on_machine`). num_samples: samples of all ranks."""
        self.plan, self.machine, self.recipe = plan, machine, plan.recipe
        self.num_samples = num_samples if plan.recipe.needs_data else 0
        self.seq_len = plan.options.seq_len
        self.sequences = largest_share(self.num_samples, machine.cards)
        """Samples of the rank that has most of them."""
        tensors = [plan.tensors_of_block(index).values() for index in range(len(plan.block_names))]
        self.parameters = [sum(math.prod(info.shape) for info in infos) for infos in tensors]
        """Number of parameters of each block."""
        self.num_bytes = [sum(math.prod(info.shape) * info.dtype.itemsize for info in infos) for infos in tensors]
        """Bytes of each block in the checkpoint."""

    # --- one block ----------------------------------------------------------------------------------------------------

    def block(self, index: int) -> dict[str, float]:
        """Return the seconds of each step of one block."""
        groups = input_groups(self.plan, index)
        steps: dict[str, float] = {}
        if self.recipe.needs_data:
            networks = 2 if self.recipe.needs_original else 1
            steps["forward"] = networks * self._forward(index) + self._pass_seconds(index)
            if self.recipe.compensates_across_rows:
                steps["output Hessians"] = self._output_hessians(index)
            steps["statistics"] = sum(map(self._statistics, groups))
            steps |= _added(map(self._solving, groups))
            steps["exchange"] = sum(map(self._exchange, groups))
        else:
            weights = sum(map(_num_weights, self.plan.linears_of_block(index).values()))
            steps["rounding"] = weights * ROUNDING_BYTES / self.machine.memory.per_second
        steps["digests and copies"] = self._digests(index)
        # The next block is read, and the last one packed and written, while this one is quantized.
        num_bytes = self.num_bytes[index]
        reading, writing = num_bytes / self.machine.disk_read.per_second, self._writing(index)
        busy = sum(steps.values())
        steps["reading"] = num_bytes / self.machine.host.per_second + max(reading - busy, 0.0)
        steps["waiting for writing"] = max(writing - busy, 0.0)
        return {name: seconds for name, seconds in steps.items() if seconds > 0}

    @property
    def _passes(self) -> tuple[int, int]:
        """The passes of one sequence, and those of several, of the rank that has most samples (`block_loop.py`)."""
        single = min(self.sequences, -(-self.num_samples // NUM_CHUNKS))
        several = max(1, min(PASS_TOKENS // self.seq_len, self.num_samples // NUM_PIECES))
        return single, -(-(self.sequences - single) // several)

    def _forward(self, index: int) -> float:
        """Return the seconds of all forward passes of one network through a block."""
        operations = 2 * self.parameters[index] * self.seq_len * self.sequences
        each = max(self.num_bytes[index] / self.machine.memory.per_second, BLOCK_PASS_SECONDS)
        return max(operations / self._matmul_rate, sum(self._passes) * each)

    def _pass_seconds(self, index: int) -> float:
        """Return the seconds of one forward pass of one sequence through a block."""
        operations = 2 * self.parameters[index] * self.seq_len
        bytes_seconds = self.num_bytes[index] / self.machine.memory.per_second
        return max(operations / self._matmul_rate, bytes_seconds, BLOCK_PASS_SECONDS)

    def _statistics(self, group: list[LinearPlan]) -> float:
        """Return the seconds of summing the statistics of one input group on the rank with most samples."""
        in_features, tokens = group[0].in_features, self.sequences * self.seq_len
        writes_residual = len(group) == 1
        operations, num_sums = 2.0 * tokens * in_features**2, 1
        if self.recipe.needs_original:
            # A linear that writes to the residual stream: its drift, and two pieces of its moment.
            moment = 6 * tokens * _num_weights(group[0]) if writes_residual else 2 * tokens * in_features**2
            operations, num_sums = operations + moment, 2
        single, several = self._passes
        adds = max(-(-single // SEQUENCES_AT_ONCE) + several, -(-self._num_pieces // self.machine.cards))
        pieces = -(-self._num_pieces // self.machine.cards)
        moved = (8 * adds + 12 * pieces) * num_sums * in_features**2 + STATISTICS_BYTES * tokens * in_features
        seconds = operations / self._matmul_rate + moved / self.machine.memory.per_second
        return max(seconds, adds * STATISTICS_LAUNCHES * LAUNCH_SECONDS)

    def _output_hessians(self, index: int) -> float:
        """Return the seconds of the output-side Hessians of one block, which rank 0 measures or reads from disk."""
        linears = self.plan.linears_of_block(index).values()
        slices = [rows.stop - rows.start for linear in linears for rows in row_slices(linear.out_features)]
        if self.recipe.runs_backward:  # They were measured before the first block.
            return sum(4 * rows**2 for rows in slices) / self.machine.disk_read.per_second
        sequences = num_gradient_sequences(self.num_samples, self.seq_len)
        drawn = sequences * self.seq_len * self._hidden / DRAWN_PER_SECOND
        return sequences * FORWARD_BACKWARD * self._pass_seconds(index) + drawn + _factoring_seconds(linears)

    def _solving(self, group: list[LinearPlan]) -> dict[str, float]:
        """Return the seconds of quantizing one input group on the rank with most work."""
        in_features = group[0].in_features
        square, machine = in_features**2, self.machine
        steps: dict[str, float] = {}
        # Every rank factors the Hessian (K^3 / 3 operations, and as many for the inverse), and fits all corrections.
        steps["factors"] = 2 / 3 * in_features**3 / machine.float64.per_second + 60 * square / machine.memory.per_second
        if self.recipe.needs_original:
            products = 3 if len(group) == 1 else 5
            weights = sum(map(_num_weights, group))
            steps["corrections"] = 2 * products * in_features * weights / machine.float32.per_second
        each = {linear.name: self._linear(linear) for linear in group}
        costs = {linear.name: _num_weights(linear) for linear in group}
        shares = (_added(each[name] for name in names) for names in divide_tasks(costs, machine.cards))
        return _added([steps, max(shares, key=lambda share: sum(share.values()))])

    def _linear(self, linear: LinearPlan) -> dict[str, float]:
        """Return the seconds of quantizing one linear, after the factor and the correction."""
        in_features, weights, recipe = linear.in_features, _num_weights(linear), self.recipe
        product = 2 * in_features * weights / self.machine.float32.per_second  # H E, for an error E [K, N]
        compensated = self._is_compensated(linear)
        row_blocks = min(MAX_ROW_BLOCKS, linear.out_features) if compensated else 1
        panels = -(-in_features // BLOCK_COLUMNS)
        loop = row_blocks * panels * max(BLOCK_COLUMNS * COLUMN_SECONDS, PANEL_SECONDS)
        steps: dict[str, float] = {}
        search = weights * SHRINK_STEPS * SEARCH_OPERATIONS / SEARCH_EFFICIENCY
        steps["range search"] = search / self.machine.float32.per_second
        steps["column loops"] = loop
        # The trailing products take K^2 N operations, half a product. Errors are measured against the target, and with
        # compensation also against the values that were rounded.
        errors = 5 if compensated else 3
        between_rows = in_features * linear.out_features * MAX_SLICE_ROWS / self.machine.float32.per_second
        moved = weights * SOLVING_BYTES / self.machine.memory.per_second
        steps["trailing products"] = product / 2
        steps["errors"] = max(errors * product + moved, LINEAR_LAUNCHES * LAUNCH_SECONDS)
        steps["compensation"] = between_rows if compensated else 0.0
        if sweeps := recipe.descent_sweeps:
            refits = sweeps - 1 if recipe.refit_scales else 0
            num_groups = linear.quant_spec.num_groups(in_features)
            solve = (
                2
                / 3
                * num_groups**3
                * linear.out_features
                / (self.machine.float64.per_second * BATCHED_SOLVE_EFFICIENCY)
            )
            launches = row_blocks * num_groups * 4 * LAUNCH_SECONDS
            steps["coordinate descent"] = sweeps * (loop + 1.5 * product)
            steps["refitted scales"] = refits * (max(2 * product, launches) + solve)
        return steps

    def _is_compensated(self, linear: LinearPlan) -> bool:
        """Whether the rows of a linear are assumed to compensate for each other's errors."""
        recipe = self.recipe
        return recipe.compensates_across_rows and (
            recipe.runs_backward or linear.name.rpartition(".")[2] in COMPENSATED
        )

    def _exchange(self, group: list[LinearPlan]) -> float:
        """Return the seconds of passing sums from rank to rank and back, and of sending the results."""
        cards, in_features = self.machine.cards, group[0].in_features
        if cards == 1:
            return 0.0
        moment = _num_weights(group[0]) if len(group) == 1 else in_features**2
        sums = 4 * (in_features**2 + (2 * moment if self.recipe.needs_original else 0))
        return cards * sums / self.machine.link.per_second + sum(map(_num_weights, group)) / RESULTS_PER_SECOND

    def _digests(self, index: int) -> float:
        """Return the seconds of the digests of a block, of which threads compute one for each linear of a group, and of
        copying its codes to main memory and back."""
        groups = input_groups(self.plan, index)
        hashed = sum(max(map(_num_weights, group)) for group in groups)
        codes = sum(_num_weights(linear) for group in groups for linear in group)
        return hashed / self.machine.hashing.per_second + 2 * codes / (PAGEABLE_FRACTION * self.machine.host.per_second)

    def _writing(self, index: int) -> float:
        """Return the seconds of packing, hashing and writing a block."""
        linears = self.plan.linears_of_block(index).values()
        codes, packed = sum(map(_num_weights, linears)), sum(map(self.plan.packed_bytes, linears))
        return (codes + packed) / (PAGEABLE_FRACTION * self.machine.host.per_second) + self._write_seconds(packed)

    # --- before and after the blocks ----------------------------------------------------------------------------------

    def other_steps(self) -> dict[str, float]:
        """Return the seconds of each step before and after the blocks."""
        plan, machine = self.plan, self.machine
        hashed = min(machine.disk_read.per_second, HASHING_THREADS * machine.hashing.per_second)
        outside = sum(math.prod(info.shape) * info.dtype.itemsize for info in plan.tensors_outside().values())
        steps = {"start and end": START_SECONDS, "hashing": plan.reader.total_bytes / hashed}
        if self.recipe.has_budget:
            steps["sensitivity"] = self._backprop(min(MEASURED_TOKENS, self.num_samples * self.seq_len), 1)
        if self.recipe.runs_backward:
            steps["gradients"] = self._gradients()
        steps["tensors outside the blocks"] = outside / machine.disk_read.per_second + self._write_seconds(outside)
        steps["shards"] = self._write_seconds(plan.output_bytes)
        steps["verifying"] = self._verifying(outside)
        return steps

    def _gradients(self) -> float:
        """Return the seconds of running the whole model backward on rank 0, with sums of each block on disk."""
        at_once = tokens_at_once(self.plan, self.machine.memory_bytes) // self.seq_len
        batches = -(-self.num_samples // max(1, min(at_once, self.num_samples // 2)))
        slices = [rows.stop - rows.start for linear in self.plan.quantized for rows in row_slices(linear.out_features)]
        sums = 2 * sum(4 * rows**2 for rows in slices)
        tokens = self.num_samples * self.seq_len
        products = 2 * tokens * sum(rows**2 for rows in slices) / self._matmul_rate
        rates = 1 / self.machine.disk_read.per_second + 1 / self.machine.disk_write.per_second
        tests = _factoring_seconds(self.plan.quantized) + self._write_seconds(sums // 2)
        return self._backprop(tokens, batches) + products + batches * sums * rates + tests

    def _backprop(self, tokens: int, batches: int) -> float:
        """Return the seconds of running tokens forward and backward through the whole model, in some batches."""
        num_bytes, parameters = sum(self.num_bytes), sum(self.parameters)
        reading = 1 / self.machine.disk_read.per_second + 1 / self.machine.host.per_second
        # Forward to find the body, forward, forward again, and backward, which takes two.
        operations = 2 * tokens * (5 * parameters + FORWARD_BACKWARD * self._head)
        return (batches * READS_PER_BLOCK + 1) * num_bytes * reading + operations / self._matmul_rate

    def _verifying(self, outside: int) -> float:
        """Return the seconds of reading the result back, and of comparing both models on held-out text."""
        plan, machine = self.plan, self.machine
        codes = sum(map(_num_weights, plan.quantized))
        reading = (plan.output_bytes + outside) / machine.disk_read.per_second
        seconds = reading + codes / machine.hashing.per_second
        if plan.options.verify:
            length = window_length(plan.config)
            windows, tokens = num_windows(length), num_windows(length) * length
            if self.num_samples:
                windows += num_held_out(self.num_samples)
                tokens += num_held_out(self.num_samples) * self.seq_len
            parameters = sum(self.parameters) + self._head
            launches = 2 * windows * len(self.parameters) * BLOCK_PASS_SECONDS
            both = (plan.reader.total_bytes + plan.output_bytes) / machine.disk_read.per_second
            seconds += both + max(2 * 2 * tokens * parameters / self._matmul_rate, launches)
        return seconds

    # --- sizes and rates ----------------------------------------------------------------------------------------------

    @property
    def _matmul_rate(self) -> float:
        """Operations per second of matmuls in the dtype of the model, also of those with float32 sums."""
        is_16_bit = self.plan.skeleton.dtype.itemsize == 2
        return MATMUL_EFFICIENCY * self.machine.bfloat16.per_second if is_16_bit else self.machine.float32.per_second

    @property
    def _num_pieces(self) -> int:
        return len({piece_of(sample, self.num_samples) for sample in range(self.num_samples)})

    @property
    def _head(self) -> int:
        return weight_of(self.plan.skeleton.model.get_input_embeddings()).numel()

    @property
    def _hidden(self) -> int:
        return weight_of(self.plan.skeleton.model.get_input_embeddings()).shape[1]

    def _write_seconds(self, num_bytes: int) -> float:
        """Return the seconds of hashing and writing a file."""
        return num_bytes / self.machine.hashing.per_second + num_bytes / self.machine.disk_write.per_second


def _added(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of the seconds of each step."""
    total: defaultdict[str, float] = defaultdict(float)
    for steps in several:
        for name, seconds in steps.items():
            total[name] += seconds
    return dict(total)


def _factoring_seconds(linears: Iterable[LinearPlan]) -> float:
    """Return the seconds of factoring output-side Hessians: row slices of one linear and of one size go together."""
    sizes = (len({rows.stop - rows.start for rows in row_slices(linear.out_features)}) for linear in linears)
    return FACTORING_SECONDS * sum(sizes)


def _num_weights(linear: LinearPlan) -> int:
    return linear.in_features * linear.out_features
