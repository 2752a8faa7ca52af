from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files, 95 conversations."""
    from chat_words import conversations, write_lines

    write_lines(tmp_path / "data" / "a.jsonl", conversations(60))
    write_lines(tmp_path / "data" / "b.jsonl", conversations(35, start=60))
    return tmp_path / "data"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts in a file of a few thousand bytes, and looks and renewals that tests can wait for."""
    from lora_converter.chat import crew, reading, survey

    monkeypatch.setattr(reading, "PART_BYTES", 1000)
    monkeypatch.setattr(survey, "PARTS_PER_STRETCH", 4)
    monkeypatch.setattr(crew, "POLL", 0.01)
    monkeypatch.setattr(crew, "BEAT", 0.05)
