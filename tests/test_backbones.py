"Backbones: a table that users add to, and networks of one's own."
import hashlib, io, os

import pytest
import torch
from torch import nn
from torchvision.models._api import BUILTIN_MODELS, Weights, WeightsEnum

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


# -- weights that cannot be trusted ------------------------------------------------------------------------------------

def test_weights_beyond_the_networks_type_are_refused(tmp_path):
    "A float64 of 1e300 is finite, and infinite as float32."
    weights = {n: t.double() if t.is_floating_point() else t for n, t in small(3).state_dict().items()}
    weights['0.weight'][0, 0, 0, 0] = 1e300
    path = save_state(tmp_path/'w.safetensors', weights)
    with pytest.raises(InputError, match=r'0\.weight holds values beyond the range of torch.float32'): backbone(small(3), 3, weights=str(path))
    weights['0.weight'][0, 0, 0, 0] = 1e38
    assert backbone(small(3), 3, weights=str(save_state(tmp_path/'w.safetensors', weights)))[0].weight.detach().max() == torch.tensor(1e38)


class Evil:
    "Pickled, it makes a folder when it is loaded."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A torchvision network `tinynet` whose weights file is what the test puts into the hub's folder."
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path/'checkpoints').mkdir()
    def put(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        path = tmp_path/'checkpoints'/f'tinynet-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth'
        path.write_bytes(buffer.getvalue())
        class TinyWeights(WeightsEnum): DEFAULT = Weights(url=f'http://127.0.0.1:9/{path.name}', transforms=None, meta={})
        def tinynet(*, weights: TinyWeights | None = None, **kwargs):
            model, weights = small(3), TinyWeights.verify(weights)
            if weights is not None: model.load_state_dict(weights.get_state_dict(check_hash=True))
            return model
        tinynet.__module__ = 'torchvision.models.tinynet'
        monkeypatch.setitem(BUILTIN_MODELS, 'tinynet', tinynet)
        return path
    return put

def test_cached_weights_are_loaded_and_hashed_each_time(hub):
    weights = small(3).state_dict()
    path = hub(weights)
    assert torch.equal(backbone('tinynet', 5, weights='imagenet')[0].weight, weights['0.weight'])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged)//2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r'is damaged: its SHA-256 begins with .*delete it'): backbone('tinynet', 5, weights='imagenet')
    path.write_bytes(b'')
    with pytest.raises(InputError, match=r'is damaged'): backbone('tinynet', 5, weights='imagenet')
    path.unlink()
    with pytest.raises(InputError, match=r'could not be downloaded'): backbone('tinynet', 5, weights='imagenet')

def test_cached_weights_run_no_code(hub, tmp_path):
    "Even a file whose digest is right is read as tensors only."
    mark, before = tmp_path/'executed', dict(os.environ)
    hub(small(3).state_dict() | {'evil': Evil(mark)})
    with pytest.raises(InputError, match='holds more than tensors'): backbone('tinynet', 5, weights='imagenet')
    assert not mark.exists() and dict(os.environ) == before
