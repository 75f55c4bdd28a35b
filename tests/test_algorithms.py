"Client algorithms against an oracle in plain numpy, written from the papers' equations, over many rounds; and the laws that days obey."
import copy, functools, gc, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.data.images import Format
from fedsq_nb.client.algorithms import FedDyn, Margins, Moon, Scaffold, contrast, gradient_count, head_only, margins, norm_names
from fedsq_nb.server.optimizers import FedDynAvg, ScaffoldAvg, with_control
from fedsq_nb.core import InputError, copy_state, rng, seeded, state_hash
from fedsq_nb.data.batches import Augment
from fedsq_nb.data.images import from_arrays
from fedsq_nb.engine.execute import Processes, serial
from fedsq_nb.engine.federate import Federation, Limits, Sampling, sample_clients
from fedsq_nb.client.learner import ClientContext, FedProx, LocalLearner, LocalLoss, LocalSGD, LocalTraining, TrainMode, evaluate, shared_state

fast, few = settings(max_examples=25, deadline=None), settings(max_examples=8, deadline=None)
FORM, gen = Format(1, (.5,), (.25,), 3), rng(0, 'test', 'clients')
LABELS = np.concatenate([[0, 1]*3, gen.integers(0, 4, 50)])  # the first client has two of the four classes
DATA = from_arrays(gen.integers(0, 256, (56, 3, 3), dtype='uint8'), LABELS, 'abcd')
PARTS = [np.arange(0, 6), np.arange(6, 27), np.arange(27, 38), np.arange(38, 56)]
SIZES, LR, MU, ALPHA, TAU, EPOCHS = [6, 21, 11, 18], .1, .3, .4, .5, 2

def fresh(make):
    "A network with the weights that all begin with."
    with seeded(1, 'model'): return make().double()

