"""Loading: files, forms, the Hub, and what is said about bad input."""

from __future__ import annotations

import gzip
import json
import socket
import time
from pathlib import Path

import datasets
import pytest

from tralign_mini import data


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt="w3 w4", chosen="w5", rejected="w6") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def tldr_row(choice=1, **info) -> dict:
    return {"info": {"subreddit": "cats", "title": "A cat", "post": "My cat sat.", "article": None} | info,
            "summaries": [{"text": " Bad one. ", "policy": "x"}, {"text": "Good one.", "policy": "y"}],
            "choice": choice}


# ---------------------------------------------------------------- loading: files and forms


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet", "l.json"]
)
def test_every_kind_of_file_gives_the_same_rows_and_writes_nothing_beside_it(tmp_path, name):
    rows = [pair('Say "hi",\nplease é', " yes", ' no, "no"'), pair("second", " a", " b")]
    frame, path = datasets.Dataset.from_list(rows).to_pandas(), tmp_path / name
    compression = "gzip" if name.endswith(".gz") else None
    if ".csv" in name:
        frame.to_csv(path, index=False, compression=compression)
    elif name.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        as_list = name in ("a.json", "a.json.gz")  # l.json holds one object a line, as many .json files do
        frame.to_json(path, orient="records", lines=not as_list, compression=compression)
    dataset = data.load_dataset(path)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    assert dataset.to_list() == rows
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert not dataset.cache_files  # in memory: nothing in a cache folder either


@pytest.mark.parametrize(
    "text", ["prompt,chosen,rejected\na,b,c\n", '{"prompt": "a", "chosen": "b", "rejected": "c"}']
)
def test_byte_order_mark_of_windows_programs_is_not_data(tmp_path, text):
    path = tmp_path / ("a.csv" if text.startswith("prompt") else "a.jsonl")
    path.write_text(text, encoding="utf-8-sig")
    assert data.load_dataset(path).to_list() == [pair("a", "b", "c")]


def test_a_list_may_begin_with_blank_lines(tmp_path):
    (tmp_path / "a.json").write_text("\n\n  " + json.dumps([pair()], indent=1))
    assert data.load_dataset(tmp_path / "a.json").to_list() == [pair()]


def test_folder_has_its_files_as_splits(tmp_path):
    write(tmp_path / "train.jsonl", [pair("in train")])
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps(pair("in test")))
    (tmp_path / "README.md").write_text("not data")
    assert data.load_dataset(tmp_path)["prompt"] == ["in train"]
    assert data.load_dataset(str(tmp_path), split="test")["prompt"] == ["in test"]


def test_hh_prompt_ends_with_the_last_common_assistant_turn(tmp_path):
    path = write(tmp_path / "hh.jsonl", [
        {"chosen": hh("Hi", "Hello", "Cake?", "Yes"), "rejected": hh("Hi", "Hello", "Cake?", "No\n\nnever")},
        {"chosen": hh("Hi", "Hello", "Cake?", "Yes"), "rejected": hh("Hi", "Go away", "Cake?", "No")},
        {"chosen": hh("Hi", "Hello", "Cake?", "Yes"), "rejected": hh("Hi", "Hello")},
    ])
    dataset = data.load_dataset(path)
    assert dataset[0] == pair("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Cake?\n\nAssistant:", " Yes",
                              " No\n\nnever")
    assert dataset["prompt"][1:] == [None, None]


def test_tldr_raw_form(tmp_path):
    article = tldr_row(subreddit=None, post=None, article="News.")
    dataset = data.load_dataset(
        write(tmp_path / "c.jsonl", [tldr_row(post=" My cat sat.\n"), tldr_row(0), article]))
    prompt = "SUBREDDIT: r/cats\n\nTITLE: A cat\n\nPOST: My cat sat.\n\nTL;DR:"
    assert dataset[0] == pair(prompt, " Good one.", " Bad one.")
    assert dataset[1] == pair(prompt, " Bad one.", " Good one.")
    assert dataset["prompt"][2] == ""  # a news article is no Reddit post


