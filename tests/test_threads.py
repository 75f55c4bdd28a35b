"Workers beside threads: any number of them, used or not, in a script, a thread, a kernel, under pytest; nothing hangs, no bit moves."
import dataclasses, functools, json, multiprocessing, os, random, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsq_nb.core import InputError, Update
from fedsq_nb.engine import execute
from fedsq_nb.engine.execute import Processes, WorkerLost, WorkerStuck, serial
from fedsq_nb.engine.federate import Federation
from processes import gone

ROOT = Path(__file__).parent.parent
ZERO = {'w': torch.zeros(2)}

def children(pid):
    "Process ids of the children of `pid`, those that are dead and not yet buried too."
    return [int(p) for task in Path(f'/proc/{pid}/task').iterdir() for p in (task/'children').read_text().split()]

# A convolutional network on noise: products, convolutions and sums long enough to be shared among threads.
CLIENTS = '''
import os, threading, torch
from torch import nn
from fedsq_nb.core import Update, copy_state, rng, state_hash
from fedsq_nb.engine.execute import Processes, serial

def net(): return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                                nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))
def train(state, client, round):
    model = net()
    model.load_state_dict(state)
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    x = torch.from_numpy(rng(0, 'x', client).normal(size=(64, 3, 32, 32))).float()
    y = torch.from_numpy(rng(0, 'y', client).integers(10, size=64))
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return Update(client, round, copy_state(model.state_dict()), 1, {'threads': torch.get_num_threads()})

torch.manual_seed(0)
start = copy_state(net().state_dict())
def bits(answers): return sorted((c, state_hash(u.state) if isinstance(u, Update) else repr(u)) for c, u in answers)
def use_threads():
    "Everything that makes pools of threads."
    x = torch.ones(1200, 1200)
    x @ x; x.exp().sum(); torch.linalg.inv(torch.eye(300)); torch.fft.fft(x); train(start, 0, 1)
    list(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(40, 3)), batch_size=10, num_workers=2))
def by_workers():
    with Processes(2) as pool: return bits(pool(train, start, range(3), 1))
def alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return bits(serial(train, start, range(3), 1))
    finally: torch.set_num_threads(before)
'''

SCRIPT = CLIENTS + '''
import sys
if sys.argv[1:]: torch.set_num_threads(int(sys.argv[1]))  # torch makes no more of the variable than there are processors
before = torch.get_num_threads()
use_threads()
found = [by_workers()]
thread = threading.Thread(target=lambda: (use_threads(), found.append(by_workers())))
thread.start()
thread.join()
assert torch.get_num_threads() == before
print(before, all(f == alone() for f in found), len(found), found[0][0][1])
'''

def stock(**extra):
    "An environment as a shell has it: nothing about threads."
    keep = {k: v for k, v in os.environ.items() if not k.endswith('NUM_THREADS')}
    return keep | {'PYTHONPATH': str(ROOT)} | extra

def python(text, *args, **extra):
    p = subprocess.run([sys.executable, '-c', text, *args], capture_output=True, text=True, timeout=180, env=stock(**extra), cwd=ROOT)
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout.split()

@pytest.mark.parametrize('threads', [None, '1', '2', '4'])
def test_workers_beside_any_number_of_threads(threads):
    "After products, convolutions, backward passes and data loaders, from the main thread and from another: the bits of one thread."
    before, same, n, _ = python(SCRIPT, *([threads] if threads else []), **({'OMP_NUM_THREADS': threads} if threads else {}))
    assert same == 'True' and n == '2' and before == (threads or before)

def test_the_bits_do_not_depend_on_the_threads_of_the_parent():
    assert len({python(SCRIPT, n, OMP_NUM_THREADS=n)[3] for n in ('1', '2', '4')}) == 1

def test_under_pytest_in_a_stock_shell(tmp_path):
    file = tmp_path/'test_inner.py'
    file.write_text(CLIENTS + '\ndef test_it():\n    use_threads()\n    assert torch.get_num_threads() == 2 and by_workers() == alone()\n')
    p = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(file)], capture_output=True, text=True, timeout=180,
                       env=stock(OMP_NUM_THREADS='2'), cwd=tmp_path)
    assert p.returncode == 0, p.stdout[-3000:]

