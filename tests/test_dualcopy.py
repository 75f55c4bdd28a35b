"What must be true of a DualCopy, over many random networks."
import copy, io, multiprocessing, pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.client.backbones import backbone, freeze_statistics
from fedsq_nb.data.example import ResCNN
from fedsq_nb.core import InputError, load_state, save_state, seeded, state_hash
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.gating.graph import gate_function, trace
from fedsq_nb.gating.cache import pack, slots_of, unpack
from fedsq_nb.gating.gates import disagreement

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


# What people do with a network: store it, move it, compile it, export it, send it elsewhere

class Excite(nn.Module):
    "Squeeze and excitation, with a hard sigmoid."
    def __init__(self, c): super().__init__(); self.down, self.up = nn.Conv2d(c, 2, 1), nn.Conv2d(2, c, 1)
    def forward(self, x): return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Mixed(nn.Module):
    "A little of everything: batch norm, hard and soft units, excitation, max pooling, layer norm, attention, dropout."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Hardswish(), Excite(8), nn.MaxPool2d(3, 2, 1), nn.GroupNorm(2, 8), nn.GELU())
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    def forward(self, x):
        x = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.drop(x.mean(1)))


def made(make, *shape, seed=0):
    "A network in evaluation mode, none of whose parameters and statistics is trivial, and images for it."
    with seeded(seed, 'made'), torch.no_grad():
        net = make()
        for p in net.parameters(): p.add_(0.2*torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, 0.3); m.running_var.uniform_(0.5, 2)
        return net.eval(), torch.randn(*shape)


def mixed(): return made(Mixed, 3, 3, 8, 8)


def near(a, b, eps=1e-5):
    error = float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())
    assert error <= eps


def agrees(dc, x): assert {s: d for s, d in disagreement(dc.gates(x), dc.own_gates(x)).items() if d} == {}


def starts_equal(net, x, **options):
    "Convert, and check what must hold before any training."
    before = state_hash(net.state_dict())
    dc = DualCopy(net, **options).eval()
    with torch.no_grad():
        near(dc(x), net(x))
        agrees(dc, x)
    assert state_hash(net.state_dict()) == before and list(dc.quantitative.state_dict()) == list(net.state_dict())
    return dc


def linear_in_each_layer(dc, x, still=()):
    "Affine in each parameter for fixed gates; those whose name contains one of `still`, and only those, do not move the output."
    dc, x = perturbed(copy.deepcopy(dc).double(), 0, 0.3), x.double()
    gates, moves = dc.gates(x), set()
    for i, (name, p) in enumerate(dc.quantitative.named_parameters()):
        gen, kept = torch.Generator().manual_seed(i), p.detach().clone()
        def f(value):
            with torch.no_grad():
                p.copy_(value)
                return dc(x, gates)
        W, V = (torch.randn(p.shape, generator=gen, dtype=p.dtype) for _ in range(2))
        r = f(torch.zeros_like(p))
        torch.testing.assert_close(f(0.7*W - 1.3*V) - r, 0.7*(f(W) - r) - 1.3*(f(V) - r), rtol=1e-8, atol=1e-8, msg=lambda m: f'{name}: {m}')
        if not torch.equal(f(W), r): moves.add(name)
        f(kept)
    names = {n for n, _ in dc.quantitative.named_parameters()}
    assert names - moves == {n for n in names if any(s in n for s in still)}


def test_a_network_with_everything_starts_equal_and_is_linear():
    net, x = mixed()
    linear_in_each_layer(starts_equal(net, x), x, still=('body.2.',))


def test_safetensors_round_trip(tmp_path):
    net, x = mixed()
    dc = perturbed(DualCopy(net), 1)
    save_state(tmp_path/'both.safetensors', dc.state_dict())
    save_state(tmp_path/'trained.safetensors', dc.quantitative.state_dict())
    other = DualCopy(Mixed()).eval()
    other.load_state_dict(load_state(tmp_path/'both.safetensors'))
    assert torch.equal(other(x), dc(x))
    plain = Mixed().eval()
    plain.load_state_dict(load_state(tmp_path/'trained.safetensors'))
    assert state_hash(plain.state_dict()) == state_hash(dc.quantitative.state_dict())
    other = DualCopy(net).eval()
    other.quantitative.load_state_dict(load_state(tmp_path/'trained.safetensors'))
    assert torch.equal(other(x), dc(x))


