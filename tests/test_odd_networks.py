"""Odd networks, as people write them: each is right, or refused with a clear error. None is silently wrong.

A pattern is a function of a module and a tensor; it is put into three places: on the input, between two layers, and in a
residual branch. What a network should compute under fixed gates is worked out here, by running its own Python code twice,
with torch's functions replaced: first they remember what they decide, then they are held to it. Nothing of the package is
used for that.

`python tests/test_odd_networks.py [WORD]` prints what becomes of each network.
"""
import copy, math, sys, types, warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fedsq_nb.core import InputError
from fedsq_nb.gating import gates, graph, rules
from fedsq_nb.gating.definition import CertificateError
from fedsq_nb.gating.dualcopy import DualCopy

CERTIFIES = True
warnings.filterwarnings('ignore')


# The oracle: two runs of the network's own code

def ratio(f): return lambda s, *a, **k: torch.where(s == 0, 1., f(s, *a, **k) / s)
def times(q, g, *a, **k): return q * g
def piece(name, slope):
    def decide(s, *a, **k): return s > 0
    def apply(q, g, *a, **k): return torch.where(g, q, slope(*a, **k) * q)
    return decide, apply


def bounds(name, a, k):
    if name == 'relu6': return 0., 6.
    if name == 'hardtanh': return (a + (-1., 1.)[len(a):])[0] if a else k.get('min_val', -1.), (a + (-1., 1.)[len(a):])[1] if a else k.get('max_val', 1.)
    low = k.get('min', a[0] if a and 'max' not in name else None)
    high = k.get('max', a[0] if a and name == 'clamp_max' else a[1] if len(a) > 1 else None)
    return -math.inf if low is None else low, math.inf if high is None else high


def regime(name):
    def decide(s, *a, **k): return sum(((s > bounds(name, a, k)[0]).int(), (s >= bounds(name, a, k)[1]).int()))
    def apply(q, g, *a, **k): return torch.where(g == 1, q, torch.where(g == 0, *map(q.new_tensor, bounds(name, a, k))))
    return decide, apply


def spread(s, shape, *a, eps=1e-5, **k):
    dims = [-1 - i for i in range(len(shape))]
    return 1 / torch.sqrt(((s - s.mean(dims, keepdim=True))**2).mean(dims, keepdim=True) + eps)


def layer(q, g, shape, weight=None, bias=None, *a, **k):
    dims = [-1 - i for i in range(len(shape))]
    out = (q - q.mean(dims, keepdim=True)) * g
    return out * (1 if weight is None else weight) + (0 if bias is None else bias)


def places(s, *a, **k): return F.max_pool1d(s, *a, **{**k, 'return_indices': True})[1]
def places2(s, *a, **k): return F.max_pool2d(s, *a, **{**k, 'return_indices': True})[1]
def read(q, g, *a, **k): return q.flatten(-1).gather(-1, g)
def read2(q, g, *a, **k): return q.flatten(-2).gather(-1, g.flatten(-2)).view(g.shape)
def same(q, g, *a, **k): return g
def tangent(s): return torch.sigmoid(s), F.softplus(s) - s*torch.sigmoid(s)


ORACLE = {'relu': piece('relu', lambda *a, **k: 0.), 'leaky_relu': piece('leaky', lambda n=0.01, *a, **k: k.get('negative_slope', n)),
          'rrelu': piece('rrelu', lambda lower=1/8, upper=1/3, *a, **k: (lower + upper)/2), 'prelu': piece('prelu', lambda w, *a, **k: w), 'sigmoid': (torch.sigmoid, same), 'softmax': (torch.softmax, same), 'hardsigmoid': (F.hardsigmoid, same),
          'layer_norm': (spread, layer), 'max_pool1d': (places, read), 'max_pool2d': (places2, read2),
          'softplus': (tangent, lambda q, g: q*g[0] + g[1]),
          'normalize': (lambda s, p=2., dim=1, eps=1e-12: 1 / s.norm(p, dim, keepdim=True).clamp(min=eps), times),
          'glu': (lambda s, dim=-1: torch.sigmoid(s.chunk(2, dim)[1]), lambda q, g, dim=-1: q.chunk(2, dim)[0] * g),
          'threshold': (lambda s, t, v, *a: s > t, lambda q, g, t, v, *a: torch.where(g, q, v)),
          'amax': (lambda s, dim, keepdim=False: s.argmax(dim, keepdim=True), lambda q, g, dim, keepdim=False: q.gather(dim, g) if keepdim else q.gather(dim, g).squeeze(dim))}
for name in ('gelu', 'silu', 'mish', 'hardswish', 'elu', 'selu', 'celu'): ORACLE[name] = ratio(getattr(F, name)), times
ORACLE['tanh'] = ratio(torch.tanh), times
for name in ('relu6', 'hardtanh', 'clamp', 'clamp_min', 'clamp_max', 'clip'): ORACLE[name] = regime('clamp' if name == 'clip' else name)


