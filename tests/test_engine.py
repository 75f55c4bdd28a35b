"The engine: one result whoever executes it, clients and processes that fail, checkpoints that are damaged, and runs that are killed."
import contextlib, dataclasses, errno, functools, json, multiprocessing, os, pickle, resource, signal, subprocess, sys, threading, time, tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fedsq_nb.cli, fedsq_nb.study.report
from fedsq_nb.server.aggregate import weighted_mean
from fedsq_nb.cli import main
from fedsq_nb.core import InputError, Update, copy_state, rng, save_state, state_hash
from fedsq_nb.study.folder import read_lines
from fedsq_nb.study.config import Config, read_toml
from fedsq_nb.study.experiment import compare, run
from fedsq_nb.study.task import load_task
from fedsq_nb.study.methods import METHODS
from fedsq_nb.engine.execute import Processes, serial
from fedsq_nb.engine.federate import Federation, Limits, RoundVoid, Sampling
from processes import gone, running

SMALL = dict(weights='random', lr='0.02', seeds=1, rounds=2, clients=4, alpha=1., min_size=4, batch_size=8, max_train=60, valid_fraction=.05, test_fraction=.05)
START = {'w': torch.tensor([1., -2., 3.]), 'b': torch.tensor([[.5]]), 'seen': torch.tensor(0), 'none': torch.zeros(0, 2), 'half': torch.ones(3, dtype=torch.bfloat16)}

def timeless(rows): return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in rows]

def children(pid=None):
    "Process ids of the children of `pid`, zombies too."
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(')')[2].split()[1]) == (pid or os.getpid()): found.append(int(stat.parent.name))
    return found

@pytest.fixture(autouse=True)
def nothing_left_running():
    "No test leaves a process behind, not even a zombie."
    before = set(children())
    yield
    assert set(children()) <= before

# ---- the same bits whoever trains the clients

VARIETIES = {'plain': {}, 'flips': dict(flip=True), 'flips and shifts from four views': dict(flip=True, crop=2, views=4), 'batch statistics': dict(bn='train'),
             'sampling': dict(per_round=2, rounds=4), 'no stored gates': dict(cache='off'), 'gates in a folder': dict(cache='folder')}

@functools.cache
def task_of(**settings): return load_task(Config(**SMALL | settings))

@pytest.mark.parametrize('variety', VARIETIES)
@pytest.mark.parametrize('method', ['fedavg', 'fedprox', 'fedsq'])
def test_the_same_bits_for_any_number_of_workers(method, variety, tmp_path):
    settings = VARIETIES[variety]
    if 'cache' in settings and method != 'fedsq': pytest.skip('stores no gates')
    if settings.get('cache') == 'folder': settings = settings | dict(cache=str(tmp_path))
    task, runs = task_of(**settings), []
    for workers in (1, 2, 4):
        config = task.config.replace(workers=workers, client_seconds=60.)
        runs.append(run(dataclasses.replace(task, config=config), method, 0, .02))
    assert runs[0].rows[-1]['clients_ok'] == (settings.get('per_round') or 4)
    for other in runs[1:]: assert timeless(other.rows) == timeless(runs[0].rows) and state_hash(other.state) == state_hash(runs[0].state)
    assert state_hash(runs[0].state) != runs[0].rows[0]['weights']  # something was learned

def test_a_comparison_with_calibration_is_the_same_for_any_number_of_workers():
    settings = SMALL | dict(lr='auto', rates=(.01, .03), calibration_rounds=1, calibration_seeds=1, rounds=1, methods=('fedavg', 'fedsq'), clients=3)
    one, two = (compare(Config(**settings, workers=n), say=lambda note: None) for n in (1, 2))
    assert repr(timeless(one.rows.to_dict('records'))) == repr(timeless(two.rows.to_dict('records'))) and one.rates == two.rates  # None of a start is NaN here
    assert one.calibration.equals(two.calibration)
    assert {k: state_hash(s) for k, s in one.weights.items()} == {k: state_hash(s) for k, s in two.weights.items()}

# ---- clients and processes that fail

def step(state, client, round):
    "A good client's update."
    noise = torch.from_numpy(rng(3, 'client', client, round).normal(size=3)).float()
    new = state | {'w': state['w'] + noise, 'b': state['b'] * 1.5, 'seen': state['seen'] + client, 'half': state['half'] * noise.bfloat16()}
    return Update(client, round, new, 1. + client, {'train_loss': float(noise.norm())})

