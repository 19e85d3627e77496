"""Live panels for notebooks: one function each, and a file each. They are drawn and computed in threads.

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

from .live_run import live_run
from .loss_explorer import loss_explorer
from .playground import playground
from .reference_explorer import reference_explorer
from .runs_explorer import runs_explorer
from .toy_explorer import toy_explorer

__all__ = ["live_run", "loss_explorer", "playground", "reference_explorer", "runs_explorer", "toy_explorer"]
