"""Makes data/judges, which notebook 09 reads: what reward models and a small language model say of data/grid.

    python data/judges.py reward         trains reward models, and scores with them
    python data/judges.py llm FOLDER     serves the chat model in FOLDER; asks it who wins, and for ratings

Both go on where they were stopped. Nothing is written but numbers and verdicts: the texts are in data/grid.
"""
from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
REWARD_MODELS = (("little-tldr", 0), ("little-hh", 0))  # world, seed
ASKED = {  # run of data/grid, policy against initial: a good one, an overoptimized one, a ruined one
    "one-epoch-dpo-hard-beta1-seed1", "overoptimize-dpo-soft-beta0.05-seed2",
    "overoptimize-kto-soft-beta0.05-seed3"}
PROMPTS = 12  # of each
SETTINGS = {"temperature": 0, "max_completion_tokens": 60}
REASON = "It says what happened."  # the same in both examples: it gives no winner away
POSTS = ("POST: My aunt sold my car. I dreamed of a dog. Today I quit my job.",
         "POST: Thanks for reading. It turns out my son lost the keys. Today I moved out.")
WHICH, RATE = "Which one is better?", "Rate the answer."
COMPARED = [  # what stands in the tags, the question, what is to be answered
    ({"post": POSTS[0], "answer_a": "I like coffee; my uncle broke a cup.",
      "answer_b": "my aunt sold my car; I quit my job."}, WHICH, {"reason": REASON, "winner": "B"}),
    ({"post": POSTS[1], "answer_a": "my son lost the keys; I moved out.",
      "answer_b": "my son lost the keys; like, like; it is complicated."}, WHICH,
     {"reason": REASON, "winner": "A"}),
]
RATED = [  # a bad one and a good one, by the CRITERIA in their order
    ({"post": POSTS[0], "answer": "I like coffee; coffee, my uncle broke a."}, RATE, (3, 1, 2, 1, 9)),
    ({"post": POSTS[1], "answer": "my son lost the keys; I moved out."}, RATE, (9, 10, 8, 9, 10)),
]
FOLDER, WORK = REPOSITORY / "data" / "judges", REPOSITORY / "runs" / "judges"


def samples(run: str) -> list[dict]:
    """The rows of a run that have texts."""
    lines = (REPOSITORY / "data" / "grid" / run / "samples.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "policy" in row]


def reward() -> None:
    """held-out.jsonl: a line a reward model, the test pairs; grid.jsonl: a line a run and reward model."""
    import tralign_mini as tr

    held_out, grid = [], []
    for world, seed in REWARD_MODELS:
        run = tr.train(f"{world}-reward", seed=seed, eval_steps=625, output=str(WORK / f"{world}-{seed}"),
                       resume=True)
        model = tr.RewardModel.load(run)
        with gzip.open(REPOSITORY / "data" / world / "test.jsonl.gz", "rt") as file:
            pairs = [json.loads(line) for line in file]
        held_out.append({"world": world, "seed": seed}
                        | {side: score(model, pairs, side) for side in ("chosen", "rejected")})
        for folder in sorted((REPOSITORY / "data" / "grid").glob("*-seed*")) * (world == "little-tldr"):
            rows = samples(folder.name)
            sides = {side: score(model, rows, side) for side in ("initial", "policy")}
            grid.append({"run": folder.name, "seed": seed} | sides)
    write("held-out.jsonl", held_out)
    write("grid.jsonl", grid)


def score(model, rows: list[dict], side: str) -> list[float]:
    return [round(x, 3) for x in model.score([row["prompt"] for row in rows], [row[side] for row in rows])]


def llm(model: str) -> None:
    """verdicts.jsonl: a line a pair, who won with the policy first, and with it second; ratings.jsonl: a line
    an answer. First of both how the model did without examples."""
    from tralign_mini.llm_judge import CRITERIA, LLMJudge

    rated = [(tags, question, dict(zip(CRITERIA, said))) for tags, question, said in RATED]
    with served() as endpoint:
        def judge(name: str, model: str):
            cache = WORK / f"{name}.jsonl"
            return LLMJudge(model, endpoint=endpoint, cache=cache, settings=SETTINGS, parallel=1)

        def plain(what: str, ask) -> dict:
            asked = judge(f"{what}-no-examples", model)
            try:
                ask(asked, *sides(min(ASKED)))
            except ValueError as error:
                print(error)
            return {"setting": "no examples", "asked": asked.asked, "failures": dict(asked.failures)}

        rows = [plain("verdicts", lambda judge, *texts: judge(*texts))]
        asked = judge("verdicts", with_examples(Path(model), WORK / "compares", COMPARED))
        for run in sorted(ASKED):
            for row, verdict in enumerate(asked(*sides(run))):
                rows.append({"setting": "two examples", "run": run, "row": row, "winner": verdict.winner,
                             "orders": verdict.orders, "why": verdict.why})
            print(asked.report(), flush=True)
        write("verdicts.jsonl", rows)

        rows = [plain("ratings", lambda judge, prompts, policy, initial: judge.rate(prompts, policy))]
        asked = judge("ratings", with_examples(Path(model), WORK / "rates", rated))
        for run in sorted(ASKED):
            prompts, *texts = sides(run)
            for who, side in zip(("policy", "initial"), texts):
                for row, ratings in enumerate(asked.rate(prompts, side)):
                    rows.append({"setting": "two examples", "run": run, "row": row, "who": who,
                                 "ratings": ratings})
            print(asked.report(), flush=True)
        write("ratings.jsonl", rows)


def sides(run: str) -> list[list[str]]:
    """Prompts, and the answers of the policy and of the initial policy."""
    return [[row[key] for row in samples(run)[:PROMPTS]] for key in ("prompt", "policy", "initial")]


@contextmanager
def served():
    """`transformers serve` on this machine, on one thread; its base URL once it answers."""
    port = 8023  # always the same: what a judge has answered is kept by its address
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu",
               "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    with (WORK / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def with_examples(model: Path, folder: Path, examples: list[tuple[dict, str, dict]]) -> str:
    """A copy of a model whose chat template shows worked examples first: without, it wrote no JSON."""
    from transformers import AutoTokenizer

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model.resolve(), folder, copy_function=os.symlink)
    messages = []
    for tags, question, answer in examples:
        asked = "\n\n".join([*(f"<{tag}>\n{text}\n</{tag}>" for tag, text in tags.items()), question])
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": json.dumps(answer)}]
    messages.append({"role": "user", "content": "{{ messages[-1].content }}"})
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # a link: the model's own file stays
    (folder / "chat_template.jinja").write_text(template + "\n")  # Jinja drops one newline at the end
    return str(folder)


def write(name: str, rows: list[dict]) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    WORK.mkdir(parents=True, exist_ok=True)
    {"reward": reward, "llm": llm}[sys.argv[1]](*sys.argv[2:])
