"""The model that judges and rewrites prompts."""

from __future__ import annotations

from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.chat import ChatEndpoint


class Critic(ChatEndpoint):
    """A model at an endpoint; what goes wrong ends the algorithm, which can be resumed."""

    role = "critic"
    failure = AlgorithmError
