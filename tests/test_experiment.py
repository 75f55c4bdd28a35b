"From one configuration to rows: repeatable to the bit, test data that influence nothing, and a fair search for learning rates."
import contextlib, dataclasses, json, multiprocessing, os, random, shutil, signal, subprocess, sys, time, tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.study import experiment as E, task as T
from fedsq_nb.core import rng, save_state, state_hash
from fedsq_nb.data.images import ImageSet
from fedsq_nb.cli import main
from fedsq_nb.engine.execute import WorkerLost, serial
from fedsq_nb.study.config import Config, read_toml
from fedsq_nb.study.experiment import calibrate, compare
from fedsq_nb.study.folder import append_row, check_files, read_calibration, read_origin, read_rows, read_settings, sole_writer
from fedsq_nb.study.methods import METHODS
from fedsq_nb.study.task import partition_card
from fedsq_nb.data.partition import partition_hash

TINY = dict(weights='random', size=12, clients=3, alpha=1, min_size=2, max_train=60, valid_fraction=.05, test_fraction=.05, batch_size=16, rounds=2, seeds=1)
ALL = TINY | dict(lr='fedavg=0.02,fedprox=0.02,fedsq=0.01', mu=.5)
quiet = lambda message: None

def rows_of(result, *but): return [{k: v for k, v in r.items() if not k.endswith('seconds') and k not in but} for r in result.rows.to_dict('records')]
def same(a, b): return json.dumps(a) == json.dumps(b)  # NaN is like NaN
def hashes(result): return {f'{m}-{s}': state_hash(w) for (m, s), w in result.weights.items()}

@pytest.fixture(scope='module')
def first(): return compare(Config(**ALL), say=quiet)

# ---- the same seed, the same bits

def test_the_same_settings_give_the_same_bits_here(first):
    again = compare(Config(**ALL), say=quiet)
    assert same(rows_of(again), rows_of(first)) and hashes(again) == hashes(first)
    assert len(set(hashes(first).values())) == 3

