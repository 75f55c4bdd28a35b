"Stored gates: the same bits as computed ones, a key for everything they depend on, and files that are whole or not there."
import contextlib, copy, dataclasses, errno, functools, hashlib, itertools, json, math, os, pickle, resource, signal, struct, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb import core
from fedsq_nb.gating import cache as C
from fedsq_nb.data.images import Format
from fedsq_nb.gating.cache import GateCache, cache_key, gate_cache, plan, storage_verdict
from fedsq_nb.core import InputError, copy_state, rng, seeded, state_hash
from fedsq_nb.data.batches import Augment, Batches
from fedsq_nb.data.example import printed
from fedsq_nb.data.images import ImageSet, from_arrays
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.study.config import Config
from fedsq_nb.study.task import load_task
from fedsq_nb.study.experiment import run
from fedsq_nb.client.learner import LocalTraining, shared_state

N, BS, FORM, gen = 50, 16, Format(3, (.5, .4, .3), (.25, .3, .2), 8), rng(0, 'test', 'cache')
DATA = from_arrays(gen.integers(0, 256, (N, 8, 8, 3), dtype='uint8'), gen.integers(0, 3, N), ['a', 'b', 'c'])
SHOW = dict(form=FORM, batch_size=BS)
WAYS = {'as they are': None, 'flips': Augment(flip=True), 'views': Augment(flip=True, crop=2, views=3, seed=1)}

# ---- small networks of every kind

def conv(c_in, c_out, **kw): return nn.Conv2d(c_in, c_out, 3, **dict(padding=1) | kw)

def net(*middle, act=nn.ReLU, head=8*2*2, wide=8):
    return nn.Sequential(conv(3, wide), nn.BatchNorm2d(wide), act(), *middle or [nn.MaxPool2d(2), conv(wide, 8), act(), nn.MaxPool2d(3, 2, 1)],
                         nn.Flatten(), nn.Linear(head, 16), act(), nn.Linear(16, 3))

class Attention(nn.Module):
    "Four patches that attend to each other."
    def __init__(self):
        super().__init__()
        self.patch, self.norm, self.attend = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden, self.out = nn.Linear(16, 80), nn.Linear(80, 3)
    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        h = self.norm(x)
        x = x + self.attend(h, h, h, need_weights=False)[0]
        return self.out(F.gelu(self.hidden(x)).mean(1))

def last(model): return model.to(memory_format=torch.channels_last)
MODELS = {'relu': net, 'wide': lambda: net(wide=16), 'relu6': lambda: net(act=nn.ReLU6), 'soft': lambda: net(act=nn.SiLU), 'attention': Attention, 'relu last': lambda: last(net()), 'soft last': lambda: last(net(act=nn.GELU))}

def dual(kind='relu', seed=0, **kw):
    with seeded(seed, 'model'): model = MODELS[kind]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.2, .2, generator=torch.Generator().manual_seed(3))
    return DualCopy(model, **kw).eval()

def frozen(): return dual('wide', freeze='0,1')  # what the frozen layers give is stored as numbers
def shown(data=DATA, how=None, **kw): return Batches(data, **SHOW | dict(augment=how, draws=rng(0) if how else None) | kw)

def told(dc, batches, **kw):
    "A cache, and what was said."
    said = []
    return gate_cache(dc, batches, say=said.append, **kw), said

def pictured(how, n=N):
    "Every picture of every image, as an image of its own: moved and mirrored by hand."
    table, images = (how or Augment()).pictures(n), DATA.images.numpy()[:n]
    def moved(a, down, right, mirrored):
        out = np.zeros_like(a)
        for i, j in itertools.product(range(8), range(8)):
            if 0 <= i - down < 8 and 0 <= j - right < 8: out[:, i, j] = a[:, i - down, j - right]
        return out[:, :, ::-1] if mirrored else out
    return ImageSet(torch.from_numpy(np.stack([moved(a, *t) for a, row in zip(images, table) for t in row])), DATA.labels[:n].repeat_interleave(table.shape[1]), DATA.classes)

def computed(dc, how=None, n=N):
    "Gates of every picture, computed in the batches that a cache is built in."
    data = pictured(how, n)
    with torch.no_grad(): parts = [dc.gates(shown(data).show(torch.arange(a, min(a + BS, len(data))))) for a in range(0, len(data), BS)]
    return {site: torch.cat([p[site] for p in parts]) for site in parts[0]}

def stored_as(gates, cache):
    "`gates` after the rounding that storing numbers brings."
    return {s.site: gates[s.site] if s.bits else gates[s.site].to(getattr(torch, s.stored)).to(gates[s.site].dtype) for s in cache.slots}

def same(a, b):
    assert a.keys() == b.keys()
    for site in a:
        assert a[site].dtype == b[site].dtype and torch.equal(a[site], b[site]), site

# ---- what is fetched is what would be computed

EVERY = {**{k: lambda k=k: dual(k) for k in MODELS}, 'frozen': frozen, 'own maximum': lambda: dual(pool='max')}

