"""The README's Python runs, and what it says is printed is printed; its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from harness import ConfigManager

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_snippets_run_one_after_the_other_and_print_what_their_comments_say() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, namespace)
        promised = [a or b for a, b in re.findall(r"^print\(.*\n# (.*)|^print\(.*?\)  +# (.*)", block, re.M)]
        assert printed.getvalue().splitlines() == promised


def test_the_toml_blocks_are_jobs_that_parse(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    config = parse_toml(tmp_path, blocks[0])
    assert (config.lora.rank, config.checkpoint.initial_load_in_hf, config.model.converters) == (16, True, ["lora"])
    phase = parse_toml(tmp_path, '[job]\ncustom_config_module = "lora_converter.titan"\n' + blocks[1]).lora.full_phase
    assert (phase.steps, phase.lr, phase.dataset, phase.dataset_path) == (1000, 1e-5, "c4", "")


def parse_toml(folder: Path, text: str) -> Any:
    (folder / "job.toml").write_text(text)
    return ConfigManager().parse_args(["--job.config_file", str(folder / "job.toml")])


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|^\[\w+\]: (\S+)", README, re.M)
    files = [link for pair in links for link in pair if link and not link.startswith("http")]
    assert len(files) > 30
    assert [link for link in files if not (ROOT / link).exists()] == []


def test_every_message_of_the_table_is_asserted_in_the_test_behind_it() -> None:
    table = README.partition("## What can go wrong")[2].partition("\n\n##")[0]
    messages = re.findall(r"\[`(.+?)`\]\((tests/\S+?)\)", table)
    assert len(messages) > 25
    for message, file in messages:
        source = re.sub(r'"\s*\n\s*[rf]*"', "", (ROOT / file).read_text())  # strings over several lines
        assert message in source.replace("\\", ""), (message, file)
