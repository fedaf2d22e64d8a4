// A worker's side of leased work: deliveries by credit, renewals, commands, completions.

import type { MessageInitShape } from "@bufbuild/protobuf";
import { create } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { randomUUID } from "node:crypto";
import type { Connection } from "./connection.js";
import { ENDLESS } from "./connection.js";
import { IllegalTransition, isTransient, itemError, LeaseLost, NotFound, storeError, type StoreError } from "./errors.js";
import type { Lease } from "./gen/agl_grpc/v1/attempt_pb.js";
import type { Rollout } from "./gen/agl_grpc/v1/rollout_pb.js";
import type {
  Completion,
  CompletionSchema,
  LeasedRollout,
  StreamLeasesRequest,
  StreamLeasesResponse,
} from "./gen/agl_grpc/v1/runner_service_pb.js";
import { CompletionSchema as CompletionDesc, StreamLeasesRequestSchema } from "./gen/agl_grpc/v1/runner_service_pb.js";
import type { WorkerCommand } from "./gen/agl_grpc/v1/worker_pb.js";
import { AsyncQueue } from "./queue.js";
import { pause, waitAfter } from "./retry.js";
import { fromDuration, toDuration, toLabels } from "./values.js";

const TRIES_OF_A_REFUSED_STREAM = 5;
const NOT_PERMITTED_MS = 5_000;
const RESULTS_MS = 24 * 3_600_000;
const RENEWALS_OF_A_LEASE = 3;
const SHORTEST_RENEWAL_MS = 1_000;

/** Which work a worker takes. */
export interface LeaseStreamOptions {
  readonly workerId: string;
  /** New at each start of a worker: leases of the session that it does not name are released. */
  readonly sessionId?: string;
  readonly runId?: string;
  readonly queues?: readonly string[];
  readonly labels?: Readonly<Record<string, string>>;
  /** 1 s to 1 h; default 30 s. */
  readonly leaseMs?: number;
  /** Deliveries allowed at the start; more with `grant`. */
  readonly credits?: number;
}

/** What happens on a lease stream. */
export type LeaseEvent =
  | { readonly kind: "connected" }
  | { readonly kind: "disconnected"; readonly reason: string }
  | { readonly kind: "delivered"; readonly work: LeasedRollout }
  | { readonly kind: "lost"; readonly attemptId: string; readonly error: StoreError | undefined }
  | { readonly kind: "command"; readonly command: WorkerCommand }
  | { readonly kind: "idle"; readonly reason: string };

/** The end of a held attempt; rollout, attempt and token are filled in from the lease. */
export type Result = Omit<MessageInitShape<typeof CompletionSchema>, "$typeName" | "rolloutId" | "attemptId" | "leaseToken">;

interface PendingCompletion {
  readonly completion: Completion;
  readonly resolve: (rollout: Rollout | undefined) => void;
  readonly reject: (error: unknown) => void;
}

/**
 * Takes work for one worker, and keeps it: iterate it for `LeaseEvent`s.
 *
 * Work comes as long as credits last. A held lease is renewed at a third of its duration, all of a
 * worker's in one call, until `complete` or `release`. A stream that breaks is opened again with the
 * leases that are held and the credits that are left. Whether a lease is lost is the store's word
 * alone: while the store is away nothing ends. Start it once by iterating.
 */
export class LeaseStream implements AsyncIterable<LeaseEvent> {
  readonly workerId: string;
  readonly sessionId: string;
  readonly #connection: Connection;
  readonly #options: LeaseStreamOptions;
  readonly #leaseMs: number;
  readonly #held = new Map<string, Lease>();
  readonly #ending = new Set<string>();
  readonly #acknowledged = new Map<bigint, boolean>();
  readonly #events = new AsyncQueue<LeaseEvent>();
  readonly #stop = new AbortController();
  #outgoing: AsyncQueue<StreamLeasesRequest> | undefined;
  #credits: number;
  #granted = 0;
  #draining: string | undefined;
  #connected = false;
  #started = false;
  #pending: PendingCompletion[] = [];
  #sending = false;

  constructor(connection: Connection, options: LeaseStreamOptions) {
    this.workerId = options.workerId;
    this.sessionId = options.sessionId ?? randomUUID();
    this.#connection = connection;
    this.#options = options;
    this.#leaseMs = options.leaseMs ?? 30_000;
    this.#credits = options.credits ?? 0;
  }

  /** Leases that are held now, by attempt id. */
  get held(): ReadonlyMap<string, Lease> {
    return this.#held;
  }

  /** Whether the stream is open now. */
  get connected(): boolean {
    return this.#connected;
  }

