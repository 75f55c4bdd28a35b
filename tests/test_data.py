"Images in: every kind of source, every kind of damage, and batches against a plain loop."
import os, struct, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image

from fedsq_nb.core import InputError, rng
from fedsq_nb.data.batches import Augment, Batches, shift
from fedsq_nb.data.example import LETTERS, digits, glyphs, printed
from fedsq_nb.data.images import Format, ImageSet, Splits, contact_sheet, from_arrays, hold_out, share, split
from fedsq_nb.data.sources import load_data

gen = np.random.default_rng(0)
x = gen.integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)
y = np.arange(60) % 3

def refused(data, *words, **kwargs):
    "`data` is refused in one line that holds each of `words`."
    with pytest.raises(InputError) as e: load_data(data, size=8, **kwargs)
    message = str(e.value)
    assert '\n' not in message
    for word in (*words,): assert word in message, message

def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)

def pictures(top, counts, ending='png', size=(12, 9)):
    "Class folders under `top` with so many noise pictures each."
    for name, n in counts.items():
        (top/name).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(gen.integers(0, 256, (*size, 3), dtype=np.uint8)).save(top/name/f'{i:03}.{ending}')
    return top

# ---- image sets

@pytest.mark.parametrize('images, labels, word', [
    (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), 'torch.float32'),
    (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), '(2, 2, 4, 4)'),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), '(2, 4, 4)'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), 'one for each of the 2 images'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), 'int64'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), 'label -1 at position 1 is outside 0 to 1'),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([2, 5]), 'label 2 at position 0 is outside 0 to 1')])
def test_image_set_checks_itself(images, labels, word):
    with pytest.raises(InputError) as e: ImageSet(images, labels, ('a', 'b'))
    assert word in str(e.value)

def test_image_set_is_frozen_and_shares_nothing_with_its_source():
    a = x.copy()
    s = from_arrays(a, y)
    a[:] = 0
    assert torch.equal(s.images, torch.tensor(x).permute(0, 3, 1, 2))
    with pytest.raises(AttributeError): s.labels = None
    part = s.subset([3, 1])
    part.images.zero_()
    assert s.images[3].any() and len(part) == 2

# ---- splits

def test_parts_are_disjoint_complete_and_stratified():
    "Every image is unique, so its bytes say where it went."
    n = np.array([200, 90, 31])
    labels = np.repeat(np.arange(3), n)
    ids = np.arange(len(labels), dtype=np.uint16)
    s = split('ids', from_arrays(ids.view(np.uint8).reshape(-1, 1, 2), labels), seed=4)
    read = lambda part: part.images.numpy().reshape(-1, 2).copy().view(np.uint16).ravel()
    assert sorted(np.concatenate([read(s.train), read(s.valid), read(s.test)])) == ids.tolist()
    assert (np.abs(s.test.labels.bincount().numpy() - 0.2*n) < 1).all()
    assert (np.abs(s.valid.labels.bincount().numpy() - 0.1*0.8*n) < 1.2).all()
    for part in (s.train, s.valid, s.test): assert np.array_equal(labels[read(part)], part.labels)