def test_in_a_jupyter_kernel(tmp_path):
    "A kernel has threads of its own, and trainings that no import finds."
    cell = lambda source: {'cell_type': 'code', 'id': f'c{len(source)}', 'metadata': {}, 'source': source, 'outputs': [], 'execution_count': None}
    cells = [cell(CLIENTS), cell("torch.set_num_threads(2)\nuse_threads()\nprint(by_workers() == alone(), torch.get_num_threads())"),
             cell("with Processes(2) as pool: found = dict(pool(lambda s, c, r: Update(c, r, s, 1 + c), start, range(3), 1))\nprint(found[2].weight)")]
    meta = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    (tmp_path/'k.ipynb').write_text(json.dumps({'cells': cells, 'metadata': meta, 'nbformat': 4, 'nbformat_minor': 5}))
    p = subprocess.run([sys.executable, '-m', 'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', '--ExecutePreprocessor.timeout=120', 'k.ipynb'],
                       capture_output=True, text=True, timeout=180, env=stock(), cwd=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    printed = [''.join(o.get('text', '')) for c in json.loads((tmp_path/'k.ipynb').read_text())['cells'] for o in c['outputs']]
    assert ''.join(printed).split() == ['True', '2', '3']

# ---- nothing hangs

def step(state, client, round): return Update(client, round, {'w': state['w'] + client}, 1)

def test_forked_while_other_threads_train():
    "Workers that are forked with a closed lock inside are replaced; every client is answered for."
    text = CLIENTS + '''
stop = threading.Event()
def busy():
    while not stop.is_set(): train(start, 0, 1)
others = [threading.Thread(target=busy) for _ in range(2)]
for t in others: t.start()
found = []
for _ in range(4):
    with Processes(2, patience=8.) as pool:
        pool.hire.__func__.__defaults__ = 5, 3.
        found.append(bits(pool(train, start, range(3), 1)))
stop.set()
for t in others: t.join()
want = alone()
print([f == want for f in found].count(True))
'''
    assert python(text) == ['4']

def test_a_worker_that_hangs_at_its_start_is_replaced(tmp_path, monkeypatch):
    rehearse, first = execute.rehearsal, tmp_path/'first'
    def once():
        try: first.touch(exist_ok=False)
        except FileExistsError: return rehearse()
        time.sleep(600)
    monkeypatch.setattr(execute, 'rehearsal', once)
    monkeypatch.setattr(Processes.hire, '__defaults__', (5, 2.))
    with Processes(2) as pool: assert sorted(dict(pool(step, ZERO, range(4), 1))) == [0, 1, 2, 3]

def test_workers_that_never_start_are_an_error(monkeypatch):
    monkeypatch.setattr(execute, 'rehearsal', lambda: time.sleep(600))
    monkeypatch.setattr(Processes.hire, '__defaults__', (2, .3))
    with Processes(2) as pool:
        with pytest.raises(WorkerLost, match='2 times a new worker was not ready'): list(pool(step, ZERO, range(4), 1))

def test_the_client_of_a_worker_that_stands_still_is_given_to_another(tmp_path):
    def train(state, client, round):
        if client == 1:
            try: (tmp_path/'first').touch(exist_ok=False)
            except FileExistsError: pass
            else: time.sleep(600)
        return step(state, client, round)
    with Processes(2, patience=1.) as pool: found = dict(pool(train, ZERO, range(3), 1))
    assert all(torch.equal(found[c].state['w'], ZERO['w'] + c) for c in range(3))

def test_a_client_that_always_stands_still_is_lost():
    def train(state, client, round):
        if client == 1: time.sleep(600)
        return step(state, client, round)
    with Processes(2, patience=.4) as pool: found = dict(pool(train, ZERO, range(3), 1))
    assert isinstance(found[1], WorkerStuck) and 'stood still for 0.4 s' in str(found[1]) and isinstance(found[2], Update)

def test_a_client_that_works_for_long_does_not_stand_still():
    def train(state, client, round):
        end = time.monotonic() + 2
        while time.monotonic() < end: sum(range(1000))
        return step(state, client, round)
    with Processes(2, patience=.5) as pool: assert all(isinstance(u, Update) for _, u in pool(train, ZERO, range(2), 1))

# ---- where there can be no workers

def test_workers_that_cannot_train_leave_it_to_their_parent(monkeypatch):
    "As beside a GPU after a backward pass."
    parent = os.getpid()
    def train(state, client, round):
        if os.getpid() != parent: raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")
        return Update(client, round, state, torch.get_num_threads())
    monkeypatch.setattr(execute, 'rehearsal', lambda: False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Processes(2) as pool, pytest.warns(UserWarning, match='CUDA_VISIBLE_DEVICES'): found = dict(pool(train, ZERO, range(3), 1))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    assert [found[c].weight for c in range(3)] == [1, 1, 1]

# ---- inside a daemonic process, without a parent, never closed

def _in_a_daemon(pipe):
    with Processes(2) as pool: pipe.send(sorted((c, u.state['w'][0].item()) for c, u in pool(step, ZERO, range(3), 1)))
    pipe.send((multiprocessing.current_process().daemon, children(os.getpid())))

def test_inside_a_daemonic_process():
    "As a worker of multiprocessing.Pool is one. It is daemonic afterwards as before, and leaves nobody behind."
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=_in_a_daemon, args=(there,), daemon=True)
    p.start()
    there.close()
    assert here.poll(60) and here.recv() == [(0, 0.), (1, 1.), (2, 2.)]
    assert here.recv() == (True, [])
    p.join()
    assert p.exitcode == 0

def test_a_client_may_have_processes_of_its_own():
    "A data loader with workers, as it may without processes."
    def train(state, client, round):
        loader = torch.utils.data.DataLoader(torch.arange(6.), batch_size=2, num_workers=1)
        return Update(client, round, {'w': state['w'] + sum(x.sum() for x in loader)}, 1)
    with Processes(2) as pool: found = dict(pool(train, ZERO, range(2), 1))
    assert [found[c].state['w'].tolist() for c in range(2)] == [[15., 15.]]*2

def forked(said=None):
    "A process that sleeps, as a client may start one; told to `said` is who it is."
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    if said: said.write_text(str(pid))
    return pid

@pytest.mark.parametrize('half_a_message', [False, True])
def test_a_worker_that_is_killed_with_a_child_of_its_own_ends_its_client_alone(half_a_message, tmp_path):
    "The child holds the worker's socket open; the round must not wait for it, and it goes with the worker."
    def train(state, client, round):
        if client != 1: return step(state, client, round)
        forked(tmp_path/'child')
        if half_a_message:
            for fd in sockets(os.getpid()): os.write(fd, (1000).to_bytes(8, 'little') + b'half')
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with Processes(2, patience=600.) as pool: found = dict(pool(train, ZERO, range(4), 1))
    assert str(found[1]) == 'its process was killed by signal 9' and isinstance(found[1], WorkerLost)
    assert all(isinstance(found[c], Update) for c in (0, 2, 3)) and time.monotonic() - began < 30
    assert gone([int((tmp_path/'child').read_text())])

def sockets(pid):
    "The one socket to its parent that a worker writes to: the last that it was given."
    links = {int(p.name): os.readlink(p) for p in Path(f'/proc/{pid}/fd').iterdir() if p.exists()}
    ends = [fd for fd, to in links.items() if to.startswith('socket:') and fd > 2]
    return [fd for fd in ends if os.get_blocking(fd)][-1:]

HANGS = {'in a lock': 'time.sleep(600)', "in a lock, with Python's own in its hands": 'ctypes.PyDLL(None).sleep(600)'}

@pytest.mark.parametrize('where', HANGS)
def test_a_worker_whose_parent_dies_before_its_first_look(where):
    "It hangs in the first call of torch, as one that was forked with a closed lock inside; its parent is killed."
    text = f'''
import ctypes, os, signal, threading, time, torch
from fedsq_nb.core import Update
from fedsq_nb.engine.execute import Processes
parent, set_threads = os.getpid(), torch.set_num_threads
def hang(n):
    if os.getpid() != parent: {HANGS[where]}
    set_threads(n)
torch.set_num_threads = hang
threading.Thread(target=lambda: (time.sleep(3), print('now', flush=True)), daemon=True).start()
list(Processes(2)(lambda s, c, r: Update(c, r, s, 1), {{'w': torch.zeros(2)}}, [0, 1], 1))
'''
    p = subprocess.Popen([sys.executable, '-c', text], stdout=subprocess.PIPE, text=True, env=stock(), cwd=ROOT)
    try:
        assert p.stdout.readline() == 'now\n'
        workers = children(p.pid)
        assert len(workers) == 2
    finally:
        p.kill()
        p.wait()
    assert gone(workers, 5.)

UNCLOSED = {'forgotten': 'del pool; gc.collect()', 'forgotten in the middle of a round': 'r = pool(train, zero, [0, 1, 2], 2); next(r); del r, pool; gc.collect()',
            'forgotten with its federation': 'fed = [pool]; fed.append(fed); del fed, pool; gc.collect()'}

@pytest.mark.parametrize('how', UNCLOSED)
def test_an_executor_that_was_never_closed_leaves_no_processes(how):
    text = f'''
import gc, os, subprocess, torch
from fedsq_nb.core import Update
from fedsq_nb.engine.execute import Processes
def train(s, c, r): return Update(c, r, s, 1)
zero, pool = {{'w': torch.zeros(2)}}, Processes(2)
list(pool(train, zero, [0, 1, 2], 1))
before = len(pool.team)
{UNCLOSED[how]}
found = subprocess.run(['ps', '--ppid', str(os.getpid()), '-o', 'comm='], capture_output=True, text=True).stdout.split()
print(before, [name for name in found if name != 'ps'])
'''
    assert python(text) == ['2', '[]']

@pytest.mark.parametrize('end', ['', 'raise SystemExit(0)', 'next(pool(slow, zero, [0, 1, 2], 2))'])
def test_a_script_that_closes_nothing_ends_with_its_workers(end):
    "Even one that tidies up on SIGTERM: that is not inherited."
    text = f'''
import signal, sys, time, torch
from fedsq_nb.core import Update
from fedsq_nb.engine.execute import Processes
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
def slow(s, c, r):
    if c: time.sleep(600)
    return Update(c, r, s, 1)
def train(s, c, r): return Update(c, r, s, 1)
zero, pool = {{'w': torch.zeros(2)}}, Processes(2)
list(pool(train, zero, [0, 1, 2], 1))
print(*(w.process.pid for w in pool.team))
{end}
'''
    assert gone([int(pid) for pid in python(text)], 5.)

def test_the_workers_of_a_parent_are_not_its_childs():
    "A process that was forked with an executor inside has workers of its own, and leaves the others alone."
    with Processes(2) as pool:
        list(pool(step, ZERO, range(3), 1))
        theirs = [w.process.pid for w in pool.team]
        here, there = multiprocessing.Pipe()
        def child():
            found = sorted(dict(pool(step, ZERO, range(3), 2)))
            there.send((found, [w.process.pid for w in pool.team]))
            pool.close()
        p = multiprocessing.get_context('fork').Process(target=child)
        p.start()
        assert here.poll(60)
        found, its_own = here.recv()
        p.join()
        assert found == [0, 1, 2] and not set(its_own) & set(theirs) and gone(its_own)
        assert not gone(theirs, 0.) and sorted(dict(pool(step, ZERO, range(3), 3))) == [0, 1, 2]
        assert [w.process.pid for w in pool.team] == theirs

# ---- Ctrl-C

def test_ctrl_c_while_a_worker_is_forked_is_not_swallowed():
    "What is raised in Python's preparations for a fork is printed and forgotten; a thread of OpenMP may have heard it, so no mask helps."
    text = '''
import os, signal, torch
from fedsq_nb.core import Update
from fedsq_nb.engine.execute import Processes
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
pool = Processes(3)
try: found = sorted(dict(pool(lambda s, c, r: Update(c, r, s, 1), {'w': torch.zeros(2)}, [0, 1, 2], 1)))
except KeyboardInterrupt: found = 'interrupted'
started = [w.process.pid for w in pool.team]
pool.close()
print(found, len(started), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
'''
    assert python(text) == ['interrupted', '1', 'True']

def test_after_a_ctrl_c_while_workers_start_the_same_executor_goes_on(monkeypatch):
    "Whoever was not through the rehearsal is replaced, and what it said is not taken for an answer."
    ready, calls = execute.Worker.ready, []
    def interrupted(self, seconds):
        calls.append(self)
        if len(calls) == 1: raise KeyboardInterrupt
        return ready(self, seconds)
    monkeypatch.setattr(execute.Worker, 'ready', interrupted)
    with Processes(2) as pool:
        with pytest.raises(KeyboardInterrupt): list(pool(step, ZERO, range(4), 1))
        found = dict(pool(step, ZERO, range(4), 1))
        assert all(torch.equal(found[c].state['w'], ZERO['w'] + c) for c in range(4))

def test_a_client_that_raises_keyboard_interrupt_in_a_worker_is_its_own_failure():
    def train(state, client, round):
        if client == 1: raise KeyboardInterrupt('not from a keyboard')
        return step(state, client, round)
    with Processes(2) as pool: found = dict(pool(train, ZERO, range(3), 1))
    assert type(found[1]).__name__ == 'KeyboardInterrupt' and isinstance(found[1], Exception) and isinstance(found[2], Update)
    with pytest.raises(KeyboardInterrupt): list(serial(train, ZERO, range(3), 1))

# ---- how many

def test_never_more_processes_than_clients(monkeypatch):
    forks, fork = [], execute.Worker.__init__
    monkeypatch.setattr(execute.Worker, '__init__', lambda self, *args: (forks.append(1), fork(self, *args))[1])
    with Processes(8) as pool:
        assert sorted(dict(pool(step, ZERO, range(3), 1))) == [0, 1, 2] and len(pool.team) == len(forks) == 3
        assert sorted(dict(pool(step, ZERO, [7], 2))) == [7] and len(forks) == 3
        assert sorted(dict(pool(step, ZERO, range(4), 3))) == [0, 1, 2, 3] and len(forks) == len(pool.team) == 4
        assert dict(pool(step, ZERO, [], 4)) == {}

@pytest.mark.parametrize('workers, words', [(99_999_999_999, 'workers 99999999999 must be at most'), (True, 'whole number'), (2.5, 'workers 2.5'),
                                            ('4', "workers '4'"), (float('nan'), 'workers nan'), (-1, '1 or more')])
def test_workers_that_no_machine_can_mean(workers, words):
    with pytest.raises(InputError, match='workers') as e: Processes(workers)
    assert words in str(e.value)
    if workers == 99_999_999_999: assert str(execute.most_workers()) in str(e.value) and execute.most_workers() >= 4*os.cpu_count()

def test_limits_of_time_that_make_no_sense():
    for given in (dict(time_limit=0.), dict(time_limit=float('nan')), dict(patience=-1.)):
        with pytest.raises(InputError, match=f'^{next(iter(given))}'): Processes(2, **given)

# ---- global random streams

def draws(state, client, round):
    "Every global stream, and many at a time: a second number of a pair waits in NumPy's after an odd count."
    numbers = [random.random(), *np.random.randn(3), *torch.randn(3).tolist(), *np.random.permutation(4), random.gauss(0, 1)]
    return Update(client, round, {'w': state['w'] + torch.tensor(numbers).double()}, 1)

DRAWN = {'w': torch.zeros(12, dtype=torch.float64)}

def numbers_of(execute, rounds=(1, 2), **kwargs):
    return {(c, r): tuple(u.state['w'].tolist()) for r in rounds for c, u in execute(draws, DRAWN, range(5), r, **kwargs)}

@pytest.mark.parametrize('workers', [1, 2, 4])
def test_clients_that_use_global_randomness_do_not_depend_on_the_workers(workers):
    random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
    with Processes(workers) as pool: by_workers = numbers_of(pool)
    random.random(), np.random.rand(), torch.rand(3)
    assert by_workers == numbers_of(serial) and len(set(by_workers.values())) == 10

def test_another_seed_is_another_stream_and_the_training_may_name_it():
    first, second = numbers_of(serial, seed=1), numbers_of(serial, seed=2)
    assert not set(first.values()) & set(second.values()) and numbers_of(serial) == numbers_of(serial, seed=0)
    class Seeded:
        seed = 2
        def __call__(self, *given): return draws(*given)
    with Processes(2) as pool:
        assert {(c, 1): tuple(u.state['w'].tolist()) for c, u in pool(Seeded(), DRAWN, range(5), 1)} == {k: v for k, v in second.items() if k[1] == 1}
        assert numbers_of(pool, seed=1) == first

@pytest.mark.parametrize('workers', [1, 2])
def test_a_federation_hands_its_seed_to_the_streams_of_its_clients(workers):
    def states(seed):
        with Processes(workers) as pool:
            fed = Federation(dict(DRAWN), 3, draws, seed=seed, execute=pool if workers > 1 else serial)
            fed.fit(2)
        return fed.state['w'].tolist()
    assert states(1) == states(1) != states(2)
    fours = Federation(dict(DRAWN), 3, step_drawn, seed=1, execute=lambda train, state, clients, round: serial(train, state, clients, round))
    assert fours.fit(1).iloc[-1].clients_ok == 3  # an executor that does not ask for it is not given one

def step_drawn(state, client, round): return Update(client, round, {'w': state['w'] + 1}, 1)

def world():
    "Everything that the global streams hold."
    return random.getstate(), repr(np.random.get_state(legacy=False)), id(np.random.get_bit_generator()), torch.get_rng_state().tolist()

@pytest.mark.parametrize('other', [False, True])
@pytest.mark.parametrize('act', [draws, lambda *given: 1/0, lambda *given: sys.exit(3)], ids=['draws', 'raises', 'exits'])
def test_global_streams_are_afterwards_as_they_were(act, other):
    "Also with a generator of the user's own behind `np.random`, and half a pair of normal numbers waiting."
    mine = np.random.get_bit_generator()
    try:
        if other: np.random.set_bit_generator(np.random.PCG64(3))
        np.random.randn(3), random.gauss(0, 1), torch.randn(3)
        before = world()
        for _ in serial(act, DRAWN, range(3), 1): assert world() == before  # the server's work between clients sees them, too
        assert world() == before
    finally: np.random.set_bit_generator(mine)

def test_global_streams_survive_an_executor_of_threads():
    "One of the threads sets them and puts them back; none puts back what another had set."
    before = world()
    def slow(state, client, round):
        time.sleep(.02*(1 + client % 3))
        return step(state, client, round)
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda c: list(serial(slow, ZERO, [c], 1)), range(12)))
    assert world() == before
    assert len(numbers_of(serial)) == 10 and world() == before

