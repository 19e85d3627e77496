"""From texts to token ids: where a prompt ends, what is cut, where EOS stands, and what was dropped and why.

`tokenize` is the one function that decides the boundary between prompt and completion. Their ids are made
separately and concatenated: the prompt's tokens are a prefix by construction, the same for both answers.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import datasets
import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence

PAIRED_METHODS = ("dpo", "ipo", "orpo", "simpo", "reward")
METHODS = (*PAIRED_METHODS, "kto", "sft")
PARTS = ("prompt", "chosen", "rejected")


class Tokens(NamedTuple):
    """Token ids of a prompt and a completion; a complete completion ends in EOS, a truncated one has none."""

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt_truncated: bool
    completion_truncated: bool


def prompt_ids(tokenizer, prompt, max_prompt_tokens: int | None = None) -> list[int]:
    """Token ids of a prompt, the same in training and in sampling, cut on the left to `max_prompt_tokens`.

    A text gets BOS if the tokenizer adds one; messages go through the chat template up to the answer's begin.
    """
    if isinstance(prompt, str):
        ids = _ids(tokenizer, prompt)
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
            ids = [bos, *ids]
    else:
        ids = _ids(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True))
    return ids if max_prompt_tokens is None else _cut_left(ids, max_prompt_tokens, tokenizer.bos_token_id)


def tokenize(tokenizer, prompt, completion, *, max_prompt_tokens: int, max_completion_tokens: int) -> Tokens:
    """Token ids of prompt and completion (texts, or chat messages), cut to the two limits.

    A prompt loses tokens on the left (BOS stays), a completion on the right and what follows an EOS, such as
    a template's newline; EOS counts. ValueError for a tokenizer without EOS or a template that does not fit.
    """
    if min(max_prompt_tokens, max_completion_tokens) < 1:
        raise ValueError("max_prompt_tokens and max_completion_tokens must be at least 1; "
                         f"found {max_prompt_tokens} and {max_completion_tokens}.")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("The tokenizer has no EOS token, so no answer could end. Set tokenizer.eos_token.")
    before = prompt_ids(tokenizer, prompt)
    kept = _cut_left(before, max_prompt_tokens, tokenizer.bos_token_id)
    text = completion if isinstance(prompt, str) else _rendered_answer(tokenizer, prompt, completion)
    after = _continuation_ids(tokenizer, text)
    if eos in after:
        after = after[: after.index(eos)]
    truncated = len(after) + 1 > max_completion_tokens
    after = after[:max_completion_tokens] if truncated else [*after, eos]
    return Tokens(kept, after, len(kept) < len(before), truncated)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _cut_left(ids: list[int], limit: int, bos: int | None) -> list[int]:
    if len(ids) <= limit:
        return ids
    first = ids[:1] if ids[0] == bos else []
    return first + ids[len(ids) - (limit - len(first)) :]


def _continuation_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text that continues another, without the space that SentencePiece puts before every text."""
    if _prepends_space(tokenizer):
        newline = _ids(tokenizer, "\n")
        ids = _ids(tokenizer, "\n" + text)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
    return _ids(tokenizer, text)


@functools.lru_cache(maxsize=8)
def _prepends_space(tokenizer) -> bool:
    return tokenizer.decode(_ids(tokenizer, "a") + _ids(tokenizer, "a")) == "a a"


def _render(tokenizer, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError("The data are chat messages, but the tokenizer has no chat template. Use an "
                         "instruct model, set tokenizer.chat_template, or give the data as texts.")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"The chat template refuses a conversation of {roles}: {error}.") from error


def _rendered_answer(tokenizer, prompt: list[dict], completion: list[dict]) -> str:
    """What the template writes after the prompt: the answer and the template's end of a turn."""
    before = _render(tokenizer, prompt, add_generation_prompt=True)
    whole = _render(tokenizer, [*prompt, *completion])
    if not whole.startswith(before):
        raise ValueError("The chat template cannot be used for training: the rendered prompt, which ends in "
                         f"{before[-40:]!r}, is not the beginning of the rendered conversation, which has "
                         f"{whole[max(len(before) - 40, 0) : len(before)]!r} there. Set another template.")
    return whole[len(before) :]


# ---------------------------------------------------------------- a whole data set


@dataclass
class DataReport:
    """What became of a data set: rows in and out (kto makes two of a pair), dropped by reason, and of those
    that are kept the truncated ones and mean lengths in tokens."""

    method: str
    max_prompt_tokens: int
    max_completion_tokens: int
    rows_in: int = 0
    rows_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_completions: int = 0
    mean_tokens: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [("rows in", self.rows_in),
                 *((f"  dropped: {reason}", count) for reason, count in self.dropped.items()),
                 (f"rows out ({self.method})", self.rows_out),
                 (f"prompts cut to the last {self.max_prompt_tokens}", self.truncated_prompts),
                 (f"completions cut to the first {self.max_completion_tokens}", self.truncated_completions),
                 *((f"mean tokens, {part}", f"{mean:.1f}") for part, mean in self.mean_tokens.items())]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value:>8}" for label, value in lines)


