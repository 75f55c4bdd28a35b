"Settings: each in one group, with its range beside its default; tables, flat files and old names; nothing is lost on the way round."
import dataclasses, math, tomllib, typing, warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fedsq_nb.core import InputError
from fedsq_nb.study.config import Config, as_toml, check_participants, participants, read_toml, run_settings, settings_for
from fedsq_nb.study.settings import GROUPS, OLD_NAMES, SETTINGS, Range, Settings, coerce, current_names, flattened, group_of, value_text

# ---- groups, defaults, ranges

def test_every_setting_stands_in_one_group():
    names = [f.name for kind in GROUPS.values() for f in dataclasses.fields(kind)]
    assert len(names) == len(set(names)) == len(SETTINGS) and not GROUPS.keys() & SETTINGS.keys()
    for name in SETTINGS: assert name in GROUPS[group_of(name)].__dataclass_fields__

@pytest.mark.parametrize('name', SETTINGS)
def test_every_setting_says_what_it_is(name):
    "A help in one line, a type that a command line can give, and a default within its own range."
    field = SETTINGS[name]
    assert field.metadata['help'].strip() and '\n' not in field.metadata['help']
    assert field.type in (int, float, bool, str) or typing.get_origin(field.type) is tuple
    assert getattr(Config(), name) == field.default

@pytest.mark.parametrize('name', [n for n, f in SETTINGS.items() if f.type in (int, float)])
def test_no_number_is_without_a_bound(name):
    "And every whole number has an upper one, so that no run is asked for what no machine can do."
    limits = SETTINGS[name].metadata['range']
    assert limits.at_least is not None or limits.above is not None
    assert SETTINGS[name].type is float or limits.at_most is not None

@pytest.mark.parametrize('name, limits', [(n, f.metadata['range']) for n, f in SETTINGS.items() if f.type in (int, float)])
def test_a_value_beyond_a_bound_is_refused_by_name_value_and_rule(name, limits):
    group, whole = GROUPS[group_of(name)], SETTINGS[name].type is int
    step = 1 if whole else 1e-3
    beyond = []
    if limits.at_least is not None: beyond.append(limits.at_least - step)
    if limits.above is not None: beyond.append(limits.above)
    if limits.at_most is not None: beyond.append(limits.at_most + (step if whole else max(step, limits.at_most*step)))
    if limits.below is not None: beyond.append(limits.below)
    if not whole: beyond += [math.nan, math.inf, -math.inf]
    assert beyond
    for value in beyond:
        with pytest.raises(InputError, match=rf'^{name} .* must ') as e: group(**{name: value})
        assert value_text(SETTINGS[name].type(value)) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('name, choices', [(n, f.metadata['range'].choices) for n, f in SETTINGS.items() if f.metadata['range'].choices])
def test_choices_are_all_taken_and_no_others(name, choices):
    group = GROUPS[group_of(name)]
    for choice in choices: assert getattr(group(**{name: choice}), name) == choice
    with pytest.raises(InputError, match=name): group(**{name: 'something else'})

@given(st.floats(allow_nan=True), st.floats(-10, 10), st.floats(-10, 10))
def test_a_range_is_its_bounds(value, low, high):
    assert (Range(at_least=low, at_most=high).fault(value) == '') == (low <= value <= high)
    assert (Range(above=low, below=high).fault(value) == '') == (low < value < high)
    assert (Range(at_least=low, below=high).fault(value) == '') == (low <= value < high)

# ---- values

@pytest.mark.parametrize('kind, value', [(int, True), (int, 2.5), (int, 'x'), (int, None), (int, [1]), (int, math.inf), (int, '9'*5000), (float, 'x'), (float, False),
    (float, 10**400), (bool, 'perhaps'), (bool, 1.5), (str, None), (str, ['a']), (str, {}), (tuple[str, ...], 3), (tuple[float, ...], ['a']), (tuple[float, ...], [True])])
def test_values_of_another_kind_are_refused_in_one_line(kind, value):
    with pytest.raises(InputError, match='^thing .* is not ') as e: coerce('thing', kind, value)
    assert len(str(e.value)) < 200 and '\n' not in str(e.value)

@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers())),
       st.sampled_from(list(SETTINGS)))
@settings(max_examples=500, deadline=None)
def test_whatever_is_given_is_taken_or_refused(value, name):
    "Never another kind of error, and what is taken is of the setting's type."
    try: got = getattr(GROUPS[group_of(name)](**{name: value}), name)
    except InputError as e:
        assert str(e) and '\n' not in str(e)
        return
    kind = SETTINGS[name].type
    assert isinstance(got, typing.get_origin(kind) or kind)

def test_a_number_of_too_many_digits():
    for name in ('rounds', 'alpha', 'data'):
        with pytest.raises(InputError, match=f'^{name} '): Config(**{name: 10**5000})

def test_home_folders_are_put_in():
    assert Config(out='~/runs').out == str(Path.home()/'runs') and Config(plain_sites='~').plain_sites == '~'
    with pytest.raises(InputError, match='whole path'): Config(out='~nobody-of-that-name/runs')

# ---- one configuration

def test_groups_and_names_are_two_ways_to_the_same_value():
    c = Config(rounds=3, lr=.02, methods='fedavg, fedsq')
    assert c.rounds == c.federation.rounds == 3 and c.training.lr == '0.02' and c == Config(**c.as_dict())
    assert Config(federation=c.federation, methods=c.methods, lr=c.lr) == c
    with pytest.raises(InputError, match="'rounds'"): Config(round=3)
    with pytest.raises(InputError, match='running 3 must be a RunSettings'): Config(running=3)
    with pytest.raises(AttributeError, match='no setting'): c.round

