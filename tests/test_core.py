"What everything leans on, under real faults: streams, fingerprints, and files that are whole or absent."
import multiprocessing, os, pickle, random, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fedsq_nb.core import (InputError, atomic_write, check_name, copy_state, load_state, norm, pick_device, rng, save_state, seeded,
                           serialised_bytes, state_hash, sub)

fast = settings(max_examples=60, deadline=None)
words = st.one_of(st.text(max_size=8), st.integers(-10**6, 10**6))
paths = st.tuples(st.integers(0, 2**64), st.lists(words, max_size=4).map(tuple))
PINNED = {'rng': [269, 735, 241, 126], 'seeded': [534, 509, 582, 15], 'hash': '6f17cb4429e58f23', 'empty': 'e3b0c44298fc1c14'}
top = Path(__file__).resolve().parent.parent


# -- random streams ----------------------------------------------------------------------------------------------------

def draw(seed, path): return rng(seed, *path).integers(2**63, size=2).tolist()

@fast
@given(paths, paths)
def test_a_stream_is_its_path(one, other):
    a, b = draw(*one), draw(*other)
    assert a == draw(*one)
    assert (a == b) == (one == other)

@fast
@given(st.lists(st.text(max_size=6), min_size=2, max_size=4))
def test_paths_cannot_be_glued_or_reordered(parts):
    alternatives = [tuple(parts), (''.join(parts),), (','.join(parts),), ('", "'.join(parts),), tuple(parts[::-1]), (*parts, ''), (*parts, 0)]
    streams = {p: tuple(draw(0, p)) for p in alternatives}
    assert len(set(streams.values())) == len(streams)

@fast
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_numpy_and_python_integers_name_the_same_stream(seed, client):
    assert draw(seed, ('client', client)) == draw(np.int64(seed), ('client', np.int32(client))) == draw(seed, ('client', torch.tensor(client)))

def test_streams_are_pinned():
    "A published result names its seed: these draws may never change, in any process or on any machine."
    assert rng(0, 'round', 3, 'client', 7).integers(1000, size=4).tolist() == PINNED['rng']
    with seeded(0, 'head'): assert torch.randint(1000, (4,)).tolist() == PINNED['seeded']

def test_streams_neither_read_nor_move_the_global_generators():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    a = draw(1, ('x',)); np.random.seed(5); random.seed(5)
    assert a == draw(1, ('x',))
    random.setstate(before[0]); np.random.seed(7)
    moved = np.random.get_state()[1].tobytes(); draw(2, ('y',))
    assert np.random.get_state()[1].tobytes() == moved and random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])

def test_streams_look_uniform_and_uncorrelated_across_clients():
    "A hundred neighbouring paths, side by side: no drift of the mean, no correlation beyond chance."
    sample = np.stack([rng(0, 'client', c).random(1000) for c in range(100)])
    assert abs(sample.mean() - 0.5) < 5 / (12 * sample.size) ** 0.5
    off = np.corrcoef(sample)[np.triu_indices(100, 1)]
    assert abs(off).max() < 6 / 1000**0.5

@fast
@given(paths, st.integers(0, 50))
def test_seeded_repeats_and_restores(path, drawn_before):
    seed, rest = path
    torch.rand(drawn_before)
    before = torch.get_rng_state()
    with seeded(seed, *rest): first = torch.rand(4)
    with seeded(seed, *rest): assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)

def test_seeded_restores_after_an_error_and_when_nested():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        with seeded(0, 'a'): torch.rand(3); 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(0, 'outer'): plain = [torch.rand(2), torch.rand(2)]
    with seeded(0, 'outer'):
        first = torch.rand(2)
        with seeded(0, 'inner'): torch.rand(100)
        assert torch.equal(first, plain[0]) and torch.equal(torch.rand(2), plain[1])


# -- states and their fingerprints -------------------------------------------------------------------------------------

dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool]

