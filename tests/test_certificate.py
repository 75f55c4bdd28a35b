"What the certificate must see, and must leave as it was."
import copy, pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsq_nb.core import InputError, seeded, state_hash
from fedsq_nb.data.example import ResCNN
from fedsq_nb.gating.certificate import certify
from fedsq_nb.gating.definition import CertificateError
from fedsq_nb.gating.dualcopy import DualCopy

CERTIFIES = True


class Of(nn.Module):
    "A layer, a function, a layer."
    def __init__(self, f): super().__init__(); self.a, self.b, self.f = nn.Linear(6, 6), nn.Linear(6, 3), f
    def forward(self, x): return self.b(self.f(self.a(x)))


def net_and_input(f=F.relu):
    with seeded(0, 'certificate tests'): return Of(f), torch.randn(4, 6)


def verdicts(certificate): return {f.property: f.verdict.split(':')[0] for f in certificate.findings}


def test_a_relu_network_has_every_line():
    net, x = net_and_input()
    dc = DualCopy(net, example=x)
    assert set(verdicts(dc.certificate).values()) == {'holds'} and len(dc.certificate.findings) == 12
    assert max(f.error for f in dc.certificate.findings) < 1e-7
    assert [p.operation for p in dc.certificate.places] == ['relu'] and 'F.relu' not in dc.certificate.places[0].line


def test_a_small_residual_network_with_batch_norm_and_dropout():
    with seeded(0, 'bn'): net, x = nn.Sequential(ResCNN(10), nn.Dropout(0.5), nn.ReLU(), nn.Linear(10, 3)), torch.randn(3, 1, 16, 16)
    certificate = DualCopy(net, example=x).certificate
    assert {f.property: f.verdict for f in certificate.findings}['1. starts as the original, training mode'] == 'holds'


def test_soft_gates_have_no_original_gradient_and_say_why():
    net, x = net_and_input(F.gelu)
    lines = {f.property: f.verdict for f in DualCopy(net, example=x).certificate.findings}
    assert 'does not apply' in lines["4. the gradient starts as the original's"] and 'gelu' in lines["4. the gradient starts as the original's"]


def test_what_decides_alone_is_told():
    net, x = net_and_input(torch.sigmoid)
    assert DualCopy(net, example=x).certificate.still == ['a.weight', 'a.bias']


def test_the_world_is_as_before():
    net, x = net_and_input()
    net = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.BatchNorm1d(6), nn.Flatten(), net, nn.Dropout(0.5)).train()
    dc = DualCopy(net, certify=False).train()
    dc.quantitative[4].eval()
    before = state_hash(dc.state_dict()), [m.training for m in dc.modules()], x.clone(), torch.get_rng_state(), state_hash(net.state_dict())
    dc.certify(x, net)
    after = state_hash(dc.state_dict()), [m.training for m in dc.modules()], x, torch.get_rng_state(), state_hash(net.state_dict())
    assert before[0] == after[0] and before[1] == after[1] and before[4] == after[4]
    assert torch.equal(before[2], after[2]) and torch.equal(before[3], after[3])
    assert all(p.grad is None for p in dc.parameters()) and torch.is_grad_enabled()


def test_the_first_input_certifies_and_copies_do_not_again(monkeypatch):
    net, x = net_and_input()
    calls = []
    monkeypatch.setattr('fedsq_nb.gating.dualcopy.certify', lambda *args: calls.append(args) or certify(*args))
    dc = DualCopy(net)
    clients = [copy.deepcopy(dc) for _ in range(3)]
    for client in clients: client(x)
    dc(x)
    pickle.loads(pickle.dumps(dc))(x)
    assert len(calls) == 1
    DualCopy(net, certify=False)(x)
    assert len(calls) == 1
    with torch.no_grad(): DualCopy(net).gates(x)
    assert len(calls) == 2


def test_a_single_input_gets_company():
    net, x = net_and_input()
    assert set(verdicts(DualCopy(net).certify(x[:1])).values()) == {'holds'}


def test_original_must_be_where_the_copy_starts():
    net, x = net_and_input()
    dc = DualCopy(net)
    with torch.no_grad(): net.a.weight.add_(1)
    with pytest.raises(CertificateError, match="'a.weight' differs"): dc.certify(x, net)


@pytest.mark.parametrize('options', [dict(plain='relu'), dict(plain='*'), dict(unknown='plain')])
def test_what_was_declared_is_allowed(options):
    net, x = net_and_input()
    certificate = DualCopy(net, example=x, **options).certificate
    assert 'does not apply' in verdicts(certificate)['3. affine in each trained tensor'] or 'unknown' in options


def test_a_trained_copy_is_certified_as_well():
    net, x = net_and_input()
    dc = DualCopy(net, certify=False)
    with torch.no_grad():
        for p in dc.quantitative.parameters(): p.add_(torch.randn_like(p))
    assert set(verdicts(dc.certify(x)).values()) == {'holds'}


def test_it_can_be_read():
    net, x = net_and_input()
    certificate = DualCopy(net, example=x).certificate
    assert certificate._repr_markdown_().count('\n|') >= 13 and 'certified: 1 places' in repr(certificate)


# Faults, planted in a copy that is otherwise right

def planted(change, f=F.relu):
    net, x = net_and_input(f)
    dc = DualCopy(net, certify=False)
    change(dc)
    return dc, net, x


def broken_gate(dc):
    right = dc.functions.gates
    dc.functions = dc.functions._replace(gates=lambda net, x: {k: g ^ True for k, g in right(net, x).items()})


def plain_relu(dc): dc.functions = dc.functions._replace(evaluation=lambda net, x, gates: net(x))
def other_training(dc): dc.functions = dc.functions._replace(training=lambda net, x, gates: 2*net(x))
def shared(dc): dc.structural.a.weight = dc.quantitative.a.weight
def cut(dc):
    right = dc.functions.evaluation
    dc.functions = dc.functions._replace(evaluation=lambda net, x, gates: net.b(right(net, x, gates).detach()@torch.zeros(3, 6, dtype=x.dtype)) + right(net, x, gates).detach())
def writes(dc):
    right = dc.functions.predict
    dc.functions = dc.functions._replace(predict=lambda net, x: right(net, x.add_(1e-12)))


@pytest.mark.parametrize('change', [broken_gate, plain_relu, other_training, shared, cut, writes], ids=lambda f: f.__name__)
def test_a_planted_fault_is_seen(change):
    dc, net, x = planted(change)
    with pytest.raises(CertificateError): dc.certify(x, net)


def test_a_network_of_sigmoids_warns_that_only_its_head_trains():
    with seeded(0, 'sigmoids'): net, x = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)), torch.randn(4, 6)
    with pytest.warns(UserWarning, match='4 of 6 trained tensors only decide'): DualCopy(net, example=x)


@pytest.mark.parametrize('freeze', ['1', '0-1', '0-4'])
def test_a_frozen_batch_norm_does_not_move_and_is_no_fault(freeze):
    "Frozen layers stay in evaluation mode while the others train, and so does the original that they are compared with."
    with seeded(0, 'frozen'):
        net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 4, 3),
                            nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(), nn.Linear(64, 3)).eval()
        net[0][1].running_mean.normal_()
        net[0][1].running_var.uniform_(.5, 2)
        x = torch.randn(4, 3, 8, 8)
    dc = DualCopy(net, freeze=freeze)
    dc.certify(x)
    before = dc.train().quantitative[0][1].running_mean.clone()
    dc(x)
    assert torch.equal(dc.quantitative[0][1].running_mean, before)
