"Partitions: properties over many label arrays, the limits, and every way to ask for the impossible."
import collections, contextlib, math, random, time

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from fedsq_nb.core import InputError
from fedsq_nb.data.niid_bench import niid_bench, niid_bench_labels
from fedsq_nb.data.partition import (round_table, by_column, card, check_card, class_counts, cut, deal, dirichlet, effective_classes, heat_map, iid, label_distance,
                                label_skew, load_card, partition_hash, quantity_skew, save_card, shards, split_clients)

matplotlib.use('agg')
import matplotlib.pyplot as plt

labels_ = arrays(np.int64, st.integers(20, 200), elements=st.integers(0, 6))
seeds, alphas = st.integers(0, 2**31), st.floats(0.3, 1000)
fast = settings(max_examples=40, deadline=None)

def assert_partition(parts, n):
    assert all(p.dtype == np.int64 for p in parts)
    assert all((np.diff(p) > 0).all() for p in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))

def same(a, b): return len(a) == len(b) and all(np.array_equal(p, q) for p, q in zip(a, b))

@fast
@given(labels_, st.integers(1, 20), seeds)
def test_iid_is_a_partition_into_equal_sizes(labels, n_clients, seed):
    parts = iid(labels, n_clients, seed=seed)
    sizes = [len(p) for p in parts]
    assert_partition(parts, len(labels))
    assert len(parts) == n_clients and max(sizes) - min(sizes) <= 1
    assert same(parts, iid(labels, n_clients, seed=seed))

@fast
@given(labels_, st.integers(1, 5), alphas, st.integers(1, 3), st.booleans(), seeds)
def test_dirichlet_is_a_partition_that_keeps_the_minimum_and_repeats(labels, n_clients, alpha, min_size, balance, seed):
    before, state, torch_state = labels.copy(), np.random.get_state()[1].copy(), torch.get_rng_state()
    kwargs = dict(min_size=min_size, balance=balance, seed=seed)
    parts = dirichlet(labels, n_clients, alpha, **kwargs)
    assert_partition(parts, len(labels))
    assert len(parts) == n_clients and min(map(len, parts)) >= min_size
    assert same(parts, dirichlet(labels, n_clients, alpha, **kwargs))
    assert np.array_equal(labels, before)
    assert np.array_equal(np.random.get_state()[1], state) and torch.equal(torch.get_rng_state(), torch_state)

@fast
@given(labels_, st.permutations(range(7)), seeds)
def test_names_of_classes_do_not_matter(labels, names, seed):
    parts = dirichlet(labels, 4, 0.5, seed=seed)
    assert same(parts, dirichlet(np.array(names)[labels], 4, 0.5, seed=seed))
    assert same(parts, dirichlet([f'class {k}' for k in labels], 4, 0.5, seed=seed))
    assert same(parts, dirichlet(torch.tensor(labels), 4, 0.5, seed=seed))

@fast
@given(arrays(np.float64, (3, 8), elements=st.floats(0.001, 1)), arrays(np.int64, 3, elements=st.integers(0, 500)))
def test_cut_divides_exactly_and_within_one(p, n):
    p /= p.sum(1, keepdims=True)
    sizes = cut(p, n)
    assert (sizes >= 0).all() and np.array_equal(sizes.sum(1), n)
    assert (np.abs(sizes - p*n[:, None]) <= 1 + 1e-9).all()

@fast
@given(arrays(np.int64, (4, 5), elements=st.integers(0, 9)), seeds)
def test_deal_gives_what_the_table_says(table, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), table.sum(0)))
    parts = deal(labels, table, np.random.default_rng(seed))
    assert sum(map(len, parts)) == len(labels)
    assert np.array_equal(class_counts(labels, parts, 5), table)

def test_deal_gives_every_sample_of_a_class_the_same_chance():
    labels, table = np.zeros(6, dtype=int), np.array([[1], [2], [3]])
    gen, hits = np.random.default_rng(0), np.zeros(6)
    for _ in range(3000): hits[deal(labels, table, gen)[0]] += 1
    assert np.abs(hits/3000 - 1/6).max() < 0.03

def test_large_alpha_is_even_and_small_alpha_gives_a_class_to_one_client():
    labels = np.repeat(np.arange(10), 100)
    counts = lambda alpha: class_counts(labels, dirichlet(labels, 10, alpha, seed=3), 10)
    assert label_distance(counts(1e5)) < 0.01
    assert effective_classes(counts(1e5)).min() > 9.9
    assert label_distance(counts(0.05)) > 0.6
    assert label_distance(class_counts(labels, iid(labels, 10, seed=3), 10)) < 0.2