def test_splits_depend_on_the_seed_only_and_max_train_leaves_the_rest_alone():
    a, b, c = (load_data('digits', size=8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(getattr(a, p).images, getattr(b, p).images) for p in ('train', 'valid', 'test'))
    assert not torch.equal(a.test.images, c.test.images)
    small = load_data('digits', size=8, max_train=100)
    assert torch.equal(small.test.images, a.test.images) and torch.equal(small.valid.images, a.valid.images)
    assert small.train.labels.bincount().tolist() == pytest.approx([10]*10, abs=1)
    have = {i.numpy().tobytes() for i in a.train.images}
    assert all(i.numpy().tobytes() in have for i in small.train.images)

def test_share_never_exceeds_what_there_is():
    for i in range(200):
        g = np.random.default_rng(i)
        counts = g.integers(0, 20, 6)
        total = int(g.integers(0, counts.sum() + 1))
        size = share(counts, total, g)
        assert size.sum() == total and (size >= 0).all() and (size <= counts).all()

def test_last_image_of_a_class_is_never_held_out():
    s = from_arrays(x[:20], np.array([0]*18 + [1, 2]))
    for i in range(20): assert hold_out(s, 0.9, rng(i))[0].labels.unique().tolist() == [0, 1, 2]

def test_global_random_state_is_left_alone():
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    load_data('digits', size=8); printed(50)
    list(Batches(printed(5), Format(1, 0, 1, 8), shuffle=rng(0), augment=Augment(flip=True, crop=1), draws=rng(1)))
    assert np.array_equal(np_state, np.random.get_state()[1]) and torch.equal(torch_state, torch.get_rng_state())

@pytest.mark.parametrize('name', ['valid_fraction', 'test_fraction'])
@pytest.mark.parametrize('value', [0, 1, -0.1, float('nan'), '0.1', None])
def test_bad_fraction(name, value): refused('digits', f'{name} {value!r} must be a number between 0 and 1', **{name: value})

@pytest.mark.parametrize('value', [9, -1, 50.5])
def test_bad_max_train(value): refused('digits', f'max_train {value!r}', 'at least the number of classes (10)', max_train=value)

def test_empty_parts_are_refused():
    refused('digits', 'the test part is empty: raise test_fraction', test_fraction=1e-4)
    refused('digits', 'the valid part is empty: raise valid_fraction', valid_fraction=1e-4)
    s = from_arrays(x, y)
    with pytest.raises(InputError, match='the test part does not match train'): Splits('a', s, s, from_arrays(x[..., :1], y))

# ---- names and paths

def test_digits_keep_the_sixteen_levels():
    s = load_data('digits', size=8)
    assert s.train.images.shape[1:] == (1, 8, 8) and len(s.train) + len(s.valid) + len(s.test) == 1797
    assert s.train.images.max() == 255 and len(s.train.images.unique()) == 17 and s.name == 'digits'

def test_no_such_path():
    refused('fashon_mnist', 'no such path, and not a known name', "did you mean 'fashion_mnist'?")
    refused('/no/such/folder', 'no such path, and not a known name', 'valid: digits, cifar10')

@pytest.mark.parametrize('size', [0, -3, 8.0, None])
def test_bad_size(size):
    with pytest.raises(InputError, match='size .* must be a whole number of pixels'): load_data('digits', size=size)

def idx(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack('>HBB', 0, 8, a.ndim) + struct.pack(f'>{a.ndim}I', *a.shape) + a.astype(np.uint8).tobytes())

def test_torchvision_source_with_its_own_test_part(tmp_path, capsys):
    raw, a, b = tmp_path/'FashionMNIST'/'raw', gen.integers(0, 256, (200, 28, 28)), gen.integers(0, 256, (50, 28, 28))
    for name, images in (('train', a), ('t10k', b)):
        idx(raw/f'{name}-images-idx3-ubyte', images)
        idx(raw/f'{name}-labels-idx1-ubyte', np.arange(len(images)) % 10)
    s = load_data('fashion_mnist', size=28, root=tmp_path)
    assert (len(s.train), len(s.valid), len(s.test)) == (180, 20, 50)
    assert np.array_equal(s.test.images[:, 0], b) and s.test.labels[:3].tolist() == [0, 1, 2]
    assert s.train.classes[9] == 'Ankle boot' and capsys.readouterr().out == ''

@pytest.mark.parametrize('name, cls', [('cifar10', 'CIFAR10'), ('cifar100', 'CIFAR100'), ('fashion_mnist', 'FashionMNIST')])
def test_failed_download_is_one_clear_line(tmp_path, monkeypatch, name, cls):
    import torchvision.datasets as tv
    def fail(*args, **kwargs): raise OSError('<urlopen error [Errno -3]\nTemporary failure in name resolution>')
    monkeypatch.setattr(getattr(tv, cls), 'download', fail)
    refused(name, 'there seems to be no network', 'name resolution', '--data also takes a folder of pictures or an .npz', root=tmp_path)

# ---- npz

@pytest.mark.parametrize('names', [('x', 'y'), ('images', 'labels'), ('x_train', 'y_train')])
@pytest.mark.parametrize('a', [x, x[..., :1], x[..., 0]])
def test_npz_layouts(tmp_path, names, a):
    s = load_data(npz(tmp_path/'a.npz', **dict(zip(names, (a, y)))), size=8)
    assert s.train.images.shape == (43, 3 if a.ndim == 4 and a.shape[3] == 3 else 1, 6, 5)
    assert (len(s.valid), len(s.test), s.train.classes, s.name) == (5, 12, ('0', '1', '2'), 'a.npz')

def test_npz_with_its_own_test_part_and_names(tmp_path):
    s = load_data(npz(tmp_path/'a.npz', x_train=x, y_train=y, x_test=x[:6], y_test=y[:6].astype(np.uint8), classes=['cat', 'dog', 'owl']), size=8)
    assert np.array_equal(s.test.images.permute(0, 2, 3, 1), x[:6]) and s.test.classes == ('cat', 'dog', 'owl')
    assert len(s.train) + len(s.valid) == 60
    assert load_data(npz(tmp_path/'b.npz', x=x, y=y, classes=np.array([b'cat', b'dog', b'owl'])), size=8).train.classes[0] == 'cat'

@pytest.mark.parametrize('arrays, words', [
    (dict(a=x, b=y), ['x_train and y_train', 'found: a, b']),
    (dict(x=x), ['x and y', 'found: x']),
    (dict(x_train=x, y_train=y, x_test=x), ['with x_test and y_test or without', 'found: x_train, y_train, x_test']),
    ({}, ['found: none']),
    (dict(x=x, y=y[:50]), ['60 images but 50 labels']),
    (dict(x=x/255, y=y), ['got float64', 'multiply values in 0 to 1 by 255', 'astype(np.uint8)']),
    (dict(x=x.astype(np.int32), y=y), ['got int32']),
    (dict(x=x.transpose(0, 3, 1, 2), y=y), ['(60, 3, 6, 5)', 'channels last']),
    (dict(x=x.reshape(60, -1), y=y), ['(60, 90)']),
    (dict(x=x[:, :0], y=y), ['(60, 3, 0, 5)']),
    (dict(x=x, y=y.astype(float)), ['labels must be one whole number per image, got float64']),
    (dict(x=x, y=np.eye(3)[y].astype(int)), ['labels must be one whole number per image', '(60, 3)']),
    (dict(x=x, y=y - 1), ['label -1 at position 0 is outside']),
    (dict(x=x, y=y, classes=['a', 'b']), ['label 2 at position 2 is outside 0 to 1']),
    (dict(x=x, y=y*10**9), ['label 2000000000 at position 2', 'without gaps']),
    (dict(x=x, y=y + 1), ["class '0' (label 0) has no training image", 'without gaps']),
    (dict(x=x, y=y, classes=['a', 'b', 'c', 'd']), ["class 'd' (label 3) has no training image"]),
    (dict(x=x, y=y*0), ['one class only']),
    (dict(x=x[:0], y=y[:0]), ['one class only']),
    (dict(x_train=x, y_train=y, x_test=x, y_test=y + 1), ['x_test, y_test', 'label 3 at position 2']),
    (dict(x_train=x, y_train=y, x_test=x[..., 0], y_test=y), ['the test part does not match train']),
    (dict(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0]), ['the test part is empty']),
])
def test_npz_that_cannot_be_used(tmp_path, arrays, words): refused(npz(tmp_path/'a.npz', **arrays), f"data '{tmp_path}/a.npz'", *words)

