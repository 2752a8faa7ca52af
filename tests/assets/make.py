"""Writes the debug tokenizer and text beside this file; run once, the results are committed.

torchtitan's wheel ships neither. They stand where its defaults look: tests/assets/tokenizer and tests/assets/c4_test.
The tokenizer has one token per byte plus BOS and EOS. The text is made of small random facts, so that a small model
learns something from it in a few steps.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_text(folder: Path, documents: int = 120) -> None:
    rng = random.Random(0)
    animals = ["heron", "otter", "lynx", "toad", "wren", "stoat", "newt", "hare"]
    places = ["river", "orchard", "quarry", "harbour", "meadow", "attic"]
    verbs = ["watches", "crosses", "leaves", "finds", "maps", "counts"]
    folder.mkdir(exist_ok=True)
    with open(folder / "data.jsonl", "w") as out:
        for _ in range(documents):
            sentences = [
                f"The {rng.choice(animals)} {rng.choice(verbs)} the {rng.choice(places)} "
                f"{rng.randint(2, 9)} times before the {rng.choice(animals)} {rng.choice(verbs)} it."
                for _ in range(rng.randint(4, 10))
            ]
            out.write(json.dumps({"text": " ".join(sentences)}) + "\n")


if __name__ == "__main__":
    write_tokenizer(HERE / "tokenizer")
    write_text(HERE / "c4_test")