@pytest.mark.parametrize('options', [dict(), dict(freeze='stem'), dict(pool='max', excite='own'), dict(plain='head*'), dict(unknown='plain')])
def test_copies_keep_their_options(options):
    net, x = mixed()
    dc = perturbed(DualCopy(net, **options), 1)
    for other in (copy.deepcopy(dc), pickle.loads(pickle.dumps(dc)), torch.load(_saved(dc), weights_only=False)):
        assert torch.equal(other(x), dc(x)) and list(other.gates(x)) == list(dc.gates(x)) and not other.training
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in dc.parameters()}
        shared = lambda c: {n for n, m in c.structural.named_modules() if n and m is c.quantitative.get_submodule(n)}
        assert shared(other) == shared(dc) and bool(shared(dc)) == ('freeze' in options)


def _saved(dc):
    file = io.BytesIO()
    torch.save(dc, file)
    file.seek(0)
    return file


@pytest.mark.parametrize('dtype,eps', [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_other_types(dtype, eps):
    net, x = mixed()
    dc = DualCopy(net).eval().to(dtype)
    out, y = dc(x.to(dtype)), copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    near(out, y, eps)
    near(out.float(), net(x), eps)
    agrees(dc, x.to(dtype))


def test_channels_last():
    net, x = mixed()
    dc, last = starts_equal(net, x).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(): near(dc(last), net(x))
    agrees(dc, last)
    gates = dc.gates(last)
    maps = {'stem_2', 'body_1', 'body_3', 'body_5'}   # a clamp, a soft unit, a max pool, another soft unit
    assert {s for s in maps if gates[s].is_contiguous(memory_format=torch.channels_last)} == maps
    assert {s.site for s in slots_of(gates, dc.symbols) if s.channels_last} == maps
    moved = perturbed(dc, 1)
    with torch.no_grad(): near(moved(last), copy.deepcopy(moved).to(memory_format=torch.contiguous_format)(x))
    dc.train()(last).sum().backward()


def test_autocast():
    net, x = mixed()
    dc = DualCopy(net).eval()
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        near(dc(x), net(x), 0.02)
        agrees(dc, x)
        assert dc(x).dtype == net(x).dtype
    dc.train()
    with torch.autocast('cpu', torch.bfloat16): loss = dc(x).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for n, p in dc.quantitative.named_parameters() if p.grad is not None) and dc.quantitative.stem[0].weight.grad.abs().sum() > 0


def test_compiled():
    net, x = mixed()
    dc = perturbed(DualCopy(net), 1)
    compiled = torch.compile(dc, backend='aot_eager')
    near(compiled(x), dc(x))
    grads = []
    for f in (dc, compiled):
        dc.zero_grad()
        f(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in dc.quantitative.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for n in grads[0]: torch.testing.assert_close(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['mixed', 'swin'])
def test_exported_as_one_program(name, tmp_path):
    import torchvision
    swin = lambda: torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [3, 3], num_classes=4)
    net, x = mixed() if name == 'mixed' else made(swin, 2, 3, 8, 8)
    dc = perturbed(DualCopy(net), 1, 0.1)
    with torch.no_grad(): y, one = dc(x), dc(x[:1])
    torch.export.save(torch.export.export(dc, (x,)), tmp_path/'fixed.pt2')
    near(torch.export.load(tmp_path/'fixed.pt2').module()(x), y)
    program = torch.export.export(dc, (x,), dynamic_shapes={'x': {0: torch.export.Dim.DYNAMIC}})
    torch.export.save(program, tmp_path/'any.pt2')
    for run in (program.module(), torch.export.load(tmp_path/'any.pt2').module()):
        near(run(x), y)
        near(run(torch.cat([x, x, x]))[-1:], y[-1:], 1e-4)


def _in_another_process(dc, x, out):
    "What a copy answers there, or why it does not: who waits must not wait for ever."
    try: out.put(dc(x).detach().numpy())
    except BaseException as e: out.put(repr(e))


def test_in_another_process():
    net, x = mixed()
    dc, spawn = perturbed(DualCopy(net, freeze='stem'), 1), multiprocessing.get_context('spawn')
    out = spawn.SimpleQueue()
    worker = spawn.Process(target=_in_another_process, args=(dc, x, out))
    worker.start()
    answer = out.get()
    assert not isinstance(answer, str), answer
    np.testing.assert_allclose(answer, dc(x).detach().numpy(), rtol=1e-5, atol=1e-6)
    worker.join(30)
    assert worker.exitcode == 0


def test_fastai_summary():
    import fastai.callback.hook
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    net, x = mixed()
    dls = DataLoaders.from_dsets([(i, 0) for i in x], [(i, 0) for i in x], bs=3, num_workers=0)
    text = str(Learner(dls, DualCopy(net), loss_func=nn.CrossEntropyLoss()).summary())
    assert text.startswith('DualCopy') and {'True', 'False'} <= {line.split()[-1] for line in text.splitlines() if line.startswith('Conv2d')}
    assert 'Linear                                    28         True' in text and 'Linear                                    28         False' not in text


# Stored gates

def comes_back(dc, x):
    "Gates that need no rounding are the same after packing, and so is the output."
    gates = dc.gates(x)
    slots = slots_of(gates, dc.symbols, soft='float32')
    back = unpack(torch.from_numpy(pack(gates, slots)), slots)
    assert {s for s in gates if not torch.equal(gates[s], back[s])} == set()
    assert torch.equal(dc(x, back), dc(x))
    return {s.site: s.bits for s in slots}


def test_gates_of_a_network_come_back():
    net, x = mixed()
    for options in (dict(), dict(freeze='stem'), dict(norm='own', attention='own')):
        bits = comes_back(perturbed(DualCopy(net, **options), 1), 3*x)
        assert (bits.get('stem_2', 2), bits['body_3'], bits['body_1'], bits['head_1']) == (2, 4, 0, 1)


@pytest.mark.parametrize('pool', [nn.AdaptiveMaxPool2d(2), nn.AdaptiveMaxPool2d((1, None)), nn.AdaptiveMaxPool2d(1), nn.AdaptiveMaxPool2d(20), nn.MaxPool2d(4), nn.MaxPool2d((1, 2)),
                                  nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(1)], ids=str)
@pytest.mark.parametrize('size', [9, 10, 11])
def test_positions_of_a_pooling_come_back(pool, size):
    net, x = made(lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), pool, nn.Conv2d(3, 2, 1)), 4, 1, size, size)
    assert comes_back(starts_equal(net, x), x)['1'] <= 8


