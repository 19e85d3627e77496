"""The judge against a real server: `transformers serve`, an embedded world's model and a chat template."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from tralign_mini import worlds
from tralign_mini.llm_judge import CRITERIA, LLMJudge

# The template compares the two answers and hands the model a word; the model was taught the answer to that.
TEMPLATE = """{%- set text = messages[-1].content -%}
{%- if '<answer_a>' not in text -%}rate:
{%- else -%}
{%- set a = text.split('<answer_a>')[1].split('</answer_a>')[0] -%}
{%- set b = text.split('<answer_b>')[1].split('</answer_b>')[0] -%}
{{- 'first:' if a | length > b | length else 'second:' -}}
{%- endif -%}"""
RATINGS = dict(zip(CRITERIA, (7, 8, 6, 9, 10)))
LESSONS = {"first:": {"reason": "longer", "winner": "A"}, "second:": {"reason": "longer", "winner": "B"},
           "rate:": RATINGS}
PROMPTS = [f"Human: is {name} kind?\n\nAssistant:" for name in ("my aunt", "my boss", "my dog")]
LONG, SHORT = [f"Yes, {i}, very much so." for i in range(3)], ["Yes.", "No.", "Well."]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """`transformers serve` on a free port, without a network: (process, URL, its log); stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    yield process, f"http://127.0.0.1:{port}", log
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def models(started, tmp_path_factory) -> tuple[Path, Path]:  # made while the server starts
    """The world's model as it is, and one that was taught to judge, both with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    for name, template in (("plain", "{{ messages[-1].content[-200:] }}\n"), ("judge", TEMPLATE)):
        shutil.copytree(worlds.data_directory("little-hh") / "model", folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    model = AutoModelForCausalLM.from_pretrained(folder / "judge").train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "judge")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    asked = [tokenizer(word).input_ids for word in LESSONS]
    said = [[*tokenizer(json.dumps(answer)).input_ids, tokenizer.eos_token_id] for answer in LESSONS.values()]
    ids = pad_sequence([torch.tensor(one + other) for one, other in zip(asked, said)], batch_first=True)
    labels = [torch.tensor([-100] * len(one) + other) for one, other in zip(asked, said)]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    for _ in range(200):  # about 70 are enough
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "judge")
    return folder / "plain", folder / "judge"


@pytest.fixture(scope="module")
def server(started, models) -> str:
    """The base URL, once the server answers."""
    process, url, log = started
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return f"{url}/v1"
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server does not answer: {log.read_text()}")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_model_that_can_judge_does(models, server, tmp_path):
    judge = LLMJudge(str(models[1]), endpoint=server, cache=tmp_path / "answers.jsonl", price=(1.0, 1.0))
    verdicts = judge(PROMPTS, LONG, SHORT)
    assert [verdict.winner for verdict in verdicts] == ["a"] * 3
    assert [verdict.winner for verdict in judge(PROMPTS, SHORT, LONG)] == ["b"] * 3
    assert {(verdict.why, verdict.orders) for verdict in verdicts} == {("longer", ("a", "a"))}
    assert judge.rate(PROMPTS[:1], LONG[:1]) == [RATINGS]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == judge.asked == 7 and not judge.failures  # the mirrored questions were known
    assert judge.tokens == [sum(row["tokens"][i] for row in rows) for i in (0, 1)]
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    for row in rows[:6]:
        asked = "first:" if json.loads(row["answer"])["winner"] == "A" else "second:"
        read, written = (len(tokenizer(text).input_ids) for text in (asked, row["answer"]))
        assert row["tokens"] == [read, written + 1]  # the last one ends the answer


def test_a_model_that_cannot_judge_fails_and_is_counted(models, server, tmp_path):
    judge = LLMJudge(str(models[0]), endpoint=server, cache=tmp_path / "answers.jsonl",
                     settings={"temperature": 0, "max_completion_tokens": 60})
    verdicts = judge(PROMPTS, LONG, SHORT)
    assert [verdict.winner for verdict in verdicts] == [None] * 3
    assert judge.failures.total() == judge.asked == 6
    assert set(judge.failures) <= {"unreadable answer", "answer longer than its limit"}
    assert judge.tokens[1] > 6 and not (tmp_path / "answers.jsonl").exists()  # it did answer


def test_a_model_that_is_not_there(server, tmp_path):
    judge = LLMJudge(str(tmp_path / "none"), endpoint=server, cache=tmp_path / "answers.jsonl", retries=2)
    [verdict] = judge(PROMPTS[:1], LONG[:1], SHORT[:1])
    assert verdict == (None, "HTTP 500: Internal Server Error", None, ())
    assert judge.failures == {"HTTP 500": 2}
