"""Numerical checks of the paper's claims about group updates: where they hold, and where not.

Notation: tasks or groups have losses L_k with gradients g_k and Hessians H_k; a step is plain
gradient descent with step size eta. Everything is in float64 unless said otherwise.
"""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian as hessian_of

import taskgroup as tg


def slope(steps, errors):
    """The order of the error in the step size."""
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


class Network:
    """K smooth, non-quadratic losses of shared parameters: regressions from one tanh layer."""

    def __init__(self, n_tasks=4, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tasks = [f"task{k}" for k in range(n_tasks)]
        self.weight, self.bias = randn(5, 3), randn(5)
        self.shared = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        self._inputs, self._heads = randn(16, 3), randn(5, n_tasks)
        self._targets = randn(16, n_tasks)

    def losses(self, weight=None, bias=None):
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        hidden = torch.tanh(self._inputs @ weight.T + bias)
        return (hidden @ self._heads - self._targets).square().mean(0) + 0.1

    def after(self, gradients, step):
        """The losses after a step along these gradients."""
        with torch.no_grad():
            return self.losses(*(p - step * g for p, g in zip(self.shared, gradients, strict=True)))


# 1. The affinity to first order.

STEPS = np.geomspace(1e-4, 1e-2, 9)


@pytest.mark.parametrize("group", [[0], [2, 3], [0, 1, 3], [0, 1, 2, 3]], ids=str)
def test_affinity_is_the_inner_product_of_gradients_to_first_order(group):
    """A_{G->k} = eta <sum of g_j over G, g_k> / L_k, up to a term in eta squared."""
    network = Network()
    before = network.losses()
    gradients = tg.task_gradients(before, network.shared)
    gram = tg.task_gram(gradients)
    first_order = gram[group].sum(0) / before.detach()
    own = [sum(gradients[j][t] for j in group) for t in range(2)]
    errors = []
    for step in STEPS:
        affinity = 1 - network.after(own, step) / before.detach()
        errors.append((affinity - step * first_order).norm())
    assert slope(STEPS, errors) == pytest.approx(2, abs=0.1)


def test_lookahead_is_the_inner_product_of_gradients_to_first_order():
    """The same for every single task, with the package's measurement (its result is float32)."""
    network = Network()
    before = network.losses()
    gradients = tg.task_gradients(before, network.shared)
    first_order = tg.task_gram(gradients) / network.losses().detach()
    steps = np.geomspace(1e-3, 1e-2, 5)
    errors = []
    for step in steps:
        optimizer = torch.optim.SGD(network.shared, lr=step)
        found = tg.lookahead_affinity(network.losses, optimizer, network.shared).double()
        exact = torch.stack([1 - network.after(g, step) / before.detach() for g in gradients])
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
        errors.append((found - step * first_order).abs().max())
    assert slope(steps, errors) == pytest.approx(2, abs=0.1)


# 2. Theorem 1.


def random_pair(generator, dim=6):
    """Two random convex quadratics, (x - c)^T H (x - c) / 2, and the largest curvature of both."""
    normal = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)
    hessian = normal @ normal.mT / dim
    centre = torch.randn(2, dim, generator=generator, dtype=torch.float64)

    def losses(x):
        offset = x - centre
        return torch.einsum("kd,kde,ke->k", offset, hessian, offset) / 2

    return losses, hessian, torch.linalg.eigvalsh(hessian).max().item()


