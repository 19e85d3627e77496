"""The reward model: read at the last token, exact in packed rows, an ordinary classifier on disk."""

from __future__ import annotations

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from engine_helpers import assert_same_gradients, gradients_of, packed, random_groups, sequences_of, weighted
from helpers import (
    EOS,
    PAD,
    assert_close,
    make_trainer,
    metrics,
    random_rows,
    run_once,
    tiny_llama,
    tiny_neox,
    tiny_run,
    weights,
    write_model,
)
from hypothesis import given
from hypothesis import strategies as st
from lora_helpers import adapted, lora_layers
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import tralign_mini as tr
from tralign_mini import models
from tralign_mini.batches import group_of
from tralign_mini.checkpoint import checkpoints
from tralign_mini.data import collate, tokenize
from tralign_mini.losses import bradley_terry_loss
from tralign_mini.reward import REWARDS, calibration_error, completion_rewards, plain_completion_rewards
from tralign_mini.sharing import NotExact, row_limit

ARCHITECTURES = {"neox": tiny_neox, "llama": tiny_llama}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
SEQUENCES = [([5, 6, 7], [8, EOS]), ([9], [10, 11, 12, EOS]), ([13, 14], [15]), ([16, 17], [PAD + 20, EOS])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    for name, make in ARCHITECTURES.items():
        write_model(folder / name, make())
    return folder


def classifier(root, name="neox", **settings):
    """A reward model before training, as a run loads it; a large head, so that rewards differ."""
    settings = {"model": str(root / name), "data": "none", "method": "reward", "lora_rank": 2} | settings
    model = models.load_policy(tr.Recipe(**settings))
    with torch.no_grad():
        (model.get_base_model() if isinstance(model, PeftModel) else model).score.weight.mul_(30)
    return model


def rewards_by_hand(model, sequences):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = base.gpt_neox if hasattr(base, "gpt_neox") else base.model
    head = base.score.weight[0].double()
    with torch.no_grad():
        return torch.stack([backbone(torch.tensor([[*prompt, *completion]]))[0][0, -1].double() @ head
                            for prompt, completion in sequences])


# ------------------------------------------------------------------------------------------ loss, calibration


def test_the_loss_by_hand():
    loss, chosen, rejected = bradley_terry_loss(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 2.0]))
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log(2), math.log1p(math.exp(3))])
    assert chosen.tolist() == [2.0, 0.0, -1.0] and rejected.tolist() == [0.0, 0.0, 2.0]


def test_the_gradient_by_hand():
    chosen = torch.tensor([2.0, -1.0], requires_grad=True)
    rejected = torch.tensor([0.5, 3.0], requires_grad=True)
    result = bradley_terry_loss(chosen, rejected)
    result.losses.sum().backward()
    expected = [-1 / (1 + math.exp(margin)) for margin in (1.5, -4.0)]  # -sigmoid(-margin)
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-x for x in expected])
    assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad


def test_the_loss_refuses_what_is_no_reward():
    with pytest.raises(ValueError, match="rejected_rewards is a torch.int64.*floating-point.*completion_"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"chosen_rewards \(2,\), rejected_rewards \(1,\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(1))


def test_calibration_by_hand():
    sure, unsure = math.log(9), math.log(1.5)  # confidence 0.9 and 0.6
    margins = [sure] * 9 + [-sure] + [unsure] * 6 + [-unsure] * 4
    assert calibration_error(margins, bins=2) == pytest.approx(0, abs=1e-12)
    reverse = [-margin for margin in margins]  # 0.1 and 0.4 of them right
    assert calibration_error(reverse, bins=2) == pytest.approx((0.8 + 0.2) / 2)
    assert calibration_error([sure, -unsure], bins=2) == pytest.approx((0.1 + 0.6) / 2)
    assert calibration_error([sure, -unsure], bins=1) == pytest.approx(1.5 / 2 - 0.5)  # one bin: they make up
    assert calibration_error([0.0, 0.0]) == 0  # half right, and it says so


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=60), st.integers(1, 12))
def test_calibration_is_a_share_and_the_order_of_pairs_is_nothing_to_it(margins, bins):
    error = calibration_error(margins, bins)
    assert 0 <= error <= 1
    if len(set(map(abs, margins))) == len(margins):  # ties of both signs may fall into either bin
        assert calibration_error(margins[::-1], bins) == pytest.approx(error)


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        calibration_error([])


