"The server's arithmetic: an oracle in plain numpy, the laws of a mean, and every poison kept out of it."
import copy, functools, itertools, math, statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.server import aggregate
from fedsq_nb.server.aggregate import FailureKind, FedAvg, any_diverged, averaging_gap, change_norms, check_update, client_drift, plot_gap, screen_updates, weighted_mean
from fedsq_nb.core import InputError, Update, norm, rng, state_hash, sub

fast = settings(max_examples=60, deadline=None)
floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
wholes = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
nan, inf = float('nan'), float('inf')


@st.composite
def rounds(draw, dtypes=(*floats, *wholes), max_clients=6):
    "States of equal signature and a weight for each: names like a network's, 0 to 3 dimensions, empty tensors too."
    signature = draw(st.lists(st.tuples(st.sampled_from(dtypes), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=4))
    g, scale = rng(draw(st.integers(0, 2**32)), 'states'), 10.0 ** draw(st.integers(-4, 4))
    def tensor(dtype, shape):
        if 0 in shape: return torch.zeros(shape, dtype=dtype)
        if dtype == torch.bool: return torch.tensor(g.random(shape) < 0.5)
        if not dtype.is_floating_point: return torch.tensor(g.integers(0, 100, shape)).to(dtype)
        return torch.tensor(g.normal(size=shape) * scale).to(dtype)
    n_clients = draw(st.integers(1, max_clients))
    states = [{f'layers.{i}.weight': tensor(*sig) for i, sig in enumerate(signature)} for _ in range(n_clients)]
    weights = draw(st.lists(st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e6)), min_size=n_clients, max_size=n_clients))
    return states, weights


def spacing(states, name):
    "One unit in the last place of the largest value that any client sends: what one rounding may cost, elementwise."
    largest = torch.stack([s[name] for s in states]).abs().amax(0).double().numpy()
    info = torch.finfo(states[0][name].dtype)
    return np.maximum(2.0 ** np.floor(np.log2(np.maximum(largest, info.tiny))) * info.eps, info.smallest_normal * info.eps)

def slack(states, name):
    "One ulp; a float64 tensor has no wider accumulator to hide in, so it gets one for each term."
    return spacing(states, name) * (2 * len(states) if states[0][name].dtype == torch.float64 else 1)

def assert_within_an_ulp(a, b, states):
    assert list(a) == list(b)
    for k in a:
        if a[k].is_floating_point(): assert (np.abs(a[k].double().numpy() - b[k].double().numpy()) <= slack(states, k)).all()
        else: assert torch.equal(a[k], b[k])

def bits(states): return [state_hash(s) for s in states]


# -- the laws of a mean ------------------------------------------------------------------------------------------------

@fast
@given(rounds())
def test_agrees_with_plain_numpy(drawn):
    states, weights = drawn
    got, p = weighted_mean(states, weights), np.array(weights, dtype=np.float64) / np.sum(np.array(weights, dtype=np.float64))
    for k, t in got.items():
        values = np.stack([s[k].double().numpy() for s in states])
        want = np.tensordot(p, values, 1) if t.is_floating_point() else values.max(0)
        assert t.dtype == states[0][k].dtype and t.shape == states[0][k].shape
        tolerance = slack(states, k) if t.is_floating_point() else 0
        assert (np.abs(t.double().numpy() - want) <= tolerance).all()

@fast
@given(rounds(), st.randoms(use_true_random=False))
def test_order_of_clients_moves_at_most_the_last_bit(drawn, random):
    states, weights = drawn
    order = random.sample(range(len(states)), len(states))
    assert_within_an_ulp(weighted_mean(states, weights), weighted_mean([states[i] for i in order], [weights[i] for i in order]), states)

@fast
@given(rounds(), st.randoms(use_true_random=False))
def test_fedavg_is_the_same_to_the_bit_in_any_order(drawn, random):
    states, weights = drawn
    updates = [Update(client=i, round=1, state=s, weight=w) for i, (s, w) in enumerate(zip(states, weights))]
    rule, old = FedAvg(), copy.deepcopy(states[0])
    assert state_hash(rule.step(old, updates)) == state_hash(rule.step(old, random.sample(updates, len(updates))))

@fast
@given(rounds(), st.floats(1e-300, 1e300), st.integers(-900, 900))
def test_only_ratios_of_weights_matter(drawn, factor, exponent):
    states, weights = drawn
    mean = weighted_mean(states, weights)
    assert_within_an_ulp(mean, weighted_mean(states, [w * factor for w in weights]), states)
    assert state_hash(mean) == state_hash(weighted_mean(states, [w * 2.0**exponent for w in weights]))

@fast
@given(rounds())
def test_a_mean_lies_between_the_smallest_and_the_largest(drawn):
    states, weights = drawn
    for k, t in weighted_mean(states, weights).items():
        values = torch.stack([s[k] for s in states])
        room = slack(states, k) if t.dtype == torch.float64 else 0  # narrower types are rounded once, and rounding is monotone
        low, high = values.amin(0).double().numpy() - room, values.amax(0).double().numpy() + room
        assert ((low <= t.double().numpy()) & (t.double().numpy() <= high)).all()

