"The round loop over toy clients: order, every kind of failure, sampling, bytes, and what a void round leaves behind."
import json
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.core import InputError, Update, copy_state, rng, serialised_bytes, state_hash
from fedsq_nb.engine.execute import WorkerLost, serial
from fedsq_nb.engine.federate import Diverged, Federation, Limits, RoundVoid, Sampling, absent_clients, sample_clients
from fedsq_nb.server.aggregate import any_diverged

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

@pytest.mark.parametrize('stop', [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_is_no_clients_failure(stop):
    def train(state, client, round): raise stop
    with pytest.raises(stop): Federation(copy_state(START), 2, train).fit(1)

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
