import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { createServer as createHttp2Server, type ServerHttp2Session } from "node:http2";
import { createServer, type AddressInfo, type Socket } from "node:net";
import { after, before, describe, it } from "node:test";
import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { ConnectError } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import {
  AlreadyExists, Code, fromAnyValue, fromPayload, InvalidRequest, MessageTooLarge, NotFound, NotPermitted, StoreClient, StoreError,
  StoreUnavailable, toAnyValue, Unimplemented, type Value,
} from "../src/index.js";
import { RolloutSchema } from "../src/gen/agl_grpc/v1/rollout_pb.js";
import { RunnerService } from "../src/gen/agl_grpc/v1/runner_service_pb.js";
import { StoreService } from "../src/gen/agl_grpc/v1/store_service_pb.js";
import { RolloutStatus } from "../src/gen/agl_grpc/v1/rollout_pb.js";
import { freePort, TestStore } from "./support.js";

describe("StoreClient", () => {
  let store: TestStore;
  let client: StoreClient;
  before(async () => {
    store = await TestStore.start();
    client = store.client();
  });
  after(() => store.stop());

  it("reads what the server is", async () => {
    const info = await client.store.getServerInfo({});
    assert.equal(info.contractVersion, "v1");
    assert.equal(info.backend, "sqlite");
    assert.equal((await client.require("blobs")).contractVersion, "v1");
    await assert.rejects(client.require("blobs", "telepathy", "magic"), (error: unknown) => {
      assert(error instanceof Unimplemented);
      assert.deepEqual(error.info, { contract_version: "v1", missing: "telepathy,magic" });
      return true;
    });
  });

  it("gives tasks back as they were put in, small and large", async () => {
    const large = { text: "x".repeat(3 << 20) };
    const made = await client.enqueue([{ input: { q: "1+1", n: [1, 2.5, null] } }, { input: large, groupId: "g" }]);
    const read = await Promise.all(made.map(({ rolloutId }) => client.store.getRollout({ rolloutId })));
    const inputs = await Promise.all(read.map(({ rollout }) => client.load(rollout?.rollout?.input)));
    assert.deepEqual(inputs, [{ q: "1+1", n: [1, 2.5, null] }, large]);
    assert.equal(read[1]?.rollout?.rollout?.groupId, "g");
    assert.throws(() => fromPayload(read[1]?.rollout?.rollout?.input), /blob sha256:/);
  });

  it("throws typed errors with reason and metadata", async () => {
    const missing = client.store.getRollout({ rolloutId: "ro-none" });
    await assert.rejects(missing, (error: unknown) => {
      assert(error instanceof NotFound && error instanceof StoreError && error instanceof Error);
      assert.deepEqual([error.code, error.reason], [Code.NotFound, "ENTITY_NOT_FOUND"]);
      assert.deepEqual(error.info, { entity: "rollout", id: "ro-none" });
      return true;
    });
    const bad = client.enqueue([{ input: 1, priority: 5000 }]);
    await assert.rejects(bad, (error: unknown) => error instanceof InvalidRequest && error.info["field"] === "rollouts[0].priority");
    await client.enqueue([{ input: 1, rolloutId: "ro-twice" }]);
    await assert.rejects(client.enqueue([{ input: 1, rolloutId: "ro-twice" }]), AlreadyExists);
  });

  it("refuses a wrong token by name", async () => {
    const wrong = store.client({ credential: "agl1.bm9uZQ.bm9uZQ" });
    await assert.rejects(wrong.store.getServerInfo({}).then(() => wrong.enqueue([{ input: 1 }])), NotPermitted);
  });

  it("repeats a request id without doing it twice", async () => {
    const request = { requestId: "once", rollouts: [{ input: { content: { case: "data" as const, value: new Uint8Array([49]) } } }] };
    const [first, second] = [await client.store.enqueueRollouts(request), await client.store.enqueueRollouts(request)];
    assert.equal(first.rollouts[0]?.rolloutId, second.rollouts[0]?.rolloutId);
    await assert.rejects(client.store.enqueueRollouts({ requestId: "once", rollouts: [] }), (e: unknown) => e instanceof StoreError && e.reason === "REQUEST_ID_REUSED");
  });

  it("keeps fields of a newer contract", () => {
    const unknown = Uint8Array.from([0x0a, 0x01, 0x61, 0xfa, 0x3e, 0x02, 0x68, 0x69]); // rollout_id "a", field 1007 "hi"
    assert.deepEqual(toBinary(RolloutSchema, fromBinary(RolloutSchema, unknown)), unknown);
  });

  it("carries every kind of value", () => {
    const value: Value = { a: [1, -2.5, true, null, "ü", 2n ** 60n], b: { c: new Uint8Array([1, 2]) } };
    assert.deepEqual(fromAnyValue(toAnyValue(value)), value);
  });

  it("reports a message over the limit and does not try again", async () => {
    const value = randomBytes(65 << 20);
    const started = Date.now();
    await assert.rejects(client.store.enqueueRollouts({ rollouts: [{ input: { content: { case: "data", value } } }] }), (error: unknown) => {
      assert(error instanceof MessageTooLarge);
      assert.deepEqual([error.code, error.reason, error.info["limit_bytes"]], [Code.ResourceExhausted, "MESSAGE_TOO_LARGE", "67108864"]);
      return true;
    });
    assert(Date.now() - started < 20_000);
  });

  it("waits for rollouts and watches them finish", async () => {
    const ids = (await client.enqueue([{ input: 1 }, { input: 2 }])).map(({ rolloutId }) => rolloutId);
    const stop = new AbortController();
    const seen: string[] = [];
    const watching = (async () => {
      for await (const { rollouts } of client.watchRollouts({ filter: { rolloutIdIn: ids }, includeExisting: true }, { signal: stop.signal })) {
        for (const { rollout } of rollouts) if (rollout?.status === RolloutStatus.CANCELLED) seen.push(rollout.rolloutId);
        if (seen.length === 2) return;
      }
    })();
    assert.deepEqual(await client.waitForRollouts(ids, { timeoutMs: 50 }), []);
    await client.store.cancelRollouts({ filter: { rolloutIdIn: ids }, reason: "test" });
    const done = await client.waitForRollouts(ids, { timeoutMs: 10_000 });
    await watching;
    assert.deepEqual(done.map(({ rolloutId }) => rolloutId).sort(), ids.sort());
    assert.deepEqual(seen.sort(), ids.sort());
    stop.abort();
  });

  it("tries again while the store restarts", async () => {
    await store.down();
    const call = client.enqueue([{ input: "patience" }]);
    await store.up();
    assert.equal((await call).length, 1);
  });

  it("watches through a restart without a gap or a repeat", async () => {
    const { position } = await client.store.getLatestResources({});
    const seen: bigint[] = [];
    const watching = (async () => {
      for await (const { resources } of client.watchResources({ cursor: position })) {
        seen.push(...resources.map(({ version }) => version));
        if (seen.length >= 6) return;
      }
    })();
    for (let n = 0; n < 6; n++) {
      if (n === 3) {
        await store.down();
        await store.up();
      }
      await client.store.publishResources({ resourcesId: "rs-watch", resources: [] });
    }
    await watching;
    assert.deepEqual(seen, [1n, 2n, 3n, 4n, 5n, 6n]);
  });
});