class Softmax(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(9, 4)
    def forward(self, x): return self.fc(x.double().flatten(1))

class Hidden(nn.Module):
    "One hidden layer, with dropout and batch norm in front if wanted."
    def __init__(self, dropout=0., norm=False):
        super().__init__()
        self.inner, self.dropout, self.bn, self.fc = nn.Linear(9, 5), nn.Dropout(dropout), nn.BatchNorm1d(9) if norm else nn.Identity(), nn.Linear(5, 4)
    def forward(self, x): return self.fc(torch.tanh(self.inner(self.dropout(self.bn(x.double().flatten(1))))))

class Normed(nn.Module):
    def __init__(self): super().__init__(); self.bn, self.fc = nn.BatchNorm1d(9), nn.Linear(9, 4)
    def forward(self, x): return self.fc(self.bn(x.double().flatten(1)))

def training(model, callbacks=tuple, **changes):
    return LocalTraining(model, DATA, changes.pop('parts', PARTS), FORM, callbacks=callbacks, **dict(lr=LR, epochs=EPOCHS, batch_size=4, momentum=0., seed=5) | changes)

def bits(update): return state_hash(update.state), state_hash(update.client_state)

# ---- the oracle: gradients by hand

def each(f, *states): return {n: f(*(s[n] for s in states)) for n in states[0]}

def logit_gradient(z, y):
    "Of the mean cross-entropy."
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p / len(y)

def softmax(w, x, y, shift=0.):
    d = logit_gradient(x @ w['fc.weight'].T + w['fc.bias'] + shift, y)
    return {'fc.weight': d.T @ x, 'fc.bias': d.sum(0)}

def hidden(w, x): return np.tanh(x @ w['inner.weight'].T + w['inner.bias'])

def head(w, x, y): return softmax(w, hidden(w, x), y)

def normed(w, x, y):
    "Also moves the statistics, as PyTorch does: a tenth of the batch's, with the unbiased variance."
    mean, var = x.mean(0), x.var(0)
    w['bn.running_mean'] = .9*w['bn.running_mean'] + .1*mean
    w['bn.running_var'] = .9*w['bn.running_var'] + .1*x.var(0, ddof=1)
    w['bn.num_batches_tracked'] = w['bn.num_batches_tracked'] + 1
    xhat = (x - mean) / np.sqrt(var + 1e-5)
    out = xhat*w['bn.weight'] + w['bn.bias']
    d = logit_gradient(out @ w['fc.weight'].T + w['fc.bias'], y)
    back = d @ w['fc.weight']
    return {'bn.weight': (back*xhat).sum(0), 'bn.bias': back.sum(0), 'fc.weight': d.T @ out, 'fc.bias': d.sum(0)}

def cosine_gradient(z, a):
    "Each image's cosine, and its gradient with respect to z."
    nz, na = (np.linalg.norm(v, axis=1, keepdims=True) for v in (z, a))
    cos = (z*a).sum(1, keepdims=True) / (nz*na)
    return cos, a/(nz*na) - cos*z/nz**2

def contrastive(w, x, y, known, last, mu, tau):
    "Cross-entropy plus mu times -log(e^(cos g/tau) / (e^(cos g/tau) + e^(cos l/tau)))."
    z = hidden(w, x)
    d = logit_gradient(z @ w['fc.weight'].T + w['fc.bias'], y)
    back = d @ w['fc.weight']
    if last:
        (cg, dg), (cl, dl) = cosine_gradient(z, hidden(known, x)), cosine_gradient(z, hidden(last, x))
        back = back + mu/len(y) / (1 + np.exp((cg - cl)/tau)) * (dl - dg)/tau
    inside = back * (1 - z**2)
    return {'inner.weight': inside.T @ x, 'inner.bias': inside.sum(0), 'fc.weight': d.T @ z, 'fc.bias': d.sum(0)}

# ---- the oracle: clients, each (day) -> weights at its end, what is kept, change of the control

def walk(d, gradient):
    "SGD with momentum and L2 penalty."
    w, speed = dict(d.w), {}
    for x, y in d.batches:
        for n, g in gradient(w, x, y).items():
            g = g + d.decay*w[n]
            speed[n] = d.rho*speed[n] + g if n in speed else g
            w[n] = w[n] - LR*speed[n]
    return w

def plain(d): return walk(d, softmax), {}, {}

def prox(d): return walk(d, lambda w, x, y: each(lambda g, p, start: g + MU*(p - start), softmax(w, x, y), w, d.w)), {}, {}

def scaffold(option, d):
    own = d.own or each(np.zeros_like, d.w)
    end = walk(d, lambda w, x, y: each(lambda g, mine, c: g - mine + c, softmax(w, x, y), own, d.c))
    K = len(d.batches)
    amount = K if d.rho == 0 else K/(1 - d.rho) - d.rho*(1 - d.rho**K)/(1 - d.rho)**2  # gradients that the steps amount to
    new = softmax(d.w, *d.whole) if option == 1 else each(lambda mine, c, x, y: mine - c + (x - y)/(amount*LR), own, d.c, d.w, end)
    return end, new, each(np.subtract, new, own)

def dyn(d):
    own = d.own or each(np.zeros_like, d.w)
    end = walk(d, lambda w, x, y: each(lambda g, p, start, mine: g + ALPHA*(p - start) - mine, softmax(w, x, y), w, d.w, own))
    return end, each(lambda mine, p, start: mine - ALPHA*(p - start), own, end, d.w), {}

def moon(d):
    end = walk(d, lambda w, x, y: contrastive(w, x, y, d.w, d.own, MU, TAU))
    return end, end, {}

def shifted(kind, d):
    n = d.counts.astype(float)
    with np.errstate(divide='ignore'): shift = -TAU*n**-.25 if kind == 'fedlc' else np.log(n)
    return walk(d, lambda w, x, y: softmax(w, x, y, np.where(n > 0, shift, -np.inf))), {}, {}

def staying(gradient, names, d):
    d.w = d.w | d.own
    end = walk(d, gradient)
    return {n: t for n, t in end.items() if n not in names}, {n: end[n] for n in names}, {}

def of_the_head(d):
    inner = {n: t.detach().numpy() for n, t in fresh(Hidden).inner.named_parameters(prefix='inner')}
    return walk(d, lambda w, x, y: head(w | inner, x, y)), {}, {}

NORMS = ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']

def kind(client, callbacks=tuple, make=Softmax, keeps='', server='mean', kept_names=(), **settings):
    return SimpleNamespace(client=client, callbacks=callbacks, make=make, keeps=keeps, server=server, kept_names=kept_names, settings=settings)

KINDS = {
    'fedavg': kind(plain), 'fedprox': kind(prox, lambda: [FedProx(MU)]),
    'scaffold II': kind(functools.partial(scaffold, 2), lambda: [Scaffold(2)], keeps='control/', server='control'),
    'scaffold I': kind(functools.partial(scaffold, 1), lambda: [Scaffold(1)], keeps='control/', server='control', batch_size=50, epochs=6),  # in one batch the order does not matter
    'feddyn': kind(dyn, lambda: [FedDyn(ALPHA)], keeps='dyn/', server='dyn'),
    'moon': kind(moon, lambda: [Moon(MU, TAU)], Hidden, keeps='last/'),
    'fedlc': kind(functools.partial(shifted, 'fedlc'), lambda: [Margins('fedlc', TAU)]), 'balanced': kind(functools.partial(shifted, 'balanced'), lambda: [Margins('balanced')]),
    'bias at home': kind(functools.partial(staying, softmax, ['fc.bias']), keeps='home/', kept_names=['fc.bias']),
    'norms at home': kind(functools.partial(staying, normed, NORMS), make=Normed, keeps='home/', kept_names=NORMS),
    'head only': kind(of_the_head, make=lambda: head_only(Hidden()))}

def controlled(state): return {n: t for n, t in state.items() if not n.startswith('control/')}

def beginning(k):
    state = {n: t for n, t in shared_state(fresh(k.make)).items() if n not in k.kept_names}
    return with_control(state, state) if k.server == 'control' else state

def rule_of(k): return {'mean': FedAvg, 'control': lambda: ScaffoldAvg(sum(SIZES)), 'dyn': lambda: FedDynAvg(ALPHA, len(SIZES))}[k.server]()

def oracle(k, train, rounds):
    "Yields the global state and what clients have kept after each of `rounds`, by the papers."
    begin = {n: t.numpy().copy() for n, t in beginning(k).items()}
    w, kept = controlled(begin), {}
    c, h, m = each(np.zeros_like, w), each(np.zeros_like, w), len(SIZES)
    for t, clients in enumerate(rounds, 1):
        ends, changes, n = {}, {}, {i: len(train.parts[i]) for i in clients}
        for i in clients:
            passes = train.batches(i, t)
            batches = [(x.double().flatten(1).numpy(), y.numpy()) for _ in range(train.epochs) for x, y in passes]
            whole = tuple(map(np.concatenate, zip(*batches[:len(passes)])))
            home = {name: v.numpy() for name, v in fresh(k.make).state_dict().items() if name in k.kept_names}
            d = SimpleNamespace(w=w, own=kept.get(i, home), c=c, batches=batches[:train.steps(i, t, len(batches))], whole=whole, rho=train.momentum, decay=train.weight_decay,
                                counts=np.array([(LABELS[train.parts[i]] == label).sum() for label in range(4)]))
            ends[i], kept[i], changes[i] = k.client(d)
        mean = each(lambda *ts: sum(n[i]*v for i, v in zip(clients, ts)) / sum(n.values()), *ends.values())
        if k.server == 'control': c = each(lambda old, *ts: old + sum(n[i]*v for i, v in zip(clients, ts)) / sum(SIZES), c, *changes.values())
        if k.server == 'dyn':
            h = each(lambda old, start, *ts: old - ALPHA/m * sum(v - start for v in ts), h, w, *ends.values())
            mean = each(lambda old, *ts: sum(ts)/len(ts) - old/ALPHA, h, *ends.values())
        w = mean
        yield w | ({f'control/{name}': v for name, v in c.items()} if k.server == 'control' else {}), {i: {k.keeps + name: v for name, v in own.items()} for i, own in kept.items() if own}

def real(k, train, rounds):
    "The same by the module."
    state, rule, kept = beginning(k), rule_of(k), {}
    for t, clients in enumerate(rounds, 1):
        train.client_states = kept
        updates = [train(state, i, t) for i in clients]
        state, kept = rule.step(state, updates), kept | {u.client: u.client_state for u in updates if u.client_state}
        yield state, kept

def close(got, want, tolerance=1e-9):
    assert got.keys() == want.keys()
    for n in want:
        if isinstance(want[n], dict): close(got[n], want[n], tolerance)
        else: assert np.abs(got[n].numpy() - want[n]).max() <= tolerance*max(np.abs(want[n]).max(), 1e-3), n

ALL, SOME = [[0, 1, 2, 3]]*5, [[0, 2], [1, 3], [0, 1, 3], [2], [0, 3], [1, 2, 3]]

SCENES = [(ALL, 0., 0., 0.), (ALL, .9, .05, 0.), (SOME, 0., 0., 0.), (SOME, .9, 0., 0.), (SOME, 0., .05, 0.), (SOME, .9, .05, .6)]

@pytest.mark.parametrize('rounds, momentum, weight_decay, stragglers', SCENES, ids=['all', 'all, momentum, decay', 'some', 'some, momentum', 'some, decay', 'stragglers, momentum, decay'])
@pytest.mark.parametrize('name', KINDS)
def test_rounds_follow_the_papers(name, rounds, momentum, weight_decay, stragglers):
    k = KINDS[name]
    train = training(fresh(k.make), k.callbacks, momentum=momentum, weight_decay=weight_decay, stragglers=stragglers, kept_names=k.kept_names, **k.settings)
    if stragglers: assert 3 < sum(train.steps(i, t, 10) is not None for t, clients in enumerate(rounds, 1) for i in clients) < sum(map(len, rounds))
    tolerance = 1e-6 if 'shifted' in str(k.client) else 1e-9  # margins are made in float32
    for (state, kept), (want, own) in zip(real(k, train, rounds), oracle(k, train, rounds), strict=True):
        close(state, want, tolerance)
        close(kept, own, tolerance)

def test_the_oracles_gradients_by_central_differences():
    g = rng(3, 'differences')
    x, y = g.normal(size=(6, 9)), g.integers(0, 4, 6)
    draw = lambda make: {n: g.normal(size=t.shape) for n, t in make().named_parameters()}
    def entropy(z): return (np.log(np.exp(z).sum(1)) - z[np.arange(6), y]).mean()
    def cos(a, b): return (a*b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    known, last = draw(Hidden), draw(Hidden)
    def moon_loss(w):
        z = hidden(w, x)
        a, b = np.exp(cos(z, hidden(known, x))/TAU), np.exp(cos(z, hidden(last, x))/TAU)
        return entropy(z @ w['fc.weight'].T + w['fc.bias']) + MU*np.mean(-np.log(a/(a + b)))
    def normed_loss(w): return entropy(((x - x.mean(0))/np.sqrt(x.var(0) + 1e-5)*w['bn.weight'] + w['bn.bias']) @ w['fc.weight'].T + w['fc.bias'])
    for make, loss, by_hand in ((Softmax, lambda w: entropy(x @ w['fc.weight'].T + w['fc.bias'] + [1, 2, 3, 4]), lambda w: softmax(w, x, y, [1, 2, 3, 4])),
                                (Hidden, moon_loss, lambda w: contrastive(w, x, y, known, last, MU, TAU)), (Normed, normed_loss, lambda w: normed(dict.fromkeys(NORMS, 0.) | w, x, y))):
        w = draw(make)
        for n, v in by_hand(w).items():
            for at in np.ndindex(v.shape):
                bump = np.zeros_like(v); bump[at] = 1e-5
                assert abs((loss(w | {n: w[n] + bump}) - loss(w | {n: w[n] - bump})) / 2e-5 - v[at]) < 1e-8

def test_every_algorithm_walks_elsewhere():
    "So that an oracle that agrees says something."
    ends = {}
    for name in ('fedavg', 'fedprox', 'scaffold II', 'feddyn', 'fedlc', 'balanced', 'bias at home'):
        k = KINDS[name]
        *_, (state, _) = real(k, training(fresh(k.make), k.callbacks, kept_names=k.kept_names), SOME)
        ends[name] = state['fc.weight']
    for a in ends:
        for b in ends: assert a == b or (ends[a] - ends[b]).abs().max() > 1e-3, (a, b)

# ---- through a federation

def played(k, execute=serial, per_round=None, **changes):
    train = training(fresh(k.make), k.callbacks, kept_names=k.kept_names, **k.settings | dict(momentum=.9) | changes)
    fed = Federation(beginning(k), 4, train, rule=rule_of(k), sampling=Sampling(per_round), seed=9, execute=execute)
    fed.fit(5)
    assert [r['state'] for r in fed.rows] == ['ok']*6 and all(r['failures'] == [] for r in fed.rows)
    return fed

@pytest.mark.parametrize('name', KINDS)
def test_a_federation_plays_the_same_rounds_serially_and_in_processes(name):
    k = KINDS[name]
    one = played(k, per_round=2, stragglers=.3)
    with Processes(2) as pool: two = played(k, pool, per_round=2, stragglers=.3)
    assert state_hash(one.state) == state_hash(two.state) and {i: state_hash(s) for i, s in one.client_states.items()} == {i: state_hash(s) for i, s in two.client_states.items()}
    *_, (want, own) = oracle(k, one.train, [sample_clients(4, 2, seed=9, round=t) for t in range(1, 6)])
    close(one.state, want, 1e-6)
    close(one.client_states, own, 1e-6)
    *_, (want, own) = oracle(k, one.train, [[0, 1, 2, 3]]*5)
    close(played(k, stragglers=.3).state, want, 1e-6)

# ---- reductions

FORMS = {'softmax': Softmax, 'dropout': lambda: Hidden(.5), 'batch norm': lambda: Hidden(norm=True)}

@few
@given(st.sampled_from([*FORMS]), st.integers(0, 3), st.integers(1, 99), st.sampled_from([0., .5, .9]), st.sampled_from([0., .1]))
def test_mu_zero_and_a_first_day_are_plain_to_the_bit(form, client, round, momentum, weight_decay):
    make, start = FORMS[form], shared_state(fresh(FORMS[form]))
    go = lambda callbacks: bits(training(fresh(make), callbacks, momentum=momentum, weight_decay=weight_decay)(start, client, round))[0]
    assert go(lambda: [FedProx(0.)]) == go(lambda: [Moon(MU)]) == go(tuple) != go(lambda: [FedProx(MU)])
    train = training(fresh(make), lambda: [Moon(0.)], momentum=momentum, weight_decay=weight_decay)
    train.client_states = {client: train(start, client, 1).client_state}
    assert state_hash(train(start, client, round).state) == go(tuple)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('option', [1, 2])
def test_zero_control_variates_make_scaffold_plain_to_the_bit(option, form):
    "Option I passes over the images first: that must leave their order, dropout and statistics as they would have been."
    model = fresh(FORMS[form])
    start, names = shared_state(model), [n for n, _ in model.named_parameters()]
    a = training(model, lambda: [Scaffold(option)], momentum=.9)(with_control(start, names), 1, 1)
    b = training(fresh(FORMS[form]), momentum=.9)(start, 1, 1)
    assert state_hash(controlled(a.state)) == state_hash(b.state) and a.metrics['train_loss'] == b.metrics['train_loss']

@few
@given(st.integers(0, 3), st.integers(1, 50), st.floats(0, .95), st.sampled_from([0., .2]))
def test_option_one_keeps_the_gradient_of_all_images_where_the_day_began(client, seed, momentum, weight_decay):
    g = rng(seed, 'weights')
    state = {n: torch.from_numpy(g.normal(size=t.shape)) for n, t in shared_state(fresh(Softmax)).items()}
    u = training(fresh(Softmax), lambda: [Scaffold(1)], momentum=momentum, weight_decay=weight_decay)(with_control(state, state), client, seed)
    x = ((DATA.images[PARTS[client]].double()/255 - .5)/.25).flatten(1).numpy()
    want = softmax({n: t.numpy() for n, t in state.items()}, x, LABELS[PARTS[client]])
    close(u.client_state, {f'control/{n}': v for n, v in want.items()}, 1e-6)  # pictures are made in float32

@few
@given(st.integers(0, 2**31), st.sampled_from([1, 2]), st.booleans(), st.sampled_from([0., .9]), st.sampled_from([0., .5]), st.booleans())
def test_the_corrections_of_all_clients_sum_to_zero(seed, option, equal, momentum, stragglers, everybody):
    "Weighed as the server weighs them, whoever takes part."
    g = rng(seed, 'sizes')
    sizes = [5]*5 if equal else g.integers(1, 12, 5)
    parts = np.split(g.permutation(56)[:sum(sizes)], np.cumsum(sizes)[:-1])
    train = training(fresh(Softmax), lambda: [Scaffold(option)], parts=parts, momentum=momentum, stragglers=stragglers)
    start = shared_state(fresh(Softmax))
    fed = Federation(with_control(start, start), 5, train, rule=ScaffoldAvg(sum(sizes)), sampling=Sampling(None if everybody else int(g.integers(1, 5))), seed=seed, limits=Limits(norm_limit=None))
    for t in range(1, 5):
        fed.round(t)
        for n in start:
            own = sum(len(p) * fed.client_states.get(i, {}).get(f'control/{n}', torch.zeros_like(start[n])) for i, p in enumerate(parts)) / sum(sizes)
            torch.testing.assert_close(fed.state[f'control/{n}'], own, rtol=0, atol=1e-12)
            assert own.abs().max() > 1e-4

@few
@given(st.integers(0, 2**31), st.floats(.01, 5), st.sampled_from([0., .9]))
def test_feddyn_keeps_the_sum_of_all_ways_walked(seed, alpha, momentum):
    g, train, ways = rng(seed, 'states'), training(fresh(Softmax), lambda: [FedDyn(alpha)], momentum=momentum), {}
    for t in range(1, 5):
        state = {n: torch.from_numpy(g.normal(size=v.shape)) for n, v in shared_state(train.model).items()}
        u = train(state, 2, t)
        train.client_states = {2: u.client_state}
        ways = {n: ways.get(n, 0) + u.state[n] - state[n] for n in state}
        for n in state: torch.testing.assert_close(u.client_state[f'dyn/{n}'], -alpha*ways[n], rtol=1e-9, atol=1e-12)

# ---- formulas

@fast
@given(st.integers(1, 300), st.floats(0, .99))
def test_gradient_count_in_closed_form(steps, rho):
    want = steps/(1 - rho) - rho*(1 - rho**steps)/(1 - rho)**2
    assert gradient_count(steps, rho) == pytest.approx(want, rel=1e-8)
    assert gradient_count(steps, 0.) == steps and gradient_count(1, rho) == 1 and steps <= gradient_count(steps, rho)*(1 + 1e-12) <= steps/(1 - rho)*(1 + 1e-9)
    place, speed = 0., 0.  # and by walking: gradient 1, rate 1
    for _ in range(steps): speed = rho*speed + 1; place += speed
    assert gradient_count(steps, rho) == pytest.approx(place, rel=1e-9)

def vectors(seed, b=3, d=4): return torch.from_numpy(rng(seed, 'vectors').normal(size=(3, b, d)))

@fast
@given(st.integers(0, 2**31), st.floats(.05, 10), st.floats(.1, 50))
def test_the_contrastive_loss(seed, tau, scale):
    z, known, last = vectors(seed)
    got = contrast(z, known, last, tau)
    one = lambda i, a=known, b=last: contrast(z[i:i+1], a[i:i+1], b[i:i+1], tau).item()
    difference = (F.cosine_similarity(z, known) - F.cosine_similarity(z, last)) / tau
    for want in (np.logaddexp(0, -difference.numpy()).mean(), np.mean([one(i) for i in range(3)])): assert got.item() == pytest.approx(want, rel=1e-9)
    for i in range(3): assert math.exp(-one(i)) + math.exp(-one(i, last, known)) == pytest.approx(1)  # the two networks share one probability
    torch.testing.assert_close(contrast(scale*z, known, last/scale, tau), got, rtol=1e-9, atol=0)  # lengths do not matter
    for limit in (contrast(z, known, known, tau), contrast(z, known, last, 1e9)): assert limit.item() == pytest.approx(math.log(2))
    least, most = contrast(known, known, -known, tau).item(), contrast(-known, known, -known, tau).item()
    assert least == pytest.approx(math.log1p(math.exp(-2/tau))) and most - least == pytest.approx(2/tau) and least <= got.item() <= most

@fast
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=6).filter(any), st.floats(.1, 3))
def test_margins_by_their_formulas(counts, tau):
    lc, balanced = margins(np.array(counts), 'fedlc', tau), margins(np.array(counts), 'balanced')
    for n, a, b in zip(counts, lc.tolist(), balanced.tolist()):
        if n: assert a == pytest.approx(-tau / n**.25, rel=1e-6) and b == pytest.approx(math.log(n), rel=1e-6, abs=1e-7)
        else: assert a == b == -math.inf
    order = np.argsort(counts, kind='stable')
    for m in (lc, balanced): assert (np.diff(m.numpy()[order][np.array(counts)[order] > 0]) >= 0).all()  # rarer classes have the lower logits
    with pytest.raises(InputError, match='kind of margin'): margins(np.array(counts), 'fedcl')

