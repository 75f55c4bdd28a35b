"The round loop over toy clients: order, every kind of failure, sampling, bytes, and what a void round leaves behind."
import asyncio, errno, functools, hashlib, json, multiprocessing, os, resource, warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.core import InputError, Update, copy_state, rng, serialised_bytes, state_hash
from fedsq_nb.engine.execute import Processes, WorkerLost, serial
from fedsq_nb.engine.federate import Diverged, Federation, Limits, RoundVoid, Sampling, absent_clients, sample_clients
from fedsq_nb.server.aggregate import FedAvg, any_diverged
from fedsq_nb.server.optimizers import FedAdam

START = {'w': torch.tensor([1., -2., 3.]), 'b': torch.tensor([[.5]]), 'seen': torch.tensor(0)}
GOOD, KINDS = 'good', ('raises', 'nan', 'inf', 'missing', 'shape', 'dtype', 'late', 'weightless', 'no update', 'nan loss')
REASONS = {'raises': 'OSError: disk full', 'nan': "non-finite values in 'w' (1 of 3)", 'inf': 'non-finite', 'missing': "missing 'b'", 'shape': 'has shape (2,)',
           'dtype': 'torch.float64', 'late': 'round', 'weightless': 'weight 0', 'no update': 'NoneType', 'nan loss': "metric 'train_loss'"}
KIND_OF = {'raises': 'error', 'nan': 'diverged', 'inf': 'diverged', 'nan loss': 'diverged'}  # the others are invalid
fast = settings(max_examples=40, deadline=None)
kinds = st.lists(st.sampled_from((GOOD, GOOD, *KINDS)), min_size=1, max_size=9)

def trainer(kinds):
    "Clients that do as `kinds` says; good ones take a random step of their own."
    def train(state, client, round):
        step, kind = torch.from_numpy(rng(3, 'client', client, round).normal(size=3)).float(), kinds[client]
        new, weight, loss = {'w': state['w'] + step, 'b': state['b'] * 1.5, 'seen': state['seen'] + client}, 1. + client, float(step.norm())
        if kind == 'raises': raise OSError('disk full')
        if kind == 'no update': return None
        if kind in ('nan', 'inf'): new['w'][1] = float(kind)
        if kind == 'missing': del new['b']
        if kind == 'shape': new['w'] = new['w'][:2]
        if kind == 'dtype': new['w'] = new['w'].double()
        return Update(client, round - (kind == 'late'), new, 0. if kind == 'weightless' else weight,
                      {'train_loss': float('nan') if kind == 'nan loss' else loss})
    return train

def shuffled(seed):
    def execute(train, state, clients, round): yield from serial(train, state, rng(seed, 'order', round).permutation(clients).tolist(), round)
    return execute

def threads(train, state, clients, round):
    "Whoever is ready first arrives first."
    with ThreadPoolExecutor(4) as pool:
        for job in as_completed([pool.submit(lambda c: list(serial(train, state, [c], round)), c) for c in clients]): yield from job.result()

def play(kinds, rounds=2, **kwargs):
    fed = Federation(copy_state(START), len(kinds), trainer(kinds), measure=lambda s: {'val_accuracy': .5, 'hash': state_hash(s)}, **kwargs)
    try: fed.fit(rounds)
    except Diverged as e: return fed, str(e)
    return fed, None

def timeless(fed): return [{k: v for k, v in r.items() if not k.endswith('seconds')} for r in fed.rows]

@fast
@given(kinds, st.integers(0, 2**31))
def test_the_order_of_execution_changes_no_bit(kinds, seed):
    (a, why), (b, other) = play(kinds), play(kinds, execute=shuffled(seed))
    assert state_hash(a.state) == state_hash(b.state) and timeless(a) == timeless(b) and why == other

@pytest.mark.parametrize('kinds', [[GOOD] * 6, [GOOD, 'nan', GOOD, 'raises', GOOD]])
def test_parallel_clients_give_the_same_rounds(kinds):
    a, b = play(kinds, rounds=5)[0], play(kinds, rounds=5, execute=threads)[0]
    assert state_hash(a.state) == state_hash(b.state) and timeless(a) == timeless(b)

@fast
@given(kinds)
def test_each_bad_client_is_left_out_and_named_and_the_rest_are_averaged(kinds):
    fed, why = play(kinds, rounds=1)
    bad = [c for c, k in enumerate(kinds) if k != GOOD]
    row = fed.rows[-1]
    assert [f['client'] for f in row['failures']] == bad and row['clients_failed'] == len(bad) and row['clients_ok'] == len(kinds) - len(bad)
    assert [f['kind'] for f in row['failures']] == [KIND_OF.get(kinds[c], 'invalid') for c in bad]
    for f in row['failures']: assert REASONS[kinds[f['client']]] in f['reason'] and '\n' not in f['reason']
    if len(bad) == len(kinds): return
    updates = [trainer(kinds)(START, c, 1) for c in range(len(kinds)) if c not in bad]
    n = sum(u.weight for u in updates)
    for name in ('w', 'b'):  # the mean by its definition
        want = sum(u.weight / n * u.state[name].numpy().astype(np.float64) for u in updates)
        np.testing.assert_allclose(fed.state[name].numpy(), want, rtol=1e-6, atol=1e-7)
    assert fed.state['seen'].item() == max(u.client for u in updates)
    assert row['train_loss'] == pytest.approx(sum(u.weight * u.metrics['train_loss'] for u in updates) / n)

