"""Pictures of an index whose names are no UTF-8."""

import os
import types

from coca_jax import local_files
from coca_jax.importers.items import printable
from coca_jax.searching import index
from coca_jax.searching.parts import Known


def test_a_picture_whose_name_is_no_utf8_is_not_gone(tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.jpg")
    there = [name, str(tmp_path / "lost.jpg")]
    files = {printable(one): Known(row) for row, one in enumerate(there)}
    parts = types.SimpleNamespace(
        files=files, base=os.getcwd(), whole_path=local_files.whole_path, grouped=dict
    )
    assert "\\" in printable(name)
    with open(name, "wb"):
        assert index.gone([str(tmp_path)], parts) == [1]
