// The calculator agent of `make train`, in TypeScript: asks the model, works out what it asks of the
// calculator, and takes its final answer. It knows nothing of training: a plain OpenAI client against
// the base URL that it is given.
//
//   node dist/examples/calculator.js 127.0.0.1:4747 RUN [CONCURRENCY]
//
// beside a training run whose workers are elsewhere: AGL_CURRENT_ROLE=algorithm make train RUN=RUN

import OpenAI from "openai";
import { pathToFileURL } from "node:url";
import { StoreClient, Worker, type Agent, type Model } from "../src/index.js";

const MAX_TURNS = 3;
const MAX_TOKENS = 20;
const CALL = /^\s*<calc>([\s\S]*?)<\/calc>\s*$/;
const ANSWER = /^\s*Answer: (-?\d{1,9})\s*$/;

interface Task {
  readonly question: string;
  readonly answer: string;
}

/** The reward is 1 for the right answer, else 0. */
export const agent: Agent<Task> = async (task, { model, signal }) => {
  if (!model) throw new Error("no model is published in this run");
  return (await solve(task.question, model, signal)) === task.answer ? 1 : 0;
};

async function solve(question: string, model: Model, signal: AbortSignal): Promise<string | undefined> {
  const client = new OpenAI({ baseURL: model.baseUrl, apiKey: model.apiKey || "unused", timeout: 120_000 });
  const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: "user", content: question }];
  for (let turn = 0; turn < MAX_TURNS; turn++) {
    const answer = await client.chat.completions.create(
      { model: model.model, messages, max_tokens: MAX_TOKENS, ...model.samplingParameters },
      { signal },
    );
    const text = answer.choices[0]?.message.content ?? "";
    const call = CALL.exec(text);
    if (!call) {
      const final = ANSWER.exec(text)?.[1];
      return final === undefined ? undefined : String(Number(final));
    }
    messages.push({ role: "assistant", content: text });
    messages.push({ role: "tool", tool_call_id: `calc-${turn}`, content: calculate(call[1] ?? "") });
  }
  return undefined;
}

/** The value of a chain of whole numbers with + - *, or `error`. */
export function calculate(expression: string): string {
  if (!/^\s*-?\d{1,9}(\s*[-+*]\s*\d{1,9}){0,15}\s*$/.test(expression)) return "error";
  const terms = expression.replace(/\s+/g, "").match(/[-+]?\d+(\*\d+)*/g) ?? [];
  const product = (term: string): bigint => term.split("*").reduce((value, factor) => value * BigInt(Number(factor)), 1n);
  return String(terms.map(product).reduce((sum, value) => sum + value, 0n));
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const [target = "127.0.0.1:4747", runId = "default", concurrency = "16"] = process.argv.slice(2);
  const client = new StoreClient(target, { runId });
  const queues = [runId, `${runId}-validation`]; // where a Trainer puts its rollouts
  await new Worker(client, agent, { concurrency: Number(concurrency), queues }).run();
  client.close();
}
