import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { FailureKind } from "../src/gen/agl_grpc/v1/attempt_pb.js";
import { RolloutStatus } from "../src/gen/agl_grpc/v1/rollout_pb.js";
import { attemptUrl, toDuration, Worker, type Agent, type StoreClient, type Task, type WorkerOptions } from "../src/index.js";
import { TestStore, until } from "./support.js";

describe("Worker", () => {
  let store: TestStore;
  let client: StoreClient;
  let queue = 0;
  before(async () => {
    store = await TestStore.start();
    client = store.client();
  });
  after(() => store.stop());

  /** Runs tasks through an agent; answers the rollouts as they ended. */
  async function work<T>(agent: Agent<T>, tasks: readonly Task[], options: WorkerOptions = {}) {
    const name = `q${queue++}`;
    const made = await client.enqueue(tasks.map((task) => ({ ...task, queue: name })));
    const worker = new Worker(client, agent, { queues: [name], maxRollouts: tasks.length, log: () => undefined, ...options });
    const running = worker.run();
    const ids = made.map(({ rolloutId }) => rolloutId);
    const done = await client.waitForRollouts(ids, { timeoutMs: 30_000 });
    worker.drain("test");
    await running;
    return ids.map((id) => done.find(({ rolloutId }) => rolloutId === id)!);
  }

  it("gives tasks to the agent and its rewards and spans to the store", async () => {
    const agent: Agent<{ n: number }> = async ({ n }, { emit, reward }) => {
      emit("thought", { n, deep: { list: [n, "x"] } });
      reward(n / 10, { name: "style", step: 0 });
      return n;
    };
    const rollouts = await work(agent, [{ input: { n: 1 } }, { input: { n: 2 } }], { concurrency: 2 });
    assert(rollouts.every(({ status }) => status === RolloutStatus.SUCCEEDED));
    const rolloutIds = rollouts.map(({ rolloutId }) => rolloutId);
    const { rewards } = await client.store.listRewards({ rolloutIds });
    const found = rewards.map(({ name, value, step }) => `${name} ${value} ${step}`).sort();
    assert.deepEqual(found, ["primary 1 undefined", "primary 2 undefined", "style 0.1 0", "style 0.2 0"]);
    const { spans } = await client.store.listSpans({ rolloutId: rolloutIds[0]! });
    assert.deepEqual(spans.map(({ span }) => span?.name), ["thought"]);
  });

  it("fails the attempt of an agent that throws, returns nonsense, or never ends", async () => {
    const agent: Agent<string> = (task, { signal }) => {
      if (task === "throw") throw new RangeError("no such thing\nsecond line");
      if (task === "nan") return NaN;
      if (task === "text") return "text" as unknown as number;
      return new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new Error("stopped"))));
    };
    const config = { timeout: toDuration(300) };
    const tasks = [{ input: "throw" }, { input: "nan" }, { input: "text" }, { input: "hang", config }];
    const [threw, nan, text, hung] = await work(agent, tasks, { concurrency: 4 });
    assert.deepEqual([threw!.failure?.kind, threw!.failure?.type, threw!.failure?.message], [FailureKind.AGENT, "RangeError", "no such thing"]);
    assert.match(threw!.failure!.detail, /worker\.test/);
    assert.match(nan!.failure!.message, /NaN/);
    assert.match(text!.failure!.message, /string/);
    assert.equal(hung!.status, RolloutStatus.FAILED);
    assert.match(hung!.failure!.message, /timeout|longer/);
  });

  it("stops an agent whose rollout is cancelled", async () => {
    let stopped = false;
    const [made] = await client.enqueue([{ input: "cancel", queue: "cancel" }]);
    const agent: Agent = (_task, { signal }) =>
      new Promise<void>((resolve) => {
        signal.addEventListener("abort", () => {
          stopped = true;
          resolve();
        });
        void client.store.cancelRollouts({ filter: { rolloutIdIn: [made!.rolloutId] }, reason: "enough" });
      });
    const worker = new Worker(client, agent, { queues: ["cancel"], log: () => undefined });
    const running = worker.run();
    await until(() => stopped, "the agent is told");
    worker.drain();
    await running;
    const { rollout } = await client.store.getRollout({ rolloutId: made!.rolloutId });
    assert.equal(rollout?.rollout?.status, RolloutStatus.CANCELLED);
  });

  it("finishes every rollout once while the store is killed", async () => {
    let calls = 0;
    const agent: Agent<number> = async (n) => {
      if (++calls === 20) {
        await store.down();
        await store.up();
      }
      return n;
    };
    const rollouts = await work(agent, Array.from({ length: 60 }, (_, n) => ({ input: n })), { concurrency: 8 });
    // What was on its way to the worker when the store died comes again, as a second attempt.
    assert(rollouts.every(({ status }) => status === RolloutStatus.SUCCEEDED));
    const { rewards } = await client.store.listRewards({ rolloutIds: rollouts.map(({ rolloutId }) => rolloutId) });
    assert.deepEqual(rewards.map(({ value }) => value).sort((a, b) => a! - b!), Array.from({ length: 60 }, (_, n) => n));
  });

  it("obeys a drain command of the store and tells why it idles", async () => {
    const worker = new Worker(client, () => 1, { workerId: "drained", queues: ["none"], log: () => undefined });
    const running = worker.run();
    await until(async () => (await client.store.listWorkers({})).workers.some((one) => one.workerId === "drained" && one.idleReason === "no work"), "it idles");
    await client.store.drainWorkers({ workerIds: ["drained"] });
    await running;
  });
});

it("writes the URL of an attempt as the interceptor reads it", () => {
  assert.equal(attemptUrl("http://h:1/v1", "r", "a"), "http://h:1/rollout/r/attempt/a/v1");
  assert.equal(attemptUrl("http://h:1/", "r", "a"), "http://h:1/rollout/r/attempt/a");
});
