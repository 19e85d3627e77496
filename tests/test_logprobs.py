"""Completion log-probs: against a computation token by token, against TRL, and nothing else counted."""

from __future__ import annotations

import math
import warnings
import weakref
from functools import partial

import pytest
import torch
from engine_helpers import (
    BOTH,
    assert_same_gradients,
    build,
    gradients_of,
    packed,
    random_groups,
    sequences_of,
    weighted,
)
from helpers import EOS, PAD, VOCAB, logps_by_hand, tiny_llama, tiny_neox, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import adapted
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tralign_mini import logprobs
from tralign_mini.data import collate
from tralign_mini.generate import sample
from tralign_mini.logprobs import CompletionScorer, completion_logps, plain_completion_logps

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


# ------------------------------------------------------------ the projection, only where it counts, in chunks

GROUPS = random_groups(6)
WHOLE = collate(sequences_of(GROUPS), PAD)
EITHER_WAY = pytest.mark.parametrize("batch", [WHOLE, packed(GROUPS)], ids=["whole", "packed"])
ROUNDING = {"rtol": 3e-7, "atol": 1e-5}  # of float32: 1e-5, and the last bits of large sums
COUNTED = sum(len(completion) for _, completion in sequences_of(GROUPS))
FAMILIES = pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "Gemma2", "GPT2", "OPT"])


def in_chunks_of(monkeypatch, tokens):
    monkeypatch.setattr(logprobs, "LOGIT_BYTES", 4 * VOCAB * tokens + 3)


class Head:
    """What a model's head has been called with since then, and returned."""

    def __init__(self, model):
        completion_logps(model, make_batch(SEQUENCES))  # whether one projection is all, is asked once
        self.inputs, self.shapes = [], []
        model.get_output_embeddings().register_forward_hook(self.seen)

    def seen(self, module, args, output):
        self.inputs.append(args[0].detach().clone())
        self.shapes.append(tuple(output.shape))


@pytest.mark.parametrize(("family", "attention"), BOTH, ids=["-".join(one) for one in BOTH])
def test_whole_sequences_equal_the_plain_way_in_value_and_gradient(family, attention):
    model = build(family, attn_implementation=attention)
    found, plain = completion_logps(model, WHOLE), plain_completion_logps(model, WHOLE)
    torch.testing.assert_close(found, plain, **ROUNDING)
    torch.testing.assert_close(found.double(), logps_by_hand(model, sequences_of(GROUPS)), **ROUNDING)
    assert_same_gradients(gradients_of(model, weighted(found)), gradients_of(model, weighted(plain)))


@EITHER_WAY
@FAMILIES
def test_the_head_sees_the_positions_that_predict_a_counted_token_and_no_other(family, batch):
    model = build(family)
    inputs = {name: WHOLE[name] for name in ("input_ids", "attention_mask")}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    predicts = torch.zeros_like(WHOLE["completion_mask"])
    predicts[:, :-1] = WHOLE["completion_mask"][:, 1:]
    head = Head(model)
    completion_logps(model, batch)
    [seen] = head.inputs
    assert head.shapes == [(COUNTED, VOCAB)]
    torch.testing.assert_close(seen, hidden[predicts], rtol=0, atol=2e-5)


@EITHER_WAY
@FAMILIES
@pytest.mark.parametrize("tokens", [1, 7, COUNTED - 1])
def test_chunks_change_nothing_and_all_but_the_last_are_computed_again(family, batch, tokens, monkeypatch):
    model = build(family)
    whole = completion_logps(model, batch)
    expected = gradients_of(model, weighted(whole))
    head = Head(model)
    in_chunks_of(monkeypatch, tokens)
    found = completion_logps(model, batch)
    shapes = list(head.shapes)
    sizes = [size for size, _ in shapes]
    assert max(sizes) <= tokens and sum(sizes) == COUNTED and len(sizes) == math.ceil(COUNTED / tokens) > 1
    torch.testing.assert_close(found, whole, **ROUNDING)
    assert_same_gradients(gradients_of(model, weighted(found)), expected)
    assert sorted(head.shapes) == sorted(2 * shapes[:-1] + shapes[-1:])  # the last one is still there
    before = len(head.shapes)
    with torch.no_grad():
        torch.testing.assert_close(completion_logps(model, batch), whole, **ROUNDING)
    assert head.shapes[before:] == shapes


def test_within_the_budget_nothing_is_computed_twice(monkeypatch):
    model = build("Llama")
    head = Head(model)
    in_chunks_of(monkeypatch, COUNTED)
    weighted(completion_logps(model, packed(GROUPS))).backward()
    assert head.shapes == [(COUNTED, VOCAB)]


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_and_not_left_out(adapter):
    model = get_peft_model(build("Llama"), adapter(task_type="CAUSAL_LM", num_virtual_tokens=2))
    sampling = partial(sample, tokenizer=tiny_tokenizer(), prompts=["w3"], max_completion_tokens=1)
    for function in (completion_logps, plain_completion_logps, lambda model, batch: sampling(model)):
        with pytest.raises(ValueError, match="virtual tokens are neither scored nor sampled here. Use LoRA"):
            function(model, WHOLE)


