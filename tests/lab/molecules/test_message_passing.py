import math

import pytest
import torch
from torch import nn

from taskgroup.lab.molecules.message_passing import ELEMENTS, MessagePassing


def network(width=16, layers=2, dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(seed)
    return MessagePassing(width, layers, **settings).to(dtype)


def molecules(n=3, atoms=7, padding=2, seed=0, dtype=torch.float64):
    """Random molecules [n, atoms + padding]; no two atoms are much nearer than in a molecule."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(ELEMENTS), (n, atoms), generator=generator)
    charges = torch.tensor(list(ELEMENTS))[kinds]
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    sites = torch.stack([torch.randperm(27, generator=generator)[:atoms] for _ in range(n)])
    positions = 1.3 * grid[sites] + 0.3 * torch.rand(n, atoms, 3, generator=generator)
    return (
        nn.functional.pad(charges, (0, padding)),
        nn.functional.pad(positions, (0, 0, 0, padding)).to(dtype),
    )


def orthogonal(determinant):
    q, _ = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    return q * (determinant * torch.linalg.det(q)).sign()


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_features_do_not_change_with_rotation_reflection_and_translation(determinant):
    net, (charges, positions) = network(), molecules()
    expected = net(charges, positions)
    moved = positions @ orthogonal(determinant) + torch.tensor([3.0, -2.0, 5.0])
    torch.testing.assert_close(net(charges, moved), expected, rtol=0, atol=1e-10)


def test_features_do_not_change_with_the_order_of_the_atoms():
    net, (charges, positions) = network(), molecules()
    order = torch.randperm(charges.shape[1], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        net(charges[:, order], positions[:, order]), net(charges, positions), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_padding_changes_nothing_wherever_it_lies(dtype, atol):
    net, (charges, positions) = network(dtype=dtype), molecules(padding=0, dtype=dtype)
    expected = net(charges, positions)
    charges, positions = molecules(padding=5, dtype=dtype)
    torch.testing.assert_close(net(charges, positions), expected, rtol=0, atol=atol)
    positions[:, 7:] = torch.randn(3, 5, 3, dtype=dtype)
    torch.testing.assert_close(net(charges, positions), expected, rtol=0, atol=atol)


def test_a_molecule_does_not_depend_on_the_others_of_its_batch():
    net, (charges, positions) = network(), molecules()
    alone = torch.cat([net(charges[[k]], positions[[k]]) for k in range(3)])
    torch.testing.assert_close(net(charges, positions), alone, rtol=0, atol=1e-12)


def test_a_moved_atom_or_another_element_changes_the_features():
    net, (charges, positions) = network(), molecules()
    expected = net(charges, positions)
    for atom in range(7):
        moved = positions.clone()
        moved[:, atom] += 0.05
        assert ((net(charges, moved) - expected).abs().amax(1) > 1e-5).all(), atom
        other = charges.clone()
        other[:, atom] = torch.where(charges[:, atom] == 6, 7, 6)
        assert ((net(other, positions) - expected).abs().amax(1) > 1e-5).all(), atom


def test_conformers_differ():
    """A chain of four carbons turned about its middle bond: one distance changes."""
    chain = [[-0.5, 1.4, 0], [0, 0, 0], [1.5, 0, 0], [2.0, 1.4, 0]]
    positions = torch.tensor([chain, chain], dtype=torch.float64)
    positions[1, 3, 1] = -1.4
    features = network(layers=1)(torch.full((2, 4), 6), positions)
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_isomers_differ():
    """HCN and HNC: the same atoms in another order along the line."""
    charges = torch.tensor([[1, 6, 7], [1, 7, 6]])
    positions = torch.tensor([[0.0, 0, 0], [0, 0, 1.07], [0, 0, 2.22]]).double().expand(2, 3, 3)
    features = network(layers=1)(charges, positions)
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_atoms_beyond_the_cutoff_do_not_see_each_other():
    net = network(cutoff=4.0)
    charges = torch.tensor([[6, 8]]).expand(3, 2)
    positions = torch.zeros(3, 2, 3, dtype=torch.float64)
    positions[:, 1, 0] = torch.tensor([3.0, 4.001, 9.0])
    near, just_beyond, far = net(charges, positions)
    assert torch.equal(just_beyond, far)
    assert (near - far).abs().max() > 1e-6


def test_features_are_smooth_at_the_cutoff():
    net = network(cutoff=4.0)
    positions = torch.zeros(200, 2, 3, dtype=torch.float64)
    positions[:, 1, 0] = torch.linspace(3.8, 4.2, 200)
    positions.requires_grad_()
    features = net(torch.tensor([[6, 8]]).expand(200, 2), positions)
    (slopes,) = torch.autograd.grad(features.sum(), positions)
    slopes = slopes[:, 1, 0]
    assert slopes[0] != 0
    assert (slopes.diff().abs() < 0.1 * slopes.abs().max()).all()


def test_gradients_are_right():
    net, (charges, positions) = network(width=4, layers=1, radial=6), molecules(2, 3, 1)
    assert torch.autograd.gradcheck(lambda x: net(charges, x), positions.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_for_atoms_in_one_place_and_for_padding(dtype):
    net = network(dtype=dtype)
    charges, positions = molecules(dtype=dtype)
    charges[0], charges[1, 1:] = 0, 0  # no atom at all, one atom
    positions[2, 1] = positions[2, 0]
    positions.requires_grad_()
    features = net(charges, positions)
    assert features.dtype == dtype
    assert features.isfinite().all()
    features.square().sum().backward()
    for name, tensor in [("positions", positions), *net.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name
    assert not positions.grad[charges == 0].any()


def test_molecules_of_one_atom_and_of_two():
    net = network()
    for charge in ELEMENTS:
        one = net(torch.tensor([[charge]]), torch.randn(1, 1, 3, dtype=torch.float64))
        far = net(torch.tensor([[charge, 0]]), torch.zeros(1, 2, 3, dtype=torch.float64))
        torch.testing.assert_close(one, far, rtol=0, atol=1e-12)
    lengths = torch.linspace(0.74, 3, 10, dtype=torch.float64)
    positions = torch.zeros(10, 2, 3, dtype=torch.float64)
    positions[:, 1, 2] = lengths
    features = net(torch.ones(10, 2, dtype=torch.int64), positions)
    assert (features.diff(dim=0).abs().amax(1) > 1e-6).all()


def test_an_atom_sends_no_message_to_itself():
    net = network(radial=2)  # two broad basis functions, which do not vanish at distance 0
    charges, positions = torch.tensor([[6, 0]]), torch.zeros(1, 2, 3, dtype=torch.float64)
    expected = net(charges, positions)
    for layer in net.layers:
        nn.init.zeros_(layer.filters.weight)
    assert torch.equal(net(charges, positions), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_charges_are_of_any_integer_dtype(dtype):
    net, (charges, positions) = network(), molecules()
    assert torch.equal(net(charges.to(dtype), positions), net(charges, positions))


def test_a_network_in_one_precision_takes_positions_in_another():
    charges, positions = molecules()
    expected = network()(charges, positions)
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        features = network(dtype=dtype)(charges, positions)
        assert features.dtype == dtype
        torch.testing.assert_close(features.double(), expected, rtol=0, atol=atol)


def test_bfloat16_autocast_is_near_to_float32_and_has_finite_gradients():
    net = network(dtype=torch.float32)
    charges, positions = molecules(dtype=torch.float32)
    charges[0] = 0
    expected = net(charges, positions)
    with torch.autocast("cpu", torch.bfloat16):
        features = net(charges, positions.requires_grad_())
    torch.testing.assert_close(features.float(), expected, rtol=0, atol=0.05)
    features.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [positions, *net.parameters()])


def test_compiled_code_is_one_graph_where_an_unknown_element_gives_nan_for_its_molecule():
    """No branch depends on data, so nothing breaks the graph and nothing waits for a device."""
    net, (charges, positions) = network(layers=1), molecules()
    expected = net(charges, positions)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(charges, positions), expected, rtol=0, atol=1e-12)
    charges[1, 3] = 17
    features = compiled(charges, positions)
    assert features[1].isnan().all()
    torch.testing.assert_close(features[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


def test_weights_load_into_a_network_of_the_same_size():
    charges, positions = molecules()
    first, second = network(seed=0), network(seed=1)
    assert not torch.equal(first(charges, positions), second(charges, positions))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(charges, positions), second(charges, positions))


@pytest.mark.learned
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_a_sum_over_pairs_and_a_shortest_distance(seed):
    """Held-out squared errors are below a quarter of the variance, which is 1."""
    charges, positions = molecules(448, 5, 1, seed=seed, dtype=torch.float32)
    charges[::2, 4] = 0  # molecules of two sizes
    products = charges[:, :, None] * charges[:, None]
    distances = torch.cdist(positions, positions)
    itself = torch.eye(6, dtype=torch.bool)
    energies = (products / distances.masked_fill(itself, math.inf)).nan_to_num(0).sum((1, 2))
    shortest = distances.masked_fill((products == 0) | itself, math.inf).amin((1, 2))
    targets = torch.stack([energies, shortest], dim=1)
    targets = (targets - targets.mean(0)) / targets.std(0)
    model = network(32, 2, torch.float32, seed=seed)
    head = nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    train, held_out = 320, slice(320, None)
    for _ in range(12):
        for rows in torch.randperm(train).split(32):
            loss = (head(model(charges[rows], positions[rows])) - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        outputs = head(model(charges[held_out], positions[held_out]))
    errors = (outputs - targets[held_out]).square().mean(0)
    assert (errors < 0.25).all(), errors


X = torch.zeros(2, 3, 3)
Z = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("charges", "positions", "words"),
    [
        (Z.float(), X, r"charges must be a tensor \[B, A\] of integers.*float32"),
        (Z.bool(), X, r"charges must be .*bool"),
        (Z[0], X, r"charges must be .*\[3\]"),
        ([[1, 1]], X, r"charges must be .*type list"),
        (Z, X.long(), r"positions must be a floating-point tensor.*int64"),
        (Z, X[:, :2], r"positions must be of shape \[2, 3, 3\].*\[2, 2, 3\]"),
        (Z, X[..., :2], r"positions must be of shape \[2, 3, 3\].*\[2, 3, 2\]"),
        (Z, X.numpy(), "positions must be .*ndarray"),
        (17 * Z, X, r"charges holds 17, .* H \(1\), C \(6\), N \(7\), O \(8\), F \(9\); 0 is"),
        (-Z, X, "charges holds -1"),
    ],
)
def test_wrong_molecules_are_refused_in_a_sentence(charges, positions, words):
    with pytest.raises(ValueError, match=words):
        network(dtype=torch.float32)(charges, positions)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 1}, "width must be an integer of at least 2, got 1"),
        ({"width": 2.0}, "width must be an integer"),
        ({"layers": 0}, "layers must be an integer of at least 1"),
        ({"radial": True}, "radial must be an integer of at least 2"),
        ({"cutoff": 0.5}, "cutoff is a distance in ångström above 0.7"),
        ({"cutoff": math.inf}, "cutoff is"),
        ({"cutoff": "5"}, "cutoff is .* got '5'"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        MessagePassing(**{"width": 8, "layers": 1, **settings})
