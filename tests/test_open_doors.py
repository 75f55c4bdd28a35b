"Ten lines each: a partition, a network, data and a server rule of one's own."
import numpy as np
import pytest
import torch
from torch import nn

from fedsq_nb.client.algorithms import Scaffold, norm_names
from fedsq_nb.client.learner import FedProx
from fedsq_nb.core import rng, state_hash
from fedsq_nb.data.batches import Augment
from fedsq_nb.data.images import Splits, from_arrays, split
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.server.aggregate import FedAvg
from fedsq_nb.study.config import Config
from fedsq_nb.study.experiment import compare, federation
from fedsq_nb.study.methods import METHODS, Method

SMALL = dict(lr='0.02', seeds=1, rounds=2, clients=3, alpha=5., min_size=2, batch_size=8, workers=1)
quiet = lambda note: None


def pictures(n=90):
    gen = rng(0, 'test', 'doors')
    y = np.arange(n) % 3
    x = gen.integers(0, 80, (n, 12, 12, 3), dtype='uint8')
    for k in range(3): x[y == k, :, 4*k:4*k + 4] += 100  # a bright bar, at another place for each class
    return from_arrays(x, y)


def net(n_classes=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, n_classes))


def splits(): return split('mine', pictures())


def test_a_partition_of_ones_own():
    data = splits()
    parts = np.array_split(np.argsort(data.train.labels.numpy(), kind='stable'), 3)  # a client a class
    fed = federation(net(), data, parts, lr=0.05, say=quiet)
    assert fed.fit(2).clients_ok.tolist() == [0, 3, 3] and fed.rows[-1]['weights'] != fed.rows[0]['weights']


@pytest.mark.parametrize('model', [net, net()], ids=['function', 'network'])
def test_a_network_of_ones_own(model):
    result = compare(Config(**SMALL, methods=('fedavg', 'fedsq')), data=splits(), model=model, say=quiet)
    start = result.rows[result.rows['round'] == 0]
    assert start.weights.nunique() == 1 and result.rows.state.eq('ok').all() and len(result.rows) == 6


def test_images_of_ones_own():
    result = compare(Config(**SMALL, methods=('fedavg',)), data=pictures(), model=net, say=quiet)
    assert result.config.data.startswith('own-') and result.rows.state.eq('ok').all()


class Pictures(torch.utils.data.Dataset):
    def __init__(self): self.data = pictures()
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.data.images[i], int(self.data.labels[i])


def test_a_dataset_of_ones_own():
    assert compare(Config(**SMALL, methods=('fedavg',)), data=Pictures(), model=net, say=quiet).rows.state.eq('ok').all()


class Half:
    "Goes half the way to the mean."
    def step(self, state, updates):
        mean = FedAvg().step(state, updates)
        return {n: (state[n] + mean[n])/2 if mean[n].is_floating_point() else mean[n] for n in state}


def test_a_server_rule_of_ones_own(monkeypatch):
    monkeypatch.setitem(METHODS, 'half', Method(rule=Half))
    result = compare(Config(**SMALL, methods=('fedavg', 'half')), data=splits(), model=net, say=quiet)
    assert state_hash(result.weights['half', 0]) != state_hash(result.weights['fedavg', 0])


# ---- one level below, everything works too

@pytest.mark.parametrize('given', [dict(callbacks=lambda: [FedProx(1.)]), dict(compress='int8'), dict(kept_names=('1.weight', '1.bias')), dict(gap=True, per_client=True)],
                         ids=['algorithm', 'compression', 'own norms', 'measures'])
@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
def test_a_federation_by_hand(given, wrap):
    data = splits()
    fed = federation(wrap(net()), data, np.array_split(np.arange(len(data.train)), 3), lr=0.05, say=quiet, **given)
    assert fed.fit(2).state.eq('ok').all() and fed.rows[-1]['clients_ok'] == 3


def test_gates_that_cannot_be_stored_are_computed_and_it_says_so():
    data, said = splits(), []
    fed = federation(DualCopy(net()), data, [np.arange(len(data.train))], lr=0.05, augment=Augment(crop=1), say=said.append)
    assert fed.train.stored_gates is None and any('computed for each batch' in s for s in said) and fed.fit(1).state.eq('ok').all()


def test_a_comparison_shows_itself_and_says_what_comes_next():
    result = compare(Config(**SMALL, methods=('fedavg', 'fedsq')), data=splits(), model=net, say=quiet)
    page = result._repr_html_()
    assert '<table' in page and 'fedsq' in page and 'report' in page
    lines = result._repr_markdown_().splitlines()
    assert lines[0].startswith('| method | lr |') and [line.split(' | ')[0] for line in lines[2:4]] == ['| fedavg', '| fedsq'] and 'report' in lines[-1]


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path):
    job, own = Config(**SMALL, methods=('fedavg',), out=str(tmp_path/'run')), net()
    def stop(row):
        if row['round'] == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): compare(job, data=splits(), model=own, say=quiet, on_row=stop)
    with pytest.raises(ValueError, match='data was'): compare(job.replace(resume=True), data=split('other', pictures(60)), model=own, say=quiet)
