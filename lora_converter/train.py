"""torchtitan's own trainer and argument handling, on GPUs or, where there is no accelerator, on CPU ranks.

torchrun --nproc_per_node=2 -m lora_converter.train --job.config_file my.toml [--lora.rank 8 ...]
"""

import sys

from lora_converter.titan.installed import install


def main() -> None:
    """Trains the job that the command line describes."""
    install()
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer
    from torchtitan.train import main as torchtitan_main

    import lora_converter.titan.converter  # noqa: F401  registers "lora", also where the config module was forgotten
    from lora_converter.titan.checks import require_config_module
    from lora_converter.titan.phases import run_full_phase

    require_config_module(sys.argv[1:])
    job_config = ConfigManager().parse_args(sys.argv[1:])
    if "lora" in job_config.model.converters:
        sys.argv += run_full_phase(job_config)
    torchtitan_main(Trainer)


if __name__ == "__main__":
    main()
