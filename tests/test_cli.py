"""The command line as a user meets it: what works, and one clear message with exit code 2 for what cannot."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers import tiny_neox, tiny_tokenizer
from judge_helpers import endpoint, longer
from rich.console import Console

from tralign_mini import chat, cli

LONG = "w3 " * 130


def tralign(monkeypatch, capsys, *arguments):
    """Run `tralign arguments...` in this process: exit code, what it printed, its error message in a line."""
    monkeypatch.setattr(sys, "argv", ["tralign", *map(str, arguments)])
    monkeypatch.setattr(cli, "console", Console(width=300))
    try:
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code
    output = capsys.readouterr()
    return code, output.out, re.sub(r"[\s│]+", " ", output.err)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, pairs, a recipe, a finished run, and many bad files."""
    root = tmp_path_factory.mktemp("place")
    tiny_neox().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    no_eos = tiny_tokenizer()
    no_eos.eos_token = None
    tiny_neox().save_pretrained(root / "no-eos")
    no_eos.save_pretrained(root / "no-eos")
    shutil.copytree(root / "model", root / "half")
    (root / "half" / "model.safetensors").write_bytes(b"half of a file")
    pairs = [{"prompt": f"w{3 + i} w{4 + i}", "chosen": " w5 w6", "rejected": f" w7 w{8 + i}"}
             for i in range(40)]
    files = {
        "pairs.jsonl": pairs,
        "same.jsonl": [pair | {"rejected": pair["chosen"]} for pair in pairs],
        "blank.jsonl": [pair | {"chosen": "  "} for pair in pairs],
        "column.jsonl": [*pairs, {"prompt": "w3", "chosen": "w4"}],
        "number.jsonl": [*pairs, {"prompt": "w3", "chosen": 4, "rejected": "w5"}],
        "label.jsonl": [{"prompt": "w3", "completion": "w4", "label": "good"}],
        "unpaired.jsonl": [{"prompt": f"w{i}", "completion": "w4", "label": True} for i in range(3, 60)],
        "single.jsonl": [{"prompt": f"w{3 + i // 20}", "chosen": " w5", "rejected": f" w{6 + i}"}
                         for i in range(40)],
        "long.jsonl": [pair | {"prompt": LONG} for pair in pairs[:1]] + pairs,
    }
    for name, rows in files.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "empty.jsonl").write_text("")
    (root / "broken.jsonl").write_text(json.dumps(pairs[0]) + "\nprompt: w3\n")
    (root / "pairs.xlsx").write_text("no")
    (root / "broken.yaml").write_text("model: [")
    (root / "list.yaml").write_text("- model\n")
    settings = {"model": str(root / "model"), "data": str(root / "pairs.jsonl"), "batch_size": 8,
                "max_steps": 3, "max_prompt_tokens": 100, "max_completion_tokens": 12, "eval_steps": 3,
                "eval_prompts": 3, "learning_rate": 1e-3}
    (root / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return root


@pytest.fixture(scope="module")
def run(place):
    """A finished run of three steps with a moving reference."""
    import tralign_mini as tr

    return tr.train(place / "recipe.yaml", reference="soft", tau=1, output=place / "run")


BAD = [
    # the recipe and its settings
    (["train", "little-tdlr"], ["little-tdlr", "did you mean 'little-tldr'"]),
    (["train", "{place}/none.yaml"], ["none.yaml", "no such file"]),
    (["train", "{place}/broken.yaml"], ["broken.yaml", "not readable as YAML"]),
    (["train", "{place}/list.yaml"], ["key: value"]),
    (["train", "R", "alhpa=0.5"], ["no setting 'alhpa'", "did you mean 'alpha'"]),
    (["train", "R", "learnin_rate=1e-4"], ["no setting 'learnin_rate'", "did you mean 'learning_rate'"]),
    (["train", "R", "alpha"], ["not key=value"]),
    (["train", "R", "alpha=0.5", "alpha=0.6"], ["alpha is given twice"]),
    (["train", "R", "reference=soft", "alpha=0"], ["alpha=0", "greater than 0"]),
    (["train", "R", "reference=soft", "alpha=1.5"], ["alpha=1.5", "less than or equal to 1"]),
    (["train", "R", "reference=soft", "alpha=.nan"], ["alpha=nan"]),
    (["train", "R", "reference=soft", "tau=0"], ["tau=0"]),
    (["train", "R", "reference=soft", "tau=1.5"], ["tau=1.5"]),
    (["train", "R", "beta=0"], ["beta=0"]),
    (["train", "R", "beta=warm"], ["beta=warm", "number"]),
    (["train", "R", "method=dop"], ["method=dop", "did you mean 'dpo'"]),
    (["train", "R", "reference=moving"], ["reference=moving", "fixed, soft, hard"]),
    (["train", "R", "reference=hard", "tau=2", "alpha=0.5"],
     ["reference=hard copies the policy", "reference=soft"]),
    (["train", "R", "reference=hard"], ["reference=hard needs tau"]),
    (["train", "R", "method=simpo", "reference=soft"], ["simpo has no reference"]),
    (["train", "R", "method=simpo", "logps=sum"], ["logps=sum"]),
    (["train", "R", "tuning=4bit"], ["tuning=4bit", "full, lora, qlora"]),
    (["train", "R", "micro_batch_size=3"], ["micro_batch_size=3 does not divide"]),
    (["train", "R", "max_steps=0"], ["max_steps=0"]),
    (["train", "R", "method=kto", "batch_size=1"], ["batch_size=1", "another prompt"]),
    (["train", "R", "seed=-1"], ["seed=-1"]),
    # the data
    (["train", "R", "data={place}/none.jsonl"], ["no file", "none.jsonl"]),
    (["train", "R", "data=little-hhh"], ["little-hhh", "did you mean 'little-hh'"]),
    (["train", "R", "data=someone/pairs"], ["someone/pairs", "on the Hub", "local file"]),
    (["train", "R", "data={place}/pairs.xlsx"], ["pairs.xlsx", ".jsonl"]),
    (["train", "R", "data={place}/empty.jsonl"], ["empty.jsonl is empty"]),
    (["train", "R", "data={place}/broken.jsonl"], ["broken.jsonl, row 2", "not valid JSON"]),
    (["train", "R", "data={place}/column.jsonl"], ["column.jsonl, row 41", "rejected"]),
    (["train", "R", "data={place}/number.jsonl"], ["number.jsonl, row 41", "chosen is int 4"]),
    (["train", "R", "data={place}/label.jsonl", "method=kto"], ["label.jsonl, row 1", "expected true"]),
    (["train", "R", "data={place}/unpaired.jsonl"], ["method=kto"]),
    (["train", "R", "data={place}/same.jsonl"], ["identical pair"]),
    (["train", "R", "data={place}/blank.jsonl"], ["empty answer"]),
    (["train", "R", "data={place}/single.jsonl", "method=kto"], ["single prompt", "z0"]),
    (["train", "R", "train_pairs=900"], ["train_pairs=900", "has only"]),
    (["train", "R", "batch_size=64"], ["less than one batch"]),
    (["train", "R", "data={place}/long.jsonl", "max_completion_tokens=60"],
     ["128 positions", "max_prompt_tokens"]),
    # the model
    (["train", "R", "model={place}/none"], ["none", "save_pretrained"]),
    (["train", "R", "model=someone/model"], ["someone/model", "on the Hugging Face Hub"]),
    (["train", "R", "model={place}/no-eos"], ["no end-of-sequence token"]),
    (["train", "R", "model={place}/half"], ["half", "could not be loaded"]),
    # runs
    (["train", "R", "output={place}/run"], ["already holds a run", "resume=true"]),
    (["train", "R", "output={place}/run", "resume=true", "beta=0.3"],
     ["other settings", "beta: 0.05 then, 0.3 now"]),
    (["evaluate", "{place}/model"], ["model is not a run's directory"]),
    (["evaluate", "{place}/run", "--prompts", "0"], ["eval_prompts=0"]),
    (["evaluate", "{place}/run", "--judge", "golden"], ["no judge 'golden'", "reward:FOLDER"]),
    (["evaluate", "{place}/run", "--judge", "gold"], ["no embedded world", "pairs.jsonl"]),
    (["evaluate", "{place}/none", "--judge", "gold"], ["none is not there"]),
    (["evaluate", "{place}/run", "{place}/run", "{place}/run", "--judge", "gold"], ["two runs", "not 3"]),
    (["evaluate", "{place}/run", "--judge", "reward:{place}/none"], ["none"]),
    (["evaluate", "{place}/run", "--judge", "gold", "--model", "m"], ["--model is for --judge llm"]),
    (["evaluate", "{place}/run", "--rate"], ["--rate is for --judge llm", "not named"]),
    (["evaluate", "{place}/run", "--judge", "llm", "--settings", "0"], ["--settings 0 is not"]),
    (["evaluate", "{place}/run", "--judge", "llm", "--settings", "{"], ["--settings { is not"]),
    (["evaluate", "{place}/run", "--judge", "llm"], ["needs the name of a model", "--model NAME"]),
    (["evaluate", "{place}/run", "--judge", "llm", "--model", "m"], ["OPENAI_API_KEY is not set"]),
    (["evaluate", "{place}/run", "--export", "csv"], ["no format 'csv'", "alpaca_eval"]),
    (["compare", "{place}/run", "{place}/none"], ["none"]),
    (["chat", "{place}"], ["no whole checkpoint"]),
    # memory
    (["doctor", "tau=3"], ["tau=3 is a setting, of which recipe", "--recipe RECIPE tau=3"]),
    (["doctor", "--recipe", "little-tdlr"], ["little-tdlr", "did you mean 'little-tldr'"]),
    (["doctor", "--recipe", "R", "tau"], ["not key=value"]),
    (["doctor", "--recipe", "R", "model={place}/none"], ["none", "save_pretrained"]),
]
NAMES = [" ".join(arguments).replace("{place}/", "") for arguments, _ in BAD]


@pytest.mark.parametrize("arguments, expected", BAD, ids=NAMES)
def test_bad_input_gets_one_message_and_exit_code_2(place, run, monkeypatch, capsys, tmp_path, arguments,
                                                    expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    arguments = [argument.replace("{place}", str(place)) for argument in arguments]
    if "R" in arguments:
        arguments[arguments.index("R")] = str(place / "recipe.yaml")
    code, _, message = tralign(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" not in message and message.count("error:") == 1
    for part in expected:
        assert part in message, message
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert after == before  # nothing was lost or written
    assert not list(tmp_path.rglob("recipe.yaml"))  # and no half run was begun


def test_train_prints_the_plan_and_writes_the_run(place, monkeypatch, capsys, tmp_path):
    code, out, _ = tralign(monkeypatch, capsys, "train", place / "recipe.yaml", "reference=hard", "tau=3",
                           f"output={tmp_path / 'run'}")
    assert code == 0
    assert "copies the policy, every 3 steps" in out
    assert "WARNING" in out and "moves only after the last step" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["reference_updates"] for row in rows] == [0, 0, 1]
    report = tmp_path / "run" / "report.md"
    assert report.exists() and str(report) in out.splitlines()[-1]
    result = out[out.rindex("Result"):]
    tokens = re.search(r"tokens a completion \|  \| ([\d.]+)", report.read_text())[1]
    assert re.search(rf"tokens a completion +{tokens}", result) and "Figures" not in result


def test_evaluate_samples_again_with_the_asked_number_of_prompts(run, monkeypatch, capsys):
    code, out, _ = tralign(monkeypatch, capsys, "evaluate", run.directory, "--prompts", 2, "--seed", 7)
    assert code == 0 and "report.md" in out
    assert len((run.directory / "samples.jsonl").read_text().splitlines()) == 2


def test_evaluate_judges_a_run_against_its_initial_policy(run, monkeypatch, capsys, tmp_path):
    """By an endpoint to which the longer answer is the better one, from the samples that the run has."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")
    judged = shutil.copytree(run.directory, tmp_path / "run")
    samples = judged / "samples.jsonl"
    answers = [("w3 w4", "w3"), ("w3", "w5 w6"), ("w7", "w7"), ("w8 w9", "w8")]  # of policy, initial policy
    samples.write_text("".join(json.dumps({"prompt": f"w{i}", "policy": a, "initial": b}) + "\n"
                               for i, (a, b) in enumerate(answers)))
    before = samples.stat().st_mtime_ns
    with endpoint(longer) as server:
        llm = ("--judge", "llm", "--model", "m", "--endpoint", server.url, "--price", 1, 2)
        llm += ("--settings", '{"top_p": 0.5}')
        arguments = ("evaluate", judged, *llm, "--output", tmp_path, "--export", "alpaca_eval")
        code, out, _ = tralign(monkeypatch, capsys, *arguments)
        asked = len(server.questions)
        assert server.requests[0][2]["top_p"] == 0.5 and "temperature" not in server.requests[0][2]
        assert code == 0 and samples.stat().st_mtime_ns == before
        assert "m: 6 requests, 0 more answered" in out and "0.0007 $" in out  # 600 read, 42 written
        assert tralign(monkeypatch, capsys, *arguments)[0] == 0 and len(server.questions) == asked
    verdicts = (tmp_path / "run-against-initial-policy.jsonl").read_text().splitlines()
    assert [json.loads(line)["winner"] for line in verdicts] == ["a", "b", "tie", "a"]
    assert "| run | initial policy |" in (tmp_path / "run-against-initial-policy.md").read_text()
    assert re.search("wins +2 +1 ", out) and re.search("ties +1 +1 ", out)
    assert {path.name for path in (tmp_path / "alpaca_eval").iterdir()} == {"run.json", "run-initial.json"}
    assert not [path for path in tmp_path.rglob("*.*") if b"very-secret" in path.read_bytes()]


def test_evaluate_judges_by_a_trained_reward_model(place, run, monkeypatch, capsys, tmp_path):
    import tralign_mini as tr
    from tralign_mini.reward import RewardModel

    folder = tr.train(place / "recipe.yaml", method="reward", output=tmp_path / "taste").directory
    judge = ("--judge", f"reward:{folder}", "--output", tmp_path)
    arguments = ("evaluate", run.directory, *judge, "--prompts", 3, "--seed", 9)
    code, out, _ = tralign(monkeypatch, capsys, *arguments)
    assert code == 0 and "Judge: reward model taste" in out
    rows = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    prompts, model = [row["prompt"] for row in rows], RewardModel.load(folder)
    scores = [model.score(prompts, [row[who] for row in rows]) for who in ("policy", "initial")]
    wins = [sum(x > y for row, x, y in zip(rows, *sides) if row["policy"] != row["initial"])
            for sides in (scores, scores[::-1])]
    assert re.search(rf"wins +{wins[0]} +{wins[1]} ", out)


def test_evaluate_samples_both_runs_again_when_asked(run, monkeypatch, capsys, tmp_path):
    """Equal policies, prompts and seeds: equal answers, so that nobody is asked and all are ties."""
    runs = [shutil.copytree(run.directory, tmp_path / name / "run") for name in "ab"]  # two of one name
    (runs[0] / "samples.jsonl").unlink()
    with endpoint(longer) as server:
        judge = ("--judge", "llm", "--model", "m", "--endpoint", server.url, "--output", tmp_path)
        code, out, _ = tralign(monkeypatch, capsys, "evaluate", *runs, *judge, "--prompts", 2, "--seed", 5)
        assert code == 0 and re.search("ties +2 +2 ", out) and out.count("report.md") == 2
        assert (runs[0] / "samples.jsonl").read_text() == (runs[1] / "samples.jsonl").read_text()
        assert not server.questions
        (runs[0] / "samples.jsonl").unlink()  # what is missing is sampled without being told to
        code, out, _ = tralign(monkeypatch, capsys, "evaluate", *runs, *judge, "--export", "arena-hard")
        assert code == 0 and out.count("report.md") == 1 and "Judge: m. 2 prompts" in out
    answers = tmp_path / "arena-hard" / "model_answer"
    assert {path.stem for path in answers.iterdir()} == {"a-run-initial", "a-run", "b-run"}
    assert (tmp_path / "a-run-against-b-run.md").is_file()


def test_compare_writes_a_page_with_every_run(run, monkeypatch, capsys, tmp_path):
    code, out, _ = tralign(monkeypatch, capsys, "compare", run.directory, "--output", tmp_path / "page")
    assert code == 0
    assert "soft" in out and "soft" in (tmp_path / "page" / "comparison.md").read_text()


def test_chat_shows_three_answers_and_the_log_ratio(run, monkeypatch):
    lines = iter(["w5 w6", "example", ""])
    console = Console(file=io.StringIO(), width=130)
    monkeypatch.setattr(console, "input", lambda prompt: next(lines))
    chat.converse(run.directory, 1.0, console)
    shown = console.file.getvalue()
    for who in ("initial", "policy", "reference"):
        assert shown.count(f"{who} (") == 2  # one panel for each of the two prompts
    assert shown.count("nats)") == 6


def test_a_typed_line_becomes_a_message_where_the_run_was_trained_on_messages(monkeypatch):
    example = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    for prompts, expected in (([example], [{"role": "user", "content": "w5\nw6"}]), (["w3"], "w5\nw6")):
        run = types.SimpleNamespace(held_out_prompts=lambda prompts=prompts: prompts, policy=tiny_neox())
        asked, lines, console = [], iter(["example", "example", r"w5\nw6", ""]), Console(file=io.StringIO())
        monkeypatch.setattr(console, "input", lambda prompt, lines=lines: next(lines))
        monkeypatch.setattr(chat, "Run", lambda directory, run=run: run)
        monkeypatch.setattr(chat, "answer", lambda run, prompt, asked=asked, **_: asked.append(prompt) or {})
        chat.converse("somewhere", 1.0, console)
        assert asked == [prompts[0], expected]
        assert "no more held-out prompts" in console.file.getvalue()


def test_a_lack_of_memory_says_what_to_lower(monkeypatch, capsys):
    def train(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("tralign_mini.runs.train", train)
    code, _, message = tralign(monkeypatch, capsys, "train", "little-tldr")
    assert code == 2 and "lower micro_batch_size" in message and "Tried to allocate 2 GiB" in message


def test_a_bug_is_not_hidden(monkeypatch, capsys):
    monkeypatch.setattr("tralign_mini.runs.train", lambda *arguments, **settings: {}["key"])
    with pytest.raises(KeyError):
        tralign(monkeypatch, capsys, "train", "little-tldr")


def test_answers_of_equal_models_are_equal_and_have_ratio_zero(place):
    """Before the first step initial policy, policy and reference are one and the same."""
    import tralign_mini as tr

    run = tr.train(place / "recipe.yaml", learning_rate=1e-30, output=place / "unmoved")
    answers = chat.answer(run, "w5 w6", seed=3)
    assert len({text for text, _ in answers.values()}) == 1
    assert {ratio for _, ratio in answers.values()} <= {"+0.0 nats", "-0.0 nats"}


def test_doctor_names_versions_device_and_what_would_fail(monkeypatch, capsys):
    import transformers

    from tralign_mini import doctor

    def version(package, installed=doctor.version):
        if package == "bitsandbytes":
            raise doctor.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(doctor, "version", version)
    code, out, _ = tralign(monkeypatch, capsys, "doctor")
    assert code == 0
    assert torch.__version__.split("+")[0] in out and transformers.__version__ in out
    assert "tuning=qlora needs bitsandbytes" in out
    if not torch.cuda.is_available():
        assert "float32" in out and "no GPU" in out


def test_doctor_says_whether_a_recipe_fits(place, monkeypatch, capsys):
    from tralign_mini import memory

    arguments = ["doctor", "--recipe", place / "recipe.yaml", "tuning=lora", "reference=soft"]
    code, out, _ = tralign(monkeypatch, capsys, *arguments)
    assert code == 0 and "it fits" in out and "barely" not in out
    for part in ("framework", "free on this device", "training step", "8 rows at once"):
        assert part in out
    peak = int(re.search(r"peak +(\d+) MiB", out).group(1)) * 2**20
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.05 * peak)
    code, out, _ = tralign(monkeypatch, capsys, *arguments)
    assert code == 0 and "it fits, but barely" in out
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    code, out, _ = tralign(monkeypatch, capsys, *arguments)
    assert code == 1 and "it does not fit" in out and "Nothing of this is enough" in out
    assert re.search(r"\d+ MiB  micro_batch_size=1\b", out)


def test_the_help_of_train_names_the_shipped_recipes(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = tralign(monkeypatch, capsys, "train", "--help")
    names = [file.stem for file in Path(cli.__file__).with_name("recipes").iterdir()]
    assert code == 0 and len(names) > 10 and all(name in out for name in names if not name.endswith("-mpo"))


def test_the_version(monkeypatch, capsys):
    code, out, _ = tralign(monkeypatch, capsys, "--version")
    assert (code, out.strip()) == (0, f"tralign_mini {version('tralign_mini')}")


def test_help_names_every_command(monkeypatch, capsys):
    code, out, _ = tralign(monkeypatch, capsys, "--help")
    assert code == 0
    for command in ("demo", "train", "evaluate", "compare", "chat", "doctor"):
        assert command in out


def test_a_narrow_terminal_cuts_nothing_off_a_table(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console(width=40))
    cli._print_table(["run", "KL to initial", "win rate"], [["tr-dpo-soft", "4.16", "0.69 [0.63, 0.75]"]])
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 40
    words = "run KL to initial win rate tr-dpo-soft 4.16 0.69 [0.63, 0.75]".split()
    assert all(word in printed for word in words)
