// Measures the client against a store, for benchmarks/bench_clients.py: `node measure.js HOST:PORT SPANS ROUNDS`.
//
// Prints one JSON object: spans on disk a second, sent in groups of 100 with 64 groups under way, and the
// milliseconds of each round trip of a lease, from the credit to the completion on disk.

import { AttemptStatus } from "../src/gen/agl_grpc/v1/attempt_pb.js";
import { StoreClient, toKeyValues, type LeaseEvent, type LeaseStream, type SpanGroup } from "../src/index.js";

const GROUP = 100;
const UNDER_WAY = 64;
const WARM_UP = 50;
const START = 1_700_000_000_000_000_000n;

function groupOf(at: { rolloutId: string; attemptId: string }, first: number): SpanGroup {
  const spans = Array.from({ length: GROUP }, (_, offset) => {
    const number = first + offset;
    const spanId = Buffer.alloc(8);
    spanId.writeBigUInt64BE(BigInt(number));
    return {
      traceId: Buffer.from("0123456789abcdef"),
      spanId,
      name: "step",
      startTimeUnixNano: START + BigInt(number),
      endTimeUnixNano: START + 1000n + BigInt(number),
      attributes: toKeyValues({ number, text: "the quick brown fox" }),
    };
  });
  return { ...at, spans };
}

async function spansPerSecond(client: StoreClient, count: number): Promise<number> {
  const { rollout } = await client.store.startRollout({ rollout: {} });
  const at = { rolloutId: rollout!.rollout!.rolloutId, attemptId: rollout!.attempt!.attemptId };
  const streamer = client.spans();
  const send = async (first: number): Promise<void> => {
    const { rejected } = await streamer.send(groupOf(at, first));
    if (rejected[0]) throw rejected[0].error;
  };
  await send(1);
  const underWay: Promise<void>[] = [];
  const begun = performance.now();
  for (let first = 1 + GROUP; first <= count; first += GROUP) {
    if (underWay.length === UNDER_WAY) await underWay.shift();
    underWay.push(send(first));
  }
  await Promise.all(underWay);
  const seconds = (performance.now() - begun) / 1000;
  await streamer.close();
  return (count - GROUP) / seconds;
}

async function roundTrips(client: StoreClient, count: number): Promise<number[]> {
  await client.enqueue(Array.from({ length: count + WARM_UP }, () => ({ input: null })));
  const stream: LeaseStream = client.leases({ workerId: "measure-typescript" });
  const events: AsyncIterator<LeaseEvent, void> = stream[Symbol.asyncIterator]();
  const found: number[] = [];
  for (let round = 0; round < count + WARM_UP; round++) {
    const begun = performance.now();
    stream.grant();
    for (;;) {
      const { value: event } = await events.next();
      if (!event) throw new Error("the lease stream ended");
      if (event.kind !== "delivered") continue;
      await stream.complete(event.work.lease!, { status: AttemptStatus.SUCCEEDED });
      break;
    }
    if (round >= WARM_UP) found.push(performance.now() - begun);
  }
  await stream.close();
  return found;
}

const [target, spans, rounds] = process.argv.slice(2);
if (!target || !rounds) throw new Error("usage: node measure.js HOST:PORT SPANS ROUNDS");
const client = new StoreClient(target);
const rate = await spansPerSecond(client, Number(spans));
const trips = await roundTrips(client, Number(rounds));
console.log(JSON.stringify({ spans_per_second: rate, round_trips_ms: trips }));
client.close();
