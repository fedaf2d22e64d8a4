// How often and how long calls are tried again.

import type { Interceptor } from "@connectrpc/connect";
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { isTransient, storeError } from "./errors.js";

/** Waits between tries start at `firstWaitMs` and double up to `longestWaitMs`, each shortened at random. */
export interface RetryPolicy {
  /** Bounds one logical call with all its tries, in milliseconds. */
  readonly timeoutMs: number;
  readonly firstWaitMs: number;
  readonly longestWaitMs: number;
}

export const DEFAULT_RETRY: RetryPolicy = { timeoutMs: 120_000, firstWaitMs: 50, longestWaitMs: 2_000 };

/** How long to wait after so many failed tries, in milliseconds. */
export function waitAfter(policy: RetryPolicy, tries: number): number {
  const full = Math.min(policy.longestWaitMs, policy.firstWaitMs * 2 ** Math.min(tries, 16));
  return full * (0.5 + Math.random() / 2);
}

/** Waits; ends early, without an error, when the signal is aborted. */
export async function pause(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, signal ? { signal } : {}).catch((error: unknown) => {
    if (!signal?.aborted) throw error;
  });
}

/**
 * Unary calls: a request id is minted once and kept over all tries, and what may be tried again is,
 * until the call's time is over.
 */
export function retrying(policy: RetryPolicy, target: string): Interceptor {
  return (next) => async (request) => {
    if (request.stream) return next(request);
    const message = request.message as { requestId?: string };
    if (message.requestId === "") message.requestId = randomUUID();
    for (let tries = 0; ; tries++) {
      try {
        return await next(request);
      } catch (failure) {
        const error = storeError(failure, target);
        if (!isTransient(error) || request.signal.aborted) throw failure;
        await pause(error.retryAfterMs ?? waitAfter(policy, tries), request.signal);
        if (request.signal.aborted) throw failure;
      }
    }
  };
}
