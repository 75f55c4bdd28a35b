"Every pure function of gates, against plain numpy or torch's own operation, over random inputs."
import itertools, math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.core import InputError, seeded
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.gating.cache import Slot, pack, row_bytes, slots_of, unpack
from fedsq_nb.gating.gates import (SOFT, adaptive_gate, apply_adaptive, apply_clamp, apply_group, apply_layer, apply_leaky,
                                   apply_multihead, apply_norm, apply_pool, apply_relu, apply_soft, apply_tangent, apply_weights,
                                   attention_weights, clamp_gate, disagreement, gelu_gate, group_scale, layer_scale, length_scale,
                                   mish_gate, multihead_weights, norm_scale, pool_both, pool_gate, relu_gate, secant, softplus_gate)

cases = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
dtypes = st.sampled_from(list(TOLERANCE))


def numbers(seed, *shape, dtype=torch.float64, size=3.):
    "Random numbers on both sides of every bend, with a few exactly at one."
    gen = torch.Generator().manual_seed(seed)
    x = size*torch.randn(*shape, generator=gen, dtype=torch.float64)
    at = torch.rand(*shape, generator=gen)
    for i, bend in enumerate((0., 6., -1., 1., -3., 3.)): x = torch.where((at > i/60) & (at <= (i+1)/60), bend, x)
    return x.to(dtype)


def close(a, b, dtype=torch.float64, size=1.):
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a.double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]*size)


# Pairs for one activation: (gate of s, apply to q, torch's own, numpy's definition of the output for q under the gate of s)
def erf(x): return np.vectorize(math.erf)(x)
def sigmoid(x): return 1 / (1 + np.exp(-x))
def softplus(x): return np.logaddexp(0, x)
def ratio(f): return lambda s: np.divide(f(s), s, out=np.ones_like(s), where=s != 0)
def elu(a, c=1.): return lambda s: c*np.where(s > 0, s, a*np.expm1(np.minimum(s, 0)))

def soft(name, oracle, own, **kw):
    return lambda s: SOFT[name](s, **kw), lambda q, g, **k: apply_soft(q, g, **k), lambda s: own(s, **kw), lambda s, q: q*oracle(s)

def clamped(low, high, own):
    return (lambda s: clamp_gate(s, low, high), lambda q, g, **k: apply_clamp(q, g, low, high, **k), own,
            lambda s, q: np.where(s >= (np.inf if high is None else high), high or 0., np.where(s > (-np.inf if low is None else low), q, low or 0.)))

def leaky(slope, own):
    return relu_gate, lambda q, g, **k: apply_leaky(q, g, slope, **k), own, lambda s, q: np.where(s > 0, q, slope*q)

ACTIVATIONS = {
    'relu': (relu_gate, apply_relu, torch.relu, lambda s, q: np.where(s > 0, q, 0)),
    'relu6': clamped(0., 6., F.relu6), 'hardtanh': clamped(-1., 1., F.hardtanh), 'hardtanh 2': clamped(-3., 0.5, lambda s: F.hardtanh(s, -3., 0.5)),
    'negative': clamped(-3., -1., lambda s: s.clamp(-3., -1.)), 'positive': clamped(1., 3., lambda s: s.clamp(1., 3.)),
    'floor': clamped(-1., None, lambda s: s.clamp(min=-1.)), 'ceiling': clamped(None, 1., lambda s: s.clamp(max=1.)), 'floor at zero': clamped(0., None, lambda s: s.clamp(min=0.)),
    'leaky': leaky(0.01, F.leaky_relu), 'leaky 2': leaky(0.3, lambda s: F.leaky_relu(s, 0.3)), 'leaky -': leaky(-0.5, lambda s: F.leaky_relu(s, -0.5)),
    'prelu': (relu_gate, lambda q, g, **k: apply_leaky(q, g, torch.tensor([0.2], dtype=q.dtype), **k), lambda s: F.prelu(s, torch.tensor([0.2], dtype=s.dtype)),
              lambda s, q: np.where(s > 0, q, 0.2*q)),
    'rrelu': leaky((1/8 + 1/3)/2, lambda s: F.rrelu(s, training=False)),
    'silu': soft('silu', sigmoid, F.silu), 'hardswish': soft('hardswish', lambda s: np.clip(s/6 + 0.5, 0, 1), F.hardswish),
    'mish': soft('mish', lambda s: np.tanh(softplus(s)), F.mish),
    'gelu': soft('gelu', lambda s: 0.5*(1 + erf(s/math.sqrt(2))), F.gelu),
    'gelu tanh': soft('gelu', lambda s: 0.5*(1 + np.tanh(math.sqrt(2/math.pi)*(s + 0.044715*s**3))), F.gelu, approximate='tanh'),
    'tanh': soft('tanh', ratio(np.tanh), torch.tanh), 'elu': soft('elu', ratio(elu(1)), F.elu), 'elu 2': soft('elu', ratio(elu(0.4)), F.elu, alpha=0.4),
    'selu': soft('selu', ratio(elu(1.6732632423543772, 1.0507009873554805)), F.selu),
    'celu': soft('celu', ratio(elu(1)), F.celu), 'celu 2': soft('celu', ratio(lambda s: np.where(s > 0, s, 2*np.expm1(np.minimum(s, 0)/2))), F.celu, alpha=2.),
    'softplus': (softplus_gate, apply_tangent, F.softplus, lambda s, q: q*sigmoid(s) + softplus(s) - s*sigmoid(s)),
    'softplus 2': (lambda s: softplus_gate(s, 2., 4.), apply_tangent, lambda s: F.softplus(s, 2., 4.),
                   lambda s, q: np.where(2*s > 4, q, sigmoid(2*s)*(q - s) + softplus(2*s)/2)),
}
each = pytest.mark.parametrize('name', ACTIVATIONS)


