"The house in figures: python .ci/figures.py [PATH OF A CHECKOUT]. Needs nothing but Python, and reads older checkouts too."
import ast, json, re, statistics, sys
from pathlib import Path

COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def cells(top):
    "Every cell of every numbered notebook: (notebook, kind, source, outputs)."
    for nb in sorted((top/'nbs').glob('[0-9]*.ipynb')):
        for c in json.loads(nb.read_text())['cells']: yield nb.stem, c['cell_type'], ''.join(c['source']), c.get('outputs', [])


def is_exported(source): return bool(re.match(r'\s*#\|\s*exports?\b', source))


def code_lines(source):
    "Lines that are neither empty nor a directive."
    return [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]


def parsed(source):
    "The tree of a cell; empty for one with notebook magic."
    try: return ast.parse(source)
    except SyntaxError: return ast.parse('')


def nested_comprehensions(tree):
    "How many comprehensions stand within another, or loop twice."
    return sum(len(n.generators) > 1 or any(isinstance(m, COMPREHENSIONS) for m in ast.walk(n) if m is not n)
               for n in ast.walk(tree) if isinstance(n, COMPREHENSIONS))


def crowded_lines(tree):
    "Line numbers on which more than one comprehension or conditional expression begins."
    at = [n.lineno for n in ast.walk(tree) if isinstance(n, (*COMPREHENSIONS, ast.IfExp))]
    return sorted({line for line in at if at.count(line) > 1})


def percentile(values, share): return sorted(values)[min(len(values) - 1, int(share*len(values)))] if values else 0


def setting_names(top):
    "The names of all settings: fields that are made by `setting(...)` or `_opt(...)`."
    names = set()
    for path in sorted((top/'fedsq_nb').rglob('*.py')):
        found = re.findall(r'^    (\w+)\s*:.*=\s*(?:setting|_opt)\(', path.read_text(), re.M)
        names |= set(found)
    return names


def settings_seen(path, names):
    "Settings that a module reads as attributes of a configuration or of a group, by the usual names."
    seen = set()
    for n in ast.walk(ast.parse(path.read_text())):
        if not isinstance(n, ast.Attribute) or n.attr not in names: continue
        owner = ast.unparse(n.value).split('.')
        if owner[-1] in ('config', 'c', 'f', 't', 'a', 'd', 'wanted') or 'config' in owner: seen.add(n.attr)
    return seen


def figures(top):
    "All figures of a checkout, by name."
    modules = sorted(p for p in (top/'fedsq_nb').rglob('*.py') if not p.name.startswith('_'))
    every = list(cells(top))
    exported = [source for _, kind, source, _ in every if kind == 'code' and is_exported(source)]
    lines = [line for source in exported for line in source.splitlines()]
    sizes = [len(code_lines(source)) for source in exported]
    words = sum(len(source.split()) for _, kind, source, _ in every if kind == 'markdown')
    code = sum(len(code_lines(source)) for _, kind, source, _ in every if kind == 'code')
    functions = [n.name for p in modules for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    named = [n for n in functions if not n.startswith('__')]
    lengths = {p: len(p.read_text().splitlines()) for p in modules}
    longest, names = max(lengths, key=lengths.get), setting_names(top)
    seen = {p.stem: len(settings_seen(p, names)) for p in modules}
    return {
        'modules': len(modules), 'longest module': f'{longest.relative_to(top)}, {lengths[longest]} lines',
        'exported lines': len(lines), 'lines over 120': sum(len(line) > 120 for line in lines),
        'nested comprehensions': sum(nested_comprehensions(parsed(s)) for s in exported),
        'lines with two comprehensions or conditions': sum(len(crowded_lines(parsed(s))) for s in exported),
        'exported cells, median': statistics.median(sizes), 'exported cells, p90': percentile(sizes, 0.9), 'exported cells, max': max(sizes),
        'words of prose a code line': round(words/code, 1),
        'private functions': f'{100*sum(n.startswith("_") for n in named)/len(named):.0f}%',
        'settings': len(names), 'settings seen by': {k: v for k, v in sorted(seen.items(), key=lambda kv: -kv[1]) if v}}


if __name__ == '__main__':
    for name, value in figures(Path(sys.argv[1] if len(sys.argv) > 1 else '.').resolve()).items(): print(f'{name:45}{value}')
