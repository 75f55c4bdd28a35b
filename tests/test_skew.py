"Feature skew: every client its own look, oracles for each kind, and nothing touched that should not be."
import random

import matplotlib
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings, strategies as st

from fedsq_nb.core import InputError
from fedsq_nb.data.images import ImageSet
from fedsq_nb.data.partition import dirichlet
from fedsq_nb.data.skew import KINDS, add_noise, tint, turn, as_clients_see, feature_skew, looks

matplotlib.use('agg')
import matplotlib.pyplot as plt

fast = settings(max_examples=30, deadline=None)
seeds, kinds = st.integers(0, 2**31), st.sampled_from(list(KINDS))
SOME = {'noise': 0.3, 'rotation': 60, 'colour': 0.5}

def image_set(n=30, channels=3, h=7, w=7, seed=0):
    gen = np.random.default_rng(seed)
    return ImageSet(torch.from_numpy(gen.integers(0, 256, (n, channels, h, w), dtype=np.uint8)), torch.from_numpy(gen.integers(0, 4, n)), tuple('abcd'))

def deal(data, n_clients, seed=0): return np.array_split(np.random.default_rng(seed).permutation(len(data)), n_clients)

@fast
@given(kinds, st.integers(1, 40), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), seeds)
def test_labels_shape_and_type_stay_and_the_bytes_repeat(kind, n, channels, h, w, n_clients, seed):
    data = image_set(n, channels, h, w)
    before, parts = data.images.clone(), deal(data, n_clients)
    states = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()
    out = feature_skew(data, parts, kind, SOME[kind], seed=seed)
    assert out.images.dtype == torch.uint8 and out.images.shape == before.shape and out.classes == data.classes
    assert torch.equal(out.labels, data.labels) and torch.equal(data.images, before)
    assert out.images.data_ptr() != data.images.data_ptr() and out.labels.data_ptr() != data.labels.data_ptr()
    assert torch.equal(out.images, feature_skew(data, parts, kind, SOME[kind], seed=seed).images)
    assert np.array_equal(np.random.get_state()[1], states[0]) and torch.equal(torch.get_rng_state(), states[1]) and random.getstate() == states[2]

@pytest.mark.parametrize('kind', KINDS)
def test_strength_nought_changes_no_byte_but_is_new_memory(kind):
    data = image_set()
    out = feature_skew(data, deal(data, 3), kind, 0, seed=0)
    assert torch.equal(out.images, data.images) and out.images.data_ptr() != data.images.data_ptr()

@pytest.mark.parametrize('kind', KINDS)
def test_seeds_differ_and_so_do_clients(kind):
    data = image_set(channels=3)
    parts = deal(data, 4)
    assert not torch.equal(*(feature_skew(data, parts, kind, SOME[kind], seed=s).images for s in (0, 1)))
    assert len(np.unique(looks(kind, SOME[kind], 50, 3, seed=0), axis=0)) == 50

@pytest.mark.parametrize('kind', ['rotation', 'colour'])
def test_a_client_looks_the_same_whoever_else_there_is(kind):
    data = image_set()
    parts = deal(data, 5)
    all_, two = feature_skew(data, parts, kind, SOME[kind], seed=3), feature_skew(data, parts[:2], kind, SOME[kind], seed=3)
    mine = np.concatenate(parts[:2])
    assert torch.equal(all_.images[mine], two.images[mine])
    others = np.concatenate(parts[2:])
    assert torch.equal(two.images[others], data.images[others]) # held by nobody: as they were
    one_by_one = [feature_skew(data.subset([i]), [[0]], kind, SOME[kind], seed=3).images[0] for i in parts[0]]
    assert torch.equal(torch.stack(one_by_one), all_.images[parts[0]]) # one look for all images of a client

def test_a_clients_noise_is_its_own_stream():
    data = image_set(40)
    parts = deal(data, 4)
    a = feature_skew(data, parts, 'noise', 0.3, seed=3).images
    b = feature_skew(data, [parts[0], parts[1][:0], parts[2], parts[3]], 'noise', 0.3, seed=3).images # client 1 has nothing
    assert torch.equal(a[parts[2]], b[parts[2]]) and torch.equal(b[parts[1]], data.images[parts[1]])
    assert not torch.equal(a[parts[2]], data.images[parts[2]])

@fast
@given(st.floats(0, 1), st.integers(1, 30))
def test_noise_levels_are_those_of_niid_bench(strength, n_clients):
    levels = looks('noise', strength, n_clients, seed=0)[:, 0]
    assert levels[0] == 0 and np.allclose(levels, [strength/(n_clients - 1)*i if n_clients > 1 else 0 for i in range(n_clients)], atol=1e-15)

def test_noise_is_gaussian_of_the_promised_spread():
    data = ImageSet(torch.full((60, 1, 24, 24), 128, dtype=torch.uint8), torch.zeros(60, dtype=torch.int64), ('a',))
    parts = np.arange(60).reshape(3, 20)
    d = (feature_skew(data, parts, 'noise', 0.1, seed=0).images.double() - 128)
    assert (d[:20] == 0).all()
    for part, std in ((d[20:40], 12.75), (d[40:], 25.5)):
        z = part.flatten().numpy() / std
        assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.02
        assert abs((np.abs(z) < 1).mean() - 0.683) < 0.02 and abs(np.mean(z**3)) < 0.06
    assert abs(np.corrcoef(d[20].flatten(), d[21].flatten())[0, 1]) < 0.15 # every image its own