class Hold(TorchFunctionMode):
    "Remembers what torch's functions decide, or holds them to it."
    def __init__(self, given=None): super().__init__(); self.given, self.made = given, []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, '__name__', ''), dict(kwargs or {})
        inplace = name.endswith('_') and not name.startswith('_') or kwargs.pop('inplace', False)
        rule = ORACLE.get(name.rstrip('_') if not name.startswith('_') else name)
        if rule is None: return func(*args, **{**kwargs, **({'inplace': True} if inplace and not name.endswith('_') else {})})
        x, rest = args[0] if args else kwargs.pop('input'), args[1:]
        kwargs = {k: v for k, v in kwargs.items() if k not in ('_stacklevel', 'training', 'dtype', 'out')}
        if name in ('relu', 'gelu', 'silu', 'relu6', 'celu', 'elu', 'selu') : rest = tuple(r for r in rest if not isinstance(r, bool))
        self.made.append(rule[0](x.clone(), *rest, **kwargs) if self.given is None else self.given[len(self.made)])
        out = rule[1](x, self.made[-1], *rest, **kwargs)
        return x.copy_(out) if inplace else out


def outputs(out):
    if isinstance(out, torch.Tensor): return [out]
    return [t for o in (out.values() if isinstance(out, dict) else out) for t in outputs(o)] if out is not None else []


def expected(net, weights, x):
    "What fixed gates make of the network with other weights."
    with torch.no_grad():
        with Hold() as first: net(x.clone())
        for p, w in zip(net.parameters(), weights): p.copy_(w)
        with Hold(first.made): return outputs(net(x.clone()))


# Patterns: f(module, tensor (b, 6)) -> tensor (b, 6)

class Net(nn.Module):
    "A pattern in one of three places."
    def __init__(self, f, place):
        super().__init__()
        self.f, self.place = f, place
        self.a, self.b, self.c, self.l = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)
        self.p, self.norm = nn.Parameter(torch.rand(6) + 0.5), nn.LayerNorm(6)
        self.act, self.inact, self.drop, self.bn = nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.BatchNorm1d(6)
        self.register_buffer('mask', torch.tensor([True, False, True, True, False, True]))
        self.register_buffer('table', torch.rand(8))
        self.register_buffer('order', torch.tensor([3, 1, 2, 0, 5, 4]))

    def forward(self, x):
        if self.place == 'input': return self.c(F.relu(self.b(self.f(self, x))))
        h = F.relu(self.a(x))
        if self.place == 'residual': return self.c(F.relu(h + self.f(self, self.b(h))))
        return self.c(self.f(self, self.b(h)))


def written(h, f):
    f(h)
    return h


