// Replays the shared vectors: `node dist/conformance/replay.js HOST:PORT FOLDER`.

import {
  fromJson, mergeFromBinary, toBinary, toJson, type DescMessage, type DescMethod, type JsonObject, type JsonValue, type Message,
} from "@bufbuild/protobuf";
import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { AsyncQueue } from "../src/queue.js";
import { RunnerService, StoreClient, StoreError, StoreService, TrainerService } from "../src/index.js";

interface Step {
  readonly rpc: string;
  readonly send: readonly JsonObject[];
  readonly receive?: readonly JsonValue[];
  readonly error?: { readonly code: number; readonly reason: string; readonly info?: JsonObject };
  readonly keep?: Readonly<Record<string, string>>;
  readonly until?: "cancel";
  readonly newer?: Readonly<Record<string, string>>;
  readonly bytes?: Readonly<Record<string, string>>;
}

class Mismatch extends Error {}

const SERVICES = { StoreService, RunnerService, TrainerService };
const TIMEOUT_MS = 20_000;

async function replay(path: string, client: StoreClient): Promise<void> {
  const name = basename(path, ".json");
  const kept: Record<string, string> = { run: name };
  const { steps } = JSON.parse(readFileSync(path, "utf8")) as { steps: Step[] };
  for (const [number, raw] of steps.entries()) {
    const where = `${name}, step ${number} (${raw.rpc})`;
    const step = filled(raw as unknown as JsonValue, kept) as unknown as Step;
    const method = methodOf(step);
    const { messages, error } = await call(client, method, step);
    const received = messages.map((message) => toJson(method.output, message));
    if (step.error) {
      if (!error) throw new Mismatch(`${where}: no error came, but ${JSON.stringify(received)}`);
      match({ code: error.code, reason: error.reason, info: error.info }, step.error as unknown as JsonValue, `${where}: error`);
    } else if (error) {
      throw new Mismatch(`${where}: ${error.reason || error.code}: ${error.message}`);
    } else {
      match(received, (step.receive ?? []) as JsonValue, where);
      for (const [place, expected] of Object.entries(step.bytes ?? {})) {
        const { desc, message } = messageAt(method.output, messages, place);
        match(Buffer.from(toBinary(desc, message)).toString("hex"), expected, `${where}: the bytes of ${place}`);
      }
    }
    for (const [key, place] of Object.entries(step.keep ?? {})) kept[key] = at(received, place);
  }
}

function methodOf({ rpc }: Step): DescMethod {
  const [service = "", name] = rpc.split("/");
  return SERVICES[service as keyof typeof SERVICES].methods.find((method) => method.name === name) as DescMethod;
}

/** The message at a place as `0.groups.0.spans.1`: lists by index, fields by their names in JSON. */
function messageAt(first: DescMessage, messages: readonly Message[], place: string): { desc: DescMessage; message: Message } {
  let desc = first;
  let found: unknown = messages;
  for (const part of place.split(".")) {
    const at = found as Record<string, unknown>;
    if (/^\d+$/.test(part)) {
      found = at[part];
    } else {
      const field = desc.field[part]!;
      found = field.oneof ? (at[field.oneof.localName] as { value: unknown }).value : at[part];
      desc = field.message!;
    }
  }
  return { desc, message: found as Message };
}

async function call(client: StoreClient, method: DescMethod, step: Step): Promise<{ messages: Message[]; error?: StoreError }> {
  const calls = { StoreService: client.store, RunnerService: client.runner, TrainerService: client.trainer }[method.parent.name] as unknown as Record<
    string,
    (request: unknown, options: object) => unknown
  >;
  const messages = step.send.map((message) => fromJson(method.input, message));
  for (const [place, fields] of Object.entries(step.newer ?? {})) {
    const { desc, message } = messageAt(method.input, messages, place);
    mergeFromBinary(desc, message, Buffer.from(fields, "hex"));
  }
  const [first] = messages;
  const received: Message[] = [];
  const stop = new AbortController();
  const options = { timeoutMs: TIMEOUT_MS, signal: stop.signal };
  const run = calls[method.localName]!;
  try {
    if (method.methodKind === "unary" || method.methodKind === "client_streaming") {
      const request = method.methodKind === "unary" ? first : from(messages);
      return { messages: [(await run(request, options)) as Message] };
    }
    const outgoing = new AsyncQueue<unknown>();
    const send = (): void => {
      const next = messages.shift();
      if (next) outgoing.push(next);
      if (messages.length === 0 && !step.until) outgoing.end();
    };
    send();
    const request = method.methodKind === "bidi_streaming" ? outgoing : first;
    for await (const answer of run(request, options) as AsyncIterable<Message>) {
      received.push(answer);
      if (step.until && received.length === step.receive?.length) break;
      send();
    }
  } catch (failure) {
    if (failure instanceof StoreError) return { messages: received, error: failure };
    throw failure;
  } finally {
    stop.abort();
  }
  return { messages: received };
}

async function* from<T>(items: readonly T[]): AsyncGenerator<T> {
  yield* items;
}

function filled(value: JsonValue, kept: Readonly<Record<string, string>>): JsonValue {
  if (typeof value === "string") return value.replace(/\$\{(\w+)\}/g, (_all, name: string) => kept[name] ?? `\${${name}}`);
  if (Array.isArray(value)) return value.map((item) => filled(item, kept));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, filled(item, kept)]));
}

function match(found: unknown, expected: JsonValue, where: string): void {
  if (expected === null) {
    if (found !== undefined) throw new Mismatch(`${where} is ${JSON.stringify(found)} and should not be set`);
  } else if (expected === "*") {
    if (found === undefined) throw new Mismatch(`${where} is not set`);
  } else if (Array.isArray(expected)) {
    const list = (found ?? []) as unknown[];
    if (list.length !== expected.length) throw new Mismatch(`${where} has ${list.length} elements, not ${expected.length}: ${JSON.stringify(found)}`);
    expected.forEach((item, index) => match(list[index], item, `${where}.${index}`));
  } else if (typeof expected === "object") {
    for (const [key, item] of Object.entries(expected)) match((found as Record<string, unknown> | undefined)?.[key], item, `${where}.${key}`);
  } else if (found !== expected) {
    throw new Mismatch(`${where} is ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
  }
}

function at(received: unknown, place: string): string {
  return String(place.split(".").reduce((value, part) => (value as Record<string, unknown>)[part], received));
}

const [target = "", folder = "", authority] = process.argv.slice(2);
const client = new StoreClient(target, authority ? { tls: { ca: readFileSync(authority, "utf8") } } : {});
for (const file of readdirSync(folder).filter((name) => name.endsWith(".json")).sort()) {
  try {
    await replay(join(folder, file), client);
    console.log(`ok ${basename(file, ".json")}`);
  } catch (error) {
    process.exitCode = 1;
    console.log(`FAILED ${basename(file, ".json")}: ${error instanceof Error ? error.message : String(error)}`);
  }
}
client.close();
process.exit(); // deadlines of cancelled streams would keep the process for their 20 s
