"""A Ray cluster of two nodes of one core each on this machine, for as long as its standard input is open.

    python tests/deploy/ray_cluster.py

Says its address in the first line, and in a line for each one that it reads, as JSON, which replicas serve.
In a process of its own: Ray reads the environment when it is imported, and leaves much behind.
"""

import contextlib
import json
import socket
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client


def free_port() -> int:
    """Of this machine's ephemeral ones, which are none that Ray chooses for itself."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def replicas() -> list[dict[str, Any]]:
    """The node and the process of each that serves."""
    applications = _get_global_client().get_serve_details()["applications"].values()
    return [
        {"node": replica["node_id"], "pid": replica["pid"]}
        for application in applications
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    ]


def main() -> None:
    """Keep it until nobody asks any more."""
    with contextlib.ExitStack() as stack:
        head = {"num_cpus": 1, "include_dashboard": False, "gcs_server_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "node_ip_address": "127.0.0.1"})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        ray.init(address=cluster.address, log_to_driver=False)
        stack.callback(ray.shutdown)
        stack.callback(serve.shutdown)
        print(cluster.address, flush=True)
        for _ in sys.stdin:
            print(json.dumps(replicas()), flush=True)


if __name__ == "__main__":
    main()
