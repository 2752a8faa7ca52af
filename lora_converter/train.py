"""torchtitan's own trainer and argument handling, on GPUs or, where there is no accelerator, on CPU ranks.

torchrun --nproc_per_node=2 -m lora_converter.train --job.config_file my.toml [--lora.rank 8 ...]
torchrun --nproc_per_node=2 -m lora_converter.train --module my_configs --config my_job [--lora.rank 8 ...]    # 0.3
"""

import importlib

from lora_converter.titans.chosen import room

_START = {"titan": "titan.start", "titan03": "toml03.start"}


def main() -> None:
    """Trains the job that the command line describes, on the torchtitan that is installed."""
    importlib.import_module(f"lora_converter.{_START[room()]}").main()


if __name__ == "__main__":
    main()
