// Server streams that survive disconnects: they resume after the last cursor that was seen.

import type { RetryPolicy } from "./retry.js";
import { pause, waitAfter } from "./retry.js";
import { isTransient, storeError } from "./errors.js";

/** What a resumable stream needs of its connection. */
export interface Resumption {
  readonly target: string;
  readonly retry: RetryPolicy;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Messages of a server stream, opened again by `open` after each break. `advance` is told of every
 * message before it is handed on, so that the next request goes on after it. An endless stream is
 * opened again too when the server ends it (it drains). A store that stays away longer than the
 * retry policy allows ends the iteration with `StoreUnavailable`; aborting the signal ends it quietly.
 */
export async function* resumed<T>(
  open: (signal: AbortSignal) => AsyncIterable<T>,
  advance: (message: T) => void,
  { target, retry, signal }: Resumption,
  endless: boolean,
): AsyncGenerator<T, void> {
  let silentSince = performance.now();
  for (let tries = 0; !signal?.aborted; ) {
    const local = new AbortController();
    const abort = (): void => local.abort();
    signal?.addEventListener("abort", abort);
    try {
      for await (const message of open(local.signal)) {
        tries = 0;
        advance(message);
        yield message;
        silentSince = performance.now(); // the consumer's own time is not the store's silence
      }
      if (!endless) return;
      await pause(retry.firstWaitMs, signal);
    } catch (failure) {
      if (signal?.aborted) return;
      const error = storeError(failure, target);
      const wait = error.retryAfterMs ?? waitAfter(retry, tries);
      if (tries === 0) silentSince = performance.now(); // a stream may be quiet for hours before it breaks
      if (!isTransient(error) || performance.now() + wait - silentSince > retry.timeoutMs) throw error;
      tries++;
      await pause(wait, signal);
    } finally {
      signal?.removeEventListener("abort", abort);
      local.abort();
    }
  }
}
