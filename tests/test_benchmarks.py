"""The benchmarks measure what they say: the same pairs and losses on both sides, and a floor done by hand."""

from __future__ import annotations

import dataclasses
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import against_trl, measure, on_cuda, sides
from benchmarks.floor import matmul_rate, step_flops
from benchmarks.table import table
from benchmarks.workload import (
    EOS,
    HH_FILE,
    SHAPES,
    WORLD_PAIRS,
    Shape,
    Workload,
    as_texts,
    neox_config,
    number_tokenizer,
    random_rows,
    save_model,
    workload,
)

VOCABULARY = 300
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> measure.Job:
    """20 steps of 4 pairs, 24 different ones, so that the epochs' orders have to agree, too."""
    model = save_model(neox_config(**TINY), tmp_path_factory.mktemp("model"))
    rows = random_rows(Shape(12, 6, 4), 24, VOCABULARY)
    return measure.Job("ours", str(model), rows, batch_size=4, steps=20, tau=4)


@pytest.fixture(scope="module")
def ours(job):
    return measure.measure(job)


# ---------------------------------------------------------------- both sides


@pytest.mark.parametrize("micro", [4, 2])
def test_losses_of_tr_dpo_are_trls_over_20_steps(job, ours, micro):
    pytest.importorskip("trl")
    trl = measure.measure(dataclasses.replace(job, side="trl", micro_batch_size=micro))
    assert len(trl.losses) == 20 and sides.loss_difference(ours, trl) <= 1e-4
    assert trl.logps == pytest.approx(ours.logps, rel=1e-5)
    assert trl.moved == pytest.approx(ours.moved, rel=1e-3) and ours.moved > 1e-4
    sides.check(ours, trl, "here")


def test_the_losses_would_show_a_reference_that_stays_where_it_is(job, ours):
    fixed = measure.measure(dataclasses.replace(job, tau=None))
    assert fixed.moved == 0 and fixed.update_seconds is None
    assert fixed.losses[:4] == pytest.approx(ours.losses[:4], abs=1e-6)  # before the first update
    assert sides.loss_difference(ours, fixed) > 1e-3
    with pytest.raises(RuntimeError, match="moved by 0.0"):
        sides.check(ours, fixed, "here")


def test_other_pairs_are_noticed(job, ours, monkeypatch):
    pytest.importorskip("trl")
    with pytest.raises(RuntimeError, match="not given the same pairs"):
        sides.check(ours, dataclasses.replace(ours, logps=(ours.logps[1], ours.logps[0])), "here")
    swapped = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids", "prompt_ids": "prompt_ids"}
    monkeypatch.setattr(measure, "as_texts", lambda row: as_texts({k: row[v] for k, v in swapped.items()}))
    with pytest.raises(RuntimeError, match="other token ids"):
        measure.measure(dataclasses.replace(job, side="trl", steps=2))


def test_the_adapter_is_the_same_on_both_sides(job):
    pytest.importorskip("trl")
    lora = dataclasses.replace(job, tuning="lora", tau=None, steps=6)
    ours, trl = measure.measure(lora), measure.measure(dataclasses.replace(lora, side="trl"))
    assert sides.loss_difference(ours, trl) <= 1e-5
    assert abs(ours.losses[-1] - ours.losses[0]) > 1e-4


def test_a_process_of_its_own_gives_the_same_losses_and_counts_the_optimizer(job, tmp_path):
    pytest.importorskip("trl")
    model = save_model(neox_config(**TINY | {"vocab_size": 2**17}), tmp_path)
    large = dataclasses.replace(job, steps=2, model=str(model))
    alone = measure.run_alone(large, threads=1)
    assert alone.losses == pytest.approx(measure.measure(large).losses, abs=1e-6)
    weights = 2 * 32 * 2**17 * 4  # bytes of embedding and head, which is nearly all
    # policy, gradient, two moments and reference; then what comes and goes
    assert 5 * weights < alone.peak < 10 * weights


def test_a_failed_measurement_says_why(job, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such model >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="ours, full: the process failed.\nno such model"):
        measure.run_alone(job, threads=1)


# ---------------------------------------------------------------- what is trained


def test_ids_come_back_from_their_texts():
    tokenizer = number_tokenizer(VOCABULARY)
    for row in random_rows(Shape(20, 10, 1), 20, VOCABULARY):
        texts = as_texts(row)
        assert tokenizer(texts["prompt"])["input_ids"] == row["prompt_ids"]
        for side in ("chosen", "rejected"):
            ids = tokenizer(texts["prompt"] + texts[side])["input_ids"]
            assert ids == row["prompt_ids"] + row[f"{side}_ids"]


