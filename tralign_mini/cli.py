"""The command line: `tralign demo | train | evaluate | compare | chat | doctor`.

Every error is one message and exit code 2. Ctrl-C in a training run finishes the step, saves, and says
how to go on.
"""

from __future__ import annotations

import signal
import sys
import threading
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
EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
)  # what a wrong argument or a lack of memory raises


def main() -> None:
    """Entry point of the `tralign` command."""
    try:
        app()
    except EXPECTED as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would read [brackets] as a style


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the four runs and the comparison")] = Path(
        "runs/demo"
    ),
) -> None:
    """SFT against DPO, TR-DPO soft and TR-DPO hard on little-tldr: a table and figures in a few minutes."""
    from .demo import run_demo

    comparison = run_demo(output, say=console.print)
    page = comparison.save(output)
    _show(comparison)
    console.print(f"figures and sample texts: {page}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, a YAML file, or a run's directory")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example alpha=0.6 tau=16")
    ] = None,
) -> None:
    """Train one policy; the reference, the data and everything else come from the recipe."""
    from .recipe import parse_overrides

    overrides = parse_overrides(settings or [])
    from .runs import train as train_run

    stop = threading.Event()
    with _stopping(stop):
        run = train_run(recipe, stop=stop, **overrides)
    if run is None:  # not the main process
        return
    if stop.is_set() and not (run.directory / "report.md").exists():
        console.print(f"stopped; go on with: tralign train {run.directory} resume=true")
        raise typer.Exit(130)
    console.print(f"report: {run.directory / 'report.md'}")


class _stopping:
    """The first Ctrl-C asks the run to stop after its step, the second one is the usual interruption."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __enter__(self):
        self.usual = signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        self.stop.set()
        signal.signal(signal.SIGINT, self.usual)
        Console(stderr=True).print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once)")

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.usual)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs")],
    prompts: Annotated[int | None, typer.Option(help="held-out prompts; default: as in the recipe")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the samples; default: the run's")] = None,
) -> None:
    """Sample finished runs again, measure them, and print the comparison."""
    from .comparison import compare as compare_runs
    from .evaluate import evaluate as evaluate_run

    for run in runs:
        console.print(f"report: {evaluate_run(run, prompts=prompts, seed=seed)}")
    _show(compare_runs(runs))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs")],
    output: Annotated[Path, typer.Option(help="folder for comparison.md and its figures")] = Path(
        "runs/comparison"
    ),
) -> None:
    """One table and the figures of several runs, from their directories alone."""
    from .comparison import compare as compare_runs

    comparison = compare_runs(runs)
    _show(comparison)
    console.print(f"figures: {comparison.save(output)}")


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 1.0,
) -> None:
    """Type a prompt; the initial policy, the trained policy and its reference answer side by side."""
    from .chat import converse

    converse(run, temperature, console)


@app.command()
def doctor() -> None:
    """What is installed, which device and precision a run would use, and what would fail."""
    from .doctor import examine

    findings = examine()
    for name, value in findings.facts.items():
        console.print(f"{name:<16}{_plain(value)}", soft_wrap=True)
    for problem in findings.problems:
        console.print(f"[yellow]would fail[/]      {_plain(problem)}", soft_wrap=True)
    if not findings.problems:
        console.print("[green]nothing that would fail[/]")


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
    parts = [run["reference"]] if isinstance(run["reference"], str) else []
    if parts == ["soft"]:
        parts.append(f"{run['alpha']:g}")
    if parts and parts[0] in ("soft", "hard"):
        parts.append(f"every {run['tau']:g}")
    return " ".join(parts)


if __name__ == "__main__":
    main()