class Bomb:
    "Unpickling this makes a file."
    def __reduce__(self): return (os.mkdir, (str(self.path),))

def test_pickled_objects_are_refused_and_never_unpickled(tmp_path):
    bomb = Bomb()
    bomb.path = tmp_path/'exploded'
    refused(npz(tmp_path/'a.npz', x=x, y=np.array([bomb, None], dtype=object)), "array 'y' holds pickled Python objects", 'never loaded')
    refused(npz(tmp_path/'b.npz', x=x, y=y, classes=np.array([bomb], dtype=object)), "array 'classes' holds pickled Python objects")
    assert not bomb.path.exists()
    with np.load(tmp_path/'a.npz', allow_pickle=True) as z: z['y'] # the file is the danger that the test says it is
    assert bomb.path.exists()

def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path/'a.npz'
    path.write_text('not arrays\n')
    refused(str(path), 'not an .npz file, or cut short')
    path.write_bytes(b'')
    refused(str(path), 'not an .npz file, or cut short')
    np.savez_compressed(path, x=x, y=y)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    refused(str(path), 'not an .npz file, or cut short')
    path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    refused(str(path), 'cannot be read whole')
    np.save(tmp_path/'x.npy', x)
    refused(str(tmp_path/'x.npy'), 'not an .npz file')

