"Backbones: a table that users add to, and networks of one's own."
import pytest
import torch
from torch import nn

from fedsq_nb.client.backbones import BACKBONES, add_backbone, backbone, image_format
from fedsq_nb.core import InputError, save_state, state_hash
from fedsq_nb.data.example import ResCNN
from fedsq_nb.data.images import Format
from fedsq_nb.gating.dualcopy import DualCopy

def small(n): return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n))
FORM = Format(1, .5, .25, 8)

@pytest.fixture
def table(monkeypatch): monkeypatch.setattr('fedsq_nb.client.backbones.BACKBONES', dict(BACKBONES)); yield

def test_own_model_in_ten_lines():
    mine = small(10)
    model = backbone(mine, 10, bn='frozen')
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), mine.eval()(x)) and model is not mine and not model.train()[1].training
    assert torch.equal(DualCopy(model)(x), model(x)) and image_format(mine).channels == 1

def test_a_line_of_the_table(table):
    add_backbone('small', small, FORM)
    a, b, c = (backbone('small', 3, seed=s) for s in (0, 0, 1))
    assert image_format('small') == FORM and a[5].out_features == 3
    assert state_hash(a.state_dict()) == state_hash(b.state_dict()) != state_hash(c.state_dict())
    for name in ('small', 'resnet18', 'rescnn'):
        with pytest.raises(InputError, match='exists already'): add_backbone(name, small, FORM)
    with pytest.raises(InputError, match="did you mean 'small'"): backbone('smal', 3)

def test_own_networks_get_a_head_where_it_does_not_fit(tmp_path):
    assert backbone(small(10), 4)[5].out_features == 4 and backbone(small, 7)[5].out_features == 7
    path = save_state(tmp_path/'w.safetensors', small(10).state_dict())
    assert backbone(small(3), 10, weights=str(path))[5].out_features == 10

@pytest.mark.parametrize('call, word', [
    (lambda: backbone(small(3), 3, weights='imagenet'), "use 'own', or a file"), (lambda: backbone('resnet18', 3, weights='own'), "weights='own' are for"),
    (lambda: backbone(lambda n: None, 3), 'must return a module, got NoneType'), (lambda: backbone(7, 3), 'must be a name, a module or a function'),
    (lambda: add_backbone('x', small(3), FORM), 'must be a function of the number of classes'), (lambda: image_format(nn.Conv2d(2, 3, 1)), '2 channels, not one of 1 or 3')])
def test_what_is_wrong_is_said(call, word):
    with pytest.raises(InputError) as e: call()
    assert word in str(e.value)

def test_by_default_a_network_comes_with_its_own_weights():
    assert state_hash(backbone('rescnn', 10).state_dict()) == state_hash(backbone('rescnn', 10, weights='printed').state_dict())
    assert isinstance(BACKBONES['rescnn'].make(3), ResCNN)
