"""A run's samples in the file formats of other judges: alpaca_eval and arena-hard-auto (its version 2)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .json_lines import write_rows
from .record import prompt_text, read_sampled

FORMATS = ("alpaca_eval", "arena-hard")


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r} for outputs. There are {' and '.join(FORMATS)}.")


def export_outputs(run, folder: str | Path, *, format: str, who: str = "policy",
                   generator: str | None = None) -> Path:
    """Write the samples of a run (its directory, or an object with `.directory`); the file of the answers.

    format="alpaca_eval": <generator>.json, for its --model_outputs or --reference_outputs. "arena-hard":
    question.jsonl and model_answer/<generator>.jsonl, as in its data/<benchmark>; it needs the baselines that
    its utils/judge_utils.py names, and its utils/add_markdown_info.py adds what style control needs.
    who: "policy" or "initial", which is added to the name; generator: that name, default: of the directory.
    """
    check_format(format)
    record, folder = read_sampled(run), Path(folder)
    generator = (generator or record.directory.resolve().name) + "-initial" * (who == "initial")
    if Path(generator).name != generator:
        raise ValueError(f"generator={generator!r} is also the name of a file: leave out the /.")
    rows = [(prompt_text(row["prompt"]), row[who].strip()) for row in record.samples]
    if format == "alpaca_eval":
        more = {"generator": generator, "dataset": Path(record.prompts_from).name}
        outputs = [{"instruction": prompt, "output": text} | more for prompt, text in rows]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{generator}.json"
        path.write_text(json.dumps(outputs, ensure_ascii=False, indent=1), encoding="utf-8")
        return path
    questions, answers, written = [], [], (record.directory / "samples.jsonl").stat().st_mtime
    for prompt, text in rows:
        uid = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": text}}]
        questions.append({"uid": uid, "category": "hard_prompt", "subcategory": "", "prompt": prompt})
        answers.append({"uid": uid, "ans_id": f"{generator}-{uid}", "model": generator, "messages": messages,
                        "tstamp": written})
    write_rows(folder / "question.jsonl", questions)
    return write_rows(folder / "model_answer" / f"{generator}.jsonl", answers)
