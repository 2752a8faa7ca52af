"""The demo's conversations: letters are asked, their capitals are the answer. Of `demo.py`.

The template is plain text. Its only special tokens are those that the base has read around every document: a frozen
head cannot learn new ones.
"""

import json
import random
import string
import warnings
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first }}{{ 'A' if message.role == 'assistant' else 'Q' }}:\n"
    "{{ message.content }}{{ eos_token if message.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:\n{% endif %}"
)

Messages = list[dict[str, str]]


def write_conversations(data: Path, base: Path, train: int = 2000, test: int = 100) -> list[Messages]:
    """Writes the file that is trained on, and the template into the base's folder.

    Returns:
        Conversations whose questions are not in the file.
    """
    rng, questions = random.Random(0), set[str]()
    while len(questions) < train + test:
        questions.add(" ".join(rng.choices(string.ascii_lowercase, k=3)))
    asked = sorted(questions)
    rng.shuffle(asked)
    told = [[dict(role="user", content=q), dict(role="assistant", content=q.upper())] for q in asked]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in told[test:]))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return told[:test]


def describe_scores(base: Path, adapter: Path, conversations: list[Messages]) -> str:
    """How many answers are right, as a line."""
    before, after = count_right(base, adapter, conversations)
    question, answer = (message["content"] for message in conversations[0])
    return (
        f"{len(conversations)} new questions ({question} -> {answer}), right answers: untouched base {before}   "
        f"LoRA {after}   (by transformers + PEFT)"
    )


def count_right(base: Path, adapter: Path, conversations: list[Messages]) -> tuple[int, int]:
    """Answers that are right to the last letter and end where they should: of the base, and with the adapter on it.

    Decoded by transformers and PEFT, which share no code with the trainer.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # one token at a time: more threads wait for each other
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)

    def is_right(messages: Messages) -> bool:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
        return answer == messages[-1]["content"] + tokenizer.eos_token

    with torch.inference_mode():
        with model.disable_adapter():
            before = sum(map(is_right, conversations))
        return before, sum(map(is_right, conversations))
