/** embedge for the browser: a bundle over HTTP, on onnxruntime-web (WebAssembly). */
import { BaseEmbedder, OPEN_OPTIONS } from "./embedder.js";
import { EmbedgeError, EmbedgeValueError, reasonOf, shown } from "./errors.js";
import { urlSource } from "./files.js";
import { checkOptions } from "./options.js";
import { checkVersion } from "./sessions.js";

export * from "./errors.js";

/**
 * Embeds texts with a bundle.
 * @typedef {import("./embedder.js").OpenOptions & {ort?: any}} WebOptions `ort`: the module of onnxruntime-web to use,
 *   where `env.wasm` was set; by default `onnxruntime-web/wasm`.
 */
export class Embedder extends BaseEmbedder {
  /**
   * Opens a bundle. A graph, of a task, is fetched and opened at its first use. Nothing else is fetched than the
   * bundle's files, and what onnxruntime-web fetches of itself.
   * @param {string | URL} bundle Address of the bundle's folder; a relative one counts from the page.
   * @param {WebOptions} [options]
   * @returns {Promise<Embedder>}
   * @throws {BundleError} If the bundle is missing, damaged, or too new.
   * @throws {EmbedgeValueError} For an argument that cannot be used, with the list of what can.
   */
  static async open(bundle, options) {
    const given = checkOptions("Embedder.open", options, [...OPEN_OPTIONS, "ort"]);
    const source = urlSource(addressOf(bundle));
    const ort = given.ort ?? (await loadRuntime());
    checkVersion("onnxruntime-web", ort);
    const platform = {
      name: "onnxruntime-web",
      ort,
      options: { executionProviders: ["wasm"], logSeverityLevel: 4 },
      create: openFromBytes,
    };

    /** @type {import("./sessions.js").Platform["create"]} */
    async function openFromBytes(files, graph, externals, settings) {
      const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
      const [bytes, ...weights] = await Promise.all(
        [graph, ...externals.map((name) => folder + name)].map((name) => files.read(name)),
      );
      const externalData = externals.map((name, at) => ({ path: name, data: weights[at] }));
      return ort.InferenceSession.create(bytes, { ...settings, externalData });
    }

    return new Embedder(await BaseEmbedder.read(source, platform, given));
  }
}

async function loadRuntime() {
  try {
    const found = await import("onnxruntime-web/wasm");
    return /** @type {any} */ (found).default ?? found;
  } catch (error) {
    throw new EmbedgeError(`embedge needs onnxruntime-web (${reasonOf(error)}); run: npm install onnxruntime-web@1.30`);
  }
}

/** @param {unknown} bundle */
function addressOf(bundle) {
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  try {
    if (typeof bundle === "string" || bundle instanceof URL) return new URL(bundle, base);
  } catch {
    // said below
  }
  throw new EmbedgeValueError(`bundle: expected the address of a folder, found ${shown(bundle)}`);
}
