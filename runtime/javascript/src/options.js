/** Checks of arguments, each with what would have been right. */
import { EmbedgeValueError, listed, shown } from "./errors.js";

/**
 * Refuses options that there are none of: JavaScript would leave them out in silence.
 * @param {string} where
 * @param {unknown} options
 * @param {readonly string[]} known
 * @returns {Record<string, any>}
 */
export function checkOptions(where, options, known) {
  if (options === undefined) return {};
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw new EmbedgeValueError(
      `${where}: expected an object of options such as { ${known[0]}: … }, found ${shown(options)}`,
    );
  }
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) {
      const camel = name.replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
      const meant = known.includes(camel) ? `; it is called ${camel} here` : `; there are ${listed(known)}`;
      throw new EmbedgeValueError(`${where} has no option ${shown(name)}${meant}`);
    }
  }
  // Null is "not given", as Python's None.
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null && value !== undefined));
}

/**
 * A whole number of at least 1.
 * @param {string} name
 * @param {unknown} value
 * @returns {number}
 */
export function checkPositive(name, value) {
  if (Number.isSafeInteger(value) && /** @type {number} */ (value) >= 1) return /** @type {number} */ (value);
  throw new EmbedgeValueError(`${name} is ${shown(value)}; expected a whole number of at least 1`);
}

/**
 * @param {string} name
 * @param {unknown} value
 * @returns {boolean}
 */
export function checkFlag(name, value) {
  if (typeof value === "boolean") return value;
  throw new EmbedgeValueError(`${name} is ${shown(value)}; expected true or false`);
}

/**
 * @template {string} Choice
 * @param {string} name
 * @param {unknown} value
 * @param {readonly Choice[]} choices
 * @returns {Choice}
 */
export function checkChoice(name, value, choices) {
  if (choices.includes(/** @type {Choice} */ (value))) return /** @type {Choice} */ (value);
  throw new EmbedgeValueError(`${name} is ${shown(value)}; expected one of ${listed(choices)}`);
}

/**
 * The texts of a call, and whether it was a single one.
 * @param {unknown} inputs
 * @returns {[string[], boolean]}
 */
export function asTexts(inputs) {
  if (typeof inputs === "string") return [[inputs], true];
  if (!Array.isArray(inputs)) {
    throw new EmbedgeValueError(`inputs: expected a string or an array of strings, found ${shown(inputs)}`);
  }
  inputs.forEach((text, index) => {
    if (typeof text !== "string") {
      const missing = text === null || text === undefined ? ", a missing value; fill or drop those" : "";
      throw new EmbedgeValueError(`inputs[${index}]: expected a string, found ${shown(text)}${missing}`);
    }
  });
  return [inputs, false];
}

/**
 * @param {unknown} prompts
 * @returns {Record<string, string>}
 */
export function checkPrompts(prompts) {
  if (prompts === undefined || prompts === null) return {};
  if (typeof prompts !== "object" || Object.prototype.toString.call(prompts) !== "[object Object]") {
    throw new EmbedgeValueError(
      `prompts: expected texts by name, such as { query: "query: " }, found ${shown(prompts)}`,
    );
  }
  for (const [name, text] of Object.entries(prompts)) {
    if (typeof text !== "string") {
      throw new EmbedgeValueError(`prompts.${name}: expected a string, found ${shown(text)}`);
    }
  }
  return { .../** @type {Record<string, string>} */ (prompts) };
}
