"Client-level privacy: the rule against plain numpy, its sensitivity, its noise, and the account against closed forms."
import builtins, importlib.util, logging, math, multiprocessing, random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.core import InputError, Update, rng, state_hash
from fedsq_nb.server import privacy
from fedsq_nb.server.privacy import PrivateFedAvg, epsilon, noise_for, promise, system_normal, system_uniform

fast = settings(max_examples=50, deadline=None)
slow = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**32)
accounted = pytest.mark.skipif(importlib.util.find_spec('dp_accounting') is None, reason='needs dp-accounting')


def federation(seed, n, kind=torch.float64, scale=1., round=1):
    "A network's kinds of tensors, and n clients' updates around them."
    g = rng(seed, 'federation')
    make = lambda s: {'w': torch.from_numpy(s*g.normal(size=(2, 3))).to(kind), 'bn.running_mean': torch.from_numpy(s*g.normal(size=3)).to(kind),
                      'bn.running_var': torch.from_numpy(1 + s*g.uniform(0, 1, size=3)).to(kind), 'bn.num_batches_tracked': torch.tensor(int(g.integers(100))), 'none': torch.zeros(0, 2).to(kind)}
    return make(1.), [Update(k, round, make(scale*g.uniform(0.1, 3)), float(g.integers(1, 50))) for k in range(n)]

def vector(state): return np.concatenate([t.double().numpy().ravel() for t in state.values() if t.is_floating_point()])
def quiet(clip, clients=5, seed=0): return PrivateFedAvg(clip, 0., clients, seed)


# -- the rule --------------------------------------------------------------------------------------------------------------

def oracle(g, clients, clip, z, expected, seed, round):
    "On vectors: clip, add, divide, and one long draw of noise."
    total = np.zeros_like(g)
    for w in clients:
        way = w - g
        total += way / max(1., np.sqrt((way**2).sum()) / clip)
    noise = rng(seed, 'server', 'round', round, 'noise').normal(size=g.size)
    return g + total/expected + z*clip/expected*noise

@pytest.mark.parametrize('clip, z, expected', [(0.5, 0., 4), (1., 0.3, 6), (3., 1.1, 2), (1e9, 0., 5)])
def test_rounds_agree_with_plain_numpy(clip, z, expected):
    for seed in range(4):
        state, _ = federation(seed, 1)
        rule, at = PrivateFedAvg(clip, z, expected, seed), slice(9, 12)  # where the variances lie in the vector
        for t in range(1, 12):
            _, updates = federation(100*seed + t, 3 + t % 4, round=t)
            want = oracle(vector(state), [vector(u.state) for u in updates], clip, z, expected, seed, t)
            want[at] = want[at].clip(min=0)
            state = rule.step(state, updates)
            np.testing.assert_allclose(vector(state), want, rtol=1e-9, atol=1e-12)

@fast
@given(seeds, st.integers(1, 8))
def test_no_noise_and_no_limit_is_the_plain_mean_of_changes(seed, n):
    state, updates = federation(seed, n)
    mean = np.mean([vector(u.state) - vector(state) for u in updates], axis=0)
    np.testing.assert_allclose(vector(quiet(1e9, n).step(state, updates)), vector(state) + mean, atol=1e-12)
    equal = [replace(u, weight=1.) for u in updates]
    np.testing.assert_allclose(vector(quiet(1e9, n).step(state, updates)), vector(FedAvg().step(state, equal)), atol=1e-12)

@fast
@given(seeds, st.integers(2, 8), st.floats(1e-3, 10), st.integers(1, 20), st.floats(1e-3, 1e30))
def test_a_client_that_stays_away_moves_the_result_by_no_more_than_its_limit(seed, n, clip, clients, scale):
    state, updates = federation(seed, n)
    updates[0] = replace(updates[0], state=federation(seed + 1, 1, scale=scale)[1][0].state)
    free = {k: t for k, t in state.items() if not k.endswith('running_var')}  # the clamp is no part of the sum
    updates = [replace(u, state={k: u.state[k] for k in free}) for u in updates]
    with_, without = quiet(clip, clients).step(free, updates), quiet(clip, clients).step(free, updates[1:])
    assert np.linalg.norm(vector(with_) - vector(without)) <= clip/clients*(1 + 1e-9) + 1e-14

