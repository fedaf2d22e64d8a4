// Node with the `openai` package: a program that knows nothing of agl-grpc. Started for each task by
//   agl-grpc runner start --command 'node agent.mjs'
import { readFileSync, writeFileSync } from "node:fs";
import OpenAI from "openai";

const WEATHER = { Paris: "sunny", London: "rainy", Oslo: "snowy" };
const MAX_TURNS = 4;
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Look up the weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

function getWeather({ city }) {
  return `It is ${WEATHER[city] ?? "unknown"} in ${city} now.`;
}

async function solve(question) {
  const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY name this attempt
  const messages = [
    { role: "system", content: "You answer questions about the weather. Look it up with your tool." },
    { role: "user", content: question },
  ];
  for (let turn = 0; turn < MAX_TURNS; turn++) {
    const completion = await client.chat.completions.create({
      model: process.env.OPENAI_MODEL,
      messages,
      tools,
      temperature: 0.2,
    });
    const message = completion.choices[0].message;
    if (!message.tool_calls?.length) return message.content ?? "";
    messages.push(message);
    for (const call of message.tool_calls) {
      const result = getWeather(JSON.parse(call.function.arguments));
      messages.push({ role: "tool", tool_call_id: call.id, content: result });
    }
  }
  return "";
}

const task = JSON.parse(readFileSync(0, "utf8"));
const said = await solve(task.question);
console.log(said);
writeFileSync(process.env.AGL_GRPC_REWARD_FILE, said.includes(task.answer) ? "1" : "0");
