// A queue between callbacks and an async iterator.

/** Items pushed by producers come out of the iterator in order, until `end` or `fail`. */
export class AsyncQueue<T> implements AsyncIterable<T> {
  #items: T[] = [];
  #ended = false;
  #error: unknown;
  #wake: (() => void)[] = [];

  push(item: T): void {
    this.#items.push(item);
    this.#pulse();
  }

  /** Ends the iteration once what was pushed has been taken. */
  end(): void {
    this.#ended = true;
    this.#pulse();
  }

  /** As `end`, with an error at the end. */
  fail(error: unknown): void {
    this.#error ??= error;
    this.end();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T, void> {
    for (;;) {
      while (this.#items.length > 0) yield this.#items.shift() as T;
      if (this.#error !== undefined) throw this.#error;
      if (this.#ended) return;
      await new Promise<void>((resolve) => this.#wake.push(resolve));
    }
  }

  #pulse(): void {
    for (const wake of this.#wake.splice(0)) wake();
  }
}

/** Wakes everyone who waits, each time it is pulsed. */
export class Signal {
  #waiting: (() => void)[] = [];

  pulse(): void {
    for (const wake of this.#waiting.splice(0)) wake();
  }

  async wait(): Promise<void> {
    await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }
}
