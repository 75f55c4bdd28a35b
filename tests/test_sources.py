"Any data: ten-line proofs that a user's own Dataset, DataLoaders, table or hub dataset becomes Splits with the right owners."
import io, time, warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fedsq_nb.core import InputError, rng
from fedsq_nb.data.images import ImageSet, from_arrays, hold_out, thin
from fedsq_nb.data.partition import by_owner
from fedsq_nb.data.sources import from_dataset, load_data, read_picture, to_square

gen = np.random.default_rng(0)

class Mine(torch.utils.data.Dataset):
    "Each picture's red says its number; even numbers are cats."
    def __init__(self, n=60, kind='pil'): self.n, self.kind = n, kind
    def __len__(self): return self.n
    def __getitem__(self, i):
        x = np.full((4, 4, 3), (4*i, 0, 0), np.uint8)
        picture = {'pil': Image.fromarray, 'array': np.array, 'tensor': lambda a: torch.tensor(a).permute(2, 0, 1).float()/255}[self.kind](x)
        return picture, ('cat', 'dog')[i % 2]

def number(images): return images.images[:, 0, 0, 0].numpy().astype(int)//4

def tree(top, order, n=6):
    "Pictures in two levels of folders."
    for client in ('eva', 'ada'):
        for label in ('cat', 'dog'):
            folder = top/client/label if order == 'outer' else top/label/client
            folder.mkdir(parents=True)
            for i in range(n): Image.new('RGB', (6, 6), (200 if client == 'eva' else 100, i, 0)).save(folder/f'{i}.png')
    return top

# ---- ten-line proofs

@pytest.mark.parametrize('kind', ['pil', 'array', 'tensor'])
def test_own_dataset(kind):
    s = load_data(Mine(kind=kind), size=4, owners=[f'ward {i % 3}' for i in range(60)])
    assert s.train.classes == ('cat', 'dog') and s.owner_names == ('ward 0', 'ward 1', 'ward 2')
    assert np.array_equal(number(s.train) % 2, s.train.labels) and np.array_equal(number(s.train) % 3, s.owners)
    assert np.array_equal(number(s.test) % 3, s.test.owners) and np.array_equal(number(s.valid) % 3, s.valid.owners)
    parts = by_owner(s.owners)
    assert [set(number(s.train)[p] % 3) for p in parts] == [{0}, {1}, {2}] and sum(map(len, parts)) == len(s.train)

def test_fastai_dataloaders_one_a_client_or_one_with_owners(tmp_path):
    with warnings.catch_warnings(action='ignore'): from fastai.vision.all import ImageDataLoaders, RandomResizedCrop, aug_transforms
    tree(tmp_path, 'inner', 10)
    make = lambda seed: ImageDataLoaders.from_folder(tmp_path, valid_pct=.25, seed=seed, num_workers=0, item_tfms=RandomResizedCrop(4), batch_tfms=aug_transforms())
    one = make(0)
    s = load_data(one, size=4, owners=[p.parent.name for p in one.train_ds.items])
    assert len(s.valid) == len(one.valid_ds) and set(s.owner_names) == {'ada', 'eva'}
    assert np.array_equal(s.train.images[:, 0, 0, 0] == 200, s.owners == s.owner_names.index('eva'))
    s = load_data({'west': make(1), 'east': make(2)}, size=4)
    assert s.owner_names == ('west', 'east') and len(s.valid) == 20 and len(by_owner(s.owners)) == 2

def test_pandas_table_with_client_ids_and_the_same_from_a_file(tmp_path):
    tree(tmp_path, 'outer')
    files = sorted(tmp_path.rglob('*.png'))
    table = pd.DataFrame(dict(path=[f.relative_to(tmp_path) for f in files], label=[f.parent.name for f in files], client=[f.parent.parent.name for f in files]))
    table.to_csv(tmp_path/'list.csv', index=False)
    a, b = load_data(table, size=6, root=tmp_path), load_data(tmp_path/'list.csv', size=6)
    assert torch.equal(a.train.images, b.train.images) and np.array_equal(a.owners, b.owners) and b.name == 'list.csv'
    assert a.owner_names == ('ada', 'eva') and np.array_equal(a.train.images[:, 0, 0, 0] == 200, a.owners == 1)
    other = load_data(table.rename(columns=dict(client='who', path='where')), size=6, root=tmp_path, path_column='where', client_column='who')
    assert np.array_equal(other.owners, a.owners)

