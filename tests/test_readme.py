"""The README's promises: its commands parse, its links lead somewhere, its tables name what exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from tralign_mini import __all__ as public_names
from tralign_mini.cli import app
from tralign_mini.recipe import Recipe, parse_overrides

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^tralign .*$", README, re.M)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_exists(command):
    assert CliRunner().invoke(app, [command[1], "--help"]).exit_code == 0
    if command[1] == "train" and not command[2].startswith("runs/"):
        Recipe.load(command[2], **parse_overrides(command[3:]))


def test_the_two_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test"} <= set(targets)
    assert "make demo" in README and "make test" in README


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


def test_python_examples_use_public_names():
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        tree = ast.parse(block)
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and getattr(node.value, "id", "") == "tr"}
        assert used and used <= set(public_names)


def test_the_table_of_methods_is_complete():
    methods = [*get_args(Recipe.model_fields["method"].annotation), "ppo"]  # which has a recipe of its own
    assert re.findall(r"^\| `(\w+)` \|", README, re.M)[1:] == methods
