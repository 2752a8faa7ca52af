"""A linear with a low-rank adapter and a magnitude of its own per output row (DoRA, Liu et al. 2024).

    y = c ∘ (x Wᵀ + s (x Aᵀ) Bᵀ) + b        c = m / n,  m = ‖W‖ + lora_magnitude_change,  n = ‖W + s B A‖, per row

n is a constant to the derivative, as in the paper's section 4.3. It is computed without B A, from rank-sized products:

    n² = ‖W‖² + 2 s Σ_r (W Aᵀ) ∘ B + s² Σ_r (B (A Aᵀ)) ∘ B

‖W‖² is taken once by a run, whose base stays what was loaded (`keep_of_base`). Elsewhere it is taken in every forward,
since nothing tells when a weight changes: FSDP2 gathers it anew, and torch.compile sees no version of it.

What trains is not m but what is added to ‖W‖. AdamW takes the same steps, and it is zero at the start: the first
output is the base's, bit for bit and in any layout (but a bias is added to what is rounded, which shows in bf16),
nothing has to wait for the base to be loaded, and where FSDP2 computes in bf16 the change is rounded, and not a
magnitude of which a small change would be lost. Weight decay draws m to ‖W‖. PEFT's files have m.

Under tensor parallelism the change lies as the bias does: sharded with the rows of a column-wise weight, whole beside a
row-wise one, whose sums are partial over the ranks: one all-reduce of out_features numbers per forward, or of 2 x that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lora_converter.linear import LoRALinear, add_adapter, is_transposed
from lora_converter.ops import kept, low_rank_update, rows_of
from lora_converter.tensors import full_tensor, local_indices, local_part

Tensor = torch.Tensor

CHANGE = "lora_magnitude_change"


class DoRALinear(LoRALinear):
    """What a linear's class gains. Made by `add_dora` alone.

    Attributes:
        lora_magnitude_change: m − ‖W‖, (out_features).
        lora_row_squares: ‖W‖² of the rows that this rank computes, if it is kept.
    """

    adapter_kind = "linears with a magnitude (DoRA)"
    adapter_parameter_names = (*LoRALinear.adapter_parameter_names, CHANGE)

    lora_magnitude_change: Tensor
    lora_row_squares: Tensor | None

    def _is_one_operation(self, x: Tensor) -> bool:
        return True  # as `check_takes_magnitude` has made sure, of which torch.compile sees nothing

    def _linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        *,
        with_base: bool,
        shards: DeviceMesh | None = None,
    ) -> Tensor:
        """shards: The mesh over which the features of x, and the columns of the weight, are sharded, if they are."""
        assert with_base
        change, squares = self.lora_magnitude_change, None
        if not isinstance(x, DTensor):
            change, squares = local_part(change), self.lora_row_squares
        scale = row_scales(weight, a, b, change, scaling=self.lora_config.scaling, squares=squares, shards=shards)
        p = self.lora_config.dropout
        if not (self.training and p > 0):
            return scaled(super()._linear(x, weight, None, a, b, with_base=True, shards=shards), scale, bias)
        # As PEFT: what dropout leaves is scaled, in the base's product too, beside the base's of all of x.
        left = F.dropout(x, p) if isinstance(x, DTensor) else kept(x, self._mask(x, shards)) / (1 - p)
        update = low_rank_update(left, a, b, scaling=self.lora_config.scaling)
        base, own = F.linear(x, weight, bias), F.linear(left, weight)
        return base + own * (scale - 1).to(own.dtype) + scaled(update.to(own.dtype), scale, None)

    @torch.no_grad()
    def reset_adapter(self, seed: int) -> None:
        super().reset_adapter(seed)
        self.lora_magnitude_change.zero_()

    def local_updates(self, weight: str) -> Iterator[Tensor]:
        """c ∘ (W + s B A) − W, in one piece."""
        param, dim = self.get_parameter(weight), int(self.lora_transposed)
        local = local_part(param).float()
        (update,) = super().local_updates(weight)
        squares = self._of_rows(update.add_(local).square().sum(1 - dim))
        scale = (self.magnitude() / norms_of(squares))[local_indices(param, dim).to(local.device)]
        yield update.mul_(scale.unsqueeze(1 - dim)).sub_(local)

    def magnitude(self) -> Tensor:
        """m of all rows, (out_features), fp32. A collective where parameters are sharded."""
        return self.row_norms() + full_tensor(self.lora_magnitude_change.detach()).float()

    def row_norms(self) -> Tensor:
        """‖W‖ of all rows, likewise; of the base's also while an update is merged into it."""
        return norms_of(self._row_squares())

    @torch.no_grad()
    def keep_of_base(self) -> None:
        """Takes ‖W‖² once, for all forwards to come."""
        squares, mesh = self._row_squares(), self.lora_a.whole_over
        if isinstance(self.weight, DTensor):
            squares = squares.to(self.weight.device_mesh.device_type)  # not where an offloaded weight lies
        if mesh is not None:
            squares = distribute_tensor(squares, mesh, [Shard(0)], src_data_rank=None).to_local()
        self.lora_row_squares = squares

    def _row_squares(self) -> Tensor:
        weight = local_part((self.lora_unmerged or {}).get("weight", self.weight))
        return self._of_rows(squares_of(weight.t() if self.lora_transposed else weight))

    @torch.no_grad()
    def _of_rows(self, sums: Tensor) -> Tensor:
        """Sums over this rank's part of each of its rows -> over the whole of all rows, (out_features)."""
        weight, dim = self.weight, int(self.lora_transposed)
        if not isinstance(weight, DTensor):
            return sums
        whole = sums.new_zeros(self.out_features)
        whole[local_indices(weight, dim).to(sums.device)] = sums
        for axis, placement in enumerate(weight.placements):
            if not placement.is_replicate():
                dist.all_reduce(whole, group=weight.device_mesh.get_group(axis))
        return whole

    def whole_over(self) -> dict[str, DeviceMesh]:
        own = {} if self.lora_b.whole_over is None else {CHANGE: self.lora_b.whole_over}
        return super().whole_over() | own

    def remove_adapter(self) -> None:
        super().remove_adapter()
        del self.lora_magnitude_change, self.lora_row_squares


