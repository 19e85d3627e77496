"""The command line: `tralign demo | train | mpo | evaluate | compare | chat | doctor`.

An error is one message and exit code 2. Ctrl-C while training finishes the step, saves, says how to go on.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from . import __version__
from .recipe_file import shipped_recipes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
SETTINGS = ("method", "reference", "alpha", "tau", "beta", "seed", "steps")
RESULTS = ("gold", "win rate", "KL to initial")
EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)  # what a wrong argument raises
Runs = Annotated[list[Path], typer.Argument(help="directories of runs")]
RecipeName = Annotated[str, typer.Argument(
    help=f"a shipped recipe, a YAML file, or a run's directory. Shipped: {', '.join(shipped_recipes())}")]
Settings = Annotated[list[str] | None, typer.Argument(help="settings of the recipe: key=value, as tau=16")]


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except Exception as error:
        message = str(error)
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in message:  # torch's
            message = f"out of memory: lower micro_batch_size, or set gradient_checkpointing=true. {message}"
        elif not isinstance(error, EXPECTED):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print it and leave")] = False) -> None:
    if version:
        _say(f"tralign_mini {__version__}")
        raise typer.Exit


@app.command()
def demo(output: Annotated[Path, typer.Option(help="folder for the three runs")] = Path("runs/demo")) -> None:
    """SFT against DPO, TR-DPO soft and TR-DPO hard on little-tldr: a table and figures in a few minutes."""
    from .demo import run_demo

    comparison = run_demo(output, say=_say)
    _show(comparison)
    _say(f"figures and sample texts: {comparison.save(output)}")


@app.command()
def train(recipe: RecipeName, settings: Settings = None) -> None:
    """Train one policy; the reference, the data and everything else come from the recipe."""
    from .recipe import Recipe, parse_overrides

    overrides = parse_overrides(settings or [])
    Recipe.load(recipe, **overrides)  # what cannot be is refused before torch is loaded
    from .runs import train as train_run

    with _until_stopped() as stop:
        run = train_run(recipe, stop=stop, **overrides)
    if run is not None:  # the main process
        _say_how_it_ended("train", run.directory, ["."])


@app.command()
def mpo(recipe: RecipeName, settings: Settings = None) -> None:
    """MPO (arXiv 2403.19443): reward models, split, DPO on easy pairs, PPO on the prompts of hard ones.

    A setting of a stage begins with its name: easy.beta=0.1, ppo.kl_coef=0.05.
    """
    from .mpo import train_mpo
    from .recipe import parse_overrides

    overrides = parse_overrides(settings or [])

    with _until_stopped() as stop:
        run = train_mpo(recipe, stop=stop, **overrides)
    _say_how_it_ended("mpo", run.directory, dict.fromkeys([*run.stages, "ppo"]))  # the last stage


@contextmanager
def _until_stopped():
    """An event that the first Ctrl-C sets, so that a run stops after its step; the second one interrupts."""
    stop = threading.Event()

    def ask(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, usual)
        Console(stderr=True).print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once)")

    usual = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)


def _say_how_it_ended(command: str, directory: Path, stages: Iterable[str]) -> None:
    reports = [directory / stage / "report.md" for stage in stages]
    if not reports[-1].exists():
        _say(f"stopped; go on with: tralign {command} {directory} resume=true")
        raise typer.Exit(130)
    for report in reports:
        *_, result = report.read_text(encoding="utf-8").split("\n## Figures")[0].split("\n## ")
        console.print(Markdown(f"## {result}"))
        _say(f"report: {report}")


@app.command()
def evaluate(
    runs: Runs,
    prompts: Annotated[int | None, typer.Option(help="held-out prompts; default: as in the recipe")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the samples; default: the run's")] = None,
    judge: Annotated[str | None, typer.Option(help="who wins: gold | reward:FOLDER | llm")] = None,
    model: Annotated[str | None, typer.Option(help="llm: the model's name at the endpoint")] = None,
    endpoint: Annotated[str | None, typer.Option(help="llm: base URL; default: OpenAI's")] = None,
    price: Annotated[tuple[float, float] | None, typer.Option(help="llm: $ a million tokens in, out")] = None,
    settings: Annotated[str, typer.Option(help='llm: what a request says, as {"temperature": 0}')] = "",
    rate: Annotated[bool, typer.Option(help="llm: rate each answer from 1 to 10 as well")] = False,
    export: Annotated[str | None, typer.Option(help="alpaca_eval | arena-hard: write the samples so")] = None,
    output: Annotated[Path, typer.Option(help="folder of page, answers, exports")] = Path("runs/judged"),
) -> None:
    """Sample finished runs again, measure them, and print the comparison.

    The new samples and report take the place of the run's own; without --prompts and --seed they are the very
    ones with which it ended.

    With --judge: two runs, or one and its initial policy, on the samples that they have (--prompts or --seed:
    on new ones). A language model's answers are kept, so a killed command goes on where it was.
    """
    llm = {"model": model, "endpoint": endpoint, "price": price, "settings": _json_object(settings)}
    for name, value in (llm | {"rate": rate}).items():
        if value and judge != "llm":
            raise ValueError(f"--{name} is for --judge llm; the judge is {judge or 'not named'}.")
    if judge and len(runs) > 2:
        raise ValueError(f"--judge compares two runs, or one with its initial policy, not {len(runs)}.")
    from .comparison import compare as compare_runs
    from .comparison import names_of
    from .evaluate import evaluate as evaluate_run
    from .export_outputs import check_format, export_outputs
    from .head_to_head import head_to_head
    from .judge import make_judge
    from .record import read

    if export:
        check_format(export)
    if judge:  # made before anything is sampled: what it lacks is said at once
        asked = make_judge(judge, data=read(runs[0]).prompts_from, cache=output / "answers.jsonl", **llm)
    for run in runs:
        if not judge or prompts is not None or seed is not None or not (run / "samples.jsonl").is_file():
            _say(f"report: {evaluate_run(run, prompts=prompts, seed=seed)}")
    if export:
        names = [name.replace("/", "-") for name in names_of(runs)]
        for run, name, who in [*zip(runs, names, ["policy"] * len(runs)), (runs[0], names[0], "initial")]:
            _say(f"outputs: {export_outputs(run, output / export, format=export, who=who, generator=name)}")
    if judge:
        result = head_to_head(*runs, judge=asked, rate=rate)
        _print_result(result, result.table)
        _say(f"page: {result.save(output)}")
    else:
        _show(compare_runs(runs))


def _json_object(text: str) -> dict | None:
    try:
        return dict(**json.loads(text)) if text else None
    except (ValueError, TypeError):
        raise ValueError(f"--settings {text} is not a JSON object, as '{{\"temperature\": 0}}'.") from None


@app.command()
def compare(
    runs: Runs,
    output: Annotated[Path, typer.Option(help="folder for page and figures")] = Path("runs/comparison"),
) -> None:
    """One table and the figures of several runs, from their directories alone."""
    from .comparison import compare as compare_runs

    comparison = compare_runs(runs)
    _show(comparison)
    _say(f"figures: {comparison.save(output)}")


@app.command()
def chat(run: Annotated[Path, typer.Argument(help="directory of a run")],
         temperature: Annotated[float, typer.Option(help="0 is greedy")] = 1.0) -> None:
    """Type a prompt; the initial policy, the trained policy and its reference answer side by side."""
    from .chat import converse

    converse(run, temperature, console)


@app.command()
def doctor(
    settings: Settings = None,
    recipe: Annotated[str | None, typer.Option(help="predict this recipe's peak memory instead")] = None,
) -> None:
    """What is installed, which device and precision a run would use, and what would fail.

    With --recipe: the memory that the run will need, and whether it fits. Exit code 1 if it does not, so that
    nothing is begun by: tralign doctor --recipe R && tralign train R
    """
    if recipe:
        return _will_it_fit(recipe, settings or [])
    if settings:
        raise ValueError(f"{settings[0]} is a setting, of which recipe? Say --recipe RECIPE {settings[0]}")
    from .doctor import examine

    facts, problems = examine()
    for name, value in facts.items():
        _say(f"{name:<16}{value}")
    for problem in problems:
        console.print(f"[yellow]would fail[/]      {escape(problem)}", soft_wrap=True)
    if not problems:
        console.print("[green]nothing that would fail[/]")


def _will_it_fit(name: str, settings: list[str]) -> None:
    from .recipe import Recipe, parse_overrides

    recipe = Recipe.load(name, **parse_overrides(settings))  # refused before torch is loaded
    from .memory import predict, smaller

    prediction = predict(recipe)
    parts = {part: size for part, size in Counter(prediction.parts).most_common() if size >= 2**19}
    parts |= {"peak": prediction.total, "free on this device": prediction.free}
    _print_table([f"at the peak: {prediction.moment}", "memory"],
                 [(part, _bytes(size)) for part, size in parts.items()])
    _say(f"{recipe.micro_batch_size or recipe.batch_size} rows at once, each as long as the recipe allows: "
         f"prompts of {recipe.max_prompt_tokens} and completions of {recipe.max_completion_tokens} tokens")
    if prediction.fits:
        console.print("[green]it fits[/]" if prediction.total < 0.85 * prediction.free else
                      "[yellow]it fits, but barely[/]: most predictions are good to 15 %")
        return
    console.print("[red]it does not fit[/]. With these settings it needs:")
    trial = prediction
    for changes, trial in smaller(recipe, prediction):
        words = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
        _say(f"  {_bytes(trial.total):>9}  {words}" + "  (fits)" * trial.fits)
    if not trial.fits:
        _say("Nothing of this is enough: take a smaller model, or another device.")
    raise typer.Exit(1)


def _bytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _show(comparison) -> None:
    """What fits a terminal of 80 columns; the page has the rest. Settings that all runs share go below."""
    summary = comparison.summary
    summary["method"] = summary["method"].str.removeprefix("TR-")  # the reference says whether it moves
    runs = summary[summary["run"] != "initial policy"]
    same = [name for name in SETTINGS if name in runs and runs[name].nunique() == 1]
    shared = ", ".join(f"{name} {runs[name].iloc[0]}" for name in same)
    shown = [name for name in ("run", *SETTINGS, *RESULTS) if name in summary and name not in same]
    _print_result(comparison, summary[shown], ["all runs: " + shared])


def _print_result(result, frame, remarks: Iterable[str] = ()) -> None:
    """A table of texts, after the warnings and before the notes of what it is about."""
    for warning in result.warnings:
        console.print(f"[bold yellow]Warning.[/] {escape(warning)}")
    _print_table(frame.columns, frame.to_numpy())
    for remark in (*remarks, *result.notes):
        console.print(remark, style="dim", markup=False)


def _print_table(header: Iterable[str], rows: Iterable) -> None:
    table = Table(*map(escape, header), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.overflow = "fold"  # in a narrow terminal cells take more lines, and nothing is cut off
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)  # a path stays in one piece, to be copied


if __name__ == "__main__":
    main()