@pytest.mark.parametrize('callback', [lambda: [Margins('fedlc', 2.)], lambda: [Margins('balanced')]], ids=['fedlc', 'balanced'])
def test_classes_that_are_equally_frequent_shift_nothing(callback):
    index = np.concatenate([np.flatnonzero(LABELS == c)[:5] for c in range(4)])
    start = shared_state(fresh(Softmax))
    shifted, straight = (training(fresh(Softmax), cb, parts=[index], momentum=.9)(start, 0, 1).state for cb in (callback, tuple))
    for n in start: torch.testing.assert_close(shifted[n], straight[n], rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('callback', [lambda: [Margins('fedlc')], lambda: [Margins('balanced')]], ids=['fedlc', 'balanced'])
@pytest.mark.parametrize('momentum', [0., .9])
def test_rows_of_absent_classes_keep_their_bits(callback, momentum):
    start = shared_state(fresh(Softmax))
    for make, n in ((callback, 0), (tuple, 1)):
        state = training(fresh(Softmax), make, momentum=momentum)(start, 0, 1).state  # this client has classes 0 and 1
        for name in start: assert (state[name][2:] != start[name][2:]).any() == bool(n) and (state[name][:2] != start[name][:2]).all()

# ---- a day depends on what it is given

DAYS = {'fedprox': [FedProx(MU)], 'scaffold I': [Scaffold(1)], 'scaffold II': [Scaffold(2)], 'feddyn': [FedDyn(ALPHA)], 'moon': [Moon(MU, TAU)], 'fedlc': [Margins('fedlc')],
        'many at once': [FedProx(MU), Scaffold(2), FedDyn(ALPHA), Moon(MU), Margins('balanced')]}

def any_day(name, make=lambda: Hidden(.3), **changes):
    model = fresh(make)
    start = shared_state(model)
    return training(model, lambda: copy.deepcopy(DAYS[name]), momentum=.9, augment=Augment(flip=True), stragglers=.3, **changes), with_control(start, [n for n, _ in model.named_parameters()])

def asked(name, make=lambda: Hidden(.3), **changes):
    "Three rounds of days: what each was given, and what came of it."
    train, state = any_day(name, make, **changes)
    given = []
    for t in range(1, 4):
        for i in (1, 2):
            kept = train.client_states.get(i, {})
            u = train(state, i, t)
            given.append((state, i, t, kept, bits(u)))
            train.client_states = train.client_states | {i: u.client_state}
        state = u.state
    return given

@pytest.mark.parametrize('name', DAYS)
def test_days_replayed_in_another_order_and_another_process(name):
    given = asked(name)
    assert len({g[-1] for g in given}) == len(given)
    train, _ = any_day(name)
    with Processes(1) as pool:
        for state, i, t, kept, want in [given[n] for n in (5, 0, 3, 2, 4, 1)]:
            train.client_states = {i: copy_state(kept)}
            assert bits(train(copy_state(state), i, t)) == want
            (client, update), = pool(train, state, [i], t)
            assert client == i and bits(update) == want
            torch.rand(3)

@pytest.mark.parametrize('form', ['dropout', 'batch norm'])
@pytest.mark.parametrize('name', DAYS)
def test_a_measurement_in_between_changes_nothing(name, form):
    given = asked(name, FORMS[form])
    train, _ = any_day(name, FORMS[form])
    for state, i, t, kept, want in given:
        train.client_states = {i: kept}
        evaluate(train.model, train.batches(i, t))
        assert bits(train(state, i, t)) == want

@pytest.mark.parametrize('name', DAYS)
def test_what_a_day_is_given_stays_as_it_was(name):
    train, start = any_day(name)
    train.client_states = {1: train(start, 1, 1).client_state}
    kept, before = train.client_states[1], (state_hash(start), state_hash(train.client_states[1]))
    u = train(start, 1, 2)
    assert (state_hash(start), state_hash(kept)) == before and train.client_states == {1: kept}
    held = bits(u)
    train(start, 2, 2)
    assert bits(u) == held  # nor does the next day write on it

class Breaks(Callback):
    "Raises in the midst of a client's day."
    order = 50
    def __init__(self, client): self.client = client
    def before_step(self):
        if self.learn.context.client == self.client and self.learn.train_iter >= 1: raise RuntimeError('stumbled')

@pytest.mark.parametrize('name', DAYS)
def test_a_callback_that_raises_leaves_the_next_day_unharmed(name):
    train, start = any_day(name)
    well = train.callbacks
    train.callbacks = lambda: well() + [Breaks(3)]
    train.client_states = {i: train(start, i, 1).client_state for i in (1, 2)}
    with pytest.raises(RuntimeError, match='stumbled'): train(start, 3, 2)
    other, _ = any_day(name)
    other.client_states = train.client_states
    for i in (1, 2): assert bits(train(start, i, 2)) == bits(other(start, i, 2))

def test_a_day_that_broke_leaves_no_hooks_on_the_network():
    train, start = any_day('moon')
    train(start, 1, 1)
    assert not train.model.fc._forward_pre_hooks
    train.callbacks = lambda: [Moon(MU), Breaks(3)]
    with pytest.raises(RuntimeError, match='stumbled'): train(start, 3, 1)
    assert not train.model.fc._forward_pre_hooks

# ---- MOON where there is more than weights

@pytest.mark.parametrize('stays', [False, True], ids=['batch norm', 'batch norm at home'])
def test_moon_compares_with_whole_networks(stays):
    "The global network is the one that the day began with, the last one that of the last day's end: with the statistics of batch norms that they had then."
    make = lambda: Hidden(norm=True)
    train = training(fresh(make), lambda: [Moon(5., TAU)], kept_names=norm_names(fresh(make)) if stays else ())
    begin = {n: t for n, t in shared_state(fresh(make)).items() if n not in train.kept_names}
    u = train(begin, 1, 1)
    train.client_states = {1: u.client_state}
    state = {n: t + .1 if t.is_floating_point() else t for n, t in u.state.items()}
    got = train(state, 1, 2)
    last, known, net = fresh(make), fresh(make), fresh(make)
    whole = u.state | {n.removeprefix('home/'): t for n, t in u.client_state.items() if n.startswith('home/')}
    last.load_state_dict(whole)
    for m in (known, net): m.load_state_dict(whole | state)
    opt, batches, seen = torch.optim.SGD(net.parameters(), LR), train.batches(1, 2), {}
    for m in (known.eval(), last.eval(), net.train()): m.fc.register_forward_pre_hook(lambda fc, x, m=m: seen.update({m: x[0]}))
    for _ in range(EPOCHS):
        for x, y in batches:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            with torch.no_grad(): known(x), last(x)
            (loss + 5*contrast(seen[net], seen[known], seen[last], TAU)).backward()
            opt.step()
    mine = got.state | {n.removeprefix('home/'): t for n, t in got.client_state.items() if n.startswith('home/')}
    for n, t in net.state_dict().items(): torch.testing.assert_close(mine[n], t, rtol=1e-9, atol=1e-12, msg=lambda m: f'{n}: {m}')

# ---- what stays at home, heads, stragglers, refusals

@few
@given(st.sets(st.sampled_from(list(fresh(lambda: Hidden(norm=True)).state_dict())), min_size=1, max_size=5), st.sampled_from(['fedprox', 'scaffold II', 'feddyn', 'many at once']))
def test_what_stays_at_home_is_never_sent_and_always_kept(names, name):
    make = lambda: Hidden(norm=True)
    train, _ = any_day(name, make, kept_names=sorted(names))
    state = {n: t for n, t in shared_state(fresh(make)).items() if n not in names}
    trained = [n for n, _ in fresh(make).named_parameters() if n in state]
    for t in (1, 2):
        u = train(with_control(state, trained), 1, t)
        assert {n for n in u.state if not n.startswith('control/')} == set(state)
        assert {n.removeprefix('home/') for n in u.client_state if n.startswith('home/')} == names
        assert {n.removeprefix('control/') for n in u.state if n.startswith('control/')} == (set(trained) if name in ('scaffold II', 'many at once') else set())
        train.client_states = {1: u.client_state}
    other = train(with_control(state, trained), 2, 1)  # a client that is new begins with what all began with
    new, _ = any_day(name, make, kept_names=sorted(names))
    assert bits(other) == bits(new(with_control(state, trained), 2, 1))

def test_norms_are_found_wherever_they_are():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(3)), nn.BatchNorm2d(4, affine=False), nn.Linear(4, 2))
    assert norm_names(model) == ['1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked', '2.0.weight', '2.0.bias', '3.running_mean', '3.running_var', '3.num_batches_tracked']
    assert norm_names(fresh(Normed)) == NORMS
    with pytest.raises(InputError, match='has no batch norm'): norm_names(fresh(Softmax))

