// Asks a server by npm's client of OpenAI. Arguments: the folder of node_modules, the server's address.
// Prints a JSON object: an answer, or an error's status, code and field, for each call.
const { createRequire } = require("node:module");
const [folder, url] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/`)("openai");

const open = (apiKey) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const client = open("secret");
const model = "bundle:code";
const calls = {
  text: { model, input: "w1 w2" },
  list: { model, input: ["w1 w2", "w3"] },
  float: { model, input: "w1 w2", encoding_format: "float" },
  base64: { model, input: "w1 w2", encoding_format: "base64" },
  dimensions: { model, input: "w1 w2", dimensions: 4 },
  query: { model: "bundle:retrieval", input: "w1 w2", input_type: "query" },
  wrongModel: { model: "gpt", input: "w1" },
  wrongDimensions: { model, input: "w1", dimensions: 5 },
  unknownField: { model, input: "w1", temperature: 1 },
};

async function answered(call) {
  try {
    const answer = await call();
    return { data: answer.data.map((one) => one.embedding ?? one.id), usage: answer.usage };
  } catch (error) {
    return { status: error.status, code: error.code, param: error.param, name: error.constructor.name };
  }
}

async function main() {
  const found = {};
  for (const [name, body] of Object.entries(calls)) {
    found[name] = await answered(() => client.embeddings.create(body));
  }
  found.models = await answered(() => client.models.list());
  found.wrongKey = await answered(() => open("other").embeddings.create(calls.text));
  console.log(JSON.stringify(found));
}

main();