@each
@cases
@given(seeds, dtypes)
def test_gate_and_value_are_the_activation(name, seed, dtype):
    gate, apply, own, _ = ACTIVATIONS[name]
    s = numbers(seed, 2, 3, 5, dtype=dtype)
    close(apply(s, gate(s)), own(s), dtype, 6)


@each
@cases
@given(seeds)
def test_any_value_under_any_gate(name, seed):
    gate, apply, _, oracle = ACTIVATIONS[name]
    s, q = numbers(seed, 2, 3, 5), numbers(seed + 1, 2, 3, 5)
    np.testing.assert_allclose(apply(q, gate(s)).numpy(), oracle(s.numpy(), q.numpy()), rtol=1e-9, atol=1e-9)


@each
@cases
@given(seeds, st.floats(-3, 3))
def test_a_unit_is_affine_under_its_gate_and_its_gradient_is_the_slope(name, seed, a):
    gate, apply, _, _ = ACTIVATIONS[name]
    g, q, r = gate(numbers(seed, 2, 3, 5)), numbers(seed + 1, 2, 3, 5).requires_grad_(), numbers(seed + 2, 2, 3, 5)
    close(apply(a*q + (1 - a)*r, g), a*apply(q, g) + (1 - a)*apply(r, g))
    grad, = torch.autograd.grad((apply(q, g)*r).sum(), q)
    close(grad, r*(apply(torch.ones_like(q), g) - apply(torch.zeros_like(q), g)))
    assert apply(q, g).is_contiguous()


@pytest.mark.parametrize('name', [n for n in ACTIVATIONS if 'softplus' not in n])
@pytest.mark.parametrize('dtype', list(TOLERANCE))
def test_inplace_forms_overwrite_and_the_others_do_not(name, dtype):
    gate, apply, _, _ = ACTIVATIONS[name]
    g, q = gate(numbers(0, 2, 3, 5, dtype=dtype)), numbers(1, 2, 3, 5, dtype=dtype)
    kept, at, bits = q.clone(), q.data_ptr(), g.clone()
    out = apply(q, g)
    assert torch.equal(q, kept) and out.data_ptr() != at
    assert apply(q, g, inplace=True) is q and q.data_ptr() == at
    assert torch.equal(q, out) and torch.equal(g, bits)


