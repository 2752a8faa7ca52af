"""Ids and masks are transformers' for TRL's training templates, and TRL's for the stock templates beside them."""

import datetime
import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import MARKED, STOCK, TEMPLATES, a_tokenizer, conversation

from lora_converter.chat.formats import BadRecord
from lora_converter.chat.masks import ChatTokenizer, Example

PARTS = {"idefics3", "llava_next", "smolvlm"}
"""Templates that want content as a list of parts."""

HEADERS = {"gptoss": "<|start|>assistant", "muse_glimmer": "<|start|>assistant"}
"""What a training template has within its tags although the generation prompt holds it."""

BY_TURN = {"gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"}
"""Stock templates whose earlier turns are not what the model wrote, so that only one turn per example is right."""

REFUSED = {
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), r"does not begin this turn with its generation prompt"),
    **{
        f"nemotron_3_{size}": r"does not begin this turn with its generation prompt"
        for size in ("nano", "super", "ultra")
    },
    "nemotron_3_5_lightning": r"does not begin this turn with its generation prompt",
    "glm4moe": r"the template writes no end of turn",
}
"""Stock templates that open reasoning which plain answers do not have, or do not end the last turn."""

UNTAGGED = sorted(set(STOCK) - BY_TURN - REFUSED.keys() - {Path(name).stem for name in MARKED})

MANY = pytest.param(500, marks=pytest.mark.slow)


@cache
def tokenizer(family: str) -> Any:
    """One vocabulary for the stock and the training template of a family, so that their ids compare."""
    names = [name for name in (f"{family}.jinja", f"{family}_training.jinja") if (TEMPLATES / name).is_file()]
    return a_tokenizer("".join((TEMPLATES / name).read_text() for name in names))


def ours(family: str, template: str, folder: Path, **settings: Any) -> ChatTokenizer:
    tokenizer(family).save_pretrained(folder)
    return ChatTokenizer(folder, template=TEMPLATES / template, date=datetime.date.today(), **settings)


def theirs(family: str, template: str, record: dict[str, Any], **settings: Any) -> Any:
    messages = record["messages"]
    if family in PARTS:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    settings = {"chat_template": (TEMPLATES / template).read_text(), "tools": record.get("tools"), **settings}
    return tokenizer(family).apply_chat_template(messages, **settings)


def masked(family: str, template: str, record: dict[str, Any]) -> tuple[list[int], list[bool]]:
    out = theirs(family, template, record, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], [bool(trained) for trained in out["assistant_masks"]]


def read(family: str, ids: Any) -> str:
    return tokenizer(family).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def loses(record: dict[str, Any], everything: str, trained: str) -> bool:
    """Whether a template leaves out something that the assistant wrote, or the tools."""
    wrote = [m for m in record["messages"] if m["role"] == "assistant"]
    texts = [m["content"] for m in wrote] + [m.get("reasoning_content", "") for m in wrote]
    texts += ["get_weather" for m in wrote if "tool_calls" in m]
    return any(text.strip() not in trained for text in texts) or ("tools" in record and "get_weather" not in everything)


@pytest.mark.parametrize("count", [20, MANY])
@pytest.mark.parametrize("name", MARKED)
def test_ids_and_masks_of_training_templates_are_those_of_transformers(name: str, count: int, tmp_path: Path) -> None:
    family = name.removesuffix(".jinja").removesuffix("_training")
    chat, compared = ours(family, name, tmp_path), 0
    for seed in range(count):
        kind = {"tools": seed % 4 == 1, "reasoning": seed % 4 == 2, "system": seed % 4 != 3}
        record = conversation(random.Random(seed), **kind)
        try:
            ids, mask = masked(family, name, record)
        except Exception:
            ids, mask = [], []
        trained = read(family, itertools.compress(ids, mask))
        if not ids or loses(record, read(family, ids), trained):
            with pytest.raises(BadRecord):
                chat.encode(record)
            continue
        [example] = chat.encode(record)
        assert (example.ids.tolist(), example.trained.tolist()) == (ids, mask), record
        compared += 1
    assert compared >= count // 4


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MARKED)
def test_one_turn_per_example_is_transformers_mask_of_the_last_turn(name: str, count: int, tmp_path: Path) -> None:
    family = name.removesuffix(".jinja").removesuffix("_training")
    chat = ours(family, name, tmp_path / "each", train_on="each")
    last = ours(family, name, tmp_path / "last", train_on="last")
    for seed in range(count):
        record = conversation(random.Random(seed), system=False, turns=3)
        examples = chat.encode(record)
        for turn, example in zip((1, 3, 5), examples, strict=True):
            ids, mask = masked(family, name, {"messages": record["messages"][: turn + 1]})
            before = theirs(family, name, {"messages": record["messages"][:turn]}, return_dict=True)["input_ids"]
            start = next(k for k, (a, b) in enumerate(zip(ids, [*before, None], strict=False)) if a != b)
            assert example.ids.tolist() == ids
            assert example.trained.tolist() == [False] * start + mask[start:]
        [only] = last.encode({"messages": [*record["messages"], {"role": "user", "content": "and?"}]})
        assert only.ids.tolist() == examples[-1].ids.tolist() and only.trained.tolist() == examples[-1].trained.tolist()


