"""The wheel, built and installed into a clean environment and run from another folder, without a network."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULE_OF = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "pillow": "PIL", "ipython": "IPython"}

# Python runs this file at each start: any look-up or connection to another machine is an error.
REFUSE_NETWORK = """
import socket

def refuse(*arguments, **keywords):
    raise RuntimeError(f"network call: {arguments}")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
"""


def run(*command, **options) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a clean environment with the wheel in it; it sees the packages here, not this checkout."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    (site / "sitecustomize.py").write_text(REFUSE_NETWORK)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return python


@pytest.fixture
def elsewhere(tmp_path):
    """How to run something in another folder, with an empty home and no trace of this checkout."""
    home = tmp_path / "home"
    home.mkdir()
    unwanted = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    return {"cwd": tmp_path, "env": environment | {"HOME": str(home)}}


def test_the_wheel_holds_data_and_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tralign_mini").rglob("*.py")}
    here |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tralign_mini" / "recipes").glob("*.yaml")}
    for path in (ROOT / "data").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            here.add("tralign_mini/_data/" + path.relative_to(ROOT / "data").as_posix())
    assert shipped == here
    for world in ("little-tldr", "little-hh"):
        for file in ("model/model.safetensors", "model/tokenizer.json", "train.jsonl.gz", "test.jsonl.gz"):
            assert f"tralign_mini/_data/{world}/{file}" in shipped
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_package_finds_its_own_data_and_recipes(python, elsewhere):
    code = """
import sys, tralign_mini as tr
from tralign_mini.recipe_file import shipped_recipes
print(tr.__file__, tr.__version__, *shipped_recipes())
from tralign_mini.worlds import grid_directory
print(*(len(tr.load_dataset(world, split="test")) > 0 for world in tr.WORLDS), len(tr.compare(
    sorted(grid_directory().glob("*-seed1"))[:2]).table))
"""
    first, second = run(python, "-c", code, **elsewhere).splitlines()
    file, version, *recipes = first.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == PYPROJECT["project"]["version"]
    assert recipes == sorted(path.stem for path in (ROOT / "tralign_mini" / "recipes").glob("*.yaml"))
    assert second == "True True 3"  # the initial policy, and two runs of the grid


def test_the_installed_command_trains_without_a_network(python, elsewhere):
    settings = "max_steps=2 tau=1 batch_size=4 eval_steps=2 eval_prompts=2 warmup_steps=0 output=here".split()
    run(python.with_name("tralign"), "train", "little-tldr", *settings, **elsewhere)
    folder = elsewhere["cwd"] / "here"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "report.md").is_file()


def test_the_refusal_of_the_network_works(python, elsewhere):
    code = "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, **elsewhere)
    assert result.returncode == 1 and "RuntimeError: network call" in result.stderr


@pytest.mark.parametrize("arguments", [["taw=16"], ["tau=none", "alpha=2"]])
def test_a_wrong_setting_is_refused_before_torch_is_loaded(python, elsewhere, arguments):
    code = f"""
import sys
from tralign_mini import cli
sys.argv = ["tralign", "train", "little-tldr", *{arguments}]
try:
    cli.main()
except SystemExit as exit:
    print(exit.code, 'torch' in sys.modules)
"""
    assert run(python, "-c", code, **elsewhere).splitlines()[-1] == "2 False"


def test_import_is_light(python, elsewhere):
    code = """
import sys, time
start = time.perf_counter()
import tralign_mini
print(time.perf_counter() - start)
print('torch' in sys.modules, 'transformers' in sys.modules)
"""
    seconds = []
    for _ in range(5):  # the first is cold, and other processes may be busy: the best one counts
        taken, modules = run(python, "-c", code, **elsewhere).splitlines()
        seconds.append(float(taken))
        assert modules == "False False"
    assert min(seconds) < 0.3
    start = time.perf_counter()
    run(python.with_name("tralign"), "--help", **elsewhere)
    assert time.perf_counter() - start < 5


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_every_import_of_the_package_is_declared_and_every_requirement_is_used():
    def names(requirements):
        found = (re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
        return {MODULE_OF.get(name, name) for name in found}

    extras = PYPROJECT["project"]["optional-dependencies"]
    required = names(PYPROJECT["project"]["dependencies"])
    optional = set().union(*(names(extras[extra]) for extra in extras if extra != "dev"))
    used = set().union(*(imported(path) for path in (ROOT / "tralign_mini").rglob("*.py"))) - {"tralign_mini"}
    assert used - required <= optional
    assert required <= used | imported(ROOT / "data" / "make.py")


def test_every_requirement_has_an_exact_version_in_constraints():
    pinned = re.findall(r"^([\w-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pinned}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    requirements = PYPROJECT["project"]["dependencies"] + [line for extra in extras for line in extra]
    assert {re.match(r"[\w-]+", line)[0] for line in requirements} <= pinned