# A frozen prefix

@pytest.mark.parametrize('freeze,frozen', [('stem', ['stem.0', 'stem.1']), ('stem.0-2', ['stem.0', 'stem.1']), (1, ['stem.0', 'stem.1']), ('2', ['stem.0', 'stem.1', 'body.0']),
                                           ('stem,body.0-3', ['stem.0', 'stem.1', 'body.0', 'body.2.down', 'body.2.up'])])
@pytest.mark.parametrize('options', [dict(), dict(pool='max', norm='own'), dict(plain='body_1')])
def test_a_frozen_prefix_is_common(freeze, frozen, options):
    net, x = mixed()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    freeze_statistics(net)
    dc, whole = starts_equal(net, x, freeze=freeze, **options), DualCopy(net, **options)
    for n in frozen:
        assert dc.structural.get_submodule(n) is dc.quantitative.get_submodule(n)
        assert not any(p.requires_grad for p in dc.quantitative.get_submodule(n).parameters())
    assert dc.structural.body[4] is not dc.quantitative.body[4]
    gates, every = dc.gates(x), whole.gates(x)
    values = [s for s in gates if s.endswith('_value')]
    assert len(values) >= 1 and gates['head_1'].dtype == torch.bool and set(gates) - set(values) < set(every)
    assert not [s for s in gates if s.startswith('stem_') and s not in values] and [s for s in every if s.startswith('stem_')] == ['stem_2']
    with seeded(0, 'drop'): a = dc.train()(x)
    with seeded(0, 'drop'): b = whole.train()(x)
    near(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    trained = dict(whole.quantitative.named_parameters())
    for n, p in dc.quantitative.named_parameters():
        if n.startswith(tuple(f'{f}.' for f in frozen)): assert p.grad is None
        elif trained[n].grad is not None: torch.testing.assert_close(p.grad, trained[n].grad, rtol=1e-4, atol=1e-6)
    assert dc.quantitative.head[2].weight.grad is not None and all(p.grad is None for p in dc.structural.parameters())


def test_a_frozen_prefix_hands_over_every_value_that_goes_on():
    class Skip(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        def forward(self, x):
            h = F.relu(self.a(x))
            g = F.relu(self.b(h))
            return self.d(F.relu(self.c(g) + h))
    net, x = made(Skip, 5, 4)
    dc = starts_equal(net, x, freeze='a,b')
    assert len([s for s in dc.gates(x) if s.endswith('_value')]) == 2
    with torch.no_grad(): dc.structural.c.weight.zero_()
    assert dc.structural.c is not dc.quantitative.c and dc.structural.a is dc.quantitative.a
    linear_in_each_layer(starts_equal(net, x, freeze='a'), x, still=('a.',))


class Noisy(nn.Module):
    "Dropout above a frozen layer, in three forms."
    def __init__(self, form): super().__init__(); self.a, self.drop, self.b, self.form = nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2), form
    def forward(self, x):
        h = F.relu(self.a(x))
        if self.form == 'module': return self.b(self.drop(h))
        if self.form == 'function': return self.b(F.dropout(h, 0.5, self.training))
        return self.b(h + torchvision_depth(h, 0.5, 'row', self.training))


def torchvision_depth(*args):
    from torchvision.ops import stochastic_depth
    return stochastic_depth(*args)


@pytest.mark.parametrize('form', ['module', 'function', 'depth'])
def test_dropout_in_a_frozen_prefix_is_not_common(form):
    "Both copies would draw alike, or not at all."
    net, x = made(lambda: Noisy(form), 6, 4)
    dc, whole = starts_equal(net, x, freeze='a').train(), DualCopy(net).train()
    with seeded(0, 'a'): a = dc(x)
    with seeded(0, 'b'): b = dc(x)
    with seeded(0, 'a'): c = whole(x)
    assert not torch.equal(a, b) and all(torch.equal(g, h) for g, h in zip(dc.gates(x).values(), dc.gates(x).values()))
    near(a, c)
    with seeded(0, 'a'): near(dc(x, dc.gates(x)), c)


@pytest.mark.parametrize('freeze,word', [('features', 'unknown layer'), ('stem.0-9', 'unknown layer'), (99, 'must be below')])
def test_a_frozen_layer_that_is_none(freeze, word):
    with pytest.raises(InputError, match=word): DualCopy(Mixed(), freeze=freeze)


# What the tracer does not see

class Branch(nn.Module):
    "Its way depends on shapes, so tracing cannot follow it."
    def __init__(self): super().__init__(); self.a, self.q, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)
    def forward(self, x):
        if x.shape[0] > 1000: return x
        h = F.relu(self.a(x))
        h = self.drop(h) + F.dropout(h, 0.5, self.training)
        h = torch.softmax(self.q(x), -1) * h
        return F.gelu(self.b(h)) + x