def lost(*args): os.kill(os.getpid(), signal.SIGKILL)
def hangs(*args): time.sleep(600)
def raises(*args): raise OSError('disk full')
def leaves(*args): os._exit(3)
def shaped(state, client, round):
    u = step(state, client, round)
    return dataclasses.replace(u, state=u.state | {'w': torch.zeros(300_000)})

FAULTS = {
    'raises': (raises, 'OSError: disk full'),
    'is killed': (lost, 'WorkerLost: its process was killed by signal 9'),
    'leaves': (leaves, 'WorkerLost: its process ended with status 3'),
    'hangs': (hangs, 'WorkerLost: took longer than the time limit of 1 s'),
    'sends no update': (lambda *args: {'w': 1}, "dict: {'w': 1}"),
    'sends what cannot be sent': (lambda *args: lambda: 0, None),
    'sends another shape': (shaped, "'w' has shape (300000,), expected (3,)"),
    'sends another type': (lambda s, c, r: dataclasses.replace(step(s, c, r), state={k: v.double() for k, v in s.items()}), 'torch.float64'),
    'sends a list for a tensor': (lambda s, c, r: dataclasses.replace(step(s, c, r), state=s | {'w': [1., 2., 3.]}), None),
    'sends too little': (lambda s, c, r: dataclasses.replace(step(s, c, r), state={'w': s['w']}), 'missing'),
    "sends in another's name": (lambda s, c, r: step(s, 0, r), 'sent in the name of client 0'),
    'sends numbers that are not finite': (lambda s, c, r: dataclasses.replace(step(s, c, r), state=s | {'w': s['w'] / 0}), "non-finite values in 'w'")}

def faulty(act, bad=(2,), rounds=(1,)):
    "Clients of which `bad` do as `act` says in `rounds`."
    def train(state, client, round): return act(state, client, round) if client in bad and round in rounds else step(state, client, round)
    return train

def federation(train, n=5, **kwargs):
    return Federation(copy_state(START), n, train, measure=lambda s: {'val_accuracy': .5, 'hash': state_hash(s)}, **kwargs)

def without(clients, n=5, rounds=1):
    "The state after `rounds` rounds of a serial federation in which `clients` never answer in round 1."
    fed = federation(faulty(raises, clients), n)
    fed.fit(rounds)
    return fed.state

@pytest.mark.parametrize('workers', [1, 2, 4])
@pytest.mark.parametrize('fault', FAULTS)
def test_a_client_that_fails_is_named_and_the_others_are_averaged(fault, workers):
    act, reason = FAULTS[fault]
    with Processes(workers, time_limit=1.) as pool:
        fed = federation(faulty(act), execute=pool)
        row = fed.fit(1).iloc[-1]
        assert [f['client'] for f in row.failures] == [2] and (reason or '') in row.failures[0]['reason'] and '\n' not in row.failures[0]['reason']
        assert row.clients_ok == 4 and state_hash(fed.state) == state_hash(without([2]))
        row = fed.fit(1).iloc[-1]
        assert row.failures == [] and len(pool.team) == workers and all(running(w.process.pid) for w in pool.team)
        assert state_hash(fed.state) == state_hash(without([2], rounds=2))
    assert pool.team == []

@pytest.mark.parametrize('fault', [f for f in FAULTS if f not in ('is killed', 'leaves', 'hangs', 'sends what cannot be sent')])
def test_failures_are_the_same_rows_without_processes(fault):
    one = federation(faulty(FAULTS[fault][0]))
    one.fit(1)
    with Processes(2) as pool:
        two = federation(faulty(FAULTS[fault][0]), execute=pool)
        two.fit(1)
    assert [f['client'] for f in one.rows[-1]['failures']] == [2]
    assert timeless(one.rows) == timeless(two.rows) and state_hash(one.state) == state_hash(two.state)