def joint_serves_task_as_well(relative_step, trials=300):
    """For random pairs (i, k): is stepping on {i, k} at least as good for k as on {k} alone?

    Returns arrays over the trials: the answer, the cosine of g_i and g_k, and
    <g_i, (I - eta H_k) g_k> - eta g_i^T H_k g_i / 2.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    answers = []
    for _ in range(trials):
        losses, hessian, curvature = random_pair(generator)
        step = relative_step / curvature
        gradients = tg.task_gradients(losses(x), [x])
        cosine = tg.conflicts(tg.task_gram(gradients))[0, 1]
        (g_i,), (g_k,) = gradients
        with torch.no_grad():
            serves = losses(x - step * (g_i + g_k))[1] <= losses(x - step * g_k)[1]
            exact = g_i @ g_k - step * (g_i @ hessian[1] @ g_k + g_i @ hessian[1] @ g_i / 2)
        answers.append((bool(serves), cosine.item(), exact.item()))
    return (np.array(column) for column in zip(*answers, strict=True))


def test_theorem_1():
    """If stepping on {i, k} serves k at least as well as on {k} alone, <g_i, g_k> >= 0.

    With a small step this holds. If the gradients conflict, as in about half of the cases, the
    joint step always serves k worse.
    """
    serves, cosine, _ = joint_serves_task_as_well(relative_step=1e-4)
    assert 0.3 < serves.mean() < 0.7
    assert (cosine[serves] >= 0).all()
    assert not serves[cosine < 0].any()
    # To first order the reverse holds too; a cosine within the step of 0 may say anything.
    assert serves[cosine > 1e-3].all()


def test_theorem_1_for_steps_of_any_size():
    """This holds exactly: L_k(a - eta g_i) - L_k(a) at a = x - eta g_k is -eta times

        <g_i, (I - eta H_k) g_k> - eta g_i^T H_k g_i / 2,

    so the premise says that this is not negative. But <g_i, g_k> may be negative: a large step on k
    alone may overshoot and reverse its gradient, and a conflicting task then reduces the overshoot.
    """
    counterexamples = []
    for relative_step in (1e-3, 0.5, 1.9):
        serves, cosine, exact = joint_serves_task_as_well(relative_step)
        certain = np.abs(exact) > 1e-12
        assert (serves == (exact >= 0))[certain].all()
        counterexamples.append((serves & (cosine < 0)).sum())
    assert counterexamples[0] == 0
    assert counterexamples[1] > 0
    assert counterexamples[2] > 20


# 3. Groups in sequence against one joint step.


def stepped(network, partition, step, seed):
    """The losses after one batch of the real loop, and the groups in the order of their steps."""
    groups = tg.TaskGroups(network.tasks, grouping=tg.Fixed(partition), seed=seed)
    x = [p.detach().clone().requires_grad_() for p in network.shared]
    order = []
    for group in groups:
        order.append([network.tasks.index(task) for task in group.tasks])
        gradients = torch.autograd.grad(group.loss(network.losses(*x)), x)
        for p, gradient in zip(x, gradients, strict=True):
            p.data.sub_(step * gradient)
    return network.losses(*x).detach(), order


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [1, 2, 1], [1, 1, 1, 1]], ids=str)
def test_sequence_differs_from_joint_step_in_the_second_order(sizes):
    """With F the sum of all losses, g its gradient and groups taken in the order 1, 2, ...

        F(sequence) - F(joint) = eta^2 g^T (sum over m < n of H_n g_m) + O(eta^3).

    After the step on group m, the gradient of a later group n is g_n - eta H_n g_m. The sequence
    therefore ends at a distance of eta^2 times the sum of H_n g_m from the end of the joint step.
    The two are the same to first order: which of them is lower depends on the curvature, not on the
    sign of the affinities.
    """
    network = Network(n_tasks=sum(sizes), seed=2)
    bounds = np.cumsum([0, *sizes])
    partition = [network.tasks[a:b] for a, b in itertools.pairwise(bounds)]
    flat = torch.cat([p.detach().flatten() for p in network.shared])

    def loss_of(x, k):
        return network.losses(x[:15].view(5, 3), x[15:])[k]

    tasks = range(len(network.tasks))
    found = tg.task_gradients(network.losses(), network.shared)
    gradient = [torch.cat([g.flatten() for g in own]) for own in found]
    hessian = [hessian_of(lambda x, k=k: loss_of(x, k), flat) for k in tasks]
    for seed in (0, 1):
        errors = []
        steps = np.geomspace(1e-4, 1e-3, 5)
        for step in steps:
            sequence, order = stepped(network, partition, step, seed)
            joint, _ = stepped(network, [network.tasks], step, seed)
            bend, before = torch.zeros_like(flat), torch.zeros_like(flat)
            for group in order:
                bend += sum(hessian[k] for k in group) @ before
                before += sum(gradient[k] for k in group)
            second_order = step**2 * (sum(gradient) @ bend)
            errors.append(abs((sequence - joint).sum() - second_order))
            assert errors[-1] < 0.2 * abs(second_order)
        assert slope(steps, errors) == pytest.approx(3, abs=0.1)


def share_lower_in_sequence(relative_step, *, convex, trials=3000, dim=6):
    """The share of random pairs of quadratics whose sequence ends lower than the joint step, on
    average over the two orders. Their affinity is positive both ways. The step is relative to the
    largest absolute curvature of the sum: below 2, a joint step on a convex sum does not diverge.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(trials, 2, dim, dim, generator=generator, dtype=torch.float64)
    if convex:  # curvatures between 0.1 and 1, in directions of each task's own
        curvatures = 0.1 + 0.9 * torch.rand(trials, 2, dim, generator=generator).double()
        basis = torch.linalg.qr(normal).Q
        hessian = basis @ torch.diag_embed(curvatures) @ basis.mT
    else:
        hessian = normal + normal.mT
    g = torch.randn(trials, 2, dim, generator=generator, dtype=torch.float64)  # at x = 0
    step = relative_step / torch.linalg.eigvalsh(hessian.sum(1)).abs().amax(1)[:, None]

    def gradient(m, x):
        return g[:, m] + torch.einsum("nde,ne->nd", hessian[:, m], x)

    def loss(m, x):
        return ((g[:, m] + gradient(m, x)) * x).sum(1) / 2

    def total(x):
        return loss(0, x) + loss(1, x)

    positive = (loss(1, -step * g[:, 0]) < 0) & (loss(0, -step * g[:, 1]) < 0)
    joint = total(-step * g.sum(1))
    sequence = 0
    for first, second in ((0, 1), (1, 0)):
        x = -step * g[:, first]
        sequence = sequence + total(x - step * gradient(second, x)) / 2
    assert positive.sum() > 300
    return (sequence < joint)[positive].double().mean().item()