@fast
@given(rounds(max_clients=1), st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9))
def test_identical_states_come_back_to_the_bit_and_in_new_memory(drawn, weights):
    (state,), _ = drawn
    name = state_hash(state)
    assert state_hash(weighted_mean([copy.deepcopy(state) for _ in weights], weights)) == name
    for t in weighted_mean([state] * len(weights), weights).values(): t.zero_()
    assert state_hash(state) == name

@pytest.mark.parametrize('dtype', floats[:3], ids=str)  # float64 has no wider accumulator: see `slack`
@pytest.mark.parametrize('n', [3, 7, 10])
def test_values_that_agree_are_untouched_although_one_beside_them_differs(dtype, n):
    "A frozen channel in a trained tensor: the tensor is summed, and the agreed values must survive the summing."
    agreed = torch.from_numpy(rng(0, 'agreed').normal(size=500)).to(dtype)
    states = [{'w': torch.cat([agreed, torch.tensor([float(i)], dtype=dtype)])} for i in range(n)]
    assert torch.equal(weighted_mean(states, range(1, n + 1))['w'][:-1], agreed)

def test_float16_neither_overflows_nor_loses_small_clients():
    "The sum of these would be infinite in float16, and 0.1 added to 60000 would vanish in it."
    states = [{'w': torch.tensor([60000., v], dtype=torch.float16)} for v in (60000., *[0.5] * 9)]
    want = torch.tensor([60000., (60000 + 9 * 0.5) / 10]).half()
    assert torch.equal(weighted_mean(states, [1] * 10)['w'], want)

@fast
@given(rounds())
def test_inputs_are_never_written_to(drawn):
    states, weights = drawn
    before, kept = bits(states), list(weights)
    updates = [Update(client=i, round=1, state=s, weight=w) for i, (s, w) in enumerate(zip(states, weights))]
    extra = {**copy.deepcopy(states[0]), 'frozen': torch.ones(2)}
    whole = state_hash(extra)
    after = FedAvg().step(extra, screen_updates(updates, states[0], round=1)[0])
    for k in states[0]: after[k].zero_()
    assert (bits(states), list(weights), state_hash(extra)) == (before, kept, whole)

def test_live_parameters_give_plain_tensors_without_a_graph():
    nets = [torch.nn.Linear(2, 1) for _ in range(2)]
    mean = weighted_mean([dict(n.named_parameters()) for n in nets], [1, 3])
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in mean.values())

def test_key_order_is_that_of_the_first_state():
    a, b = {'w': torch.ones(1), 'b': torch.zeros(1)}, {'b': torch.ones(1), 'w': torch.zeros(1)}
    assert list(weighted_mean([a, b], [1, 1])) == ['w', 'b']

def test_a_non_contiguous_tensor_is_averaged_by_position():
    t = torch.arange(6.).reshape(2, 3)
    assert torch.equal(weighted_mean([{'w': t.T}, {'w': t.T.contiguous() + 2}], [1, 1])['w'], t.T + 1)

def plainly(tensors, shares):
    "The mean as it reads: whole tensors, one term after the other."
    first, *rest = tensors
    if all(torch.equal(first, t) for t in rest): return first.clone()
    if not first.is_floating_point(): return functools.reduce(torch.maximum, rest, first)
    total = shares[0] * first.double()
    for share, t in zip(shares[1:], rest): total += share * t.double()
    return total.to(first.dtype)

def exact_shares(weights):
    scaled = [float(w) / float(max(weights)) for w in weights]
    return [w / math.fsum(scaled) for w in scaled]

