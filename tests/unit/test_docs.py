"""README and docs: their Python runs and prints what it says, their TOML parses, their links lead somewhere."""

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from harness import ConfigManager

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def blocks(language: str) -> dict[str, list[str]]:
    """Page -> its code blocks of a language."""
    found = {page: re.findall(rf"```{language}\n(.*?)```", text, re.S) for page, text in PAGES.items()}
    return {page: texts for page, texts in found.items() if texts}


NEEDS_A_MODEL = {
    "docs/chat.md": "tests/integration/test_chat_page.py",
    "docs/torchtitan03.md": "tests/titan03/test_native03.py",
}
"""Pages whose Python takes the result of a job, or another host, and the test that runs it on one."""


@pytest.mark.parametrize("page", blocks("python").keys() - NEEDS_A_MODEL)
def test_the_snippets_of_a_page_run_one_after_the_other_and_print_what_their_comments_say(page: str) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python")[page]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, namespace)
        promised = [a or b for a, b in re.findall(r"^print\(.*\n# (.*)|^print\(.*?\)  +# (.*)", block, re.M)]
        assert printed.getvalue().splitlines() == promised


def test_snippets_on_a_model_are_run_by_a_test_of_their_own() -> None:
    for page, test in NEEDS_A_MODEL.items():
        assert blocks("python")[page] and page in source(test)


def test_python_is_shown_in_the_readme_and_on_the_librarys_page() -> None:
    assert len(blocks("python")["README.md"]) == 1 and len(blocks("python")["docs/library.md"]) >= 3


def test_the_toml_blocks_are_jobs_that_parse(tmp_path: Path) -> None:
    found = blocks("toml")
    assert {page: len(texts) for page, texts in found.items()} == {"README.md": 1, "docs/two_phases.md": 1}
    config = parse_toml(tmp_path, found["README.md"][0])
    assert (config.lora.rank, config.checkpoint.initial_load_in_hf, config.model.converters) == (16, True, ["lora"])
    lines = '[job]\ncustom_config_module = "lora_converter.titan"\n' + found["docs/two_phases.md"][0]
    phase = parse_toml(tmp_path, lines).lora.full_phase
    assert (phase.steps, phase.lr, phase.dataset, phase.dataset_path) == (1000, 1e-5, "c4", "")


def parse_toml(folder: Path, text: str) -> Any:
    (folder / "job.toml").write_text(text)
    return ConfigManager().parse_args(["--job.config_file", str(folder / "job.toml")])


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)|^\[\w+\]: (\S+)", PAGES[page], re.M)
    files = [link for pair in links for link in pair if link and not link.startswith("http")]
    folder = (ROOT / page).parent
    assert files and [link for link in files if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_command_names_is_there(page: str) -> None:
    named = set(re.findall(r"\b(?:tests|scripts|configs|examples|docs)/[\w./-]+\.(?:py|toml|sh|md)\b", PAGES[page]))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([\w./]+\.md)(?:#\w+)?\)", PAGES[page]):
            other = (ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
            if other in PAGES and other not in reached:
                todo.append(other)
    assert reached == PAGES.keys()


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def source(file: str) -> str:
    """A test file, with strings over several lines in one piece."""
    return re.sub(r'"\s*\n\s*[rf]*"', "", (ROOT / file).read_text()).replace("\\", "")


def errors() -> list[tuple[list[tuple[str, str]], list[str]]]:
    """Of each row of the table: its messages with their tests, and the tests behind what to do."""
    rows = [line.split(" | ") for line in PAGES["docs/errors.md"].splitlines() if line.startswith("| [`")]
    link = r"\]\(\.\./(tests/\S+?)\)"
    return [(re.findall(rf"\[`(.+?)`{link}", message), re.findall(link, advice)) for message, advice in rows]


def test_every_message_of_the_table_is_asserted_in_the_test_behind_it() -> None:
    messages = [pair for row, _ in errors() for pair in row]
    assert len(messages) > 40
    for message, file in messages:
        assert message in source(file), (message, file)


NOTHING_TO_DO = {
    "which is not in its folder",
    "not resumed from: ",
    "has no lora.json, so its settings and its base are not checked",
    "got no gradient in the whole step",
    "are saved without optimizer state",
    "is not saved: its adapters hold nan or inf",
    "was made for the base",
    "other data than in",
    "ends at once, without a save: ",
}
"""Rows that explain, and ask for nothing."""


def test_what_a_row_says_to_do_is_done_by_the_test_behind_it_after_the_rows_trouble() -> None:
    assert {message for row, _ in errors() for message, _ in row} > NOTHING_TO_DO
    for row, files in errors():
        message = row[0][0]
        assert bool(files) is (message not in NOTHING_TO_DO), message
        assert not files or any(message in source(file) for file in files), (message, files)


def test_every_report_of_others_has_a_test_of_its_name() -> None:
    rows = [line for line in PAGES["docs/chat_reports.md"].splitlines() if line.startswith("| ")][1:]
    found = [re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/\S+?)\)", row) for row in rows]
    assert len(rows) == 19 and all(found)  # EOS is never learned in two ways
    missing = [test for tests in found for test, file in tests if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []


ASKS = re.compile(
    r"(?:for .* )?(?:add|allow|call|check|convert|delete|derive|end|exclude|give|have it|keep|leave|load|merge|name|"
    r"put|remove|rename|resume|set|start|take|untie|use|write) ",
    re.I,
)
"""How a part of a message begins that asks for something."""


def asked_for() -> dict[str, str]:
    """What messages of the package ask for -> the file. Of a part with a value in it, what is before the value."""
    found = {}
    for path in sorted((ROOT / "lora_converter").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                for part in re.split(r"[.,;:](?: |$)| \(|\bor |\n", node.value):
                    if ASKS.match(part.strip()):
                        found[part.strip()] = path.name
    return found


ELSEWHERE = {
    "Set parallelism.expert_tensor_parallel_degree to the tensor parallel degree for the gradients of one rank",
}
"""The row "MoE, EP2 x TP2" of tests/distributed/parity.py."""


def test_what_a_message_asks_for_is_in_a_test_that_does_it() -> None:
    linked = {file for _, files in errors() for file in files}
    remedies = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*remedies*.py")}
    done = "".join(map(source, linked | remedies))
    asked = asked_for()
    assert len(asked) > 75 and asked.keys() > ELSEWHERE
    assert {part: file for part, file in asked.items() if part not in done} == {part: asked[part] for part in ELSEWHERE}


def test_the_clusters_commands_have_the_flags_of_the_test_with_two_agents() -> None:
    flags = set(re.findall(r"--(?:nnodes|nproc_per_node|rdzv_\w+)", PAGES["docs/cluster.md"]))
    tested = (ROOT / "tests" / "integration" / "test_multinode.py").read_text()
    assert flags == set(re.findall(r"--(?:nnodes|nproc_per_node|rdzv_\w+)", tested)) and len(flags) == 5