@pytest.mark.parametrize('kind', EVERY)
@pytest.mark.parametrize('soft', ['float16', 'bfloat16', 'float32'])
def test_a_batch_has_the_gates_of_the_same_pictures_to_the_bit(kind, soft):
    dc, batches = EVERY[kind](), shown()
    cache, want = gate_cache(dc, batches, soft=soft), computed(dc)
    for a in range(0, N, BS):
        x, at = batches.show(torch.arange(a, min(a + BS, N))), torch.arange(a, min(a + BS, N))
        back, fresh = cache.fetch(at), dc.gates(x)
        same(fresh, {s: g[a:a + BS] for s, g in want.items()})
        same(back, stored_as(fresh, cache))
        assert all(back[s].is_contiguous(memory_format=torch.channels_last) == g.is_contiguous(memory_format=torch.channels_last) for s, g in fresh.items() if g.ndim == 4)
        with torch.no_grad():
            exact = soft == 'float32' or all(s.bits or s.stored == s.dtype for s in cache.slots)
            if exact: assert torch.equal(dc(x, back), dc(x))
            else: torch.testing.assert_close(dc(x, back), dc(x), rtol=0, atol=.02 if soft == 'bfloat16' else .003)
    if kind == 'frozen': assert {s.stored for s in cache.slots} == {'bits', 'float32'}, 'what frozen layers hand over is a value and keeps its type'
    elif kind not in ('soft', 'soft last', 'attention'): assert all(s.bits for s in cache.slots)
    else: assert any(s.stored == soft for s in cache.slots)

@pytest.mark.parametrize('kind', ['soft', 'attention'])
def test_stored_numbers_are_rounded_to_the_nearest(kind):
    dc = EVERY[kind]()
    want = computed(dc)
    for soft, digits in (('float16', 11), ('bfloat16', 8)):
        cache = gate_cache(dc, shown(), soft=soft)
        back = cache.fetch(torch.arange(N))
        off = {s.site: ((back[s.site] - want[s.site]).abs() / want[s.site].abs().clamp_min(2.**-14)).max().item() for s in cache.slots if s.stored == soft}
        assert 2.**-(digits + 2) < max(off.values()) <= 2.**-digits, off

@pytest.mark.parametrize('kind', ['relu', 'relu6', 'relu last', 'soft', 'attention', 'frozen'])
def test_in_other_batches_at_most_one_gate_in_ten_thousand_differs(kind):
    "A convolution may round differently beside other images: a unit that is zero up to rounding may fall on the other side."
    dc, order = EVERY[kind](), torch.from_numpy(rng(1).permutation(N))
    batches, wrong, units = shown(), 0, 0
    cache = gate_cache(dc, batches, soft='float32')
    for at in (*order.split(7), order[:1], order):
        for site, g in dc.gates(batches.show(at)).items():
            back = cache.fetch(at)[site]
            if g.is_floating_point(): torch.testing.assert_close(back, g, rtol=1e-4, atol=1e-5)
            else: wrong, units = wrong + (back != g).sum().item(), units + g.numel()
    assert units > 10_000 or kind in ('soft', 'attention')
    assert wrong <= 1e-4*units

@pytest.mark.parametrize('how', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('kind', ['relu', 'frozen', 'soft last'])
def test_every_picture_has_its_own_gates(kind, how):
    dc = EVERY[kind]()
    cache, want = gate_cache(dc, shown(how=how), soft='float32'), computed(dc, how)
    n = (how or Augment()).fixed
    assert cache.views == n and len(cache.rows) == n*N and cache.nbytes == cache.rows.numel() == plan(dc, shown(how=how), 'float32').total
    at = torch.from_numpy(rng(2).integers(N, size=40))
    picture = torch.from_numpy(rng(3).integers(n, size=40))
    same(cache.fetch(at, picture), {s: g[at*n + picture] for s, g in want.items()})
    same(cache.fetch(at), {s: g[at*n] for s, g in want.items()})
    if n > 1: assert any(not torch.equal(want[s][0::n], want[s][1::n]) for s in want)

@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_rows_in_any_order(draw):
    n, bs, k = draw.draw(st.integers(1, 9)), draw.draw(st.integers(1, 5)), draw.draw(st.integers(1, 3))
    dc, how = dual(draw.draw(st.sampled_from(['relu', 'relu6', 'relu last']))), Augment(flip=True, crop=1, views=k, seed=4)
    data = DATA.subset(range(n))
    cache = gate_cache(dc, shown(data, how, batch_size=bs))
    pairs = draw.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, k - 1)), min_size=1, max_size=12))
    whole = cache.fetch(torch.arange(n).repeat_interleave(k), torch.arange(k).repeat(n))
    got = cache.fetch(torch.tensor([i for i, _ in pairs]), torch.tensor([j for _, j in pairs]))
    same(got, {s: g[[i*k + j for i, j in pairs]] for s, g in whole.items()})
    fresh = dc.gates(shown(pictured(how, n)).show(torch.arange(n*k)))
    assert sum((whole[s] != g).sum().item() for s, g in fresh.items()) <= 1e-4*sum(g.numel() for g in fresh.values())

def test_fetching_takes_as_many_calls_for_many_images_as_for_two():
    for kind in ('relu6', 'attention', 'soft last', 'frozen'):
        cache, counts = gate_cache(EVERY[kind](), shown()), []
        for n in (2, N):
            calls, at = [0], torch.arange(n)
            def count(frame, event, arg): calls[0] += event in ('call', 'c_call')
            cache.fetch(at)
            sys.setprofile(count)
            try: cache.fetch(at)
            finally: sys.setprofile(None)
            counts.append(calls[0])
        assert counts[0] == counts[1] > 5, (kind, counts)

