"The command line: every kind of bad input in one line, runs on real files, and a run that is interrupted."
import dataclasses, json, os, re, signal, subprocess, sys, time, tomllib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image

from fedsq_nb import __version__
from fedsq_nb.data.example import ResCNN
from fedsq_nb.cli import main
from fedsq_nb.study.settings import SETTINGS, value_text
from fedsq_nb.study.config import Config, read_toml
from fedsq_nb.study.folder import read_lines

gen = np.random.default_rng(0)
x, y = gen.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8), np.arange(60) % 3
QUICK = '--weights random --seeds 1 --rounds 1 --lr 0.02 --methods fedavg --clients 2 --alpha 5 --min-size 2 --max-train 40 --test-fraction 0.1'.split()
SMALL = ['--backbone', 'rescnn', '--size', '12']

def npz(path, **arrays):
    np.savez(path, **arrays)
    return path

def pictures(top, n=10, classes='abc'):
    for k, name in enumerate(classes):
        (top/name).mkdir(parents=True)
        for i in range(n): Image.fromarray(gen.integers(60*k, 60*k + 130, (14, 11, 3), dtype=np.uint8)).save(top/name/f'{i}.png')
    return top

def rows_of(folder): return read_lines(folder/'rounds.jsonl')
def timeless(folder): return [{k: v for k, v in r.items() if not k.endswith('seconds')} for r in rows_of(folder)]
def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.fixture
def fedsq(capsys):
    "Run the command in this process; returns exit status, standard output and standard error."
    def run(*argv):
        capsys.readouterr()
        status = main([str(a) for a in argv])
        return status, *capsys.readouterr()
    return run

@pytest.fixture
def refused(fedsq, tmp_path):
    "The command is refused in one line that holds each of `words`, and --out is as it was."
    def check(argv, *words, out=tmp_path/'out', ignore='$^'):
        before = tree(tmp_path)
        status, printed, err = fedsq('compare', *QUICK, *SMALL, '--out', out, *argv)
        lines = [line for line in err.splitlines() if not re.match(ignore, line)]
        assert status == 2 and printed == '', err
        assert len(lines) == 1 and lines[0].startswith('fedsq: '), err
        for word in words: assert str(word) in lines[0], err
        assert tree(tmp_path) == before and (tmp_path/'out').exists() == any(k.split('/')[0] == 'out' for k in before)
    return check

# ---- bad input: data

class Trap:
    "Leaves a file behind when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def damaged(p):
    pictures(p)
    (p/'b'/'3.png').write_bytes((p/'b'/'3.png').read_bytes()[:60])
    return p

DATA = {
    'no such path': (lambda p: p, 'digits', 'no such path'),
    'almost a name': (lambda p: 'fashon_mnist', "'fashon_mnist'", "'fashion_mnist'"),
    'one class': (lambda p: pictures(p, classes='a'), 'one class only (a)', 'at least two'),
    'no classes': (lambda p: p.mkdir() or p, 'no class folders', 'one folder per class'),
    'unreadable image': (damaged, 'b/3.png', '--skip-bad'),
    'other arrays': (lambda p: npz(p, a=x, b=y), 'x_train and y_train', 'found: a, b'),
    'no labels': (lambda p: npz(p, x=x), 'found: x'),
    'lengths': (lambda p: npz(p, x=x, y=y[:-1]), '60 images but 59 labels'),
    'negative label': (lambda p: npz(p, x=x, y=np.where(np.arange(60) == 7, -1, y)), 'label -1 at position 7'),
    'label above the classes': (lambda p: npz(p, x=x, y=y, classes=np.array(['a', 'b'])), 'label 2 at position 2', '2 classes'),
    'label with a gap': (lambda p: npz(p, x=x, y=np.where(y == 2, 3, y)), "class '2'", 'without gaps'),
    'label far away': (lambda p: npz(p, x=x, y=np.where(y == 2, 10**12, y)), 'label 1000000000000', 'without gaps'),
    'float images': (lambda p: npz(p, x=x/255., y=y), 'uint8', 'float64'),
    'channels first': (lambda p: npz(p, x=x.transpose(0, 3, 1, 2), y=y), '(60, 3, 12, 12)', 'channels last'),
    'no arrays at all': (lambda p: p.write_bytes(b'not a zip') and p, 'not an .npz'),
    'cut short': (lambda p: p.write_bytes(npz(p, x=x, y=y).read_bytes()[:3000]) and p, 'not an .npz', 'cut short')}

@pytest.mark.parametrize('case', DATA)
def test_bad_data(case, refused, tmp_path):
    make, *words = DATA[case]
    data = make(tmp_path/'bad.npz')
    refused(['--data', data], data, *words)

def test_pickled_objects_are_never_unpickled(refused, tmp_path):
    trap = tmp_path/'sprung'
    data = npz(tmp_path/'p.npz', x=x, y=np.array([Trap(trap)] * 60, dtype=object))
    refused(['--data', data], data, "'y'", 'pickled')
    assert not trap.exists()
    np.load(data, allow_pickle=True)['y']
    assert trap.exists()  # the trap works

def test_skip_bad_goes_on_and_counts(fedsq, tmp_path):
    status, _, err = fedsq('compare', *QUICK, *SMALL, '--data', damaged(tmp_path/'d'), '--skip-bad', '--out', tmp_path/'out')
    assert status == 0 and '1 unreadable image' in err

def no_network(monkeypatch, home):
    for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'): monkeypatch.setenv(k, 'http://127.0.0.1:9')
    for k in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(k, raising=False)
    for k in ('HOME', 'TORCH_HOME', 'XDG_CACHE_HOME'): monkeypatch.setenv(k, str(home))

@pytest.mark.parametrize('argv, words', [
    (['--data', 'cifar10'], ("'cifar10'", 'could not be downloaded', 'folder of pictures')),
    (['--data', 'fashion_mnist'], ("'fashion_mnist'", 'could not be downloaded', 'folder of pictures')),
    (['--backbone', 'squeezenet1_1', '--weights', 'imagenet', '--size', '64'], ('squeezenet1_1', 'could not be downloaded', 'random'))])
