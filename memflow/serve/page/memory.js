// What the film remembers at the moment on the screen: the timeline, the recalled frames, and the table that says the
// same in words.

const $ = (id) => document.getElementById(id);
const SCENES = ["#5b8fb9", "#6aa67c", "#b5739d", "#c9a545", "#6fb3c4", "#8a78b8", "#a3a155", "#c47f86"];
const BAR = 6, FILM = 52, MARK = 9, GAP = 5; // heights in the timeline, pixels

export const sceneColour = (scene) => SCENES[Math.max(0, scene) % SCENES.length];
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** What is needed to draw the memory of `shown`: its frames with time, scene, picture and place on the scale. */
function read(story, shown) {
  const { memory } = shown;
  const chunks = new Map(story.chunks.map((entry) => [entry.chunk, entry]));
  const values = memory.held.map(({ relevance }) => relevance).filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values);
  const frames = memory.held.map((held) => {
    const start = startOf(held.chunk, chunks, shown);
    return {
      ...held, words: held.words ?? [], seconds: start / story.fps, scene: story.sceneAt(start), thumbnail: chunks.get(held.chunk)?.thumbnail,
      part: Number.isFinite(held.relevance) && high > low ? (held.relevance - low) / (high - low) : 1,
    };
  });
  frames.sort((one, other) => one.frame - other.frame);
  return { shown, chunks, frames, recalled: frames.filter((held) => held.shown > 0) };
}

/** First video frame of a chunk; of one that this page knows nothing of, by the mean length of those up to `shown`. */
const startOf = (chunk, chunks, shown) => chunks.get(chunk)?.start_frame ?? (chunk * shown.start_frame) / Math.max(1, shown.chunk);

export function drawMemory(story, chunk) {
  const seen = chunk && read(story, chunk);
  for (const id of ["strip", "legend", "table"]) $(id).hidden = !seen;
  $("no-memory").hidden = Boolean(seen?.recalled.length);
  $("memory-when").textContent = seen ? `at ${clock(chunk.start_frame / story.fps)}: ${seen.recalled.length} recalled of ${seen.frames.length} kept` : "";
  if (!seen) {
    $("recalled").replaceChildren();
    $("rows").replaceChildren();
    return;
  }
  drawStrip(story, seen);
  drawRecalled(story, seen);
  drawTable(story, seen);
}

const heat = (part) => `color-mix(in oklab, ${colour("high")} ${Math.round(part * 100)}%, ${colour("low")})`;

function drawRecalled(story, { recalled }) {
  const list = $("recalled");
  while (list.children.length > recalled.length) list.lastChild.remove();
  while (list.children.length < recalled.length) list.append($("recalled-frame").content.cloneNode(true));
  recalled.forEach((held, i) => {
    const item = list.children[i];
    const [time, relevance] = item.querySelectorAll(".facts > *");
    const picture = item.querySelector("img");
    item.dataset.frame = held.frame;
    item.style.setProperty("--heat", heat(held.part));
    item.style.setProperty("--part", `${8 + 92 * held.part}%`);
    item.style.setProperty("--scene", sceneColour(held.scene));
    picture.hidden = !held.thumbnail;
    if (held.thumbnail && picture.src !== held.thumbnail) picture.src = held.thumbnail;
    picture.alt = story.scenes[held.scene]?.prompt ?? "";
    time.textContent = clock(held.seconds);
    relevance.textContent = Number.isFinite(held.relevance) ? held.relevance.toFixed(3) : "";
    const words = held.words.map((word) => `\u201c${word}\u201d`).join(", ");
    item.querySelector(".words").textContent = words && `for ${words}`;
  });
}

