import assert from "node:assert/strict";
import { it } from "node:test";
import { create, toBinary, type MessageInitShape } from "@bufbuild/protobuf";
import { SpanKind, SpanSchema, SpanStatusCode } from "../src/gen/agl_grpc/v1/span_pb.js";
import { spanMessage } from "../src/span_message.js";

const attributes = [{ key: "k", value: { value: { case: "stringValue" as const, value: "v" } } }];

const WHOLE: MessageInitShape<typeof SpanSchema> = {
  traceId: Buffer.alloc(16, 1),
  spanId: Buffer.alloc(8, 2),
  traceState: "a=b",
  parentSpanId: Buffer.alloc(8, 3),
  name: "n",
  kind: SpanKind.CLIENT,
  startTimeUnixNano: 4n,
  endTimeUnixNano: 5n,
  attributes,
  droppedAttributesCount: 6,
  events: [{ timeUnixNano: 7n, name: "e", attributes }],
  droppedEventsCount: 8,
  links: [{ traceId: Buffer.alloc(16, 9), attributes }],
  droppedLinksCount: 10,
  status: { code: SpanStatusCode.ERROR, message: "no" },
  flags: 11,
  resource: { attributes },
  scopeName: "s",
  scopeVersion: "1",
  modelCall: { model: "m", choices: [{ tokenIds: [1, 2], logprobs: [-1, -2] }] },
  explicitSequenceId: 12n,
};

it("makes of a span what protobuf makes of it", () => {
  assert.deepEqual(Object.keys(WHOLE).sort(), SpanSchema.fields.map(({ localName }) => localName).sort());
  const fields = Object.entries(WHOLE).map(([name, value]) => ({ [name]: value }) as MessageInitShape<typeof SpanSchema>);
  for (const init of [WHOLE, {}, ...fields]) {
    assert.deepEqual(toBinary(SpanSchema, spanMessage(init)), toBinary(SpanSchema, create(SpanSchema, init)));
  }
  const made = create(SpanSchema, WHOLE);
  assert.equal(spanMessage(made), made);
});
