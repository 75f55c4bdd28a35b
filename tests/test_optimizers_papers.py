"Server optimisers against plain numpy written from the papers, over many rounds; reductions, laws, memory that survives, fixed points in closed form."
import json, math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.core import InputError, Update, copy_state, rng, state_hash
from fedsq_nb.server.optimizers import FedAdagrad, FedAdam, FedAvgM, FedNova, FedYogi

fast = settings(max_examples=40, deadline=None)
SHAPES = {'w': (3, 2), 'b': (), 'none': (0, 4), 'conv': (2, 1, 2)}

def draw(seed, *path, kind=torch.float64, scale=1.): return {n: torch.from_numpy(np.asarray(rng(seed, *path, n).normal(size=s)*scale)).to(kind) for n, s in SHAPES.items()}

def play(rule, seed, rounds=12, kind=torch.float64, scale=.1):
    "A random federation: clients come and go, with weights and steps of their own. Yields (before, updates, after)."
    state, gen = draw(seed, 'start', kind=kind), rng(seed, 'who')
    for t in range(1, rounds + 1):
        who = gen.choice(6, gen.integers(1, 6), replace=False)
        moves = {int(k): draw(seed, t, int(k), kind=kind, scale=scale) for k in who}
        updates = [Update(k, t, {n: v + m[n] for n, v in state.items()}, float(gen.integers(1, 50)), {'steps': int(gen.integers(1, 9))}) for k, m in moves.items()]
        kept = copy_state(state)
        new = rule.step(state, updates)
        assert state_hash(state) == state_hash(kept) and list(new) == list(state)
        yield state, updates, new
        state = new

# ---- oracles: a class a paper, on flat float64 vectors, sharing nothing with the package

def flat(state): return np.concatenate([np.asarray(state[n], dtype=np.float64).ravel() for n in SHAPES])
class Oracle:
    def __init__(self, **kw): self.__dict__.update(kw); self.t, self.v, self.m = 0, None, None
    def mean(self, x, ys, n): return sum(a*(y - x) for a, y in zip(n, ys)) / sum(n)
    def go(self, x, ys, n, steps):
        self.t += 1
        return x + self.way(x, ys, n, steps)
class HsuMomentum(Oracle):
    def way(self, x, ys, n, steps):
        self.v = self.mean(x, ys, n) + (self.beta*self.v if self.v is not None else 0)
        return self.eta*self.v
class Reddi(Oracle):
    def way(self, x, ys, n, steps):
        d = self.mean(x, ys, n)
        if self.m is None: self.m, self.v = np.zeros_like(x), np.full_like(x, 0. if self.corrected else self.tau**2)
        self.m = self.b1*self.m + (1 - self.b1)*d
        if self.kind == 'adagrad': self.v = self.v + d*d
        if self.kind == 'adam': self.v = self.b2*self.v + (1 - self.b2)*d*d
        if self.kind == 'yogi': self.v = np.array([v - (1 - self.b2)*q*((v > q)*1. - (v < q)) for v, q in zip(self.v, d*d)])
        m, v = self.m, self.v
        if self.corrected: return self.eta * math.sqrt(1 - self.b2**(self.t + 1)) / (1 - self.b1**(self.t + 1)) * m / (np.sqrt(v) + self.tau)
        return self.eta*m / (np.sqrt(v) + self.tau)
class Wang(Oracle):
    def way(self, x, ys, n, steps):
        p, a = np.array(n) / np.sum(n), [(1 - (1 - self.x)**s) / self.x if hasattr(self, 'x') else sum(sum(self.rho**j for j in range(i)) for i in range(1, s + 1)) for s in steps]
        return self.eta * sum(pk*ak for pk, ak in zip(p, a)) * sum(pk*(y - x)/ak for pk, y, ak in zip(p, ys, a))

