"""The house: who may import whom, how large a room may be, and what stands where. `docs/contributing.md` draws it."""

import ast
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lora_converter"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = [
    {
        "config",
        "fake_quantized",
        "figures",
        "files",
        "fit",
        "frozen_head",
        "grouped",
        "live_bytes",
        "names",
        "ops",
        "order",
        "plan",
        "packed",
        "packed_formats",
        "packed_ops",
        "packed_triton",
        "processes",
        "ranks",
        "swap",
        "targets",
        "tensors",
        "trained",
        "updates",
        "vocabulary",
    },
    {"adapted", "chat", "packed_module", "shared"},
    {"packed_experts", "tensor_parallel"},
    {"experts", "linear", "packed_linear", "token_rows"},
    {"beside", "dora", "new_tokens", "offset", "packing"},
    {"adapters", "fingerprint", "increments", "own_names", "state_dict", "switching"},
    {"dcp"},
    {"hf"},
    {"combine", "inspect", "inspect_experts", "merge", "peft", "sync"},
    {"run"},
    {"titans"},
    {"titan", "titan03"},
    {"toml03"},
    {"cli", "train"},
]
"""Rooms, the lowest floor first. A room imports from its own and from lower floors."""


def room_of(module: str) -> str:
    """`lora_converter.hf.folder` -> `hf`."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return {name for name in found if name in MODULES and name != "lora_converter"}


def test_every_room_has_a_floor_and_nothing_imports_upwards() -> None:
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    modules = {module: path for module, path in MODULES.items() if module != "lora_converter"}
    assert {room_of(module) for module in modules} == floor.keys()
    upwards = [
        f"{module} imports {other}"
        for module, path in modules.items()
        for other in imports(path)
        if floor[room_of(other)] > floor[room_of(module)]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {module: others & graph.keys() for module, others in graph.items()}
    assert graph == {}


def test_files_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 250} == {}
    assert statistics.median(size for size in sizes.values() if size) <= 130


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by these; two of one name are not collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_what_the_type_checker_is_told_to_ignore_is_little_and_has_a_reason() -> None:
    ignored = []
    for path in FILES:
        with tokenize.open(path) as file:
            comments = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT]
        lines = path.read_text().splitlines()
        for comment in comments:
            if "type: ignore" in comment.string:
                above = lines[comment.start[0] - 2].strip()
                ignored.append((path.name, comment.string.count("#") == 2 or above.startswith("#")))
    assert len(ignored) <= 10 and all(reason for _, reason in ignored), ignored


def test_all_but_the_hosts_import_without_torchtitan() -> None:
    modules = [
        m
        for m in MODULES
        if not m.startswith(("lora_converter.titan", "lora_converter.toml03")) and m != "lora_converter.__main__"
    ]
    code = "import sys, importlib\nsys.modules['torchtitan'] = None\n"
    code += "".join(f"importlib.import_module({module!r})\n" for module in modules)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_hosts_do_not_import_each_other_and_the_second_is_small() -> None:
    others = {"titan": "titan03", "titan03": "titan"}
    crossing = [m for m, path in MODULES.items() for o in imports(path) if others.get(room_of(f"{m}.")) == room_of(o)]
    assert crossing == []
    assert sum(len(path.read_text().splitlines()) for path in (PACKAGE / "titan03").glob("*.py")) <= 700


def test_torchtitan_is_named_as_a_module_in_its_own_folders_alone() -> None:
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtitan")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torchtitan" for alias in node.names))
    }
    assert importers == {"titan", "titan03", "titans", "toml03"}
