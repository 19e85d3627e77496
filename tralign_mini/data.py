"""Preference data: every source becomes one schema, TRL's documented one, so that files move between the two.

    prompt, chosen, rejected        paired; texts, or chat messages with `role` and `content`
    prompt, completion, label       unpaired (KTO); label is true for a desirable completion
    prompt, completion              demonstrations (SFT)

Sources: Anthropic-HH, Reddit TL;DR, UltraFeedback or any other data set on the Hub, the embedded worlds, and
local files. Raw forms are recognised by their columns. `tokens.py` goes on from here: ids, limits, report.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi, constants

from tralign_mini.tokens import DataReport, Tokens, collate, prepare, prompt_ids, tokenize
from tralign_mini.worlds import WORLDS, data_directory

__all__ = ["DataReport", "NAMES", "Tokens", "collate", "load_dataset", "prepare", "prompt_ids", "tokenize"]

HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
NAMES = ("hh", *(f"hh/{subset}" for subset in HH_SUBSETS), "tldr", "ultrafeedback", *WORLDS)
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

TURN = "\n\nAssistant:"  # what precedes each answer in HH's dialogues


def load_dataset(name_or_path: str | Path, split: str = "train") -> datasets.Dataset:
    """A data set in the schema of this module: prompt, chosen, rejected; or prompt, completion and label.

    `name_or_path`: one of `NAMES`, a Hub name `owner/name`, a file (`EXTENSIONS`), or a folder with train.*
    and test.*. A pair whose dialogues differ before the last answer is kept with prompt None, for `prepare`
    to drop and count. Raises ValueError, FileNotFoundError or ConnectionError.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in WORLDS:
        path = data_directory(name)
    elif name in NAMES:
        return _load_hub(name, split)
    if path.exists():
        file = _file_of_split(path, split)
        return _to_schema(_read(file), str(file))
    if path.name.endswith(EXTENSIONS) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file {path} (looked for in {Path.cwd()}).")
    if not name.startswith("hh/") and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _load_hub(name, split)
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    raise ValueError(f"Unknown data set {name!r}{f'; did you mean {nearest[0]!r}?' if nearest else '.'} "
                     f"Valid: {', '.join(NAMES)}, owner/name of the Hub, or the path of a file or folder.")


# ---------------------------------------------------------------- the Hub


