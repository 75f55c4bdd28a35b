"Compression on the wire: each kind against plain numpy, what an error may cost, and every message that must be turned away."
import math, pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.core import InputError, norm, rng, serialised_bytes, state_hash, sub
from fedsq_nb.client.compression import Compression, decode, encode, lag, parse_kind

fast = settings(max_examples=25, deadline=None)
floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
wholes = [torch.uint8, torch.int32, torch.int64, torch.bool]
kinds = ['float16', 'bfloat16', 'int8', 'topk:0.01', 'topk:0.3', 'topk:1']
each_kind = pytest.mark.parametrize('kind', kinds)
nan, inf = float('nan'), float('inf')


@st.composite
def days(draw, dtypes=(*floats, *wholes), n=3):
    "A global state and what it is after each of some days: scalars, empty tensors, up to three dimensions."
    signature = draw(st.lists(st.tuples(st.sampled_from(dtypes), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=4))
    g, size = rng(draw(st.integers(0, 2**32)), 'days'), 10.0 ** draw(st.integers(-3, 3))
    def tensor(dtype, shape):
        if 0 in shape: return torch.zeros(shape, dtype=dtype)
        if not dtype.is_floating_point: return torch.tensor(g.integers(0, 2, shape)).to(dtype)
        return torch.tensor(g.normal(size=shape) * size).to(dtype)
    states = [{f'control/layers.{i}.weight': tensor(*sig) for i, sig in enumerate(signature)} for _ in range(n + 1)]
    return states[0], states[1:]

def wide(t): return np.float64 if t.dtype == torch.float64 else np.float32
def array(t): return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32).numpy()
def floating(state): return {n: t for n, t in state.items() if t.is_floating_point()}


# -- an oracle in plain numpy ------------------------------------------------------------------------------------------

def to_bfloat16(x):
    "The nearest number with eight significant bits, halves to even, by its mantissa."
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)

def oracle(x, kind):
    "The change that arrives when `x` is sent."
    if not x.size: return x.copy()
    name, _, share = kind.partition(':')
    if name == 'topk':
        flat, k = x.reshape(-1), max(1, round(float(share) * x.size))
        chosen, out = sorted(range(x.size), key=lambda i: (-abs(flat[i]), i))[:k], np.zeros_like(flat)
        out[chosen] = flat[chosen]
        return out.reshape(x.shape)
    largest = np.abs(x).max()
    if name == 'int8':
        step = largest / x.dtype.type(127)
        return (np.rint(x / step) * step if step else x * 0).astype(x.dtype)
    scale = x.dtype.type(2.0 ** (math.floor(math.log2(largest)) - 14)) if largest else x.dtype.type(1)
    return (to_bfloat16(x / scale) if name == 'bfloat16' else (x / scale).astype(np.float16)).astype(x.dtype) * scale

@each_kind
@fast
@given(drawn=days())
def test_agrees_with_plain_numpy_over_days(kind, drawn):
    before, later = drawn
    error, expected = None, {n: np.zeros(t.shape, wide(t)) for n, t in floating(before).items()}
    for state in later:
        message, error = encode(state, before, kind, error=error)
        got = decode(message, before, kind)
        assert list(got) == list(before) and list(error) == list(expected)
        for n, old in before.items():
            if not old.is_floating_point(): assert torch.equal(got[n], state[n]); continue
            x = np.asarray(array(state[n]) - array(old) + expected[n])
            sent = oracle(x, kind)
            if kind.startswith('topk'): sent = array(torch.tensor(sent).to(old.dtype))
            now = torch.tensor(np.asarray(array(old) + sent)).to(old.dtype)
            assert torch.equal(got[n], now), n
            expected[n] = np.asarray(x - (array(now) - array(old)), wide(old))
            assert error[n].numpy().dtype == expected[n].dtype and np.array_equal(error[n].numpy(), expected[n])


# -- laws --------------------------------------------------------------------------------------------------------------

