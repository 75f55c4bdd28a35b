"The server's half of SCAFFOLD and FedDyn: an oracle in plain numpy, and quadratic clients whose fixed points are known in closed form."
import functools, math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.server.aggregate import FedAvg, weighted_mean
from fedsq_nb.client.algorithms import FedDyn, Scaffold
from fedsq_nb.server.optimizers import FedDynAvg, ScaffoldAvg, with_control
from fedsq_nb.core import InputError, Update, copy_state, rng, state_hash
from fedsq_nb.engine.federate import Federation, Limits, Sampling
from fedsq_nb.client.learner import ClientContext, FedProx, LocalLearner, LocalLoss, LocalSGD, TrainMode

fast = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)

# ---- the oracle

SHAPES = {'layer.weight': (3, 2), 'layer.bias': (3,), 'scale': (), 'none': (0, 2)}

def drawn(g, names=SHAPES): return {n: torch.from_numpy(np.asarray(g.normal(size=SHAPES[n]))) for n in names}

@st.composite
def histories(draw, equal=False):
    "A federation's clients with their weights, and who takes part in each of several rounds."
    n, g = draw(st.integers(1, 6)), rng(draw(seeds), 'history')
    weights = np.ones(n) if equal else g.integers(1, 50, n) * draw(st.sampled_from([1., .37, 1e3]))
    return g, weights, [sorted(g.choice(n, g.integers(1, n + 1), replace=False).tolist()) for _ in range(draw(st.integers(1, 6)))]

def close(got, want):
    assert got.keys() == want.keys()
    for n in want: np.testing.assert_allclose(got[n].numpy(), want[n], rtol=1e-6, atol=1e-9, err_msg=n)

@fast
@given(histories(), st.randoms(use_true_random=False))
def test_scaffold_follows_the_paper(history, random):
    "x moves to the mean of those who came, c by their change with all clients in the denominator."
    g, weights, rounds = history
    trained = ['layer.weight', 'scale', 'none']  # the bias has no control
    rule, state = ScaffoldAvg(total=float(weights.sum())), with_control(drawn(g), trained)
    x, c = {n: t.numpy().copy() for n, t in state.items() if n in SHAPES}, {n: np.zeros(SHAPES[n]) for n in trained}
    assert all(not state[f'control/{n}'].any() for n in trained)
    for t, clients in enumerate(rounds, 1):
        y, change = ({k: drawn(g, names) for k in clients} for names in (SHAPES, trained))
        updates = [Update(k, t, y[k] | {f'control/{n}': state[f'control/{n}'] + change[k][n] for n in trained}, weights[k]) for k in clients]
        random.shuffle(updates)
        state = rule.step(state, iter(updates))
        here = sum(weights[k] for k in clients)
        x = {n: sum(weights[k]/here * y[k][n].numpy() for k in clients) for n in x}
        c = {n: c[n] + sum(weights[k]/weights.sum() * change[k][n].numpy() for k in clients) for n in c}
        close(state, x | {f'control/{n}': v for n, v in c.items()})

