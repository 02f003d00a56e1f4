"""Every backend computes the definition in `reference.py`, and the torch operator passes torch's checks."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from kernel_cases import CPU, SHAPES, exact_product, random_weight, relative_error

from llmquant.errors import UserError
from llmquant.kernels.dispatch import BACKENDS, choose_backend, explain_choice, matmul
from llmquant.kernels.layout import LinearShape, arrange_slots
from llmquant.runtime.linear import QuantizedLinear
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

CPU_BACKENDS = [
    name
    for name, backend in BACKENDS.items()
    if backend.refuses(LinearShape.of_sizes(64, 64, QuantSpec()), CPU, torch.bfloat16) is None
]
"""Backends that run on this machine without a GPU. `test_triton.py` tests the others."""


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_one_hot_rows_return_the_weight(name, symmetric):
    weight = random_weight(48, 96, group_size=32, symmetric=symmetric)
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=CPU, backend=name)
    dense_NK, one_hot = weight.dequantize(torch.bfloat16), torch.eye(96).bfloat16()
    assert torch.equal(linear(one_hot).T, dense_NK)
    # The kernel for few rows rounds only the offset of asymmetric weights.
    few = torch.cat([linear(rows) for rows in one_hot.split(4)]).T
    tolerance = {"rtol": 0, "atol": 0} if symmetric else {"rtol": 2**-7, "atol": 8 * 0.025 * 2**-8}
    torch.testing.assert_close(few, dense_NK, **tolerance)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_negative_scales_of_other_tools_work(name):
    weight = random_weight(48, 96, group_size=32)
    weight.scale_NG[::2] *= -1
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=CPU, backend=name)
    one_hot = torch.eye(96).bfloat16()
    for result in (linear(one_hot), torch.cat([linear(rows) for rows in one_hot.split(4)])):
        assert torch.equal(result.T, weight.dequantize(torch.bfloat16))


def test_unknown_backend_is_a_user_error():
    with pytest.raises(UserError, match="not one of auto"):
        choose_backend(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16, "cuda")


def test_environment_variable_decides_if_no_backend_is_requested(monkeypatch):
    monkeypatch.setenv("LLMQUANT_BACKEND", "torch")
    choice = explain_choice(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16)
    assert choice.backend.name == "torch" and "LLMQUANT_BACKEND" in choice.reason


@pytest.mark.slow
def test_operator_passes_opcheck():
    linear = QuantizedLinear(random_weight(16, 64), None, dtype=torch.float32, device=CPU, backend="torch")
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(matmul, (x, list(linear.prepared), None, "torch", linear.shape.as_ints()))


def test_gradient_of_the_input_equals_the_gradient_of_the_dense_linear():
    weight = random_weight(16, 64)
    linear = QuantizedLinear(weight, torch.randn(16), dtype=torch.float32, device=CPU, backend="torch")
    x = torch.randn(3, 5, 64, requires_grad=True)
    linear(x).square().sum().backward()
    grad, x.grad = x.grad, None
    torch.nn.functional.linear(x, weight.dequantize(), linear.bias).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


def skip_if_refused(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Skip the test if the backend cannot run the weight on this machine."""
    if (reason := BACKENDS[name].refuses(LinearShape.of(weight), CPU, dtype)) is not None:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_dequantize_returns_the_dense_weight(name, dtype, case):
    weight = random_weight(**case)
    skip_if_refused(name, weight, dtype)
    linear = QuantizedLinear(weight, None, dtype=dtype, device=CPU, backend=name)
    assert torch.equal(linear.dequantize(), weight.dequantize(dtype))


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_error_is_close_to_the_error_of_plain_torch(name, dtype, case):
    weight = random_weight(**case)
    skip_if_refused(name, weight, dtype)
    torch.manual_seed(0)
    linear = QuantizedLinear(weight, torch.randn(weight.out_features), dtype=dtype, device=CPU, backend=name)
    for rows in (1, 5, 40, 200):
        x = torch.randn(rows, weight.in_features).to(dtype)
        exact = exact_product(x, weight, linear.bias)
        plain = relative_error(torch.nn.functional.linear(x, weight.dequantize(dtype), linear.bias), exact)
        # Few rows in `cpu`: the offset is rounded instead of the weight, and the bias is added after a rounding.
        assert relative_error(linear(x), exact) <= (1.6 if rows < 48 else 1.25) * plain


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_symmetric_weights_are_not_rounded_on_the_cpu(name):
    """Without offset and bias, the packed kernel rounds only the output."""
    weight = random_weight(256, 512, group_size=128)
    x = torch.randn(4, 512).bfloat16() + 1
    exact = exact_product(x, weight)
    y = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=CPU, backend=name)(x)
    rounded_weight = 1.2 if name == "torch" else 1.01
    assert relative_error(y, exact) <= rounded_weight * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_leading_dimensions_and_empty_batches_are_kept(name):
    weight = random_weight(48, 96, group_size=32)
    linear = QuantizedLinear(weight, None, dtype=torch.bfloat16, device=CPU, backend=name)
    x = torch.randn(2, 3, 96).bfloat16()
    torch.testing.assert_close(linear(x), linear(x.view(6, 96)).view(2, 3, 48))
    assert linear(x[:0]).shape == (0, 3, 48)
    # A slice of the columns of a wider tensor, as attention code passes it.
    torch.testing.assert_close(linear(torch.cat([x, x], dim=-1)[..., 96:]), linear(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_one_graph_under_compile_and_export(name):
    weight = random_weight(48, 96, group_size=32)
    linear = QuantizedLinear(weight, torch.randn(48), dtype=torch.bfloat16, device=CPU, backend=name)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for rows in (1, 3, 60):
            x = torch.randn(rows, 96).bfloat16()
            assert torch.equal(compiled(x), linear(x))
    dynamic = {"x": {0: torch.export.Dim("rows", min=2)}}
    program = torch.export.export(linear, (torch.randn(4, 96).bfloat16(),), dynamic_shapes=dynamic)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.llmquant.matmul.default in calls
    x = torch.randn(50, 96).bfloat16()
    torch.testing.assert_close(program.module()(x), linear(x))


def test_dtype_device_and_shape_of_the_weight_need_no_dense_weight(monkeypatch):
    linear = QuantizedLinear(random_weight(16, 64), None, dtype=torch.bfloat16, device=CPU)
    dense = linear.dequantize()
    assert torch.equal(linear.weight.T, dense.T) and torch.equal(torch.relu(linear.weight), torch.relu(dense))
    monkeypatch.setattr(QuantizedLinear, "dequantize", lambda *_: pytest.fail("made dense"))
    weight = linear.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, CPU, (16, 64))


def test_moving_keeps_the_codes_and_casting_is_refused():
    weight = random_weight(16, 64)
    linear = QuantizedLinear(weight, torch.randn(16), dtype=torch.bfloat16, device=CPU, backend="torch")
    before = linear.dequantize()
    assert torch.equal(linear.to("cpu", torch.bfloat16).dequantize(), before)
    with pytest.raises(UserError, match="cannot be cast"):
        linear.half()
    assert list(linear.state_dict()) == ["bias", "weight_packed", "weight_scale", "weight_shape"]


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_deep_copies_and_pickles_are_the_same(name):
    linear = QuantizedLinear(random_weight(32, 64), torch.randn(32), dtype=torch.bfloat16, device=CPU, backend=name)
    assert torch.equal(copy.copy(linear.weight).T, linear.dequantize().T)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), copy.copy(linear)):
        assert [tensor.layout for tensor in twin.prepared] == [tensor.layout for tensor in linear.prepared]
        for rows in (2, 40):
            x = torch.randn(rows, 64).bfloat16()
            assert torch.equal(twin(x), linear(x))


