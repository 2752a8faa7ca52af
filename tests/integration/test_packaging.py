"""What a user installs: a wheel and an sdist, built here, tried where nothing of this folder is on the path."""

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from harness import ROOT, TINY_ARGS

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


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == tracked("lora_converter") and "lora_converter/py.typed" in inside
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: BSD-3-Clause" in metadata and "Requires-Dist: torchtitan==0.2.2" in metadata


def test_the_sdist_makes_the_same_wheel(copy: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", copy, copy / "dist-sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        of_package = [{n: z.read(n) for n in z.namelist() if n.startswith("lora_converter/")} for z in (first, second)]
    assert of_package[0] == of_package[1]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that sees the dependencies of this one, and has the wheel instead of the checkout."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not followed
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    run(*pip, cwd=folder)
    where = run(python, "-c", "import lora_converter; print(lora_converter.__file__)", cwd=folder)
    assert where.startswith(str(site))
    return python


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
