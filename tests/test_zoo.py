"""What must be true of a DualCopy, for torchvision's classification networks.

pytest checks one network of each family. `python tests/test_zoo.py` checks all of them and writes a line each to
nbs/studies/results/dualcopy/zoo.jsonl.
"""
import copy, gc, json, time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fedsq_nb.core import seeded, state_hash
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.gating.gates import disagreement

RESULTS = Path(__file__).parents[1]/'nbs/studies/results/dualcopy/zoo.jsonl'
FAMILIES = ['alexnet', 'vgg11_bn', 'resnet18', 'densenet121', 'googlenet', 'inception_v3', 'squeezenet1_1', 'shufflenet_v2_x0_5', 'mnasnet0_5', 'mobilenet_v2',
            'mobilenet_v3_small', 'efficientnet_b0', 'regnet_y_400mf', 'convnext_tiny', 'swin_t', 'swin_v2_t', 'vit_b_16', 'maxvit_t']
LARGE = 150_000_000   # parameters above which training and double precision are left out


def size_of(name):
    "Pixels a side: what the network is built for where it insists, else little."
    return 224 if 'maxvit' in name else 96 if 'inception' in name else 112 if 'vit_h' in name else 64


def small(name):
    "The same classes with fewer layers or features, where the smallest network of the family takes long."
    if name == 'vit_b_16': return torchvision.models.VisionTransformer(64, 16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=96, num_classes=10)
    if name == 'maxvit_t': return torchvision.models.MaxVit((56, 56), 16, 7, [16, 32], [1, 2], head_dim=8, stochastic_depth_prob=0.2, num_classes=10)
    if name in ('alexnet', 'vgg11_bn'):
        net = torchvision.models.get_model(name, num_classes=10)
        for i, m in list(net.classifier.named_children()):
            if isinstance(m, nn.Linear): net.classifier[int(i)] = nn.Linear(m.in_features if m.in_features != 4096 else 100, 100 if m.out_features == 4096 else 10)
        return net


