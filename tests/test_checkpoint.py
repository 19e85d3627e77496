"""What a checkpoint holds comes back to the bit, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_trainer, tiny_llama, tiny_neox, weights
from lora_helpers import adapted
from safetensors.torch import load_file, save_file

from tralign_mini.checkpoint import (
    checkpoints,
    read_seal,
    remove_unfinished,
    restore_policy,
    save_policy,
    start_hash,
    weight_hash,
    write_seal,
)


def sealed(policy, target):
    save_policy(policy, target)
    write_seal(target, {"weights": weight_hash(policy)})
    return target


def policy_of(kind, seed):
    return {"neox": tiny_neox, "llama": tiny_llama}[kind](seed) if kind != "lora" else adapted(seed=seed)


KINDS = pytest.mark.parametrize("kind", ["neox", "llama", "lora"])


@KINDS
def test_the_weights_come_back_to_the_bit(tmp_path, kind):
    saved, start = policy_of(kind, 1), policy_of(kind, 2)
    assert weight_hash(saved) != weight_hash(start)
    restore_policy(start, sealed(saved, tmp_path))
    trained = [name for name, _ in saved.named_parameters() if kind != "lora" or ".default." in name]
    assert all(torch.equal(weights(saved)[name], weights(start)[name]) for name in trained)


def test_the_head_of_gpt_neox_comes_back(tmp_path):
    """Its file says `embed_out`, the model `lm_head`: loaded key by key, the head stays what it was."""
    saved, naive, start = tiny_neox(seed=1), tiny_neox(seed=2), tiny_neox(seed=2)
    stored = load_file(sealed(saved, tmp_path) / "model.safetensors")
    naive.load_state_dict(stored, strict=False)
    heads = [model.get_output_embeddings().weight for model in (naive, saved)]
    assert not torch.equal(*heads)  # the trap
    restore_policy(start, tmp_path)
    assert torch.equal(start.get_output_embeddings().weight, saved.get_output_embeddings().weight)


def tamper(target, change):
    file = next(Path(target).glob("*model.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@KINDS
def test_a_changed_weight_is_refused(tmp_path, kind):
    def change(tensors):
        tensors[max(tensors)].view(-1)[0] += 1e-3

    target = sealed(policy_of(kind, 1), tmp_path)
    tamper(target, change)
    with pytest.raises(ValueError,
                       match="their hash differs.*delete it to resume from the checkpoint before"):
        restore_policy(policy_of(kind, 2), target)


@KINDS
def test_a_missing_weight_is_refused(tmp_path, kind):
    target = sealed(policy_of(kind, 1), tmp_path)
    tamper(target, lambda tensors: tensors.pop(max(tensors)))
    with pytest.raises(ValueError, match=r"does not fit this model: missing \['.*weight'"):
        restore_policy(policy_of(kind, 1), target)


@KINDS
def test_an_unknown_weight_is_refused(tmp_path, kind):
    target = sealed(policy_of(kind, 1), tmp_path)
    tamper(target, lambda tensors: tensors.update({max(tensors).replace("weight", "other"): torch.ones(2)}))
    with pytest.raises(ValueError, match=r"does not fit this model: missing \[\], unexpected \['.*other'"):
        restore_policy(policy_of(kind, 1), target)


@KINDS
def test_half_a_file_is_refused(tmp_path, kind):
    target = sealed(policy_of(kind, 1), tmp_path)
    file = next(target.glob("*model.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read.*changed or damaged"):
        restore_policy(policy_of(kind, 1), target)


def test_half_a_seal_is_refused(tmp_path):
    (sealed(policy_of("neox", 1), tmp_path) / "tralign.json").write_text('{"weights": "a')
    with pytest.raises(ValueError, match="its tralign.json cannot be read.*changed or damaged"):
        restore_policy(policy_of("neox", 1), tmp_path)


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    assert checkpoints(tmp_path) == []
    for step in (100, 9, 10):
        write_seal(tmp_path / "checkpoints" / f"checkpoint-{step}", {"step": step})
    assert [read_seal(found)["step"] for found in checkpoints(tmp_path)] == [9, 10, 100]
    assert checkpoints(tmp_path / "nothing") == []


def test_the_hash_of_a_start_sees_the_frozen_base(tmp_path):
    one, other = adapted(), adapted()
    assert start_hash(one) == start_hash(other) and weight_hash(one) == weight_hash(other)
    with torch.no_grad():
        other.base_model.model.gpt_neox.embed_in.weight.mul_(1.001)
    assert weight_hash(one) == weight_hash(other)
    assert start_hash(one) != start_hash(other)


def test_what_a_checkpoint_says_of_its_run(tmp_path):
    trainer = make_trainer(tmp_path, reference="soft", tau=1, alpha=0.5)
    start = start_hash(trainer.policy)
    trainer.train()
    seal = read_seal(checkpoints(tmp_path)[-1])
    assert seal["step"] == 4 and seal["reference_updates"] == 4 and seal["processes"] == 1
    assert seal["weights"] == weight_hash(trainer.policy) and seal["start"]["model"] == start


def test_only_what_was_cut_off_is_removed(tmp_path):
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    write_seal(tmp_path / "checkpoints" / "checkpoint-1", {"step": 1})
    remove_unfinished(tmp_path)
    assert [found.name for found in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]
    remove_unfinished(tmp_path / "nothing")
