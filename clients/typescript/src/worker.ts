// A worker: takes leased rollouts from the store, runs a function on them, gives the results back.

import { create } from "@bufbuild/protobuf";
import { randomBytes, randomUUID } from "node:crypto";
import { hostname } from "node:os";
import type { StoreClient } from "./client.js";
import { isTransient, StoreError } from "./errors.js";
import type { Attempt, Failure, Lease } from "./gen/agl_grpc/v1/attempt_pb.js";
import { AttemptStatus, FailureKind, FailureSchema } from "./gen/agl_grpc/v1/attempt_pb.js";
import type { ResourceSet } from "./gen/agl_grpc/v1/resources_pb.js";
import type { Reward } from "./gen/agl_grpc/v1/reward_pb.js";
import { RewardSchema } from "./gen/agl_grpc/v1/reward_pb.js";
import type { Rollout } from "./gen/agl_grpc/v1/rollout_pb.js";
import type { LeasedRollout } from "./gen/agl_grpc/v1/runner_service_pb.js";
import type { SpanSchema } from "./gen/agl_grpc/v1/span_pb.js";
import { CommandKind, WorkerStatus, type WorkerCommand } from "./gen/agl_grpc/v1/worker_pb.js";
import { pause } from "./retry.js";
import type { LeaseEvent, LeaseStream, Result } from "./lease_stream.js";
import { bindModel, type Model } from "./resources.js";
import type { SpanStreamer } from "./span_streamer.js";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { fromDuration, nowNanos, toKeyValues, type Value } from "./values.js";

const HEARTBEAT_MS = 10_000;
const STOP_MS = 2_000;
const TIMEOUT_MARGIN_MS = 1_000;

/** What an agent knows of the rollout that it works on. */
export interface AgentContext {
  readonly rollout: Rollout;
  readonly attempt: Attempt;
  /** The resources that the rollout is bound to; `undefined` = none were published. */
  readonly resources: ResourceSet | undefined;
  /** The first model among the resources, its base URL naming this attempt. */
  readonly model: Model | undefined;
  /** Secret for this attempt alone: call the model and append spans. */
  readonly credential: string;
  /** Aborted when the agent has to stop: cancelled, out of time, or its lease was lost. */
  readonly signal: AbortSignal;
  /** Stores a span of this attempt; its id is made when none is given. */
  emit(name: string, attributes?: { readonly [key: string]: Value }, span?: MessageInitShape<typeof SpanSchema>): void;
  /** Notes a reward beside what the agent returns, for example of one step. */
  reward(value: number, options?: { readonly name?: string; readonly step?: number; readonly targetSpanId?: Uint8Array }): void;
}

/** A reward, several named ones, or nothing. */
export type AgentResult = number | { readonly [name: string]: number } | undefined | void;

/** The agent: a function of the task. */
export type Agent<T = unknown> = (task: T, context: AgentContext) => AgentResult | Promise<AgentResult>;

export interface WorkerOptions {
  readonly workerId?: string;
  /** Rollouts at a time; default 1. */
  readonly concurrency?: number;
  readonly runId?: string;
  readonly queues?: readonly string[];
  readonly labels?: Readonly<Record<string, string>>;
  readonly leaseMs?: number;
  /** Leave after so many rollouts; default: never. */
  readonly maxRollouts?: number;
  /** How long running agents may go on after `drain` and signals; default 30 s. */
  readonly graceMs?: number;
  /** Called with one line for each thing worth knowing; default: standard error. */
  readonly log?: (line: string) => void;
}

interface Running {
  readonly lease: Lease;
  readonly stop: AbortController;
  readonly done: Promise<void>;
  /** Set when nothing more is to be said of the attempt. */
  silent: boolean;
}

/** How an attempt is stopped from outside the agent. */
class Stopped extends Error {}

/**
 * Runs an agent on leased rollouts until it is told to leave.
 *
 * An agent that throws fails its attempt (kind AGENT, with name, message and stack). One that
 * overruns the rollout's time-out fails it as TRUNCATED; a cancelled or lost one is not reported.
 * Results are kept and delivered while the store is away.
 */
export class Worker<T = unknown> {
  readonly workerId: string;
  readonly #client: StoreClient;
  readonly #agent: Agent<T>;
  readonly #options: WorkerOptions;
  readonly #stream: LeaseStream;
  readonly #spans: SpanStreamer;
  readonly #running = new Map<string, Running>();
  readonly #log: (line: string) => void;
  readonly #left = new AbortController();
  readonly #limit: number;
  #granted: number;
  #idle = "connecting";

