import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { after, before, describe, it } from "node:test";
import { Durability } from "../src/gen/agl_grpc/v1/common_pb.js";
import { LeaseLost, nowNanos, StreamFenced, type LeaseEvent, type LeaseStream, type StoreClient } from "../src/index.js";
import { AttemptStatus } from "../src/gen/agl_grpc/v1/attempt_pb.js";
import { TestStore, until } from "./support.js";

function span(name: string, spanId = randomBytes(8)) {
  return { traceId: randomBytes(16), spanId, name, startTimeUnixNano: nowNanos(), endTimeUnixNano: nowNanos() };
}

async function startAttempt(client: StoreClient): Promise<{ rolloutId: string; attemptId: string }> {
  const { rollout } = await client.store.startRollout({ rollout: { input: await client.payload({}) } });
  return { rolloutId: rollout!.rollout!.rolloutId, attemptId: rollout!.attempt!.attemptId };
}

async function storedNames(client: StoreClient, rolloutId: string): Promise<string[]> {
  const names: string[] = [];
  for await (const { spans } of client.exportSpans({ rolloutIds: [rolloutId] })) names.push(...spans.map(({ span: one }) => one!.name));
  return names;
}

describe("SpanStreamer", () => {
  let store: TestStore;
  let client: StoreClient;
  before(async () => {
    store = await TestStore.start();
    client = store.client();
  });
  after(() => store.stop());

  it("acknowledges what is on disk and keeps the good ones beside a bad one", async () => {
    const at = await startAttempt(client);
    const streamer = client.spans();
    const ahead = nowNanos() + 25n * 3_600_000_000_000n; // of a clock that is a day and more ahead
    const early = { ...span("early"), startTimeUnixNano: ahead, endTimeUnixNano: ahead };
    const ack = await streamer.send({ ...at, spans: [span("a"), span(""), early] }, { ...at, spans: [span("c")] });
    assert.equal(ack.durability, Durability.DISK);
    assert.deepEqual(ack.rejected.map(({ groupIndex, index }) => [groupIndex, index]), [[0, 1], [0, 2]]);
    assert(ack.rejected.every(({ error }) => error.reason === "INVALID_FIELD"));
    await streamer.close();
    assert.deepEqual((await storedNames(client, at.rolloutId)).sort(), ["a", "c"]);
  });

  it("refuses a span that is too large and keeps its neighbours", async () => {
    const at = await startAttempt(client);
    const streamer = client.spans();
    const large = { ...span("large"), attributes: [{ key: "x", value: { value: { case: "stringValue" as const, value: "x".repeat(5 << 20) } } }] };
    const ack = await streamer.send({ ...at, spans: [span("before"), large, span("after")] });
    assert.deepEqual(ack.rejected.map(({ index }) => index), [1]);
    await streamer.close();
    assert.deepEqual((await storedNames(client, at.rolloutId)).sort(), ["after", "before"]);
  });

  it("loses and doubles nothing when the store is killed again and again", async () => {
    const at = await startAttempt(client);
    const streamer = client.spans({ maxBufferBytes: 100_000 });
    const sent: Promise<unknown>[] = [];
    const names = Array.from({ length: 3000 }, (_, n) => `s-${n}`);
    const kills = (async () => {
      for (let n = 0; n < 3; n++) {
        await until(() => sent.length > (n + 1) * 600, "spans are under way");
        await store.down("SIGKILL");
        await store.up();
      }
    })();
    for (const name of names) {
      sent.push(streamer.send({ ...at, spans: [span(name)] }));
      if (sent.length % 50 === 0) await sent.at(-1);
    }
    await Promise.all([...sent, kills]);
    await streamer.close();
    assert.deepEqual((await storedNames(client, at.rolloutId)).sort(), [...names].sort());
  });

  it("is fenced by a newer streamer of the same producer", async () => {
    const at = await startAttempt(client);
    const [older, newer] = [client.spans({ producerId: "one" }), client.spans({ producerId: "one" })];
    await older.send({ ...at, spans: [span("older")] });
    await newer.send({ ...at, spans: [span("newer")] });
    await assert.rejects(older.send({ ...at, spans: [span("late")] }).then(() => older.send({ ...at, spans: [span("later")] })), StreamFenced);
    await newer.close();
    await older.close().catch((error: unknown) => assert(error instanceof StreamFenced));
  });

  it("says what is given up when the store stays away", async () => {
    const at = await startAttempt(client);
    const streamer = client.spans();
    await streamer.send({ ...at, spans: [span("there")] });
    await store.down();
    const lost = assert.rejects(streamer.send({ ...at, spans: [span("lost")] }), /given up|closed/);
    await assert.rejects(streamer.close({ timeoutMs: 200 }), /given up/);
    await lost;
    await store.up();
  });
});