@each_kind
@fast
@given(drawn=days(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
def test_what_was_sent_and_what_is_left_make_up_the_whole(kind, drawn):
    before, later = drawn
    total, error = {n: t.double() * 0 for n, t in floating(before).items()}, {}
    for state in later * 3:
        message, error = encode(state, before, kind, error=error)
        got = decode(message, before, kind)
        for n in total: total[n] += (state[n].double() - before[n].double()) - (got[n].double() - before[n].double())
    for n, t in total.items():
        largest = max([s[n].double().abs().max().item() for s in (before, *later)] if t.numel() else [0])
        assert (t - error[n].double()).abs().max().item() <= 1e-4 * largest if t.numel() else True


@each_kind
def test_many_rounds_of_a_moving_state_arrive(kind):
    "The server follows the client's wishes; after many rounds it is behind by what the client still holds and by rounding."
    g, before, error, wanted = rng(0, 'moving'), {'w': torch.zeros(40)}, None, torch.zeros(40, dtype=torch.float64)
    for _ in range(200):
        step = torch.tensor(g.normal(size=40)).float()
        message, error = encode({'w': before['w'] + step}, before, kind, error=error)
        wanted += (before['w'] + step - before['w']).double()
        before = decode(message, before, kind)
    assert (wanted - before['w'].double() - error['w'].double()).abs().max() < 2e-4
    assert norm(error) < (60 if kind == 'topk:0.01' else 20) * math.sqrt(40)


def change_of(draw_seed, n=257, size=1.): return torch.tensor(rng(draw_seed, 'change').normal(size=n) * size).float()

@fast
@given(seed=st.integers(0, 10**6), power=st.integers(-36, 37))
def test_error_bounds(seed, power):
    x = change_of(seed, size=10.0**power)
    if not x.isfinite().all(): return
    zero, largest = {'w': torch.zeros_like(x)}, x.abs().max().item()
    arrived = {k: decode(encode({'w': x}, zero, k)[0], zero, k)['w'].double() for k in kinds}
    off = {k: (x.double() - y).abs() for k, y in arrived.items()}
    assert (off['float16'] <= 2**-11 * x.double().abs() + 2**-39 * largest).all()
    assert (off['bfloat16'] <= 2**-8 * x.double().abs()).all()
    if power > -35: assert off['int8'].max() <= largest / 127 / 2 * (1 + 1e-4)
    for kind in kinds[3:]:
        kept = arrived[kind] != 0
        assert torch.equal(arrived[kind][kept], x[kept].double())
        assert kept.sum() == max(1, round(float(kind[5:]) * len(x)))
    assert torch.equal(arrived['topk:1'], x.double())


@fast
@given(seed=st.integers(0, 10**6), n=st.integers(1, 300), share=st.floats(0.001, 1), tied=st.booleans())
def test_topk_is_a_contraction(seed, n, share, tied):
    x = change_of(seed, n)
    if tied: x = x.round()
    zero, kind = {'w': torch.zeros(n)}, Compression('topk', share)
    message, error = encode({'w': x}, zero, kind)
    k = len(message['w|index'])
    assert norm(error)**2 <= (1 - k/n) * norm({'w': x})**2 * (1 + 1e-12)
    kept = set(message['w|index'].tolist())
    for i in range(n):  # nobody left out is larger, nor as large and earlier
        if i not in kept: assert all((abs(x[j]), -j) > (abs(x[i]), -i) for j in kept)


@each_kind
@fast
@given(drawn=days())
def test_same_input_same_bytes_and_nothing_is_touched(kind, drawn):
    before, (state, *_) = drawn
    _, error = encode(state, before, kind)
    held = [state_hash(s) for s in (before, state, error)]
    a, b = encode(state, before, kind, error=error), encode(dict(reversed(state.items())), dict(reversed(before.items())), kind, error=error)
    assert [state_hash(s) for s in a] == [state_hash(s) for s in b]
    got = decode(a[0], before, kind)
    for t in (*got.values(), *a[0].values(), *a[1].values()): t.logical_not_() if t.dtype == torch.bool else t.add_(1)
    assert [state_hash(s) for s in (before, state, error)] == held


@each_kind
@fast
@given(drawn=days())
def test_what_is_counted_is_what_is_sent(kind, drawn):
    before, (state, *_) = drawn
    message, _ = encode(state, before, kind)
    file = safetensors.torch.save(message)
    assert len(file) == serialised_bytes(message)
    arrived = safetensors.torch.load(file)
    assert state_hash(decode(arrived, before, kind)) == state_hash(decode(message, before, kind))


def test_bytes_of_a_large_tensor():
    before = {'w': torch.zeros(10**6)}
    sizes = {k: serialised_bytes(encode(before, before, k)[0]) for k in kinds}
    raw = {'float16': 2*10**6, 'bfloat16': 2*10**6, 'int8': 10**6, 'topk:0.01': 8*10**4, 'topk:0.3': 24*10**5, 'topk:1': 8*10**6}
    assert all(0 < sizes[k] - raw[k] < 300 for k in kinds)


@each_kind
def test_no_change_is_no_change(kind):
    state = {'w': torch.tensor([1.5, -0., 3e38]), 'e': torch.zeros(0, 4), 's': torch.tensor(2., dtype=torch.bfloat16), 'n': torch.tensor(3)}
    message, error = encode(state, state, kind)
    got = decode(message, state, kind)
    assert all(torch.equal(got[n], state[n]) for n in state)
    assert norm(error) == 0 and {n: t.dtype for n, t in error.items()} == dict.fromkeys('wes', torch.float32)


# -- the edges of the number line --------------------------------------------------------------------------------------

@each_kind
@pytest.mark.parametrize('dtype', floats, ids=str)
@pytest.mark.parametrize('bad', [nan, inf, -inf])
@pytest.mark.parametrize('old_error', [False, True])
def test_not_finite_stays_not_finite(kind, dtype, bad, old_error):
    before = {'w': torch.zeros(200, dtype=dtype), 'b': torch.zeros(2, dtype=dtype)}
    state = {'w': torch.linspace(-9, 9, 200).to(dtype), 'b': torch.ones(2, dtype=dtype)}
    error = encode(state, before, kind)[1] if old_error else None
    state['w'][77] = bad
    message, left = encode(state, before, kind, error=error)
    got = decode(message, before, kind)
    assert not got['w'].isfinite().all() and got['b'].isfinite().all()
    assert all(t.isfinite().all() for t in left.values())


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_very_small_and_very_large_changes(kind, dtype):
    "Down to the last subnormal and up to the largest number; with feedback nothing is lost even where nothing can be sent."
    info = torch.finfo(dtype)
    for size in (info.smallest_normal * info.eps, info.tiny / 3, info.tiny * 1000, info.max / 3, info.max):
        x = torch.tensor([size, -size / 3, size / 7, 0.], dtype=dtype)
        zero = {'w': torch.zeros_like(x)}
        message, error = encode({'w': x}, zero, kind)
        got = decode(message, zero, kind)['w']
        if size == info.max and kind != 'topk:1': continue  # rounding may pass the end of the type: see the test below
        assert got.isfinite().all()
        assert torch.equal(got + error['w'], x) or (got + error['w'] - x).abs().max() <= size * info.eps


def test_a_change_beyond_the_type_is_refused_not_wrapped():
    before, state = {'w': torch.tensor([-3e38])}, {'w': torch.tensor([3e38])}
    for kind in kinds:
        message, error = encode(state, before, kind)
        assert not decode(message, before, kind)['w'].isfinite().all() and error['w'].isfinite().all()


def test_halves_to_even():
    before, x = {'w': torch.zeros(6)}, torch.tensor([127., 0.5, 1.5, 2.5, -0.5, -3.5])
    assert encode({'w': x}, before, 'int8')[0]['w'].tolist() == [127, 0, 2, 2, 0, -4]


@pytest.mark.parametrize('kind', kinds)
def test_small_changes_survive_where_plain_float16_would_drop_them(kind):
    x = torch.tensor([1e-9, -7e-10, 3e-10])
    got = decode(encode({'w': x}, {'w': torch.zeros(3)}, kind)[0], {'w': torch.zeros(3)}, kind)['w']
    assert got.abs().max() > 0.99e-9 and x.half().abs().max() == 0


# -- feedback ----------------------------------------------------------------------------------------------------------

@each_kind
def test_without_feedback_nothing_is_kept_and_nothing_used(kind):
    before, state = {'w': torch.zeros(50)}, {'w': change_of(1, 50)}
    message, left = encode(state, before, kind, error={'w': torch.full((50,), 9.)}, feedback=False)
    assert left == {} and state_hash(message) == state_hash(encode(state, before, kind)[0])
    assert state_hash(encode(state, before, kind, error={})[0]) == state_hash(message)


@pytest.mark.parametrize('kind', ['float16', 'bfloat16', 'int8', 'topk:0.05'])
def test_lag_is_bounded_with_feedback_and_grows_without(kind):
    change = {'w': change_of(3, 300)}
    kept, lost = lag(change, kind, 150), lag(change, kind, 150, feedback=False)
    assert max(kept[75:]) < 1.5 * max(kept[:75]) and lost[-1] > 7 * kept[-1]
    assert np.allclose(np.diff(lost), lost[0], rtol=1e-3)


def test_topk_reaches_every_entry():
    "The smallest entry of a constant change gets its turn."
    zero, x, error, met = {'w': torch.zeros(20)}, torch.arange(1., 21.), None, set()
    for _ in range(400):
        message, error = encode({'w': x}, zero, 'topk:0.05', error=error)
        met |= set(message['w|index'].tolist())
    assert met == set(range(20))


@pytest.mark.parametrize('error, reason', [
    ({'w': torch.zeros(2)}, "'w' has shape"), ({'w': torch.zeros(3).double()}, "'w' has type"), ({'v': torch.zeros(3)}, "lacks 'w'"),
    ({'w': torch.zeros(3), 'n': torch.tensor(1.)}, "has 'n'")])
def test_an_error_of_another_network_is_refused(error, reason):
    before = {'w': torch.zeros(3), 'n': torch.tensor(1)}
    with pytest.raises(InputError, match=f'^error.*{reason}'): encode(before, before, 'int8', error=error)


def test_states_that_do_not_belong_together():
    before = {'w': torch.zeros(3)}
    for state, reason in (({}, "state lacks 'w'"), ({'w': torch.zeros(4)}, 'has shape'), ({'w': torch.zeros(3).half()}, 'has type'),
                          (before | {'x': torch.zeros(1)}, "has 'x'")):
        with pytest.raises(InputError, match=reason): encode(state, before, 'int8')


@each_kind
def test_names_with_a_bar_are_refused_on_both_sides(kind):
    before = {'w': torch.zeros(3), 'w|scale': torch.zeros(())}
    for code in (encode, decode):
        with pytest.raises(InputError, match=r"'w\|scale'.*rename"): code(before, before, kind)


# -- strangers ---------------------------------------------------------------------------------------------------------

plain = {'w': torch.zeros(2, 5), 'n': torch.tensor(3)}
def index(*i): return {'w|index': torch.tensor(i, dtype=torch.int32)}
malformed = [
    ('int8', lambda m: None, 'not a dict'), ('int8', lambda m: [1], 'not a dict'), ('int8', lambda m: {}, "lacks 'w'"),
    ('int8', lambda m: plain, r"lacks 'w\|scale'"), ('int8', lambda m: m | {'x': torch.zeros(1)}, "has 'x'"), ('int8', lambda m: m | {5: torch.zeros(1)}, 'has 5'),
    ('int8', lambda m: m | {'w': [1, 2]}, 'is of type list'), ('int8', lambda m: m | {'w': m['w'].float()}, 'has type torch.float32'),
    ('int8', lambda m: m | {'w': m['w'].T}, r'has shape \(5, 2\)'), ('int8', lambda m: m | {'w|scale': torch.ones(2)}, r'has shape \(2,\), expected \(\)'),
    ('int8', lambda m: m | {'w|scale': torch.tensor(1.).double()}, 'has type torch.float64'), ('int8', lambda m: m | {'n': torch.tensor(3.)}, "'n' has type"),
    ('int8', lambda m: m | {'n': torch.tensor([3])}, "'n' has shape"), ('int8', lambda m: m | {'w': m['w'].to('meta')}, 'not a plain tensor'),
    ('int8', lambda m: m | {'w': m['w'].to_sparse()}, 'not a plain tensor'), ('float16', lambda m: m | {'w': m['w'].bfloat16()}, 'expected torch.float16'),
    ('topk:0.3', lambda m: m | index(0, 1, 10), r"'w\|index' holds 10, outside of 0 to 9"), ('topk:0.3', lambda m: m | index(-1, 1, 3), 'holds -1'),
    ('topk:0.3', lambda m: m | index(2**31 - 1, -2**31, 3), 'holds 2147483647'), ('topk:0.3', lambda m: m | index(1, 1, 3), 'does not ascend'),
    ('topk:0.3', lambda m: m | index(3, 1, 2), 'does not ascend'), ('topk:0.3', lambda m: m | index(0, 1), r'has shape \(2,\), expected \(3,\)'),
    ('topk:0.3', lambda m: m | {'w|index': m['w|index'].long()}, 'expected torch.int32'), ('topk:0.3', lambda m: m | {'w|value': m['w|value'].half()}, 'has type'),
    ('topk:0.3', lambda m: m | {'w|value': m['w|value'][:0]}, r"'w\|value' has shape \(0,\)"), ('topk:0.1', lambda m: m, r'has shape \(3,\), expected \(1,\)'),
]

@pytest.mark.parametrize('kind, spoil, reason', malformed)
def test_malformed_messages_are_refused_with_the_reason(kind, spoil, reason):
    message, _ = encode(plain | {'w': torch.arange(10.).reshape(2, 5)}, plain, 'topk:0.3' if kind == 'topk:0.1' else kind)
    with pytest.raises(InputError, match=reason): decode(spoil(message), plain, kind)


@each_kind
@fast
@given(seed=st.integers(0, 10**6))
def test_random_bytes_are_decoded_or_refused(kind, seed):
    "Whatever the bits of a message are, the outcome is a state of the right form or an `InputError`."
    g, (message, _) = rng(seed, 'bytes'), encode(plain, plain, kind)
    noise = {n: torch.tensor(np.frombuffer(g.bytes(t.numel()*t.element_size()), np.uint8).copy()).view(t.dtype).reshape(t.shape) for n, t in message.items()}
    try: got = decode(noise, plain, kind)
    except InputError as e: assert '|index' in str(e)
    else: assert {n: (t.dtype, t.shape) for n, t in got.items()} == {n: (t.dtype, t.shape) for n, t in plain.items()}


# -- kinds -------------------------------------------------------------------------------------------------------------

def test_kinds_by_name():
    assert [parse_kind(k) for k in ('float16', 'bfloat16', 'int8', 'topk:0.05')] == [Compression('float16'), Compression('bfloat16'), Compression('int8'), Compression('topk', 0.05)]
    for kind in map(parse_kind, kinds): assert parse_kind(str(kind)) == parse_kind(kind) == pickle.loads(pickle.dumps(kind)) == kind

@pytest.mark.parametrize('text', ['', 'int4', 'INT8', 'int8:', 'int8:0.5', 'topk', 'topk:', 'topk:x', 'topk:0', 'topk:-1', 'topk:1.1', 'topk:nan', 'topk:inf', 'topk:0.1:2', ':', 7, None])
def test_kinds_that_are_none(text):
    with pytest.raises(InputError) as e: parse_kind(text)
    assert str(text) in str(e.value) and ('topk:SHARE' in str(e.value) or 'above 0 and at most 1' in str(e.value)) and '\n' not in str(e.value)

def test_a_compression_cannot_be_made_wrong():
    for made in (lambda: Compression('zip'), lambda: Compression('topk'), lambda: Compression('int8', 0.5), lambda: Compression('topk', 0.)):
        with pytest.raises(InputError): made()


def test_too_many_entries_for_int32():
    huge = {'w': torch.zeros(1).expand(2**31)}
    with pytest.raises(InputError, match='2147483648 entries'): decode({}, huge, 'topk:0.01')
