"The report: statistics against an independent oracle, honesty about divergence and partial runs, and a page that stands alone."
import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsq_nb.core import InputError
from fedsq_nb.study import figures, folder, report, summary, tables

R = SimpleNamespace(**{name: getattr(room, name) for room in (folder, summary, tables, figures, report) for name in room.__all__})

T975 = {2: 12.706204736, 3: 4.302652730, 4: 3.182446305, 5: 2.776445105}  # printed tables of Student's t, by number of values
SITES = ['conv1.relu', 'block.relu', 'block.relu@2']

def row(method, seed, round, val, test=None, **kw):
    dead = val is None
    return dict(method=method, seed=seed, round=round, lr=.01, val_accuracy=val, val_loss=None if dead else 1 - val,
        test_accuracy=None if dead else val - .01 if test is None else test, test_loss=None if dead else 1 - val,
        train_loss=None if dead or not round else 1 - val, bytes_up=1000 * (round > 0), bytes_down=2000 * (round > 0), seconds=.5,
        clients_ok=0 if dead else 2, clients_failed=2 if dead else 0,
        failures=[dict(client=k, reason='w holds <NaN>') for k in range(2)] if dead else [], drift=None,
        gate_disagreement={} if dead else {s: .01 * round * (i + 1) for i, s in enumerate(SITES)}, state='diverged' if dead else 'ok') | kw

def run(method, seed, vals, start=.1): return [row(method, seed, t, v) for t, v in enumerate([start, *vals])]

accuracy = st.integers(0, 1000).map(lambda k: k / 1000)
histories = st.integers(1, 5).flatmap(lambda n: st.integers(1, 5).flatmap(lambda t: st.lists(
    st.tuples(*[st.lists(accuracy, min_size=t, max_size=t)] * 2), min_size=n, max_size=n)))

def two_methods(h): return [r for s, (a, b) in enumerate(h) for r in run('fedavg', s, a) + run('fedsq', s, b)]

def oracle(x, low=-np.inf, high=np.inf):
    "Student's interval, cut where no mean can lie."
    x, n = np.array(x), len(x)
    mean = sum(x) / n
    if n == 1: return mean, np.nan, np.nan
    half = T975[n] * np.sqrt(sum((x - mean) ** 2) / (n - 1)) / np.sqrt(n)
    return mean, max(mean - half, low), min(mean + half, high)

def write(folder, rows, cut=0, **files):
    text = ''.join(json.dumps(r) + '\n' for r in rows)
    (folder/'rounds.jsonl').write_text(text[:len(text) - cut])
    for name, content in files.items(): (folder/name.replace('__', '.')).write_text(content)
    return folder

@settings(max_examples=40, deadline=None)
@given(histories)
def test_means_intervals_and_paired_differences_match_the_oracle(h):
    s = R.summary(pd.DataFrame(two_methods(h))).set_index('method')
    a, b = [max(x) for x, _ in h], [max(y) for _, y in h]
    for line, name, want, low in [('fedavg', 'best_val', a, 0), ('fedsq', 'best_val', b, 0), ('fedsq', 'diff_val', np.subtract(b, a), -1)]:
        got = [s.loc[line, name + end] for end in ('', '_lo', '_hi')]
        np.testing.assert_allclose(np.array(got, float), oracle(want, low, 1), atol=1e-7)
    assert s.loc['fedsq', 'pairs'] == len(h) and np.isnan(s.loc['fedavg', 'diff_val'])

@settings(max_examples=40, deadline=None)
@given(st.lists(accuracy, min_size=1, max_size=12))
def test_best_is_the_first_maximum_after_the_start(vals):
    one = R.per_seed(pd.DataFrame(run('fedavg', 0, vals, start=1.))).iloc[0]
    assert one.best_val == max(vals) and one.best_round == 1 + vals.index(max(vals))
    assert one.rounds_to_99 == 1 + next(i for i, v in enumerate(vals) if v >= .99 * max(vals)) <= one.best_round
    assert one.last_val == vals[-1] and one.bytes_up == 1000 and one.seconds == .5 * (len(vals) + 1)

