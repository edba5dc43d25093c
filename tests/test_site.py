"""The documentation's site builds without a warning, and what it says of files is so."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from docs_walk import ROOT

PAGE = (ROOT / "docs/how_it_works.md").read_text()
ROWS = re.findall(r"^\| (?!paper|---)(.+?) \| (.+?) \| (.+?) \|$", PAGE, re.M)


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}/site"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    start = (tmp_path / "site/index.html").read_text()
    assert "Contrastive captioners" in start and 'href="own_data/"' in start
    api = (tmp_path / "site/api/index.html").read_text()
    assert "encode_image" in api and "num_beams" in api  # inherited methods, fields
    found = json.loads((tmp_path / "site/search/search_index.json").read_text())
    assert len({entry["location"].split("#")[0] for entry in found["docs"]}) >= 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split(",")[0])
def test_what_implements_the_paper_is_where_the_table_says(row):
    _, files, test = row
    for file in re.findall(r"`(.+?)`", files):
        assert (ROOT / file).exists(), file
    for name in re.findall(r"`(tests/.+?)`", test):
        path, function = name.split("::")
        found = ast.parse((ROOT / path).read_text()).body
        assert function in {node.name for node in found if isinstance(node, ast.FunctionDef)}, name
