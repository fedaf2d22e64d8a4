"""A vLLM server put together step by step in a process of somebody else's, as verl does it in its actors.

``python -m tests.interceptor.foreign_server ARGUMENTS`` takes vLLM's arguments; the interceptor's settings
come by the environment.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import uvicorn

from agl_grpc.interceptor.inside.serve import MIDDLEWARE, is_cpu, set_environment
from agl_grpc.interceptor.settings import FAILURE_FILE, Settings


async def serve(arguments: Sequence[str]) -> None:
    """Make the engine client, the application and its state, and serve it with a server of our own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*arguments, "--middleware", MIDDLEWARE])
    usage = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=usage)
    client = AsyncLLM.from_vllm_config(vllm_config=config, usage_context=usage)
    try:
        tasks = await client.get_supported_tasks()
        app = build_app(args, supported_tasks=tasks, model_config=client.model_config)
        await init_app_state(client, app.state, args, tasks)
        await uvicorn.Server(uvicorn.Config(app, args.host, args.port, log_level="warning")).serve()
    finally:
        client.shutdown()


def main() -> None:
    """Serve until SIGTERM."""
    settings = Settings.from_environment()
    assert settings is not None
    set_environment(os.environ, settings, cpu=is_cpu(), cores=len(os.sched_getaffinity(0)))
    # By it vLLM's processes know that they end with this one, which a signal ends without a word to them.
    os.environ[FAILURE_FILE] = os.devnull
    asyncio.run(serve(sys.argv[1:]))


if __name__ == "__main__":
    main()
