"""generate: what is sampled is the policy's distribution, and sampling leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, VOCAB, tiny_llama, tiny_neox, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import GenerationConfig

from tralign_mini.generate import sample

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15", "w20 w21 w22 w23"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_neox()


def eos_model(bias):
    """A tiny model whose EOS logit is raised: a constant direction in the output of the last norm feeds
    it."""
    model = tiny_neox()
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] = 0
        model.gpt_neox.final_layer_norm.bias[0] = 1.0
        model.gpt_neox.final_layer_norm.weight[0] = 0.0
        model.get_output_embeddings().weight[EOS, 0] = bias
    return model


@torch.no_grad()
def next_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(model, tokenizer, temperature):
    n = 4000
    drawn = sample(model, tokenizer, ["w5 w6 w7"] * n, max_completion_tokens=1, temperature=temperature,
                   batch_size=1000)
    counts = np.bincount([completion[0] for _, completion in drawn.sequences], minlength=VOCAB)
    expected = torch.softmax(next_logits(model, [5, 6, 7]) / temperature, -1).numpy() * n
    common = expected >= 5  # chi-square: rare tokens go into one bin
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert common.sum() > 10  # the test has to see more than a few tokens


def test_every_token_is_conditioned_on_what_was_drawn_before(model, tokenizer):
    # a shifted position or a forgotten token would break the chain: the second token given the first one
    drawn = sample(model, tokenizer, ["w5 w6 w7"] * 4000, max_completion_tokens=2, batch_size=1000)
    seconds = [c for _, c in drawn.sequences if len(c) == 2]
    first = np.bincount([c[0] for c in seconds]).argmax()
    counts = np.bincount([c[1] for c in seconds if c[0] == first], minlength=VOCAB)
    expected = torch.softmax(next_logits(model, [5, 6, 7, int(first)]), -1).numpy() * counts.sum()
    common = expected >= 5
    observed, expected = (np.append(counts[common], counts[~common].sum()),
                          np.append(expected[common], expected[~common].sum()))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("build", [tiny_neox, tiny_llama])
def test_greedy_is_argmax_whatever_the_batch(build, tokenizer):
    model = build()
    expected = []
    for prompt in PROMPTS:
        ids = [int(word[1:]) for word in prompt.split()]
        completion = []
        while len(completion) < 6 and completion[-1:] != [EOS]:
            completion.append(int(next_logits(model, ids + completion).argmax()))
        expected.append((ids, completion))
    for batch_size in (1, 2, 64):  # 2 and 64 pad on the left
        drawn = sample(model, tokenizer, PROMPTS, max_completion_tokens=6, temperature=0,
                       batch_size=batch_size)
        assert [(list(p), list(c)) for p, c in drawn.sequences] == expected
        assert drawn.texts == [tokenizer.decode(c, skip_special_tokens=True) for _, c in expected]


def test_the_seed_decides(model, tokenizer):
    def draw(seed):
        return sample(model, tokenizer, PROMPTS, max_completion_tokens=8, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1).texts != draw(2).texts


@pytest.mark.parametrize("settings", [
    {"top_k": 1},
    {"top_p": 0.01},
    {"repetition_penalty": 1e4},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 8},
    {"suppress_tokens": list(range(2, 40))},
    {"forced_eos_token_id": EOS},
    {"num_beams": 3},
    {"temperature": 0.01},
    {"max_length": 4},
    {"eos_token_id": 30},
    {"min_p": 0.9},
])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_models_generation_config_does_not_leak(model, tokenizer, settings, temperature):
    def draw():
        return sample(model, tokenizer, PROMPTS, max_completion_tokens=8, temperature=temperature).sequences

    model.generation_config = GenerationConfig()
    plain = draw()
    model.generation_config = own = GenerationConfig(**settings)
    assert draw() == plain
    assert model.generation_config is own
    assert all(getattr(own, name) == value for name, value in settings.items())


def test_a_peft_models_generation_config_does_not_leak(tokenizer):
    torch.manual_seed(0)
    policy = get_peft_model(tiny_neox(),
                            LoraConfig(r=2, init_lora_weights=False, target_modules=["query_key_value"]))
    base = policy.get_base_model()
    policy.generation_config = GenerationConfig(top_k=1)
    base.generation_config = own = GenerationConfig(top_p=0.01)
    drawn = sample(policy, tokenizer, PROMPTS, max_completion_tokens=8)
    assert len(set(drawn.texts)) > 1 and drawn != sample(
        policy, tokenizer, PROMPTS, max_completion_tokens=8, temperature=0)
    assert base.generation_config is own
    greedy = sample(policy, tokenizer, ["w5 w6 w7"], max_completion_tokens=1, temperature=0).sequences[0][1]
    assert greedy == [int(next_logits(policy, [5, 6, 7]).argmax())]  # the adapter is on ...
    with policy.disable_adapter():
        off = sample(policy, tokenizer, PROMPTS, max_completion_tokens=8)
    assert off != drawn
    assert off == sample(tiny_neox(), tokenizer, PROMPTS, max_completion_tokens=8)  # ... or off


def test_a_sampled_eos_ends(tokenizer):
    model = eos_model(bias=4.0)
    drawn = sample(model, tokenizer, PROMPTS * 40, max_completion_tokens=6)
    lengths = set()
    for text, (_, completion) in zip(drawn.texts, drawn.sequences, strict=True):
        lengths.add(len(completion))
        assert 1 <= len(completion) <= 6
        assert EOS not in completion[:-1] and PAD not in completion[len(completion) - 1 :]
        assert len(completion) == 6 or completion[-1] == EOS
        assert "<eos>" not in text and "<pad>" not in text
    assert lengths >= {1, 2, 3, 6}  # all endings were seen, EOS as the very first token included
    assert any(completion[-1] != EOS for _, completion in drawn.sequences)


def test_eos_as_padding_token_changes_nothing(tokenizer):
    model, other = eos_model(bias=4.0), tiny_tokenizer()
    other.pad_token = other.eos_token
    assert (
        sample(model, tokenizer, PROMPTS, max_completion_tokens=6).sequences
        == sample(model, other, PROMPTS, max_completion_tokens=6).sequences
    )


def test_sampling_leaves_no_trace(model, tokenizer):
    model.train()
    model.gpt_neox.layers[0].eval()  # a mixed state has to come back as it was
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn = sample(model, tokenizer, PROMPTS, max_completion_tokens=4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False and torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.manual_seed(8)  # and the global state has no influence on the samples
    assert sample(model, tokenizer, PROMPTS, max_completion_tokens=4, seed=1) == drawn


def test_dropout_is_off_while_sampling(tokenizer):
    model = tiny_neox(hidden_dropout=0.9, attention_dropout=0.9)
    drawn = sample(model, tokenizer, PROMPTS, max_completion_tokens=4, temperature=0)
    model.train()
    assert sample(model, tokenizer, PROMPTS, max_completion_tokens=4, temperature=0) == drawn


def test_modes_come_back_after_an_error(model, tokenizer, monkeypatch):
    model.train()
    own, state = model.generation_config, torch.get_rng_state()
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, tokenizer, PROMPTS, max_completion_tokens=4)
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), state)


def test_long_prompts_keep_their_end(model, tokenizer):
    drawn = sample(model, tokenizer, ["w3 w4 w5 w6 w7"], max_completion_tokens=1, max_prompt_tokens=2,
                   temperature=0)
    assert drawn.sequences[0][0] == [6, 7]
    assert drawn.sequences[0][1] == [int(next_logits(model, [6, 7]).argmax())]


def test_chat_messages_go_through_the_template(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w30 ' if m['role'] == 'user' else 'w31 ' }}{{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}w32{% endif %}"
    )
    drawn = sample(model, tokenizer, [[{"role": "user", "content": "w5 w6"}]], max_completion_tokens=2)
    assert drawn.sequences[0][0] == [30, 5, 6, 32]


def test_no_prompts_no_samples(model, tokenizer):
    assert sample(model, tokenizer, [], max_completion_tokens=2) == ([], [])


@pytest.mark.parametrize("prompts, change, message", [
    (PROMPTS, {"max_completion_tokens": 0}, "at least 1"),
    (PROMPTS, {"batch_size": 0}, "at least 1"),
    (PROMPTS, {"temperature": -1.0}, "greedy"),
    (PROMPTS, {"temperature": float("nan")}, "greedy"),
    (PROMPTS, {"temperature": float("inf")}, "greedy"),
    (["w5", ""], {}, "Prompt 1 has no tokens"),
    (["w5 " * 125], {}, "128 positions.*max_prompt_tokens to 124"),
])
def test_refusals(model, tokenizer, prompts, change, message):
    with pytest.raises(ValueError, match=message):
        sample(model, tokenizer, prompts, **{"max_completion_tokens": 4} | change)


def test_a_tokenizer_without_eos_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        sample(model, tokenizer, PROMPTS, max_completion_tokens=4)