  constructor(client: StoreClient, agent: Agent<T>, options: WorkerOptions = {}) {
    this.#client = client;
    this.#agent = agent;
    this.#options = options;
    this.#log = options.log ?? ((line) => process.stderr.write(`${new Date().toISOString()} ${line}\n`));
    this.#limit = options.maxRollouts ?? Infinity;
    this.#granted = Math.min(options.concurrency ?? 1, this.#limit);
    const session = randomUUID();
    this.workerId = options.workerId ?? `${hostname()}-ts-${process.pid}-${session.slice(0, 8)}`;
    this.#stream = client.leases({
      workerId: this.workerId,
      sessionId: session,
      runId: options.runId ?? client.runId,
      queues: options.queues ?? [],
      labels: options.labels ?? {},
      leaseMs: options.leaseMs ?? 30_000,
      credits: this.#granted,
    });
    this.#spans = client.spans({ producerId: `${this.workerId}/${session}` });
  }

  /** Takes nothing new; `run` returns when what is held has ended, or is handed back after the grace. */
  drain(reason = "told to leave"): void {
    if (this.#left.signal.aborted) return;
    this.#log(`${this.workerId} drains (${reason}): ${this.#running.size} rollouts in hand`);
    this.#stream.drain(reason);
    this.#left.abort();
  }

  /** Works until `drain`, a drain command of the store, `maxRollouts`, SIGINT or SIGTERM. */
  async run(): Promise<void> {
    const leave = (): void => this.drain("signal");
    process.once("SIGINT", leave).once("SIGTERM", leave);
    const beats = setInterval(() => void this.#beat(), HEARTBEAT_MS);
    const failed = this.#follow().then(
      () => undefined,
      (error: unknown) => ({ error }),
    );
    try {
      const left = new Promise<undefined>((resolve) => this.#left.signal.addEventListener("abort", () => resolve(undefined)));
      const failure = await Promise.race([left, failed]);
      if (failure) throw failure.error;
      await this.#finish();
    } finally {
      clearInterval(beats);
      process.off("SIGINT", leave).off("SIGTERM", leave);
      await this.#spans.close();
      await this.#stream.close();
    }
  }

  async #finish(): Promise<void> {
    const all = Promise.all([...this.#running.values()].map(({ done }) => done));
    await within(all, this.#options.graceMs ?? 30_000);
    for (const running of this.#running.values()) this.#stop(running, "the worker leaves");
    await within(all, STOP_MS);
  }

  async #follow(): Promise<void> {
    for await (const event of this.#stream) this.#react(event);
  }

  #react(event: LeaseEvent): void {
    switch (event.kind) {
      case "delivered":
        this.#take(event.work);
        break;
      case "lost":
        this.#stopAttempt(event.attemptId, `its lease was lost${event.error ? `: ${event.error.message}` : ""}`);
        break;
      case "command":
        this.#obey(event.command);
        break;
      case "idle":
        this.#say(event.reason);
        break;
      case "connected":
        this.#log(`${this.workerId} is connected to the store at ${this.#client.target}`);
        this.#say("no work");
        break;
      case "disconnected":
        this.#log(`the store is away (${event.reason}): ${this.#running.size} rollouts go on, their results are kept`);
        this.#say("the store is away");
    }
  }

  #say(reason: string): void {
    const changed = this.#idle !== reason;
    this.#idle = reason;
    if (changed) void this.#beat();
  }

  #obey(command: WorkerCommand): void {
    if (command.kind === CommandKind.CANCEL) this.#stopAttempt(command.attemptId, `cancelled: ${command.reason}`);
    this.#stream.acknowledge(command);
    if (command.kind === CommandKind.DRAIN) this.drain(command.reason);
  }

  #stopAttempt(attemptId: string, reason: string): void {
    const running = this.#running.get(attemptId);
    if (running) this.#stop(running, reason);
  }

  #stop(running: Running, reason: string): void {
    running.silent = true;
    this.#log(`attempt ${running.lease.attemptId} is stopped: ${reason}`);
    running.stop.abort(new Stopped(reason));
  }

  #take(work: LeasedRollout): void {
    const lease = work.lease!;
    const stop = new AbortController();
    const running: Running = { lease, stop, silent: false, done: Promise.resolve() };
    const done = this.#attend(work, running).catch((error: unknown) => {
      this.#log(`attempt ${lease.attemptId}: its result was not taken: ${error instanceof Error ? error.message : String(error)}`);
    });
    this.#running.set(lease.attemptId, Object.assign(running, { done }));
    void done.finally(() => this.#ended(lease.attemptId));
  }

  #ended(attemptId: string): void {
    this.#running.delete(attemptId);
    if (this.#left.signal.aborted) return;
    if (this.#granted < this.#limit) {
      this.#granted++;
      this.#stream.grant();
    } else if (this.#running.size === 0) {
      this.drain(`${this.#limit} rollouts are done`);
    }
  }

  async #attend(work: LeasedRollout, running: Running): Promise<void> {
    const rewards: Reward[] = [];
    const writes: Promise<unknown>[] = [];
    const failure = await this.#execute(work, running, rewards, writes);
    await Promise.all(writes); // spans are on disk before the attempt is completed
    if (running.silent) return;
    const result: Result = failure ? { status: AttemptStatus.FAILED, failure, rewards } : { status: AttemptStatus.SUCCEEDED, rewards };
    await this.#stream.complete(running.lease, result);
  }

  async #execute(work: LeasedRollout, running: Running, rewards: Reward[], writes: Promise<unknown>[]): Promise<Failure | undefined> {
    const limit = fromDuration(work.rollout?.config?.timeout);
    const timer = limit === undefined ? undefined : setTimeout(() => running.stop.abort(new Stopped("timeout")), limit);
    const signal = running.stop.signal;
    try {
      const task = (await this.#client.load(work.rollout?.input)) as T;
      const agent = Promise.resolve(this.#agent(task, this.#context(work, signal, rewards, writes)));
      const stopped = new Promise<never>((_resolve, reject) => signal.addEventListener("abort", () => reject(signal.reason as Error)));
      rewards.push(...readResult(await Promise.race([agent, stopped])));
      return undefined;
    } catch (error) {
      if (!(error instanceof Stopped)) return failureOf(error);
      // The store's own timer ends the attempt first, unless the store is away.
      for (let waited = 0; waited < TIMEOUT_MARGIN_MS && !running.silent; waited += 50) await pause(50);
      return truncated(limit ?? 0);
    } finally {
      clearTimeout(timer);
    }
  }

  #context(work: LeasedRollout, signal: AbortSignal, rewards: Reward[], writes: Promise<unknown>[]): AgentContext {
    const { rolloutId, attemptId, attemptCredential } = work.lease!;
    const send = (init: MessageInitShape<typeof SpanSchema>): void => {
      const write = this.#spans.send({ rolloutId, attemptId, spans: [init] });
      write.catch(() => undefined); // seen when the attempt is completed
      writes.push(write);
    };
    return {
      rollout: work.rollout!,
      attempt: work.attempt!,
      resources: work.resources,
      model: bindModel(work.resources, work.lease!),
      credential: attemptCredential,
      signal,
      emit: (name, attributes = {}, span = {}) => {
        const now = nowNanos();
        const ids = { traceId: randomBytes(16), spanId: randomBytes(8), startTimeUnixNano: now, endTimeUnixNano: now };
        send({ ...ids, ...span, name, attributes: toKeyValues(attributes) });
      },
      reward: (value, { name = "", step, targetSpanId } = {}) => {
        rewards.push(makeReward(name, value, { ...(step === undefined ? {} : { step }), ...(targetSpanId ? { targetSpanId } : {}) }));
      },
    };
  }

  async #beat(): Promise<void> {
    const memory = process.memoryUsage();
    const stats = toKeyValues({ pid: process.pid, "memory.rss_bytes": memory.rss, runtime: `node ${process.version}` });
    const busy = this.#running.size > 0;
    const status = this.#left.signal.aborted ? WorkerStatus.DRAINING : busy ? WorkerStatus.BUSY : WorkerStatus.IDLE;
    try {
      const request = { workerId: this.workerId, stats, idleReason: busy ? "" : this.#idle, status };
      await this.#client.runner.heartbeat(request, { timeoutMs: HEARTBEAT_MS });
    } catch (error) {
      if (error instanceof StoreError && !isTransient(error)) this.#log(`no heartbeat: ${error.message}`);
    }
  }
}