@fast
@given(rounds(), st.sampled_from([1, 3, 4, 5, 2**16]))
def test_blocks_do_not_move_a_bit(drawn, block):
    states, weights = drawn
    want = {k: plainly([s[k] for s in states], exact_shares(weights)) for k in states[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, '_BLOCK', block)
        assert state_hash(weighted_mean(states, weights)) == state_hash(want)

@pytest.mark.parametrize('dtype', floats, ids=str)
@pytest.mark.parametrize('n', [2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16 + 7])
def test_tensors_longer_than_a_block_have_the_bits_of_the_plain_formula(n, dtype):
    g = rng(0, 'long', n)
    states, weights = [{'w': torch.from_numpy(g.normal(size=n)).to(dtype)} for _ in range(4)], [3, 1, 4.5, 159]
    states[2] = {'w': torch.stack([states[2]['w']] * 2, 1)[:, 0]}  # the same numbers, every second place in memory
    assert torch.equal(weighted_mean(states, weights)['w'], plainly([s['w'] for s in states], exact_shares(weights)))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_gives_the_processors_bits():
    states = [{'w': torch.from_numpy(rng(0, 'gpu', k).normal(size=100_000)).float(), 'n': torch.tensor(k)} for k in range(4)]
    there = [{k: t.cuda() for k, t in s.items()} for s in states]
    mean = weighted_mean(there, [1, 2, 3, 4])
    assert mean['w'].is_cuda and state_hash(mean) == state_hash(weighted_mean(states, [1, 2, 3, 4]))
    updates = lambda some: [Update(client=k, round=1, state=s, weight=1 + k) for k, s in enumerate(some)]
    for name, value in client_drift(updates(there[1:]), there[0]).items(): assert value == pytest.approx(client_drift(updates(states[1:]), states[0])[name], rel=1e-5)
    assert len(screen_updates(updates(there), there[0], norm_limit=10., weight_limit=10.)[0]) == 4


# -- what cannot be averaged -------------------------------------------------------------------------------------------

one = {'w': torch.ones(2)}

@pytest.mark.parametrize('weight', [0, -1, -0.0, nan, inf, -inf, None, '3', 1j, 10**400, torch.tensor(3.), np.float32('nan'), np.array([1., 2.])],
                         ids=lambda w: f'{type(w).__name__}-{str(w)[:5]}')
def test_a_weight_must_be_a_finite_number_above_0(weight):
    with pytest.raises(InputError, match='weight .* is not a finite number above 0'): weighted_mean([one, one], [1, weight])
    assert 'is not a finite number above 0' in check_update(Update(client=0, round=1, state=one, weight=weight), one).reason

@pytest.mark.parametrize('weight', [1, 2.5, np.int64(3), np.float32(0.5), 5e-324, 1.7e308, 10**300])
def test_any_positive_real_number_is_a_weight(weight):
    assert check_update(Update(client=0, round=1, state=one, weight=weight), one) is None
    assert torch.equal(weighted_mean([one, one], [weight, weight])['w'], one['w'])

@pytest.mark.parametrize('states, weights, text', [
    ([], [], 'states is empty'), ([], [1], 'states is empty'),
    ([one, one], [1], 'weights has 1 numbers for 2 states'), ([one], [], 'weights has 0 numbers for 1 states'),
    ([one, {}], [1, 1], r"states\[1\] does not match states\[0\]: missing 'w'"),
    ([one, {**one, 'b': one['w']}], [1, 1], "unexpected 'b'"),
    ([one, {'w': torch.ones(3)}], [1, 1], r"'w' has shape \(3,\), expected \(2,\)"),
    ([one, {'w': torch.ones(1)}], [1, 1], r"'w' has shape \(1,\), expected \(2,\)"),  # would broadcast
    ([one, one, {'w': torch.ones(2).double()}], [1, 1, 1], r"states\[2\] .*torch.float64, expected torch.float32"),
    ([one, {'w': np.ones(2)}], [1, 1], "'w' is of type ndarray, expected a tensor")])
def test_states_that_do_not_fit_are_named(states, weights, text):
    with pytest.raises(InputError, match=text): weighted_mean(states, weights)

def test_many_names_are_cut_to_a_few():
    many = {f'n{i}': torch.ones(1) for i in range(9)}
    assert check_update(Update(client=0, round=1, state={}, weight=1), many).reason == "missing 'n0', 'n1', 'n2' and 6 more"


# -- poison ------------------------------------------------------------------------------------------------------------

expected = {'conv.weight': torch.zeros(2, 3), 'bn.num_batches_tracked': torch.tensor(0), 'fc.bias': torch.zeros(4)}

def healthy(client, round=4):
    g = rng(0, 'client', client)
    state = {'conv.weight': torch.from_numpy(g.normal(size=(2, 3))).float(), 'bn.num_batches_tracked': torch.tensor(client),
             'fc.bias': torch.from_numpy(g.normal(size=4)).float()}
    return Update(client=client, round=round, state=state, weight=10 + client, metrics={'train_loss': 0.5})

def with_value(value):
    t = torch.zeros(4); t[2] = value
    return lambda u: replace(u, state={**u.state, 'fc.bias': t})

def with_tensor(name, t): return lambda u: replace(u, state={**u.state, name: t})

class Unreadable:
    "Raises whatever is asked of it."
    def __repr__(self): raise OSError('no text')
    __str__ = __eq__ = __lt__ = __float__ = __bool__ = __repr__
    __hash__ = object.__hash__

poisons = {
    'nan': (with_value(nan), "non-finite values in 'fc.bias' (1 of 4)"),
    '+inf': (with_value(inf), "non-finite values in 'fc.bias' (1 of 4)"),
    '-inf': (with_value(-inf), "non-finite values in 'fc.bias' (1 of 4)"),
    'all nan': (with_tensor('conv.weight', torch.full((2, 3), nan)), "non-finite values in 'conv.weight' (6 of 6)"),
    'shape': (with_tensor('fc.bias', torch.zeros(5)), "'fc.bias' has shape (5,), expected (4,)"),
    'broadcastable shape': (with_tensor('fc.bias', torch.zeros(1)), "'fc.bias' has shape (1,), expected (4,)"),
    'scalar': (with_tensor('fc.bias', torch.tensor(0.)), "'fc.bias' has shape (), expected (4,)"),
    'dtype': (with_tensor('fc.bias', torch.zeros(4).double()), "'fc.bias' has type torch.float64, expected torch.float32"),
    'counter as float': (with_tensor('bn.num_batches_tracked', torch.tensor(3.)), "'bn.num_batches_tracked' has type torch.float32, expected torch.int64"),
    'not a tensor': (with_tensor('fc.bias', [0.] * 4), "'fc.bias' is of type list, expected a tensor"),
    'missing': (lambda u: replace(u, state={k: v for k, v in u.state.items() if k != 'fc.bias'}), "missing 'fc.bias'"),
    'empty': (lambda u: replace(u, state={}), "missing 'conv.weight', 'bn.num_batches_tracked', 'fc.bias'"),
    'extra': (with_tensor('backdoor', torch.zeros(1)), "unexpected 'backdoor'"),
    'negative weight': (lambda u: replace(u, weight=-3), 'weight -3 is not a finite number above 0'),
    'zero weight': (lambda u: replace(u, weight=0), 'weight 0 is not a finite number above 0'),
    'nan weight': (lambda u: replace(u, weight=nan), 'weight nan is not a finite number above 0'),
    'infinite weight': (lambda u: replace(u, weight=inf), 'weight inf is not a finite number above 0'),
    'text weight': (lambda u: replace(u, weight='12'), "weight '12' is not a finite number above 0"),
    'no weight': (lambda u: replace(u, weight=None), 'weight None is not a finite number above 0'),
    'stale': (lambda u: replace(u, round=3), 'belongs to round 3, not to round 4'),
    'early': (lambda u: replace(u, round=5), 'belongs to round 5, not to round 4'),
    'nan metric': (lambda u: replace(u, metrics={'train_loss': nan}), "metric 'train_loss' is nan, not a finite number"),
    'infinite metric': (lambda u: replace(u, metrics={'seconds': 1., 'train_loss': inf}), "metric 'train_loss' is inf, not a finite number"),
    'text metric': (lambda u: replace(u, metrics={'train_loss': 'low'}), "metric 'train_loss' is 'low', not a number"),
    'no metric': (lambda u: replace(u, metrics={'train_loss': None}), "metric 'train_loss' is None, not a number"),
    'huge metric': (lambda u: replace(u, metrics={'train_loss': 1e308}), "metric 'train_loss' is 1e+308, beyond 1e+30"),
    'huge whole metric': (lambda u: replace(u, metrics={'images': 10**400}), f"metric 'images' is {'1' + '0'*79}, not a finite number"),
    'sparse': (with_tensor('conv.weight', torch.zeros(2, 3).to_sparse()), "'conv.weight' has the layout torch.sparse_coo, expected a dense tensor"),
    'csr': (with_tensor('conv.weight', torch.ones(2, 3).to_sparse_csr()), "'conv.weight' has the layout torch.sparse_csr, expected a dense tensor"),
    'meta': (with_tensor('conv.weight', torch.zeros(2, 3, device='meta')), "'conv.weight' is on the meta device and holds no numbers"),
    'nested': (with_tensor('conv.weight', torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])), "'conv.weight' is a nested tensor, expected a plain one"),
    'quantised': (with_tensor('fc.bias', torch.quantize_per_tensor(torch.zeros(4), .1, 0, torch.qint8)), "'fc.bias' has type torch.qint8, expected real numbers"),
    'complex': (with_tensor('fc.bias', torch.zeros(4, dtype=torch.complex64)), "'fc.bias' has type torch.complex64, expected real numbers"),
    'expanded': (with_tensor('fc.bias', torch.zeros(1).expand(10**13)), "'fc.bias' shows 10000000000000 numbers and holds 1"),
    'key': (with_tensor(7, torch.zeros(4)), 'state has a name that is no text: 7'),
    'metric key': (lambda u: replace(u, metrics={('a',): 1.}), "metrics has a name that is no text: ('a',)"),
    'no state': (lambda u: replace(u, state=None), 'state is of type NoneType, expected a dictionary'),
    'list': (lambda u: replace(u, state=list(u.state.values())), 'state is of type list, expected a dictionary'),
    'no metrics': (lambda u: replace(u, metrics=None), 'metrics is of type NoneType, expected a dictionary'),
    'kept list': (lambda u: replace(u, client_state=[torch.zeros(1)]), 'client_state is of type list, expected a dictionary'),
    'kept text': (lambda u: replace(u, client_state={'home': 'x'}), "'home' is of type str, expected a tensor"),
    'odd round': (lambda u: replace(u, round='4'), "round '4' is no whole number"),
    'unreadable weight': (lambda u: replace(u, weight=Unreadable()), 'weight something of type Unreadable is not a finite number above 0'),
    'unreadable metric': (lambda u: replace(u, metrics={'train_loss': Unreadable()}), "metric 'train_loss' is something of type Unreadable, not a number"),
    'runaway counter': (with_tensor('bn.num_batches_tracked', torch.tensor(2**62)), f'a whole number has grown by {2**62}, more than 1e+06'),
}
RAN_AWAY = {'nan', '+inf', '-inf', 'all nan', 'nan metric', 'infinite metric', 'huge metric', 'huge whole metric'}