# ---- folders

def test_folder_of_classes_is_read_sorted_and_resized(tmp_path):
    pictures(tmp_path, {'dog': 6, 'cat': 6})
    (tmp_path/'notes.txt').write_text('no picture')
    (tmp_path/'cat'/'list.csv').write_text('no picture')
    (tmp_path/'cat'/'.hidden.png').write_text('no picture')
    pictures(tmp_path, {'.cache': 1})
    s = load_data(str(tmp_path), size=8, test_fraction=0.3, valid_fraction=0.3)
    assert s.train.classes == ('cat', 'dog') and s.train.images.shape[1:] == (3, 8, 8)
    want = {np.asarray(Image.open(p).resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1).tobytes() for p in tmp_path.glob('[cd]*/*[0-9].png')}
    got = [i.numpy().tobytes() for part in (s.train, s.valid, s.test) for i in part.images]
    assert set(got) == want and len(got) == 12 and s.skipped == 0

@pytest.mark.parametrize('valid', [None, 'val', 'valid'])
def test_folder_with_parts(tmp_path, valid):
    for part, n in (('train', 10), ('test', 2), (valid, 3)):
        if part: pictures(tmp_path/part, {'cat': n, 'dog': n}, 'jpg')
    s = load_data(str(tmp_path), size=8)
    assert (len(s.train), len(s.valid), len(s.test)) == ((20, 6, 4) if valid else (18, 2, 4))

def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    pictures(tmp_path, {'cat': 5, 'dog': 5})
    for mode in ('L', 'P', 'RGBA', 'CMYK', '1'): Image.new('RGB', (9, 9), 'red').convert(mode).save(tmp_path/'cat'/f'{mode}.{"jpg" if mode == "CMYK" else "png"}')
    assert load_data(str(tmp_path), size=4).train.images.shape[1:] == (3, 4, 4)

def test_truncated_jpeg_is_named_or_skipped_and_counted(tmp_path):
    pictures(tmp_path, {'cat': 8, 'dog': 8}, 'jpg', size=(64, 64))
    bad = tmp_path/'dog'/'003.jpg'
    bad.write_bytes(bad.read_bytes()[:-400])
    Image.open(bad) # opens: only its pixels are missing
    refused(str(tmp_path), str(bad), '--skip-bad')
    (tmp_path/'cat'/'text.png').write_text('not a picture')
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(tmp_path/'cat'/'deep.png')
    s = load_data(str(tmp_path), size=8, skip_bad=True)
    assert s.skipped == 3 and len(s.train) + len(s.valid) + len(s.test) == 15

def test_skipping_a_whole_class_is_an_error(tmp_path):
    pictures(tmp_path, {'cat': 5, 'dog': 5})
    for f in (tmp_path/'dog').iterdir(): f.write_bytes(b'')
    refused(str(tmp_path), "class 'dog' (label 1) has no training image", skip_bad=True)

