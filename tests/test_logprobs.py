"""Completion log-probs: against a computation token by token, against TRL, and nothing else counted."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, PAD, VOCAB, tiny_llama, tiny_neox, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tralign_mini.logprobs import CompletionScorer, completion_logps

BUILDERS = [tiny_neox, tiny_llama]
MODELS = {build.__name__: build().requires_grad_(False) for build in BUILDERS}
SEQUENCES = [([3, 4, 5], [6, 7, EOS]), ([8], [9, 10, 11, 12, EOS]), ([20, 21, 22, 23], [24]), ([30, 31], [])]
each_architecture = pytest.mark.parametrize("architecture", MODELS)


def make_batch(sequences, *, extra=0, pad=PAD):
    """The batch of (prompt, completion) pairs, by hand, with `extra` more columns of padding than needed."""
    length = max(len(prompt) + len(completion) for prompt, completion in sequences) + extra
    rows = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, completion in sequences:
        padding = length - len(prompt) - len(completion)
        rows["input_ids"].append(prompt + completion + [pad] * padding)
        rows["attention_mask"].append([1] * (length - padding) + [0] * padding)
        rows["completion_mask"].append([False] * len(prompt) + [True] * len(completion) + [False] * padding)
    return {name: torch.tensor(row) for name, row in rows.items()}


def token_by_token(model, prompt, completion):
    """log p(completion | prompt), one token at a time: no batch, no padding, no mask."""
    total, context = 0.0, list(prompt)
    for token in completion:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
        total += torch.log(torch.softmax(logits, dim=-1)[token]).item()
        context.append(token)
    return total


tokens = st.integers(3, VOCAB - 1)
sequences = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)), min_size=1, max_size=4)


@each_architecture
def test_equals_the_computation_token_by_token(architecture):
    model = MODELS[architecture]
    expected = torch.tensor([token_by_token(model, *sequence) for sequence in SEQUENCES])
    torch.testing.assert_close(completion_logps(model, make_batch(SEQUENCES)), expected, rtol=0, atol=1e-5)
    assert expected[:3].max() < -1 and expected[3] == 0


@each_architecture
@settings(max_examples=15, deadline=None)
@given(sequences=sequences)
def test_equals_the_computation_token_by_token_for_any_sequences(architecture, sequences):
    model = MODELS[architecture]
    expected = torch.tensor([token_by_token(model, *sequence) for sequence in sequences])
    torch.testing.assert_close(completion_logps(model, make_batch(sequences)), expected, rtol=0, atol=2e-5)


@each_architecture
@settings(max_examples=25, deadline=None)
@given(sequences=sequences, extra=st.integers(1, 9), pad=st.integers(0, VOCAB - 1))
def test_padding_is_never_counted(architecture, sequences, extra, pad):
    """However much of it, whatever its token id, and whoever is in the same batch."""
    model = MODELS[architecture]
    plain = completion_logps(model, make_batch(sequences))
    torch.testing.assert_close(
        completion_logps(model, make_batch(sequences, extra=extra, pad=pad)), plain, rtol=0, atol=2e-5)
    alone = torch.cat([completion_logps(model, make_batch([sequence])) for sequence in sequences])
    torch.testing.assert_close(alone, plain, rtol=0, atol=2e-5)


@each_architecture
@given(prompt=st.lists(tokens, min_size=1, max_size=6), completion=st.lists(tokens, min_size=1, max_size=6),
       at=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_prompt_is_never_counted(architecture, prompt, completion, at):
    """Moving the boundary moves exactly the moved token's own log-prob from one count into the other."""
    model, at = MODELS[architecture], at % len(completion)
    whole, head, tail = (completion_logps(model, make_batch([pair])) for pair in [
        (prompt, completion), (prompt, completion[:at]), (prompt + completion[:at], completion[at:])])
    torch.testing.assert_close(whole, head + tail, rtol=0, atol=2e-5)


