"The whole table of methods: same bits for any number of workers and after a resume, reductions to FedAvg and FedSQ, poison on every server rule, missing clients."
import dataclasses, functools, json, math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedsq_nb.core import InputError, Update, copy_state, norm, rng, state_hash, sub
from fedsq_nb.study.config import Config
from fedsq_nb.study.experiment import compare, run
from fedsq_nb.study.folder import read_lines, sealed_line
from fedsq_nb.study.task import load_task
from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.study.settings import MethodSettings
from fedsq_nb.engine.federate import Diverged, Federation, Limits, RoundVoid
from fedsq_nb.study.methods import METHODS, Method, Source, add_method, known_values, method_of, method_table

TINY = dict(weights='random', lr='0.02', seeds=1, rounds=2, clients=7, alpha=1., min_size=4, batch_size=8, max_train=90, valid_fraction=.05, test_fraction=.05, workers=1, dp_noise=.01, dp_seeded_noise=True)
MIXED = ['fedsq+fedprox', 'fedsq+fedadam', 'fedsq+scaffold', 'fedsq+fedbn', 'fedsq+krum', 'fedsq+int8', 'fedsq+moon', 'fedsq+private', 'scaffold+fedyogi', 'fedsq_refresh+scaffold',
         'feddyn+topk', 'scaffold+int8', 'fedbn+moon+topk', 'clipped+fedavgm', 'head+fedadam', 'fedsq_refresh+fedbn+fedprox+fp16']

@functools.cache
def task_of(**settings): return load_task(Config(**TINY | dict(methods=('fedavg',)) | settings))

def with_config(task, **settings): return dataclasses.replace(task, config=task.config.replace(**settings))
def timeless(rows): return [{k: v for k, v in r.items() if not k.endswith('seconds')} for r in rows]
def same(a, b):
    assert timeless(a.rows) == timeless(b.rows) and state_hash(a.state) == state_hash(b.state)
    assert {c: state_hash(s) for c, s in a.client_states.items()} == {c: state_hash(s) for c, s in b.client_states.items()}
    assert a.memory.seen_clients == b.memory.seen_clients and a.memory.outdated_clients == b.memory.outdated_clients
    assert state_hash(a.memory.renewed_from or {}) == state_hash(b.memory.renewed_from or {})

class Stopped(Exception): "Somebody stopped the run."
def stop_after(task, method, rounds, checkpoints):
    "Play so many rounds and a part of the next, as if the process had been killed there."
    def on_row(row):
        if row['round'] == rounds + 1: raise Stopped
    with pytest.raises(Stopped): run(task, method, 0, .02, on_row=on_row, checkpoints=checkpoints)

# ---- the same bits whoever trains, and after a stop

@pytest.mark.parametrize('method', [*METHODS, *MIXED])
def test_the_same_bits_with_workers_and_after_a_stop(method, tmp_path):
    task = task_of()
    whole = run(task, method, 0, .02)
    assert [r['state'] for r in whole.rows] == ['ok']*3 and whole.rows[-1]['clients_ok'] == 7
    assert state_hash(whole.state) != whole.rows[0]['weights']
    stop_after(task, method, 1, tmp_path)
    gone_on = run(with_config(task, workers=2), method, 0, .02, checkpoints=tmp_path)
    same(gone_on, whole)

# ---- private runs

def differ(a, b): return norm(sub(a.state, b.state)) > 1e-3
def releases(fed): return [r.get('releases') for r in fed.rows]

def test_private_noise_is_the_systems_unless_a_test_asks_for_the_seeds():
    "The same run twice is two draws; in test mode it is one, and in a run without it the seed does not give the mean away."
    real, test = task_of(dp_seeded_noise=False), task_of()
    assert differ(*(run(real, 'private', 0, .02) for _ in range(2)))
    same(*(run(test, 'private', 0, .02) for _ in range(2)))
    assert releases(run(real, 'fedsq+private', 0, .02)) == [None, 1, 2] and 'releases' not in run(real, 'fedavg', 0, .02).rows[-1]

