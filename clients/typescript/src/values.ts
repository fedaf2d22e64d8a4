// JavaScript values as the contract's: attributes, labels, payloads, times.

import { create } from "@bufbuild/protobuf";
import type { Duration, Timestamp } from "@bufbuild/protobuf/wkt";
import { DurationSchema, timestampDate, timestampFromDate } from "@bufbuild/protobuf/wkt";
import type { AnyValue, KeyValue, Label, Payload } from "./gen/agl_grpc/v1/common_pb.js";
import { LabelSchema, PayloadSchema } from "./gen/agl_grpc/v1/common_pb.js";

/** What an attribute, a note or an output may hold. */
export type Value = null | boolean | number | bigint | string | Uint8Array | readonly Value[] | { readonly [key: string]: Value };

/** Whole numbers that JavaScript holds exactly become integers, others doubles. */
export function toAnyValue(value: Value): AnyValue {
  return { $typeName: "agl_grpc.v1.AnyValue", value: toOneof(value) };
}

function toOneof(value: Value): AnyValue["value"] {
  if (value === null) return { case: undefined };
  switch (typeof value) {
    case "string":
      return { case: "stringValue", value };
    case "boolean":
      return { case: "boolValue", value };
    case "bigint":
      return { case: "intValue", value };
    case "number":
      return Number.isSafeInteger(value) && !Object.is(value, -0)
        ? { case: "intValue", value: BigInt(value) }
        : { case: "doubleValue", value };
    default:
      return objectOneof(value);
  }
}

function objectOneof(value: Exclude<Value, null | boolean | number | bigint | string>): AnyValue["value"] {
  if (value instanceof Uint8Array) return { case: "bytesValue", value };
  if (Array.isArray(value)) {
    const values = (value as readonly Value[]).map(toAnyValue);
    return { case: "arrayValue", value: { $typeName: "agl_grpc.v1.ArrayValue", values } };
  }
  const values = toKeyValues(value as { readonly [key: string]: Value });
  return { case: "kvlistValue", value: { $typeName: "agl_grpc.v1.KeyValueList", values } };
}

/** Integers outside JavaScript's exact range stay `bigint`. */
export function fromAnyValue(message: AnyValue | undefined): Value {
  const { value } = message ?? { value: { case: undefined } };
  switch (value?.case) {
    case undefined:
      return null;
    case "intValue": {
      const number = Number(value.value);
      return Number.isSafeInteger(number) ? number : value.value;
    }
    case "arrayValue":
      return value.value.values.map(fromAnyValue);
    case "kvlistValue":
      return fromKeyValues(value.value.values);
    default:
      return value.value;
  }
}

export function toKeyValues(values: { readonly [key: string]: Value }): KeyValue[] {
  return Object.entries(values).map(([key, value]) => ({ $typeName: "agl_grpc.v1.KeyValue", key, value: toAnyValue(value) }));
}

export function fromKeyValues(entries: readonly KeyValue[]): { [key: string]: Value } {
  return Object.fromEntries(entries.map(({ key, value }) => [key, fromAnyValue(value)]));
}

export function toLabels(labels: Readonly<Record<string, string>>): Label[] {
  return Object.entries(labels).map(([key, value]) => create(LabelSchema, { key, value }));
}

/** JSON data inline; above 1 MiB use `StoreClient.payload`, which stores a blob. */
export function toPayload(value: unknown): Payload {
  const text = JSON.stringify(value);
  if (text === undefined) throw new TypeError(`a ${typeof value} cannot be written as JSON`);
  return create(PayloadSchema, { content: { case: "data", value: new TextEncoder().encode(text) } });
}

/** The value of inline JSON data; `undefined` when there is no payload. */
export function fromPayload(payload: Payload | undefined): unknown {
  if (payload === undefined || payload.content.case === undefined) return undefined;
  if (payload.content.case === "blobDigest") {
    throw new TypeError(`the payload lies in blob ${payload.content.value}: read it with StoreClient.load`);
  }
  if (payload.mediaType && !/^application\/json\b/.test(payload.mediaType)) return payload.content.value;
  return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(payload.content.value));
}

/** Milliseconds as the contract's duration. */
export function toDuration(ms: number): Duration {
  const nanos = Math.round(ms * 1e6);
  const seconds = Math.floor(nanos / 1e9);
  return create(DurationSchema, { seconds: BigInt(seconds), nanos: nanos - seconds * 1e9 });
}

/** A duration in milliseconds; `undefined` when unset. */
export function fromDuration(duration: Duration | undefined): number | undefined {
  return duration && Number(duration.seconds) * 1000 + duration.nanos / 1e6;
}

export function toTimestamp(date: Date): Timestamp {
  return timestampFromDate(date);
}

export function fromTimestamp(timestamp: Timestamp | undefined): Date | undefined {
  return timestamp && timestampDate(timestamp);
}

/** Now, in nanoseconds since the epoch, as spans count; to the millisecond. */
export function nowNanos(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}