class Holds(nn.Module):
    def __init__(self, inside=Branch): super().__init__(); self.inside, self.head = inside(), nn.Sequential(nn.Linear(6, 5), nn.ReLU6(), nn.Linear(5, 3))
    def forward(self, x): return self.head(self.inside(x))


def test_inside_a_leaf_units_are_gated():
    net, x = made(Holds, 4, 6)
    with pytest.raises(InputError, match='leaves=.*fixed='): DualCopy(net)
    dc = starts_equal(net, x, leaves=(Branch,))
    assert [s for s in dc.gates(x) if s.startswith('inside')] == ['inside_relu', 'inside_softmax', 'inside_gelu'] and len(dc.gates(x)) == 4
    linear_in_each_layer(dc, x, still=('inside.q',))
    agrees(pickle.loads(pickle.dumps(dc)), x)


class Values(nn.Module):
    "Its way depends on values and numbers of its input, asked in all the ways that people do."
    def __init__(self, ask=lambda x: x.sum() > 1e9): super().__init__(); self.a, self.ask = nn.Linear(6, 6), ask
    def forward(self, x): return x if self.ask(x) else F.relu(self.a(x))


@pytest.mark.parametrize('ask', [lambda x: x.sum() > 1e9, lambda x: len(x) > 1000, lambda x: x.isnan().any(), lambda x: x.sum().item() > 1e9, lambda x: float(x.mean()) > 1e9,
                                 lambda x: not torch.isfinite(x).all(), lambda x: x.dim() == 5 or x.ndim == 5, lambda x: x.numel() > 1e9,
                                 lambda x: x.is_cuda or x.dtype == torch.int8 or x.device.type == 'meta', lambda x: torch.is_grad_enabled() and x.shape[-1] != 6],
                         ids=['sum', 'len', 'isnan', 'item', 'float', 'isfinite', 'dim', 'numel', 'kind', 'grad'])
