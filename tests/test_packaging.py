"What is handed out is whole: the wheel built from the sdist holds every wing, its metadata and the mark that it is typed."
import configparser, email, json, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

import pytest

top = Path(__file__).resolve().parent.parent
BUILD = 'import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))'


def build(kind, source, target):
    "What setuptools builds from the folder `source`, without an environment of its own and without a network."
    done = subprocess.run([sys.executable, '-c', BUILD, f'build_{kind}', str(target)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target/done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('setuptools')
    work = tmp_path_factory.mktemp('packaging')
    source = work/'source'
    skip = shutil.ignore_patterns('.git', '__pycache__', '*.egg-info', 'build', 'dist', 'runs', 'results', '.pytest_cache', '.hypothesis')
    shutil.copytree(top, source, ignore=skip)
    sdist = build('sdist', source, work)
    with tarfile.open(sdist) as tar: tar.extractall(work/'unpacked', filter='data')
    unpacked, = (work/'unpacked').iterdir()
    return build('wheel', unpacked, work)


def test_the_wheel_of_the_sdist_holds_every_module(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(top).as_posix() for p in (top/'fedsq_nb').rglob('*.py')}
    assert modules - packed == set()
    wings = {p.parent.name for p in (top/'fedsq_nb').glob('*/__init__.py')}
    assert wings and all(f'fedsq_nb/{wing}/__init__.py' in packed for wing in wings)


def test_the_wheel_says_that_it_is_typed(wheel):
    assert 'fedsq_nb/py.typed' in zipfile.ZipFile(wheel).namelist()


def test_the_metadata_of_the_wheel_are_those_of_the_settings(wheel):
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(top/'settings.ini')
    cfg, packed = ini['DEFAULT'], zipfile.ZipFile(wheel)
    meta, = (n for n in packed.namelist() if n.endswith('.dist-info/METADATA'))
    told = email.message_from_bytes(packed.read(meta))
    assert (told['Name'], told['Version'], told['Summary']) == (cfg['lib_name'], cfg['version'], cfg['description'])
    needs = {need for need in told.get_all('Requires-Dist') if 'extra ==' not in need}
    assert {need.split('>')[0] for need in needs} == {need.split('>')[0] for need in cfg['requirements'].split()}
    assert told['Description'] or told.get_payload().startswith('# fedsq_nb')
    scripts = packed.read(meta.replace('METADATA', 'entry_points.txt')).decode()
    assert 'fedsq = fedsq_nb.cli:main' in scripts


def links(text): return [target for target in re.findall(r'\]\(([^)\s]+)\)', text) if '://' not in target and not target.startswith('#')]


def test_no_link_of_the_readme_is_broken():
    found = links((top/'README.md').read_text())
    assert found and [target for target in found if not (top/target).is_file()] == []


@pytest.mark.parametrize('nb', ['index', 'explanations/architecture', *(f'studies/{p.stem}' for p in (top/'nbs'/'studies').glob('*.ipynb'))])
def test_no_link_of_a_page_is_broken(nb):
    path = top/'nbs'/f'{nb}.ipynb'
    cells = json.loads(path.read_text())['cells']
    shown = [''.join(o['data'].get('text/markdown', '')) for c in cells for o in c.get('outputs', []) if 'data' in o]
    text = '\n'.join([*(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'), *shown])
    assert [target for target in links(text) if not (path.parent/target).is_file()] == []


def test_every_notebook_can_be_reached_from_the_readme():
    found = set(links((top/'README.md').read_text()))
    pages = [p for p in (top/'nbs').rglob('*.ipynb') if p.name != 'index.ipynb' and '.ipynb_checkpoints' not in p.parts]
    assert [p.name for p in pages if p.relative_to(top).as_posix() not in found] == []


def test_the_two_commands_of_the_readme_are_the_ones_that_ci_runs():
    lines, ci = (top/'README.md').read_text().split('\n'), (top/'.ci'/'run').read_text()
    for command in ('pip install -e . && fedsq compare', 'pip install -e ".[dev]" && nbdev_test && pytest'):
        assert lines.count(command) == 1 and f"line '{command}'" in ci
    assert not re.search(r'OMP_NUM_THREADS|MPLBACKEND|OPENBLAS', ci)