@pytest.mark.parametrize('place', range(4))
@pytest.mark.parametrize('kind', poisons)
def test_poison_is_named_and_leaves_no_trace(kind, place):
    spoil, reason = poisons[kind]
    updates = [healthy(c) for c in (7, 1, 5)]
    clean = FedAvg().step(expected, updates)
    updates.insert(place, spoil(healthy(3)))
    good, failures = screen_updates(updates, expected, round=4, norm_limit=100., weight_limit=1000.)
    assert [u.client for u in good] == [1, 5, 7]
    assert [f.as_row() for f in failures] == [{'client': 3, 'kind': 'diverged' if kind in RAN_AWAY else 'invalid', 'reason': reason}]
    assert state_hash(FedAvg().step(expected, good)) == state_hash(clean)

@fast
@given(st.permutations(range(4)), st.sampled_from([nan, inf]))
def test_a_duplicate_is_refused_whatever_it_holds(order, value):
    updates = [healthy(c) for c in range(4)]
    clean = FedAvg().step(expected, updates)
    arrived = [updates[i] for i in order]
    twice = arrived[0]
    good, failures = screen_updates([*arrived, with_value(value)(twice), twice], expected, round=4)
    assert [f.as_row() for f in failures] == [{'client': twice.client, 'kind': 'invalid', 'reason': f'duplicate of client {twice.client}'}] * 2
    assert [u.client for u in good] == [0, 1, 2, 3] and good[twice.client] is twice
    assert state_hash(FedAvg().step(expected, good)) == state_hash(clean)

