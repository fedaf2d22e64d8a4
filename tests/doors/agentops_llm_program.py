"""A program whose model calls the AgentOps SDK instruments by itself; run with AGENTOPS_* and OPENAI_* set.

`agentlightning` on the command line adds what Agent Lightning 0.3 adds to that instrumentation: token ids.
"""

from __future__ import annotations

import sys
import time

import agentops
from agentops.sdk.core import tracer
from openai import OpenAI

if "agentlightning" in sys.argv:
    from agentlightning.instrumentation.agentops import enable_agentops_service, instrument_agentops

    enable_agentops_service()  # it keeps AgentOps from sending unless told otherwise
    instrument_agentops()
agentops.init(auto_start_session=False, instrument_llm_calls=True, log_level="ERROR")
# It signs in beside the program, which here would be done before.
while not agentops.get_client().get_current_jwt():
    time.sleep(0.01)
answer = OpenAI(max_retries=0).chat.completions.create(
    model="scripted", messages=[{"role": "user", "content": "what is 2 + 2?"}], temperature=0.5
)
assert answer.choices[0].message.content == "four"
assert tracer.provider.force_flush(10_000)
print("done", flush=True)
