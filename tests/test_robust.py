"Robust rules against plain numpy, and what they promise when some clients send anything at all."
import copy, itertools, json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize

from fedsq_nb.server import robust
from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.server.optimizers import ScaffoldAvg, with_control
from fedsq_nb.core import InputError, Update, rng, state_hash
from fedsq_nb.server.robust import Bulyan, FedMedian, FedTrimmedAvg, GeometricMedian, Krum, MultiKrum, NormClipping

fast = settings(max_examples=40, deadline=None)
rules = [FedMedian(), FedTrimmedAvg(0.2), FedTrimmedAvg(0.), Krum(1), MultiKrum(1), MultiKrum(1, keep=2), Bulyan(1), GeometricMedian(),
         NormClipping(), NormClipping(0.5), NormClipping(then=FedMedian())]
named = pytest.mark.parametrize('rule', rules, ids=repr)
seeds = st.integers(0, 2**32)


def federation(seed, n, d=7, scale=1., kind=torch.float64):
    "A global vector in two tensors, and n clients' updates around it."
    g = rng(seed, 'federation')
    cut = lambda v: {'a': torch.from_numpy(v[:3].copy()).to(kind), 'b': torch.from_numpy(v[3:].reshape(2, -1).copy()).to(kind)}
    start = g.normal(size=d)
    clients = start + scale*g.normal(size=(n, d)) * g.uniform(0.2, 3, size=(n, 1))
    return cut(start), [Update(k, 1, cut(w), float(g.integers(1, 50))) for k, w in enumerate(clients)]

def vector(state): return np.concatenate([t.double().numpy().ravel() for t in state.values() if t.is_floating_point()])
def vectors(updates): return np.stack([vector(u.state) for u in updates])
def like(state, v): return {'a': torch.from_numpy(v[:3].copy()), 'b': torch.from_numpy(v[3:].reshape(2, -1).copy())}
def one(values, weights=None): return [Update(k, 1, {'w': torch.tensor([v], dtype=torch.float64)}, (weights or [1.]*len(values))[k]) for k, v in enumerate(values)]
zero = {'w': torch.zeros(1, dtype=torch.float64)}


# -- oracles: one for each paper, on a (clients, numbers) array ------------------------------------------------------------

def o_median(x, w, g): return np.median(x, axis=0)

def o_trimmed(x, w, g, trim):
    n, out = len(x), []
    for column in x.T:
        kept, cut = sorted(column), int(trim*n)
        out.append(sum(kept[cut:n - cut]) / (n - 2*cut))
    return np.array(out)

def o_scores(x, f):
    scores = []
    for i in range(len(x)):
        d = sorted(((x[i] - x[j])**2).sum() for j in range(len(x)) if j != i)
        scores.append(sum(d[:max(1, len(x) - f - 2)]))
    return scores

def o_krum(x, w, g, f): return x[int(np.argmin(o_scores(x, f)))]

def o_multikrum(x, w, g, f, keep): return x[np.argsort(o_scores(x, f), kind='stable')[:keep or len(x) - f - 2]].mean(0)

def o_bulyan(x, w, g, f):
    n, left, chosen = len(x), list(x), []
    for _ in range(n - 2*f): chosen.append(left.pop(int(np.argmin(o_scores(np.array(left), f)))))
    return np.array([np.mean(sorted(column, key=lambda v: (abs(v - np.median(column)), v))[:n - 4*f]) for column in np.array(chosen).T])

