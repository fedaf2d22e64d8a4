// Spans as whole messages, made in one step.

import type { MessageInitShape } from "@bufbuild/protobuf";
import { create, isMessage } from "@bufbuild/protobuf";
import { KeyValueSchema } from "./gen/agl_grpc/v1/common_pb.js";
import { ModelCallSchema } from "./gen/agl_grpc/v1/model_call_pb.js";
import type { Span } from "./gen/agl_grpc/v1/span_pb.js";
import { SpanEventSchema, SpanKind, SpanLinkSchema, SpanResourceSchema, SpanSchema, SpanStatusSchema } from "./gen/agl_grpc/v1/span_pb.js";

const NO_BYTES = new Uint8Array();

/**
 * What `create(SpanSchema, init)` makes, in a tenth of its time: with it, making the spans took longer than all else
 * that is done to send them. The compiler sees to it that no field of the contract is missing here.
 */
export function spanMessage(init: MessageInitShape<typeof SpanSchema>): Span {
  if (isMessage(init, SpanSchema)) return init;
  const span: Required<Omit<Span, "$unknown" | "resource" | "status" | "modelCall">> = {
    $typeName: "agl_grpc.v1.Span",
    traceId: init.traceId ?? NO_BYTES,
    spanId: init.spanId ?? NO_BYTES,
    traceState: init.traceState ?? "",
    parentSpanId: init.parentSpanId ?? NO_BYTES,
    name: init.name ?? "",
    kind: init.kind ?? SpanKind.UNSPECIFIED,
    startTimeUnixNano: init.startTimeUnixNano ?? 0n,
    endTimeUnixNano: init.endTimeUnixNano ?? 0n,
    attributes: (init.attributes ?? []).map((one) => create(KeyValueSchema, one)),
    droppedAttributesCount: init.droppedAttributesCount ?? 0,
    events: (init.events ?? []).map((one) => create(SpanEventSchema, one)),
    droppedEventsCount: init.droppedEventsCount ?? 0,
    links: (init.links ?? []).map((one) => create(SpanLinkSchema, one)),
    droppedLinksCount: init.droppedLinksCount ?? 0,
    flags: init.flags ?? 0,
    scopeName: init.scopeName ?? "",
    scopeVersion: init.scopeVersion ?? "",
    explicitSequenceId: init.explicitSequenceId ?? 0n,
  };
  const made: Span = span;
  if (init.resource) made.resource = create(SpanResourceSchema, init.resource);
  if (init.status) made.status = create(SpanStatusSchema, init.status);
  if (init.modelCall) made.modelCall = create(ModelCallSchema, init.modelCall);
  return made;
}
