"""Templates are found, rendered as transformers renders them, and stopped where they have no end."""

import datetime
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from chat_tokenizers import a_folder, a_tokenizer
from tokenizers import Tokenizer, processors

from lora_converter.chat.folder import open_tokenizer, template_source
from lora_converter.chat.formats import BadRecord
from lora_converter.chat.template import ChatTemplate

DATE = datetime.date(2026, 1, 31)
HI = [{"role": "user", "content": "Hi <b> é"}]


def render(source: str, messages: list[dict[str, Any]] = HI, **args: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, args, DATE).render(messages, None).text


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages | tojson(ensure_ascii=true) }}",
        "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\nend\n",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}{{ bos_token }}",
        "{% set ns = namespace(n=1) %}{% for i in [4] %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}{{ 'a' * 3 }}",
        "{{ messages[0]['role'] }} {{ tools is none }} {{ add_generation_prompt }} {{ eos_token }}",
        "{{ dict(a=1) | tojson }} {{ [1, 2] | join(', ') }} {{ messages[0].content.split(' ') | last }} {{ 2 ** 8 }}",
    ],
)
def test_text_is_what_transformers_writes(source: str) -> None:
    tokenizer = a_tokenizer(source)
    theirs = tokenizer.apply_chat_template(HI, tokenize=False)
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    assert ChatTemplate(source, special, {}, DATE).render(HI, None).text == theirs


def test_a_template_writes_the_date_that_is_given_not_todays() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "31 Jan 2026"


def test_generation_blocks_are_recorded_by_character() -> None:
    source = "{% for m in messages %}é{{ m.role }}:{% generation %}{{ m.content }}!{% endgeneration %}\n{% endfor %}"
    template = ChatTemplate(source, {}, {}, DATE)
    rendered = template.render([*HI, {"role": "assistant", "content": "你好"}], None)
    assert template.tagged and [rendered.of([span]) for span in rendered.spans] == ["Hi <b> é!", "你好!"]
    assert not ChatTemplate("{{ messages }}{# {% generation %} #}", {}, {}, DATE).tagged


def test_a_generation_block_that_is_written_into_a_variable_is_refused() -> None:
    with pytest.raises(BadRecord, match=r"block into a variable"):
        render("{% set x %}{% generation %}Hello{% endgeneration %}{% endset %}Well, {{ x }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"rounds of range\(\)"),
        ("{% for i in range(99999) %}{% for j in range(400) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}", r"characters"),
        ("{{ 'x' * 10000000000 }}", r"it computes 'x' \* '10000000000'"),
        ("{{ 9 ** 99999999 }}", r"it computes '9' \*\* '99999999'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"macros call each other without end"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"the chat template refuses the conversation: roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", r"the chat template fails on the conversation: TypeError"),
        ("{{ messages[7].content }}", r"the chat template fails on the conversation: UndefinedError"),
        ("{{ messages.append(1) }}", r"the chat template fails on the conversation: SecurityError"),
        ("{{ messages.__class__.__mro__ }}", r"the chat template fails on the conversation: SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", r"begins with an underscore"),
        ("{% include 'secrets' %}", r"the chat template fails on the conversation: TypeError: no loader"),
    ],
)
def test_a_runaway_or_broken_template_is_stopped_with_the_reason(source: str, reason: str) -> None:
    limits = {"_ROUNDS": 200_000, "_CHARACTERS": 1 << 20}
    with mock.patch.multiple("lora_converter.chat.template", **limits), pytest.raises(BadRecord, match=reason):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | nosuchfilter }}", "{% generation %}never ends"])
def test_a_template_that_is_no_jinja_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(ValueError, match=r"The chat template is no Jinja: line 1: "):
        render(source)


def test_arguments_reach_the_template_and_one_that_it_does_not_take_is_refused() -> None:
    source = "{{ bos_token }}{% if enable_thinking %}think{% endif %}"
    assert render(source, enable_thinking=True) == "<s>think" and render(source, bos_token="<b>") == "<b>"
    with pytest.raises(
        ValueError, match=r"enable_thinkin: the template does not take it. It may take: enable_thinking\."
    ):
        render(source, enable_thinkin=False)
    with pytest.raises(ValueError, match=r"template_args: messages"):
        ChatTemplate("{{ messages }}", {}, {"messages": []}, DATE)


def test_a_template_that_wants_parts_gets_parts() -> None:
    assert render("{% for part in messages[0].content %}{{ part.text }}{% endfor %}") == "Hi <b> é"


def test_the_template_comes_from_the_setting_then_the_file_then_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert template_source(tmp_path) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_source(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_source(tmp_path) == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert template_source(tmp_path, tmp_path / "mine.jinja") == "mine"


def test_a_folder_without_a_template_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no chat template: .*Set \[chat\] template to the path of a Jinja file"):
        template_source(tmp_path)
    with pytest.raises(ValueError, match=r"\[chat\] template: there is no file .*nowhere.jinja"):
        template_source(tmp_path, tmp_path / "nowhere.jinja")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": "x"}]}))
    with pytest.raises(
        ValueError, match=r"has the chat templates rag and no default\. Write the one you want into a file"
    ):
        template_source(tmp_path)


def test_special_tokens_are_text_or_objects_and_come_from_either_file(tmp_path: Path) -> None:
    a_folder(tmp_path, "x")
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": None,
        "pad_token": "</s>",
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<old>", "unk_token": "<unk>"}))
    assert open_tokenizer(tmp_path).special == {"bos_token": "<s>", "pad_token": "</s>", "unk_token": "<unk>"}


def test_the_tokenizer_neither_adds_nor_cuts_nor_pads(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(a_folder(tmp_path, "x") / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = open_tokenizer(tmp_path)
    ids = files.tokenizer.encode("the cat sat on a mat and then it ran").ids
    assert files.tokenizer.decode(ids, skip_special_tokens=False) == "the cat sat on a mat and then it ran"
    assert files.first == [bos] and files.end == eos


def test_a_folder_that_is_no_tokenizer_or_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json\. Copy it"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(tmp_path)
    a_folder(tmp_path, "x")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"999": {"content": "<new>"}}}))
    with pytest.raises(ValueError, match=r"token 999 is '<new>' in tokenizer_config\.json, and 'none that was added'"):
        open_tokenizer(tmp_path)
