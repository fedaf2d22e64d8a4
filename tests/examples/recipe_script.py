"""Reads recipes with the parsers of the engine (`engine`) or the learner (`learner`); prints JSON.

Nothing is loaded: models are built on torch's ``meta`` device, which holds shapes only.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def engine(recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM's own parser of ``vllm serve`` makes of each recipe's arguments, with ours."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from agl_grpc.interceptor.inside.serve import engine_arguments

    parsed = []
    for recipe in recipes:
        parser = make_arg_parser(FlexibleArgumentParser())
        arguments = parser.parse_args(engine_arguments(recipe["model"], recipe["arguments"]))
        validate_parsed_serve_args(arguments)
        parsed.append(
            {
                "tensor_parallel": arguments.tensor_parallel_size,
                "length": arguments.max_model_len,
                "tools": arguments.tool_call_parser,
                "logprobs": arguments.logprobs_mode,
            }
        )
    return parsed


def learner(recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What verl makes of each recipe's keys for GPUs, and the model as far as its shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from agl_grpc.learner.verl.config import compose, validate

    made = []
    for recipe in recipes:
        config = compose(recipe["verl"], device="cuda")
        validate(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe["model"]))
        made.append(
            {
                "gpus": config.trainer.n_gpus_per_node,
                "correction": config.algorithm.rollout_correction.rollout_is,
                "updates": config.trainer.v1.separate_async.parameter_sync_step,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "attention": config.actor_rollout_ref.model.override_config.attn_implementation,
            }
        )
    return made


if __name__ == "__main__":
    read = engine if sys.argv[1] == "engine" else learner
    print("\n" + json.dumps(read(json.loads(sys.argv[2]))))