@fast
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.integers(0, 2))
def test_a_void_round_stops_and_leaves_the_state_as_it_was(kinds, before):
    fed, healthy = play([GOOD] * len(kinds), rounds=before)[0], trainer(kinds)
    fed.train, kept, held = healthy, state_hash(fed.state), fed.state
    with pytest.raises(Diverged) as e: fed.fit(3)
    message = str(e.value)
    assert fed.state is held and state_hash(fed.state) == kept
    assert f'{len(kinds)} of {len(kinds)} clients failed' in message and 'client 0: ' in message and '\n' not in message
    assert ('lower learning rate' in message) == any(f['kind'] == 'diverged' for f in fed.rows[-1]['failures'])
    numeric = any(f['kind'] == 'diverged' for f in fed.rows[-1]['failures'])
    assert len(fed.rows) == before + 2 and fed.rows[-1]['state'] == ('diverged' if numeric else 'void') and fed.rows[-1]['val_accuracy'] is None
    assert type(e.value) is (Diverged if numeric else RoundVoid)
    assert fed.rows[-1].keys() == fed.rows[0].keys()

@fast
@given(kinds, st.integers(1, 5))
def test_min_clients_is_the_least_that_may_be_averaged(kinds, least):
    fed, why = play(kinds, rounds=1, limits=Limits(least))
    assert (why is None) == (kinds.count(GOOD) >= least)
    if why: assert state_hash(fed.state) == state_hash(START)

@pytest.mark.parametrize('loss', [float('nan'), float('inf')])
def test_an_average_that_cannot_be_measured_is_not_kept(loss):
    fed = Federation(copy_state(START), 2, trainer([GOOD] * 2), measure=lambda s: {'val_accuracy': .1, 'val_loss': .5 if s['b'] == .5 else loss})
    with pytest.raises(Diverged, match='round 1: .*lower learning rate'): fed.fit(4)
    assert state_hash(fed.state) == state_hash(START)
    assert fed.rows[-1]['state'] == 'diverged' and fed.rows[-1]['val_loss'] is None and len(fed.rows) == 2

def test_a_request_to_stop_is_no_clients_failure():
    "Only Ctrl-C is one: a client that calls `sys.exit` ends itself, here as in a process of its own."
    def train(state, client, round): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Federation(copy_state(START), 2, train).fit(1)

@fast
@given(kinds, st.integers(1, 4))
def test_rows_are_json(kinds, rounds):
    fed = play(kinds, rounds)[0]
    assert [json.loads(json.dumps(r, allow_nan=False)) for r in fed.rows] == fed.rows

@fast
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 1000), st.integers(0, 2**31))
def test_bytes_are_counted_and_the_constant_part_once_a_client(n, per_round, rounds, once, seed):
    per_round = min(n, per_round)
    fed = Federation(copy_state(START), n, trainer([GOOD] * n), sampling=Sampling(per_round), first_contact_bytes=once, seed=seed)
    fed.fit(rounds)
    met = {c for t in range(1, rounds + 1) for c in sample_clients(n, per_round, seed=seed, round=t)}
    one = serialised_bytes(START)
    assert sum(r['bytes_down'] for r in fed.rows) == rounds * per_round * one + len(met) * once
    assert sum(r['bytes_up'] for r in fed.rows) == rounds * per_round * one and fed.memory.seen_clients == met

def test_refused_updates_have_used_the_line_and_broken_clients_have_not():
    one = serialised_bytes(START)
    assert play([GOOD, 'nan', 'raises'], 1)[0].rows[1]['bytes_up'] == 2 * one

def test_sampling_is_fair_and_repeats():
    rounds = [sample_clients(20, 5, seed=1, round=t) for t in range(1, 2001)]
    assert rounds == [sample_clients(20, 5, seed=1, round=t) for t in range(1, 2001)]
    assert all(len(set(r)) == 5 and r == sorted(r) and 0 <= r[0] and r[-1] < 20 for r in rounds)
    seen = np.zeros((20, 20))
    for r in rounds: seen[np.ix_(r, r)] += 1
    alone, pairs = np.diag(seen), seen[np.triu_indices(20, 1)]
    for count, p in ((alone, 5/20), (pairs, 5*4/(20*19))):  # five standard deviations of a binomial
        assert (abs(count - 2000*p) < 5 * np.sqrt(2000*p*(1 - p))).all()
    assert rounds[:20] != [sample_clients(20, 5, seed=2, round=t) for t in range(1, 21)]

def test_sampling_does_not_depend_on_what_happened_before():
    "A run that is continued meets the same clients as one that went through."
    one, two = play([GOOD] * 8, rounds=6, sampling=Sampling(3))[0], play([GOOD] * 8, rounds=2, sampling=Sampling(3))[0]
    two.fit(4)
    assert timeless(one) == timeless(two) and state_hash(one.state) == state_hash(two.state)

@pytest.mark.parametrize('per_round', [0, -1, 6])
def test_more_clients_than_there_are(per_round):
    with pytest.raises(InputError, match=f'per_round {per_round} must be from 1 to the 5 clients'): sample_clients(5, per_round, seed=0, round=1)


def test_nobody_sends_in_the_name_of_another():
    "An update that carries another client's id is left out, and the one in whose name it came is heard all the same."
    def train(state, client, round): return Update(0 if client == 2 else client, round, {'w': state['w'] + client}, 1, {'train_loss': 0.})
    fed = Federation({'w': torch.zeros(1)}, 3, train)
    row = fed.fit(1).iloc[-1]
    assert row.failures == [{'client': 2, 'kind': 'invalid', 'reason': 'sent in the name of client 0'}]
    assert torch.equal(fed.state['w'], torch.tensor([0.5]))


# ---- facts decide, not words

