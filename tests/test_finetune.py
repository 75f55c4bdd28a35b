"DualCopy in a fastai Learner of one's own: ten lines each."
import warnings

import pytest
import torch
from PIL import Image

from fedsq_nb.client.backbones import backbone
from fedsq_nb.client.finetune import dualcopy_splitter, gated_learner, head_path
from fedsq_nb.core import InputError, seeded, state_hash
from fedsq_nb.data.sources import load_data
from fedsq_nb.gating.dualcopy import DualCopy

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from fastai.vision.all import ImageDataLoaders, PILImageBW, accuracy, load_learner, vision_learner


def rescnn(pretrained=True): return backbone('rescnn', 10, weights='random', say=str)


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    digits, folder = load_data('digits', size=16).train, tmp_path_factory.mktemp('digits')
    for i in range(160):
        place = folder/str(digits.labels[i].item())
        place.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(place/f'{i}.png')
    return ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=0, bs=32, img_cls=PILImageBW, num_workers=0, device='cpu')


@pytest.fixture
def learn(dls, tmp_path):
    with seeded(0, 'learn'): learn = gated_learner(vision_learner(dls, rescnn, metrics=accuracy, path=tmp_path))
    with learn.no_bar(), learn.no_logging(): yield learn


def trained(learn): return {n for n, p in learn.model.named_parameters() if p.requires_grad}


def test_only_the_quantitative_copy_is_trained(learn):
    both = learn.model
    before, start = state_hash(both.structural.state_dict()), {n: p.detach().clone() for n, p in both.quantitative.named_parameters()}
    learn.fine_tune(1, 1e-2)
    assert state_hash(both.structural.state_dict()) == before
    assert all(not torch.equal(p, start[n]) for n, p in both.quantitative.named_parameters())
    structural = {id(p) for p in both.structural.parameters()}
    assert not structural & {id(p) for group in learn.opt.param_lists for p in group}
    learn.fit_one_cycle(1, 1e-3)
    assert state_hash(both.structural.state_dict()) == before


def test_freeze_and_unfreeze(learn):
    weights = {n for n, p in learn.model.named_parameters() if p.ndim > 1}
    assert trained(learn) & weights == {n for n in weights if n.startswith('quantitative.1.')}, 'vision_learner had frozen the body'
    learn.unfreeze()
    assert trained(learn) == {f'quantitative.{n}' for n, _ in learn.model.quantitative.named_parameters()}
    learn.freeze()
    assert trained(learn) & weights == {n for n in weights if n.startswith('quantitative.1.')}


def test_what_conversion_froze_is_never_thawed(dls, tmp_path):
    learn = gated_learner(vision_learner(dls, rescnn, pretrained=False, path=tmp_path), freeze='0.0')
    before = state_hash(learn.model.state_dict())
    frozen = {n for n, _ in learn.model.quantitative.named_parameters() if n.startswith('0.0.')}
    learn.unfreeze()
    assert frozen and not trained(learn) & {f'quantitative.{n}' for n in frozen}
    state, structural = learn.model.quantitative.state_dict(), state_hash(learn.model.structural.state_dict())
    held = {n: state[n].clone() for n in frozen}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert state_hash(learn.model.structural.state_dict()) == structural and state_hash(learn.model.state_dict()) != before
    assert all(torch.equal(learn.model.quantitative.state_dict()[n], v) for n, v in held.items())


def test_lr_find_and_summary_run(learn):
    before = state_hash(learn.model.state_dict())
    assert learn.lr_find(show_plot=False, num_it=5).valley > 0
    assert state_hash(learn.model.state_dict()) == before
    assert 'DualCopy' in str(learn.summary())


def test_export_and_load_give_equal_predictions(learn):
    learn.fit(1, 1e-3)
    before = learn.get_preds()[0]
    learn.export('gated.pkl')
    again = load_learner(learn.path/'gated.pkl')
    with again.no_bar(): assert torch.equal(again.get_preds(dl=learn.dls.valid)[0], before)
    learn.save('both')
    learn.fit(1, 1e-2)
    assert not torch.equal(learn.get_preds()[0], before)
    assert torch.equal(learn.load('both').get_preds()[0], before)


def test_half_precision(learn):
    before = state_hash(learn.model.structural.state_dict())
    learn.to_bf16().fit(1, 1e-3)
    x, y = learn.dls.one_batch()
    for mode in (True, False):
        learn.model.train(mode)
        with torch.autocast('cpu', torch.bfloat16): loss = learn.loss_func(learn.model(x), y)
        loss.backward()
        assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learn.model.parameters())
    assert state_hash(learn.model.structural.state_dict()) == before


def test_it_starts_as_the_network_that_it_was(dls, tmp_path):
    learn = vision_learner(dls, rescnn, path=tmp_path)
    x, _ = dls.valid.one_batch()
    with torch.no_grad():
        want = learn.model.eval()(x)
        assert torch.equal(gated_learner(learn).model.eval()(x), want)


def test_groups_of_other_networks_and_mistakes(learn):
    dc = DualCopy(backbone('rescnn', 10, weights='random', say=str))
    body, head = dualcopy_splitter(dc)
    assert [tuple(p.shape) for p in head] == [(10, 32), (10,)] and head_path(dc.quantitative) == 'fc'
    assert len(body) + len(head) == len(list(dc.quantitative.parameters()))
    with pytest.raises(InputError, match='once'): gated_learner(learn)
