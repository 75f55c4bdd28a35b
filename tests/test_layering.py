"The house stands: imports go down and to the left only, fastai enters at `client.learner`, and module, notebook and settings agree."
import ast, configparser, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

top = Path(__file__).resolve().parent.parent
WINGS = ('core', 'data', 'gating', 'client', 'server', 'engine', 'study', 'flower', 'bench', 'top')
STRANGERS = {('server', 'client')}  # wings that know nothing of each other, though one stands left of the other
package = top/'fedsq_nb'
notebooks = sorted((top/'nbs').glob('[0-9]*.ipynb'))
level = {nb.stem.split('_', 1)[1]: int(nb.stem.split('_', 1)[0]) for nb in notebooks}
modules = sorted(p for p in package.rglob('*.py') if not p.name.startswith('_'))


def room(path):
    "The dotted name of a module within the package: 'server.aggregate'."
    return '.'.join(path.relative_to(package).with_suffix('').parts)


def wing(name):
    "The wing a room belongs to; what stands in the package itself is 'core' or 'top'."
    return name.split('.')[0] if '.' in name or name == 'core' else 'top'


def imports(path):
    "Absolute names of everything `path` imports, wherever in the file."
    here = ('fedsq_nb', *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from ((a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = '.'.join(here[:len(here) + 1 - node.level])
            base = '.'.join(filter(None, [above, node.module])) if node.level else node.module
            yield from ((base, a.name) for a in node.names)


def test_every_notebook_has_its_module():
    assert {room(p) for p in modules} == set(level)


def test_wings_stand_in_the_order_of_their_numbers():
    order = [WINGS.index(wing(name)) for name in sorted(level, key=level.get)]
    assert order == sorted(order)


@pytest.mark.parametrize('path', modules, ids=room)
def test_imports_go_to_lower_numbers_only(path):
    for module, name in imports(path):
        assert name != '*', f'{room(path)} imports * from {module}'
        if module.startswith('fedsq_nb.'):
            other = module.removeprefix('fedsq_nb.')
            assert level[other] < level[room(path)], f'{room(path)} imports {module}'
            assert (wing(room(path)), wing(other)) not in STRANGERS, f'{room(path)} imports {module}'


@pytest.mark.parametrize('path', modules, ids=room)
def test_outside_libraries_enter_where_the_architecture_says(path):
    used = {m.split('.')[0] for m, _ in imports(path)}
    if wing(room(path)) != 'flower': assert 'flwr' not in used and 'ray' not in used
    if level[room(path)] < level['client.learner'] or wing(room(path)) in ('server', 'engine') or room(path) in ('study.summary', 'study.tables', 'study.figures', 'study.report'): assert 'fastai' not in used


@pytest.mark.parametrize('name', sorted({wing(n) for n in level} - {'core', 'top'}))
def test_each_wing_can_be_imported_alone(name):
    "All rooms of one wing, in a fresh process, load no wing to their right."
    rooms = [n for n in level if wing(n) == name]
    right = WINGS[WINGS.index(name) + 1:-1]
    code = f'import sys, importlib\nfor n in {rooms}: importlib.import_module("fedsq_nb." + n)\n' \
           f'assert not [m for m in sys.modules if m.startswith("fedsq_nb.") and m.split(".")[1] in {right}]'
    out = subprocess.run([sys.executable, '-c', code], cwd=top, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_the_lower_floors_run_without_fastai():
    "Not only by name: importing the server's side and the gates loads no fastai at all."
    code = ('import sys, fedsq_nb.engine.federate, fedsq_nb.gating.dualcopy, fedsq_nb.client.backbones\n'
            'sys.exit(any(m.split(".")[0] == "fastai" for m in sys.modules))')
    assert subprocess.run([sys.executable, '-c', code], cwd=top).returncode == 0


def test_importing_has_no_side_effects():
    "No output, no change of numpy's or torch's random state, no thread setting. (fastai's own import draws from Python's `random`.)"
    names = ', '.join(f'fedsq_nb.{m}' for m in level)
    code = ('import numpy, torch; torch.manual_seed(1); numpy.random.seed(1)\n'
            'before = torch.get_rng_state().tolist(), str(numpy.random.get_state()), torch.get_num_threads()\n'
            f'import {names}\n'
            'assert before == (torch.get_rng_state().tolist(), str(numpy.random.get_state()), torch.get_num_threads())')
    out = subprocess.run([sys.executable, '-c', code], cwd=top, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, ''), out.stderr


def test_notebooks_modules_and_readme_agree(tmp_path):
    "Exporting a copy of the project changes no byte of the modules, and its README is the one that stands here."
    pytest.importorskip('nbdev')
    for name in ('nbs', 'fedsq_nb', '.ci'): shutil.copytree(top/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
    for name in ('settings.ini', 'setup.py'): shutil.copy(top/name, tmp_path/name)
    for path in (tmp_path/'fedsq_nb').rglob('[a-z]*.py'): path.unlink()
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, check=True, capture_output=True)
    for path in package.rglob('*.py'): assert (tmp_path/path.relative_to(top)).read_text() == path.read_text(), path.name
    subprocess.run([sys.executable, '.ci/readme.py'], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path/'README.md').read_text() == (top/'README.md').read_text()


@pytest.mark.parametrize('nb', sorted((top/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook_is_clean(nb):
    text = nb.read_text()
    cells = json.loads(text)['cells']
    assert len({c['id'] for c in cells}) == len(cells)
    assert not any(o['output_type'] == 'error' for c in cells for o in c.get('outputs', []))
    assert not re.search(r'/(root|home|work|tmp)/\w|site-packages', text), 'a path of some machine is stored in the notebook'
    assert nb.stat().st_size < 450_000


def test_one_version_number():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(top/'settings.ini')
    import fedsq_nb
    assert fedsq_nb.__version__ == ini['DEFAULT']['version']
    assert [p.name for p in top.rglob('*.py') if 'build' not in p.parts and re.search(r'(?m)^__version__ *=', p.read_text())] == ['__init__.py']
