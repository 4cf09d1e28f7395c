// The page: what a story says is put on the screen, what the viewer does goes to the story.

import { keepPlace, keptPlace, putStoryInAddress, storyInAddress, wasReloaded } from "./kept.js";
import { clock, drawMemory, sceneColour } from "./memory.js";
import { FilmPlayer, ImagePlayer, MsePlayer } from "./players.js";
import { shown, write } from "./prompt.js";
import { Story } from "./story.js";

const $ = (id) => document.getElementById(id);
const NAMES = { idle: "Ready", connecting: "Connecting", telling: "Telling", paused: "Paused", lost: "Connecting again", ended: "Ended" };
const KEPT = {
  prompt: "What the next scene calls for", fifo: "The newest", diverse: "The most varied, as last seen", original: "The most varied, as first seen",
  archive: "Everything", random: "By chance", none: "Nothing but the last seconds",
};
const CAPTION = 120; // letters
const dark = matchMedia("(prefers-color-scheme: dark)");

const info = await about();
let story = newStory();
let drawn = {}; // what the screen shows already: chunk, scene, scenes

function newStory() {
  const made = new Story({
    change: paint,
    say: (text) => { $("live").textContent = text; },
    fail,
    player: (format, fps, start) => (format === "m4s" ? new MsePlayer($("video"), fail) : new ImagePlayer($("canvas"), fps, start)),
  });
  made.perChunk = info.latent_frames_per_chunk;
  made.redraw = redraw;
  return made;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function about() {
  try {
    const answer = await fetch("v1/info");
    if (answer.ok) return await answer.json();
    fail(answer.status === 401 ? "The server asks for its token: open the address that it printed." : "The server is not ready. Reload the page in a moment.");
  } catch {
    fail("The server cannot be reached.");
  }
  throw new Error("no v1/info");
}

function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text; // nothing is said, or laid out, that has not changed
}

const on = () => story.state === "telling" || story.state === "lost";

function paint() {
  const state = story.state === "telling" && story.paused ? "paused" : story.state;
  $("status").dataset.state = state;
  $("status").textContent = NAMES[state];
  const begun = Boolean(story.id);
  document.documentElement.style.setProperty("--ratio", story.size ? story.size[0] / story.size[1] : info.width / info.height);
  $("blank").hidden = Boolean(story.player);
  $("prompt").placeholder = on() ? "What happens next?" : begun ? "What happens next? Nothing written: the scene goes on." : info.examples[0] ?? "";
  $("prompt-label").textContent = begun ? "Next scene" : "First scene";
  $("go").textContent = on() ? "Send" : begun ? "Go on" : "Start";
  $("go").disabled = story.state === "connecting";
  $("pause").disabled = !on();
  $("pause").dataset.shows = story.paused ? "play" : "pause";
  $("pause-name").textContent = story.paused ? "Go on" : "Pause";
  $("end").disabled = story.state !== "telling";
  $("new").hidden = !begun && story.state !== "ended";
  $("save").disabled = story.state !== "telling";
  $("download").hidden = !begun;
  $("kept").textContent = story.until ? `Kept until ${new Date(story.until * 1000).toLocaleString([], { weekday: "long", hour: "2-digit", minute: "2-digit" })}. This page's address brings the story back.` : "";
  if (begun) {
    $("download").href = `${film()}?download=1`;
    putStoryInAddress(story.id);
  }
  $("examples").hidden = begun;
  $("settings").inert = begun;
  $("settings-note").textContent = begun ? "They were set when the story began." : "They hold from the first scene to the last.";
  drawn.scenes = null;
  follow();
}

const film = () => new URL(`v1/stories/${story.id}.mp4`, location.href).href;

/** What belongs to the picture on the screen; called ten times a second. */
function follow() {
  story.report();
  if (story.state === "ended" && story.player?.push && story.player.ahead < 0.1) showFilm();
  const { chunk, scene } = story.shown;
  put("clock", story.player ? clock(story.player.time) : "");
  put("ahead", story.player && on() ? ` · ${story.player.ahead.toFixed(1)} s ahead` : "");
  if (drawn.scenes !== story.scenes.length || drawn.scene !== scene) {
    drawScenes(scene);
    if (drawn.scene !== scene && story.scenes[scene]) {
      $("caption").textContent = shortened(story.scenes[scene].prompt);
      if (drawn.scene >= 0) $("live").textContent = `Scene: ${story.scenes[scene].prompt}`;
    }
    $("caption").hidden = !story.scenes[scene] || story.player?.video?.controls;
    drawn.scenes = story.scenes.length;
    drawn.scene = scene;
  }
  if (drawn.chunk !== chunk) {
    drawn.chunk = chunk;
    drawMemory(story, chunk);
  }
}

/** The beginning of a long scene: its caption may not cover the film. */
function shortened(prompt) {
  const letters = [...prompt];
  return letters.length > CAPTION ? `${letters.slice(0, CAPTION - 1).join("")}…` : prompt;
}