def test_proportions_have_the_dirichlet_mean_and_spread():
    labels = np.zeros(10_000, dtype=int)
    shares = np.array([[len(p) for p in dirichlet(labels, 5, 2., seed=s)] for s in range(1500)]) / 10_000
    assert np.abs(shares.mean(0) - 1/5).max() < 0.015
    assert np.abs(shares.var(0) - (1/5)*(4/5)/(5*2 + 1)).max() < 0.003

def test_seeds_and_schemes_differ():
    labels = np.arange(200) % 10
    assert partition_hash(iid(labels, 10, seed=0)) != partition_hash(iid(labels, 10, seed=1))
    assert partition_hash(dirichlet(labels, 5, 1., seed=0)) != partition_hash(dirichlet(labels, 5, 1., seed=1))

def test_redrawing_does_not_change_which_samples_an_early_accepted_table_gets():
    labels = np.arange(300) % 3
    assert same(dirichlet(labels, 3, 100., min_size=1, seed=0), dirichlet(labels, 3, 100., min_size=50, seed=0, max_draws=7))

def test_balance_narrows_the_sizes():
    labels = np.repeat(np.arange(10), 100)
    spread = lambda balance: np.mean([np.std([len(p) for p in dirichlet(labels, 10, 0.1, seed=s, balance=balance)]) for s in range(10)])
    assert spread(True) < 0.7 * spread(False)

def test_balance_survives_a_concentration_whose_mass_is_all_on_full_clients():
    labels = np.repeat(np.arange(4), 25)
    for alpha in (1e-6, 1e-12, 1e-300):
        for seed in range(20):
            parts = dirichlet(labels, 4, alpha, balance=True, seed=seed)
            assert_partition(parts, 100)
            counts = class_counts(labels, parts, 4)
            first = counts[:, 0].argmax()
            assert counts[first].tolist() == [25, 0, 0, 0] # full after class 0, it takes no more

def test_a_thousand_redraws_are_quick_and_the_error_names_the_client():
    labels = np.arange(50_000) % 100
    start = time.perf_counter()
    with pytest.raises(InputError, match=r'client \d could not be filled: in the best of 1000 draws it got \d+ samples and min_size is 4999; lower min_size'):
        dirichlet(labels, 10, 0.1, min_size=4999, seed=0)
    assert time.perf_counter() - start < 3

@pytest.mark.parametrize('alpha', [0, -0.1, float('nan'), float('inf'), '0.1', None, True, False, np.array([[1., 2.]])])
def test_bad_alpha(alpha):
    with pytest.raises(InputError, match='alpha .* must be a number above 0'): dirichlet([0, 1, 0, 1], 2, alpha, seed=0)

@pytest.mark.parametrize('alpha', [1, np.float32(0.5), np.int64(2)])
def test_any_real_number_is_an_alpha(alpha): assert_partition(dirichlet([0, 1, 0, 1, 0, 1], 2, alpha, seed=0), 6)

@pytest.mark.parametrize('n_clients', [0, -1, 2.0, True, '3', None])
def test_bad_number_of_clients(n_clients):
    with pytest.raises(InputError, match='n_clients .* must be a whole number, at least 1'): iid([0, 1, 0, 1], n_clients, seed=0)
    with pytest.raises(InputError, match='n_clients .* must be a whole number, at least 1'): dirichlet([0, 1, 0, 1], n_clients, 1., seed=0)

def test_more_clients_than_samples_and_impossible_minimum():
    with pytest.raises(InputError, match='n_clients 5 is more than the 4 samples'): iid([0, 1, 0, 1], 5, seed=0)
    with pytest.raises(InputError, match='n_clients 5 is more than the 4 samples'): dirichlet([0, 1, 0, 1], 5, 1., seed=0)
    with pytest.raises(InputError, match='2 clients x 3 needs 6 samples and there are 4; use min_size 2 or less'):
        dirichlet([0, 1, 0, 1], 2, 1., min_size=3, seed=0)
    with pytest.raises(InputError, match='min_size 0'): dirichlet([0, 1], 1, 1., min_size=0, seed=0)
    with pytest.raises(InputError, match='max_draws 0'): dirichlet([0, 1], 1, 1., max_draws=0, seed=0)

