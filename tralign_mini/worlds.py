"""The embedded worlds: small made-up tasks whose true quality is known, for runs without a network or a GPU.

Each world is a module of its own, `little_tldr.py` or `little_hh.py`: a generator of prompts and a gold
reward, exact because it parses texts with the generator's own templates. `data/make.py` makes the data.
"""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

WORLDS = ("little-tldr", "little-hh")


def world(name: str) -> ModuleType:
    """The module of a world: make_prompt, demonstration, ideal, gold_reward, explain."""
    if name not in WORLDS:
        raise ValueError(f"There is no embedded world {name!r}. There are: {', '.join(WORLDS)}.")
    return import_module(f"{__package__}.{name.replace('-', '_')}")


def gold_reward(name: str, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The true quality of each completion, exact; ValueError for a prompt that is not of this world."""
    if len(prompts) != len(completions):
        raise ValueError(f"gold_reward got {len(prompts)} prompts and {len(completions)} completions: "
                         "one completion belongs to each prompt.")
    reward = world(name).gold_reward
    return [reward(prompt, completion) for prompt, completion in zip(prompts, completions)]


def data_root() -> Path:
    """Where the worlds' data lie: `data/` beside the package in a checkout, `_data` in it when installed."""
    package = Path(__file__).resolve().parent
    for root in (package.parent / "data", package / "_data"):
        if (root / WORLDS[0]).is_dir():
            return root
    raise FileNotFoundError(f"The embedded worlds' data are neither in {package.parent / 'data'} nor in "
                            f"{package / '_data'}. Install the package again, or run `python data/make.py`.")


def data_directory(name: str) -> Path:
    """A world's folder: model/ (tokenizer and SFT model), train.jsonl.gz, test.jsonl.gz, README.md."""
    world(name)
    return data_root() / name


def grid_directory() -> Path:
    """The finished runs behind notebook 04, a folder each (recipe, metrics, samples), and their README.md."""
    return data_root() / "grid"