@each_architecture
@settings(max_examples=15, deadline=None)
@given(sequences=sequences)
def test_average_is_the_sum_over_the_number_of_tokens(architecture, sequences):
    model, batch = MODELS[architecture], make_batch(sequences)
    lengths = torch.tensor([max(len(completion), 1) for _, completion in sequences])
    torch.testing.assert_close(
        completion_logps(model, batch, average=True), completion_logps(model, batch) / lengths)


@each_architecture
@pytest.mark.parametrize("average", [False, True])
def test_no_completion_token_gives_zero_and_no_nan_gradient(architecture, average):
    model = {"tiny_neox": tiny_neox, "tiny_llama": tiny_llama}[architecture]()
    for batch in (make_batch([([3, 4], [])] * 2), make_batch([([3, 4], []), ([3], [5, EOS])])):
        logps = completion_logps(model, batch, average=average)
        logps.sum().backward()
        assert logps[0] == 0
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_all_completions_of_a_length_sum_to_probability_one():
    """The probabilities of all 64 one-token completions, each predicted from the prompt's last position."""
    batch = make_batch([([3, 4, 5], [token]) for token in range(VOCAB)])
    for model in MODELS.values():
        torch.testing.assert_close(completion_logps(model, batch).exp().sum(), torch.tensor(1.0))


class Recorder(torch.nn.Module):
    """A language model whose logits are a parameter: shows what gets gradient and what it was called with."""

    def __init__(self, n, length, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(n, length, VOCAB, generator=generator).to(dtype))

    def forward(self, **inputs):
        self.inputs = inputs
        return type("Output", (), {"logits": self.logits})


def test_gradient_flows_only_through_positions_that_predict_a_counted_token():
    batch = make_batch(SEQUENCES, extra=2)
    model = Recorder(*batch["input_ids"].shape)
    completion_logps(model, batch).sum().backward()
    predicts = torch.zeros_like(batch["completion_mask"])
    predicts[:, :-1] = batch["completion_mask"][:, 1:]
    assert torch.equal(model.logits.grad.abs().sum(-1) > 0, predicts)
    one_hot = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, dims=1), VOCAB).float()
    expected = (one_hot - model.logits.detach().softmax(-1)) * predicts[..., None]  # d log softmax
    torch.testing.assert_close(model.logits.grad, expected)