def test_folders_that_cannot_be_used(tmp_path):
    refused(str(tmp_path), 'has no class folders', 'one folder per class')
    pictures(tmp_path, {'cat': 5})
    refused(str(tmp_path), 'one class only (cat)')
    (tmp_path/'dog').mkdir()
    refused(str(tmp_path), f"class folder '{tmp_path}/dog' holds no pictures")

def test_parts_that_cannot_be_used(tmp_path):
    pictures(tmp_path/'flat', {'train': 3, 'test': 3})
    refused(str(tmp_path/'flat'), 'has no class folders')
    pictures(tmp_path/'only'/'test', {'cat': 3, 'dog': 3})
    refused(str(tmp_path/'only'), 'has test/ but no train/')
    pictures(tmp_path/'more'/'train', {'cat': 5, 'dog': 5})
    pictures(tmp_path/'more'/'test', {'cat': 2, 'owl': 2})
    refused(str(tmp_path/'more'), f"'{tmp_path}/more/test/owl' is a class that train does not have")

def test_folder_without_permission(tmp_path, monkeypatch):
    "The tests may run as root, who may read everything; so the refusal is played."
    def denied(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(type(tmp_path), 'iterdir', denied)
    refused(str(tmp_path), f"data '{tmp_path}'", 'Permission denied')

# ---- printed letters

def test_printed_letters_repeat_and_scale():
    a = printed(370, seed=5)
    assert torch.equal(a.images, printed(370, seed=5).images) and not torch.equal(a.images, printed(370, seed=6).images)
    assert a.labels.bincount().tolist() == [10]*37 and a.images.flatten(1).any(1).all()
    big = printed(370, seed=5, size=16, channels=3)
    assert torch.equal(a.labels, big.labels) and big.images.shape == (370, 3, 16, 16)
    halved = F.avg_pool2d(big.images[:, :1].float(), 2)
    assert torch.corrcoef(torch.stack([halved.flatten(), a.images.float().flatten()]))[0, 1] > 0.97
    assert not any(c.isdigit() for c in a.classes) and len(set(a.classes)) == 37

def test_every_font_has_every_letter():
    "A missing glyph is drawn as the same box for all letters."
    drawn = glyphs(64)
    for font in range(drawn.shape[1]):
        assert len({g.numpy().tobytes() for g in drawn[:, font]}) == len(LETTERS)
        assert (drawn[:, font].flatten(1) > 127).sum(1).min() > 100

def test_ten_thousand_letters_are_quick():
    printed(1)
    start = time.perf_counter()
    printed(10_000)
    assert time.perf_counter() - start < 8 # about 1 s on an idle core

# ---- batches

def by_hand(image, channels, mean, std):
    "What one image of the right size becomes, pixel by pixel, in numpy."
    a = image.astype(np.float64) / 255
    if a.shape[0] == 1 and channels == 3: a = np.concatenate([a]*3)
    if a.shape[0] == 3 and channels == 1: a = (0.299*a[0] + 0.587*a[1] + 0.114*a[2])[None]
    return np.stack([(a[c] - mean[c]) / std[c] for c in range(channels)])

@pytest.mark.parametrize('stored', [1, 3])
@pytest.mark.parametrize('channels', [1, 3])
def test_batches_equal_a_loop_over_images(stored, channels):
    s = from_arrays(gen.integers(0, 256, (10, 8, 8, stored), dtype=np.uint8), np.arange(10) % 2)
    mean, std, index = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels], np.array([7, 2, 2, 9, 0])
    out = list(Batches(s, Format(channels, mean, std, 8), index, batch_size=2))
    got = torch.cat([b for b, _ in out])
    assert got.dtype == torch.float32 and [len(b) for b, _ in out] == [2, 3]
    assert np.allclose(got, [by_hand(s.images[i].numpy(), channels, mean, std) for i in index], atol=1e-5)
    assert torch.equal(torch.cat([t for _, t in out]), s.labels[index])

