"""The house breathes: short lines, small cells, one thought at a time, and figures that are there.

Rooms that do not breathe yet stand in breath_owed.json with what they owe. No room may owe more than is written there,
and what has been paid is struck off: `python tests/test_breath.py` writes the file anew."""
import importlib.util, json, re, statistics
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


def long_lines(room): return [line for source in exported(room) for line in source.splitlines() if len(line) > 120]


def nested(room): return [source for source in exported(room) for _ in F.nested_comprehensions(F.parsed(source))]


def crowded(room): return [line for source in exported(room) for line in F.crowded_lines(F.parsed(source))]


def long_cells(room): return [source for source in exported(room) if len(F.code_lines(source)) > 35]


def patched_together(room): return [s for s in exported(room) if len(re.findall(r'(?m)^@patch\b', s)) > 1]


RULES = {rule.__name__: rule for rule in (long_lines, nested, crowded, long_cells, patched_together)}


def sizes():
    "Code lines of the median exported cell and of the one at nine tenths."
    found = [len(F.code_lines(source)) for _, source in EXPORTED]
    return {'median': statistics.median(found), 'p90': F.percentile(found, 0.9)}


def owed():
    "By rule and room, how often the rule is broken."
    counts = {name: {room: len(rule(room)) for room in ROOMS} for name, rule in RULES.items()}
    return {name: {room: n for room, n in by_room.items() if n} for name, by_room in counts.items()} | {'sizes': sizes()}


OWED = Path(__file__).with_name('breath_owed.json')


@pytest.mark.parametrize('room', ROOMS)
@pytest.mark.parametrize('rule', RULES)
def test_no_room_owes_more_than_is_written_down(rule, room):
    assert len(RULES[rule](room)) <= json.loads(OWED.read_text())[rule].get(room, 0), RULES[rule](room)


def test_cells_are_no_larger_than_is_written_down():
    limit, now = json.loads(OWED.read_text())['sizes'], sizes()
    assert now['median'] <= max(8, limit['median']) and now['p90'] <= max(20, limit['p90']), now


def test_what_has_been_paid_is_struck_off():
    written, now = json.loads(OWED.read_text()), owed()
    assert {name: written[name] for name in RULES} == {name: now[name] for name in RULES}


@pytest.mark.parametrize('path', sorted((top/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_a_cell_that_should_show_a_figure_stores_one(path):
    bare = []
    for c in json.loads(path.read_text())['cells']:
        source = ''.join(c['source'])
        called = re.sub(r'(?s)lambda[^\n]*|test_\w+\([^\n]*|(?m:^\s*(def|from|import) [^\n]*)', '', source)
        if c['cell_type'] != 'code' or source.startswith('#|') or not re.search(FIGURE, called): continue
        if not any('image/png' in o.get('data', {}) or 'image/svg+xml' in o.get('data', {}) for o in c['outputs']): bare.append(source[:200])
    assert not bare


if __name__ == '__main__': OWED.write_text(json.dumps(owed(), indent=1) + '\n')