def test_a_refused_update_does_not_use_up_the_clients_voice():
    "A stale update that arrives late must not silence the client's good one."
    stale, fresh = replace(healthy(3), round=3), healthy(3)
    good, failures = screen_updates([stale, fresh], expected, round=4)
    assert len(good) == 1 and good[0] is fresh and len(failures) == 1

def test_absurd_but_finite_passes_the_guard():
    "1e30 is a number: on its own an update is not implausible, only beside others, and only where a limit is set."
    assert check_update(with_value(1e30)(healthy(3)), expected, round=4) is None
    assert len(screen_updates([healthy(1), healthy(2), with_value(1e30)(healthy(3))], expected, round=4)[0]) == 3

@pytest.mark.parametrize('dtype', floats, ids=str)
def test_finite_values_pass_although_their_sum_overflows(dtype):
    "The quick look is at the sum; what it cannot tell is counted."
    top = torch.finfo(dtype).max
    wide = lambda *values: Update(client=1, round=1, state={'w': torch.tensor(values, dtype=dtype)}, weight=1)
    want = {'w': torch.zeros(4, dtype=dtype)}
    assert check_update(wide(top, top, top, top), want) is None
    assert check_update(wide(-top, -top, top, -top), want) is None
    assert check_update(wide(inf, -inf, top, top), want).reason == "non-finite values in 'w' (2 of 4)"

@fast
@given(rounds(dtypes=(*floats, *wholes)), st.data())
def test_one_bad_number_anywhere_is_found(drawn, data):
    states, weights = drawn
    state = copy.deepcopy(states[0])
    places = [(k, i) for k, t in state.items() if t.is_floating_point() for i in range(t.numel())]
    u = Update(client=1, round=1, state=state, weight=weights[0])
    assert check_update(u, states[0]) is None
    if not places: return
    name, i = data.draw(st.sampled_from(places))
    state[name].view(-1)[i] = data.draw(st.sampled_from([nan, inf, -inf]))
    assert check_update(u, states[0]).reason == f"non-finite values in {name!r} (1 of {state[name].numel()})"


# -- beside the others -------------------------------------------------------------------------------------------------

def flat(state): return np.concatenate([np.zeros(0), *[t.double().numpy().ravel() for t in state.values() if t.is_floating_point()]])
def as_updates(states, weights): return [Update(client=i, round=1, state=s, weight=w) for i, (s, w) in enumerate(zip(states, weights))]

def precision(state):
    "Relative error of a difference and a sum of squares in the tensors' own precision, single at least."
    return 1e-12 if all(t.dtype == torch.float64 for t in state.values() if t.is_floating_point()) else 1e-5

