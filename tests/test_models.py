"""A policy is loaded so that what trains is float32, what compares has no noise, what is frozen stays so."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers import (
    EOS,
    metrics,
    random_rows,
    tiny_llama,
    tiny_neox,
    tiny_run,
    tiny_tokenizer,
    weights,
    write_model,
)
from lora_helpers import adapted, dense, lora_layers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tralign_mini as tr
from tralign_mini import models
from tralign_mini.batches import collate_rows

ARCHITECTURES = pytest.mark.parametrize("make", [tiny_neox, tiny_llama])


def recipe(folder, **settings):
    return tr.Recipe(**{"model": str(folder), "data": "none", "lora_rank": 2} | settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each architecture, the weights stored in bfloat16 as on the Hub."""
    root = tmp_path_factory.mktemp("models")
    return {make: write_model(root / make.__name__, make(hidden_size=64).bfloat16())
            for make in (tiny_neox, tiny_llama)}


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """A PEFT folder on the tiny GPT-NeoX, with random A and B."""
    folder = tmp_path_factory.mktemp("adapter")
    base = models.load_base(str(folders[tiny_neox]), torch.float32)
    adapted(base).save_pretrained(folder)
    return folder


@ARCHITECTURES
def test_full_training_stores_every_weight_in_float32(folders, make):
    policy = tr_policy(folders[make])
    assert not isinstance(policy, PeftModel) and policy.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    stored = make(hidden_size=64).bfloat16().state_dict()
    assert all(torch.equal(p, stored[name].float()) for name, p in policy.state_dict().items())


def tr_policy(folder, **settings):
    return models.load_policy(recipe(folder, **settings))


@ARCHITECTURES
def test_lora_trains_float32_factors_on_all_linear_layers_but_the_head(folders, make):
    policy = tr_policy(folders[make], tuning="lora", lora_rank=3)
    base = make(hidden_size=64)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    head = {name for name in linear if base.get_submodule(name) is base.get_output_embeddings()}
    assert set(lora_layers(policy)) == linear - head and len(linear) >= 9
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == (".default." in name), name
        assert parameter.dtype == torch.float32, name
    assert all(layer.r["default"] == 3 and layer.scaling["default"] == 2
               for layer in lora_layers(policy).values())


def test_lora_settings_arrive(folders):
    policy = tr_policy(folders[tiny_neox], tuning="lora", lora_alpha=10, lora_dropout=0.25)
    for layer in lora_layers(policy).values():
        assert layer.scaling["default"] == 5 and layer.lora_dropout["default"].p == 0.25


def test_a_fresh_adapter_has_no_effect_and_depends_on_the_seed(folders):
    one, again, other = (tr_policy(folders[tiny_neox], tuning="lora", seed=seed) for seed in (1, 1, 2))
    ids = torch.arange(3, 13)[None]
    base = models.load_base(str(folders[tiny_neox]), torch.float32)
    assert torch.equal(one(ids).logits, base(ids).logits)
    a, b, c = (weights(policy) for policy in (one, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@ARCHITECTURES
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_dropout_is_off_wherever_the_model_keeps_it(tmp_path, make, tuning):
    noisy = {"attention_dropout": 0.5} | ({"hidden_dropout": 0.5} if make is tiny_neox else {})
    folder = write_model(tmp_path / "noisy", make(**noisy))
    policy, ids = tr_policy(folder, tuning=tuning), torch.arange(3, 13)[None]
    in_training = policy.train()(ids).logits
    assert torch.equal(in_training, policy.eval()(ids).logits)
    loud = make(**noisy).train()
    assert not torch.equal(loud(ids).logits, loud(ids).logits)  # or there was nothing to switch off


@ARCHITECTURES
def test_qlora_stores_the_base_in_four_bits_and_the_adapter_in_float32(folders, make):
    bnb = pytest.importorskip("bitsandbytes")
    policy = tr_policy(folders[make], tuning="qlora")
    layers = lora_layers(policy)
    assert set(layers) == set(lora_layers(tr_policy(folders[make], tuning="lora")))
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        assert isinstance(weight, bnb.nn.Params4bit) and weight.quant_state.quant_type == "nf4"
        assert weight.element_size() * weight.numel() * 2 == layer.in_features * layer.out_features
        assert not layer.get_base_layer().support_avx512bf16_for_cpu
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(layers) and all(p.dtype == torch.float32 for p in trainable)
    ids = torch.arange(3, 13)[None]
    exact = models.load_base(str(folders[make]), torch.float32)(ids).logits
    assert 0 < (policy(ids).logits - exact).norm() < 0.5 * exact.norm()  # it is that model, rounded


def test_qlora_without_bitsandbytes_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"tuning=qlora needs bitsandbytes.*pip install"):
        tr_policy(folders[tiny_neox], tuning="qlora")


@ARCHITECTURES
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradient_checkpointing_recomputes_the_same_gradients(folders, monkeypatch, make, tuning):
    batch = collate_rows(random_rows("dpo", 4), "dpo", 0)["sequences"]
    passes = []
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: passes.append(1) or original(self, x))

    def gradients(checkpointing):
        policy = tr_policy(folders[make], tuning=tuning, gradient_checkpointing=checkpointing)
        passes.clear()
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:  # zero at the start, and then A has no gradient
                    parameter.fill_(0.01)
        tr.completion_logps(policy, batch).sum().backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}, len(passes)

    (plain, once), (checkpointed, twice) = gradients(False), gradients(True)
    assert twice > 1.3 * once  # it did recompute: all layers, though not the head
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-5, atol=1e-6) for name in plain)
    assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if "lora" in name)