@settings(max_examples=15, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(h, random):
    rows = two_methods(h)
    mixed = rows[:]
    random.shuffle(mixed)
    tables = [R.summary(pd.DataFrame(r)).set_index('method').loc[['fedavg', 'fedsq']] for r in (rows, mixed)]
    pd.testing.assert_frame_equal(*tables)
    seeds = [R.per_seed(pd.DataFrame(r)).sort_values(['method', 'seed'], ignore_index=True) for r in (rows, mixed)]
    pd.testing.assert_frame_equal(*seeds)

def test_test_accuracy_never_selects():
    rows = [row('fedavg', 0, 0, .1), row('fedavg', 0, 1, .8, test=.2), row('fedavg', 0, 2, .7, test=.99)]
    assert R.per_seed(pd.DataFrame(rows)).test_at_best[0] == .2

def test_first_round_bytes_stand_apart():
    rows = [row('fedsq', 0, 0, .1), row('fedsq', 0, 1, .5, bytes_down=5000), row('fedsq', 0, 2, .6)]
    one = R.per_seed(pd.DataFrame(rows)).iloc[0]
    assert (one.bytes_down_first, one.bytes_down) == (5000, 3500)

@settings(max_examples=25, deadline=None)
@given(histories, st.data())
def test_a_method_with_a_diverged_seed_has_no_means(h, data):
    seed, method = data.draw(st.integers(0, len(h) - 1)), data.draw(st.sampled_from(['fedavg', 'fedsq']))
    last = len(h[0][0])
    rows = [r for r in two_methods(h) if (r['method'], r['seed'], r['round']) != (method, seed, last)] + [row(method, seed, last, None)]
    s = R.summary(pd.DataFrame(rows)).set_index('method')
    assert s.loc[method, R.MEASURES].isna().all() and s.loc[method, 'note'] == f'diverged in 1 of {len(h)} seeds, first at round {last}'
    assert s.loc[['fedavg', 'fedsq'], ['diff_val', 'diff_test']].isna().all(axis=None)
    other = {'fedavg': 'fedsq', 'fedsq': 'fedavg'}[method]
    assert s.loc[other, 'best_val'] == pytest.approx(np.mean([max(x[other == 'fedsq']) for x in h]))
    assert 'diverged' in R.table(pd.DataFrame(rows)).set_index('method').loc[method, 'best val %']

def test_a_diverged_run_is_a_cross_and_not_a_low_accuracy():
    rows = pd.DataFrame(run('fedavg', 0, [.5, .6, None]) + run('fedavg', 1, [.5, .7, .8]) + run('fedsq', 0, [None]))
    lines = R.curves(rows).axes[0].lines
    crosses = [(l.get_xdata()[0], l.get_ydata()[0]) for l in lines if l.get_marker() == 'X']
    assert crosses == [(2, .6), (0, .1)]
    mean = next(l for l in lines if l.get_label().startswith('fedavg'))
    assert np.isnan(mean.get_ydata()[3]) and mean.get_ydata()[2] == pytest.approx(.65)
    assert [l.get_marker() for l in R.curves(rows[rows.method == 'fedsq'], 'train_loss').axes[0].lines].count('X') == 1

def test_unequal_runs_are_not_paired():
    rows = pd.DataFrame(run('fedavg', 0, [.5, .9]) + run('fedsq', 0, [.6]))
    s = R.summary(rows).set_index('method')
    assert s.loc['fedsq', 'pairs'] == 0 and np.isnan(s.loc['fedsq', 'diff_val'])
    assert 'No seed allows a paired comparison' in R.headline(rows)

@pytest.mark.parametrize('cut', [1, 2, 40, 300])
def test_a_last_line_that_was_cut_is_ignored(tmp_path, cut):
    rows = run('fedavg', 0, [.5, .6])
    whole, got = R.read_rows(write(tmp_path, rows)), R.read_rows(write(tmp_path, rows, cut=cut))
    assert len(got) == (3 if cut == 1 else 2)  # without its newline alone, the row is whole
    pd.testing.assert_frame_equal(got[['round', 'val_accuracy']], whole[['round', 'val_accuracy']][:len(got)])

def test_a_cut_inside_a_character_is_ignored(tmp_path):
    write(tmp_path, run('fedavg', 0, [.5]))
    with open(tmp_path/'rounds.jsonl', 'ab') as f: f.write('{"method": "fedé'.encode()[:-1])
    assert len(R.read_rows(tmp_path)) == 2

def test_a_repeated_round_counts_once_as_last_written(tmp_path):
    rows = R.read_rows(write(tmp_path, run('fedavg', 0, [.5]) + [row('fedavg', 0, 1, .7)]))
    assert rows.val_accuracy.tolist() == [.1, .7]

@pytest.mark.parametrize('text, message', [
    (None, 'has no rounds.jsonl'), ('', 'no complete row'), ('{"method": "fed', 'no complete row'),
    ('{"a": 1}\n', "rows have no 'method'"), ('{"a"\n{"a": 1}\n', 'line 1 is not JSON')])
def test_unusable_folders_are_refused_and_get_no_page(tmp_path, text, message):
    if text is not None: (tmp_path/'rounds.jsonl').write_text(text)
    with pytest.raises(InputError, match=message): R.report(tmp_path)
    assert not (tmp_path/'report.html').exists()

def test_headlines_for_thin_evidence():
    head = lambda *rows, **kw: R.headline(pd.DataFrame(sum(rows, [])), **kw)
    assert 'one seed settles nothing' in head(run('fedavg', 0, [.5]), run('fedsq', 0, [.9]))
    assert 'no other method to rank' in head(run('fedavg', 0, [.5]))
    assert 'There is no mean of fedavg' in head(run('fedsq', 0, [.5]), run('fedprox', 0, [.4]))
    assert 'No method can be ranked' in head(run('fedsq', 0, [None])) and 'diverged in 1 of 1' in head(run('fedsq', 0, [None]))
    assert 'No round has been trained yet' in head(run('fedsq', 0, []))
    clear = sum((run('fedavg', s, [.5]) + run('fedsq', s, [.6 + .001 * s]) for s in range(3)), [])
    assert 'excludes zero' in head(clear) and head(clear).startswith('fedsq')
    assert 'fedavg against fedsq' in head(clear, baseline='fedsq')

def test_records_are_json_and_agree_with_the_summary():
    rows = pd.DataFrame(run('fedavg', 0, [.5]) + run('fedsq', 0, [None]))
    got = json.loads(json.dumps(R.records(rows), allow_nan=False))
    assert [(g['method'], g['best_val'], g['seeds']) for g in got] == [('fedavg', .5, 1), ('fedsq', None, 1)]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text('abc 0123456789.,[]|', max_size=45), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(30, 120))