@fast
@given(rounds())
def test_norms_and_spread_agree_with_plain_numpy(drawn):
    states, weights = drawn
    before, updates = states[0], as_updates(states[1:], weights[1:])
    if not updates: return
    ways, p = np.stack([flat(u.state) - flat(before) for u in updates]), np.array(weights[1:]) / np.sum(weights[1:])
    lengths, mean, rel = np.linalg.norm(ways, axis=1), p @ ways, precision(before)
    assert change_norms(updates, before) == pytest.approx(lengths, rel=rel, abs=1e-30)
    seen = client_drift(updates, before)
    assert (seen['drift'], seen['drift_max']) == pytest.approx((lengths.mean(), lengths.max()), rel=rel, abs=1e-30)
    wide = lambda state: {k: t.double() for k, t in state.items() if t.is_floating_point()}
    assert seen['drift'] == pytest.approx(sum(norm(sub(wide(u.state), wide(before))) for u in updates) / len(updates), rel=rel, abs=1e-30)
    if not lengths.all(): return
    if np.linalg.norm(mean) > 1e-2 * lengths.max(): assert seen['cosine'] == pytest.approx((ways @ mean / lengths / np.linalg.norm(mean)).mean(), abs=100*rel)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_norms_of_many_clients_over_many_blocks(dtype):
    "40 clients of 30000 numbers take several blocks, the last of them short."
    g = rng(0, 'blocks')
    before = {'w': torch.from_numpy(g.normal(size=(300, 100))).to(dtype), 'n': torch.tensor(3)}
    updates = as_updates([{'w': before['w'] + torch.from_numpy(g.normal(size=(300, 100)) * 1e-3).to(dtype), 'n': torch.tensor(k)} for k in range(40)], range(1, 41))
    want = [norm(sub(u.state, before)) for u in updates]
    assert change_norms(updates, before) == pytest.approx(want, rel=precision(before))
    assert client_drift(updates, before)['drift_max'] == pytest.approx(max(want), rel=precision(before))

def test_cosine_counts_who_stayed_as_nought_and_weights_the_mean():
    "One goes along x with weight 3, one along y with weight 4: the mean is (3, 4)/7, the cosines 3/5 and 4/5; a third that stays has none."
    to = lambda *ends: as_updates([{'w': torch.tensor(e)} for e in ends], [3, 4, 5])
    assert client_drift(to([1., 0.], [0., 1.]), {'w': torch.zeros(2)})['cosine'] == pytest.approx(.7)
    assert client_drift(to([1., 0.], [0., 1.], [0., 0.]), {'w': torch.zeros(2)})['cosine'] == pytest.approx(1.4 / 3)
    assert client_drift(to([0., 0.], [0., 0.]), {'w': torch.zeros(2)}) == {'drift': 0., 'drift_max': 0., 'cosine': None}

@pytest.mark.parametrize('dtype', floats[:2], ids=str)
def test_narrow_types_are_subtracted_in_single_precision(dtype):
    before, updates = {'w': torch.full((3,), -6e4, dtype=dtype)}, as_updates([{'w': torch.tensor([6e4, -6e4, .1234], dtype=dtype)}], [1])
    want = norm({'w': updates[0].state['w'].double() - before['w'].double()})
    assert math.isfinite(want) and change_norms(updates, before) == pytest.approx([want], rel=1e-6)

def test_norms_without_weights_are_nought():
    updates = as_updates([{'n': torch.tensor(k), 'e': torch.zeros(0)} for k in range(3)], [1, 1, 1])
    before = {'n': torch.tensor(9), 'e': torch.zeros(0)}
    assert change_norms(updates, before) == [0.] * 3 and change_norms([], before) == []
    assert client_drift(updates, before) == {'drift': 0., 'drift_max': 0., 'cosine': None}
    assert len(screen_updates(updates, before, norm_limit=1e-9, weight_limit=1.)[0]) == 3

