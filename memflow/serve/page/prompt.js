// The box that the scenes are written in: words that the model does not know are marked while they are written.

const $ = (id) => document.getElementById(id);
const DELAY = 250; // milliseconds after the last key

const NOTHING = { error: null, unknown: [], cut: null };
let checked = { text: "", ...NOTHING };
let waiting;

/** Ask the server what of `text` the model does not know; what it says is shown. */
async function check(text) {
  let said = NOTHING;
  if (text.trim()) {
    try {
      const answer = await fetch("v1/check", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ prompt: text }) });
      if (answer.ok) said = await answer.json();
    } catch { /* the server is away: the story itself says so */ }
  }
  if ($("prompt").value === text) {
    checked = { text, ...said };
    show();
  }
  return said;
}

function show() {
  const text = $("prompt").value, mirror = $("mirror");
  const unknown = new Set(checked.unknown.map((word) => word.toLowerCase()));
  mirror.replaceChildren();
  for (const piece of text.split(/(\s+)/)) {
    const [, before, word, after] = piece.match(/^([^\p{L}\p{N}]*)(.*?)([^\p{L}\p{N}]*)$/su);
    if (!word || !unknown.has(word.toLowerCase())) { mirror.append(piece); continue; }
    const mark = document.createElement("mark");
    mark.textContent = word;
    mirror.append(before, mark, after);
  }
  mirror.append("\n"); // a last empty line has its height
  const said = checked.text === text && text.trim() ? sentence(checked) : "";
  if ($("unknown").textContent !== said) $("unknown").textContent = said; // spoken only when it changes
}

function sentence({ error, unknown, cut }) {
  if (error) return error;
  const words = unknown.length ? `The model does not know: ${unknown.join(", ")}.` : "";
  return [words, cut ? `Too long, this end is cut off: \u201c${cut}\u201d.` : ""].join(" ").trim();
}

/** Whether the text can go: what is lost of it has been shown to whoever wrote it. */
export async function shown(text) {
  if (checked.text === text) return true;
  clearTimeout(waiting);
  const marked = new Set([...$("mirror").querySelectorAll("mark")].map((mark) => mark.textContent.toLowerCase()));
  const { error, unknown, cut } = await check(text);
  return !error && !cut && unknown.every((word) => marked.has(word.toLowerCase()));
}

export function write(text) {
  $("prompt").value = text;
  $("prompt").dispatchEvent(new Event("input"));
}

$("prompt").addEventListener("input", () => {
  show();
  clearTimeout(waiting);
  waiting = setTimeout(() => check($("prompt").value), DELAY);
});
$("prompt").addEventListener("scroll", () => { $("mirror").scrollTop = $("prompt").scrollTop; });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  $("form").requestSubmit();
});
