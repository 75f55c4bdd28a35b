"Every server rule behind the guard: one poisoned client of ten leaves no trace, memory survives a checkpoint, and what the formulas come to in closed form."
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from fedsq_nb.server.aggregate import Failure, FailureKind, FedAvg, screen_updates
from fedsq_nb.core import InputError, Update, copy_state, rng, state_hash
from fedsq_nb.engine.federate import Federation, Sampling
from fedsq_nb.server.robust import Bulyan, FedMedian, FedTrimmedAvg, GeometricMedian, Krum, MultiKrum, NormClipping
from fedsq_nb.server.optimizers import FedAdagrad, FedAdam, FedAvgM, FedNova, FedYogi, ScaffoldAvg, with_control

fast = settings(max_examples=40, deadline=None)
nan, inf = float('nan'), float('inf')
OPTIMISERS = {'FedAvg': FedAvg, 'FedAvg, half way': lambda: FedAvg(.5), 'FedAvgM': FedAvgM, 'FedAdagrad': FedAdagrad, 'FedAdam': FedAdam, 'FedYogi': FedYogi,
              'FedAdam, corrected': lambda: FedAdam(bias_corrected=True), 'FedNova': FedNova, 'FedNova, momentum': lambda: FedNova(momentum=.9)}
ROBUST = {'FedMedian': FedMedian, 'FedTrimmedAvg': FedTrimmedAvg, 'Krum': lambda: Krum(1), 'MultiKrum': lambda: MultiKrum(1), 'Bulyan': lambda: Bulyan(1),
          'GeometricMedian': GeometricMedian, 'NormClipping': NormClipping, 'NormClipping, FedAdam': lambda: NormClipping(then=FedAdam())}
RULES = OPTIMISERS | ROBUST

START = {'conv.weight': torch.zeros(2, 3), 'narrow': torch.ones(5, dtype=torch.bfloat16), 'none': torch.zeros(0, 4), 'bn.running_var': torch.ones(3),
         'bn.num_batches_tracked': torch.tensor(0), 'flag': torch.tensor([False, True]), 'fc.bias': torch.zeros(4)}

def honest(state, client, round):
    "A step of about unit length in a direction that client and round decide."
    g = rng(0, 'round', round, 'client', client)
    move = lambda t: (t.double() + torch.from_numpy(g.normal(size=tuple(t.shape)))).abs().to(t.dtype) if t.is_floating_point() else t | True if t.dtype == torch.bool else t + client
    return Update(client, round, {n: move(t) for n, t in state.items()}, 10 + client, {'steps': 1 + client % 4, 'train_loss': .5})

def spoil(u, **tensors): return replace(u, state=u.state | tensors)
def bias(value): return lambda u: spoil(u, **{'fc.bias': torch.tensor([0., value, 0., 0.])})

POISONS = {'nan': bias(nan), 'inf': bias(inf), '-inf': bias(-inf), '1e30': bias(1e30), 'largest float': bias(torch.finfo(torch.float32).max), 'far': bias(1e4),
           'nan in a narrow type': lambda u: spoil(u, narrow=torch.full((5,), nan, dtype=torch.bfloat16)),
           'shape': lambda u: spoil(u, **{'fc.bias': torch.zeros(5)}), 'scalar': lambda u: spoil(u, **{'fc.bias': torch.tensor(0.)}),
           'dtype': lambda u: spoil(u, **{'fc.bias': torch.zeros(4).double()}), 'counter as float': lambda u: spoil(u, **{'bn.num_batches_tracked': torch.tensor(1.)}),
           'missing': lambda u: replace(u, state={n: t for n, t in u.state.items() if n != 'fc.bias'}), 'extra': lambda u: spoil(u, backdoor=torch.ones(1)),
           'not a tensor': lambda u: spoil(u, **{'fc.bias': [0.]*4}), 'nothing': lambda u: replace(u, state={}),
           **{f'weight {w}': lambda u, w=w: replace(u, weight=w) for w in (-1, 0, nan, inf, 1e12, '7', None)},
           'stale': lambda u: replace(u, round=u.round - 1), 'early': lambda u: replace(u, round=u.round + 1), 'nan loss': lambda u: replace(u, metrics=u.metrics | {'train_loss': nan})}

def rounds(make, poison=None, bad=3, n=3):
    "Final state and memory after rounds of ten clients, one of them poisoned; without poison, of the nine others."
    rule, state = make(), START
    for t in range(1, n + 1):
        sent = [honest(state, c, t) for c in range(10) if c != bad]
        if poison: sent.insert(t % 10, poison(honest(state, bad, t)))
        good, failures = screen_updates(sent, state, round=t, norm_limit=100., weight_limit=1000.)
        assert [f.client for f in failures] == ([bad] if poison else [])
        state = rule.step(state, good)
    return state, rule.state_dict()

@pytest.fixture(scope='module')
def clean(): return {name: rounds(make) for name, make in RULES.items()}