def test_a_disk_quota_that_is_finite_is_no_divergence():
    "A client that raises an error with the word in it has not diverged, whatever the word."
    def train(state, client, round): raise OSError('disk quota is finite, 3 times the round limit')
    fed = Federation(copy_state(START), 3, train)
    with pytest.raises(RoundVoid, match='mend the cause') as e: fed.fit(1)
    assert type(e.value) is RoundVoid and 'learning rate' not in str(e.value)
    row = fed.rows[-1]
    assert row['state'] == 'void' and [f['kind'] for f in row['failures']] == ['error'] * 3 and not any_diverged(row['failures'])

def test_every_kind_of_failure_is_in_its_row():
    def train(state, client, round):
        if client == 0: raise OSError('disk full')
        if client == 1: return Update(1, round, {**state, 'w': state['w'] / 0}, 1)
        if client == 2: return Update(2, round, {'w': state['w']}, 1)
        return Update(client, round, state, 1)
    def execute(train, state, clients, round):
        for client, answer in serial(train, state, clients, round): yield client, WorkerLost('gone') if client == 3 else answer
    seed = next(s for s in range(99) if not set(absent_clients(range(40), .2, seed=s, round=1)) & {0, 1, 2, 3})
    fed = Federation(copy_state(START), 40, train, execute=execute, sampling=Sampling(client_dropout=.2), seed=seed)
    failures = fed.fit(1).failures[1]
    absent = absent_clients(range(40), .2, seed=seed, round=1)
    assert absent and not set(absent) & {0, 1, 2, 3}
    want = {0: 'error', 1: 'diverged', 2: 'invalid', 3: 'lost', **dict.fromkeys(absent, 'absent')}
    assert {f['client']: f['kind'] for f in failures} == want and all(type(f['kind']) is str for f in failures)

# ---- a rule of one's own

class Half:
    "Goes half the way to the mean of the clients, and has nothing but `step`."
    def step(self, global_state, updates):
        new = dict(global_state)
        for name, old in global_state.items():
            mean = sum(u.state[name].double() for u in updates) / len(updates)
            new[name] = ((old + mean) / 2).to(old.dtype)
        return new

def test_a_rule_with_just_a_step_works_to_the_end_checkpoints_included(tmp_path):
    def fresh(folder):
        fed = Federation(copy_state(START), 4, trainer([GOOD] * 4), rule=Half(), sampling=Sampling(3))
        fed.listeners.on_round = lambda: fed.save(folder, 'half')
        return fed
    whole, first, again = fresh(tmp_path/'whole'), fresh(tmp_path/'part'), fresh(tmp_path/'part')
    whole.fit(5)
    first.fit(2)
    assert again.restore(tmp_path/'part', 'half')
    again.fit(3)
    assert timeless(again) == timeless(whole) and state_hash(again.state) == state_hash(whole.state)

def test_a_checkpoint_of_an_earlier_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path/'round-000001.safetensors'
    path.write_bytes(safetensors.torch.save({'state/w': torch.zeros(1)}, {'note': '{}', 'seal': 'x'}))
    with pytest.raises(InputError, match='earlier version'): Federation(copy_state(START), 2, trainer([GOOD] * 2)).restore(tmp_path, 'key')
    assert path.exists()


# ---- what comes in is owned

class Live:
    "A trainer that trains one network in place, and sends its live tensors. Wishes 0, 3 and 9."
    def __init__(self):
        self.net = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad(): self.net.weight.zero_()

    def __call__(self, state, client, round):
        with torch.no_grad(): self.net.weight.copy_((state['weight'] + [0., 3., 9.][client]) / 2)
        return Update(client, round, self.net.state_dict(), 1.)

def test_a_live_state_dict_is_averaged_as_it_was_sent():
    "The last client's numbers do not stand for everybody's: 0, 1.5 and 4.5 have the mean 2."
    train = Live()
    fed = Federation(train.net.state_dict(), 3, train)
    fed.fit(1)
    assert fed.state['weight'].item() == 2.
    with Processes(2) as team:
        train = Live()
        two = Federation(train.net.state_dict(), 3, train, execute=team)
        two.fit(1)
    assert torch.equal(fed.state['weight'], two.state['weight'])

def test_a_federation_does_not_live_in_a_network():
    train = Live()
    fed = Federation(train.net.state_dict(), 3, train)
    with torch.no_grad(): train.net.weight.fill_(99.)
    assert fed.state['weight'].item() == 0.

def test_what_a_client_has_kept_is_its_own():
    "A trainer that keeps one tensor for all, and writes into what it is given."
    shared = torch.zeros(1)
    def train(state, client, round):
        shared.fill_(client)
        return Update(client, round, {'w': state['w'] + 1}, 1., client_state={'c': shared})
    fed = Federation({'w': torch.zeros(1)}, 3, train)
    fed.fit(1)
    assert [fed.client_states[c]['c'].item() for c in range(3)] == [0., 1., 2.]

@pytest.mark.parametrize('state', [None, [torch.zeros(1)], {3: torch.zeros(1)}, {'w': 1.}, {'w': torch.zeros(2).to_sparse()}, {'w': torch.zeros(2, device='meta')},
                                   {'w': torch.zeros(2, dtype=torch.complex64)}], ids=lambda s: type(s).__name__)
def test_a_federation_begins_with_plain_tensors(state):
    with pytest.raises(InputError, match='state'): Federation(state, 2, trainer([GOOD] * 2))


# ---- a round is a transaction

def adapted(**kwargs):
    "A federation whose rule remembers, with five clients of which three take part."
    kwargs = dict(rule=FedAdam(lr=.1), sampling=Sampling(3), first_contact_bytes=7) | kwargs
    return Federation({k: v for k, v in copy_state(START).items() if k != 'seen'}, 5, keeping, **kwargs)