def test_label_distance_does_not_depend_on_the_order_of_clients_or_classes():
    counts = np.random.default_rng(0).integers(1, 50, (6, 8))
    assert label_distance(counts) == pytest.approx(label_distance(counts[::-1, ::-1]))
    assert label_distance(3*counts) == pytest.approx(label_distance(counts))
    assert np.allclose(effective_classes(np.full((2, 5), 4)), 5)

def test_heat_map_writes_numbers_only_where_they_can_be_read():
    for shape, numbers in (((10, 10), 100), ((10, 100), 0)):
        fig, ax = plt.subplots()
        heat_map(np.ones(shape, dtype=int), ax=ax)
        assert len(ax.texts) == numbers and len(fig.axes) == (1 if numbers else 2)
        assert 'class' in ax.get_xlabel() and ax.get_ylabel() == 'client' and ax.get_title()
        plt.close(fig)

@pytest.mark.parametrize('alpha', [[1., 0.], [1.], [1., 2., 3.], [[1., 2.]], ['a', 'b'], [1., float('nan')], [True, True]])
def test_bad_alphas_of_the_clients(alpha):
    for make in (lambda: dirichlet([0, 1, 0, 1], 2, alpha, seed=0), lambda: quantity_skew([0, 1, 0, 1], 2, alpha=alpha, seed=0)):
        with pytest.raises(InputError, match='alpha .* must be a number above 0, or one for each of the 2 clients'): make()

@fast
@given(labels_, st.integers(2, 6), st.floats(0.3, 100), seeds, st.booleans())
def test_equal_alphas_are_one_alpha(labels, n_clients, alpha, seed, balance):
    assert same(dirichlet(labels, n_clients, alpha, seed=seed, balance=balance), dirichlet(labels, n_clients, [alpha]*n_clients, seed=seed, balance=balance))

def test_shares_follow_the_alphas_of_the_clients():
    labels, alpha = np.arange(4000) % 2, np.array([1., 2., 5.])
    shares = np.mean([[len(p) for p in dirichlet(labels, 3, alpha, seed=s)] for s in range(600)], 0) / 4000
    assert np.abs(shares - alpha/8).max() < 0.02

GOLDEN = { # made before there were other schemes: seed -> i.i.d., then four settings of Dirichlet
    0: ('6c49c88253577ee9', '09d234efc218b153', '651f248ad0df16f9', '91f6c7a52b4b520f', '6873171ec4566047'),
    1: ('b812a99edb17cf13', 'a21a065d1944d4e5', '51f55f61f48b67de', '964c9d01276b8258', '14068fe16fe435b8'),
    7: ('5cfb9f1cf6da3115', '3517de386dbea114', '42ac7a776b92323c', '60f332bb2c6cda06', 'bf78caca3054aeac')}

@pytest.mark.parametrize('seed', GOLDEN)
def test_a_seed_gives_the_partition_it_always_gave(seed):
    y = np.arange(500) * 7919 % 13 % 7
    made = [iid(y, 10, seed=seed), *(dirichlet(y, 10, a, min_size=m, balance=b, seed=seed) for a, m, b in ((0.1, 1, False), (1, 5, False), (0.5, 3, True), (100, 1, False)))]
    assert tuple(map(partition_hash, made)) == GOLDEN[seed]

# The lists of NIID-Bench. The oracles below are written from the description of the algorithm, with the global generators
# and Python lists, one client and one sample at a time.

@contextlib.contextmanager
def global_seeds(seed):
    states = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    try: yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])

def niid_bench_oracle(labels, n_clients, beta, seed, min_size=10):
    n = len(labels)
    with global_seeds(seed):
        while True:
            hands = [[] for _ in range(n_clients)]
            for k in range(labels.max() + 1):
                row = np.array([i for i in range(n) if labels[i] == k])
                np.random.shuffle(row)
                p = np.random.dirichlet([beta]*n_clients)
                for j in range(n_clients):
                    if len(hands[j]) >= n/n_clients: p[j] = 0.
                p = p / p.sum()
                start, total = 0, np.cumsum(p)
                for j in range(n_clients):
                    end = len(row) if j == n_clients - 1 else math.floor(total[j] * len(row))
                    hands[j].extend(row[start:end])
                    start = end
            if min(map(len, hands)) >= min_size: return [np.sort(h) for h in hands]

