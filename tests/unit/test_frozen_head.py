"""The loss of a frozen head in chunks: against PyTorch's cross-entropy of all logits, and by exact counts."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import Made

from lora_converter.frozen_head import CHUNK_BYTES, IGNORED, default_chunk_tokens, frozen_head_loss

ROWS, TOKENS, WIDTH, VOCABULARY, CHUNK = 4, 50, 32, 100, 30
Operands = dict[str, torch.Tensor]


def operands(
    dtype: torch.dtype = torch.float32, *, ignored: float = 0.7, bias: bool = False, vocabulary: int = VOCABULARY
) -> Operands:
    """Two hundred tokens, of which a share has no label."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator)
    labels[torch.rand(ROWS, TOKENS, generator=generator) < ignored] = IGNORED
    found = dict(hidden=normal(ROWS, TOKENS, WIDTH), weight=normal(vocabulary, WIDTH), labels=labels)
    return {**found, "bias": normal(vocabulary)} if bias else found


def over_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: Any = None) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)


def in_chunks(chunk_tokens: int = CHUNK, **options: Any) -> Callable[..., torch.Tensor]:
    return lambda **given: frozen_head_loss(**given, chunk_tokens=chunk_tokens, **options)


def loss_and_gradient(function: Callable[..., torch.Tensor], given: Operands, scale: float = 1.0) -> list[torch.Tensor]:
    hidden = given["hidden"].detach().requires_grad_()
    loss = function(**{**given, "hidden": hidden})
    (gradient,) = torch.autograd.grad(loss * scale, hidden)
    return [loss.detach(), gradient]


def in_fp64(given: Operands) -> Operands:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for CPU kernels: no g++"
)
BACKENDS = ["", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.7, 0.99])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_is_the_loss_over_logits_to_1e_6(bias: bool, ignored: float, backend: str) -> None:
    given = operands(ignored=ignored, bias=bias)
    exact = loss_and_gradient(over_logits, in_fp64(given))
    found = loss_and_gradient(in_chunks(compile_backend=backend), given)
    assert all(error(a, b) < 1e-6 for a, b in zip(found, exact, strict=True))
    assert found[0].dtype is found[1].dtype is torch.float32