def test_chat_forms(tmp_path):
    question = [message("system", "Be kind."), message("user", "Cake?")]
    yes, no = message("assistant", "Yes"), message("assistant", "No")
    expected = {"prompt": question, "chosen": [yes], "rejected": [no]}
    implicit = {"chosen": [*question, yes], "rejected": [*question, no]}
    ultrafeedback = implicit | {"prompt": "Cake?", "score_chosen": 8.0}
    for row in (expected, implicit, ultrafeedback):
        assert data.load_dataset(write(tmp_path / "c.jsonl", [row])).to_list() == [expected]
    differ = {"chosen": [question[1], yes, question[1], yes], "rejected": [question[1], no, question[1], yes]}
    assert data.load_dataset(write(tmp_path / "c.jsonl", [implicit, differ]))["prompt"] == [question, None]


def test_chat_prompt_is_the_one_that_trl_extracts(tmp_path):
    trl = pytest.importorskip("trl.data_utils")
    turns = [message("user", "Cake?"), message("assistant", "Which?"), message("user", "Plum.")]
    row = {"chosen": [*turns, message("assistant", "Yes")], "rejected": [*turns, message("assistant", "No")]}
    assert data.load_dataset(write(tmp_path / "c.jsonl", [row]))[0] == trl.extract_prompt(row)


def test_unpaired_and_demonstrations(tmp_path):
    rows = [{"prompt": "p", "completion": " c", "label": True},
            {"prompt": "p", "completion": " d", "label": False}]
    assert data.load_dataset(write(tmp_path / "u.jsonl", rows)).to_list() == rows
    datasets.Dataset.from_list(rows).to_pandas().to_csv(tmp_path / "u.csv", index=False)
    assert data.load_dataset(tmp_path / "u.csv").to_list() == rows
    rows = [{"prompt": "p", "completion": " c"}]
    assert data.load_dataset(write(tmp_path / "d.jsonl", rows)).to_list() == rows


def test_what_load_gives_can_be_saved_and_loaded_again(tmp_path):
    original = data.load_dataset(write(tmp_path / "a.jsonl", [
        {"chosen": hh("Hi", "Yes"), "rejected": hh("Hi", "No")},
        {"chosen": hh("Hi", "Yes"), "rejected": hh("Ho", "No")},
    ]))
    original.to_json(tmp_path / "b.jsonl")
    assert data.load_dataset(tmp_path / "b.jsonl").to_list() == original.to_list()


@pytest.mark.parametrize("name", ["little-tldr", "little-hh"])
def test_embedded_worlds_load_from_their_directory(tmp_path, monkeypatch, name):
    write(tmp_path / "test.jsonl", [pair(name)])
    monkeypatch.setattr(data, "data_directory", lambda world: tmp_path if world == name else None)
    assert data.load_dataset(name, split="test").to_list() == [pair(name)]


