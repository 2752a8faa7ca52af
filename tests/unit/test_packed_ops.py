"""Linears with packed weights: against dense ones on what is unpacked, fp64 autograd of the formula, by counts."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from memory import Made
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_converter import packed as packing
from lora_converter.grouped import grouped_linear, grouped_product
from lora_converter.ops import low_rank_linear
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_ops import (
    as_product,
    packed_grouped_mm_kernel,
    packed_linear,
    packed_linear_dx_kernel,
    packed_linear_kernel,
)

TOKENS, IN, OUT, RANK, SCALING = 24, 256, 320, 4, 2.0
every_format = pytest.mark.parametrize("form", FORMATS)
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ for CPU kernels")

Tensors = dict[str, torch.Tensor]


def operands(form: str = "nf4", dtype: torch.dtype = torch.float32, *, bias: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"x": normal(2, TOKENS // 2, IN), "a": normal(RANK, IN), "b": normal(OUT, RANK)}
    for value in found.values():
        value.requires_grad_()
    found["packed"] = FORMATS[form].pack(normal(OUT, IN))
    return {**found, "bias": normal(OUT)} if bias else found


def adapted(form: str, x, a, b, packed, bias=None, keep=None) -> torch.Tensor:
    return packed_linear(x, packed, bias, form=form, factors=(a, b), scaling=SCALING, keep=keep)


def dense(form: str, x, a, b, packed, bias=None, keep=None) -> torch.Tensor:
    weight = FORMATS[form].unpack(packed, x.dtype)
    return low_rank_linear(x, weight, bias, a, b, scaling=SCALING, keep=keep)


def formula(form: str, x, a, b, packed, bias=None, keep=None) -> torch.Tensor:
    weight = FORMATS[form].unpack(packed, torch.float32).to(x.dtype)
    out = x @ weight.T + SCALING * ((x if keep is None else x * keep) @ a.T) @ b.T
    return out if bias is None else out + bias


def gradients(function: Callable[..., torch.Tensor], form: str, given: Tensors) -> list[torch.Tensor]:
    """y, dx, dA, dB under one fixed output gradient."""
    inputs = {name: value.detach().requires_grad_(value.requires_grad) for name, value in given.items()}
    out = function(form, **inputs)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [inputs[name] for name in ("x", "a", "b")], dy)]


def with_mask(given: Tensors) -> Tensors:
    return {**given, "keep": torch.rand(given["x"].shape, generator=torch.Generator().manual_seed(2)) > 0.3}


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_it_is_the_dense_operation_on_the_unpacked_weight(
    form: str, dtype: torch.dtype, bias: bool, dropout: bool
) -> None:
    given = operands(form, dtype, bias=bias)
    given = with_mask(given) if dropout else given
    for found, expected in zip(gradients(adapted, form, given), gradients(dense, form, given), strict=True):
        assert torch.equal(found, expected)


@every_format
@pytest.mark.parametrize("dropout", [False, True])
def test_it_is_the_formula_in_fp64(form: str, dropout: bool) -> None:
    given = operands(form, torch.float64, bias=True)
    given = with_mask(given) if dropout else given
    for found, expected in zip(gradients(adapted, form, given), gradients(formula, form, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@every_format
@pytest.mark.parametrize("bias", [False, True])
def test_without_factors_it_is_the_frozen_linear(form: str, bias: bool) -> None:
    given = operands(form, bias=bias)
    x, packed, shift = given["x"], given["packed"], given.get("bias")
    out = packed_linear(x, packed, shift, form=form)
    expected = F.linear(x, FORMATS[form].unpack(packed, x.dtype), shift)
    dy = torch.randn_like(out)
    assert torch.equal(out, expected) and not out._is_view()
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (out, expected)))


def test_autocast_computes_in_its_dtype() -> None:
    given = operands()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = adapted("nf4", **given), packed_linear(given["x"], given["packed"], form="nf4")
    grads = torch.autograd.grad(out.sum(), [given["x"], given["a"], given["b"]])
    assert torch.equal(out, adapted("nf4", **half)) and {grad.dtype for grad in grads} == {torch.float32}
    assert torch.equal(plain, packed_linear(half["x"], half["packed"], form="nf4"))


def test_only_what_is_asked_for_is_computed_and_no_tokens_give_zeros() -> None:
    given = operands()
    x, packed = given["x"].detach(), given["packed"]
    (db,) = torch.autograd.grad(adapted("nf4", x, given["a"].detach(), given["b"], packed).sum(), [given["b"]])
    torch.testing.assert_close(db, gradients_of_sum(given)[2])
    given["x"] = torch.empty(0, IN, requires_grad=True)
    out, dx, da, db = gradients(adapted, "nf4", given)
    assert out.shape == (0, OUT) and dx.shape == (0, IN) and not da.any() and not db.any()


def gradients_of_sum(given: Tensors) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(formula("nf4", **given).sum(), [given[name] for name in ("x", "a", "b")])


def test_meta_and_fake_tensors_have_the_shapes() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, IN, requires_grad=True)
        packed = torch.empty(OUT, 4, 34, dtype=torch.uint8)
        a, b = torch.empty(RANK, IN, requires_grad=True), torch.empty(OUT, RANK, requires_grad=True)
        out = adapted("nf4", x, a, b, packed)
        assert out.shape == (2, 3, OUT)
        assert [grad.shape for grad in torch.autograd.grad(out.sum(), [x, a, b])] == [x.shape, a.shape, b.shape]
    with torch.device("meta"):
        assert packed_linear(torch.empty(5, IN), torch.empty(OUT, 4, 34, dtype=torch.uint8), form="nf4").shape == (
            5,
            OUT,
        )


@pytest.mark.parametrize("operator", ["packed_linear", "packed_grouped_mm"])
def test_torchs_own_checks_of_operators_pass(operator: str) -> None:
    given = operands()
    x, packed, a, b = given["x"].detach()[0].requires_grad_(), given["packed"], given["a"], given["b"]
    offsets = torch.tensor([8, 16], dtype=torch.int32)
    args = {
        "packed_linear": (x, packed, "nf4", None, a, b, SCALING, None),
        "packed_grouped_mm": (
            x[:16].detach().requires_grad_(),
            packed.view(2, OUT // 2, -1, 34),
            "nf4",
            offsets,
            False,
        ),
    }
    torch.library.opcheck(getattr(torch.ops.lora_converter, operator).default, args[operator])


def saved(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What is kept for the backward, each storage once."""
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.setdefault(value.untyped_storage()._cdata, value) is None or value, lambda value: value
    ):
        out = function()
    assert out.grad_fn is not None
    return list(kept.values())


