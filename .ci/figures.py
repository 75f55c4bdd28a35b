"""Figures of the house: how long, how wide and how nested the exported code is, and how much prose stands beside it.

    python .ci/figures.py [CHECKOUT] [--json]

Reads notebooks only, so that it measures any checkout, an older one too."""
import argparse, ast, json, re, statistics, sys
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def cells_of(notebook):
    "Kind and source of each cell."
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']: yield cell['cell_type'], ''.join(cell['source'])


def exported(notebook):
    "Sources of the cells that become the module, without their directives."
    for kind, source in cells_of(notebook):
        if kind == 'code' and re.match(r'#\|\s*exports?\b', source): yield re.sub(r'(?m)^#\|.*\n?', '', source).strip('\n')


def rooms(top):
    "By dotted name of the module: its notebook."
    found = {}
    for notebook in sorted((top/'nbs').glob('[0-9]*.ipynb')):
        for _, source in cells_of(notebook):
            if name := re.search(r'#\|\s*default_exp\s+(\S+)', source): found[name[1]] = notebook
    return found


def nested(tree):
    "Comprehensions that hold another one."
    inside = lambda node: any(isinstance(n, COMPREHENSIONS) for n in ast.walk(node) if n is not node)
    return [n for n in ast.walk(tree) if isinstance(n, COMPREHENSIONS) and inside(n)]


def crowded(tree):
    "Lines on which more than one comprehension or conditional expression begins."
    starts = [n.lineno for n in ast.walk(tree) if isinstance(n, (*COMPREHENSIONS, ast.IfExp))]
    return sorted({line for line in starts if starts.count(line) > 1})


def code_length(cell): return sum(bool(line.strip()) for line in cell.splitlines())


def settings_of(top):
    "Names of all settings: annotated fields of `Config`, or of the groups whose names end in Settings."
    names = set()
    for notebook in rooms(top).values():
        for cell in exported(notebook):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.ClassDef) and (node.name == 'Config' or node.name.endswith('Settings')):
                    names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return names


def seen(tree, names):
    "Settings that a module reads: attributes with a setting's name of what is called c, config or settings."
    holders = {'c', 'config', 'settings', 'groups', 'network', 'gates', 'federation', 'training', 'methods', 'calibration', 'output', 'run'}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in names: continue
        holder = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, 'attr', '')
        if holder in holders: found.add(node.attr)
    return found


def measure(top):
    "All figures of a checkout."
    cells, lines, lengths, functions, prose, code, config = [], [], {}, [], 0, 0, {}
    names = settings_of(top)
    for name, notebook in rooms(top).items():
        own = list(exported(notebook))
        tree = ast.parse('\n\n'.join(own))
        cells += own
        lines += [line for cell in own for line in cell.splitlines()]
        lengths[name] = sum(map(code_length, own))
        functions += [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and not n.name.startswith('__')]
        config[name] = len(seen(tree, names))
        for kind, source in cells_of(notebook):
            if kind == 'markdown': prose += len(source.split())
            elif kind == 'code': code += code_length(source)
    sizes = sorted(map(code_length, cells))
    trees = [ast.parse(cell) for cell in cells]
    longest = max(lengths, key=lengths.get)
    return {'modules': len(lengths), 'longest module': f'{longest}, {lengths[longest]} lines of code', 'lines exported': len(lines),
            'lines over 120': sum(len(line) > 120 for line in lines), 'lines over 140': sum(len(line) > 140 for line in lines),
            'nested comprehensions': sum(len(nested(t)) for t in trees), 'crowded lines': sum(len(crowded(t)) for t in trees),
            'exported cell, median': statistics.median(sizes), 'exported cell, p90': sizes[int(0.9*len(sizes))], 'exported cell, longest': sizes[-1],
            'words a code line': round(prose / code, 1), 'private functions': f"{100*sum(n.startswith('_') for n in functions) / len(functions):.0f}%",
            'settings': len(names), 'settings seen': {name: n for name, n in config.items() if n}}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkout', nargs='?', default=Path(__file__).resolve().parent.parent, type=Path)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    figures = measure(args.checkout)
    if args.json: print(json.dumps(figures))
    else: print('\n'.join(f'{name:24} {value}' for name, value in figures.items()))
