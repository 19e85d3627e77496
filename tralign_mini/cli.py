"""The command line: `tralign demo | train | evaluate | compare | chat | doctor`.

An error is one message and exit code 2. Ctrl-C while training finishes the step, saves, says how to go on.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()
SETTINGS = ("method", "beta", "seed", "steps")
RESULTS = ("gold", "win rate", "KL to initial")
RESULTS_WITHOUT_GOLD = ("KL to initial", "Self-BLEU", "words")
EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)  # what a wrong argument raises
Runs = Annotated[list[Path], typer.Argument(help="directories of runs")]


def main() -> None:
    """Entry point of the `tralign` command."""
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
        Console(stderr=True).print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)
        sys.exit(2)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would read [brackets] as a style


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)  # a path stays in one piece, to be copied


@app.command()
def demo(output: Annotated[Path, typer.Option(help="folder for the three runs")] = Path("runs/demo")) -> None:
    """SFT against DPO, TR-DPO soft and TR-DPO hard on little-tldr: a table and figures in a few minutes."""
    from .demo import run_demo

    comparison = run_demo(output, say=_say)
    page = comparison.save(output)
    _show(comparison)
    _say(f"figures and sample texts: {page}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, a YAML file, or a run's directory")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as tau=16")] = None,
) -> None:
    """Train one policy; the reference, the data and everything else come from the recipe."""
    from .recipe import parse_overrides

    overrides = parse_overrides(settings or [])  # a typing error is refused before torch is loaded
    from .runs import train as train_run

    stop = threading.Event()
    with _stopping(stop):
        run = train_run(recipe, stop=stop, **overrides)
    if run is None:  # not the main process
        return
    if stop.is_set() and not (run.directory / "report.md").exists():
        _say(f"stopped; go on with: tralign train {run.directory} resume=true")
        raise typer.Exit(130)
    _say(f"report: {run.directory / 'report.md'}")


@contextmanager
def _stopping(stop: threading.Event):
    """The first Ctrl-C asks the run to stop after its step, the second one is the usual interruption."""

    def ask(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, usual)
        Console(stderr=True).print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once)")

    usual = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


@app.command()
def evaluate(
    runs: Runs,
    prompts: Annotated[int | None, typer.Option(help="held-out prompts; default: as in the recipe")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the samples; default: the run's")] = None,
) -> None:
    """Sample finished runs again, measure them, and print the comparison."""
    from .comparison import compare as compare_runs
    from .evaluate import evaluate as evaluate_run

    for run in runs:
        _say(f"report: {evaluate_run(run, prompts=prompts, seed=seed)}")
    _show(compare_runs(runs))


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
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, settings of the recipe")] = None,
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

    findings = examine()
    for name, value in findings.facts.items():
        console.print(f"{name:<16}{_plain(value)}", soft_wrap=True)
    for problem in findings.problems:
        console.print(f"[yellow]would fail[/]      {_plain(problem)}", soft_wrap=True)
    if not findings.problems:
        console.print("[green]nothing that would fail[/]")


def _will_it_fit(name: str, settings: list[str]) -> None:
    from .recipe import Recipe, parse_overrides

    recipe = Recipe.load(name, **parse_overrides(settings))  # refused before torch is loaded
    from .memory import predict, smaller

    prediction = predict(recipe)
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column(f"at the peak: {prediction.moment}")
    table.add_column("memory", justify="right")
    for part, size in sorted(prediction.parts.items(), key=lambda item: -item[1]):
        if size >= 2**19:  # half of the last digit
            table.add_row(part, _bytes(size))
    table.add_section()
    table.add_row("peak", _bytes(prediction.total))
    table.add_row("free on this device", _bytes(prediction.free))
    console.print(table)
    peaks = {moment: _bytes(sum(parts.values())) for moment, parts in prediction.moments.items()}
    _say("all moments: " + ", ".join(f"{moment} {peak}" for moment, peak in peaks.items()))
    _say(f"{recipe.micro_batch_size or recipe.batch_size} rows at once, each as long as the recipe allows: "
         f"prompts of {recipe.max_prompt_tokens} and completions of {recipe.max_completion_tokens} tokens")
    if prediction.fits:
        console.print("[green]it fits[/]" if prediction.total < 0.85 * prediction.free else
                      "[yellow]it fits, but barely[/]: a prediction is good to 15 %")
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
    for warning in comparison.warnings:
        console.print(f"[bold yellow]Warning.[/] {_plain(warning)}")
    summary = comparison.summary.drop(columns=["alpha", "tau", "reference"], errors="ignore")
    summary.insert(1, "reference", [_reference(row) for row in comparison.table.to_dict("records")])
    summary["method"] = summary["method"].str.removeprefix("TR-")  # the column before says whether it moves
    same = [name for name in SETTINGS if name in summary and len(set(summary[name]) - {""}) == 1]
    wanted = RESULTS if "gold" in summary else RESULTS_WITHOUT_GOLD
    differing = [name for name in SETTINGS if name in summary and name not in same]
    columns = ["run", "reference", *differing, *(name for name in wanted if name in summary)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.removesuffix(" to initial"), no_wrap=True)
    for row in summary[columns].to_numpy():
        table.add_row(*map(_plain, row))
    console.print(table)
    if same:
        console.print("all runs: " + ", ".join(f"{name} {max(summary[name])}" for name in same), style="dim")
    for note in comparison.notes:
        console.print(_plain(note), style="dim")


def _reference(run: dict) -> str:
    """`soft 0.6 every 16`, `hard every 32`, `fixed`, or nothing for the initial policy."""
    moving = {"soft": "soft {alpha:g} every {tau:g}", "hard": "hard every {tau:g}"}
    return moving.get(run["reference"], run["reference"]).format(**run)


if __name__ == "__main__":
    main()
