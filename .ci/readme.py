"Write README.md from nbs/index.ipynb: its markdown, its visible code, and the outputs stored in it. Nothing is executed."
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor
from traitlets.config import Config

top = Path(__file__).resolve().parent.parent
hidden = RegexRemovePreprocessor(patterns=[r'(?s)\s*#\|\s*(hide|default_exp)\b.*'], enabled=True)
body, resources = MarkdownExporter(config=Config(), preprocessors=[hidden]).from_filename(str(top/'nbs'/'index.ipynb'))
if resources['outputs']: raise SystemExit('nbs/index.ipynb holds a picture as an output: README.md cannot carry it, show a table')
body = re.sub(r'(?m)^#\| .*\n', '', body)
body = re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'
(top/'README.md').write_text(body, encoding='utf-8')