@st.composite
def states(draw):
    names = draw(st.lists(st.text('abc.01', min_size=1, max_size=6), unique=True, min_size=1, max_size=4))
    g = rng(draw(st.integers(0, 2**32)), 'state')
    def tensor(dtype, shape): return torch.from_numpy(np.asarray(g.integers(0, 2, shape)).astype(np.float64).reshape(shape)).to(dtype, copy=True)
    return {n: tensor(draw(st.sampled_from(dtypes)), draw(st.lists(st.integers(1, 3), max_size=3))) for n in names}

def flip(t, bit):
    "`t` with one bit of its memory turned over."
    t = t.clone().reshape(-1)
    t.view(torch.uint8)[bit // 8 % (t.numel() * t.element_size())] ^= 1 << bit % 8
    return t

@fast
@given(states(), st.randoms(use_true_random=False), st.integers(0, 10**4))
def test_any_change_has_another_fingerprint_and_order_has_none(state, random, bit):
    name = random.choice(list(state))
    t, h = state[name], state_hash(state)
    assert h == state_hash({k: state[k] for k in random.sample(list(state), len(state))}) == state_hash(copy_state(state))
    if t.dtype != torch.bool: assert state_hash({**state, name: flip(t, bit).reshape(t.shape)}) != h
    assert state_hash({**state, name: t[None]}) != h
    assert state_hash({k if k != name else k + 'x': v for k, v in state.items()}) != h
    assert state_hash({k: v for k, v in state.items() if k != name}) != h

@pytest.mark.parametrize('a, b', [
    (torch.tensor([0.]), torch.tensor([-0.])), (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    (torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.bfloat16)), (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(0, 3), torch.zeros(3, 0)), (torch.zeros(()), torch.zeros(1))], ids=str)
def test_equal_values_of_another_kind_differ(a, b): assert state_hash({'w': a}) != state_hash({'w': b})

def test_a_fingerprint_does_not_depend_on_memory_layout():
    t = torch.arange(24.).reshape(2, 3, 4)
    for same in (t.clone().permute(2, 0, 1).contiguous().permute(1, 2, 0), t.clone().requires_grad_(), torch.stack([t, t], -1)[..., 0]):
        assert state_hash({'w': same}) == state_hash({'w': t})

def test_fingerprints_are_pinned():
    assert state_hash({'w': torch.arange(6.).reshape(2, 3), 'n': torch.tensor(7), 'h': torch.ones(2, dtype=torch.bfloat16)}) == PINNED['hash']
    assert state_hash({}) == PINNED['empty']

@fast
@given(states())
def test_a_saved_state_comes_back_to_the_bit_and_has_the_announced_length(tmp_path_factory, state):
    path = save_state(tmp_path_factory.mktemp('s')/'w.safetensors', state)
    assert state_hash(load_state(path)) == state_hash(state)
    assert path.stat().st_size == serialised_bytes(state)

def test_a_copy_shares_no_memory_even_where_the_original_does():
    t = torch.arange(6.).reshape(2, 3)
    state = {'a': t, 'tied': t, 'turned': t.T, 'part': t[:, 1]}
    for k, v in copy_state(state).items(): assert torch.equal(v, state[k])
    assert len({v.data_ptr() for v in copy_state(state).values()}) == 4

def test_tied_and_strided_tensors_make_a_file(tmp_path):
    "safetensors alone refuses memory that is shared or not contiguous; a network's `state_dict` can have both."
    t = torch.arange(6.).reshape(2, 3)
    state = {'a': t, 'tied': t, 'turned': t.T}
    assert state_hash(load_state(save_state(tmp_path/'w', state))) == state_hash(state)

@fast
@given(states())
def test_a_state_is_no_distance_from_itself(state):
    assert norm(sub(state, state)) == 0
    assert list(sub(state, state)) == [k for k, v in state.items() if v.is_floating_point()]

def test_norm_is_summed_in_float64(): assert norm({'w': torch.full((10**6,), 300., dtype=torch.float16)}) == pytest.approx(3e5)


# -- files that are whole or absent ------------------------------------------------------------------------------------

forks = multiprocessing.get_context('fork')
OLD, NEW = b'old ' * 1000, b'new ' * 3_000_000

def in_child(f, *args):
    "Run `f` in a forked process and return its exit code; a negative one is the signal that killed it."
    p = forks.Process(target=f, args=args); p.start(); p.join(30)
    return p.exitcode

def _killed_at(step, path):
    def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, step, die)
    atomic_write(path, NEW)

