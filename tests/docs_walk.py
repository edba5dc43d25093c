"""What README and docs tell people to type: found in the pages, in order, with how it is run.

A page's fenced or indented block is a walk if one of its lines is a command. `<!-- needs: X -->` on
the line before a block says what its commands need that a test does not have: then their flags are
parsed, and launchers run with --dry_run, no more. `<!-- not run: why -->` is for what is no command
of ours. README.md has no such comments: NEEDS does it for its commands. Lines that begin with # and
what follows `  #` are remarks.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
COMMAND = re.compile(
    r"^(coca-jax |python3? -|pip |launch/|bash |[A-Z_]+=\S+ .*launch/|ls |uv |docker |export )"
)
# Commands of README.md, by pattern, and what they need that a test does not have.
NEEDS = {
    r"launch/(demo|test)\.sh": "an environment of its own",
    r"coca_ViT-L-14:|photos\.index": "a download",
    r"coca-jax serve ": "somebody who ends it",
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>needs|not run): (?P<what>[^>]*?) -->\n\n?)?"
    r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```"
    r"|(?P<indented>(?:^    \S[^\n]*\n|^     +[^\n]*\n)+))",
    re.S | re.M,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that a page says to do: text of a command, or of Python; `needs`: what a test lacks
    of it, '' for nothing."""

    page: str
    language: str
    text: str
    needs: str = ""


def steps(page: str) -> list[Step]:
    """The commands and the Python of a page, in order."""
    found = []
    for block in BLOCK.finditer((ROOT / page).read_text()):
        if block["kind"] == "not run":
            continue
        needs = block["what"] or ""
        text = block["fenced"]
        if text is None:
            text = re.sub(r"^    ", "", block["indented"], flags=re.M)
        if block["language"] == "python":
            found.append(Step(page, "python", text, needs))
        else:
            found += [
                Step(page, "shell", line, needs or _needs(page, line)) for line in commands(text)
            ]
    return found


def _needs(page: str, command: str) -> str:
    matching = (what for pattern, what in NEEDS.items() if re.search(pattern, command))
    return next(matching, "") if page == "README.md" else ""


def commands(text: str) -> list[str]:
    """The commands of a block: continued lines joined, here-documents whole, remarks left out."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        if not COMMAND.match(line):
            continue
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines).strip()
        line = re.sub(r"\s\s+#.*$", "", line).rstrip()
        here = re.search(r"<<'?(\w+)'?$", line)
        if here:
            for more in lines:
                line += "\n" + more
                if more == here[1]:
                    break
        found.append(line)
    return found
