"Write README.md from nbs/index.ipynb: its markdown, its visible code, and the outputs stored in it. Nothing is executed."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor
from traitlets.config import Config

top = Path(__file__).resolve().parent.parent
hidden = RegexRemovePreprocessor(patterns=[r'\s*#\|\s*(hide|default_exp)\b'], enabled=True)
index = nbformat.read(top/'nbs'/'index.ipynb', as_version=4)
index.metadata['language_info'] = {'name': 'python'}  # the fences say so; nbdev_clean takes it out of the notebook
for cell in index.cells:  # of a cell whose input is hidden, what it shows is left
    if cell.cell_type == 'code' and cell.source.startswith('#| hide_input'):
        cell.source = '\n\n'.join(''.join(o['data']['text/markdown']) for o in cell.outputs)
        cell.cell_type = 'markdown'
        del cell['outputs'], cell['execution_count']
body, resources = MarkdownExporter(config=Config(), preprocessors=[hidden]).from_notebook_node(index)
if resources['outputs']: raise SystemExit('nbs/index.ipynb holds a picture as an output: README.md cannot carry it, show a table')
body = re.sub(r'(?m)^#\| .*\n', '', body)
body = re.sub(r'\]\((?!\w+:)([^)]+\.ipynb)\)', r'](nbs/\1)', body)  # links are relative to nbs/ in the notebook
body = re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'
(top/'README.md').write_text(body, encoding='utf-8')
