"""A run's samples in the file formats of other judges: alpaca_eval and arena-hard-auto (its version 2)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .record import Record, prompt_text, read

FORMATS = ("alpaca_eval", "arena-hard")


def sampled(run) -> Record:
    """The record of a run that has samples with their texts; ValueError says how to get them."""
    record = read(run)
    if not record.samples or not {"prompt", "initial", "policy"} <= set(record.samples[0]):
        raise ValueError(f"{record.directory} has no samples.jsonl with prompts and answers. If the run "
                         f"still has a checkpoint: tralign evaluate {record.directory}")
    return record


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r} for outputs. There are {' and '.join(FORMATS)}.")


def export_outputs(run, folder: str | Path, *, format: str, who: str = "policy",
                   generator: str | None = None) -> Path:
    """Write the samples of a run (its directory, or an object with `.directory`); the file of the answers.

    format="alpaca_eval": <generator>.json, for its --model_outputs or --reference_outputs. "arena-hard":
    question.jsonl and model_answer/<generator>.jsonl, as in its data/<benchmark>; it needs the baselines that
    its utils/judge_utils.py names, and its utils/add_markdown_info.py adds what style control needs.
    who: "policy" or "initial"; generator: the name of the model, default: that of the run's directory.
    """
    check_format(format)
    record, folder = sampled(run), Path(folder)
    generator = generator or record.directory.resolve().name + "-initial" * (who == "initial")
    rows = [(prompt_text(row["prompt"]), row[who].strip()) for row in record.samples]
    if format == "alpaca_eval":
        dataset = Path(record.prompts_from).name
        outputs = [{"instruction": prompt, "output": text, "generator": generator, "dataset": dataset}
                   for prompt, text in rows]
        return _write(folder / f"{generator}.json", json.dumps(outputs, ensure_ascii=False, indent=1))
    questions, answers, written = [], [], (record.directory / "samples.jsonl").stat().st_mtime
    for prompt, text in rows:
        uid = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        questions.append({"uid": uid, "category": "hard_prompt", "subcategory": "", "prompt": prompt})
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": text}}]
        answers.append({"uid": uid, "ans_id": f"{generator}-{uid}", "model": generator, "messages": messages,
                        "tstamp": written})
    _write(folder / "question.jsonl", _lines(questions))
    return _write(folder / "model_answer" / f"{generator}.jsonl", _lines(answers))


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