@pytest.mark.parametrize('every', [1, 2])
def test_a_private_run_that_goes_on_uses_no_noise_twice_and_counts_every_release(every, tmp_path):
    "Two stops; each may have lost as many rounds as lie between two checkpoints, and the count outlasts the next stop."
    task = task_of(dp_seeded_noise=False, rounds=5, checkpoint_every=every)
    seen = []
    def stopped_at(last):
        def on_row(row):
            seen.append((row['round'], row['weights'], row.get('releases')))
            if row['round'] == last: raise Stopped
        with pytest.raises(Stopped): run(task, 'private', 0, .02, on_row=on_row, checkpoints=tmp_path)
    stopped_at(3)
    stopped_at(4)
    end = run(task, 'private', 0, .02, on_row=lambda row: seen.append((row['round'], row['weights'], row.get('releases'))), checkpoints=tmp_path)
    drawn = {(t, w) for t, w, _ in seen if t}  # models that somebody has seen, told more than once when a run goes on
    assert len(drawn) > 5 and len({t for t, _ in drawn}) == 5
    assert len(drawn) <= end.rows[-1]['releases'] <= 5 + 2*every

def rewrite(folder, change):
    "The rows of a run, each as `change` makes it, as if the run had written them."
    rows = read_lines(folder/'rounds.jsonl')
    (folder/'rounds.jsonl').write_text(''.join(sealed_line(change(row)) for row in rows))
    (folder/'SHA256SUMS').unlink(missing_ok=True)

@pytest.mark.parametrize('seeded', [False, True])
def test_the_promise_and_the_report_say_where_the_noise_came_from(seeded, tmp_path):
    pytest.importorskip('dp_accounting')
    from fedsq_nb.study.report import report
    said = []
    config = Config(**TINY | dict(methods=('fedavg', 'private'), dp_noise=2., dp_seeded_noise=seeded, out=str(tmp_path/'out')))
    done = compare(config, say=said.append)
    for text in ([s for s in said if s.startswith('private:')][0], report(tmp_path/'out').read_text()):
        assert ('TEST MODE, no promise' in text) == seeded and ('-differentially private for each client' in text) != seeded
    assert [r for r in done.rows[done.rows.method == 'private'].releases] [1:] == [1, 2]
    rewrite(tmp_path/'out', lambda row: {k: v for k, v in row.items() if k != 'releases'})
    assert 'TEST MODE, no promise' in report(tmp_path/'out').read_text()  # of a version that knew no other noise

def test_the_report_counts_rounds_that_were_played_again(tmp_path):
    pytest.importorskip('dp_accounting')
    from fedsq_nb.server.privacy import epsilon
    from fedsq_nb.study.folder import read_rows
    from fedsq_nb.study.report import report
    from fedsq_nb.study.tables import notes
    config = Config(**TINY | dict(methods=('private',), dp_noise=2., out=str(tmp_path/'out')))
    compare(config.replace(dp_seeded_noise=False), say=lambda note: None)
    rewrite(tmp_path/'out', lambda row: row | ({'releases': row['releases'] + 3} if row.get('releases') else {}))
    text = report(tmp_path/'out').read_text()
    assert 'at most 3 that were played again' in text and f'({epsilon(2., 2, 1., 1e-5, repeated=3):.3g}, 1e-05)' in text
    assert any('up to 3 rounds' in note for note in notes(read_rows(tmp_path/'out')))

@pytest.mark.parametrize('method', ['scaffold', 'fedsq_refresh', 'feddyn', 'fedbn', 'topk', 'fedadam', 'private'])
def test_the_same_bits_when_few_take_part(method, tmp_path):
    "Clients come back after rounds without them, and find what they kept."
    task = task_of(per_round=3, rounds=5, client_dropout=.2, stragglers=.4, sampling='size')
    whole = run(task, method, 0, .02)
    same(run(with_config(task, workers=2), method, 0, .02), whole)
    for rounds in (1, 3): stop_after(task, method, rounds, tmp_path)
    same(run(task, method, 0, .02, checkpoints=tmp_path), whole)