@pytest.mark.parametrize("dropout", [False, True])
def test_saved_are_x_s_a_b_and_the_packed_weight(dropout: bool) -> None:
    given = operands(dtype=torch.bfloat16, bias=True)
    given = with_mask(given) if dropout else given
    kept = saved(lambda: adapted("nf4", **given))
    sizes = sorted(value.untyped_storage().nbytes() for value in kept)
    bytes_of = {"x": 2 * TOKENS * IN, "s": 2 * TOKENS * RANK, "a": 2 * RANK * IN, "b": 2 * OUT * RANK}
    mask = [TOKENS * IN] if dropout else []
    assert sizes == sorted([*bytes_of.values(), OUT * IN // 64 * 34, *mask])
    places = {value.untyped_storage().data_ptr() for value in kept}
    assert {given[name].untyped_storage().data_ptr() for name in ("x", "a", "b", "packed")} <= places


def test_without_factors_the_packed_weight_alone_is_saved() -> None:
    given = operands()
    (kept,) = saved(lambda: packed_linear(given["x"], given["packed"], form="nf4"))
    assert kept.data_ptr() == given["packed"].data_ptr()


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.lora_converter.packed_linear.default: packed_linear_kernel,
    torch.ops.lora_converter.packed_linear_dx.default: packed_linear_dx_kernel,
    torch.ops.lora_converter.packed_grouped_mm.default: packed_grouped_mm_kernel,
}


class Inside(Made):
    """Counts inside our operators too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KERNELS:
            with self:
                return KERNELS[func](*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_one_dense_weight_is_there_at_a_time_and_none_between_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three linears of 1024 x 1024 one after the other; a chunk is small beside one, as with a model's weights."""
    monkeypatch.setattr(packing, "_CHUNK", 2**14)
    size, tokens = 1024, 8
    weights = [FORMATS["nf4"].pack(torch.randn(size, size)) for _ in range(3)]
    factors = [(torch.randn(2, size, requires_grad=True), torch.randn(size, 2, requires_grad=True)) for _ in weights]
    x = torch.randn(tokens, size, requires_grad=True)

    def run() -> torch.Tensor:
        h = x
        for packed, pair in zip(weights, factors, strict=True):
            h = packed_linear(packed_linear(h, packed, form="nf4", factors=pair), packed, form="nf4")
        return h.sum()

    with Inside(x, *weights, *(f for pair in factors for f in pair)) as inside:
        run().backward()
    dense_bytes, activations = 4 * size * size, 20 * 4 * tokens * size
    assert inside.largest == size * size
    assert dense_bytes < inside.peak < dense_bytes + activations + 20 * 2**14  # a chunk's codes, values and product
    with Made(x, *weights) as made:
        run().backward()
    assert made.largest < size * size


@pytest.mark.parametrize("selective", [False, True])
def test_under_activation_checkpointing_nothing_dense_is_kept(selective: bool) -> None:
    given, second = operands(), FORMATS["nf4"].pack(torch.randn(IN, OUT))

    def run(x: torch.Tensor) -> torch.Tensor:
        return packed_linear(adapted("nf4", x, given["a"], given["b"], given["packed"]).relu(), second, form="nf4")

    asked = []

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        func, *args = as_product(func, args)
        if func is torch.ops.aten.mm.default:
            asked.append(tuple(args[1].shape))
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if selective else {}
    leaves = [given[name] for name in ("x", "a", "b")]
    expected = torch.autograd.grad(run(given["x"]).square().sum(), leaves)
    with Inside(*given.values(), second) as inside:
        out = checkpoint(run, given["x"], use_reentrant=False, **options).square().sum()
    assert inside.alive < OUT * IN * 4 / 2  # a few activations, 24 rows of them
    found = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert asked[:2] == ([(IN, OUT), (OUT, IN)] if selective else [])


def test_policies_are_asked_about_the_dense_product() -> None:
    given = operands(bias=True)
    x, packed, bias = given["x"][0], given["packed"], given["bias"]
    operator = torch.ops.lora_converter.packed_linear.default
    func, *args = as_product(operator, (x, packed, "nf4", bias, None, None, 1.0, None))
    assert func is torch.ops.aten.addmm.default and [arg.shape for arg in args] == [(OUT,), x.shape, (IN, OUT)]
    dense = (torch.ops.lora_converter.linear.default, x, torch.empty(OUT, IN), None, None, None, 1.0, None)
    assert as_product(dense[0], dense[1:])[0] is torch.ops.aten.mm.default
    other = (torch.ops.aten.mul.Tensor, x, x)
    assert as_product(other[0], other[1:]) == other


class Partitioned:
    """A backend that keeps what the partitioner makes: the sizes of what goes from the forward to the backward."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self.operators: list[str] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def forward(module: Any, inputs: Any) -> Any:
            outputs = next(iter(reversed(module.graph.nodes))).args[0]
            self.kept = [(n.meta["val"].dtype, tuple(n.meta["val"].shape)) for n in outputs[1:] if hasattr(n, "meta")]
            return compiled(module, inputs)

        def compiled(module: Any, inputs: Any) -> Any:
            self.operators += [str(n.target) for n in module.graph.nodes if "lora_converter" in str(n.target)]
            return make_boxed_compiler(lambda module, inputs: module.forward)(module, inputs)

        backend = aot_autograd(
            fw_compiler=forward, bw_compiler=compiled, partition_fn=min_cut_rematerialization_partition
        )
        return backend(graph, inputs)


def test_the_partitioner_keeps_nothing_dense() -> None:
    torch._dynamo.reset()
    given, partitioned = operands(), Partitioned()
    second = FORMATS["nf4"].pack(torch.randn(IN, OUT))

    def run(form: str, **tensors: torch.Tensor) -> torch.Tensor:
        return packed_linear(adapted(form, **tensors).relu(), second, form=form)

    found = gradients(torch.compile(run, backend=partitioned, fullgraph=True), "nf4", given)
    for value, expected in zip(found, gradients(run, "nf4", given), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    assert [dtype for dtype, _ in partitioned.kept].count(torch.uint8) == 2
    assert all(torch.Size(shape).numel() < OUT * IN for _, shape in partitioned.kept)
    names = [name.split(".")[1] for name in partitioned.operators]
    assert sorted(names) == ["packed_linear"] * 2 + ["packed_linear_dx"] * 2


@needs_a_compiler
def test_compiled_by_inductor_it_is_the_same_and_keeps_nothing_dense() -> None:
    torch._dynamo.reset()
    given = operands()
    compiled = torch.compile(lambda form, **tensors: adapted(form, **tensors).sin(), fullgraph=True)
    found = gradients(compiled, "nf4", given)
    expected = gradients(lambda form, **tensors: adapted(form, **tensors).sin(), "nf4", given)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)
    inputs = {name: value.detach().requires_grad_(value.requires_grad) for name, value in given.items()}
    kept = saved(lambda: compiled("nf4", **inputs))
    assert kept and max(value.numel() for value in kept if value.is_floating_point()) < OUT * IN
    assert any(value.dtype is torch.uint8 for value in kept)


EXPERTS, ROWS = 3, [8, 0, 16]


def expert_operands(form: str, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (sum(ROWS), IN), "a": (EXPERTS, IN, RANK), "b": (EXPERTS, OUT, RANK)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for value in found.values():
        value.requires_grad_()
    return {**found, "packed": FORMATS[form].pack(torch.randn(EXPERTS, OUT, IN, generator=generator))}


OFFSETS = torch.tensor(ROWS).cumsum(0, dtype=torch.int32)


def grouped(form: str, x, a, b, packed) -> torch.Tensor:
    return grouped_linear(x, packed, a, b, OFFSETS, scaling=SCALING, form=form)


def grouped_dense(form: str, x, a, b, packed) -> torch.Tensor:
    return grouped_linear(x, FORMATS[form].unpack(packed, x.dtype), a, b, OFFSETS, scaling=SCALING)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_the_dense_ones_on_the_unpacked_weight(form: str, dtype: torch.dtype) -> None:
    given = expert_operands(form, dtype)
    for found, expected in zip(gradients(grouped, form, given), gradients(grouped_dense, form, given), strict=True):
        assert torch.equal(found, expected)
    x, packed = given["x"], given["packed"]
    out = grouped_product(x, packed, OFFSETS, form=form)
    parts = zip(x.split(ROWS), FORMATS[form].unpack(packed, dtype), strict=True)
    expected = torch.cat([part @ weight.T for part, weight in parts])
    close = {"rtol": 1e-5, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 0.5}  # sums of hundreds
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)), **close)


def test_grouped_products_save_the_packed_weight() -> None:
    given = expert_operands("nf4", torch.bfloat16)
    kept = saved(lambda: grouped("nf4", **given))
    assert max(value.numel() for value in kept if value.is_floating_point()) < EXPERTS * OUT * IN
    assert {value.data_ptr() for value in kept} >= {given[name].data_ptr() for name in ("x", "packed")}
    plain = saved(lambda: grouped_product(given["x"], given["packed"], OFFSETS, form="nf4"))
    assert {value.dtype for value in plain} == {torch.uint8, torch.int32}


def test_the_partitioner_keeps_nothing_dense_of_grouped_products() -> None:
    torch._dynamo.reset()
    given, partitioned = expert_operands("nf4", torch.bfloat16), Partitioned()
    found = gradients(torch.compile(grouped, backend=partitioned, fullgraph=True), "nf4", given)
    for value, expected in zip(found, gradients(grouped, "nf4", given), strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=0.5)  # bf16, sums of hundreds
    assert [dtype for dtype, _ in partitioned.kept].count(torch.uint8) == 1
    assert all(torch.Size(shape).numel() < EXPERTS * OUT * IN for _, shape in partitioned.kept)
    assert len([name for name in partitioned.operators if "packed_grouped_mm" in name]) == 2


def test_the_partitioner_would_keep_a_dense_weight_of_plain_operations() -> None:
    """So the bound above is one that an implementation can miss."""
    torch._dynamo.reset()
    given, partitioned = operands(), Partitioned()
    table = nn.Parameter(torch.randn(256, 2), requires_grad=False)

    def plain(form: str, x, a, b, packed) -> torch.Tensor:
        weight = F.embedding(packed[..., :32].int(), table).view(OUT, IN)
        return F.linear(x, weight) + SCALING * F.linear(F.linear(x, a), b)

    gradients(torch.compile(plain, backend=partitioned), "nf4", given)
    assert any(torch.Size(shape).numel() == OUT * IN for dtype, shape in partitioned.kept if dtype.is_floating_point)


def test_grouped_products_of_no_rows_have_gradients() -> None:
    """On a rank whose experts got no token; the gradient of a sum has strides of zero."""
    x = torch.empty(0, IN, dtype=torch.bfloat16, requires_grad=True)
    packed = FORMATS["nf4"].pack(torch.randn(2, OUT, IN))
    out = grouped_product(x, packed, torch.zeros(2, dtype=torch.int32), form="nf4")
    out.sum().backward()
    assert out.shape == (0, OUT) and x.grad is not None and x.grad.shape == (0, IN)
