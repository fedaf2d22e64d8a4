"""AgentOps as a tracer: its decorators and its instrumentation of libraries, recorded into our own traces.

Nothing leaves the machine: AgentOps' exporters, its sign-in and its uploads are never started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agl_grpc.tracer.otel import OtelTracer
from agl_grpc.tracer.outbox import SpanSink


class AgentOpsTracer(OtelTracer):
    """An `OtelTracer` that also takes what the package ``agentops`` records.

    ``agentops_managed`` puts AgentOps' spans (its decorators, ``start_trace`` and so on) into our traces;
    `agentops.init` in an agent then does nothing more. ``instrument_managed`` has AgentOps instrument the
    libraries that it knows, such as openai and anthropic, when they are imported. AgentOps is one for the
    whole process, and so is this. ``daemon`` is accepted for older callers: there is no server to start.

    Raises `RuntimeError` in `init` when ``agentops`` is not installed (``pip install agl-grpc[agentops]``).
    """

    def __init__(
        self,
        streamer: SpanSink | None = None,
        *,
        agentops_managed: bool = True,
        instrument_managed: bool = True,
        daemon: bool = True,
        resource: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(streamer, resource=resource)
        self._settings = {
            "agentops_managed": agentops_managed,
            "instrument_managed": instrument_managed,
            "resource": resource,
        }
        self.agentops_managed = agentops_managed
        self.instrument_managed = instrument_managed
        self._attached = False

    def init(self) -> None:
        """Make AgentOps' spans visible. A second call changes nothing."""
        super().init()
        if self._attached or not (self.agentops_managed or self.instrument_managed):
            return
        self._attached = True
        core, client = _agentops()
        if not core.tracer.initialized:
            _initialize_offline(core, self.provider)
            # What an agent passes to agentops.init() changes nothing any more; above all it signs in nowhere.
            client.initialized = True
        self.listen_to(core.tracer.provider)
        if self.instrument_managed:
            from agentops.instrumentation import instrument_all

            instrument_all()

    def teardown(self) -> None:
        """Stop listening to spans, and undo AgentOps' instrumentation of libraries."""
        if self._attached and self.instrument_managed:
            from agentops.instrumentation import uninstrument_all

            uninstrument_all()
        self._attached = False
        super().teardown()


def _agentops() -> tuple[Any, Any]:
    try:
        import agentops
        from agentops.sdk import core
    except ImportError as error:
        raise RuntimeError(
            f"AgentOpsTracer needs the package agentops: pip install 'agl-grpc[agentops]' ({error})"
        ) from error
    return core, agentops.get_client()


def _initialize_offline(core: Any, provider: Any) -> None:
    from opentelemetry.sdk.metrics import MeterProvider

    honest = core.setup_telemetry
    # Its own providers would send to the internet.
    core.setup_telemetry = lambda **_settings: (provider, MeterProvider(shutdown_on_exit=False))
    try:
        core.tracer.initialize()
    finally:
        core.setup_telemetry = honest
