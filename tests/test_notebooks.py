"""The notebooks: each runs from top to bottom, and what is stored in it is current, whole and clean."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import tralign_mini as tr
from notebooks import run_all
from tralign_mini import exercises

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PATHS = run_all.notebooks()
LONGEST_CELL = 40  # lines
FOLDED = r"<details><summary>Solution</summary>\n\n```python\n(.*)\n```\n.*</details>"
MACHINE = re.compile(r"/(?:work|tmp|root|home|Users|content)/")  # a path that holds on one machine only

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def markdown(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def python(source: str) -> ast.Module:
    """The syntax tree of a cell, magics translated as IPython does."""
    return ast.parse(TransformerManager().transform_cell(source))


def exercise_parts(notebook) -> list[tuple[str, str, str]]:
    """(heading, starter, solution) of each exercise; the solution is folded away behind the starter."""
    cells, parts = notebook.cells, []
    for i, cell in enumerate(cells):
        if heading := re.search(r"^### (Exercise \d+): \w", cell.source, re.M):
            starter, hidden = cells[i + 1 : i + 3]
            solution = re.fullmatch(FOLDED, hidden.source, re.S)
            assert starter.cell_type == "code" and solution, f"{heading[1]}: no starter, or no solution"
            parts.append((heading[1], starter.source, solution[1]))
    return parts


@each
def test_it_runs_from_top_to_bottom_with_the_exercises_still_open(path, tmp_path):
    notebook = read(path)
    run_all.execute(notebook, tmp_path, small=True)
    for cell in run_all.code_cells(notebook):
        if "exercises.check_" in cell.source:
            [said] = [output.text for output in cell.outputs if output.output_type == "stream"]
            assert "not yet" in said and "right!" not in said


@each
def test_what_is_stored_comes_from_this_very_code_in_this_order(path):
    notebook = read(path)
    cells = run_all.code_cells(notebook)
    assert notebook.metadata.get("tralign", {}).get("executed") == run_all.code_hash(notebook), (
        f"the code of {path.name} changed after it was executed: python notebooks/run_all.py {path.name[:2]}")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@each
def test_what_is_stored_can_be_read_anywhere(path):
    for cell in run_all.code_cells(read(path)):
        for output in cell.outputs:
            assert output.output_type != "error"
            data = output.get("data", {})
            assert run_all.WIDGET not in data, "blank without a kernel: run_all keeps the picture instead"
            shown = [output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))]
            assert not any(map(MACHINE.search, shown)), f"a path of one machine, shown by {cell.source}"
        if re.search(r"\bwidgets\.\w+\(", cell.source):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs)


@each
def test_its_form(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert markdown(notebook).startswith(f"# {path.name[:2]} · ")
    for cell in notebook.cells:
        assert 0 < len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        assert not MACHINE.search(cell.source)


@each
def test_its_links_lead_somewhere(path):
    text = re.sub(r"\$\$.*?\$\$|`[^`]*`", "", markdown(read(path)), flags=re.S)
    links = re.findall(r"\]\(\s*([^)#\s]+)", text)
    for link in links + re.findall(r"""<(?:img|a)\b[^>]*(?:src|href)=["']([^"'#]+)""", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@each
def test_its_setup_is_that_of_the_first_notebook_and_the_only_place_that_installs(path):
    setup, first = (run_all.code_cells(read(one))[0].source for one in (path, PATHS[0]))
    assert setup == first, "change it in 00; run_all copies it into the others"
    others = "\n".join(cell.source for cell in run_all.code_cells(read(path))[1:])
    assert not re.search(r"pip install|REPOSITORY|os\.environ|google\.colab", others)


def test_the_setup_installs_this_package_with_an_extra_that_pyproject_has():
    setup = run_all.code_cells(read(PATHS[0]))[0].source
    installs = re.findall(r"^ +%pip install --quiet (.*)$", setup, re.M)
    assert installs == [f'"{PROJECT["name"]}[notebooks] @ git+{{REPOSITORY}}"']
    assert "notebooks" in PROJECT["optional-dependencies"]
    assert re.search(r'^REPOSITORY = "https://[\w./-]+"', setup, re.M) and setup.count("https://") == 1
    assert f'os.environ.get("{run_all.SCALE}") == "small"' in setup


@each
def test_it_imports_only_what_the_setup_installs(path):
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"]]
    known = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in declared} | {"tralign_mini", "IPython"}
    for cell in run_all.code_cells(read(path)):
        for node in ast.walk(python(cell.source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known | sys.stdlib_module_names


@each
def test_its_exercises_have_a_starter_and_a_solution_that_passes(path):
    parts = exercise_parts(read(path))
    assert [heading for heading, *_ in parts] == [f"Exercise {i + 1}" for i in range(len(parts))]
    assert 2 <= len(parts) <= 4
    assert any("exercises.check_" in solution for _, _, solution in parts)
    for heading, starter, solution in parts:
        python(starter)
        tree = ast.parse(solution)
        checks = [set(re.findall(r"exercises\.check_\w+", text)) for text in (starter, solution)]
        assert checks[0] == checks[1], f"{heading}: starter and solution have different checks"
        if checks[1]:
            scope = {"torch": torch, "F": F, "tr": tr, "exercises": exercises}
            exec(compile(ast.Module(tree.body[:-1], []), heading, "exec"), scope)
            assert eval(compile(ast.Expression(tree.body[-1].value), heading, "eval"), scope) is True


@each
def test_it_ends_with_a_few_questions_for_a_class(path):
    text = markdown(read(path))
    [questions] = re.findall(r"^## Questions for a class\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert 3 <= len(re.findall(r"^\d\. ", questions, re.M)) <= 5


def test_the_table_in_the_readme_lists_every_notebook():
    readme = (ROOT / "notebooks" / "README.md").read_text()
    assert re.findall(r"^\| \[.*?\]\((.*?\.ipynb)\)", readme, re.M) == [path.name for path in PATHS]
    for link in re.findall(r"\]\((?!https://)([^)#]+)\)", readme):
        assert (ROOT / "notebooks" / link).exists(), link


# What these tests lean on.


def notebook_of(*sources):
    return new_notebook(cells=[new_markdown_cell("text"), *map(new_code_cell, sources)])


def test_the_hash_knows_all_code_but_the_setup():
    before = run_all.code_hash(notebook_of("setup", "a = 1", "b"))
    assert run_all.code_hash(notebook_of("another setup", "a = 1", "b")) == before
    for changed in (["a = 2", "b"], ["a = 1"], ["b", "a = 1"], ["a = 1b", ""]):
        assert run_all.code_hash(notebook_of("setup", *changed)) != before


def test_of_a_widget_its_picture_is_kept_and_of_a_progress_bar_nothing():
    notebook = notebook_of("explorer", "train")
    picture, text = {"image/png": "iVBO"}, new_output("stream", name="stdout", text="plan")
    bar = new_output("display_data", data={run_all.WIDGET: {}, "text/plain": "0%|  |"})
    explorer = new_output("execute_result", data={run_all.WIDGET: {}, "text/plain": "run it"} | picture)
    notebook.cells[1].outputs, notebook.cells[2].outputs = [explorer], [text, bar]
    run_all.keep_what_can_be_read(notebook)
    assert notebook.cells[1].outputs[0].data == {"text/plain": "run it"} | picture
    assert notebook.cells[2].outputs == [text]


def test_a_cell_that_raises_stops_the_run_and_the_environment_says_the_scale(tmp_path):
    look = f"import os; print(os.environ.get({run_all.SCALE!r}), os.getcwd() == {str(tmp_path)!r})"
    notebook = notebook_of(look)
    run_all.execute(notebook, tmp_path, small=True)
    assert notebook.cells[1].outputs[0].text == "small True\n"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run_all.execute(notebook_of(look, "1 / 0"), tmp_path)
