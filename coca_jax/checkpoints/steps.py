"""Where checkpoints are, a folder or a bucket, and which of their steps are whole."""

from __future__ import annotations

import functools
import os
import urllib.parse
import uuid
from typing import Any

import fsspec
import fsspec.asyn
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from coca_jax.runtime import storage

# Arrays of checkpoints in buckets, which Orbax writes by TensorStore, not by the path library.
#
# Orbax tells TensorStore where an array lies by one function, `build_kvstore_tspec(directory, ...)`.
# That knows local folders and gs:// alone, though TensorStore has a driver for S3. `enable` lets it
# take s3:// as well: it answers as for the same path on gs://, with the driver exchanged, and with
# the server and the kind of credentials that s3fs found (AWS_ENDPOINT_URL, AWS_PROFILE,
# ~/.aws/config ...).


# Where botocore found the credentials -> what TensorStore calls it.
_CREDENTIALS = {
    "env": "environment",
    "iam-role": "imds",
    "container-role": "ecs",
    "assume-role-with-web-identity": "default",
}


@functools.cache
def enable() -> None:
    """Lets Orbax keep arrays on s3://, in this process.

    Raises:
        ValueError: a version of Orbax that cannot.
    """
    utils = _tensorstore_utils()
    build = getattr(utils, "build_kvstore_tspec", None)
    # Before the options of atomicity, parts of a step were renamed.
    if build is None or not hasattr(ocp.options, "AtomicityOptions"):
        raise ValueError(
            f"s3:// works with orbax-checkpoint 0.12.3 to 0.12.8, this is {ocp.__version__}: "
            "pip install 'orbax-checkpoint>=0.12.3,<0.13'"
        )

    @functools.wraps(build)
    def build_kvstore_tspec(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        scheme, _, rest = os.fspath(directory).partition(":")
        if scheme != "s3":
            return build(directory, *args, **options)
        return _on_s3(build(f"gs://{rest.lstrip('/')}", *args, **options))

    utils.build_kvstore_tspec = build_kvstore_tspec


def _tensorstore_utils() -> Any:
    """Orbax's module that describes arrays to TensorStore; not of its public interface, so runs on
    a disk go without it."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils
    except ImportError:
        return None
    return tensorstore_utils


def check_bucket_writable(folder: epath.Path) -> None:
    """Writes and removes a small value in a bucket's folder as Orbax writes arrays: TensorStore has
    ways of its own to a server and to credentials.

    Raises:
        ValueError: it cannot be; why, and what to do.
    """

    def work() -> None:
        path = f"{folder}/.probe-{uuid.uuid4().hex}"
        spec = _tensorstore_utils().build_kvstore_tspec(path, use_ocdbt=False)
        store = tensorstore.KvStore.open(spec).result()
        store.write("", b"coca_jax").result()
        store.write("", None).result()

    storage.answer(folder, work)


def _on_s3(spec: Any) -> Any:
    """A specification of TensorStore with its gs:// stores on S3."""
    if isinstance(spec, str) and spec.startswith("gs://"):
        bucket, _, path = spec.removeprefix("gs://").partition("/")
        return {"bucket": bucket, "path": path, **_server()}
    if not isinstance(spec, dict):
        return spec
    inner = {key: _on_s3(value) for key, value in spec.items()}
    return inner | _server() if inner.get("driver") in ("gcs", "gcs_grpc") else inner


@functools.cache
def _server() -> dict[str, Any]:
    """The driver, the server and the credentials that s3fs uses, as TensorStore wants them."""
    system = fsspec.filesystem("s3")
    meta = system.s3.meta
    spec: dict[str, Any] = {"driver": "s3"}
    host = urllib.parse.urlsplit(meta.endpoint_url).hostname or ""
    if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        spec |= {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
    found = fsspec.asyn.sync(system.loop, system.session.get_credentials)
    return spec | {"aws_credentials": _credentials(system.session, found)}


def _credentials(session: Any, found: Any) -> dict[str, str]:
    """Where TensorStore finds what botocore found. TensorStore does not look at AWS_PROFILE itself,
    and logs an error for each file that is not there."""
    if found is None:
        return {"type": "anonymous"}
    if found.method in _CREDENTIALS:
        return {"type": _CREDENTIALS[found.method]}
    profile = session.profile or "default"
    if found.method not in ("config-file", "shared-credentials-file"):
        return {"type": "default", "profile": profile}  # a role, SSO, a process ...
    files = {}
    for name in ("config_file", "credentials_file"):
        path = os.path.expanduser(session.get_config_variable(name))
        files[name] = path if os.path.exists(path) else os.devnull
    return {"type": "profile", "profile": profile, **files}


_COMMITTED = "commit_success.txt"  # what Orbax writes last


def place(path: str) -> epath.Path:
    """`storage.place` of a run or of its checkpoints.

    Raises ValueError where there cannot be any.
    """
    found = storage.place(path)
    if str(found).startswith("s3://"):
        enable()
    return found


def check_writable(workdir: str) -> None:
    """Makes the folder when it is missing and tries whether files and arrays can be written in it.

    Raises ValueError when they cannot.
    """
    folder = place(workdir)
    storage.check_writable(folder)
    if storage.is_remote(folder):
        check_bucket_writable(folder)


def atomicity(directory: epath.Path) -> dict[str, Any]:
    """Options of Orbax's CheckpointManager: how a step appears at once.

    On a disk it gets its name when it is whole. In a bucket nothing can be renamed: a file that is
    written last says that a step is whole. Orbax does so by itself on gs:// alone.
    """
    if not str(directory).startswith("s3://"):
        return {}
    options = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
    return {"atomicity_options": options}


def is_whole(step: epath.Path) -> bool:
    """Whether a step, which is there, was written to its end."""
    return not storage.is_remote(step) or (step / _COMMITTED).exists()


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were killed or failed have left."""
    if not directory.is_dir():
        return []
    if not storage.is_remote(directory):
        return list(directory.glob("*.orbax-checkpoint-tmp*"))
    return [p for p in directory.iterdir() if p.name.isdecimal() and not is_whole(p)]


def rename(step: epath.Path, target: epath.Path) -> None:
    """Gives a step another name."""
    if storage.is_remote(step):  # the server copies file by file, which may be cut short
        (step / _COMMITTED).unlink()
    storage.move_folder(step, target)
