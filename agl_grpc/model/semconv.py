"""Names of spans and attributes: those of Agent Lightning, so that its traces and readers go on working."""

from __future__ import annotations

ROLLOUT_ID = "agentlightning.rollout_id"
ATTEMPT_ID = "agentlightning.attempt_id"
SPAN_SEQUENCE_ID = "agentlightning.span_sequence_id"
# Of a model call in somebody else's span: the committed optimiser step whose weights sampled it, of which
# distribution its logprobs are (raw, processed), and in which mode it was sampled (default train).
POLICY_VERSION = "agentlightning.policy_version"
LOGPROBS = "agentlightning.logprobs"
MODE = "agentlightning.mode"
TRACER_NAME = "agentlightning.tracer.name"

SPAN_ANNOTATION = "agentlightning.annotation"
SPAN_MESSAGE = "agentlightning.message"
SPAN_OBJECT = "agentlightning.object"
SPAN_EXCEPTION = "agentlightning.exception"
SPAN_OPERATION = "agentlightning.operation"
SPAN_REWARD = "agentlightning.reward"
SPAN_VIRTUAL = "agentlightning.virtual"

REWARD = "agentlightning.reward"
REWARD_STEP = "agentlightning.reward.step"
REWARD_TARGET = "agentlightning.reward.target_span_id"
# False on a span whose first reward is not the one that counts.
REWARD_IS_PRIMARY = "agentlightning.reward.is_primary"
LINK = "agentlightning.link"
TAG = "agentlightning.tag"
MESSAGE_BODY = "agentlightning.message.body"
OBJECT_TYPE = "agentlightning.object.type"
OBJECT_LITERAL = "agentlightning.object.literal"
OBJECT_JSON = "agentlightning.object.json"
OPERATION_NAME = "agentlightning.operation.name"
OPERATION_INPUT = "agentlightning.operation.input"
OPERATION_OUTPUT = "agentlightning.operation.output"

EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_STACKTRACE = "exception.stacktrace"
