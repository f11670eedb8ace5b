/** What embedge refuses: the tree of the Python package, as far as this one reaches. */

/** Base of all errors that embedge throws on purpose. */
export class EmbedgeError extends Error {
  /**
   * @param {string} message
   * @param {ErrorOptions} [options]
   */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** An argument cannot be used; the message lists what can. */
export class EmbedgeValueError extends EmbedgeError {}

/** A text has more tokens than the model takes, and was not to be cut. */
export class TextTooLongError extends EmbedgeValueError {
  /**
   * @param {number} index The text's, in the call.
   * @param {number} maxLength Tokens that the model takes.
   */
  constructor(index, maxLength) {
    super(`inputs[${index}] is longer than ${maxLength} tokens; shorten it, or pass onTruncate: "ignore"`);
    this.index = index;
    this.maxLength = maxLength;
  }
}

/** A bundle or one of its files is missing, damaged, or not what the manifest says. */
export class BundleError extends EmbedgeError {}

/** A `manifest.json` cannot be used; the message holds the path of the bad key. */
export class ManifestError extends BundleError {}

/** A graph failed while running, or gave something that is not a vector. */
export class InferenceError extends EmbedgeError {}

/**
 * Why something failed, on one line.
 * @param {unknown} error
 */
export function reasonOf(error) {
  return String(error instanceof Error ? error.message : error)
    .replace(/\s+/g, " ")
    .trim();
}

/**
 * A value as messages have it, cut where it gets long.
 * @param {unknown} value
 */
export function shown(value) {
  let text;
  try {
    text = JSON.stringify(value) ?? String(value);
  } catch {
    text = String(value);
  }
  return text.length <= 60 ? text : `${text.slice(0, 57)}...`;
}

/**
 * Names as messages have them.
 * @param {Iterable<unknown>} names
 */
export function listed(names) {
  return [...names].join(", ") || "none";
}