def test_text_tables_fit_and_lose_no_character(cells, width):
    df = pd.DataFrame(cells, columns=['method', 'b', 'c', 'd'])
    lines = R.one_table(df, width).split('\n')
    assert max(map(len, lines)) <= width
    bare = lambda s: sorted(s.replace(' ', ''))
    assert bare(''.join(l for l in lines if set(l) != {'-'})) == bare(''.join(df.columns) + ''.join(sum(cells, [])))

@given(st.floats(1, 9e14))
def test_human_bytes_is_right_to_three_digits(n):
    value, unit = R.human_bytes(n).split()
    assert float(value) * 1000 ** (1 + ['KB', 'MB', 'GB', 'TB'].index(unit)) == pytest.approx(n, rel=.0051)

class Page(HTMLParser):
    "Collects tags, addresses and text, and sees that every tag that opens is closed."
    void = {'meta', 'img', 'br'}
    def __init__(self, text):
        super().__init__()
        self.stack, self.links, self.tags, self.text = [], [], [], ''
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ('src', 'href')]
        if tag not in self.void: self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop() == tag
    def handle_data(self, data): self.text += data

EVIL = '<b>"x" & \'y\'</b>'

def full(tmp_path):
    rows = [r for s in range(2) for m, vals in [('fedavg', [.5, .6]), (EVIL, [.5, None]), ('fedsq', [.5, .7])] for r in run(m, s, vals)]
    grid = [dict(method=m, lr=lr, round=1, val_accuracy=.5, state='ok', chosen=lr == c) for m, c in [('fedavg', .1), (EVIL, .01)] for lr in (.001, .01, .1)]
    return write(tmp_path, rows, calibration__jsonl=''.join(json.dumps(g) + '\n' for g in grid),
                 config__toml='data = "<script>alert(1)</script>"\nrounds = 2\nseeds = [0, 1]\nclients = 2\n[rates]\nfedavg = 0.01\n',
                 partition__json=json.dumps(dict(classes=[EVIL, 'two'], counts={'0': [[1, 2], [3, 4]], '1': [[0, 0], [3, 4]]}, hash={})))

