"What must be true of a DualCopy, over many random networks."
import copy, pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.backbones import ResCNN, backbone, freeze_statistics
from fedsq_nb.core import InputError, seeded, state_hash
from fedsq_nb.dualcopy import DualCopy, gate_function, trace
from fedsq_nb.gates import disagreement

cases = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


class Residual(nn.Module):
    "A random activation around a residual sum, in one of the forms that people write."
    def __init__(self, c, form):
        super().__init__()
        self.conv, self.bn, self.act, self.form = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(inplace=True), form
    def forward(self, x):
        h = self.bn(self.conv(x))
        if self.form == 'module': return self.act(h + x)
        if self.form == 'function': return F.relu(torch.add(h, x), inplace=True)
        if self.form == 'iadd':
            h += x
            return torch.relu(h)
        return (h + x).relu()


ACTIVATIONS = [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.LeakyReLU, lambda: nn.LeakyReLU(0.3), nn.Hardtanh, lambda: nn.Hardtanh(-0.5, 0.25)]
POOLS = [lambda: nn.MaxPool2d(2), lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.AvgPool2d(2), lambda: nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)]


def random_net(seed, bias=True, hidden_bn=True):
    "A convolutional network of the ReLU family with statistics that are not the trivial ones, and images for it."
    r = np.random.default_rng(seed)
    pick = lambda options: options[r.integers(len(options))]
    c, layers = int(r.integers(2, 5)), []
    layers += [nn.Conv2d(2, c, 3, padding=1, bias=bias), *([nn.BatchNorm2d(c)] if hidden_bn else []), pick(ACTIVATIONS)()]
    for _ in range(r.integers(0, 3)): layers += [Residual(c, pick(['module', 'function', 'iadd', 'method']))] if hidden_bn else [nn.Conv2d(c, c, 1, bias=bias), pick(ACTIVATIONS)()]
    layers += [pick(POOLS)(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4*c, 5, bias=bias), pick(ACTIVATIONS)(), nn.Linear(5, 3, bias=bias)]
    with seeded(seed, 'net'):
        net = nn.Sequential(*layers)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3); m.running_var.uniform_(0.5, 2)
                nn.init.normal_(m.weight, 1, 0.3); nn.init.normal_(m.bias, 0, 0.3)
        return freeze_statistics(net).double().eval(), torch.randn(3, 2, 7, 7, dtype=torch.float64)


def perturbed(dc, seed, size=0.5):
    "`dc` with its quantitative copy moved away from the structural one."
    with seeded(seed, 'move'), torch.no_grad():
        for p in dc.quantitative.parameters(): p.add_(size*torch.randn_like(p)*p.std().nan_to_num(1))
    return dc.eval()


@cases
@given(seeds)
def test_at_the_start_the_dualcopy_is_the_network(seed):
    net, x = random_net(seed)
    before = state_hash(net.state_dict())
    dc = DualCopy(net).eval()
    with torch.no_grad():
        assert torch.equal(dc(x), net(x))
        assert torch.equal(dc(x, dc.gates(x)), net(x))
        assert set(disagreement(dc.gates(x), dc.own_gates(x)).values()) == {0.0}
    assert state_hash(net.state_dict()) == before
    assert not net.training and all(p.requires_grad for p in net.parameters())


@cases
@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_the_output_is_linear_in_each_single_layer(seed, a, b):
    net, x = random_net(seed)
    dc = perturbed(DualCopy(net), seed)
    gates = dc.gates(x)
    for i, p in enumerate(dc.quantitative.parameters()):
        gen, kept = torch.Generator().manual_seed(seed + i), p.detach().clone()
        def f(value):
            with torch.no_grad():
                p.copy_(value)
                return dc(x, gates)
        W, V, zero = torch.randn(p.shape, generator=gen, dtype=p.dtype), torch.randn(p.shape, generator=gen, dtype=p.dtype), torch.zeros_like(p)
        rest = f(zero)  # what the other layers contribute; affine in W with this constant part
        torch.testing.assert_close(f(a*W + b*V) - rest, a*(f(W) - rest) + b*(f(V) - rest), rtol=1e-9, atol=1e-9)
        f(kept)


@cases
@given(seeds)
def test_averaging_clients_that_trained_one_layer_averages_their_outputs(seed):
    net, x = random_net(seed)
    dc = DualCopy(net).eval()
    gates, first = dc.gates(x), next(dc.quantitative.parameters())
    clients = [first.detach() + torch.randn(first.shape, generator=torch.Generator().manual_seed(k), dtype=first.dtype) for k in range(4)]
    shares = np.random.default_rng(seed).dirichlet(np.ones(4))
    def f(W):
        with torch.no_grad():
            first.copy_(W)
            return dc(x, gates)
    torch.testing.assert_close(f(sum(s*W for s, W in zip(shares, clients))), sum(s*f(W) for s, W in zip(shares, clients)), rtol=1e-9, atol=1e-9)