AFFINE = {
    'sum': lambda m, h: h + h, 'scale': lambda m, h: h * 2 - 1, 'centre': lambda m, h: h - h.mean(1, keepdim=True), 'cat': lambda m, h: torch.cat([h[:, :3], h[:, 3:]], 1),
    'chunk': lambda m, h: torch.cat(h.chunk(2, 1)[::-1], 1), 'split': lambda m, h: torch.cat(h.split([2, 4], 1), 1), 'tensor_split': lambda m, h: torch.cat(h.tensor_split(3, 1), 1),
    'expand_as': lambda m, h: h + h.mean(1, keepdim=True).expand_as(h), 'reshape_as': lambda m, h: h.view(-1, 2, 3).reshape_as(h), 'view_as': lambda m, h: h.reshape(-1, 2, 3).view_as(h),
    'repeat_interleave': lambda m, h: h[:, :3].repeat_interleave(2, dim=1), 'type_as': lambda m, h: h.type_as(m.p), 'T': lambda m, h: h.T.T + 0, 'mT': lambda m, h: (h[:, None].mT.mT)[:, 0],
    'TlinearT': lambda m, h: (m.l.weight @ h.T).T, 'flip': lambda m, h: h.flip(1), 'roll': lambda m, h: h.roll(1, 1), 'einsum': lambda m, h: torch.einsum('bi,oi->bo', h, m.l.weight),
    'functional': lambda m, h: F.linear(h, m.l.weight, m.l.bias), 'addcmul': lambda m, h: torch.addcmul(h, h, m.p, value=0.5), 'masked_fill': lambda m, h: h.masked_fill(m.mask, 0.),
    'where mask': lambda m, h: torch.where(m.mask, h, torch.zeros_like(h)), 'pad': lambda m, h: F.pad(h[:, :4], (1, 1)), 'circular': lambda m, h: F.pad(h[:, None, :4], (1, 1), mode='circular')[:, 0],
    'reflect': lambda m, h: F.pad(h[:, None, :4], (1, 1), mode='reflect')[:, 0], 'cumsum': lambda m, h: h.cumsum(1), 'zeros_like': lambda m, h: h + torch.zeros_like(h),
    'ones_like': lambda m, h: h * torch.ones_like(h), 'buffer slice': lambda m, h: h * m.table[:6], 'buffer sum': lambda m, h: h + m.table[1:7], 'index_select': lambda m, h: h.index_select(1, m.order),
    'index': lambda m, h: h[:, m.order], 'list index': lambda m, h: h[:, [1, 0, 2, 3, 5, 4]], 'gather': lambda m, h: h.gather(1, m.order.expand(h.shape[0], -1)), 'stack': lambda m, h: torch.stack(h.unbind(1), 1),
    'narrow': lambda m, h: torch.cat([h.narrow(1, 0, 2), h.narrow(1, 2, 4)], 1), 'unfold': lambda m, h: h.unfold(1, 2, 2).flatten(1), 'parameter': lambda m, h: h * m.p, 'neg': lambda m, h: -h,
    'addmm': lambda m, h: torch.addmm(m.l.bias, h, m.l.weight), 'baddbmm': lambda m, h: torch.baddbmm(h[:, None], h[:, None], m.l.weight.expand(h.shape[0], 6, 6))[:, 0], 'matmul': lambda m, h: h @ m.l.weight,
    'twice': lambda m, h: m.l(m.l(h)), 'loop': lambda m, h: [h := F.relu(m.l(h)) for _ in range(3)][-1], 'dropout': lambda m, h: m.drop(h), 'F.dropout': lambda m, h: F.dropout(h, 0.2, m.training),
    'batch norm': lambda m, h: m.bn(h), 'F.batch_norm': lambda m, h: F.batch_norm(h, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias), 'divide': lambda m, h: h / 3., 'divide by parameter': lambda m, h: h / m.p,
    'lerp': lambda m, h: torch.lerp(h, h.flip(1), 0.3), 'interpolate': lambda m, h: F.interpolate(h[:, None, :3], scale_factor=2)[:, 0], 'avg_pool': lambda m, h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
    'conv1d': lambda m, h: F.conv1d(h[:, None], m.l.weight[:1, None, :3], padding=1)[:, 0], 'conv_transpose1d': lambda m, h: F.conv_transpose1d(h[:, None], m.l.weight[:1, None, :3], padding=1)[:, 0],
    'float': lambda m, h: h.to(h.dtype), 'clone': lambda m, h: h.clone(), 'contiguous': lambda m, h: h.t().contiguous().t(), 'squeeze': lambda m, h: h.unsqueeze(1).squeeze(1), 'repeat': lambda m, h: h[:, :2].repeat(1, 3),
    'tile': lambda m, h: h[:, :2].tile(1, 3), 'movedim': lambda m, h: h[:, :, None].movedim(1, 2).flatten(1), 'swapaxes': lambda m, h: h.swapaxes(0, 1).swapaxes(0, 1) + 0, 'diff': lambda m, h: h - h.roll(1, 1),
    'slice step': lambda m, h: torch.cat([h[:, ::2], h[:, 1::2]], 1), 'ellipsis': lambda m, h: h[..., None][..., 0], 'triu': lambda m, h: (h[:, None] * m.l.weight.triu()).sum(2), 'kron': lambda m, h: h @ (m.l.weight + torch.eye(6)),
    'sum dim': lambda m, h: h + h.sum(1, keepdim=True), 'sub_': lambda m, h: (h + 0).sub_(1.), 'add_': lambda m, h: h.clone().add_(m.p), 'iadd': lambda m, h: exec_add(h), 'mul_ buffer': lambda m, h: (h + 0).mul_(m.table[:6]),
    'div_': lambda m, h: (h*1).div_(2.), 'size arithmetic': lambda m, h: h / h.size(1)**0.5, 'shape unpack': lambda m, h: h.view(h.shape[0], 2, 3).reshape(h.shape[0], -1), 'new_zeros': lambda m, h: h + h.new_zeros(6)}


def exec_add(h):
    h = h + 0
    h += 1
    return h


