/** embedge for Node.js: a bundle's folder, on onnxruntime-node. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { BaseEmbedder, OPEN_OPTIONS } from "./embedder.js";
import { EmbedgeError, EmbedgeValueError, reasonOf, shown } from "./errors.js";
import { checkOptions, checkPositive } from "./options.js";
import { checkVersion } from "./sessions.js";

export * from "./errors.js";

/**
 * Embeds texts with a bundle.
 * @typedef {import("./embedder.js").OpenOptions & {threads?: number}} NodeOptions `threads`: threads of a run; by
 *   default ONNX Runtime's choice, the machine's cores.
 */
export class Embedder extends BaseEmbedder {
  /**
   * Opens a bundle. A graph, of a task, is opened at its first use.
   * @param {string | URL} bundle The bundle's folder, a path or a file: URL.
   * @param {NodeOptions} [options]
   * @returns {Promise<Embedder>}
   * @throws {BundleError} If the bundle is missing, damaged, or too new.
   * @throws {EmbedgeValueError} For an argument that cannot be used, with the list of what can.
   */
  static async open(bundle, options) {
    const given = checkOptions("Embedder.open", options, [...OPEN_OPTIONS, "threads"]);
    const threads = given.threads === undefined ? 0 : checkPositive("threads", given.threads); // 0: its choice
    const source = folderSource(folderOf(bundle));
    const ort = await loadRuntime();
    const platform = {
      name: "onnxruntime-node",
      ort,
      options: { executionProviders: ["cpu"], intraOpNumThreads: threads, interOpNumThreads: 1, logSeverityLevel: 4 },
      create: openFromFolder,
    };
    return new Embedder(await BaseEmbedder.read(source, platform, given));
  }
}

/** @type {import("./sessions.js").Platform["create"]} */
async function openFromFolder(files, graph, externals, options) {
  const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
  for (const name of externals) await files.path(folder + name);
  const { InferenceSession } = await loadRuntime();
  return InferenceSession.create(await files.path(graph), /** @type {any} */ (options));
}

async function loadRuntime() {
  let found;
  try {
    found = await import("onnxruntime-node");
  } catch (error) {
    throw new EmbedgeError(
      `embedge needs onnxruntime-node (${reasonOf(error)}); run: npm install onnxruntime-node@1.30`,
    );
  }
  const ort = /** @type {typeof import("onnxruntime-node")} */ (/** @type {any} */ (found).default ?? found);
  checkVersion("onnxruntime-node", ort);
  return ort;
}

/**
 * @param {unknown} bundle
 * @returns {string}
 */
function folderOf(bundle) {
  const text = bundle instanceof URL ? bundle.href : bundle;
  if (typeof text !== "string" || text === "") {
    throw new EmbedgeValueError(`bundle: expected the path of a folder, found ${shown(bundle)}`);
  }
  if (/^file:/i.test(text)) return fileURLToPath(text);
  if (/^[a-z][a-z0-9+.-]+:\/\//i.test(text)) {
    throw new EmbedgeValueError(
      `bundle: expected the path of a folder, found ${shown(text)}; in Node.js a bundle lies on ` +
        "disk: download its folder first",
    );
  }
  return path.resolve(text);
}

/**
 * @param {string} root
 * @returns {import("./files.js").Source}
 */
function folderSource(root) {
  /** @param {string} name */
  const place = (name) => path.join(root, ...name.split("/"));
  return {
    root,
    place,
    read: (name) => readFile(place(name)),
    async look(name) {
      const found = await stat(place(name));
      if (!found.isFile()) throw new Error("not a regular file");
      return { size: found.size, sha256: () => hashOf(place(name)) };
    },
  };
}

/** @param {string} file */
async function hashOf(file) {
  const hash = createHash("sha256");
  for await (const part of createReadStream(file, { highWaterMark: 1 << 20 })) hash.update(part);
  return hash.digest("hex");
}
