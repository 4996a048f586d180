"""A Ray cluster of two nodes on this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """Each has a processor; this process is no part of them."""
    with (
        pytest.MonkeyPatch.context() as patch,
        # The path of a socket must be short.
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        made = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            made.add_node(**NODE)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()