UNITS = {
    'relu': lambda m, h: F.relu(h), 'module': lambda m, h: m.act(h), 'module twice': lambda m, h: m.act(m.l(m.act(h))), 'method': lambda m, h: h.relu(), 'inplace module': lambda m, h: m.inact(h + 0), 'relu_': lambda m, h: (h + 0).relu_(),
    'overwritten': lambda m, h: written(h + 0, lambda y: F.relu(y, inplace=True)), 'relu on view': lambda m, h: written(h + 0, lambda y: y[:, :3].relu_()), 'view read later': lambda m, h: view_later(h), 'view and result': lambda m, h: view_and_result(h), 'leaky': lambda m, h: F.leaky_relu(h, 0.2),
    'prelu': lambda m, h: F.prelu(h, m.p[:1]), 'relu6': lambda m, h: F.relu6(3*h), 'hardtanh': lambda m, h: F.hardtanh(h, -0.4, 0.6), 'clamp': lambda m, h: h.clamp(-0.3, 0.4), 'clamp min': lambda m, h: h.clamp(min=0.), 'clamp_min': lambda m, h: h.clamp_min(0.1),
    'clamp_max': lambda m, h: h.clamp_max(0.1), 'clip': lambda m, h: torch.clip(h, -0.1, 0.2), 'elu': lambda m, h: F.elu(h), 'selu': lambda m, h: F.selu(h), 'celu': lambda m, h: F.celu(h, 0.7), 'silu': lambda m, h: F.silu(h),
    'gelu': lambda m, h: F.gelu(h), 'gelu tanh': lambda m, h: F.gelu(h, approximate='tanh'), 'mish': lambda m, h: F.mish(h), 'tanh': lambda m, h: torch.tanh(h), 'softplus': lambda m, h: F.softplus(h), 'hardswish': lambda m, h: F.hardswish(h),
    'excite': lambda m, h: h * torch.sigmoid(m.l(h)), 'excite expand_as': lambda m, h: h * torch.sigmoid(m.l(h).mean(1, keepdim=True)).expand_as(h), 'swish by hand': lambda m, h: h * torch.sigmoid(h), 'softmax weights': lambda m, h: torch.softmax(m.l(h), -1) * h,
    'hardsigmoid': lambda m, h: h * F.hardsigmoid(h), 'layer_norm': lambda m, h: m.norm(h), 'F.layer_norm': lambda m, h: F.layer_norm(h, (6,)), 'normalize': lambda m, h: F.normalize(h, dim=1), 'max_pool1d': lambda m, h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    'attention': lambda m, h: (torch.softmax(h[:, :, None] @ h[:, None], -1) @ h[:, :, None])[..., 0], 'two relus': lambda m, h: F.relu(h) - 0.5*F.relu(-h), 'glu': lambda m, h: F.glu(torch.cat([m.l(h), h], 1)), 'threshold': lambda m, h: F.threshold(h, 0.1, -0.2),
    'maxout': lambda m, h: torch.stack([h, m.l(h)], 1).amax(1), 'relu inplace': lambda m, h: F.relu(h + 0, inplace=True), 'hardtanh_': lambda m, h: F.hardtanh_(h + 0), 'nested': lambda m, h: F.relu(m.l(F.gelu(m.l(h)))), 'shared norm': lambda m, h: m.norm(m.norm(h) + h)}


def view_later(h):
    y = h + 0
    half = y[:, :3]
    z = half.relu_()
    return torch.cat([z, z], 1) + y


def view_and_result(h):
    y = (h + 0).view(-1, 2, 3)
    flat = y.flatten(1)
    y.relu_()
    return flat * 2


def masked_write(h):
    h = h.clone()
    h[h > 0.2] = 0.
    return h


def no_grad(m, h):
    with torch.no_grad(): g = m.l(h)
    return g + h


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, grad): return grad * 0.5


def branch(m, h): return h if h.sum() > 0 else -h
def random_noise(m, h): return h + torch.randn_like(h)
def training_only(m, h):
    if m.training: return F.relu(m.l(h)) * 0 + F.relu(h)
    return F.relu(h)


BENT = {
    'square': lambda m, h: h*h, 'pow': lambda m, h: h**2, 'einsum self': lambda m, h: torch.einsum('bc,bd->bcd', h, h).sum(2), 'linear self': lambda m, h: F.linear(h, h)@h, 'bmm self': lambda m, h: (h[:, None] * h[:, :, None]).sum(2), 'product': lambda m, h: h * m.l(h),
    'exp': lambda m, h: h.exp(), 'abs': lambda m, h: h.abs(), 'sqrt': lambda m, h: (h.relu() + 1).sqrt(), 'log': lambda m, h: (h.relu() + 1).log(), 'reciprocal': lambda m, h: 1 / (h.relu() + 1), 'ratio': lambda m, h: m.l(h) / (1 + h.relu()),
    'maximum': lambda m, h: torch.maximum(h, m.l(h)), 'minimum': lambda m, h: torch.minimum(h, h.flip(1)), 'sort': lambda m, h: h.sort(1)[0], 'topk': lambda m, h: h.topk(3, 1)[0].repeat(1, 2), 'max value': lambda m, h: h - h.max(1, keepdim=True)[0],
    'compare': lambda m, h: h * (h > 0), 'where': lambda m, h: torch.where(h > 0, h, 0.1*h), 'masked write': lambda m, h: masked_write(h), 'sign': lambda m, h: h * h.sign(), 'cast': lambda m, h: h + h.long().to(h.dtype), 'floor division': lambda m, h: h // 0.5,
    'rounding_mode': lambda m, h: torch.div(h, 0.5, rounding_mode='floor'), 'round': lambda m, h: h.round(), 'floor': lambda m, h: h - h.floor(), 'remainder': lambda m, h: h % 1.0, 'sin': lambda m, h: torch.sin(h), 'cdist': lambda m, h: torch.cdist(h[:, :, None], m.p[:, None].expand(h.shape[0], 6, 1))[:, :, 0],
    'norm': lambda m, h: h / (1 + h.norm(dim=1, keepdim=True)), 'std': lambda m, h: h / (1 + h.std(1, keepdim=True)), 'var': lambda m, h: h * h.var(1, keepdim=True), 'logsumexp': lambda m, h: h - h.logsumexp(1, keepdim=True), 'log_softmax': lambda m, h: F.log_softmax(h, 1),
    'softsign': lambda m, h: F.softsign(h), 'logsigmoid': lambda m, h: F.logsigmoid(h), 'erf': lambda m, h: torch.erf(h), 'prod': lambda m, h: h * h[:, :2].prod(1, keepdim=True), 'cumprod': lambda m, h: h.cumprod(1), 'argmax': lambda m, h: h * F.one_hot(h.argmax(1), 6),
    'clamp by tensor': lambda m, h: torch.clamp(h, -m.p, m.p), 'bilinear': lambda m, h: F.bilinear(h, h, m.l.weight[None].expand(6, 6, 6)), 'addcmul self': lambda m, h: torch.addcmul(h, h, h), 'addcdiv': lambda m, h: torch.addcdiv(h, h, 1 + h.relu()),
    'cosine': lambda m, h: h * F.cosine_similarity(h, m.l(h), dim=1)[:, None], 'pairwise': lambda m, h: h * F.pairwise_distance(h, m.l(h))[:, None], 'cross': lambda m, h: torch.cross(h.view(-1, 2, 3), m.l(h).view(-1, 2, 3), dim=2).flatten(1)}