def test_no_network(argv, words, refused, monkeypatch, tmp_path_factory):
    no_network(monkeypatch, tmp_path_factory.mktemp('home'))
    began = time.perf_counter()
    refused(argv, *words, ignore='Downloading')
    assert time.perf_counter() - began < 5

# ---- bad input: options

@pytest.mark.parametrize('argv, words', [
    (['--clients', '5000'], ('5000', 'samples', 'use at most')),
    (['--alpha', '0'], ('alpha 0', 'above 0')),
    (['--alpha', '-1'], ('alpha -1', 'above 0')),
    (['--alpha', 'nan'], ('alpha nan', 'above 0')),
    (['--alpha', 'inf'], ('alpha inf', 'above 0')),
    (['--alpha', 'abc'], ("alpha 'abc'", 'number')),
    (['--min-size', '21'], ('min_size 21 is impossible', '42 samples', 'min_size 20 or less', 'fewer clients')),
    (['--alpha', '0.001', '--clients', '8', '--min-size', '5'], ('could not be filled', 'min_size is 5', 'raise alpha', 'fewer clients')),
    (['--backbone', 'resnet81'], ("backbone 'resnet81'", "'resnet18'")),
    (['--methods', 'fedavg,fedqs'], ("method 'fedqs'", "'fedsq'")),
    (['--methods', 'fedavg,fedavg'], ('fedavg', 'once')),
    (['--lr', 'fedavg=0.1,fedqs=1'], ("'fedqs'", "'fedsq'")),
    (['--lr', '0'], ('lr 0', 'above 0')),
    (['--lr', 'quick'], ("lr 'quick'", 'number')),
    (['--aplha', '1'], ("'--aplha'", "'--alpha'")),
    (['--local_epochs', '1'], ("'--local_epochs'", "'--local-epochs'")),
    (['--rounds', '0'], ('rounds 0', '1 or more')),
    (['--rounds', '2.5'], ("rounds '2.5'", 'whole number')),
    (['--rounds'], ('--rounds', 'expected one argument')),
    (['--seeds', '-1'], ('seeds -1', '1 or more')),
    (['--per-round', '3'], ('per_round 3', '2 clients')),
    (['--bn', 'forzen'], ("bn 'forzen'", "'frozen'")),
    (['--head', 'lihgt'], ("head 'lihgt'", "'light'")),
    (['--pool', 'maks'], ("pool 'maks'", "'max'")),
    (['--partition', 'irichlet'], ("partition 'irichlet'", "'dirichlet'")),
    (['--valid-fraction', '1'], ('valid_fraction 1', 'between 0 and 1')),
    (['--max-train', '3'], ('max_train 3', '10')),
    (['--device', 'gpu'], ("device 'gpu'", "'cuda'")),
    (['--device', 'cuda:99'], ("device 'cuda:99'", "'cpu'")),
    (['--device', 'mps'], ("device 'mps'", "'cpu'")),
    (['--device', 'meta'], ("device 'meta'", "'cpu'")),
    (['--backbone', 'alexnet', '--size', '62'], ('size 62', 'alexnet', '63')),
    (['--backbone', 'vgg11', '--size', '31'], ('size 31', 'vgg11', '32')),
    (['--backbone', 'vit_b_16', '--size', '64'], ('size 64', 'vit_b_16', '224')),
    (['--freeze', 'stam'], ("'stam'", "'stem'")),
    (['--freeze', '9'], ('freeze 9', 'blocks')),
    (['--excite', 'mine'], ("'mine'", 'excite')),
    (['--cache-type', 'float8'], ("'float8'", 'float32')),
    (['--cache-bytes', '-1'], ('cache_bytes -1', '0 or more')),
    (['--weights', 'imagenet'], ("'imagenet'", "'printed'")),
    (['--backbone', 'alexnet', '--weights', 'printed'], ("'printed'", "'alexnet'", "'random'"))])
def test_bad_option(argv, words, refused): refused(argv, *words)

@pytest.mark.parametrize('argv, words', [
    (['--workers', '99999999999'], ('workers 99999999999', '256 or less')),
    (['--threads', '99999999'], ('threads 99999999', '256 or less')),
    (['--workers', '2', '--threads', '2'], ('workers 2', 'leave threads at 1')),
    (['--clients', '4', '--min-clients', '99'], ('min_clients 99', '4 or less', 'void')),
    (['--clients', '4', '--min-clients', '3', '--per-round', '2'], ('min_clients 3', '2 or less', 'take part in a round')),
    (['--clients', '8', '--min-clients', '5', '--fraction', '0.5'], ('min_clients 5', '4 or less')),
    (['--methods', 'fedavg,fedsq', '--plain-sites', 'nosuch*'], ("plain_sites 'nosuch*'", 'no site', 'blocks_0_relu')),
    (['--methods', 'fedsq', '--plain-sites', 'stem_2, nosuch'], ("plain_sites 'nosuch'", 'no site')),
    (['--methods', 'topk', '--compress', 'int8'], ("compress 'int8'", "'topk:0.05'", 'compressed once')),
    (['--methods', 'fedavg,fedprox+fp16', '--compress', 'topk:0.1'], ("compress 'topk:0.1'", 'fedprox+fp16')),
    (['--dp-delta', '2'], ('dp_delta 2.0', 'between 0 and 1')),
    (['--momentum', '1.5'], ('momentum 1.5', 'below 1')),
    (['--server-momentum', '1'], ('server_momentum 1.0', 'below 1')),
    (['--trim', '0.5'], ('trim 0.5', 'below 0.5')),
    (['--scaffold-option', '3'], ('scaffold_option 3', '2 or less')),
    (['--client-dropout', '1'], ('client_dropout 1.0', 'below 1')),
    (['--lr', '1e300'], ('lr 1e+300 of fedavg', '1e+30 or less')),
    (['--lr', 'auto', '--rates', '1e300'], ('rates (1e+300,)', '1e+30 or less')),
    (['--crop', '999999999'], ('crop 999999999', '4,096 or less')),
    (['--crop', '12'], ('crop 12', 'below the size of the images, which is 12')),
    (['--freeze', 'stem,blocks,fc'], ("freeze 'stem,blocks,fc'", 'nothing to train', 'leave at least one layer free')),
    (['--views', '99999999', '--flip'], ('views 99999999', '1,000 or less')),
    (['--seeds', '99999999'], ('seeds 99999999', '1,000 or less')),
    (['--seed', '9'*30], ('seed 999', '9,007,199,254,740,992 or less')),
    (['--local-epochs', '9'*12], ('local_epochs 999999999999', '10,000 or less')),
    (['--rounds', '9'*12], ('rounds 999999999999', '1,000,000 or less')),
    (['--rounds', '9'*5000], ("rounds '999", '5002 characters', 'whole number')),
    (['--rounds', '-' + '9'*5000], ("rounds '-999", '5003 characters', 'whole number')),
    (['--data', '~nobody-of-that-name/x'], ("data '~nobody-of-that-name/x'", 'whole path')),
    (['--weights', '~nobody-of-that-name/x'], ("weights '~nobody-of-that-name/x'", 'whole path')),
    (['--cache', '~nobody-of-that-name/x', '--methods', 'fedsq'], ("cache '~nobody-of-that-name/x'", 'whole path')),
    (['--config', '~nobody-of-that-name/x'], ("config '~nobody-of-that-name/x'", 'whole path')),
    (['--data', '/dev/zero'], ('/dev/zero', 'device', 'give a file or a folder')),
    (['--weights', '/dev/zero'], ('/dev/zero',)),
    (['--config', '/dev/zero'], ('/dev/zero', 'device', 'give a file')),
    (['--path-column', 'picture'], ("path_column 'picture'", '.csv'))])
