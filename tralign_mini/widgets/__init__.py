"""Live panels for notebooks, a file each. They are drawn and computed in threads.

    import tralign_mini as tr
    tr.widgets.loss_explorer()
"""

from __future__ import annotations

try:
    import ipywidgets  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tr.widgets needs ipywidgets, and it is not installed here. Install it and restart the kernel: "
        "pip install 'ipywidgets>=8.1' jupyterlab") from error

from .judge_explorer import JudgeExplorer as judge_explorer
from .live_run import LiveRun as live_run
from .loss_explorer import LossExplorer as loss_explorer
from .playground import Playground as playground
from .reference_explorer import ReferenceExplorer as reference_explorer
from .runs_explorer import RunsExplorer as runs_explorer
from .split_explorer import SplitExplorer as split_explorer
from .toy_explorer import ToyExplorer as toy_explorer

__all__ = ["judge_explorer", "live_run", "loss_explorer", "playground", "reference_explorer", "runs_explorer",
           "split_explorer", "toy_explorer"]
