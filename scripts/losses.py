"""Losses of a torchtitan run, read from the TensorBoard events that it wrote."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAG = "loss_metrics/global_avg_loss"


def read_losses(dump_folder: Path, tb_folder: str = "tb") -> dict[int, float]:
    """Step -> global average loss. Of a step that was run twice, the later run counts.

    Raises:
        FileNotFoundError: The run wrote no events; it needs `--metrics.enable_tensorboard`.
    """
    events = sorted((dump_folder / tb_folder).rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not events:
        raise FileNotFoundError(f"No TensorBoard events under {dump_folder / tb_folder}.")
    losses: dict[int, float] = {}
    for path in events:
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
        accumulator.Reload()
        if TAG in accumulator.Tags()["scalars"]:
            losses.update({event.step: event.value for event in accumulator.Scalars(TAG)})
    return dict(sorted(losses.items()))