def test_every_method_does_something_else():
    hashes = {m: state_hash({n: t for n, t in run(task_of(), m, 0, .02).state.items() if not n.startswith('control/')}) for m in METHODS}
    alike = {m: [o for o in hashes if o != m and hashes[o] == hashes[m]] for m in hashes}
    assert {m: o for m, o in alike.items() if o} == {}

# ---- reductions

def final(method, **settings): return state_hash({n: t for n, t in run(task_of(**settings), method, 0, .02).state.items() if not n.startswith('control/')})

@pytest.mark.parametrize('method, settings', [
    ('fedprox', dict(mu=0.)), ('fedavgm', dict(server_momentum=0.)), ('moon', dict(moon_mu=0.)), 
    ('clipped', dict(clip=1e9)), ('fedavg', dict(refresh=1)), ('fedavg', dict(gate_source='random'))])
def test_methods_whose_setting_is_nothing_are_fedavg(method, settings):
    ways = [run(task_of(**settings), m, 0, .02) for m in (method, 'fedavg')]
    assert norm(sub(ways[0].state, ways[1].state)) <= 1e-5 * norm(sub(ways[1].state, run(task_of(**settings), 'fedavg', 0, .02, rounds=1).state))

def test_gates_that_are_never_renewed_are_fedsq(): assert final('fedsq', refresh=99) == final('fedsq')
def test_the_first_round_of_scaffold_is_fedavg(): assert final('scaffold', rounds=1) == final('fedavg', rounds=1)
def test_order_of_parts_does_not_matter(): assert final('fedsq+fedprox+fedadam') == final('fedadam+fedsq+fedprox')

def test_gates_renewed_every_round_are_the_global_models():
    fed = run(task_of(), 'fedsq_refresh', 0, .02)
    assert all(v == 0 for v in run(task_of(rounds=1), 'fedsq_refresh', 0, .02).rows[0]['gate_disagreement'].values())
    assert state_hash(fed.memory.renewed_from) != state_hash(fed.state) and fed.memory.renewed_from.keys() == fed.state.keys()

# ---- bytes

def test_bytes_of_what_travels():
    sent = {m: run(task_of(), m, 0, .02).rows for m in ('fedavg', 'scaffold', 'fp16', 'int8', 'topk', 'fedbn', 'head', 'fedsq', 'fedsq_refresh')}
    up = {m: rows[-1]['bytes_up'] / sent['fedavg'][-1]['bytes_up'] for m, rows in sent.items()}
    assert up['fedsq'] == 1 and up['fedsq_refresh'] == 1 and up['fedbn'] < 1 and up['head'] < .2
    assert 1.9 < up['scaffold'] < 2.1 and .45 < up['fp16'] < .6 and .22 < up['int8'] < .45 and up['topk'] < .3
    down = {m: [r['bytes_down'] for r in rows] for m, rows in sent.items()}
    assert down['fedsq'][1] > down['fedavg'][1] and down['fedsq'][2:] == down['fedavg'][2:] == down['fedsq_refresh'][2:]

def test_who_was_away_when_gates_were_renewed_gets_the_state_they_came_from():
    fed = run(task_of(per_round=2, rounds=6), 'fedsq_refresh', 0, .02)
    plain = run(task_of(per_round=2, rounds=6), 'fedsq', 0, .02)
    assert [r['bytes_down'] for r in fed.rows] == [r['bytes_down'] for r in plain.rows]  # renewed each round: everybody has just got it
    slow = run(task_of(per_round=2, rounds=6, refresh=3), 'fedsq', 0, .02)
    assert sum(r['bytes_down'] for r in slow.rows) >= sum(r['bytes_down'] for r in plain.rows)

# ---- clients that go missing or do less