function readResult(result: AgentResult): Reward[] {
  if (result === undefined || result === null) return [];
  if (typeof result === "number") return [makeReward("", result)];
  if (typeof result === "object" && !Array.isArray(result)) {
    return Object.entries(result).map(([name, value]) => makeReward(name, value));
  }
  throw new TypeError(`the agent returned a ${typeof result}; it may return nothing, a number, or named numbers`);
}

function makeReward(name: string, value: number, target: { step?: number; targetSpanId?: Uint8Array } = {}): Reward {
  if (typeof value !== "number" || !Number.isFinite(value)) {
    throw new TypeError(`the reward${name ? ` "${name}"` : ""} is ${String(value)}; rewards are finite numbers`);
  }
  return create(RewardSchema, { name, value, ...target });
}

function failureOf(error: unknown): Failure {
  const known = error instanceof Error ? error : new Error(String(error));
  const kind = known instanceof StoreError ? FailureKind.INFRASTRUCTURE : FailureKind.AGENT;
  const message = known.message.split("\n")[0]!.slice(0, 1000);
  return create(FailureSchema, { kind, type: known.name, message, detail: (known.stack ?? "").slice(-16_000) });
}

function truncated(limitMs: number): Failure {
  const message = `the attempt took longer than its timeout of ${limitMs / 1000} s`;
  return create(FailureSchema, { kind: FailureKind.TRUNCATED, type: "timeout", message });
}

async function within(work: Promise<unknown>, ms: number): Promise<void> {
  const timer = new AbortController();
  await Promise.race([work, pause(ms, timer.signal)]);
  timer.abort();
}