def test_the_structural_copy_runs_once_for_each_picture():
    for how in WAYS.values():
        dc, batches, seen = dual(), shown(how=how), []
        dc.structural.get_submodule('0').register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
        cache = gate_cache(dc, batches)
        n = cache.views*N
        assert seen == [1] + [BS]*(n // BS) + [n % BS]*(n % BS > 0)  # one picture tells the plan
        with torch.no_grad(): dc(batches.show(torch.arange(BS)), cache.fetch(torch.arange(BS)))
        assert sum(seen) == n + 1

# ---- training

class Recomputed:
    "What a cache should answer, from gates that were computed picture by picture."
    def __init__(self, dc, how): self.gates, self.n = computed(dc, how), (how or Augment()).fixed
    def fetch(self, image, picture=None): return {s: g[image*self.n + (0 if picture is None else picture)] for s, g in self.gates.items()}

PARTS = [np.arange(N)[::2], np.arange(N)[1::2]]
def days(dc, gates, how=None, kind=LocalTraining, parts=PARTS, **kw):
    "Two rounds of every client; the mean of a round starts the next."
    train = kind(dc, DATA, parts, FORM, lr=.05, batch_size=BS, augment=how, stored_gates=gates, seed=3, **kw)
    state = shared_state(dc)
    for r in (1, 2):
        sent = [train(state, client, r).state for client in range(len(parts))]
        state = {k: torch.stack([s[k] for s in sent]).float().mean(0).to(v.dtype) for k, v in sent[0].items()}
    return state

@pytest.mark.parametrize('how', WAYS.values(), ids=WAYS)
@pytest.mark.parametrize('make', [dual, frozen, lambda: dual('relu6')], ids=['relu', 'frozen', 'relu6'])
def test_training_with_a_cache_gives_the_same_weights_to_the_bit(make, how, tmp_path):
    start = shared_state(make())
    want = days(make(), Recomputed(make(), how), how)
    for folder in (None, tmp_path):
        got = days(make(), gate_cache(make(), shown(how=how), soft='float32', folder=folder), how)
        assert state_hash(got) == state_hash(want) != state_hash(start)
    without = days(make(), None, how)
    for k in want: torch.testing.assert_close(without[k], want[k], rtol=0, atol=1e-4)
    wrong = Recomputed(make(), how)
    wrong.gates = {site: g.roll(1, 0) for site, g in wrong.gates.items()}  # another image's
    assert state_hash(days(make(), wrong, how)) != state_hash(want)

class InOrder(LocalTraining):
    "Batches that are composed as the cache was built."
    def batches(self, client, round):
        b = super().batches(client, round)
        b.shuffle = None
        return b

@pytest.mark.parametrize('kind', ['relu', 'relu6', 'relu last', 'frozen', 'attention', 'soft'])
def test_at_equal_composition_no_cache_is_the_same_to_the_bit(kind):
    make, parts = EVERY[kind], [np.arange(N)]  # batches of 16, 16, 16 and 2: as built
    cache = gate_cache(make(), shown(), soft='float32')
    a, b = days(make(), cache, kind=InOrder, parts=parts, epochs=2), days(make(), None, kind=InOrder, parts=parts, epochs=2)
    assert state_hash(a) == state_hash(b) != state_hash(shared_state(make()))

RUN = dict(weights='random', size=12, clients=3, alpha=1, min_size=2, max_train=60, valid_fraction=.05, test_fraction=.05, batch_size=16, rounds=2, methods='fedsq', lr='0.02')

@pytest.mark.parametrize('more', [{}, dict(flip=True), dict(crop=1, flip=True, views=3), dict(freeze='stem', cache_type='float32')], ids=['as they are', 'flips', 'views', 'frozen'])
def test_a_run_with_and_without(more, tmp_path, monkeypatch):
    asked, make = [], DualCopy.__init__
    def counting(dc, *args, **kw):
        make(dc, *args, **kw)
        dc.structural.stem[0].register_forward_hook(lambda m, i, o: asked.append(len(i[0])))
    monkeypatch.setattr(DualCopy, '__init__', counting)
    def play(**kw):
        asked.clear()
        task = load_task(Config(**RUN | more | kw))
        fed = run(task, 'fedsq', 0, .02)
        return fed, sum(asked), task
    (memory, n_memory, task), (off, n_off, _), (files, *_), (again, n_again, _) = play(), play(cache='off'), play(cache=str(tmp_path)), play(cache=str(tmp_path))
    assert state_hash(memory.state) == state_hash(files.state) == state_hash(again.state)
    for k in off.state: torch.testing.assert_close(off.state[k], memory.state[k], rtol=0, atol=1e-3)
    assert len(list(tmp_path.iterdir())) == 3
    lines = [[{k: v for k, v in r.items() if not k.endswith('seconds') and k != 'weights'} for r in f.rows] for f in (memory, files, off)]
    assert json.dumps(lines[0]) == json.dumps(lines[1])
    for a, b in zip(lines[0], lines[2]): assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-3) and a['test_accuracy'] == pytest.approx(b['test_accuracy'], abs=.03)
    sizes = {part: len(getattr(task.splits, part)) for part in ('train', 'valid', 'test')}
    pictures = sizes['train']*(task.augment or Augment()).fixed + sizes['valid'] + sizes['test']
    assert pictures <= n_memory <= pictures + 15 + 128 < n_off + 100*bool(task.augment) and n_again <= 15 + 128  # plans look at one picture each; the probe at up to 128

def test_free_crops_have_no_cache_and_say_so():
    cache, said = told(dual(), shown(how=Augment(crop=2)))
    assert cache is None and len(said) == 1 and 'computed for each batch' in said[0] and 'random crops' in said[0] and 'views=k' in said[0]
    task = load_task(Config(**RUN | dict(crop=1)))
    assert any('random crops' in n and 'gate cache: ' in n for n in map(str, task.notes)), task.notes  # valid and test are shown as they are
    model = DualCopy(task.network(0))
    assert task.gates(model, 'train') is None and task.gates(model, 'valid') is not None and task.gates(model, 'test') is not None

