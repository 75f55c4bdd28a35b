"Intervals, tests and what is reached when, against plain numpy and by the numbers that textbooks give."
import itertools, math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import bootstrap

from fedsq_nb.core import InputError, rng
from fedsq_nb.study.statistics import (area_under_curve, bootstrap_interval, first_reached, holm, median_reached,
                                       paired_differences, sign_flip_p, smallest_p, verdicts)

fast = settings(max_examples=60, deadline=None)
# whole numbers: sums are exact, so ties between sign patterns are ties for everybody
whole = st.lists(st.integers(-50, 50), min_size=1, max_size=9)


@fast
@given(whole)
def test_sign_flips_are_all_counted(d):
    total = abs(sum(d))
    patterns = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
    want = np.mean([s >= total for s in patterns]) if len(d) > 1 else 1.
    assert sign_flip_p(d) == pytest.approx(want)
    assert sign_flip_p(d) >= smallest_p(len(d))


@fast
@given(whole, st.floats(.1, 10))
def test_a_p_value_knows_neither_sign_nor_unit(d, unit):
    assert sign_flip_p([-x for x in d]) == pytest.approx(sign_flip_p(d))
    assert sign_flip_p([2 * x for x in d]) == pytest.approx(sign_flip_p(d))


def test_fishers_own_example():
    "Darwin's fifteen pairs of maize: Fisher (1935, section 21) counts 1,726 of 32,768 patterns in both tails."
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert sign_flip_p(maize) == pytest.approx(1726 / 2**15)


def test_more_pairs_than_can_be_counted_are_refused():
    with pytest.raises(InputError, match='21 pairs have too many'): sign_flip_p([1.] * 21)


@pytest.mark.parametrize('n', [4, 8, 15])
def test_the_interval_is_scipys_and_repeats(n):
    x = rng(1, 'interval', n).normal(2, 1, size=n)
    want = bootstrap((x,), np.mean, method='BCa', n_resamples=9999, rng=rng(0, 'bootstrap')).confidence_interval
    assert bootstrap_interval(x) == (want.low, want.high) == bootstrap_interval(x)
    assert bootstrap_interval(x, level=.5)[0] > want.low
    if n > 4: assert bootstrap_interval(x, seed=1) != (want.low, want.high)


def test_an_interval_of_equal_pairs_and_of_too_few():
    assert bootstrap_interval([2., 2., 2.]) == (2., 2.)
    assert all(math.isnan(end) for end in bootstrap_interval([2.]) + bootstrap_interval([]))
    with pytest.raises(InputError, match='level'): bootstrap_interval([1., 2.], level=0.)


@fast
@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_is_monotone_and_no_smaller_than_it_was(p):
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p)) and all(a <= 1 for a in adjusted)
    order = np.argsort(p, kind='stable')
    assert all(adjusted[a] <= adjusted[b] for a, b in zip(order, order[1:]))
    if p: assert min(adjusted) == pytest.approx(min(1., min(p) * len(p)))


def test_holms_table():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])


def test_a_claim_needs_both_and_pays_for_its_company():
    clear = [2., 2.1, 1.9, 2.2, 2., 1.8, 2.1, 2.]
    assert verdicts({'a': clear})['a'].told_apart
    assert not verdicts({'a': clear[:5]})['a'].told_apart  # five seeds cannot
    crowd = {'a': clear} | {f'noise {i}': rng(0, i).normal(size=8) for i in range(9)}
    assert not verdicts(crowd)['a'].told_apart  # ten comparisons: 10 x 2/256 > 0.05
    assert verdicts(crowd)['a'].p == pytest.approx(10 * 2 / 2**8)


def test_verdicts_of_nothing_and_of_one_pair():
    found = verdicts({'none': [], 'one': [3.]})
    assert str(found['none']) == 'no pair' and 'nothing can be said' in str(found['one'])
    assert not found['none'].told_apart and not found['one'].told_apart


@fast
@given(st.dictionaries(st.integers(0, 9), st.one_of(st.none(), st.just(math.nan), st.floats(0, 1))),
       st.dictionaries(st.integers(0, 9), st.floats(0, 1)))
def test_pairs_are_those_that_both_have(ours, theirs):
    d = paired_differences(ours, theirs)
    want = [ours[s] - theirs[s] for s in sorted(theirs) if ours.get(s) is not None and not math.isnan(ours.get(s, math.nan))]
    assert d.tolist() == want


@fast
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1), st.floats(0, 1))
def test_the_first_that_is_high_enough(values, target):
    at = first_reached(values, target)
    if at == math.inf: assert all(v is None or v < target for v in values)
    else: assert values[int(at)] >= target and all(v is None or v < target for v in values[:int(at)])


@fast
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 9))
def test_the_median_of_runs_that_did_not_all_get_there(firsts, lost):
    censored = [float(f) for f in firsts] + [math.inf] * lost
    got = median_reached(censored)
    big = np.median([f if f < math.inf else 1e9 for f in censored])
    assert got == big if big < 1e8 else got == math.inf
    with pytest.raises(InputError): median_reached([])


@fast
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_area_is_a_mean_height(values):
    area = area_under_curve(values)
    assert min(values) - 1e-12 <= area <= max(values) + 1e-12
    assert area == pytest.approx(sum((a + b) / 2 for a, b in zip(values, values[1:])) / (len(values) - 1))