def test_a_leaf_may_branch_on_what_arrives(ask):
    "It is what the error of a network that cannot be traced advises."
    net, x = made(lambda: Holds(lambda: Values(ask)), 4, 6)
    linear_in_each_layer(starts_equal(net, x, leaves=(Values,)), x)


def test_dropout_inside_a_leaf_follows_the_mode():
    net, x = made(Holds, 40, 6)
    dc = DualCopy(net, leaves=(Branch,)).train()
    with seeded(0, 'a'): a = dc(x)
    with seeded(0, 'b'): b = dc(x)
    assert not torch.equal(a, b)
    assert all(torch.equal(g, h) for g, h in zip(dc.gates(x).values(), dc.gates(x).values()))
    dc(x).sum().backward()
    assert dc.quantitative.inside.a.weight.grad.abs().sum() > 0 and all(p.grad is None for p in dc.structural.parameters())


class Regimes(nn.Module):
    "Units inside a leaf whose gates are whole numbers."
    def __init__(self): super().__init__(); self.a = nn.Linear(6, 12)
    def forward(self, x):
        if x.shape[0] > 1000: return x
        return F.max_pool1d(F.relu6(self.a(x))[:, None], 2)[:, 0]


def test_gates_inside_a_leaf_can_be_packed():
    net, x = made(lambda: Holds(Regimes), 4, 6)
    dc, x = starts_equal(net, 5*x, leaves=(Regimes,)), 5*x
    assert [s for s in dc.gates(x)] == ['inside_relu6', 'inside_max_pool1d', 'head_1']
    comes_back(dc, x)