def niid_bench_labels_oracle(labels, n_clients, k, seed):
    n_classes = labels.max() + 1
    with global_seeds(seed):
        wants = []
        for i in range(n_clients):
            mine = {i % n_classes}
            while len(mine) < k: mine.add(random.randint(0, n_classes - 1))
            wants.append(mine)
        hands = [[] for _ in range(n_clients)]
        for c in range(n_classes):
            row = np.flatnonzero(labels == c)
            np.random.shuffle(row)
            holders = [i for i in range(n_clients) if c in wants[i]]
            size, extra = divmod(len(row), len(holders))
            row = row.tolist()
            for place, i in enumerate(holders): hands[i] += [row.pop(0) for _ in range(size + (place < extra))]
    return [np.sort(np.array(h, dtype=int)) for h in hands]

@settings(max_examples=30, deadline=None)
@given(st.integers(200, 400), st.integers(1, 6), st.sampled_from([0.3, 0.5, 1., 5.]), st.integers(0, 2**32 - 1), st.booleans())
def test_niid_bench_gives_the_lists_of_the_published_algorithm(n, n_clients, beta, seed, ordered):
    labels = np.random.default_rng(seed).integers(0, 10, n)
    labels[:10] = range(10)
    if ordered: labels.sort()
    before = np.random.get_state()[1].copy()
    parts = niid_bench(labels, n_clients, beta, numpy_seed=seed)
    assert np.array_equal(np.random.get_state()[1], before)
    assert_partition(parts, n)
    assert min(map(len, parts)) >= 10
    assert same(parts, niid_bench_oracle(labels, n_clients, beta, seed))
    assert same(parts, niid_bench(torch.tensor(labels), n_clients, beta, numpy_seed=seed))

@settings(max_examples=30, deadline=None)
@given(st.integers(10, 25), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_niid_bench_labels_gives_the_lists_of_the_published_algorithm(n_clients, k, seed):
    labels = np.random.default_rng(seed).permutation(np.arange(1000) % 10)
    before = random.getstate()
    parts = niid_bench_labels(labels, n_clients, k, numpy_seed=seed)
    assert random.getstate() == before
    assert_partition(parts, 1000)
    assert ((class_counts(labels, parts, 10) > 0).sum(1) == k).all()
    assert same(parts, niid_bench_labels_oracle(labels, n_clients, k, seed))

SCRIPT = { # what the script itself (commit 61b901a) gave for these labels: seed -> labeldir 0.1 and 0.5 with 6 clients, #label1 and #label3 with 12
    0: ('7335f83268bfa8d0', '1d09ef6ea451b937', 'd008578aa4ba8aac', '243bdf5eaeda02d7'),
    1: ('6e6a5cff18fb67cc', '69e22adb6b68fe1d', 'b43a30e40ce2ec62', 'f119bd78f7439472'),
    2: ('74d0c9969f646f1b', '77ac69ec6adaa01f', '6e7ec4541fae213d', 'a38fc600b2dc6980')}

@pytest.mark.parametrize('seed', SCRIPT)
def test_niid_bench_gives_the_lists_that_the_script_gave(seed):
    y = np.arange(2000) * 7919 % 17 % 10
    made = [*(niid_bench(y, 6, beta, numpy_seed=seed) for beta in (0.1, 0.5)), *(niid_bench_labels(y, 12, k, numpy_seed=seed) for k in (1, 3))]
    assert tuple(map(partition_hash, made)) == SCRIPT[seed]

def test_niid_bench_with_an_absent_class_draws_for_it_all_the_same():
    y = np.arange(200) % 5
    assert not same(niid_bench(y*2, 3, 1., numpy_seed=0), niid_bench(y, 3, 1., numpy_seed=0)) # classes 0, 2, 4, 6, 8 of 9
    assert same(niid_bench(y, 3, 1., numpy_seed=0), niid_bench(y, 3, 1., numpy_seed=0, n_classes=5))
    assert_partition(niid_bench(y, 3, 1., numpy_seed=0, n_classes=9), 200)

def test_niid_bench_says_what_is_wrong():
    y = np.arange(100) % 10
    for bad in (-1, 2**32, 1.5, None, True):
        with pytest.raises(InputError, match='numpy_seed .* must be a whole number from 0'): niid_bench(y, 2, 1., numpy_seed=bad)
        with pytest.raises(InputError, match='numpy_seed .* must be a whole number from 0'): niid_bench_labels(y, 10, 2, numpy_seed=bad)
    for bad in (0, -1, None, '1', [1., 1.], float('inf')):
        with pytest.raises(InputError, match='beta .* must be (a|one) number above 0'): niid_bench(y, 2, bad, numpy_seed=0)
    with pytest.raises(InputError, match='labels must be whole numbers from 0 .* got <U1'): niid_bench(['a', 'b'], 2, 1., numpy_seed=0, min_size=1)
    with pytest.raises(InputError, match='label 5 at position 5 is outside 0 to 4'): niid_bench(y, 2, 1., numpy_seed=0, n_classes=5)
    with pytest.raises(InputError, match='label -1 at position 0 is outside'): niid_bench(y - 1, 2, 1., numpy_seed=0)
    with pytest.raises(InputError, match='n_classes 0 must be a whole number'): niid_bench(y, 2, 1., numpy_seed=0, n_classes=0)
    with pytest.raises(InputError, match='11 clients x 10 needs 110'): niid_bench(y, 11, 1., numpy_seed=0)
    with pytest.raises(InputError, match=r'could not be filled: in the best of 50 draws it got \d samples and min_size is 10; lower min_size, raise beta \(now 0.001\)'):
        niid_bench(y, 9, 0.001, numpy_seed=0, max_draws=50)
    with pytest.raises(InputError, match='n_clients 9 is less than the 10 classes'): niid_bench_labels(y, 9, 2, numpy_seed=0)
    with pytest.raises(InputError, match='classes_per_client 11 is more than the 10 classes'): niid_bench_labels(y, 10, 11, numpy_seed=0)
    rare = np.r_[np.arange(10), np.zeros(90, dtype=int)] # one sample of class 1, and clients 1 and 11 hold that class alone
    with pytest.raises(InputError, match='client 11 got no sample'): niid_bench_labels(rare, 20, 1, numpy_seed=0)

# A few classes each

@fast
@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 8), seeds)
def test_label_skew_gives_each_client_its_classes_and_each_class_its_holders(n_classes, n_clients, k, seed):
    gen = np.random.default_rng(seed)
    labels = gen.permutation(np.repeat(np.arange(n_classes), gen.integers(n_clients, 60, n_classes)))
    assume(k <= n_classes <= n_clients*k)
    parts = label_skew(labels, n_clients, k, seed=seed)
    counts = class_counts(labels, parts, n_classes)
    holders = (counts > 0).sum(0)
    assert_partition(parts, len(labels))
    assert ((counts > 0).sum(1) == k).all() and holders.min() >= 1 and holders.max() - holders.min() <= 1
    assert all(np.ptp(column[column > 0]) <= 1 for column in counts.T)
    assert same(parts, label_skew([f'class {y}' for y in labels], n_clients, k, seed=seed))

