"""The low-rank linear as one operation: against fp64 autograd of the formula, PEFT's layer, and by exact counts."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lora_converter import LoRAConfig, apply_lora, order
from lora_converter.ops import as_plain_product, linear_kernel, low_rank_linear
from lora_converter.order import Order, order_of

SHAPE, IN, OUT, RANK, SCALING = (3, 20), 48, 80, 4, 2.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operands = dict[str, torch.Tensor]


def operands(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"x": normal(*SHAPE, IN), "weight": normal(OUT, IN), "a": normal(RANK, IN), "b": normal(OUT, RANK)}
    for name in ("x", "a", "b"):
        found[name].requires_grad_()
    return {**found, "bias": normal(OUT)} if bias else found


def formula(x, weight, a, b, bias=None, keep=None) -> torch.Tensor:
    out = x @ weight.T + SCALING * ((x if keep is None else x * keep) @ a.T) @ b.T
    return out if bias is None else out + bias


def ours(x, weight, a, b, bias=None, keep=None) -> torch.Tensor:
    return low_rank_linear(x, weight, bias, a, b, scaling=SCALING, keep=keep)


def output_and_gradients(function: Callable[..., torch.Tensor], operands: Operands) -> list[torch.Tensor]:
    """y, dx, dA, dB under one fixed output gradient."""
    inputs = {name: value.detach().requires_grad_(value.requires_grad) for name, value in operands.items()}
    leaves = [inputs[name] for name in ("x", "a", "b")]
    out = function(**inputs)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def peft(x, weight, a, b) -> torch.Tensor:
    """PEFT's own layer with these tensors in the places of its parameters."""
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(IN, OUT, bias=False))).to(x.dtype)
    names = {"0.base_layer.weight": weight, "0.lora_A.default.weight": a, "0.lora_B.default.weight": b}
    return functional_call(model, names, (x,))


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def in_fp64(operands: Operands) -> Operands:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for name, value in operands.items()
    }


@pytest.fixture(params=Order, ids=lambda order: order.value)
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Order:
    """Each order of the products in turn, whatever this device's is."""
    monkeypatch.setattr(order, "order_of", lambda device, dtype: request.param)
    return request.param


in_every_order = pytest.mark.usefixtures("taken")