def same(a, b):
    tensors = lambda d: {n: t for n, t in d.items() if isinstance(t, torch.Tensor)}
    others = lambda d: {n: v for n, v in d.items() if not isinstance(v, torch.Tensor)}
    return state_hash(tensors(a)) == state_hash(tensors(b)) and others(a) == others(b) and list(a) == list(b)

@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('poison', POISONS)
def test_one_poisoned_client_of_ten_leaves_no_trace_in_model_or_memory(poison, rule, clean):
    state, memory = rounds(RULES[rule], POISONS[poison])
    assert same(state, clean[rule][0]) and same(memory, clean[rule][1])

@pytest.mark.parametrize('rule', RULES)
def test_a_client_that_sends_again_is_heard_once(rule, clean):
    bare, state = RULES[rule](), START
    for t in (1, 2, 3):
        sent = [honest(state, c, t) for c in range(10) if c != 3]
        good, failures = screen_updates([*sent, bias(1e3)(sent[2]), sent[2]], state, round=t, norm_limit=100., weight_limit=1000.)
        assert failures == [Failure(2, FailureKind.INVALID, 'duplicate of client 2')]*2
        state = bare.step(state, good)
    assert same(state, clean[rule][0])

@pytest.mark.parametrize('rule', RULES)
def test_the_model_keeps_its_names_types_and_shapes_and_the_inputs_their_bits(rule):
    bare, sent = RULES[rule](), [honest(START, c, 1) for c in range(9)]
    kept = state_hash(START), [state_hash(u.state) for u in sent]
    after = bare.step(START, sent)
    assert [(n, t.dtype, t.shape) for n, t in after.items()] == [(n, t.dtype, t.shape) for n, t in START.items()]
    assert all(t.isfinite().all() for t in after.values()) and (after['bn.running_var'] >= 0).all()
    for t in after.values(): t.zero_()
    assert (state_hash(START), [state_hash(u.state) for u in sent]) == kept


# -- memory and checkpoints --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stop', [1, 3])
@pytest.mark.parametrize('rule', RULES)
def test_a_run_that_stopped_goes_on_with_the_same_bits(rule, stop, tmp_path):
    "Through a checkpoint of the engine: tensors in a file, the rest in its note."
    def federation(): return Federation(copy_state(START), 10, honest, rule=RULES[rule](), measure=lambda s: {'hash': state_hash(s)}, sampling=Sampling(9), seed=4)
    whole, first, second = federation(), federation(), federation()
    whole.fit(5)
    first.fit(stop)
    first.save(tmp_path, 'key')
    assert second.restore(tmp_path, 'key') and len(second.rows) == stop + 1
    second.fit(5 - stop)
    assert [r['hash'] for r in second.rows] == [r['hash'] for r in whole.rows]
    assert same(second.rule.state_dict(), whole.rule.state_dict())

@pytest.mark.parametrize('rule', RULES)
def test_what_was_saved_does_not_change_when_the_rule_goes_on(rule):
    bare = RULES[rule]()
    state = bare.step(START, [honest(START, c, 1) for c in range(9)])
    saved = bare.state_dict()
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in saved.items()}
    bare.step(state, [honest(state, c, 2) for c in range(9)])
    assert same(saved, kept)


# -- closed forms ------------------------------------------------------------------------------------------------------

def path(rule, change, n):
    "Where a weight stands after each of `n` rounds in which all clients add `change`."
    w, seen = torch.zeros(1, dtype=torch.float64), []
    for t in range(1, n + 1):
        w = rule.step({'w': w}, [Update(0, t, {'w': w + change}, 1)])['w']
        seen.append(w.item())
    return seen

numbers = st.floats(1e-3, 1e3).flatmap(lambda x: st.sampled_from([x, -x]))

@fast
@given(numbers, st.floats(0, .99), st.floats(.1, 2), st.integers(1, 12))
def test_momentum_is_a_geometric_sum(change, beta, lr, n):
    "v_t = change (1 - beta^t) / (1 - beta), and w is lr times the sum of them."
    want = [lr*change*sum((1 - beta**s) / (1 - beta) for s in range(1, t + 1)) for t in range(1, n + 1)]
    assert path(FedAvgM(lr, beta), change, n) == pytest.approx(want, rel=1e-9)

@fast
@given(numbers, st.floats(1e-3, 1), st.integers(1, 12))
def test_without_memory_adam_takes_equal_steps_and_adagrad_shrinking_ones(change, tau, n):
    """beta1 = beta2 = 0: Adam's v is the last square, so each step is change / (|change| + tau);
    Adagrad's is tau^2 + t change^2."""
    steps = [change / (abs(change) + tau)]*n
    assert path(FedAdam(1., 0., 0., tau), change, n) == pytest.approx([sum(steps[:t]) for t in range(1, n + 1)], rel=1e-9)
    shrinking = [change / ((tau**2 + t*change**2)**.5 + tau) for t in range(1, n + 1)]
    assert path(FedAdagrad(1., 0., 0., tau), change, n) == pytest.approx([sum(shrinking[:t]) for t in range(1, n + 1)], rel=1e-9)

