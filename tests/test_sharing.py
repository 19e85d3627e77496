"""Completions that share a prompt have the log-probs and gradients of whole sequences, or do not share it."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
from engine_helpers import (
    BOTH,
    assert_same_gradients,
    build,
    gradients_of,
    groups,
    packed,
    random_groups,
    sequences_of,
    weighted,
)
from helpers import logps_by_hand, tiny_llama, tiny_neox
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import adapted, shake
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tralign_mini.adapters import guard_4bit
from tralign_mini.data import collate
from tralign_mini.logprobs import completion_logps, plain_completion_logps, shared_prompt_mask
from tralign_mini.packing import group_length, lay_out
from tralign_mini.reference import AdapterReference
from tralign_mini.sharing import PACKED, NotExact, row_limit

ROUNDING = {"rtol": 3e-7, "atol": 1e-5}  # of float32: 1e-5, and the last bits of large sums
each_family = pytest.mark.parametrize(("family", "attention"), BOTH, ids=["-".join(one) for one in BOTH])
model_of = functools.cache(lambda family, attention: build(family, attn_implementation=attention))


def assert_exact(model, groups, batch):
    """Values and every gradient of packed rows against whole sequences; returns the values."""
    shared = completion_logps(model, batch)
    plain = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(shared, plain, **ROUNDING)
    if plain.abs().max() > 0:
        found, expected = gradients_of(model, weighted(shared)), gradients_of(model, weighted(plain))
        assert_same_gradients(found, expected)
    return shared.detach()


# --------------------------------------------------------------------------- the same numbers as one by one


@each_family
@settings(max_examples=8)
@given(groups=groups, rows=st.integers(1, 5), pad=st.integers(0, 63))
def test_packed_rows_equal_whole_sequences(family, attention, groups, rows, pad):
    """In value and in every gradient, with all groups in one row or in several, whatever the padding is."""
    model = model_of(family, attention)
    bins = [list(range(row, len(groups), rows)) for row in range(min(rows, len(groups)))]
    found = assert_exact(model, groups, lay_out(groups, pad, bins))
    torch.testing.assert_close(found.double(), logps_by_hand(model, sequences_of(groups)), **ROUNDING)


@each_family
def test_packed_rows_of_any_limit_equal_whole_sequences(family, attention):
    groups, rows = random_groups(10), set()
    assert row_limit(model_of(family, attention), groups, 0) >= 120
    for limit in (1, 60, 120):
        batch = packed(groups, limit, pad=9)
        rows.add(len(batch["input_ids"]))
        assert_exact(model_of(family, attention), groups, batch)
    assert 10 in rows and len(rows) > 1


@pytest.mark.parametrize("average", [False, True])
def test_the_average_is_the_same_too(average):
    model, groups = model_of("Llama", "sdpa"), random_groups(5)
    found = completion_logps(model, packed(groups), average=average)
    expected = plain_completion_logps(model, collate(sequences_of(groups), 0), average=average)
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_what_the_gradients_are_compared_with_would_show_a_difference():
    """Without the mask, or with positions that run on, they are far away."""
    model, groups = model_of("Llama", "sdpa"), random_groups(5)
    expected = gradients_of(model, weighted(plain_completion_logps(model, collate(sequences_of(groups), 0))))
    batch = packed(groups)
    places = torch.arange(batch["branch"].shape[1]).expand_as(batch["branch"])
    for change in ({}, {"branch": torch.zeros_like(places)}, {"position_ids": places}):
        found = gradients_of(model, weighted(completion_logps(model, batch | change)))
        with pytest.raises(AssertionError) if change else nullcontext():
            assert_same_gradients(found, expected, 1e-2 if change else 1e-5)


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "Gemma3", "GPT2"])
def test_with_gradient_checkpointing(family):
    model, groups = build(family), random_groups(6)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = weighted(completion_logps(model, packed(groups)))
    before = len(calls)
    assert_same_gradients(gradients_of(model, loss), gradients_of(
        model_of(family, "sdpa"), weighted(completion_logps(model_of(family, "sdpa"), packed(groups)))))
    assert len(calls) == before + 2  # the layers ran once more in the backward pass
    assert row_limit(model, groups, 0) >= 120
    assert_exact(model, groups, packed(groups))


@pytest.mark.parametrize("base", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_lora_and_with_the_reference_adapter(base, attention):
    policy, groups = adapted(base(attn_implementation=attention)).train(), random_groups(6)
    reference = AdapterReference(policy)
    shake(policy, seed=1)
    reference.update(0.4)
    assert row_limit(policy, groups, 0) == PACKED
    found = assert_exact(policy, groups, packed(groups))
    with reference.using() as model:
        of_reference = completion_logps(model, packed(groups))
        plain = plain_completion_logps(model, collate(sequences_of(groups), 0))
    torch.testing.assert_close(of_reference, plain, **ROUNDING)
    assert (of_reference - found).abs().min() > 1e-2  # another model than the policy
    with policy.disable_adapter():
        without = completion_logps(policy, packed(groups)).detach()
    torch.testing.assert_close(without, completion_logps(base(), packed(groups)).detach(), **ROUNDING)


@pytest.mark.parametrize("base", [tiny_neox, tiny_llama])
def test_with_a_4_bit_base(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no 4-bit models here")
    base(hidden_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    guard_4bit(model)
    policy, groups = adapted(model).train(), random_groups(6)
    shake(policy, seed=1, size=0.1)
    assert row_limit(policy, groups, 0) == PACKED
    assert_exact(policy, groups, packed(groups))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("base", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("how", ["autocast", "stored"])
def test_in_bfloat16(base, attention, how):
    """Both ways round differently: as far apart as one way and the same way with other padding, and not more.

    A step of bfloat16 is 1/256 of a number; log-probs of 45 nats are 0.2 apart, those of a wrong mask 2.5.
    """
    model, groups = base(attn_implementation=attention).train(), random_groups(6)
    if how == "stored":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert row_limit(model, groups, 0) == PACKED
        shared = completion_logps(model, packed(groups))
        plain = plain_completion_logps(model, collate(sequences_of(groups), 0))
        everyone = {"branch": torch.zeros_like(packed(groups)["branch"])}  # sees everyone
        wrong = completion_logps(model, packed(groups) | everyone)
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, plain, rtol=0, atol=0.25)
    assert (wrong - plain).abs().max() > 2.5
    exact = logps_by_hand(base().train(), sequences_of(groups))
    assert (shared - exact).abs().max() < 2 * (plain - exact).abs().max() + 0.05


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "OPT"])
def test_the_rounding_of_bfloat16_refuses_no_model(family):
    """Also where other batches of whole sequences happen to round alike: short completions, long prompts."""
    model = build(family)
    for stored in (False, True):
        for seed, (prompt, answer) in enumerate([((1, 12), (1, 9)), ((5, 40), (5, 30)), ((30, 60), (1, 3))]):
            groups = random_groups(8, prompt=prompt, completion=answer, seed=seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=not stored):
                assert row_limit(model, groups, 0) == PACKED
        model.bfloat16()


# ---------------------------------------------------------------------------------------------- who sees whom

GROUP = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]])
BRANCH = torch.tensor([[0, 0, 1, 2, 0, 1, 2, 0, 0]])
SEES = [
    [1, 0, 0, 0, 0, 0, 0, 0, 0],  # the prompt: what came before it
    [1, 1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0],  # chosen: the prompt and itself
    [1, 1, 0, 1, 0, 0, 0, 0, 0],  # rejected: the prompt and itself, not chosen
    [0, 0, 0, 0, 1, 0, 0, 0, 0],  # the next group: nothing of the one before it
    [0, 0, 0, 0, 1, 1, 0, 0, 0],
    [0, 0, 0, 0, 1, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 1, 0],  # padding sees padding, so that no softmax is over nothing
    [0, 0, 0, 0, 0, 0, 0, 1, 1],
]


def test_who_sees_whom_by_hand():
    for attention in ("sdpa", "eager", "flex_attention"):
        model = tiny_llama()
        model.config._attn_implementation = attention
        mask = shared_prompt_mask(model, GROUP, BRANCH)
        if attention == "sdpa":
            assert mask.dtype == torch.bool and mask.shape == (1, 1, 9, 9)
            assert mask[0, 0].int().tolist() == SEES
        elif attention == "eager":
            assert mask.dtype == torch.float32 and mask.shape == (1, 1, 9, 9)
            assert set(mask.unique().tolist()) == {0, torch.finfo(torch.float32).min}
            assert (mask[0, 0] == 0).int().tolist() == SEES
        else:
            places = torch.arange(9)
            found = [[int(mask.mask_mod(0, 0, i, j)) for j in places] for i in places]
            assert found == SEES and mask.seq_lengths == (9, 9)


def test_the_mask_for_eager_attention_has_the_models_dtype():
    model = tiny_llama(attn_implementation="eager").bfloat16()
    assert shared_prompt_mask(model, GROUP, BRANCH).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------- how long a row may be


def test_rows_of_several_groups_grow_to_1024_tokens_or_to_the_longest_group():
    model, short = model_of("Llama", "sdpa"), random_groups(4)
    assert row_limit(model, short, 0) == PACKED == 1024
    longest = random_groups(1, prompt=(1000, 1000), completion=(30, 30))
    assert row_limit(model, short + longest, 0) == 1060


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_a_window_as_long_as_the_longest_group_limits_the_rows_to_itself(family):
    groups = random_groups(6)
    longest = max(map(group_length, groups))
    model = build(family, sliding_window=longest)
    assert row_limit(model, groups, 0) == longest
    assert_exact(model, groups, packed(groups, longest))
    with pytest.raises(NotExact, match=f"window of {longest - 1} tokens is shorter .*, {longest} tokens"):
        row_limit(build(family, sliding_window=longest - 1), groups, 0)


# ------------------------------------------------------------- where it cannot be exact: said, and it is true

LONG, SHORT = random_groups(6), random_groups(6, prompt=(2, 3), completion=(3, 4))
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = DYNAMIC | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                      "original_max_position_embeddings": 12}
LOCAL = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
CHUNKED = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2,
           "attention_chunk_size": 8}
REFUSED = {
    "sliding window": ("Mistral", {"sliding_window": 8}, "attention window of 8 tokens is shorter"),
    "sliding window in some layers": ("Gemma3", {"sliding_window": 8}, "attention window of 8 tokens"),
    "local layers": ("GPTNeo", LOCAL, "attention window of 8 tokens"),
    "chunks": ("Llama4", CHUNKED, "layers of the kind chunked_attention"),
    "state": ("Rwkv", {"attention_hidden_size": 32}, "rwkv carries a state from token to token"),
    "dynamic RoPE": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12},
                     r"RoPE \(dynamic\) depends on the row's length"),
    "long RoPE": ("Llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 48},
                  r"RoPE \(longrope\) depends on the row's length"),
    "alibi": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2},
              r"on the longest row, \d+ tokens, log-probs differ by \d\.\d+ \(more than rounding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_share_is_refused_and_would_be_wrong(case):
    family, config, message = REFUSED[case]
    model = build(family, **config)
    with pytest.raises(NotExact, match=message):
        row_limit(model, LONG, 0)
    model.eval()
    expected = logps_by_hand(model, sequences_of(LONG))
    with torch.no_grad():
        assert (completion_logps(model, packed(LONG)) - expected).abs().max() > 0.1
        if "RoPE" not in case:  # HF's own batches depend on their longest sequence there
            alone = [completion_logps(model, collate([one], 0)) for one in sequences_of(LONG)]
            torch.testing.assert_close(torch.cat(alone).double(), expected, **ROUNDING)


def test_a_window_counts_places_in_the_row_even_where_all_sequences_fit():
    """So the group decides, and not its sequences: these have 7 tokens at most, and the window has 8."""
    assert max(len(prompt) + len(ids) for prompt, ids in sequences_of(SHORT)) <= 7
    model = build("GPTNeo", **LOCAL)
    with pytest.raises(NotExact, match="attention window of 8 tokens"):
        row_limit(model, SHORT, 0)
    expected = logps_by_hand(model, sequences_of(SHORT))
    assert (completion_logps(model, packed(SHORT)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "config", "message"), [
    ("Bloom", {"n_layer": 2, "n_head": 4}, "bloom refuses packed rows"),
    ("Falcon", {"alibi": True, "new_decoder_architecture": False}, "falcon refuses packed rows"),
    ("Mamba", {"state_size": 4}, "mamba carries a state from token to token"),
])
def test_a_model_that_does_not_take_packed_rows_is_refused(family, config, message):
    model = build(family, **config)
    with pytest.raises(NotExact, match=message):
        row_limit(model, LONG, 0)
    with pytest.raises((ValueError, RuntimeError)):
        completion_logps(model, packed(LONG))


def test_whatever_a_model_raises_on_packed_rows_it_is_refused():
    model = tiny_llama().train()

    def forbid(module, args, kwargs):
        if kwargs["attention_mask"].ndim == 4:
            raise AssertionError

    model.model.register_forward_pre_hook(forbid, with_kwargs=True)
    with pytest.raises(NotExact, match="llama refuses packed rows: AssertionError"):
        row_limit(model, LONG, 0)


def test_another_attention_is_refused_by_its_name():
    model = tiny_llama().train()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotExact, match="'flash_attention_2' takes no mask of our own; .* with sdpa"):
        row_limit(model, LONG, 0)


# ------------------------------------------------------------------ what no config says: models that lie


def liar(how, beyond=0, build=tiny_llama):
    """A model that does something wrong in rows of more than `beyond` tokens; its config says nothing."""
    model = build().train()

    def forget_the_mask(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > beyond and kwargs["attention_mask"].ndim == 4:
            return args, kwargs | {"attention_mask": None}

    def count_places(module, args, output):
        if output.shape[1] > beyond:
            return output + 0.01 * torch.arange(output.shape[1])[:, None] * torch.linspace(-1, 1, 32).sin()

    if how == "forgets the mask":
        model.base_model.register_forward_pre_hook(forget_the_mask, with_kwargs=True)
    elif how == "counts places":  # as a learned position would that is not taken from position_ids
        model.get_input_embeddings().register_forward_hook(count_places)
    return model


LIES = ["forgets the mask", "counts places"]


@pytest.mark.parametrize("build", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("how", LIES)
def test_a_model_that_lies_is_found_out(how, build):
    with pytest.raises(NotExact, match=r"on the longest row, \d+ tokens, log-probs differ by"):
        row_limit(liar(how, build=build), LONG, 0)
    row_limit(liar("not at all", build=build), LONG, 0)


@pytest.mark.parametrize("how", LIES)
def test_also_one_that_lies_on_the_longest_row_alone(how):
    longest = random_groups(1, prompt=(900, 900), completion=(65, 65))  # 1030: rows of several stop at 1024
    model = liar(how, beyond=1026)
    assert row_limit(model, LONG, 0) == 1024
    for place in (0, 3, 6):
        with pytest.raises(NotExact, match="on the longest row, 1030 tokens, log-probs differ"):
            row_limit(model, [*LONG[:place], *longest, *LONG[place:]], 0)


@pytest.mark.parametrize("how", LIES)
def test_also_one_that_lies_only_where_several_groups_fill_a_row_beyond_the_longest(how):
    groups = random_groups(120)
    model = liar(how, beyond=900)
    with pytest.raises(NotExact, match="log-probs differ"):
        row_limit(model, groups, 0)
    assert row_limit(model, groups[:2], 0) == 1024  # these never fill it


@pytest.mark.parametrize("how", LIES)
def test_the_rounding_of_bfloat16_hides_no_lie(how):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotExact, match="log-probs differ"):
        row_limit(liar(how), LONG, 0)


def test_a_model_whose_numbers_depend_on_its_company_is_no_measure_of_rounding():
    """It shifts by padding: what it says of two sequences at once is not what it says of each."""
    model = tiny_llama().train()

    def shift(module, args, kwargs):
        padding = (kwargs["attention_mask"] == 0).sum() if kwargs["attention_mask"].ndim == 2 else 5
        places = torch.arange(kwargs["input_ids"].shape[1])[None]
        return args, kwargs | {"position_ids": places * (1 + padding)}

    model.model.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(NotExact, match="log-probs differ"):
        row_limit(model, LONG, 0)


def test_the_check_is_without_dropout_and_leaves_it_as_it_was():
    policy = adapted(tiny_llama(), lora_dropout=0.3).train()

    def chances():
        return [module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)]

    before = chances()
    random_state = torch.get_rng_state()
    assert row_limit(policy, LONG, 0) == PACKED and policy.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert chances() == before and set(before) == {0.3}
    model = liar("forgets the mask")
    model.dropout = torch.nn.Dropout(0.2)
    with pytest.raises(NotExact):
        row_limit(model, LONG, 0)
    assert model.dropout.p == 0.2