def test_resizing_is_antialiased_bilinear():
    "Halving an 8x8 image by the antialiased filter weighs 1, 3, 3, 1 in each direction, cut off at the border."
    s = from_arrays(gen.integers(0, 256, (3, 8, 8), dtype=np.uint8), np.arange(3) % 2)
    (got, _), = Batches(s, Format(1, 0., 1., 4))
    w = np.zeros((4, 8))
    for i in range(4):
        for d, v in zip(range(-1, 3), (1, 3, 3, 1)):
            if 0 <= 2*i + d < 8: w[i, 2*i + d] = v
    w /= w.sum(1, keepdims=True)
    assert np.allclose(got[:, 0], w @ (s.images[:, 0].numpy()/255) @ w.T, atol=1e-6)
    (grey, _), = Batches(s, Format(3, 0., 1., 20))
    assert grey.shape == (3, 3, 20, 20) and torch.equal(grey[:, 0], grey[:, 2])

S = from_arrays(gen.integers(0, 256, (400, 6, 4), dtype=np.uint8), np.arange(400) % 2)
def vary(how, seed=0, data=S, **kw): return Batches(data, Format(1, 0.5, 0.5, 4), **dict(batch_size=32) | kw, augment=how, draws=rng(seed, 'augment') if how else None)
def images(batches): return torch.cat([b[0] for b in batches])

def moved(a, down, right, mirrored):
    "One picture, pixel by pixel."
    out = np.zeros_like(a)
    for i in range(a.shape[-2]):
        for j in range(a.shape[-1]):
            if 0 <= i - down < a.shape[-2] and 0 <= j - right < a.shape[-1]: out[..., i, j] = a[..., i - down, j - right]
    return out[..., ::-1].copy() if mirrored else out

def test_flips_mirror_whole_images_about_half_of_them():
    plain, flipped = images(vary(None)), images(vary(Augment(flip=True)))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert ((flipped == plain).flatten(1).all(1) ^ mirrored).all() and 150 < mirrored.sum() < 250
    assert torch.equal(flipped, images(vary(Augment(flip=True)))) and not torch.equal(flipped, images(vary(Augment(flip=True), seed=1)))
    both = vary(Augment(flip=True))
    assert torch.equal(images(both), flipped) and not torch.equal(images(both), flipped)  # a second epoch draws anew

@pytest.mark.parametrize('by', [(0, 0), (1, 0), (0, -1), (2, 3), (-6, 1), (5, 4), (-9, 9)])
def test_shift_moves_by_pixels_and_black_comes_in(by):
    a = S.images[:3]
    got = shift(a, torch.tensor([by, (0, 0), (-1, 1)]))
    for g, i, (down, right) in zip(got, a, [by, (0, 0), (-1, 1)]): assert np.array_equal(g, moved(i.numpy(), down, right, 0))
    assert got.dtype == torch.uint8 and got.shape == a.shape and torch.equal(a, S.images[:3])

@pytest.mark.parametrize('how, n', [(Augment(), 1), (Augment(flip=True), 2), (Augment(crop=2), 0), (Augment(flip=True, crop=1), 0), (Augment(views=3, crop=1), 3), (Augment(flip=True, views=1), 1)])
def test_the_table_of_pictures_says_what_is_shown(how, n):
    "Every image of an epoch is one of its fixed pictures, and each of them turns up."
    assert how.fixed == n
    if not n: return
    table, seen = how.pictures(len(S)), set()
    assert table.shape == (len(S), n, 3) and abs(table[..., :2]).max() <= how.crop and set(np.unique(table[..., 2])) <= {0, int(how.flip)}
    stored = torch.stack([torch.stack([torch.from_numpy(moved(i.numpy(), *t)) for t in row]) for i, row in zip(S.images, table)])
    stored = [images(vary(None, data=ImageSet(stored[:, k], S.labels, S.classes))) for k in range(n)]
    for _ in range(2):
        got = images(vary(how, seed=_))
        same = torch.stack([(got == v).flatten(1).all(1) for v in stored], 1)
        assert same.any(1).all()
        seen |= {k for k in range(n) if same[:, k].any()}
    assert seen == set(range(n))