@pytest.mark.parametrize('weight_decay', [0., .1])
def test_only_the_head_moves(weight_decay):
    model = head_only(fresh(Hidden))
    inner, start = copy_state(model.inner.state_dict()), shared_state(model)
    u = training(model, momentum=.9, weight_decay=weight_decay)(start, 1, 1)
    assert list(u.state) == ['fc.weight', 'fc.bias'] and state_hash(inner) == state_hash(model.inner.state_dict()) and model.inner.weight.grad is None
    assert all((u.state[n] != start[n]).all() for n in start)

@fast
@given(st.integers(0, 2**31), st.integers(0, 99), st.integers(1, 999), st.integers(1, 200), st.floats(.01, 1))
def test_stragglers_do_from_one_step_to_all(seed, client, round, whole, share):
    train = training(fresh(Softmax), stragglers=share, seed=seed)
    steps = train.steps(client, round, whole)
    assert steps is None or 1 <= steps <= whole
    assert steps == training(fresh(Softmax), stragglers=share, seed=seed).steps(client, round, whole) and training(fresh(Softmax), seed=seed).steps(client, round, whole) is None
    assert training(fresh(Softmax), stragglers=1., seed=seed).steps(client, round, whole) is not None
    assert train.steps(client, round, whole) is None or training(fresh(Softmax), stragglers=1., seed=seed).steps(client, round, whole) == steps  # a larger share adds, and changes nobody