def keeping(state, client, round):
    step = torch.from_numpy(rng(3, 'client', client, round).normal(size=3)).float()
    return Update(client, round, {'w': state['w'] + step, 'b': state['b'] * 1.5}, 1. + client, {'train_loss': 1.}, {'kept': step})

def everything(fed):
    "All that a later round could depend on."
    m = fed.memory
    return (state_hash(fed.state), timeless(fed), sorted(m.seen_clients), {c: state_hash(s) for c, s in m.client_states.items()},
            {n: state_hash({'t': t}) if isinstance(t, torch.Tensor) else t for n, t in fed.rule.state_dict().items()})

class Stop(Exception): pass

PLACES = 'train', 'decode', 'step', 'measure', 'inspect', 'on_row', 'on_round'

@pytest.mark.parametrize('stop', [KeyboardInterrupt, Stop, SystemExit])
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('at', [1, 2, 4])
def test_a_round_that_is_stopped_anywhere_and_played_again_is_the_same_round(place, stop, at):
    if place in ('train', 'decode') and stop is not KeyboardInterrupt: pytest.skip('a failure of the client, by its kind')
    smooth, rough, calls = adapted(), adapted(), []
    def stops(action):
        def act(*args):
            done = action(*args)
            calls.append(place)
            if len(calls) == at: raise stop('now')
            return done
        return act
    owner = {'step': rough.rule, 'on_row': rough.listeners, 'on_round': rough.listeners}.get(place, rough)
    setattr(owner, place, stops(getattr(owner, place)))
    smooth.fit(4)
    with pytest.raises(stop): rough.fit(4)
    if place == 'step': del rough.rule.step
    kept = everything(rough)
    assert len(rough.rows) == at - (place in ('measure', 'on_row')) or place in ('train', 'decode', 'inspect', 'step')
    assert everything(rough) == kept
    rough.fit(5 - max(len(rough.rows), 1))
    assert everything(rough) == everything(smooth)

def test_nobody_changes_the_global_state_in_place():
    "A client, a rule, a measure and an inspection that write into what they were handed, and then fail or not."
    def train(state, client, round):
        state['w'].fill_(100.)
        if client == 1: raise OSError('disk full')
        return Update(client, round, {'w': torch.full((3,), 1. + client)}, 1.)
    class Writes(FedAvg):
        def step(self, global_state, updates):
            global_state['w'].fill_(100.)
            if len(updates) == 2: raise InputError('two are too few')
            return super().step(global_state, updates)
    def measure(state): return {'val_accuracy': .5, 'val_loss': float(state['w'].mul_(0).sum())}
    fed = Federation({'w': torch.zeros(3)}, 3, train, rule=Writes(), measure=measure, inspect=lambda before, updates, after: before['w'].fill_(7.) is after)
    with pytest.raises(RoundVoid, match='round 1: two are too few'): fed.fit(1)
    assert torch.equal(fed.state['w'], torch.zeros(3)) and fed.rows[-1]['state'] == 'void'

def test_a_rule_keeps_nothing_of_what_it_gave():
    "A rule that remembers its last answer and writes into it in the next round."
    class Remembers:
        last = None
        def step(self, global_state, updates):
            if self.last is not None: self.last['w'].fill_(50.)
            self.last = {'w': global_state['w'] + 1}
            return self.last
    fed = Federation({'w': torch.zeros(1)}, 1, lambda s, c, r: Update(c, r, {'w': s['w'] + (2. if r > 1 else 1.)}, 1.), rule=Remembers())
    fed.fit(2)
    assert fed.state['w'].item() == 2.

def test_a_rule_without_a_state_dict_is_put_back_as_well():
    "Momentum of one's own in plain attributes, changed in place; an interrupt in the measure must not move it twice."
    class Momentum:
        def __init__(self): self.v = torch.zeros(1)
        def step(self, global_state, updates):
            self.v.mul_(.9).add_(updates[0].state['w'] - global_state['w'])
            return {'w': global_state['w'] + self.v}
    def played(measure):
        fed = Federation({'w': torch.zeros(1)}, 1, lambda s, c, r: Update(c, r, {'w': s['w'] + 1}, 1.), rule=Momentum(), measure=measure)
        return fed
    calls = []
    def once(state):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return {}
    smooth, rough = played(lambda s: {}), played(once)
    smooth.fit(4)
    with pytest.raises(KeyboardInterrupt): rough.fit(4)
    rough.fit(3)
    assert torch.equal(smooth.state['w'], rough.state['w']) and torch.equal(smooth.rule.v, rough.rule.v)

NO_MODELS = {
    'None': (lambda s: None, RoundVoid, 'NoneType'), 'a list': (lambda s: [*s.values()], RoundVoid, 'of type list'), 'too little': (lambda s: {'w': s['w']}, RoundVoid, "missing 'b'"),
    'too much': (lambda s: s | {'x': s['w']}, RoundVoid, "unexpected 'x'"), 'shape': (lambda s: s | {'w': s['w'][:2]}, RoundVoid, r'shape \(2,\)'),
    'type': (lambda s: s | {'w': s['w'].double()}, RoundVoid, 'torch.float64'), 'sparse': (lambda s: s | {'w': s['w'].to_sparse()}, RoundVoid, 'sparse'),
    'no tensor': (lambda s: s | {'w': 3.}, RoundVoid, 'of type float'), 'a key': (lambda s: {3: s['w']}, RoundVoid, "missing 'w'"),
    'nan': (lambda s: s | {'w': s['w'] * float('nan')}, Diverged, "non-finite values in 'w'"), 'inf': (lambda s: s | {'b': s['b'] / 0}, Diverged, "non-finite values in 'b'")}

