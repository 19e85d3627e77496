"""Sharded over two processes on the CPU (FSDP2, gloo): packed log-probs and gradients of the whole model.

The trainer itself refuses FSDP; this is about `CompletionScorer`, whose forward is what the hooks are around.
"""

from __future__ import annotations

import pytest
import torch
from engine_helpers import assert_same_gradients, build, gradients_of, packed, random_groups, weighted
from helpers import two_processes
from safetensors.torch import load_file

from tralign_mini.logprobs import CompletionScorer

FAMILIES = ("GPTNeoX", "Llama")
VARIANTS = ("plainly", "in chunks", "with checkpointing")
GROUPS = random_groups(8)

WORKER = """
import os, sys, conftest, torch
import torch.distributed as dist
from engine_helpers import build, packed, weighted
from safetensors.torch import save_file
from test_fsdp import FAMILIES, GROUPS, VARIANTS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tralign_mini import logprobs

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
for family in FAMILIES:
    for variant in VARIANTS:
        model = build(family)
        if variant == "with checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
        logprobs.LOGIT_BYTES = 4 * 64 * 5 if variant == "in chunks" else 2**27
        scorer = logprobs.CompletionScorer(model)
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(scorer, mesh=mesh)
        batch = packed(GROUPS[4 * rank : 4 * rank + 4])
        for _ in range(2):  # the second time nothing is asked first
            scorer.zero_grad()
            logps = scorer(**batch)
            weighted(logps).backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        sharded = sum(p.to_local().numel() for p in model.parameters())
        assert sharded < 0.6 * sum(p.numel() for p in model.parameters()), "nothing is sharded"
        with torch.no_grad():
            found |= {"logps": logps, "without gradient": scorer(**batch)}
        save_file({name: t.detach().contiguous() for name, t in found.items()},
                  f"{sys.argv[1]}/{family} {variant} {rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes found: <family> <variant> <rank>.safetensors."""
    folder = tmp_path_factory.mktemp("fsdp")
    two_processes(WORKER, folder, str(folder))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_packed_log_probs_and_gradients_equal_the_whole_ones(folder, family, variant):
    model = build(family)
    losses = []
    for rank in (0, 1):
        logps = CompletionScorer(model)(**packed(GROUPS[4 * rank : 4 * rank + 4]))
        losses.append(weighted(logps))
        found = load_file(folder / f"{family} {variant} {rank}.safetensors")
        for name in ("logps", "without gradient"):
            torch.testing.assert_close(found[name], logps.detach(), rtol=3e-7, atol=1e-5)
    expected = gradients_of(model, (losses[0] + losses[1]) / 2)  # FSDP averages over the processes
    for rank in (0, 1):
        found = load_file(folder / f"{family} {variant} {rank}.safetensors")
        assert_same_gradients({name: found[name] for name in expected}, expected)