@pytest.mark.parametrize("name", SHAPES)
def test_random_pairs_have_the_lengths_of_their_shape(name):
    shape = SHAPES[name]
    rows = random_rows(shape, 400, 50304, seed=3)
    assert rows == random_rows(shape, 400, 50304, seed=3) != random_rows(shape, 400, 50304, seed=4)
    for part in ("prompt", "chosen", "rejected"):
        mean = shape.prompt if part == "prompt" else shape.completion
        lengths = torch.tensor([len(row[f"{part}_ids"]) for row in rows], dtype=torch.float)
        assert lengths.mean().item() == pytest.approx(mean, rel=0.05)
        assert lengths.std().item() == pytest.approx(0.22 * mean, rel=0.15)  # 0.25, less what was cut off
        assert mean / 2 - 1 < lengths.min() and lengths.max() < 1.5 * mean + 1
    for row in rows:
        assert [ids.count(EOS) for ids in row.values()] == [0, 1, 1]
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == EOS


def test_pairs_of_the_embedded_world_and_of_the_real_file(tmp_path):
    world = workload("little-tldr", 2, tmp_path)
    assert len(world.rows) == 2 * WORLD_PAIRS and {row["chosen_ids"][-1] for row in world.rows} == {EOS}
    if not HH_FILE.exists():
        with pytest.raises(FileNotFoundError, match="shared/data"):
            workload("hh-file", 2, tmp_path)
        return
    (tmp_path / "model").mkdir()  # the model is not looked at here
    real = workload("hh-file", 50, tmp_path)
    assert len(real.rows) == 50 * real.pairs
    assert sum(len(row["prompt_ids"]) for row in real.rows) / len(real.rows) == pytest.approx(125, rel=0.25)


# ---------------------------------------------------------------- the floor


def test_operations_of_a_step_by_hand():
    config = SimpleNamespace(hidden_size=2, num_hidden_layers=3, intermediate_size=8, vocab_size=10)
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 0], "rejected_ids": [0]}
    # a block: 4 * 2 * 2 + 2 * 2 * 8 = 48 weights; 6 tokens through 3 blocks: 2 * 3 * 48 * 6 = 1728
    # two positions predict (the prompt's last and the first chosen one): 2 * 2 * 10 * 2 = 80
    # seen: prompt 1 + 2 + 3, chosen 4 + 5, rejected 4 = 19, each 4 * 2 operations in 3 layers: 456
    assert step_flops([row], config) == 4 * (1728 + 80) + 4 * 456
    assert step_flops([row, row], config, "qlora") == 2 * (3 * (1728 + 80) + 4 * 456)


def test_the_rate_is_the_best_product(monkeypatch):
    config = SimpleNamespace(hidden_size=8, intermediate_size=16, vocab_size=2048)
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # every product takes a second
    assert matmul_rate(config, tokens=4, repeats=1) == 2 * 2048**3


def test_the_rate_is_taken_between_the_steps_and_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rates = iter([7.0, 1.0, 3.0, 5.0])

    def rate():
        now[0] += 100
        return next(rates)

    clock = measure.Clock(rate)
    for seconds in (50, 2, 4, 6):  # the first one is the warm-up
        now[0] += seconds
        clock.on_step_end(None, None, SimpleNamespace())
    job = measure.Job("ours", "model", [], 1, steps=4)
    result = clock.result(job, [{"loss": 0.7, "logps/chosen": -1.0, "logps/rejected": -2.0}])
    assert result.seconds == 4 and result.rate == 4  # before, between and after the timed ones: 7, 1, 3, 5


# ---------------------------------------------------------------- the tables


def test_lines_compare_neighbouring_runs():
    row = {"prompt_ids": [1] * 10, "chosen_ids": [2] * 3, "rejected_ids": [3]}
    work = Workload("x", "model", [row], pairs=4)
    first, second = sides.sides("bf16")
    for side, seconds, peak, loss in ((first, (1, 2, 2), 1, 0.5), (second, (3, 4, 8), 4, 0.502)):
        side.results.extend(measure.Result(s, peak * 2**20, [0.7, loss], (0, 0)) for s in seconds)
    mine, other = sides.speed_lines(work, "bf16", [first, second])
    assert mine == ["x", "bf16", "ours", "2", "48", "1", "", "", ""]  # 4 pairs of 24 tokens in 2 seconds
    assert other == ["x", "bf16", "TRL", "1", "24", "4", "2e-03", "3.00x (2.00-4.00)", "0.25x (0.25-0.25)"]


