/**
 * `manifest.json`: everything about a bundle that a caller could get wrong.
 *
 * The format is stated in docs/reference/bundle-format.md. Unknown keys are ignored; a missing or wrong one is an error
 * with its path. What only Python reads, such as the settings of images, is not looked at.
 */
import { listed, ManifestError, reasonOf, shown } from "./errors.js";

export const FORMAT_VERSION = "1.8";

/**
 * @typedef {object} LateInteraction
 * @property {number} query_length
 * @property {number} document_length
 * @property {number} text_length
 * @property {{length: number, token_id: number, attend: boolean} | null} expansion
 * @property {number[]} skipped_ids
 * @property {string[]} skipped_in
 *
 * @typedef {object} Model
 * @property {number} dim
 * @property {boolean} normalize
 * @property {number} max_length
 * @property {number[] | null} matryoshka_dims
 * @property {number | null} truncate_dim
 * @property {number | null} multi_vector_dim
 * @property {string[]} inputs
 * @property {"cosine" | "dot" | "maxsim" | "meanmaxsim"} similarity
 * @property {number | null} image_width Width of an image feature; null where images are not taken.
 * @property {boolean} include_prompt
 * @property {LateInteraction | null} late_interaction
 *
 * @typedef {object} TokenizerSettings
 * @property {string} file
 * @property {number} pad_token_id
 * @property {number | null} append_eos_token_id
 * @property {"right" | "left"} truncation_side
 * @property {number | null} table_rows
 * @property {number[]} special_token_ids
 *
 * @typedef {object} Task
 * @property {Record<string, string>} prompts
 * @property {string | null} default_prompt
 *
 * @typedef {object} Precision
 * @property {Map<string, string>} graphs Path of the graph by task.
 * @property {string[]} devices
 * @property {number} row_multiple
 * @property {boolean} saturates Whether its 8-bit products need exact ones where ONNX Runtime saturates.
 * @property {boolean} unpacked Whether its weights are unpacked when a graph opens, which takes embedge's kernels.
 * @property {Map<string, string>} task_tensors Path, by task, of what it brings to a graph that tasks share.
 *
 * @typedef {object} Manifest
 * @property {string} name The source model's.
 * @property {Model} model
 * @property {TokenizerSettings} tokenizer
 * @property {Map<string, Task>} tasks
 * @property {Map<string, Precision>} precisions
 * @property {Map<string, {size: number, sha256: string}>} files
 */

const NAME = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$/;
const PART = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$/;
const INPUTS = ["input_ids", "attention_mask", "token_type_ids", "pool_mask"];
const IMAGE_INPUTS = ["position_ids", "pool_mask", "image_features", "image_positions"];
const SIMILARITIES = ["cosine", "dot", "maxsim", "meanmaxsim"];

/** A JSON value and where it stands; every reader throws a ManifestError with that place. */
class Value {
  /**
   * @param {any} value
   * @param {string} file
   * @param {string} path
   */
  constructor(value, file, path = "") {
    this.value = value;
    this.file = file;
    this.path = path;
  }

  /**
   * @param {string} problem
   * @returns {never}
   */
  fail(problem) {
    throw new ManifestError([this.file, this.path, problem].filter(Boolean).join(": "));
  }

  /**
   * @param {string} expected
   * @returns {never}
   */
  unlike(expected) {
    if (this.value === undefined) this.fail("missing");
    this.fail(`expected ${expected}, found ${shown(this.value)}`);
  }

  /** @param {string} key */
  member(key) {
    const value = Object.hasOwn(this.object(), key) ? this.value[key] : undefined;
    return new Value(value, this.file, this.path ? `${this.path}.${key}` : key);
  }

  /** @returns {Record<string, any>} */
  object() {
    const is = typeof this.value === "object" && this.value !== null && !Array.isArray(this.value);
    return is ? this.value : this.unlike("an object");
  }

  /** @returns {string} */
  string() {
    return typeof this.value === "string" ? this.value : this.unlike("a string");
  }

  /** @returns {boolean} */
  flag() {
    return typeof this.value === "boolean" ? this.value : this.unlike("true or false");
  }

  /**
   * @param {number} least
   * @returns {number}
   */
  whole(least) {
    if (Number.isSafeInteger(this.value) && this.value >= least) return this.value;
    return this.unlike(`a whole number ≥ ${least}`);
  }

  /** @returns {Value[]} */
  list() {
    if (!Array.isArray(this.value)) this.unlike("a list");
    return this.value.map(
      (/** @type {any} */ item, /** @type {number} */ index) => new Value(item, this.file, `${this.path}[${index}]`),
    );
  }

  /** @returns {[string, Value][]} */
  entries() {
    return Object.keys(this.object()).map((key) => [key, this.member(key)]);
  }

