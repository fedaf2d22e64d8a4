"""The training run of an algorithm of this process: its state, metrics and end in the store, and in files."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agl_grpc.client import StoreClient, StoreError
from agl_grpc.diagnosis import AlarmFile, AlarmLimits, AlarmWatch
from agl_grpc.diagnosis.sinks import MetricSinks
from agl_grpc.model import Failure, PromptTemplate, StepMetrics, TrainingRun, TrainingRunStatus
from agl_grpc.model.value import to_payload
from agl_grpc.trainer.errors import TrainerError
from agl_grpc.trainer.progress import Progress
from agl_grpc.trainer.run_folder import RunFolder

_END_SECONDS = 5.0
_AT_ONCE = 100
# A character has up to four bytes; a line of the contract has up to 16 KiB.
_LINE_CHARACTERS = 4000


class RunStopped(Exception):  # nothing went wrong
    """Somebody asked the training run to stop."""


class TrainingRecord:
    """Keeps what an algorithm reports. `begin` comes first, `end` last; it is the algorithm's `Reporter`.

    Args:
        client: of the run, in whose event loop this works.
        folder: of the run.
        progress: shows lines and steps.
        on_stop: told that the run shall stop.
        alarms: from when on they are raised.
    """

    def __init__(
        self,
        client: StoreClient,
        folder: RunFolder,
        progress: Progress,
        on_stop: Callable[[Exception], None],
        alarms: AlarmLimits | None = None,
    ) -> None:
        self._client = client
        self._files = folder
        self._progress = progress
        self._on_stop = on_stop
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[StepMetrics | str | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._sinks: MetricSinks | None = None
        self._alarms = AlarmWatch(alarms)
        self._alarm_file = AlarmFile(folder.path)
        self.training = TrainingRun()
        self.metadata: dict[str, Any] = {}
        """Of a training run that is made here."""
        self.history: dict[int, StepMetrics] = {}

    @property
    def folder(self) -> Path | None:
        """Where the algorithm may leave files."""
        return self._files.path

    async def begin(self, algorithm: str, training_run_id: str = "", trainer_id: str = "") -> None:
        """Makes the training run, or takes the one that is named."""
        name = training_run_id or await self._free_name(algorithm)
        trainer_id = trainer_id or f"{socket.gethostname()}-{os.getpid()}"
        self.training = await self._client.acquire_training_run(name, trainer_id)
        about = {"algorithm": algorithm, "run": self._files.name}
        self._sinks = MetricSinks(self._files.path, about, self.say)
        self._tasks = [asyncio.create_task(self._deliver()), asyncio.create_task(self._watch())]

    async def _free_name(self, algorithm: str) -> str:
        """A training run of this run that has not succeeded; made if there is none."""
        number = 1
        while True:
            name = f"{self._client.run_id}-training" + (f"-{number}" if number > 1 else "")
            found = await self._client.get_training_run_by_id(name)
            if found is None:
                wanted = TrainingRun(
                    training_run_id=name,
                    run_id=self._client.run_id,
                    algorithm=algorithm,
                    metadata=self.metadata,
                )
                return (await self._client.create_training_run(wanted)).training_run_id
            if found.status is not TrainingRunStatus.SUCCEEDED:
                return name
            number += 1

    def step(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        """Numbers of a finished step; from any thread."""
        # A metric that is not finite says nothing, and JSON cannot hold it.
        numbers = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}

        def on_loop() -> None:
            for event in self._alarms.step(step, numbers):
                self._alarm_file.write(event)
                self.say(event.line)
            self.history[step] = StepMetrics(step=step, metrics=numbers)
            self._progress.step(step, total, numbers)
            self._queue.put_nowait(StepMetrics(step=step, metrics={**numbers, **self._alarms.numbers()}))
            if stops := self._alarms.stops:
                self._on_stop(RunStopped(f"alarm {stops} is in alarms.stop_on"))

        self._loop.call_soon_threadsafe(on_loop)

    def say(self, text: str) -> None:
        """A line for people, on the terminal and in the training run's log; from any thread."""
        self._progress.say(text)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, text)

    async def end(
        self, status: TrainingRunStatus, error: BaseException | None = None, value: Any = None
    ) -> None:
        """Delivers what was reported and closes the training run; waits for no store."""
        deliver, watch = self._tasks
        watch.cancel()
        failure = Failure.from_exception(error) if error is not None else None
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(_END_SECONDS):
                await asyncio.sleep(0)  # steps that another thread has just reported
                self._queue.put_nowait(None)
                await deliver
                self.training = await self._client.finish_training_run(
                    self.training.training_run_id,
                    self.training.trainer_epoch,
                    status,
                    failure,
                    plain_result(value),
                )
        deliver.cancel()
        await asyncio.wait({deliver, watch})
        if self._sinks is not None:
            self._sinks.close()

    async def _deliver(self) -> None:
        """Sends what waits, as one call; until the None that `end` puts behind everything."""
        more = True
        while more:
            waiting = [await self._queue.get()]
            while not self._queue.empty() and len(waiting) < _AT_ONCE:
                waiting.append(self._queue.get_nowait())
            more = None not in waiting
            steps = [item for item in waiting if isinstance(item, StepMetrics)]
            lines = [item[:_LINE_CHARACTERS] for item in waiting if isinstance(item, str)]
            assert self._sinks is not None
            for item in steps:
                await asyncio.to_thread(self._sinks.write, item.step, item.metrics)
            if not steps and not lines:
                continue
            training = self.training
            try:
                await self._client.report_metrics(
                    training.training_run_id, training.trainer_epoch, steps, log=lines
                )
            except StoreError as error:
                self._on_stop(TrainerError(f"metrics were refused: {error}"))
                return

    async def _watch(self) -> None:
        """Sees a request to stop, and that another trainer took the run up."""
        run_id = self.training.training_run_id
        try:
            async for run, _ in self._client.watch_training_run(run_id, from_step=2**62):
                if run is None:
                    continue
                if run.trainer_epoch != self.training.trainer_epoch:
                    self._on_stop(TrainerError(f"{run.trainer_id} has taken training run {run_id} over"))
                elif run.status is TrainingRunStatus.STOPPING:
                    self._on_stop(RunStopped(f"training run {run_id} was asked to stop"))
        except StoreError as error:
            self._on_stop(TrainerError(f"the store at {self._client.target} is lost: {error}"))


def result_fields(record: TrainingRecord) -> dict[str, Any]:
    """What a `FitResult` says of the training run."""
    history = [record.history[step] for step in sorted(record.history)]
    return {"training_run": record.training, "history": history}


def plain_result(value: Any) -> Any:
    """What an algorithm answered, as a value that the store can hold; None = nothing that it can."""
    if isinstance(value, Mapping) and value and all(isinstance(v, PromptTemplate) for v in value.values()):
        return {"prompts": {name: {"template": v.template, "engine": v.engine} for name, v in value.items()}}
    try:
        to_payload(value, "result")
    except (TypeError, ValueError):
        return None
    return value