TRICKS = {
    'no_grad': no_grad, 'detach': lambda m, h: m.l(h).detach() + h, 'data': lambda m, h: m.l(h).data + h, 'own function': lambda m, h: Half.apply(h), 'branch': branch, 'item': lambda m, h: h * h.mean().item(), 'noise': random_noise,
    'always dropout': lambda m, h: F.dropout(h, 0.4), 'batch mean': lambda m, h: h - h.mean(0), 'batch std': lambda m, h: h / (1 + h.std(0)), 'batch statistics': lambda m, h: F.batch_norm(h, None, None, training=True), 'numpy': lambda m, h: h + torch.from_numpy(h.detach().numpy()),
    'tolist': lambda m, h: h * sum(h.tolist()[0]), 'bool': lambda m, h: h if bool((h > 0).any()) else -h, 'training only': training_only}
PLACES = ('input', 'middle', 'residual')
FIRST = {'in place on input': lambda m, h: F.relu(m.l(h.sub_(.5).div_(.25))), 'relu_ on input': lambda m, h: h.relu_(), 'mul_ on view of input': lambda m, h: written(h, lambda y: y.view(-1).mul_(2.)),
         'lstm': lambda m, h: m.extra(h[:, None])[0][:, 0], 'gru': lambda m, h: m.extra(h[:, None])[0][:, 0], 'rnn': lambda m, h: m.extra(h[:, None])[0][:, 0], 'encoder': lambda m, h: m.extra(h[:, None])[:, 0], 'mha': lambda m, h: m.extra(h[:, None], h[:, None], h[:, None])[0][:, 0],
         'mha by name': lambda m, h: m.extra(query=h[:, None], key=h[:, None], value=h[:, None])[0][:, 0], 'mha mixed': lambda m, h: m.extra(h[:, None], h[:, None], value=h[:, None])[0][:, 0], 'mha weights': lambda m, h: m.extra(h[:, :, None].expand(-1, -1, 6), h[:, :, None].expand(-1, -1, 6), h[:, :, None].expand(-1, -1, 6))[1].mean(1),
         'cdist with weights': lambda m, h: torch.cdist(h[:, None], m.l.weight[None].expand(h.shape[0], 6, 6))[:, 0], 'maximum with weights': lambda m, h: torch.maximum(h, m.p), 'pow of weights': lambda m, h: (h * m.p)**2, 'embedding bag': lambda m, h: m.extra((h > 0).long())}
EXTRA = {'lstm': lambda: nn.LSTM(6, 6, batch_first=True), 'gru': lambda: nn.GRU(6, 6, batch_first=True), 'rnn': lambda: nn.RNN(6, 6, batch_first=True), 'encoder': lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1),
         'mha': lambda: nn.MultiheadAttention(6, 2, batch_first=True), 'mha by name': lambda: nn.MultiheadAttention(6, 2, batch_first=True), 'mha mixed': lambda: nn.MultiheadAttention(6, 2, batch_first=True), 'mha weights': lambda: nn.MultiheadAttention(6, 2, batch_first=True), 'embedding bag': lambda: nn.EmbeddingBag(6, 6)}


def of(f, place, extra=None):
    net = Net(f, place)
    if extra: net.extra = extra()
    return net


# Networks that are odd as a whole