# ----------------------------------------------------------------------------------------- completion_rewards


@each_architecture
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_rewards_are_read_at_the_last_token(root, name, tuning):
    model = classifier(root, name, tuning=tuning)
    expected = rewards_by_hand(model, SEQUENCES)
    assert expected.std() > 0.1
    for batch in (collate(SEQUENCES, PAD), collate([*SEQUENCES, ([5] * 9, [7] * 9)], PAD)):
        rewards = completion_rewards(model, batch)[:4]
        assert rewards.dtype == torch.float32
        torch.testing.assert_close(rewards.double(), expected, rtol=0, atol=1e-5)
        plain = plain_completion_rewards(model, batch)[:4].double()
        torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


@each_architecture
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_same_rewards_and_gradients(root, name, tuning, attention):
    model = classifier(root, name, tuning=tuning)
    model.set_attn_implementation(attention) if tuning == "full" else None
    groups = random_groups(6) + [([3], [[4], [5, EOS]])]
    batch = packed(groups)
    assert len(batch["input_ids"]) < 7  # several groups in a row
    plain = plain_completion_rewards(model, collate(sequences_of(groups), PAD))
    shared = completion_rewards(model, batch)
    assert plain.std() > 0.1
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert_same_gradients(gradients_of(model, weighted(shared)), gradients_of(model, weighted(plain)))


def test_a_completion_without_a_token_is_refused(root):
    model = classifier(root)
    for batch in (collate([([3], [4]), ([3, 4], [])], PAD), packed([([3], [[4], []])])):
        with pytest.raises(ValueError, match="completion 1 of the batch has no token"):
            completion_rewards(model, batch)


@each_architecture
def test_the_check_of_shared_prompts_looks_at_rewards(root, name):
    groups, model = random_groups(20), classifier(root, name)
    assert row_limit(model, groups, PAD, REWARDS) == 1024

    def forget_the_mask(module, args, kwargs):
        return args, kwargs | ({"attention_mask": None} if kwargs["attention_mask"].ndim == 4 else {})

    model.base_model.register_forward_pre_hook(forget_the_mask, with_kwargs=True)
    with pytest.raises(NotExact, match="rewards differ by"):
        row_limit(model, groups, PAD, REWARDS)


# -------------------------------------------------------------------------------------------------- the model


@each_architecture
def test_only_the_head_is_new_and_its_seed_decides(root, name):
    def load(seed):
        recipe = tr.Recipe(model=str(root / name), data="none", method="reward", seed=seed)
        return weights(models.load_policy(recipe))

    one, again, other = load(1), load(1), load(2)
    start = weights(ARCHITECTURES[name]())
    assert one.keys() - start.keys() == {"score.weight"}
    assert all(torch.equal(one[key], start[key]) for key in one.keys() & start.keys())
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert [key for key in one if not torch.equal(one[key], other[key])] == ["score.weight"]
    assert 0.5 / 32 < one["score.weight"].std() < 2 / 32  # N(0, 1 / hidden_size^2)


def test_a_model_that_lacks_more_than_the_head_is_refused(root, tmp_path):
    folder = write_model(tmp_path / "damaged")
    state = load_file(folder / "model.safetensors")
    del state["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack.*dense_4h_to_h.weight"):
        classifier(tmp_path, "damaged")