def test_wrong_dtype_of_x_is_refused():
    linear = QuantizedLinear(random_weight(16, 64), None, dtype=torch.bfloat16, device=CPU)
    with pytest.raises(TypeError, match="float32"):
        linear(torch.randn(1, 64))


def test_refusals_give_the_reason():
    choice = explain_choice(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16, "torch")
    assert "NVIDIA" in choice.refusals["triton"] and choice.reason == "requested"
    with pytest.raises(UserError, match=r"cannot run 64x16 4-bit g64 sym on cpu.*NVIDIA"):
        choose_backend(LinearShape.of(random_weight(16, 64)), CPU, torch.bfloat16, "triton")


def test_linears_that_no_other_backend_supports_run_by_the_definition():
    backend, reason = choose_backend(LinearShape.of(random_weight(16, 64, group_size=8)), CPU, torch.float64)
    assert backend.name == "torch" and "no other" in reason
    small = LinearShape.of(random_weight(16, 64, group_size=8))
    assert "8 is below 16" in explain_choice(small, CPU, torch.bfloat16).refusals.get("cpu", "8 is below 16")


def test_slots_hold_every_column_once_and_one_group_per_block():
    weight = random_weight(8, 200, group_size=48, act_order=True, symmetric=False)
    slots = arrange_slots(weight, 32, 128)
    real = slots.column_S[slots.column_S < 200]
    assert sorted(real.tolist()) == list(range(200)) and slots.num_slots % 128 == 0
    for block, columns in enumerate(slots.column_S.view(-1, 32)):
        groups = weight.group_of_column_K[columns[columns < 200]].unique().tolist()
        assert groups in ([], [slots.group_B[block]])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_restore_returns_the_tensors_that_prepare_got(name):
    """Also for backends that do not run on this machine, because neither direction launches a kernel."""
    grids = itertools.product((2, 3, 4, 8), (48, 64), (True, False), (True, False))
    for bits, group_size, symmetric, act_order in grids:
        weight = random_weight(
            100,
            200,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            act_order=act_order,
            float16_scales=act_order,
        )
        shape = LinearShape.of(weight)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if name.startswith("triton") and dtype == torch.float32:
                continue
            if name in CPU_BACKENDS or name.startswith("triton"):
                prepared = BACKENDS[name].prepare(weight, dtype, CPU)
                codes_NK, scale_NG, zero_NG = BACKENDS[name].restore(prepared, shape, weight.group_of_column_K)
                assert torch.equal(codes_NK, weight.codes_NK) and torch.equal(zero_NG, weight.zero_NG)
                assert torch.equal(scale_NG.to(weight.scale_NG.dtype), weight.scale_NG)


