// A real store for the tests: started and stopped by each.

import { spawn, type ChildProcess } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { StoreClient, type ConnectionOptions } from "../src/index.js";

const COMMAND = (process.env["AGL_GRPC_COMMAND"] ?? "agl-grpc").split(" ");

/** A store on disk that can be stopped, killed and started again on its port. */
export class TestStore {
  readonly target: string;
  readonly #folder: string;
  readonly #port: number;
  #process: ChildProcess | undefined;
  readonly #clients: StoreClient[] = [];

  private constructor(folder: string, port: number) {
    this.#folder = folder;
    this.#port = port;
    this.target = `127.0.0.1:${port}`;
  }

  static async start(): Promise<TestStore> {
    const store = new TestStore(await mkdtemp(join(tmpdir(), "agl-ts-")), await freePort());
    await store.up();
    return store;
  }

  async up(): Promise<void> {
    const [program = "agl-grpc", ...first] = COMMAND;
    const more = ["store", "serve", "--database", join(this.#folder, "agl.db"), "--port", String(this.#port), "--no-http"];
    const child = spawn(program, [...first, ...more], { stdio: ["ignore", "pipe", "pipe"] });
    this.#process = child;
    const lines: string[] = [];
    await new Promise<void>((resolve, reject) => {
      child.once("error", reject);
      child.once("exit", (code) => reject(new Error(`the store ended with ${code}:\n${lines.join("\n")}`)));
      for (const stream of [child.stdout, child.stderr]) {
        createInterface({ input: stream }).on("line", (line) => {
          lines.push(line);
          if (line.includes("Starting server")) resolve();
        });
      }
    });
    await this.client().store.getServerInfo({});
  }

  async down(signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
    const child = this.#process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.once("exit", resolve));
    child.kill(signal);
    await ended;
  }

  client(options: ConnectionOptions = {}): StoreClient {
    const client = new StoreClient(this.target, options);
    this.#clients.push(client);
    return client;
  }

  async stop(): Promise<void> {
    for (const client of this.#clients) client.close();
    await this.down("SIGTERM");
    await rm(this.#folder, { recursive: true, force: true });
  }
}

export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Waits until a condition holds. */
export async function until(condition: () => boolean | Promise<boolean>, what: string, ms = 20_000): Promise<void> {
  for (const end = Date.now() + ms; !(await condition()); ) {
    if (Date.now() > end) throw new Error(`not within ${ms} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
