"""The README's Python runs, and what it says is printed is printed; its links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

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


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|^\[\w+\]: (\S+)", README, re.M)
    files = [link for pair in links for link in pair if link and not link.startswith("http")]
    assert len(files) > 30
    assert [link for link in files if not (ROOT / link).exists()] == []