@pytest.mark.parametrize("chunk_tokens", [1, 7, 200, 10_000])
def test_the_size_of_a_chunk_does_not_matter(chunk_tokens: int) -> None:
    given = operands()
    exact = loss_and_gradient(over_logits, in_fp64(given))
    found = loss_and_gradient(in_chunks(chunk_tokens), given)
    assert all(error(a, b) < 1e-6 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_over_logits(dtype: torch.dtype) -> None:
    given = operands(dtype)
    exact = loss_and_gradient(over_logits, in_fp64(given))
    pairs = zip(loss_and_gradient(in_chunks(), given), loss_and_gradient(over_logits, given), exact, strict=True)
    for found, theirs, expected in pairs:
        # The same products of the same rounded tensors: the logits are equal, sums over rows are in another order.
        assert error(found, expected) <= 1.02 * error(theirs, expected) + 1e-7


def test_autocast_computes_in_its_dtype_as_a_linear_does() -> None:
    given = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, theirs = loss_and_gradient(in_chunks(), given), loss_and_gradient(over_logits, given)
    assert found[1].dtype is torch.float32
    exact = loss_and_gradient(over_logits, in_fp64(given))
    assert 1e-4 < error(found[1], exact[1]) <= 1.02 * error(theirs[1], exact[1])


def test_the_scale_of_a_mean_keeps_its_digits_in_half_precision() -> None:
    """1 / 12,345 in bf16 is 0.2 % off, for all tokens alike."""
    given = operands(torch.bfloat16)
    _, whole = loss_and_gradient(in_chunks(), given)
    _, mean = loss_and_gradient(in_chunks(), given, scale=1 / 12345)
    assert torch.equal(mean, (whole.float() / 12345).bfloat16())


def test_a_token_without_a_label_has_a_gradient_of_zero_and_costs_nothing() -> None:
    given = operands(ignored=0.7)
    trained = int((given["labels"] != IGNORED).sum())
    with Made() as seen:
        _, gradient = loss_and_gradient(in_chunks(), given)
    assert not gradient[given["labels"] == IGNORED].any() and gradient[given["labels"] != IGNORED].any(-1).all()
    assert seen.products == 2 * trained * VOCABULARY * WIDTH


def test_a_batch_without_any_label_has_a_loss_and_a_gradient_of_zero() -> None:
    given = operands(ignored=1.1)
    loss, gradient = loss_and_gradient(in_chunks(), given)
    assert loss == 0 and gradient.shape == given["hidden"].shape and not gradient.any()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_logits_are_there_a_chunk_at_a_time_once_in_each_dtype(dtype: torch.dtype, size: int) -> None:
    given = operands(dtype, ignored=0.0, vocabulary=3000)
    chunk, tokens = given["weight"].shape[0] * CHUNK, given["labels"].numel()
    hidden = given["hidden"].requires_grad_()
    with Made(*given.values()) as seen:
        loss = frozen_head_loss(**given, chunk_tokens=CHUNK)
        assert seen.largest <= chunk < tokens * given["weight"].shape[0]
        # Beside them the gradient that is kept, a chunk's hidden states and theirs, row numbers and some columns.
        assert seen.peak <= size * chunk + hidden.nbytes + CHUNK * (2 * WIDTH + 16) * 4 + 16 * tokens
        loss.backward()
    assert seen.largest <= chunk


def test_without_a_gradient_there_is_one_product() -> None:
    given = operands(ignored=0.0)
    with Made() as seen, torch.no_grad():
        loss = frozen_head_loss(**given, chunk_tokens=CHUNK)
    assert seen.products == ROWS * TOKENS * VOCABULARY * WIDTH
    assert error(loss, over_logits(**in_fp64(given))) < 1e-6


def test_without_any_label_the_gradient_is_zero_whatever_its_scale() -> None:
    _, gradient = loss_and_gradient(in_chunks(), operands(ignored=1.1), scale=float("inf"))
    assert not gradient.any()
    _, gradient = loss_and_gradient(in_chunks(), given := operands(ignored=0.7), scale=float("inf"))
    assert not gradient[given["labels"] == IGNORED].any()


def test_other_numbers_of_labels_than_tokens_are_refused() -> None:
    given = operands()
    with pytest.raises(ValueError, match=r"Labels of shape \(4, 49\) for hidden states of shape \(4, 50, 32\)"):
        in_chunks()(**{**given, "labels": given["labels"][:, 1:]})


def test_the_head_gets_no_gradient() -> None:
    given = operands()
    given["weight"].requires_grad_()
    given["hidden"].requires_grad_()
    frozen_head_loss(**given, chunk_tokens=CHUNK).backward()
    assert given["weight"].grad is None and given["hidden"].grad is not None


def test_the_default_chunk_fits_its_budget() -> None:
    assert default_chunk_tokens(128_256) == 1024  # 751 MiB of Llama 3's vocabulary
    assert all(6 * v * default_chunk_tokens(v) <= CHUNK_BYTES for v in (320, 32_000, 128_256, 262_144))
    assert default_chunk_tokens(10**9) == 128


def test_rows_that_are_added_to_the_head_have_the_gradient_of_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (50, 30))
    labels = torch.randint(0, 30, (50,), generator=generator)
    labels[::7] = IGNORED
    columns, results = torch.tensor([3, 17, 29]), []
    for chunked in (True, False):
        x, added = hidden.clone().requires_grad_(), torch.full((3, 8), 0.1, requires_grad=True)
        if chunked:
            loss = frozen_head_loss(x, weight, labels, chunk_tokens=7, added=added, columns=columns)
        else:
            logits = F.linear(x, weight.index_add(0, columns, added))
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        (loss / 3).backward()
        results.append((loss.detach(), x.grad, added.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