def prepare(dataset: datasets.Dataset, tokenizer, *, method: str, max_prompt_tokens: int,
            max_completion_tokens: int) -> tuple[list[dict], DataReport]:
    """Tokenized rows for a method, and the report of what was dropped or truncated.

    Paired methods: prompt_ids, chosen_ids, rejected_ids. kto: prompt_ids, completion_ids, label. sft:
    prompt_ids, completion_ids, of the chosen or desirable completions. Raises ValueError if the data do not
    fit the method or no row is left.
    """
    columns = _columns_of(dataset, method)
    report = DataReport(method, max_prompt_tokens, max_completion_tokens, rows_in=len(dataset))
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
    rows, dropped, lengths = [], Counter(), defaultdict(list)
    for row in dataset.select_columns(columns):
        answers = _answers(row, method)
        reason = unusable(row["prompt"], answers)
        if not reason:
            tokens = {name: tokenize(tokenizer, row["prompt"], answer, **limits)
                      for name, answer in answers.items()}
            reason = _unusable_tokens(list(tokens.values()), tokenizer)
        if reason:
            dropped[reason] += 1
            continue
        first = next(iter(tokens.values()))
        report.truncated_prompts += first.prompt_truncated
        report.truncated_completions += sum(t.completion_truncated for t in tokens.values())
        completions = {name: t.completion_ids for name, t in tokens.items()}
        for part, ids in {"prompt": first.prompt_ids, **completions}.items():
            lengths[part].append(len(ids))
        prompt = {"prompt_ids": first.prompt_ids}
        if method in PAIRED_METHODS:
            rows.append(prompt | {f"{name}_ids": ids for name, ids in completions.items()})
        else:
            for name, ids in completions.items():
                label = {"label": name == "chosen"} if method == "kto" else {}
                rows.append(prompt | {"completion_ids": ids} | label)
    report.rows_out, report.dropped = len(rows), dict(dropped.most_common())
    report.mean_tokens = {part: sum(lengths[part]) / len(lengths[part]) for part in PARTS if part in lengths}
    if not rows:
        held_out = "" if len(dataset) else (" Is each prompt held out for evaluation? Give other prompts for "
                                            "that, eval_data=FOLDER with a file test.*, or here.")
        raise ValueError(f"No row is left to train on.{held_out}\n{report}")
    return rows, report


def _columns_of(dataset: datasets.Dataset, method: str) -> list[str]:
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    forms = [PARTS] if method in PAIRED_METHODS else [PARTS, ("prompt", "completion", "label")]
    forms += [("prompt", "completion")] if method == "sft" else []
    for columns in forms:
        if set(columns) <= set(dataset.column_names):
            return list(columns)
    raise ValueError(f"Method {method!r} needs the columns {', or '.join(map(', '.join, forms))}; found "
                     f"{', '.join(sorted(dataset.column_names))}. Use method=kto for completions with a "
                     "label, method=sft for demonstrations, or give pairs.")


def _answers(row: dict, method: str) -> dict:
    """The row's completions by name; one without a label is a demonstration, so it is `chosen`."""
    if "completion" in row:
        answers = {"chosen" if row.get("label", True) else "rejected": row["completion"]}
    else:
        answers = {"chosen": row["chosen"], "rejected": row["rejected"]}
    return {"chosen": answers.get("chosen")} if method == "sft" else answers


def unusable(prompt, answers: dict) -> str:
    """Why a row cannot be trained on, or ""."""
    if prompt is None:
        return "no shared prompt"
    if _is_blank(prompt):
        return "empty prompt"
    if answers.get("chosen", "") is None:
        return "undesirable (sft learns from label true)"
    if any(_is_blank(answer) for answer in answers.values()):
        return "empty answer"
    if len(answers) == 2 and answers["chosen"] == answers["rejected"]:
        return "identical pair"
    return ""


def _is_blank(content) -> bool:
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return not any(text.strip() for text in texts)


def _unusable_tokens(tokens: Sequence[Tokens], tokenizer) -> str:
    """Why a row cannot be trained on after truncation, or ""."""
    if set(tokens[0].prompt_ids) <= {tokenizer.bos_token_id}:
        return "prompt too long" if tokens[0].prompt_truncated else "empty prompt"
    if any(t.completion_ids == [tokenizer.eos_token_id] for t in tokens):
        return "empty answer"
    if len(tokens) == 2 and tokens[0].completion_ids == tokens[1].completion_ids:
        return "identical after truncation"
    return ""


def collate(sequences: Iterable[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A right-padded batch of (prompt_ids, completion_ids).

    input_ids, attention_mask: (n, L) int64; completion_mask: (n, L) bool, True on completion tokens and EOS.
    """
    sequences = list(sequences)
    rows = [torch.tensor([*prompt, *completion], dtype=torch.long) for prompt, completion in sequences]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    starts, ends = torch.tensor([[len(prompt) for prompt, _ in sequences], list(map(len, rows))])[..., None]
    places = torch.arange(input_ids.shape[1])
    return {"input_ids": input_ids, "attention_mask": (places < ends).long(),
            "completion_mask": (starts <= places) & (places < ends)}