def test_every_bound_is_said_before_anything_is_written(argv, words, refused): refused(argv, *words)

@pytest.mark.parametrize('name, why', [('a\0b', 'NUL'), ('a\udcffb', 'UTF-8'), ('a'*256, 'too long'), ('a/'*3000, 'too long'), ('~nobody-of-that-name/x', 'whole path')])
@pytest.mark.parametrize('option', ['out', 'cache', 'data', 'weights', 'config'])
def test_names_that_no_file_can_have(option, name, why, refused): refused([f'--{option}={name}'], option, why, value_text(name))

def test_a_cache_folder_is_looked_at_before_anything_is_written(refused, tmp_path):
    (tmp_path/'file').write_text('')
    refused(['--methods', 'fedsq', '--cache', tmp_path/'file'], tmp_path/'file', 'cannot be used', 'memory')
    refused(['--methods', 'fedsq', '--cache', tmp_path/'file'/'deeper'], tmp_path/'file', 'cannot be used', 'memory')

@pytest.mark.parametrize('text, words', [
    ('rounds = ' + '9'*5000, ('c.toml', 'not TOML', 'too many digits')),
    ('x = ' + '['*100_000, ('c.toml', 'nested too deeply')),
    ('x = 1 # ' + ' '*2**20, ('c.toml', 'too long', '1,048,576 bytes')),
    ('out = "a\\u0000b"', ('out', 'NUL')), ('running = 3', ("'running'", 'c.toml'))], ids=['digits', 'deep', 'long', 'nul', 'group'])
def test_toml_that_is_a_trap(text, words, fedsq, tmp_path):
    (tmp_path/'c.toml').write_text(text)
    status, printed, err = fedsq('compare', '--config', tmp_path/'c.toml')
    assert status == 2 and printed == '' and err.count('\n') == 1, err
    assert all(word in err for word in words) and [p.name for p in tmp_path.iterdir()] == ['c.toml']

def test_a_decompression_bomb_is_not_decoded(refused, fedsq, tmp_path):
    "20 kB that are 507 MB once they are unpacked: refused by its header, whatever Pillow's own limit is, and counted with --skip-bad."
    data = pictures(tmp_path/'d')
    Image.new('L', (13_000, 13_000)).save(data/'a'/'0.png')
    assert (data/'a'/'0.png').stat().st_size < 300_000
    refused(['--data', data], data/'a'/'0.png', '13000 x 13000', '100,000,000 pixels', '--max-pixels', '--skip-bad')
    refused(['--data', pictures(tmp_path/'small'), '--max-pixels', '100'], '11 x 14', 'more than 100 pixels')
    status, _, err = fedsq('compare', *QUICK, *SMALL, '--data', data, '--skip-bad', '--out', tmp_path/'out')
    assert status == 0 and '1 unreadable image' in err

def test_a_zip_with_something_before_it(refused, tmp_path):
    good = npz(tmp_path/'good.npz', x=x, y=y)
    bad = tmp_path/'bad.npz'
    bad.write_bytes(b'#!/bin/sh\n' + good.read_bytes())
    refused(['--data', bad], bad, 'something before it', 'np.savez')

@pytest.mark.parametrize('text, words', [
    ('aplha = 1', ("'aplha'", "'alpha'", 'c.toml')),
    ('[training]\nalpha = 1', ("'training'", 'c.toml')),
    ('alpha = "much"', ("alpha 'much'", 'number')),
    ('alpha = true', ('alpha True', 'number')),
    ('clients = 2.5', ('clients 2.5', 'whole number')),
    ('clients = [1]', ('clients [1]', 'whole number')),
    ('flip = "perhaps"', ("flip 'perhaps'", 'true or false')),
    ('methods = 3', ('methods 3', 'list')),
    ('methods = [3]', ("method '3'", 'fedavg')),
    ('methods = []', ('methods', 'method')),
    ('rates = ["a"]', ('rates', 'list')),
    ('data = ["digits"]', ('data', "['digits']", 'text')),
    ('out = {a = 1}', ('out', 'text')),
    ('lr = [0.1]', ('lr', '[0.1]')),
    ('alpha = ', ('c.toml', 'not TOML'))])
def test_bad_toml(text, words, refused, tmp_path):
    (tmp_path/'c.toml').write_text(text)
    strip = [name for name in re.findall(r'^\w+', text) if f'--{name}' in QUICK]
    args = [a for i, a in enumerate(QUICK) if not {a, QUICK[i - 1]} & {f'--{n}' for n in strip}]
    if text.startswith('out'):
        with pytest.MonkeyPatch.context() as m:
            m.chdir(tmp_path)
            m.setattr('fedsq_nb.study.experiment.load_task', lambda *a: pytest.fail('the wrong type was taken'))
            assert main(['compare', *args, '--config', 'c.toml']) == 2
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys.modules[__name__], 'QUICK', args)
        refused(['--config', tmp_path/'c.toml'], *words)

