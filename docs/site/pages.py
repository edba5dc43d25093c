"""Adds to the site the pages outside docs/ (README is its first) and files that README links to."""

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
FILES = ("CITATION.cff", "examples/search_a_folder.ipynb", "examples/train_and_caption.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them; a link to docs/X.md there is one to X.md here."""
    root = pathlib.Path(config.config_file_path).parent
    for source, name in PAGES.items():
        text = (root / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for name in FILES:
        files.append(File.generated(config, name, content=(root / name).read_text()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """A link out of docs/ to one of them is one beside the page here."""
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return markdown