@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_killed_between_two_steps_the_old_file_is_whole(tmp_path, step):
    path = tmp_path/'rows.jsonl'
    path.write_bytes(OLD)
    assert in_child(_killed_at, step, path) == -signal.SIGKILL
    assert path.read_bytes() == OLD
    assert atomic_write(path, NEW).read_bytes() == NEW  # what the dead process left lying about is in nobody's way

@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_killed_before_the_end_a_new_file_is_absent(tmp_path, step):
    assert in_child(_killed_at, step, tmp_path/'w') == -signal.SIGKILL
    assert not (tmp_path/'w').exists()

def _write_for_ever(path):
    while True:
        for data in (OLD, NEW): atomic_write(path, data)

def test_killed_at_any_instant_the_file_is_one_or_the_other(tmp_path):
    "A writer alternates between two contents of very different length, and is killed at moments spread over its work."
    path, left = tmp_path/'state', set()
    path.write_bytes(OLD)
    for i in range(12):
        p = forks.Process(target=_write_for_ever, args=(path,)); p.start()
        time.sleep(0.02 + 0.0037 * i)
        p.kill(); p.join()
        assert p.exitcode == -signal.SIGKILL and path.read_bytes() in (OLD, NEW)
        left |= {f.name for f in tmp_path.iterdir()} - {'state'}
    assert all(n.startswith('.state.') for n in left)

def test_a_reader_never_sees_a_part(tmp_path):
    path = atomic_write(tmp_path/'state', OLD)
    p = forks.Process(target=_write_for_ever, args=(path,)); p.start()
    try: seen = {path.read_bytes() for _ in range(100)}
    finally: p.kill(); p.join()
    assert seen <= {OLD, NEW}

def _with_little_room(path, action):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try: action(path)
    except OSError: os._exit(7)
    os._exit(0)

def _big_state(path): save_state(path, {'w': torch.zeros(10_000)})
def _big_bytes(path): atomic_write(path, NEW)

@pytest.mark.parametrize('action', [_big_bytes, _big_state])
@pytest.mark.parametrize('existing', [True, False])
def test_when_the_file_may_not_grow_nothing_changes(tmp_path, action, existing):
    path = tmp_path/'state'
    if existing: path.write_bytes(OLD)
    assert in_child(_with_little_room, path, action) == 7
    assert [f.name for f in tmp_path.iterdir()] == ['state'] * existing
    if existing: assert path.read_bytes() == OLD

full_disk = '''
import errno, sys
from pathlib import Path
from fedsq_nb.core import atomic_write
path = Path(sys.argv[1])/'state'
atomic_write(path, b'old')
try: atomic_write(path, b'x' * 200_000)
except OSError as e: assert e.errno == errno.ENOSPC, e
else: sys.exit('a disk of 64 KiB took 200 kB')
assert path.read_bytes() == b'old' and [f.name for f in path.parent.iterdir()] == ['state']
assert atomic_write(path, b'new').read_bytes() == b'new'
'''

private = ['unshare', '--user', '--map-root-user', '--mount']
can_mount = shutil.which('unshare') and subprocess.run([*private, 'mount', '-t', 'tmpfs', 'none', '/mnt'], capture_output=True).returncode == 0

