// Starts a training run, follows its log and metrics, and prints what came of it:
//
//   node dist/examples/training.js 127.0.0.1:4747 RUN '{"agent": "my_agent:agent", "algorithm": "baseline"}'
//
// The configuration is what `agl-grpc train fit` reads from a file; an `agl-grpc train worker` executes it.
// Ctrl-C asks the training run to stop; it is followed until it has.

import { StoreClient, fromPayload } from "../src/index.js";
import { TrainingRunStatus, type TrainingRun } from "../src/gen/agl_grpc/v1/training_pb.js";

/** Asks for a training run; answers its id. */
export async function start(client: StoreClient, runId: string, config: { readonly algorithm?: unknown }): Promise<string> {
  const { algorithm } = config;
  await client.store.createRun({ run: { runId } });
  const made = await client.trainer.createTrainingRun({
    trainingRun: {
      trainingRunId: `${runId}-training`,
      runId,
      algorithm: typeof algorithm === "string" ? algorithm : "none",
      config: await client.payload(config),
    },
  });
  return made.trainingRun!.trainingRunId;
}

/** Shows log and metrics as they come, until the stream ends with the training run; the run as it ended. */
export async function follow(client: StoreClient, trainingRunId: string, show: (line: string) => void): Promise<TrainingRun> {
  for await (const news of client.trainer.watchTrainingRun({ trainingRunId, includeLog: true })) {
    for (const line of news.log) show(line.text);
    for (const step of news.steps) {
      const numbers = step.metrics.filter(({ name }) => !name.startsWith("alarm/"));
      show(`step ${step.step}  ${numbers.map(({ name, value }) => `${name} ${value}`).join("  ")}`);
    }
  }
  return (await client.trainer.getTrainingRun({ trainingRunId })).trainingRun!;
}

const [target = "127.0.0.1:4747", runId = "default", config = "{}"] = process.argv.slice(2);
const client = new StoreClient(target, { runId });
const trainingRunId = await start(client, runId, JSON.parse(config) as object);
process.once("SIGINT", () => void client.trainer.stopTrainingRun({ trainingRunId, reason: "Ctrl-C" }));
const ended = await follow(client, trainingRunId, console.log);
console.log(`${trainingRunId} ${TrainingRunStatus[ended.status].toLowerCase()}`);
if (ended.failure) console.log(ended.failure.message);
console.log(JSON.stringify(fromPayload(ended.result) ?? null));
client.close();
