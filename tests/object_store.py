"""A local S3: moto's server, which speaks the protocol that pyarrow's client speaks."""

import contextlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

BUCKET = "bucket"
KEY, SECRET = "planted-key-id", "planted-secret-key"


@dataclass
class ObjectStore:
    """A running server.

    Attributes:
        endpoint: Its address.
    """

    endpoint: str

    @property
    def root(self) -> str:
        """A storage root in it."""
        return f"s3://{BUCKET}/comp"

    def check_keys(self) -> None:
        """From now on refuses keys that it has not handed out, which are all."""
        self._check_after("0")

    def trust(self) -> None:
        """Takes all keys again."""
        self._check_after("inf")

    def _check_after(self, requests: str) -> None:
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            data=requests.encode(),
            headers={"Content-Type": "text/plain"},
            method="POST",
        )
        urllib.request.urlopen(request, timeout=10).close()


def environment(endpoint: str) -> dict[str, str]:
    """What a machine needs in its environment to use a server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def serving() -> Iterator[ObjectStore]:
    """Starts a server on loopback with one bucket; this process's environment points at it."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    from orchestration.storage import _filesystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = ObjectStore(f"http://{host}:{port}")
    before = dict(os.environ)
    os.environ.update(environment(store.endpoint))
    client = fs.S3FileSystem(
        endpoint_override=store.endpoint, region="us-east-1", allow_bucket_creation=True
    )
    client.create_dir(BUCKET)
    try:
        yield store
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)
        _filesystem.cache_clear()
