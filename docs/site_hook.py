"""The hook of mkdocs.yml: adds files of the checkout outside docs/ to the site, and rewrites the links to them.

README.md becomes the start page. Any other file that a page links to keeps its path. The help texts of `melora-fx`
become the page of commands. So all links work in the checkout and on the site.

A *path* here is relative to the checkout (docs/FOLD.md); mkdocs's `src_uri` is relative to docs/ (FOLD.md).
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
COMMANDS = "api/commands.md"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
"""The path of a relative link, without its anchor."""
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `PAGES`, every file that a page links to, directly or through others, and the page of commands."""
    waiting = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            linked = {target for target in links_of((ROOT / path).read_text(), path) if (ROOT / target).is_file()}
            waiting += sorted(linked - seen)
            seen |= linked
    files.append(File.generated(config, COMMANDS, content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Returns the page with the links of the site."""
    if page.file.src_uri == COMMANDS:  # has no file in the checkout, and no links
        return markdown
    return with_site_links(markdown, checkout_path(page.file.src_uri))


def site_path(path: str) -> str:
    """Returns the `src_uri` of a file of the checkout."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def checkout_path(src_uri: str) -> str:
    """The inverse of `site_path`."""
    if src_uri == "index.md":
        return "README.md"
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).is_file() else src_uri


def links_of(markdown: str, path: str) -> list[str]:
    """Returns the paths of the files that the page at `path` links to."""
    return [_target(link, path) for link in _LINK.findall(_CODE.sub("", markdown))]


def with_site_links(markdown: str, path: str) -> str:
    """Returns the page at `path` with every relative link as it must be at its place on the site."""
    folder = posixpath.dirname(site_path(path)) or "."

    def of_site(link: re.Match[str]) -> str:
        return posixpath.relpath(site_path(_target(link[0], path)), folder)

    parts = _CODE.split(markdown)  # every other part is code
    return "".join(part if index % 2 else _LINK.sub(of_site, part) for index, part in enumerate(parts))


def _target(link: str, path: str) -> str:
    """Returns the path that a relative link of the page at `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _commands() -> str:
    """Returns the page of all commands and options, from their help texts."""
    import typer
    from typer.cli import get_docs_for_click

    from exporters.cli.commands import app

    group = typer.main.get_command(app)
    page = get_docs_for_click(obj=group, ctx=typer.Context(group), name="melora-fx", title="Commands")
    return re.sub(r"^Example: (.*)$", r"**Example**:\n\n```console\n$ \1\n```", page, flags=re.MULTILINE)