@fast
@given(histories(), st.floats(.01, 10), st.randoms(use_true_random=False))
def test_feddyn_follows_the_paper(history, alpha, random):
    "Clients count alike, whatever they weigh; statistics of batch norms are averaged, counters are the largest."
    g, weights, rounds = history
    m, rule = len(weights), FedDynAvg(alpha, len(weights))
    more = lambda g: {'bn.running_mean': torch.from_numpy(g.normal(size=2)), 'bn.running_var': torch.from_numpy(g.random(2)), 'bn.num_batches_tracked': torch.tensor(int(g.integers(99)))}
    state = drawn(g) | more(g)
    theta, h = {n: state[n].numpy().copy() for n in SHAPES}, {n: np.zeros(s) for n, s in SHAPES.items()}
    for t, clients in enumerate(rounds, 1):
        ends = {k: drawn(g) | more(g) for k in clients}
        updates = [Update(k, t, ends[k], weights[k]) for k in clients]
        random.shuffle(updates)
        state = rule.step(state, iter(updates))
        for n in SHAPES:
            h[n] = h[n] - alpha/m * sum(ends[k][n].numpy() - theta[n] for k in clients)
            theta[n] = sum(ends[k][n].numpy() for k in clients)/len(clients) - h[n]/alpha
        averaged = {n: sum(ends[k][n].numpy() for k in clients)/len(clients) for n in ('bn.running_mean', 'bn.running_var')}
        close(state, theta | averaged | {'bn.num_batches_tracked': max(ends[k]['bn.num_batches_tracked'].item() for k in clients)})
        close(rule.state_dict(), {f'h/{n}': v for n, v in h.items()})

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_stay_and_are_summed_in_double(dtype):
    g, n = rng(0, 'narrow'), 5
    state = with_control({'w': torch.from_numpy(g.normal(size=8)).to(dtype)}, ['w'])
    ends = [{k: torch.from_numpy(g.normal(size=8)).to(dtype) for k in state} for _ in range(n)]
    updates = [Update(k, 1, e, k + 1.) for k, e in enumerate(ends)]
    c, dyn = ScaffoldAvg(total=30).step(state, updates)['control/w'], FedDynAvg(.5, 10).step({'w': state['w']}, [replace(u, state={'w': u.state['w']}) for u in updates])['w']
    assert c.dtype == dyn.dtype == dtype
    mean = weighted_mean([{k: t.double() for k, t in e.items()} for e in ends], [1, 2, 3, 4, 5])['control/w']
    ways = sum(e['w'].double() - state['w'].double() for e in ends)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(c.double(), mean/2, rtol=eps, atol=eps)
    torch.testing.assert_close(dyn.double(), state['w'].double() + ways/n + ways/10, rtol=2*eps, atol=2*eps)

# ---- laws

@fast
@given(histories())
def test_the_control_is_the_mean_of_all_clients_controls(history):
    g, weights, rounds = history
    state, own, rule = with_control(drawn(g), SHAPES), {k: {n: torch.zeros(s).double() for n, s in SHAPES.items()} for k in range(len(weights))}, ScaffoldAvg(float(weights.sum()))
    for t, clients in enumerate(rounds, 1):
        new = {k: drawn(g) for k in clients}
        updates = [Update(k, t, drawn(g) | {f'control/{n}': state[f'control/{n}'] + new[k][n] - own[k][n] for n in SHAPES}, weights[k]) for k in clients]
        state, own = rule.step(state, updates), own | new
        close({n: state[f'control/{n}'] for n in SHAPES}, {n: sum(w*own[k][n].numpy() for k, w in enumerate(weights))/weights.sum() for n in SHAPES})

@fast
@given(histories(), st.floats(.1, 10))
def test_clients_that_send_back_what_they_got_change_nothing(history, alpha):
    g, weights, rounds = history
    state = with_control(drawn(g), SHAPES) | {f'control/{n}': t for n, t in drawn(g).items()}
    for rule in (ScaffoldAvg(float(weights.sum())), FedDynAvg(alpha, len(weights))):
        for clients in rounds: assert state_hash(rule.step(state, [Update(k, 1, copy_state(state), weights[k]) for k in clients])) == state_hash(state)

@fast
@given(histories(), st.floats(.1, 10))
def test_what_a_rule_is_given_stays_as_it_was_and_shares_no_memory(history, alpha):
    g, weights, rounds = history
    begin = with_control(drawn(g), SHAPES)
    for rule in (ScaffoldAvg(float(weights.sum())), FedDynAvg(alpha, len(weights))):
        state = begin
        for clients in rounds:
            updates = [Update(k, 1, drawn(g) | {f'control/{n}': t for n, t in drawn(g).items()}, weights[k]) for k in clients]
            given, before = [state, *(u.state for u in updates), rule.state_dict()], []
            before = [state_hash(s) for s in given]
            new = rule.step(state, updates)
            assert [state_hash(s) for s in given] == before
            places = {t.untyped_storage().data_ptr() for s in given for t in s.values() if t.numel()}
            assert not places & {t.untyped_storage().data_ptr() for t in new.values() if t.numel()}
            state = new

