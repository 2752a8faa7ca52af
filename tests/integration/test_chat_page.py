"""docs/chat.md: its snippet answers with the adapter of a real job on conversations, as the trained model would."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from chat_job import TEMPLATE, chat_options
from harness import ROOT, train
from test_resume import on

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs/chat.md").read_text()
(SNIPPET,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def with_values(**values: str) -> str:
    """The snippet with other values for the variables at its top."""
    text = SNIPPET
    for name, value in values.items():
        text, count = re.subn(rf'^{name} = ".*?"', f"{name} = {value!r}", text, flags=re.M)
        assert count == 1, name
    return text


@pytest.mark.parametrize("template_is_a_file", [False, True])
def test_the_snippet_answers_with_the_adapter_of_a_job(
    template_is_a_file: bool, hf_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template that writes otherwise, the answer is another one: the variable is used."""
    options = chat_options(tmp_path / "chat", count=20)
    base = shutil.copytree(hf_base, tmp_path / "base")
    shutil.copytree(tmp_path / "chat" / "tokenizer", base, dirs_exist_ok=True)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.replace("<bos>", "<bos><bos>"))
    chosen = [f"--chat.template={template}"] if template_is_a_file else []
    size = ["--training.local_batch_size=2", "--training.steps=2", "--optimizer.lr=3e-2"]
    export = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    run = train(tmp_path / "run", *on(hf_base), *options, *chosen, *size, *export)
    paths = {"base": str(base), "adapter": str(tmp_path / "run/checkpoint/step-2"), "question": "the red cat"}
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(with_values(**paths, template=str(template) if template_is_a_file else ""), names)
    prompt, tokens = names["prompt"]["input_ids"], names["tokens"]  # type: ignore[index]
    begin = "<bos><bos>" if template_is_a_file else "<bos>"
    assert names["tokenizer"].decode(prompt[0]) == f"{begin}user: the red cat<eos>\nassistant: "  # type: ignore[attr-defined]
    (model,), read = run.trainer.model_parts, tokens[:, :-1]  # type: ignore[index]
    with torch.no_grad():
        logits = model(read, attention_masks=model.get_attention_masks(read, run.trainer.tokenizer))
    answer = tokens[0, prompt.shape[1] :]
    assert torch.equal(logits[0, prompt.shape[1] - 1 :].argmax(-1), answer) and len(answer) > 0
    assert capsys.readouterr().out == names["tokenizer"].decode(answer) + "\n"  # type: ignore[attr-defined]