def test_noise_stops_at_black_and_white():
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat(500).view(1, 1, 10, 100)
    out = add_noise(x, np.array([0.3]), np.random.default_rng(0)).float()
    assert 0.4 < (out[x == 0] == 0).float().mean() < 0.6 and 0.4 < (out[x == 255] == 255).float().mean() < 0.6

@fast
@given(st.floats(-180, 180), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), seeds)
def testturning_is_scipys_linear_rotation(angle, h, w, channels, seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, channels, h, w), dtype=np.uint8))
    oracle = scipy.ndimage.rotate(x.numpy().astype(float), angle, axes=(3, 2), reshape=False, order=1, mode='grid-constant', cval=0)
    assert np.abs(turn(x, [angle]).numpy() - oracle).max() < 0.51 # rounding, and float32 for the grid

def test_quarterturns_lose_nothing():
    x = image_set(4, 3, 6, 6).images
    for k in range(-2, 3): assert torch.equal(turn(x, [90*k]), torch.rot90(x, k, (2, 3)))

@fast
@given(st.floats(0, 1), st.sampled_from([1, 3]), seeds)
def testtinting_is_a_gain_and_an_offset_for_each_channel(strength, channels, seed):
    x, look = image_set(5, channels).images, looks('colour', strength, 4, channels, seed=seed)
    gain, offset = look[:, :channels], look[:, channels:]
    assert look.shape == (4, 2*channels) and (np.abs(gain - 1) <= strength).all() and (np.abs(offset) <= strength/2).all()
    for i in range(4):
        oracle = np.clip(x.numpy()*gain[i][:, None, None] + 255*offset[i][:, None, None], 0, 255)
        assert np.abs(tint(x, look[i]).numpy() - oracle).max() < 0.501

@fast
@given(st.floats(0.1, 180), seeds)
def test_angles_fill_their_range(strength, seed):
    a = looks('rotation', strength, 200, seed=seed)[:, 0]
    assert (np.abs(a) <= strength).all() and a.max() > 0.8*strength and a.min() < -0.8*strength

def test_work_in_portions_changes_nothing():
    "A client with more images than are worked on at a time."
    data = image_set(600, 1, 3, 3)
    for kind in ('rotation', 'colour'):
        whole, half = (feature_skew(data, [np.arange(n)], kind, SOME[kind], seed=0).images for n in (600, 300))
        assert torch.equal(whole[:300], half[:300])
    out = feature_skew(data, [np.arange(0), np.arange(600)], 'noise', 0.2, seed=0).images.float() - data.images
    assert not torch.equal(out[:256], out[256:512])

def test_partitions_of_the_package_and_plain_lists_are_taken():
    data = image_set(40)
    parts = dirichlet(data.labels, 3, 1., seed=0)
    a, b = (feature_skew(data, p, 'noise', 0.2, seed=0).images for p in (parts, [p.tolist() for p in parts]))
    assert torch.equal(a, b)

@pytest.mark.parametrize('kind, strength, says', [
    ('noise', -0.1, 'strength -0.1 of noise must be a number from 0 up'), ('noise', float('inf'), 'strength inf of noise'), ('noise', float('nan'), 'strength nan'),
    ('rotation', 181, 'strength 181 of rotation must be a number from 0 to 180'), ('colour', 1.5, 'strength 1.5 of colour must be a number from 0 to 1'),
    ('colour', '1', "strength '1' of colour"), ('colour', True, 'strength True'), ('color', 0.5, "unknown kind of feature skew 'color': did you mean 'colour'"), (None, 0.5, 'unknown kind')])
def test_bad_kinds_and_strengths(kind, strength, says):
    with pytest.raises(InputError, match=says): feature_skew(image_set(), [[0], [1]], kind, strength, seed=0)

@pytest.mark.parametrize('parts, says', [([], 'got none'), ([[0, 1], [1, 2]], 'image 1 is in parts more than once'), ([[0, 0]], 'image 0 is in parts more than once'),
                                         ([[0], [30]], 'positions from 0 to 29, got 0 to 30'), ([[-1]], 'positions from 0 to 29, got -1 to -1')])
def test_bad_parts(parts, says):
    data = image_set()
    for strength in (0, 0.1):
        with pytest.raises(InputError, match=says): feature_skew(data, parts, 'noise', strength, seed=0)

@pytest.mark.parametrize('n_clients', [0, -1, 2.5, True])
def test_looks_of_no_clients(n_clients):
    with pytest.raises(InputError, match='n_clients .* must be a whole number, at least 1'): looks('noise', 0.1, n_clients, seed=0)

def test_the_sheet_shows_what_the_clients_get():
    data = image_set(3, 3, 5, 6)
    fig, ax = plt.subplots()
    as_clients_see(data, 2, [('noise', 0.3), ('colour', 0.5)], 4, seed=7, ax=ax)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (12, 28, 3)
    same = data.subset([2]*4)
    for row, (kind, s) in enumerate((('noise', 0.3), ('colour', 0.5))):
        made = feature_skew(same, [[0], [1], [2], [3]], kind, s, seed=7).images
        for i in range(4): assert np.array_equal(sheet[6*row:6*row + 5, 7*i:7*i + 6], made[i].permute(1, 2, 0).numpy())
    assert [t.get_text() for t in ax.get_yticklabels()] == ['noise 0.3', 'colour 0.5'] and ax.get_xlabel() == 'client' and ax.get_title()
    plt.close(fig)