  [Symbol.asyncIterator](): AsyncIterator<LeaseEvent, void> {
    if (!this.#started) {
      this.#started = true;
      const fail = (error: unknown): void => {
        this.#stop.abort(); // a stream that has failed for good renews nothing, so that the process may end
        this.#events.fail(error);
      };
      void this.#run().catch(fail);
      void this.#renew().catch(fail);
    }
    return this.#events[Symbol.asyncIterator]();
  }

  /** Allows so many more deliveries. */
  grant(credits = 1): void {
    if (!Number.isInteger(credits) || credits < 0) throw new RangeError(`credits is ${credits}; it has to be a whole number from 0`);
    this.#credits += credits;
    this.#granted += credits;
    this.#send({ case: "credit", value: { $typeName: "agl_grpc.v1.CreditGrant", granted: BigInt(this.#granted) } });
  }

  /** Says that a command was carried out; the store stops repeating it. */
  acknowledge(command: WorkerCommand): void {
    this.#acknowledged.set(command.commandId, true);
    this.#send({ case: "ack", value: { $typeName: "agl_grpc.v1.CommandAck", commandIds: [command.commandId] } });
  }

  /** Takes nothing new: credits that are left are void. What is held goes on. */
  drain(reason = ""): void {
    this.#draining = reason;
    this.#credits = 0;
    this.#send({ case: "drain", value: { $typeName: "agl_grpc.v1.LeaseStreamDrain", reason } });
  }

  /**
   * Ends a held attempt; completions made while a call is under way travel together in the next.
   * Throws `LeaseLost` when the lease is over: the result was not taken.
   */
  async complete(lease: Lease, result: Result): Promise<Rollout | undefined> {
    const { rolloutId, attemptId, leaseToken } = lease;
    const completion = create(CompletionDesc, { ...result, rolloutId, attemptId, leaseToken });
    return this.#end([attemptId], () => this.#submit(completion));
  }

