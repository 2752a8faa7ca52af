"""The kernel that unpacks weights on CUDA is the plain unpacking: on a GPU, or in Triton's interpreter."""

import os
import shutil
import subprocess
import sys

import pytest

CODE = """
import sys, torch
from lora_converter.packed_formats import FORMATS
from lora_converter.packed_triton import unpack_blocks

device, *dtypes = sys.argv[1:]
any_byte = torch.Generator().manual_seed(0)
for form in FORMATS.values():
    for shape in ((5, 7, 384), (1, 128), (33, 256)):
        packed = form.pack(torch.randn(shape, generator=any_byte))
        packed[..., : form.code_bytes] = torch.randint(256, packed[..., : form.code_bytes].shape, generator=any_byte)
        if form.name == "mxfp4":  # every power, those below fp32's normal numbers too
            packed[..., -1] = torch.arange(packed[..., -1].numel()).view(packed.shape[:-1]) % 255
        for dtype in dtypes:
            dtype = getattr(torch, dtype)
            expected = form.unpack(packed, dtype)
            if device == "cuda":
                found = form.unpack(packed.cuda(), dtype).cpu()
            else:
                found = torch.full(shape, torch.nan, dtype=dtype)
                how = dict(code_bytes=form.code_bytes, high_first=form.first_code_is_high)
                unpack_blocks(packed.flatten(0, -2), form.table(packed.device), found.view(-1, form.block), **how)
            same = (found == expected) | (found.isnan() & expected.isnan())
            assert same.all(), (form.name, shape, dtype, (~same).sum())
"""


def check(device: str, *dtypes: str, **env: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    result = subprocess.run(
        [sys.executable, "-c", CODE, device, *dtypes], env={**kept, **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_interpreted_it_is_the_plain_unpacking() -> None:
    """Not in bf16, to which the interpreter truncates, where a GPU rounds to the nearest."""
    check("cpu", "float32", "float16", TRITON_INTERPRET="1")


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="this machine has no NVIDIA GPU")
def test_on_a_gpu_it_is_the_plain_unpacking() -> None:
    check("cuda", "float32", "bfloat16", "float16")