def test_with_control_adds_zeros_of_the_same_kind_and_changes_nothing():
    state = {'w': torch.ones(2, dtype=torch.float16), 'b': torch.ones(3).double(), 'count': torch.tensor(3)}
    before, new = state_hash(state), with_control(state, iter(['w', 'b']))
    assert list(new) == ['w', 'b', 'count', 'control/w', 'control/b'] and list(state) == ['w', 'b', 'count'] and state_hash(state) == before
    for n in ('w', 'b'): assert new[f'control/{n}'].dtype == state[n].dtype and torch.equal(new[f'control/{n}'], torch.zeros_like(state[n]))

class Heavy:
    "A rule that remembers: server momentum of a half."
    def __init__(self): self.speed = {}
    def step(self, state, updates):
        assert not any(n.startswith('control/') for s in [state, *(u.state for u in updates)] for n in s)
        mean = FedAvg().step(state, updates)
        self.speed = {n: .5*self.speed.get(n, 0) + mean[n] - state[n] for n in state}
        return {n: state[n] + self.speed[n] for n in state}
    def state_dict(self): return dict(self.speed)
    def load_state_dict(self, d): self.speed = dict(d)
    def __repr__(self): return 'Heavy()'

@fast
@given(histories(), st.integers(0, 6), st.floats(.1, 10))
def test_rules_go_on_from_their_state_dict(history, at, alpha):
    g, weights, rounds = history
    makers = [lambda: ScaffoldAvg(float(weights.sum())), lambda: ScaffoldAvg(float(weights.sum()), Heavy()), lambda: FedDynAvg(alpha, len(weights)),
              lambda: ScaffoldAvg(float(weights.sum()), FedDynAvg(alpha, len(weights)))]
    ends = [[Update(k, t, drawn(g) | {f'control/{n}': v for n, v in drawn(g).items()}, weights[k]) for k in clients] for t, clients in enumerate(rounds, 1)]
    for make in makers:
        ways = []
        for stop in (None, min(at, len(rounds))):
            rule, state = make(), with_control(drawn(rng(1)), SHAPES)
            for t, updates in enumerate(ends):
                if t == stop:
                    old, rule = rule, make()
                    rule.load_state_dict(copy_state(old.state_dict()))
                    assert state_hash(rule.state_dict()) == state_hash(old.state_dict())
                state = rule.step(state, updates)
            ways.append((state_hash(state), state_hash(rule.state_dict())))
        assert ways[0] == ways[1]

def test_another_rule_for_the_weights_stands_beside_the_control():
    g = rng(2)
    state, plain, heavy = with_control(drawn(g), SHAPES), ScaffoldAvg(4.), ScaffoldAvg(4., Heavy())
    alone, rest = Heavy(), {n: t for n, t in state.items() if n in SHAPES}
    a = b = state
    for t in range(1, 4):
        updates = [Update(k, t, drawn(g) | {f'control/{n}': v for n, v in drawn(g).items()}, 1.) for k in (0, 2)]
        a, b, rest = plain.step(a, updates), heavy.step(b, updates), alone.step(rest, [replace(u, state={n: u.state[n] for n in SHAPES}) for u in updates])
        for n in SHAPES: assert torch.equal(b[n], rest[n]) and torch.equal(a[f'control/{n}'], b[f'control/{n}'])
    assert repr(heavy) == 'ScaffoldAvg(total=4, average=Heavy())' and repr(FedDynAvg(.5, 4)) == 'FedDynAvg(alpha=0.5, clients=4)'

