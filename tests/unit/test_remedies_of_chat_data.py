"""What a message about chat data says to do: it is done, and the trouble is gone."""

import json
from pathlib import Path

import pytest
from chat_tokenizers import ANSWER, CHATML, PLAIN, TAGGED, TWO_TURNS, USER, a_folder, a_tokenizer, chat, trained

from lora_converter.chat.masks import ChatTokenizer

ENDS = ["on a mat<|im_end|>", "it ran<|im_end|>"]


def test_set_chat_template_to_the_path_of_a_jinja_file(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, CHATML)
    source = folder / "chat_template.jinja"
    source.rename(tmp_path / "mine.jinja")
    with pytest.raises(ValueError, match="Set \\[chat\\] template to the path of a Jinja file"):
        ChatTokenizer(folder).encode(TWO_TURNS)
    [example] = ChatTokenizer(folder, template=tmp_path / "mine.jinja").encode(TWO_TURNS)
    assert trained(folder, example) == ENDS


def test_one_of_several_templates_is_written_into_a_file(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, CHATML)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    asked = "Write the one you want into a file and set [chat] template to its path"
    with pytest.raises(ValueError) as error:
        ChatTokenizer(folder).encode(TWO_TURNS)
    assert asked in str(error.value)
    (tmp_path / "rag.jinja").write_text(CHATML)
    [example] = ChatTokenizer(folder, template=tmp_path / "rag.jinja").encode(TWO_TURNS)
    assert trained(folder, example) == ENDS


@pytest.mark.parametrize("each", [False, True])
def test_set_chat_template_to_one_that_has_generation_blocks(tmp_path: Path, each: bool) -> None:
    folder = a_folder(tmp_path, CHATML)
    for name, source in (("plain", PLAIN), ("tagged", TAGGED)):
        (tmp_path / f"{name}.jinja").write_text(source)
    train_on = "each" if each else "assistant"
    asked = "Set [chat] template to one that has {% generation %} blocks"
    with pytest.raises(ValueError) as error:
        ChatTokenizer(folder, template=tmp_path / "plain.jinja", train_on=train_on).encode(TWO_TURNS)
    assert asked in str(error.value)
    examples = ChatTokenizer(folder, template=tmp_path / "tagged.jinja", train_on=train_on).encode(TWO_TURNS)
    assert [run for example in examples for run in trained(folder, example)] == ENDS


def test_set_chat_template_to_one_that_writes_all_of_it(tmp_path: Path) -> None:
    record = {"messages": [USER, {**ANSWER, "reasoning_content": "because"}]}
    with pytest.raises(ValueError, match=r"Set \[chat\] template to one that writes all of it"):
        chat(tmp_path, TAGGED).encode(record)
    writes = TAGGED.replace("{% generation %}", "{% generation %}{{ m.reasoning_content }}: ")
    assert trained(tmp_path, chat(tmp_path, writes).encode(record)[0]) == ["because: on a mat<|im_end|>"]


def test_write_earlier_turns_as_messages(tmp_path: Path) -> None:
    history = {"instruction": "and then?", "output": "it ran", "history": [["the cat sat", "on a mat"]]}
    with pytest.raises(ValueError, match="Write earlier turns as messages"):
        chat(tmp_path).encode(history)
    [example] = chat(tmp_path).encode(TWO_TURNS)
    assert trained(tmp_path, example) == ENDS


def test_copy_it_from_the_models_folder_or_write_one_or_write_both_anew_with_transformers(tmp_path: Path) -> None:
    for asked, config in (
        ("Copy it from the model's Hugging Face folder, or write one with transformers: AutoTokenizer", None),
        ("Write both anew with transformers: AutoTokenizer", {"added_tokens_decoder": {"999": {"content": "<new>"}}}),
    ):
        if config:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            ChatTokenizer(tmp_path)
        assert asked in str(error.value)
        a_tokenizer(CHATML).save_pretrained(tmp_path)
        assert trained(tmp_path, ChatTokenizer(tmp_path).encode(TWO_TURNS)[0]) == ENDS