function drawTable(story, { frames }) {
  if (!$("table").open) return;
  $("rows").replaceChildren(...frames.map((held) => {
    const row = document.createElement("tr");
    row.dataset.frame = held.frame;
    const relevance = Number.isFinite(held.relevance) ? held.relevance.toFixed(3) : "";
    for (const text of [clock(held.seconds), story.scenes[held.scene]?.prompt ?? "", held.shown > 0 ? "yes" : "no", relevance, held.words.join(", ")]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
}

const pictures = new Map(); // decoded thumbnails, by their data URL

function picture(url, story) {
  let image = pictures.get(url);
  if (!image) {
    image = new Image();
    image.onload = () => story.redraw?.();
    image.src = url;
    pictures.set(url, image);
    if (pictures.size > 400) pictures.delete(pictures.keys().next().value);
  }
  return image.complete && image.naturalWidth ? image : null;
}

function drawStrip(story, { shown, chunks, frames, recalled }) {
  const canvas = $("strip"), width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  const last = shown.chunk, step = width / Math.max(24, last + 1); // the film fills the width as it grows
  const top = BAR + GAP, marks = top + FILM + GAP, pad = step > 4 ? 1 : 0;
  const box = (x, y, w, h, fill, radius = 2) => {
    g.fillStyle = fill;
    g.beginPath();
    g.roundRect(x, y, Math.max(1, w), h, radius);
    g.fill();
  };
  const scenes = story.scenes.filter(({ chunk }) => chunk <= last);
  scenes.forEach(({ chunk }, index) => {
    const end = scenes[index + 1]?.chunk ?? last + 1;
    box(chunk * step, 0, (end - chunk) * step - 1.5, BAR, sceneColour(index), 3);
  });

  const ratio = story.size ? story.size[0] / story.size[1] : 1, tile = FILM * ratio;
  const every = Math.max(1, Math.round(tile / step)); // a picture for every so many chunks
  for (let index = 0; index <= last; index += every) {
    const x = index * step, w = Math.min(every, last + 1 - index) * step - 1.5;
    const entry = chunks.get(index), image = entry?.thumbnail && picture(entry.thumbnail, story);
    if (!image) { box(x, top, w, FILM, `${sceneColour(story.sceneAt(startOf(index, chunks, shown)))}55`, 4); continue; }
    g.save();
    g.beginPath();
    g.roundRect(x, top, Math.max(1, w), FILM, 4);
    g.clip();
    const zoom = Math.max(w / image.naturalWidth, FILM / image.naturalHeight), iw = image.naturalWidth * zoom, ih = image.naturalHeight * zoom;
    g.drawImage(image, x + (w - iw) / 2, top + (FILM - ih) / 2, iw, ih);
    g.restore();
  }
  const mark = (index, fill, thin) => box(index * step + pad / 2, marks + (thin ? MARK / 3 : 0), step - pad, thin ? MARK / 3 : MARK, fill);
  for (const name of ["window", "sink"]) for (const frame of shown.memory[name]) mark(Math.floor(frame / story.perChunk), colour(name));
  for (const held of frames) mark(held.chunk, held.shown > 0 ? heat(held.part) : colour("held"), !(held.shown > 0));
  const base = marks + MARK + 3, end = (last + 0.5) * step;
  g.lineWidth = 1.75;
  g.lineCap = "round";
  for (const held of recalled) {
    const x = (held.chunk + 0.5) * step, depth = Math.min(height - base - 3, 12 + Math.abs(end - x) * 0.2) / 0.75;
    g.strokeStyle = heat(held.part);
    g.beginPath();
    g.moveTo(x, base);
    g.bezierCurveTo(x, base + depth, end, base + depth, end, base);
    g.stroke();
  }
  g.strokeStyle = colour("ink");
  g.lineWidth = 2;
  g.beginPath();
  g.roundRect(Math.min(last * step, width - 4) + 1, 1, Math.max(3, step - 3), marks + MARK - 2, 3);
  g.stroke();
  const from = recalled.map(({ seconds }) => clock(seconds)).join(", ");
  canvas.setAttribute("aria-label", `Timeline of ${last + 1} chunks in ${story.scenes.length} scenes` + (from ? `; frames from ${from} are recalled` : ""));
}