# ---- sizes

def bits_needed(model, x):
    "Bits of one picture's gates, counted at the units of an ordinary network while it runs."
    bits = []
    def at(kind, size):
        for m in model.modules():
            if isinstance(m, kind): m.register_forward_hook(lambda m, i, o: bits.append(o[0].numel() * size(m)))
    at(nn.ReLU, lambda m: 1)
    at(nn.ReLU6, lambda m: 2)
    at(nn.MaxPool2d, lambda m: math.ceil(2*math.log2(m.kernel_size)))
    at((nn.SiLU, nn.Hardswish, nn.Hardsigmoid), lambda m: 16)
    with torch.no_grad(): model.eval()(x)
    return sum(bits)

@pytest.mark.parametrize('name, size', [('resnet18', 32), ('mobilenet_v2', 64), ('mobilenet_v3_small', 48), ('squeezenet1_1', 64)])
def test_a_picture_takes_the_bits_of_its_gates(name, size):
    with seeded(0, name): model = torchvision.models.get_model(name, weights=None, num_classes=10)
    batches = Batches(printed(3, size=size, channels=3), Format(3, .5, .25, size))
    p, bits = plan(DualCopy(model), batches), bits_needed(model, batches.show(torch.arange(1)))
    assert bits <= 8*p.row <= 1.05*bits
    assert p.total == 3*p.row and f'{p.row:,} bytes a picture' in str(p)

@pytest.mark.parametrize('how', WAYS.values(), ids=WAYS)
def test_the_plan_is_what_the_file_holds(how, tmp_path):
    dc = dual()
    p, cache = plan(dc, shown(how=how)), gate_cache(dc, shown(how=how), folder=tmp_path)
    whole = cache.path.read_bytes()
    n = struct.unpack('<Q', whole[-14-8:-14])[0]
    note = json.loads(whole[-22-n:-22])
    assert len(whole) - 22 - n == p.total == cache.nbytes and note['key'] == cache.path.stem and n < 200
    assert note['checksum'] == hashlib.blake2b(whole[:p.total], digest_size=16).hexdigest() and whole[:p.total] == cache.rows.numpy().tobytes()
    units = {'2': (512, 1), '3': (128, 2), '5': (128, 1), '6': (32, 4), '9': (16, 1)}
    assert p.row == sum(u*b for u, b in units.values()) // 8 and p.total == p.row*N*(how or Augment()).fixed

def test_adaptive_pooling_takes_whole_bytes():
    "Its windows are as large as the images make them, so the bits of a position are not known beforehand."
    dc = DualCopy(net(nn.AdaptiveMaxPool2d(3), head=8*9)).eval()
    assert {s.site: s.bits for s in plan(dc, shown()).slots} == {'2': 1, '3': 8, '6': 1}

@functools.cache
def some():
    "A small job, and networks with three structural copies."
    task = load_task(Config(**RUN | dict(max_train=30)))
    return task, [DualCopy(load_task(Config(**RUN | dict(max_train=30, seed=k))).network(k)).eval() for k in (0, 1, 2)]

def limited(limit, **kw):
    task, _ = some()
    return type(task)(task.config.replace(cache_bytes=limit, **kw), task.splits, task.form)

def test_bytes_are_bounded_over_the_three_parts(tmp_path):
    task, (dc, *_) = some()
    size = {part: plan(dc, task.batches(part)).total for part in ('train', 'valid', 'test')}
    t, v, s = size.values()
    for limit in sorted({0} | {e + d for e in (t, v, s, t + v, t + s, v + s, t + v + s) for d in (-1, 0)}):
        for order in (list(size), list(size)[::-1]):
            one, left, kept = limited(limit, cache=str(tmp_path) if limit == t + v else 'memory'), limit, []
            for part in order:
                cache = one.gates(dc, part)
                assert (cache is not None) == (size[part] <= left), (limit, part)
                left -= cache.nbytes if cache else 0
                kept += [part] if cache else []
            assert 0 <= left <= limit and sum(c.nbytes for _, c in one.stored.values() if c) == limit - left
            if order[0] == 'train':
                note = one.storage(dc)
                assert note.count('are more than the') == note.count('computed for each batch') == 3 - len(kept) and note.startswith('gate cache: ') == bool(kept), note
    note, = (n for n in map(str, load_task(Config(**RUN | dict(max_train=30, cache_bytes=t))).notes) if 'each batch' in n)
    assert note == limited(t).storage(dc)

@settings(max_examples=12, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(['train', 'valid', 'test'])), min_size=1, max_size=8), share=st.floats(0, 1.2))
def test_never_more_bytes_than_allowed_whatever_is_asked_for(steps, share):
    task, models = some()
    total = sum(plan(models[0], task.batches(part)).total for part in ('train', 'valid', 'test'))
    task = limited(int(share*total))
    for which, part in steps:
        cache = task.gates(models[which], part)
        assert sum(c.nbytes for _, c in task.stored.values() if c) <= int(share*total)
        if cache:
            at = torch.arange(9)
            for site, g in models[which].gates(task.batches(part).show(at)).items(): assert (cache.fetch(at)[site] != g).float().mean() < 1e-3  # these weights', not another's

def test_no_room_says_how_much_is_missing():
    p = plan(dual(), shown())
    cache, said = told(dual(), shown(), limit=p.total - 1)
    assert cache is None and len(said) == 1 and 'cache_bytes' in said[0] and str(p) in said[0]
    cache, said = told(dual(), shown(), limit=p.total)
    assert cache.nbytes == p.total and said == [f'gate cache: {p}'] == [storage_verdict([p], p.total)]

