"""Attention group by group in packed rows on a CPU: most of what the mask rules out is not computed.

torch's CPU kernel goes through all of a row for every token, also through the half that comes later and the
other groups. So rows have to be short, and short rows of different lengths hold padding. Here a group is cut
into pieces, each of which attends to its own group, up to the piece's end: rows may be long, with little
padding. benchmarks/README.md says what it gains.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

LEAST_WIDTH = 256  # hidden size; in smaller models the many small calls cost more than they save
PIECE = 192  # tokens; shorter pieces skip more of the later half and cost more calls


def by_group(model) -> bool:
    """Whether attention of this model goes group by group where a mask knows its groups."""
    config = model.config.get_text_config()
    attention, device = getattr(model.config, "_attn_implementation", None), next(model.parameters()).device
    return attention == "sdpa" and device.type == "cpu" and config.hidden_size >= LEAST_WIDTH


def by_flex(model) -> bool:
    """Whether packed rows of this model take FlexAttention, whatever it takes for whole sequences."""
    loaded_with = model.config._attn_implementation
    return loaded_with == "flex_attention" or getattr(model, "flex_for_packed_rows", False)


def set_flex(models, on: bool) -> None:
    """Packed rows of these models (loaded with SDPA) take FlexAttention from now on, or SDPA again."""
    for model in models:
        model.flex_for_packed_rows = on


def know_groups(mask: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """The mask (rows, 1, L, L) with what `attend` needs to go group by group; spans: `packing.lay_out`."""
    mask.pieces = [[] for _ in mask]  # of each row: (where its group begins, where it begins, where it ends)
    for row, length in spans.tolist():
        pieces = mask.pieces[row]
        group, number = pieces[-1][2] if pieces else 0, math.ceil(length / PIECE)
        cuts = [group + length * i // number for i in range(number + 1)]
        pieces += [(group, begin, end) for begin, end in pairwise(cuts)]
    return mask


def attend(module, query, key, value, attention_mask, **options):
    """transformers' attention by SDPA, (rows, heads, L, size) -> (rows, L, heads, size), and in its place:
    FlexAttention for a block mask; where a mask knows its groups, piece by piece. A model that loses the
    groups has the mask.
    """
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)
    rows = getattr(attention_mask, "pieces", None)
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    options["is_causal"] = False  # the mask says who sees whom
    queries = [(row, begin, end) for row, pieces in enumerate(rows) for _, begin, end in pieces]
    keys = [(row, group, end) for row, pieces in enumerate(rows) for group, _, end in pieces]
    windows = zip(_Windows.apply(query, queries), _Windows.apply(key, keys), _Windows.apply(value, keys))
    out = []
    for row, pieces in enumerate(rows):
        for (group, begin, end), (q, k, v) in zip(pieces, windows):
            allowed = attention_mask[row : row + 1, :, begin:end, group:end]
            out.append(sdpa_attention_forward(module, q, k, v, allowed, **options)[0])
        out.append(out[0].new_zeros(1, query.shape[2] - end, *out[0].shape[2:]))  # padding
    return torch.cat(out, 1).view(len(query), -1, *out[0].shape[2:]), None


class _Windows(torch.autograd.Function):
    """tensor[row, :, begin:end] of each window, (1, heads, tokens, size): views, which may overlap.

    As slices, each would get a gradient as large as the tensor, most of it zeros.
    """

    @staticmethod
    def forward(ctx, tensor, windows):
        ctx.shape, ctx.windows = tensor.shape, windows
        return tuple(tensor[row : row + 1, :, begin:end] for row, begin, end in windows)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        total = grads[0].new_zeros(ctx.shape)
        for (row, begin, end), grad in zip(ctx.windows, grads):
            total[row : row + 1, :, begin:end] += grad
        return total, None


AttentionInterface.register("sdpa", attend)
