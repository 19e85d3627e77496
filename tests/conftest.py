"""The tests' environment: no network, no noise, and one thread: processes side by side do not compete."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TRALIGN_CACHE"] = tempfile.mkdtemp(prefix="tralign-cache-")  # nothing from or for other runs

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import tralign_mini  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without report.md and its figures: `pytestmark = pytest.mark.usefixtures("no_report")`."""
    monkeypatch.setattr(tralign_mini.Run, "report", lambda self: None)