@pytest.mark.parametrize('workers', [1, 3])
def test_many_failures_at_once(workers):
    acts = {1: lost, 2: hangs, 4: raises, 6: lost}
    def train(state, client, round): return acts.get(client, step)(state, client, round)
    with Processes(workers, time_limit=.4) as pool:
        fed = federation(train, 8, execute=pool)
        row = fed.fit(2).iloc[-1]
    assert [f['client'] for f in row.failures] == [1, 2, 4, 6] and row.clients_ok == 4
    alone = federation(lambda s, c, r: raises() if c in acts else step(s, c, r), 8)
    alone.fit(2)
    assert state_hash(fed.state) == state_hash(alone.state)

def test_a_process_that_is_killed_between_rounds_costs_nothing():
    with Processes(2) as pool:
        fed, free = federation(step, execute=pool), federation(step)
        fed.fit(1)
        victim = pool.team[0].process
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(5)
        row = fed.fit(1).iloc[-1]
        free.fit(2)
    assert row.clients_ok >= 4 and {f['reason'].split(':')[0] for f in row.failures} <= {'WorkerLost'}
    assert row.failures or state_hash(fed.state) == state_hash(free.state)

@pytest.mark.parametrize('fault', ['raises', 'is killed', 'hangs'])
def test_too_few_good_clients_make_the_round_void(fault):
    with Processes(2, time_limit=.3) as pool:
        fed = federation(faulty(FAULTS[fault][0], bad=(0, 2, 3), rounds=(2,)), 4, limits=Limits(min_clients=2), execute=pool)
        fed.fit(1)
        before, state = state_hash(fed.state), fed.state
        with pytest.raises(RoundVoid, match='round 2: 3 of 4 clients failed'): fed.fit(1)
        assert fed.state is state and state_hash(fed.state) == before and fed.rows[-1]['state'] == 'void'
        assert [f['client'] for f in fed.rows[-1]['failures']] == [0, 2, 3]

def test_a_generator_that_is_abandoned_leaves_nothing_for_the_next_round():
    def slow(state, client, round):
        if client: time.sleep(.1)
        return step(state, client, round)
    with Processes(2) as pool:
        for _ in range(3):
            for client, update in pool(slow, START, range(4), 1): break
            del client, update
        again = dict(pool(slow, {k: v * 2 for k, v in START.items()}, range(4), 2))
        assert sorted(again) == [0, 1, 2, 3] and all(u.client == c and u.round == 2 for c, u in again.items())
        want = dict(serial(step, {k: v * 2 for k, v in START.items()}, range(4), 2))
        assert all(state_hash(again[c].state) == state_hash(want[c].state) for c in want)

def test_updates_do_not_change_after_they_have_arrived():
    "One worker trains all clients in memory that it shares; each update has memory of its own."
    with Processes(1) as pool:
        seen = [(u, state_hash(u.state)) for _, u in pool(step, START, range(6), 1)]
        list(pool(step, START, range(6), 2))
    assert all(state_hash(u.state) == h for u, h in seen) and len({h for _, h in seen}) == 6

def test_the_costliest_clients_go_first():
    def train(state, client, round): return step(state, client, round)
    train.cost = lambda client: [3, 9, 1, 9, 5][client]
    with Processes(1) as pool: order = [c for c, _ in pool(train, START, range(5), 1)]
    assert order == [1, 3, 4, 0, 2]

def test_states_of_another_kind_and_other_trainings_may_follow():
    with Processes(2) as pool:
        for start in (START, {'w': torch.zeros(7)}, {'w': torch.zeros(7, dtype=torch.float64)}):
            def train(state, client, round): return Update(client, round, {n: t + 1 for n, t in state.items()}, 1)
            got = dict(pool(train, start, range(3), 1))
            assert all(state_hash(u.state) == state_hash({n: t + 1 for n, t in start.items()}) for u in got.values())

def test_workers_that_cannot_be():
    with pytest.raises(InputError, match='workers 0 must be 1 or more'): Processes(0)
    with pytest.raises(InputError, match='workers -1'): Config(workers=-1)

# ---- the parent is stopped

def _life(idle, sleep, log):
    "Federations in three workers, without an end."
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, 'w')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def train(state, client, round):
        time.sleep(sleep)
        return step(state, client, round)
    with Processes(3) as pool:
        fed = federation(train, 6, execute=pool)
        fed.fit(1 if idle else 100_000)
        time.sleep(600)