@pytest.mark.parametrize('what', NO_MODELS)
def test_a_rule_that_gives_no_model_ends_the_run_and_leaves_everything_else(what):
    spoil, kind, words = NO_MODELS[what]
    class Rule(FedAdam):
        def step(self, global_state, updates):
            new = super().step(global_state, updates)
            return spoil(new) if self.memory['round'] == 2 else new
    fed = adapted(rule=Rule(lr=.1))
    fed.fit(1)
    before = everything(fed)
    with pytest.raises(kind, match=f'round 2: .*Rule gives .*{words}') as e: fed.fit(1)
    assert type(e.value) is kind and fed.rows[-1]['state'] == ('diverged' if kind is Diverged else 'void')
    state, rows, _, kept, rule = everything(fed)
    assert (state, rows[:-1], kept, rule) == (before[0], before[1], before[3], before[4])

@pytest.mark.parametrize('name', ['val_loss', 'val_accuracy', 'perplexity'])
@pytest.mark.parametrize('value', [float('nan'), np.float32('nan'), np.float64('inf'), torch.tensor(float('nan')), np.float16('-inf'), np.array(float('nan'))], ids=lambda v: type(v).__name__)
def test_a_row_with_a_number_that_is_not_finite_is_not_ok(name, value):
    found = iter([{name: .5}, {name: value}])
    fed = adapted(measure=lambda s: next(found))
    before = None
    with pytest.raises(Diverged, match=f'round 1: .*{name}.*lower learning rate'): fed.fit(3)
    assert fed.rows[-1][name] is None and fed.rows[-1]['state'] == 'diverged' and len(fed.rows) == 2
    assert everything(fed)[0] == everything(adapted())[0] and 'round' not in fed.rule.memory

def test_a_measures_numbers_become_plain():
    found = {'a': np.float32(.5), 'b': np.int64(3), 'c': np.bool_(True), 'd': torch.tensor(2), 'e': {'f': np.float32('nan'), 1: [np.float16(1)]}, 'g': np.arange(2), 'h': 'text', 'i': None}
    fed = adapted(measure=lambda s: found)
    fed.fit(1)
    row = fed.rows[-1]
    assert {k: row[k] for k in found} == {'a': .5, 'b': 3, 'c': True, 'd': 2, 'e': {'f': None, '1': [1.]}, 'g': [0, 1], 'h': 'text', 'i': None}
    assert json.loads(json.dumps(fed.rows, allow_nan=False)) == fed.rows and row['state'] == 'ok'

@pytest.mark.parametrize('found', [None, [1], {'a': object()}, {'a': {1, 2}}, {'a': 1j}], ids=repr)
def test_a_measure_that_no_row_can_hold_is_named_and_nothing_is_kept(found):
    fed = adapted(measure=lambda s: found)
    with pytest.raises(InputError, match='measure'): fed.fit(1)
    assert fed.rows == []


# ---- one client is one client

class Mute(Exception):
    def __str__(self): raise OSError('no text')
    __repr__ = __str__

class Odd:
    "Raises whatever is asked of it."
    def __repr__(self): raise OSError('no text')
    __str__ = __eq__ = __lt__ = __gt__ = __float__ = __int__ = __index__ = __bool__ = __repr__
    __hash__ = object.__hash__

class OneWay:
    "Can be pickled, and not unpickled."
    def __reduce__(self): return int, ('no number',)

def cut_short():
    t = torch.zeros(3)
    t.untyped_storage().resize_(0)
    return t

def raiser(error):
    def spoil(u): raise error
    return spoil

def put(**fields): return lambda u: replace(u, **fields)
def tensor(t): return lambda u: replace(u, state=u.state | {'w': t})
def metric(value): return lambda u: replace(u, metrics={'train_loss': value})
def kept(t): return lambda u: replace(u, client_state=t)

class Loud(Exception):
    def __str__(self): return 'é\ud800\n' * 10**5

nan, inf = float('nan'), float('inf')
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)])
    QUANTISED = torch.quantize_per_tensor(torch.zeros(3), .1, 0, torch.qint8)
    CSR = torch.ones(1, 3).to_sparse_csr()

