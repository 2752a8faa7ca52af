"""Tiny tokenizers, the chat templates of the installed TRL, and conversations to try them on. No model hub.

TRL's templates are read from its wheel; what they should give is for transformers to say.
"""

import importlib.util
import itertools
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_converter.chat.masks import ChatTokenizer, Example

_FOUND = importlib.util.find_spec("trl")  # not imported: that takes seconds
TEMPLATES = Path(_FOUND.origin).parent / "chat_templates" if _FOUND and _FOUND.origin else Path("trl is not installed")
STOCK = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
"""Families whose own template TRL knows."""

MARKED = sorted(path.name for path in TEMPLATES.glob("*.jinja") if "endgeneration" in path.read_text())
"""Templates with `{% generation %}` blocks: TRL's training templates, and a few that come with them."""

BOS, EOS = "<s>", "</s>"
_MARKS = re.compile(r"<\|[^<>{}' ]+?\|>|<\uff5c[^<>]+?\uff5c>|</?[a-z_]+>|<\|?[a-z_]+\|>|<\|[a-z_]+>|\[/?INST\]")

_SPLIT = Regex(r"\s*[\r\n]+| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
"""Line ends that follow each other are one word, as in Llama's and Qwen's tokenizers."""

_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "12",
    "345",
    "miles",
    "to",
    "see",
    "naïve",
    "café",
    "你好",
    "🙂",
    "def",
    "f(x):",
    "return",
    "x",
]
_ODD = [
    "naïve café — 你好",
    "\n\nleading newlines",
    "trailing spaces   ",
    "  two spaces",
    "tab\there",
    "🙂🙂",
    "a",
    "\nx",
    "",
]


@cache
def _trained() -> str:
    """A byte-level BPE of a few hundred tokens, as JSON: it merges newlines and spaces, as those of real models do."""
    rng = random.Random(0)
    lines = [
        " ".join(rng.choices(_WORDS, k=8)) + "\n" * rng.randint(1, 3) + "  " * rng.randint(0, 2) for _ in range(400)
    ]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(_SPLIT, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def a_tokenizer(template: str, **tokens: str) -> Any:
    """transformers' tokenizer with the marks of a template as special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.add_special_tokens([BOS, EOS, *sorted(set(_MARKS.findall(template)))])
    tokens = {"bos_token": BOS, "eos_token": EOS, **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **tokens)


def a_folder(folder: Path, template: str, **tokens: str) -> Path:
    """The same as files."""
    a_tokenizer(template, **tokens).save_pretrained(folder)
    return folder


def prose(rng: random.Random, words: int = 12) -> str:
    parts = [rng.choice(_ODD) if rng.random() < 0.2 else " ".join(rng.choices(_WORDS, k=rng.randint(1, words)))]
    while rng.random() < 0.3:
        parts.append(" ".join(rng.choices(_WORDS, k=rng.randint(1, words))))
    return "\n".join(parts)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def conversation(
    rng: random.Random, *, system: bool = True, tools: bool = False, reasoning: bool = False, turns: int | None = None
) -> dict[str, Any]:
    """A record in transformers' own form."""
    messages: list[dict[str, Any]] = []
    if system and rng.random() < 0.5:
        messages.append({"role": "system", "content": prose(rng)})
    for _ in range(turns or rng.randint(1, 4)):
        messages.append({"role": "user", "content": prose(rng, 200 if rng.random() < 0.05 else 12)})
        if tools and rng.random() < 0.5:
            function = {"name": "get_weather", "arguments": {"city": prose(rng, 2)}}
            call = {"role": "assistant", "content": prose(rng) if rng.random() < 0.3 else ""}
            messages.append({**call, "tool_calls": [{"type": "function", "function": function}]})
            messages.append({"role": "tool", "name": "get_weather", "content": prose(rng)})
        answer = {"role": "assistant", "content": prose(rng)}
        if reasoning and rng.random() < 0.5:
            answer["reasoning_content"] = "because " + prose(rng).strip()
        messages.append(answer)
    return {"messages": messages, **({"tools": [TOOL]} if tools else {})}


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}" + PROMPT
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}\n\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n\nassistant:{% endif %}"
)
THINKS = "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
FORGETS = CHATML.replace("{{ m.content }}", THINKS + "{{ m.content }}")
"""Leaves the reasoning out of earlier turns, as Qwen's and DeepSeek's templates do."""

USER, SECOND = {"role": "user", "content": "the cat sat"}, {"role": "user", "content": "and then?"}
ANSWER, OTHER = {"role": "assistant", "content": "on a mat"}, {"role": "assistant", "content": "it ran"}
TWO_TURNS = {"messages": [USER, ANSWER, SECOND, OTHER]}


def chat(folder: Path, template: str = CHATML, **settings: Any) -> ChatTokenizer:
    return ChatTokenizer(a_folder(folder, template), **settings)


def text(folder: Path, ids: Any) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def trained(folder: Path, example: Example) -> list[str]:
    """The stretches of text that are trained."""
    pairs = zip(example.ids.tolist(), example.trained.tolist(), strict=True)
    runs = itertools.groupby(pairs, lambda pair: pair[1])
    return [text(folder, [token for token, _ in run]) for is_trained, run in runs if is_trained]