def test_clients_that_vanish_are_rows():
    fed = run(task_of(client_dropout=.4, rounds=6), 'fedavg', 0, .02)
    gone = [f for r in fed.rows for f in r['failures']]
    assert gone and {f['reason'] for f in gone} == {'dropped out (simulated)'}
    assert all(r['clients_ok'] + r['clients_failed'] == 7 for r in fed.rows[1:])

def test_a_quorum_stops_the_run_so_that_it_can_go_on(tmp_path):
    job = Config(**TINY | dict(methods=('fedavg',), client_dropout=.9, min_clients=5, out=str(tmp_path/'out')))
    with pytest.raises(RoundVoid, match='round 1: .* of 7 clients failed .*dropped out'): compare(job, say=lambda note: None)
    rows = [json.loads(line) for line in (tmp_path/'out'/'rounds.jsonl').read_text().splitlines()]
    assert [r['state'] for r in rows] == ['ok', 'void'] and rows[-1]['val_accuracy'] is None and (tmp_path/'out'/'checkpoints').is_dir()

def test_stragglers_do_less():
    full, less = (run(task_of(stragglers=s, local_epochs=4), 'fedavg', 0, .02).rows for s in (0., 1.))
    assert all(0 < b['images'] < a['images'] for a, b in zip(full[1:], less[1:]))
    assert len({r['images'] for r in less[1:]}) > 1

def test_sampling_by_size_prefers_the_large():
    task = task_of(per_round=1, rounds=40, sampling='size', alpha=.3, min_size=4)
    sizes = np.array([len(p) for p in task.parts(0)])
    from fedsq_nb.engine.federate import sample_clients
    often = np.bincount([sample_clients(7, 1, seed=0, round=t, sizes=sizes)[0] for t in range(1, 2001)], minlength=7) / 2000
    assert np.abs(often - sizes/sizes.sum()).max() < .04

@pytest.mark.parametrize('settings, words', [
    (dict(fraction=.5, per_round=2), 'both say how many clients'), (dict(fraction=1.5), 'fraction 1.5 must be 1 or less'), (dict(client_dropout=-.1), 'dropout -0.1 must be'), (dict(stragglers=2), 'stragglers 2.0 must be'),
    (dict(sampling='sizes'), "did you mean 'size'"), (dict(compress='int9'), 'int9'), (dict(compress='topk:0'), 'topk'), (dict(dyn_alpha=0), 'dyn_alpha 0.0 must be a number above 0'),
    (dict(methods='fedavg,fedavg+krm'), "did you mean 'krum'"), (dict(methods='krum+median'), 'both decide how the server averages'), (dict(gate_source='rand'), "did you mean 'random'")])
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(InputError) as e: Config(**settings)
    assert words in str(e.value)

@pytest.mark.parametrize('method, settings', [('krum', dict(clients=4)), ('bulyan', dict(clients=6)), ('bulyan', dict(malicious=3)), ('krum', dict(per_round=3)), ('trimmed', dict(trim=.6))])
def test_rules_that_need_more_clients_are_refused_before_anything_is_trained(method, settings, tmp_path):
    with pytest.raises(InputError): compare(Config(**TINY | dict(methods=(method,), out=str(tmp_path/'out')) | settings), say=lambda note: None)
    assert not (tmp_path/'out').exists()

def test_a_fraction_of_the_clients(): assert load_task(Config(**TINY | dict(fraction=.43))).config.per_round == 3
def test_all_means_the_whole_table(): assert Config(methods='all').methods == tuple(METHODS)

# ---- one poisoned client of ten, on every server rule

START = {'w': torch.tensor([1., -2., 3., .5]), 'b': torch.tensor([[.5]]), 'n': torch.tensor(4)}
def honest(client, round=1):
    gen = rng(5, 'honest', client, round)
    return Update(client, round, {k: v + torch.from_numpy(gen.normal(size=tuple(v.shape))*.1).to(v) if v.is_floating_point() else v + 1 for k, v in START.items()}, 10. + client, {'steps': 3, 'train_loss': 1.})