describe("LeaseStream", () => {
  let store: TestStore;
  let client: StoreClient;
  before(async () => {
    store = await TestStore.start();
    client = store.client();
  });
  after(() => store.stop());

  function follow(stream: LeaseStream): LeaseEvent[] {
    const events: LeaseEvent[] = [];
    void (async () => {
      for await (const event of stream) events.push(event);
    })();
    return events;
  }

  function delivered(events: readonly LeaseEvent[]) {
    return events.flatMap((event) => (event.kind === "delivered" ? [event.work] : []));
  }

  it("gets as many rollouts as there are credits, and completes them", async () => {
    const stream = client.leases({ workerId: "w-credits", credits: 2 });
    const events = follow(stream);
    const made = await client.enqueue([{ input: 1 }, { input: 2 }, { input: 3 }]);
    await until(() => delivered(events).length === 2, "two deliveries");
    const [first] = delivered(events);
    const done = await stream.complete(first!.lease!, { status: AttemptStatus.SUCCEEDED, rewards: [{ value: 0.5 }] });
    assert.equal(done?.rolloutId, first!.rollout!.rolloutId);
    stream.grant();
    await until(() => delivered(events).length === 3, "the third delivery");
    await Promise.all(delivered(events).slice(1).map((work) => stream.complete(work.lease!, { status: AttemptStatus.SUCCEEDED })));
    assert.equal((await client.waitForRollouts(made.map((one) => one.rolloutId), { timeoutMs: 5000 })).length, 3);
    const { rewards } = await client.store.listRewards({ rolloutIds: [first!.rollout!.rolloutId] });
    assert.deepEqual(rewards.map(({ value }) => value), [0.5]);
    assert.equal(stream.held.size, 0);
    await stream.close();
  });

  it("keeps its leases over a kill -9 of the store and renews them", async () => {
    const stream = client.leases({ workerId: "w-kill", credits: 1, leaseMs: 1500 });
    const events = follow(stream);
    await client.enqueue([{ input: "kill" }]);
    await until(() => delivered(events).length === 1, "a delivery");
    await store.down();
    await until(() => events.some(({ kind }) => kind === "disconnected"), "the break is noticed");
    await store.up();
    await until(() => events.filter(({ kind }) => kind === "connected").length === 2, "it is back");
    const { lease } = delivered(events)[0]!;
    await new Promise((resolve) => setTimeout(resolve, 2000)); // longer than the lease: only renewals keep it
    await stream.complete(lease!, { status: AttemptStatus.SUCCEEDED });
    assert(!events.some(({ kind }) => kind === "lost"));
    await stream.close();
  });

  it("is told of a lost lease, and its late result is refused", async () => {
    const stream = client.leases({ workerId: "w-lost", credits: 1, leaseMs: 1000 });
    const events = follow(stream);
    await client.enqueue([{ input: "lost" }]);
    await until(() => delivered(events).length === 1, "a delivery");
    const { lease } = delivered(events)[0]!;
    await client.store.expireLeases({ attemptIds: [lease!.attemptId] });
    await until(() => events.some(({ kind }) => kind === "lost" || kind === "command"), "the loss is told");
    await assert.rejects(stream.complete(lease!, { status: AttemptStatus.SUCCEEDED }), LeaseLost);
    await stream.close();
  });

  it("hands back what it holds when it is closed", async () => {
    const stream = client.leases({ workerId: "w-back", credits: 1, queues: ["back"] });
    const events = follow(stream);
    const [made] = await client.enqueue([{ input: "back", queue: "back" }]);
    await until(() => delivered(events).length === 1, "a delivery");
    await stream.close();
    const again = client.leases({ workerId: "w-again", credits: 1, queues: ["back"] });
    const others = follow(again);
    await until(() => delivered(others).length === 1, "it is delivered again");
    assert.equal(delivered(others)[0]!.rollout!.rolloutId, made!.rolloutId);
    await again.close();
  });
});
