"Workers beside threads: any number of them, used or not, in a script, a thread, a kernel, under pytest; nothing hangs, no bit moves."
import json, multiprocessing, os, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch

from fedsq_nb.core import InputError, Update
from fedsq_nb.engine import execute
from fedsq_nb.engine.execute import Processes, WorkerLost, WorkerStuck, serial

ROOT = Path(__file__).parent.parent
ZERO = {'w': torch.zeros(2)}

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

def _in_a_daemon(pipe):
    try: Processes(2)
    except InputError as e: pipe.send(str(e))

def test_a_daemonic_process_is_told_what_to_do():
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=_in_a_daemon, args=(there,), daemon=True)
    p.start()
    assert here.poll(20) and 'daemonic' in (said := here.recv()) and 'workers=1' in said
    p.join()