def test_refusals():
    state = with_control({'w': torch.zeros(2)}, ['w'])
    updates = [Update(k, 1, copy_state(state), 2.) for k in range(3)]
    for total in (0, -1., math.nan):
        with pytest.raises(InputError, match='total'): ScaffoldAvg(total)
    with pytest.raises(InputError, match='weigh 6, more than all clients together: total is 5.9'): ScaffoldAvg(5.9).step(state, updates)
    ScaffoldAvg(6).step(state, updates)
    tenth = [replace(u, weight=.1) for u in updates]
    ScaffoldAvg(.3).step(state, tenth)  # 0.1 + 0.1 + 0.1 is a little more than 0.3
    for alpha in (0, 0., -.1, math.inf, -math.inf, math.nan):
        with pytest.raises(InputError, match='alpha'): FedDynAvg(alpha, 3)
    for clients in (0, -1):
        with pytest.raises(InputError, match='clients'): FedDynAvg(.1, clients)
    for rule in (ScaffoldAvg(6), FedDynAvg(.1, 3)):
        with pytest.raises(InputError, match='at least one client'): rule.step(state, [])
        with pytest.raises(InputError): rule.step(state, [updates[0], replace(updates[1], state={'w': torch.zeros(3), 'control/w': torch.zeros(3)})])
        with pytest.raises(InputError): rule.load_state_dict({'momentum/w': torch.zeros(2)})

def test_a_refused_round_leaves_feddyn_as_it_was():
    rule, state = FedDynAvg(.5, 2), {'w': torch.zeros(2)}
    state = rule.step(state, [Update(0, 1, {'w': torch.ones(2)}, 1.)])
    before = state_hash(rule.state_dict())
    with pytest.raises(InputError): rule.step(state, [Update(0, 2, {'w': torch.ones(2)}, 1.), Update(1, 2, {'w': torch.ones(3)}, 1.)])
    assert state_hash(rule.state_dict()) == before

# ---- quadratic clients: F_k(w) = (w - a_k)' H_k (w - a_k) / 2, with the module's own callbacks and rules

g = rng(7, 'quadratics')
N, SIZES, RATE = 4, np.array([1., 3., 2., 4.]), .2
SHARES, A = SIZES/SIZES.sum(), 2*g.normal(size=(N, 3))
ROTATIONS = [np.linalg.qr(g.normal(size=(3, 3)))[0] for _ in range(N)]
H = np.stack([q @ np.diag(g.uniform(.3, 3., 3)) @ q.T for q in ROTATIONS])
EYE = np.eye(3)

def zero_of(matrices, shares=SHARES): # where sum_k p_k M_k (w - a_k) = 0
    return np.linalg.solve(np.tensordot(shares, matrices, 1), sum(p * m @ a for p, m, a in zip(shares, matrices, A)))

OPTIMUM, ALIKE = zero_of(H), zero_of(H, np.full(N, 1/N))
def walked(steps): return np.stack([EYE - np.linalg.matrix_power(EYE - RATE*h, steps) for h in H]) # a walk of so many steps goes this part of the way to a_k

class Weights(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(3).double())
    def forward(self, x): return self.w

class Quadratics:
    "Local training for `Federation`: full gradients, so many steps a day."
    def __init__(self, callbacks, steps, momentum=0.): self.callbacks, self.steps, self.momentum, self.client_states = callbacks, steps, momentum, {}
    def __call__(self, state, client, round):
        net, xy = Weights(), [(torch.zeros(1), torch.zeros(1))]*self.steps
        net.w.data.copy_(state['w'])
        h, a = torch.from_numpy(H[client]), torch.from_numpy(A[client])
        learn = LocalLearner(DataLoaders(xy, []), net, loss_func=lambda w, y: .5*(w - a) @ h @ (w - a), opt_func=functools.partial(OptimWrapper, opt=LocalSGD, momentum=self.momentum),
                             default_cbs=False, cbs=[TrainMode(), LocalLoss(), *self.callbacks()])
        learn.context = ClientContext(client, round, state, self.client_states.get(client, {}), RATE, self.momentum, lambda: np.ones(1))
        learn.fit(1, RATE)
        return Update(client, round, {'w': net.w.detach().clone()} | learn.context.send, SIZES[client], {}, learn.context.keep)

