"""A job on conversations goes on at the row where it stopped, and not on other rows."""

import re
import shutil
from pathlib import Path

import pytest
from chat_job import chat_job
from harness import build, train

pytestmark = pytest.mark.slow


def test_epoch_end_resume_a_run_goes_on_at_the_right_row(chat: Path, dcp_base: Path, tmp_path: Path) -> None:
    options = chat_job(dcp_base, chat, "--training.local_batch_size=5", "--lr_scheduler.total_steps=20")
    more = ["--checkpoint.interval=2", "--checkpoint.no-last_save_model_only"]
    rows = build(tmp_path / "look", *options).trainer.dataloader.order.rows.per_epoch
    steps = rows // 5 + 2
    whole = train(tmp_path / "whole", *options, f"--training.steps={steps}")
    train(tmp_path / "parts", *options, *more, f"--training.steps={rows // 5}")
    second = train(tmp_path / "parts", *options, *more, f"--training.steps={steps}")
    assert second.losses == whole.losses[rows // 5 :] and rows % 5
    seen = [row for inputs, _ in whole.batches for row in inputs.tolist()][:rows]
    assert len({tuple(row) for row in seen}) == rows  # each row once in the epoch


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--chat.packing=none", "packing (documents, now none)"),
        ("--debug.seed=12", "seed (11, now 12)"),
        ("--training.seq_len=192", "seq_len (256, now 192)"),
        ("--chat.train_on=last", "the tokenizer, chat.template, template_args, date or train_on (digest"),
        ("data", "the data files (digest"),
    ],
)
def test_another_fingerprint_at_resume_is_an_error_that_says_which(
    change: str, told: str, chat: Path, dcp_base: Path, tmp_path: Path
) -> None:
    options = [*chat_job(dcp_base, chat), "--checkpoint.interval=1", "--checkpoint.no-last_save_model_only"]
    train(tmp_path / "run", *options)
    if change == "data":
        other = shutil.copytree(chat, tmp_path / "other")
        (other / "train.jsonl").write_text("".join((chat / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
        change = f"--training.dataset_path={other}/train.jsonl"
    run = build(tmp_path / "run", *options, change, "--training.steps=3")
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        run.trainer.checkpointer.load()
    run.trainer.close()
    assert "was trained on other rows" in str(error.value)
    anew = train(
        tmp_path / "run", *options, change, "--training.steps=3", "--checkpoint.exclude_from_loading=dataloader"
    )
    assert len(anew.losses) == 1 and anew.trainer.dataloader.order.consumed == 2