def test_a_run_with_gradient_checkpointing_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tr.Run, "report", lambda self: None)
    settings = {"tuning": "lora", "reference": "soft", "max_steps": 4, "eval_prompts": 1, "lora_dropout": 0.2}
    for name, on in (("plain", False), ("checkpointed", True)):
        tr.train(tiny_run(tmp_path, output=str(tmp_path / name), gradient_checkpointing=on, **settings))
    for plain, checkpointed in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "checkpointed"),
                                   strict=True):
        assert plain == pytest.approx(checkpointed, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- adapters on disk


def test_an_adapter_folder_is_recognised(folders, adapter):
    assert models.is_adapter(str(adapter))
    assert not models.is_adapter(str(folders[tiny_neox]))
    assert not models.is_adapter("EleutherAI/pythia-70m")
    assert not models.is_adapter("little-tldr")


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_training_goes_on_from_an_adapter_and_keeps_it_as_the_initial_policy(adapter, tuning):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    policy = tr_policy(adapter, tuning=tuning)
    stored = tr_policy(adapter, tuning="lora")
    assert policy.active_adapters == ["default"]
    for name, product in dense(policy).items():
        assert torch.equal(product, dense(stored)[name]) and product.abs().sum() > 0
        assert torch.allclose(dense(policy, "initial")[name], product)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.named_parameters() if ".default." in name}


def test_an_adapter_cannot_be_trained_in_full(adapter):
    with pytest.raises(ValueError, match=r"is a PEFT adapter, and tuning=full.*Use tuning=lora"):
        tr_policy(adapter)


def test_an_adapter_that_cannot_be_averaged_is_refused_before_the_base_is_loaded(
    folders, tmp_path, monkeypatch
):
    base = models.load_base(str(folders[tiny_neox]), torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    get_peft_model(base, config).save_pretrained(tmp_path)
    monkeypatch.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    with pytest.raises(ValueError, match="use_dora=True.*magnitude"):
        tr_policy(tmp_path, tuning="lora")


def test_the_tokenizer_of_an_adapter_is_its_own_or_the_bases(folders, adapter, tmp_path):
    assert models.load_tokenizer(str(adapter)).eos_token_id == EOS  # the adapter's folder has none
    changed = tiny_tokenizer()
    changed.eos_token = "w7"
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).eos_token == "w7"


# ---------------------------------------------------------------- tokenizers, dtypes, messages


def test_a_tokenizer_without_padding_pads_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(str(tmp_path)).pad_token_id == EOS
    assert tiny_tokenizer().pad_token_id != EOS


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token.*eos_token"):
        models.load_tokenizer(str(tmp_path))


def test_an_unknown_model_is_named_with_what_would_do(tmp_path):
    with pytest.raises(ValueError,
                       match=r"model='\./nothing-there' could not be loaded; looked for as a local folder\."):
        models.load_base("./nothing-there", torch.float32)
    with pytest.raises(ValueError, match="as a local folder and on the Hugging Face Hub.*little-tldr"):
        models.load_base("nobody/nothing-there", torch.float32)


def test_a_folder_without_a_model_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="could not be loaded; looked for as a local folder"):
        models.load_base(str(tmp_path), torch.float32)


def cut(tensors):
    del tensors[max(tensors)]


@pytest.mark.parametrize("change, message", [
    (cut, "its files lack .*weight, which would be random"),  # transformers would draw it, with a warning
    (lambda tensors: tensors.update({key: value[:3] for key, value in tensors.items()}), "mismatched_sizes"),
])
def test_a_model_whose_weights_do_not_fit_is_refused(tmp_path, change, message):
    write_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"could not be loaded; looked for as a local folder.*{message}"):
        models.load_base(str(tmp_path), torch.float32)


def test_an_adapter_is_not_taken_for_a_whole_model(adapter):
    with pytest.raises(ValueError, match="it is a PEFT adapter: download its base"):
        models.load_base(str(adapter), torch.float32)


def test_half_a_file_is_refused(tmp_path):
    file = write_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be loaded; .*Reason: .*deserializing header"):
        models.load_base(str(tmp_path), torch.float32)


def test_an_adapter_that_is_incomplete_is_refused(adapter, tmp_path):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    cut(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"could not be loaded.*missing adapter keys.*lora_B"):
        tr_policy(tmp_path, tuning="lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for load in (lambda: tr_policy(tmp_path, tuning="lora"), lambda: models.load_tokenizer(str(tmp_path))):
        with pytest.raises(ValueError, match="names no base_model_name_or_path"):
            load()


def test_an_embedded_world_names_its_own_model():
    assert models.model_path("little-tldr").endswith("little-tldr/model")
    assert models.model_path("/some/folder") == "/some/folder"


@pytest.mark.parametrize(("dtype", "gpu", "expected"), [
    ("auto", False, torch.float32),
    ("auto", True, torch.bfloat16),
    ("float32", True, torch.float32),
    ("bfloat16", False, torch.bfloat16),
])
def test_the_dtype_of_the_arithmetic(monkeypatch, dtype, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: gpu)
    assert models.compute_dtype(tr.Recipe(model="none", data="none", dtype=dtype)) is expected


def test_bfloat16_arithmetic_leaves_what_trains_in_float32(folders):
    full = tr_policy(folders[tiny_neox], dtype="bfloat16")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    lora = tr_policy(folders[tiny_neox], dtype="bfloat16", tuning="lora")
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