class Alive(TorchDispatchMode):
    """How many rows over the vocabulary exist at the same time, at most, without the head's 24 of weights."""

    def __init__(self):
        super().__init__()
        self.tensors, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        found = [x for x in (output if isinstance(output, (tuple, list)) else [output]) if torch.is_tensor(x)]
        logits = [x for x in found if x.ndim == 2 and x.shape[1] == VOCAB and len(x) != 24]
        self.tensors += map(weakref.ref, logits)
        alive = {x.data_ptr(): x.numel() // VOCAB for x in (ref() for ref in self.tensors) if x is not None}
        self.most = max(self.most, sum(alive.values()))
        return output


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_no_more_than_a_chunk_of_logits_is_ever_alive(family, monkeypatch):
    """In both passes: the logits, later in their place the log-softmax and its gradient, of one chunk."""
    groups = random_groups(24)
    model = build(family, hidden_size=24, num_attention_heads=2, intermediate_size=40)
    most = []
    for tokens, count in ((4, 12), (4, 24), (10**6, 24)):
        in_chunks_of(monkeypatch, tokens)
        completion_logps(model, packed(groups[:count], 30))
        with Alive() as alive:
            weighted(completion_logps(model, packed(groups[:count], 30))).backward()
        most.append(alive.most)
    print(most)
    copies = 1 if family == "Llama" else 3  # the softcap keeps its own
    assert most[0] == most[1] <= copies * 4
    assert most[2] >= 236  # without chunks


@EITHER_WAY
@pytest.mark.parametrize(("family", "config"), [
    ("Cohere", {"num_key_value_heads": 2, "logit_scale": 0.3}),
    ("Granite", {"num_key_value_heads": 2, "logits_scaling": 3.0}),
])
def test_a_model_that_does_more_to_its_logits_warns_once_and_is_right(family, config, batch):
    model = build(family, **config)
    message = f"{family}ForCausalLM does more to its logits than one projection"
    with pytest.warns(UserWarning, match=message) as seen:
        found = completion_logps(model, batch)
        completion_logps(model, batch)
    assert len(seen) == 1
    plain = plain_completion_logps(model, WHOLE)
    torch.testing.assert_close(found, plain, **ROUNDING)
    assert_same_gradients(gradients_of(model, weighted(found)), gradients_of(model, weighted(plain)))
    torch.testing.assert_close(found.double(), logps_by_hand(model, sequences_of(GROUPS)), **ROUNDING)


@FAMILIES
def test_a_model_whose_logits_are_one_projection_gives_no_warning(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        completion_logps(build(family), WHOLE)


def changing_logits(model, change):
    """A model that does something else to its logits, as far as anyone outside can see."""
    def hook(module, args, output):
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(hook)


def test_all_logits_of_a_softcap_that_is_not_gemmas_are_taken_from_the_model():
    model = build("Llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * torch.tanh(output / 3))
    found = completion_logps(model, WHOLE)  # the head's own business: what comes out of it are the logits
    torch.testing.assert_close(found, plain_completion_logps(model, WHOLE), **ROUNDING)
    other = build("Llama")
    changing_logits(other, lambda logits: 3 * torch.tanh(logits / 3))
    with pytest.warns(UserWarning, match="more to its logits"):
        found = completion_logps(other, WHOLE)
    torch.testing.assert_close(found, plain_completion_logps(other, WHOLE), **ROUNDING)


@FAMILIES
def test_a_resized_vocabulary_is_noticed(family):
    model = build(family)
    completion_logps(model, WHOLE)
    before = model.get_output_embeddings()
    model.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
    assert model.get_output_embeddings() is not before
    groups = [([3, 70, 5], [[VOCAB + 15, 6], [VOCAB]]), *GROUPS]
    whole = collate(sequences_of(groups), PAD)
    plain = plain_completion_logps(model, whole)
    for batch in (whole, packed(groups)):
        torch.testing.assert_close(completion_logps(model, batch), plain, **ROUNDING)


def test_a_replaced_head_is_noticed():
    class Scaled(torch.nn.Linear):
        """A head that the model treats in a way of its own."""

    model = build("Llama")
    completion_logps(model, WHOLE)
    model.set_output_embeddings(Scaled(32, VOCAB, bias=False))
    changing_logits(model, lambda logits: logits / 2)
    with pytest.warns(UserWarning, match="more to its logits"):
        found = completion_logps(model, WHOLE)
    torch.testing.assert_close(found, plain_completion_logps(model, WHOLE), **ROUNDING)


def test_asking_what_the_head_does_draws_no_random_numbers():
    """It happens at a run's first batch, and again where the run is resumed."""
    policy = adapted(tiny_llama(), lora_dropout=0.5).train()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(completion_logps(policy, WHOLE))
    assert torch.equal(*found)


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


def test_a_second_pass_backward_is_refused_rather_than_wrong():
    """The first one writes over what the second would read."""
    model = build("Llama")
    loss = weighted(completion_logps(model, packed(GROUPS)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