def state_with(u, **tensors): return dataclasses.replace(u, state=u.state | tensors)
POISON = {
    'nan': lambda u: state_with(u, w=u.state['w']*math.nan), 'inf': lambda u: state_with(u, b=u.state['b'] + math.inf), '1e30': lambda u: state_with(u, w=u.state['w'] + 1e30),
    '1e38, whose square is too large': lambda u: state_with(u, w=u.state['w'] + 1e38), 'wrong shape': lambda u: state_with(u, w=u.state['w'][:3]), 'one number for all': lambda u: state_with(u, w=u.state['w'][:1]),
    'missing tensor': lambda u: dataclasses.replace(u, state={'w': u.state['w'], 'n': u.state['n']}), 'another tensor': lambda u: state_with(u, x=torch.zeros(1)), 'wrong type': lambda u: state_with(u, w=u.state['w'].double()),
    'negative weight': lambda u: dataclasses.replace(u, weight=-5.), 'no weight': lambda u: dataclasses.replace(u, weight=0), 'weight nan': lambda u: dataclasses.replace(u, weight=math.nan),
    'huge weight': lambda u: dataclasses.replace(u, weight=1e12), 'stale round': lambda u: dataclasses.replace(u, round=0), 'round to come': lambda u: dataclasses.replace(u, round=7), "another's name": lambda u: dataclasses.replace(u, client=2)}
RULES = sorted(m for m, method in METHODS.items() if method.rule is not METHODS['fedavg'].rule or method.wrap_rule is not METHODS['fedavg'].wrap_rule or m == 'fedavg')

def rule_of(name):
    return METHODS[name].make_rule(**known_values(client_sizes=[10 + c for c in range(10)], algorithms=MethodSettings(dp_seeded_noise=True)))

def play(name, answer, rounds=2):
    "A federation of ten whose clients answer as told."
    start = START | ({'control/w': torch.zeros(4)} if METHODS[name].control else {})
    def execute(train, state, clients, round):
        for c in clients:
            u = honest(c, round)
            if METHODS[name].control: u = state_with(u, **{'control/w': u.state['w'] - START['w']})
            yield from answer(c, u)
    fed = Federation(copy_state(start), 10, lambda *a: None, rule=rule_of(name), execute=execute)
    fed.fit(rounds)
    return fed

@pytest.mark.parametrize('kind', POISON)
@pytest.mark.parametrize('rule', RULES)
def test_a_poisoned_client_changes_nothing(rule, kind):
    nine = play(rule, lambda c, u: [] if c == 4 else [(c, u)])
    bad = play(rule, lambda c, u: [(c, POISON[kind](u) if c == 4 else u)])
    assert state_hash(bad.state) == state_hash(nine.state) and state_hash(nine.state) != state_hash(START)
    assert [[f['client'] for f in r['failures']] for r in bad.rows[1:]] == [[4], [4]] and all(f['reason'] for r in bad.rows for f in r['failures'])

@pytest.mark.parametrize('rule', RULES)
def test_an_answer_that_comes_twice_counts_once(rule):
    once = play(rule, lambda c, u: [(c, u)])
    twice = play(rule, lambda c, u: [(c, u)] + [(c, state_with(u, w=u.state['w'] + 1))]*(c == 4))
    assert state_hash(once.state) == state_hash(twice.state) and [f['client'] for f in twice.rows[1]['failures']] == [4]

def test_an_answer_that_nobody_asked_for():
    fed = play('fedavg', lambda c, u: [(c, u)] + ([(17, dataclasses.replace(u, client=17))] if c == 0 else []))
    assert [(f['client'], f['reason']) for f in fed.rows[1]['failures']] == [(17, 'sent an update that nobody asked for')]

def test_a_rule_that_has_too_few_left_stops_the_run():
    with pytest.raises(RoundVoid, match='round 1: Krum.*needs 5 or more updates and has 4'): play('krum', lambda c, u: [(c, u if c < 4 else OSError('gone'))])