def test_another_type_is_refused():
    with pytest.raises(InputError, match="'float8'.*valid|'float8'.*did you mean"): gate_cache(dual(), shown(), soft='float8')

def test_values_too_large_for_their_type_never_become_infinite():
    "float16 ends at 65504: what frozen layers hand over may be larger, and is refused with a remedy, or comes back finite."
    dc, at = frozen(), torch.arange(BS)
    with torch.no_grad(): dc.structural.get_submodule('1').weight.fill_(1e6)
    for soft in ('float16', 'bfloat16', 'float32'):
        try: cache = gate_cache(dc, shown(), soft=soft)
        except InputError as e: assert soft == 'float16' and 'bfloat16' in str(e) and '3_value' in str(e), e
        else:
            with torch.no_grad(): assert cache is None or dc(shown().show(at), cache.fetch(at)).isfinite().all(), soft

# ---- the key

def key(dc=None, batches=None, soft='float16'):
    dc, batches = dc or dual(), batches or shown()
    return cache_key(dc, batches, plan(dc, batches, soft).slots)

def pixel(i, c, h, w):
    images = DATA.images.clone()
    images[i, c, h, w] ^= 1
    return ImageSet(images, DATA.labels, DATA.classes)

def test_every_change_has_a_key_of_its_own():
    crop = dict(flip=True, crop=2, views=3, seed=1)
    keys = {'as it is': key(), 'one pixel': key(batches=shown(pixel(0, 0, 0, 0))), 'another pixel': key(batches=shown(pixel(N-1, 2, 7, 7))),
            'order': key(batches=shown(DATA.subset([1, 0, *range(2, N)]))), 'fewer': key(batches=shown(DATA.subset(range(N-1)))),
            'size': key(batches=shown(form=FORM._replace(size=9))), 'mean': key(batches=shown(form=FORM._replace(mean=(.5, .4, .30001)))), 'std': key(batches=shown(form=FORM._replace(std=(.25, .3, .21)))),
            'swapped': key(batches=shown(form=FORM._replace(mean=FORM.std, std=FORM.mean))), 'batch size': key(batches=shown(batch_size=BS+1)),
            'flip': key(batches=shown(how=Augment(flip=True))), 'views': key(batches=shown(how=Augment(**crop))),
            'other views': key(batches=shown(how=Augment(**crop | dict(seed=2)))), 'more views': key(batches=shown(how=Augment(**crop | dict(views=4)))),
            'views by flips': key(batches=shown(how=Augment(flip=True, views=2))), 'wider': key(batches=shown(how=Augment(**crop | dict(crop=3)))),
            'pool': key(dual(pool='max')), 'plain': key(dual(plain='9')), 'plain too': key(dual(plain='5')), 'frozen': key(frozen()), 'wide': key(dual('wide')), 'frozen by name': key(dual('wide', freeze='0,1,4')),
            'channels last': key(dual('relu last')), 'other weights': key(dual(seed=1)),
            **{f'{kind} {soft}': key(dual(kind), soft=soft) for kind in ('soft', 'attention') for soft in ('float16', 'bfloat16', 'float32')},
            **{f'{option} own': key(dual('attention', **{option: 'own'})) for option in ('attention', 'norm')}}
    twice = [(a, b) for a, b in itertools.combinations(keys, 2) if keys[a] == keys[b]]
    assert not twice and all(len(k) == 32 and int(k, 16) >= 0 for k in keys.values())

@pytest.mark.parametrize('kind', ['relu', 'attention', 'frozen'])
def test_every_structural_tensor_counts_and_no_trained_one_does(kind):
    dc = EVERY[kind]()
    base, keys = key(dc), set()
    for name, t in dc.structural.state_dict().items():
        at = tuple(gen.integers(n) for n in t.shape)
        old = t[at].clone()
        t[at] = old + 1 if not t.is_floating_point() else torch.nextafter(old, old + 1)  # the last bit
        keys.add(key(dc))
        t[at] = old
    assert len(keys) == len(dc.structural.state_dict()) > 4 and base not in keys and key(dc) == base
    shared = {v.data_ptr() for v in dc.structural.state_dict().values()}
    for p in dc.quantitative.parameters():
        if p.data_ptr() not in shared: p.data.add_(1)
    assert key(dc) == base == key(copy.deepcopy(dc)) == key(pickle.loads(pickle.dumps(dc)))
    days(dc, None)
    assert key(dc.eval()) == base == key(dc.train())

class Offset(nn.Module):
    "Adds what is no part of the state."
    def __init__(self, by):
        super().__init__()
        self.register_buffer('by', torch.tensor(by), persistent=False)
    def forward(self, x): return x + self.by