def test_the_page_stands_alone_parses_and_escapes(tmp_path):
    text = R.report(full(tmp_path)).read_text()
    page = Page(text)
    assert page.stack == [] and 'script' not in page.tags and 'b' not in page.tags and 'link' not in page.tags
    assert len(page.links) == 3 and all(l.startswith('data:image/png;base64,') for l in page.links)
    assert '://' not in text and '@import' not in text and 'url(' not in text
    assert EVIL in page.text and 'w holds <NaN>' in page.text and '<script>alert(1)</script>' in page.text
    assert 'fedavg: the chosen rate 0.1 is the largest of its grid' in page.text and f'{EVIL}: the chosen rate' not in page.text
    assert f'{EVIL}, seed 0, at round 2' in page.text and 'not complete' not in page.text

def test_the_page_is_the_same_each_time(tmp_path):
    full(tmp_path)
    assert R.report(tmp_path).read_bytes() == R.report(tmp_path).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['calibration.jsonl', 'config.toml', 'partition.json', 'report.html', 'rounds.jsonl']

@pytest.mark.parametrize('rows', [run('fedsq', 0, []), run('fedsq', 0, [.5]), run('fedsq', 0, [None]), run('fedavg', 0, [.5]) + run('fedsq', 0, [])],
                         ids=['only the start', 'one method and seed', 'diverged at once', 'second method not begun'])
def test_partial_folders_get_a_page_that_says_what_is_missing(tmp_path, rows):
    page = Page(R.report(write(tmp_path, rows)).read_text())
    assert 'partition.json is missing' in page.text and 'config.toml is missing' in page.text and 'No calibration is stored' in page.text

def test_damaged_side_files_are_named(tmp_path):
    write(tmp_path, run('fedavg', 0, [.5]), partition__json='{', config__toml='= 3')
    page = Page(R.report(tmp_path).read_text())
    assert 'partition.json cannot be read' in page.text and 'config.toml is missing or cannot be read' in page.text

def test_missing_counts_seeds_and_rounds_but_not_divergence(tmp_path):
    write(tmp_path, run('fedavg', 0, [.5, .6]) + run('fedavg', 1, [.5]) + run('fedsq', 0, [None]),
          config__toml='rounds = 2\nseeds = 2\nmethods = "fedavg, fedprox,fedsq"', partition__json='{}')
    assert R.missing(tmp_path) == ['fedsq: 1 of 2 seeds', 'fedprox: 0 of 2 seeds', 'fedavg, seed 1: 1 of 2 rounds']

def test_gate_maps_keep_the_order_of_the_network_and_one_scale():
    rows = pd.DataFrame(run('fedavg', 0, [.5, .6]) + run('fedsq', 0, [.5, .6]) + run('fedsq', 1, [.5, None]))
    fig = R.gate_maps(rows)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == SITES
    images = [ax.collections[0] for ax in fig.axes[:2]]
    assert {i.get_clim() for i in images} == {(0, .06)}
    assert np.ma.getmaskarray(images[1].get_array())[:, 2].all() and not np.ma.getmaskarray(images[1].get_array())[:, 1].any()

def test_an_edge_is_seen_only_at_an_edge():
    grid = lambda chosen, rates: pd.DataFrame([dict(method='m', lr=r, val_accuracy=.5, diverged=r == .1, chosen=r == chosen) for r in rates])
    assert R.edge_warnings(grid(.01, [.1, .001, .01])) == []
    assert 'smallest' in R.edge_warnings(grid(.001, [.1, .001, .01]))[0]
    assert 'only' in R.edge_warnings(grid(.01, [.01]))[0]