def test_label_skew_deals_classes_by_lot():
    labels = np.repeat(np.arange(6), 50)
    seen = np.mean([class_counts(labels, label_skew(labels, 4, 2, seed=s), 6) > 0 for s in range(400)], 0)
    assert np.abs(seen - 1/3).max() < 0.1

def test_label_skew_says_what_is_wrong():
    labels = np.repeat(np.arange(10), 5)
    with pytest.raises(InputError, match='classes_per_client 2 is too few: 4 clients hold at most 8 of the 10 classes; use classes_per_client 3 or more'): label_skew(labels, 4, 2, seed=0)
    with pytest.raises(InputError, match='classes_per_client 11 is more than the 10 classes'): label_skew(labels, 4, 11, seed=0)
    with pytest.raises(InputError, match='class 0, counted in order of appearance, has 5 samples for 10 clients'): label_skew(labels, 50, 2, seed=0)
    for bad in (0, -1, 1.5, None, True):
        with pytest.raises(InputError, match='classes_per_client .* must be a whole number'): label_skew(labels, 10, bad, seed=0)

@fast
@given(labels_, st.integers(1, 6), st.integers(1, 3), seeds)
def test_shards_are_runs_of_the_sorted_labels(labels, n_clients, per_client, seed):
    parts = shards(labels, n_clients, per_client, seed=seed)
    assert_partition(parts, len(labels))
    n_shards = n_clients*per_client
    runs = np.array_split(np.argsort(labels, kind='stable'), n_shards)
    sizes = [len(labels)//n_shards + (s < len(labels) % n_shards) for s in range(n_shards)]
    assert [len(r) for r in runs] == sizes
    owners = [{next(i for i, p in enumerate(parts) if x in p) for x in run.tolist()} for run in runs]
    assert all(len(o) == 1 for o in owners)
    assert np.bincount([o.pop() for o in owners]).tolist() == [per_client]*n_clients
    assert same(parts, shards(torch.tensor(labels), n_clients, per_client, seed=seed))

def test_shards_in_equal_classes_hold_at_most_two_classes_each():
    labels = np.random.default_rng(0).permutation(np.arange(6000) % 10)
    counts = class_counts(labels, shards(labels, 100, 2, seed=0), 10)
    assert (counts.sum(1) == 60).all() and (counts > 0).sum(1).max() <= 2

def test_too_many_shards():
    with pytest.raises(InputError, match='shards_per_client 3 is too many: 2 clients make 6 shards of 4 samples'): shards([0, 1, 0, 1], 2, 3, seed=0)
    with pytest.raises(InputError, match='shards_per_client 0 must be a whole number'): shards([0, 1, 0, 1], 2, 0, seed=0)

# Sizes

@fast
@given(st.integers(20, 400), st.integers(1, 10), st.floats(0, 3), st.integers(1, 3), seeds)
def test_power_law_sizes(n, n_clients, power, min_size, seed):
    w = np.array([(i + 1.)**-power for i in range(n_clients)])
    exact = w / w.sum() * n
    assume(np.floor(exact.min()) >= min_size)
    parts = quantity_skew(np.zeros(n), n_clients, power=power, min_size=min_size, seed=seed)
    assert_partition(parts, n)
    sizes = np.sort([len(p) for p in parts])[::-1]
    assert (np.abs(sizes - exact) < 1 + 1e-9).all() and sizes[-1] >= min_size
    assert same(parts, quantity_skew(np.arange(n), n_clients, power=power, min_size=min_size, seed=seed)) # labels are not looked at

@fast
@given(st.integers(100, 400), st.integers(1, 6), st.floats(1, 100), st.integers(1, 3), seeds)
def test_dirichlet_sizes(n, n_clients, alpha, min_size, seed):
    parts = quantity_skew(np.zeros(n), n_clients, alpha=alpha, min_size=min_size, seed=seed)
    assert_partition(parts, n)
    assert len(parts) == n_clients and min(map(len, parts)) >= min_size
    assert same(parts, quantity_skew(np.zeros(n), n_clients, alpha=alpha, min_size=min_size, seed=seed))

def test_every_client_can_be_the_largest_and_sizes_have_the_dirichlet_spread():
    largest = [np.argmax([len(p) for p in quantity_skew(np.zeros(100), 4, power=1.5, seed=s)]) for s in range(400)]
    assert np.abs(np.bincount(largest) / 400 - 1/4).max() < 0.08
    shares = np.array([[len(p) for p in quantity_skew(np.zeros(5000), 5, alpha=2., seed=s)] for s in range(1500)]) / 5000
    assert np.abs(shares.var(0) - (1/5)*(4/5)/(5*2 + 1)).max() < 0.003

def test_quantity_skew_leaves_labels_to_chance():
    labels = np.repeat(np.arange(4), 2500)
    counts = class_counts(labels, quantity_skew(labels, 5, power=1, seed=0), 4)
    assert np.abs(counts / counts.sum(1, keepdims=True) - 1/4).max() < 0.05

def test_quantity_skew_says_what_is_wrong():
    for bad in (-1, float('nan'), float('inf'), '1', True):
        with pytest.raises(InputError, match='power .* must be a number, 0'): quantity_skew(range(20), 4, power=bad, seed=0)
    for both in ({}, dict(alpha=1., power=1.)):
        with pytest.raises(InputError, match='give either alpha or power'): quantity_skew(range(20), 4, **both, seed=0)
    with pytest.raises(InputError, match='power 3 is too steep: the smallest of 4 clients would get 0 of 20 samples and min_size is 1'): quantity_skew(range(20), 4, power=3, seed=0)
    with pytest.raises(InputError, match='could not be filled: in the best of 7 draws'): quantity_skew(range(20), 4, alpha=1e-3, min_size=4, seed=0, max_draws=7)

# Natural owners

@fast
@given(st.lists(st.sampled_from(['b', 'aa', 'c', 'a b', 'ä']), min_size=1, max_size=60), st.integers(1, 5))
def test_by_column_groups_equal_values(values, min_size):
    sizes = collections.Counter(values)
    keep = sorted(v for v in sizes if sizes[v] >= min_size)
    if len(keep) < len(sizes):
        with pytest.raises(InputError, match=f'min_size {min_size} is more than these clients hold') as e: by_column(values, min_size=min_size)
        assert all(f'{v!r} ({sizes[v]})' in str(e.value) for v in sizes if v not in keep)
    if not keep: return
    parts, names = by_column(values, min_size=min_size, drop_small=True)
    assert names == keep and all(p.dtype == np.int64 for p in parts)
    assert [p.tolist() for p in parts] == [[i for i, v in enumerate(values) if v == name] for name in keep]

@pytest.mark.parametrize('values', [np.array([30, 4, 30, -1]), torch.tensor([30, 4, 30, -1]), pd.Series([30, 4, 30, -1]), [30., 4., 30., -1.]])
def test_numbers_are_sorted_as_numbers(values):
    parts, names = by_column(values)
    assert names == [-1, 4, 30] and [p.tolist() for p in parts] == [[3], [1], [0, 2]] and not isinstance(names[0], np.generic)

def test_a_column_of_a_table():
    parts, names = by_column(pd.Series(['x', 'y', 'x'], dtype=object))
    assert names == ['x', 'y'] and [p.tolist() for p in parts] == [[0, 2], [1]]

def test_by_column_says_what_is_wrong():
    for values in (['x', None], [1., float('nan')]):
        with pytest.raises(InputError, match='the value at position 1 is missing'): by_column(values)
    with pytest.raises(InputError, match='all strings or all numbers'): by_column(np.array(['x', 1], dtype=object))
    with pytest.raises(InputError, match='one owner for each sample'): by_column([])
    with pytest.raises(InputError, match=r'one owner for each sample, got the shape \(2, 1\)'): by_column([['x'], ['y']])
    with pytest.raises(InputError, match="'0' .1., '1' .1., '2' .1., '3' .1., '4' .1. and 3 more"): by_column(list('01234567'), min_size=2)
    with pytest.raises(InputError, match='min_size 2 leaves no client: the largest holds 1'): by_column(list('012'), min_size=2, drop_small=True)
    with pytest.raises(InputError, match='min_size 0 must be'): by_column(list('012'), min_size=0)

# Every scheme that draws

DRAWN = {'iid': lambda y, s: iid(y, 5, seed=s), 'dirichlet': lambda y, s: dirichlet(y, 5, 0.5, seed=s), 'alphas': lambda y, s: dirichlet(y, 5, [1, 2, 3, 4, 5], seed=s),
         'niid_bench': lambda y, s: niid_bench(y, 5, 0.5, numpy_seed=s), 'niid_bench_labels': lambda y, s: niid_bench_labels(y, 10, 2, numpy_seed=s),
         'label_skew': lambda y, s: label_skew(y, 5, 2, seed=s), 'shards': lambda y, s: shards(y, 5, 2, seed=s),
         'sizes': lambda y, s: quantity_skew(y, 5, alpha=1., seed=s), 'power': lambda y, s: quantity_skew(y, 5, power=1., seed=s)}

@pytest.mark.parametrize('make', DRAWN.values(), ids=DRAWN)
def test_a_seed_names_one_partition_and_nothing_global_moves(make):
    y = np.random.default_rng(0).permutation(np.arange(300) % 10)
    before, states = y.copy(), (np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate())
    hashes = [partition_hash(make(y, s)) for s in range(20)]
    assert len(set(hashes)) == 20 and hashes == [partition_hash(make(y, s)) for s in range(20)]
    assert np.array_equal(y, before) and np.array_equal(np.random.get_state()[1], states[0])
    assert torch.equal(torch.get_rng_state(), states[1]) and random.getstate() == states[2]
    for s in range(20): assert_partition(make(y, s), 300)

# Train, validation and test

fractions_ = st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)).map(lambda f: tuple(x/sum(f) for x in f))

