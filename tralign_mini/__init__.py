"""tralign_mini: preference alignment with a moving reference policy, small enough to read.

TR-DPO, TR-IPO and TR-KTO (arXiv 2404.09656) on one GPU or on a laptop. `import tralign_mini as tr` loads
nothing heavy; each name below loads its module when it is first used.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

# On a CPU bitsandbytes advises to install `kernels`, which would fetch compiled code from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {
    "losses": ("PreferenceLoss", "bradley_terry_loss", "dpo_loss", "ipo_loss", "kto_loss", "orpo_loss",
               "simpo_loss"),
    "trust_region": ("TrustRegion", "update_reference"),
    "logprobs": ("CompletionScorer", "completion_logps"),
    "reference": ("AdapterReference", "FrozenReference", "make_reference"),
    "data": ("load_dataset", "prepare"),
    "worlds": ("WORLDS", "gold_reward"),
    "recipe": ("Recipe",),
    "train": ("AlignmentTrainer",),
    "runs": ("Run", "replay", "train"),
    "ppo_run": ("train_ppo",),
    "mpo": ("MPORun", "gap_figure", "split_gaps", "train_mpo"),
    "evaluate": ("evaluate",),
    "generate": ("sample",),
    "reward": ("RewardModel", "completion_rewards", "score"),
    "comparison": ("compare",),
    "judge": ("GoldJudge", "RewardJudge"),
    "llm_judge": ("LLMJudge",),
    "head_to_head": ("head_to_head",),
    "export_outputs": ("export_outputs",),
}
_MODULES = ("exercises", "memory", "toy", "widgets")  # tr.widgets.loss_explorer() and the like
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *_MODULES, *_MODULE_OF]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)


class _Package(ModuleType):
    """`tralign_mini.train` is a file, `tr.train` a function: importing the one must not hide the other."""

    def __setattr__(self, name, value):
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