def test_and_in_another_process(first):
    code = f'''if True:
        import json, random, numpy, torch
        random.seed(1); numpy.random.seed(2); torch.manual_seed(3)
        from fedsq_nb.study.config import Config
        from fedsq_nb.study.experiment import compare
        from fedsq_nb.core import state_hash
        r = compare(Config(**{ALL!r}), say=lambda m: None)
        print(json.dumps([r.rows.filter(regex='^(?!.*seconds)').to_dict('records'), {{f'{{m}}-{{s}}': state_hash(w) for (m, s), w in r.weights.items()}}]))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    rows, weights = json.loads(done.stdout)
    assert same(rows, rows_of(first)) and weights == hashes(first)

def test_other_seeds_give_other_runs(first):
    other = compare(Config(**ALL | dict(seed=1)), say=quiet)
    assert not set(hashes(other).values()) & set(hashes(first).values())

def test_a_method_does_not_depend_on_its_company(first):
    "Alone, in another order, with more seeds: the rows of a method and seed stay."
    alone = compare(Config(**ALL | dict(methods='fedsq', seeds=2)), say=quiet)
    mixed = compare(Config(**ALL | dict(methods='fedsq,fedavg')), say=quiet)
    want = [r for r in rows_of(first) if r['method'] == 'fedsq']
    assert same([r for r in rows_of(alone) if r['seed'] == 0], want) and same([r for r in rows_of(mixed) if r['method'] == 'fedsq'], want)

def test_nothing_global_is_touched():
    threads = torch.get_num_threads()
    random.seed(1); np.random.seed(2); torch.manual_seed(3); torch.set_num_threads(2)
    try:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled()
        compare(Config(**ALL | dict(lr='auto', rates=(.02,), calibration_seeds=1, rounds=1, flip=True)), say=quiet)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.is_grad_enabled()
        assert before == after and torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)

# ---- fairness

def test_every_method_starts_from_the_same_network_on_the_same_partition(first, monkeypatch):
    start = first.rows[first.rows['round'] == 0].set_index('method')
    assert start.weights.nunique() == 1
    for name in ('val_accuracy', 'val_loss', 'test_accuracy', 'test_loss'): np.testing.assert_allclose(start[name], start[name].iloc[0], rtol=1e-5)
    seen = []
    class Spy(E.LocalTraining):
        def __init__(self, model, data, parts, form, *, lr, callbacks, **shared):
            seen.append((partition_hash(parts), len(data), form, *sorted((k, v) for k, v in shared.items() if k != 'stored_gates')))
            super().__init__(model, data, parts, form, lr=lr, callbacks=callbacks, **shared)
    monkeypatch.setattr(E, 'LocalTraining', Spy)
    compare(Config(**ALL | dict(seeds=2, rounds=1)), say=quiet)
    assert len(seen) == 6 and len(set(seen[:3])) == len(set(seen[3:])) == 1 and seen[0] != seen[3]

@pytest.mark.parametrize('calibration', ['federated', 'centralised'])
def test_the_test_part_influences_nothing(calibration, monkeypatch):
    config = Config(**TINY | dict(lr='auto', rates=(.01, .03), calibration=calibration, calibration_seeds=1, rounds=2, methods='fedavg,fedsq'))
    load, gen = T.load_data, rng(0, 'test', 'noise')
    def spoiled(*args, **kwargs):
        splits = load(*args, **kwargs)
        noise = torch.from_numpy(gen.integers(0, 256, splits.test.images.shape, dtype='uint8'))
        return dataclasses.replace(splits, test=ImageSet(noise, splits.test.labels.flip(0), splits.test.classes))
    a = compare(config, say=quiet)
    monkeypatch.setattr(T, 'load_data', spoiled)
    b = compare(config, say=quiet)
    measured = 'test_accuracy', 'test_loss'
    assert same(rows_of(a, *measured), rows_of(b, *measured)) and not np.allclose(a.rows.test_loss, b.rows.test_loss)
    assert a.rates == b.rates and a.calibration.equals(b.calibration) and hashes(a) == hashes(b)

def test_calibration_never_looks_at_the_test_part_or_at_the_seeds_of_the_comparison(monkeypatch):
    task = E.load_task(Config(**TINY))
    batches, run, seeds = E.Task.batches, E.run, []
    def guarded(self, what, *gates): return batches(self, what, *gates) if what in ('train', 'valid') else pytest.fail('calibration read the test part')
    def noted(task, method, seed, lr, **kwargs): seeds.append(seed); return run(task, method, seed, lr, **kwargs)
    monkeypatch.setattr(E.Task, 'batches', guarded)
    monkeypatch.setattr(E, 'run', noted)
    results = [E.try_rate(task, m, .02) for m in ('fedavg', 'fedprox', 'fedsq')]
    assert all(r['state'] == 'ok' and 'test_accuracy' not in r for r in results)
    assert len(seeds) == 6 and seeds[:2] == seeds[2:4] == seeds[4:] and not set(seeds) & set(range(1000))

def test_a_trial_is_the_mean_of_each_seeds_best_round_on_validation(monkeypatch):
    "The start does not count; of two equal rounds the one with the lower loss does."
    row = lambda t, acc, loss: dict(round=t, val_accuracy=acc, val_loss=loss, state='ok')
    runs = iter([[row(0, .9, .1), row(1, .4, .9), row(2, .6, .8), row(3, .5, .2)], [row(0, 0., 3.), row(1, .7, .5), row(2, .7, .3), row(3, .7, .4)]])
    monkeypatch.setattr(E, 'run', lambda *a, **k: type('', (), {'rows': next(runs)}))
    got = E.try_rate(E.load_task(Config(**TINY)), 'fedavg', .02)
    assert got == dict(method='fedavg', lr=.02, round=2., val_accuracy=pytest.approx(.65), val_loss=pytest.approx(.55), state='ok')

# ---- the search, on formulas

def search(formula, rates=(.003, .01, .03), method='fedavg'):
    "Calibrate with `formula(lr)` as validation accuracy, None for a divergence."
    asked = []
    def trial(task, method, lr, *journal):
        asked.append(lr)
        v = formula(lr)
        return dict(method=method, lr=lr, round=1., val_accuracy=v, val_loss=None if v is None else 1 - v, state='diverged' if v is None else 'ok')
    task = type('', (), {'config': type('', (), {'rates': rates})})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(E, 'try_rate', trial)
        lr, rows = calibrate(task, method)
    assert len(asked) == len(set(asked)) == len(rows) <= len(rates) + 3
    assert [r['lr'] for r in rows] == sorted(asked) and [r['lr'] for r in rows if r['chosen']] == [lr]
    return lr, asked

def peak(at, wall=np.inf): return lambda lr: None if lr >= wall else 1/(1 + np.log10(lr/at)**2)

@pytest.mark.parametrize('formula, chosen, beyond', [
    (peak(.01), .01, []), (peak(.03), .03, [.1]), (peak(.1), .1, [.1, .3]), (peak(.003), .003, [.001]), (peak(.001), .001, [.001, .0003]),
    (peak(1e-9), .0001, [.001, .0003, .0001]), (peak(1e9), 1., [.1, .3, 1.]),
    (peak(1., wall=.02), .01, []), (peak(1., wall=.05), .03, [.1]), (peak(1., wall=.005), .003, [.001]), (peak(1., wall=.002), .001, [.001, .0003]),
    (peak(1., wall=2e-4), .0001, [.001, .0003, .0001]), (peak(1., wall=1e-9), .0001, [.001, .0003, .0001])],
    ids=['inside', 'upper edge', 'above', 'lower edge', 'below', 'far below', 'far above', 'wall inside', 'wall above', 'all but the lowest diverge',
         'all of the grid diverge', 'all but the last try diverge', 'everything diverges'])
def test_the_search_goes_on_beyond_an_edge_and_away_from_divergence(formula, chosen, beyond):
    assert search(formula) == (chosen, [.003, .01, .03, *beyond])

@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=5, unique=True), st.integers(0, 2**31), st.integers(0, 3))
def test_the_search_ends_with_the_best_of_what_it_tried(rates, seed, often):
    value = lambda lr: None if (v := np.random.default_rng([seed, int(lr * 1e12)])).integers(4) < often else float(v.random())
    lr, asked = search(value, tuple(rates))
    tried = {a: value(a) for a in asked}
    fine = {a: v for a, v in tried.items() if v is not None}
    if fine: assert fine[lr] == max(fine.values())
    else: assert lr == min(tried)
    assert min(tried) < lr < max(tried) or len(asked) == len(rates) + 3
    assert all(search(value, tuple(rates), m) == (lr, asked) for m in METHODS)

def test_equal_accuracies_are_told_apart_by_loss():
    def trial(task, method, lr, *journal): return dict(method=method, lr=lr, round=1., val_accuracy=.5, val_loss=abs(lr - .01), state='ok')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(E, 'try_rate', trial)
        assert calibrate(type('', (), {'config': Config()}), 'fedsq')[0] == .01

def test_a_rate_that_diverges_on_one_seed_is_out(monkeypatch):
    task, runs = E.load_task(Config(**TINY)), []
    def run(*args, **kwargs):
        bad = bool(runs)
        runs.append(type('', (), {'rows': [dict(round=t, val_accuracy=None if bad and t else .9, val_loss=.1, state='diverged' if bad and t else 'ok') for t in (0, 1)]}))
        return runs[-1]
    monkeypatch.setattr(E, 'run', run)
    got = E.try_rate(task, 'fedavg', .1)
    assert got['state'] == 'diverged' and got['val_accuracy'] is None and len(runs) == 2

# ---- divergence

def test_a_diverged_run_is_recorded_and_the_others_go_on():
    heard = []
    result = compare(Config(**TINY | dict(lr='fedavg=1e12,fedsq=0.02', methods='fedavg,fedsq', seeds=2, rounds=3)), say=heard.append)
    bad, good = (result.rows[result.rows.method == m] for m in ('fedavg', 'fedsq'))
    for _, run in bad.groupby('seed'):
        last = run.iloc[-1]
        assert last.state == 'diverged' and last['round'] < 3 and all(np.isnan(last[c]) for c in ('val_accuracy', 'val_loss', 'test_accuracy', 'test_loss'))
        assert (run.state[:-1] == 'ok').all()
    assert len(good) == 8 and (good.state == 'ok').all()
    assert sum('fedavg, seed' in h and 'lower learning rate' in h for h in heard) == 2
    assert all(torch.isfinite(t).all() for w in result.weights.values() for t in w.values())  # the last good state

# ---- a run knows what it was made from

class Crash(Exception): pass

def crash_at(method, t):
    def on_row(row):
        if 'seed' in row and (row['method'], row['round']) == (method, t): raise Crash
    return on_row

def arrays(path, seed=0):
    "Sixty random images of three classes, as a file."
    gen = np.random.default_rng(seed)
    np.savez(path, x=gen.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8), y=np.arange(60) % 3)
    return path

def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture
def halted(tmp_path):
    "A run on a file of images that was stopped half-way, and its settings."
    config = Config(**TINY | dict(data=str(arrays(tmp_path/'a.npz')), backbone='rescnn', lr='0.02', methods='fedavg,fedsq', max_train=0, test_fraction=.2,
                                  valid_fraction=.1, out=str(tmp_path/'out')))
    with pytest.raises(Crash): compare(config, say=quiet, on_row=crash_at('fedsq', 1))
    return config

def refused(config, folder, *words):
    before = files(folder)
    with pytest.raises(E.InputError) as e: compare(config.replace(resume=True), say=quiet)
    for word in words: assert word in str(e.value), str(e.value)
    assert files(folder) == before

def test_a_run_writes_down_what_it_was_made_from(halted):
    origin = read_origin(halted.out)
    assert origin['contents']['classes'] == ['0', '1', '2'] and len(origin['contents']['data']) == len(origin['contents']['network']) == 16
    [now] = origin['circumstances']
    assert now['torch'] == torch.__version__ and now['threads'] == 1 and now['instruction_set'] == torch.backends.cpu.get_cpu_capability()
    assert {'python', 'fastai', 'fedsq_nb', 'numpy', 'device', 'processor'} < now.keys()

def test_other_images_under_the_old_name_are_refused(halted, tmp_path):
    was = read_origin(halted.out)['contents']['data']
    arrays(tmp_path/'a.npz', seed=1)
    refused(halted, tmp_path/'out', 'made from something else', f"data was '{was}' and is '")
    arrays(tmp_path/'a.npz')
    compare(halted.replace(resume=True), say=quiet)

def test_a_relative_path_from_another_folder_is_refused(halted, tmp_path, monkeypatch):
    "It names other images there; the old images under another name are welcome."
    (tmp_path/'here').mkdir(); (tmp_path/'there').mkdir()
    arrays(tmp_path/'here'/'a.npz'); arrays(tmp_path/'there'/'a.npz', seed=1)
    job = halted.replace(data='a.npz', out=str(tmp_path/'run'))
    monkeypatch.chdir(tmp_path/'here')
    whole = compare(job.replace(out=str(tmp_path/'whole')), say=quiet)
    with pytest.raises(Crash): compare(job, say=quiet, on_row=crash_at('fedavg', 1))
    monkeypatch.chdir(tmp_path/'there')
    refused(job, tmp_path/'run', 'made from something else', 'data was')
    done = compare(job.replace(resume=True, data='../here/a.npz'), say=quiet)
    assert same(rows_of(done), rows_of(whole))

def test_other_weights_under_the_old_name_are_refused(halted, tmp_path):
    net, path = E.load_task(halted).network(0), tmp_path/'w.safetensors'
    save_state(path, net.state_dict())
    job = halted.replace(weights=str(path), out=str(tmp_path/'run'))
    with pytest.raises(Crash): compare(job, say=quiet, on_row=crash_at('fedavg', 1))
    save_state(path, {n: t + 1 if t.is_floating_point() else t for n, t in net.state_dict().items()})
    refused(job, tmp_path/'run', 'network was', 'weights_file was')

def test_other_circumstances_need_force_and_are_written_down(halted, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'NONE')
        refused(halted, tmp_path/'out', 'instruction_set was', "is 'NONE'", '--force')
        compare(halted.replace(resume=True, force=True), say=quiet)
    assert [c['instruction_set'] for c in read_origin(halted.out)['circumstances']] == [torch.backends.cpu.get_cpu_capability(), 'NONE']

def test_force_accepts_no_other_images(halted, tmp_path):
    arrays(tmp_path/'a.npz', seed=1)
    refused(halted.replace(force=True), tmp_path/'out', 'data was')

def test_a_run_without_a_record_or_with_a_damaged_one_is_refused(halted, tmp_path):
    path = tmp_path/'out'/'made_from.json'
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    refused(halted, tmp_path/'out', 'made_from.json', 'damaged')
    path.unlink()
    refused(halted, tmp_path/'out', 'earlier version', '--overwrite')

def test_the_partition_is_compared_and_never_overwritten(halted, tmp_path, monkeypatch):
    "Were the same settings dealt out in another way by another version, half of the rows would come from another federation."
    monkeypatch.setattr(E, 'partition_card', lambda task: partition_card(task) | {'hash': {'0': 'f' * 16}})
    refused(halted, tmp_path/'out', 'partition', 'seed 0 was', 'f' * 16)

def test_a_checkpoint_belongs_to_its_contents(tmp_path):
    "Called by hand, below the folder: a checkpoint of other images is refused too."
    task = E.load_task(Config(**TINY))
    E.run(task, 'fedavg', 0, .02, rounds=1, checkpoints=tmp_path)
    x = task.splits.train.images.clone()
    x[0, 0, 0, 0] ^= 1
    other = dataclasses.replace(task, splits=dataclasses.replace(task.splits, train=dataclasses.replace(task.splits.train, images=x)))
    with pytest.raises(E.InputError, match='belongs to another run'): E.run(other, 'fedavg', 0, .02, rounds=1, checkpoints=tmp_path)

# ---- one writer a folder

def waiting_run(config, pipe):
    "A comparison that tells of its first row and goes on when it is told to."
    def on_row(row):
        if row['round'] == 1:
            pipe.send('here')
            pipe.recv()
    compare(config, say=quiet, on_row=on_row)

def test_a_second_writer_is_refused_and_disturbs_nobody(halted, tmp_path, capsys):
    "Beside a running process: --resume, a new run and --overwrite are refused in one line; a report is allowed."
    job = halted.replace(out=str(tmp_path/'run'))
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=waiting_run, args=(job, there))
    p.start()
    assert here.poll(60) and here.recv() == 'here'
    before = files(tmp_path/'run')
    for more in (dict(resume=True), dict(overwrite=True), {}):
        with pytest.raises(E.InputError, match='another process is writing|already holds a run'): compare(job.replace(**more), say=quiet)
    capsys.readouterr()
    assert main(['compare', '--resume', '--out', job.out]) == 2
    printed, err = capsys.readouterr()
    assert printed == '' and err.count('\n') == 1 and 'another process is writing there' in err
    assert files(tmp_path/'run') == before and len(read_rows(job.out)) == 2
    here.send('on')
    assert here.recv() == 'here'  # the second method has come to its first round
    here.send('on')
    p.join(60)
    assert p.exitcode == 0 and len(read_rows(job.out)) == 6

def orphaned(folder, pipe):
    "Hold the lock, have a child that lives on, and wait to be killed."
    with sole_writer(folder):
        child = os.fork()
        if not child: time.sleep(60); os._exit(0)
        pipe.send(child)
        time.sleep(60)

def test_the_lock_dies_with_its_process_and_not_with_its_children(tmp_path):
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=orphaned, args=(tmp_path, there))
    p.start()
    child = here.recv()
    with pytest.raises(E.InputError, match='another process'):
        with sole_writer(tmp_path): pass
    p.kill(); p.join()
    try:
        os.kill(child, 0)  # it lives
        with sole_writer(tmp_path): pass
    finally: os.kill(child, signal.SIGKILL)

# ---- calibration is part of the run

class Counting:
    "The serial executor, counting the rounds it plays; client 1 is lost in the first of them, so many times."
    def __init__(self, losses=0): self.rounds, self.losses = 0, losses
    def __call__(self, train, state, clients, round):
        self.rounds += 1
        lose, self.losses = self.losses > 0 and round == 1, self.losses - (round == 1)
        for c, answer in serial(train, state, clients, round): yield c, WorkerLost('its process was killed by signal 9') if lose and c == 1 else answer

@pytest.fixture
def executing(monkeypatch):
    def use(losses=0):
        executor = Counting(losses)
        monkeypatch.setattr(E, 'executor', lambda *a: contextlib.nullcontext(executor))
        return executor
    return use

AUTO = TINY | dict(lr='auto', rates=(.01, .03), calibration_seeds=2, calibration_rounds=3, methods='fedavg,fedsq', rounds=1)

def calibration_of(folder): return (folder/'calibration.jsonl').read_bytes()

@pytest.fixture(scope='module')
def calibrated(tmp_path_factory):
    "A calibrated run that nobody disturbed."
    out = tmp_path_factory.mktemp('calibrated')/'out'
    return compare(Config(**AUTO, out=str(out)), say=quiet), out

@pytest.mark.parametrize('stop', [1, 7, 13, 20, 30])
def test_a_crash_in_the_calibration_loses_the_unfinished_round_only(stop, calibrated, executing, tmp_path):
    whole, folder = calibrated
    executor, told = executing(), []
    def crash(row):
        told.append(row)
        if row['round'] and sum(r['round'] > 0 for r in told) == stop: raise Crash
    job = Config(**AUTO, out=str(tmp_path/'out'))
    with pytest.raises(Crash): compare(job, say=quiet, on_trial_row=crash)
    done = compare(job.replace(resume=True), say=quiet)
    assert executor.rounds == 1 + sum(len(E.trial_seeds(0, 2))*3 for _ in range(len(whole.calibration))) + 2
    assert calibration_of(tmp_path/'out') == calibration_of(folder) and done.rates == whole.rates and same(rows_of(done), rows_of(whole))

def test_a_client_that_is_lost_by_accident_changes_no_rate(calibrated, executing, tmp_path):
    whole, said = calibrated[0], []
    executing(losses=1)
    done = compare(Config(**AUTO, out=str(tmp_path/'out')), say=said.append)
    assert done.rates == whole.rates and done.calibration.equals(whole.calibration) and same(rows_of(done), rows_of(whole))
    [lost] = [row for row in read_calibration(tmp_path/'out') if row['state'] == 'lost']
    assert lost['again'] and [(f['round'], f['client'], f['kind']) for f in lost['failures']] == [(1, 1, 'lost')]
    assert any('lost client 1 in round 1' in text and 'played again' in text for text in said)

def test_a_client_that_is_always_lost_is_given_up(executing, tmp_path):
    said = []
    executor = executing(losses=10**9)
    job = Config(**AUTO | dict(methods='fedavg', rates=(.01,), calibration_seeds=1, out=str(tmp_path/'out')))
    task = E.load_task(job)
    row = E.try_rate(task, 'fedavg', .01, E.Journal(say=said.append))
    assert executor.rounds == 2*3 and row['state'] == 'ok' and 'counts as it is' in said[-1] and len(said) == 2

def test_the_planned_rounds_are_those_that_are_played(calibrated, executing):
    executor, trials = executing(), []
    job = Config(**AUTO | dict(calibration_rounds=1))
    result = compare(job, say=quiet, on_trial_row=lambda row: trials.append(row['round'] > 0))
    planned = E.planned_rounds(job)
    extra = len(result.calibration) - 2*2
    assert sum(trials) == planned['calibration'] + extra*planned['trial'] and executor.rounds == sum(trials) + planned['runs']

# ---- a flipped bit is seen

def flips(data): return ((i, data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1:]) for i in range(len(data)) for bit in range(8))

def test_every_flipped_bit_in_a_file_of_rows_is_named_with_its_line(tmp_path):
    "All of them. Only the end of the last line may be taken for a line that was cut short."
    path = tmp_path/'calibration.jsonl'
    for lr in (.01, .03, .1): append_row(path, {'method': 'fedsq', 'lr': lr, 'val_accuracy': .625, 'state': 'ok', 'chosen': lr == .03})
    data, rows = path.read_bytes(), read_calibration(tmp_path)
    ends = [i for i, byte in enumerate(data) if byte == 10]
    for i, flipped in flips(data):
        path.write_bytes(flipped)
        if i == len(data) - 1:
            assert read_calibration(tmp_path) == rows[:-1]
            continue
        line = 1 + sum(end < i for end in ends)
        with pytest.raises(E.InputError, match=rf'calibration.jsonl line ({line}|{line + 1}) '): read_calibration(tmp_path)

def test_a_file_of_a_complete_run_that_has_changed_is_named(calibrated, tmp_path, capsys):
    "One bit anywhere in any file; a file that was taken away is none."
    out = tmp_path/'out'
    shutil.copytree(calibrated[1], out)
    check_files(out)
    names = [name for name in files(out) if name != 'SHA256SUMS']
    assert {'config.toml', 'made_from.json', 'partition.json', 'calibration.jsonl', 'rounds.jsonl', 'weights/fedsq-0.safetensors'} <= set(names)
    for k, name in enumerate(names):
        whole = (out/name).read_bytes()
        at = rng(0, 'flip', k).integers(len(whole))
        (out/name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(E.InputError, match=name): check_files(out)
        capsys.readouterr()
        assert main(['report', str(out)]) == 2 and 'Traceback' not in capsys.readouterr().err
        (out/name).write_bytes(whole)
    shutil.rmtree(out/'weights')
    check_files(out)
    assert subprocess.run(['sha256sum', '-c', '--quiet', '--ignore-missing', 'SHA256SUMS'], cwd=out).returncode == 0

def test_a_damaged_row_of_the_calibration_stops_a_resume_in_one_line(halted, tmp_path):
    out = tmp_path/'out'
    append_row(out/'calibration.jsonl', {'method': 'fedavg', 'lr': .01, 'val_accuracy': .5, 'state': 'ok'})
    (out/'calibration.jsonl').write_bytes((out/'calibration.jsonl').read_bytes().replace(b'0.5', b'0.7'))
    refused(halted, out, 'calibration.jsonl line 1', 'checksum')

def test_settings_are_written_in_tables_and_flat_ones_are_read(calibrated, tmp_path):
    tables = tomllib.loads((calibrated[1]/'config.toml').read_text())
    assert tables['federation']['clients'] == 3 and tables['chosen']['rates'] == calibrated[0].rates and not {'resume', 'force'} & tables['output'].keys()
    assert read_settings(calibrated[1])['clients'] == 3
    (tmp_path/'config.toml').write_text('clients = 7\n[chosen.rates]\nfedavg = 0.01\n')
    assert read_settings(tmp_path) == {'clients': 7, 'chosen': {'rates': {'fedavg': .01}}} and read_toml(tmp_path/'config.toml') == {'clients': 7}

# ---- kills, a few; `python tests/kill_runs.py --kills 1000` does as many as you like

def test_a_few_kills_change_nothing(tmp_path):
    script = Path(__file__).with_name('kill_runs.py')
    done = subprocess.run([sys.executable, script, '--kills', '4', '--seed', '3'], capture_output=True, text=True, cwd=script.parent.parent,
                          env=os.environ | {'TMPDIR': str(tmp_path), 'PYTHONPATH': str(script.parent.parent)}, timeout=600)
    assert done.returncode == 0 and ' 0 differences' in done.stdout, done.stdout + done.stderr