@fast
@given(labels_, st.integers(1, 6), fractions_, seeds)
def test_split_clients_keeps_each_clients_prior(labels, n_clients, fractions, seed):
    parts = dirichlet(labels, n_clients, 1., seed=seed)
    lists = split_clients(parts, labels, fractions, seed=seed)
    held = class_counts(labels, parts, 7)
    assert len(lists) == 3 and all(len(part) == n_clients for part in lists)
    for i in range(n_clients):
        three = [part[i] for part in lists]
        assert all(p.dtype == np.int64 and (np.diff(p) > 0).all() for p in three)
        assert np.array_equal(np.sort(np.concatenate(three)), parts[i])
    for part, f in zip(lists, fractions):
        counts = class_counts(labels, part, 7)
        assert (np.abs(counts - f*held) < 1).all() # each class of each client
        assert (np.abs(counts.sum(1) - f*held.sum(1)) < 1).all() # and each client as a whole
    assert all(same(a, b) for a, b in zip(lists, split_clients(parts, labels, fractions, seed=seed)))

@settings(max_examples=60, deadline=None)
@given(arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 9)), fractions_, seeds)
def test_rounding_keeps_all_sums(counts, fractions, seed):
    assume(counts.sum())
    f = np.array(fractions)
    table, exact = round_table(counts, f, np.random.default_rng(seed)), np.outer(counts, f)
    assert (table.sum(1) == counts).all() and (np.abs(table - exact) < 1).all() and (np.abs(table.sum(0) - exact.sum(0)) < 1).all()