def test_fixed_pictures_depend_on_the_seed_and_the_image_alone():
    a, b = Augment(crop=3, flip=True, views=4, seed=1), Augment(crop=3, flip=True, views=4, seed=2)
    assert np.array_equal(a.pictures(50), Augment(crop=3, flip=True, views=4, seed=1).pictures(50)) and not np.array_equal(a.pictures(50), b.pictures(50))
    assert len({t.tobytes() for t in a.pictures(50)}) == 50
    free = vary(Augment(crop=3))
    assert not torch.equal(images(free), images(free))

class Noted:
    "Answers with what it is asked for."
    def fetch(self, image, picture): return {'image': image, 'picture': picture}

@pytest.mark.parametrize('how', [None, Augment(flip=True), Augment(flip=True, crop=2, views=3)])
def test_stored_gates_are_those_of_the_pictures_shown(how):
    index = rng(0).permutation(400)[:75]
    make = lambda gates, shuffle: vary(how, index=index, stored_gates=gates, shuffle=rng(5) if shuffle else None)
    for shuffle in (False, True):
        with_gates, without = list(make(Noted(), shuffle)), list(make(None, shuffle))
        assert [len(b) for b in with_gates] == [3]*3 and [len(b) for b in without] == [2]*3 and (make(Noted(), shuffle).n_inp, make(None, shuffle).n_inp) == (2, 1)
        for (x, gates, y), (x2, y2) in zip(with_gates, without):
            assert torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(y, S.labels[gates['image']]) and len(gates['picture']) == len(x)
            table = (how or Augment()).pictures(400)
            want = torch.stack([torch.from_numpy(moved(S.images[i].numpy(), *table[i, k])) for i, k in zip(gates['image'].tolist(), gates['picture'].tolist())])
            assert torch.equal(x, images(vary(None, data=ImageSet(want, y, S.classes))))
        assert sorted(torch.cat([g['image'] for _, g, _ in with_gates]).tolist()) == sorted(index.tolist())

def test_augmenting_needs_a_stream():
    with pytest.raises(InputError, match='draws'): Batches(S, Format(1, 0.5, 0.5, 4), augment=Augment(flip=True))

def test_shuffle_is_a_new_permutation_each_epoch_and_replays():
    s, index = from_arrays(np.arange(50, dtype=np.uint8).reshape(50, 1, 1), np.arange(50) % 2), np.arange(5, 45)
    make = lambda: Batches(s, Format(1, 0., 1/255, 1), index, batch_size=8, shuffle=rng(0, 'order'))
    epoch = lambda b: torch.cat([i for i, _ in b]).flatten().round().long().tolist()
    a, b = make(), make()
    one, two = epoch(a), epoch(a)
    assert sorted(one) == sorted(two) == index.tolist() and one != two
    next(iter(b)) # an epoch that is broken off
    assert epoch(b) == two
    assert np.array_equal(index, np.arange(5, 45))

@pytest.mark.parametrize('n', range(1, 12))
@pytest.mark.parametrize('bs', [1, 2, 3, 5, 20])
def test_no_batch_of_one_unless_there_is_no_other_way(n, bs):
    b = Batches(from_arrays(np.zeros((12, 2, 2), np.uint8), np.arange(12) % 2), Format(1, 0., 1., 2), np.arange(n), batch_size=bs)
    sizes = [len(t) for _, t in b]
    assert sum(sizes) == n and len(sizes) == len(b) and max(sizes) <= bs + 1
    assert 1 not in sizes or n == 1 or bs == 1

def test_batches_share_the_images_and_look_like_a_loader():
    s = from_arrays(x, y)
    clients = [Batches(s, Format(3, 0.5, 0.5, 6), np.arange(i, 60, 4), batch_size=4) for i in range(4)]
    assert {c.images.data_ptr() for c in clients} == {s.images.data_ptr()}
    assert (clients[0].bs, clients[0].n_inp, len(clients[0].dataset)) == (4, 1, 15)
    assert list(Batches(s, Format(3, 0.5, 0.5, 6), [])) == []