@cases
@given(seeds)
def test_training_leaves_every_structural_bit_alone(seed):
    net, x = random_net(seed)
    dc = DualCopy(net).train()
    before = state_hash(dc.structural.state_dict())
    opt = torch.optim.SGD([p for p in dc.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(dc(x), torch.tensor([0, 1, 2])).backward()
        opt.step()
    assert state_hash(dc.structural.state_dict()) == before
    assert all(p.grad is None and not p.requires_grad for p in dc.structural.parameters())
    assert not {id(p) for p in dc.structural.parameters()} & {id(p) for g in opt.param_groups for p in g['params']}
    assert state_hash(dc.quantitative.state_dict()) != state_hash(net.state_dict())
    assert not any(m.training for m in dc.structural.modules())


@cases
@given(seeds)
def test_gradients_agree_with_finite_differences(seed):
    net, x = random_net(seed)
    dc = perturbed(DualCopy(net), seed)
    gates = dc.gates(x)
    for name, p in list(dc.quantitative.named_parameters())[::3]:
        def f(value): return torch.func.functional_call(dc, {f'quantitative.{name}': value}, (x, gates))
        assert torch.autograd.gradcheck(f, (p.detach().clone().requires_grad_(),), fast_mode=True)


@cases
@given(seeds)
def test_open_gates_everywhere_give_the_linear_network(seed):
    r = np.random.default_rng(seed)
    with seeded(seed, 'mlp'):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 3)).double()
        x = torch.randn(3, 4, dtype=torch.float64)
    dc = perturbed(DualCopy(net), seed)
    gates = {'1': torch.ones(3, 6, dtype=torch.bool), '3': torch.ones(3, 5, dtype=torch.uint8)}
    assert {k: v.shape for k, v in dc.gates(x).items()} == {k: v.shape for k, v in gates.items()}
    linear = nn.Sequential(*[m for m in dc.quantitative if isinstance(m, nn.Linear)])
    with torch.no_grad(): torch.testing.assert_close(dc(x, gates), linear(x), rtol=1e-12, atol=1e-12)


@cases
@given(seeds)
def test_two_streams_in_plain_numpy(seed):
    "An oracle that shares no code: the two rows of the definition, with numpy alone."
    with seeded(seed, 'mlp'):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(0.2), nn.Linear(5, 4), nn.ReLU6(), nn.Linear(4, 2)).double()
        x = torch.randn(7, 4, dtype=torch.float64) * 5
    dc = perturbed(DualCopy(net), seed, size=1.)
    S, Q = ([(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in part if isinstance(m, nn.Linear)] for part in (net, dc.quantitative))
    h_s = h_q = x.numpy()
    for l, ((W_s, b_s), (W_q, b_q)) in enumerate(zip(S, Q)):
        s, q = h_s @ W_s.T + b_s, h_q @ W_q.T + b_q
        if l == 0: h_s, h_q = np.maximum(s, 0), np.where(s > 0, q, 0)
        elif l == 1: h_s, h_q = np.where(s > 0, s, 0.2*s), np.where(s > 0, q, 0.2*q)
        elif l == 2: h_s, h_q = np.clip(s, 0, 6), np.where(s >= 6, 6, np.where(s > 0, q, 0))
        else: h_q = q
    np.testing.assert_allclose(dc(x).detach().numpy(), h_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name,size', [('alexnet', 63), ('resnet18', 32), ('mobilenet_v2', 32), ('vgg11_bn', 32), ('resnext50_32x4d', 32), ('squeezenet1_1', 32)])
def test_torchvision_networks(name, size):
    import torchvision
    with seeded(0, name): net, x = torchvision.models.get_model(name, weights=None, num_classes=5), torch.randn(2, 3, size, size)
    net.eval()
    with torch.no_grad():
        dc = DualCopy(net).eval()
        assert torch.equal(dc(x), net(x))
        own, fixed = gate_function(net)(net, x), dc.gates(x)
        assert list(own) == list(fixed) and set(disagreement(own, fixed).values()) == {0.0}
    assert list(dc.quantitative.state_dict()) == list(net.state_dict())
    assert not torchvision.models.get_model(name, weights=None, num_classes=5).load_state_dict(dc.quantitative.state_dict()).missing_keys


def test_copies_of_a_dualcopy_are_independent_and_equal():
    dc = perturbed(DualCopy(ResCNN(10)), 0)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(dc), pickle.loads(pickle.dumps(dc))):
        assert torch.equal(other(x), dc(x))
        with torch.no_grad(): other.quantitative.fc.weight.zero_()
        assert not torch.equal(other(x), dc(x))
    twin = DualCopy(ResCNN(10)).eval()
    twin.load_state_dict(dc.state_dict())
    assert torch.equal(twin(x), dc(x))
    assert dc.double()(x.double()).dtype == torch.float64


def test_train_and_evaluation_mode():
    net = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Dropout(0.5), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2))
    x, dc = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), DualCopy(net)
    dc.train()
    with seeded(0, 'a'): a = dc(x)
    with seeded(0, 'b'): b = dc(x)
    assert not torch.equal(a, b), 'dropout is on in the quantitative copy'
    assert all(torch.equal(g, h) for g, h in zip(dc.gates(x).values(), dc.gates(x).values())), 'and off in the structural one'
    dc.eval()
    assert torch.equal(dc(x), net.eval()(x))