class Unruly(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(6, 6)
    def forward(self, x): return F.softsign(self.a(x)) if x.shape[0] < 1000 else x


def test_inside_a_leaf_an_operation_without_a_rule_is_refused():
    net, x = made(lambda: Holds(Unruly), 4, 6)
    with pytest.raises(InputError, match="(softsign|abs).*inside.*unknown='plain'"): DualCopy(net, leaves=(Unruly,)).eval()(x)


def test_inside_a_leaf_an_operation_without_a_rule_passes_on_demand():
    net, x = made(lambda: Holds(Unruly), 4, 6)
    dc = DualCopy(net, leaves=(Unruly,), unknown='plain').eval()
    near(dc(x), net(x))
    assert list(dc.gates(x)) == ['head_1']


def shifted(x, weight, bias=None, times=1):
    if x.shape[0] > 1000: return x
    for _ in range(times): x = F.relu(F.linear(x, weight, bias))
    return x


torch.fx.wrap('shifted')


class Wrapped(nn.Module):
    def __init__(self): super().__init__(); self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
    def forward(self, x): return self.head(shifted(x, self.a.weight, bias=self.a.bias, times=2))


def test_a_wrapped_function_is_gated():
    net, x = made(Wrapped, 4, 6)
    dc = starts_equal(net, x)
    gates = dc.gates(x)
    assert len(gates) == 2 and all(g.dtype == torch.bool for g in gates.values())
    moved = perturbed(dc, 1)
    s, S, Q = x, net, moved.quantitative
    h = x
    for g in gates.values():
        s = F.linear(s, S.a.weight, S.a.bias)
        assert torch.equal(g, s > 0)
        h, s = F.linear(h, Q.a.weight, Q.a.bias) * g, s.relu()
    near(moved(x), Q.head(h))


class Masked(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x, mask=None, scale=1., deep=False):
        h = F.relu(self.a(x)) * scale
        if deep: h = F.relu(self.a(h))
        if mask is not None: h = h.masked_fill(mask, 0.)
        return self.b(h)


def test_further_arguments_keep_their_defaults_or_are_fixed():
    net, x = made(Masked, 5, 4)
    dc = starts_equal(net, x)
    assert list(dc.gates(x)) == ['relu']
    dc = DualCopy(net, fixed={'scale': 3., 'deep': True}).eval()
    near(dc(x), net(x, scale=3., deep=True))
    assert len(dc.gates(x)) == 2
    agrees(pickle.loads(pickle.dumps(dc)), x)
    mask = torch.tensor([True, False, True, False])
    near(DualCopy(net, fixed={'mask': mask}).eval()(x), net(x, mask))


class Required(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
    def forward(self, x, scale): return F.relu(self.a(x)) * scale


def test_an_argument_without_default_must_be_fixed():
    net, x = made(Required, 5, 4)
    with pytest.raises(InputError, match="fixed="): DualCopy(net)
    near(DualCopy(net, fixed={'scale': 2.}).eval()(x), net(x, 2.))


class Untraceable(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4)
    def forward(self, x):
        for row in x.tolist(): assert row
        return self.a(x)


def test_a_network_that_cannot_be_traced_says_what_to_do():
    with pytest.raises(InputError, match=r'Untraceable cannot be traced.*leaves=.*fixed='): DualCopy(Untraceable())


# Options

@pytest.mark.parametrize('option,value,sites', [('pool', 'max', {'body_3'}), ('excite', 'own', {'body_2_hardsigmoid'}), ('attention', 'own', {'attention'}), ('norm', 'own', {'norm', 'body_4'})])
def test_each_option_leaves_its_units_to_themselves(option, value, sites):
    net, x = mixed()
    default, own = starts_equal(net, x), starts_equal(net, x, **{option: value})
    assert set(default.gates(x)) - set(own.gates(x)) == sites and list(DualCopy(net, **{option: 'structural'}).gates(x)) == list(default.gates(x))
    moved, other = perturbed(DualCopy(net), 1), perturbed(DualCopy(net, **{option: value}), 1)
    assert state_hash(moved.quantitative.state_dict()) == state_hash(other.quantitative.state_dict())
    with torch.no_grad(): assert (moved(3*x) - other(3*x)).abs().max() > 1e-3*moved(3*x).abs().max()
    differ = disagreement(moved.gates(3*x), moved.own_gates(3*x))
    assert all(differ[s] > 0 for s in sites), 'left to themselves they would decide otherwise'


def test_with_excitation_of_its_own_the_excitation_is_trained():
    net, x = mixed()
    for option, trained in ((dict(), False), (dict(excite='own'), True)):
        dc = DualCopy(net, **option).train()
        dc(x).sum().backward()
        assert (dc.quantitative.body[2].up.weight.grad is not None) == trained


def test_all_units_left_to_themselves_are_the_plain_network():
    net, x = mixed()
    dc = perturbed(DualCopy(net, plain='*'), 1)
    assert dc.gates(x) == {}
    near(dc(x), dc.quantitative(x))


def test_unknown_operations_pass_unchanged_on_demand():
    net, x = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 5, 4)
    dc = starts_equal(net, x, unknown='plain')
    assert list(dc.gates(x)) == ['3']


# Code as people write it

class Again(nn.Module):
    "In-place units whose input is read again later."
    def __init__(self, form): super().__init__(); self.a, self.b, self.act, self.form = nn.Linear(4, 4), nn.Linear(4, 3), nn.ReLU6(inplace=True), form
    def forward(self, x):
        y = self.a(x)
        if self.form == 'method': y.relu_()
        if self.form == 'function': F.relu(y, inplace=True)
        if self.form == 'function_': torch.relu_(y)
        if self.form == 'leaky': F.leaky_relu_(y, 0.3)
        if self.form == 'module': self.act(y)
        if self.form == 'before':
            z = y + 1
            y.relu_()
            return self.b(z + y)
        if self.form == 'result':
            z = F.hardswish(y, inplace=True)
            return self.b(z + 2*y)
        if self.form == 'twice': F.hardtanh_(y.relu_(), -1., 0.5)
        if self.form == 'view':
            half = y[:, :2]
            half.relu_()
        if self.form == 'add': y += x
        if self.form == 'add_': y.add_(x)
        if self.form == 'zero': y[:, 0] = 0
        if self.form == 'mul_': y.mul_(2.).relu_()
        return self.b(y + x)


@pytest.mark.parametrize('form', ['method', 'function', 'function_', 'leaky', 'module', 'before', 'result', 'twice', 'add', 'add_', 'mul_'])
def test_what_is_overwritten_and_read_again(form):
    net, x = made(lambda: Again(form), 6, 4)
    kept = x.clone()
    dc = starts_equal(net, x)
    linear_in_each_layer(dc, x)
    dc.train()(x).sum().backward()
    assert torch.equal(x, kept)
    own = perturbed(DualCopy(net), 1)
    with torch.no_grad(): assert not torch.equal(own(x), net(x))


@pytest.mark.parametrize('form', ['view', 'zero'])
def test_what_is_overwritten_in_part_is_right_or_refused(form):
    net, x = made(lambda: Again(form), 6, 4)
    try: dc = DualCopy(net).eval()
    except InputError: return
    near(dc(x), net(x))


class Reused(nn.Module):
    "One layer, one unit, one normaliser, called several times."
    def __init__(self): super().__init__(); self.a, self.act, self.norm, self.head = nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)
    def forward(self, x):
        for _ in range(3): x = self.act(self.norm(self.a(x)))
        return self.head(x)


