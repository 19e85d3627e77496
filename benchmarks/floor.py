"""The least time that an optimizer step can take here: its matrix products at the fastest rate measured.

The rate is taken in the process whose steps are measured, between them, and is a mean over repeats, as the
time of a step is one over its products: what else goes on in the machine slows both.

Counted are the products that no exact method avoids: each token of `[prompt | chosen | rejected]` once
through the blocks, the vocabulary only where a completion token is predicted, and the attention that the
shared prompt leaves. A pass forward counts once, a gradient for inputs once and for weights once: 3 for a
policy trained in full, 2 for one with an adapter, 1 for the reference. Not counted: optimizer, embedding,
norms, softmax, the adapter's own products.
"""

from __future__ import annotations

import time


def step_flops(rows: list[dict], config, tuning: str = "full") -> float:
    """Floating-point operations of one step over these pairs: policy and reference, forward and backward.

    config: of a GPT-NeoX model (4 h^2 weights of attention and 2 h i of the MLP in a block).
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    block_weights = layers * (4 * h * h + 2 * h * config.intermediate_size)
    tokens = predictions = attended = 0
    for row in rows:
        prompt, chosen, rejected = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        tokens += prompt + chosen + rejected
        predictions += chosen + rejected - 1  # the prompt's last position predicts both first tokens
        attended += prompt * (prompt + 1) // 2
        attended += sum(prompt * part + part * (part + 1) // 2 for part in (chosen, rejected))
    products = 2 * block_weights * tokens + 2 * h * config.vocab_size * predictions
    attention = 4 * h * layers * attended  # scores and weighted values; both of their inputs get gradients
    return products * (4 if tuning == "full" else 3) + attention * 4


def matmul_rate(config, tokens: int, repeats: int = 5) -> float:
    """Operations a second: the best of square float32 products and of the model's own shapes."""
    import torch

    h, inner = config.hidden_size, config.intermediate_size
    shapes = [(n, n, n) for n in (512, 1024, 2048)]
    shapes += [(tokens, h, 3 * h), (tokens, h, inner), (tokens, inner, h)]
    best = 0.0
    for m, k, n in shapes:
        a, b = torch.rand(m, k), torch.rand(k, n)
        out = a @ b
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        best = max(best, 2 * m * k * n * repeats / (time.perf_counter() - start))
    return best
