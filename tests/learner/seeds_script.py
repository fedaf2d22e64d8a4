"""Learners one after the other in one process, on a Ray cluster whose workers have imported everything.

`python -m tests.learner.seeds_script STORE CONFIG...`; each says what `agl-grpc learner` says.
"""

from __future__ import annotations

import dataclasses
import sys

from agl_grpc.learner.process import run
from agl_grpc.learner.run_config import load
from tests.learner.warm_ray import warm_cluster


def main(store: str, paths: list[str]) -> None:
    """Trains each configuration."""
    with warm_cluster(nodes=1) as address:
        for path in paths:
            run(dataclasses.replace(load(path), ray_address=address), store)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
