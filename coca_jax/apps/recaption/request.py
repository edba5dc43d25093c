"""What is asked for: together with the input and the weights it fixes the output, byte for byte."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from coca_jax.data.sources.items import Options
from coca_jax.inference.generation import config
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.runtime import extras

FORMATS = ("tar", "parquet", "array_record")
TEXTS = ("better", "synthetic", "original", "all")
_USUAL: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=4),
    "nucleus": dict(do_sample=True, top_p=0.9),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to make of an input.

    Attributes:
        input, format: what is read, and as what (a name that `prepare --format` takes).
        out, to: the folder to write, in one of FORMATS.
        checkpoints: models that write captions; the first gives scores and embeddings.
        captioner: URL of a chat API that writes the captions in their place; the one checkpoint
            then only scores. captioner_model: which of its models; '': its first.
        concurrency: requests of it at a time; rate: requests a second at most, 0: any.
        ways: how captions are written, as `way` reads them.
        prompts: how captions begin.
        text: which texts an image keeps, one of TEXTS; see choose.py.
        margin: with 'better', by how much the score of a caption must be above that of the original
            text that it replaces.
        min_score: least score of a text that is kept, from -1 to 1; None: any.
        quantile: share of the texts that `text` chooses, those of the lowest scores, to leave out.
        embeddings: writes them too.
        batch_size: images encoded at a time; rows: captions in flight; part: images between two
            savings, a multiple of batch_size.
        dtype: of the models; '': their own.
        options: how the input is read.
        split: the split of the input that is read, which the output has then; '': the input tells
            none, or 'train' alone.
    """

    input: str
    format: str
    out: str
    to: str = "tar"
    checkpoints: tuple[str, ...] = ()
    captioner: str = ""
    captioner_model: str = ""
    concurrency: int = 16
    rate: float = 0.0
    ways: tuple[str, ...] = ("greedy",)
    prompts: tuple[str, ...] = ("",)
    text: str = "better"
    margin: float = 0.05
    min_score: float | None = None
    quantile: float = 0.0
    embeddings: bool = False
    batch_size: int = 16
    rows: int = 64
    part: int = 512
    dtype: str = ""
    options: Options = dataclasses.field(default_factory=Options)
    split: str = ""

    def __post_init__(self) -> None:
        if self.to == "parquet":
            extras.check("pyarrow", "parquet", "--to=parquet")
        for text in self.ways:
            found = way(text)
            if self.captioner and found.num_beams > 1:
                raise ValueError(f"--how={text}: a chat API has no beams; begin with nucleus")
        if self.captioner:
            if not self.captioner.startswith(("http://", "https://")):
                raise ValueError(f"--captioner={self.captioner}: give a URL, http://host:port/v1")
            if len(self.checkpoints) != 1:
                raise ValueError(
                    "--captioner needs one --checkpoint, which scores its captions; any CLIP or "
                    "SigLIP model does, as ViT-B-32:openai"
                )
        if not 0 <= self.quantile < 1:
            raise ValueError(f"--quantile={self.quantile}: give a share from 0 up to, not with, 1")
        if self.min_score is not None and not -1 <= self.min_score <= 1:  # nor NaN
            raise ValueError(
                f"--min_score={self.min_score}: give a cosine similarity, a number from -1 to 1"
            )
        if not 0 <= self.margin <= 2:  # nor NaN
            raise ValueError(
                f"--margin={self.margin}: give a difference of cosine similarities, from 0 to 2"
            )
        if self.rows < self.batch_size:
            raise ValueError(
                f"--rows={self.rows}: at least --batch_size={self.batch_size}, images that start "
                "together"
            )
        if self.part % self.batch_size:
            raise ValueError(
                f"--part={self.part}: give a multiple of --batch_size={self.batch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All but the place of the output, for the file that says how it was made."""
        found = dataclasses.asdict(self)
        # Neither of these changes an answer: the same server may be at another address now.
        for name in ("out", "captioner", "concurrency", "rate"):
            del found[name]
        found["by_api"] = bool(self.captioner)
        return found


def way(text: str) -> GenerationConfig:
    """The config of a text such as 'nucleus,top_p=0.8,num_return_sequences=3': a name (greedy,
    beams, nucleus), then fields of GenerationConfig.

    Raises:
        ValueError: an unknown name or field, values that exclude each other, or those of another
            name.
    """
    name, *rest = (part.strip() for part in _PARTS.split(text))
    if name not in _USUAL:
        raise ValueError(f"--how={text}: begin with one of {', '.join(_USUAL)}")
    given: dict[str, Any] = dict(_USUAL[name])
    try:
        for part in rest:
            key, _, value = part.partition("=")
            given[key] = config.parse(key, value) if key in config.KINDS else value
        found = GenerationConfig().updated(given)
    except ValueError as error:
        raise ValueError(f"--how={text}: {error}") from None
    true = "nucleus" if found.do_sample else "greedy" if found.streams else "beams"
    if name != true:
        raise ValueError(f"--how={text}: these settings are not {name}; begin with {true}")
    return found


_PARTS = re.compile(r",(?![^\[]*\])")  # not those in a list
