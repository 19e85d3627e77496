"""Token boundaries, truncation, EOS, chat templates, the report, collation; the real HH file if there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch
from helpers import EOS, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tralign_mini import data

SHARED = Path(__file__).parents[2] / "shared" / "data"
LIMITS = {"max_prompt_tokens": 100, "max_completion_tokens": 100}
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer(*, bos: bool = False, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, so that any text is encoded and decoded exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("a", "b"), ("Ċ", "Ċ"), ("h", "e"), ("Ġ", "Ġ")]
    vocabulary = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<s>", "<|im_start|>", "<|im_end|>", "<pad>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <|im_end|>",
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "<|im_end|>")],
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>",
                                   pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 does it: a space before every text, spaces written ▁, unknown characters as bytes."""
    tokens = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc:", "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, byte_fallback=True,
                       fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


PLAIN, WITH_BOS = byte_tokenizer(), byte_tokenizer(bos=True)


def pair(prompt="w3 w4", chosen="w5", rejected="w6") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- tokenize

texts = st.text(alphabet=st.sampled_from("ab he\n:.é漢🙂"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(prompt=texts, completion=texts, max_prompt=st.integers(1, 30), max_completion=st.integers(1, 30),
       bos=st.booleans())
def test_boundaries_lengths_and_eos_for_any_text(prompt, completion, max_prompt, max_completion, bos):
    tokenizer = WITH_BOS if bos else PLAIN
    limits = {"max_prompt_tokens": max_prompt, "max_completion_tokens": max_completion}
    tokens = data.tokenize(tokenizer, prompt, completion, **limits)
    untruncated = data.tokenize(tokenizer, prompt, completion, max_prompt_tokens=999,
                                max_completion_tokens=999)
    eos = tokenizer.eos_token_id
    # lengths bounded, flags true exactly when something was cut
    assert len(tokens.prompt_ids) <= max_prompt and len(tokens.completion_ids) <= max_completion
    assert tokens.prompt_truncated == (len(untruncated.prompt_ids) > max_prompt)
    assert tokens.completion_truncated == (len(untruncated.completion_ids) > max_completion)
    # exactly one EOS, at the end, if and only if complete
    assert tokens.completion_ids.count(eos) == (not tokens.completion_truncated)
    assert tokens.completion_truncated or tokens.completion_ids[-1] == eos
    assert eos not in tokens.prompt_ids
    # a prompt keeps its end, a completion its beginning, BOS its place
    start = [tokenizer.bos_token_id] if bos else []
    assert tokens.prompt_ids[: len(start)] == start
    kept = tokens.prompt_ids[len(start) :]
    assert kept == untruncated.prompt_ids[len(untruncated.prompt_ids) - len(kept) :]
    assert tokens.completion_ids == untruncated.completion_ids[: len(tokens.completion_ids)]
    # the prompt's ids are those of the prompt alone, and everything decodes to the text
    assert tokens.prompt_ids == data.prompt_ids(tokenizer, prompt, max_prompt)
    assert tokenizer.decode(untruncated.prompt_ids[len(start) :]) == prompt
    everything = untruncated.prompt_ids[len(start) :] + untruncated.completion_ids[:-1]
    assert tokenizer.decode(everything) == prompt + completion


def test_text_by_hand():
    tokenizer = tiny_tokenizer()
    tokens = data.tokenize(tokenizer, "w3 w4 w5", "w6 w7", max_prompt_tokens=2, max_completion_tokens=3)
    assert tokens == ([4, 5], [6, 7, EOS], True, False)
    tokens = data.tokenize(tokenizer, "w3 w4 w5", "w6 w7", max_prompt_tokens=3, max_completion_tokens=2)
    assert tokens == ([3, 4, 5], [6, 7], False, True)  # both words fit, but EOS does not: truncated
    tokens = data.tokenize(tokenizer, "w3", "w6 <eos> w7", **LIMITS)
    assert tokens == ([3], [6, EOS], False, False)  # not a second EOS, and nothing after the first


def test_bos_is_added_once_and_only_by_tokenizers_that_add_it():
    bos, tokenize = (WITH_BOS.bos_token_id,
                     lambda *a: data.tokenize(*a, max_prompt_tokens=3, max_completion_tokens=9))
    a = PLAIN.convert_tokens_to_ids("a")
    assert tokenize(WITH_BOS, "aaaa", "a").prompt_ids == [bos, a, a]
    assert tokenize(WITH_BOS, "<s>aaaa", "a").prompt_ids == [bos, a, a]
    assert tokenize(WITH_BOS, "<s>a", "a").prompt_ids == [bos, a]
    assert tokenize(PLAIN, "aaaa", "a").prompt_ids == [a, a, a]
    assert bos not in tokenize(WITH_BOS, "aaaa", "a").completion_ids


def test_sentencepiece_adds_no_space_between_prompt_and_completion():
    tokenizer = sentencepiece_tokenizer()
    assert len(tokenizer("a", add_special_tokens=False)["input_ids"]) == 1  # it is "▁a"
    for completion in (" a b", "a", "\na", " é"):
        tokens = data.tokenize(tokenizer, "b:", completion, **LIMITS)
        assert tokenizer.decode(tokens.prompt_ids + tokens.completion_ids[:-1]) == "b:" + completion
    a, b = tokenizer.convert_tokens_to_ids(["▁a", "▁b"])
    assert data.tokenize(tokenizer, "b:", " a b", **LIMITS).completion_ids == [a, b, tokenizer.eos_token_id]


@settings(max_examples=50, deadline=None)
@given(question=texts, answer=texts)
def test_chat_is_what_the_template_renders_up_to_the_first_eos(question, answer):
    prompt, completion = [message("user", question)], [message("assistant", answer)]
    tokens = data.tokenize(WITH_BOS, prompt, completion, max_prompt_tokens=999, max_completion_tokens=999)
    rendered = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert WITH_BOS.decode(tokens.prompt_ids) == rendered
    assert WITH_BOS.decode(tokens.completion_ids) == answer + "<|im_end|>"  # the template's newline is cut
    assert tokens.completion_ids.count(WITH_BOS.eos_token_id) == 1
    assert WITH_BOS.bos_token_id not in tokens.prompt_ids  # the template decides, and this one writes none


def test_chat_template_with_its_own_bos_keeps_it_when_truncated():
    tokenizer = byte_tokenizer(bos=True, chat_template="{{ bos_token }}" + CHATML)
    prompt = [message("user", "aaaaaa")]
    assert data.prompt_ids(tokenizer, prompt).count(tokenizer.bos_token_id) == 1
    tokens = data.tokenize(tokenizer, prompt, [message("assistant", "a")], max_prompt_tokens=4,
                           max_completion_tokens=9)
    assert tokens.prompt_truncated and tokens.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens.prompt_ids[1:]) == "nt\n"


def test_template_that_ends_a_turn_without_eos_still_gets_one():
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>", "<end>"))
    tokens = data.tokenize(tokenizer, [message("user", "a")], [message("assistant", "b")], **LIMITS)
    assert tokenizer.decode(tokens.completion_ids) == "b<end>\n<|im_end|>"


@pytest.mark.parametrize(("template", "expected"), [
    (None, "the tokenizer has no chat template"),
    ("{{ raise_exception('only odd turns') }}", "refuses a conversation of user: only odd turns"),
    ("{% if add_generation_prompt %}X{% endif %}{{ messages[-1]['content'] }}",
     "is not the beginning of the rendered"),
])
def test_bad_chat_templates(template, expected):
    with pytest.raises(ValueError, match=expected):
        tokenizer = byte_tokenizer(chat_template=template)
        data.tokenize(tokenizer, [message("user", "Cake?")], [message("assistant", "Yes")], **LIMITS)


def test_bad_limits_and_a_tokenizer_without_eos():
    with pytest.raises(ValueError, match="must be at least 1; found 0 and 5"):
        data.tokenize(PLAIN, "a", "b", max_prompt_tokens=0, max_completion_tokens=5)
    with pytest.raises(ValueError, match="must be at least 1; found 5 and -1"):
        data.tokenize(PLAIN, "a", "b", max_prompt_tokens=5, max_completion_tokens=-1)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        data.tokenize(tokenizer, "w3", "w4", **LIMITS)


# ---------------------------------------------------------------- prepare and its report


def mixed() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            pair("w3 w4 w5 w6", "w7", "w8 w9"),  # good; the prompt is cut
            pair("w3", "w7 w8 w9 w10", "w8"),  # good; one completion is cut
            pair(None, "w3 w7", "w4 w8"),
            pair("  ", "w7", "w8"),
            pair("w3", " ", "w8"),
            pair("w3", "w7", "\n"),
            pair("w3", "w7", "w7"),
            pair("w3", "w7 w8 w9 w10", "w7 w8 w9 w11"),
        ]
    )