def test_a_federation_within_a_client_draws_the_same_by_workers():
    def nested(state, client, round):
        inner = [u.state['w'] for _, u in serial(draws, DRAWN, range(2), round, seed=client)]
        return Update(client, round, {'w': sum(inner) + torch.rand(1).double()}, 1)
    with Processes(2) as pool: by_workers = {c: u.state['w'].tolist() for c, u in pool(nested, DRAWN, range(3), 1)}
    assert by_workers == {c: u.state['w'].tolist() for c, u in serial(nested, DRAWN, range(3), 1)}

# ---- answers that cannot be sent, or not be read

class Mute(Exception):
    def __str__(self): raise ValueError('no words')

class Loud(Exception):
    def __str__(self): sys.exit(3)

class Needs(Exception):
    "Cannot be made again from its arguments, so it cannot be unpickled."
    def __init__(self, one, two): super().__init__(one)

class Text(str):
    "A text that is only itself here."
    def __reduce__(self): raise TypeError('cannot be sent')

class Wordy(Exception):
    def __str__(self): return Text('said in a text of its own')

class BadRead:
    "Pickled, it cannot be read again."
    def __init__(self, how): self.how = how
    def __reduce__(self): return _fails, (self.how,)

def _fails(how):
    if how == 'exit': sys.exit(3)
    if how == 'mute': raise Mute
    raise AttributeError('not here')