def test_too_few_left_because_numbers_ran_away_is_a_divergence():
    with pytest.raises(Diverged, match='needs 5 or more updates') as e: play('krum', lambda c, u: [(c, u if c < 4 else state_with(u, w=u.state['w']*math.inf))])
    assert type(e.value) is Diverged

def test_control_variates_are_not_private():
    with pytest.raises(InputError, match='would not be private'): method_of('scaffold+private')

def test_limits_can_be_taken_away():
    far = lambda c, u: [(c, state_with(u, w=u.state['w'] + 1e6) if c == 4 else u)]
    fed = Federation(copy_state(START), 10, lambda *a: None, execute=lambda t, s, cs, r: (p for c in cs for p in far(c, honest(c, r))), limits=Limits(norm_limit=None))
    fed.fit(1)
    assert fed.rows[-1]['clients_ok'] == 10 and fed.state['w'].max() > 1e4

def test_honest_clients_of_unequal_size_are_not_outliers():
    "A change ten times the median, from a client a hundred times the size, is kept."
    big = lambda c, u: [(c, dataclasses.replace(state_with(u, w=START['w'] + 10*(u.state['w'] - START['w'])), weight=1500.) if c == 4 else u)]
    fed = Federation(copy_state(START), 10, lambda *a: None, execute=lambda t, s, cs, r: (p for c in cs for p in big(c, honest(c, r))))
    fed.fit(1)
    assert fed.rows[-1]['clients_ok'] == 10

# ---- the table, and what is put in it

TABLE = pd.read_csv(Path(__file__).with_name('method_table.csv'), index_col='method', dtype=str)

def test_the_table_says_of_every_method_what_it_said():
    pd.testing.assert_frame_equal(method_table().loc[list(TABLE.index)], TABLE)
    assert list(METHODS)[:len(TABLE)] == list(TABLE.index) and len(TABLE) == 31

@pytest.fixture
def table():
    "A table that is as before when the test is over."
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)

class HalfWay:
    "Half the way to the mean."
    def step(self, state, updates):
        mean = FedAvg().step(state, updates)
        return {n: torch.lerp(state[n], t, .5) if t.is_floating_point() else t for n, t in mean.items()}

def test_a_method_in_ten_lines_is_compared_combined_and_listed(table):
    add_method('half', Method(rule=HalfWay, source=Source('this test', passes='1')))
    names = ('fedavg', 'half', 'fedsq+half', 'half+fedprox+int8')
    found = compare(Config(**TINY | dict(methods=names, mu=1.)), say=lambda note: None)
    last = found.rows[found.rows['round'] == 2].set_index('method')
    assert list(last.index) == list(names) and last.weights.nunique() == 4 and last.val_accuracy.notna().all()
    assert list(found.last_rows().index) == list(names)
    assert method_table().loc['half', 'source'] == 'this test' and Config(methods='all').methods[-1] == 'half'

def test_makers_get_what_they_name_and_nothing_else(table):
    asked = []
    def callbacks(mu, client_lr, seed=7): asked.append(('callbacks', mu, client_lr, seed)); return []
    def rule(clients_per_round, client_sizes, trim, other='own'): asked.append(('rule', clients_per_round, list(client_sizes), trim, other)); return FedAvg()
    add_method('curious', Method(callbacks=callbacks, rule=rule))
    fed = run(with_config(task_of(), mu=.25, trim=.2, per_round=3), 'curious', 0, .02, rounds=1)
    assert ('callbacks', .25, .02, 0) in asked and ('rule', 3, [len(p) for p in task_of().parts(0)], .2, 'own') in asked and fed.rows[-1]['state'] == 'ok'

@pytest.mark.parametrize('name', ['', 'all', 'a+b', 'a,b', 'a b', 'a=b'])
def test_names_that_could_not_be_written_are_refused(name, table):
    with pytest.raises(InputError, match='must be a word'): add_method(name, Method())
    assert name not in table