# ---------------------------------------------------------------- loading: the Hub


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("the network is off")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("name", "repository"), [
    ("hh", "Anthropic/hh-rlhf"),
    ("hh/helpful-online", "Anthropic/hh-rlhf"),
    ("tldr", "openai/summarize_from_feedback"),
    ("ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized"),
    ("nobody/nothing", "nobody/nothing"),
])
@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_a_hub_name_fails_at_once_and_says_what_to_do(
    no_network, monkeypatch, name, repository, offline
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    start = time.perf_counter()
    with pytest.raises(ConnectionError) as caught:
        data.load_dataset(name)
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    assert (repr(name) in text and repository in text and "data=path/to/file.jsonl.gz" in text
            and "little-tldr" in text)
    assert ("OfflineMode" if offline else "the network is off") in text


def fake_hub(monkeypatch, rows: list[dict]) -> list[dict]:
    """The Hub answers with these rows; returns the list of what it was asked for."""
    asked = []
    monkeypatch.setattr(data.HfApi, "dataset_info", lambda self, repository, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda **kw: asked.append(kw) or datasets.Dataset.from_list(rows))
    return asked


@pytest.mark.parametrize(("name", "split", "expected"), [
    ("hh", "test", {"path": "Anthropic/hh-rlhf", "split": "test", "data_files": {"test": [
        "harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz", "helpful-online/test.jsonl.gz",
        "helpful-rejection-sampled/test.jsonl.gz"]}}),
    ("hh/helpful-base", "train", {"path": "Anthropic/hh-rlhf", "split": "train",
                                  "data_files": {"train": ["helpful-base/train.jsonl.gz"]}}),
    ("tldr", "test", {"path": "openai/summarize_from_feedback", "revision": "refs/convert/parquet",
                      "split": "test", "data_files": {"test": ["comparisons/validation/*.parquet"]}}),
    ("ultrafeedback", "train", {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}),
    ("some/one", "validation", {"path": "some/one", "split": "validation"}),
])
def test_what_the_hub_is_asked_for(monkeypatch, name, split, expected):
    asked = fake_hub(monkeypatch, [pair() | {"score": 1.0}])
    assert data.load_dataset(name, split).to_list() == [pair()]
    assert asked == [expected]


def test_hub_rows_are_checked_like_those_of_a_file(monkeypatch):
    fake_hub(monkeypatch, [{"question": "a", "answer": "b"}])
    with pytest.raises(
        ValueError, match=r"some/one \(train\), row 1: found the columns question, answer; expected info, "):
        data.load_dataset("some/one")


def test_missing_split_of_the_hub_is_not_called_a_network_problem(monkeypatch):
    fake_hub(monkeypatch, [])

    def unknown(**_):
        raise ValueError('Unknown split "tset". Should be one of ["train", "test"].')

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(ValueError,
                       match=r"'some/one'.*split 'tset'.*Should be one of \[\"train\", \"test\"\]"):
        data.load_dataset("some/one", split="tset")


# ---------------------------------------------------------------- loading: bad input

CHAT = {
    "prompt": [message("user", "Cake?")],
    "chosen": [message("assistant", "Yes")],
    "rejected": [message("assistant", "No")],
}


@pytest.mark.parametrize(("text", "expected"), [
    ("", "a.jsonl is empty: expected rows with info, summaries, choice; or prompt, chosen, rejected; or"),
    ('{"prompt": "a", "chosen"\n', "row 1: not valid JSON"),
    (json.dumps(pair()) + "\n\n['x']\n", "row 3: not valid JSON"),
    ('["a", "b"]\n', "row 1: expected an object with named columns, found list ['a', 'b']"),
    ({"prompt": "a", "answer": "b"},
     "found the columns prompt, answer; expected info, summaries, choice; or"),
    ([pair(), {"prompt": "a", "chosen": "b"}],
     "row 2: found the columns prompt, chosen; the first row is prompt, "
     "chosen, rejected, so rejected is missing"),
    ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "label": True}],
     "row 2: found the columns prompt, completion, label; the first row is prompt, completion"),
    (pair(chosen=3), "row 1: chosen is int 3; expected text, or messages with role and content"),
    (pair(rejected=None), "row 1: rejected is empty (null)"),
    (pair(prompt=[]), "row 1: prompt is list []"),
    ([pair(), CHAT], "row 2: texts and chat messages are mixed"),
    (CHAT | {"prompt": "Cake?"},
     "prompt and chosen must both be texts or both be messages; found str and list"),
    (CHAT | {"chosen": "Yes"},
     "prompt and chosen must both be texts or both be messages; found list and str"),
    (CHAT | {"chosen": [{"role": "assistant"}]},
     "chosen has the message dict {'role': 'assistant'}; expected role and"),
    (CHAT | {"prompt": [{"content": "Cake?"}]},
     "prompt has the message dict {'content': 'Cake?'}; expected role and"),
    (CHAT | {"rejected": [message("user", "No")]}, "rejected must be one message with the role assistant"),
    (CHAT | {"prompt": [message("assistant", "Hm")]}, "prompt ends in a message of the assistant"),
    ({"chosen": [message("user", "Hi")], "rejected": [message("user", "Hi")]},
     "chosen ends in dict {'role': 'user'"),
    ({"chosen": hh("Hi", "Yes"), "rejected": CHAT["rejected"]},
     "chosen and rejected must both be texts or both be"),
    ({"chosen": "Yes", "rejected": "No"},
     "no row has a prompt. Without a column prompt, chosen and rejected must"),
    ({"prompt": "a", "completion": "b", "label": 1},
     "row 1: label is int 1; expected true (desirable) or false"),
    ({"prompt": "a", "completion": "b", "label": "yes"}, "row 1: label is str 'yes'"),
    (tldr_row(choice=2), "row 1: choice is int 2; expected 0 or 1"),
    (tldr_row(choice=True), "row 1: choice is bool True"),
    (tldr_row() | {"summaries": [{"text": "one"}]},
     "row 1: summaries is list [{'text': 'one'}]; expected two objects"),
    (tldr_row() | {"info": "A cat"}, "row 1: info is str 'A cat'; expected"),
    (tldr_row(title=None), "expected the texts subreddit, title and post"),
])
def test_bad_rows_say_file_row_found_and_expected(tmp_path, text, expected):
    path = tmp_path / "a.jsonl"
    rows = text if isinstance(text, list) else [text]
    path.write_text(text if isinstance(text, str) else "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError) as caught:
        data.load_dataset(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


TORN = gzip.compress(json.dumps(pair()).encode(), mtime=0)[:-12]  # as after a broken download


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.txt", b"hello", "unknown extension '.txt'; expected .jsonl, .jsonl.gz"),
    ("a.jsonl.gz", b"not gzip", "cannot be read as .jsonl.gz: Not a gzipped file"),
    ("a.jsonl.gz", TORN, "cannot be read as .jsonl.gz: Compressed file ended"),
    ("a.jsonl", b'{"prompt": "\xff"}', "is not UTF-8 ('utf-8' codec"),
    ("a.parquet", b"not parquet", "cannot be read as .parquet"),
    ("a.parquet", b"", "cannot be read as .parquet"),
    ("a.json", b'[{"prompt": 1}', "is not valid JSON"),
    ("a.json", b"[]", "is empty: expected rows with"),
    ("a.csv", b"prompt,chosen,rejected\n", "is empty: expected rows with"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c\na,b, no,c\n",
     "row 2 has not as many fields as the header (prompt, chosen, rejected): commas separate"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", "row 1 has not as many fields as the header"),
    ("a.jsonl", b'{"prompt": "a", "choosen": "b", "rejected": "c"}', "did you mean 'chosen' by 'choosen'?"),
    ("a.jsonl", b'{"prompt": "a", "chosen": null, "rejected": "c"}', "chosen is empty (null); expected"),
    ("a.csv", b"prompt,completion,label\na,b,maybe\n", "row 1: label is str 'maybe'; expected true"),
])
def test_bad_files_say_what_is_wrong(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        data.load_dataset(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize(("name", "error", "expected"), [
    ("hhh", ValueError, "Unknown data set 'hhh'; did you mean 'hh'?"),
    ("little-tdlr", ValueError, "did you mean 'little-tldr'?"),
    ("hh/harmles-base", ValueError, "did you mean 'hh/harmless-base'?"),
    ("???", ValueError, "Unknown data set '???'. Valid: hh, hh/harmless-base"),
    ("nowhere/pairs.jsonl", FileNotFoundError, "There is no file nowhere/pairs.jsonl"),
    ("./nowhere", FileNotFoundError, "There is no file nowhere"),
])
def test_unknown_names_and_paths(no_network, name, error, expected):
    with pytest.raises(error) as caught:
        data.load_dataset(name)
    assert expected in str(caught.value)


def test_missing_splits_say_what_there_is(tmp_path):
    path = write(tmp_path / "train.jsonl", [pair()])
    for source, expected in [
        (path, "has no split 'test': a single file is the split 'train' as a whole"),
        (tmp_path, "has no split 'test'; there is: train. Expected e.g. test.jsonl.gz"),
        ("tldr", "has no split 'tset'; it has 'train' and 'test'"),
    ]:
        with pytest.raises(ValueError, match=expected):
            data.load_dataset(source, split="tset" if source == "tldr" else "test")
    write(tmp_path / "train.json", [pair()])
    with pytest.raises(ValueError,
                       match="several files for the split 'train': train.json, train.jsonl; keep one"):
        data.load_dataset(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no split 'train'; there is: no file with one of .jsonl"):
        data.load_dataset(tmp_path / "empty")