@pytest.mark.parametrize('name', [n for n in ACTIVATIONS if 'softplus' not in n])
def test_values_keep_their_memory_order(name):
    gate, apply, _, _ = ACTIVATIONS[name]
    s = numbers(0, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert gate(s).is_contiguous(memory_format=torch.channels_last)
    assert apply(s, gate(s)).is_contiguous(memory_format=torch.channels_last)


@cases
@given(seeds)
def test_hard_gates_in_numpy(seed):
    s = numbers(seed, 4, 9)
    assert relu_gate(s).dtype == torch.bool and np.array_equal(relu_gate(s).numpy(), s.numpy() > 0)
    for low, high in ((0., 6.), (-1., 1.), (None, 1.), (-3., None)):
        regime = 1 - (s.numpy() <= (-np.inf if low is None else low)) + (s.numpy() >= (np.inf if high is None else high))
        g = clamp_gate(s, low, high)
        assert g.dtype == torch.uint8 and np.array_equal(g.numpy(), regime)


@each
def test_an_empty_batch(name):
    gate, apply, _, _ = ACTIVATIONS[name]
    s = torch.empty(0, 3, 5)
    assert apply(s, gate(s)).shape == s.shape


@each
def test_a_gate_needs_no_gradient_and_takes_values_that_do(name):
    gate, apply, _, _ = ACTIVATIONS[name]
    s = nn.Parameter(numbers(0, 2, 3, dtype=torch.float32))
    with torch.no_grad(): g = gate(s)
    assert not g.requires_grad and torch.equal(g, gate(s.detach()))
    assert apply(s, g).requires_grad


@cases
@given(seeds)
def test_a_slope_for_each_channel(seed):
    for shape in ((3, 4), (3, 4, 5), (2, 4, 3, 3), (1, 4, 2, 3, 2)):
        s, q, slopes = numbers(seed, *shape), numbers(seed + 1, *shape), numbers(seed + 2, 4)
        wide = slopes.numpy().reshape(4, *[1]*(len(shape) - 2))
        np.testing.assert_allclose(apply_leaky(q, relu_gate(s), slopes).numpy(), np.where(s.numpy() > 0, 1, wide)*q.numpy(), rtol=1e-12)
        close(apply_leaky(s, relu_gate(s), slopes), F.prelu(s, slopes))


def test_a_learned_slope_gets_its_gradient():
    s, q, slope = numbers(0, 3, 4), numbers(1, 3, 4), torch.full((4,), 0.2, dtype=torch.float64, requires_grad=True)
    apply_leaky(q, relu_gate(s), slope).sum().backward()
    np.testing.assert_allclose(slope.grad.numpy(), np.where(s.numpy() > 0, 0, q.numpy()).sum(0), rtol=1e-12)


@cases
@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 6))
def test_local_response_norm(seed, dtype, size):
    s = numbers(seed, 2, 7, 3, 3, dtype=dtype)
    close(apply_soft(s, SOFT['local_response_norm'](s, size=size, alpha=0.1, beta=0.7, k=1.5)), F.local_response_norm(s, size, 0.1, 0.7, 1.5), dtype, 3)


def test_a_secant_is_one_at_the_origin_and_finite_beside_it():
    for f in (F.elu, F.selu, F.celu, torch.tanh):
        g = secant(f)(torch.tensor([0., -0., 1e-30, -1e-30]))
        assert g.isfinite().all() and torch.equal(g[:2], torch.ones(2))


@cases
@given(seeds, dtypes)
def test_multipliers(seed, dtype):
    s, q = numbers(seed, 3, 4, dtype=dtype), numbers(seed + 1, 3, 4, dtype=dtype)
    np.testing.assert_allclose(mish_gate(s.double()).numpy(), np.tanh(softplus(s.double().numpy())), rtol=1e-12)
    np.testing.assert_allclose(gelu_gate(s.double()).numpy(), 0.5*(1 + erf(s.double().numpy()/math.sqrt(2))), rtol=1e-12, atol=1e-15)
    close(apply_soft(q, torch.sigmoid(s)), q*torch.sigmoid(s), dtype)


# Attention

def plain_attention(q, k, v, mask=None, causal=False, scale=None):
    "Attention written out in numpy."
    score = q @ np.swapaxes(k, -1, -2) * (q.shape[-1]**-0.5 if scale is None else scale)
    if causal: score = np.where(np.tril(np.ones(score.shape[-2:], bool)), score, -np.inf)
    if mask is not None: score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    weights = np.exp(score - score.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), weights / weights.sum(-1, keepdims=True) @ v


