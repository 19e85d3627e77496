"""Log-probabilities of completions: the seam between model and loss, and the engine behind it.

Everything asks `completion_logps` (in training: `CompletionScorer`). It takes one of two batches, dicts of
tensors: whole sequences, padded on the right (`data.collate`),

    input_ids, attention_mask, completion_mask   (n, L); completion_mask: True on exactly the counted tokens,

or rows in which the completions of a prompt share it (`packing.pack`), so that it is computed once. Either
way the vocabulary projection, often a third of the work, runs only where a counted token is predicted.
`plain_completion_logps` is the same number straight from the model's logits: what tests hold the engine to.
"""

from __future__ import annotations

import math
import warnings
import weakref
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from .attention import by_flex, by_group, know_groups

LOGIT_BYTES = 2**27  # float32 logits held at once; with more, all parts but the last are computed twice
SEQUENCES = ("input_ids", "attention_mask", "completion_mask")


def completion_logps(model, batch, *, average=False) -> torch.Tensor:
    """log p(completion | prompt) of each completion, differentiable: (n,) float32, in nats.

    The sum over the completion's tokens or, with `average`, their mean; 0 for a completion without a token.
    `model` is a causal LM of transformers or a PeftModel; for packed rows `sharing.row_limit` says whether
    it can be exact. Its train/eval mode is left as it is, so dropout acts if it is on. ValueError for a batch
    whose masks contradict each other.
    """
    token_logps, counted = completion_token_logps(model, batch)
    return _per_completion(token_logps, counted, average)