PAIRS = {'FedAvgM': (FedAvgM(.7, .9), HsuMomentum(eta=.7, beta=.9)), 'FedAvgM, no momentum': (FedAvgM(1.3, 0.), HsuMomentum(eta=1.3, beta=0.)),
         **{f'{name}{" corrected" * c}': (kind(.1, b1, .95, .01, *[c]*c), Reddi(eta=.1, b1=b1, b2=.95, tau=.01, kind=word, corrected=c))
            for name, kind, word, b1 in (('FedAdagrad', FedAdagrad, 'adagrad', 0.), ('FedAdam', FedAdam, 'adam', .9), ('FedYogi', FedYogi, 'yogi', .8)) for c in (False, True) if not c or name == 'FedAdam'},
         'FedNova': (FedNova(), Wang(eta=1., rho=0.)), 'FedNova with momentum': (FedNova(.5, .9), Wang(eta=.5, rho=.9)), 'FedNova with proximal term': (FedNova(1., 0., .2), Wang(eta=1., rho=0., x=.2)), 'FedAvg, half way': (FedAvg(.5), HsuMomentum(eta=.5, beta=0.))}
def fresh(name):
    rule, oracle = PAIRS[name]
    kind, given = type(rule), {k: v for k, v in vars(rule).items() if k in ('lr', 'momentum', 'proximal', 'beta1', 'beta2', 'tau', 'bias_corrected')}
    return kind(**given), type(oracle)(**{k: v for k, v in vars(oracle).items() if k not in ('t', 'm', 'v')})

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('name', PAIRS)
def test_agrees_with_the_paper_over_many_rounds(name, seed):
    rule, oracle = fresh(name)
    x = None
    for before, updates, after in play(rule, seed):
        x = flat(before) if x is None else x
        x = oracle.go(x, [flat(u.state) + x - flat(before) for u in updates], [u.weight for u in updates], [u.metrics['steps'] for u in updates])
        np.testing.assert_allclose(flat(after), x, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_double_and_rounded_once(name, kind):
    rule, oracle = fresh(name)
    for i, (before, updates, after) in enumerate(play(rule, 3, rounds=1, kind=kind)):
        x = oracle.go(flat({n: t.double() for n, t in before.items()}), [flat({n: t.double() for n, t in u.state.items()}) for u in updates], [u.weight for u in updates], [u.metrics['steps'] for u in updates])
        slack = torch.finfo(kind).eps
        np.testing.assert_allclose(flat({n: t.double() for n, t in after.items()}), x, rtol=2*slack, atol=2*slack)
        assert all(t.dtype == kind for t in after.values())

# ---- laws

RULES = [lambda: FedAvg(), lambda: FedAvg(.5), lambda: FedAvgM(), lambda: FedAdagrad(), lambda: FedAdam(), lambda: FedYogi(), lambda: FedAdam(bias_corrected=True), lambda: FedNova(), lambda: FedNova(momentum=.9)]
def run(rule, seed, change=lambda us: us, rounds=4):
    state = draw(seed, 'start')
    for t in range(1, rounds + 1):
        updates = [Update(k, t, {n: v + d for (n, v), d in zip(state.items(), draw(seed, t, k, scale=.1).values())}, 3. + k, {'steps': 2 + k % 3}) for k in range(5)]
        state = rule.step(state, change(updates))
    return state

@pytest.mark.parametrize('make', RULES)
def test_order_does_not_matter_to_the_bit(make): assert state_hash(run(make(), 1)) == state_hash(run(make(), 1, lambda us: us[::-1])) == state_hash(run(make(), 1, lambda us: iter(us[2:] + us[:2])))

@fast
@given(st.sampled_from(range(len(RULES))), st.floats(1e-6, 1e6))
def test_only_ratios_of_weights_matter(which, scale):
    import dataclasses
    a, b = run(RULES[which](), 2), run(RULES[which](), 2, lambda us: [dataclasses.replace(u, weight=u.weight*scale) for u in us])
    for n in a: torch.testing.assert_close(a[n], b[n], rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('make', RULES)
def test_a_client_that_counts_twice_is_two_clients(make):
    import dataclasses
    twice = run(make(), 3, lambda us: [dataclasses.replace(us[0], weight=2*us[0].weight), *us[1:]], 1)
    apart = run(make(), 3, lambda us: [*us, dataclasses.replace(us[0], client=99)], 1)
    for n in twice: torch.testing.assert_close(twice[n], apart[n], rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('make', RULES)
def test_clients_that_stay_where_they_are_leave_the_model(make):
    state = draw(4, 'start')
    assert state_hash(make().step(state, [Update(k, 1, copy_state(state), 1. + k, {'steps': 3}) for k in range(4)])) == state_hash(state)

@pytest.mark.parametrize('make', [lambda: FedAvg(), lambda: FedNova(), lambda: FedNova(momentum=.9), lambda: FedAvgM(momentum=0.)])
def test_identical_updates_are_returned(make):
    state, new = draw(5, 'start'), draw(5, 'new')
    got = make().step(state, [Update(k, 1, copy_state(new), 1. + k, {'steps': 4}) for k in range(3)])
    for n in new: torch.testing.assert_close(got[n], new[n], rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('make', [lambda: FedAvgM(1., 0.), lambda: FedAvg(1.)])
def test_without_momentum_it_is_fedavg(make):
    a, b = run(make(), 6), run(FedAvg(), 6)
    for n in a: torch.testing.assert_close(a[n], b[n], rtol=1e-12, atol=1e-14)

def test_fednova_with_equal_steps_is_fedavg():
    import dataclasses
    equal = lambda us: [dataclasses.replace(u, metrics={'steps': 7}) for u in us]
    a, b = run(FedNova(momentum=.9), 7, equal), run(FedAvg(), 7, equal)
    for n in a: torch.testing.assert_close(a[n], b[n], rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('make', RULES)
def test_memory_survives_a_file_to_the_bit(make):
    whole, first, second = make(), make(), make()
    states = [s for s in play(whole, 8, rounds=8)]
    for before, updates, after in states[:4]: first.step(before, updates)
    kept = first.state_dict()
    tensors, rest = {n: t for n, t in kept.items() if isinstance(t, torch.Tensor)}, {n: t for n, t in kept.items() if not isinstance(t, torch.Tensor)}
    second.load_state_dict(json.loads(json.dumps(rest)) | safetensors.torch.load(safetensors.torch.save(copy_state(tensors))))
    for before, updates, after in states[4:]: assert state_hash(second.step(before, updates)) == state_hash(after)

@pytest.mark.parametrize('make', RULES)
def test_memory_of_another_rule_is_refused(make):
    with pytest.raises(InputError, match='resume with the rule that saved it'): make().load_state_dict({'h/w': torch.zeros(1)})

def test_memories_are_not_mixed_up():
    kinds = [FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova]
    for saved in kinds:
        rule = saved()
        run(rule, 1)
        for other in kinds:
            if other is saved: other().load_state_dict(rule.state_dict())
            else:
                with pytest.raises(InputError, match=f'{other.__name__} was given the memory of {saved.__name__}'): other().load_state_dict(rule.state_dict())

def test_small_changes_of_narrow_types_are_not_lost():
    'Nine clients at 1, one at 1 + 2**-7: the mean change is no bfloat16, and momentum gathers it.'
    rule, state = FedAvgM(momentum=.9), {'w': torch.ones(1, dtype=torch.bfloat16)}
    rule.step(state, [Update(k, 1, {'w': state['w'] + (2**-7 if k == 0 else 0)}, 1.) for k in range(10)])
    assert rule.state_dict()['v/w'].item() == pytest.approx(2**-7 / 10)

@pytest.mark.parametrize('make', [m for m in RULES[2:]])
def test_statistics_and_counters_are_averaged_not_optimised(make):
    before = {'w': torch.ones(2), 'bn.running_var': torch.tensor([1e-3]), 'bn.running_mean': torch.tensor([5.]), 'bn.num_batches_tracked': torch.tensor(3), 'flag': torch.tensor([True, False])}
    clients = [{'w': torch.zeros(2), 'bn.running_var': torch.tensor([v]), 'bn.running_mean': torch.tensor([m]), 'bn.num_batches_tracked': torch.tensor(n), 'flag': torch.tensor([False, False])} for v, m, n in ((0., 1., 7), (2e-4, 3., 5))]
    rule = make()
    for t in (1, 2, 3): new = rule.step(before, [Update(k, t, c, 1., {'steps': 2 + k}) for k, c in enumerate(clients)])
    assert new['bn.running_var'].item() == pytest.approx(1e-4) and new['bn.running_mean'].item() == 2. and new['bn.num_batches_tracked'].item() == 7 and new['flag'].tolist() == [False, False]

@pytest.mark.parametrize('make', RULES)
def test_no_updates_and_strange_ones_are_refused(make):
    rule, state = make(), draw(9, 'start')
    with pytest.raises(InputError): rule.step(state, [])
    with pytest.raises(InputError): rule.step({'w': torch.zeros(2)}, [Update(0, 1, {'v': torch.zeros(2)}, 1., {'steps': 1})])
    with pytest.raises(InputError): rule.step({'w': torch.zeros(2)}, [Update(0, 1, {'w': torch.zeros(3)}, 1., {'steps': 1})])
    if 'round' in rule.state_dict(): assert rule.state_dict()['round'] == 0

@pytest.mark.parametrize('make, words', [(lambda: FedAvg(0.), 'lr 0.0 of FedAvg'), (lambda: FedAvg(math.nan), 'lr nan'), (lambda: FedAvgM(momentum=-.1), 'momentum -0.1'), (lambda: FedAdam(beta1=1.), 'beta1 1.0'),
                                         (lambda: FedYogi(beta2=math.nan), 'beta2 nan'), (lambda: FedAdagrad(tau=0.), 'tau 0.0'), (lambda: FedNova(lr=-1.), 'lr -1.0'), (lambda: FedNova(momentum=1.), 'momentum 1.0')])
def test_settings_that_cannot_be(make, words):
    with pytest.raises(InputError, match=words): make()

# ---- fixed points on convex quadratics, in closed form

H, A, LR = np.array([1., 4., .5]), np.array([-1., 2., 5.]), .1
def ends(w, steps): return [a + (w - a)*(1 - LR*h)**s for h, a, s in zip(H, A, steps)]
def settle(rule, steps, weights, rounds=400):
    w = torch.zeros(1, dtype=torch.float64)
    for t in range(1, rounds + 1):
        w = rule.step({'w': w}, [Update(k, t, {'w': torch.tensor([e], dtype=torch.float64)}, n, {'steps': s}) for k, (e, n, s) in enumerate(zip(ends(w.item(), steps), weights, steps))])['w']
    return w.item()

@pytest.mark.parametrize('steps', [(1, 1, 1), (5, 5, 5), (2, 9, 20)])
@pytest.mark.parametrize('weights', [(1., 1., 1.), (5., 1., 2.)])
@pytest.mark.parametrize('rule, factor', [(FedAvg(), lambda s: 1.), (FedAvg(.5), lambda s: 1.), (FedAvgM(1., .5), lambda s: 1.), (FedNova(), lambda s: 1/s)])
def test_fixed_points_in_closed_form(rule, factor, steps, weights):
    "w = sum_k c_k (1 - r_k) a_k / sum_k c_k (1 - r_k), with r_k = (1 - lr h_k)^steps and c_k the rule's weight of a client's change."
    c = np.array([n*factor(s) for n, s in zip(weights, steps)]) * (1 - (1 - LR*H)**np.array(steps))
    rule = type(rule)(**{k: v for k, v in vars(rule).items() if k in ('lr', 'momentum')})
    assert settle(rule, steps, weights) == pytest.approx((c*A).sum() / c.sum(), abs=1e-8)

def test_fednova_removes_the_bias_of_unequal_steps():
    "With one Hessian and small steps the true optimum is the mean of the goals; FedAvg leans towards who takes more steps."
    a, steps, lr = np.array([0., 1.]), (1, 10), 1e-3
    def settle(rule):
        w = torch.zeros(1, dtype=torch.float64)
        for t in range(1, 8000): w = rule.step({'w': w}, [Update(k, t, {'w': torch.tensor([a[k] + (w.item() - a[k])*(1 - lr)**s], dtype=torch.float64)}, 1., {'steps': s}) for k, s in enumerate(steps)])['w']
        return w.item()
    assert abs(settle(FedNova()) - .5) < .01 and settle(FedAvg()) > .85