def test_an_interval_ends_where_the_measure_ends():
    "Two seeds, eight rounds: no accuracy beyond 0 to 100%, no round before the first or after the last, and every cut is marked."
    rows = pd.DataFrame(run('fedavg', 0, [.99, *[.2] * 7]) + run('fedavg', 1, [.1, *[.2] * 6, .3]))
    s = R.summary(rows).iloc[0]
    assert (s.best_val_lo, s.best_val_hi, s.best_val_cut_lo, s.best_val_cut_hi) == (0, 1, True, True)
    assert (s.best_round_lo, s.best_round_hi) == (1, 8)
    line = R.table(rows).iloc[0]
    assert line['best val %'] == '64.5 [0.0\u2020, 100.0\u2020]' and line['at round'] == '4.5 [1\u2020, 8\u2020]'
    assert any(note.startswith('\u2020') for note in R.notes(rows))

def test_an_end_that_was_reached_and_not_cut_is_not_marked():
    rows = pd.DataFrame(run('fedavg', 0, [.5, .6]) + run('fedavg', 1, [.5, .6]))
    assert R.table(rows).iloc[0]['at round'] == '2.0 [2, 2]' and not any(n.startswith('\u2020') for n in R.notes(rows))

@settings(max_examples=40, deadline=None)
@given(histories)
def test_every_interval_lies_within_its_bounds(h):
    s = R.summary(pd.DataFrame(two_methods(h)))
    for name, (low, high) in {'best_val': (0, 1), 'last_val': (0, 1), 'best_round': (1, len(h[0][0])), 'diff_val': (-1, 1)}.items():
        ends = s[[f'{name}_lo', f'{name}_hi']].to_numpy(float)
        assert np.all((ends >= low) & (ends <= high) | np.isnan(ends))

THREE = pd.DataFrame([r for s in range(3) for m, v in [('fedavg', [.5, .6]), ('fedsq_random+fedadam', [.9, .2 * s]), ('moon', [.5, None])]
                      for r in run(m, s, v)])

@pytest.mark.parametrize('width', [80, 120, 200])
def test_a_table_fits_the_terminal_and_breaks_no_interval_and_no_name(width, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(width))
    df = R.table(THREE)
    text = R.text_table(df)
    assert max(map(len, text.split('\n'))) <= width
    for cell in df.to_numpy().ravel():
        pieces = [cell] if cell.startswith('diverged') else cell.split(' [')
        assert cell.startswith('diverged') or all(piece in text for piece in pieces), cell
    assert (text.count('fedsq_random+fedadam') == 1) == (width == 200)  # in each of several tables

EXTRA = dict(gap=.5, gap_crossing=.25, clients_before=.8, clients_before_worst=.6, clients_after=.7, clients_after_worst=.3)

def test_what_averaging_does_is_shown_when_it_was_measured(tmp_path):
    rows = [r | (EXTRA if r['round'] else {}) for m in ('fedavg', 'fedsq') for r in run(m, 0, [.5, .6])]
    df = pd.DataFrame(rows)
    assert R.averaging(df).loc['fedsq'].to_dict() == EXTRA
    told = next(n for n in R.notes(df) if n.startswith('fedsq:'))
    assert all(t in told for t in ('gap 0.5', 'flipped gates 0.25', '80.0%', '60.0%', '70.0%', '30.0%'))
    assert len(R.averaging_curves(df).axes) == 6
    page = Page(R.report(write(tmp_path, rows)).read_text())
    assert 'What averaging does' in page.text and told in page.text
    plain = pd.DataFrame(run('fedavg', 0, [.5]))
    assert R.averaging_notes(plain) == [] and R.averaging_part(plain) == []

def test_a_partition_is_named_with_its_own_settings_only(tmp_path):
    config = 'data = "digits"\nclients = 10\nalpha = 0.1\nclasses_per_client = 2\npartition = "{}"\n'
    pages = {kind: Page(R.report(write(tmp_path, run('fedavg', 0, [.5]), config__toml=config.format(kind))).read_text()).text.split('Results')[0]
             for kind in ('iid', 'dirichlet', 'shards')}
    assert 'partition iid' in pages['iid'] and 'alpha' not in pages['iid']
    assert 'alpha 0.1' in pages['dirichlet'] and 'classes_per_client' not in pages['dirichlet']
    assert 'classes_per_client 2' in pages['shards'] and 'alpha' not in pages['shards']