def raising(error):
    def act(state, client, round): raise error
    return act

def measuring(value):
    def act(state, client, round): return dataclasses.replace(step(state, client, round), metrics={'loss': value})
    return act

def endless(n): return 'x'*n

FAILS = {  # what a client does, and what is told
    'exits': (lambda *_: sys.exit(3), 'SystemExit', '3'),
    'a generator exits': (raising(GeneratorExit('bye')), 'GeneratorExit', 'bye'),
    'raises what is no Exception': (raising(type('Mine', (BaseException,), {})('other')), 'Mine', 'other'),
    'an error without words': (raising(Mute()), 'Mute', 'its text cannot be read'),
    'an error whose words exit': (raising(Loud()), 'Loud', 'its text cannot be read'),
    'an error that cannot be unpickled': (raising(Needs('one', 'two')), 'Needs', 'one'),
    'an error of a text of its own': (raising(Wordy()), 'Wordy', 'said in a text of its own'),
    'an error that goes on and on': (raising(ValueError(endless(3_000_000))), 'ValueError', endless(10_000))}

@pytest.mark.parametrize('fault', FAILS)
def test_whatever_a_client_raises_is_its_failure_and_the_same_by_workers(fault):
    act, name, text = FAILS[fault]
    def train(state, client, round): return act(state, client, round) if client == 1 else step(state, client, round)
    alone = dict(serial(train, ZERO, range(3), 1))
    with Processes(2) as pool: by_workers = dict(pool(train, ZERO, range(3), 1))
    for found in (alone, by_workers):
        assert isinstance(found[1], Exception) and not isinstance(found[1], WorkerLost)
        assert (type(found[1]).__name__, str(found[1])) == (name, text)
        assert isinstance(found[0], Update) and isinstance(found[2], Update)

