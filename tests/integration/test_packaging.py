"""What a user installs: a wheel and an sdist, built here, tried where nothing of this folder is on the path."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import files, requires
from pathlib import Path

import pytest
from harness import ROOT, TINY_ARGS
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout + result.stderr


def tracked(*folders: str) -> set[str]:
    """Files of the checkout: what git tracks, and what it would if it were added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name for name in listed.stdout.split() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is committed, or will be: building leaves files behind, and here it would take some with it."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(what: str, source: Path, output: Path) -> Path:
    """An "sdist" or "wheel" by the backend that pyproject.toml names, with what is installed: no download."""
    output.mkdir(exist_ok=True)
    code = f"from setuptools.build_meta import build_{what} as build; build({str(output)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(copy: Path) -> Path:
    return build("wheel", copy, copy / "dist-wheel")


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == tracked("lora_converter") and "lora_converter/py.typed" in inside
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    lines = metadata_of(wheel).splitlines()
    assert "License-Expression: BSD-3-Clause" in lines
    of_torchtitan = {line for line in lines if line.startswith("Requires-Dist: torchtitan")}
    assert of_torchtitan == {
        'Requires-Dist: torchtitan==0.2.2; extra == "titan022"',
        'Requires-Dist: torchtitan==0.3.0; extra == "titan03"',
    }


def test_the_sdist_makes_the_same_wheel(copy: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", copy, copy / "dist-sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        of_package = [{n: z.read(n) for n in z.namelist() if n.startswith("lora_converter/")} for z in (first, second)]
    assert of_package[0] == of_package[1]


def environment(folder: Path, wheel: Path, names: set[str] | None = None) -> Path:
    """The python of an environment with the wheel instead of the checkout, beside all distributions that are here.

    Args:
        names: Distributions that it has instead of all, with what they need.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    if names is None:
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not followed
    else:
        link(names, site)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    run(*pip, cwd=folder)
    where = run(python, "-c", "import lora_converter; print(lora_converter.__file__)", cwd=folder)
    assert where.startswith(str(site))
    return python


def link(names: set[str], site: Path) -> None:
    """Links distributions of this environment, and what they need, into another one."""
    seen, todo = set(), set(names)
    while todo:
        seen.add(name := todo.pop())
        todo |= asked_for(requires(name) or ()) - seen
        for top in {file.parts[0] for file in files(name) or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(sysconfig.get_path("purelib"), top))


def asked_for(lines: Iterable[str]) -> set[str]:
    """Names of the requirements that hold here without an extra."""
    requirements = map(Requirement, lines)
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("env"), wheel)


def test_the_core_trains_where_there_are_torch_and_safetensors_alone(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel, {"torch", "safetensors"})
    code = """if True:
        import torch
        from lora_converter import LoRAConfig, adapter_parameters, adapter_state_dict, apply_lora
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        apply_lora(model, LoRAConfig(rank=2, alpha=4.0), seed=0)
        optimizer = torch.optim.AdamW(adapter_parameters(model).values())
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        print(sorted(adapter_state_dict(model)))
    """
    assert "['0.lora_a.weight', '0.lora_b.weight']" in run(python, "-c", code, cwd=tmp_path)


def test_a_plain_install_has_the_library_and_the_commands_without_a_torchtitan(
    wheel: Path, hf_base: Path, tmp_path: Path
) -> None:
    required = re.findall(r"^Requires-Dist: (.*)", metadata_of(wheel), re.MULTILINE)
    python = environment(tmp_path / "env", wheel, asked_for(required))
    find = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    assert run(python, "-c", find, "torchtitan", "peft", "transformers", "tqdm", cwd=tmp_path) == "['tqdm']\n"

    files_of = (name for name in sorted(tracked("lora_converter")) if name.endswith(".py"))
    modules = (name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files_of)
    # The last is asked for with triton.
    hosts = re.compile(r"lora_converter\.(titan|toml03|train$|__main__$|packed_triton$)")
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    run(python, "-c", code, *(module for module in modules if not hosts.match(module)), cwd=tmp_path)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hf_base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge = ["merge", "--base", hf_base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    assert "Merged 4 adapted modules" in run(python.parent / "lora-converter", *merge, cwd=tmp_path)


def test_the_environments_of_the_two_torchtitans_differ_in_little() -> None:
    first, second = (pins(name) for name in ("constraints.txt", "constraints-titan03.txt"))
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differing == {"torch", "torchtitan", "datasets"}  # 0.3.0 wants datasets below 4.8
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'"torchtitan=={pinned["torchtitan"]}"' in project for pinned in (first, second))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_installed_wheel_trains_and_its_command_reads_the_step(python: Path, tmp_path: Path) -> None:
    arguments = [argument for argument in TINY_ARGS if "flavor" not in argument]
    training = run(
        python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "lora_converter.train",
        f"--job.config_file={ROOT}/configs/debug_lora.toml", *arguments, "--checkpoint.initial_load_path=",
        f"--job.dump_folder={tmp_path}/run", "--training.steps=1",
        cwd=tmp_path,
    )  # fmt: skip
    assert "LoRA: 42 linears adapted (rank 16, alpha 32)" in training
    command = python.parent / "lora-converter"
    shown = run(command, "inspect", tmp_path / "run" / "checkpoint" / "step-1", cwd=tmp_path)
    assert shown.splitlines()[0] == "rank 16, alpha 32, scaling 2, dropout 0" and "42 linears, " in shown
    assert "merge" in run(command, "--help", cwd=tmp_path)


def test_hooks_and_the_test_script_run_the_same_checks() -> None:
    """.pre-commit-config.yaml is read line by line: no parser of YAML is among the dependencies by right."""
    hooks = [line.split("entry: ")[1].split(", language")[0] for line in hook_lines()]
    script = (ROOT / "scripts" / "test.sh").read_text().splitlines()
    checks = [line for line in script if line.split(" ")[0] in ("ruff", "mypy")]
    assert [hook.removeprefix(".venv/bin/") for hook in hooks] == checks and len(checks) == 3


def hook_lines() -> list[str]:
    return [line for line in (ROOT / ".pre-commit-config.yaml").read_text().splitlines() if "entry: " in line]


def test_the_version_is_named_once() -> None:
    """In pyproject.toml; the changelog has it, and the package has no other."""
    version = next(
        ast.literal_eval(line.split(" = ")[1])
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    )
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
