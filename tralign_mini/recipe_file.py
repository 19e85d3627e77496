"""How recipes are read and written: YAML, `key=value`, and refusals that a person can read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

# YAML 1.2's scalars, and none. Those of PyYAML (YAML 1.1) read 1e-6 as text, 010 as 8, 2024-01-01 as a date.
SCALARS = {
    "null": r"(~|null|Null|NULL|none|None|)",
    "bool": r"(true|True|TRUE|false|False|FALSE|yes|no|on|off)",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
}


class RecipeError(ValueError):
    """A recipe that cannot be run; `.problems` has a line for each thing that is wrong, `str` shows all."""

    def __init__(self, problems: Iterable[str], source: str = "recipe"):
        self.problems = list(problems)
        many = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{source}:{many}" if len(self.problems) > 1 else f"{source}: {self.problems[0]}")


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    names = [file.name for file in (resources.files(__package__) / "recipes").iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def read(source: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """(settings, what to call them in messages) of a shipped recipe, a YAML file or a run's directory."""
    name, path = os.fspath(source), Path(source).expanduser()
    if name in shipped_recipes():
        title, file = f"recipe {name}", resources.files(__package__) / "recipes" / f"{name}.yaml"
    else:
        file = path / "recipe.yaml" if path.is_dir() else path
        title = f"recipe {file}"
        if not file.is_file():
            nearest, shipped = _nearest(name, shipped_recipes()), ", ".join(shipped_recipes())
            raise RecipeError([f"there is no such file or recipe{nearest} (shipped are {shipped})"], title)
    try:
        settings = yaml.load(file.read_bytes().decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise RecipeError(["this is not a text file in UTF-8: give a YAML file"], title) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {error.problem}" if mark else str(error)
        raise RecipeError([f"not readable as YAML: {reason}"], title) from None
    if not isinstance(settings, dict):
        raise RecipeError(["a recipe is lines of `key: value`, for example `model: little-tldr`"], title)
    return settings, title


def dump(settings: Mapping[str, Any]) -> str:
    """Settings as YAML; `read` gives back exactly the same."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parse_assignments(arguments: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`["alpha=0.6", ...]` as a dict; values are YAML scalars, but where the field is text (output=2024)."""
    settings: dict[str, Any] = {}
    for argument in arguments:
        key, _, text = (part.strip() for part in argument.partition("="))
        if key.startswith("-"):
            problem = f"{argument}: settings have no dashes in front, write {argument.lstrip('-')}"
        elif not (key and text):
            problem = f"{argument!r} is not key=value: write for example alpha=0.6 (alpha=none leaves it out)"
        elif key in settings:
            problem = f"{key} is given twice: {settings[key]} and {text}"
        else:
            try:
                value = yaml.load(text, Loader=_Loader)
            except yaml.YAMLError:
                value = text
            is_text = key in fields and fields[key].annotation is str
            settings[key] = text if is_text and value is not None else value
            continue
        raise RecipeError([problem], "command line")
    return settings


def explain(error: ValidationError, fields: Mapping[str, Any]) -> list[str]:
    """pydantic's error as lines for a person: key, value, why not, what it should be."""
    lines = []
    for problem in error.errors():
        if not problem["loc"]:  # rules between settings come as one error, a line each
            lines += str(problem["ctx"]["error"]).splitlines()
            continue
        key, value, kind = str(problem["loc"][0]), problem["input"], problem["type"]
        if kind == "extra_forbidden":
            nearest = _nearest(key, fields) or f". There are: {', '.join(fields)}"
            lines.append(f"there is no setting {key!r}{nearest}")
            continue
        if kind == "missing":
            reason = f"{key} is missing"
        elif kind == "literal_error":
            choices = get_args(fields[key].annotation) + ("ppo",) * (key == "method")  # by another class
            reason = f"{key}={value}: must be one of {', '.join(choices)}{_nearest(str(value), choices)}"
        else:
            message = re.sub(r"^(Value error, |Input |String )", "", problem["msg"]).split(", unable to ")[0]
            reason = f"{key}={value}: {message.replace('should be', 'must be')}"
        lines.append(f"{reason}. {key}: {fields[key].description}")
    return lines


def _nearest(name: str, names: Iterable[str]) -> str:
    """Like ", did you mean 'tau'?", or nothing."""
    return "".join(f", did you mean {best!r}?" for best in difflib.get_close_matches(name, list(names), 1))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        """Refuse a key that is given twice: PyYAML would silently take the last."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}


for _tag, _pattern in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), None)