@cases
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.sampled_from(['none', 'bool', 'float', 'causal']), st.sampled_from([None, 0.3]))
def test_attention_in_numpy(seed, targets, sources, masked, scale):
    q, k, v, other = numbers(seed, 2, 3, targets, 4), numbers(seed+1, 2, 3, sources, 4), numbers(seed+2, 2, 3, sources, 5), numbers(seed+3, 2, 3, sources, 5)
    mask = {'bool': numbers(seed+4, targets, sources) > -1, 'float': numbers(seed+4, targets, sources)}.get(masked)
    if masked == 'bool': mask[:, 0] = True
    weights, out = plain_attention(*(t.numpy() for t in (q, k, v)), None if mask is None else mask.numpy(), masked == 'causal', scale)
    g = attention_weights(q, k, v, mask, is_causal=masked == 'causal', scale=scale, dropout_p=0.5)
    np.testing.assert_allclose(g.numpy(), weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(apply_weights(v, g).numpy(), out, rtol=1e-9, atol=1e-12)
    close(apply_weights(v, g), F.scaled_dot_product_attention(q, k, v, mask, is_causal=masked == 'causal', scale=scale))
    close(apply_weights(2*v - 3*other, g), 2*apply_weights(v, g) - 3*apply_weights(other, g), size=10)


def test_dropped_weights_are_rescaled():
    value, g = torch.ones(1, 1000, 1), torch.full((1, 50, 1000), 1e-3)
    with seeded(0, 'drop'): out = apply_weights(value, g, 0.5)
    assert out.std() > 0 and abs(out.mean() - 1) < 0.02
    assert torch.equal(apply_weights(value, g, 0.), g @ value)


@cases
@given(seeds, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(['none', 'bool', 'float', 'padding', 'both', 'heads']))
def test_multihead_attention(seed, batch_first, bias, other_sizes, masked):
    b, targets, sources, n, heads = 2, 3, 4, 8, 2
    with seeded(seed, 'attention'):
        attention = nn.MultiheadAttention(n, heads, bias=bias, batch_first=batch_first, **({'kdim': 5, 'vdim': 6} if other_sizes else {})).double()
        for p in attention.parameters(): nn.init.normal_(p, 0, 0.5)
        q, k, v = torch.randn(b, targets, n), torch.randn(b, sources, 5 if other_sizes else n), torch.randn(b, sources, 6 if other_sizes else n)
        q, k, v = (t.double() if batch_first else t.double().transpose(0, 1) for t in (q, k, v))
        mask, padding, many = torch.rand(targets, sources) > 0.7, torch.rand(b, sources) > 0.7, torch.rand(b*heads, targets, sources) > 0.7
    for m in (mask, padding, many): m[..., 0] = False
    settings = {'none': {}, 'bool': {'attn_mask': mask}, 'float': {'attn_mask': numbers(seed, targets, sources)}, 'padding': {'key_padding_mask': padding},
                'both': {'attn_mask': mask, 'key_padding_mask': padding}, 'heads': {'attn_mask': many}}[masked]
    for mode in (True, False):
        g = multihead_weights(q, k, v, attention=attention.train(mode), **settings)
        assert g.shape == (b, heads, targets, sources) and g.dtype == torch.float64
        close(g.sum(-1), torch.ones(b, heads, targets, dtype=torch.float64))
        out, none = apply_multihead(v, g, attention)
        assert none is None
        close(out, attention(q, k, v, **settings, need_weights=False)[0])
    f = lambda value: apply_multihead(value, g, attention)[0] - apply_multihead(torch.zeros_like(v), g, attention)[0]
    close(f(2*v - 3*v.flip(0)), 2*f(v) - 3*f(v.flip(0)), size=10)


def test_masks_by_position_are_masks_by_name():
    with seeded(0, 'attention'): attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)
    padding, mask = torch.tensor([[False, False, True], [False]*3]), torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
    by_name = multihead_weights(x, x, x, attention=attention, key_padding_mask=padding, attn_mask=mask)
    assert torch.equal(multihead_weights(x, x, x, padding, True, mask, attention=attention), by_name)
    assert torch.equal(multihead_weights(x, x, x, padding, False, mask, True, attention=attention), by_name)
    causal = multihead_weights(x, x, x, attention=attention, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(causal, multihead_weights(x, x, x, attention=attention, attn_mask=mask))


@pytest.mark.parametrize('extra', ['add_bias_kv', 'add_zero_attn'])
def test_extra_keys_are_refused(extra):
    x = torch.randn(2, 3, 4)
    with pytest.raises(InputError, match='add_bias_kv or add_zero_attn'): multihead_weights(x, x, x, attention=nn.MultiheadAttention(4, 2, batch_first=True, **{extra: True}))


# Normalisers

def plain_norm(s, q, axes, eps, centred=True):
    "What `q` becomes when the spread is that of `s`."
    spread = np.sqrt(((s - s.mean(axes, keepdims=True)*centred)**2).mean(axes, keepdims=True) + eps)
    return (q - q.mean(axes, keepdims=True)*centred) / spread


@cases
@given(seeds, st.booleans(), st.booleans(), st.integers(1, 3), st.sampled_from([1e-5, 0.1]), dtypes)
def test_layer_norms(seed, affine, centred, last, eps, dtype):
    s, q = numbers(seed, 2, 3, 4, 5, dtype=dtype), numbers(seed + 1, 2, 3, 4, 5, dtype=dtype)
    shape, axes = list(s.shape[-last:]), tuple(range(-last, 0))
    w, b = (numbers(seed + i, *shape, dtype=dtype) if affine else None for i in (2, 3))
    b = b if centred else None
    own = F.layer_norm(s, shape, w, b, eps) if centred else F.rms_norm(s, shape, w, eps)
    close(apply_layer(s, layer_scale(s, shape, eps, centred), shape, w, b, centred), own, dtype, 20)
    if dtype != torch.float64: return
    want = plain_norm(s.numpy(), q.numpy(), axes, eps, centred)*(w.numpy() if affine else 1) + (b.numpy() if b is not None else 0)
    np.testing.assert_allclose(apply_layer(q, layer_scale(s, shape, eps, centred), shape, w, b, centred).numpy(), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(apply_norm(q, norm_scale(s, axes, eps, centred), axes, centred).numpy(), plain_norm(s.numpy(), q.numpy(), axes, eps, centred), rtol=1e-9, atol=1e-9)


def test_the_defaults_of_torch():
    for dtype in (torch.float32, torch.float64):
        s = numbers(0, 3, 4, dtype=dtype, size=1e-3)
        close(apply_layer(s, layer_scale(s, 4), 4), F.layer_norm(s, [4]), dtype)
        close(apply_layer(s, layer_scale(s, [4], None, False), [4], centred=False), F.rms_norm(s, [4]), dtype)


@cases
@given(seeds, st.integers(1, 3), st.sampled_from([1, 2, 3, 6, None]), st.booleans(), st.sampled_from([1e-5, 0.1]))
def test_group_and_instance_norms(seed, dims, groups, affine, eps):
    shape = (2, 6, *(3, 4, 2)[:dims])
    s, q, w, b = numbers(seed, *shape), numbers(seed + 1, *shape), *(numbers(seed + i, 6) if affine else None for i in (2, 3))
    own = F.instance_norm(s, weight=w, bias=b, eps=eps) if groups is None else F.group_norm(s, groups, w, b, eps)
    close(apply_group(s, group_scale(s, groups, eps), groups, w, b), own, size=100)
    cut, wide = (2, groups or 6, -1), (6, *[1]*dims)
    want = plain_norm(s.numpy().reshape(cut), q.numpy().reshape(cut), (2,), eps).reshape(shape)
    if affine: want = want*w.numpy().reshape(wide) + b.numpy().reshape(wide)
    np.testing.assert_allclose(apply_group(q, group_scale(s, groups, eps), groups, w, b).numpy(), want, rtol=1e-9, atol=1e-9)


@cases
@given(seeds, st.sampled_from([1., 2., 3.]), st.integers(-1, 2))
def test_unit_length(seed, p, dim):
    s, q = numbers(seed, 2, 3, 4), numbers(seed + 1, 2, 3, 4)
    close(apply_soft(s, length_scale(s, p, dim)), F.normalize(s, p, dim))
    np.testing.assert_allclose(apply_soft(q, length_scale(s, p, dim)).numpy(), q.numpy() / (np.abs(s.numpy())**p).sum(dim, keepdims=True)**(1/p), rtol=1e-9)
    assert torch.equal(apply_soft(torch.zeros(2, 3), length_scale(torch.zeros(2, 3))), torch.zeros(2, 3))


# Max pooling

OWN = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


@st.composite
def poolings(draw):
    "Dimensions, size of the plane, and settings that torch accepts."
    dims = draw(st.integers(1, 3))
    ints = lambda low, high: draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)]*dims)))
    kernel, dilation = ints(1, 4), ints(1, 2)
    each = lambda v: (v,)*dims if isinstance(v, int) else v
    padding = tuple(draw(st.integers(0, k//2)) for k in each(kernel))
    size = tuple(draw(st.integers(d*(k - 1) + 1, d*(k - 1) + 6)) for k, d in zip(each(kernel), each(dilation)))
    return dims, size, dict(kernel_size=kernel, stride=draw(st.one_of(st.none(), st.just(ints(1, 3)))), padding=padding, dilation=dilation, ceil_mode=draw(st.booleans()))


def plain_pool(s, q, out, kernel, stride, padding, dilation):
    "Read `q` where `s` is largest, window by window."
    n, result = len(out), np.empty((*s.shape[:2], *out))
    for o in itertools.product(*map(range, out)):
        axes = [[i for i in range(o[d]*stride[d] - padding[d], o[d]*stride[d] - padding[d] + kernel[d]*dilation[d], dilation[d]) if 0 <= i < s.shape[2 + d]] for d in range(n)]
        pixels = list(itertools.product(*axes))
        for i, j in np.ndindex(*s.shape[:2]): result[(i, j, *o)] = q[(i, j, *max(pixels, key=lambda p: s[(i, j, *p)]))]
    return result


@settings(max_examples=150, deadline=None, derandomize=True)
@given(poolings(), seeds, st.booleans())
def test_max_pooling(pooling, seed, channels_last):
    dims, size, keys = pooling
    gen = torch.Generator().manual_seed(seed)
    s, q = (torch.randn(2, 3, *size, generator=gen, dtype=torch.float64) for _ in range(2))
    if channels_last and dims == 2: s, q = (t.contiguous(memory_format=torch.channels_last) for t in (s, q))
    own = OWN[dims](s, **keys)
    g = pool_gate(s, **keys, dims=dims)
    each = lambda v: (v,)*dims if isinstance(v, int) else v
    window = math.prod(each(keys['kernel_size']))
    assert g.dtype == torch.uint8 and g.shape == own.shape and int(g.max()) < window
    assert torch.equal(apply_pool(s, g, **keys, dims=dims), own)
    stride = each(keys['kernel_size'] if keys['stride'] is None else keys['stride'])
    want = plain_pool(s.numpy(), q.numpy(), own.shape[2:], each(keys['kernel_size']), stride, keys['padding'], each(keys['dilation']))
    np.testing.assert_array_equal(apply_pool(q, g, **keys, dims=dims).numpy(), want)
    r = q.clone().requires_grad_()
    a, b = apply_pool(2*r - 3*s, g, **keys, dims=dims), 2*apply_pool(r, g, **keys, dims=dims) - 3*apply_pool(s, g, **keys, dims=dims)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    w = torch.randn(own.shape, generator=gen, dtype=torch.float64)
    (a*w).sum().backward()
    where = q.flatten(2).new_zeros(q.flatten(2).shape).scatter_add_(2, OWN[dims](s, **keys, return_indices=True)[1].flatten(2), 2*w.flatten(2))
    torch.testing.assert_close(r.grad, where.view(q.shape), rtol=1e-12, atol=1e-12)
    if channels_last and dims == 2 and min(size) > 1: assert a.stride(1) == 1


def test_gate_and_value_from_one_search():
    s, keys = numbers(0, 2, 3, 7, 8, dtype=torch.float32), dict(kernel_size=3, stride=2, padding=1)
    gate, value = pool_both(s, **keys)
    assert torch.equal(gate, pool_gate(s, **keys)) and torch.equal(value, F.max_pool2d(s, **keys))


def test_equal_pixels_are_read_once_and_where_torch_reads():
    s = torch.zeros(1, 1, 4, 4)
    q = torch.arange(16.).view(1, 1, 4, 4)
    place = F.max_pool2d(s, 2, return_indices=True)[1]
    assert torch.equal(apply_pool(q, pool_gate(s, 2), 2), q.flatten()[place.flatten()].view(1, 1, 2, 2))


@pytest.mark.parametrize('dims,kernel,dtype', [(1, 256, torch.uint8), (1, 300, torch.int16), (2, (16, 16), torch.uint8), (2, (16, 17), torch.int16), (3, 7, torch.int16)])
def test_large_windows(dims, kernel, dtype):
    size = [(kernel if isinstance(kernel, int) else kernel[d]) + 3 for d in range(dims)]
    s, q = numbers(0, 2, 2, *size), numbers(1, 2, 2, *size)
    g = pool_gate(s, kernel, 1, dims=dims)
    assert g.dtype == dtype
    own, place = OWN[dims](s, kernel, 1, return_indices=True)
    assert torch.equal(apply_pool(s, g, kernel, 1, dims=dims), own)
    assert torch.equal(apply_pool(q, g, kernel, 1, dims=dims), q.flatten(2).gather(2, place.flatten(2)).view(own.shape))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.data(), seeds)
def test_adaptive_max_pooling(dims, data, seed):
    size = tuple(data.draw(st.integers(1, 9)) for _ in range(dims))
    output = data.draw(st.one_of(st.integers(1, 6), *([st.tuples(*[st.one_of(st.none(), st.integers(1, 6))]*dims)] if dims > 1 else [])))
    gen = torch.Generator().manual_seed(seed)
    s, q = (torch.randn(2, 3, *size, generator=gen, dtype=torch.float64) for _ in range(2))
    if data.draw(st.booleans()) and dims == 2: s, q = (t.contiguous(memory_format=torch.channels_last) for t in (s, q))
    own, place = ADAPTIVE[dims](s, output, return_indices=True)
    g = adaptive_gate(s, output, dims)
    assert g.dtype == torch.uint8 and g.shape == own.shape
    assert torch.equal(apply_adaptive(s, g, output, dims), own)
    assert torch.equal(apply_adaptive(q, g, output, dims), q.flatten(2).gather(2, place.flatten(2)).view(own.shape))


def test_adaptive_windows_above_256_pixels():
    s, q = numbers(0, 1, 2, 40, 40), numbers(1, 1, 2, 40, 40)
    place = F.adaptive_max_pool2d(s, 2, return_indices=True)[1]
    g = adaptive_gate(s, 2)
    assert g.dtype == torch.int16 and torch.equal(apply_adaptive(q, g, 2), q.flatten(2).gather(2, place.flatten(2)).view(1, 2, 2, 2))


# Disagreement

@cases
@given(seeds)
def test_disagreement_in_numpy(seed):
    a = {'bit': numbers(seed, 4, 5) > 0, 'regime': clamp_gate(numbers(seed, 4, 5)), 'soft': torch.sigmoid(numbers(seed, 4, 5)), 'norm': numbers(seed, 4, 1)}
    b = {'bit': numbers(seed+1, 4, 5) > 0, 'regime': clamp_gate(numbers(seed+1, 4, 5)), 'soft': torch.sigmoid(numbers(seed+1, 4, 5)), 'norm': numbers(seed+1, 4, 1)}
    d = disagreement(a, b)
    for site in ('bit', 'regime'): assert d[site] == pytest.approx((a[site].numpy() != b[site].numpy()).mean())
    for site in ('soft', 'norm'): assert d[site] == pytest.approx(np.abs(a[site].numpy() - b[site].numpy()).sum() / (np.abs(a[site].numpy()) + np.abs(b[site].numpy())).sum(), rel=1e-5)
    assert all(0 < v <= 1 for v in d.values()) and list(d) == list(a)
    assert set(disagreement(a, {k: v.clone() for k, v in a.items()}).values()) == {0.}


@pytest.mark.parametrize('a,b', [(torch.zeros(3), torch.zeros(3)), (torch.full((3,), -0.), torch.zeros(3))])
def test_gates_that_are_all_zero_agree(a, b): assert disagreement({'s': a}, {'s': b}) == {'s': 0.}


def test_one_unit_that_differs_is_seen():
    a = {'bit': torch.zeros(7, 11, dtype=torch.bool), 'soft': torch.ones(7, 11, dtype=torch.float64)}
    b = {k: v.clone() for k, v in a.items()}
    b['bit'][3, 4], b['soft'][3, 4] = True, 0.5
    d = disagreement(a, b)
    assert d['bit'] == pytest.approx(1/77) and d['soft'] == pytest.approx(0.5/153.5)
    assert disagreement({'s': torch.ones(4)}, {'s': torch.zeros(4)}) == {'s': 1.}


# Packing

@st.composite
def batches(draw):
    "Gates of a batch: bits, regimes, positions in windows of any size, numbers, in either memory order."
    b, r = draw(st.integers(1, 5)), np.random.default_rng(draw(seeds))
    gates, symbols = {}, {}
    for i in range(draw(st.integers(1, 6))):
        kind, shape = draw(st.sampled_from(['bit', 'regime', 'pool', 'wide', 'soft', 'scale'])), draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        site, whole = f's{i}', (b, *shape)
        if kind == 'bit': g = torch.from_numpy(r.random(whole) > 0.5)
        elif kind in ('regime', 'pool', 'wide'):
            symbols[site] = 3 if kind == 'regime' else draw(st.integers(1, 256)) if kind == 'pool' else draw(st.integers(257, 2000))
            g = torch.from_numpy(r.integers(0, symbols[site], whole)).to(torch.int16 if kind == 'wide' else torch.uint8)
        else:
            whole = (b, 16, 4, 5) if kind == 'soft' else whole
            g = torch.from_numpy(r.normal(size=whole)).to(draw(st.sampled_from([torch.float32, torch.float64])))
        if g.ndim == 4 and draw(st.booleans()): g = g.contiguous(memory_format=torch.channels_last)
        gates[site] = g
    return gates, symbols, draw(st.sampled_from(['float16', 'bfloat16', 'float32']))


def bound(gates, symbols, soft, planes=False):
    "The bytes that one image's decisions need: bits and numbers; and what it costs to begin each plane of bits with a byte."
    bits = [(g[0].numel(), 1 if g.dtype == torch.bool else max(1, math.ceil(math.log2(symbols[s])))) for s, g in gates.items() if not g.is_floating_point()]
    numbers = sum(g[0].numel()*(getattr(torch, soft).itemsize if g[0].numel() >= 256 else g.dtype.itemsize) for g in gates.values() if g.is_floating_point())
    return numbers + (sum(k*math.ceil(n/8) for n, k in bits) if planes else math.ceil(sum(n*k for n, k in bits)/8))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_packed_gates_come_back(batch):
    gates, symbols, soft = batch
    slots = slots_of(gates, symbols, soft)
    rows = pack(gates, slots)
    b = len(next(iter(gates.values())))
    assert rows.dtype == np.uint8 and rows.shape == (b, row_bytes(slots)) and row_bytes(slots) == bound(gates, symbols, soft, planes=True)
    assert 0 <= row_bytes(slots) - bound(gates, symbols, soft) <= sum(s.bits for s in slots)
    back = unpack(torch.from_numpy(rows), slots)
    assert list(back) == list(gates)
    for site, g in gates.items():
        stored = g.to(getattr(torch, soft)).to(g.dtype) if g.is_floating_point() and g[0].numel() >= 256 else g
        assert back[site].dtype == g.dtype and torch.equal(back[site], stored), site
        if g.ndim == 4 and g.is_contiguous(memory_format=torch.channels_last) and not g.is_contiguous(): assert back[site].is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), seeds)
