"The house stands: imports go down only, fastai enters at `learner`, and module, notebook and settings agree."
import ast, configparser, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

top = Path(__file__).resolve().parent.parent
notebooks = sorted((top/'nbs').glob('[0-9]*.ipynb'))
level = {nb.stem.split('_', 1)[1]: int(nb.stem.split('_', 1)[0]) for nb in notebooks}
modules = sorted(p for p in (top/'fedsq_nb').glob('*.py') if not p.name.startswith('_'))


def imports(path):
    "Absolute names of everything `path` imports, wherever in the file."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from ((a.name, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"fedsq_nb{'.' + node.module if node.module else ''}" if node.level else node.module
            yield from ((base, a.name) for a in node.names)


def test_every_notebook_has_its_module():
    assert {p.stem for p in modules} == set(level)


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_imports_go_to_lower_numbers_only(path):
    for module, name in imports(path):
        assert name != '*', f'{path.stem} imports * from {module}'
        if module.startswith('fedsq_nb.'):
            assert level[module.split('.')[1]] < level[path.stem], f'{path.stem} imports {module}'


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_outside_libraries_enter_where_the_architecture_says(path):
    used = {m.split('.')[0] for m, _ in imports(path)}
    assert 'flwr' not in used and 'ray' not in used
    if level[path.stem] < level['learner'] or path.stem in ('aggregate', 'federate', 'report'): assert 'fastai' not in used


def test_the_lower_floors_run_without_fastai():
    "Not only by name: importing the server's side and the gates loads no fastai at all."
    code = 'import sys, fedsq_nb.federate, fedsq_nb.dualcopy, fedsq_nb.backbones; sys.exit(any(m.split(".")[0] == "fastai" for m in sys.modules))'
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
    for path in (tmp_path/'fedsq_nb').glob('[a-z]*.py'): path.unlink()
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, check=True, capture_output=True)
    for path in (top/'fedsq_nb').glob('*.py'): assert (tmp_path/'fedsq_nb'/path.name).read_text() == path.read_text(), path.name
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