function drawScenes(current) {
  const item = (index, prompt) => {
    const entry = $("scene").content.cloneNode(true).firstElementChild;
    entry.querySelector(".told").textContent = prompt;
    if (index < 0) {
      entry.className = "coming";
      entry.querySelector(".when").textContent = "next";
      entry.querySelector("button").remove();
      return entry;
    }
    entry.style.setProperty("--scene", sceneColour(index));
    entry.querySelector(".when").textContent = clock(story.scenes[index].start_frame / story.fps);
    if (index === current) entry.setAttribute("aria-current", "true");
    const again = entry.querySelector("button");
    again.setAttribute("aria-label", `Write again: ${prompt}`);
    again.onclick = () => { write(prompt); $("prompt").focus(); };
    return entry;
  };
  const list = $("scenes"), focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
  list.replaceChildren(...story.scenes.map(({ prompt }, index) => item(index, prompt)), ...story.coming.map(({ prompt }) => item(-1, prompt)));
  if (focused >= 0) list.querySelectorAll("button")[focused]?.focus();
  $("no-scenes").hidden = list.children.length > 0;
  list.scrollTop = list.scrollHeight;
}

/** The story has ended: the whole film, with the browser's controls; the memory follows it. */
function showFilm() {
  const at = story.player.time;
  story.player.remove();
  story.player = new FilmPlayer($("video"), film());
  $("video").currentTime = at;
  paint();
}

function settings() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const policy = $("policy").value, memory = { policy };
  if (policy !== "none") memory.bank_frames = number("bank_frames");
  memory.held_frames = $("held_frames").disabled ? null : number("held_frames");
  memory.top_k = number("top_k");
  return [number("seed"), memory];
}

function choosePolicy() {
  $("held_frames").disabled = ["archive", "none"].includes($("policy").value);
  $("bank_frames").disabled = $("policy").value === "none";
}

async function submit(event) {
  event.preventDefault();
  const text = $("prompt").value;
  const prompt = text.trim();
  fail("");
  if (!prompt && (on() || !story.id)) return fail("Write what happens in the scene first.");
  const letters = [...prompt].length, most = info.limits.prompt_characters;
  if (letters > most) return fail(`A scene has at most ${most} letters, this one has ${letters}.`);
  if (!(await shown(text))) {
    $("go").textContent = "Send anyway";
    return;
  }
  if (on()) story.send(prompt);
  else if (story.id) goOn(prompt);
  else story.begin(prompt, ...settings());
  write("");
  $("prompt").focus();
}

function goOn(prompt) {
  const { id, fps, size, scenes, chunks } = story;
  story.leave();
  story = newStory();
  Object.assign(story, { id, fps, size, scenes, chunks });
  story.resume(prompt || undefined);
}

/** The story in the page's address: one that was told here goes on, of one that a link names the film is shown. */
async function openStory(id) {
  if (!id) return;
  const kept = await story.recall(id).catch(() => null);
  if (kept === null) {
    fail("The server cannot be reached. Reload the page in a moment.");
  } else if (!kept) {
    putStoryInAddress(null);
    fail("This story is not kept any more. Start a new one.");
  } else if (wasReloaded()) {
    const { at, paused } = keptPlace(id);
    Object.assign(story, { at, paused: Boolean(paused) });
    story.resume();
  } else {
    story.state = "ended";
    story.player = new FilmPlayer($("video"), film());
  }
}

function startAnew() {
  story.leave();
  story = newStory();
  drawn = {};
  putStoryInAddress(null);
  fail("");
  $("caption").hidden = true;
  paint();
  drawMemory(story, undefined);
  $("prompt").focus();
}

function redraw() {
  if (drawn.chunk) drawMemory(story, drawn.chunk);
}

function setTheme(name) {
  document.documentElement.classList.toggle("dark", name ? name === "dark" : dark.matches);
  redraw();
}

$("form").addEventListener("submit", submit);
$("prompt").addEventListener("input", paint);
$("pause").onclick = () => { story.pause(!story.paused); $("live").textContent = story.paused ? "Paused." : "Going on."; };
$("end").onclick = () => story.stop();
$("save").onclick = () => story.save();
$("new").onclick = startAnew;
$("policy").onchange = choosePolicy;
$("table").ontoggle = redraw;
$("theme").onclick = () => {
  localStorage.theme = document.documentElement.classList.contains("dark") ? "light" : "dark";
  setTheme(localStorage.theme);
};
dark.addEventListener("change", () => setTheme(localStorage.theme));
addEventListener("resize", redraw);
addEventListener("pagehide", () => { if (story.id) keepPlace(story.id, story.player?.time ?? 0, story.paused); });
addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select, video") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "k" && !$("pause").disabled) $("pause").click();
  if (event.key === "/") {
    event.preventDefault();
    $("prompt").focus();
  }
});

setTheme(localStorage.theme);
for (const { name, about } of info.policies) $("policy").add(new Option(KEPT[name] ?? `${name}: ${about}`, name, false, name === info.memory.policy));
for (const name of ["bank_frames", "held_frames", "top_k"]) $(name).value = info.memory[name] ?? "";
for (const name of ["bank_frames", "held_frames"]) $(name).max = info.limits[name];
for (const example of info.examples) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = example;
  button.onclick = () => { write(example); $("prompt").focus(); };
  $("examples").append(button);
}
choosePolicy();
await openStory(storyInAddress());
paint();
setInterval(follow, 100);