def test_a_row_depends_on_its_image_alone(batch, seed):
    gates, symbols, soft = batch
    b = len(next(iter(gates.values())))
    order = torch.randperm(2*b, generator=torch.Generator().manual_seed(seed)) % b
    slots = slots_of(gates, symbols, soft)
    rows = pack(gates, slots)
    chosen = {s: g[order].contiguous(memory_format=torch.channels_last if s_.channels_last else torch.contiguous_format) for (s, g), s_ in zip(gates.items(), slots)}
    np.testing.assert_array_equal(pack(chosen, slots), rows[order.numpy()])
    for i in range(b): np.testing.assert_array_equal(pack({s: g[i:i+1] for s, g in gates.items()}, slots), rows[i:i+1])
    back, whole = unpack(torch.from_numpy(rows[order.numpy()]), slots), unpack(torch.from_numpy(rows), slots)
    for site in gates: assert torch.equal(back[site], whole[site][order])


def test_bits_stand_where_the_definition_puts_them():
    "One image, by hand: sites in order, of each all low bits, then all high bits, then the next site."
    gates = {'a': torch.tensor([[True, True, False]]), 'b': torch.tensor([[2, 1, 3]], dtype=torch.uint8), 'c': torch.tensor([[1., -2.]])}
    slots = slots_of(gates, {'b': 4})
    assert slots == [Slot('a', (3,), 'bool', 1, 'bits', False), Slot('b', (3,), 'uint8', 2, 'bits', False), Slot('c', (2,), 'float32', 0, 'float32', False)]
    assert [s.units for s in slots] == [3, 3, 2] and row_bytes(slots) == 3 + 8
    row = pack(gates, slots)[0]
    assert [f'{r:08b}'[:3] for r in row[:3]] == ['110', '011', '101'] and not (row[:3] & 0b11111).any()
    assert row[3:].tobytes() == np.array([1., -2.], np.float32).tobytes()


