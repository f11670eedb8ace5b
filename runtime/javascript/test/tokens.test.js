/** Token ids are those of Python's tokenizers, for every kind of tokenizer that embedding models have. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import path from "node:path";
import { test } from "node:test";

import { TextTokenizer } from "../src/tokenizer.js";
import { CASES, read } from "./cases.js";

const { texts, tokenizers } = read("tokens.json");
/** @param {string} side */
const settings = (side) => ({
  file: "tokenizer.json",
  pad_token_id: 0,
  append_eos_token_id: null,
  truncation_side: side,
  table_rows: null,
  special_token_ids: [],
});
const MOST = 100_000;

for (const [name, { ids, cut }] of Object.entries(tokenizers)) {
  const bytes = readFileSync(path.join(CASES, "tokenizers", `${name}.json`));

  test(`${name}: ids of ${texts.length} texts`, () => {
    const tokenizer = new TextTokenizer(bytes, name, settings("right"), [MOST]);
    assert.ok(texts.length >= 1000);
    texts.forEach((text, index) => {
      assert.deepEqual(tokenizer.tokens(text, MOST).ids, ids[index], JSON.stringify(text));
      assert.equal(tokenizer.count(text), ids[index].length);
    });
  });

  for (const side of ["right", "left"]) {
    test(`${name}: cut on the ${side}`, () => {
      const tokenizer = new TextTokenizer(bytes, name, settings(side), [16]);
      cut[side].forEach(([expected, types, truncated], index) => {
        const found = tokenizer.tokens(texts[index], 16);
        assert.deepEqual(
          [found.ids, found.typeIds, found.truncated],
          [expected, types, truncated],
          JSON.stringify(texts[index]),
        );
      });
    });
  }
}

/** @param {(config: any) => void} change */
function changed(change) {
  const config = JSON.parse(readFileSync(path.join(CASES, "tokenizers/qwen.json"), "utf8"));
  change(config);
  return () => new TextTokenizer(Buffer.from(JSON.stringify(config)), "tokenizer.json", settings("right"), [16]);
}

const ODD = {
  "the normalizer Nmt": (config) => (config.normalizer = { type: "Nmt" }),
  "the pre-tokenizer UnicodeScripts": (config) => (config.pre_tokenizer = { type: "UnicodeScripts" }),
  "the pre-tokenizer Punctuation": (config) => (config.pre_tokenizer = { type: "Punctuation", behavior: "Isolated" }),
  "the pre-tokenizer Split with the behavior MergedWithNext": (config) =>
    (config.pre_tokenizer = { type: "Split", pattern: { String: " " }, behavior: "MergedWithNext", invert: false }),
  "the model BPE with dropout": (config) => (config.model.dropout = 0.1),
  "the model CharBPE": (config) => (config.model.type = "CharBPE"),
  'the added token "odd" with single_word': (config) =>
    config.added_tokens.push({ id: 9, content: "odd", single_word: true, special: false, normalized: true }),
  "a template without the text in one place": (config) =>
    (config.post_processor = { type: "TemplateProcessing", single: [], pair: [], special_tokens: {} }),
};
for (const [what, change] of Object.entries(ODD)) {
  test(`${what} is refused`, () => {
    assert.throws(changed(change), (error) => {
      assert.equal(error.name, "BundleError");
      assert.ok(
        error.message.startsWith(`tokenizer.json: ${what} is not known to give the same tokens`),
        error.message,
      );
      return true;
    });
  });
}

test("lone surrogates are read as U+FFFD", () => {
  const tokenizer = changed(() => {})();
  assert.deepEqual(tokenizer.bare("a\ud800b"), tokenizer.bare("a\ufffdb"));
});

test("special tokens that leave no room are an error", () => {
  const bytes = readFileSync(path.join(CASES, "tokenizers/minilm.json"));
  assert.throws(() => new TextTokenizer(bytes, "t", settings("right"), [1]), /special tokens leave no room/);
});

test("an id that ends texts is appended within the limit", () => {
  const bytes = readFileSync(path.join(CASES, "tokenizers/llama3.json"));
  const tokenizer = new TextTokenizer(bytes, "t", { ...settings("right"), append_eos_token_id: 7 }, [4]);
  const { ids, truncated } = tokenizer.tokens("many words are in here", 4);
  assert.equal(ids.length, 4);
  assert.equal(ids.at(-1), 7);
  assert.ok(truncated);
});