def test_the_model_gets_ids_and_attention_mask_and_nothing_else():
    batch = make_batch(SEQUENCES)
    model = Recorder(*batch["input_ids"].shape)
    completion_logps(model, batch | {"labels": batch["input_ids"], "index": torch.arange(4)})
    assert set(model.inputs) == {"input_ids", "attention_mask", "use_cache"}
    assert model.inputs["use_cache"] is False
    assert torch.equal(model.inputs["input_ids"], batch["input_ids"])
    assert torch.equal(model.inputs["attention_mask"], batch["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_summed_in_float32(dtype):
    """Softmax and sum in 16 bits would be off by far more: the reference value is in float64."""
    batch = make_batch([([3], list(range(4, 60))), ([5, 6], list(range(10, 60)))])
    model = Recorder(*batch["input_ids"].shape, dtype)
    actual = completion_logps(model, batch)
    full = model.logits.detach().double().log_softmax(-1)[:, :-1]
    full = full.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * batch["completion_mask"][:, 1:]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.detach().double(), full.sum(-1), rtol=1e-6, atol=0)


@each_architecture
def test_a_bfloat16_model_gives_float32(architecture):
    model = {"tiny_neox": tiny_neox, "tiny_llama": tiny_llama}[architecture]().bfloat16()
    logps = completion_logps(model, make_batch(SEQUENCES))
    assert logps.dtype == torch.float32
    exact = completion_logps(MODELS[architecture], make_batch(SEQUENCES))
    torch.testing.assert_close(logps, exact, rtol=0.1, atol=0.3)


def test_train_mode_and_dropout_are_left_alone():
    model, batch = tiny_neox(hidden_dropout=0.5).train(), make_batch(SEQUENCES)
    assert not torch.equal(completion_logps(model, batch), completion_logps(model, batch)) and model.training
    model.eval()
    assert torch.equal(completion_logps(model, batch), completion_logps(model, batch)) and not model.training


# ----------------------------------------------------------------------------------------- CompletionScorer


@pytest.mark.parametrize("average", [False, True])
def test_the_scorers_forward_is_completion_logps(average):
    model, batch = tiny_neox(), make_batch(SEQUENCES)
    scorer = CompletionScorer(model, average=average)
    assert scorer.model is model
    assert torch.equal(scorer(**batch), completion_logps(model, batch, average=average))
    assert list(scorer.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_hooks_around_the_scorer_see_the_log_probs():
    """What DDP and FSDP rely on: the model runs within the `forward` of the module that is called."""
    events, scorer = [], CompletionScorer(tiny_neox())
    scorer.register_forward_pre_hook(lambda *_: events.append("before"))
    scorer.model.register_forward_hook(lambda *_: events.append("model"))
    scorer.register_forward_hook(lambda module, inputs, output: events.append(tuple(output.shape)))
    scorer(**make_batch(SEQUENCES))
    assert events == ["before", "model", (4,)]


# ---------------------------------------------------------------------------------------- TRL as the oracle


@each_architecture
@pytest.mark.parametrize("average", [False, True])
def test_equals_the_log_probs_of_trls_orpo_trainer(architecture, average):
    orpo = pytest.importorskip("trl.experimental.orpo")
    model, batch = MODELS[architecture], make_batch(SEQUENCES[:3], extra=1)
    labels = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = orpo.ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)
    torch.testing.assert_close(completion_logps(model, batch, average=average), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_equals_the_log_probs_of_trls_dpo_trainer(build, tmp_path):
    """TRL's collator, fused head and log-probs against ours, on the batch that TRL made."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trainer = trl.DPOTrainer(
        model=build(0), ref_model=build(1), processing_class=tiny_tokenizer(),
        args=trl.DPOConfig(
            str(tmp_path), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2),
        train_dataset=datasets.Dataset.from_list([
            {"prompt": "w3 w4 w5", "chosen": " w6 w7", "rejected": " w8 w9 w10 w11"},
            {"prompt": "w12", "chosen": " w13 w14 w15", "rejected": " w16"}]))
    batch = next(iter(trainer.get_train_dataloader()))
    for seed, model in enumerate((trainer.model, trainer.ref_model)):
        expected = torch.cat(trainer.compute_ref_log_probs(model, batch))
        torch.testing.assert_close(completion_logps(build(seed), batch).detach(), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- refusals


def refused(match, **changes):
    batch = {name: value for name, value in (make_batch(SEQUENCES) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=match):
        completion_logps(MODELS["tiny_neox"], batch)
    with pytest.raises(ValueError, match=match):
        CompletionScorer(MODELS["tiny_neox"])(**batch)


def test_a_completion_at_position_zero_is_refused():
    """Nothing predicts a first token: leaving it out silently would score a shorter completion."""
    batch = make_batch([([], [3, 4]), ([5], [6])])
    refused("True at position 0.*first token.*at least one token", **batch)


def test_counting_padding_is_refused():
    mask = make_batch(SEQUENCES)["completion_mask"]
    mask[2, -1] = True
    refused("True where attention_mask is 0: padding", completion_mask=mask)


def test_left_padding_is_refused():
    left = {name: value.flip(1) for name, value in make_batch(SEQUENCES).items()}
    left["completion_mask"] = left["attention_mask"].bool() & (torch.arange(6) > 4)
    refused("0 to 1 within a row.*Pad on the right", **left)


def test_other_shapes_and_missing_keys_are_refused():
    refused(r"completion_mask \(4, 5\), but all three", completion_mask=torch.zeros(4, 5, dtype=torch.bool))
    refused(r"attention_mask \(1, 6\)", attention_mask=torch.ones(1, 6))  # would broadcast
    refused(r"input_ids \(6,\).*\(sequences, length\)", **{k: v[0] for k, v in make_batch(SEQUENCES).items()})
    refused("the batch has no completion_mask. It needs", completion_mask=None)