@pytest.mark.parametrize('name,size', [('resnet18', 32), ('alexnet', 64), ('mobilenet_v3_small', 64)])
def test_a_network_takes_the_information_bound(name, size):
    import torchvision
    with seeded(0, name): dc, x = DualCopy(torchvision.models.get_model(name, num_classes=2)).eval(), torch.randn(2, 3, size, size)
    gates = dc.gates(x)
    slots = slots_of(gates, dc.symbols)
    assert bound(gates, dc.symbols, 'float16') <= row_bytes(slots) <= 1.001*bound(gates, dc.symbols, 'float16')
    back = unpack(torch.from_numpy(pack(gates, slots)), slots)
    assert torch.equal(dc(x, {s: back[s] for s in gates}), dc(x)) or name == 'mobilenet_v3_small'
    torch.testing.assert_close(dc(x, back), dc(x), rtol=1e-3, atol=1e-3)


def test_rows_from_a_read_only_or_strided_buffer():
    "A memory-mapped file gives rows that may not be written, and a batch of them may be a view."
    gates = {'a': torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.5, 'b': torch.rand(6, 300, generator=torch.Generator().manual_seed(1))}
    slots = slots_of(gates, {})
    rows = torch.from_numpy(pack(gates, slots))
    wide = torch.cat([rows, rows], 1)[::2, :rows.shape[1]]
    assert not wide.is_contiguous()
    back = unpack(wide, slots)
    assert torch.equal(back['a'], gates['a'][::2]) and torch.equal(back['b'], gates['b'][::2].half().float())
