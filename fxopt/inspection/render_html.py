"""A graph diff as one page that needs nothing else: no network, no server. It opens from disk.

The data stands in the page as the JSON that `render_json` writes, in a block that no browser runs; the page's script
makes text nodes of it. A content security policy names the hashes of the page's own script and style, so that nothing
else can run, whatever stands in a model's source or names.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources
from string import Template

from fxopt.inspection.diff import GraphDiff
from fxopt.inspection.render_json import as_json
from fxopt.inspection.render_text import headline

SCRIPTS = ("numbers.js", "layout.js", "panels.js", "drawing.js", "commands.js")  # the last one starts the page


def as_html(diff: GraphDiff) -> str:
    style = _file("page.css")
    script = "\n".join(map(_file, SCRIPTS)).replace('"use strict";\n', "")
    script = f'"use strict";\n{script}'
    return Template(_file("page.html")).substitute(
        TITLE=html.escape(headline(diff)),
        STYLE=style,
        STYLE_HASH=_hash(style),
        SCRIPT=script,
        SCRIPT_HASH=_hash(script),
        DATA=inert(as_json(diff)),
    )


def inert(text: str) -> str:
    """JSON that cannot end the block that it stands in: HTML's characters as escapes, which JSON reads as the same."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _file(name: str) -> str:
    return resources.files("fxopt.inspection").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash of a script or style as a content security policy has it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
