"""The kernel that unpacks NF4 on CUDA, against plain operations: on a GPU, and without one in Triton's interpreter."""

import os
import shutil
import subprocess
import sys

import pytest

CODE = """
import sys, torch
from lora_converter.packed_formats import _NF4_VALUES, FORMATS
from lora_converter.packed_triton import unpack_nf4

device, *dtypes = sys.argv[1:]
for form in (FORMATS["nf4"], FORMATS["nf4-fp32"]):
    for shape in ((5, 7, 320), (1, 64), (33, 192)):
        packed = form.pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        for dtype in dtypes:
            dtype = getattr(torch, dtype)
            expected = form.unpack(packed, dtype)
            if device == "cuda":
                found = form.unpack(packed.cuda(), dtype).cpu()
            else:
                found = torch.full(shape, torch.nan, dtype=dtype)
                unpack_nf4(packed.flatten(0, -2), _NF4_VALUES, found.view(-1, 64), code_bytes=32)
            assert torch.equal(found, expected), (form.name, shape, dtype)
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