def test_rounding_up_is_by_lot_where_remainders_are_equal():
    seen = np.mean([round_table(np.ones(10, int), np.array([.8, .1, .1]), np.random.default_rng(s)) for s in range(400)], 0)
    assert np.abs(seen - [.8, .1, .1]).max() < 0.07

def test_a_clients_split_is_its_own():
    labels = np.arange(300) % 10
    parts = iid(labels, 4, seed=0)
    whole, alone = split_clients(parts, labels, seed=0), split_clients(parts[:2], labels, seed=0)
    assert all(same(a[:2], b) for a, b in zip(whole, alone))
    assert not all(same(a, b) for a, b in zip(whole, split_clients(parts, labels, seed=1)))
    assert [[len(p) for p in part] for part in split_clients([np.array([4]), np.array([], dtype=int)], labels, seed=0)] == [[1, 0], [0, 0], [0, 0]]
    assert all(same(a, b) for a, b in zip(whole, split_clients(parts, [f'class {y}' for y in labels], seed=0)))

@pytest.mark.parametrize('fractions', [(0.8, 0.2), (0.8, 0.3, 0.1), (1.2, -0.1, -0.1), (0, 0.5, 0.5), ('a', 'b', 'c'), (float('nan'), 0.5, 0.5), 0.8])
def test_bad_fractions(fractions):
    with pytest.raises(InputError, match='fractions .* must be three numbers'): split_clients([np.arange(4)], np.zeros(4, int), fractions, seed=0)

