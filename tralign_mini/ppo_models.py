"""The value function and the reward of a PPO run.

With full fine-tuning the value function is a sequence classifier of its own: a copy of the reward model or,
where the reward is a function, of the policy's backbone under a head of zeros. With LoRA there is one base
model in memory, and policy (`default`), `reference`, `value` and `reward` are adapters on it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn

from .adapters import POLICY
from .logprobs import predictions
from .models import is_adapter
from .reward import RewardModel, read_at, sequence_rewards
from .runs import Run

VALUE, REWARD = "value", "reward"


class SharedClassifier(nn.Module):
    """A sequence classifier on the policy's base: one of the policy's adapters, and a head without bias."""

    base_model_prefix = "backbone"  # where transformers' classifiers have theirs

    def __init__(self, policy: PeftModel, adapter: str, head: torch.Tensor):
        super().__init__()
        self.policy, self.adapter = [policy], adapter  # in a list: not one of this module's own modules
        self.backbone, self.config = policy.get_base_model().get_decoder(), policy.config
        self.score = nn.Linear(head.shape[1], 1, bias=False, device=policy.device)
        self.score.weight.data.copy_(head)

    @contextmanager
    def active(self):
        """Inside, the shared base computes with this adapter, and gradients go to it."""
        policy = self.policy[0]
        policy.set_adapter(self.adapter)
        try:
            yield
        finally:
            policy.set_adapter(POLICY)


def active(classifier: nn.Module):
    """The context in which a classifier computes: its own adapter's, if it shares the policy's base."""
    return classifier.active() if isinstance(classifier, SharedClassifier) else nullcontext()


def completion_values(model: nn.Module, batch: dict) -> torch.Tensor:
    """V of the states in which each completion token was chosen, (tokens,), in the order of the log-probs."""
    inputs, source, _, counted = predictions(model, batch)
    return read_at(model, inputs, source[counted])


def trained_parameters(value: nn.Module) -> dict[str, nn.Parameter]:
    """The value function's weights by name: its adapter and head, or all of it. Never one of the policy's."""
    if isinstance(value, SharedClassifier):
        return _adapter_weights(value, VALUE) | {"score.weight": value.score.weight}
    return dict(value.named_parameters())


def value_and_score(policy: nn.Module, tokenizer, reward) -> tuple[nn.Module, Callable, str]:
    """(value function, score(prompts, samples) -> rewards, what they are in a line).

    reward: what `RewardModel.load` takes, or a function of (prompts, texts) that gives a number for each.
    """
    shared = isinstance(policy, PeftModel)
    if callable(reward):
        value = _shared(policy, VALUE) if shared else _from_policy(policy)
        return value, lambda prompts, samples: reward(prompts, samples.texts), "a function; values start at 0"
    if shared and not isinstance(reward, RewardModel) and (folder := _fitting_adapter(policy, reward)):
        frozen, value = _shared(policy, REWARD, folder), _shared(policy, VALUE, folder)

        def score(prompts, samples):
            with active(frozen):
                return sequence_rewards(frozen, samples.sequences, tokenizer.pad_token_id)

        return value, score, f"{folder}, an adapter on the policy's base; values start from it"
    model = RewardModel.load(reward)
    if model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"reward_model={reward} has another tokenizer than the policy, so it cannot read "
                         "its tokens, and no value can start from it. Train one on the policy's base.")
    if shared:
        value, start = _shared(policy, VALUE), "0: its base is not the policy's"
    elif _quantised(model.model):
        value, start = _from_policy(policy), "0: its base has 4 bits and cannot be trained in full"
    else:
        value, start = copy.deepcopy(model.model), "it"
        value = value.merge_and_unload() if isinstance(value, PeftModel) else value
        value.requires_grad_(True).float().train()
    about = f"{reward}; values start from {start}"
    return value, lambda prompts, samples: model.score_ids(samples.sequences), about


def _from_policy(policy: nn.Module) -> nn.Module:
    """A classifier with a copy of the policy's backbone and a head of zeros."""
    value = nn.Module()
    value.base_model_prefix, value.config = "backbone", policy.config
    value.backbone = copy.deepcopy(policy.get_decoder())
    value.score = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False, device=policy.device)
    nn.init.zeros_(value.score.weight)
    return value.requires_grad_(True).train()


def _fitting_adapter(policy: PeftModel, reward) -> str | None:
    """The folder of a reward model that is an adapter on the policy's very base, in as many bits, or None."""
    folder, four_bit = Path(getattr(reward, "directory", reward)), None
    if (folder / "recipe.yaml").is_file():
        run = Run(folder)
        if run.recipe.method != "reward":
            return None  # RewardModel.load says what is wrong with it
        folder, four_bit = run.last_checkpoint, run.recipe.tuning == "qlora"
    if not is_adapter(str(folder)) or four_bit not in (None, _quantised(policy.get_base_model())):
        return None
    configs = policy.peft_config[POLICY], LoraConfig.from_pretrained(folder)
    bases = {os.path.realpath(config.base_model_name_or_path) for config in configs}
    return str(folder) if len(bases) == 1 else None


def _quantised(model: nn.Module) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _shared(policy: PeftModel, adapter: str, folder: str | None = None) -> SharedClassifier:
    """One more adapter on the policy's base: the reward model's in `folder`, or the policy's with head 0."""
    if folder:
        config, weights = LoraConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu")
        heads = [weights.pop(name) for name in list(weights) if name.endswith("score.weight")]
        if len(heads) != 1:
            raise ValueError(f"{folder} is an adapter with {len(heads)} reward heads instead of one. Give a "
                             "run of method=reward, or a checkpoint of one.")
        head = heads[0]
    else:
        config, weights = copy.deepcopy(policy.peft_config[POLICY]), None
        head = torch.zeros(1, policy.config.get_text_config().hidden_size)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    config.lora_dropout = 0.0
    with torch.random.fork_rng(devices=[]):  # PEFT draws A at random
        policy.add_adapter(adapter, config)
    own = _adapter_weights(policy, adapter)
    if weights is None:
        for name, weight in _adapter_weights(policy, POLICY).items():
            own[name.replace(f".{POLICY}.weight", f".{adapter}.weight")].data = weight.detach().clone()
    else:
        found = set_peft_model_state_dict(policy, weights, adapter_name=adapter)
        if wrong := [key for key in found.missing_keys if key in own] + found.unexpected_keys:
            raise ValueError(f"{folder} does not fit the policy's base: {', '.join(wrong[:3])}.")
    for weight in own.values():
        weight.data = weight.data.float()
    policy.set_adapter(POLICY)
    return SharedClassifier(policy, adapter, head)


def _adapter_weights(module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters()
            if name.endswith((f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight"))}