def test_what_does_not_decide_the_results_does_not_mark_a_run():
    other = dict(workers=2, out='x', cache='off', overwrite=True, save_weights=False)
    assert run_settings(Config(**other)) == run_settings(Config()) and run_settings(Config(alpha=2)) != run_settings(Config())

@pytest.mark.parametrize('given, drawn', [({}, 10), ({'per_round': 4}, 4), ({'fraction': .25}, 2), ({'fraction': .01}, 1), ({'fraction': 1}, 10), ({'clients': 7}, 7)])
def test_participants(given, drawn):
    assert participants(Config(**given)) == drawn and Config(**given, min_clients=drawn).min_clients == drawn
    with pytest.raises(InputError, match=f'min_clients {drawn + 1} must be {drawn} or less'): Config(**given, min_clients=drawn + 1)

def test_natural_clients_are_counted_before_they_are_compared():
    c = Config(partition='natural', per_round=30, min_clients=20)
    check_participants(c.replace(clients=30))
    with pytest.raises(InputError, match='per_round 30 must be from 1 to the 29 clients'): check_participants(c.replace(clients=29))

def test_a_method_sets_its_own_and_two_compressions_are_refused():
    c = Config(methods='fedavg,int8,topk')
    assert settings_for(c, 'int8').compress == 'int8' and settings_for(c, 'topk').compress == 'topk:0.05' and settings_for(c, 'fedavg') == c
    assert Config(methods='int8', compress='int8').compress == 'int8'
    with pytest.raises(InputError, match="compress 'int8': the method topk"): Config(methods='fedavg,topk', compress='int8')

def test_workers_share_a_cpu():
    for device in ('cuda', 'cuda:1'):
        with pytest.raises(InputError, match='workers 2 share a CPU'): Config(device=device, workers=2)
    assert Config(device='cuda', workers=1).device == 'cuda'

# ---- files

def test_tables_flat_files_and_a_mixture(tmp_path):
    texts = ['rounds = 3\nlr = "0.1"\nworkers = 2', '[federation]\nrounds = 3\n[training]\nlr = "0.1"\n[running]\nworkers = 2', 'rounds = 3\n[training]\nlr = "0.1"\n[running]\nworkers = 2']
    for text in texts:
        (tmp_path/'c.toml').write_text(text)
        assert read_toml(tmp_path/'c.toml') == {'rounds': 3, 'lr': '0.1', 'workers': 2}

def test_the_wrong_table_and_what_is_no_setting(tmp_path):
    for text, words in (('[training]\nalpha = 1', "belongs in 'federation'"), ('[training]\nlearning = 1', "'learning'"), ('[trainig]\nlr = "1"', "'trainig'"), ('round = 1', "'rounds'")):
        (tmp_path/'c.toml').write_text(text)
        with pytest.raises(InputError, match=words) as e: read_toml(tmp_path/'c.toml')
        assert 'c.toml' in str(e.value)

def test_old_names_work_with_one_warning(tmp_path):
    (tmp_path/'c.toml').write_text('gates = "random"\ndropout = 0.5\ngated = "lower"\n')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        got = read_toml(tmp_path/'c.toml')
        Config(**got)
    assert got == {'gate_source': 'random', 'client_dropout': .5, 'gated_sites': 'lower'} and len(seen) == 1
    assert all(f'{old} is now {new}' in str(seen[0].message) for old, new in OLD_NAMES.items())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert Config(gates='random', dropout=.5) == Config(gate_source='random', client_dropout=.5)
    assert len(seen) == 1
    with pytest.raises(InputError, match='both are given'): current_names({'gates': 'own', 'gate_source': 'own'}, print)

def test_a_device_is_no_file_of_settings():
    with pytest.raises(InputError, match="'/dev/zero' is a device"): read_toml('/dev/zero')

KINDS = {int: st.integers, float: st.floats}

@st.composite
def values(draw):
    "Settings that are right one by one: anything that a type and a range allow."
    given = {}
    for name in draw(st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, max_size=12)):
        field = SETTINGS[name]
        limits = field.metadata['range']
        if limits.choices: value = st.sampled_from(limits.choices)
        elif field.type is bool: value = st.booleans()
        elif field.type is int: value = st.integers(int(limits.at_least), int(limits.at_most))
        elif field.type is float:
            low, high = (limits.at_least if limits.above is None else limits.above), (limits.at_most if limits.below is None else limits.below)
            value = st.floats(low, high, exclude_min=limits.above is not None, exclude_max=limits.below is not None, allow_infinity=False, allow_nan=False)
        elif name in ('rates', 'methods', 'lr', 'compress'): continue
        else: value = st.text()
        given[name] = draw(value)
    return given

@given(values())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_configuration_survives_a_file_and_a_dictionary(tmp_path, given):
    try: c = Config(**given)
    except InputError: return
    (tmp_path/'c.toml').write_bytes(as_toml(c).encode())
    assert Config(**read_toml(tmp_path/'c.toml')) == c and Config(**c.as_dict()) == c and c.replace() == c
    tables = tomllib.loads(as_toml(c))
    assert set(tables) == set(GROUPS) and flattened(tables, 'c.toml') == c.as_dict()
    assert as_toml(c, leave_out=('out',)).count('\nout = ') == 0