def test_every_partition_has_a_line_saying_what_it_looks_at():
    from fedsq_nb.study.settings import PARTITIONS
    assert set(R.PARTITION_SETTINGS) == set(PARTITIONS)

def test_failures_have_a_kind_and_only_rows_without_one_are_read_for_it():
    bad = [dict(client=0, kind='error', reason='disk quota is finite, but it is not finite enough'), dict(client=1, reason='loss is not finite'),
           dict(client=2, reason='dropped out (simulated)'), dict(client=3, reason="w has shape (2,), expected (3,)")]
    assert R.failures(pd.DataFrame([row('fedavg', 0, 1, .5, failures=bad)])).kind.tolist() == ['error', 'diverged', 'absent', 'invalid']

def test_names_are_text_and_no_formulas(tmp_path):
    evil = '$x^{$'
    rows = [r | dict(gate_disagreement={evil: .1}) for m in (evil, 'fedavg') for r in run(m, 0, [.5, .6])]
    write(tmp_path, rows, partition__json=json.dumps(dict(classes=[evil, 'two'], counts={'0': [[1, 2], [3, 4]]})))
    assert Page(R.report(tmp_path).read_text()).text.count(evil) > 0
    for fig in (R.curves(pd.DataFrame(rows)), R.gate_maps(pd.DataFrame(rows)), R.partition_maps(tmp_path)): assert fig._repr_png_()

def test_any_number_of_methods_can_be_told_apart():
    from fedsq_nb.study.methods import METHODS
    for names in (list(METHODS), [f'method {i}' for i in range(300)]):
        styles = R.method_styles(names)
        assert len({str(s) for s in styles.values()}) == len(names)
    few, many = R.method_styles(['moon', 'fedsq+fedadam']), R.method_styles(METHODS)
    assert few['moon'] != few['fedsq+fedadam']
    for name in few: assert {k: few[name][k] for k in ('color', 'linestyle')} == {k: many.get(name, few[name])[k] for k in ('color', 'linestyle')}

def test_a_curve_under_another_is_wider_than_it():
    rows = pd.DataFrame([r for m in ('fedavg', 'fedprox', 'moon') for r in run(m, 0, [.5, .6])])
    widths = [line.get_linewidth() for line in R.curves(rows).axes[0].lines]
    assert len(widths) == 3 and widths == sorted(widths, reverse=True) and len(set(widths)) == 3

