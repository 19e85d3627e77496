"""`tralign demo` at a small scale: three runs, one comparison, no network, and nothing twice."""

from __future__ import annotations

import socket

import pytest

from tralign_mini.demo import RUNS, run_demo

SMALL = {"max_steps": 4, "batch_size": 8, "eval_steps": 4, "eval_prompts": 12, "warmup_steps": 1}


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to look up or reach another machine fails the test."""

    def refuse(*arguments, **options):
        raise AssertionError(f"a network call: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_demo_compares_sft_with_three_references_without_network(tmp_path, no_network):
    said = []
    comparison = run_demo(tmp_path, say=said.append, **SMALL | {"tau": 2})
    table = comparison.table.set_index("run")
    assert [name for name in table.index if name in RUNS] == list(RUNS)
    assert len(table) == len(RUNS) + 1  # and the SFT model, from which all three begin
    assert table.loc[list(RUNS), "updates"].tolist() == [0, 2, 2]
    assert table["gold"].notna().all() and (table["low"] < table["high"]).all()
    page = comparison.save(tmp_path)
    assert page.exists() and list((tmp_path / "figures").glob("*.png"))

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    again = run_demo(tmp_path, say=said.append, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == stamps  # not again
    assert again.table.equals(comparison.table)
    assert sum("already in" in str(line) for line in said) == len(RUNS)