SMALL = {"max_prompt_tokens": 3, "max_completion_tokens": 3}
DROPPED = {
    "empty answer": 2,
    "no shared prompt": 1,
    "empty prompt": 1,
    "identical pair": 1,
    "identical after truncation": 1,
}


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo"])
def test_prepare_pairs_by_hand(method):
    rows, report = data.prepare(mixed(), tiny_tokenizer(), method=method, **SMALL)
    assert rows == [{"prompt_ids": [4, 5, 6], "chosen_ids": [7, EOS], "rejected_ids": [8, 9, EOS]},
                    {"prompt_ids": [3], "chosen_ids": [7, 8, 9], "rejected_ids": [8, EOS]}]
    assert report.to_dict() == {"method": method, **SMALL, "rows_in": 8, "rows_out": 2, "dropped": DROPPED,
                                "truncated_prompts": 1, "truncated_completions": 1,
                                "mean_tokens": {"prompt": 2.0, "chosen": 2.5, "rejected": 2.5}}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_report_is_a_table_with_every_count():
    _, report = data.prepare(mixed(), tiny_tokenizer(), method="dpo", **SMALL)
    table = dict(line.rsplit(maxsplit=1) for line in str(report).splitlines())
    assert {key.strip(): value for key, value in table.items()} == {
        "rows in": "8", **{f"dropped: {reason}": str(n) for reason, n in DROPPED.items()},
        "rows out (dpo)": "2", "prompts cut to the last 3": "1", "completions cut to the first 3": "1",
        "mean tokens, prompt": "2.0", "mean tokens, chosen": "2.5", "mean tokens, rejected": "2.5"}