def test_reused_modules():
    net, x = made(Reused, 5, 4)
    dc = starts_equal(net, x)
    assert list(dc.gates(x)) == ['norm', 'act', 'norm_1', 'act_1', 'norm_2', 'act_2']
    moved, h = perturbed(dc, 1), x
    gates, Q = moved.gates(x), dc.quantitative
    for i in ('', '_1', '_2'):
        h = Q.a(h)
        h = ((h - h.mean(-1, keepdim=True))*gates[f'norm{i}']*Q.norm.weight + Q.norm.bias)*gates[f'act{i}']
    near(moved(x), Q.head(h))


class Relative(nn.Module):
    "A table of relative positions from a small network of its own, as in a Swin transformer of the second version."
    def __init__(self):
        super().__init__()
        self.mlp, self.value, self.head = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer('place', torch.linspace(-1, 1, 25).view(25, 1))
    def forward(self, x):
        table = 16*torch.sigmoid(self.mlp(self.place)).view(5, 5)
        return self.head(F.relu(table @ self.value(x)).mean(1))


def test_what_sees_no_image_is_no_unit():
    "The table is the trained copy's own; only what sees images is gated."
    net, x = made(Relative, 3, 5, 4)
    dc = starts_equal(net, x)
    assert list(dc.gates(x)) == ['relu']
    dc.train()(x).sum().backward()
    assert dc.quantitative.value.weight.grad.abs().sum() > 0


class LayerNorm2d(nn.LayerNorm):
    "As timm writes it: a layer norm over channels, by permuting."
    def forward(self, x): return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Scale(nn.Module):
    def __init__(self, c): super().__init__(); self.gamma = nn.Parameter(torch.full((c, 1, 1), 0.5))
    def forward(self, x): return x.mul(self.gamma)


def drop_path(x, p, training):
    if p == 0. or not training: return x
    keep = x.new_empty((x.shape[0],) + (1,)*(x.ndim - 1)).bernoulli_(1 - p)
    return x * keep.div_(1 - p)