class Names: names = ['cat', 'dog']

class Hub:
    "What this package asks of a Hugging Face dataset."
    column_names, features = ['image', 'label', 'client'], {'image': None, 'label': Names, 'client': None}
    def __len__(self): return 40
    def __getitem__(self, i):
        if isinstance(i, str): return [f'user {j % 4}' for j in range(40)]
        return dict(image=Image.new('RGB', (4, 4), (4*i, 0, 0)), label=i % 2, client=f'user {i % 4}')

def test_hub_dataset_by_its_shape_alone():
    s = load_data(Hub(), size=4)
    assert s.train.classes == ('cat', 'dog') and np.array_equal(number(s.train) % 4, s.owners) and s.owner_names[3] == 'user 3'
    s = load_data({'train': Hub(), 'test': Hub()}, size=4)
    assert len(s.test) == 40 and len(s.train) + len(s.valid) == 40

def test_the_real_hub_datasets():
    datasets = pytest.importorskip('datasets')
    d = datasets.Dataset.from_dict(dict(image=[Image.new('RGB', (4, 4), (4*i, 0, 0)) for i in range(40)], label=[i % 2 for i in range(40)], client=[f'user {i % 4}' for i in range(40)]),
                                   features=datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog']), client=datasets.Value('string'))))
    a, b = load_data(d, size=4), load_data(datasets.DatasetDict(train=d, test=d), size=4)
    assert a.train.classes == ('cat', 'dog') and np.array_equal(number(a.train) % 4, a.owners) and len(b.test) == 40

# ---- folder levels

@pytest.mark.parametrize('level', ['outer', 'inner'])
def test_a_folder_level_names_the_client(tmp_path, level):
    s = load_data(tree(tmp_path, level), size=6, client_level=level)
    assert s.train.classes == ('cat', 'dog') and s.owner_names == ('ada', 'eva')
    assert np.array_equal(s.train.images[:, 0, 0, 0] == 200, s.owners == 1)
    assert load_data(tmp_path, size=6).owners is None

def test_unknown_level_and_level_of_a_file(tmp_path):
    with pytest.raises(InputError, match='client_level'): load_data(tree(tmp_path, 'outer'), size=6, client_level='middle')
    pd.DataFrame(dict(path=['a'], label=['b'])).to_csv(tmp_path/'a.csv')
    with pytest.raises(InputError, match='a table has client_column'): load_data(tmp_path/'a.csv', size=6, client_level='outer')

# ---- owners stay with their images

def test_owners_follow_subset_hold_out_thin_and_to():
    data = from_dataset(Mine(), 4)
    data = ImageSet(data.images, data.labels, data.classes, torch.arange(60) % 5, tuple('abcde'))
    rest, held = hold_out(data, .3, rng(0))
    for part in (rest, held, thin(data, 20, rng(1)), data.subset([7, 3]), data.to('cpu')):
        assert np.array_equal(number(part) % 5, part.owners) and part.owner_names == tuple('abcde')

def test_parts_number_the_same_clients_alike(tmp_path):
    for part, clients in (('train', ['ben', 'cem']), ('test', ['ann', 'cem'])):
        for client in clients:
            for label in ('cat', 'dog'):
                (tmp_path/part/client/label).mkdir(parents=True)
                for i in range(9): Image.new('RGB', (6, 6), (dict(ann=1, ben=2, cem=3)[client], i, 0)).save(tmp_path/part/client/label/f'{i}.png')
    s = load_data(tmp_path, size=6, client_level='outer')
    assert s.owner_names == s.test.owner_names == ('ben', 'cem', 'ann')
    for part in (s.train, s.valid, s.test): assert [('ben', 'cem', 'ann')[o] for o in part.owners] == [{1: 'ann', 2: 'ben', 3: 'cem'}[int(r)] for r in part.images[:, 0, 0, 0]]

def test_splits_and_image_sets_are_taken_as_they_are():
    s = load_data(Mine(), size=4)
    assert load_data(s, size=99) is s
    assert len(load_data(from_dataset(Mine(), 4), size=4).train) == len(s.train)

def test_clients_may_know_different_classes():
    a, b = from_arrays(np.zeros((20, 2, 2), np.uint8), np.arange(20) % 2, ['cat', 'dog']), from_arrays(np.zeros((20, 2, 2), np.uint8), np.arange(20) % 2, ['owl', 'cat'])
    s = load_data([a, b], size=2)
    assert s.train.classes == ('cat', 'dog', 'owl') and s.owner_names == ('0', '1')
    assert set(s.train.labels[s.owners == 1].tolist()) == {0, 2}

# ---- what is refused

class Random(Mine):
    def __getitem__(self, i): return torch.rand(3, 4, 4), i % 2

class Normalised(Mine):
    def __getitem__(self, i): return torch.full((3, 4, 4), -1.5), i % 2

class Growing(Mine):
    def __getitem__(self, i): return np.zeros((4 + i, 4), np.uint8), i % 2

@pytest.mark.parametrize('data, word', [
    (Random(), 'ask for flip and crop instead'), (Normalised(), 'leave out Normalize'), (Growing(), 'item 1 has 5x4 pixels and item 0 has 4x4'),
    (Mine(0), 'the dataset is empty'), (iter([1]), 'has no items by number'), (pd.DataFrame(dict(file=['a'])), 'say which one to take with label_column'),
    (pd.DataFrame(dict(path=['a', None], label=['b', 'c'])), "column 'path' has no value in row 1"), ({}, 'there are no clients')])
def test_what_cannot_be_used_is_refused_in_one_line(data, word):
    with pytest.raises(InputError) as e: load_data(data, size=4)
    assert word in str(e.value) and '\n' not in str(e.value)

def test_wrong_owners():
    with pytest.raises(InputError, match='one for each of the 60 images'): load_data(Mine(), size=4, owners=['a'])
    with pytest.raises(InputError, match='the owner of image 1 is missing'): load_data(Mine(), size=4, owners=['a', None]*30)

# ---- pictures

@pytest.mark.parametrize('orientation', range(2, 9))
def test_exif_orientation_is_obeyed(tmp_path, orientation):
    "The picture that a viewer shows is the one that a network gets."
    upright = Image.fromarray(gen.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how the stored pixels come from what is seen
    stored = upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(read_picture(tmp_path/'a.png', 6), np.asarray(upright).transpose(2, 0, 1))

def photo(path, w, h):
    u, v = np.meshgrid(np.linspace(0, 40, w), np.linspace(0, 30, h))
    Image.fromarray((127 + 60*np.stack([np.sin(u), np.cos(v), np.sin(u + v)], -1)).astype(np.uint8)).save(path, quality=95)
    return path

def test_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = photo(tmp_path/'a.jpg', 4000, 3000)
    def seconds(f):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            out = f()
            times.append(time.perf_counter() - start)
        return out, min(times)
    (whole, slow), (drafted, fast) = seconds(lambda: to_square(Image.open(path), 64)), seconds(lambda: read_picture(path, 64))
    assert fast < slow/2 and abs(whole.astype(int) - drafted).mean() < 1

@pytest.mark.parametrize('name, w, h', [('a.jpg', 900, 700), ('a.png', 1500, 1200)])
def test_no_pixel_changes_otherwise(tmp_path, name, w, h):
    path = photo(tmp_path/name, w, h)
    want = np.asarray(Image.open(path).convert('RGB').resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(read_picture(path, 8), want)