def test_stragglers_are_as_many_as_asked_and_end_when_drawn():
    train = training(fresh(Softmax), stragglers=.3)
    drawn = [train.steps(i, t, 1000) for t in range(1, 41) for i in range(50)]
    late = [s for s in drawn if s is not None]
    assert abs(len(late) - 600) < 5*math.sqrt(2000*.3*.7) and abs(np.mean(late) - 500) < 5*1000/math.sqrt(12*len(late))
    train = training(fresh(Softmax), stragglers=.5)
    start, made = shared_state(train.model), []
    for t in range(1, 9):
        whole = EPOCHS*len(train.batches(1, t))
        u = train(start, 1, t)
        made.append(u.metrics['steps'])
        assert made[-1] == (train.steps(1, t, whole) or whole)
        assert (u.metrics['images'] == EPOCHS*21) == (made[-1] == whole) and (bits(u) == bits(training(fresh(Softmax))(start, 1, t))) == (made[-1] == whole)
    assert min(made) < max(made) == whole

def test_refusals():
    start, train = shared_state(fresh(Hidden)), training(fresh(Hidden))
    for n in start:
        with pytest.raises(InputError, match=f"state lacks '{n}'"): train({k: v for k, v in start.items() if k != n}, 0, 1)
    train(start, 0, 1)
    with pytest.raises(InputError, match='control variates'): training(fresh(Hidden), lambda: [Scaffold()])(start, 0, 1)
    for option in (0, 3, 'II'):
        with pytest.raises(InputError, match='SCAFFOLD option'): Scaffold(option)
    for alpha in (0., -1., math.inf, math.nan):
        with pytest.raises(InputError, match='alpha'): FedDyn(alpha)