@pytest.mark.skipif(not can_mount, reason='needs a private mount')
def test_a_full_disk_changes_nothing(tmp_path):
    command = 'mount -t tmpfs -o size=64k none "$0" && exec "$1" -c "$2" "$0"'
    done = subprocess.run([*private, 'sh', '-c', command, str(tmp_path), sys.executable, full_disk], cwd=top, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('data', [None, 3, ['text'], '\ud800'], ids=repr)
def test_what_cannot_be_written_leaves_no_file(tmp_path, data):
    with pytest.raises((TypeError, UnicodeEncodeError)): atomic_write(tmp_path/'f', data)
    assert list(tmp_path.iterdir()) == []

def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(fd): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt): atomic_write(tmp_path/'f', 'text')
    assert list(tmp_path.iterdir()) == []

def test_a_directory_in_the_way_stays(tmp_path):
    (tmp_path/'f').mkdir()
    with pytest.raises(OSError): atomic_write(tmp_path/'f', 'text')
    assert [f.name for f in tmp_path.iterdir()] == ['f'] and (tmp_path/'f').is_dir()

def test_text_is_utf8_and_line_ends_are_kept(tmp_path): assert atomic_write(tmp_path/'f', 'α\r\nβ\n').read_bytes() == 'α\r\nβ\n'.encode()


# -- reading what others left ------------------------------------------------------------------------------------------

whole = {'w': torch.arange(12.).reshape(3, 4), 'n': torch.tensor(3)}
in_one_folder = settings(fast, suppress_health_check=[HealthCheck.function_scoped_fixture])

@in_one_folder
@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path, data):
    content = save_state(tmp_path/'w', whole).read_bytes()
    (tmp_path/'cut').write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(InputError, match="'.*cut' is not a whole safetensors file"): load_state(tmp_path/'cut')

@in_one_folder
@given(st.binary(max_size=200))
def test_noise_is_refused(tmp_path, noise):
    (tmp_path/'noise').write_bytes(noise)
    with pytest.raises(InputError, match='is not a whole safetensors file'): load_state(tmp_path/'noise')

class Bomb:
    def __reduce__(self): return os._exit, (3,)

def foreign():
    header = b'{"w":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'
    return {'pickle': pickle.dumps({'w': 1}), 'bomb': pickle.dumps(Bomb()), 'zip': b'PK\x03\x04' + bytes(100), 'text': b'epoch,loss\n' * 20,
            'longer': (len(header)).to_bytes(8, 'little') + header + bytes(16), 'huge header': (2**63).to_bytes(8, 'little') + header,
            'trailing': b'', 'json': b'{"w": [1, 2]}'}

@pytest.mark.parametrize('kind', foreign())
def test_foreign_files_are_refused_and_never_run(tmp_path, kind):
    "A bomb that is unpickled ends this very process."
    content = foreign()[kind] if kind != 'trailing' else save_state(tmp_path/'w', whole).read_bytes() + b'x'
    (tmp_path/'f').write_bytes(content)
    with pytest.raises(InputError, match="weights file '.*f' is not a whole safetensors file"): load_state(tmp_path/'f')

def test_a_torch_checkpoint_is_refused(tmp_path):
    torch.save(whole, tmp_path/'model.pt')
    with pytest.raises(InputError, match='model.pt'): load_state(tmp_path/'model.pt')

@pytest.mark.parametrize('name', ['absent', '.'])
def test_no_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match='does not exist'): load_state(tmp_path/name)


# -- names and devices -------------------------------------------------------------------------------------------------

@fast
@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.text())
def test_a_name_is_returned_or_refused_in_one_line(valid, name):
    if name in valid: assert check_name(name, iter(valid), 'method') == name
    else:
        with pytest.raises(InputError, match='unknown method'): check_name(name, iter(valid), 'method')

@pytest.mark.parametrize('name', ['cuda:99', 'cdua', '', 'cpu:x'])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match='device'): pick_device(name)


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_files_are_readable_by_whom_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try: path = atomic_write(tmp_path/'rows.jsonl', b'x')
    finally: os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
