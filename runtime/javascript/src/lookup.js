/** What a caller names, found in a bundle's manifest: a precision, a task, a prompt, a length of vectors. */
import { EmbedgeValueError, listed, shown } from "./errors.js";

/**
 * @typedef {import("./manifest.js").Manifest} Manifest
 * @typedef {import("./manifest.js").Model} Model
 * @typedef {import("./manifest.js").Precision} Precision
 * @typedef {import("./manifest.js").Task} Task
 */

/**
 * The precision named, or the bundle's only one that runs here.
 * @param {Manifest} manifest
 * @param {string | undefined} name
 * @returns {[string, Precision]}
 */
export function choosePrecision(manifest, name) {
  const known = manifest.precisions;
  if (name === undefined) {
    const usable = [...known].filter(([, precision]) => refusal("", precision) === null);
    if (usable.length === 1) return usable[0];
    if (usable.length > 1) {
      throw new EmbedgeValueError(
        `the bundle has several precisions: ${listed(known.keys())}; choose one, such as ` +
          `precision: ${shown(usable[0][0])}`,
      );
    }
    name = /** @type {string} */ (known.keys().next().value);
  }
  if (name === "auto") {
    throw new EmbedgeValueError(
      'precision: "auto" measures with embedge\'s kernels, in Python; choose one of ' + listed(known.keys()),
    );
  }
  const precision = known.get(name);
  if (precision === undefined) {
    throw new EmbedgeValueError(`the bundle has no precision ${shown(name)}; it has ${listed(known.keys())}`);
  }
  const problem = refusal(name, precision);
  if (problem !== null) throw new EmbedgeValueError(problem);
  return [name, precision];
}

/**
 * Why a precision cannot run outside Python; null where it can.
 * @param {string} name
 * @param {Precision} precision
 */
function refusal(name, precision) {
  if (precision.unpacked) {
    return (
      `precision ${shown(name)} is unpacked when a graph opens, by embedge in Python alone; ` +
      "int4 holds the same weights: export with --precision int4 and open that"
    );
  }
  if (!precision.devices.includes("cpu")) {
    return (
      `precision ${shown(name)} has kernels on ${listed(precision.devices)} alone, and this package runs on the CPU; ` +
      "export with --precision int8 or fp32 and open that"
    );
  }
  return null;
}

/**
 * The task named, or the only one; it has a graph at the precision.
 * @param {Manifest} manifest
 * @param {string} precision
 * @param {string | undefined} task
 */
export function chooseTask(manifest, precision, task) {
  const known = /** @type {Precision} */ (manifest.precisions.get(precision)).graphs;
  if (task === undefined) {
    const [first] = known.keys();
    if (known.size === 1) return first;
    throw new EmbedgeValueError(
      `the bundle has several tasks: ${listed(known.keys())}; choose one, such as ` + `task: ${shown(first)}`,
    );
  }
  if (known.has(task)) return task;
  if (manifest.tasks.has(task)) {
    throw new EmbedgeValueError(
      `task ${shown(task)} has no graph at precision ${shown(precision)}, which has ` + listed(known.keys()),
    );
  }
  throw new EmbedgeValueError(`the bundle has no task ${shown(task)}; it has ${listed(known.keys())}`);
}

/**
 * The text to put before every text, "" for none; an explicit prompt wins over a name.
 * @param {string} name
 * @param {Task} task
 * @param {string | undefined} promptName
 * @param {string | undefined} prompt
 */
export function choosePrompt(name, task, promptName, prompt) {
  if (prompt !== undefined) {
    if (typeof prompt === "string") return prompt;
    throw new EmbedgeValueError(`prompt: expected a string, found ${shown(prompt)}`);
  }
  const chosen = promptName ?? task.default_prompt;
  if (chosen === null) return "";
  if (typeof chosen === "string" && Object.hasOwn(task.prompts, chosen)) return task.prompts[chosen];
  const known = Object.keys(task.prompts);
  const hint = known.length ? `it has ${listed(known)}` : "it declares none; leave promptName out";
  throw new EmbedgeValueError(`task ${shown(name)} has no prompt ${shown(chosen)}; ${hint}`);
}

/**
 * Tasks with an Embedder's own prompts.
 * @param {Map<string, Task>} tasks
 * @param {Record<string, string>} prompts Win over a task's prompts of the same name.
 * @param {string | undefined} defaultPromptName Becomes the default of the tasks that have it.
 * @param {string | undefined} task Has to have it; undefined: all have to.
 * @returns {Map<string, Task>}
 */
export function withPrompts(tasks, prompts, defaultPromptName, task) {
  const given = new Map(
    [...tasks].map(([name, entry]) => [name, { ...entry, prompts: { ...entry.prompts, ...prompts } }]),
  );
  if (defaultPromptName === undefined) return given;
  for (const [name, entry] of given) {
    if (task === undefined || task === name) choosePrompt(name, entry, defaultPromptName, undefined);
    if (Object.hasOwn(entry.prompts, defaultPromptName)) entry.default_prompt = defaultPromptName;
  }
  return given;
}

/**
 * The most tokens of a text, where fewer are wanted than the model takes.
 * @param {Model} model
 * @param {number} length
 * @param {number} least Fewest that leave room for a text.
 */
export function chooseLength(model, length, least) {
  const late = model.late_interaction;
  if (late !== null) {
    throw new EmbedgeValueError(
      `maxSeqLength is ${shown(length)}: a late-interaction model has a length of queries, ` +
        `${late.query_length}, and one of documents, ${late.document_length}, as it was trained; leave it out`,
    );
  }
  if (Number.isSafeInteger(length) && length >= least && length <= model.max_length) return length;
  throw new EmbedgeValueError(
    `maxSeqLength is ${shown(length)}; expected ${least} to ${model.max_length}, as many tokens ` +
      "as the model takes; longer texts are to be split",
  );
}

/**
 * The length of the vectors to give.
 * @param {Model} model
 * @param {number | undefined} truncateDim
 */
export function chooseDim(model, truncateDim) {
  const usual = model.truncate_dim ?? model.dim;
  if (truncateDim === undefined) return usual;
  const declared = model.matryoshka_dims;
  const whole = Number.isSafeInteger(truncateDim) && truncateDim >= 1 && truncateDim <= model.dim;
  if (whole && (declared === null || [...declared, model.dim, usual].includes(truncateDim))) return truncateDim;
  const expected = declared === null ? `1 to ${model.dim}` : `one of ${listed(declared)}`;
  throw new EmbedgeValueError(`truncateDim is ${shown(truncateDim)}; the bundle has ${expected}`);
}