@pytest.mark.parametrize('name', ['none.toml', '.'])
def test_toml_that_cannot_be_read(name, refused, tmp_path): refused(['--config', tmp_path/name], tmp_path/name, 'cannot be read')

@pytest.mark.parametrize('argv, words', [
    (['comapre'], ("'comapre'", 'compare')), (['--aplha'], ("'--aplha'",)), (['report'], ('folder',)), (['report', '/nowhere'], ('/nowhere', 'folder of a run')),
    (['report', '.', '--jsno'], ("'--jsno'", "'--json'"))])
def test_bad_command(argv, words, fedsq):
    status, printed, err = fedsq(*argv)
    assert status == 2 and printed == '' and err.startswith('fedsq: ') and err.count('\n') == 1
    for word in words: assert word in err

# ---- bad input: weights

def weights(path, state): safetensors.torch.save_file(state, path)

def cut(path):
    weights(path, ResCNN(5).state_dict())
    path.write_bytes(path.read_bytes()[:-100])

WEIGHTS = {
    'missing': (lambda p: None, 'does not exist'),
    'folder': (lambda p: p.mkdir(), 'does not exist'),
    'cut short': (cut, 'not a whole safetensors file'),
    'not safetensors': (lambda p: torch.save(ResCNN(5).state_dict(), p), 'not a whole safetensors file'),
    'empty': (lambda p: p.touch(), 'not a whole safetensors file'),
    'another width': (lambda p: weights(p, ResCNN(5, width=8).state_dict()), 'does not fit ResCNN', 'has shape (8,), not (16,)', 'more'),
    'another architecture': (lambda p: weights(p, torchvision.models.squeezenet1_1().state_dict()), 'does not fit ResCNN', 'is not in the network', 'more'),
    'one tensor short': (lambda p: weights(p, {k: v for k, v in ResCNN(5).state_dict().items() if k != 'stem.0.weight'}), 'stem.0.weight is missing')}

@pytest.mark.parametrize('case', WEIGHTS)
def test_bad_weights(case, refused, tmp_path):
    make, *words = WEIGHTS[case]
    make(path := tmp_path/'w.safetensors')
    refused(['--weights', path], path, *words)

def test_weights_that_fit_are_used(fedsq, tmp_path):
    torch.manual_seed(0)
    net = ResCNN(5)
    weights(tmp_path/'w.safetensors', net.state_dict())
    assert fedsq('compare', *QUICK, *SMALL, '--weights', tmp_path/'w.safetensors', '--out', tmp_path/'a')[0] == 0
    assert fedsq('compare', *QUICK, *SMALL, '--out', tmp_path/'b')[0] == 0
    a, b = (safetensors.torch.load_file(tmp_path/r/'weights'/'fedavg-0.safetensors')['stem.0.weight'] for r in 'ab')
    assert (a - net.stem[0].weight).abs().max() < 0.1 < (b - net.stem[0].weight).abs().max()

# ---- bad input: the folder for results

def test_a_folder_with_another_run_is_kept_or_replaced_whole(fedsq, refused, tmp_path):
    out = tmp_path/'out'
    assert fedsq('compare', *QUICK, *SMALL, '--methods', 'fedavg,fedsq', '--out', out)[0] == 0
    (out/'mine.txt').write_text('not a part of the run')
    before = tree(out)
    assert {'config.toml', 'partition.json', 'rounds.jsonl', 'report.html', 'weights/fedavg-0.safetensors', 'weights/fedsq-0.safetensors'} < before.keys()
    refused([], out, 'already holds a run', '--overwrite')
    refused(['--overwrite', '--data', tmp_path/'none'], 'none')  # what cannot run replaces nothing
    assert fedsq('compare', *QUICK, *SMALL, '--seed', 1, '--overwrite', '--out', out)[0] == 0
    assert tree(out).keys() == before.keys() - {'weights/fedsq-0.safetensors', 'weights/fedavg-0.safetensors'} | {'weights/fedavg-1.safetensors'}
    assert {r['seed'] for r in rows_of(out)} == {1} and (out/'mine.txt').read_text() == before['mine.txt'].decode()

@pytest.mark.parametrize('name', ['rounds.jsonl', 'config.toml', 'calibration.jsonl', 'report.html', 'partition.json', 'weights/fedsq-3.safetensors'])
def test_one_file_of_a_run_is_enough_to_refuse(name, refused, tmp_path):
    (tmp_path/'out'/name).parent.mkdir(parents=True)
    (tmp_path/'out'/name).write_text('')
    refused([], 'already holds a run')

@pytest.mark.parametrize('under', ['', 'deeper'])
def test_out_is_a_file(under, refused, tmp_path):
    (tmp_path/'taken').write_text('mine')
    refused([], tmp_path/'taken', 'directory', 'another folder', out=tmp_path/'taken'/under)

@pytest.fixture(scope='module')
def all_imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('warm')
    assert main(['compare', *QUICK, *SMALL, '--data', str(npz(folder/'d.npz', x=x, y=y)), '--out', str(folder/'out')]) == 0

@pytest.fixture
def not_root(all_imported, tmp_path):
    "Forget root's rights, which no mode of a folder binds; gives a folder that cannot be written to and, with 0o700, not be looked into."
    def lock(mode):
        npz(tmp_path/'d.npz', x=x, y=y)
        locked = tmp_path/'locked'
        locked.mkdir(mode=mode)
        for p in (tmp_path, *list(tmp_path.parents)[:2]): os.chmod(p, p.stat().st_mode | 0o055)
        if os.geteuid() == 0: os.seteuid(65534)
        else: os.chmod(locked, mode & 0o555 if mode == 0o755 else 0)
        return locked
    uid = os.geteuid()
    yield lock
    os.seteuid(uid)
    os.chmod(tmp_path/'locked', 0o755)