# The card

def test_a_card_survives_the_file_and_knows_its_partition(tmp_path):
    labels = np.arange(200) % 5
    parts = dirichlet(labels, 4, np.float32(0.5), min_size=5, seed=3)
    made = card(labels, parts, scheme='dirichlet', settings=dict(alpha=np.float32(0.5), min_size=5, n_clients=np.int64(4)), seed=3, classes=np.array(list('abcde')))
    assert load_card(save_card(tmp_path/'card.json', made)) == made
    check_card(made, torch.tensor(labels), [p.tolist() for p in parts])
    counts = class_counts(labels, parts, 5)
    q = counts / counts.sum(1, keepdims=True)
    bits = [-sum(x*math.log2(x) for x in row if x) for row in q]
    assert np.allclose(made['label_entropy_bits'], bits, atol=1e-6) and np.allclose(made['effective_classes'], effective_classes(counts), atol=1e-6)
    assert made['label_distance'] == pytest.approx(label_distance(counts), abs=1e-6) and made['sizes'] == [len(p) for p in parts]
    again = dirichlet(labels, seed=made['seed'], **made['settings'])
    assert partition_hash(again) == made['hash']

def test_a_card_and_a_partition_that_do_not_belong_together():
    labels = np.arange(40) % 4
    parts = iid(labels, 4, seed=0)
    made = card(labels, parts, scheme='iid', settings={'n_clients': 4}, seed=0, classes=list('abcd'))
    check_card(made, labels, parts)
    with pytest.raises(InputError, match='the partition has the hash .* and its card .* make it again with iid, settings .* seed 0'): check_card(made, labels, parts[::-1])
    with pytest.raises(InputError, match='reaches position 39, but there are only 39 labels'): check_card(made, labels[:-1], parts)
    with pytest.raises(InputError, match='of the classes, its card says'): check_card(made, (labels + 1) % 4, parts)

@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"scheme": "iid"}', '\xff'])
def test_a_broken_card(tmp_path, text):
    (tmp_path/'card.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError, match='partition card .*card.json.* (cannot be read|is not whole)'): load_card(tmp_path/'card.json')

def test_what_a_card_cannot_hold():
    labels = [0, 1, 0]
    with pytest.raises(InputError, match='client 1 holds no sample'): card(labels, [np.arange(3), np.arange(0)], scheme='x', settings={}, seed=0, classes='ab')
    for bad in ({'f': len}, {'alpha': float('inf')}):
        with pytest.raises(InputError, match='cannot be written as JSON'): card(labels, [np.arange(3)], scheme='x', settings=bad, seed=0, classes='ab')
