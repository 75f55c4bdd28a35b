"Closed-form heads: whatever the partition, the solution of all images in one place; oracles in plain numpy."
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.client.heads import (add_sums, best_ridge_head, class_mean_head, features, gram_from_means, head_sums,
                                   ridge_head, scaled_head)
from fedsq_nb.core import InputError, rng, state_hash

fast = settings(max_examples=40, deadline=None)
CLASSES, WIDTH = 4, 5


def world(seed, n=60):
    draws = rng(seed, 'heads')
    y = draws.integers(0, CLASSES, n)
    return torch.from_numpy(draws.normal(size=(CLASSES, WIDTH))[y] + draws.normal(size=(n, WIDTH))), torch.from_numpy(y)


@st.composite
def partitions(draw, n=60):
    "From one image a client to all at one: who owns which."
    owners = draw(st.lists(st.integers(0, draw(st.integers(0, 30))), min_size=n, max_size=n))
    return [np.flatnonzero(np.array(owners) == c) for c in sorted(set(owners))]


@fast
@given(partitions(), st.integers(0, 99), st.sampled_from([.1, 1., 100.]))
def test_a_ridge_head_does_not_depend_on_the_partition(parts, seed, strength):
    x, y = world(seed)
    whole = ridge_head(head_sums(x, y, CLASSES), strength)
    parted = ridge_head(add_sums([head_sums(x[p], y[p], CLASSES) for p in parts]), strength)
    for name in whole: torch.testing.assert_close(parted[name], whole[name], rtol=1e-9, atol=1e-9)


@fast
@given(partitions(), st.integers(0, 99))
def test_class_means_do_not_depend_on_the_partition(parts, seed):
    x, y = world(seed)
    parted = class_mean_head(add_sums([head_sums(x[p], y[p], CLASSES, gram=False) for p in parts]))
    means = np.stack([x[y == c].numpy().mean(0) for c in range(CLASSES)])
    np.testing.assert_allclose(parted['weight'].numpy(), means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize('strength', [.01, 1., 30.])
def test_ridge_is_the_penalised_least_squares_solution(strength):
    "No other weights and bias have a smaller penalised loss: the gradient of the definition is zero."
    x, y = world(3)
    head = ridge_head(head_sums(x, y, CLASSES), strength, normalise=False)
    weight, bias = (head[n].clone().requires_grad_() for n in ('weight', 'bias'))
    loss = (x @ weight.T + bias - nn.functional.one_hot(y, CLASSES)).square().sum() + strength*weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)): assert gradient.abs().max() < 1e-9


def test_classes_are_of_one_length():
    x, y = world(0)
    for head in (ridge_head(head_sums(x, y, CLASSES)), class_mean_head(head_sums(x, y, CLASSES))):
        torch.testing.assert_close(head['weight'].norm(dim=1), torch.ones(CLASSES, dtype=torch.float64))


@pytest.mark.parametrize('make', [ridge_head, class_mean_head])
def test_a_class_that_nobody_has_never_wins(make):
    x, y = world(1)
    x, y = x[y != 2], y[y != 2]
    head = make(head_sums(x, y, CLASSES))
    assert all(t.isfinite().all() for t in head.values()) and not head['weight'][2].any()
    directions = nn.functional.normalize(torch.from_numpy(rng(0, 'anywhere').normal(size=(500, WIDTH))))
    assert not ((directions @ head['weight'].T + head['bias']).argmax(1) == 2).any()


def test_one_image_and_more_features_than_images_have_a_head():
    x, y = world(2)
    for n in (1, 3):
        head = ridge_head(head_sums(x[:n], y[:n], CLASSES), 1.)
        assert all(t.isfinite().all() for t in head.values())


def test_half_of_the_gram_matrix_travels():
    x, y = world(0)
    sums = head_sums(x, y, CLASSES)
    assert sums.n_bytes == 8 * (CLASSES + CLASSES*WIDTH + WIDTH*(WIDTH + 1)//2)
    assert torch.equal(sums.gram, sums.gram.T)


@pytest.mark.parametrize('bad, words', [
    (lambda x, y: head_sums(x, y, 2), 'labels from 0 to 3; they must be from 0 to 1'),
    (lambda x, y: add_sums([]), 'sums is empty'),
    (lambda x, y: add_sums([head_sums(x, y, 4), head_sums(x, y, 5)]), 'have no sum'),
    (lambda x, y: ridge_head(head_sums(x, y, 4, gram=False)), 'no Gram matrix'),
    (lambda x, y: ridge_head(head_sums(x, y, 4), 0.), "strength"),
    (lambda x, y: gram_from_means([head_sums(x, y, 4)]), 'no class is held by two'),
    (lambda x, y: features(nn.Sequential(nn.Linear(5, 4)), []), 'batches is empty')])
def test_what_has_no_head_is_refused(bad, words):
    with pytest.raises(InputError, match=words): bad(*world(0))


def test_scatter_of_means_is_an_unbiased_gram_matrix():
    "Over many draws the mean of the estimate is the mean of the truth."
    gap, size = 0., 0.
    for seed in range(200):
        x, y = world(seed)
        clients = [head_sums(x[i], y[i], CLASSES, gram=False) for i in torch.arange(60).tensor_split(6)]
        truth = head_sums(x, y, CLASSES).gram
        gap, size = gap + (gram_from_means(clients).gram - truth), size + truth
    assert float(gap.norm() / size.norm()) < .02


def test_scale_and_strength_are_chosen_on_held_out_images():
    (x, y), (xv, yv) = world(5, 200), world(5, 60)
    head, chosen = best_ridge_head(head_sums(x, y, CLASSES), xv, yv, strengths=(1., 10.))
    def held_out(strength):
        h = ridge_head(head_sums(x, y, CLASSES), strength)
        return float(((xv @ h['weight'].T + h['bias']).argmax(1) == yv).double().mean())
    assert chosen['accuracy'] == max(held_out(s) for s in (1., 10.)) == held_out(chosen['strength'])
    assert head['weight'].dtype == torch.float32
    _, scale = scaled_head(ridge_head(head_sums(x, y, CLASSES)), xv, yv, scales=(.25, 1., 4.))
    assert scale in (.25, 1., 4.)


@pytest.mark.parametrize('training', [True, False])
def test_features_leave_the_network_as_it_was(training):
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(), nn.ReLU(), nn.Linear(7, 4)).train(training)
    before, x, y = state_hash(net.state_dict()), *world(0)
    batches = [(x[:30].float(), y[:30]), (x[30:].float(), 'gates', y[30:])]
    got, labels = features(net, batches)
    assert net.training == training and state_hash(net.state_dict()) == before and not net[3]._forward_pre_hooks
    torch.testing.assert_close(got, net[0](x.float()).relu().double().detach())
    assert torch.equal(labels, y)


def test_a_hook_does_not_stay_when_the_network_fails():
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))
    with pytest.raises(RuntimeError): features(net, [(torch.zeros(1, 9), torch.zeros(1))])
    assert not net[1]._forward_pre_hooks