def test_table_is_aligned_or_markdown():
    assert table(["a", "n"], [["bb", "10"], ["c", "2"]], left=1) == "a    n\nbb  10\nc    2"
    markdown = table(["a", "n"], [["bb", "10"]], left=1, markdown=True)
    assert markdown == "| a | n |\n| --- | ---: |\n| bb | 10 |"


# ---------------------------------------------------------------- the other script


def fake_measurements(monkeypatch, module, name):
    """The jobs that `module` has measured, none of them really: ours takes 1 s and 1 GiB, TRL's 2."""
    jobs = []

    def fake(job, threads=1):
        jobs.append(job)
        n = 1 if job.side == "ours" else 2
        return measure.Result(n, n * 2**30, [0.7] * job.steps, (-5.0, -6.0), 1e-3, 0.16, 1e12 * len(jobs))

    monkeypatch.setattr(module, name, fake)
    return jobs


def test_sides_take_turns_and_all_numbers_reach_the_table(monkeypatch):
    jobs = fake_measurements(monkeypatch, against_trl, "run_alone")
    text = against_trl.report(["little-tldr"], ["full"], repeats=2, steps=2, threads=1, markdown=False)
    assert [job.side for job in jobs] == ["ours", "trl", "trl-default", "trl", "ours"]
    assert all((job.tau, job.steps, job.batch_size, job.tuning) == (2, 4, 64, "full") for job in jobs)
    rows = [line.split() for line in text.splitlines()]
    assert ["full", "TRL", "32"] in [row[1:4] for row in rows] and "2.00x (2.00-2.00)" in text
    assert [row for row in rows if row[-3:] == ["160.0", "1.00%", "0.25%"]]  # an update, at tau 16 and 64


def test_each_run_has_a_floor_of_its_own():
    """On a machine that gets slower its products do, too: 100 operations at 50, 25 and 40 a second."""
    results = [measure.Result(seconds, 1, [0.7], (0, 0), None, 0.1, rate)
               for seconds, rate in ((4.0, 50.0), (8.0, 25.0), (3.125, 40.0))]
    row = against_trl.limit_row("x", "full", 100, sides.Side("ours", {}, results=results))
    assert row[:5] == ["x", "full", "2.5", "4", "50% (50%-80%)"]


def test_both_sides_cut_a_step_into_the_same_micro_batches(monkeypatch):
    jobs = fake_measurements(monkeypatch, against_trl, "run_alone")
    work = Workload("x", "model", [], pairs=16, micro=4)
    against_trl.compare(work, "full", steps=2, repeats=1, threads=1)
    assert [(job.side, job.batch_size, job.micro_batch_size) for job in jobs] == [
        ("ours", 16, 4), ("trl", 16, 4), ("trl-default", 16, 4)]


def test_the_cuda_script_goes_on_after_what_does_not_fit(monkeypatch):
    jobs = fake_measurements(monkeypatch, on_cuda, "measure")
    ours, notes, work = on_cuda.measure, [], Workload("1b", "model", random_rows(SHAPES["short"], 4, 300), 2)

    def out_of_memory_for_trl(job):
        if job.side == "trl":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return ours(job)

    monkeypatch.setattr(on_cuda, "measure", out_of_memory_for_trl)
    rows = on_cuda.compare(work, "qlora", time.monotonic() + 60, notes)
    assert [row.label for row in rows] == ["ours", "ours, fixed reference"]
    assert [(job.tau, job.tuning, job.dtype) for job in jobs] == [(t, "qlora", "bfloat16") for t in (2, None)]
    assert notes == ["1b, qlora, TRL, fixed reference: out of memory."]
    assert on_cuda.compare(work, "full", time.monotonic() - 1, notes) == [] and "the time is up" in notes[-1]


def test_without_a_gpu_the_cuda_script_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert on_cuda.main(["--sizes", "12b"]) == 0
    assert capsys.readouterr().out.startswith("skipped: there is no CUDA GPU.")


def test_shared_prompts_are_checked_and_a_wrong_mask_is_found(monkeypatch):
    from tralign_mini import packing

    config = neox_config(**TINY | {"initializer_range": 0.1})
    assert all(found <= allowed for _, found, allowed in on_cuda.exactness("cpu", config))
    right = packing.pack

    def wrong(*arguments, **options):  # the rejected completion sees the chosen one
        batch = right(*arguments, **options)
        return batch | {"branch": torch.zeros_like(batch["branch"])}

    monkeypatch.setattr(packing, "pack", wrong)
    assert all(found > allowed for _, found, allowed in on_cuda.exactness("cpu", config))