def add_dora(linear: nn.Module, config: Any, *, fqn: str, **options: Any) -> DoRALinear:
    """As `add_adapter`, with a magnitude.

    Raises:
        ValueError: See `check_takes_magnitude`.
    """
    check_takes_magnitude(fqn, linear)
    adapted = add_adapter(linear, config, fqn=fqn, kind=DoRALinear, **options)
    assert isinstance(adapted, DoRALinear)
    adapted.lora_magnitude_change = nn.Parameter(adapted.lora_b.weight.new_zeros(adapted.out_features))
    adapted.lora_row_squares = None  # on the instance, see `adapt`
    return adapted


def check_takes_magnitude(fqn: str, linear: nn.Module) -> None:
    """Refuses a linear of whose weight no norm is taken.

    Raises:
        ValueError: It is packed, torchao's way too, or has a product of its own: float8, fake quantization.
    """
    weight = linear.get_parameter("weight")
    packed = hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)
    if packed or (type(linear).forward is not nn.Linear.forward and not is_transposed(linear)):
        raise ValueError(
            f"lora.use_dora = true: {fqn} is a {type(linear).__name__}, which is packed or has a product of its own, "
            "and DoRA scales rows by the norms of a dense weight. Set lora.use_dora = false, or name it in "
            "lora.exclude_modules."
        )


def row_scales(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    change: Tensor,
    *,
    scaling: float,
    squares: Tensor | None = None,
    shards: DeviceMesh | None = None,
) -> Tensor:
    """c = (‖W‖ + change) / ‖W + s B A‖ per row, (out_features), at least fp32; with a derivative for `change` alone.

    Args:
        weight: (out_features, in_features).
        a: (rank, in_features).
        b: (out_features, rank).
        squares: ‖W‖² over all in_features, if it is known.
        shards: The mesh over which in_features are sharded, if they are.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        left, a, b = _times(weight, a.to(weight.dtype)).to(dtype), a.to(dtype), b.to(dtype)
        mixed = left.mul_(2 * scaling).add_(_times(b, _times(a, a)), alpha=scaling * scaling)
        sums = torch.stack([(mixed * b).sum(1), *([squares_of(weight)] if squares is None else [])])
        if shards is not None:
            sums = funcol.all_reduce(sums, "sum", shards)
        squares = sums[1] if squares is None else squares
        base, now = norms_of(squares), norms_of(squares + sums[0])
    return (base + change.to(dtype)) / now


def squares_of(weight: Tensor) -> Tensor:
    """‖W‖² per row of (out_features, in_features), at least fp32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def norms_of(squares: Tensor) -> Tensor:
    """Square roots that one can divide by: a row of zeros keeps the scale 1."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x factorᵀ as a batch of one, see `ops.py`."""
    return torch.bmm(x.unsqueeze(0), factor.t().unsqueeze(0)).squeeze(0)


def scaled(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """z ∘ scale + bias, in z's dtype.

    Args:
        z: (..., out_features).
        scale: (out_features), at least fp32.
    """
    if isinstance(z, DTensor) or torch.compiler.is_compiling():
        out = (z * scale).to(z.dtype)
    else:
        out = _Scaled.apply(z, scale)
    return out if bias is None else out + bias.to(out.dtype)


class _Scaled(torch.autograd.Function):
    """z ∘ scale as z + z ∘ (scale − 1): rounded to z's dtype is what is small, and there is no copy of z in fp32."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
        shift = (scale - 1).to(z.dtype)
        ctx.save_for_backward(z, shift)
        ctx.dtype = scale.dtype
        return torch.addcmul(z, z, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, shift = ctx.saved_tensors
        dz = torch.addcmul(dy, dy, shift) if ctx.needs_input_grad[0] else None
        dscale = rows_of(dy * z).sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return dz, dscale