@contextlib.contextmanager
def living(idle, sleep, log):
    p = multiprocessing.get_context('fork').Process(target=_life, args=(idle, sleep, log))
    p.start()
    left = []
    try: yield p, (left := team_of(p))
    finally:
        p.kill()
        p.join()
        for pid in filter(running, left): os.kill(pid, signal.SIGKILL)

def team_of(p, n=3):
    "The workers of a process, as soon as there are so many."
    end = time.monotonic() + 60
    while len(pids := children(p.pid)) < n:
        assert time.monotonic() < end and p.is_alive()
        time.sleep(.05)
    return pids

@pytest.mark.parametrize('idle, sleep', [(True, 0.), (False, .05), (False, 600.)])
def test_workers_do_not_outlive_a_parent_that_is_killed(idle, sleep, tmp_path):
    with living(idle, sleep, tmp_path/'log') as (p, pids):
        time.sleep(.3)
        p.kill()
        p.join()
        assert gone(pids, 4.)

@pytest.mark.parametrize('sleep, wait', [(.05, 0.), (.05, .05), (.05, .3), (600., 0.), (600., .3)])
def test_ctrl_c_stops_the_workers(sleep, wait, tmp_path):
    "At once, and while they are still being forked; a client of ten minutes is not waited for. A loaded machine has a minute."
    with living(False, sleep, tmp_path/'log') as (p, pids):
        time.sleep(wait)
        for pid in (*pids, p.pid): os.kill(pid, signal.SIGINT)  # as a terminal does
        p.join(60)
        assert p.exitcode == 1 and gone(pids, 2.)
        assert (tmp_path/'log').read_text().count('KeyboardInterrupt') == 1

# ---- checkpoints

class Momentum:
    "A server rule with a tensor and plain values to remember."
    def __init__(self): self.velocity, self.steps, self.note = None, 0, {'rate': .1, 'names': ['é', 'b'], 'nothing': None}
    def step(self, state, updates):
        mean = weighted_mean([u.state for u in updates], [u.weight for u in updates])
        change = mean['w'] - state['w']
        self.velocity = change if self.velocity is None else .9*self.velocity + change
        self.steps += 1
        return mean | {'w': state['w'] + self.velocity}
    def state_dict(self): return {'steps': self.steps, 'note': self.note} | ({} if self.velocity is None else {'velocity': self.velocity})
    def load_state_dict(self, d): self.steps, self.note, self.velocity = d['steps'], d['note'], d.get('velocity')

def kept(folder, rounds=3, key='k', n=4, **kwargs):
    "A federation that writes a checkpoint after each round."
    fed = federation(step, n, rule=Momentum(), sampling=Sampling(2), first_contact_bytes=7, **kwargs)
    fed.listeners.on_round = lambda: fed.save(folder, key)
    if rounds: fed.fit(rounds)
    return fed

def restored(folder, key='k', n=4):
    "A fresh federation gone back to what `folder` holds, whether there was something, and what was said."
    fed, said = kept(folder, 0, key, n), []
    return fed, fed.restore(folder, key, said.append), said

def same(a, b):
    assert timeless(a.rows) == timeless(b.rows) and state_hash(a.state) == state_hash(b.state) and a.memory.seen_clients == b.memory.seen_clients
    assert a.rule.steps == b.rule.steps and a.rule.note == b.rule.note
    assert (a.rule.velocity is None) == (b.rule.velocity is None) and (a.rule.velocity is None or torch.equal(a.rule.velocity, b.rule.velocity))

@pytest.mark.parametrize('rounds', [1, 2, 5])
def test_a_restored_run_ends_as_one_that_went_through(rounds, tmp_path):
    whole = kept(tmp_path/'whole', 7)
    first = kept(tmp_path/'a', rounds)
    again, found, said = restored(tmp_path/'a')
    assert found and said == [] and again.rows == first.rows
    assert state_hash(again.state) == state_hash(first.state) and again.memory.seen_clients == first.memory.seen_clients and again.rule.note == first.rule.note
    again.fit(7 - rounds)
    assert timeless(again.rows) == timeless(whole.rows) and state_hash(again.state) == state_hash(whole.state) and again.memory.seen_clients == whole.memory.seen_clients
    assert torch.equal(again.rule.velocity, whole.rule.velocity) and again.rule.steps == 7

