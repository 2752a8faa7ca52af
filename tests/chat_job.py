"""A chat job on the tiny models: a tokenizer with an end token, a plain template, and conversations from a seed."""

import json
import random
import shutil
from pathlib import Path

from tokenizers import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' if loop.first }}{{ message.role }}: {{ message.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "runs",
    "over",
    "under",
    "house",
    "tree",
    "and",
    "with",
    "for",
    "é",
    "☕",
]


def conversation(rng: random.Random, turns: int = 3, words: int = 6) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, words)))

    pairs = [("user", "assistant")] * rng.randint(1, turns)
    return [{"role": role, "content": text()} for pair in pairs for role in pair]


def chat_options(folder: Path, *, count: int = 120, seq_len: int = 256) -> list[str]:
    """Options of a job on conversations, whose files are made in `folder` unless they are there."""
    tokenizer = folder / "tokenizer"
    if not folder.exists():
        folder.mkdir(parents=True)
        shutil.copytree(Path(__file__).parent / "assets" / "tokenizer", tokenizer)
        made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        made.add_special_tokens(["<bos>", "<eos>"])
        made.save(str(tokenizer / "tokenizer.json"))
        (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
        rng = random.Random(0)
        lines = [json.dumps({"messages": conversation(rng)}) for _ in range(count)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return [
        "--training.dataset=chat",
        f"--training.dataset_path={folder}/train.jsonl",
        f"--model.hf_assets_path={tokenizer}",
        f"--chat.cache_path={folder}/cache",
        f"--training.seq_len={seq_len}",
    ]


SMALL = ("--training.steps=2", "--training.local_batch_size=2")


def chat_job(base: Path, folder: Path, *options: str) -> list[str]:
    """Two short steps on the conversations in a folder."""
    return [f"--checkpoint.initial_load_path={base}", *chat_options(folder), *SMALL, *options]
