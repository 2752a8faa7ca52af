"""A job on torchtitan 0.2.2, from its command line."""

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