  /**
   * One of some strings.
   * @template {string} Choice
   * @param {readonly Choice[]} choices
   * @returns {Choice}
   */
  choice(choices) {
    const text = /** @type {Choice} */ (this.string());
    return choices.includes(text) ? text : this.unlike(`one of ${choices.join(", ")}`);
  }

  /** A path below the bundle's folder, with `/` between its parts. */
  bundlePath() {
    const path = this.string();
    if (path.split("/").every((part) => PART.test(part))) return path;
    return this.fail(`${shown(path)} is not a path inside the bundle; export it again`);
  }

  /**
   * What a reader makes of it, or something else where it is absent or null.
   * @template Result, Default
   * @param {(value: Value) => Result} read
   * @param {Default} otherwise
   * @returns {Result | Default}
   */
  or(read, otherwise) {
    return this.value === undefined || this.value === null ? otherwise : read(this);
  }

  /**
   * Likewise, but the key has to be there.
   * @template Result
   * @param {(value: Value) => Result} read
   * @returns {Result | null}
   */
  nullable(read) {
    return this.value === null ? null : read(this);
  }
}

/**
 * @param {Uint8Array} bytes Of the file.
 * @param {string} file Its name, for messages.
 * @param {(message: string) => void} warn
 * @returns {Manifest}
 * @throws {ManifestError} With the path of the first key that cannot be used.
 */
export function readManifest(bytes, file, warn) {
  let document;
  try {
    document = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new ManifestError(`${file}: not valid JSON (${reasonOf(error)}); copy or export the bundle again`);
  }
  const root = new Value(document, file);
  checkVersion(root.member("format_version"), warn);
  const manifest = {
    name: root.member("source").member("name").string(),
    model: readModel(root.member("model")),
    tokenizer: readTokenizerSettings(root.member("tokenizer")),
    tasks: readNamed(root.member("tasks"), "task", readTask),
    precisions: readNamed(root.member("precisions"), "precision", readPrecision),
    files: new Map(
      root
        .member("files")
        .entries()
        .map(([path, entry]) => [
          new Value(path, file, "files").bundlePath(),
          { size: entry.member("size").whole(0), sha256: readSha256(entry.member("sha256")) },
        ]),
    ),
  };
  checkNames(root, manifest);
  return manifest;
}

/**
 * @param {Value} place
 * @param {(message: string) => void} warn
 */
function checkVersion(place, warn) {
  const version = place.string();
  const match = /^(\d{1,9})\.(\d{1,9})$/.exec(version);
  if (match === null) return place.unlike('"major.minor"');
  const [knownMajor, knownMinor] = FORMAT_VERSION.split(".").map(Number);
  const [major, minor] = match.slice(1).map(Number);
  if (major !== knownMajor) {
    const hint = major > knownMajor ? "upgrade the package embedge" : "export the bundle again";
    place.fail(`this embedge reads version ${knownMajor}.x, the bundle is ${version}; ${hint}`);
  }
  if (minor > knownMinor) {
    warn(
      `${place.file}: format_version ${version} is newer than ${FORMAT_VERSION}, which this embedge knows; ` +
        "what it does not know is ignored",
    );
  }
}

/**
 * @template Result
 * @param {Value} place
 * @param {string} kind
 * @param {(value: Value) => Result} read
 * @returns {Map<string, Result>}
 */
function readNamed(place, kind, read) {
  const entries = place.entries();
  if (entries.length === 0) place.fail("expected at least one, found none");
  return new Map(
    entries.map(([name, value]) => {
      if (!NAME.test(name)) place.fail(`${shown(name)} is no name of a ${kind}; rename it, or export the bundle again`);
      return [name, read(value)];
    }),
  );
}

/** @param {Value} value */
const texts = (value) => Object.fromEntries(value.entries().map(([name, text]) => [name, text.string()]));
/** @param {Value} value */
const paths = (value) => new Map(value.entries().map(([task, path]) => [task, path.bundlePath()]));
/** @param {Value} value */
const strings = (value) => value.list().map((item) => item.string());
/** @param {Value} value */
const ids = (value) => value.list().map((item) => item.whole(0));
/** @param {Value} value */
const count = (value) => value.whole(1);
/** @param {Value} value */
const id = (value) => value.whole(0);
/** @param {Value} value */
const flag = (value) => value.flag();

/**
 * @param {Value} value
 * @returns {Task}
 */
function readTask(value) {
  const prompts = value.member("prompts").or(texts, {});
  const place = value.member("default_prompt");
  const chosen = place.nullable((name) => name.string());
  if (chosen !== null && !Object.hasOwn(prompts, chosen)) {
    place.fail(`${shown(chosen)} is not in prompts (${listed(Object.keys(prompts))})`);
  }
  return { prompts, default_prompt: chosen };
}