describe("a server of another version", () => {
  const calls = { enqueued: 0 };
  const sessions = new Set<ServerHttp2Session>();
  const server = createHttp2Server(
    connectNodeAdapter({
      routes: (router) => {
        router.service(StoreService, {
          getServerInfo: () => ({ serverVersion: "9.0", contractVersion: "v9" }),
          enqueueRollouts: () => {
            calls.enqueued++;
            throw new ConnectError("gone", Code.Unimplemented);
          },
        });
        router.service(RunnerService, {});
      },
    }),
  ).on("session", (session) => sessions.add(session));
  let client: StoreClient;
  before(async () => {
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const { port } = server.address() as AddressInfo;
    client = new StoreClient(`127.0.0.1:${port}`, { retry: { timeoutMs: 20_000, firstWaitMs: 1, longestWaitMs: 1 } });
  });
  after(async () => {
    client.close();
    for (const session of sessions) session.destroy();
    await new Promise((resolve) => server.close(resolve));
  });

  it("is named", async () => {
    await assert.rejects(client.require(), (error: unknown) => {
      assert(error instanceof Unimplemented);
      assert.deepEqual([error.reason, error.info["contract_version"]], ["METHOD_UNIMPLEMENTED", "v9"]);
      assert.match(error.message, /9\.0/);
      return true;
    });
  });

  it("is asked once for what it does not serve, and streams end", async () => {
    await assert.rejects(client.enqueue([{ input: 1 }]), Unimplemented);
    assert.equal(calls.enqueued, 1);
    await assert.rejects(async () => {
      for await (const event of client.leases({ workerId: "w", credits: 1 })) assert.fail(event.kind);
    }, Unimplemented);
    const spans = [{ traceId: randomBytes(16), spanId: randomBytes(8), name: "x" }];
    await assert.rejects(client.spans().send({ rolloutId: "r", attemptId: "a", spans }), Unimplemented);
  });
});

describe("a store that is not there", () => {
  it("ends by the deadline", async () => {
    const client = new StoreClient(`127.0.0.1:${await freePort()}`, { retry: { timeoutMs: 400 } });
    const started = Date.now();
    await assert.rejects(client.store.getServerInfo({}), (error: unknown) => error instanceof StoreUnavailable && /cannot be reached/.test(error.message));
    assert(Date.now() - started < 5_000);
    client.close();
  });

  it("ends by the deadline when the server takes the connection and stays silent", async () => {
    const sockets: Socket[] = [];
    const silent = createServer((socket) => sockets.push(socket));
    const port = await freePort();
    await new Promise<void>((resolve) => silent.listen(port, "127.0.0.1", resolve));
    const client = new StoreClient(`127.0.0.1:${port}`, { retry: { timeoutMs: 500 } });
    await assert.rejects(client.store.getServerInfo({}), StoreUnavailable);
    client.close();
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => silent.close(resolve));
  });

  it("names an address that is none", () => {
    assert.throws(() => new StoreClient("http://127.0.0.1:4747"), /host:port/);
  });
});