@pytest.mark.parametrize('mode', [0o700, 0o755])
@pytest.mark.parametrize('under, more', [('', []), ('run', []), ('run/deeper', []), ('run', ['--overwrite'])])
def test_no_write_permission(mode, under, more, fedsq, not_root, tmp_path):
    out = not_root(mode)/under
    status, printed, err = fedsq('compare', *QUICK, *SMALL, '--data', tmp_path/'d.npz', '--out', out, *more)
    os.seteuid(os.getuid())
    assert status == 2 and printed == '' and err.count('\n') == 1 and err.startswith('fedsq: '), err
    assert str(out) in err and 'Permission denied' in err and 'another folder' in err
    assert list((tmp_path/'locked').iterdir()) == []

def test_data_without_permission_to_read(fedsq, not_root, tmp_path):
    locked = not_root(0o700)
    os.seteuid(os.getuid())
    os.chmod(tmp_path, 0o777)
    if os.geteuid() == 0: os.seteuid(65534)
    status, printed, err = fedsq('compare', *QUICK, *SMALL, '--data', locked/'pictures', '--out', tmp_path/'out')
    os.seteuid(os.getuid())
    assert status == 2 and printed == '' and err.count('\n') == 1 and str(locked/'pictures') in err and not (tmp_path/'out').exists()

# ---- runs