def test_kto_makes_two_rows_of_a_pair():
    rows, report = data.prepare(mixed(), tiny_tokenizer(), method="kto", **SMALL)
    assert rows[:2] == [{"prompt_ids": [4, 5, 6], "completion_ids": [7, EOS], "label": True},
                        {"prompt_ids": [4, 5, 6], "completion_ids": [8, 9, EOS], "label": False}]
    assert (report.rows_in, report.rows_out, report.dropped) == (8, 4, DROPPED)
    assert (report.truncated_prompts, report.truncated_completions) == (1, 1)


def unpaired() -> datasets.Dataset:
    return datasets.Dataset.from_list([
        {"prompt": "w3", "completion": "w4", "label": True},
        {"prompt": "w3", "completion": "w5 w6", "label": False},
        {"prompt": "w3", "completion": " ", "label": True},
    ])


def test_unpaired_data_for_kto_and_sft():
    rows, report = data.prepare(unpaired(), tiny_tokenizer(), method="kto", **LIMITS)
    assert rows == [{"prompt_ids": [3], "completion_ids": [4, EOS], "label": True},
                    {"prompt_ids": [3], "completion_ids": [5, 6, EOS], "label": False}]
    assert (report.dropped, report.mean_tokens) == (
        {"empty answer": 1}, {"prompt": 1.0, "chosen": 2.0, "rejected": 3.0})
    rows, report = data.prepare(unpaired(), tiny_tokenizer(), method="sft", **LIMITS)
    assert rows == [{"prompt_ids": [3], "completion_ids": [4, EOS]}]
    assert report.dropped == {"undesirable (sft learns from label true)": 1, "empty answer": 1}


def test_sft_takes_the_chosen_completion_or_the_demonstration():
    good = {"prompt_ids": [3], "completion_ids": [4, EOS]}
    pairs = datasets.Dataset.from_list([pair("w3", "w4", " "), pair("w3", "w4", "w4"), pair("w3", " ", "w4")])
    rows, report = data.prepare(pairs, tiny_tokenizer(), method="sft", **LIMITS)
    assert rows == [good, good]  # the rejected one does not matter to SFT
    assert report.dropped == {"empty answer": 1}
    rows, _ = data.prepare(unpaired().remove_columns("label").select([0]), tiny_tokenizer(), method="sft",
                           **LIMITS)
    assert rows == [good]


def test_a_prompt_of_which_only_bos_is_left_is_too_long():
    dataset = datasets.Dataset.from_list([pair("aa", "a", "b"), pair("\n", "a", "b")])
    with pytest.raises(ValueError, match=r"(?s)No row is left.*prompt too long +1.*empty prompt +1"):
        data.prepare(dataset, WITH_BOS, method="dpo", max_prompt_tokens=1, max_completion_tokens=5)


def test_an_answer_of_which_no_token_is_left_is_empty():
    dataset = datasets.Dataset.from_list([pair("w3", "<eos> w5", "w4"), pair("w3", "w4", "w5")])
    rows, report = data.prepare(dataset, tiny_tokenizer(), method="dpo", **LIMITS)
    assert (len(rows), report.dropped) == (1, {"empty answer": 1})


