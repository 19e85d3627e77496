"""Recipes: what they refuse and with which words, how overrides and derived values meet, and the plan."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tralign_mini.recipe_file
from tralign_mini import mpo
from tralign_mini.recipe import Recipe, parse_overrides
from tralign_mini.recipe_file import RecipeError, shipped_recipes
from tralign_mini.trust_region import TrustRegion

WORLD = {"model": "little-tldr"}
SOFT = WORLD | {"reference": "soft"}
HARD = WORLD | {"reference": "hard", "tau": 50}


def refused(*arguments, **overrides) -> str:
    with pytest.raises(RecipeError) as error:
        Recipe.load(*arguments, **overrides)
    message = str(error.value)
    assert "pydantic" not in message and "http" not in message and "Input should" not in message
    return message


# --- what is refused: settings, and all that the message must say ---

BAD = [
    ({}, ["model is missing", "an embedded world"]),
    ({"model": "gpt2"}, ["data is missing", "model=gpt2", "little-tldr", "hh, tldr, ultrafeedback"]),
    (WORLD | {"alhpa": 0.6}, ["no setting 'alhpa'", "did you mean 'alpha'"]),
    (WORLD | {"xyzzy": 1}, ["no setting 'xyzzy'", "There are: model, data, method"]),
    (WORLD | {"method": "ddpo"}, ["method=ddpo", "must be one of dpo, ipo, kto", "did you mean 'dpo'"]),
    (WORLD | {"reference": "moving"}, ["reference=moving", "fixed, soft, hard"]),
    (WORLD | {"tuning": "QLoRA"}, ["tuning=QLoRA", "full, lora, qlora"]),
    (WORLD | {"dtype": "float16"}, ["dtype=float16", "auto, float32, bfloat16"]),
    (SOFT | {"alpha": 0}, ["alpha=0", "must be greater than 0", "weight of the policy"]),
    (SOFT | {"alpha": 1.5}, ["alpha=1.5", "must be less than or equal to 1"]),
    (SOFT | {"alpha": True}, ["alpha=True", "true and false are no values for this"]),
    (SOFT | {"alpha": "much"}, ["alpha=much", "must be a valid number"]),
    (SOFT | {"tau": 0}, ["tau=0", "greater than or equal to 1", "optimizer steps between two updates"]),
    (SOFT | {"tau": 2.5}, ["tau=2.5", "must be a valid integer"]),
    (HARD | {"alpha": 0.6}, ["reference=hard copies the policy", "alpha=0.6", "say reference=soft"]),
    (WORLD | {"reference": "hard"}, ["reference=hard needs tau", "512"]),
    (SOFT | {"method": "orpo"}, ["method=orpo", "orpo has no reference", "reference=fixed"]),
    (HARD | {"method": "sft"}, ["method=sft", "sft has no reference"]),
    (WORLD | {"method": "simpo", "logps": "sum"}, ["logps=sum", "simpo is defined with the mean"]),
    (WORLD | {"method": "sft", "logps": "mean"}, ["logps=mean with method=sft", "leave it out"]),
    (WORLD | {"beta": 0}, ["beta=0", "must be greater than 0"]),
    (WORLD | {"label_smoothing": 0.5}, ["label_smoothing=0.5", "must be less than 0.5"]),
    (WORLD | {"simpo_gamma": -1}, ["simpo_gamma=-1", "greater than or equal to 0"]),
    (WORLD | {"learning_rate": "fast"}, ["learning_rate=fast", "must be a valid number"]),
    (WORLD | {"epochs": 0}, ["epochs=0", "must be greater than 0"]),
    (WORLD | {"batch_size": 0}, ["batch_size=0", "greater than or equal to 1"]),
    (WORLD | {"batch_size": 64, "micro_batch_size": 12}, ["micro_batch_size=12", "batch_size=64", "8 does"]),
    (WORLD | {"batch_size": 4, "micro_batch_size": 8}, ["micro_batch_size=8", "batch_size=4", "4 does"]),
    (WORLD | {"method": "kto", "batch_size": 1}, ["batch_size=1", "method=kto", "another prompt"]),
    (WORLD | {"lora_rank": 16, "reference_rank": 8}, ["reference_rank=8", "lora_rank=16", "64"]),
    (WORLD | {"lora_dropout": 1}, ["lora_dropout=1", "less than 1"]),
    (WORLD | {"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
    (WORLD | {"resume": "maybe"}, ["resume=maybe", "must be a valid boolean"]),
    (WORLD | {"output": ""}, ["output=", "at least 1 character", "directory of the run"]),
    ({"model": ["a"]}, ["model=['a']", "must be a valid string"]),
]


@pytest.mark.parametrize(("settings", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_settings_are_refused_with_key_value_and_reason(settings, words):
    message = refused(settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", ".nan", "-inf"])
def test_nan_and_infinity_are_refused_for_every_number(value):
    for key, field in Recipe.model_fields.items():
        if "float" in str(field.annotation) or "int" in str(field.annotation):
            message = refused(SOFT | {key: value})
            assert f"{key}={value}" in message, message


def test_all_errors_come_in_one_message_a_line_each():
    with pytest.raises(RecipeError) as error:
        Recipe(model="little-tldr", alhpa=1, beta=-1, tau=0)
    assert len(error.value.problems) == 3
    assert len(str(error.value).splitlines()) == 4
    with pytest.raises(RecipeError) as error:
        Recipe(model="little-tldr", reference="hard", alpha=0.5, method="kto", batch_size=1)
    assert len(error.value.problems) == 3  # tau is missing, too


def test_every_setting_has_a_description():
    for key, field in Recipe.model_fields.items():
        assert field.description and "\n" not in field.description, key


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Recipe(**SOFT).alpha = 0.5


# --- what is derived ---


def test_derived_values():
    fixed, soft, hard = Recipe(**WORLD), Recipe(**SOFT), Recipe(**HARD)
    assert (fixed.alpha, fixed.tau) == (None, None)
    assert (soft.alpha, soft.tau) == (0.6, 1)
    assert (hard.alpha, hard.tau) == (1.0, 50)
    assert soft.data == "little-tldr" and soft.logps == "sum" and soft.learning_rate == 1e-6
    assert Recipe(**WORLD, method="orpo").logps == "mean"
    assert Recipe(**WORLD, method="simpo", logps="mean").logps == "mean"
    assert Recipe(**WORLD, method="ipo", logps="mean").logps == "mean"
    lora = Recipe(**SOFT, tuning="lora", lora_rank=4, seed=3)
    assert (lora.lora_alpha, lora.reference_rank, lora.learning_rate) == (8.0, 16, 1e-5)
    assert lora.output == "runs/little-tldr-dpo-soft-lora-3"
    assert Recipe(model="m", data="some/file.jsonl.gz", method="sft").output == "runs/file-sft-0"


def test_trust_region():
    assert Recipe(**WORLD).trust_region() == TrustRegion.fixed()
    assert Recipe(**WORLD, tau=7).trust_region() == TrustRegion.fixed()
    assert Recipe(**SOFT, alpha=0.3, tau=7).trust_region() == TrustRegion.soft(0.3, 7)
    assert Recipe(**HARD).trust_region() == TrustRegion.hard(50)


def test_notes_name_what_is_not_used():
    assert Recipe(**SOFT).notes() == Recipe(**HARD).notes() == Recipe(**WORLD).notes() == []
    assert "alpha=0.3 is not used" in Recipe(**WORLD, alpha=0.3).notes()[0]
    assert "tau=9 is not used" in Recipe(**WORLD, tau=9).notes()[0]
    assert "reference=hard" in Recipe(**SOFT, alpha=1).notes()[0]
    assert "method=simpo" in Recipe(**WORLD, simpo_gamma=1).notes()[0]
    assert Recipe(**WORLD, method="simpo", simpo_gamma=1).notes() == []
    assert "max_steps=3 decides" in Recipe(**WORLD, max_steps=3, epochs=2).notes()[0]


# --- load ---


def test_another_reference_drops_the_files_alpha_and_keeps_its_tau():
    source = SOFT | {"alpha": 0.3, "tau": 16}
    assert Recipe.load(source, beta=0.2).alpha == Recipe.load(source, reference="soft").alpha == 0.3
    hard = Recipe.load(source, reference="hard")
    assert (hard.alpha, hard.tau) == (1.0, 16)
    assert (hard.replace(reference="soft").alpha, hard.replace(reference="soft").tau) == (0.6, 16)
    assert Recipe.load(source, reference="fixed").alpha is None
    assert "alpha=0.3" in refused(source, reference="hard", alpha=0.3)
    # The default tau of soft is not taken over: a hard update after every step leaves no margin to train on.
    assert "needs tau" in refused(Recipe(**SOFT), reference="hard")


def test_derived_values_follow_overrides_and_chosen_ones_stay():
    recipe = Recipe(**SOFT, tuning="lora")
    assert recipe.replace(lora_rank=4).lora_alpha == 8.0 and recipe.replace(lora_rank=4).reference_rank == 16
    assert recipe.replace(lora_alpha=5).replace(lora_rank=4).lora_alpha == 5
    assert recipe.replace(seed=7).output == "runs/little-tldr-dpo-soft-lora-7"
    assert recipe.replace(output="here").replace(seed=7).output == "here"
    assert recipe.replace(reference="fixed", method="simpo").logps == "mean"
    assert recipe.replace(beta=0.3).replace(beta=None).beta == 0.05  # none: the default
    assert recipe.replace(model="little-hh").data == "little-hh"
    assert recipe.replace(model="my/model").data == "little-tldr"
    assert recipe.replace(model="my/model", data="hh").data == "hh"


def test_load_takes_names_files_directories_mappings_and_recipes(tmp_path, monkeypatch):
    recipe = Recipe.load("little-tldr", output=tmp_path / "run", alpha=0.5)
    (tmp_path / "run").mkdir()
    recipe.save(tmp_path / "run" / "recipe.yaml")
    for source in (tmp_path / "run", str(tmp_path / "run" / "recipe.yaml"), recipe.model_dump(), recipe):
        assert Recipe.load(source) == recipe
        assert Recipe.load(source, tau=3) == recipe.replace(tau=3) != recipe
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Recipe.load("~/run") == recipe
    assert Recipe(model="~/model", data="hh").model == str(tmp_path / "model")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert "did you mean 'little-tldr'?" in refused("litle-tldr")
    assert "no such file" in refused("nowhere/recipe.yaml") and "little-hh" in refused("nowhere/recipe.yaml")
    assert "recipe.yaml" in refused(tmp_path)  # a directory without one
    assert "line 2" in refused(write(path, "model: a\ndata: b: c\n"))
    assert "tau is given twice" in refused(write(path, "model: little-tldr\ntau: 1\ntau: 2\n"))
    assert "`key: value`" in refused(write(path, "- little-tldr\n"))
    assert "`key: value`" in refused(write(path, ""))
    assert "UTF-8" in refused(write(path, b"\xff\xfe\x00"))
    assert "not readable" in refused(write(path, "model: !!python/object:os.system x\n"))
    assert "not readable" in refused(write(path, "{[1]: 2}\n"))
    assert str(path) in refused(write(path, "model: little-tldr\nbeta: -1\n"))


texts = st.text(st.characters(codec="utf-8", exclude_characters="~"), min_size=1)
numbers = st.floats(1e-300, 1e300)


@given(model=texts, data=texts, output=texts, beta=numbers, learning_rate=numbers,
       alpha=st.none() | st.floats(0, 1, exclude_min=True), tau=st.none() | st.integers(1, 10**9),
       reference=st.sampled_from(["fixed", "soft"]), tuning=st.sampled_from(["full", "lora", "qlora"]),
       max_steps=st.none() | st.integers(1), lora_rank=st.integers(1, 999), seed=st.integers(0, 2**32 - 1),
       resume=st.booleans())
def test_a_saved_recipe_is_the_same_recipe(tmp_path_factory, **settings):
    recipe = Recipe(**settings)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.load(path).to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(recipe.to_yaml()).keys() == Recipe.model_fields.keys()  # plain YAML, every setting


# --- the command line's key=value ---


def test_overrides_are_yaml_scalars():
    arguments = ["learning_rate=1e-6", "alpha = 0.5", "tau=010", "max_steps=none", "data=null", "resume=yes",
                 "output=2024-01-01", "model=1e3", "seed=7"]
    assert parse_overrides(arguments) == {
        "learning_rate": 1e-6, "alpha": 0.5, "tau": "010", "max_steps": None, "data": None, "resume": True,
        "output": "2024-01-01", "model": "1e3", "seed": 7,
    }
    assert parse_overrides(["output=a=b: {"]) == {"output": "a=b: {"}
    assert Recipe.load("little-tldr", **parse_overrides(["tau=010"])).tau == 10  # not octal


@pytest.mark.parametrize(("argument", "words"), [
    ("alpha", "'alpha' is not key=value"),
    ("alpha=", "alpha=none"),
    ("=0.6", "is not key=value"),
    ("--alpha=0.6", "write alpha=0.6"),
    ("beta=2", "beta is given twice: 1 and 2"),
])
def test_bad_overrides_are_refused(argument, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_overrides(["beta=1", argument])


# --- the plan ---


def test_plan_counts_steps_and_updates():
    recipe = Recipe(**SOFT, alpha=0.6, tau=16, batch_size=64)
    plan = recipe.plan(9800)
    assert (plan.rows, plan.steps, plan.updates, plan.warnings) == (9800, 153, 9, [])
    assert recipe.replace(epochs=4, train_pairs=1500).plan(9800).steps == 93  # 6000 // 64
    assert recipe.replace(max_steps=500).plan(9800).steps == 500
    assert recipe.replace(epochs=0.29, batch_size=1).plan(100).steps == 29  # 0.29 * 100 < 29 in floats
    text = str(plan)
    for words in ("9800 pairs", "0.6 policy + 0.4 reference", "every 16 steps: 9 updates", "153 of 64"):
        assert words in text
    assert "WARNING" not in text
    assert "completions" in str(recipe.replace(method="kto").plan(9800))
    assert "none" in str(recipe.replace(method="sft", reference="fixed").plan(9800))
    assert "note      tau=16 is not used" in str(recipe.replace(reference="fixed").plan(9800))
    lora = str(recipe.replace(tuning="lora", lora_rank=4).plan(9800))
    assert "rank 4, lora_alpha 8, reference rank 16" in lora


@pytest.mark.parametrize(("tau", "updates", "words"), [
    (512, 0, "tau=512 but the run has 153 steps: the reference never moves, this is plain DPO; "
             "choose tau <= 51 for 3 updates"),
    (153, 1, "the reference moves only after the last step, this is plain DPO"),
    (77, 1, "the reference moves only once, at step 77; choose tau <= 51 for 3 updates"),
    (76, 2, None),
])
@pytest.mark.parametrize("reference", ["soft", "hard"])
def test_a_reference_that_hardly_moves_warns_loudly(reference, tau, updates, words):
    plan = Recipe(**WORLD, reference=reference, tau=tau).plan(9800)
    assert plan.updates == updates
    assert bool(plan.warnings) == bool(words) == ("WARNING" in str(plan))
    assert not words or words in str(plan)
    if words:
        advised = int(re.search(r"tau <= (\d+)", words + "tau <= 51")[1])
        assert Recipe(**WORLD, reference=reference, tau=advised).plan(9800).updates == 3


def test_a_warm_up_as_long_as_the_run_warns():
    short, enough = (Recipe(**WORLD, warmup_steps=10, max_steps=steps).plan(9800) for steps in (10, 11))
    assert "WARNING   warmup_steps=10 but the run has 10 steps: the learning rate never gets" in str(short)
    assert not enough.warnings


def test_plan_of_a_very_short_run():
    assert "every step: 1 update\n" in str(Recipe(**SOFT, tau=1, max_steps=1).plan(100))
    assert "train longer" in str(Recipe(**SOFT, tau=5, max_steps=1).plan(100))
    assert "tau <= 1 for 2 updates" in str(Recipe(**SOFT, tau=5, max_steps=2).plan(100))


@pytest.mark.parametrize(("settings", "words"), [
    ({"batch_size": 64}, "50 pairs to train on, less than one batch of batch_size=64"),
    ({"batch_size": 64, "method": "kto"}, "50 completions"),
    ({"batch_size": 50, "epochs": 0.5}, "epochs=0.5 of 50 pairs is less than one batch"),
    ({"batch_size": 2, "train_pairs": 51}, "train_pairs=51, but little-tldr has only 50 pairs"),
])
def test_too_little_data_is_refused(settings, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        Recipe(**WORLD, **settings).plan(50)


# --- the shipped recipes ---

@pytest.mark.parametrize("name", ["data", "eval_data", "output"])
def test_a_path_is_as_good_as_its_text(name):
    assert getattr(Recipe(**WORLD | {name: Path("~") / "here"}), name) == os.path.expanduser("~/here")


FOLDER = Path(tralign_mini.recipe_file.__file__).parent / "recipes"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_give_a_reason_for_each_value(name):
    stages = [Recipe.load(name)] if not name.endswith("mpo") else [
        mpo.stage_recipe(mpo.load_settings(name, {}), Path("x"), stage)
        for stage in ("reward", "easy", "ppo")]
    for recipe in stages:
        assert not recipe.notes() and not recipe.plan(100_000).warnings
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "Status:" in text
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.]+: \S+ +# \S.{2,}", line), line


def test_the_papers_recipes_hold_the_papers_numbers():
    names = [name for name in shipped_recipes() if name.startswith("pythia")]
    assert len(names) == 6
    for name in names:
        recipe = Recipe.load(name)
        assert recipe.model == "EleutherAI/pythia-2.8b" and recipe.data == name.split("-")[2]
        assert (recipe.method, recipe.beta, recipe.learning_rate, recipe.epochs) == ("dpo", 0.05, 1e-6, 1)
        assert recipe.max_prompt_tokens + recipe.max_completion_tokens == 1024
        assert (recipe.max_grad_norm, recipe.warmup_steps) == (2.0, 100)
        assert recipe.trust_region() == {
            "soft": TrustRegion.soft(0.6, 1), "tau512": TrustRegion.soft(0.6, 512),
            "hard": TrustRegion.hard(512)}[name.rpartition("-")[2]]


def test_a_bad_recipe_is_refused_before_torch_is_imported():
    code = "import sys; from tralign_mini.recipe import Recipe; Recipe.load('little-tldr').to_yaml();"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1]).returncode == 0


def test_a_method_without_reference_drops_the_reference_of_the_source_but_not_that_of_the_overrides():
    recipe = Recipe.load("little-tldr", method="simpo")
    assert (recipe.reference, recipe.alpha, recipe.tau) == ("fixed", None, None)
    with pytest.raises(RecipeError, match="simpo has no reference"):
        Recipe.load("little-tldr", method="simpo", reference="soft")


@pytest.mark.parametrize("batch, micro", [(8, 8), (100, 10), (7, 7), (64, 16), (48, 16)])
def test_another_batch_size_lowers_the_micro_batch_of_the_source_to_a_divisor(batch, micro):
    assert Recipe.load("little-tldr", batch_size=batch).micro_batch_size == micro
    with pytest.raises(RecipeError, match="does not divide"):
        Recipe.load("little-tldr", batch_size=batch, micro_batch_size=batch + 1)