def test_sequence_is_lower_where_the_joint_step_is_too_long():
    """For convex tasks that help each other, one joint step is better if the step is small.

    The step on the first group reduces the gradient of the second, so its step is shorter. As long
    as the steps do not reach the minimum, longer steps are better. A positive affinity therefore
    does not make the sequence better with small steps: it is better in (nearly) none of these
    problems. The sequence is better if the joint step overshoots, which begins beyond a step of one
    over the curvature of the sum.
    """
    shares = [share_lower_in_sequence(s, convex=True) for s in (0.01, 0.1, 0.5, 1.0, 1.5, 1.9)]
    assert max(shares[:4]) < 0.01
    assert shares[4] > 0.1
    assert shares[5] > 0.5


def test_sequence_is_lower_in_half_of_the_cases_where_curvature_has_any_sign():
    """For tasks that are not convex: in half of the cases with small steps, in more with large."""
    shares = [share_lower_in_sequence(s, convex=False) for s in (0.01, 0.1, 1.0, 1.9)]
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares == sorted(shares)
    assert shares[-1] > 0.85


def test_two_tasks_that_agree_in_everything():
    """Two tasks with the same loss x^2 / 2: all affinities are positive, but the sequence is not
    always lower. The joint step leaves a factor (1 - 2 eta) of x, the sequence (1 - eta)^2. The two
    have the same size at 2 eta - 1 = (1 - eta)^2, which is eta = 2 - sqrt(2) = 0.586. Below, the
    joint step is better; above, where it overshoots, the sequence is better.
    """
    for step, sequence_is_lower in ((0.01, False), (0.3, False), (0.58, False), (0.59, True)):
        ends = {}
        for name, grouping in (("sequence", tg.Singletons()), ("joint", tg.Together())):
            x = torch.ones((), dtype=torch.float64, requires_grad=True)
            affinity = tg.ProximalAffinity(decay=1.0)
            groups = tg.TaskGroups(["a", "b"], grouping=grouping, affinity=affinity)
            for group in groups:
                losses = torch.stack([x.square() / 2, x.square() / 2])
                (gradient,) = torch.autograd.grad(group.loss(losses), x)
                x.data.sub_(step * gradient)
            if name == "sequence":  # of which the last step is not observed
                assert (groups.affinity.matrix > 0).sum() == 2
            ends[name] = x.item() ** 2
        assert (ends["sequence"] < ends["joint"]) == sequence_is_lower


def test_order_decides_where_tasks_conflict():
    """With L_m = |x - c_m|^2 / 2, H = 1 and the second order is eta^2 (|g_1|^2 + <g_1, g_2>). The
    sequence is lower only if the second gradient opposes the first and is longer. The sum over both
    orders is eta^2 |g_1 + g_2|^2, so on average the sequence is never lower.
    """
    centre = torch.tensor([[1.0, 0.0], [-2.0, 0.5]], dtype=torch.float64)
    gradient, step = -centre, 1e-3

    def total(x):
        return (x - centre).square().sum() / 2

    joint = total(-step * gradient.sum(0))
    differences = []
    for first, second in ((0, 1), (1, 0)):
        x = -step * gradient[first]
        differences.append((total(x - step * (x - centre[second])) - joint).item())
        expected = gradient[first].square().sum() + gradient.prod(0).sum()
        assert differences[-1] == pytest.approx(step**2 * expected.item(), rel=0.02)
    assert differences[0] < 0 < differences[1]
    assert sum(differences) > 0


