"""The thread that runs requests together: bounded batches, one bad item spoils none."""

import importlib.util
import threading

import pytest

if not all(map(importlib.util.find_spec, ("uvicorn", "starlette", "prometheus_client"))):
    pytest.skip("needs the extra 'serve'", allow_module_level=True)

from coca_jax.apps.serve.batcher import Batcher  # noqa: E402
from coca_jax.apps.serve.limits import Refused  # noqa: E402


class Slow:
    """A work that waits until it is let go, and refuses the item 'bad'."""

    def __init__(self):
        self.go, self.batches = threading.Event(), []

    def run(self, model, items):
        self.go.wait(10)
        self.batches.append(list(items))
        if "bad" in items:
            raise ValueError("bad: no such thing")
        yield [item.upper() for item in items]


def test_a_batch_is_bounded_and_one_bad_item_spoils_none():
    import asyncio

    batcher, work = Batcher(None, batch_size=4, wait=0.05, depth=5), Slow()

    async def ask():
        jobs = [asyncio.create_task(batcher.answers(work, [x])) for x in ("a", "b", "bad", "c")]
        await asyncio.sleep(0.5)  # taken, and held
        more = [asyncio.create_task(batcher.answers(work, [x])) for x in "defgh"]
        await asyncio.sleep(0.1)
        with pytest.raises(Refused, match="too many requests") as later:
            await batcher.answers(work, ["i"])
        with pytest.raises(
            Refused, match=r"6 pictures or texts; at most 5 are taken at a time"
        ) as never:
            await batcher.answers(work, list("ijklmn"))
        assert (later.value.status, never.value.status) == (503, 400)
        more[4].cancel()  # whoever asked has left
        await asyncio.sleep(0.1)
        work.go.set()
        return await asyncio.gather(*jobs, *more, return_exceptions=True)

    found = asyncio.run(ask())
    assert batcher.stop()
    assert found[:2] == [["A"], ["B"]] and found[3:8] == [["C"], ["D"], ["E"], ["F"], ["G"]]
    assert isinstance(found[2], ValueError) and isinstance(found[8], asyncio.CancelledError)
    assert work.batches == [["a", "b", "bad", "c"], ["a"], ["b"], ["bad"], ["c"], list("defg")]
    with pytest.raises(Refused, match="stopping"):
        asyncio.run(batcher.answers(work, ["late"]))


def test_a_stop_waits_no_longer_than_it_may():
    import asyncio

    batcher, work = Batcher(None, batch_size=4, wait=0, depth=5), Slow()

    async def ask():
        job = asyncio.create_task(batcher.answers(work, ["a"]))
        await asyncio.sleep(0.1)  # taken, and held
        ended = batcher.stop(0.05)
        work.go.set()
        return ended, await job

    assert asyncio.run(ask()) == (False, ["A"])
    assert batcher.stop(10)