class DropPath(nn.Module):
    "Stochastic depth, as timm writes it, or by rounding down."
    def __init__(self, form): super().__init__(); self.form = form
    def forward(self, x):
        if self.form == 'bernoulli': return drop_path(x, 0.5, self.training)
        if not self.training: return x
        keep = 0.5 + torch.rand((x.shape[0],) + (1,)*(x.ndim - 1), dtype=x.dtype, device=x.device)
        keep.floor_()
        return x.div(0.5) * keep


class BlurPool(nn.Module):
    "A fixed filter before taking every second pixel."
    def __init__(self, c):
        super().__init__()
        f = torch.tensor([1., 2., 1.])
        self.register_buffer('filter', (f[:, None]*f / 16)[None, None].repeat(c, 1, 1, 1))
    def forward(self, x): return F.conv2d(F.pad(x, (1, 1, 1, 1), 'reflect'), self.filter, stride=2, groups=x.shape[1])


class FusedAttention(nn.Module):
    "Attention as timm writes it, in one call."
    def __init__(self, c, heads):
        super().__init__()
        self.qkv, self.proj, self.heads, self.p = nn.Linear(c, 3*c), nn.Linear(c, c), heads, 0.1
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class LongAttention(FusedAttention):
    "The same with its softmax in sight."
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q * (c // self.heads)**-0.5) @ k.transpose(-2, -1)
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Timm(nn.Module):
    def __init__(self, attention, drop):
        super().__init__()
        self.conv, self.norm, self.act, self.blur, self.excite = nn.Conv2d(3, 8, 3, padding=1), LayerNorm2d(8), nn.SiLU(inplace=True), BlurPool(8), Excite(8)
        self.scale, self.path, self.group = Scale(8), DropPath(drop), nn.GroupNorm(4, 8)
        self.token, self.pos = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 17, 8))
        self.norm1, self.attn, self.norm2, self.mlp, self.head = nn.LayerNorm(8), attention(8, 2), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 3)
    def forward(self, x):
        x = self.blur(self.act(self.norm(self.conv(x))))
        x = x + self.path(self.scale(self.group(self.excite(x))))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + self.pos
        x = x + self.path(self.attn(self.norm1(x)))
        x = x + self.path(self.mlp(self.norm2(x)))
        return self.head(x[:, 0])


@pytest.mark.parametrize('attention', [FusedAttention, LongAttention])
@pytest.mark.parametrize('drop', ['bernoulli', 'floor'])
def test_pieces_as_timm_writes_them(attention, drop):
    net, x = made(lambda: Timm(attention, drop), 4, 3, 8, 8)
    dc = starts_equal(net, x)
    linear_in_each_layer(dc, x, still=('excite',))
    before = state_hash(dc.structural.state_dict())
    dc.train()
    with seeded(0, 'a'): a = dc(x)
    with seeded(1, 'b'): b = dc(x)
    assert not torch.equal(a, b), 'stochastic depth is on'
    a.square().sum().backward()
    assert dc.quantitative.attn.qkv.weight.grad[:16].abs().max() == 0 < dc.quantitative.attn.qkv.weight.grad[16:].abs().max(), 'values are trained, queries and keys are not'
    assert dc.quantitative.scale.gamma.grad.abs().sum() > 0 and state_hash(dc.structural.state_dict()) == before


def test_stochastic_depth_scales_what_it_keeps():
    "On average over its draws, the output of training is what the mode of evaluation gives, where the network is linear."
    class Path(nn.Module):
        def __init__(self, form): super().__init__(); self.a, self.path, self.head = nn.Linear(4, 4), DropPath(form), nn.Linear(4, 2)
        def forward(self, x): return self.head(x + self.path(F.relu(self.a(x))))
    for form in ('bernoulli', 'floor'):
        net, x = made(lambda: Path(form), 1, 4)
        dc = DualCopy(net).train()
        with seeded(0, form), torch.no_grad(): many = dc(x.expand(4000, -1))
        near(many.mean(0), net(x)[0], 0.1)
        assert len(many.unique(dim=0)) == 2


def test_a_gated_linear_unit_is_refused_by_name():
    for net in (nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)), Of(lambda x: F.glu(x))):
        with pytest.raises(InputError, match="(GLU|glu).*unknown='plain'"): DualCopy(net)