# ---- LocalSGD is torch.optim.SGD

def pairs(seed, shapes, dtype):
    g = rng(seed, 'parameters')
    values = [torch.from_numpy(g.normal(size=s)).to(dtype) for s in shapes]
    return [[nn.Parameter(v.clone()) for v in values] for _ in range(2)], g

@fast
@given(st.integers(0, 2**31), st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4), st.floats(1e-3, 1), st.sampled_from([0., .5, .9]), st.sampled_from([0., .1]),
       st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_local_sgd_is_torchs_to_the_bit(seed, shapes, lr, momentum, weight_decay, steps, dtype, grouped):
    (mine, theirs), g = pairs(seed, shapes, dtype)
    groups = lambda ps: [{'params': ps[:1], 'lr': lr/3, 'momentum': .7}, {'params': iter(ps[1:]), 'weight_decay': .3}] if grouped and len(ps) > 1 else iter(ps)
    a, b = LocalSGD(groups(mine), lr, momentum, weight_decay), torch.optim.SGD(groups(theirs), lr, momentum, weight_decay=weight_decay)
    for _ in range(steps):
        a.zero_grad(), b.zero_grad()
        assert all(p.grad is None for p in mine)
        for p, q in zip(mine, theirs):
            if g.random() < .3: continue  # no gradient: it stays, and so does its momentum
            grad = torch.from_numpy(g.normal(size=p.shape)).to(dtype)
            p.grad, q.grad = grad.clone(), grad.clone()
        held = [None if p.grad is None else p.grad.clone() for p in mine]
        a.step(), b.step()
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs))
        assert all(h is None or torch.equal(p.grad, h) for p, h in zip(mine, held))  # gradients are read, not written

