"""What every algorithm is given, and how a plain function becomes one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from agl_grpc.algorithm.reporting import Reporter, SilentReporter
from agl_grpc.client import StoreClient

Dataset = Sequence[Any]


class Algorithm:
    """Base of algorithms. The trainer sets what they work with, then calls ``run``.

    A subclass overrides ``run``, as a method or as a coroutine; ``is_async`` tells which.
    """

    def __init__(self) -> None:
        self._store: StoreClient | None = None
        self._initial_resources: Mapping[str, Any] | None = None
        self._llm_proxy: Any = None
        self._adapter: Any = None
        self._trainer: Any = None
        self._reporter: Reporter = SilentReporter()
        self._seed: int = 0

    @property
    def name(self) -> str:
        """The algorithm's name in the store, for example ``apo``."""
        return type(self).__name__.lower()

    def set_store(self, store: StoreClient) -> None:
        """Gives the client of the store."""
        self._store = store

    def get_store(self) -> StoreClient:
        """The client of the store; `RuntimeError` before one was set."""
        if self._store is None:
            raise RuntimeError("the algorithm has no store yet: run it through a Trainer, or call set_store")
        return self._store

    def set_initial_resources(self, resources: Mapping[str, Any] | None) -> None:
        """Gives the resources that the run begins with, by name."""
        self._initial_resources = resources

    def get_initial_resources(self) -> Mapping[str, Any] | None:
        """The resources that the run begins with; None = none."""
        return self._initial_resources

    def set_llm_proxy(self, llm_proxy: Any) -> None:
        """Gives the model endpoint that agents use."""
        self._llm_proxy = llm_proxy

    def get_llm_proxy(self) -> Any:
        """The model endpoint that agents use; None = none."""
        return self._llm_proxy

    def set_adapter(self, adapter: Any) -> None:
        """Gives the adapter that turns spans into what the algorithm learns from."""
        self._adapter = adapter

    def get_adapter(self) -> Any:
        """The adapter; None = none."""
        return self._adapter

    def set_trainer(self, trainer: Any) -> None:
        """Gives the trainer that runs this algorithm."""
        self._trainer = trainer

    def get_trainer(self) -> Any:
        """The trainer that runs this algorithm; `RuntimeError` outside one."""
        if self._trainer is None:
            raise RuntimeError("the algorithm is not run by a Trainer")
        return self._trainer

    def set_seed(self, seed: int) -> None:
        """Gives the seed of whatever the algorithm draws, in place of its own."""
        self._seed = seed

    def check_datasets(self, train_dataset: Dataset | None, val_dataset: Dataset | None) -> None:
        """Raises `TypeError` when ``run`` would not take these datasets; asked before anything starts."""

    def set_reporter(self, reporter: Reporter) -> None:
        """Gives what takes the algorithm's metrics."""
        self._reporter = reporter

    def get_reporter(self) -> Reporter:
        """Takes metrics of steps and lines for people; one that keeps nothing before another was set."""
        return self._reporter

    def is_async(self) -> bool:
        """Whether ``run`` is a coroutine."""
        return inspect.iscoroutinefunction(self.run)

    def run(self, train_dataset: Dataset | None = None, val_dataset: Dataset | None = None) -> Any:
        """Learns from the datasets; tasks go to agents as rollouts of the store."""
        raise TypeError(f"{type(self).__name__} does not define run(train_dataset, val_dataset)")


class FunctionalAlgorithm(Algorithm):
    """An algorithm made of one function. Its parameters are filled by name.

    Known names: ``store``, ``train_dataset``, ``val_dataset``, ``llm_proxy``, ``adapter``,
    ``initial_resources``, ``reporter`` (see `Reporter`), ``seed`` (the trainer's; 0 = none was given).
    """

    _NAMES: ClassVar[tuple[str, ...]] = (
        "store",
        "train_dataset",
        "val_dataset",
        "llm_proxy",
        "adapter",
        "initial_resources",
        "reporter",
        "seed",
    )

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            if name not in self._NAMES and parameter.default is inspect.Parameter.empty:
                raise TypeError(
                    f"{function.__qualname__} asks for {name!r}; an algorithm may ask for "
                    f"{', '.join(self._NAMES)}"
                )
        functools.update_wrapper(self, function)
        self._function = function
        self._wanted = [name for name in self._NAMES if name in parameters]

    @property
    def name(self) -> str:
        return str(getattr(self._function, "__name__", "function"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself."""
        return self._function(*args, **kwargs)

    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self._function)

    def run(self, train_dataset: Dataset | None = None, val_dataset: Dataset | None = None) -> Any:
        """Calls the function with what it asks for; a dataset that it does not ask for is a `TypeError`."""
        self.check_datasets(train_dataset, val_dataset)
        given = {"train_dataset": train_dataset, "val_dataset": val_dataset}
        return self._function(**{name: self._value(name, given) for name in self._wanted})

    def check_datasets(self, train_dataset: Dataset | None, val_dataset: Dataset | None) -> None:
        for name, dataset in (("train_dataset", train_dataset), ("val_dataset", val_dataset)):
            if dataset is not None and name not in self._wanted:
                raise TypeError(f"{self._function.__qualname__} takes no {name}, but one was given")

    def _value(self, name: str, datasets: Mapping[str, Dataset | None]) -> Any:
        if name in datasets:
            return datasets[name]
        if name == "store":
            return self.get_store()
        getters: dict[str, Callable[[], Any]] = {
            "llm_proxy": self.get_llm_proxy,
            "adapter": self.get_adapter,
            "initial_resources": self.get_initial_resources,
            "reporter": self.get_reporter,
            "seed": lambda: self._seed,
        }
        return getters[name]()


def algo(function: Callable[..., Any]) -> FunctionalAlgorithm:
    """Makes a function, plain or async, an algorithm; see `FunctionalAlgorithm` for its parameters."""
    return FunctionalAlgorithm(function)
