"""A worker that executes training runs which others asked for, one after the other.

A training run's ``config`` is what `agl-grpc train fit` reads from a file: agent and components are
imported here, so whoever may create training runs in the store may run code of this machine's environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agl_grpc.client import IllegalTransition, StoreClient, StoreError
from agl_grpc.model import Failure, TrainingRun, TrainingRunStatus
from agl_grpc.trainer.config_file import check_configuration, fit_configuration
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.run_folder import RunFolder

log = logging.getLogger(__name__)


class TrainingWorker:
    """Takes up pending training runs and trains.

    Args:
        store: address of the store.
        run_dir: where the runs' folders lie.
        worker_id: who takes them; a worker that starts again under the same id goes on with what it had.
            Empty = the host's name.
        say: told each thing worth a line.
    """

    def __init__(
        self,
        store: str,
        run_dir: Path,
        *,
        worker_id: str = "",
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._store = store
        self._run_dir = run_dir
        self._worker_id = worker_id or socket.gethostname()
        self._say = say

    def run(self, *, once: bool = False) -> None:
        """Works until it is interrupted; with ``once`` until one training run has ended.

        Raises:
            TrainerError: the store cannot be reached.
        """
        while True:
            try:
                training = asyncio.run(self._next())
            except StoreError as error:
                raise TrainerError(f"the store at {self._store}: {error}") from error
            self._say(f"{training.training_run_id}: begins")
            self._execute(training)
            if once:
                return

    async def _next(self) -> TrainingRun:
        """A training run that is now ours."""
        async with StoreClient(self._store) as client:
            running = await client.query_training_runs(status_in=["running", "stopping"], run_id="*")
            mine = [run for run in running if run.trainer_id == self._worker_id]
            if mine:
                return mine[0]
            changes = client.watch_training_runs(include_existing=True)
            async with contextlib.aclosing(changes):  # type: ignore[type-var]  # it is a generator
                async for change in changes:
                    for run in change.items:
                        if run.status is TrainingRunStatus.PENDING:
                            with contextlib.suppress(IllegalTransition):  # another worker was quicker
                                return await client.acquire_training_run(
                                    run.training_run_id, self._worker_id, only_pending=True
                                )
        raise TrainerError(f"the store at {self._store} ended the watch of training runs")

    def _execute(self, training: TrainingRun) -> None:
        name = training.training_run_id
        try:
            self._fit(training)
        except TrainerError as error:
            self._say(f"{name}: failed: {error}")
            asyncio.run(self._end(name, TrainingRunStatus.FAILED, error))
        except Exception as error:  # an algorithm of the user; the worker outlives it
            log.exception("training run %s", name)
            self._say(f"{name}: failed: {type(error).__name__}: {error}")
            asyncio.run(self._end(name, TrainingRunStatus.FAILED, error))
        except BaseException:
            asyncio.run(self._end(name, TrainingRunStatus.STOPPED))
            raise
        else:
            self._say(f"{name}: ended")

    def _fit(self, training: TrainingRun) -> None:
        if not isinstance(training.config, Mapping):
            raise TrainerError("the training run has no config: a mapping as `agl-grpc train fit` reads it")
        data: dict[str, Any] = {
            **training.config,
            "run_name": training.run_id,
            "run_dir": str(self._run_dir),
            "store": self._store,
        }
        folder = RunFolder(self._run_dir / training.run_id)
        if folder.manifest.is_file():
            data["resume"] = True
        configuration = check_configuration(data)
        fit_configuration(configuration, training_run=(training.training_run_id, self._worker_id))

    async def _end(self, name: str, status: TrainingRunStatus, error: BaseException | None = None) -> None:
        """Says the end of a run whose trainer did not come so far, with a reason but no traceback."""
        with contextlib.suppress(StoreError):
            async with StoreClient(self._store) as client:
                run = await client.get_training_run_by_id(name)
                if run is not None and not run.status.is_terminal:
                    failure = Failure(message=str(error), type=type(error).__name__) if error else None
                    await client.finish_training_run(name, run.trainer_epoch, status, failure)
