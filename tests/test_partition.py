"Partitions: properties over many label arrays, the limits, and every way to ask for the impossible."
import time

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from fedsq_nb.core import InputError
from fedsq_nb.partition import class_counts, cut, deal, dirichlet, effective_classes, heat_map, iid, label_distance, partition_hash

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

@pytest.mark.parametrize('alpha', [0, -0.1, float('nan'), float('inf'), '0.1', None, True, np.array([1., 2.])])
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