def _hub_arguments(name: str, split: str) -> dict:
    if name not in NAMES:
        return {"path": name, "split": split}
    if split not in ("train", "test"):
        raise ValueError(f"{name!r} has no split {split!r}; it has 'train' and 'test'.")
    if name == "tldr":  # a loading script, which datasets 5 does not run: read the Hub's parquet conversion
        folder = {"train": "train", "test": "validation"}[split]
        return {"path": "openai/summarize_from_feedback", "revision": "refs/convert/parquet", "split": split,
                "data_files": {split: [f"comparisons/{folder}/*.parquet"]}}
    if name == "ultrafeedback":
        return {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": f"{split}_prefs"}
    subsets = HH_SUBSETS if name == "hh" else (name.removeprefix("hh/"),)
    files = [f"{subset}/{split}.jsonl.gz" for subset in subsets]
    return {"path": "Anthropic/hh-rlhf", "data_files": {split: files}, "split": split}


def _load_hub(name: str, split: str) -> datasets.Dataset:
    arguments = _hub_arguments(name, split)
    repository = arguments["path"]
    looked = (f"Cannot load {name!r}: looked for the data set {repository}, split {arguments['split']!r}, on "
              f"the Hub ({constants.ENDPOINT}); there is no local file or folder of that name.")
    try:
        if not constants.is_offline_mode():  # ask once: `datasets` would retry for half a minute
            HfApi().dataset_info(repository, timeout=10)
        raw = datasets.load_dataset(**arguments)
    except Exception as error:  # network, permission, unknown name: the Hub's libraries raise dozens of types
        kind = ValueError if isinstance(error, ValueError) else ConnectionError  # a missing split; all else
        raise kind(f"{looked} It failed with {type(error).__name__}: {str(error).strip()[:400]}\n"
                   "Without a network give a local file, data=path/to/file.jsonl.gz, a folder with train.* "
                   f"and test.*, or an embedded world, data={WORLDS[0]}.") from error
    known = {column for columns, _ in _FORMS for column in columns}
    used = [column for column in raw.column_names if column in known] or raw.column_names
    return _to_schema(enumerate(raw.select_columns(used), start=1), f"{repository} ({arguments['split']})")


# ---------------------------------------------------------------- local files


def _extension(path: Path) -> str:
    return next((e for e in EXTENSIONS if path.name.lower().endswith(e)), "")


def _file_of_split(path: Path, split: str) -> Path:
    """The file of this split: a single file is 'train' as a whole, in a folder a file's name is its split."""
    if path.is_file():
        if not _extension(path):
            raise ValueError(f"{path}: unknown extension {path.suffix!r}; expected {', '.join(EXTENSIONS)}.")
        if split != "train":
            raise ValueError(f"{path} has no split {split!r}: a single file is the split 'train' as a whole. "
                             "For several splits give a folder with train.* and test.* files.")
        return path
    files = {file.name: file.name.removesuffix(_extension(file)) for file in sorted(path.iterdir())
             if file.is_file() and _extension(file)}
    found = [name for name, of in files.items() if of == split]
    if len(found) > 1:
        raise ValueError(f"{path} has several files for the split {split!r}: {', '.join(found)}; keep one.")
    if not found:
        there = ", ".join(dict.fromkeys(files.values())) or f"no file with one of {', '.join(EXTENSIONS)}"
        raise ValueError(f"{path} has no split {split!r}; there is: {there}. Expected e.g. {split}.jsonl.gz.")
    return path / found[0]


def _read(path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered raw rows of a file: lines of JSONL from 1, else rows of data from 1."""
    try:
        if _extension(path) == ".parquet":
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
            return
        reader = gzip.open if path.name.lower().endswith(".gz") else open
        with reader(path, "rt", encoding="utf-8-sig", newline="") as file:
            if _extension(path).startswith(".csv"):
                yield from _csv_rows(file)
                return
            is_list = not _extension(path).startswith(".jsonl") and file.read(99).lstrip().startswith("[")
            file.seek(0)
            yield from enumerate(json.load(file), start=1) if is_list else _json_lines(file, path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it with that encoding.") from error
    except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as {_extension(path)}: {error}. Is it damaged?") from error


def _json_lines(file, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, row {number}: not valid JSON ({error}): {line[:60]!r}.") from None


def _csv_rows(file) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 128 KiB
    for number, row in enumerate(csv.DictReader(file), start=1):
        if None in row or None in row.values():
            header = ", ".join(filter(None, row))
            raise csv.Error(f"row {number} has not as many fields as the header ({header}): commas separate "
                            "fields, and texts with commas are quoted")
        if row.get("label", "").lower() in ("true", "false"):  # CSV is all text; pandas writes True
            row["label"] = row["label"].lower() == "true"
        yield number, row


# ---------------------------------------------------------------- raw rows to the schema


def _to_schema(rows: Iterator[tuple[int, dict]], source: str) -> datasets.Dataset:
    """Convert row by row; the first row's columns decide the form, and every other row must have it too."""
    columns, convert, kind, out = (), None, None, []
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected an object with named columns, found {_show(row)}")
            if convert is None:
                columns, convert = _form_of(row)
            missing = [column for column in columns if column not in row]
            if missing or _form_of(row)[0] != columns:
                raise ValueError(f"found the columns {', '.join(row)}; the first row is {', '.join(columns)}"
                                 + (f", so {', '.join(missing)} is missing" if missing else ""))
            out.append(convert(row))
            chat = isinstance(out[-1].get("chosen", out[-1].get("completion")), list)
            if kind not in (None, chat):
                raise ValueError("texts and chat messages are mixed: this row differs from the first")
            kind = chat
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}.") from None
    if not out:
        raise ValueError(f"{source} is empty: expected rows with {_expected()}.")
    if all(row["prompt"] is None for row in out):
        raise ValueError(f"{source}: no row has a prompt. Without a column prompt, chosen and rejected must "
                         f"be dialogues, equal up to the last answer: texts with {TURN!r}, or chat messages.")
    return datasets.Dataset.from_list(out)


def _form_of(row: dict):
    for columns, convert in _FORMS:
        if all(column in row for column in columns):
            return columns, convert
    known = {column for columns, _ in _FORMS for column in columns}
    found, meant = [str(name) for name in row], ""
    for name in found:
        for near in difflib.get_close_matches(name, known, 1, 0.7) if name not in known else ():
            meant += f" (did you mean {near!r} by {name!r}?)"
    raise ValueError(f"found the columns {', '.join(found) or '(none)'}{meant}; expected {_expected()}")


def _expected() -> str:
    return "; or ".join(", ".join(columns) for columns, _ in _FORMS)


def _show(value) -> str:
    return "empty (null)" if value is None else f"{type(value).__name__} {value!r:.60}"


def _content(value, column: str):
    """A text as it is, or a list of chat messages reduced to role and content."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} is {_show(value)}; expected text, or messages with role and content")
    keys = ("role", "content")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise ValueError(f"{column} has the message {_show(message)}; expected role and content as text")
    return [{key: message[key] for key in keys} for message in value]


def _answer(value, column: str, prompt):
    answer = _content(value, column)
    if isinstance(answer, str) != isinstance(prompt, str):
        raise ValueError(f"prompt and {column} must both be texts or both be messages; found "
                         f"{type(prompt).__name__} and {type(answer).__name__}")
    if isinstance(answer, list) and [message["role"] for message in answer] != ["assistant"]:
        raise ValueError(f"{column} must be one message with the role assistant; found {_show(answer)}")
    return answer


def _prompt(value):
    prompt = _content(value, "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError("prompt ends in a message of the assistant; expected the turn to be answered")
    return prompt


def _from_tldr(row: dict) -> dict:
    """OpenAI's comparisons (arXiv 2009.01325): a Reddit post, two summaries, the index of the better one."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if type(choice) is not int or choice not in (0, 1):
        raise ValueError(f"choice is {_show(choice)}; expected 0 or 1, the index of the better summary")
    try:
        first, second = (" " + summary["text"].strip() for summary in summaries)
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError(f"summaries is {_show(summaries)}; expected two objects with text") from None
    try:
        subreddit, title, post = (info[key].strip() for key in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    except (TypeError, KeyError, AttributeError):
        if not isinstance(info, dict) or info.get("article") is None:
            raise ValueError(f"info is {_show(info)}; expected the texts subreddit, title and post") from None
        prompt = ""  # a news article among the posts: another task, dropped and counted as an empty prompt
    chosen, rejected = (second, first) if choice else (first, second)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _from_pairs(row: dict) -> dict:
    if isinstance(row["prompt"], str) and isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        return _from_dialogues(row)  # UltraFeedback repeats the prompt as a text beside whole conversations
    if row["prompt"] is None:  # a pair without a shared prompt that was saved by us
        return {"prompt": None} | {c: _content(row[c], c) for c in ("chosen", "rejected")}
    prompt = _prompt(row["prompt"])
    return {"prompt": prompt} | {c: _answer(row[c], c, prompt) for c in ("chosen", "rejected")}


def _from_dialogues(row: dict) -> dict:
    """Two whole dialogues; the prompt is all before the last answer, if it is the same in both, else None."""
    chosen, rejected = (_content(row[c], c) for c in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be texts or both be messages")
    if isinstance(chosen, str):
        ends = [text.rfind(TURN) + len(TURN) if TURN in text else 0 for text in (chosen, rejected)]
    else:
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"{column} ends in {_show(messages[-1])}; expected the role assistant there")
        ends = [len(chosen) - 1, len(rejected) - 1]
    prompt, end = chosen[: ends[0]], ends[0]
    if end == 0 or prompt != rejected[: ends[1]]:
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "chosen": chosen[end:], "rejected": rejected[end:]}


def _from_unpaired(row: dict) -> dict:
    if not isinstance(row["label"], bool):
        raise ValueError(f"label is {_show(row['label'])}; expected true (desirable) or false")
    return _from_demonstrations(row) | {"label": row["label"]}


def _from_demonstrations(row: dict) -> dict:
    prompt = _prompt(row["prompt"])
    return {"prompt": prompt, "completion": _answer(row["completion"], "completion", prompt)}


_FORMS = (  # the first one whose columns are all there
    (("info", "summaries", "choice"), _from_tldr),
    (("prompt", "chosen", "rejected"), _from_pairs),
    (("chosen", "rejected"), _from_dialogues),
    (("prompt", "completion", "label"), _from_unpaired),
    (("prompt", "completion"), _from_demonstrations),
)
