"""How a work of recaptioning ends, what is told then, and who may work at it."""

import contextlib
import os

import pytest
from test_recaption_inputs import asked, tars  # noqa: F401
from test_version_0_1 import flags_of

from coca_jax import recaption, sealed_json
from coca_jax.engines import Engine
from coca_jax.recaptioning import running, shard, whole
from coca_jax.training import lease


def test_a_work_of_which_all_is_filtered_says_so(tars):  # noqa: F811
    request = asked(min_score=0.9)
    for job in (jobs := whole.plan(request)):
        made = [
            dict(number=n, key=item.key, originals=[dict(text="a", score=0.5)])
            | dict(captions=[dict(text="b", score=0.6, flags=[])])
            for n, item in shard.selected(job)
        ]
        bad = [dict(key="bad", reason="unreadable_image", detail="no picture")]
        part = dict(results=made, quarantined=bad, read=3, last=True)
        sealed_json.write(f"{job.part}/part-00000.json", part)
    with pytest.raises(ValueError) as told:
        running.run(request, jobs, Engine(), say=print, progress=False)
    assert str(told.value) == (
        "t: none of 6 examples can be used: quarantined {'unreadable_image': 2}, filtered {'below "
        "--min_score=0.9': 4}; the first quarantined: bad: no picture; the highest score of a text "
        "is 0.6"
    )


def test_a_second_work_at_one_output_is_refused_and_one_of_another_shard_is_not(tars, monkeypatch):  # noqa: F811
    flags_of("recaption", monkeypatch)
    given = ["recaption", "--checkpoint=c", "--input=t", "--out=out"]

    def work(share: str, *beside: str) -> list[str]:
        """Starts works of shares while one of `share` is under way; those that are let in."""
        let_in: list[str] = []

        def run(request, jobs, engine, **how):
            let_in.append(engine.share)
            for other in beside if len(let_in) == 1 else ():
                recaption.flags.FLAGS.unparse_flags()
                recaption.flags.FLAGS([*given, f"--shard={other}"])
                with contextlib.suppress(lease.Held):
                    recaption.main(["recaption"])
            return dict(waiting=1)

        monkeypatch.setattr(running, "run", run)
        recaption.flags.FLAGS.unparse_flags()
        recaption.flags.FLAGS([*given, f"--shard={share}"])
        assert recaption.main(["recaption"])["waiting"] == 1
        return let_in

    assert work("", "", "") == [""]
    assert work("0/2", "0/2", "1/2") == ["0/2", "1/2"]
    assert sorted(os.listdir("out/recaption")) == ["input.json", "plan.json"]
