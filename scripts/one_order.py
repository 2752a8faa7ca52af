"""torchtitan's trainer with one data order for every data-parallel degree; `loss_compare.py` starts it.

Under data parallelism torchtitan gives each rank its own part of the data set, so that one rank and two see other
batches. Here every rank reads the whole stream, and of each round of consecutive batches takes the one of its rank:
the global batch of a step is the same set of rows on any layout.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lora_converter.titan import install

install()  # before torchtitan

from torchtitan.train import Trainer, main

import lora_converter.titan.converter  # noqa: F401


class OneOrderTrainer(Trainer):
    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Any]:
        mesh = self.parallel_dims.get_optional_mesh("batch")
        rank, degree = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
        assert self.train_spec.build_dataloader_fn is not None
        whole = self.train_spec.build_dataloader_fn(
            dp_world_size=1, dp_rank=0, tokenizer=self.tokenizer, job_config=self.job_config
        )
        return super().batch_generator(itertools.islice(iter(whole), rank, None, degree))


if __name__ == "__main__":
    sys.exit(main(OneOrderTrainer))
