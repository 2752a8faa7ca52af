"""`lora-converter chat-data my.toml`: makes the tokenised cache of a job beforehand, and shows what is trained."""

import sys

from lora_converter.titan.installed import install

_MARKS = {True: ("\033[32m", "\033[0m"), False: ("«", "»")}
"""Around trained text, on a terminal and elsewhere."""


def show_chat_data(arguments: list[str]) -> str:
    """Counts, and the first conversation with its trained tokens marked.

    Args:
        arguments: torchtitan's command line.

    Raises:
        ValueError: The job has no conversations, or they cannot be used.
    """
    install()
    from torchtitan.config import ConfigManager
    from torchtitan.protocols.train_spec import get_train_spec

    from lora_converter.titan.chat import conversations_of
    from lora_converter.titans.chat_data import CHAT, ChatData

    job_config = ConfigManager().parse_args(arguments)
    training = job_config.training
    if training.dataset.lower() != CHAT:
        raise ValueError(f'training.dataset = {training.dataset!r}: set it to "chat".')
    model_args = get_train_spec(job_config.model.name).model_args[job_config.model.flavor]
    data = ChatData(conversations_of(job_config, model_args))
    one_rank = training.global_batch_size <= 0
    global_batch = training.local_batch_size if one_rank else training.global_batch_size
    ids, trained = data.rows.dataset.example(0)
    begin, end = _MARKS[sys.stdout.isatty()]
    pieces, at = [], 0
    while at < len(ids):
        stop = next((k for k in range(at, len(ids)) if trained[k] != trained[at]), len(ids))
        text = data.encoder.decode(ids[at:stop].tolist())
        pieces.append(f"{begin}{text}{end}" if trained[at] else text)
        at = stop
    where = data.rows.dataset.where(0)
    counted = " (on one data-parallel rank: training.global_batch_size is not set)" if one_rank else ""
    return f"{data.describe(global_batch)}{counted}\n\n{where}, what is trained is marked:\n\n{''.join(pieces)}"