@fast
@given(seeds, st.integers(1, 8), st.floats(1e-3, 10), st.integers(1, 20))
def test_a_client_that_says_something_else_moves_it_by_twice_the_limit(seed, n, clip, clients):
    "The clamp of variances can only bring two results nearer to each other."
    state, updates = federation(seed, n)
    opposite = {k: 2*state[k] - t if t.is_floating_point() else t for k, t in updates[0].state.items()}
    other = [replace(updates[0], state=opposite), *updates[1:]]
    far = np.linalg.norm(vector(quiet(clip, clients).step(state, updates)) - vector(quiet(clip, clients).step(state, other)))
    assert far <= 2*clip/clients*(1 + 1e-9) + 1e-14

def test_the_bounds_are_reached():
    "Two clients that pull apart as hard as they may: a bound that is too wide would hide a wrong denominator."
    state, far = {'w': torch.zeros(4, dtype=torch.float64)}, torch.full((4,), 1e20, dtype=torch.float64)
    at = lambda *ways: quiet(3., 10).step(state, [Update(k, 1, {'w': w}, 1.) for k, w in enumerate(ways)])['w'].norm().item()
    assert (at(far), at(far, far), at(far, -far)) == pytest.approx((0.3, 0.6, 0.))

@fast
@given(seeds, st.floats(1e-3, 1e3))
def test_neither_weights_nor_metrics_nor_counters_matter(seed, weight):
    state, updates = federation(seed, 4)
    rule = PrivateFedAvg(1., 1., 4, seed)
    other = [replace(u, weight=weight*(k + 1), metrics={'train_loss': weight}, state=u.state | {'bn.num_batches_tracked': torch.tensor(k)}) for k, u in enumerate(updates)]
    after = rule.step(state, updates)
    assert state_hash(after) == state_hash(rule.step(state, other))
    assert after['bn.num_batches_tracked'] is state['bn.num_batches_tracked']

