"The house breathes: short lines, small cells, one thought at a time, and figures that are there."
import importlib.util, re, statistics
from pathlib import Path

import pytest

top = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('figures', top/'.ci/figures.py')
F = importlib.util.module_from_spec(spec)
spec.loader.exec_module(F)

CELLS = list(F.cells(top))
EXPORTED = [(nb, source) for nb, kind, source, _ in CELLS if kind == 'code' and F.is_exported(source)]
ROOMS = sorted({nb for nb, _ in EXPORTED})
FIGURE = r'(?<![\w.])(curves|contact_sheet|heat_map|plot_\w+|gate_maps|partition_maps)\(|\.imshow\(|plt\.subplots\('


def exported(room): return [source for nb, source in EXPORTED if nb == room]


@pytest.mark.parametrize('room', ROOMS)
def test_no_line_is_over_120_characters(room):
    assert not [line for source in exported(room) for line in source.splitlines() if len(line) > 120]


@pytest.mark.parametrize('room', ROOMS)
def test_no_comprehension_within_another(room):
    assert not [source[:200] for source in exported(room) if F.nested_comprehensions(F.parsed(source))]


@pytest.mark.parametrize('room', ROOMS)
def test_one_comprehension_or_condition_a_line(room):
    found = [(source.splitlines(), F.crowded_lines(F.parsed(source))) for source in exported(room)]
    assert not [lines[n - 1] for lines, numbers in found for n in numbers]


@pytest.mark.parametrize('room', ROOMS)
def test_exported_cells_have_at_most_35_lines(room):
    assert not [source[:200] for source in exported(room) if len(F.code_lines(source)) > 35]


def test_exported_cells_are_small():
    sizes = [len(F.code_lines(source)) for _, source in EXPORTED]
    assert statistics.median(sizes) <= 8 and F.percentile(sizes, 0.9) <= 20


@pytest.mark.parametrize('room', ROOMS)
def test_one_patched_method_a_cell(room):
    assert not [source[:200] for source in exported(room) if len(re.findall(r'(?m)^@patch\b', source)) > 1]


@pytest.mark.parametrize('path', sorted((top/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_a_cell_that_should_show_a_figure_stores_one(path):
    import json
    bare = []
    for c in json.loads(path.read_text())['cells']:
        source = ''.join(c['source'])
        called = re.sub(r'(?s)lambda[^\n]*|test_\w+\([^\n]*|(?m:^\s*(def|from|import) [^\n]*)', '', source)
        if c['cell_type'] != 'code' or source.startswith('#|') or not re.search(FIGURE, called): continue
        if not any('image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in c['outputs']): bare.append(source[:200])
    assert not bare