def o_clip(x, w, g, limit, then):
    ways = [v - g for v in x]
    lengths = [np.sqrt((v**2).sum()) for v in ways]
    if limit is None: limit = sorted(lengths)[(len(x) - 1) // 2]
    return then(np.array([g + v*min(1., limit/d) for v, d in zip(ways, lengths)]), w, g)

def o_mean(x, w, g): return (np.array(w)[:, None] * x).sum(0) / sum(w)

def o_geometric(x, w, g):
    "Weiszfeld on the vectors themselves, for long."
    v, w = g, np.array(w) / sum(w)
    for _ in range(3000):
        beta = w / np.maximum(1e-6, np.sqrt(((x - v)**2).sum(1)))
        v = (beta[:, None]*x).sum(0) / beta.sum()
    return v

oracles = [(FedMedian(), o_median), (FedTrimmedAvg(0.2), lambda *a: o_trimmed(*a, 0.2)), (FedTrimmedAvg(0.34), lambda *a: o_trimmed(*a, 0.34)),
           (Krum(1), lambda *a: o_krum(*a, 1)), (Krum(2), lambda *a: o_krum(*a, 2)), (MultiKrum(1), lambda *a: o_multikrum(*a, 1, None)),
           (MultiKrum(2, keep=3), lambda *a: o_multikrum(*a, 2, 3)), (Bulyan(0), lambda *a: o_bulyan(*a, 0)), (Bulyan(1), lambda *a: o_bulyan(*a, 1)), (Bulyan(2), lambda *a: o_bulyan(*a, 2)),
           (NormClipping(), lambda *a: o_clip(*a, None, o_mean)), (NormClipping(1.3), lambda *a: o_clip(*a, 1.3, o_mean)),
           (NormClipping(0.7, then=FedMedian()), lambda *a: o_clip(*a, 0.7, o_median))]

@pytest.mark.parametrize('rule, oracle', oracles, ids=lambda r: repr(r) if not callable(r) else '')
def test_rounds_agree_with_plain_numpy(rule, oracle):
    "Twelve rounds in a row with changing clients; the next round begins where the last one ended."
    for seed in range(4):
        state, _ = federation(seed, 1)
        for t in range(12):
            _, updates = federation(100*seed + t, n=11 + (t + seed) % 5, scale=3.)
            want = oracle(vectors(updates), [u.weight for u in updates], vector(state))
            state = rule.step(state, updates)
            np.testing.assert_allclose(vector(state), want, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('n', [1, 2, 3, 6, 11])
def test_the_geometric_median_agrees_with_weiszfeld_on_the_vectors(n):
    state, _ = federation(n, 1)
    for t in range(5):
        _, updates = federation(50*n + t, n)
        want = o_geometric(vectors(updates), [u.weight for u in updates], vector(state))
        state = GeometricMedian().step(state, updates)
        np.testing.assert_allclose(vector(state), want, atol=1e-6)

@pytest.mark.parametrize('seed', range(5))
def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances(seed):
    state, updates = federation(seed, 6)
    x, w = vectors(updates), np.array([u.weight for u in updates])
    cost = lambda v: (w * np.sqrt(((x - v)**2).sum(1))).sum()
    found = vector(GeometricMedian().step(state, updates))
    best = minimize(cost, x.mean(0), method='Nelder-Mead', options=dict(maxiter=4000, maxfev=4000, xatol=1e-9, fatol=1e-12)).fun
    assert cost(found) <= best*(1 + 1e-6)

@fast
@given(seeds, st.integers(3, 12))
def test_blocks_make_no_difference(seed, n):
    "A few numbers at a time instead of all."
    state, updates = federation(seed, n, d=23)
    some = [FedMedian(), FedTrimmedAvg(0.3), GeometricMedian(), NormClipping()] + [MultiKrum(0)] + [Bulyan(1)]*(n >= 7)
    whole, room = [r.step(state, updates) for r in some], robust.NUMBERS_AT_A_TIME
    try:
        robust.NUMBERS_AT_A_TIME = 2*n
        assert [s.stop - s.start for s in robust.coordinate_blocks(5, n)] == [2, 2, 1]
        for r, w in zip(some, whole): np.testing.assert_allclose(vector(r.step(state, updates)), vector(w), rtol=1e-9, atol=1e-12)
    finally: robust.NUMBERS_AT_A_TIME = room


# -- properties of all rules -----------------------------------------------------------------------------------------------

@named
@fast
@given(seeds, st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter_to_the_bit(rule, seed, random):
    state, updates = federation(seed, 9, kind=torch.float32)
    assert state_hash(rule.step(state, updates)) == state_hash(rule.step(state, random.sample(updates, 9)))

@named
@fast
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_identical_updates_come_back(rule, seed, kind):
    state, (update, *_) = federation(seed, 1, kind=kind)
    if isinstance(rule, NormClipping) and rule.limit: rule = NormClipping(1e9)
    same = [replace(update, client=k, state=copy.deepcopy(update.state), weight=float(k + 1)) for k in range(8)]
    assert state_hash(rule.step(state, same)) == state_hash(update.state)

@named
def test_nobody_moved_and_nothing_happens(rule):
    state, _ = federation(3, 1)
    still = [Update(k, 1, copy.deepcopy(state), 1.) for k in range(9)]
    assert state_hash(rule.step(state, still)) == state_hash(state)

@named
@fast
@given(seeds, st.floats(-100, 100))
def test_moving_everything_moves_the_result(rule, seed, by):
    state, updates = federation(seed, 9)
    shift = lambda s: {n: t + by for n, t in s.items()}
    moved = rule.step(shift(state), [replace(u, state=shift(u.state)) for u in updates])
    np.testing.assert_allclose(vector(moved), vector(rule.step(state, updates)) + by, atol=1e-6)

@named
@fast
@given(seeds, st.floats(0.1, 100))
def test_scaling_everything_scales_the_result(rule, seed, by):
    state, updates = federation(seed, 9)
    scale = lambda s: {n: t*by for n, t in s.items()}
    other = replace(rule, limit=rule.limit*by) if isinstance(rule, NormClipping) and rule.limit else rule
    scaled = other.step(scale(state), [replace(u, state=scale(u.state)) for u in updates])
    np.testing.assert_allclose(vector(scaled), by*vector(rule.step(state, updates)), atol=1e-6*max(1, by))

@named
def test_inputs_are_never_written_to_and_results_are_new(rule):
    state, updates = federation(5, 9, kind=torch.float32)
    state, frozen = state | {'frozen': torch.ones(2)}, state_hash(state)
    before, order = [state_hash(state)] + [state_hash(u.state) for u in updates], [u.client for u in updates]
    after = rule.step(state, updates)
    assert list(after) == ['a', 'b', 'frozen'] and after['frozen'] is state['frozen']
    for n in ('a', 'b'): after[n].fill_(77)
    assert [state_hash(state)] + [state_hash(u.state) for u in updates] == before and order == [u.client for u in updates]

@named
@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_types_are_computed_in_float64_and_cast_once(rule, kind):
    state, updates = federation(8, 9, kind=kind)
    wide = lambda s: {n: t.double() for n, t in s.items()}
    want = rule.step(wide(state), [replace(u, state=wide(u.state)) for u in updates])
    got = rule.step(state, updates)
    for n, t in got.items():
        assert t.dtype == kind and t.shape == state[n].shape
        if isinstance(rule, NormClipping): torch.testing.assert_close(t.double(), want[n], rtol=4*torch.finfo(kind).eps, atol=4*torch.finfo(kind).eps)  # the clipped update is cast, then the mean
        else: assert torch.equal(t, want[n].to(kind))

@named
def test_empty_and_scalar_tensors_and_layouts(rule):
    g = rng(0, 'layouts')
    make = lambda: {'none': torch.zeros(0, 3), 'scalar': torch.tensor(g.normal()), 'turned': torch.from_numpy(g.normal(size=(4, 3))).t(), 'n': torch.tensor(4)}
    state, updates = make(), [Update(k, 1, make(), 1.) for k in range(9)]
    got = rule.step(state, updates)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in state.items()}
    flat = lambda s: {n: t.contiguous() for n, t in s.items()}
    plain = rule.step(flat(state), [replace(u, state=flat(u.state)) for u in updates])
    assert all(torch.equal(got[n], plain[n]) for n in got)

@named
def test_a_state_of_nothing_that_is_averaged(rule):
    updates = [Update(k, 1, {'n': torch.tensor(5)}, 1.) for k in range(9)]
    assert rule.step({'n': torch.tensor(1)}, updates)['n'] == 5

@named
def test_live_parameters_give_plain_tensors_without_a_graph(rule):
    nets = [torch.nn.Linear(2, 1) for _ in range(10)]
    after = rule.step(dict(nets[9].named_parameters()), [Update(k, 1, dict(n.named_parameters()), 1.) for k, n in enumerate(nets[:9])])
    assert not any(t.requires_grad for t in after.values())

@named
def test_resume_and_the_state_of_another_rule(rule):
    assert rule.state_dict() == {} and json.dumps(rule.state_dict()) == '{}'
    rule.load_state_dict({})
    with pytest.raises(InputError, match="keeps no state but was given 'momentum/a'"): rule.load_state_dict({'momentum/a': torch.zeros(1)})
    assert eval(repr(rule)) == rule or isinstance(rule, NormClipping)

def test_clipping_hands_on_the_memory_of_its_rule():
    class Counts(FedAvg):
        n = 0
        def step(self, state, updates): self.n += 1; return super().step(state, updates)
        def state_dict(self): return {'n': self.n}
        def load_state_dict(self, d): self.n = d['n']
    rule, again = NormClipping(then=Counts()), NormClipping(then=Counts())
    rule.step(*federation(0, 3)); again.load_state_dict(rule.state_dict())
    assert again.then.n == 1

def test_a_robust_rule_stands_in_for_the_mean_of_scaffold():
    state = with_control(zero, ['w'])
    updates = [Update(k, 1, {'w': torch.tensor([v], dtype=torch.float64), 'control/w': torch.ones(1, dtype=torch.float64)}, 1.) for k, v in enumerate([1., 2., 1e30])]
    assert ScaffoldAvg(total=3, average=FedMedian()).step(state, updates)['w'] == 2


# -- integers --------------------------------------------------------------------------------------------------------------

def counts(values, kind=torch.int64): return [Update(k, 1, {'n': torch.tensor([v]).to(kind), 'w': torch.tensor([float(k)])}, 1.) for k, v in enumerate(values)]

@pytest.mark.parametrize('rule, want', [(FedMedian(), 5), (FedTrimmedAvg(0.2), 7), (FedTrimmedAvg(0), 2**62), (GeometricMedian(), 5), (Krum(1), 4),
                                        (MultiKrum(1, keep=1), 4), (MultiKrum(1), 5), (Bulyan(0), 2**62), (NormClipping(), 2**62)], ids=repr)
def test_whole_numbers_are_the_largest_of_what_is_kept(rule, want):
    "By their weights, 0 to 4, Krum trusts clients 1 and 2 most."
    got = rule.step({'n': torch.tensor([0]), 'w': torch.zeros(1)}, counts([2**62, 4, 5, 7, 1]))['n']
    assert (got.dtype, got.item()) == (torch.int64, want)

def test_whole_numbers_next_to_a_bulyan_median():
    "Clients 0 to 4 are chosen by their weights; of their numbers 4, 5 and 7 are nearest to the median 5."
    updates = counts([9, 5, 4, 7, 1, 6, 2**40])
    updates = [replace(u, state=u.state | {'w': torch.tensor([v])}) for u, v in zip(updates, [0., 1., 2., 3., 4., 5., 100.])]
    assert Bulyan(1).step({'n': torch.tensor([0]), 'w': torch.zeros(1)}, updates)['n'].item() == 7

@pytest.mark.parametrize('kind', [torch.uint8, torch.int16, torch.bool], ids=str)
@named
def test_types_of_whole_numbers_stay(rule, kind):
    got = rule.step({'n': torch.zeros(1).to(kind), 'w': torch.zeros(1)}, counts([1]*9, kind))
    assert got['n'].dtype == kind and got['n'].item() == 1


# -- bad clients -----------------------------------------------------------------------------------------------------------

anything = st.floats(-1e30, 1e30, allow_nan=False)

def attacked(data, seed, n, f, d=7):
    "n clients of which the f with random ids send what hypothesis likes: wild values, copies of others, all alike."
    state, updates = federation(seed, n, d)
    bad = sorted(rng(seed, 'bad').choice(n, f, replace=False).tolist())
    together = data.draw(st.booleans())
    values = [data.draw(st.lists(st.one_of(anything, st.floats(-3, 3)), min_size=d, max_size=d)) for _ in range(1 if together else f)] * (f if together else 1)
    for k, v in zip(bad, values): updates[k] = replace(updates[k], state=like(state, np.array(v)))
    return state, updates, [k for k in range(n) if k not in bad]

@pytest.mark.parametrize('rule, n, f', [(FedMedian(), 7, 3), (FedMedian(), 8, 3), (FedTrimmedAvg(0.3), 10, 3), (FedTrimmedAvg(0.45), 9, 4)], ids=str)
@fast
@given(st.data(), seeds)
def test_coordinates_stay_among_the_honest(rule, n, f, data, seed):
    state, updates, honest = attacked(data, seed, n, f)
    got, x = vector(rule.step(state, updates)), vectors(updates)[honest]
    assert (x.min(0) <= got).all() and (got <= x.max(0)).all()

@pytest.mark.parametrize('n, f', [(7, 1), (8, 1), (11, 2), (15, 3)])
@fast
@given(st.data(), seeds)
def test_bulyan_stays_within_the_honest_clients_own_width(n, f, data, seed):
    "A bad value may be kept when it is nearer to the median than honest ones: by so much, and no more."
    state, updates, honest = attacked(data, seed, n, f)
    got, x = vector(Bulyan(f).step(state, updates)), vectors(updates)[honest]
    width = x.max(0) - x.min(0)
    assert (x.min(0) - width <= got).all() and (got <= x.max(0) + width).all()

def test_a_bad_value_can_pull_bulyan_a_little_below_all_honest_ones():
    "Why the test above has a margin: 0.8 is nearer to the median 1.1 than 1.6 is. A second coordinate keeps the last two honest clients from being chosen."
    points = [(1., 0.), (1.1, 0.), (1.6, 0.), (1.6, 0.), (0.8, 0.), (1.3, 50.), (1.3, -50.)]
    updates = [Update(k, 1, {'w': torch.tensor(p, dtype=torch.float64)}, 1.) for k, p in enumerate(points)]
    got = Bulyan(1).step({'w': torch.zeros(2, dtype=torch.float64)}, updates)['w'][0].item()
    np.testing.assert_allclose(got, (0.8 + 1 + 1.1)/3)
    assert got < min(p[0] for k, p in enumerate(points) if k != 4)

@pytest.mark.parametrize('rule', [Krum, MultiKrum], ids=lambda r: r.__name__)
@pytest.mark.parametrize('n, f', [(5, 1), (7, 2), (9, 3)])
@fast
@given(seed=seeds, size=st.floats(3, 30), together=st.booleans())
def test_krum_takes_honest_clients_only_when_the_bad_ones_are_far(rule, n, f, seed, size, together):
    state, updates = federation(seed, n)
    g = rng(seed, 'far')
    bad = sorted(g.choice(n, f, replace=False).tolist())
    where = g.normal(size=7)
    for k in bad: updates[k] = replace(updates[k], state=like(state, 10.**size*(where if together else g.normal(size=7))))
    x = vectors(updates)
    honest = [k for k in range(n) if k not in bad]
    means = [x[list(c)].mean(0) for c in itertools.combinations(honest, 1 if rule is Krum else n - f - 2)]
    got = vector(rule(f).step(state, updates))
    assert any(np.allclose(got, m, rtol=1e-12, atol=1e-12) for m in means)

@fast
@given(st.data(), seeds, st.sampled_from([(5, 1), (9, 3)]))
def test_krum_always_answers_with_a_client(data, seed, size):
    state, updates, _ = attacked(data, seed, *size)
    assert state_hash(Krum(size[1]).step(state, updates)) in {state_hash(u.state) for u in updates}

@pytest.mark.parametrize('n, f', [(3, 1), (7, 3), (10, 4), (11, 5)])
@fast
@given(st.data(), seeds)
def test_the_geometric_median_breaks_down_at_half_and_not_before(n, f, data, seed):
    "With a share a < 1/2 of bad weight it stays within 2(1-a)/(1-2a) times the honest clients' largest distance from any point (Lopuhaa and Rousseeuw 1991)."
    state, updates, honest = attacked(data, seed, n, f)
    updates = [replace(u, weight=1.) for u in updates]
    got, x = vector(GeometricMedian().step(state, updates)), vectors(updates)[honest]
    centre, a = x.mean(0), f/n
    bound = 2*(1 - a)/(1 - 2*a) * np.sqrt(((x - centre)**2).sum(1)).max()
    assert np.linalg.norm(got - centre) <= bound*(1 + 1e-6) + 1e-5

def test_beyond_half_the_geometric_median_is_the_bad_ones():
    got = GeometricMedian().step(zero, one([1., 2., 1e6, 1e6, 1e6]))
    assert got['w'].item() > 9e5

def test_weight_is_what_counts_for_the_geometric_median():
    assert abs(GeometricMedian().step(zero, one([1., 2., 1e6], weights=[10., 10., 19.]))['w'].item()) < 3
    assert GeometricMedian().step(zero, one([1., 2., 1e6], weights=[10., 10., 21.]))['w'].item() > 9e5

@fast
@given(st.data(), seeds)
def test_a_clipped_client_moves_the_mean_by_its_share_of_the_limit(data, seed):
    state, updates, honest = attacked(data, seed, 8, 1)
    updates = [replace(u, weight=1.) for u in updates]
    bad = ({*range(8)} - {*honest}).pop()
    without = [replace(u, state=state) if u.client == bad else u for u in updates]
    rule = NormClipping(1.5)
    way = vector(rule.step(state, updates)) - vector(rule.step(state, without))
    assert np.linalg.norm(way) <= 1.5/8*(1 + 1e-6)

@pytest.mark.parametrize('rule', [FedMedian(), FedTrimmedAvg(0.2), Krum(1), MultiKrum(1), GeometricMedian(), NormClipping(1.)], ids=repr)
def test_squares_that_overflow(rule):
    "Values so large that their squares are infinite: the honest ones still decide, and nothing is NaN."
    state, updates = federation(2, 7)
    clean = vector(rule.step(state, updates[:6]))
    updates[6] = replace(updates[6], state=like(state, np.full(7, -1.7e308)))
    got = vector(rule.step(state, updates))
    assert np.isfinite(got).all() and np.abs(got - clean).max() < 5

def test_all_squares_overflow():
    with pytest.raises(InputError, match='overflows'): GeometricMedian().step(zero, one([1e200, 1e300]))

def test_distances_keep_their_digits_far_from_the_origin():
    "Weights of 1e6 and changes of 1e-3: products of weights would lose all of this."
    values = 1e-3*rng(0, 'small').normal(size=9)
    base = {'w': torch.full((1,), 1e6, dtype=torch.float64)}
    at = [replace(u, state={'w': u.state['w'] + base['w']}) for u in one(values.tolist())]
    best = int(np.argmin(o_scores((1e6 + values - 1e6)[:, None], 1)))
    assert torch.equal(Krum(1).step(base, at)['w'], at[best].state['w'])


# -- special cases and refusals --------------------------------------------------------------------------------------------

@fast
@given(seeds, st.integers(1, 12))
def test_nothing_trimmed_is_the_plain_mean(seed, n):
    state, updates = federation(seed, n)
    np.testing.assert_allclose(vector(FedTrimmedAvg(0.).step(state, updates)), vectors(updates).mean(0), rtol=1e-12, atol=1e-12)

@fast
@given(seeds, st.integers(3, 12))
def test_all_clients_kept_is_the_plain_mean(seed, n):
    state, updates = federation(seed, n)
    np.testing.assert_allclose(vector(MultiKrum(0, keep=n).step(state, updates)), vectors(updates).mean(0), rtol=1e-12, atol=1e-12)

@fast
@given(seeds, st.integers(3, 12))
def test_keeping_one_is_krum(seed, n):
    state, updates = federation(seed, n)
    assert state_hash(MultiKrum(0, keep=1).step(state, updates)) == state_hash(Krum(0).step(state, updates))

def test_a_limit_that_nobody_reaches_is_the_rule_itself_to_the_bit():
    state, updates = federation(1, 6, kind=torch.float32)
    for then in (FedAvg(), FedMedian()): assert state_hash(NormClipping(1e9, then=then).step(state, updates)) == state_hash(then.step(state, updates))

def test_ties_go_to_the_lower_client():
    for order in itertools.permutations([3., 0., 1., 2.]):
        assert Krum(0).step(zero, one(list(order)))['w'].item() == next(v for v in order if v in (1., 2.))

@pytest.mark.parametrize('n', [10, 20, 100])
def test_a_share_of_clients_is_cut_as_written(n):
    "0.29 times 100 is 28.999999999999996 in floating point."
    for percent in range(50):
        cut = percent*n // 100
        values = np.r_[np.full(cut, -1e9), np.full(n - 2*cut, 5.), np.full(cut, 1e9)].tolist()
        assert FedTrimmedAvg(percent/100).step(zero, one(values))['w'].item() == 5

def test_something_is_always_left():
    for n in range(1, 9): assert FedTrimmedAvg(0.4999999999).step(zero, one([3.]*n))['w'].item() == 3

@pytest.mark.parametrize('rule, least', [(Krum(1), 5), (Krum(3), 9), (MultiKrum(2), 7), (MultiKrum(1, keep=8), 8), (Bulyan(1), 7), (Bulyan(2), 11), (FedMedian(), 1), (NormClipping(), 1)], ids=str)
def test_too_few_clients_are_refused_with_the_numbers(rule, least):
    rule.step(zero, one([float(i) for i in range(least)]))
    with pytest.raises(InputError) as e: rule.step(zero, one([float(i) for i in range(least - 1)]))
    assert f'{rule} needs {least} or more updates and has {least - 1}: ask more clients' in str(e.value)

@pytest.mark.parametrize('make, message', [
    (lambda: FedTrimmedAvg(-0.1), 'trim -0.1'), (lambda: FedTrimmedAvg(0.5), 'trim 0.5'), (lambda: FedTrimmedAvg(float('nan')), 'trim nan'), (lambda: FedTrimmedAvg('0.1'), "trim '0.1'"),
    (lambda: Krum(1.5), 'malicious 1.5'), (lambda: Krum(True), 'malicious True'), (lambda: MultiKrum(-1), 'malicious -1'), (lambda: MultiKrum(1, keep=0), 'keep 0'), (lambda: Bulyan(None), 'malicious None'),
    (lambda: GeometricMedian(iterations=0), 'iterations 0'), (lambda: GeometricMedian(tolerance=-1), 'tolerance -1'), (lambda: GeometricMedian(smoothing=0), 'smoothing 0'),
    (lambda: NormClipping(0), 'limit 0'), (lambda: NormClipping(float('inf')), 'limit inf')])
def test_settings_are_checked_when_they_are_made(make, message):
    with pytest.raises(InputError) as e: make()
    assert str(e.value).startswith(message) and 'must be' in str(e.value)

@named
def test_updates_that_do_not_fit_are_refused(rule):
    state, updates = federation(0, 9)
    for bad in ({'a': updates[0].state['a']}, updates[0].state | {'c': torch.zeros(1)}, updates[0].state | {'a': torch.zeros(3)}, updates[0].state | {'a': torch.zeros(4, dtype=torch.float64)}):
        with pytest.raises(InputError, match='client'): rule.step(state, updates[:4] + [replace(updates[4], state=bad)] + updates[5:])
