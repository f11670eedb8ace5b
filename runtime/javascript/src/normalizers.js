/**
 * Normalizers of `tokenizer.json` as the Rust library runs them.
 *
 * `@huggingface/tokenizers` comes close, and gives other ids for some texts in silence: its Precompiled is NFKC, its
 * BertNormalizer overlooks ideographs above U+FFFF, and lower case takes JavaScript's final sigma.
 * Source: huggingface/tokenizers, `tokenizers/src/normalizers`; `spm_precompiled` 0.1.
 */
import * as library from "@huggingface/tokenizers";

const { ReplaceNormalizer } = /** @type {any} */ (library); // missing among its types

/** @typedef {(text: string) => string} Normalizer */

/** Rust's `char::is_whitespace`; JavaScript's `\s` has U+FEFF too, and lacks U+0085. */
export const WHITESPACE = "\\p{White_Space}";

/**
 * What is not known to be as the Rust library has it.
 */
export class UnknownComponent extends Error {}

/**
 * @param {any} config A normalizer of tokenizer.json, or null.
 * @returns {Normalizer}
 * @throws {UnknownComponent}
 */
export function makeNormalizer(config) {
  if (config === null || config === undefined) return (text) => text;
  const make = MAKERS[config.type];
  if (make === undefined) throw new UnknownComponent(`the normalizer ${config.type}`);
  return make(config);
}

/** @type {Record<string, (config: any) => Normalizer>} */
const MAKERS = {
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => lowercase,
  StripAccents: () => (text) => text.replace(/\p{M}/gu, ""),
  Prepend:
    ({ prepend }) =>
    (text) =>
      text === "" ? text : prepend + text,
  Replace: makeReplace,
  Strip:
    ({ strip_left: left, strip_right: right }) =>
    (text) =>
      strip(text, left, right),
  Sequence: ({ normalizers }) => {
    const steps = normalizers.map(makeNormalizer);
    return (text) => steps.reduce((/** @type {string} */ out, /** @type {Normalizer} */ step) => step(out), text);
  },
  BertNormalizer: makeBert,
  Precompiled: ({ precompiled_charsmap: map }) => makePrecompiled(map),
};

/**
 * Lower case of each character by itself.
 * @param {string} text
 */
function lowercase(text) {
  return text.includes("Σ") ? Array.from(text, (character) => character.toLowerCase()).join("") : text.toLowerCase();
}

/**
 * @param {any} config
 * @returns {Normalizer}
 */
function makeReplace(config) {
  if (config.pattern?.String !== undefined) {
    return (text) => text.replaceAll(config.pattern.String, () => config.content);
  }
  const replace = new ReplaceNormalizer({ ...config, content: config.content.replaceAll("$", "$$$$") });
  return (text) => replace.normalize(text);
}

/**
 * @param {string} text
 * @param {boolean} left
 * @param {boolean} right
 */
function strip(text, left, right) {
  if (left) text = text.replace(new RegExp(`^${WHITESPACE}+`, "u"), "");
  return right ? text.replace(new RegExp(`${WHITESPACE}+$`, "u"), "") : text;
}

/**
 * @param {any} config
 * @returns {Normalizer}
 */
function makeBert(config) {
  const accents = config.strip_accents ?? config.lowercase;
  return (text) => {
    if (config.clean_text)
      text = text.replace(/(?![\t\n\r])[\0\uFFFD\p{Cc}\p{Cf}\p{Co}]/gu, "").replace(/\p{White_Space}/gu, " ");
    if (config.handle_chinese_chars) text = text.replace(IDEOGRAPHS, " $& ");
    if (accents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    return config.lowercase ? lowercase(text) : text;
  };
}

const IDEOGRAPHS = new RegExp(
  "[\\u4E00-\\u9FFF\\u3400-\\u4DBF\\u{20000}-\\u{2A6DF}\\u{2A700}-\\u{2B73F}" +
    "\\u{2B740}-\\u{2B81F}\\u{2B920}-\\u{2CEAF}\\uF900-\\uFAFF\\u{2F800}-\\u{2FA1F}]",
  "gu",
);

/**
 * SentencePiece's table of replacements: a double-array trie (Darts) from UTF-8 to texts that end with a zero byte.
 * @param {string} encoded Base64 of: bytes of the trie, uint32; its units, uint32; the texts.
 * @returns {Normalizer}
 */
function makePrecompiled(encoded) {
  const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const trieBytes = view.getUint32(0, true);
  const units = Uint32Array.from({ length: trieBytes / 4 }, (_, index) => view.getUint32(4 + 4 * index, true));
  const texts = bytes.subarray(4 + trieBytes);
  const [encoder, decoder] = [new TextEncoder(), new TextDecoder()];
  const graphemes = new Intl.Segmenter(undefined, { granularity: "grapheme" });
  /** @param {number} unit */
  const offset = (unit) => (unit >>> 10) << ((unit & 0x200) >>> 6);

  /**
   * The replacement of the shortest prefix that has one, as the Rust library takes it.
   * @param {Uint8Array} key
   * @returns {string | null}
   */
  function replacement(key) {
    let at = offset(units[0]);
    for (const byte of key) {
      if (byte === 0) return null;
      at ^= byte;
      const unit = units[at];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return null;
      at ^= offset(unit);
      if ((unit >>> 8) & 1) {
        const start = units[at] & 0x7fffffff;
        return decoder.decode(texts.subarray(start, texts.indexOf(0, start)));
      }
    }
    return null;
  }

  return (text) => {
    let out = "";
    for (const { segment } of graphemes.segment(text)) {
      const key = encoder.encode(segment);
      const whole = key.length < 6 ? replacement(key) : null;
      out += whole ?? Array.from(segment, (one) => replacement(encoder.encode(one)) ?? one).join("");
    }
    return out;
  };
}
