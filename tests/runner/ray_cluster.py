"""A Ray cluster of several simulated nodes on this machine, told what to do on standard input.

`python -m tests.runner.ray_cluster NODES CPUS`: prints the address, then obeys `add` and `kill N` (node N,
from 0), answering `done`; ends at the end of its input.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def main() -> None:
    """Runs the cluster."""
    count, cpus = map(int, sys.argv[1:])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    nodes = [cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES) for _ in range(count)]
    print(cluster.address, flush=True)
    try:
        for line in sys.stdin:
            match line.split():
                case ["add"]:
                    nodes.append(cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES))
                case ["kill", number]:
                    cluster.remove_node(nodes[int(number)], allow_graceful=False)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