class FunctionalDropout(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 300), nn.Linear(300, 2)
    def forward(self, x): return self.b(F.dropout(F.relu(self.a(x)), 0.5, self.training))


def test_functional_dropout_follows_the_mode():
    net, x = FunctionalDropout(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    dc = DualCopy(net)
    assert torch.equal(dc.eval()(x), net.eval()(x))
    with seeded(0, 'a'): a = dc.train()(x)
    assert not torch.equal(a, dc.eval()(x))


class Functional(nn.Module):
    "Every activation as a function, with settings by position and by name."
    def __init__(self): super().__init__(); self.c = nn.Conv2d(1, 3, 3, padding=1)
    def forward(self, x):
        x = F.leaky_relu(self.c(x), 0.2)
        x = F.max_pool2d(x, 2, stride=1, padding=1)
        x = F.hardtanh(x, min_val=-0.7, max_val=0.9)
        return F.relu6(F.max_pool2d(x, kernel_size=2)).flatten(1)


def test_functional_forms_keep_their_settings():
    with seeded(0, 'functional'): net, x = Functional(), 3*torch.randn(2, 1, 6, 6)
    dc = DualCopy(net).eval()
    assert len(dc.gates(x)) == 5 and torch.equal(dc(x), net(x))


class Product(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
    def forward(self, x): return self.a(x) * self.b(x)


class Quotient(Product):
    def forward(self, x): return x / self.a(x)


class Of(nn.Module):
    "A linear layer and a function."
    def __init__(self, f): super().__init__(); self.a, self.f = nn.Linear(2, 2), f
    def forward(self, x): return self.f(self.a(x))


@pytest.mark.parametrize('net,word', [
    (Product(), 'product of two trained factors'), (Quotient(), 'product of two trained factors'), (Of(nn.Softsign()), 'Softsign'), (Of(F.softsign), 'softsign'),
    (Of(torch.abs), 'abs'), (Of(lambda x: x.exp()), 'exp'), (Of(lambda x: x.max()), 'max'), (Of(lambda x: x ** 2), 'pow'), (Of(lambda x: 1 / x), 'div|reciprocal'),
    (Of(nn.LogSoftmax(1)), 'LogSoftmax'), (Of(lambda x: F.log_softmax(x, 1)), 'log_softmax'), (Of(torch.sort), 'sort')])
def test_an_operation_without_a_rule_stops_the_conversion(net, word):
    "Nothing that is not affine passes silently; the error names the operation, its node and the option."
    with pytest.raises(InputError, match=f"({word}).*node.*unknown='plain'"): DualCopy(net)
    assert isinstance(DualCopy(net, unknown='plain'), DualCopy)


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    dc = DualCopy(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2)))
    assert dc.quantitative[0] is dc.quantitative[2] and dc.structural[0] is dc.structural[2]


def test_frozen_parameters_stay_frozen():
    net = ResCNN(10)
    net.stem.requires_grad_(False)
    dc = DualCopy(net)
    assert {n for n, p in dc.quantitative.named_parameters() if not p.requires_grad} == {n for n, p in net.named_parameters() if n.startswith('stem')}


def test_tracing_leaves_modes_as_they_were():
    net = ResCNN(10).train()
    net.stem[1].eval()
    trace(net)
    assert net.training and not net.stem[1].training


def test_live_batch_norms_move_only_in_the_quantitative_copy():
    net = backbone('rescnn', 10, weights='random', bn='train', say=str)
    dc, x = DualCopy(net).train(), torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = state_hash(dc.structural.state_dict())
    dc(x)
    assert state_hash(dc.structural.state_dict()) == before
    assert not torch.equal(dc.quantitative.stem[1].running_mean, net.stem[1].running_mean)