POISONS = {
    'error': {
        'OSError': raiser(OSError('disk full')), 'two lines': raiser(OSError('disk\nfull')), 'no text': raiser(Mute()), 'a megabyte of text': raiser(Loud()),
        'SystemExit': raiser(SystemExit(3)), 'GeneratorExit': raiser(GeneratorExit()), 'CancelledError': raiser(asyncio.CancelledError()), 'StopIteration': raiser(StopIteration()),
        'MemoryError': raiser(MemoryError()), 'BaseException': raiser(BaseException('base')), 'a group': raiser(ExceptionGroup('many', [OSError('a')])), 'returned error': lambda u: OSError('sent, not raised'),
        'not finite in words': raiser(ValueError('not positive definite')), 'RecursionError': raiser(RecursionError('deep'))},
    'invalid': {
        'None': lambda u: None, 'dict': lambda u: u.state, 'text': lambda u: 'update', 'class': lambda u: Update,
        'state None': put(state=None), 'state list': put(state=[torch.zeros(3)]), 'state empty': put(state={}), 'state tuple': put(state=(1, 2)), 'state of lists': tensor([0., 0., 0.]), 'state of numpy': tensor(np.zeros(3, np.float32)),
        'metrics None': put(metrics=None), 'metrics list': put(metrics=[1.]), 'metrics text': put(metrics='train_loss'), 'metric key': put(metrics={3: 1.}), 'metric text': metric('low'), 'metric None': metric(None), 'metric tensor': metric(torch.tensor(1.)), 'metric complex': metric(1j), 'metric list': metric([1.]),
        'sparse': tensor(torch.zeros(3).to_sparse()), 'CSR': tensor(CSR), 'meta': tensor(torch.zeros(3, device='meta')), 'nested': tensor(NESTED), 'quantised': tensor(QUANTISED), 'complex': tensor(torch.zeros(3, dtype=torch.complex64)),
        'ten billion': tensor(torch.zeros(1).expand(10**13)), 'half a million': tensor(torch.zeros(1).expand(2**19)), 'cut short': lambda u: tensor(cut_short())(u), 'scalar': tensor(torch.tensor(0.)), 'broadcasts': tensor(torch.zeros(1)), 'shape': tensor(torch.zeros(4)), 'empty': tensor(torch.zeros(0)),
        'half': tensor(torch.zeros(3).half()), 'double': tensor(torch.zeros(3).double()), 'whole numbers': tensor(torch.zeros(3, dtype=torch.int64)), 'truth values': tensor(torch.zeros(3, dtype=torch.bool)), 'eight bits': tensor(torch.zeros(3).to(torch.float8_e4m3fn)),
        'key is a number': lambda u: replace(u, state=u.state | {3: torch.zeros(3)}), 'key is None': lambda u: replace(u, state=u.state | {None: torch.zeros(3)}), 'key is a tuple': lambda u: replace(u, state=u.state | {('w',): torch.zeros(3)}), 'long key': lambda u: replace(u, state=u.state | {'k'*10**5: torch.zeros(3)}), 'extra': lambda u: replace(u, state=u.state | {'control/w': torch.zeros(3)}), 'missing': lambda u: replace(u, state={'w': u.state['w']}),
        'client text': put(client='two'), 'client None': put(client=None), 'client half': put(client=2.5), 'client list': put(client=[2]), 'client array': put(client=np.array([2, 2])), 'client truth': put(client=True), 'another client': put(client=0), 'client huge': put(client=10**30), 'client negative': put(client=-2),
        'round text': put(round='one'), 'round None': put(round=None), 'late': put(round=0), 'early': put(round=2), 'round array': put(round=np.array([1, 1])),
        'weight 0': put(weight=0), 'negative weight': put(weight=-1.), 'nan weight': put(weight=nan), 'infinite weight': put(weight=inf), 'text weight': put(weight='12'), 'no weight': put(weight=None), 'complex weight': put(weight=1j), 'tensor weight': put(weight=torch.tensor(3.)), 'array weight': put(weight=np.array([1., 2.])), 'enormous weight': put(weight=10**400), 'heavy': put(weight=10**9),
        'kept None': kept(None), 'kept list': kept([torch.zeros(1)]), 'kept number': kept({'c': 1.}), 'kept key': kept({3: torch.zeros(1)}), 'kept sparse': kept({'c': torch.zeros(3).to_sparse()}), 'kept ten billion': kept({'c': torch.zeros(1).expand(10**13)}), 'kept meta': kept({'c': torch.zeros(1, device='meta')}), 'kept nested': kept({'c': NESTED}),
        'counter': lambda u: replace(u, state=u.state | {'seen': torch.tensor(2**62)})},
    'diverged': {
        'nan': tensor(torch.tensor([0., nan, 0.])), 'inf': tensor(torch.tensor([0., inf, 0.])), '-inf': tensor(torch.tensor([-inf, 0., 0.])), 'expanded nan': tensor(torch.tensor(nan).expand(3)),
        'far': tensor(torch.full((3,), 1e6)), 'very far': tensor(torch.full((3,), 1e30)), 'metric nan': metric(nan), 'metric inf': metric(-inf), 'metric 10**308': metric(10**308), 'metric 10**400': metric(10**400), 'numpy nan': metric(np.float32('nan'))},
}
TABLE = [(kind, what) for kind, poisons in POISONS.items() for what in poisons]
# What cannot go through a pipe is, in a process, an error in place of the answer
BY_PIPE = {'surrogate key': lambda u: replace(u, state=u.state | {'\ud800': torch.zeros(3)}), 'odd weight': put(weight=Odd()), 'odd metric': metric(Odd()), 'odd client': put(client=Odd()), 'odd round': put(round=Odd()), 'lambda': lambda u: lambda: 0, 'lambda for a metric': metric(lambda: 0), 'one way': metric(OneWay()), 'one way weight': put(weight=OneWay())}

def normal(state, client, round):
    step = torch.from_numpy(rng(3, 'client', client, round).normal(size=3)).float()
    return Update(client, round, {'w': state['w'] + step, 'b': state['b'] + 1, 'seen': state['seen'] + 3}, 10 + client, {'train_loss': 1., 'images': 10, 'seconds': .1})

def spoilt_round(spoil, execute):
    def train(state, client, round): return spoil(normal(state, client, round)) if client == 2 and round == 1 else normal(state, client, round)
    fed = Federation(copy_state(START), 5, train, execute=execute)
    fed.fit(2)
    return fed

@functools.cache
def without_client_2():
    def train(state, client, round):
        if client == 2 and round == 1: raise OSError('away')
        return normal(state, client, round)
    fed = Federation(copy_state(START), 5, train)
    fed.fit(2)
    return state_hash(fed.state)

def assert_one_is_left_out(fed, kinds):
    row, after = fed.rows[1:]
    assert [f['client'] for f in row['failures']] in ([2], [-1, 2]) and {f['kind'] for f in row['failures']} <= kinds
    assert row['failures'][-1]['kind'] in kinds and row['clients_ok'] == 4 and row['state'] == 'ok' and after['failures'] == []
    for f in row['failures']: assert 0 < len(f['reason']) < 500 and '\n' not in f['reason'] and f['reason'].encode()
    assert json.loads(json.dumps(fed.rows, allow_nan=False)) == fed.rows
    assert state_hash(fed.state) == without_client_2()

