"""`recaption --captioner`: captions of a chat API that stalls, fails and answers garbage."""

import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from chat_server import Server, caption
from conftest import tiny_config
from PIL import Image
from test_inference import random_params

from coca_jax import inference
from coca_jax.apps.recaption import chat_api
from coca_jax.apps.recaption.request import Request
from coca_jax.data import vocabulary
from coca_jax.inference import export_folder
from coca_jax.models import coca

COUNT = 48


def png(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scorer and two tars of images with texts."""
    folder = tmp_path_factory.mktemp("api")
    words = vocabulary.train(
        [f"a dog in a small tree {n}" for n in range(300)], 300, str(folder / "words.model"), 0
    )
    config = tiny_config(bias=False)
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=16, unimodal_depth=1, multimodal_depth=1)
    model = inference.CoCaModel(config, random_params(coca.build(config.model)), words)
    export_folder.write(model, str(folder / "scorer"))
    (folder / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"tars/{shard:03d}.tar", "w") as tar:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                for suffix, data in (("png", png(number)), ("txt", b"an alt text")):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def command(folder, url, out, *more):
    return [
        *("recaption", f"--captioner={url}", f"--checkpoint={folder}/scorer"),
        *(f"--input={folder}/tars", f"--out={out}", "--text=synthetic", "--prompt=Say it."),
        *("--batch_size=4", "--part=8", "--concurrency=4", *more),
    ]


def written(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.tar"))}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(chat_api, "PAUSE", 0.01)


def test_captions_are_the_servers_and_scores_ours(folder, commands, tmp_path):
    with Server() as server:
        done = commands.run(command(folder, server.url, "out"), tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        wanted = {f"{n:04d}": caption(png(n) + b"Say it.") for n in range(COUNT)}
        with tarfile.open(tmp_path / "out/00000.tar") as tar:
            names = [member.name for member in tar if member.name.endswith(".txt")]
            texts = {name[:4]: tar.extractfile(name).read().decode() for name in names}
            about = json.loads(tar.extractfile("0003.json").read())
        assert texts == {key: wanted[key] for key in texts} and len(texts) == COUNT // 2
        assert -1 <= about["recaption"]["scores"][0] <= 1
        asked = server.asked
        again = commands.run(command(folder, server.url, "out"), tmp_path)  # it is done
        assert again.returncode == 0 and server.asked == asked


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_after_kills_the_output_is_that_of_a_calm_run(folder, commands, tmp_path, kills):
    with Server(bad=0.0) as calm:
        done = commands.run(command(folder, calm.url, "calm"), tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    chance = random.Random(0)
    with Server(bad=0.3) as server:
        argv = [sys.executable, "-m", "coca_jax", *command(folder, server.url, "out", "--rate=12")]
        done_kills = 0
        for _ in range(3 * kills):
            running = subprocess.Popen(
                argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            try:
                running.wait(chance.uniform(2, 12))
                assert running.returncode == 0, running.stderr.read()
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                running.wait()
                done_kills += 1
            else:
                if done_kills >= kills:
                    break
                # Finished before enough kills: begin anew.
                assert written(tmp_path / "out") == written(tmp_path / "calm")
                (tmp_path / "out").rename(tmp_path / f"out{time.monotonic_ns()}")
            if done_kills >= kills:
                break
        done = commands.run(command(folder, server.url, "out"), tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
    assert done_kills >= kills
    assert written(tmp_path / "out") == written(tmp_path / "calm")


def test_a_server_that_is_gone_ends_the_run_which_resumes(folder, quick, monkeypatch):
    monkeypatch.setattr(chat_api, "MOST_IN_A_ROW", 3)
    with Server(bad=0.0) as server:
        request = Request(
            "x", "webdataset", "out", captioner=server.url, checkpoints=("scorer",), concurrency=2
        )
        captioner = chat_api.ChatCaptioner(request)
        server.down = True
        with pytest.raises(OSError, match=r"\d images in a row have no caption; .*status 503"):
            captioner.captions([png(n) for n in range(8)], [str(n) for n in range(8)])
        server.down = False
        (found,) = captioner.captions([png(1)], ["1"])
        assert found[0]["text"] == caption(png(1) + chat_api.PROMPT.encode())
        (why,) = captioner.captions([b"no image"], ["2"])
        assert why.startswith("unreadable_image")
    with pytest.raises(OSError, match="no chat API answers there"):
        chat_api.ChatCaptioner(request)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(captioner="localhost:8000"), "give a URL"),
        (dict(checkpoints=()), "needs one --checkpoint"),
        (dict(ways=("beams",)), "no beams"),
    ],
)
def test_what_cannot_be_asked_for(changes, says):
    given = dict(captioner="http://localhost:8000/v1", checkpoints=("scorer",)) | changes
    with pytest.raises(ValueError, match=says):
        Request("x", "webdataset", "out", **given)