UNSENT = {'a function': lambda: 0, 'cannot be read': BadRead('here'), 'exits when read': BadRead('exit'), 'has no words when read': BadRead('mute'),
          'a thread': threading.Lock(), 'too deep': functools.reduce(lambda inner, _: [inner], range(100_000), [])}

@pytest.mark.parametrize('what', UNSENT)
def test_an_answer_that_cannot_be_sent_or_read_is_its_clients_failure(what):
    def train(state, client, round): return (measuring(UNSENT[what]) if client == 1 else step)(state, client, round)
    with Processes(2) as pool:
        for round in (1, 2):
            found = dict(pool(train, ZERO, range(4), round))
            assert isinstance(found[1], Exception) and not isinstance(found[1], WorkerLost) and str(found[1])
            assert all(isinstance(found[c], Update) for c in (0, 2, 3))

def odd_states():
    w = torch.zeros(2)
    yield 'sparse', {'w': torch.tensor([1., 0.]).to_sparse()}
    yield 'compressed rows', {'w': torch.eye(2).to_sparse_csr()}
    yield 'meta', {'w': torch.zeros(2, device='meta')}
    yield 'complex', {'w': torch.zeros(2, dtype=torch.complex64)}
    yield 'quantised', {'w': torch.quantize_per_tensor(w, .1, 0, torch.quint8)}
    yield 'nested', {'w': torch.nested.nested_tensor([w, w])}
    yield 'a number that claims to be many', {'w': torch.zeros(1).expand(10**13)}
    yield 'a name that is none', {3: w}
    yield 'a tuple for a name', {('w', 1): w, 'w': w}
    yield 'None', None
    yield 'a list', [w]