def left(values, limit):
    "Indices that stay: an oracle in the words of the rule."
    if len(values) < 3: return [i for i, v in enumerate(values) if v != inf]
    above = sorted(v for v in values if v > 0 and v != inf)
    middle = above[(len(above) - 1) // 2] if above else 0
    return [i for i, v in enumerate(values) if v != inf and not v > limit * middle]

lengths = st.one_of(st.just(0.), st.integers(1, 2000).map(float), st.just(1e30))

@settings(fast, max_examples=150)
@given(st.lists(st.tuples(lengths, st.integers(1, 5000)), min_size=1, max_size=8), st.sampled_from([1.5, 10., 100.]), st.sampled_from([1., 20., 1000.]), st.randoms(use_true_random=False))
def test_limits_keep_whom_an_oracle_keeps(clients, norm_limit, weight_limit, random):
    "First weights, then changes beside the median of those still in."
    updates = [Update(client=i, round=1, state={'w': torch.tensor([1. + x, 1.]), 'n': torch.tensor(i)}, weight=w) for i, (x, w) in enumerate(clients)]
    light = left([float(w) for _, w in clients], weight_limit)
    near = [light[i] for i in left([inf if clients[k][0] > 1e29 else clients[k][0] for k in light], norm_limit)]
    good, failures = screen_updates(random.sample(updates, len(updates)), {'w': torch.ones(2), 'n': torch.tensor(0)}, round=1, norm_limit=norm_limit, weight_limit=weight_limit)
    assert [u.client for u in good] == near
    assert [f.client for f in failures] == [i for i in range(len(updates)) if i not in near]
    for f in failures: assert f.reason.startswith('weight' if f.client not in light else 'change of norm') and 'more than' in f.reason

def test_limits_name_value_limit_and_median():
    updates = as_updates([{'w': torch.tensor([v])} for v in (.2, .21, .22, 3e10, .2)], [10, 20, 30, 40, 99999])
    good, failures = screen_updates(updates, {'w': torch.zeros(1)}, norm_limit=100, weight_limit=1000)
    assert [u.client for u in good] == [0, 1, 2]
    assert [f.as_row() for f in failures] == [{'client': 3, 'kind': 'diverged', 'reason': "change of norm 3e+10 is more than 100 times the round's median 0.21"},
                        {'client': 4, 'kind': 'invalid', 'reason': "weight 1e+05 is more than 1000 times the round's median 30"}]

@pytest.mark.parametrize('bad', range(1, 10))
def test_an_overflowing_change_is_left_out_however_many_there_are(bad):
    updates = as_updates([{'w': torch.tensor([1e30 if k < bad else 1.])} for k in range(10)], [1] * 10)
    assert [u.client for u in screen_updates(updates, {'w': torch.zeros(1)}, norm_limit=100.)[0]] == list(range(bad, 10))

def test_two_have_no_majority_and_no_limit_is_no_limit():
    updates = as_updates([{'w': torch.tensor([v])} for v in (1., 1e30, 2.)], [1, 10**12, 1])
    assert [u.client for u in screen_updates(updates[:2], {'w': torch.zeros(1)}, norm_limit=2., weight_limit=2.)[0]] == [0]  # an infinite norm
    assert len(screen_updates([updates[0], updates[2]], {'w': torch.zeros(1)}, norm_limit=2., weight_limit=2.)[0]) == 2
    assert len(screen_updates(updates, {'w': torch.zeros(1)})[0]) == 3
    assert statistics.median_low([1, 2, 3, 4]) == 2  # of two middle ones the lower: half the round being far off is enough to notice it

def test_bad_updates_do_not_shift_the_median():
    "A NaN, a stale one and a duplicate are gone before anybody is compared."
    updates = as_updates([{'w': torch.tensor([v])} for v in (1., 1., 1., 50.)], [1] * 4)
    noise = [Update(client=k, round=2, state={'w': torch.tensor([1e3])}, weight=1) for k in (7, 8, 9)] + [replace(updates[0], state={'w': torch.tensor([1e3])})]
    good, failures = screen_updates([*updates, *noise], {'w': torch.zeros(1)}, round=1, norm_limit=10.)
    assert [u.client for u in good] == [0, 1, 2] and [f.client for f in failures] == [0, 3, 7, 8, 9]

def test_checks_come_in_their_stated_order():
    "An update with every fault at once shows them one by one as they are mended."
    everything = Update(client=1, round=3, weight=nan, metrics={'train_loss': nan},
                        state={'a': torch.zeros(3), 'b': torch.zeros(2).half(), 'd': torch.zeros(1)})
    want = {'a': torch.zeros(2), 'b': torch.zeros(2), 'c': torch.zeros(1)}
    mends = [('weight', lambda u: replace(u, weight=1)), ('round', lambda u: replace(u, round=4)),
             ("missing 'c'", with_tensor('c', torch.tensor([nan]))),
             ("unexpected 'd'", lambda u: replace(u, state={k: v for k, v in u.state.items() if k != 'd'})),
             ("'b' has type", with_tensor('b', torch.zeros(2))), ("'a' has shape", with_tensor('a', torch.zeros(2))),
             ("non-finite values in 'c'", with_tensor('c', torch.zeros(1))), ('metric', lambda u: replace(u, metrics={}))]
    for text, mend in mends:
        assert text in check_update(everything, want, round=4).reason
        everything = mend(everything)
    assert check_update(everything, want, round=4) is None

def test_all_bad_leaves_nothing_and_the_rule_says_so():
    good, failures = screen_updates([with_value(nan)(healthy(c)) for c in (2, 1)], expected, round=4)
    assert good == [] and [f.client for f in failures] == [1, 2]
    with pytest.raises(InputError, match='states is empty'): FedAvg().step(expected, good)

def test_screening_takes_an_iterator_and_any_round_by_default():
    good, failures = screen_updates(iter([healthy(2, round=9), healthy(1, round=1)]), expected)
    assert [u.client for u in good] == [1, 2] and failures == []


# -- the rule ----------------------------------------------------------------------------------------------------------

def test_fedavg_replaces_what_was_sent_and_hands_on_the_rest():
    world = {'mask': torch.ones(2), **expected, 'tail': torch.tensor(nan)}
    after = FedAvg().step(world, (healthy(c) for c in (2, 1)))
    assert list(after) == list(world)
    assert after['mask'] is world['mask'] and after['tail'] is world['tail']
    assert after['bn.num_batches_tracked'] == 2

@pytest.mark.parametrize('world, text', [
    ({}, 'unexpected'), ({**expected, 'fc.bias': torch.zeros(5)}, r"'fc.bias' has shape \(4,\), expected \(5,\)"),
    ({**expected, 'fc.bias': torch.zeros(4).half()}, "'fc.bias' has type torch.float32, expected torch.float16")])
def test_fedavg_refuses_updates_of_another_model(world, text):
    with pytest.raises(InputError, match=f'updates do not fit the global state: .*{text}'): FedAvg().step(world, [healthy(1)])

def test_fedavg_has_no_memory_and_takes_nobody_elses():
    rule = FedAvg()
    rule.step(expected, [healthy(1)])
    assert rule.state_dict() == {} and repr(rule) == 'FedAvg()'
    rule.load_state_dict(rule.state_dict())
    with pytest.raises(InputError, match='FedAvg keeps no state'): rule.load_state_dict({'momentum': expected})


# -- the averaging gap -------------------------------------------------------------------------------------------------

def clients_of(seed, sizes, n, t=1.):
    "A chain of square layers, and `n` clients a random step of size `t` away; and the inputs."
    g = rng(seed, 'gap')
    normal = lambda *shape: torch.from_numpy(g.normal(size=shape))
    start = {f'{i}': normal(s, r) / r**0.5 for i, (r, s) in enumerate(itertools.pairwise(sizes))}
    steps = [{k: normal(*v.shape) for k, v in start.items()} for _ in range(n)]
    return start, [{k: v + t * d[k] for k, v in start.items()} for d in steps], normal(20, sizes[0])

def gated(inputs, start):
    "The outputs as a function of weights, with gates that `start` decided."
    gates, h = [], inputs
    for w in start.values(): h = h @ w.T; gates.append(h > 0); h = h * gates[-1]
    def f(state):
        h = inputs
        for w, g in zip(state.values(), gates): h = (h @ w.T) * g
        return h
    return f

@fast
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 2), st.lists(st.floats(1, 100), min_size=5, max_size=5))
def test_with_fixed_gates_training_any_single_layer_averages_exactly(seed, n, layer, weights):
    start, states, inputs = clients_of(seed, (3, 4, 4, 2), n)
    states = [{**start, f'{layer}': s[f'{layer}']} for s in states]
    f = gated(inputs, start)
    largest = max(float(f(s).abs().max()) for s in states) + 1
    assert averaging_gap(f, states, weights[:n]).abs().max() < 1e-12 * largest

