"""What a run needs in order to go on as if it had never stopped: its policy, proof of it, and a seal.

`Trainer` keeps optimizer, scheduler and random states, but its own way back loads raw keys non-strictly:
transformers saves GPT-NeoX's `lm_head` as `embed_out`, so the head would silently stay at its initial value.
Here weights come back through `from_pretrained`'s key mapping and have to match a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers.utils import logging

SEAL = "tralign.json"  # written last: a checkpoint folder without it was cut off while it was being written
DAMAGED = "It was changed or damaged: delete it to resume from the checkpoint before, or start again."


@contextmanager
def quietly():
    """No progress bars of transformers: they would tear the run's own bar apart at every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def weight_hash(policy: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of what training changes: the adapter `default`, or all parameters."""
    adapted = isinstance(policy, PeftModel)
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        if not adapted or ".default." in name:
            digest.update(name.encode() + _bytes(parameter))
    return digest.hexdigest()


def start_hash(policy: torch.nn.Module) -> str:
    """SHA-256 of what a run begins from: the weights that training changes, and the frozen ones beside them.

    Of a frozen tensor some 4096 numbers count, evenly spaced, so that a large base is not read in full; of
    4-bit codes their scales, too: twice the weights have the same codes.
    """
    digest = hashlib.sha256(weight_hash(policy).encode())
    for name, parameter in sorted(policy.named_parameters()):
        if not parameter.requires_grad:
            state = getattr(parameter, "quant_state", None)
            scales = {} if state is None else state.as_dict(packed=True)
            for part, tensor in [("", parameter), *sorted(scales.items())]:
                some = tensor.flatten()[:: max(1, tensor.numel() // 4096)]
                digest.update(f"{name}{part}".encode() + _bytes(some))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save_policy(policy: torch.nn.Module, folder: Path) -> None:
    """Write the policy as an ordinary model folder, or as a PEFT folder with the adapter `default` alone."""
    adapters = {"selected_adapters": ["default"]} if isinstance(policy, PeftModel) else {}
    with quietly():
        policy.save_pretrained(folder, **adapters)


def restore_policy(policy: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into `policy`; every key must fit and the hash must be the stored one."""
    try:
        missing, unexpected = _load_weights(policy, folder)
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights cannot be read ({error}). {DAMAGED}") from error
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit this model: missing {missing[:3]}, unexpected "
                         f"{unexpected[:3]}. Another model or version made it; it cannot be resumed.")
    if weight_hash(policy) != read_seal(folder)["weights"]:
        raise ValueError(f"{folder}: the weights that came back are not those that were saved (their hash "
                         f"differs). {DAMAGED}")


def _load_weights(policy: torch.nn.Module, folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names that were missing in the folder, and those that were unexpected."""
    if isinstance(policy, PeftModel):
        saved = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(policy, saved, adapter_name="default")
        return [key for key in result.missing_keys if ".default." in key], result.unexpected_keys
    with quietly():
        loaded, info = type(policy).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    policy.load_state_dict(loaded.state_dict())
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"])


def write_seal(folder: Path, content: dict) -> None:
    """Mark a checkpoint as whole, atomically."""
    scratch = Path(folder) / (SEAL + ".tmp")
    scratch.write_text(json.dumps(content, indent=1))
    os.replace(scratch, Path(folder) / SEAL)


def read_seal(folder: Path, start: dict[str, str] | None = None) -> dict:
    """What `write_seal` stored; ValueError if the run began from something else than `start`."""
    try:
        seal = json.loads((Path(folder) / SEAL).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: its {SEAL} cannot be read ({error}). {DAMAGED}") from error
    if changed := [name for name, own in (start or {}).items() if seal["start"][name] != own]:
        raise ValueError(f"resume: the {changed[0]} that this run began from is not the same any more by its "
                         "hash. Put the old state back, or start a new run elsewhere.")
    return seal


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; folders that were cut off by a kill are left out."""
    found = [f for f in Path(directory, "checkpoints").glob("checkpoint-*") if (f / SEAL).is_file()]
    return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))


def remove_unfinished(directory: Path) -> None:
    """Delete cut-off checkpoints: `Trainer` would count them among those it keeps, and delete a whole one."""
    for folder in Path(directory, "checkpoints").glob("checkpoint-*"):
        if not (folder / SEAL).is_file():
            shutil.rmtree(folder)
