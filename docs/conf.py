"""How the pages become a site: ``make docs``. It loads nothing from other hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import taskgroup as tg

project = "taskgroup"
author = "The taskgroup developers"
copyright = author  # noqa: A001 (Sphinx asks for this name)
version = release = tg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**/*.partial"]

html_theme = "furo"
pygments_style = "tango"
pygments_dark_style = "github-dark"
html_title = "taskgroup"
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # those of repository browsers, where the pages are read as well
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Types of torch, NumPy and the standard library are not here, and their inventories need network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|concurrent|os|pathlib|numpy|typing|nn|np|npt)\..*"),
    ("py:class", r"Tensor|ProcessGroup|Path"),
    # Ours, but not part of the reference.
    ("py:class", r"(.*\.)?(Cell|Ranks|Result|Score|Step|Summary|Transform|Variant)"),
    ("py:class", r"(.*\.)?(Inputs|Losses|TaskMetrics)"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_custom_sections = [("Attributes", "params_style")]

# What a page leads to, in the sidebar: by caption.
TREES: dict[str, dict[str, list[str]]] = {
    "index": {
        "Begin": ["quickstart", "how-it-works", "your-model", "choosing"],
        "Training": [
            *("training", "recording", "trackers", "report", "trainers", "several-data-sets"),
            *("own-data", "clusters", "examples", "faq"),
        ],
        "Cost": ["cost", "kernels", "benchmarks"],
        "Results": ["Results <results/README>", "results/qm9", "qm9", "reproduce", "migration"],
        "Reference": ["api/index", "architecture", "changelog", "contributing"],
    },
    "api/index": {
        "": [
            *("schedule", "affinity", "groupings", "models", "gradients", "methods"),
            *("recording", "trainers", "checkpoints", "experiments", "vision", "molecules"),
            "command-line",
        ]
    },
}

# Pages of the site that are files elsewhere in the repository; in docs/ they are links to these.
ELSEWHERE = {
    "benchmarks": "benchmarks/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """What a page of the site has besides the Markdown that repository browsers show."""
    root = Path(app.srcdir).parent
    if page in ELSEWHERE:
        text = (root / ELSEWHERE[page]).read_text("utf-8")
        source[0] = re.sub(r"\]\((\.\./)?docs/", "](", text)
        app.env.note_dependency(root / ELSEWHERE[page])
    for own, path in ELSEWHERE.items():
        source[0] = source[0].replace(f"](../{path}", f"]({own}.md")
    if page == "examples":
        section = re.compile(r"^(## .*?(\w+)\.py\n\n(?:.+\n)+)", re.MULTILINE)
        whole = r"(examples-\2)=\n\1\n```{literalinclude} ../examples/\2.py\n```\n"
        source[0] = section.sub(whole, source[0])
    else:
        source[0] = re.sub(r"\]\(\.\./examples/(\w+)\.py", r"](#examples-\1", source[0])
    for caption, entries in TREES.get(page, {}).items():
        options = [":hidden:", f":caption: {caption}"] if caption else [":hidden:"]
        source[0] += "\n".join(["", "```{toctree}", *options, *entries, "```", ""])
    if page == "api/command-line":
        source[0] += "\n".join(command_line())


def command_line() -> Iterator[str]:
    """What ``taskgroup COMMAND --help`` prints, command by command, as Markdown."""
    from typer.testing import CliRunner

    from taskgroup.lab.cli import app

    def describe(app: Any, name: str) -> Iterator[str]:
        for command in app.registered_commands:
            own = command.name or command.callback.__name__.replace("_", "-")
            words = [*name.split(), own]
            printed = CliRunner().invoke(
                root, [*words[1:], "--help"], prog_name="taskgroup", terminal_width=80
            )
            yield from ("", f"## {' '.join(words)}", "", "```text")
            yield from (printed.output.strip(), "```")
        for group in app.registered_groups:
            yield from describe(group.typer_instance, f"{name} {group.name}")

    root = app
    root.rich_markup_mode = None  # no boxes
    yield from describe(root, "taskgroup")


def write_math(self: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw without help from elsewhere."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block).replace(r"\_", "_")
    self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