class Heads(nn.Module):
    def __init__(self, form): super().__init__(); self.a, self.b, self.c, self.d, self.form = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 3), form
    def forward(self, x):
        h = F.relu(self.a(x))
        if self.form == 'tuple': return self.b(h), self.c(h)
        if self.form == 'dict': return {'out': self.b(h), 'more': self.c(h)}
        if self.form == 'list': return [self.b(h), None, self.c(h)]
        if self.form == 'aux':
            out = self.d(F.relu(self.c(h)))
            return (out, self.d(F.relu(self.b(h)))) if self.training else out
        if self.form == 'aux before':
            if self.training: more = self.d(F.relu(self.b(h)))
            out = self.d(F.relu(self.c(h)))
            return (out, more) if self.training else out
        if self.form == 'log_softmax': return F.log_softmax(self.b(h), 1)
        if self.form == 'sigmoid head': return torch.sigmoid(self.b(h))
        if self.form == 'scalar': return self.b(h).mean()


def hooked(change):
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    change(net)
    return net


def patched(m, f):
    m.forward = types.MethodType(lambda self, x: f(x), m)


def pruned(net):
    from torch.nn.utils import prune
    prune.l1_unstructured(net[0], 'weight', 0.3)


def old_weight_norm(net): torch.nn.utils.weight_norm(net[0])
def new_weight_norm(net): torch.nn.utils.parametrizations.weight_norm(net[0])
def new_spectral_norm(net): torch.nn.utils.parametrizations.spectral_norm(net[2])


WHOLE = {f'heads {form}': (lambda form=form: Heads(form)) for form in ('tuple', 'dict', 'list', 'aux', 'aux before', 'log_softmax', 'sigmoid head', 'scalar')}
WHOLE |= {name: (lambda f=f: hooked(f)) for name, f in {
    'hook on layer': lambda n: n[2].register_forward_hook(lambda m, i, o: o.abs()), 'hook on unit': lambda n: n[1].register_forward_hook(lambda m, i, o: o*2), 'hook on root': lambda n: n.register_forward_hook(lambda m, i, o: o*2),
    'pre-hook on layer': lambda n: n[2].register_forward_pre_hook(lambda m, i: (i[0].exp(),)), 'pre-hook on root': lambda n: n.register_forward_pre_hook(lambda m, i: (i[0]*2,)), 'hook that looks': lambda n: n[1].register_forward_hook(lambda m, i, o: None),
    'hook on root that looks': lambda n: n.register_forward_hook(lambda m, i, o: None), 'backward hook': lambda n: n[2].register_full_backward_hook(lambda m, i, o: (i[0]*2,)), 'patched unit': lambda n: patched(n[1], torch.abs), 'patched layer': lambda n: patched(n[2], torch.sin),
    'patched root': lambda n: patched(n, torch.sin), 'patched by lambda': lambda n: setattr(n[3], 'forward', lambda x: x*3), 'pruned': pruned, 'old weight norm': old_weight_norm, 'weight norm': new_weight_norm, 'spectral norm': new_spectral_norm,
    'hidden state': lambda n: setattr(n[0], 'weight', nn.Parameter(n[0].weight.data*2)), 'frozen': lambda n: n[0].requires_grad_(False), 'all frozen': lambda n: n.requires_grad_(False), 'tied': lambda n: setattr(n[2], 'weight', n[0].weight)}.items()}
WHOLE |= {
    'sigmoids': lambda: nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)), 'untracked batch norm': lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3)),
    'scripted': lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.ReLU()), nn.Linear(6, 3)), 'lazy': lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)), 'linear': lambda: nn.Linear(6, 3), 'empty': lambda: nn.Sequential(), 'identity': lambda: nn.Identity(),
    'no module': lambda: torch.relu, 'a class': lambda: nn.ReLU, 'none': lambda: None, 'whole numbers': lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).to(torch.bfloat16), 'rrelu': lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU(), nn.Linear(6, 3)),
    'glu module': lambda: nn.Sequential(nn.Linear(6, 6), nn.GLU(), nn.Linear(3, 3)), 'bilinear module': lambda: of(lambda m, h: m.extra(h, h), 'middle', lambda: nn.Bilinear(6, 6, 6)), 'alpha dropout': lambda: nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.2), nn.SELU(), nn.Linear(6, 3)),
    'softmax head': lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1)), 'shared relu': lambda: (lambda r: nn.Sequential(nn.Linear(6, 6), r, nn.Linear(6, 6), r, nn.Linear(6, 3)))(nn.ReLU())}


def all_networks():
    "By name: a maker, and whether fixed gates mean something for it (or there is nothing to gate in what it does to its input)."
    nets = {}
    for patterns, good in ((AFFINE, True), (UNITS, True), (BENT, False), (TRICKS, False)):
        for name, f in patterns.items():
            for place in PLACES: nets[f'{name}, {place}'] = (lambda f=f, place=place: of(f, place)), good
    for name, f in FIRST.items(): nets[f'{name}, input'] = (lambda f=f, name=name: of(f, 'input', EXTRA.get(name))), 'in' in name or 'mha' in name
    for name, make in WHOLE.items(): nets[name] = make, False
    return nets


