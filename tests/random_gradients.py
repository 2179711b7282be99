"""Gradients of every shape, layout, dtype and pattern that the ops must accept."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PART = 2**20  # elements


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and values.dim():  # dense, in another order
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
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


def large(n_tasks, shapes, dtype, seed=0, device="cpu"):
    """Normal gradients ``[K][T]``, made on their device, each in its own (aligned) memory."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    return [[torch.randn(shape, **options).to(dtype) for shape in shapes] for _ in range(n_tasks)]


def make(n_tasks, shapes, dtypes, layouts, missing, seed, device="cpu"):
    """Normal gradients ``[K][T]``; each gradient has its own scale."""
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
    """A strategy for gradients ``[K][T]``, of which at least one is not None."""
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


class Error(float):
    """The largest of many errors, and its position."""

    entry: tuple[int, int]

    @classmethod
    def of(cls, errors):
        """The largest error of a matrix of errors."""
        place = int(errors.argmax())  # the position of NaN, if there is one
        largest = cls(errors.flatten()[place].item())
        largest.entry = divmod(place, errors.shape[1])
        return largest


def exact_gram(gradients):
    """The Gram matrix ``[K, K]`` in float64, with a matrix product for each part of a parameter."""
    device = next((g.device for own in gradients for g in own if g is not None), "cpu")
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=device)
    for of_tasks in zip(*gradients, strict=True):
        there = [k for k, gradient in enumerate(of_tasks) if gradient is not None]
        rows = [of_tasks[k].detach().reshape(-1) for k in there]
        tasks = torch.tensor(there, device=device)
        for begin in range(0, rows[0].numel() if rows else 0, PART):
            part = torch.stack([row[begin : begin + PART] for row in rows]).double()
            gram[tasks[:, None], tasks] += part @ part.t()
    return gram.cpu()


def gram_error(gram, gradients):
    """The largest error of a Gram matrix, relative to ``|g_i| |g_j|``."""
    exact = exact_gram(gradients)
    norm = exact.diagonal().sqrt()
    scale = norm[:, None] * norm
    error = (gram.cpu().double() - exact).abs()
    assert not error[scale == 0].any()
    return Error.of(error / scale.clamp(min=1e-300))


def combination_error(total, gradients, weights):
    """The largest error of weighted sums, relative to the error that rounding can explain.

    Every product and every sum may be off by the spacing of float32 (of float64 for float64), and
    the result by the spacing of its dtype. The entry is (parameter, element).
    """
    worst = []
    for t, got in enumerate(total):
        own = [(w, g[t]) for w, g in zip(weights.double(), gradients, strict=True)]
        terms = [w * gradient.double() for w, gradient in own if gradient is not None]
        if got.numel() == 0 or not terms:
            continue
        exact = sum(terms)
        wide = torch.float64 if got.dtype == torch.float64 else torch.float32
        rounding = len(own) * torch.finfo(wide).eps * sum(term.abs() for term in terms)
        rounding += torch.finfo(got.dtype).eps * exact.abs() + torch.finfo(got.dtype).tiny
        error = Error.of(((got.double() - exact).abs() / rounding).reshape(1, -1))
        error.entry = (t, error.entry[1])
        worst.append(error)
    return max(worst, key=lambda error: (error != error, float(error)))  # NaN is the largest