def end(callbacks, rule, rounds, steps, per_round=None, control=False, **kwargs):
    "Where the federation arrives, and how far it went in its last round."
    start = {'w': torch.zeros(3).double()}
    fed = Federation(with_control(start, ['w']) if control else start, N, Quadratics(callbacks, steps, **kwargs), rule=rule, sampling=Sampling(per_round), seed=4, limits=Limits(norm_limit=None))
    fed.fit(rounds - 1)
    before = fed.state['w'].numpy()
    fed.fit(1)
    return fed.state['w'].numpy(), np.abs(fed.state['w'].numpy() - before).max()

@pytest.mark.parametrize('steps', [1, 2, 5, 10])
def test_fedavg_arrives_where_the_walks_cancel(steps):
    w, last = end(tuple, FedAvg(), {1: 100, 2: 60, 5: 40, 10: 30}[steps], steps)
    np.testing.assert_allclose(w, zero_of(walked(steps)), atol=1e-6)
    assert (np.abs(w - OPTIMUM).max() < 1e-5) == (steps == 1)  # one step is gradient descent on the whole

@pytest.mark.parametrize('mu', [.5, 2.])
def test_fedprox_arrives_where_the_springs_balance(mu):
    "Local problems solved to the end: y = (H + mu)^-1 (H a + mu w), so (H + mu)^-1 H (w - a_k) must cancel."
    w, last = end(lambda: [FedProx(mu)], FedAvg(), 22 if mu < 1 else 40, 70 if mu < 1 else 24)
    np.testing.assert_allclose(w, zero_of(np.stack([np.linalg.inv(h + mu*EYE) @ h for h in H])), atol=1e-6)
    assert np.abs(w - OPTIMUM).max() > 1e-2

@pytest.mark.parametrize('per_round', [None, 2])
@pytest.mark.parametrize('option, momentum', [(2, 0.), (2, .5)])
def test_scaffold_arrives_at_the_optimum(option, momentum, per_round):
    w, last = end(lambda: [Scaffold(option)], ScaffoldAvg(SIZES.sum()), 70 if per_round is None else 250, 4, per_round, True, momentum=momentum)
    np.testing.assert_allclose(w, OPTIMUM, atol=1e-6)

@pytest.mark.parametrize('per_round', [None, 2])
def test_feddyn_arrives_at_the_optimum_of_clients_that_count_alike(per_round):
    w, last = end(lambda: [FedDyn(1.)], FedDynAvg(1., N), 60 if per_round is None else 120, 12, per_round)
    np.testing.assert_allclose(w, ALIKE, atol=1e-6)
    assert np.abs(ALIKE - OPTIMUM).max() > 1e-2

class OfTheRound(ScaffoldAvg):
    "The known bug: the change of the control is divided by the clients of the round."
    def step(self, state, updates):
        updates = list(updates)
        return ScaffoldAvg(sum(u.weight for u in updates), self.average).step(state, updates)

def test_dividing_by_the_clients_of_the_round_misses_the_optimum():
    "With everybody there it is the same rule, and no such test would find it; with half of them it comes to rest somewhere else."
    whole, _ = end(lambda: [Scaffold()], OfTheRound(SIZES.sum()), 70, 4, None, True)
    half, last = end(lambda: [Scaffold()], OfTheRound(SIZES.sum()), 250, 4, 2, True)
    assert np.abs(whole - OPTIMUM).max() < 1e-6 and np.abs(half - OPTIMUM).max() > 1e-2 and last < 1e-4