def test_there_are_enough_poisons(): assert len(TABLE) + len(BY_PIPE) >= 110 and {kind for kind, _ in TABLE} == {'error', 'invalid', 'diverged'}

@pytest.mark.parametrize('kind, what', TABLE)
def test_each_poison_is_named_by_its_kind_and_one_client_is_one_client(kind, what):
    assert_one_is_left_out(spoilt_round(POISONS[kind][what], serial), {kind})

@pytest.mark.parametrize('what', BY_PIPE)
def test_what_cannot_be_sent_is_left_out_as_well(what):
    assert_one_is_left_out(spoilt_round(BY_PIPE[what], serial), {'invalid'})
    with Processes(2) as team: assert_one_is_left_out(spoilt_round(BY_PIPE[what], team), {'invalid', 'error'})

@pytest.mark.parametrize('kind', POISONS)
def test_each_poison_has_its_kind_in_two_processes(kind):
    "One team for all, as a long run would have it; a round a poison."
    names = [what for what in POISONS[kind] if what != 'cut short']  # there it is whatever the worker's memory holds
    def train(state, client, round): return POISONS[kind][names[round - 1]](normal(state, client, round)) if client == 2 else normal(state, client, round)
    with Processes(2, time_limit=60.) as team:
        fed = Federation(copy_state(START), 5, train, execute=team)
        fed.fit(len(names))
    wrong = {what: row['failures'] for what, row in zip(names, fed.rows[1:]) if [(f['client'], f['kind']) for f in row['failures']] != [(2, kind)] or row['clients_ok'] != 4}
    early = {'early', 'late', 'round None', 'round text', 'round array'}  # these name a round by number, and are played in another one
    assert not wrong.keys() - early, wrong

def test_numbers_of_other_kinds_are_a_good_clients():
    "numpy's numbers, fractions and truth values are numbers; rows and checkpoints hold Python's."
    def train(state, client, round):
        u = normal(state, client, round)
        if client == 0: return replace(u, client=np.int64(0), round=np.int32(round), weight=np.float32(10), metrics={'train_loss': np.float32(1), 'images': np.int64(10), 'seconds': np.float64(.1)})
        if client == 1: return replace(u, weight=Fraction(11), metrics={'train_loss': Fraction(1), 'images': 10, 'seconds': True, 'extra': 10**30})
        return u
    fed, plain = Federation(copy_state(START), 5, train), Federation(copy_state(START), 5, normal)
    fed.fit(2), plain.fit(2)
    assert state_hash(fed.state) == state_hash(plain.state) and [r['failures'] for r in fed.rows] == [[]] * 3
    assert json.loads(json.dumps(fed.rows, allow_nan=False)) == fed.rows and fed.rows[-1]['train_loss'] == 1.

@pytest.mark.parametrize('weight', [1e308, 10**308])
def test_weights_whose_sum_overflows_are_weights(weight):
    fed = Federation(copy_state(START), 3, lambda s, c, r: replace(normal(s, c, r), weight=weight))
    fed.fit(1)
    assert fed.rows[-1]['clients_ok'] == 3 and json.dumps(fed.rows, allow_nan=False)

def test_clients_that_an_executor_never_answers_for_are_lost():
    def execute(train, state, clients, round): return [a for a in serial(train, state, clients, round) if a[0] < 2]
    fed = Federation(copy_state(START), 5, normal, execute=execute)
    row = fed.fit(1).iloc[-1]
    assert [(f['client'], f['kind']) for f in row.failures] == [(2, 'lost'), (3, 'lost'), (4, 'lost')] and (row.clients_ok, row.clients_failed) == (2, 3)

def test_a_message_that_cannot_be_decoded_is_its_clients():
    def decode(message, before): return {'w': before['w'] + message['w'], 'b': before['b'], 'seen': before['seen']}
    def train(state, client, round): return Update(client, round, {'w': torch.ones(3)} if client else {'other': torch.ones(3)}, 1.)
    fed = Federation(copy_state(START), 3, train, decode=decode)
    assert [(f['client'], f['kind']) for f in fed.fit(1).iloc[-1].failures] == [(0, 'invalid')]

@pytest.mark.parametrize('length', [3., 1e3, 1e6])
def test_of_two_clients_one_cannot_carry_the_model_away(length):
    "The other's change and the length of the model, later those of earlier rounds, are what is usual."
    def train(state, client, round): return Update(client, round, {'w': state['w'] + (length if client and round == 2 else .1)}, 1.)
    fed = Federation({'w': torch.ones(4)}, 2, train)
    failures = fed.fit(2).iloc[-1].failures
    assert [f['kind'] for f in failures] == ['diverged'] * (length > 100)


# ---- checkpoints hold any run, and are never thrown away for nothing

def kept_run(folder, rounds=2, **kwargs):
    "A federation with everything to remember, that writes a checkpoint after each round."
    fed = adapted(**kwargs)
    fed.listeners.on_round = lambda: fed.save(folder, 'key')
    if rounds: fed.fit(rounds)
    return fed

def test_rows_of_any_length_fit_into_a_checkpoint(tmp_path):
    "A header may hold 100 MB: 366 rounds with 5,000 absent clients are more."
    fed = kept_run(tmp_path)
    absent = [{'client': c, 'kind': 'absent', 'reason': 'dropped out (simulated)'} for c in range(5000)]
    fed.memory.rows[1:] = [fed.rows[1] | {'round': t, 'failures': absent} for t in range(1, 367)]
    assert len(json.dumps(fed.rows)) > 100_000_000
    fed.save(tmp_path, 'key')
    again = kept_run(tmp_path, 0)
    assert again.restore(tmp_path, 'key') and again.rows == fed.rows and everything(again)[0] == everything(fed)[0]

