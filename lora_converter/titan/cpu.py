"""What torchtitan 0.2.2 needs to run on CPU ranks (gloo), for CI and for laptops.

Released torchtitan assumes an accelerator. `prepare` makes the least of it that lets the same TOML files train on a
machine that has none: FSDP2, HSDP, DDP, TP, PP, CP, compile and the debug MoE models. Where there is an accelerator
it does nothing. Each function below is one workaround; remove it when the reason it names is gone.

Not possible here: models that need FlexAttention's backward (gpt_oss), which has no CPU kernel.
"""

import functools
import importlib
import os
import platform
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._utils


def prepare() -> bool:
    """Prepares torchtitan for CPU ranks if the machine has no accelerator; call before importing torchtitan.

    Returns:
        Whether CPU ranks will be used.

    Raises:
        RuntimeError: torchtitan was imported before and has chosen a device that is not there.
    """
    if torch.accelerator.is_available():
        return False
    _choose_cpu_device()
    _set_unknown_peak_flops()
    _reduce_with_plain_sums()
    _offload_without_pinning()
    _shard_attention_over_heads()
    _register_ring_attention()
    _count_integers_with_histc()
    _permute_tokens_without_triton()
    return True


def _choose_cpu_device() -> None:
    """torchtitan.tools.utils picks "cuda" where torch reports no accelerator, once, when it is imported."""
    chosen = sys.modules.get("torchtitan.tools.utils")
    if chosen is not None:
        if chosen.device_type != "cpu":
            raise RuntimeError(
                f"torchtitan was imported before lora_converter.titan.cpu.prepare() and has chosen "
                f"{chosen.device_type!r}, which this machine does not have. Call prepare() first, or start with "
                "`-m lora_converter.train`."
            )
        return
    original = torch._utils._get_available_device_type, torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _: _cpu_device_module()  # type: ignore[assignment]
    try:
        importlib.import_module("torchtitan.tools.utils")
    finally:
        torch._utils._get_available_device_type, torch._utils._get_device_module = original


def _cpu_device_module() -> ModuleType:
    """torch.cpu with the functions of an accelerator's module that torchtitan calls; memory is resident memory."""
    module = ModuleType("torch.cpu for torchtitan")
    module.__dict__.update(torch.cpu.__dict__)
    module.__dict__.update(
        set_device=lambda device: None,
        current_device=lambda: 0,
        get_device_name=lambda device=None: platform.processor() or platform.machine(),
        get_device_properties=lambda device=None: SimpleNamespace(total_memory=_total_memory()),
        memory_stats=_memory_stats,
        reset_peak_memory_stats=_reset_peak_memory,
        empty_cache=lambda: None,
    )
    return module


def _total_memory() -> int:
    """Bytes of physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_stats(device: Any = None) -> dict[str, int]:
    """This process's peak resident set since the last reset, in bytes, under the names of an allocator's statistics."""
    peak = _peak_resident_bytes()
    return {
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def _peak_resident_bytes() -> int:
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024  # kB
    except (OSError, StopIteration):  # not Linux: the peak since the start of the process
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak_memory(device: Any = None) -> None:
    """Lets Linux count the peak anew (proc(5), clear_refs); elsewhere the peak stays that of the whole process."""
    try:
        with open("/proc/self/clear_refs", "w") as clear_refs:
            clear_refs.write("5")
    except OSError:
        pass


def _set_unknown_peak_flops() -> None:
    """A CPU's peak is not in torchtitan's table, which would fall back to an A100's; nan shows as an unknown MFU."""
    utils: Any = importlib.import_module("torchtitan.tools.utils")
    utils.get_peak_flops = lambda device_name: float("nan")


def _reduce_with_plain_sums() -> None:
    """gloo has no PREMUL_SUM, the reduction that FSDP2 takes once a gradient divide factor is set."""
    from torch.distributed.fsdp import FSDPModule

    set_factor = FSDPModule.set_gradient_divide_factor

    @functools.wraps(set_factor)
    def set_factor_and_plain_sum(self: FSDPModule, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_factor_and_plain_sum  # type: ignore[method-assign]


def _offload_without_pinning() -> None:
    """`training.enable_cpu_offload` pins what it offloads for the copy to an accelerator, which takes one."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pin_memory


def _shard_attention_over_heads() -> None:
    """DTensor can shard the CUDA attention kernels over batch or heads, but not the CPU one (qwen3 under TP)."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def like_the_query(outputs: int, tensors: int) -> Callable[..., Any]:
        def shardings(*args: Any, **kwargs: Any) -> list[tuple[list, list]]:
            rest = [None] * (len(args) - tensors)
            return [([p] * outputs, [p] * tensors + rest) for p in (Replicate(), Shard(0), Shard(1))]

        return shardings

    aten = torch.ops.aten
    register_sharding(aten._scaled_dot_product_flash_attention_for_cpu.default)(like_the_query(2, 3))
    register_sharding(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)(like_the_query(3, 6))


def _register_ring_attention() -> None:
    """Context parallelism has ring versions of the CUDA attention kernels only; the ring itself fits the CPU kernel."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    aten = torch.ops.aten
    forward_op = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward_op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def as_dtensors(results: tuple[torch.Tensor, ...], like: DTensor) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(r, like.device_mesh, like.placements, run_check=False) for r in results)

    def forward(op: Any, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
        (query, key, value, *rest), options = args, dict(kwargs)
        options.update(zip(("dropout_p", "is_causal"), rest, strict=False))
        results = cp._templated_ring_attention(
            query.device_mesh.get_group(), 2, op, *(t.to_local() for t in (query, key, value)), **options
        )
        return as_dtensors(results, query)

    def backward(op: Any, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
        grad_out, query, key, value, out, logsumexp, dropout_p, is_causal = args
        local = {
            name: tensor.to_local()
            for name, tensor in dict(
                grad_out=grad_out, query=query, key=key, value=value, out=out, logsumexp=logsumexp
            ).items()
        }
        results = cp._templated_ring_attention_backward(
            query.device_mesh.get_group(),
            2,
            op,
            grad_out_name="grad_out",
            dropout_p=dropout_p,
            is_causal=is_causal,
            **local,
            **kwargs,
        )
        return as_dtensors(results, query)

    cp.custom_ops.update({forward_op: forward, backward_op: backward})  # type: ignore[dict-item]


def _count_integers_with_histc() -> None:
    """MoE routing counts expert indices with torch.histc, which has no integer CPU kernel; counts are exact in fp32."""
    histc: Callable[..., torch.Tensor] = torch.histc

    @functools.wraps(histc)
    def histc_of_integers(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point() or input.device.type != "cpu":
            return histc(input, *args, **kwargs)
        return histc(input.float(), *args, **kwargs).to(input.dtype)

    torch.histc = histc_of_integers


def _permute_tokens_without_triton() -> None:
    """The token permutation of grouped matrix products is a Triton kernel with a CPU twin behind a flag."""
    moe: Any = importlib.import_module("torchtitan.models.moe.utils")
    moe.generate_permute_indices = functools.partial(moe.generate_permute_indices, use_cpu=True)