@pytest.mark.parametrize('momentum', [0., .9])
def test_a_learner_with_local_sgd_takes_torchs_steps(momentum):
    "Two groups with rates of their own, and a parameter that never gets a gradient."
    class Net(Hidden):
        def __init__(self): super().__init__(); self.idle = nn.Parameter(torch.ones(3))
    mine, theirs = fresh(Net), fresh(Net)
    split = lambda m: [[*m.inner.parameters()], [*m.fc.parameters(), m.idle]]
    batches = lambda: training(mine).batches(1, 1)
    learn = LocalLearner(DataLoaders(batches(), []), mine, loss_func=F.cross_entropy, opt_func=functools.partial(OptimWrapper, opt=LocalSGD, momentum=momentum, weight_decay=.01),
                         splitter=split, wd_bn_bias=True, train_bn=False, default_cbs=False, cbs=[TrainMode(), LocalLoss()])
    learn.fit(2, [.02, .2])
    opt, again = torch.optim.SGD([{'params': ps, 'lr': lr} for ps, lr in zip(split(theirs), (.02, .2))], momentum=momentum, weight_decay=.01), batches()
    for _ in range(2):
        for x, y in again:
            opt.zero_grad()
            F.cross_entropy(theirs(x), y).backward()
            opt.step()
    for (n, p), q in zip(mine.named_parameters(), theirs.parameters()): assert torch.equal(p, q), n
    assert torch.equal(mine.idle, torch.ones(3).double())

