/** Search over twenty sentences; `?bundle=ADDRESS&precision=NAME&task=NAME` opens another bundle. */
import { Embedder } from "embedge/web";

const SENTENCES = [
  "We baked bread with rye flour and let it rise overnight.",
  "Porridge with berries is served until ten o'clock.",
  "The night train to Vienna leaves from platform nine.",
  "Snow on the line delayed every train this morning.",
  "The bridge is closed to lorries until the repair is done.",
  "Her violin was made in Cremona three hundred years ago.",
  "The orchestra rehearses the new symphony on Fridays.",
  "A fox crossed the garden just before sunrise.",
  "Swallows build their nests under the roof of the barn.",
  "The vet vaccinated both kittens yesterday.",
  "The central bank left interest rates unchanged.",
  "Our rent goes up by three percent in January.",
  "The program crashed because a file was missing.",
  "Back up your photos before you update the phone.",
  "A new password has to have at least twelve characters.",
  "The goalkeeper saved two penalties in the final.",
  "She ran the marathon in under three hours.",
  "Drink plenty of water when you have a fever.",
  "The pharmacy on the square is open on Sundays.",
  "Astronomers found water vapour on a distant planet.",
];

const parameters = new URLSearchParams(location.search);
const [form, input, button, status, results] = ["form", "input", "button", "#status", "#results"].map((selector) =>
  document.querySelector(selector),
);

/** @param {string} text @param {boolean} [failed] */
function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

const model = await Embedder.open(parameters.get("bundle") ?? "../../../demo-bundle/", {
  precision: parameters.get("precision") ?? "int8",
  task: parameters.get("task") ?? "retrieval",
}).catch((error) => say(error.message, true));

if (model) {
  try {
    const documents = await model.encodeDocument(SENTENCES);
    await search(documents);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      search(documents).catch((error) => say(error.message, true));
    });
    input.disabled = button.disabled = false;
  } catch (error) {
    say(error.message, true);
  }
}

/** @param {Float32Array[]} documents */
async function search(documents) {
  const started = performance.now();
  const [scores] = model.similarity(await model.encodeQuery(input.value), documents);
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]);
  results.replaceChildren(
    ...order.map((index) => {
      const item = document.createElement("li");
      const [text, score] = [SENTENCES[index], (Math.round(100 * scores[index]) / 100 || 0).toFixed(2)].map(
        (content) => {
          const part = document.createElement("span");
          part.textContent = content;
          return part;
        },
      );
      score.setAttribute("aria-label", `similarity ${score.textContent}`);
      item.style.setProperty("--share", `${Math.max(0, 100 * scores[index])}%`);
      item.append(text, score);
      return item;
    }),
  );
  say(`${SENTENCES.length} sentences at ${model.precision}, ${Math.round(performance.now() - started)} ms.`);
}
