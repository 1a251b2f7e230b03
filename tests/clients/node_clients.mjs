// One client of an embedding server: embeds two texts and prints the vectors as JSON.
//
//     node node_clients.mjs NAME URL KEY

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { OpenAIEmbeddings } from "@langchain/openai";
import { embedMany } from "ai";
import { CohereClient, CohereClientV2 } from "cohere-ai";
import { createJina } from "jina-ai-provider";
import OpenAI from "openai";

const TEXTS = ["how do I edit a photo?", "ein Bildbearbeitungsprogramm"];
const TASKS = { query: "retrieval.query", passage: "retrieval.passage" };

async function bySide(embed) {
  return { query: await embed(TASKS.query, "search_query"), passage: await embed(TASKS.passage, "search_document") };
}

const CLIENTS = {
  async openai(url, key) {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
    const embed = async (model) => (await client.embeddings.create({ model, input: TEXTS })).data.map((item) => item.embedding);
    return { plain: await embed("m"), ...(await bySide((task) => embed(`m:${task}`))) };
  },
  async cohere(url, key) {
    const client = new CohereClientV2({ token: key, environment: url });
    return bySide(async (_, inputType) => {
      const answer = await client.embed({ texts: TEXTS, model: "m", inputType, embeddingTypes: ["float"] });
      return answer.embeddings.float;
    });
  },
  async cohere_v1(url, key) {
    const client = new CohereClient({ token: key, environment: url });
    return bySide(async (_, inputType) => (await client.embed({ texts: TEXTS, model: "m", inputType })).embeddings);
  },
  async langchain_openai(url, key) {
    const model = new OpenAIEmbeddings({ apiKey: key, model: "m", configuration: { baseURL: `${url}/v1` } });
    return { plain: await model.embedDocuments(TEXTS) };
  },
  async ai_sdk_openai_compatible(url, key) {
    const provider = createOpenAICompatible({ name: "x", baseURL: `${url}/v1`, apiKey: key });
    return { plain: (await embedMany({ model: provider.textEmbeddingModel("m"), values: TEXTS })).embeddings };
  },
  async jina_ai_provider(url, key) {
    const provider = createJina({ baseURL: `${url}/v1`, apiKey: key });
    return bySide(async (task) => {
      const providerOptions = { jina: { inputType: task } };
      const model = provider.textEmbeddingModel("jina-embeddings-v3");
      return (await embedMany({ model, values: TEXTS, providerOptions })).embeddings;
    });
  },
};

const [name, url, key] = process.argv.slice(2);
console.log(JSON.stringify(name ? await CLIENTS[name](url, key) : Object.keys(CLIENTS)));