@pytest.mark.parametrize("instructions", [False, True])
def test_each_device_and_dtype_has_its_order(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(order, "_accumulates_well", order._accumulates_well.__wrapped__)  # without its memory
    found = {(d, t): order_of(torch.device(d), t) for d in ("cuda", "cpu", "xpu") for t in DTYPES}
    on_cpu = [Order.BASE_FIRST, Order.BASE_FIRST if instructions else Order.ADDED, Order.ADDED]
    assert [found["cpu", dtype] for dtype in DTYPES] == on_cpu
    assert {found["cuda", dtype] for dtype in DTYPES} == {Order.UPDATE_FIRST}
    assert {found["xpu", dtype] for dtype in DTYPES} == {Order.BASE_FIRST}


@in_every_order
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_it_is_the_formula_but_for_rounding(bias: bool, dropout: bool, dtype: torch.dtype, bound: float) -> None:
    given = operands(dtype, bias=bias)
    if dropout:
        given["keep"] = torch.rand(*SHAPE, IN, generator=torch.Generator().manual_seed(2)) > 0.3
    exact = output_and_gradients(formula, in_fp64(given))
    for actual, expected in zip(output_and_gradients(ours, given), exact, strict=True):
        assert error(actual, expected) < bound


@in_every_order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_pefts(dtype: torch.dtype) -> None:
    given = operands(dtype)
    exact = output_and_gradients(formula, in_fp64(given))
    pairs = zip(output_and_gradients(ours, given), output_and_gradients(peft, given), exact, strict=True)
    for name, (actual, theirs, expected) in zip(("y", "dx", "da", "db"), pairs, strict=True):
        # dB and dA are the same products of the same rounded tensors in both, in another order of their sums.
        assert error(actual, expected) <= 1.02 * error(theirs, expected), name


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters() -> None:
    given = operands()
    given["weight"] = given["weight"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(**given)
    grads = torch.autograd.grad(out.sum(), [given["x"], given["a"], given["b"]])
    assert out.dtype is torch.bfloat16 and {grad.dtype for grad in grads} == {torch.float32}
    half = {name: value.detach().bfloat16().requires_grad_(value.requires_grad) for name, value in given.items()}
    assert torch.equal(out, ours(**half))


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)


@in_every_order
@pytest.mark.parametrize(
    "change", [transposed, lambda x: x[:, ::2], lambda x: x[0], lambda x: x[0, 0], lambda x: x[None]]
)
def test_any_number_of_dims_and_any_strides(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = operands()
    found = [
        output_and_gradients(lambda x, function=function, **rest: function(change(x), **rest), given)
        for function in (ours, formula)
    ]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@in_every_order
def test_no_tokens_give_zero_gradients() -> None:
    given = operands()
    given["x"] = torch.empty(0, IN, requires_grad=True)
    out, dx, da, db = output_and_gradients(ours, given)
    assert out.shape == (0, OUT) and dx.shape == (0, IN)
    assert not da.any() and not db.any() and da.shape == (RANK, IN) and db.shape == (OUT, RANK)


def test_meta_and_fake_tensors_have_the_shapes() -> None:
    with torch.device("meta"):
        x, weight, a, b = torch.empty(2, 3, 8), torch.empty(6, 8), torch.empty(4, 8), torch.empty(6, 4)
        assert low_rank_linear(x, weight, None, a, b, scaling=1.0).shape == (2, 3, 6)
    with FakeTensorMode():
        x, weight, a, b = torch.empty(2, 3, 8), torch.empty(6, 8), torch.empty(4, 8), torch.empty(6, 4)
        assert low_rank_linear(x, weight, None, a.requires_grad_(), b, scaling=1.0).shape == (2, 3, 6)


@in_every_order
def test_the_result_may_be_written_to() -> None:
    """As that of nn.Linear, which is no view either: a residual added in place."""
    given = operands()
    assert not ours(**given)._is_view() and not ours(**{**given, "x": given["x"][0]})._is_view()
    ours(**given).add_(1.0).relu_().sum().backward()
    assert given["a"].grad is not None


@in_every_order
def test_an_input_used_twice_and_factors_used_twice() -> None:
    given = operands()

    def twice(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, weight, a, b: function(x, weight, a, b) + function(2 * x, -weight, a, b) * x.sum()

    for actual, expected in zip(
        output_and_gradients(twice(ours), given), output_and_gradients(twice(formula), given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)  # sums of thousands of numbers around 100


@in_every_order
def test_only_what_is_asked_for_is_computed() -> None:
    given = operands()
    given.update(x=given["x"].detach(), a=given["a"].detach())
    with Products() as products:
        torch.autograd.grad(ours(**given).sum(), [given["b"]])
    assert products.count == 3 + 1  # forward: S, base, update; backward: dB


def test_a_trained_base_gets_its_gradient() -> None:
    given = operands()
    given["weight"].requires_grad_()
    (grad,) = torch.autograd.grad(ours(**given).sum(), [given["weight"]])
    torch.testing.assert_close(grad, given["x"].detach().sum((0, 1)).expand(OUT, IN))


class Products(TorchDispatchMode):
    """Counts matrix products, elements that operators move, and elementwise kernels, inside our operator too."""

    def __init__(self, elementwise_from: float = math.inf) -> None:
        super().__init__()
        self.count, self.moved, self.elementwise_from = 0, 0, elementwise_from
        self.elementwise: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.lora_converter.linear.default:
            with self:
                return linear_kernel(*args)
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("detach", "empty", "empty_strided", "new_empty_strided", "zeros_like"):
            return out
        tensors = [value for value in (*args, out) if isinstance(value, torch.Tensor)]
        self.moved += sum(tensor.numel() for tensor in tensors)
        product = name in ("mm", "addmm", "addmm_", "matmul", "linear")
        self.count += product
        if not product and isinstance(out, torch.Tensor) and out.numel() >= self.elementwise_from:
            self.elementwise.append(name)
        return out


TOKENS, BIG_IN, BIG_OUT = 256, 128, 192


def moved_over_frozen(function: Callable[..., torch.Tensor], *, bias: bool = False) -> tuple[float, list[str]]:
    """Elements moved in forward + backward over the frozen linear's, and elementwise kernels of activations' size."""
    x, dy = torch.randn(TOKENS, BIG_IN, requires_grad=True), torch.randn(TOKENS, BIG_OUT)
    weight, a, b = torch.randn(BIG_OUT, BIG_IN), torch.randn(RANK, BIG_IN), torch.randn(BIG_OUT, RANK)
    shift = torch.randn(BIG_OUT) if bias else None
    counts = []
    for run, leaves in (
        (lambda: F.linear(x, weight, shift), [x]),
        (lambda: function(x, weight, a, b, shift), [x, a, b]),
    ):
        for leaf in leaves:
            leaf.requires_grad_()
        with Products(TOKENS * min(BIG_IN, BIG_OUT)) as products:
            torch.autograd.grad(run(), leaves, dy)
        counts.append(products)
    return counts[1].moved - counts[0].moved, counts[1].elementwise


RANK_SIZED = RANK * (2 * 5 * TOKENS + 3 * (BIG_IN + BIG_OUT))
"""S and dS written, scaled (read, written) and read twice; A and B read twice; dA and dB written."""

MOVED = {Order.UPDATE_FIRST: (4, 4, []), Order.BASE_FIRST: (4, 4, []), Order.ADDED: (6, 6, ["add_", "add_"])}
MOVED_WITH_DROPOUT = {
    # x ∘ keep in forward and backward: 3 in each. (dS A) ∘ keep: 3, and that it is in memory of its own: 2.
    Order.UPDATE_FIRST: (4 + 6 + 3, 4, ["mul", "mul", "mul_"]),
    Order.BASE_FIRST: (4 + 6 + 3 + 2, 4, ["mul", "mul", "mul_", "add_"]),
    Order.ADDED: (6 + 6 + 3, 6, ["mul", "add_", "mul", "mul_", "add_"]),
}


@pytest.mark.parametrize("bias", [False, True])
def test_per_token_it_moves_what_the_order_promises_over_the_frozen_linear(taken: Order, bias: bool) -> None:
    of_inputs, of_outputs, elementwise = MOVED[taken]
    expected = TOKENS * (of_inputs * BIG_IN + of_outputs * BIG_OUT) + RANK_SIZED
    assert moved_over_frozen(ours, bias=bias) == (expected, elementwise)


def test_with_dropout_it_moves_the_mask_and_the_masked_besides(taken: Order) -> None:
    keep = torch.rand(TOKENS, BIG_IN) > 0.3
    of_inputs, of_outputs, elementwise = MOVED_WITH_DROPOUT[taken]
    expected = TOKENS * (of_inputs * BIG_IN + of_outputs * BIG_OUT) + RANK_SIZED
    assert moved_over_frozen(lambda *tensors: ours(*tensors, keep=keep)) == (expected, elementwise)


def test_the_counter_sees_what_the_scale_on_the_output_moves() -> None:
    """6 in and 10 out: so the bound above is one that an implementation can miss."""
    moved, elementwise = moved_over_frozen(
        lambda x, weight, a, b, bias: F.linear(x, weight, bias) + SCALING * F.linear(F.linear(x, a), b)
    )
    assert moved >= 6 * TOKENS * BIG_IN + 10 * TOKENS * BIG_OUT
    assert {"mul", "add"} <= set(elementwise)


class Siblings(nn.Module):
    """q, k and v read one input; o another."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(32, 32, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(x) + self.v(x))


def saved_elements(module: nn.Module) -> int:
    """Elements kept for backward, each storage once, parameters not counted."""
    storages: dict[int, int] = {}
    params = {param.untyped_storage().data_ptr() for param in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            storages[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.grad_fn is not None
    return sum(storages.values())


@in_every_order
def test_saved_beyond_the_frozen_model_are_x_once_per_group_and_s_per_linear() -> None:
    frozen = saved_elements(Siblings().requires_grad_(False))
    adapted = Siblings()
    apply_lora(adapted, LoRAConfig(rank=RANK))
    assert saved_elements(adapted) - frozen == 2 * (64 * 32) + 4 * (64 * RANK)


@in_every_order
@pytest.mark.parametrize("bias", [False, True])
def test_five_tensors_are_saved_none_of_them_a_copy_of_another_dtype(bias: bool) -> None:
    given, saved = operands(torch.bfloat16, bias=bias), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours(**given)
    places = {given[name].untyped_storage().data_ptr() for name in ("x", "weight", "a", "b")}
    assert len(saved) == 5 and places < {tensor.untyped_storage().data_ptr() for tensor in saved}
    tokens = SHAPE[0] * SHAPE[1]
    bytes_saved = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    assert bytes_saved == 2 * (tokens * (IN + RANK) + OUT * IN + RANK * (IN + OUT))


@in_every_order
def test_dropout_keeps_a_mask_of_a_byte_and_no_dropped_copy() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    apply_lora(model, LoRAConfig(rank=RANK, dropout=0.5))
    sizes: dict[torch.dtype, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return tensor

    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    factors = 32 * 32 + 2 * 32 * RANK
    assert sizes == {torch.bool: 64 * 32, torch.float32: 64 * 32 + 64 * RANK + factors}


@in_every_order
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("selective", [False, True])
def test_gradients_under_activation_checkpointing_are_those_without(selective: bool, dropout: float) -> None:
    """Masks are drawn again from the state of the generator; what selective checkpointing keeps is not written to."""
    model = Siblings()
    for linear in apply_lora(model, LoRAConfig(rank=RANK, dropout=dropout)):
        nn.init.normal_(linear.lora_b.weight)
    x = torch.randn(64, 32, requires_grad=True)

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = as_plain_product(func, args)[0] is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False, **options)):
        torch.manual_seed(0)
        params = [param for param in model.parameters() if param.requires_grad]
        found.append(torch.autograd.grad(run(x).square().sum(), [x, *params]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_policies_are_asked_about_the_bases_product() -> None:
    x, weight = torch.empty(5, 8), torch.empty(6, 8)
    func, *args = as_plain_product(torch.ops.lora_converter.linear.default, (x, weight, None, None, None, 1.0, None))
    assert func is torch.ops.aten.mm.default and [arg.shape for arg in args] == [(5, 8), (8, 6)]
    other = (torch.ops.aten.mul.Tensor, x, x)
    assert as_plain_product(other[0], other[1:]) == other


def test_a_biased_linear_is_asked_about_as_addmm() -> None:
    """Which is what it runs without an adapter, and what torchtitan's policy does not count."""
    x, weight, bias = torch.empty(5, 8), torch.empty(6, 8), torch.empty(6)
    func, *args = as_plain_product(torch.ops.lora_converter.linear.default, (x, weight, bias, None, None, 1.0, None))
    assert func is torch.ops.aten.addmm.default and [arg.shape for arg in args] == [(6,), (5, 8), (8, 6)]


def test_quantized_weights_and_fp64_are_left_to_their_own_linear() -> None:
    quantized = nn.Sequential(nn.Linear(32, 32, bias=False))
    quantize_(quantized, Int8WeightOnlyConfig())
    x = torch.randn(4, 32)
    expected = quantized(x)
    apply_lora(quantized, LoRAConfig(rank=RANK), dtype=torch.float32)
    assert torch.equal(quantized(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(**in_fp64(operands())).dtype is torch.float64


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++")
def test_compiled_it_is_the_formula() -> None:
    torch._dynamo.reset()
    given = operands()
    compiled = torch.compile(ours, fullgraph=True)
    for actual, expected in zip(
        output_and_gradients(compiled, given), output_and_gradients(formula, given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
