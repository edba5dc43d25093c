"""What `search index` makes of its inputs: an index among them, links, texts, paths elsewhere."""

import pyarrow as pa
import pyarrow.parquet as pq
from test_index_changes import again, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.data import files, formats
from coca_jax.engines import Engine
from coca_jax.searching import index, parts, staged


def test_an_index_in_the_indexed_folder_is_no_part_of_it(model, folder):  # noqa: F811
    assert again(model, "s", "s/i") == (6, 0, 0, 1, 6)
    assert formats.guess("s") == "imagefolder" and formats.beside("s") == []
    assert again(model, "s", "s/i") == (0, 0, 0, 1, 6)
    how = dict(checkpoint="here", batch_size=4, part=4)
    there = parts.Parts("s/j")
    staged.stage(lambda: model, index.groups(["s"], there), there, Engine(share="0/1"), **how)
    assert formats.guess("s") == "imagefolder"  # a job's share, which is not joined yet
    pq.write_table(pa.table(dict(image=[b""], text=["x"])), "s/data.parquet")
    assert files.find("s", ("*.parquet",)) == [str(folder / "data.parquet")]
