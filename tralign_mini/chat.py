"""`tralign chat RUN`: type a prompt; initial policy, trained policy and reference answer side by side."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from .evaluate import draw, initial_policy, sequence_logps
from .record import prompt_text
from .runs import Run

QUIT = {"", "quit", "exit", "/quit", "/exit"}


def converse(directory: Path, temperature: float, console: Console) -> None:
    """Read prompts from the console until an empty line; `example` takes a held-out prompt of the run."""
    run = Run(directory)
    prompts = run.held_out_prompts()
    chat, examples = any(isinstance(prompt, list) for prompt in prompts), iter(prompts)
    run.policy.eval()  # loads it before the first question
    console.print("A prompt (\\n for a new line), 'example' for a held-out one, or an empty line to leave.\n"
                  "In brackets: log policy - log initial policy of the answer, in nats.")
    seed = 0
    while (typed := _ask(console)) not in QUIT:
        if typed == "example":
            prompt = next(examples, None)
            console.print(Text(prompt_text(prompt or "no more held-out prompts"), style="dim"))
            if prompt is None:
                continue
        else:  # a typed line becomes a chat turn when the run was trained on chat messages
            prompt = typed.replace("\\n", "\n")
            prompt = [{"role": "user", "content": prompt}] if chat else prompt
        answers = answer(run, prompt, temperature=temperature, seed=seed)
        titled = {f"{who} ({ratio})": text.strip() for who, (text, ratio) in answers.items()}
        console.print(Columns([Panel(Text(text), title=title, width=38) for title, text in titled.items()]))
        seed += 1


def answer(run: Run, prompt, *, temperature: float = 1.0, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Each model's answer, and its log-ratio: log policy - log initial policy, in nats."""
    recipe, models = run.recipe, {"initial": initial_policy(run.policy, run.recipe)}
    models["policy"] = nullcontext(run.policy)
    if run.reference is not None:
        models["reference"] = run.reference.using()
    texts, sequences = [], []
    for context in models.values():
        with context as model:
            drawn = draw(model, run.tokenizer, recipe, [prompt], seed=seed, temperature=temperature)
        texts += drawn.texts
        sequences += drawn.sequences
    ratios = sequence_logps(run.policy, sequences, run.tokenizer.pad_token_id)
    with initial_policy(run.policy, recipe) as initial:
        ratios -= sequence_logps(initial, sequences, run.tokenizer.pad_token_id)
    return {who: (text, f"{ratio:+.1f} nats") for who, text, ratio in zip(models, texts, ratios.tolist())}


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
