"`from fedsq_nb.all import *` gives a notebook every public name, each with one meaning; no other room and no command loads it."
import builtins, importlib, subprocess, sys
from pathlib import Path

import pytest

import fedsq_nb.all as A
from fedsq_nb.core import InputError

top = Path(__file__).resolve().parent.parent
MODULES = ['.'.join(p.relative_to(top).with_suffix('').parts) for p in sorted((top/'fedsq_nb').rglob('*.py')) if not p.name.startswith('_')]
APART = ('fedsq_nb.all', 'fedsq_nb.cli', 'fedsq_nb.main')
STUDY = [m for m in MODULES if m not in APART and m.split('.')[1] not in ('bench', 'flower')]


def test_no_room_is_left_out(): assert sorted(A.rooms()) == sorted(STUDY)


def test_the_star_gives_every_public_name():
    space = {}
    exec('from fedsq_nb.all import *', space)
    for room in STUDY:
        module = importlib.import_module(room)
        for name in module.__all__: assert space[name] is getattr(module, name), f'{room}: {name}'


def test_no_name_has_two_meanings():
    "Also where a star import would hide it: two rooms that export one name."
    meanings = {}
    for room in STUDY:
        for name, value in A.exports_of(room).items(): meanings.setdefault(name, {})[room] = value
    assert {name: list(rooms) for name, rooms in meanings.items() if len({id(v) for v in rooms.values()}) > 1} == {}
    with pytest.raises(InputError, match="b and a both export 'x'"): A.collected({'a': {'x': 1.5}, 'b': {'x': 2.5}})


def test_no_name_hides_one_of_pythons(): assert [name for name in A.public if hasattr(builtins, name)] == []


def test_every_name_knows_its_room():
    assert {name for name in A.public if name not in importlib.import_module(A.where(name)).__all__} == set()


def test_commands_do_not_load_it():
    code = 'import sys, fedsq_nb.cli, fedsq_nb.study.experiment; sys.exit("fedsq_nb.all" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=top).returncode == 0
    code = 'import sys, fedsq_nb.cli; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=top).returncode == 0


def test_no_other_room_imports_it():
    assert [p.name for p in (top/'fedsq_nb').rglob('*.py') if 'fedsq_nb.all' in p.read_text() and p.name not in ('all.py', '_modidx.py')] == []
