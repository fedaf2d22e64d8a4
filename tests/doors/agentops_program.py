"""A program that uses the AgentOps SDK as its users do; run with AGENTOPS_* set to a local server."""

from __future__ import annotations

import time

import agentops
from agentops.sdk.core import tracer
from agentops.sdk.decorators import agent, operation, trace


@agent
class Helper:
    """An agent by AgentOps' decorator."""

    @operation
    def think(self, text: str) -> str:
        """An operation by AgentOps' decorator."""
        return text.upper()


@trace(name="job")
def job() -> str:
    """A trace of its own."""
    return Helper().think("hi")


agentops.init(auto_start_session=False, instrument_llm_calls=False, log_level="ERROR")
# It signs in beside the program, which here would be done before.
while not agentops.get_client().get_current_jwt():
    time.sleep(0.01)
assert job() == "HI"
assert tracer.provider.force_flush(10_000)
print("done", flush=True)