@pytest.mark.parametrize('what', dict(odd_states()))
@pytest.mark.filterwarnings('ignore')
def test_what_is_no_state_arrives_as_it_is(what):
    "So that the server judges it as it does without workers."
    state = dict(odd_states())[what]
    def train(s, client, round): return Update(client, round, state, 1) if client == 1 else step(s, client, round)
    with Processes(2) as pool: found = dict(pool(train, ZERO, range(3), 1))
    came = found[1].state
    if isinstance(state, dict):
        looks = lambda s: {n: (t.shape if not t.is_nested else None, t.dtype, t.layout, str(t.device), t.is_nested) for n, t in s.items()}
        assert looks(came) == looks(state)
    else: assert type(came) is type(state)
    assert isinstance(found[0], Update) and isinstance(found[2], Update)

def test_what_a_client_keeps_may_be_odd_too():
    "It comes back as it went."
    class Keeper:
        client_states = {}
        def __call__(self, state, client, round):
            before = self.client_states.get(client, {}).get('n', 0)
            return Update(client, round, state, 1, client_state={'n': before + 1, 'z': torch.zeros(2, dtype=torch.complex64)})
    with Processes(2) as pool:
        train = Keeper()
        for round in (1, 2, 3): train.client_states = {c: u.client_state for c, u in pool(train, ZERO, range(3), round)}
    assert [train.client_states[c]['n'] for c in range(3)] == [3, 3, 3]

def test_an_order_that_a_stopped_worker_does_not_take_ends_by_its_time_limit():
    "The socket is full and nobody reads: the parent goes on with the others."
    class Keeps:
        client_states = {c: {'big': torch.zeros(3_000_000)} for c in range(4)}
        def __call__(self, state, client, round): return Update(client, round, state, 1)
    with Processes(2, time_limit=2.) as pool:
        train = Keeps()
        assert len(dict(pool(train, ZERO, range(4), 1))) == 4
        os.kill(pool.team[0].process.pid, signal.SIGSTOP)
        found = dict(pool(train, ZERO, range(4), 2))
    lost = [c for c, answer in found.items() if isinstance(answer, WorkerLost)]
    assert sorted(found) == [0, 1, 2, 3] and len(lost) == 1 and 'time limit of 2 s' in str(found[lost[0]])