@fast
@given(seeds, st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter_to_the_bit(seed, random):
    state, updates = federation(seed, 6)
    rule = PrivateFedAvg(1., 0.5, 6, seed)
    order = lambda u: replace(u, state={k: u.state[k] for k in random.sample(list(u.state), len(u.state))})
    assert state_hash(rule.step(state, updates)) == state_hash(rule.step(state, [order(u) for u in random.sample(updates, 6)]))

def test_inputs_are_never_written_to_and_results_are_new():
    state, updates = federation(0, 4)
    state['frozen'] = torch.ones(3)
    before = [state_hash(state)] + [state_hash(u.state) for u in updates]
    after = PrivateFedAvg(1., 1., 4, 0).step(state, updates)
    assert list(after) == list(state) and after['frozen'] is state['frozen']
    for k in ('w', 'bn.running_mean', 'bn.running_var'): after[k].fill_(9)
    assert [state_hash(state)] + [state_hash(u.state) for u in updates] == before

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_types_are_computed_in_float64_and_cast_once(kind):
    state, updates = federation(1, 4, kind=kind)
    wide = lambda s: {k: t.double() if t.is_floating_point() else t for k, t in s.items()}
    rule = PrivateFedAvg(1., 0.4, 4, 3)
    want = rule.step(wide(state), [replace(u, state=wide(u.state)) for u in updates])
    for k, t in rule.step(state, updates).items(): assert t.dtype == state[k].dtype and torch.equal(t, want[k].to(t.dtype))

def test_values_whose_squares_overflow_count_for_nothing_and_break_nothing():
    state, updates = federation(2, 3)
    wild = replace(updates[2], state={k: torch.full_like(t, 1.7e308) if t.is_floating_point() else t for k, t in updates[2].state.items()})
    got = vector(quiet(1.).step(state, [*updates[:2], wild]))
    assert np.isfinite(got).all() and np.linalg.norm(got - vector(quiet(1.).step(state, updates[:2]))) <= 1/5 + 1e-9

def test_a_limit_whose_square_overflows():
    state, updates = federation(2, 3)
    assert state_hash(quiet(1e200).step(state, updates)) == state_hash(quiet(1e9).step(state, updates))

def test_live_parameters_give_plain_tensors_without_a_graph():
    nets = [torch.nn.Linear(2, 1) for _ in range(3)]
    after = quiet(1.).step(dict(nets[0].named_parameters()), [Update(k, 1, dict(n.named_parameters()), 1.) for k, n in enumerate(nets)])
    assert not any(t.requires_grad for t in after.values())


# -- its noise -------------------------------------------------------------------------------------------------------------

def noise_of(rule, round=1, size=40_000, kind=torch.float64):
    state = {'a': torch.zeros(size, dtype=kind), 'b': torch.zeros(size // 2, 2, dtype=kind)}
    return vector(rule.step(state, [Update(0, round, state, 1.)]))

@pytest.mark.parametrize('clip, z, clients', [(1., 1., 1), (2., 0.5, 10), (0.1, 3., 7)])
def test_noise_is_gaussian_of_the_stated_size(clip, z, clients):
    drawn = noise_of(PrivateFedAvg(clip, z, clients, seed=4))
    assert kstest(drawn, norm(0, z*clip/clients).cdf).pvalue > 0.001
    assert drawn.std() == pytest.approx(z*clip/clients, rel=0.01) and abs(drawn.mean()) < 4*drawn.std()/drawn.size**0.5
    assert abs(np.corrcoef(drawn[:40_000], drawn[40_000:])[0, 1]) < 0.02  # two tensors do not share their noise

def test_noise_is_the_same_for_one_seed_and_round_and_new_otherwise():
    first = noise_of(PrivateFedAvg(1., 1., 5, seed=1), round=3)
    assert np.array_equal(first, noise_of(PrivateFedAvg(1., 1., 5, seed=1), round=3))
    for other in (noise_of(PrivateFedAvg(1., 1., 5, seed=2), round=3), noise_of(PrivateFedAvg(1., 1., 5, seed=1), round=4)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02

@fast
@given(seeds, st.integers(1, 6), st.floats(0.01, 5))
def test_noise_does_not_look_at_the_clients(seed, n, z):
    "The same numbers whoever answers, and however many."
    state, updates = federation(seed, n)
    free = {k: state[k] for k in ('w', 'bn.running_mean')}
    updates = [replace(u, state={k: u.state[k] for k in free}) for u in updates]
    noisy, plain = PrivateFedAvg(1., z, 5, seed), quiet(1., 5)
    differ = [vector(noisy.step(free, some)) - vector(plain.step(free, some)) for some in (updates, updates[:1])]
    np.testing.assert_allclose(*differ, atol=1e-12)

def test_noise_leaves_torchs_and_numpys_generators_alone():
    torch.manual_seed(0); np.random.seed(0)
    before = torch.get_rng_state().tolist(), str(np.random.get_state())
    noise_of(PrivateFedAvg(1., 1., 5, seed=1))
    assert (torch.get_rng_state().tolist(), str(np.random.get_state())) == before

def test_variances_end_at_zero_or_above_and_means_need_not():
    state, updates = federation(0, 2)
    names = {k: torch.zeros(2000, dtype=torch.float64) for k in ('x.running_var', 'x.running_mean', 'running_var_of_w')}
    after = PrivateFedAvg(1., 1., 1, 0).step(names, [Update(0, 1, names, 1.)])
    assert {k: bool((t < 0).any()) for k, t in after.items()} == {'x.running_var': False, 'x.running_mean': True, 'running_var_of_w': True}

def test_resuming_goes_on_with_the_same_bits():
    state, _ = federation(7, 1)
    whole = half = state
    for t in range(1, 7):
        if t == 4: (again := PrivateFedAvg(1., 0.7, 3, 9)).load_state_dict(PrivateFedAvg(1., 0.7, 3, 9).state_dict())
        rule = PrivateFedAvg(1., 0.7, 3, 9)
        updates = federation(t, 3, round=t)[1]
        whole, half = rule.step(whole, updates), (again if t >= 4 else rule).step(half, updates)
    assert state_hash(whole) == state_hash(half)


# -- noise that nobody can draw again ---------------------------------------------------------------------------------------

def test_noise_comes_from_the_operating_system_unless_a_seed_is_given():
    "No seed of anything makes it the same again: not the rule's settings, not numpy's, torch's or Python's generators."
    drawn = []
    for _ in range(3):
        random.seed(0); np.random.seed(0); torch.manual_seed(0)
        drawn.append(noise_of(PrivateFedAvg(1., 1., 5), round=3))
    for a, b in ((0, 1), (0, 2), (1, 2)): assert abs(np.corrcoef(drawn[a], drawn[b])[0, 1]) < 0.02
    assert PrivateFedAvg(1., 1., 5).seed is None

def test_one_rule_that_plays_a_round_twice_draws_twice():
    rule = PrivateFedAvg(1., 1., 5)
    assert abs(np.corrcoef(noise_of(rule, 4), noise_of(rule, 4))[0, 1]) < 0.02 and rule.releases == 2

def test_two_copies_of_one_process_do_not_draw_the_same():
    def first(): return noise_of(PrivateFedAvg(1., 1., 5), size=50).tolist()
    drawn = [in_a_fork(first) for _ in range(2)]
    assert not set(drawn[0]) & set(drawn[1])

def in_a_fork(make):
    "What `make` returns in a forked process."
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=lambda: there.send(make()))
    p.start()
    assert here.poll(60)
    got = here.recv()
    p.join()
    return got

@pytest.mark.parametrize('clip, z, clients', [(1., 1., 1), (2., 0.5, 10), (0.1, 3., 7)])
def test_the_systems_noise_is_gaussian_of_the_stated_size(clip, z, clients):
    drawn = noise_of(PrivateFedAvg(clip, z, clients))
    assert kstest(drawn, norm(0, z*clip/clients).cdf).pvalue > 1e-6  # chance decides here: once in a million
    assert drawn.std() == pytest.approx(z*clip/clients, rel=0.02) and abs(drawn.mean()) < 6*drawn.std()/drawn.size**0.5
    assert abs(np.corrcoef(drawn[:40_000], drawn[40_000:])[0, 1]) < 0.04

@fast
@given(st.lists(st.integers(0, 7), max_size=3))
def test_the_systems_normal_numbers_have_any_shape(shape):
    drawn = system_normal(tuple(shape))
    assert drawn.shape == tuple(shape) and drawn.dtype == np.float64 and np.isfinite(drawn).all()

@pytest.mark.parametrize('byte, u', [(0, 2.**-53), (255, 1.)])
def test_the_ends_of_the_uniform_numbers(byte, u, monkeypatch):
    "Never zero, whose logarithm is infinite; the longest normal number is 8.57."
    monkeypatch.setattr(privacy.secrets, 'token_bytes', lambda n: bytes([byte])*n)
    assert (system_uniform(3) == u).all() and np.isfinite(system_normal((4,))).all()
    assert np.abs(system_normal((4,))).max() <= math.sqrt(2*53*math.log(2)) + 1e-12

def test_the_mean_cannot_be_had_back_with_the_settings():
    "What the seed of a run in test mode gives away, to the last digits; without one nothing does."
    state, updates = federation(3, 5)
    exact = vector(quiet(1.).step(state, updates))
    at = slice(0, 9)  # apart from the variances, which end at zero
    def off(rule): return np.abs((vector(rule.step(state, updates)) - vector(PrivateFedAvg(1., 2., 5, 11).step(state, [replace(u, state=state) for u in updates[:1]])) + vector(state) - exact)[at]).max()
    assert off(PrivateFedAvg(1., 2., 5, 11)) < 1e-9 < 1e-3 < off(PrivateFedAvg(1., 2., 5))

# -- releases --------------------------------------------------------------------------------------------------------------

def test_a_run_that_goes_on_counts_what_may_have_been_played_and_lost():
    "Checkpoints after every third round; stopped after the fifth, after the sixth was drawn and not saved, and at once again."
    state, _ = federation(7, 1)
    def play(rule, rounds):
        for t in rounds: rule.step(state, federation(t, 3, round=t)[1])
        return rule.state_dict()
    saved = play(PrivateFedAvg(1., 1., 3, replayed=3), (1, 2, 3))
    assert saved == {'releases': 3}
    for n in (1, 2):  # it saves as soon as it goes on, so a second stop is counted as well
        again = PrivateFedAvg(1., 1., 3, replayed=3)
        again.load_state_dict(saved)
        saved = again.state_dict()
        play(again, (4, 5, 6))  # and is lost
        assert saved == {'releases': 3 + 3*n}
    assert again.releases == 3 + 3*2 + 3 >= 3 + 3 + 3  # never less than were drawn

def test_in_test_mode_the_same_round_is_the_same_release():
    rule = PrivateFedAvg(1., 1., 3, seed=2, replayed=5)
    rule.load_state_dict({'releases': 4})
    assert rule.releases == 4

# -- the promise in words --------------------------------------------------------------------------------------------------

@accounted
def test_a_seeded_run_says_that_it_promises_nothing():
    given = 1., 50, 0.2, 1e-5
    real, test = promise(*given, seeded=False), promise(*given, seeded=True)
    assert 'TEST MODE' not in real and 'differentially private' in real and f'({epsilon(*given):.3g}, 1e-05)' in real
    assert test.startswith('private: TEST MODE, no promise') and 'differentially private' not in test
    for said in (real, test): assert f'({epsilon(1., 50, 1., 1e-5):.3g}, 1e-05) towards those who know who took part' in said
    assert 'who took part' not in promise(1., 50, 1., 1e-5, seeded=False)
    assert 'at most 7 that were played again' in promise(*given, seeded=False, repeated=7)

# -- the account -----------------------------------------------------------------------------------------------------------

def balle_wang(z, delta):
    "The exact epsilon of a Gaussian mechanism of sensitivity 1 (arXiv 1805.06530, theorem 8)."
    spent = lambda e: norm.cdf(1/(2*z) - e*z) - math.exp(e + norm.logcdf(-1/(2*z) - e*z)) - delta
    return brentq(spent, 0, 2000) if spent(0) > 0 else 0.

@pytest.mark.parametrize('z, rounds, delta', [(0.5, 1, 1e-5), (1., 1, 1e-5), (2., 1, 1e-6), (5., 1, 1e-3), (20., 100, 1e-5), (40., 64, 1e-8), (3., 50, 1e-5)])
@accounted
def test_everybody_in_every_round_lies_just_above_the_exact_gaussian_mechanism(z, rounds, delta):
    exact = balle_wang(z/rounds**0.5, delta)
    assert exact <= epsilon(z, rounds, 1., delta) <= 1.2*exact

@pytest.mark.parametrize('z, rounds, delta', [(1., 1, 1e-5), (20., 100, 1e-5), (3., 50, 1e-5)])
@accounted
def test_everybody_in_every_round_is_renyi_of_the_gaussian(z, rounds, delta):
    "Least over orders of a/(2 z^2) a round, turned into (epsilon, delta) as in Canonne, Kamath and Steinke 2020."
    a = np.linspace(1.001, 1000, 2_000_000)
    least = (rounds*a/(2*z*z) + np.log1p(-1/a) - (math.log(delta) + np.log(a))/(a - 1)).min()
    assert least*(1 - 1e-9) <= epsilon(z, rounds, 1., delta) <= least*1.01

@pytest.mark.parametrize('z, q', [(1., 0.1), (2., 0.5), (1., 0.05), (4., 0.2)])
@accounted
def test_a_sampled_round_lies_above_the_exact_subsampled_gaussian(z, q):
    "The exact curve by integration of N(0, z^2) against its mixture with N(1, z^2); for a single round the account is generous."
    x = np.linspace(-15*z, 15*z + 1, 400_001)
    p, r = norm.pdf(x, 0, z), (1 - q)*norm.pdf(x, 0, z) + q*norm.pdf(x, 1, z)
    spent = lambda e: max(np.clip(r - math.exp(e)*p, 0, None).sum(), np.clip(p - math.exp(e)*r, 0, None).sum())*(x[1] - x[0]) - 1e-5
    exact = brentq(spent, 0, 50)
    assert exact*(1 - 1e-6) <= epsilon(z, 1, q, 1e-5) <= 1.7*exact

@pytest.mark.parametrize('z, rounds, q', [(1., 100, 0.1), (2., 50, 0.3), (0.7, 200, 0.02)])
@accounted
def test_many_sampled_rounds_lie_above_an_accountant_that_works_another_way(z, rounds, q):
    "Convolution of privacy losses instead of Renyi orders, by the same library; its answer is pessimistic by its grid, hence the thousandth."
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, pld
    event = SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(z)), rounds)
    tight = pld.PLDAccountant(value_discretization_interval=1e-3).compose(event).get_epsilon(1e-5)
    assert 0.999*tight <= epsilon(z, rounds, q, 1e-5) <= 1.25*tight

@slow
@example(0.6, 182, 0.8984375)
@given(st.floats(0.6, 20), st.integers(1, 300), st.floats(0.01, 0.9))
@accounted
def test_more_noise_less_rounds_and_fewer_clients_promise_more(z, rounds, q):
    e = epsilon(z, rounds, q, 1e-5)
    assert epsilon(1.2*z, rounds, q, 1e-5) < e < epsilon(z, 2*rounds, q, 1e-5)
    assert e <= epsilon(z, rounds, 1., 1e-5) and e <= epsilon(z, rounds, q, 1e-6)

@pytest.mark.parametrize('target, rounds, q', [(0.5, 20, 1.), (2., 100, 0.1), (8., 300, 0.02), (50., 5, 1.), (1., 1, 0.5)])
@accounted
def test_noise_for_a_promise_keeps_it_and_is_not_more_than_needed(target, rounds, q):
    z = noise_for(target, rounds, q, 1e-5)
    assert epsilon(z, rounds, q, 1e-5) <= target*(1 + 1e-9)
    assert epsilon(z*0.9999, rounds, q, 1e-5) > target

@accounted
def test_a_round_that_nearly_everybody_is_in_is_still_a_sampled_one(): assert epsilon(2., 10, 0.8, 1e-5) < 0.95*epsilon(2., 10, 1., 1e-5)

@pytest.mark.parametrize('z, rounds, q, repeated', [(2., 10, .3, 2), (1., 100, .1, 5), (4., 20, 1., 3)])
@accounted
def test_rounds_that_were_played_again_cost_more(z, rounds, q, repeated):
    plain, more = epsilon(z, rounds, q, 1e-5), epsilon(z, rounds, q, 1e-5, repeated=repeated)
    assert plain < more <= epsilon(z, rounds + repeated, 1., 1e-5)*(1 + 1e-9)
    assert epsilon(z, rounds, q, 1e-5, repeated=0) == plain
    assert epsilon(z, rounds, 1., 1e-5, repeated=repeated) == pytest.approx(epsilon(z, rounds + repeated, 1., 1e-5))
    assert epsilon(z, rounds, q, 1e-5, 'pld', repeated) <= more

@pytest.mark.parametrize('z, q', [(1., 0.1), (2., 0.5), (4., 0.2)])
@accounted
def test_a_round_that_is_played_again_with_the_same_clients_lies_below_the_account(z, q):
    "Two looks at one sampled sum are one look with noise z/sqrt(2); sampling helps once, and not twice."
    w = z/2**.5
    x = np.linspace(-15*w, 15*w + 1, 400_001)
    p, r = norm.pdf(x, 0, w), (1 - q)*norm.pdf(x, 0, w) + q*norm.pdf(x, 1, w)
    spent = lambda e: max(np.clip(r - math.exp(e)*p, 0, None).sum(), np.clip(p - math.exp(e)*r, 0, None).sum())*(x[1] - x[0]) - 1e-5
    exact = brentq(spent, 0, 50)
    assert exact <= epsilon(z, 1, q, 1e-5, repeated=1) and exact <= epsilon(z, 1, q, 1e-5, 'pld', repeated=1)*(1 + 1e-3)

@accounted
def test_no_noise_promises_nothing(): assert epsilon(0., 1, 0.5, 1e-5) == math.inf

@accounted
def test_the_library_is_quiet_and_heard_again_afterwards(caplog):
    log = logging.getLogger('absl')
    with caplog.at_level(logging.INFO, logger='absl'):
        epsilon(2., 100, 0.5, 1e-5)  # leaves out orders, and would say so
        assert not caplog.records and log.level == logging.INFO

def test_a_missing_library_is_named(monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.startswith('dp_accounting'): raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    for call in (lambda: epsilon(1., 10, 1., 1e-5), lambda: noise_for(1., 10, 0.1, 1e-5)):
        with pytest.raises(InputError, match=r'pip install "fedsq_nb\[privacy\]"'): call()
    quiet(1.).step(*federation(0, 2))  # the rule itself needs no accountant


@pytest.mark.parametrize('delta, rdp, pld', [(10**-6.6, 1.68, 1.12), (1e-5, 1.21, .72)])
@accounted
def test_known_values_of_both_accountants(delta, rdp, pld):
    "A hundredth of the clients, z = 1, a hundred rounds: Renyi privacy is half too high and more."
    assert epsilon(1., 100, .01, delta) == pytest.approx(rdp, abs=.01) and epsilon(1., 100, .01, delta, accountant='pld') == pytest.approx(pld, abs=.01)

@pytest.mark.parametrize('z, q', [(1., 0.1), (2., 0.5), (1., 0.05), (4., 0.2)])
@accounted
def test_the_tighter_accountant_meets_the_exact_subsampled_gaussian(z, q):
    x = np.linspace(-15*z, 15*z + 1, 400_001)
    p, r = norm.pdf(x, 0, z), (1 - q)*norm.pdf(x, 0, z) + q*norm.pdf(x, 1, z)
    spent = lambda e: max(np.clip(r - math.exp(e)*p, 0, None).sum(), np.clip(p - math.exp(e)*r, 0, None).sum())*(x[1] - x[0]) - 1e-5
    assert epsilon(z, 1, q, 1e-5, accountant='pld') == pytest.approx(brentq(spent, 0, 50), rel=5e-3)

@pytest.mark.parametrize('z, rounds', [(2., 1), (20., 100), (3., 50)])
@accounted
def test_the_tighter_accountant_meets_the_exact_gaussian_mechanism(z, rounds):
    assert epsilon(z, rounds, 1., 1e-5, accountant='pld') == pytest.approx(balle_wang(z/rounds**0.5, 1e-5), rel=2e-3)

def test_an_unknown_accountant_is_refused():
    with pytest.raises(InputError, match="unknown accountant 'pdl': did you mean 'pld'"): epsilon(1., 10, 1., 1e-5, accountant='pdl')


# -- refusals --------------------------------------------------------------------------------------------------------------

nan, inf = float('nan'), float('inf')

@pytest.mark.parametrize('make, message', [
    (lambda: PrivateFedAvg(0, 1., 5, 0), 'clip 0'), (lambda: PrivateFedAvg(inf, 1., 5, 0), 'clip inf'), (lambda: PrivateFedAvg(nan, 1., 5, 0), 'clip nan'), (lambda: PrivateFedAvg(True, 1., 5, 0), 'clip True'),
    (lambda: PrivateFedAvg(1., -1., 5, 0), 'noise_multiplier -1.0'), (lambda: PrivateFedAvg(1., nan, 5, 0), 'noise_multiplier nan'),
    (lambda: PrivateFedAvg(1., 1., 0, 0), 'clients 0'), (lambda: PrivateFedAvg(1., 1., 2.5, 0), 'clients 2.5'),
    (lambda: epsilon(-1., 1, 1., 1e-5), 'noise_multiplier -1.0'), (lambda: epsilon(1., 0, 1., 1e-5), 'rounds 0'), (lambda: epsilon(1., 1.5, 1., 1e-5), 'rounds 1.5'),
    (lambda: epsilon(1., 1, 0., 1e-5), 'participation 0.0'), (lambda: epsilon(1., 1, 1.1, 1e-5), 'participation 1.1'), (lambda: epsilon(1., 1, nan, 1e-5), 'participation nan'),
    (lambda: epsilon(1., 1, 1., 0.), 'delta 0.0'), (lambda: epsilon(1., 1, 1., 1.), 'delta 1.0'), (lambda: noise_for(0., 1, 1., 1e-5), 'epsilon 0.0'), (lambda: epsilon(1., 1, 1., 1e-5, repeated=-1), 'repeated -1'), (lambda: PrivateFedAvg(1., 1., 5, replayed=0), 'replayed 0'), (lambda: noise_for(1., 1, -0.1, 1e-5), 'participation -0.1')])
def test_settings_are_checked(make, message):
    with pytest.raises(InputError) as e: make()
    assert str(e.value).startswith(message) and 'must be' in str(e.value)

def test_updates_that_do_not_fit_are_refused():
    state, updates = federation(0, 3)
    for bad in ({'w': state['w']}, state | {'c': torch.zeros(1)}, state | {'w': torch.zeros(3, 2, dtype=torch.float64)}, state | {'w': state['w'].float()}):
        with pytest.raises(InputError, match='does not fit|several'): quiet(1.).step(state, [*updates[:2], replace(updates[2], state=bad)])
    with pytest.raises(InputError, match='updates is empty'): quiet(1.).step(state, [])
    with pytest.raises(InputError, match=r'updates are of rounds \[1, 2\]'): quiet(1.).step(state, [updates[0], replace(updates[1], round=2)])
    with pytest.raises(InputError, match="was given 'm/w'"): quiet(1.).load_state_dict({'m/w': torch.zeros(1)})
    with pytest.raises(InputError, match="was given 'm/w'"): PrivateFedAvg(1., 1., 4).load_state_dict({'releases': 3, 'm/w': torch.zeros(1)})

def test_it_shows_its_settings(): assert repr(PrivateFedAvg(1., 0.5, 10, 3)) == 'PrivateFedAvg(clip=1.0, noise_multiplier=0.5, clients=10, seed=3)'


@accounted
def test_the_tighter_accountant_says_less():
    "One training by both accountants: what is said falls by four tenths, and neither says less than nothing."
    assert epsilon(1., 100, 0.01, 1e-5, 'pld') == pytest.approx(0.718, abs=0.01)
    assert epsilon(1., 100, 0.01, 1e-5) == epsilon(1., 100, 0.01, 1e-5, 'rdp') == pytest.approx(1.214, abs=0.01)
    with pytest.raises(InputError, match='accountant'): epsilon(1., 100, 0.01, 1e-5, 'gdp')