def test_a_group_without_columns_gets_a_finite_positive_scale():
    weight = replace(
        random_weight(16, 96, group_size=32, act_order=True), group_index_K=torch.tensor([0, 2]).repeat(48)
    )
    for name in CPU_BACKENDS:
        prepared = BACKENDS[name].prepare(weight, torch.bfloat16, CPU)
        restored = BACKENDS[name].restore(prepared, LinearShape.of(weight), weight.group_of_column_K)
        for values, expected in zip(restored[1:], (weight.scale_NG, weight.zero_NG), strict=True):
            assert torch.equal(values[:, [0, 2]].float(), expected[:, [0, 2]].float())
        assert torch.isfinite(restored[1]).all() and (restored[1] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_compiler_sees_the_operators_of_a_linear_with_few_rows(name):
    linear = QuantizedLinear(random_weight(48, 96, group_size=32), None, dtype=torch.bfloat16, device=CPU, backend=name)
    has_operator: list[bool] = []
    torch.compiler.reset()

    def inspect(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        has_operator.append("llmquant" in graph.code)
        return graph

    compiled = torch.compile(linear, fullgraph=True, dynamic=False, backend=inspect)
    with torch.inference_mode():
        for rows in (1, 100):
            compiled(torch.randn(rows, 96).bfloat16())
    assert has_operator == [BACKENDS[name].traced_below_rows <= 1, True]