def completion_token_logps(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by token: (tokens,), one completion after the other, and where they stand, (n, C) bool."""
    inputs, source, target, counted = predictions(model, batch)
    return _token_logps(model, inputs, source[counted], target[counted]), counted


def predictions(model, batch) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's inputs; then, (n, C): flat positions that predict, tokens predicted, which count."""
    refuse_virtual_tokens(model)
    if "position_ids" in batch:
        names = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        mask = shared_prompt_mask(model, batch["group"], batch["branch"], batch.get("spans"))
        inputs = names | {"attention_mask": mask}
        return inputs, batch["source"], batch["target"], batch["counted"]
    input_ids, attention_mask, completion_mask = checked(batch)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    # The token at t is predicted at t - 1: drop the first token and the last prediction
    places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    return inputs, places[:, :-1], input_ids[:, 1:], completion_mask[:, 1:]


def plain_completion_logps(model, batch, *, average=False) -> torch.Tensor:
    """`completion_logps` of whole sequences the plain way: all logits, one gather. Slow, easy to believe."""
    refuse_virtual_tokens(model)
    input_ids, attention_mask, completion_mask = checked(batch)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
    token_logps = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # (n, L - 1)
    counted = completion_mask[:, 1:]
    return _per_completion(token_logps[counted], counted, average)


class CompletionScorer(nn.Module):
    """A causal LM whose `forward(**batch)` *is* `completion_logps`: the module to hand to Trainer.

    score: another function of model and batch instead; for a reward model it is `reward.completion_rewards`.

    DDP and FSDP exchange gradients and gather weights in hooks around the `forward` of the module they wrap.
    Log-probs computed beside it, on the model inside, would skip these hooks: the processes drift apart.
    """

    def __init__(self, model: nn.Module, *, average: bool = False, score=None):
        super().__init__()
        self.model = model
        self.score = score or partial(completion_logps, average=average)

    def forward(self, **batch) -> torch.Tensor:
        return self.score(self.model, batch)


def shared_prompt_mask(model, group: torch.Tensor, branch: torch.Tensor, spans: torch.Tensor | None = None):
    """Who sees whom in packed rows, for the attention that `model` uses.

    group, branch: (rows, L), and spans, as in `packing.pack`. A token sees what came before it in its own
    group: the prompt (branch 0) and its own completion, never another one. SDPA gets (rows, 1, L, L), True
    where position i (of the L before last) sees j; eager attention adds its mask to the scores, so it gets 0
    and the lowest number instead; FlexAttention gets the same rule as a block mask, and skips blocks in which
    nobody sees any.
    """
    rows, length = group.shape
    if by_flex(model):
        def sees(row, head, i, j):
            mine = (branch[row, j] == 0) | (branch[row, j] == branch[row, i])
            return (i >= j) & (group[row, i] == group[row, j]) & mine

        mask = create_block_mask(sees, rows, None, length, length, device=group.device)
        mask.ndim = 4  # which GPT-2 asks for
        return mask
    causal = torch.ones(length, length, dtype=torch.bool, device=group.device).tril()
    same_group = group[:, :, None] == group[:, None, :]
    mine = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    allowed = (causal & same_group & mine)[:, None]
    if model.config._attn_implementation != "eager":
        return know_groups(allowed, spans) if spans is not None and by_group(model) else allowed
    dtype = next(model.parameters()).dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def _per_completion(token_logps, counted, average):
    """Sums (or means) of tokens, (tokens,), that stand one after the other where `counted`, (n, C)."""
    sums = token_logps.new_zeros(counted.shape).masked_scatter(counted, token_logps).sum(-1)
    return sums / counted.sum(-1).clamp(min=1) if average else sums


def _token_logps(model, inputs: dict, source, target) -> torch.Tensor:
    """log p of the tokens `target`, (tokens,), each predicted at the flat position `source` of the rows."""
    parts = _backbone_and_head(model)
    if parts is None:  # an architecture that does something else to its logits: only the model itself knows
        logits = model(**inputs, use_cache=False).logits
        return _log_softmax_at(logits.flatten(0, 1)[source], target)
    backbone, head, softcap = parts
    hidden = backbone(**inputs, use_cache=False)[0].flatten(0, 1).index_select(0, source)  # (tokens, hidden)

    def project(hidden, target):
        return _log_softmax_at(_capped(head(hidden), softcap), target)

    at_once = max(1, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size))
    parts = max(1, math.ceil(len(target) / at_once))
    *chunks, last = zip(hidden.chunk(parts), target.chunk(parts))
    # The last is at hand when backward begins, so keeping it does not raise the peak
    done = [checkpoint(project, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([*done, project(*last)])


def _log_softmax_at(logits, target):
    return _LogSoftmaxAt.apply(logits.float(), target)


class _LogSoftmaxAt(torch.autograd.Function):
    """`-F.cross_entropy(logits, target, reduction="none")` in the memory of the logits, which are lost."""

    @staticmethod
    def forward(ctx, logits, target):
        logps = torch.log_softmax(logits, -1, out=logits)
        ctx.save_for_backward(logps, target)
        return logps.gather(-1, target[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logps, target = ctx.saved_tensors
        grad = grad[:, None]
        logits_grad = logps.exp_().mul_(-grad)  # in place, too: autograd refuses a second pass backward
        return logits_grad.scatter_add_(-1, target[:, None], grad), None


def _capped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


_KNOWN = weakref.WeakKeyDictionary()  # model -> the head that was watched


def _backbone_and_head(model):
    """(backbone, head, softcap) such that head(backbone(...)), softcapped, *is* the model's logits; or None.

    Found out once for each model and head, by watching it predict after one token: the head has to get the
    backbone's output, and nothing but Gemma 2's softcap may happen to what the head returns.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else causal_lm
    head = causal_lm.get_output_embeddings() if hasattr(causal_lm, "get_output_embeddings") else None
    if head is None or backbone is causal_lm:
        return None
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    watched, known = _KNOWN.get(model, (None, False))
    if watched is not head:
        known = _is_all_there_is(model, backbone, head, softcap)
        _KNOWN[model] = head, known
        if not known:
            warnings.warn(f"{type(causal_lm).__name__} does more to its logits than one projection: all of "
                          "them are computed, where no completion token is predicted, too. This takes "
                          "time and memory.",
                          stacklevel=3)
    return (backbone, head, softcap) if known else None


@torch.no_grad()
def _is_all_there_is(model, backbone, head, softcap) -> bool:
    seen = {}
    hooks = [backbone.register_forward_hook(lambda module, args, out: seen.update(hidden=out[0])),
             head.register_forward_hook(lambda module, args, out: seen.update(input=args[0], output=out))]
    try:
        token = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        devices = [token.device] if token.is_cuda else []
        with torch.random.fork_rng(devices):  # a resumed run asks later: no dropout may draw from its numbers
            logits = model(input_ids=token, attention_mask=token, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return (seen.keys() == {"hidden", "input", "output"} and torch.equal(seen["hidden"], seen["input"])
            and torch.equal(_capped(seen["output"], softcap), logits))


def refuse_virtual_tokens(model) -> None:
    """ValueError for prompt and prefix tuning: what they put before a text would be left out, silently."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"the adapter is one of {model.active_peft_config.peft_type.value}, whose virtual "
                         "tokens are neither scored nor sampled here. Use LoRA.")


def checked(batch):
    """input_ids, attention_mask, completion_mask (bool), of a batch that can only mean one thing."""
    if missing := [name for name in SEQUENCES if name not in batch]:
        raise ValueError(f"the batch has no {', '.join(missing)}. It needs {', '.join(SEQUENCES)}, each of "
                         "shape (sequences, length): collate makes them.")
    input_ids, attention_mask, completion_mask = (batch[name] for name in SEQUENCES)
    if input_ids.ndim != 2 or not input_ids.shape == attention_mask.shape == completion_mask.shape:
        shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in SEQUENCES)
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