def test_a_name_is_taken_over_only_when_told(table):
    with pytest.raises(InputError, match="'fedprox' is in the table already.*replace=True"): add_method('fedprox', Method(rule=HalfWay))
    assert method_of('fedprox') != Method(rule=HalfWay)
    add_method('fedprox', Method(rule=HalfWay), replace=True)
    assert method_of('fedprox') == Method(rule=HalfWay) and list(table)[:31] == list(TABLE.index)

@pytest.mark.parametrize('method, words', [
    (Method(rule=lambda server_rl: FedAvg()), "argument of 'mine', rule: 'server_rl': did you mean 'server_lr'?"),
    (Method(callbacks=lambda config: []), "argument of 'mine', callbacks: 'config'"),
    (Method(wrap_rule=lambda rule, clp: rule), "argument of 'mine', wrap_rule: 'clp'")])
def test_makers_that_ask_for_what_nobody_knows_are_refused(method, words, table):
    with pytest.raises(InputError) as e: add_method('mine', method)
    assert words in str(e.value) and 'mine' not in table

def test_every_pair_composes_or_says_why_not():
    "Two parts go together exactly when they leave each other's fields alone, and what is made of them has the facts of both."
    for a in METHODS:
        for b in METHODS:
            one, two = METHODS[a], METHODS[b]
            free = [f.name for f in dataclasses.fields(Method) if f.name in ('parametrise', 'rule', 'wrap_rule', 'local_names', 'control')]
            clash = [f for f in free if getattr(one, f) != getattr(Method(), f) and getattr(two, f) != getattr(Method(), f)]
            option = set(dict(one.settings)) & set(dict(two.settings))
            secret = {a, b} == {'scaffold', 'private'}
            if a == b or clash or option or secret:
                with pytest.raises(InputError, match='names a part twice|both decide|set the same option|would not be private'): method_of(f'{a}+{b}')
                continue
            both = method_of(f'{a}+{b}')
            assert both.parts == (a, b) and dict(both.settings) == dict(one.settings) | dict(two.settings)
            assert all(getattr(both, fact) == (getattr(one, fact) or getattr(two, fact)) for fact in ('gated', 'proximal', 'private', 'control'))
            known = known_values(client_sizes=[10]*10)
            assert [type(cb) for cb in both.make_callbacks(**known)] == [type(cb) for m in (one, two) for cb in m.make_callbacks(**known)]

def test_facts_say_what_a_method_is():
    assert [m for m in METHODS if METHODS[m].gated] == [m for m in METHODS if m.startswith('fedsq')]
    assert [m for m in METHODS if METHODS[m].proximal] == ['fedprox'] and [m for m in METHODS if METHODS[m].private] == ['private']
    known = known_values(client_lr=.1, client_sizes=[1, 2], algorithms=MethodSettings(mu=.5))
    assert method_of('fednova').make_rule(**known).proximal == 0 and method_of('fednova+fedprox').make_rule(**known).proximal == .1*.5

# ---- what is counted

def test_rows_count_drift_cosine_images_and_seconds():
    fed = run(task_of(), 'fedavg', 0, .02)
    last = fed.rows[-1]
    assert last['images'] == sum(len(p) for p in task_of().parts(0)) and last['drift_max'] >= last['drift'] > 0 and -1 <= last['cosine'] <= 1
    assert last['local_seconds'] > 0 and 0 < last['server_seconds'] < last['seconds']

def test_the_dear_measures():
    task = task_of(per_client=True, gap=True)
    plain, gated, scaffold = (run(task, m, 0, .05).rows[-1] for m in ('fedavg', 'fedsq', 'fedsq+scaffold+fedbn'))
    for row in (plain, gated, scaffold):
        assert 0 <= row['clients_before_worst'] <= row['clients_before'] <= 1 and 0 <= row['clients_after_worst'] <= row['clients_after'] <= 1
        assert row['gap'] > 0
    assert gated['gap_crossing'] == scaffold['gap_crossing'] == 0 and plain['gap_crossing'] > 0

def test_measures_do_not_disturb():
    assert final('fedsq', per_client=True, gap=True) == final('fedsq') and final('fedavg', gap=True) == final('fedavg')