@pytest.mark.parametrize('before', ['', 'import matplotlib.pyplot as plt\n'])
def test_a_bare_figure_appears_once_in_a_new_notebook(tmp_path, before):
    import os, subprocess, sys
    from pathlib import Path
    write(tmp_path, run('fedavg', 0, [.5, .6]) + run('fedsq', 0, [.5, .7]), partition__json=json.dumps(dict(counts={'0': [[1, 2], [3, 4]]})))
    sources = [before + f'from fedsq_nb.study.folder import read_rows\nfrom fedsq_nb.study.figures import *\nrows = read_rows({str(tmp_path)!r})',
               'curves(rows)', 'gate_maps(rows)', f'partition_maps({str(tmp_path)!r})', 'curves(rows).show()', 'figure = curves(rows)']
    cell = lambda s: dict(cell_type='code', id=f'c{abs(hash(s))}', metadata={}, source=s, outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path/'new.ipynb').write_text(json.dumps(dict(cells=list(map(cell, sources)), metadata=kernel, nbformat=4, nbformat_minor=5)))
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    script = Path(sys.executable).with_name('exec_nb')
    subprocess.run([sys.executable, str(script), 'new.ipynb', '--dest', 'done.ipynb'], cwd=tmp_path, env=env, check=True, capture_output=True)
    cells = json.loads((tmp_path/'done.ipynb').read_text())['cells']
    assert not [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    assert [sum('image/png' in o.get('data', {}) for o in c['outputs']) for c in cells] == [0, 1, 1, 1, 1, 0]

# ---- what the run was made from, and names of any kind

SITTING = dict(python='3.11.7', torch='2.7.1', fedsq_nb='0.1', threads=1, processor='x86_64', instruction_set='AVX2', device='cpu')
ORIGIN = dict(contents=dict(data='7f3a', network='19c4', classes=[EVIL, 'caf\udce9']), circumstances=[SITTING])

def test_the_page_names_what_the_run_was_made_from(tmp_path):
    text = Page(R.report(write(tmp_path, run('fedavg', 0, [.5]), made_from__json=json.dumps(ORIGIN))).read_text()).text
    assert all(fact in text for fact in ('7f3a', '19c4', '2.7.1', 'AVX2', 'x86_64', EVIL, 'caf\\udce9')) and 'other circumstances' not in text
    assert R.origin_text(ORIGIN) == 'images 7f3a, network 19c4, fedsq_nb 0.1, torch 2.7.1, python 3.11.7, threads 1, processor x86_64, instruction set AVX2'

def test_a_run_that_was_gone_on_with_elsewhere_says_so(tmp_path):
    moved = ORIGIN | dict(circumstances=[SITTING, SITTING | dict(threads=4, instruction_set='AVX512')])
    text = Page(R.report(write(tmp_path, run('fedavg', 0, [.5]), made_from__json=json.dumps(moved))).read_text()).text
    assert 'threads was 1 and is 4' in text and "instruction_set was 'AVX2' and is 'AVX512'" in text
    assert R.origin_text(moved).endswith('instruction set AVX512; gone on with in other circumstances')

@pytest.mark.parametrize('content, said', [(None, 'does not tell what it was made from'), ('{', 'damaged'), ('{"contents": 3}', 'damaged')])
def test_an_origin_that_is_absent_or_damaged_stops_no_page(tmp_path, content, said):
    more = {} if content is None else dict(made_from__json=content)
    assert said in Page(R.report(write(tmp_path, run('fedavg', 0, [.5]), **more)).read_text()).text

@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=12))
def test_a_name_of_any_kind_can_be_seen_and_stored(name):
    "Surrogates, control and direction marks among them; what can be seen already stays as it is."
    seen = R.visible(name)
    assert seen.isprintable() and seen.encode().decode() == seen and (seen == name) == name.isprintable()
    assert len(Page(f'<p>{R.escaped(name)}</p>').tags) == 1
    assert '\n' not in R.markdown_line([name])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), min_size=1, max_size=6), min_size=2, max_size=2))
def test_a_class_of_any_name_is_drawn(tmp_path_factory, classes):
    folder = write(tmp_path_factory.mktemp('names'), run('fedavg', 0, [.5]), partition__json=json.dumps(dict(classes=classes, counts={'0': [[1, 2], [3, 4]]})))
    assert R.partition_maps(folder)._repr_png_()

def test_a_picture_that_cannot_be_drawn_leaves_the_page(tmp_path, monkeypatch):
    def broken(rows): raise ValueError('a <font> is gone')
    monkeypatch.setattr(report, 'curves', broken)
    page = Page(R.report(full(tmp_path)).read_text())
    assert 'This picture could not be drawn' in page.text and 'ValueError: a <font> is gone' in page.text and len(page.links) == 2

@pytest.mark.parametrize('classes, columns', [(10, 3), (20, 1)])
def test_maps_of_many_classes_stand_below_one_another(tmp_path, classes, columns):
    counts = {str(s): [[250]*classes]*10 for s in range(3)}
    write(tmp_path, run('fedavg', 0, [.5]), partition__json=json.dumps(dict(classes=[f'a fairly long class name {i}' for i in range(classes)], counts=counts)))
    fig = R.partition_maps(tmp_path)
    fig._repr_png_()
    assert len({round(ax.get_position().x0, 1) for ax in fig.axes}) == columns
    numbers = [text.get_window_extent() for text in fig.axes[0].texts[:classes]]  # the first client's
    assert len(numbers) == classes and all(a.x1 < b.x0 for a, b in zip(numbers, numbers[1:])), 'numbers overlap'