SETTINGS = {  # networks with the same weights and other gates
    'slope': (lambda: nn.LeakyReLU(.1), lambda: nn.LeakyReLU(.9)), 'bound': (lambda: nn.Hardtanh(0, .5), lambda: nn.Hardtanh(0, .1)),
    'eps': (lambda: nn.BatchNorm2d(8, affine=False), lambda: nn.BatchNorm2d(8, .5, affine=False)), 'border': (lambda: conv(8, 8, bias=False), lambda: conv(8, 8, bias=False, padding_mode='reflect')),
    'spacing': (lambda: conv(8, 8, bias=False), lambda: conv(8, 8, bias=False, dilation=2, padding=2)), 'pooling': (lambda: nn.AvgPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    'a buffer outside the state': (lambda: Offset(.1), lambda: Offset(.5)), 'activation': (lambda: nn.ELU(.1), lambda: nn.ELU(1.))}

@pytest.mark.parametrize('pair', SETTINGS.values(), ids=SETTINGS)
def test_equal_weights_in_another_network_have_another_key(pair):
    a, b = (net(conv(8, 8), make(), conv(8, 8), nn.ReLU(), nn.MaxPool2d(4)) for make in pair)
    b.load_state_dict(a.state_dict())
    a, b = DualCopy(a).eval(), DualCopy(b).eval()
    x = shown().show(torch.arange(N))
    one, two = a.gates(x), b.gates(x)
    assert any(not torch.equal(one[s], two[s]) for s in one.keys() & two.keys())
    assert key(a) != key(b)

def test_images_of_any_memory_order_have_a_key():
    strided = ImageSet(DATA.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), DATA.labels, DATA.classes)
    assert not strided.images.is_contiguous() and torch.equal(strided.images, DATA.images)
    assert key(batches=shown(strided)) == key()

# ---- files

@functools.cache
def base(): return dual()
def of(dc=None, folder=None, **kw): return told(dc or base(), shown(), folder=folder, **kw)
@pytest.fixture(scope='module')
def rows(): return gate_cache(dual(), shown()).rows

def test_a_file_is_built_once_and_read_ever_after(rows, tmp_path):
    dc, seen = dual(), []
    dc.structural.get_submodule('0').register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    for built in (True, False, False):
        seen.clear()
        cache, said = of(dc, tmp_path/'deeper'/'still')
        assert torch.equal(cache.rows, rows) and sum(seen) == 1 + N*built and said == [f'gate cache: {plan(dc, shown())}']
    assert [p.name for p in cache.path.parent.iterdir()] == [f'{key()}.gates']

def mended(path, damaged, rows, *words):
    "`damaged` is noticed, said, and built again."
    path.write_bytes(damaged)
    cache, said = of(folder=path.parent)
    assert torch.equal(cache.rows, rows) and len(said) == 2 and 'is built again: ' in said[1] and path.name in said[1] and any(w in said[1] for w in words), said
    assert of(folder=path.parent)[1] == said[:1] and [p.name for p in path.parent.iterdir()] == [path.name]

def test_cut_at_any_byte(rows, tmp_path):
    path = of(folder=tmp_path)[0].path
    whole = path.read_bytes()
    for n in {0, 1, 13, 21, 22, 23, rows.numel() - 1, rows.numel(), rows.numel() + 1, len(whole) - 1, len(whole) - 14, len(whole) - 22, *gen.integers(len(whole), size=12).tolist()}:
        path.unlink()
        mended(path, whole[:n], rows, 'cut short')
    for more in (b'\0', whole[-22:], whole): mended(path, whole + more, rows, 'cut short', 'its size')
    mended(path, whole[-22:], rows, 'its size')
    mended(path, whole[7:], rows, 'its size')

def test_one_bit_anywhere(rows, tmp_path):
    path = of(folder=tmp_path)[0].path
    whole, n = path.read_bytes(), rows.numel()
    for i in (*gen.integers(n, size=15).tolist(), 0, n - 1, *gen.choice(np.arange(n, len(whole)), 25, replace=False).tolist()):
        bad = bytearray(whole)
        bad[i] ^= 1 << int(gen.integers(8))
        path.unlink()
        mended(path, bytes(bad), rows, *(['its checksum'] if i < n else ['its checksum', 'note', 'belongs', 'cut short', 'its size']))

@pytest.mark.parametrize('note', [b'[1]', b'"text"', b'null', b'7', b'{}', b'\xff\xfe', b''])
def test_a_closing_note_of_another_kind(note, rows, tmp_path):
    path = of(folder=tmp_path)[0].path
    whole = path.read_bytes()
    mended(path, whole[:rows.numel()] + note + struct.pack('<Q', len(note)) + whole[-14:], rows, 'note', 'belongs')

def test_a_stale_file_is_never_used_under_any_name(tmp_path):
    for other, size in ((dual(seed=1), True), (dual(pool='max'), False)):
        stale, path = of(other, tmp_path)[0], tmp_path/f'{key()}.gates'
        want = computed(dual())
        os.replace(stale.path, path)
        cache, said = of(folder=tmp_path)
        same(cache.fetch(torch.arange(N)), want)
        assert len(said) == 2 and ('belongs to other gates' if size else 'its size') in said[1] and not torch.equal(stale.rows[:, :64], cache.rows[:, :64]) == size
        path.unlink()

def test_the_mapping_cannot_change_the_file(rows, tmp_path):
    cache = of(folder=tmp_path)[0]
    before = cache.path.read_bytes()
    cache.rows[:] = 255
    cache.fetch(torch.arange(N))['2'].zero_()
    del cache
    again, said = of(folder=tmp_path)
    assert again.path.read_bytes() == before and torch.equal(again.rows, rows) and len(said) == 1

def refused(folder, *words):
    with pytest.raises(InputError) as e: of(folder=folder)
    assert '\n' not in str(e.value)
    for word in (f'gate cache folder {str(folder)!r}', 'cache=memory', 'choose another', *words): assert word in str(e.value), e.value

def test_a_folder_in_place_of_the_file_and_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path/f'{key()}.gates').mkdir()
    refused(tmp_path, 'irectory')
    (tmp_path/'file').write_text('mine')
    refused(tmp_path/'file')
    refused(tmp_path/'file'/'under')
    assert (tmp_path/'file').read_text() == 'mine' and len(list(tmp_path.iterdir())) == 2

