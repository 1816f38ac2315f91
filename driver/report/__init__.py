"""`report.html`: one page that says what was compiled and how, for a person who never read the IR.

It shows what the artifact and `dsc inspect` say. `page.py` puts the sections together, each other module makes some of them out of data,
and `html.py` escapes whatever is text. The page is one file: styles and scripts (`report.css`, `*.js`) are copied into it, programs lie in
it once as data, and its own policy forbids it to load anything.
"""

from .page import page, write

__all__ = ["page", "write"]