def test_the_default_job_made_small(fedsq, tmp_path):
    "Printed letters, three methods, calibration, two seeds: files, table, JSON; and config.toml gives the same run again."
    argv = '--rounds 1 --seeds 2 --rates 0.02 --calibration-rounds 1 --calibration-seeds 1 --clients 2 --max-train 80 --alpha 1 --test-fraction 0.05 --valid-fraction 0.05'.split()
    status, printed, err = fedsq('compare', *argv, '--json', '--out', tmp_path/'a')
    assert status == 0
    table = json.loads(printed, parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert [line['method'] for line in table] == ['fedavg', 'fedprox', 'fedsq']
    assert 'learning rate' in err and 'report.html' in err
    rows = rows_of(tmp_path/'a')
    assert [(r['method'], r['seed'], r['round']) for r in rows] == [(m, s, t) for s in (0, 1) for m in ('fedavg', 'fedprox', 'fedsq') for t in range(2)]
    needed = 'method seed round val_accuracy val_loss test_accuracy train_loss bytes_up bytes_down seconds clients_ok clients_failed'
    assert all(set(needed.split()) <= r.keys() and r['state'] == 'ok' for r in rows)
    assert {p.name for p in (tmp_path/'a').rglob('*')} == {'SHA256SUMS', 'config.toml', 'made_from.json', 'partition.json', 'calibration.jsonl', 'rounds.jsonl', 'report.html', 'weights',
        *(f'{m}-{s}.safetensors' for m in ('fedavg', 'fedprox', 'fedsq') for s in (0, 1))}
    assert {k: v for k, v in read_toml(tmp_path/'a'/'config.toml').items() if k in ('backbone', 'weights', 'size', 'alpha')} == {
        'backbone': 'rescnn', 'weights': 'printed', 'size': 16, 'alpha': 1.0}
    status, text, _ = fedsq('compare', '--config', tmp_path/'a'/'config.toml', '--out', tmp_path/'b')
    assert status == 0 and timeless(tmp_path/'a') == timeless(tmp_path/'b')
    for f in ('partition.json', 'calibration.jsonl', *(f'weights/{p.name}' for p in (tmp_path/'a'/'weights').iterdir())):
        assert (tmp_path/'a'/f).read_bytes() == (tmp_path/'b'/f).read_bytes(), f
    status, later, err = fedsq('report', tmp_path/'a')
    assert status == 0 and 'unfinished' not in err and all(m in text for m in ('fedavg', 'fedprox', 'fedsq'))
    hashes = [re.findall(r'^Final weights: ([0-9a-f]{16})$', t, re.M) for t in (text, later)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1
    status, printed, _ = fedsq('report', tmp_path/'a', '--json', '--baseline', 'fedsq')
    assert status == 0 and len(json.loads(printed)) == 3

def test_the_command_line_wins_over_the_file(fedsq, tmp_path):
    (tmp_path/'c.toml').write_text('alpha = 7\nrounds = 3\nmethods = ["fedprox"]\nflip = true\nlr = 0.5\nsave_weights = true\n')
    assert fedsq('compare', '--config', tmp_path/'c.toml', *QUICK, *SMALL, '--no-save-weights', '--alpha', 3, '--methods', 'fedsq', '--out', tmp_path/'out')[0] == 0
    got = read_toml(tmp_path/'out'/'config.toml')
    assert {k: got[k] for k in ('alpha', 'rounds', 'methods', 'flip', 'lr', 'save_weights')} == {
        'alpha': 3.0, 'rounds': 1, 'methods': ['fedsq'], 'flip': True, 'lr': '0.02', 'save_weights': False}
    assert not (tmp_path/'out'/'weights').exists()

def test_one_seed_is_json_too(fedsq, tmp_path):
    status, printed, _ = fedsq('compare', *QUICK, *SMALL, '--json', '--out', tmp_path/'out')
    assert status == 0 and len(json.loads(printed, parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))) == 1

def test_without_out_the_run_gets_a_folder_of_its_own(fedsq, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert fedsq('compare', *QUICK, *SMALL)[0] == 0
    folder, = (tmp_path/'runs').iterdir()
    assert folder.name.startswith('digits-') and (folder/'report.html').is_file()

def test_a_method_that_diverges_says_so(fedsq, tmp_path):
    status, printed, err = fedsq('compare', *QUICK, *SMALL, '--methods', 'fedavg,fedsq', '--lr', 'fedavg=0.02,fedsq=1e12', '--rounds', 3, '--out', tmp_path/'out')
    last = rows_of(tmp_path/'out')[-1]
    assert status == 1 and 'diverged' in printed and 'lower learning rate' in err
    assert last['state'] == 'diverged' and last['val_accuracy'] is None and last['test_accuracy'] is None
    assert 'diverged' in (tmp_path/'out'/'report.html').read_text() and (tmp_path/'out'/'weights'/'fedsq-0.safetensors').is_file()

@pytest.mark.parametrize('argv', [[*SMALL, '--methods', 'fedavg,fedprox,fedsq', '--bn', 'train'], ['--backbone', 'rescnn', '--weights', 'printed'],
                                  ['--backbone', 'resnet18', '--size', '32', '--methods', 'fedavg,fedsq', '--head', 'light']])
def test_a_folder_of_pictures_with_a_test_part(argv, fedsq, tmp_path):
    pictures(tmp_path/'d'/'train', 14)
    pictures(tmp_path/'d'/'test', 4)
    status, printed, err = fedsq('compare', *QUICK, *argv, '--data', tmp_path/'d', '--out', tmp_path/'out')
    assert status == 0, err
    assert json.loads((tmp_path/'out'/'partition.json').read_text())['classes'] == ['a', 'b', 'c']
    assert all(r['state'] == 'ok' and (12*r['test_accuracy']).is_integer() for r in rows_of(tmp_path/'out'))  # of the 12 test pictures

@pytest.mark.parametrize('arrays, argv', [
    (dict(x=x, y=y), SMALL), (dict(images=x[..., 0], labels=y), SMALL), (dict(x_train=x[..., :1], y_train=y, x_test=x[:9, ..., 1:2], y_test=y[:9]), SMALL),
    (dict(x=x[..., 0], y=y), ['--backbone', 'mobilenet_v2', '--size', '32', '--methods', 'fedavg,fedsq', '--bn', 'train'])])
def test_arrays_in_colour_and_grey(arrays, argv, fedsq, tmp_path):
    status, _, err = fedsq('compare', *QUICK, *argv, '--data', npz(tmp_path/'d.npz', **arrays), '--out', tmp_path/'out')
    assert status == 0 and all(r['state'] == 'ok' and r['clients_failed'] == 0 for r in rows_of(tmp_path/'out')), err
    assert err.count('all layers start from random weights') == 1

@pytest.mark.parametrize('backbone', ['shufflenet_v2_x0_5', 'mobilenet_v3_small'])
def test_networks_beyond_relu_and_convolution(backbone, fedsq, tmp_path):
    "Channel shuffles, squeeze-and-excitation and hard swish: compared from the command line, with frozen blocks and stored gates."
    out = tmp_path/'out'
    status, _, err = fedsq('compare', *QUICK, '--backbone', backbone, '--size', '32', '--methods', 'fedavg,fedsq', '--freeze', '2', '--cache', tmp_path/'gates', '--out', out)
    assert status == 0 and all(r['state'] == 'ok' and r['clients_failed'] == 0 for r in rows_of(out)), err
    assert err.count('gate cache:') == 1 and len(list((tmp_path/'gates').glob('*.gates'))) == 3
    assert all(r['gate_disagreement'] for r in rows_of(out))

def test_a_cache_folder_that_cannot_be_used(fedsq, tmp_path):
    (tmp_path/'file').write_text('')
    status, out, err = fedsq('compare', *QUICK, '--methods', 'fedsq', '--cache', tmp_path/'file', '--out', tmp_path/'out')
    assert status == 2 and out == '' and 'gate cache folder' in err and 'memory' in err

# ---- help, and stopping

def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e: main(['compare', '--help-all'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and '--config' in text and '--json' in text
    for f in SETTINGS.values(): assert f'--{f.name.replace("_", "-")} ' in text or f'--{f.name.replace("_", "-")},' in text, f.name

def test_bare_command_and_version(fedsq, capsys):
    status, printed, err = fedsq()
    assert status == 0 and 'compare' in printed and 'report' in printed and err == ''
    with pytest.raises(SystemExit) as e: main(['--version'])
    assert e.value.code == 0 and __version__ in capsys.readouterr().out

def test_stopped_before_the_first_row(fedsq, monkeypatch, tmp_path):
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('fedsq_nb.study.experiment.try_rate', stop)
        status, printed, err = fedsq('compare', *QUICK, *SMALL, '--lr', 'auto', '--out', tmp_path/'out')
    assert status == 130 and printed == '' and err.splitlines()[-1].startswith('stopped')
    status, printed, err = fedsq('report', tmp_path/'out')
    assert status == 2 and err.count('\n') == 1 and str(tmp_path/'out') in err
    assert fedsq('compare', *QUICK, *SMALL, '--overwrite', '--out', tmp_path/'out')[0] == 0

def test_ctrl_c(fedsq, tmp_path):
    out = tmp_path/'out'
    code = 'from fedsq_nb.cli import main; import sys; sys.exit(main())'
    p = subprocess.Popen([sys.executable, '-c', code, 'compare', *QUICK, *SMALL, '--rounds', '100000', '--out', str(out)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    try:
        deadline = time.monotonic() + 120
        while not (out/'rounds.jsonl').exists() or len((out/'rounds.jsonl').read_bytes().splitlines()) < 4:
            assert time.monotonic() < deadline and p.poll() is None
            time.sleep(.05)
        p.send_signal(signal.SIGINT)
        printed, err = p.communicate(timeout=10)
    finally: p.kill()
    assert p.returncode == 130 and printed == '' and 'Traceback' not in err and str(out) in err.splitlines()[-1]
    assert len(rows_of(out)) >= 4
    status, printed, err = fedsq('report', out)
    assert status == 0 and 'fedavg' in printed and 'unfinished: fedavg, seed 0' in err and 'of 100000 rounds' in err
    assert 'not complete' in (out/'report.html').read_text()

@pytest.mark.parametrize('argv', [['--help'], ['--version'], ['compare', '--help']])
def test_help_and_version_load_nothing_heavy(argv):
    "No torch, no fastai, no pandas: that is what makes them quick."
    code = ('import sys\nfrom fedsq_nb.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n'
            'sys.exit(bool({"torch", "fastai", "pandas", "matplotlib"} & sys.modules.keys()))')
    assert subprocess.run([sys.executable, '-c', code, *argv], cwd=Path(__file__).parent.parent, capture_output=True).returncode == 0

def test_short_help_shows_common_options(capsys):
    with pytest.raises(SystemExit): main(['compare', '--help'])
    text = capsys.readouterr().out
    assert '--clients' in text and '--help-all' in text and '--moon-mu' not in text and 'Federation:' in text

def test_the_package_runs_as_a_module():
    out = subprocess.run([sys.executable, '-m', 'fedsq_nb', '--version'], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert out.returncode == 0 and __version__ in out.stdout

def test_methods_are_listed(fedsq):
    status, printed, _ = fedsq('methods')
    assert status == 0 and 'fedsq_refresh' in printed and 'McMahan 2017' in printed
    assert 'krum' in {line['method'] for line in json.loads(fedsq('methods', '--json')[1])}

def test_old_options_work_with_one_line(fedsq, tmp_path):
    status, _, err = fedsq('compare', *QUICK, *SMALL, '--gates', 'random', '--dropout', '0', '--out', tmp_path/'out')
    assert status == 0 and err.count('old names of settings') == 1 and 'gates is now gate_source, dropout is now client_dropout' in err
    assert read_toml(tmp_path/'out'/'config.toml')['gate_source'] == 'random'

def test_the_bar_moves_after_a_resume(monkeypatch):
    "It begins with what is done already, and every row moves it."
    from fedsq_nb.cli import ErrorBar, Progress
    drawn = []
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(ErrorBar, 'on_update', lambda self, value, text: drawn.append(value))
    progress = Progress(Config(rounds=3, seeds=2, methods='fedavg'))
    for seed in (0, 1):
        for t in range(4): progress.row(dict(method='fedavg', seed=seed, round=t, val_accuracy=.5, state='ok', clients_ok=2, clients_failed=0, failures=[]))
    assert progress.done == 6 and drawn == [0, 1, 2, 3, 4, 5, 6]

def test_ctrl_c_says_how_to_go_on(fedsq, monkeypatch, tmp_path):
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('fedsq_nb.study.experiment.try_rate', stop)
        err = fedsq('compare', *QUICK, *SMALL, '--lr', 'auto', '--out', tmp_path/'out')[2]
    assert f"fedsq compare --resume --out {tmp_path/'out'}" in err

def test_a_resume_with_other_images_is_refused_in_one_line(fedsq, monkeypatch, tmp_path):
    "Two things that were found from outside: a file replaced under its name, and a relative path seen from another folder."
    from fedsq_nb.study import experiment
    for name, images in (('here', x), ('there', x[::-1])):
        (tmp_path/name).mkdir()
        npz(tmp_path/name/'a.npz', x=np.ascontiguousarray(images), y=y)
    monkeypatch.chdir(tmp_path/'here')
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(experiment, 'run_all', stop)
        assert fedsq('compare', *QUICK, *SMALL, '--data', 'a.npz', '--out', tmp_path/'out')[0] == 130
    before = tree(tmp_path/'out')
    monkeypatch.chdir(tmp_path/'there')
    status, printed, err = fedsq('compare', '--resume', '--out', tmp_path/'out')
    assert status == 2 and printed == '' and err.count('\n') == 1 and 'data was' in err and 'another folder' in err
    assert tree(tmp_path/'out') == before
    monkeypatch.chdir(tmp_path/'here')
    assert fedsq('compare', '--resume', '--out', tmp_path/'out')[0] == 0

# ---- results first: a report that fails loses nothing

def complete(out): return not (out/'checkpoints').exists() and len(rows_of(out)) == 2

@pytest.fixture
def done(fedsq, tmp_path):
    "A small run that is complete, and the table it printed."
    status, printed, _ = fedsq('compare', *QUICK, *SMALL, '--no-save-weights', '--out', tmp_path/'done')
    assert status == 0
    return tmp_path/'done', printed

def test_a_page_that_cannot_be_written_costs_neither_table_nor_run(fedsq, monkeypatch, tmp_path):
    "The place of the page is taken by a folder, which is what `report.html` cannot replace."
    out = tmp_path/'out'
    from fedsq_nb.study import experiment
    compare = experiment.compare
    def and_then(*args, **kw):
        result = compare(*args, **kw)
        (out/'report.html'/'taken').mkdir(parents=True)
        return result
    with monkeypatch.context() as m:
        m.setattr(experiment, 'compare', and_then)
        status, printed, err = fedsq('compare', *QUICK, *SMALL, '--out', out)
    last = err.splitlines()[-1]
    assert status == 3 and 'Final weights: ' in printed and complete(out)
    assert last.startswith('fedsq: the page could not be made') and last.endswith(f'fedsq report {out}') and 'Traceback' not in err
    (out/'report.html'/'taken').rmdir(), (out/'report.html').rmdir()
    assert fedsq('report', out)[:2] == (0, printed) and (out/'report.html').stat().st_size > 10_000

def command(*argv, before='', **kw):
    "The command in a fresh process, after some lines of Python."
    code = f'import sys, resource\n{before}\nfrom fedsq_nb.cli import main\nsys.exit(main())'
    return subprocess.run([sys.executable, '-c', code, *map(str, argv)], cwd=Path(__file__).parent.parent, capture_output='stdout' not in kw, text=True, **kw)

def test_a_disk_that_is_full_when_the_page_is_written(done):
    "A real limit on the size of files: rows fit, and pictures do not."
    out, printed = done
    before = (out/'report.html').read_bytes()
    got = command('report', out, before='resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))')
    assert got.returncode == 3 and got.stdout.splitlines()[-2:] == printed.splitlines()[-2:]
    assert 'the page could not be made (File too large' in got.stderr and f'fedsq report {out}' in got.stderr and 'Traceback' not in got.stderr
    assert (out/'report.html').read_bytes() == before and sorted(p.name for p in out.iterdir() if p.name.startswith('.')) == []

def test_a_fault_in_drawing_is_one_line(fedsq, done, monkeypatch):
    out, printed = done
    def broken(*args, **kw): raise ValueError('no such font')
    monkeypatch.setattr('fedsq_nb.study.report.report', broken)
    status, again, err = fedsq('report', out)
    assert (status, again) == (3, printed) and err.count('\n') == 1 and 'ValueError: no such font' in err

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_table_that_cannot_be_printed_costs_no_page(done):
    out, _ = done
    (out/'report.html').unlink()
    with open('/dev/full', 'w') as full: got = command('report', out, stdout=full, stderr=subprocess.PIPE)
    assert got.returncode == 3 and (out/'report.html').exists()
    assert got.stderr.splitlines()[0].startswith('fedsq: the table could not be printed (No space left on device)') and 'Exception' not in got.stderr

def test_an_interrupted_page_leaves_the_table(fedsq, done, monkeypatch):
    out, printed = done
    def stop(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr('fedsq_nb.study.report.report', stop)
    assert fedsq('report', out)[:2] == (130, printed)

PLAIN_ASCII = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii', 'COLUMNS': '100'}

@pytest.mark.parametrize('env', [{'LC_ALL': 'C'}, PLAIN_ASCII], ids=['LC_ALL=C', 'plain ASCII'])
def test_names_of_any_kind_in_any_locale(env, tmp_path):
    "Classes with mathematics, markup, terminal codes, line breaks, and bytes that are no UTF-8; two seeds, so that intervals are cut."
    names = [b'$x^{$', b'<b>&', b'caf\xe9', b'\x1b[31m\nred', 'Übung 字'.encode()]
    for k, name in enumerate(names):
        place = os.path.join(os.fsencode(tmp_path/'d'), name)
        os.makedirs(place)
        for i in range(8): Image.fromarray(gen.integers(40*k, 40*k + 90, (12, 12, 3), dtype=np.uint8)).save(os.path.join(place, b'%d.png' % i))
    argv = [*QUICK, *SMALL, '--seeds', '2', '--methods', 'fedavg,fedsq', '--data', tmp_path/'d', '--out', tmp_path/'out']
    got = command('compare', *argv, env={'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1', **env})
    assert got.returncode == 0, got.stderr
    assert 'Final weights: ' in got.stdout and '\x1b' not in got.stdout + got.stderr
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8')
    assert page.count('<img ') == 3 and 'could not be drawn' not in page
    assert 'caf\\udce9' in page and '<b>&amp;' not in page and '&lt;b&gt;&amp;' in page and '\x1b' not in page

def test_terminal_codes_are_shown_and_not_obeyed(fedsq):
    err = fedsq('report', 'no\x1b[2Jsuch\nfolder')[2]
    assert '\x1b' not in err and err.count('\n') == 1

# ---- the time that is left

class Clock:
    now = 0.
    def __call__(self): return self.now

def test_replayed_rows_do_not_count_in_the_time_that_is_left(monkeypatch):
    from fedsq_nb.cli import ErrorBar, Progress
    drawn, clock = [], Clock()
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(ErrorBar, 'on_update', lambda self, value, text: drawn.append(text))
    progress = Progress(Config(rounds=100, seeds=1, methods='fedavg', lr='0.1'), clock)
    def row(t, seconds): progress.row(dict(method='fedavg', seed=0, round=t, val_accuracy=.5, state='ok', clients_ok=2, clients_failed=0, failures=[], seconds=seconds))
    for t in range(81): row(t, 10.)  # at once: played before the run was stopped
    assert '[80/100' in drawn[-1] and '<?' in drawn[-1]
    for t in (81, 82):
        clock.now += 11.
        row(t, 10.)
    assert '[82/100' in drawn[-1] and '<03:18' in drawn[-1]  # 18 rounds of 11 seconds

def test_the_calibration_is_part_of_the_way(monkeypatch):
    from fedsq_nb.cli import ErrorBar, Progress
    drawn, clock = [], Clock()
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(ErrorBar, 'on_update', lambda self, value, text: drawn.append(text))
    progress = Progress(Config(rounds=4, seeds=2, methods='fedavg,fedsq', rates='0.01,0.03', calibration_rounds=3, calibration_seeds=2), clock)
    assert progress.total == 2*2*3*2 + 2*2*4
    def rounds(of, n):
        for t in range(n + 1):
            clock.now += 1.
            of(dict(method='fedavg', lr=.01, seed=0, round=t, val_accuracy=.5, state='ok', clients_ok=2, clients_failed=0, failures=[], seconds=1.))
    found = dict(method='fedavg', lr=.01, val_accuracy=.5, state='ok')
    for _ in range(2): rounds(progress.trial_row, 3)
    assert (progress.done, progress.within) == (6, 6)
    progress.row(found)
    assert (progress.done, progress.within) == (6, 0)
    rounds(progress.trial_row, 1)  # this one diverged
    progress.row(found | dict(lr=.03, state='diverged', val_accuracy=None))
    assert (progress.done, progress.total) == (12, 40)
    progress.row(found | dict(lr=.1))  # the grid is extended
    assert (progress.done, progress.total) == (18, 46)
    assert '[18/46' in drawn[-1] and '<?' not in drawn[-1]

# ---- any option, any value

ODD = ['', ' ', ',', '=', '-', '--', '*', '~', '/', '.', '..', '0', '-0', '-1', '1e300', '-1e300', '1e-300', 'nan', 'inf', '-inf', '9'*40, '9'*5000, '0x10', '1_0', '٣', '0.5', 'true', 'None', '[]', '{}',
       '%s', '{x}', "'", '"', 'é', '\n', '\t', '\x1b[2J', 'a\0b', 'a\udcff', 'a'*300, 'a/'*3000, '~nobody-of-that-name/x', '/dev/zero', '/dev/null', 'all', 'auto', 'topk:0', 'topk:nan', 'fedsq+fedsq', '+', 'fedavg=0.1,=1', 'cuda:99']

@pytest.mark.parametrize('name', ['config', *SETTINGS])
def test_any_option_with_any_value_is_taken_or_refused_in_one_line(name, fedsq, monkeypatch, tmp_path):
    "Up to the moment when a run would write its first file. Never a traceback, never a folder."
    class Began(KeyboardInterrupt): pass
    def begin(*args, **kw): raise Began
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fedsq_nb.study.experiment.load_task', begin)
    for value in ODD:
        status, printed, err = fedsq('compare', *QUICK, *SMALL, '--out', tmp_path/'out', f'--{name.replace("_", "-")}={value}')
        assert status in (2, 130) and printed == '' and not list(tmp_path.iterdir()), (value, err)
        if status == 2: assert err.startswith('fedsq: ') and err.count('\n') == 1, (value, err)
