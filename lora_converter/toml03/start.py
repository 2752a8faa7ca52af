"""A job on torchtitan 0.3, from its own command line or from 0.2.2's."""

import sys

from lora_converter.titan03.cpu_changes import install


def main() -> None:
    """Trains the job that the command line describes: `--module` and `--config`, or `--job.config_file`."""
    install()
    from torchtitan import train

    from lora_converter.toml03 import job

    given = {argument.partition("=")[0].replace("-", "_") for argument in sys.argv[1:]}
    own = given & {"__module", "__config"}
    if own and "__job.config_file" in given:
        raise ValueError("Two jobs are named. Give --job.config_file my.toml, or --module and --config.")
    if not own:
        job.arguments = sys.argv[1:]
        sys.argv[1:] = ["--module", job.__name__, "--config", job.job.__name__]
    train.main()