@pytest.mark.parametrize('kwargs, word', [
    (dict(index=[0, 60]), 'index must be from 0 to 59, got 0 to 60'), (dict(index=[-1]), 'got -1 to -1'),
    (dict(index=y == 0), 'got bool'), (dict(index=[[0, 1]]), '(1, 2)'), (dict(batch_size=0), 'batch_size 0'),
    (dict(mean=[0.5, 0.5]), 'mean must be one number or one for each of the 3 channels, got 2'), (dict(std=[0.5]*4), 'std must be')])
def test_bad_arguments_of_batches(kwargs, word):
    with pytest.raises(InputError) as e: Batches(from_arrays(x, y), Format(3, kwargs.pop('mean', 0.5), kwargs.pop('std', 0.5), 6), **kwargs)
    assert word in str(e.value)

def test_contact_sheet_lays_the_images_out_in_rows():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    s = from_arrays(x, y)
    contact_sheet(s, 7, ax, 'seven', columns=5)
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (14, 30, 3) and np.array_equal(sheet[:6, 6:11], x[1]) and np.array_equal(sheet[7:13, 6:11], x[6])
    plt.close(fig)

# ---- natural clients

def owned(labels, owners):
    "Images that can be told apart, with owners."
    n, labels, owners = len(labels), np.asarray(labels), np.asarray(owners)
    pixels = torch.arange(n, dtype=torch.int32).view(torch.uint8).reshape(n, 1, 2, 2).clone()
    names = tuple(map(str, range(int(owners.max()) + 1)))
    return ImageSet(pixels, torch.tensor(labels), tuple(map(str, range(int(labels.max()) + 1))), torch.tensor(owners), names)

def which(data): return data.images.reshape(-1).view(torch.int32).tolist()

@pytest.mark.parametrize('seed', range(20))
def test_a_tiny_client_keeps_an_image_to_train_on(seed):
    data = owned(np.arange(100) % 2, [0]*94 + [1]*2 + [2]*2 + [3, 4])
    s = split('mine', data, valid_fraction=.3, test_fraction=.4, seed=seed)
    assert set(s.train.owners.tolist()) == {0, 1, 2, 3, 4}

@given(st.data())
@settings(max_examples=80, deadline=None)
def test_hold_out_by_owner_is_a_share_of_each(drawn):
    n = drawn.draw(st.integers(2, 60))
    numbers = lambda most: st.lists(st.integers(0, most), min_size=n, max_size=n).map(lambda v: np.unique(v, return_inverse=True)[1])
    data, fraction = owned(drawn.draw(numbers(4)), drawn.draw(numbers(12))), drawn.draw(st.floats(.01, .99))
    rest, held = hold_out(data, fraction, rng(drawn.draw(st.integers(0, 99)), 'test'))
    assert sorted(which(rest) + which(held)) == list(range(n))
    assert set(rest.owners.tolist()) == set(data.owners.tolist()) and set(rest.labels.tolist()) == set(data.labels.tolist())
    of, taken = (np.bincount(d.owners, minlength=len(data.owner_names)) for d in (data, held))
    assert (taken <= np.floor(of*int(n*fraction + .5)/n) + 1).all()

def test_without_owners_the_draw_is_by_class_as_it_always_was():
    "Results that were published stay: the formula, written out."
    data = digits()
    gen, counts = rng(5, 'split', 'valid'), np.bincount(data.labels)
    wanted = np.minimum(share(counts, int(len(data)*.1 + .5), gen), counts - 1)
    held = np.sort(np.concatenate([gen.permutation(np.flatnonzero(data.labels.numpy() == k))[:m] for k, m in enumerate(wanted)]))
    assert torch.equal(hold_out(data, .1, rng(5, 'split', 'valid'))[1].images, data.images[held])
