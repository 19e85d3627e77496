"""Makes data/grid, the runs behind notebook 04: DPO, IPO, KTO with every kind of reference on little-tldr.

    python data/grid.py                 one run after the other; stopped, it goes on where it was
    python data/grid.py 1/2             every second run only, so that two processes can share the work

Each run is an ordinary `tr.train` in runs/grid; what a reader needs of it is copied to data/grid (`keep`).
A run takes one to three minutes on one core. Settings were chosen by reference=fixed alone, with seed 0; the
seeds here are fresh.
"""
from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SEEDS = (1, 2, 3)
REFERENCES = {"fixed": {}, "soft": {"alpha": 0.6, "tau": 16}, "hard": {"tau": 32}}
REGIMES = {  # recipe, the betas of each method
    "one-epoch": ("little-tldr", {"dpo": (1.0, 0.3, 0.1), "ipo": (0.1,), "kto": (0.1,)}),
    "overoptimize": ("little-tldr-overoptimize", {"dpo": (0.05, 0.2), "ipo": (0.05,), "kto": (0.05,)}),
}
TEXTS = 60  # prompts of a run whose texts are kept; of the other 140 only the gold rewards


def grid() -> dict[str, tuple[str, dict]]:
    """name -> (recipe, overrides), the most telling ones first."""
    runs = {}
    for (regime, (recipe, betas)), seed in itertools.product(reversed(REGIMES.items()), SEEDS):
        for method, reference in itertools.product(betas, REFERENCES):
            for beta in betas[method]:
                settings = {"method": method, "beta": beta, "seed": seed, "reference": reference}
                name = f"{regime}-{method}-{reference}-beta{beta:g}-seed{seed}"
                runs[name] = recipe, settings | REFERENCES[reference]
    return runs


def keep(run: Path, folder: Path) -> None:
    """Copy what a reader needs: no path of this machine, five digits, the texts of the first prompts only."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = (run / "recipe.yaml").read_text().splitlines(keepends=True)
    recipe = [f"output: {folder.name}\n" if line.startswith("output:") else line for line in recipe]
    (folder / "recipe.yaml").write_text("".join(recipe))
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        rows = [{key: _short(value) for key, value in row.items()} for row in rows]
        if name == "samples.jsonl":
            rows[TEXTS:] = [{key: row[key] for key in row if key.startswith("gold")} for row in rows[TEXTS:]]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(part: str = "1/1") -> None:
    """Make the runs of this part that are not there yet."""
    own, parts = map(int, part.split("/"))
    import tralign_mini as tr

    for index, (name, (recipe, settings)) in enumerate(grid().items()):
        folder = REPOSITORY / "data" / "grid" / name
        if index % parts != own - 1 or folder.exists():
            continue
        run = tr.train(recipe, **settings, output=str(REPOSITORY / "runs" / "grid" / name), resume=True,
                       save_steps=50, eval_prompts=200)
        keep(run.directory, folder)
        shutil.rmtree(run.directory / "checkpoints")
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        print(f"{name}: gold {last['gold/reward']:.2f} at KL {last['kl/initial']:.1f}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
