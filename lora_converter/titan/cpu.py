"""What torchtitan 0.2.2 needs to run on CPU ranks (gloo), for CI and for laptops.

Released torchtitan assumes an accelerator. `prepare` chooses CPU ranks where there is none, before torchtitan is
imported; the other functions make the values of rows of `host_changes.py`, which say why, so that the same TOML files
train: FSDP2, HSDP, DDP, TP, PP, CP, compile and the debug MoE models.

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
    """Chooses CPU ranks if the machine has no accelerator; call before importing torchtitan.

    Returns:
        Whether CPU ranks will be used.

    Raises:
        RuntimeError: torchtitan was imported before and has chosen a device that is not there.
    """
    if torch.accelerator.is_available():
        return False
    _choose_cpu_device()
    return True


def is_chosen() -> bool:
    """Whether torchtitan, which is imported by then, runs on CPU ranks."""
    return bool(importlib.import_module("torchtitan.tools.utils").device_type == "cpu")


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
    vars(torch._utils)["_get_device_module"] = lambda _: _cpu_device_module()
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


def unknown_peak_flops(get_peak_flops: Callable[[str], float]) -> Callable[[str], float]:
    """nan, which shows as an unknown MFU."""
    return lambda device_name: float("nan")


def reduce_with_plain_sums(set_factor: Callable[..., None]) -> Callable[..., None]:
    """`FSDPModule.set_gradient_divide_factor`, followed by a plain sum in its place."""

    @functools.wraps(set_factor)
    def set_factor_and_plain_sum(self: Any, factor: float) -> None:
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    return set_factor_and_plain_sum


def offload_without_pinning(init: Callable[..., None]) -> Callable[..., None]:
    """`CPUOffloadPolicy` whose default is not to pin."""

    @functools.wraps(init)
    def init_unpinned(self: Any, pin_memory: bool = False) -> None:
        init(self, pin_memory)

    return init_unpinned


def shard_attention_over_heads(strategies: dict) -> dict:
    """DTensor's rules, with one for the CPU attention kernel."""
    return _with_attention()[0]


def attention_schemas(schemas: dict) -> dict:
    """The table beside them."""
    return _with_attention()[1]


def _with_attention() -> list[dict]:
    """Copies of DTensor's tables with what `register_sharding` puts there; the tables stay as they were."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def like_the_query(outputs: int, tensors: int) -> Callable[..., Any]:
        def shardings(*args: Any, **kwargs: Any) -> list[tuple[list, list]]:
            rest = [None] * (len(args) - tensors)
            return [([p] * outputs, [p] * tensors + rest) for p in (Replicate(), Shard(0), Shard(1))]

        return shardings

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables: list[dict] = [propagator.op_strategy_funcs, propagator.op_to_schema_info]
    before = [dict(table) for table in tables]
    forward_op, backward_op = _attention_ops()
    register_sharding(forward_op)(like_the_query(2, 3))
    register_sharding(backward_op)(like_the_query(3, 6))
    after = [dict(table) for table in tables]
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    return after


def _attention_ops() -> tuple[Any, Any]:
    """The CPU attention kernel and its backward."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    )


def ring_attention(custom_ops: dict) -> dict:
    """Handlers of context parallelism: the ring itself fits the CPU kernel."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

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

    forward_op, backward_op = _attention_ops()
    return {**custom_ops, forward_op: forward, backward_op: backward}


def histc_of_integers(histc: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.histc`, of integers in fp32, in which counts are exact."""

    @functools.wraps(histc)
    def histc_in_floats(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point() or input.device.type != "cpu":
            return histc(input, *args, **kwargs)
        return histc(input.float(), *args, **kwargs).to(input.dtype)

    return histc_in_floats


def permute_without_triton(generate_permute_indices: Callable[..., Any]) -> Callable[..., Any]:
    """The permutation's CPU twin."""
    return functools.partial(generate_permute_indices, use_cpu=True)