@pytest.fixture
def not_root(tmp_path):
    "Forget root's rights, which no mode of a folder binds; gives what locks a folder."
    uid = os.geteuid()
    def lock(folder, mode):
        for p in (tmp_path, *list(tmp_path.parents)[:2]): os.chmod(p, p.stat().st_mode | 0o055)
        os.chmod(folder, mode)
        if uid == 0: os.seteuid(65534)
    yield lock
    os.seteuid(uid)

def test_a_folder_that_may_only_be_read(not_root, rows, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'full').mkdir()
    path = of(folder=tmp_path/'full')[0].path
    os.chmod(path, 0o644)
    os.chmod(tmp_path/'full', 0o555)
    not_root(tmp_path/'empty', 0o555)
    refused(tmp_path/'empty', 'Permission denied')
    refused(tmp_path/'empty'/'under', 'Permission denied')
    cache, said = of(folder=tmp_path/'full')
    assert torch.equal(cache.rows, rows) and len(said) == 1 and list((tmp_path/'empty').iterdir()) == []

def test_a_file_that_was_built_by_another_user(not_root, rows, tmp_path):
    "A file is readable by all, as every result is: processes share it."
    old = os.umask(0o022)
    try: path = of(folder=tmp_path)[0].path
    finally: os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    not_root(tmp_path, 0o755)
    if os.getuid() == 0: assert torch.equal(of(folder=tmp_path)[0].rows, rows)

def test_a_folder_that_may_not_be_looked_into(not_root, tmp_path):
    (tmp_path/'locked').mkdir()
    not_root(tmp_path/'locked', 0o700 if os.geteuid() == 0 else 0)
    refused(tmp_path/'locked', 'Permission denied')