/**
 * @param {Value} value
 * @returns {Precision}
 */
function readPrecision(value) {
  const eightBit = value.member("activation_constants").or((found) => found.entries().length > 0, false);
  return {
    graphs: paths(value.member("graphs")),
    devices: strings(value.member("devices")),
    row_multiple: value.member("row_multiple").or(count, 1),
    saturates: eightBit && !value.member("portable").or(flag, false),
    unpacked: value.member("unpack").or((found) => found.entries().length > 0, false),
    task_tensors: value.member("task_tensors").or(paths, new Map()),
  };
}

/** @param {Value} value */
function readSha256(value) {
  const text = value.string();
  return /^[0-9a-f]{64}$/.test(text) ? text : value.unlike("64 hexadecimal digits");
}

/**
 * @param {Value} value
 * @returns {TokenizerSettings}
 */
function readTokenizerSettings(value) {
  const sides = /** @type {const} */ (["right", "left"]);
  return {
    file: value.member("file").bundlePath(),
    pad_token_id: value.member("pad_token_id").whole(0),
    append_eos_token_id: value.member("append_eos_token_id").or(id, null),
    truncation_side: value.member("truncation_side").or((side) => side.choice(sides), "right"),
    table_rows: value.member("table_rows").or(count, null),
    special_token_ids: value.member("special_token_ids").or(ids, []),
  };
}

/**
 * @param {Value} value
 * @returns {Model}
 */
function readModel(value) {
  const model = {
    dim: value.member("dim").whole(1),
    normalize: value.member("normalize").flag(),
    max_length: value.member("max_length").whole(1),
    matryoshka_dims: value.member("matryoshka_dims").nullable((dims) => dims.list().map(count)),
    truncate_dim: value.member("truncate_dim").or(count, null),
    multi_vector_dim: value.member("multi_vector_dim").nullable(count),
    inputs: strings(value.member("inputs")),
    similarity: value.member("similarity").choice(/** @type {Model["similarity"][]} */ (SIMILARITIES)),
    image_width: value.member("image").or((image) => image.member("hidden_size").whole(1), null),
    include_prompt: value.member("include_prompt").or(flag, true),
    late_interaction: value.member("late_interaction").or(readLateInteraction, null),
  };
  for (const dim of [model.truncate_dim ?? 1, ...(model.matryoshka_dims ?? [])]) {
    if (dim > model.dim) value.fail(`a dimension of ${dim} is above model.dim, ${model.dim}`);
  }
  const known = [...INPUTS, ...(model.image_width === null ? [] : IMAGE_INPUTS)];
  const unknown = model.inputs.filter((name) => !known.includes(name));
  const lacking = INPUTS.slice(0, 2).filter((name) => !model.inputs.includes(name));
  if (unknown.length || lacking.length) {
    value.member("inputs").fail(`expected ${known.join(", ")}, found ${listed(model.inputs)}`);
  }
  if ((model.late_interaction !== null) !== SIMILARITIES.indexOf(model.similarity) > 1) {
    value
      .member("similarity")
      .fail(
        `found ${model.similarity}, where late_interaction is ` +
          (model.late_interaction === null ? "null" : "not null"),
      );
  }
  return model;
}

/**
 * @param {Value} value
 * @returns {LateInteraction}
 */
function readLateInteraction(value) {
  return {
    query_length: value.member("query_length").whole(1),
    document_length: value.member("document_length").whole(1),
    text_length: value.member("text_length").whole(1),
    expansion: value.member("expansion").or(
      (expansion) => ({
        length: expansion.member("length").whole(1),
        token_id: expansion.member("token_id").whole(0),
        attend: expansion.member("attend").flag(),
      }),
      null,
    ),
    skipped_ids: value.member("skipped_ids").or(ids, []),
    skipped_in: value
      .member("skipped_in")
      .or((roles) => roles.list().map((role) => role.choice(["query", "document"])), []),
  };
}

/**
 * Every task and file that is named exists in the manifest.
 * @param {Value} root
 * @param {Manifest} manifest
 */
function checkNames(root, manifest) {
  const named = new Map([["tokenizer.file", manifest.tokenizer.file]]);
  for (const [name, precision] of manifest.precisions) {
    for (const kind of /** @type {const} */ (["graphs", "task_tensors"])) {
      for (const [task, path] of precision[kind]) {
        const key = `precisions.${name}.${kind}.${task}`;
        if (!manifest.tasks.has(task)) {
          throw new ManifestError(`${root.file}: ${key}: no such task; tasks: ${listed(manifest.tasks.keys())}`);
        }
        named.set(key, path);
      }
    }
  }
  for (const [key, path] of named) {
    if (!manifest.files.has(path))
      throw new ManifestError(`${root.file}: ${key}: ${shown(path)} is not listed in files`);
  }
}
