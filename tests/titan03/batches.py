"""The batches of jobs on either torchtitan."""

import torch

ROWS, SEQ_LEN = 8, 256
"""Context parallelism on 0.3 wants masks of whole blocks of 128 on each rank, twice."""


def global_batch(step: int) -> torch.Tensor:
    """(ROWS, SEQ_LEN + 1) tokens in short cycles, so that there is something to learn in ten steps."""
    start = torch.randint(0, 64, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    return (start + 7 * torch.arange(SEQ_LEN + 1)) % 64
