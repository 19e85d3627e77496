"""The tree: completions are paths and one small network takes every step, so a lesson spreads to other paths.

The tree MDP of Rafailov et al. (arXiv 2406.02900): one start state, three actions in every state,
deterministic; a completion is a path from the root to a leaf. The paper's depth, network, pretraining, pairs
and optimizer are not known to us: ours are stated at `Tree`. `toy.train` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

ACTIONS = 3
SFT_LEARNING_RATE = 1e-2


class Data(NamedTuple):
    """What a problem is about: indices of completions, one row a configuration."""

    chosen: torch.Tensor  # (configs, a): the completions that are truly good
    rejected: torch.Tensor  # (configs, b): the ones that are truly bad; all others are out of distribution
    pairs: torch.Tensor  # (configs, pairs, 2): (preferred, other) as the data says; a label may be wrong


@dataclass(frozen=True)
class Tree:
    """A tree of 3^depth paths. A seed draws the network's first weights and the pairs' paths, all different.

    The policy is a network with a tanh layer of `hidden` units over the actions so far (one-hot, zeros where
    none was taken yet); weights are drawn from N(0, 1 / inputs in use), biases are 0. It first imitates both
    paths of every pair: `sft_steps` full-batch steps of Adam, 1e-2, on cross-entropy. That is the initial
    policy and the first reference. Preferences are then learnt by full-batch Adam with `learning_rate`.
    """

    depth: int = 5
    hidden: int = 16
    pairs: int = 4
    sft_steps: int = 200
    learning_rate: float = 1e-2

    def __post_init__(self):
        if self.depth < 2 or not 0 < 2 * self.pairs < ACTIONS ** self.depth:
            raise ValueError(f"depth = {self.depth} and pairs = {self.pairs}: a tree has two levels or more, "
                             "and more paths than the pairs, one or more, take. Use a deeper tree.")

    def data(self, seeds: Sequence[int]) -> Data:
        """Pairs of paths, drawn without replacement; the actions of a path are the digits of its index."""
        draws = {seed: torch.randperm(ACTIONS ** self.depth, generator=_generator(seed, "pairs"))
                 for seed in set(seeds)}
        chosen, rejected = torch.stack([draws[seed] for seed in seeds])[:, : 2 * self.pairs].chunk(2, 1)
        return Data(chosen, rejected, torch.stack([chosen, rejected], -1))

    def start(self, seeds: Sequence[int]) -> list[torch.Tensor]:
        """Parameters of the initial policies, each (configs, ...). New seeds train first: see `Tree`."""
        distinct = tuple(sorted(set(seeds)))
        rows = [distinct.index(seed) for seed in seeds]
        return [parameter[rows] for parameter in _imitate(self, distinct)]

    def logps(self, parameters: list[torch.Tensor]) -> torch.Tensor:
        """log p of every path, (configs, 3^depth): every state once, and then the sums along the paths."""
        weights, bias, head, head_bias = parameters
        states, choices = _layout(self.depth)
        hidden = torch.tanh(torch.baddbmm(bias, states.expand(len(weights), -1, -1), weights))
        logps = F.log_softmax(torch.baddbmm(head_bias, hidden, head), -1).flatten(1)  # (configs, 3 * states)
        return logps.index_select(1, choices.flatten()).view(-1, *choices.shape).sum(-1)

    def optimizer(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        # not fused: that one rounds differently at a tensor's end, and equal configurations would drift apart
        return torch.optim.Adam(parameters, lr=self.learning_rate, foreach=True)


@lru_cache
def _layout(depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Network inputs of all states, (states, 3 (depth - 1)), and the choices, 3 * state + action, that make
    up each path, (3^depth, depth)."""
    states = [prefix for length in range(depth) for prefix in product(range(ACTIONS), repeat=length)]
    number = {prefix: i for i, prefix in enumerate(states)}
    inputs = torch.zeros(len(states), depth - 1, ACTIONS)
    for prefix, i in number.items():
        inputs[i, range(len(prefix)), prefix] = 1
    paths = product(range(ACTIONS), repeat=depth)
    choices = [[ACTIONS * number[path[:i]] + path[i] for i in range(depth)] for path in paths]
    return inputs.flatten(1), torch.tensor(choices)


@lru_cache(maxsize=8)
def _imitate(tree: Tree, seeds: tuple[int, ...]) -> list[torch.Tensor]:
    draws = zip(*(_draw(tree, seed) for seed in seeds))
    parameters = [torch.stack(tensors).requires_grad_() for tensors in draws]
    paths = torch.cat(tree.data(seeds)[:2], 1)
    optimizer = torch.optim.Adam(parameters, lr=SFT_LEARNING_RATE, foreach=True)
    for _ in range(tree.sft_steps):
        optimizer.zero_grad()
        (-tree.logps(parameters).gather(1, paths).mean(1).sum()).backward()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _draw(tree: Tree, seed: int) -> list[torch.Tensor]:
    generator, earlier = _generator(seed, "weights"), tree.depth - 1
    weights = torch.randn(ACTIONS * earlier, tree.hidden, generator=generator) / earlier ** 0.5
    head = torch.randn(tree.hidden, ACTIONS, generator=generator) / tree.hidden ** 0.5
    return [weights, torch.zeros(1, tree.hidden), head, torch.zeros(1, ACTIONS)]


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Weights and pairs are drawn from streams of their own."""
    return torch.Generator().manual_seed(2 * int(seed) + (purpose == "pairs"))