@fast
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_with_fixed_gates_and_two_layers_half_the_step_leaves_a_quarter_of_the_gap(seed, n):
    gaps = []
    for t in (1., 0.5):
        start, states, inputs = clients_of(seed, (3, 16, 16), n, t)  # wide, so that some gates are open for any seed
        gaps.append(averaging_gap(gated(inputs, start), states, [1] * n))
    assert float(gaps[0].abs().max()) > 1e-3  # not exact, however the gates are fixed
    torch.testing.assert_close(gaps[1], gaps[0] / 4, rtol=1e-9, atol=1e-11)

def test_plot_gap_labels_the_exponent():
    import matplotlib
    from matplotlib.figure import Figure
    sizes = np.array([0.1, 1, 10])
    ax = plot_gap(sizes, {'square': 3 * sizes**2, 'root': sizes**0.5}, ax=Figure().subplots())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['square: slope 2.00', 'root: slope 0.50']
    assert ax.get_xscale() == ax.get_yscale() == 'log' and ax.get_xlabel() and ax.get_ylabel()


@fast
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=2), st.floats(0.01, 100), st.sampled_from([2., 100.]))
def test_one_or_two_clients_are_measured_by_what_is_usual(lengths, usual, limit):
    "Nobody within the limit of what is usual is left out, and who is left out is beyond what is usual and beyond the other."
    updates = as_updates([{'w': torch.tensor([v], dtype=torch.float64)} for v in lengths], [1] * len(lengths))
    good, failures = screen_updates(updates, {'w': torch.zeros(1, dtype=torch.float64)}, norm_limit=limit, usual_norm=usual)
    most = limit * max(usual, min(lengths))
    assert [u.client for u in good] == [k for k, v in enumerate(lengths) if v <= most]
    for f in failures: assert f.kind == FailureKind.DIVERGED and 'what is usual' in f.reason
    assert len(screen_updates(updates, {'w': torch.zeros(1, dtype=torch.float64)}, norm_limit=limit)[0]) == len(lengths)


@pytest.mark.parametrize('odd', [[], {}, 'three', 2.5, None, True])
def test_an_odd_client_id_is_left_out(odd):
    good, failures = screen_updates([healthy(1), replace(healthy(3), client=odd), healthy(2)], expected, round=4)
    assert [u.client for u in good] == [1, 2] and failures[0].client == -1 and 'no whole number' in failures[0].reason