def check_against_training(family: str, example: Example, record: dict[str, Any]) -> None:
    """Trained is what the training template trains, less the prompt's own and white space behind the end of a turn."""
    if not (TEMPLATES / f"{family}_training.jinja").is_file():
        contents = [m["content"].strip() for m in record["messages"] if m["role"] == "assistant"]
        places = enumerate(example.trained)
        runs = [list(run) for trained, run in itertools.groupby(places, lambda place: place[1]) if trained]
        for run, content in zip(runs, contents, strict=True):
            answer = read(family, example.ids[run[0][0] : run[-1][0] + 1])
            assert content in answer and answer.endswith("|>"), (answer, content)
        return
    ids, mask = masked(family, f"{family}_training.jinja", record)
    assert example.ids.tolist() == ids
    more = [i for i, a, b in zip(ids, example.trained, mask, strict=True) if b and not a]
    assert not any(a and not b for a, b in zip(example.trained, mask, strict=True))
    assert not read(family, more).replace(HEADERS.get(family, "\n"), "").strip()


@pytest.mark.parametrize("count", [5, MANY])
@pytest.mark.parametrize("family", UNTAGGED)
def test_masks_of_stock_templates_are_those_of_training_templates(family: str, count: int, tmp_path: Path) -> None:
    chat, compared = ours(family, f"{family}.jinja", tmp_path), 0
    for seed in range(count):
        record = conversation(random.Random(seed), system=False)
        try:
            [example] = chat.encode(record)
        except BadRecord as error:
            assert "also holds the prompt's end" in str(error) and 'train_on = "each" works' in str(error)
            continue
        assert example.ids.tolist() == theirs(family, f"{family}.jinja", record, return_dict=True)["input_ids"]
        check_against_training(family, example, record)
        compared += 1
    assert compared >= count // 2


@pytest.mark.parametrize("family", sorted(BY_TURN))
def test_stock_templates_that_rewrite_turns_are_refused_and_one_turn_per_example_works(
    family: str, tmp_path: Path
) -> None:
    chat = ours(family, f"{family}.jinja", tmp_path / "whole")
    each = ours(family, f"{family}.jinja", tmp_path / "each", train_on="each")
    for seed in range(3):
        record = conversation(random.Random(seed), system=False, turns=3)
        with pytest.raises(BadRecord, match=r"(rewrites this turn|also holds).*train_on = \"each\" works"):
            chat.encode(record)
        for turn, example in zip((1, 3, 5), each.encode(record), strict=True):
            start = example.trained.argmax()
            end = len(example.trained) - example.trained[::-1].argmax()
            context = {"messages": record["messages"][:turn]}
            prompt = theirs(family, f"{family}.jinja", context, tokenize=False, add_generation_prompt=True)
            assert read(family, example.ids[:start]) == prompt
            assert example.ids[:start].tolist() == tokenizer(family)(prompt, add_special_tokens=False)["input_ids"]
            assert example.trained[start:end].all() and not read(family, example.ids[end:]).strip()
            answer = read(family, example.ids[start:end])
            assert record["messages"][turn]["content"].strip() in answer and answer.endswith(("|>", "</s>"))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_stock_templates_that_hide_what_the_model_writes_are_refused_with_the_reason(
    family: str, tmp_path: Path
) -> None:
    for train_on in ("assistant", "each"):
        chat = ours(family, f"{family}.jinja", tmp_path / train_on, train_on=train_on)
        for seed in range(4):
            with pytest.raises(BadRecord, match=REFUSED[family] + r".*\. Set \[chat\] template"):
                chat.encode(conversation(random.Random(seed), system=False))


def test_thinking_turned_off_by_an_argument_is_rendered_as_transformers_does(tmp_path: Path) -> None:
    args = {"enable_thinking": False}
    chat = ours("qwen3", "qwen3.jinja", tmp_path, template_args=args)
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    [example] = chat.encode(record)
    prompt = theirs(
        "qwen3", "qwen3.jinja", {"messages": record["messages"][:1]}, add_generation_prompt=True, tokenize=False, **args
    )
    assert prompt.endswith("</think>\n\n") and read("qwen3", example.ids[: example.trained.argmax()]) == prompt
    assert read("qwen3", example.ids[example.trained]) == "Hello<|im_end|>"