@contextlib.contextmanager
def short_of(what, rows, monkeypatch):
    "A disk that is full when half of the rows are written, or at the end."
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def fail(*args, **kw): raise full
    with monkeypatch.context() as m:
        if what == 'limit':  # the kernel's own
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (rows.numel()//2, old[1]))
            try: yield 'too large'
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
        elif what == 'write':
            class Full:
                def __init__(self, f): self.f, self.n = f, 0
                def __enter__(self): return self
                def __exit__(self, *e): self.f.close()
                def __getattr__(self, name): return getattr(self.f, name)
                def write(self, data):
                    self.n += 1
                    return fail() if self.n > 2 else self.f.write(data)
            m.setattr(core, 'open', lambda p, mode: Full(open(p, mode)) if mode in ('wb', 'xb') else open(p, mode), raising=False)
            yield 'No space left'
        else:
            m.setattr(C.os, what, fail)
            yield 'No space left'

@pytest.mark.parametrize('what', ['limit', 'write', 'fsync', 'replace'])
def test_a_full_disk_leaves_no_part_of_a_file(what, rows, tmp_path, monkeypatch):
    with short_of(what, rows, monkeypatch) as why: refused(tmp_path, why)
    assert list(tmp_path.iterdir()) == []
    path = of(folder=tmp_path)[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with short_of(what, rows, monkeypatch) as why: refused(tmp_path, why)
    assert list(tmp_path.iterdir()) == [path] and torch.equal(of(folder=tmp_path)[0].rows, rows)

def test_a_failure_while_computing_leaves_nothing_either(tmp_path):
    for error in (RuntimeError('out of memory'), KeyboardInterrupt()):
        dc, seen = dual(), []
        def stop(m, i, o):
            seen.append(len(i[0]))
            if len(seen) == 3: raise error
        dc.structural.get_submodule('0').register_forward_hook(stop)
        with pytest.raises(type(error)): of(dc, tmp_path)
        assert list(tmp_path.iterdir()) == [] and seen == [1, BS, BS]

# ---- several processes

CHILD = textwrap.dedent('''
    import hashlib, pickle, sys
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    from fedsq_nb.gating.cache import gate_cache
    from fedsq_nb.gating.dualcopy import DualCopy
    DualCopy.certify_once = lambda self, x: None  # as in this process, see conftest.py: the calls that are counted below are the cache's
    def sha(data): return hashlib.sha256(data).hexdigest()
    dc, batches, folder = pickle.load(open(sys.argv[2], 'rb'))
    seen = []
    def wait(m, i, o):
        seen.append(len(i[0]))
        if len(seen) == 4: print('half', flush=True), sys.stdin.readline()
    dc.structural.get_submodule('0').register_forward_hook(wait)
    print(sha(gate_cache(dc, batches, folder=folder).rows.numpy().tobytes()), flush=True)
    for name in sys.argv[3:]:
        cache, at = pickle.load(open(name, 'rb'))
        gates = sha(b''.join(g.contiguous().numpy().tobytes() for g in cache.fetch(*at).values()))
        print(cache.path is not None and str(cache.path) in open('/proc/self/maps').read(), gates, flush=True)
''')

def sha(data): return hashlib.sha256(data).hexdigest()

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Three processes build the same file at the same time, this one among them; one is killed in the middle. The other goes on to read two caches that it is sent."
    with seeded(0): dc = DualCopy(net(nn.MaxPool2d(2), conv(8, 256), nn.ReLU(), nn.MaxPool2d(2), head=256*4)).eval()  # chunks larger than any buffer
    top, batches, how, at = tmp_path_factory.mktemp('work'), shown(), WAYS['views'], (torch.tensor([3, 3, 49, 0]), torch.tensor([0, 2, 1, 1]))
    folder, want = top/'gates', gate_cache(dc, batches).rows.numpy().tobytes()
    held, filed = gate_cache(dual(), shown(how=how)), gate_cache(dual(), shown(how=how), folder=top/'other')
    for name, what in (('job', (dc, batches, folder)), ('held', (held, at)), ('filed', (filed, at))): (top/name).write_bytes(pickle.dumps(what))
    argv = [sys.executable, '-c', CHILD, str(Path(__file__).parent.parent), *(str(top/name) for name in ('job', 'held', 'filed'))]
    procs = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    facts, calls = {}, []
    def half(m, i, o):
        calls.append(len(i[0]))
        if len(calls) != 4: return
        facts['parts'] = [(p.suffix, p.stat().st_size) for p in folder.iterdir()]
        procs[0].kill()
        facts['killed'] = procs[0].wait(20), sorted(p.name for p in folder.iterdir())
        print(file=procs[1].stdin, flush=True)
        facts['child'] = procs[1].communicate(timeout=30)[0].splitlines(), procs[1].returncode
        facts['between'] = {p.name: p.read_bytes() for p in folder.glob('*.gates')}
    try:
        facts['half'] = [p.stdout.readline() for p in procs]
        handle = dc.structural.get_submodule('0').register_forward_hook(half)
        facts['own'] = told(dc, batches, folder=folder)
        handle.remove()
    finally:
        for p in procs:
            p.kill()
            p.wait()
            p.stdin.close(), p.stdout.close()
    return dict(facts, dc=dc, batches=batches, folder=folder, want=want, held=held, filed=filed, at=at)

def test_two_processes_may_build_the_same_file_at_once(work):
    assert work['half'] == ['half\n']*2 and len(work['parts']) == 3 and all(len(work['want'])//4 < n < len(work['want']) for _, n in work['parts'])  # all at work
    (first, *_), status = work['child']
    assert status == 0 and first == sha(work['want'])
    (name, whole), = work['between'].items()
    assert name == f'{key(work["dc"], work["batches"])}.gates' and whole.startswith(work['want'])
    cache, said = work['own']
    assert cache.rows.numpy().tobytes() == work['want'] and cache.path.read_bytes() == whole and len(said) == 1

def test_a_process_killed_in_the_middle_leaves_nothing_that_is_taken_for_a_cache(work):
    status, names = work['killed']
    assert status == -signal.SIGKILL and len(names) == 3 and not any(n.endswith('.gates') for n in names)
    path, left = work['own'][0].path, [p for p in work['folder'].iterdir() if p.suffix != '.gates']
    assert len(left) == 1 and left[0].stat().st_size > len(work['want'])//4
    for _ in range(2):
        cache, said = told(work['dc'], work['batches'], folder=work['folder'])
        assert len(said) == 1 and cache.rows.numpy().tobytes() == work['want'] and cache.path == path
        path.unlink()  # and now with what is left of the dead alone

def test_another_process_maps_the_file_that_it_is_told_of(work):
    held, filed, at = work['held'], work['filed'], work['at']
    want = sha(b''.join(g.contiguous().numpy().tobytes() for g in held.fetch(*at).values()))
    assert work['child'][0][1:] == [f'False {want}', f'True {want}']
    sizes = [len(pickle.dumps(c)) for c in (held, filed)]
    assert sizes[1] < 2000 < held.nbytes < sizes[0]
    for c in (held, filed):
        twin = pickle.loads(pickle.dumps(c))
        assert torch.equal(twin.rows, held.rows) and (twin.slots, twin.views, twin.path) == (c.slots, c.views, c.path) and twin.rows.data_ptr() != c.rows.data_ptr()
        same(twin.fetch(*at), held.fetch(*at))
        same(copy.deepcopy(c).fetch(*at), held.fetch(*at))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', ['memory', 'file'])
def test_on_a_gpu(kind, tmp_path):
    dc, batches = dual().cuda(), Batches(DATA.to('cuda'), **SHOW, device='cuda')
    cache, at = gate_cache(dc, batches, folder=tmp_path if kind == 'file' else None), torch.arange(BS, device='cuda')
    same(cache.fetch(at), dc.gates(batches.show(at)))


@pytest.mark.parametrize('soft', ['float32', 'float16'])
def test_windows_that_are_folded_into_the_batch_are_stored_with_their_image(soft):
    "A Swin transformer treats windows as a batch: an image has several rows in the gates of its attention."
    import torchvision
    from fedsq_nb.gating.cache import pack, slots_of, unpack
    with seeded(0, 'swin'): net, x = torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [3, 3], num_classes=4).eval(), torch.randn(3, 3, 16, 16)
    dc = DualCopy(net).eval()
    slots = slots_of(dc.gates(x[:1]), dc.symbols, soft, images=1)
    assert any(slot.rows > 1 for slot in slots)
    back = unpack(torch.from_numpy(pack(dc.gates(x), slots)), slots)
    alone = [unpack(torch.from_numpy(pack(dc.gates(x[i:i+1]), slots)), slots) for i in range(3)]
    for site, gate in dc.gates(x).items():
        assert back[site].shape == gate.shape
        torch.testing.assert_close(back[site], gate, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(torch.cat([one[site] for one in alone]), gate, rtol=1e-2, atol=1e-2)


def test_a_sequence_first_network_cannot_store_and_says_so():
    from fedsq_nb.gating.cache import check_rows
    class First(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.b(torch.relu(self.a(x.flatten(2).permute(2, 0, 1)))).mean(0)
    net, x = First(), torch.randn(1, 4, 2, 3)
    dc = DualCopy(net).eval()
    with pytest.raises(InputError, match='cache=off'): check_rows(dc, dc.gates(x), x)
