"""`tr.widgets.playground(runs)`: one prompt, answered by the SFT model and by several runs, side by side.

With each answer stands its log-ratio, log policy - log SFT model in nats, under the policy of every run: how
much more likely training has made this very answer.
"""

from __future__ import annotations

import textwrap

import ipywidgets

from ..comparison import directories_of, names_of
from ..plot_style import COLORS, INK, PALE, new_figure, png, shortened, small_print
from ..record import prompt_text, read
from .panel import CONTROL, DPI, DRAWING, WIDTH, Panel, number

FIRST = "SFT"  # the name of the initial policy
MOST_LINES, EXAMPLES = 12, 20
LINE, LETTER = 0.2, 10.5 * 0.602 / 72  # inches from line to line, and of a letter
MONO = {"family": "DejaVu Sans Mono", "fontsize": 10.5, "linespacing": 1.35}


class Playground(Panel):
    """Type a prompt, and see what the SFT model and the policies of `runs` answer, with their log-ratios.

    runs: a list of runs or directories, or a dict name -> run; with checkpoints, all begun from one model.
    Controls: example, prompt, checkpoints (name of a run -> its control), temperature, seed, button. answers,
    to the last prompt: name -> {"text", "gold" (None: not known), "log_ratios": run -> nats}.
    """

    def __init__(self, runs):
        from ..checkpoint import checkpoints  # not at the top: these load transformers
        from ..runs import Run

        if not isinstance(runs, dict):
            directories = directories_of(runs)
            runs = dict(zip(names_of(directories), directories))
        if not runs:
            raise ValueError("There is no run to ask: give the directories of one or more.")
        self.runs = {name: Run(*directories_of(run)) for name, run in runs.items()}
        self.answers, self._policies, self.checkpoints = {}, {}, {}  # policies: run -> (checkpoint, policy)
        models = sorted({run.recipe.model for run in self.runs.values()})
        if len(models) > 1:
            raise ValueError(f"The runs began from different models: {', '.join(models)}. Give runs of one.")
        for name, run in self.runs.items():
            found = [(folder.name, folder) for folder in checkpoints(run.directory)]
            if not found:
                raise ValueError(f"{run.directory} has no whole checkpoint that could answer: train it.")
            self.checkpoints[name] = ipywidgets.Dropdown(
                options=found, value=found[-1][1], description=shortened(name), **CONTROL)
        prompts = [prompt for run in self.runs.values() for prompt in read(run).column("prompt")[:EXAMPLES]]
        self._chat = any(isinstance(prompt, list) for prompt in prompts)
        texts = dict.fromkeys(map(prompt_text, prompts))
        options = [(f"{i}: {' '.join(text.split())[:90]}", text) for i, text in enumerate(texts, 1)]
        look = {"style": CONTROL["style"], "layout": {"width": "990px"}}
        self.example = ipywidgets.Dropdown(options=options, description="held-out prompt", **look)
        self.prompt = ipywidgets.Textarea(self.example.value or "", rows=6, layout=look["layout"])
        self.temperature = number("temperature", 1, 0, 1.5, 0.1, ".1f")
        self.seed = number("sample", 0, 0, 20, 1)
        self.button = ipywidgets.Button(description="Answer", icon="comment", button_style="primary")
        self.bar = ipywidgets.IntProgress(max=len(runs) + 1, layout={"visibility": "hidden"})
        menus = list(self.checkpoints.values())
        rows = [[self.example], [self.prompt], menus, [self.temperature, self.seed], [self.button, self.bar]]
        super().__init__(rows, [self.temperature, self.seed, *menus])
        self.example.observe(self._take_example, "value")
        self.button.on_click(lambda button: self._drawer.ask())

    def picture(self) -> bytes:
        self.bar.value, self.bar.layout.visibility = 0, "visible"
        try:
            self.answers = self.answer(self.prompt.value)
        finally:
            self.bar.layout.visibility = "hidden"
        with DRAWING:
            return png(self._figure(), DPI)

    def answer(self, text: str) -> dict[str, dict]:
        """The answers of all, with the seed and temperature of the controls."""
        from ..evaluate import draw, initial_policy, sequence_logps
        from ..worlds import gold_reward

        if not text.strip():
            raise ValueError("The prompt is empty: type one, or choose a held-out one.")
        run = next(iter(self.runs.values()))
        prompt = [{"role": "user", "content": text}] if self._chat else text
        how = {"temperature": self.temperature.value, "seed": int(self.seed.value)}
        policies = {name: self._policy(name) for name in self.runs}
        drawn = {name: draw(policy, run.tokenizer, run.recipe, [prompt], **how)
                 for name, policy in policies.items()}
        with initial_policy(next(iter(policies.values())), run.recipe) as initial:
            drawn = {FIRST: draw(initial, run.tokenizer, run.recipe, [prompt], **how)} | drawn
            sequences, pad = [samples.sequences[0] for samples in drawn.values()], run.tokenizer.pad_token_id
            before = sequence_logps(initial, sequences, pad)
        ratios = {name: sequence_logps(policy, sequences, pad) - before for name, policy in policies.items()}
        world, answers = run.recipe.world, {}
        for i, (name, samples) in enumerate(drawn.items()):
            gold = gold_reward(world, [text], samples.texts)[0] if world else None
            answers[name] = {"text": samples.texts[0].strip(), "gold": gold,
                             "log_ratios": {run: values[i].item() for run, values in ratios.items()}}
        return answers

    def _policy(self, name: str):
        """The run's policy at the chosen checkpoint; one for each run is kept."""
        from ..checkpoint import quietly, restore_policy
        from ..models import load_policy

        folder = self.checkpoints[name].value
        if self._policies.get(name, (None,))[0] != folder:
            with quietly():
                policy = load_policy(self.runs[name].recipe)
                restore_policy(policy, folder)
            self._policies[name] = folder, policy.eval()
        self.bar.value += 1
        return self._policies[name][1]

    def _take_example(self, change) -> None:
        self.prompt.value = change["new"]
        self._drawer.ask()

    def _figure(self):
        """A column for each answer: who, its gold reward, a bar for each of its log-ratios, and the text."""
        answers, width = self.answers, int(0.92 * WIDTH / len(self.answers) / LETTER)
        texts = [textwrap.wrap(answer["text"] or "(nothing)", width, max_lines=MOST_LINES, placeholder=" …")
                 for answer in answers.values()]
        asked = textwrap.wrap(" ".join(self.prompt.value.split()), int(0.97 * WIDTH / LETTER), max_lines=2)
        figure = new_figure(WIDTH, LINE * (len(asked) + max(map(len, texts))) + 0.28 * len(self.runs) + 1.3)
        figure.suptitle("\n".join(asked), x=0.012, ha="left", color=PALE, **MONO)
        colors = {name: COLORS[run.recipe.reference] for name, run in self.runs.items()}
        axes = figure.subplots(1, len(answers), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (name, answer), lines in zip(axes, answers.items(), texts):
            look = {"fontsize": 13.5, "fontweight": "bold", "color": colors.get(name, COLORS["initial"])}
            ax.set_title(shortened(name), loc="left", **look)
            gold = "" if answer["gold"] is None else f"gold {answer['gold']:.1f}".replace("-", "−")
            ax.set_title(gold, loc="right", fontsize=12, color=INK)
            ax.set_xlabel("\n".join(lines), loc="left", color=INK, **MONO)
            bars = ax.barh(list(map(shortened, self.runs)), answer["log_ratios"].values(),
                           color=list(colors.values()), height=0.72)
            ax.bar_label(bars, fmt="%+.1f", padding=3, fontsize=10, color=INK)
            ax.axvline(0, color="#AAAAAA", lw=1)
            ax.tick_params(length=0, labelcolor=INK, labelbottom=False)
            ax.spines[:].set_visible(False)
            ax.margins(x=0.3)
        axes[0].invert_yaxis()  # of all
        small_print(figure, "bars: log-ratio to SFT (nats), under each run's policy")
        return figure