  /** Hands attempts back unfinished; answers for each why it was refused, `undefined` = done. */
  async release(leases: readonly Lease[], reason = ""): Promise<(StoreError | undefined)[]> {
    if (leases.length === 0) return [];
    const call = this.#end(
      leases.map((lease) => lease.attemptId),
      () => this.#connection.runner.releaseAttempts({ workerId: this.workerId, leases: leases.map(held), reason }),
    );
    return (await call).results.map(({ error }) => error && itemError(error));
  }

  /** Ends the stream, handing back what is still held. */
  async close(): Promise<void> {
    this.#stop.abort();
    this.#outgoing?.end();
    try {
      await this.release([...this.#held.values()], "the worker left");
    } finally {
      this.#events.end();
    }
  }

  async #end<T>(attemptIds: readonly string[], call: () => Promise<T>): Promise<T> {
    // A renewal that crosses the call finds the lease over: that is no loss.
    for (const id of attemptIds) this.#ending.add(id);
    const forget = (): void => attemptIds.forEach((id) => this.#held.delete(id));
    try {
      const result = await call();
      forget();
      return result;
    } catch (error) {
      if (error instanceof LeaseLost || error instanceof NotFound || error instanceof IllegalTransition) forget();
      throw error;
    } finally {
      for (const id of attemptIds) this.#ending.delete(id);
    }
  }

  #submit(completion: Completion): Promise<Rollout | undefined> {
    return new Promise((resolve, reject) => {
      this.#pending.push({ completion, resolve, reject });
      void this.#completePending();
    });
  }

  async #completePending(): Promise<void> {
    if (this.#sending) return;
    this.#sending = true;
    while (this.#pending.length > 0) {
      const batch = this.#pending.splice(0, 1000);
      try {
        const completions = batch.map((one) => one.completion);
        // Results wait for a store that is away as long as it would know the request id of the first try.
        const request = { workerId: this.workerId, completions };
        const { results } = await this.#connection.runner.completeAttempts(request, { timeoutMs: RESULTS_MS });
        batch.forEach(({ resolve, reject }, index) => {
          const result = results[index];
          if (result?.error) reject(itemError(result.error));
          else resolve(result?.rollout);
        });
      } catch (error) {
        for (const { reject } of batch) reject(error);
      }
    }
    this.#sending = false;
  }

  async #run(): Promise<void> {
    const signal = this.#stop.signal;
    for (let tries = 0, refusals = 0; !signal.aborted; ) {
      let reason = "the store ended the stream";
      let wait: number | undefined;
      try {
        await this.#session();
      } catch (failure) {
        if (signal.aborted) return;
        const error = storeError(failure, this.#connection.target);
        if (error.code === Code.PermissionDenied) {
          // A grant may come or come back: wait for it, and say so.
          this.#events.push({ kind: "idle", reason: `not permitted: ${error.message}` });
          await pause(NOT_PERMITTED_MS, signal);
          continue;
        }
        refusals = isTransient(error) || this.#connected ? 0 : refusals + 1;
        if (refusals >= TRIES_OF_A_REFUSED_STREAM) throw error;
        [reason, wait] = [error.message, error.retryAfterMs];
      }
      tries = this.#connected ? 0 : tries + 1;
      if (this.#connected) this.#events.push({ kind: "disconnected", reason });
      this.#connected = false;
      await pause(wait ?? waitAfter(this.#connection.retry, tries), signal);
    }
  }

  async #session(): Promise<void> {
    this.#granted = this.#credits;
    const outgoing = new AsyncQueue<StreamLeasesRequest>();
    this.#outgoing = outgoing;
    this.#open();
    if (this.#draining !== undefined) this.drain(this.#draining);
    const call = this.#connection.runner.streamLeases(outgoing, { ...ENDLESS, signal: this.#stop.signal });
    try {
      for await (const response of call) this.#receive(response);
    } finally {
      this.#outgoing = undefined;
      outgoing.end();
    }
  }

  #open(): void {
    const { runId = this.#connection.runId, queues = [], labels = {} } = this.#options;
    this.#outgoing?.push(
      create(StreamLeasesRequestSchema, {
        message: {
          case: "open",
          value: {
            workerId: this.workerId,
            sessionId: this.sessionId,
            work: { runId, queues: [...queues], labels: toLabels(labels), leaseDuration: toDuration(this.#leaseMs) },
            held: [...this.#held.values()].map(held),
            granted: BigInt(this.#granted),
          },
        },
      }),
    );
  }

  #send(message: StreamLeasesRequest["message"]): void {
    this.#outgoing?.push(create(StreamLeasesRequestSchema, { message }));
  }

  #receive({ message }: StreamLeasesResponse): void {
    switch (message.case) {
      case "opened":
        this.#connected = true;
        this.#events.push({ kind: "connected" });
        for (const attemptId of message.value.lostAttemptIds) this.#lose(attemptId, undefined);
        break;
      case "delivery":
        for (const work of message.value.rollouts) this.#deliver(work);
        break;
      case "commands":
        this.#command(message.value.commands);
        break;
      case "idle":
        this.#events.push({ kind: "idle", reason: message.value.reason });
        break;
      default: // a drain: the stream ends and is opened again; what a newer store says is left alone
    }
  }

  #deliver(work: LeasedRollout): void {
    if (!work.lease) throw new TypeError("the store delivered work without a lease");
    this.#credits = Math.max(0, this.#credits - 1);
    this.#held.set(work.lease.attemptId, work.lease);
    this.#events.push({ kind: "delivered", work });
  }

  #lose(attemptId: string, error: StoreError | undefined): void {
    if (this.#ending.has(attemptId) || !this.#held.delete(attemptId)) return;
    this.#events.push({ kind: "lost", attemptId, error });
  }

  #command(commands: readonly WorkerCommand[]): void {
    for (const command of commands) {
      const acknowledged = this.#acknowledged.get(command.commandId);
      if (acknowledged) this.acknowledge(command); // that answer was lost with a stream
      if (acknowledged !== undefined) continue;
      this.#acknowledged.set(command.commandId, false);
      this.#events.push({ kind: "command", command });
    }
  }

  async #renew(): Promise<void> {
    const signal = this.#stop.signal;
    while (!signal.aborted) {
      const durations = [...this.#held.values()].map((lease) => fromDuration(lease.duration) ?? this.#leaseMs);
      const shortest = Math.min(this.#leaseMs, ...durations);
      await pause(shortest / RENEWALS_OF_A_LEASE, signal);
      const leases = [...this.#held.values()];
      if (leases.length === 0 || signal.aborted) continue;
      try {
        const request = { workerId: this.workerId, leases: leases.map(held) };
        // No longer than until the next is due: within one call the waits between tries grow, and could outlast a lease.
        const timeoutMs = Math.max(SHORTEST_RENEWAL_MS, shortest / RENEWALS_OF_A_LEASE);
        const answer = await this.#connection.runner.renewLeases(request, { timeoutMs, signal });
        for (const { attemptId, duration, error } of answer.renewals) {
          if (error) this.#lose(attemptId, itemError(error));
          else if (duration && this.#held.has(attemptId)) this.#held.get(attemptId)!.duration = duration;
        }
        this.#command(answer.commands);
      } catch (failure) {
        const error = storeError(failure, this.#connection.target);
        if (!isTransient(error) && error.code !== Code.DeadlineExceeded && !signal.aborted) throw error;
      }
    }
  }
}

function held({ attemptId, leaseToken }: Lease): { attemptId: string; leaseToken: Uint8Array } {
  return { attemptId, leaseToken };
}
