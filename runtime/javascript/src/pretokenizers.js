/**
 * Which parts of `tokenizer.json` give the Rust library's ids here, and what it takes to make them.
 *
 * Whatever is not known to is refused by name. tests/javascript/test_tokenizers.py compares the rest.
 */
import * as library from "@huggingface/tokenizers";

import { UnknownComponent, WHITESPACE } from "./normalizers.js";

// Missing among its types.
const { ByteLevelPreTokenizer, PreTokenizer, SequencePreTokenizer } = /** @type {any} */ (library);

const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}"; // the regex crate's \w
/** @type {Record<string, RegExp>} */
const MATCHES = {
  Whitespace: new RegExp(`[${WORD}]+|[^${WORD}${WHITESPACE}]+`, "gu"),
  WhitespaceSplit: /\P{White_Space}+/gu,
  BertPreTokenizer: /[^\p{White_Space}\p{P}!-/:-@[-`{-~]+|[\p{P}!-/:-@[-`{-~]/gu,
};
const BYTE_LEVEL = new RegExp(
  `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${WHITESPACE}\\p{L}\\p{N}]+|` +
    `[${WHITESPACE}]+(?![^${WHITESPACE}])|[${WHITESPACE}]+`,
  "gu",
);

/**
 * @param {any} config A pre-tokenizer of tokenizer.json, or null.
 * @param {any} normalizer What runs before it.
 * @throws {UnknownComponent}
 */
export function checkPreTokenizer(config, normalizer) {
  if (config === null || config === undefined) return;
  switch (config.type) {
    case "Whitespace":
    case "WhitespaceSplit":
    case "BertPreTokenizer":
    case "ByteLevel":
      return;
    case "Metaspace":
      return;
    case "Digits":
      if (config.individual_digits !== undefined) return;
      break;
    case "Split":
      if (["Isolated", "Removed"].includes(config.behavior) && !config.invert) return;
      if (config.pattern.String !== undefined && leavesNone(normalizer, config.pattern.String)) return;
      throw new UnknownComponent(
        `the pre-tokenizer Split with the behavior ${config.behavior}` + (config.invert ? " and invert" : ""),
      );
    case "Sequence":
      config.pretokenizers.forEach((/** @type {any} */ part) => checkPreTokenizer(part, normalizer));
      return;
  }
  throw new UnknownComponent(`the pre-tokenizer ${config.type}`);
}

/**
 * Whether a normalizer replaces every occurrence of a text, so that splitting at it does nothing (Gemma's).
 * @param {any} normalizer
 * @param {string} text
 */
function leavesNone(normalizer, text) {
  const last = normalizer?.type === "Sequence" ? normalizer.normalizers.at(-1) : normalizer;
  return last?.type === "Replace" && last.pattern.String === text && !last.content.includes(text);
}

/**
 * Makes the library's pre-tokenizer split where the Rust one does: by Unicode's classes, not JavaScript's.
 * @param {any} preTokenizer The library's object, changed in place.
 * @param {any} config Its part of tokenizer.json.
 */
export function correctPreTokenizer(preTokenizer, config) {
  if (preTokenizer instanceof SequencePreTokenizer) {
    const parts = /** @type {any} */ (preTokenizer).tokenizers;
    config.pretokenizers.forEach((/** @type {any} */ part, /** @type {number} */ at) =>
      correctPreTokenizer(parts[at], part),
    );
  } else if (preTokenizer instanceof ByteLevelPreTokenizer) {
    /** @type {any} */ (preTokenizer).pattern = BYTE_LEVEL;
  } else if (config?.type === "Split" && config.behavior === "Removed") {
    preTokenizer.pre_tokenize_text = (/** @type {string} */ text) => between(text, preTokenizer.pattern);
  } else if (preTokenizer instanceof PreTokenizer) {
    const digits = config.individual_digits ? /\P{N}+|\p{N}/gu : /\P{N}+|\p{N}+/gu;
    const pattern = config.type === "Digits" ? digits : MATCHES[config.type];
    if (pattern) preTokenizer.pre_tokenize_text = (/** @type {string} */ text) => text.match(pattern) ?? [];
  }
}

/**
 * The parts of a text between matches. `split` would also give what groups of the pattern match.
 * @param {string} text
 * @param {RegExp} pattern
 */
function between(text, pattern) {
  const parts = [];
  let start = 0;
  for (const match of text.matchAll(pattern)) {
    parts.push(text.slice(start, match.index));
    start = match.index + match[0].length;
  }
  return [...parts, text.slice(start)].filter((part) => part !== "");
}

/**
 * @param {any} model Of tokenizer.json.
 * @throws {UnknownComponent}
 */
export function checkModel(model) {
  switch (model?.type) {
    case "WordPiece":
    case "WordLevel":
      return;
    case "Unigram":
      if (model.byte_fallback) throw new UnknownComponent("the model Unigram with byte_fallback");
      if (model.unk_id === null || model.unk_id === undefined)
        throw new UnknownComponent("the model Unigram without unk_id");
      return;
    case "BPE":
      for (const key of ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]) {
        if (model[key]) throw new UnknownComponent(`the model BPE with ${key}`);
      }
      return;
  }
  throw new UnknownComponent(`the model ${model?.type}`);
}

/**
 * @param {any[]} tokens Of tokenizer.json, `added_tokens`.
 * @throws {UnknownComponent}
 */
export function checkAddedTokens(tokens) {
  const odd = tokens.find((token) => token.single_word);
  if (odd !== undefined) throw new UnknownComponent(`the added token ${JSON.stringify(odd.content)} with single_word`);
}

/**
 * Special tokens around a text.
 * @typedef {object} Wrapping
 * @property {number[]} before Ids.
 * @property {number[]} beforeTypes
 * @property {number[]} after
 * @property {number[]} afterTypes
 * @property {number} type Of the text's own tokens.
 */

/**
 * @param {any} config A post-processor of tokenizer.json, or null.
 * @returns {Wrapping}
 * @throws {UnknownComponent}
 */
export function readWrapping(config) {
  const none = { before: [], beforeTypes: [], after: [], afterTypes: [], type: 0 };
  switch (config?.type) {
    case undefined:
    case "ByteLevel":
      return none;
    case "BertProcessing":
    case "RobertaProcessing":
      return { before: [config.cls[1]], beforeTypes: [0], after: [config.sep[1]], afterTypes: [0], type: 0 };
    case "TemplateProcessing":
      return ofTemplate(config);
    case "Sequence": {
      const parts = config.processors
        .map(readWrapping)
        .filter((/** @type {Wrapping} */ part) => part.before.length || part.after.length || part.type);
      if (parts.length > 1) throw new UnknownComponent("a post-processor of several that add tokens");
      return parts[0] ?? none;
    }
  }
  throw new UnknownComponent(`the post-processor ${config.type}`);
}

/**
 * @param {any} config
 * @returns {Wrapping}
 */
function ofTemplate(config) {
  /** @type {[number[], number[]]} */
  const [ids, types] = [[], []];
  let wrapping = null;
  for (const piece of config.single) {
    if (piece.SpecialToken !== undefined) {
      const found = config.special_tokens[piece.SpecialToken.id].ids;
      ids.push(...found);
      types.push(...found.map(() => piece.SpecialToken.type_id));
    } else if (piece.Sequence?.id === "A" && wrapping === null) {
      wrapping = { before: ids.splice(0), beforeTypes: types.splice(0), type: piece.Sequence.type_id };
    } else {
      throw new UnknownComponent("a template without the text in one place");
    }
  }
  if (wrapping === null) throw new UnknownComponent("a template without the text in one place");
  return { ...wrapping, after: ids, afterTypes: types };
}