# ---- in a Learner of a user's own

def plain_learner(callback):
    from fastai.learner import Learner
    train = training(fresh(Hidden))
    return Learner(DataLoaders(train.batches(1, 1), []), train.model, loss_func=F.cross_entropy, opt_func=functools.partial(OptimWrapper, opt=torch.optim.SGD),
                   default_cbs=False, cbs=[TrainMode(), callback])

@pytest.mark.parametrize('callback', [lambda: Scaffold(), lambda: FedDyn(), lambda: Moon(), lambda: Margins()], ids=['scaffold', 'feddyn', 'moon', 'fedlc'])
def test_a_plain_learner_is_told_what_it_lacks(callback):
    with pytest.raises(InputError, match=r'runs inside LocalTraining.*learn.context = ClientContext'): plain_learner(callback()).fit(1, .1)

@pytest.mark.parametrize('callback', [lambda: FedProx(MU), lambda: FedDyn(ALPHA), lambda: Moon(MU), lambda: Margins()], ids=['fedprox', 'feddyn', 'moon', 'fedlc'])
def test_a_plain_learner_with_a_context_trains(callback):
    learn = plain_learner(callback())
    before = state_hash(learn.model.state_dict())
    if not isinstance(learn.cbs[-1], FedProx): learn.context = ClientContext(1, 1, {}, {}, .1, 0., lambda: np.array([1, 2, 3, 4]))
    learn.fit(1, .1)
    assert state_hash(learn.model.state_dict()) != before

def test_a_client_callback_of_a_users_own_in_ten_lines():
    class SignDescent(Callback):
        def before_step(self):
            for p in self.learn.model.parameters(): p.grad.sign_()
    train, start = training(fresh(Softmax), lambda: [SignDescent()], epochs=1), shared_state(fresh(Softmax))
    u = train(start, 1, 1)
    steps = u.metrics['steps']
    assert all(((u.state[n] - start[n]).abs() <= LR*steps + 1e-9).all() for n in start) and any((u.state[n] != start[n]).any() for n in start)
    assert bits(train(start, 1, 1)) == bits(u)

# ---- nothing that stays remembers how it was computed

@pytest.mark.parametrize('algorithm', [lambda: Scaffold(), lambda: Scaffold(1), lambda: FedDyn(ALPHA), lambda: Moon(MU), lambda: Margins()],
                         ids=['scaffold', 'scaffold I', 'feddyn', 'moon', 'fedlc'])
def test_no_autograd_graph_grows_over_rounds(algorithm):
    "Though what the client kept, and what arrives, come from whoever left them with a gradient."
    def graphs():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum(t.grad_fn is not None for t in tensors)
    train = training(fresh(Hidden), callbacks=lambda: [algorithm()])
    state = shared_state(train.model)
    state = state | {f'control/{n}': torch.zeros_like(t) for n, t in state.items()}
    before = graphs()
    for round in range(1, 5):
        u = train({n: t.requires_grad_() for n, t in state.items()}, 1, round)
        assert all(t.grad_fn is None and not t.requires_grad for t in (*u.client_state.values(), *u.state.values()))
        train.client_states = {1: {n: t.clone().detach().requires_grad_() for n, t in u.client_state.items()}}
        assert graphs() == before