def test_a_header_does_not_grow_with_clients_names_or_rows(tmp_path):
    fed = kept_run(tmp_path, 1)
    fed.memory.client_states = {c: {f'layer.{i}.weight': torch.full((1,), float(c)) for i in range(40)} for c in range(500)}
    path = fed.save(tmp_path, 'key')
    with open(path, 'rb') as f: assert int.from_bytes(f.read(8), 'little') < 100 * 600
    again = kept_run(tmp_path, 0)
    again.restore(tmp_path, 'key')
    assert everything(again)[3] == everything(fed)[3] and list(again.client_states[7]) == list(fed.client_states[7])

def test_a_checkpoint_holds_everything_that_a_later_round_depends_on(tmp_path):
    whole, first, again = kept_run(tmp_path/'whole', 5), kept_run(tmp_path/'part', 2), kept_run(tmp_path/'part', 0)
    assert again.restore(tmp_path/'part', 'key') and everything(again) == everything(first)
    again.fit(3)
    assert everything(again) == everything(whole)

def test_numbers_of_numpy_in_a_rules_memory_can_be_kept(tmp_path):
    class Rule(FedAdam):
        def state_dict(self): return super().state_dict() | {'rate': np.float32(.5), 'steps': np.int64(3), 'both': np.arange(2)}
    fed, again = kept_run(tmp_path, rule=Rule(lr=.1)), kept_run(tmp_path, 0, rule=Rule(lr=.1))
    assert again.restore(tmp_path, 'key') and (again.rule.memory['rate'], again.rule.memory['steps'], again.rule.memory['both']) == (.5, 3, [0, 1])

def write_as_before(fed, folder, key):
    "A checkpoint as the last version wrote it: the note in the header, client states tensor by tensor."
    m, rule = fed.memory, fed.rule.state_dict()
    tensors = {n: t for n, t in rule.items() if isinstance(t, torch.Tensor)}
    parts = {'state': fed.state, 'rule': tensors, 'renewed_from': m.renewed_from or {}}
    parts |= {f'client_states/{c}': s for c, s in m.client_states.items()}
    flat = {f'{part}/{n}': t for part, state in parts.items() for n, t in state.items()}
    note = json.dumps(dict(key=key, rows=m.rows, seen_clients=sorted(m.seen_clients), outdated_clients=sorted(m.outdated_clients),
                           order={part: list(s) for part, s in parts.items()}, rule={n: v for n, v in rule.items() if n not in tensors}))
    sealed = hashlib.sha256((note + state_hash(flat)).encode()).hexdigest()
    (folder/f'round-{len(fed.rows) - 1:06d}.safetensors').write_bytes(safetensors.torch.save(copy_state(flat), {'note': note, 'checksum': sealed}))

def test_a_checkpoint_of_the_last_version_is_gone_on_from(tmp_path):
    first, again, whole = kept_run(tmp_path/'new'), kept_run(tmp_path, 0), kept_run(tmp_path/'whole', 4)
    write_as_before(first, tmp_path, 'key')
    assert again.restore(tmp_path, 'key') and everything(again) == everything(first)
    again.fit(2)
    assert everything(again) == everything(whole)

def in_child(f, *args):
    "Run `f` in a forked process and return its exit code."
    p = multiprocessing.get_context('fork').Process(target=f, args=args)
    p.start()
    p.join(60)
    return p.exitcode

def _restore_refused(folder, words, prepare):
    fed, said = kept_run(folder, 0), []
    prepare(folder)
    try: fed.restore(folder, 'key', said.append)
    except InputError as e: os._exit(0 if all(w in str(e) for w in ('now', *words)) and not said and fed.rows == [] else 5)
    os._exit(4)

def too_many_files(folder):
    fd = os.open(folder, os.O_RDONLY)  # the first free number: from here on nothing can be opened
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd, 4096))

def nobody(folder):
    for path in folder.iterdir(): path.chmod(0o600)
    for p in (folder, *list(folder.parents)[:3]): p.chmod(p.stat().st_mode | 0o055)
    os.seteuid(65534)

def nobody_looks(folder):
    folder.chmod(0o700)
    for p in list(folder.parents)[:3]: p.chmod(p.stat().st_mode | 0o055)
    os.seteuid(65534)

CANNOT = {'too many open files': (too_many_files, ['Too many open files']), 'files of somebody else': (nobody, ['Permission denied', 'left as it is']),
          'a folder of somebody else': (nobody_looks, ['Permission denied'])}

@pytest.mark.parametrize('why', CANNOT)
def test_a_checkpoint_that_cannot_be_read_now_is_not_thrown_away(why, tmp_path):
    prepare, words = CANNOT[why]
    if prepare is not too_many_files and os.geteuid(): pytest.skip('only root can become somebody else')
    folder = tmp_path/'run'
    first = kept_run(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert in_child(_restore_refused, folder, words, prepare) == 0
    folder.chmod(0o755)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(before) == 2
    again = kept_run(folder, 0)
    assert again.restore(folder, 'key') and everything(again) == everything(first)

@pytest.mark.parametrize('error', [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_whatever_keeps_a_file_from_being_opened_it_is_left_alone(error, tmp_path, monkeypatch):
    kept_run(tmp_path)
    before, again = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, kept_run(tmp_path, 0)
    def refuse(*args, **kwargs): raise OSError(error, os.strerror(error))
    with monkeypatch.context() as m:
        m.setattr('pathlib.Path.read_bytes', refuse)
        m.setattr('io.open', refuse)
        with pytest.raises(InputError, match='cannot be read now'): again.restore(tmp_path, 'key')
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and again.restore(tmp_path, 'key')