@each_architecture
def test_lora_trains_its_factors_and_the_head(root, name):
    model = classifier(root, name, tuning="lora")
    assert all(p.requires_grad == (".default." in key) for key, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert [key for key, p in model.named_parameters() if p.requires_grad and "lora_" not in key] == [
        "base_model.model.score.modules_to_save.default.weight"]
    assert len(lora_layers(model)) >= 8


def test_training_goes_on_from_a_policys_adapter(root, tmp_path):
    policy = adapted(models.load_base(str(root / "neox"), torch.float32), task_type="CAUSAL_LM")
    write_model(tmp_path / "adapter", policy)
    model = classifier(tmp_path, "adapter", tuning="lora")
    hidden = [part.get_base_model().gpt_neox(torch.tensor([[5, 6, 7]]))[0] for part in (model, policy)]
    assert torch.equal(*hidden)
    assert all(p.requires_grad for key, p in model.named_parameters() if ".default." in key)
    alone = models.load_base(str(root / "neox"), torch.float32).gpt_neox(torch.tensor([[5, 6, 7]]))[0]
    assert not torch.allclose(hidden[0], alone)


def test_a_4_bit_base_keeps_its_head_in_float32(root):
    pytest.importorskip("bitsandbytes")
    write_model(root / "wide", tiny_neox(hidden_size=64))
    model = classifier(root, "wide", tuning="qlora")
    head = model.get_base_model().score.modules_to_save["default"].weight
    assert head.dtype == torch.float32 and head.shape == (1, 64) and head.requires_grad
    completion_rewards(model, packed(random_groups(3))).sum().backward()
    assert head.grad.abs().sum() > 0


def tokenizer_with(*special, **roles):
    words = {word: i for i, word in enumerate(["<eos>", "<unk>", "<pad>", "w8", "w9"])}
    words = Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **roles)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@pytest.mark.parametrize("special, roles, expected", [
    (["w9", "w8"], {"unk_token": "<unk>"}, "<unk>"),
    (["w9", "<pad>"], {"unk_token": "<unk>"}, "<pad>"),
    (["w9", "w8"], {"bos_token": "w8"}, "w9"),
    (["w9"], {"pad_token": "w9"}, "w9"),  # it has one of its own
])
def test_padding_is_never_the_end_of_a_text(tmp_path, special, roles, expected):
    tokenizer_with(*special, **roles).save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path), separate_pad=True).pad_token == expected


def test_a_tokenizer_without_another_token_is_refused(tmp_path):
    tokenizer_with().save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).pad_token == "<eos>"
    with pytest.raises(ValueError, match="no special token but EOS.*pad_token of its own"):
        models.load_tokenizer(str(tmp_path), separate_pad=True)


# ---------------------------------------------------------------------------------------------------- the run


def settings(root, name="neox", **changes):
    return tiny_run(root / f"{name}-run", ARCHITECTURES[name](), method="reward", **changes)


@pytest.fixture(scope="module")
def finished(root):
    """{(architecture, tuning): a finished run}."""
    kinds = [(name, tuning) for name in ARCHITECTURES for tuning in ("full", "lora")]
    return {kind: tr.train(settings(root, kind[0], tuning=kind[1], output=str(root / "-".join(kind))))
            for kind in kinds}


def test_a_row_of_metrics(finished):
    rows = metrics(finished["neox", "full"].directory)
    always = {"step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margin",
              "rewards/accuracy", "learning_rate", "grad_norm"}
    held_out = {"eval/loss", "eval/accuracy", "eval/calibration"}
    for row in rows:
        assert row.keys() == (always | held_out if row["step"] % 4 == 0 else always)
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margin"] == pytest.approx(margin, abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05)  # the head begins small