def test_a_restored_state_keeps_its_order(tmp_path):
    "Sums over tensors, such as the drift's, are taken in the order of the state; another order is another last digit."
    gen = torch.Generator().manual_seed(0)
    start = {f'{n}{i}': torch.randn(50, generator=gen).mul(10.**(i % 5)) for i, n in enumerate('zqyaxbwcvd')}
    def train(state, client, round): return Update(client, round, {n: t * (1.1 + client) for n, t in state.items()}, 1)
    def fed(folder, execute):
        f = Federation(copy_state(start), 3, train, execute=execute)
        f.listeners.on_round = lambda: f.save(folder, 'k')
        return f
    whole = fed(tmp_path/'whole', serial)
    whole.fit(8)
    for t in range(4):
        with Processes(2) as pool:
            part = fed(tmp_path/'part', pool)
            assert part.restore(tmp_path/'part', 'k') == (t > 0)
            part.fit(2)
    assert timeless(part.rows) == timeless(whole.rows) and state_hash(part.state) == state_hash(whole.state)

def test_only_two_files_are_kept_and_no_temporary_one(tmp_path):
    kept(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['round-000004.safetensors', 'round-000005.safetensors']
    assert safetensors.torch.load_file(tmp_path/'round-000005.safetensors').keys() == {*(f'state/{n}' for n in START), 'rule/velocity', 'note'}

def test_another_run_is_refused(tmp_path):
    fed = kept(tmp_path, 2)
    other = kept(tmp_path/'none', 0)
    with pytest.raises(InputError, match='belongs to another run: its settings differ'): other.restore(tmp_path, 'another key')
    assert other.rows == [] and state_hash(other.state) == state_hash(START) and other.rule.steps == 0
    assert restored(tmp_path)[1] and fed.rows

def damages(data):
    "Files that are cut short or have a flipped bit, by what happened to them."
    n, gen = len(data), rng(0, 'damage')
    header = 8 + int.from_bytes(data[:8], 'little')
    for at in sorted({0, 1, 7, 8, 9, header - 1, header, header + 1, n - 1, *gen.integers(n, size=20).tolist()}): yield f'cut at {at}', data[:at]
    for at in sorted({*range(0, 12), header - 1, header, n - 1, *gen.integers(header, size=150).tolist(), *gen.integers(header, n, size=30).tolist()}):
        bit = int(gen.integers(8))
        yield f'bit {bit} of byte {at}', data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
    yield 'zeros', bytes(n)
    yield 'longer', data + b'\0'

@pytest.mark.parametrize('alone', [False, True])
def test_a_damaged_checkpoint_is_never_gone_on_from(alone, tmp_path):
    kept(tmp_path, 3)
    before, newest = sorted(tmp_path.iterdir())
    two = kept(tmp_path/'two', 2)
    if alone: before.unlink()
    data, unnoticed = newest.read_bytes(), []
    for what, damaged in damages(data):
        newest.write_bytes(damaged)
        fed, found, said = restored(tmp_path)
        if said == [] and found and len(fed.rows) == 4:  # only where the file says the same in another way
            same(fed, kept(tmp_path/'three', 3))
            unnoticed.append(what)
            continue
        assert len(said) == 1 and newest.name in said[0] and 'damaged' in said[0] and '\n' not in said[0], (what, said)
        assert found != alone, what
        if alone: assert fed.rows == [] and state_hash(fed.state) == state_hash(START), what
        else: same(fed, two)
    assert len(unnoticed) <= 2

def test_good_checkpoints_are_kept_when_both_were_damaged(tmp_path):
    "What is written anew is not thrown away for the sake of damaged files with higher numbers."
    kept(tmp_path, 5)
    for p in tmp_path.iterdir(): p.write_bytes(p.read_bytes()[:-1])
    fed, found, said = restored(tmp_path)
    assert not found and len(said) == 2
    fed.fit(1)
    again, found, _ = restored(tmp_path)
    assert found and len(again.rows) == 2
    same(again, fed)

class Trap:
    "Leaves a file behind when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize('write', [lambda trap, path: path.write_bytes(pickle.dumps(trap)), lambda trap, path: torch.save({'state/w': trap}, path)])
def test_nothing_in_a_checkpoint_is_run(write, tmp_path):
    kept(tmp_path/'c', 2)
    write(Trap(tmp_path/'sprung'), tmp_path/'c'/'round-000009.safetensors')
    fed, found, said = restored(tmp_path/'c')
    assert found and len(said) == 1 and len(fed.rows) == 3 and not (tmp_path/'sprung').exists()
    pickle.loads(pickle.dumps(Trap(tmp_path/'sprung')))
    assert (tmp_path/'sprung').exists()  # the trap works

@pytest.mark.parametrize('where', ['fsync', 'replace'])
def test_a_full_disk_leaves_the_checkpoints_as_they_are(where, monkeypatch, tmp_path):
    fed = kept(tmp_path, 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, where, full)
        with pytest.raises(OSError, match='No space left'): fed.fit(1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    again, found, said = restored(tmp_path)
    assert found and said == []
    again.fit(2)
    same(again, kept(tmp_path/'whole', 5))

# ---- the kill test

TINY = '--weights random --seeds 2 --rounds 4 --methods fedavg,fedsq --clients 3 --alpha 5 --min-size 2 --batch-size 8 --max-train 40 --test-fraction 0.05 --valid-fraction 0.05'.split()
RATES = {'fixed': ['--lr', 'fedavg=0.02,fedsq=0.01'], 'auto': '--lr auto --rates 0.01,0.03 --calibration-rounds 1 --calibration-seeds 1'.split()}

def _command(argv, log):
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)
    fedsq_nb.study.report.report = lambda folder, **_: folder  # the page is drawn when all is done
    os._exit(main(argv))

def start(argv, log):
    "The command in a process of its own, with everything imported already."
    p = multiprocessing.get_context('fork').Process(target=_command, args=([str(a) for a in argv], str(log)))
    p.start()
    return p

def finish(p):
    p.join(60)
    p.kill()
    p.join()
    code = p.exitcode
    p.close()
    return code

def rows_of(folder): return read_lines(folder/'rounds.jsonl')
def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
def config_in(folder): return {k: v for k, v in read_toml(folder/'config.toml').items() if k not in ('out', 'resume', 'workers')}

@functools.cache
def uninterrupted(kind, folder):
    "A run that nobody stopped, and how long it took."
    began = time.monotonic()
    assert finish(start(['compare', *TINY, *RATES[kind], '--out', folder], folder.with_suffix('.log'))) == 0, folder.with_suffix('.log').read_text()
    return folder, time.monotonic() - began

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    assert main(['compare', *TINY, *RATES['fixed'], '--rounds', '1', '--out', str(tmp_path_factory.mktemp('warm')/'out')]) == 0  # imports are inherited
    return lambda kind: uninterrupted(kind, Path(tmp_path_factory.getbasetemp())/f'whole-{kind}')

def again(argv, out):
    "How to go on: with the folder alone once it knows its settings."
    return ['compare', '--resume', '--out', out] if (out/'config.toml').exists() else argv

def same_results(out, want):
    assert timeless(rows_of(out)) == timeless(rows_of(want)) and config_in(out) == config_in(want)
    a, b = tree(out), tree(want)
    assert a.keys() - {k for k in a if Path(k).name.startswith('.')} == b.keys() and not (out/'checkpoints').exists()
    for name in a.keys() & b.keys() - {'rounds.jsonl', 'config.toml', 'SHA256SUMS'}: assert a[name] == b[name], name

@pytest.mark.parametrize('kind, seed, workers', [('fixed', s, 1) for s in range(6)] + [('auto', s, 1) for s in range(4)] + [('fixed', s, 2) for s in (7, 8)])
def test_a_run_that_is_killed_at_any_instant_ends_the_same(kind, seed, workers, whole, tmp_path):
    "Killed up to three times, the first time somewhere in its own stretch of the run."
    want, seconds = whole(kind)
    gen, n = rng(seed, 'kill', kind), 6 if kind == 'fixed' else 5
    out, log, kills = tmp_path/'out', tmp_path/'log', 0
    argv = ['compare', *TINY, *RATES[kind], '--workers', workers, '--out', out, '--resume']
    for wait in (seconds * (seed % n + gen.random()) / n, seconds * gen.random() / 2, .2 * gen.random()):
        p = start(again(argv, out), log)
        p.join(wait)
        if p.exitcode is not None: assert finish(p) == 0, log.read_text(); break
        os.kill(p.pid, signal.SIGKILL)
        code = finish(p)
        if code == 0: break  # it ended on its own between the look and the kill
        assert code == -signal.SIGKILL
        kills += 1
        if (out/'config.toml').exists() and not (out/'checkpoints').exists(): break  # killed after its end
    if kills and ((out/'checkpoints').exists() or not (out/'config.toml').exists()):
        assert finish(start(again(argv, out), log)) == 0, log.read_text()
    same_results(out, want)

def test_killed_in_the_middle_of_a_write(whole, tmp_path):
    "Every write, up to the twentieth, is the one in which the run dies; what a dead write leaves is cleared away."
    want, _ = whole('auto')
    out = tmp_path/'out'
    argv, log = ['compare', *TINY, *RATES['auto'], '--out', str(out), '--resume'], tmp_path/'log'
    def dies(at):
        done, fsync = [0], os.fsync
        def count(fd):
            done[0] += 1
            if done[0] == at:
                os.ftruncate(fd, os.fstat(fd).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(fd)
        os.fsync = count
        _command([str(a) for a in again(argv, out)], str(log))
    kills = 0
    for at in (1, 2, 3, 3, 4, 5, 6, 8, 5):
        p = multiprocessing.get_context('fork').Process(target=dies, args=(at,))
        p.start()
        code = finish(p)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0: break
    assert kills >= 6
    if code: assert finish(start(again(argv, out), log)) == 0, log.read_text()
    same_results(out, want)
    assert [k for k in tree(out) if Path(k).name.startswith('.')] == []

def stopped(out, log, rounds=200):
    "A run that is killed when it has a few rows."
    p = start(['compare', *TINY, *RATES['fixed'], '--rounds', rounds, '--out', out], log)
    end = time.monotonic() + 30
    while not (out/'rounds.jsonl').exists() or len((out/'rounds.jsonl').read_bytes().splitlines()) < 4:
        assert time.monotonic() < end and p.exitcode is None, log.read_text()
        time.sleep(.02)
    p.kill()
    finish(p)

@pytest.fixture
def refused(capsys):
    "The command is refused in one line that holds each of `words`, and `folder` is as it was."
    def check(folder, argv, *words):
        before = tree(folder)
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        printed, err = capsys.readouterr()
        assert printed == '' and err.count('\n') == 1 and err.startswith('fedsq: ') and tree(folder) == before, err
        for word in words: assert word in err, err
    return check

def _limited(argv, log, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    _command(argv, log)

def test_a_disk_that_is_full_stops_the_run_so_that_it_can_go_on(whole, tmp_path):
    "A file may grow to 40 KB and no further: the settings are written, a checkpoint is not."
    want, _ = whole('fixed')
    out, log = tmp_path/'out', tmp_path/'log'
    argv = ['compare', *TINY, *RATES['fixed'], '--out', str(out)]
    p = multiprocessing.get_context('fork').Process(target=_limited, args=(argv, str(log), 40_000))
    p.start()
    assert finish(p) == 1
    assert 'File too large' in log.read_text() and f'go on with: fedsq compare --resume --out {out}' in log.read_text() and 'Traceback' not in log.read_text()
    assert [n for n in tree(out) if Path(n).name.startswith('.')] == [] and not list((out/'checkpoints').rglob('*.safetensors'))
    assert finish(start(['compare', '--resume', '--out', str(out)], log)) == 0, log.read_text()
    same_results(out, want)

def _soon_nobody(argv, log, out):
    "The command, by somebody who may not write any more once the first checkpoint is there."
    def change():
        while not list((out/'checkpoints').rglob('*.safetensors')): time.sleep(.002)
        for folder in [out, *out.rglob('*')]:
            if folder.is_dir(): folder.chmod(0o555)
        os.seteuid(65534)
    threading.Thread(target=change, daemon=True).start()
    _command(argv, log)

@pytest.mark.skipif(os.name != 'posix' or os.geteuid() != 0, reason='only root can become somebody else')
def test_a_folder_that_becomes_read_only_stops_the_run_so_that_it_can_go_on(whole, tmp_path):
    want, _ = whole('fixed')
    out, log = tmp_path/'out', tmp_path/'log'
    p = multiprocessing.get_context('fork').Process(target=_soon_nobody, args=(['compare', *TINY, *RATES['fixed'], '--out', str(out)], str(log), out))
    p.start()
    assert finish(p) == 1, log.read_text()
    assert 'Permission denied' in log.read_text() and '--resume' in log.read_text() and 'Traceback' not in log.read_text()
    for folder in [out, *out.rglob('*')]:
        if folder.is_dir(): folder.chmod(0o755)
    assert finish(start(['compare', '--resume', '--out', str(out)], log)) == 0, log.read_text()
    same_results(out, want)

def test_checkpoints_after_every_third_round(whole, tmp_path):
    out = tmp_path/'run'
    task = task_of(rounds=5, checkpoint_every=3)
    one = run(task, 'fedsq', 0, .02, checkpoints=out)
    assert sorted(p.name for p in out.iterdir()) == ['round-000000.safetensors', 'round-000003.safetensors']
    again = run(task, 'fedsq', 0, .02, checkpoints=out)
    assert timeless(again.rows) == timeless(one.rows) and state_hash(again.state) == state_hash(one.state)

def test_a_run_that_is_complete_is_not_gone_on_with(whole, refused):
    out = whole('fixed')[0]
    refused(out, ['compare', '--resume', '--out', out], 'resume', 'is complete', 'fedsq report')
    refused(out, ['compare', *TINY, *RATES['fixed'], '--resume', '--out', out], 'is complete')

@pytest.mark.parametrize('given, words', [
    (['--alpha', '3'], ('alpha was 5.0 and is 3.0',)), (['--rounds', '5', '--seed', '1'], ('rounds was 200 and is 5', 'seed was 0 and is 1')),
    (['--methods', 'fedavg'], ("methods was ['fedavg', 'fedsq'] and is ['fedavg']",)), (['--lr', '0.5'], ("lr was 'fedavg=0.02,fedsq=0.01' and is '0.5'",))])
def test_other_settings_are_refused_with_the_difference(given, words, refused, tmp_path):
    out = tmp_path/'out'
    stopped(out, tmp_path/'log')
    refused(out, ['compare', '--resume', '--out', out, *given], *words, 'another folder')
    refused(out, ['compare', *TINY, *RATES['fixed'], '--out', out], 'already holds a run')

def test_resume_needs_a_folder(refused, tmp_path):
    refused(tmp_path, ['compare', *TINY, '--resume'], 'resume needs the folder', '--out')

def test_a_folder_that_holds_no_run_is_not_taken_for_one(refused, monkeypatch, tmp_path):
    "A slip in the folder's name must not start the default comparison, which takes hours elsewhere."
    def started(*args, **kwargs): raise InputError('it was started')
    monkeypatch.setattr('fedsq_nb.study.experiment.load_task', started)
    refused(tmp_path, ['compare', '--resume', '--out', tmp_path/'slip'], 'resume', 'slip')

def test_how_many_processes_train_may_change_when_a_run_goes_on(whole, tmp_path):
    want, _ = whole('fixed')
    stopped(tmp_path/'out', tmp_path/'log', rounds=4)
    assert finish(start(['compare', '--resume', '--workers', 2, '--out', tmp_path/'out'], tmp_path/'log')) == 0
    same_results(tmp_path/'out', want)

# ---- more than one thread

THREADS = '''
import torch
from fedsq_nb.study.config import Config
from fedsq_nb.study.experiment import compare
x = torch.ones(512, 512); x @ x  # the parent has used its threads before it forks
for workers in (1, 2):
    rows = compare(Config(data='digits', weights='random', methods=('fedavg',), lr='0.02', seeds=1, rounds=1, clients=2, alpha=5., min_size=2, max_train=40,
                          test_fraction=.05, valid_fraction=.05, threads=2, workers=workers, client_seconds=4.), say=lambda note: None).rows
    print(rows.weights.iloc[-1], rows.failures.iloc[-1])
'''

def test_workers_with_more_than_one_thread_do_not_hang():
    "They give the same bits, or are refused."
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    p = subprocess.run([sys.executable, '-c', THREADS], capture_output=True, text=True, timeout=60, env=env, cwd=Path(__file__).parent.parent)
    one, *two = p.stdout.splitlines()
    assert one.endswith(' []') and (two == [one] or 'InputError' in p.stderr and 'threads' in p.stderr), p.stdout + p.stderr
