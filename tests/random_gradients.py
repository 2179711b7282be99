"""Gradients of every shape, layout, dtype and pattern that the ops must take."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, laid out otherwise in memory."""
    if layout == "transposed" and values.dim():  # dense, in another order
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced":  # with gaps
        wide = values.new_full((*values.shape, 2), torch.nan)
        wide[..., 0] = values
        return wide[..., 0]
    if layout == "offset":  # unaligned
        flat = torch.cat([values.new_full((1,), torch.nan), values.flatten()])
        return flat[1:].view(values.shape)
    if layout == "expanded" and values.dim():  # one element stands for many
        return values[..., :1].expand(values.shape)
    return values.contiguous()


def make(n_tasks, shapes, dtypes, layouts, missing, seed, device="cpu"):
    """``[K][T]`` normal gradients; every task on every parameter has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for k in range(n_tasks):
        own = []
        for t, shape in enumerate(shapes):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values *= 2.0 ** (torch.randn((), generator=generator).item() * 2)
            layout = layouts[(k * 7 + t) % len(layouts)]
            values = values.to(device, dtypes[t])
            own.append(None if (k, t) in missing else laid_out(values, layout))
        gradients.append(own)
    return gradients


@st.composite
def gradients(draw, most_tasks=9, dtypes=tuple(DTYPES)):
    """``[K][T]``; at least one is there."""
    n_tasks = draw(st.integers(1, most_tasks))
    sizes = st.one_of(st.integers(0, 5), st.integers(14, 35), st.sampled_from([127, 600]))
    shapes = st.one_of(
        st.just(()),
        st.tuples(sizes),
        st.tuples(st.integers(1, 9), st.integers(1, 70)),
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 20)),
    )
    chosen = draw(st.lists(shapes, min_size=1, max_size=4))
    kinds = draw(st.lists(st.sampled_from(dtypes), min_size=len(chosen), max_size=len(chosen)))
    layout = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])
    layouts = draw(st.one_of(st.just(["contiguous"]), st.lists(layout, min_size=1, max_size=3)))
    pairs = st.tuples(st.integers(0, n_tasks - 1), st.integers(0, len(chosen) - 1))
    missing = draw(st.one_of(st.just(set()), st.sets(pairs)))
    if len(missing) == n_tasks * len(chosen):
        missing.pop()
    return make(n_tasks, chosen, kinds, layouts, missing, draw(st.integers(0, 2**16)))


def exact_gram(gradients):
    """``[K, K]`` in float64, pair by pair and parameter by parameter."""
    n_tasks = len(gradients)
    gram = torch.zeros(n_tasks, n_tasks, dtype=torch.float64)
    for i in range(n_tasks):
        for j in range(n_tasks):
            for a, b in zip(gradients[i], gradients[j], strict=True):
                if a is not None and b is not None:
                    gram[i, j] += (a.double() * b.double()).sum().cpu()
    return gram


def gram_error(gram, gradients):
    """The largest error, relative to ``|g_i| |g_j|``."""
    exact = exact_gram(gradients)
    norm = exact.diagonal().sqrt()
    scale = norm[:, None] * norm
    error = (gram.cpu().double() - exact).abs()
    assert not error[scale == 0].any()
    return (error / scale.clamp(min=1e-300)).max().item()
