"""The ways of `recaption --how`."""

import pytest

from coca_jax.inference.generation.settings import Settings
from coca_jax.recaptioning.request import way


def test_ways_are_read_and_wrong_ones_are_told():
    assert way("nucleus,top_p=0.8,num_captions=3") == Settings(
        temperature=1.0, top_p=0.8, num_captions=3
    )
    assert way("beams,early_stop=false").early_stop is False
    for text, why in (
        ("best", "begin with one of greedy"),
        ("greedy,length=3", "no setting 'length'"),
        ("beams,num_beams=many", "num_beams takes a int"),
        ("greedy,num_captions=2", "greedy decoding has one caption"),
        ("greedy,num_beams=3", "these settings are not greedy; begin with beams"),
        ("greedy,temperature=0.5", "these settings are not greedy; begin with nucleus"),
        ("beams,num_beams=1", "these settings are not beams; begin with greedy"),
        ("nucleus,length_penalty=2", "length_penalty=2.0: only beam search uses it"),
    ):
        with pytest.raises(ValueError, match=f"--how={text}: .*{why}"):
            way(text)
