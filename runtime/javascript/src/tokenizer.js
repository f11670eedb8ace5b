/**
 * Texts to token ids, by the bundle's own `tokenizer.json`.
 *
 * The file's truncation and padding are replaced: texts are cut at the model's limit, at the side that the manifest
 * names, with their special tokens kept, and padded later, per batch.
 */
import { Tokenizer } from "@huggingface/tokenizers";

import { BundleError, EmbedgeError, reasonOf, shown } from "./errors.js";
import { makeNormalizer, UnknownComponent } from "./normalizers.js";
import { checkAddedTokens, checkModel, checkPreTokenizer, correctPreTokenizer, readWrapping } from "./pretokenizers.js";

/**
 * One text.
 * @typedef {object} Tokens
 * @property {number[]} ids
 * @property {number[]} typeIds
 * @property {boolean} truncated Whether it was cut.
 * @property {number} unpooled How many of the first tokens pooling leaves out.
 * @property {number | null} attended How many of the first tokens others attend to, null for all.
 * @property {boolean[] | null} scored Which have a vector of their own among multi-vectors, null for all.
 */

/** A tokenizer file with what the manifest says about it. */
export class TextTokenizer {
  /**
   * @param {Uint8Array} bytes Of the file.
   * @param {string} file Its name, for messages.
   * @param {import("./manifest.js").TokenizerSettings} settings
   * @param {number[]} lengths Limits that texts will be cut at.
   * @throws {BundleError} If it is no tokenizer, cannot keep to a limit, or has parts that are not known to give the
   *   ids that Python gives.
   */
  constructor(bytes, file, settings, lengths) {
    this.file = file;
    this.settings = settings;
    try {
      const config = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
      checkModel(config.model);
      checkPreTokenizer(config.pre_tokenizer, config.normalizer);
      checkAddedTokens(config.added_tokens ?? []);
      this.wrapping = readWrapping(config.post_processor);
      const normalizer = makeNormalizer(config.normalizer);
      // Wrapped and cut here. Without a decoder none is made of parts that the library may lack.
      this.library = new Tokenizer(
        { normalizer: null, pre_tokenizer: null, added_tokens: [], ...config, post_processor: null, decoder: null },
        { unk_token: config.model.unk_token },
      );
      if (config.normalizer) this.library.normalizer = /** @type {any} */ (normalizer);
      correctPreTokenizer(this.library.pre_tokenizer, config.pre_tokenizer);
    } catch (error) {
      if (error instanceof UnknownComponent) {
        throw new BundleError(
          `${file}: ${error.message} is not known to give the same tokens here as in Python; ` +
            "embed with embedge in Python, or ask `embedge serve` over HTTP",
        );
      }
      throw new BundleError(`${file}: not a tokenizer (${reasonOf(error)}); copy or export the bundle again`);
    }
    const least = Math.min(...lengths);
    if (this.room(least) < 0) {
      throw new BundleError(
        `${file}: not a tokenizer that cuts at ${least} tokens: its special tokens leave no room for ` +
          "a text; copy or export the bundle again",
      );
    }
  }

  /**
   * Tokens of a text that is not wrapped yet.
   * @param {number} maxLength
   */
  room(maxLength) {
    const { before, after } = this.wrapping;
    return maxLength - before.length - after.length - (this.settings.append_eos_token_id === null ? 0 : 1);
  }

  /**
   * @param {string} text With its prompt; lone surrogates are read as U+FFFD.
   * @returns {number[]} Ids without the special tokens around it.
   */
  bare(text) {
    let ids;
    try {
      ids = this.library.encode(text.toWellFormed(), { add_special_tokens: false }).ids;
    } catch (error) {
      throw new BundleError(`${this.file}: the tokenizer failed on ${shown(text)}: ${reasonOf(error)}`);
    }
    if (!ids.every(Number.isInteger)) {
      throw new EmbedgeError(
        `${this.file}: has no token for a part of ${shown(text)}, and none for unknown ones; ` + "leave the part out",
      );
    }
    return ids;
  }

  /**
   * The tokens of a text.
   * @param {string} text With its prompt.
   * @param {number} maxLength Most tokens, special tokens included.
   * @param {number} [unpooled] How many of the first tokens pooling leaves out.
   * @returns {Tokens}
   */
  tokens(text, maxLength, unpooled = 0) {
    const all = this.bare(text);
    const { before, beforeTypes, after, afterTypes, type } = this.wrapping;
    const { append_eos_token_id: eos, truncation_side: side } = this.settings;
    const room = this.room(maxLength);
    const truncated = all.length > room;
    let own = all;
    if (truncated) own = side === "right" ? all.slice(0, room) : all.slice(all.length - room);
    const ids = [...before, ...own, ...after];
    const typeIds = [...beforeTypes, ...own.map(() => type), ...afterTypes];
    if (eos !== null) {
      ids.push(eos);
      typeIds.push(typeIds.at(-1) ?? 0);
    }
    return { ids, typeIds, truncated, unpooled: Math.min(unpooled, ids.length), attended: null, scored: null };
  }

  /**
   * The number of tokens of a text if it were not cut.
   * @param {string} text With its prompt.
   */
  count(text) {
    return this.bare(text).length - this.room(0);
  }

  /**
   * How many of the first tokens of a text are its prompt's: those of the prompt alone.
   *
   * A special token that ends them is the text's. Source: sentence-transformers' `Transformer._get_prompt_length`.
   * @param {string} prompt
   * @param {number} maxLength
   */
  promptTokens(prompt, maxLength) {
    if (prompt === "") return 0;
    const { ids } = this.tokens(prompt, maxLength);
    const ends = ids.length > 0 && this.settings.special_token_ids.includes(/** @type {number} */ (ids.at(-1)));
    return ids.length - (ends ? 1 : 0);
  }

  /**
   * A token as messages have it.
   * @param {number} id
   */
  tokenName(id) {
    const name = this.library.id_to_token(id);
    return name === undefined ? `the id ${id}` : shown(name);
  }
}

/**
 * A text's tokens as a query, a document or neither has them; of late interaction.
 *
 * A text without a token stays so, unless others would attend to what it is filled up with.
 * @param {Tokens} text Cut to the role's length already.
 * @param {import("./manifest.js").LateInteraction} rules
 * @param {"query" | "document" | null} role Null counts as a document where tokens are left out.
 * @returns {Tokens}
 */
export function inRole(text, rules, role) {
  const { expansion, skipped_ids: skipped } = rules;
  if (role === "query" && expansion !== null && (text.ids.length > 0 || expansion.attend)) {
    const missing = Math.max(0, expansion.length - text.ids.length);
    if (missing > 0) {
      const attended = expansion.attend ? null : text.ids.length;
      const filling = new Array(missing);
      text = {
        ...text,
        ids: text.ids.concat(filling.fill(expansion.token_id)),
        typeIds: text.typeIds.concat(new Array(missing).fill(0)),
        attended,
      };
    }
  }
  if (!rules.skipped_in.includes(role ?? "document") || skipped.length === 0) return text;
  return { ...text, scored: text.ids.map((id) => !skipped.includes(id)) };
}
