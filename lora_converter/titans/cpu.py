"""What torchtitan needs to run on CPU ranks (gloo), for CI and for laptops.

Released torchtitan assumes an accelerator. `prepare` chooses CPU ranks where there is none, before torchtitan is
imported; the other functions make the values of rows of `cpu_changes.py`, which say why, so that the same TOML files
train: FSDP2, HSDP, DDP, TP, PP, CP, compile, document masks (FlexAttention, uncompiled) and the debug MoE models.
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


def prepare(*, anyway: bool = False) -> bool:
    """Chooses CPU ranks if the machine has no accelerator; call before importing torchtitan.

    Args:
        anyway: Also if it has one.

    Returns:
        Whether CPU ranks will be used.

    Raises:
        RuntimeError: torchtitan was imported before and has chosen a device that is not there.
    """
    if torch.accelerator.is_available() and not anyway:
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
                f"torchtitan was imported before lora_converter.titans.cpu.prepare() and has chosen "
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
        device_count=lambda: 1,
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


def histc_of_integers(histc: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.histc`, of integers in fp32, in which counts are exact."""

    @functools.wraps(histc)
    def histc_in_floats(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input.is_floating_point() or input.device.type != "cpu":
            return histc(input, *args, **kwargs)
        return histc(input.float(), *args, **kwargs).to(input.dtype)

    return histc_in_floats


def all_to_all_of_any_sizes(all_to_all: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.distributed.all_to_all`, of lists of tensors, in one collective that takes pieces of any sizes."""

    @functools.wraps(all_to_all)
    def all_to_all_in_one(
        outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any = None, async_op: bool = False
    ) -> None:
        assert not async_op
        taken, given = ([piece.numel() for piece in pieces] for pieces in (outputs, inputs))
        flat = inputs[0].new_empty(sum(taken))
        whole = torch.cat([piece.flatten() for piece in inputs])
        torch.distributed.all_to_all_single(flat, whole, taken, given, group=group)
        for out, piece in zip(outputs, flat.split(taken), strict=True):
            out.copy_(piece.view_as(out))

    return all_to_all_in_one


def let_flex_attention_differentiate(validate_device: Callable[..., None]) -> Callable[..., None]:
    """No check: uncompiled FlexAttention is differentiable wherever its parts are."""
    return lambda query, key, value: None


def uncompiled_flex_attention(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The function that was compiled, traced anew for each shape: symbolic ones fail in DTensor's (torch 2.13)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)(flex_attention)


def uncompiled_block_mask(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The function that was compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask


def exchange_memory_as_it_lies(batch_p2p: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `_batch_p2p`, of views whose dims are in the order of memory. Both ends have the same strides."""

    @functools.wraps(batch_p2p)
    def exchange(ops: list[Any], *args: Any, **kwargs: Any) -> Any:
        for op in ops:
            tensor = op.tensor
            op.tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        return batch_p2p(ops, *args, **kwargs)

    return exchange
