"""May the completions of a pair share their prompt? Asked once, before training, of the model and its config.

Sharing is exact if a token's prediction depends on the tokens that it is allowed to see and on their
positions, and on nothing else. A sliding window counts places in the row, a length-dependent RoPE looks at
the whole row, a recurrent state runs through it: these fall back to two whole sequences a pair. What no
config says is found by computing the longest row both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .attention import by_group
from .logprobs import completion_logps, plain_completion_logps
from .packing import Group, group_length, lay_out
from .tokens import collate

# tokens: short groups are put together into rows up to this, or up to the longest group
PACKED, PACKED_BY_GROUP = 1024, 2048  # the second where attention goes group by group (attention.py)
LOGPS = ("log-probs", completion_logps, plain_completion_logps)
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


class NotExact(Exception):
    """Why this model needs two whole sequences a pair; the message is for the user."""


def row_limit(model: nn.Module, groups: Sequence[Group], pad_token_id: int, scores=LOGPS) -> int:
    """The longest row of several groups that `packing.pack` may fill: sharing is exact for all these groups.

    groups: all that will be trained on, or at least the longest. Raises `NotExact` where a config says that
    it cannot be exact, or a numerical check does: on the longest group, beside a row filled up to the limit,
    in the mode, precision and attention that `model` has now, with LoRA's dropout off for the comparison.
    scores: what is compared: its name, the function of model and batch, and the same the plain way.
    """
    longest = max(groups, key=group_length)
    limit = longest_row(model, groups, PACKED_BY_GROUP if by_group(model) else PACKED)
    difference, tolerance = _check(model, longest, groups, pad_token_id, limit, *scores[1:])
    if not difference <= tolerance:
        raise NotExact(f"on the longest row, {group_length(longest)} tokens, {scores[0]} differ by "
                       f"{difference:.2g} (more than rounding, {tolerance:.2g})")
    return limit


def longest_row(model: nn.Module, groups: Sequence[Group], limit: int) -> int:
    """The longest row that the config allows: `limit`, more for a longer group, less for a window."""
    config, longest = model.config.get_text_config(), max(map(group_length, groups))
    if reason := _depends_on_the_row(model, config):
        raise NotExact(reason)
    windows = [size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and size > 0]
    if windows and min(windows) < longest:
        raise NotExact(f"the attention window of {min(windows)} tokens is shorter than the longest row, "
                       f"{longest} tokens")
    return min([max(limit, longest), *windows])


def _depends_on_the_row(model: nn.Module, config) -> str:
    """What in the architecture looks at more than the visible tokens and their positions, or ""."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    attention = getattr(config, "_attn_implementation", None)
    if getattr(causal_lm, "_is_stateful", False):
        return f"{config.model_type} carries a state from token to token, through the other completion"
    if kinds:
        return f"{config.model_type} has layers of the kind {', '.join(sorted(kinds))}"
    if rope_types & {"dynamic", "longrope"}:
        return f"its RoPE ({', '.join(rope_types & {'dynamic', 'longrope'})}) depends on the row's length"
    if attention not in ("sdpa", "eager", "flex_attention"):
        return f"attention {attention!r} takes no mask of our own; load the model with sdpa"
    return ""


@torch.no_grad()
def _check(model, longest: Group, groups, pad_token_id: int, limit: int, score, plain_score):
    """(largest difference of a completion's score, what rounding can explain), shared against plain."""
    filled, room = [], limit
    for group in sorted(groups[:256], key=group_length, reverse=True):  # a row of several
        if group_length(group) <= room and group is not longest:
            filled.append(group)
            room -= group_length(group)
    several = [longest, *filled]
    device = next(model.parameters()).device

    def on_device(batch):
        return {name: tensor.to(device) for name, tensor in batch.items()}

    sequences = [(prompt, completions[k]) for k in range(len(longest[1])) for prompt, completions in several]
    packed = lay_out(several, pad_token_id, [[0], list(range(1, len(several)))])
    with without_dropout(model):
        try:
            shared = score(model, on_device(packed))
        except Exception as error:  # whatever it is: whole sequences are what the model was made for
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise NotExact(f"{model.config.model_type} refuses packed rows: {reason}") from error
        plain = torch.cat([plain_score(model, on_device(collate([one], pad_token_id))) for one in sequences])
        together = torch.cat([plain_score(model, on_device(collate(sequences[i:i + 2], pad_token_id)))
                              for i in range(0, len(sequences), 2)])
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else next(model.parameters()).dtype
    size = plain.abs().max()
    noise = (together - plain).abs().max()  # of other shapes of the same sums, in this precision
    noise = torch.minimum(5 * noise, 0.02 * size)  # what is more than that is no rounding
    noise += max(1e-5, torch.finfo(dtype).eps) * size  # bfloat16: 0.8 %; seen 0.2 %, other shapes none
    return (shared - plain).abs().max().item(), noise.item()


@contextmanager
def without_dropout(model: nn.Module):
    """Train mode with nothing random in it."""
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in dropouts:
            module.p = p
