"""`tralign demo`: the same pairs, the same seed, three references; what does moving it change?"""

from __future__ import annotations

import time
from pathlib import Path

RUNS = {
    "dpo": {"reference": "fixed"},
    "tr-dpo-soft": {"reference": "soft", "alpha": 0.6, "tau": 16},
    "tr-dpo-hard": {"reference": "hard", "tau": 32},
}
STEPS = 100  # of 64 pairs, two thirds of an epoch: the three runs take less than five minutes on two cores


def run_demo(output: Path, *, say=print, **overrides):
    """Train DPO, TR-DPO soft and TR-DPO hard on little-tldr from the SFT model; returns their `Comparison`.

    Finished runs in `output` are taken as they are, a cut one goes on. overrides: settings for all three.
    """
    from .comparison import compare
    from .runs import train

    start = time.perf_counter()
    for name, reference in RUNS.items():
        folder = Path(output) / name
        if (folder / "report.md").is_file():
            say(f"\n{name}: already in {folder}; delete it to run again")
            continue
        say(f"\n{name}")
        resume = (folder / "recipe.yaml").is_file()
        settings = {"max_steps": STEPS} | reference | overrides
        train("little-tldr", **settings, output=str(folder), resume=resume)
    say(f"\nthree runs in {time.perf_counter() - start:.0f} s")
    return compare([Path(output) / name for name in RUNS])