# 4. Theorem 4: the sequence of group updates converges to Pareto-stationary points.


def quadratics(n_tasks, seed, dim=8):
    """Convex tasks on two sides, and a start; the curvature of their sum is at most K."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    curvatures = 0.2 + 0.8 * torch.rand(n_tasks, dim, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(randn(n_tasks, dim, dim)).Q
    hessian = basis @ torch.diag_embed(curvatures) @ basis.mT
    side = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:n_tasks, None]
    centre = side * randn(dim) + 0.8 * randn(n_tasks, dim)

    def losses(x):
        offset = x - centre
        return 0.5 + torch.einsum("kd,kde,ke->k", offset, hessian, offset) / 2

    return losses, 2 * randn(dim)


def valleys(n_tasks, seed, pairs=4):
    """Rosenbrock's function, summed over pairs of variables. Each task has its own minimum, all in
    one bent valley. The start is at a point where the sum is not convex.
    """
    generator = torch.Generator().manual_seed(seed)
    minimum = torch.randn(n_tasks, pairs, generator=generator, dtype=torch.float64)
    steepness = 0.5 + torch.rand(n_tasks, 1, generator=generator, dtype=torch.float64)

    def losses(x):
        u, v = x[:pairs], x[pairs:]
        ends = (0.5 + 0.5 * minimum - u).square()
        return 0.5 + (ends + steepness * (v - u.square()).square()).mean(1)

    start = torch.tensor([-0.2] * pairs + [2.0] * pairs, dtype=torch.float64)
    assert torch.linalg.eigvalsh(curvature(losses, start)).min() < -1
    return losses, start


def curvature(losses, x):
    return hessian_of(lambda x: losses(x).sum(), x)


def stationarity(losses, x):
    return tg.pareto_stationarity(tg.task_gram(tg.task_gradients(losses(x), [x]))).item()


def train(losses, start, step, batches, seed=0):
    """Train with learned groups in the real loop; return the end, and the numbers of groups."""
    x = start.clone().requires_grad_()
    groups = tg.TaskGroups(
        [f"task{k}" for k in range(len(losses(x)))],
        affinity=tg.ProximalAffinity(decay=0.05),
        warmup=20,
        seed=seed,
    )
    counts = []
    for batch in range(batches):
        for group in groups:
            (gradient,) = torch.autograd.grad(group.loss(losses(x)), x)
            x.data.sub_(step(batch) * gradient)
        counts.append(len(groups.partition))
    return x, counts


@pytest.mark.learned
@pytest.mark.parametrize("n_tasks", [3, 4, 5])
@pytest.mark.parametrize(
    ("make", "first", "half_life", "batches"),
    [(quadratics, 0.19, 15, 600), (valleys, 0.1, 60, 1000)],
    ids=["quadratics", "valleys"],
)
def test_converges_to_pareto_stationary_points(make, first, half_life, batches, n_tasks):
    losses, start = make(n_tasks, seed=n_tasks)
    x, counts = train(losses, start, lambda batch: first / (1 + batch / half_life), batches)
    assert stationarity(losses, start.clone().requires_grad_()) > 0.1
    assert stationarity(losses, x) < 1e-6
    for place in (start, x.detach()):  # a step below the bound: one over the curvature of the sum
        assert first * torch.linalg.eigvalsh(curvature(losses, place)).abs().max() < 1
    assert set(counts[:20]) == {n_tasks}
    assert 1 < np.median(counts) < n_tasks  # groups were learned


@pytest.mark.learned
def test_with_a_constant_step_it_ends_in_a_neighbourhood():
    """The size of the neighbourhood is that of the step: the remaining squared norm falls with the
    square of the step, up to the order of the groups in the last batch.
    """
    losses, start = quadratics(4, seed=40)
    left = []
    for eta in (0.1, 0.025):
        x, _ = train(losses, start, lambda _, eta=eta: eta, 300)
        left.append(stationarity(losses, x))
    assert left[0] > 1e-6
    assert 8 < left[0] / left[1] < 32
