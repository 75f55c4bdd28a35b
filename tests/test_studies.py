"""The studies' scripts run: every arm and method on a network of the study's kind and a handful of noise images."""
import dataclasses, importlib, json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsq_nb.client.backbones import backbone
from fedsq_nb.core import save_state

STUDIES = Path(__file__).parents[1]/'nbs/studies'
CLASSES = 3


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "An array file like CIFAR-100's, and weights of the study's network; both made of noise."
    folder, draws = tmp_path_factory.mktemp('study'), np.random.default_rng(0)
    def images(n): return draws.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % CLASSES
    (x, y), (xt, yt) = images(90), images(30)
    np.savez(folder/'data.npz', x_train=x, y_train=y, x_test=xt, y_test=yt)
    net = backbone('resnet18', CLASSES, weights='random', seed=0)
    save_state(folder/'weights.safetensors', {n: t for n, t in net.state_dict().items() if not n.startswith('fc.')})
    return folder/'data.npz', folder/'weights.safetensors'


@pytest.fixture
def script(monkeypatch, request):
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module(request.param)


@pytest.fixture
def stage(monkeypatch, sources):
    "What the cells of one seed share, small."
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module('study_cells').Stage(0, *map(str, sources), 48, 30, 32, 'float32', test=12)


@pytest.mark.parametrize('script', ['gate_ceiling'], indirect=True)
@pytest.mark.parametrize('head', ['ridge', 'random'])
def test_every_arm_of_the_gate_ceiling_runs(script, stage, head):
    settings = script.Settings(train=48, valid=30, size=32, epochs=3, batch=16, precision='float32', task_rate=1e-4)
    for arm in script.ARMS:
        rows = script.run(stage, settings, script.Cell(arm, head, 0. if arm == 'start' else 1e-4, 0))
        assert [r['state'] for r in rows] == ['ok'] * (1 if arm == 'start' else 3), arm
        assert 0 <= rows[-1]['test_accuracy'] <= 1 and rows[-1]['moved'], arm
        json.dumps(rows)


@pytest.mark.parametrize('script', ['gate_ceiling'], indirect=True)
def test_late_freezing_changes_nothing_before_it_freezes(script, stage):
    settings = script.Settings(train=48, valid=30, size=32, epochs=3, batch=16, precision='float32')
    relu, late = (script.run(stage, settings, script.Cell(arm, 'random', 1e-3, 0)) for arm in ('relu', 'late2'))
    losses = [[r['train_loss'] for r in rows] for rows in (relu, late)]
    assert losses[0][:2] == losses[1][:2]


@pytest.mark.parametrize('script', ['headroom'], indirect=True)
@pytest.mark.parametrize('method', ['fedavg', 'fedsq'])
@pytest.mark.parametrize('alpha', [0.5, 0.])
def test_both_methods_of_the_headroom_run(script, stage, method, alpha):
    settings = script.Settings(train=48, valid=30, test=12, probe=8, size=32, clients=2, min_size=8, rounds=2,
                               measured=(1, 2), batch=16, precision='float32')
    rows = script.run(stage, settings, script.Cell(method, 'ridge', alpha, 1, 1e-4, 0))
    assert [r['state'] for r in rows] == ['ok', 'ok']
    shares = rows[0]['gap']['shares']
    assert abs(shares['crossing'] + shares['multilinear'] - 1) < 1e-3
    if method == 'fedsq': assert shares['crossing'] == 0
    json.dumps(rows)


@pytest.mark.parametrize('name', ['gate_ceiling', 'headroom'])
def test_options_are_read(name):
    done = subprocess.run([sys.executable, STUDIES/f'{name}.py', '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and '--weights' in done.stdout