@fast
@given(numbers, st.floats(1e-4, 1e-3), st.floats(.5, .99))
def test_yogi_moves_towards_the_square_by_a_share_of_the_square(change, tau, beta2):
    "While v is below the square it grows by (1 - beta2) of it each round, where Adam would close a share of the distance."
    rule, q = FedYogi(1., 0., beta2, tau), change**2
    assume(q > 100*tau**2)
    for t in range(1, 20):
        if tau**2 + (t - 1)*(1 - beta2)*q > q*(1 - 1e-9): break
        path(rule, change, 1)
        assert rule.state_dict()['v/w'].item() == pytest.approx(tau**2 + t*(1 - beta2)*q, rel=1e-9)

@fast
@given(st.integers(0, 2**32), st.floats(0, .95), st.integers(1, 30))
def test_fednovas_count_is_how_far_sgd_goes_on_a_slope(seed, momentum, steps):
    "On a constant gradient SGD with momentum moves by lr times gradient times ||a||_1: torch's own optimiser is the judge."
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd, slope = torch.optim.SGD([w], lr=.01, momentum=momentum), float(rng(seed, 'slope').normal())
    for _ in range(steps):
        w.grad = torch.full_like(w, slope)
        sgd.step()
    assert -w.item() == pytest.approx(.01*slope*FedNova(momentum=momentum).count(Update(0, 1, {}, 1, {'steps': steps})), rel=1e-9)

@fast
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_fedavgm_without_momentum_is_fedavg_to_one_rounding(seed, n):
    "The mean is not rounded before the change is taken, so the two may round to neighbours, and to nothing else."
    g = rng(seed, 'grid')
    grid = lambda: {'w': torch.from_numpy(g.integers(-2**20, 2**20, 50) / 2**10).float()}
    state = grid()
    updates = [Update(c, 1, grid(), float(g.integers(1, 99))) for c in range(n)]
    one, other = FedAvgM(1., 0.).step(state, updates)['w'], FedAvg().step(state, updates)['w']
    assert ((one == other) | (one == torch.nextafter(other, one))).all()

@pytest.mark.parametrize('lr', [.5, 1., 3.])
def test_fedavgs_learning_rate_leaves_statistics_alone(lr):
    before, after = START | {'bn.running_var': torch.full((3,), 2.)}, START | {'bn.running_var': torch.full((3,), .5), 'bn.num_batches_tracked': torch.tensor(4), 'fc.bias': torch.ones(4)}
    new = FedAvg(lr).step(before, [Update(0, 1, after, 1)])
    assert new['bn.running_var'].tolist() == [.5]*3 and new['bn.num_batches_tracked'] == 4 and new['fc.bias'].tolist() == [lr]*4

def test_fednova_names_the_client_that_does_not_count():
    sent = [honest(START, c, 1) for c in range(4)]
    for metrics in ({}, {'steps': 0}, {'steps': -3}):
        with pytest.raises(InputError, match='client 2 does not say'): FedNova().step(START, [*sent[:2], replace(sent[2], metrics=metrics), sent[3]])


# -- a rule of a user's own, with nothing but a step --------------------------------------------------------------------

class HalfWay:
    "What a user writes in four lines."
    def step(self, global_state, updates):
        mean = FedAvg().step(global_state, updates)
        return {n: ((t.double() + mean[n].double())/2).to(t.dtype) for n, t in global_state.items()}

@pytest.mark.parametrize('around', [lambda rule: NormClipping(1e9, then=rule), lambda rule: ScaffoldAvg(1e6, rule)], ids=['clipping', 'scaffold'])
def test_a_rule_with_only_a_step_stands_within_others(around):
    state = {'w': torch.zeros(2)}
    if isinstance(around(HalfWay()), ScaffoldAvg): state = with_control(state, ['w'])
    rule, updates = around(HalfWay()), [Update(k, 1, {n: torch.ones(2) for n in state}, 1.) for k in range(3)]
    assert rule.step(state, updates)['w'].tolist() == [.5, .5]
    assert rule.state_dict() == {}
    rule.load_state_dict({})
    with pytest.raises(InputError, match='HalfWay keeps nothing'): rule.load_state_dict({'v/w': torch.zeros(1)})

@pytest.mark.parametrize('kind', [FedAdagrad, FedYogi, FedAdam])
def test_flowers_start_of_the_second_moment(kind):
    "Flower's v begins at 0: with beta1 = 0, tau = 1 and a change of 1 the first v is the rule's share of 1."
    rule = kind(1., 0., .5, 1., v0=0.)
    path(rule, 1., 1)
    assert rule.state_dict()['v/w'].item() == {FedAdagrad: 1., FedYogi: .5, FedAdam: .5}[kind]
    with pytest.raises(InputError, match='v0 -1.0'): kind(v0=-1.)
