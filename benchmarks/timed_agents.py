"""`tests.learner.contract_engine` that writes down when its agents work, from lease to completion.

Arguments: the file to write to, then those of the engine.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agl_grpc.client.leases import LeasedRollout
from benchmarks.work_times import written
from tests.learner import contract_engine


class TimedEngine(contract_engine.ContractEngine):
    """Engine and worker of which it is written down when they answer."""

    path: Path

    async def _answer(self, leased: list[LeasedRollout]) -> None:
        with written(self.path):
            await super()._answer(leased)


if __name__ == "__main__":
    TimedEngine.path = Path(sys.argv.pop(1))
    contract_engine.ContractEngine = TimedEngine  # type: ignore[misc]  # what its `main` makes
    asyncio.run(contract_engine.main())