def test_a_step_is_the_loss_and_the_gradient_of_its_pairs(root, tmp_path):
    rows, policy = random_rows("reward", 8), classifier(root)
    pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    chosen, rejected = plain_completion_rewards(policy, collate(pairs, PAD)).chunk(2)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    norm = sum(gradient.square().sum() for gradient in gradients_of(policy, loss).values()).sqrt()
    make_trainer(tmp_path, policy=policy, rows=rows, method="reward", max_steps=1).train()
    (row,) = metrics(tmp_path)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["rewards/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def test_the_loss_is_that_of_trls_reward_trainer(root, tmp_path):
    trl = pytest.importorskip("trl")
    policy, rows = classifier(root), random_rows("reward", 8)
    pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    batch = collate(pairs, PAD)
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    seen = {key: [] for key in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
    theirs = SimpleNamespace(model=policy, accelerator=same, _metrics={"train": seen}, _total_train_tokens=0,
                             args=SimpleNamespace(center_rewards_coefficient=None), _tp_size=1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loss = trl.RewardTrainer.compute_loss(theirs, policy, inputs)
    make_trainer(tmp_path, policy=policy, rows=rows, method="reward", max_steps=1).train()
    (row,) = metrics(tmp_path)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["rewards/accuracy"] == seen["accuracy"][0]
    assert row["rewards/margin"] == pytest.approx(seen["margin"][0], abs=1e-5)


@pytest.mark.parametrize("change", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}])
def test_the_same_run_however_it_is_computed(root, change):
    folder = root / "neox-run"
    one = run_once(folder, "whole", method="reward")
    assert_close(one, run_once(folder, str(*change), method="reward", **change), 1e-4)


def test_the_same_run_without_shared_prompts(root, monkeypatch):
    folder = root / "neox-run"
    one = run_once(folder, "whole", method="reward")
    monkeypatch.setattr(importlib.import_module("tralign_mini.train"), "row_limit", lambda *args: 0)
    assert_close(one, run_once(folder, "plain", method="reward"), 1e-4)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_resumed_run_is_bit_equal(root, finished, tuning, tmp_path):
    whole = finished["llama", tuning]
    stopped = settings(root, "llama", tuning=tuning, output=str(tmp_path / "run"))
    steps = iter([False, False, True])
    stop = SimpleNamespace(is_set=lambda: next(steps))
    tr.train(stopped, stop=stop)
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    resumed = tr.train(stopped, resume=True)
    assert metrics(resumed.directory) == metrics(whole.directory)
    one, other = weights(resumed.policy), weights(whole.policy)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_it_learns_what_can_be_learnt(root, tmp_path):
    """The chosen completion begins with w5, the rejected one with w6: on new prompts, too."""
    pairs = [{"prompt": f"w{7 + i % 50} w{8 + i % 43}", "chosen": f"w5 w{10 + i % 31}",
              "rejected": f"w6 w{10 + i % 29}"} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run = tr.train(settings(root, data=str(tmp_path / "pairs.jsonl"), output=str(tmp_path / "run"),
                            max_steps=40, eval_prompts=20))
    last = metrics(run.directory)[-1]
    assert last["eval/accuracy"] == 1 and last["eval/loss"] < 0.2 and last["loss"] < 0.2


def test_held_out_pairs_are_measured_and_not_trained_on(root, finished):
    run = finished["neox", "full"]
    held_out = run.held_out_prompts()
    data = [json.loads(line) for line in (root / "neox-run" / "pairs.jsonl").read_text().splitlines()]
    pairs = [row for row in data if row["prompt"] in held_out]
    assert len(pairs) == 4  # eval_prompts
    model = tr.RewardModel.load(run)
    sides = [model.score([row["prompt"] for row in pairs], [row[side] for row in pairs])
             for side in ("chosen", "rejected")]
    margins = [a - b for a, b in zip(*sides)]
    last = metrics(run.directory)[-1]
    assert last["eval/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 4)
    assert last["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, abs=1e-5)
    assert last["eval/calibration"] == pytest.approx(calibration_error(margins), abs=1e-5)


def test_its_report_shows_held_out_pairs_and_no_samples(finished):
    run = finished["neox", "full"]
    report = (run.directory / "report.md").read_text()
    accuracy = metrics(run.directory)[-1]["eval/accuracy"]
    assert f"| share of pairs in the order of their labels | {accuracy:.2f} |" in report
    assert "Warning" not in report and "## Samples" not in report and "beta" not in report
    assert not (run.directory / "samples.jsonl").exists()


def test_what_a_reward_run_does_not_use_is_said():
    recipe = tr.Recipe.load("little-tldr", method="reward")
    assert recipe.reference == "fixed" and recipe.tau is None and recipe.output == "runs/little-tldr-reward-0"
    assert any(note.startswith("beta=0.3 is not used: method=reward") for note in recipe.notes())
    assert "beta" not in str(recipe.plan(1000)).split("note")[0] and "pairs" in str(recipe.plan(1000))
    assert tr.Recipe(model="m", data="d", method="reward").learning_rate == 1e-5
    assert tr.Recipe(model="m", data="d", method="reward", tuning="lora").learning_rate == 1e-4
    with pytest.raises(ValueError, match="reward has no reference"):
        tr.Recipe(model="m", data="d", method="reward", reference="soft")


def test_both_sides_of_a_pair_share_their_prompt():
    (row,) = random_rows("reward", 1)
    assert group_of(row) == (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])


# ---------------------------------------------------------------------------------- saved, loaded and scoring

PROMPTS, ANSWERS = ["w5 w6 w7", "w8", "w9 w10"], ["w11 w12", "w13 w14 w15 w16", "w17"]


@each_architecture
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_plain_transformers_loads_the_checkpoint_and_gives_the_same_rewards(finished, name, tuning):
    run = finished[name, tuning]
    folder = run.last_checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tuning == "full":
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    texts = [f"{prompt} {answer} <eos>" for prompt, answer in zip(PROMPTS, ANSWERS)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        plain = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    ours = torch.tensor(tr.score(PROMPTS, ANSWERS, model=run))
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_wherever_it_is_loaded_from_it_scores_the_same(finished, tuning):
    run = finished["neox", tuning]
    expected = tr.score(PROMPTS, ANSWERS, model=tr.RewardModel(run.policy, run.tokenizer))
    for source in (run, run.directory, str(run.directory), run.last_checkpoint, str(run.last_checkpoint)):
        assert tr.score(PROMPTS, ANSWERS, model=source) == pytest.approx(expected, abs=1e-6), source


def test_scores_of_texts_are_scores_of_their_tokens_in_their_order(finished):
    model = tr.RewardModel.load(finished["llama", "full"])
    prompts, answers = PROMPTS * 50, [answer for answer in ANSWERS for _ in range(50)]  # several passes
    limits = {"max_prompt_tokens": 16, "max_completion_tokens": 8}
    sequences = [tokenize(model.tokenizer, *pair, **limits)[:2] for pair in zip(prompts, answers)]
    rewards = model.score_ids(sequences)
    assert rewards.shape == (150,) and rewards.dtype == torch.float32
    torch.testing.assert_close(rewards.double(), rewards_by_hand(model.model, sequences), rtol=0, atol=1e-5)
    assert model.score(prompts, answers) == rewards.tolist()


def test_texts_are_cut_as_in_training(finished):
    model = tr.RewardModel.load(finished["neox", "full"])
    assert model.limits == {"max_prompt_tokens": 16, "max_completion_tokens": 8}
    long = " ".join(["w9"] * 30)
    assert model.score([long], ["w5"]) == model.score([" ".join(["w9"] * 16)], ["w5"])


def test_scoring_leaves_the_mode_as_it_is(finished):
    model = tr.RewardModel.load(finished["neox", "lora"])
    model.model.train()
    model.score(PROMPTS, ANSWERS)
    assert model.model.training
    model.model.eval()


def test_chat_messages_are_scored_by_their_template(finished):
    model = tr.RewardModel.load(finished["neox", "full"])
    model.tokenizer.chat_template = ("{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}"
                                     "<eos>{% endif %}{% endfor %}")
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    expected = model.score([f"{prompt} " for prompt in PROMPTS], ANSWERS)
    assert model.score(chat, answers) == expected and model.score(chat, ANSWERS) == expected


@pytest.mark.parametrize("prompts, answers", [([], []), (["a"], ["b", "c"]), ("ab", ["a", "b"]),
                                              (["a", "b"], "ab")])
def test_lists_that_do_not_fit_are_refused(finished, prompts, answers):
    with pytest.raises(ValueError, match="two lists of one length, at least 1"):
        tr.score(prompts, answers, model=finished["neox", "full"])


def test_what_gives_no_rewards_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="lack.*score.weight"):
        tr.RewardModel.load(root / "neox")
    write_model(tmp_path, adapted(models.load_base(str(root / "neox"), torch.float32), task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter of the kind CAUSAL_LM and gives no rewards"):
        tr.RewardModel.load(tmp_path)
    run = tr.train(tiny_run(root / "neox-run", method="sft", max_steps=1, output=str(tmp_path / "sft")))
    with pytest.raises(ValueError, match="method=sft: it made a policy"):
        tr.RewardModel.load(run)