def build(name, classes=10, fast=False):
    "The network with random weights, none of which is trivial: no zero head, no unit scale, no empty statistics."
    settings = ({'image_size': size_of(name)} if name.startswith('vit_') else {'init_weights': False, 'aux_logits': False} if name == 'inception_v3'
                else {'init_weights': False} if name == 'googlenet' else {})
    with seeded(0, name, 'net'), torch.no_grad():
        net = fast and small(name) or torchvision.models.get_model(name, weights=None, num_classes=classes, **settings)
        for p in net.parameters():
            if p.min() == p.max(): p.add_(0.1*torch.randn_like(p))
        for m in net.modules():
            if isinstance(m, nn.Linear) and m.out_features == classes: m.weight.normal_(0, m.in_features**-0.5)
        norms = [m.train() for m in net.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        kept = [m.momentum for m in norms]
        for m in norms: m.momentum = 1.
        if norms: net(images_of(name, fast))        # statistics of such images, or deep down nothing of an image is left
        for m, momentum in zip(norms, kept):
            m.momentum = momentum
            m.running_mean.add_(0.1*torch.randn_like(m.running_mean))
            m.running_var.clamp_min_(0.01).mul_(0.5 + torch.rand_like(m.running_var))
    return net.train()


def images_of(name, fast=False):
    size = 56 if fast and 'maxvit' in name else size_of(name)
    with seeded(0, name, 'images'): return torch.randn(2, 3, size, size)


def everything(net):
    "All that conversion could change in a network."
    return (state_hash(net.state_dict()), [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], [p.grad is None for p in net.parameters()],
            [(n, type(m), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()])


def logits(out):
    "The outputs of a network that may have auxiliary heads."
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]


def relative(a, b): return float((a - b).abs().max() / b.abs().max())


def train(dc, x, steps=2):
    "A few steps of SGD in training mode."
    dc.train()
    opt = torch.optim.SGD([p for p in dc.parameters() if p.requires_grad], lr=1e-4)
    with seeded(0, 'steps'):
        for _ in range(steps):
            opt.zero_grad()
            sum(F.cross_entropy(o, torch.arange(len(x))) for o in logits(dc(x))).backward()
            opt.step()


def affine_error(dc, x, sample=6):
    "How far the output is from affine in single parameters of layers spread over the depth, for fixed gates; and in how many it moves at all."
    dc, x = copy.deepcopy(dc).double().eval(), x[:1].double()
    errors, gates = [], dc.gates(x)
    named = list(dc.quantitative.named_parameters())
    gen, (a, b) = torch.Generator().manual_seed(0), (0.7, -1.3)
    for i in range(sample):
        name, p = named[(len(named) - 1)*i // (sample - 1)]
        kept = p.detach().clone()
        def f(value):
            with torch.no_grad():
                p.copy_(value)
                return dc(x, gates)
        W, V = (kept + kept.std().nan_to_num(1).clamp_min(1e-2)*torch.randn(p.shape, generator=gen, dtype=p.dtype) for _ in range(2))
        r = f(torch.zeros_like(p))
        fW, fV = f(W) - r, f(V) - r
        if size := float(torch.maximum(fW.abs(), fV.abs()).max()): errors.append(float((f(a*W + b*V) - r - a*fW - b*fV).abs().max()) / size)
        with torch.no_grad(): p.copy_(kept)
    return max(errors, default=float('nan')), len(errors)


def check(name, fast=False):
    "One network's row: what was measured, and what failed."
    began, net, x = time.perf_counter(), build(name, fast=fast), images_of(name, fast)
    count = sum(p.numel() for p in net.parameters())
    before = everything(net)
    dc = DualCopy(net).eval()
    row = dict(name=name, parameters=count, untouched=everything(net) == before)
    with torch.no_grad():
        y, z, gates = net.eval()(x), dc(x), dc.gates(x)
        row |= dict(error=relative(z, y), argmax=torch.equal(z.argmax(1), y.argmax(1)), given=torch.equal(dc(x, gates), z),
                    sees=relative(y[0], y[1]) > 1e-4, sites=len(gates), disagreement=max(disagreement(gates, dc.own_gates(x, gates)).values()))
    del gates
    keys = list(net.state_dict())
    row['keys'] = list(dc.quantitative.state_dict()) == keys
    net.load_state_dict(dc.quantitative.state_dict(), strict=True)
    with torch.no_grad(): row['loads'] = torch.equal(net(x), y)
    if all_of_it := count <= LARGE:
        row['affine'], row['moved'] = affine_error(dc, x)
        structural, quantitative = state_hash(dc.structural.state_dict()), state_hash(dc.quantitative.state_dict())
        train(dc, x)
        row |= dict(structural=state_hash(dc.structural.state_dict()) == structural and all(p.grad is None and not p.requires_grad for p in dc.structural.parameters()),
                    trained=state_hash(dc.quantitative.state_dict()) != quantitative and all(p.isfinite().all() for p in dc.quantitative.parameters()))
    else: row |= dict(affine=None, moved=None, structural=None, trained=None, left_out=f'training and double precision: more than {LARGE//10**6} million parameters')
    wrong = [k for k in ('untouched', 'argmax', 'given', 'sees', 'keys', 'loads') + ('structural', 'trained')*all_of_it if not row[k]]
    wrong += ['error']*(not row['error'] <= 1e-5) + ['disagreement']*(row['disagreement'] != 0) + ['sites']*(not row['sites'])
    if all_of_it: wrong += ['affine']*(not row['affine'] <= 1e-5) + ['moved']*(row['moved'] < 3)
    return row | dict(seconds=round(time.perf_counter() - began, 1), failed=', '.join(wrong) or None)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_network_of_each_family(name):
    row = check(name, fast=True)
    assert row['failed'] is None, row


def sweep(name):
    "A network's row, whatever happens."
    try: return check(name)
    except Exception as e: return dict(name=name, failed=f'{type(e).__name__}: {e}')
    finally: gc.collect()


if __name__ == '__main__':
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, 'w') as f:
        for name in torchvision.models.list_models(module=torchvision.models):
            print(json.dumps(row := sweep(name)), file=f, flush=True)
            print(row['name'], row.get('seconds'), row['failed'] or 'ok', flush=True)