NETWORKS = all_networks()


def what_becomes_of(name):
    "'right', 'refused: why', 'wrong: how' or 'unclear: error'."
    torch.manual_seed(0)
    net, x = NETWORKS[name][0](), torch.randn(4, 6)
    if isinstance(net, nn.Module) and not isinstance(net, nn.Identity):
        with torch.no_grad():
            for m in net.modules():
                if isinstance(m, nn.BatchNorm1d) and m.track_running_stats: m.running_mean.normal_(0, .3); m.running_var.uniform_(.5, 2)
    try:
        dc = DualCopy(net.eval() if isinstance(net, nn.Module) else net, example=x.to(next(net.parameters(), x).dtype) if isinstance(net, nn.Module) else x).eval()
    except InputError as e: return f'refused: {e}'
    except Exception as e: return f'unclear: {type(e).__name__}: {e}'
    return judged(dc, net, x)


def judged(dc, net, x):
    "Whether a converted network is what fixed gates make of the original."
    dc, net = dc.double(), copy.deepcopy(net).double()
    x = x.double()
    kept, start = x.clone(), [p.detach().clone() for p in net.parameters()]
    with torch.no_grad(): first = outputs(net(x.clone()))
    if not close(outputs(dc(x)), first): return 'wrong: at the start'
    if not torch.equal(x, kept): return 'wrong: the input is changed'
    moved = [p + torch.randn_like(p) if p.requires_grad else p for p in dc.quantitative.parameters()]
    wanted = expected(net, moved, x)
    with torch.no_grad():
        for p, w in zip(dc.quantitative.parameters(), moved): p.copy_(w)
        gates = dc.gates(x)
        if not close(outputs(dc(x, gates)), wanted) or not close(outputs(dc(x)), wanted): return 'wrong: with other weights'
        if not close(outputs(dc(x[:2])), outputs(dc(x)) if first[0].ndim == 0 else [o[:2] for o in wanted]) and first[0].ndim: return 'wrong: depends on the batch'
    return 'right' if slope_fits(dc, net, x, start, moved, gates) else 'wrong: the gradient'


def slope_fits(dc, net, x, start, moved, gates, h=1e-6):
    "Is the copy's gradient the slope of what the oracle computes?"
    way = [torch.randn_like(p) if p.requires_grad else torch.zeros_like(p) for p in dc.quantitative.parameters()]
    out = outputs(dc(x, gates))
    shares = [torch.randn_like(o) for o in out]
    grads = torch.autograd.grad(sum((o*s).sum() for o, s in zip(out, shares)), [p for p in dc.quantitative.parameters() if p.requires_grad], allow_unused=True)
    slope, ends = sum((g*w).sum() for g, w in zip(grads, (w for w, p in zip(way, dc.quantitative.parameters()) if p.requires_grad)) if g is not None), []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w in zip(net.parameters(), start): p.copy_(w)
        ends.append(sum((o*s).sum() for o, s in zip(expected(net, [m + sign*h*w for m, w in zip(moved, way)], x), shares)))
    return torch.allclose(torch.as_tensor(slope, dtype=torch.float64), (ends[0] - ends[1])/(2*h), rtol=1e-4, atol=1e-4)


def close(a, b): return len(a) == len(b) and all(s.shape == t.shape and torch.allclose(s, t, rtol=1e-7, atol=1e-8) for s, t in zip(a, b))


def test_there_are_enough(): assert len(NETWORKS) >= 250


CLEAR = r'(no rule|without|cannot|needs|give|leave|name|freeze|fails|replace|plain=|example|train|must|differs|hook)'


@pytest.fixture(scope='module')
def found(): return {name: what_becomes_of(name) for name in NETWORKS}


def test_none_is_silently_wrong(found): assert {n: r for n, r in found.items() if r.startswith('wrong')} == {}


def test_none_fails_unclearly(found): assert {n: r for n, r in found.items() if r.startswith('unclear')} == {}


def test_most_are_right_where_gates_mean_something(found):
    meant = [name for name, (_, good) in NETWORKS.items() if good]
    right = [name for name in meant if found[name] == 'right']
    assert len(right) >= 0.75*len(meant), sorted(set(meant) - set(right))


# The certificate alone: static checks are switched off, and faults are planted in the rules

def caught(name, changes, place='middle', pattern=None):
    "Does the certificate refuse a network that is converted under `changes` (object, attribute, value)?"
    torch.manual_seed(0)
    f = pattern or {**AFFINE, **UNITS, **BENT}[name]
    net, x = of(f, place), torch.randn(4, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualCopy, 'check', lambda self, given, graph: None)
        for where, attribute, value in changes: patch.setattr(where, attribute, value)
        try: dc = DualCopy(net, certify=False)
        except InputError: return None
        try: dc.certify(x, net)
        except CertificateError: return True
    return False


