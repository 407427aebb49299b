// Reads a request as one line of JSON, sends it with OpenAI's client for Node or with the AI SDK, and writes the answer.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany } from "ai";
import OpenAI from "openai";
import { text } from "node:stream/consumers";

const { call, baseURL, apiKey, ...fields } = JSON.parse(await text(process.stdin));
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const calls = {
  async embed() {
    const answer = await client.embeddings.create(fields);
    return { model: answer.model, usage: answer.usage, vectors: answer.data.map((item) => Array.from(item.embedding)) };
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },
  async model() {
    return (await client.models.retrieve(fields.model)).id;
  },
  async embedMany() {
    const provider = createOpenAICompatible({ name: "gateway", baseURL, apiKey });
    const answer = await embedMany({ model: provider.embeddingModel(fields.model), values: fields.input, maxRetries: 0 });
    return { vectors: answer.embeddings, tokens: answer.usage.tokens };
  },
};

try {
  console.log(JSON.stringify({ result: await calls[call]() }));
} catch (error) {
  const { name, message, status, code, param } = error;
  console.log(JSON.stringify({ error: { name, message, status, code, param } }));
}
