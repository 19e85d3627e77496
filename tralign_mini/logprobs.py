"""Log-probabilities of completions, the plain way: a forward pass over whole sequences and one gather.

This is the seam between model and loss. Everything asks `completion_logps` (in training: `CompletionScorer`),
so that a faster way to the same numbers has one place to go.

A batch is a dict of tensors of shape (n, L), padded on the right:
    input_ids        prompt, completion, padding
    attention_mask   1 on prompt and completion, 0 on padding
    completion_mask  True on the completion's tokens, EOS included: exactly these are counted
"""

from __future__ import annotations

import torch
from torch import nn


def completion_logps(model, batch, *, average=False) -> torch.Tensor:
    """log p(completion | prompt) of each row, differentiable: (n,) float32, in nats.

    The sum over the completion's tokens or, with `average`, their mean; 0 for a row without a completion
    token. `model` is a causal LM of transformers or a PeftModel. Its train/eval mode is left as it is, so
    dropout acts if it is on. ValueError for a batch whose masks contradict each other.
    """
    input_ids, attention_mask, completion_mask = _checked(batch)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    # The token at t is predicted at t - 1: drop the last prediction and the first token
    counted = completion_mask[:, 1:]  # (n, L - 1)
    targets = input_ids[:, 1:][counted]  # (tokens,): the counted tokens of all rows, one after the other
    # Only these rows of logits become float32, and their softmax is never stored
    logits = logits[:, :-1][counted].float()  # (tokens, vocabulary)
    token_logps = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    sums = token_logps.new_zeros(counted.shape).masked_scatter(counted, token_logps).sum(-1)
    return sums / counted.sum(-1).clamp(min=1) if average else sums


class CompletionScorer(nn.Module):
    """A causal LM whose `forward(**batch)` *is* `completion_logps`: the module to hand to Trainer.

    DDP and FSDP exchange gradients and gather weights in hooks around the `forward` of the module they wrap.
    Log-probs computed beside it, on the model inside, would skip these hooks: the processes drift apart.
    """

    def __init__(self, model: nn.Module, *, average: bool = False):
        super().__init__()
        self.model = model
        self.average = average

    def forward(self, **batch) -> torch.Tensor:
        return completion_logps(self.model, batch, average=self.average)


def _checked(batch):
    """input_ids, attention_mask, completion_mask (bool), of a batch that can only mean one thing."""
    names = ("input_ids", "attention_mask", "completion_mask")
    if missing := [name for name in names if name not in batch]:
        raise ValueError(f"the batch has no {', '.join(missing)}. It needs {', '.join(names)}, each of shape "
                         "(sequences, length): collate makes them.")
    input_ids, attention_mask, completion_mask = (batch[name] for name in names)
    if input_ids.ndim != 2 or not input_ids.shape == attention_mask.shape == completion_mask.shape:
        shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in names)
        raise ValueError(f"the batch has {shapes}, but all three need one shape (sequences, length), so that "
                         "each token has its masks. Collate makes them.")
    attended, completion_mask = attention_mask.bool(), completion_mask.bool()
    if completion_mask[:, :1].any():
        raise ValueError("completion_mask is True at position 0, but nothing predicts the first token of a "
                         "sequence. Give every prompt at least one token (BOS or EOS if it is empty).")
    if (completion_mask & ~attended).any():
        raise ValueError("completion_mask is True where attention_mask is 0: padding would count as text. "
                         "Make both masks from the same lengths, as collate does.")
    if (attended[:, 1:] & ~attended[:, :-1]).any():
        raise ValueError("attention_mask goes from 0 to 1 within a row: padding on the left or inside shifts "
                         "the positions the model sees. Pad on the right, as collate does.")
    return input_ids, attention_mask, completion_mask