def without_rule(name):
    def rule(op, *args): return None if op == name else rules.rule(op, *args)
    return [(graph, 'rule', rule)]


UNRULED = {'relu': 'relu', 'leaky': 'leaky_relu', 'prelu': 'prelu', 'relu6': 'relu6', 'hardtanh': 'hardtanh', 'clamp': 'clamp', 'clamp_min': 'clamp_min', 'clamp_max': 'clamp_max', 'elu': 'elu', 'selu': 'selu', 'celu': 'celu', 'silu': 'silu', 'gelu': 'gelu',
           'mish': 'mish', 'tanh': 'tanh', 'softplus': 'softplus', 'hardswish': 'hardswish', 'excite': 'sigmoid', 'softmax weights': 'softmax', 'hardsigmoid': 'hardsigmoid', 'layer_norm': 'layer_norm', 'normalize': 'normalize', 'max_pool1d': 'max_pool1d', 'attention': 'softmax'}


def swapped(name, **fields):
    "Another gate or apply for one operation's unit."
    def rule(op, *args):
        unit = rules.rule(op, *args)
        return unit._replace(**fields) if unit and op == name else unit
    return [(graph, 'rule', rule)]


def shut_where_open(s, **k): return ~(s > 0)
def all_open(s, **k): return torch.ones_like(s, dtype=torch.bool)
def above_a_bit(s, **k): return s > 0.1
def own_relu(q, gate, inplace=False): return q.relu()
def twice(q, gate, inplace=False): return 2*q*gate
def leaking(q, gate, inplace=False): return torch.where(gate, q, 0.01*q)
def own_soft(q, gate, inplace=False): return F.gelu(q)
def constant_soft(q, gate, inplace=False): return q*0.5
def first_pixel(q, gate, **k): return F.max_pool1d(q.flip(-1), 3, 1, 1)
def no_centre(q, gate, normalized_shape, weight=None, bias=None, centred=True): return gates.scale_and_shift(q*gate, weight, bias)
def no_shift(q, gate, normalized_shape, weight=None, bias=None, centred=True): return gates.apply_layer(q, gate, normalized_shape, weight, None, centred)
def batch_gate(s, **k): return s > s.mean(0)
def detached(q, gate, inplace=False): return q.detach()*gate
def half_gradient(q, gate, inplace=False): return (q*gate)*0.5 + (q*gate).detach()*0.5
def noisy(s, **k): return s + torch.randn_like(s) > 0


SWAPPED = [('relu', 'relu', dict(gate=g)) for g in (shut_where_open, all_open, above_a_bit, batch_gate, noisy)] + [('relu', 'relu', dict(apply=a)) for a in (own_relu, twice, leaking, detached, half_gradient)]
SWAPPED += [('gelu', 'gelu', dict(apply=own_soft)), ('gelu', 'gelu', dict(apply=constant_soft)), ('max_pool1d', 'max_pool1d', dict(apply=first_pixel)), ('layer_norm', 'layer_norm', dict(apply=no_centre)), ('layer_norm', 'layer_norm', dict(apply=no_shift)),
            ('leaky', 'leaky_relu', dict(apply_settings={'slope': 0.1})), ('relu6', 'relu6', dict(apply_settings={'low': 0., 'high': 5.})), ('softplus', 'softplus', dict(apply=lambda q, gate: q*gate[:, 0]))]
PLANTED = {f'{name} counts as linear': (name, []) for name in BENT}
PLANTED |= {f'no rule for {op}, {name}': (name, without_rule(op)) for name, op in UNRULED.items()}
PLANTED |= {f'{name} {i}: {next(iter(fields))}': (name, swapped(op, **fields)) for i, (name, op, fields) in enumerate(SWAPPED)}
PLANTED |= {'overwritten values are not followed': ('overwritten', [(graph, 'read_results', lambda g, m: None)])}


def test_the_certificate_alone_catches_nearly_every_planted_fault():
    found = {name: caught(pattern, changes) for name, (pattern, changes) in PLANTED.items()}
    planted = {name: seen for name, seen in found.items() if seen is not None}
    assert len(planted) >= 40
    assert sum(planted.values()) >= 0.95*len(planted), [name for name, seen in planted.items() if not seen]


def test_without_a_fault_the_same_networks_pass():
    for name in UNRULED: assert caught(name, []) is False, name


if __name__ == '__main__':
    word, counts = (sys.argv[1:] or [''])[0], Counter()
    for name, (_, good) in NETWORKS.items():
        if word not in name: continue
        told = what_becomes_of(name)
        counts[told.split(':')[0], bool(good)] += 1
        if told != 'right' and (not told.startswith('refused') or good or word): print(f'{name:32} {"meant" if good else ""} {told[:230]}', flush=True)
    print(counts)