def test_chat_rows_are_judged_by_their_content():
    yes, no, blank = ([message("assistant", text)] for text in ("Yes", "No", " "))
    prompt = [message("user", "Cake?")]
    rows = [pair(prompt, yes, no), pair(prompt, blank, no), pair(prompt, yes, yes),
            pair([message("user", "")], yes, no)]
    rows, report = data.prepare(datasets.Dataset.from_list(rows), PLAIN, method="dpo", **LIMITS)
    assert PLAIN.decode(rows[0]["chosen_ids"]) == "Yes<|im_end|>"
    assert (len(rows), report.dropped) == (1, {"empty answer": 1, "identical pair": 1, "empty prompt": 1})


def test_method_and_columns_that_do_not_fit():
    def prepare(dataset, method):
        return data.prepare(dataset, tiny_tokenizer(), method=method, **LIMITS)

    with pytest.raises(ValueError,
                       match="Unknown method 'ppo'; expected one of dpo, ipo, orpo, simpo, reward, kto, sft"):
        prepare(mixed(), "ppo")
    with pytest.raises(ValueError,
                       match=r"'dpo' needs .*rejected; found completion, label, prompt.*Use method=kto"):
        prepare(unpaired(), "dpo")
    with pytest.raises(
        ValueError, match="'kto' needs the columns prompt, chosen, rejected, or prompt, completion, label"):
        prepare(unpaired().remove_columns("label"), "kto")
    with pytest.raises(ValueError,
                       match=r"(?s)No row is left to train on\.\nrows in +1\n  dropped: identical pair +1"):
        prepare(mixed().select([6]), "dpo")


# ---------------------------------------------------------------- collate


def test_collate_pads_on_the_right_and_marks_completions():
    batch = data.collate([([5, 6], [7, EOS]), ([5], [8]), ([5], [8, 9, 10, EOS])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 8, 0, 0, 0], [5, 8, 9, 10, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [
        [False, False, True, True, False],
        [False, True, False, False, False],
        [False, True, True, True, True],
    ]
    assert [batch[key].dtype for key in ("input_ids", "attention_mask", "completion_mask")] == [
        torch.int64, torch.int64, torch.bool]


# ---------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def real():
    files = SHARED / "hh_harmless_base_test.jsonl.gz", SHARED / "gpt_neox_20b_tokenizer.json"
    if missing := [file.name for file in files if not file.exists()]:
        pytest.skip(f"the real data are not beside the project: {', '.join(missing)}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(files[1]), eos_token="<|endoftext|>",
                                        bos_token="<|endoftext|>")
    return data.load_dataset(files[0]), tokenizer


def test_real_hh_file(real):
    dataset, tokenizer = real
    rows, report = data.prepare(dataset, tokenizer, method="dpo", max_prompt_tokens=9999,
                                max_completion_tokens=9999)
    assert (report.rows_in, report.rows_out) == (2312, 2303)
    assert report.dropped == {"no shared prompt": 5, "empty answer": 4}
    assert (report.truncated_prompts, report.truncated_completions) == (0, 0)
    without_eos = {part: mean - (part != "prompt") for part, mean in report.mean_tokens.items()}
    assert {part: round(mean) for part, mean in without_eos.items()} == {
        "prompt": 125, "chosen": 40, "rejected": 50}

    raw = [json.loads(line)
           for line in gzip.open(SHARED / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8")]
    usable = [pair for pair, prompt, chosen in zip(raw, dataset["prompt"], dataset["chosen"], strict=True)
              if prompt is not None and chosen.strip()]
    for original, row in zip(usable, rows, strict=True):
        for part in ("chosen", "rejected"):
            assert (
                tokenizer.decode(row["prompt_ids"] + row[f"{part}_ids"]) == original[part] + "<|endoftext|>")


def test_real_hh_file_truncated(real):
    dataset, tokenizer = real
    rows, report = data.prepare(dataset.select(range(300)), tokenizer, method="dpo", max_prompt_tokens=64,
                                max_completion_tokens=32)
    complete = sum(row[part][-1] == tokenizer.eos_token_id for row in rows
                   for part in ("chosen_ids", "rejected_ids"))
    assert complete + report.truncated_completions == 2 * len(rows)
    assert sum(len(row["prompt_ids"]) == 64 for row in rows) >= report.truncated_prompts > 0
    assert max(len(row["prompt_ids"]) for row in rows) == 64
    # cut on the left: what precedes the answer is still there
    assert all(tokenizer.decode(row["prompt_ids"]).endswith("\n\nAssistant:") for row in rows)
