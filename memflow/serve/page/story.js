// One story: its connection, its scenes and what it remembered, chunk by chunk. Knows the protocol (docs/serving.md)
// and no element of the page.

import { format } from "./players.js";

const LEAD = 1.5; // seconds of film that the server makes ahead of the playhead
const PING = 20_000;
const RETRIES = [250, 1000, 2000, 4000, 8000, 8000, 8000];
const WHOLE = 120; // seconds of a film that is fetched where this page has missed some of it; a longer one goes on at its end
const PLAIN = {
  busy: "The server tells as many stories as it can. Try again in a moment.",
  not_found: "This story is not kept any more. Start a new one.",
  taken_over: "This story is told in another window now.",
  stalled: "The story was saved while nobody watched. Go on when you like.",
};

export const identifier = () =>
  crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export class Story {
  /**
   * hooks: `change()` after anything that shows, `say(text)` for what a listener should hear, `fail(text)` for what
   * went wrong, `player(format, fps, start)` to make a player.
   */
  constructor(hooks) {
    this.hooks = hooks;
    this.state = "idle"; // idle, connecting, telling, lost, ended
    this.paused = false;
    this.scenes = []; // { prompt, start_frame }
    this.coming = []; // { id, prompt }: sent, not begun
    this.chunks = []; // { chunk, start_frame, thumbnail, memory }, in order
    this.attempt = 0;
  }

  /** Begin with the first scene. */
  begin(prompt, seed, memory) {
    this.connect({ prompt, seed, memflow: { memory, report: true } });
  }

  /** Go on with a story that the server keeps, with a next scene or where it stopped. */
  resume(prompt) {
    this.connect({ prompt, memflow: { resume: this.id, report: true } });
  }

  /** What the server knows of a story that this page has not seen itself; false if it is not kept. */
  async recall(id) {
    const [about, past] = await Promise.all([fetch(`v1/stories/${id}`), fetch(`v1/stories/${id}/chunks`)]);
    if (!about.ok) return false;
    const { fps, width, height, scenes, frames, kept_until } = await about.json();
    const { chunks } = past.ok ? await past.json() : { chunks: [] };
    Object.assign(this, { id, fps, scenes, chunks, frames, size: [width, height], until: kept_until });
    return true;
  }

  connect(request) {
    this.format = format();
    this.state = this.attempt ? "lost" : "connecting";
    const url = new URL("v1/realtime/video", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = url.hash = "";
    const socket = (this.socket = new WebSocket(url));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.tell({ type: "session.start", format: this.format, streaming_buffer_seconds: LEAD, ...request });
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      if (typeof data === "string") this.hear(JSON.parse(data));
      else this.player.push(data, this.meta);
    };
    socket.onclose = () => { if (socket === this.socket) this.closed(); };
    clearInterval(this.ping);
    this.ping = setInterval(() => this.tell({ type: "session.ping" }), PING);
    this.hooks.change();
  }

  tell(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  hear(message) {
    switch (message.type) {
      case "video.start": this.started(message); break;
      case "video.chunk_metadata": this.chunk(message); break;
      case "session.saved": this.saved(message.kept_until); break;
      case "session.done": this.done(message.memflow); break;
      case "error": this.refused(message); break;
      default: return;
    }
    this.hooks.change();
  }

  started({ request_id, memflow }) {
    const again = this.id === request_id;
    const { fps, width, height, scenes, frames } = memflow;
    Object.assign(this, { id: request_id, fps, size: [width, height], state: "telling", attempt: 0 });
    if (again) {
      this.scenes = scenes;
      this.chunks = this.chunks.filter(({ start_frame }) => start_frame < frames); // what comes is sent anew
    }
    let at; // this page has seen some of it already: it goes on where it is
    if (!this.player?.push) {
      this.player?.remove();
      this.player = this.hooks.player(this.format, fps, frames / fps);
      this.player.onblocked = () => this.pause(true);
      at = this.at ?? frames / fps;
    }
    if (this.player.end < frames / fps - 0.01 && frames / fps <= WHOLE) this.player.begin(fetch(`v1/stories/${this.id}.mp4`), at);
    this.pause(this.paused);
    this.reported = undefined; // to the last connection
    this.sendAgain();
    this.hooks.say(again ? "The story goes on." : "The story begins.");
  }

  chunk({ memflow, started_event_ids }) {
    this.meta = memflow;
    const over = [...started_event_ids, ...memflow.dropped_event_ids];
    this.coming = this.coming.filter(({ id }) => !over.includes(id));
    if (!memflow.memory) return; // a further picture of the same chunk
    const { prompt, switched, start_frame, chunk } = memflow;
    // A server that died begins before what was seen: it hears again that the viewer is further on.
    if (start_frame / this.fps < this.player.time) this.reported = undefined;
    if (switched || !this.scenes.length) this.scenes.push({ prompt, start_frame, chunk });
    this.chunks.push(memflow);
  }

  refused({ code, message, event_id }) {
    this.coming = this.coming.filter(({ id }) => id !== event_id);
    this.hooks.fail(PLAIN[code] ?? message);
    this.broken = code;
  }

  saved(until) {
    this.until = until;
    this.hooks.say("The story is saved.");
  }

  done({ reason, kept_until }) {
    this.state = "ended";
    this.until = kept_until;
    this.player?.finish();
    this.hooks.say(reason === "limit" ? "The story is as long as this server lets it be." : "The story has ended.");
  }

  /** Without `session.done` or a reason: the server keeps what was told, so the story is asked for again. */
  closed() {
    clearInterval(this.ping);
    const wait = RETRIES[this.attempt];
    if (this.state === "ended" || this.state === "idle") return;
    if (this.broken || !this.id || wait === undefined) {
      if (!this.broken) this.hooks.fail(this.id ? "The connection is lost. The story is kept; go on when the server is there again." : "The server cannot be reached.");
      if (this.broken === "not_found") this.id = null;
      this.state = this.id ? "ended" : "idle";
      this.player?.finish();
    } else {
      if (this.attempt++ === 1) this.hooks.say("The connection is lost. Trying again.");
      this.state = "lost";
      setTimeout(() => { if (this.state === "lost") this.resume(); }, wait);
    }
    this.hooks.change();
  }

  /** The next scene. Of several that are sent before one begins the server takes the last. */
  send(prompt) {
    const id = identifier();
    this.coming.push({ id, prompt });
    this.tell({ type: "session.interaction", interaction: { event_id: id, event: { prompt } } });
    this.hooks.change();
  }

  /** What was written while there was no connection, or was lost with it; of several the server would take the last. */
  sendAgain() {
    const last = this.coming.at(-1);
    this.coming = [];
    if (last && this.scenes.at(-1)?.prompt !== last.prompt) this.send(last.prompt);
  }

  pause(paused) {
    this.paused = paused;
    this.player?.pause(paused);
    this.tell({ type: "session.pause", paused });
    this.hooks.change();
  }

  save() { this.tell({ type: "session.save" }); }

  stop() { this.tell({ type: "session.stop" }); }

  /** Where the viewer is: the server makes no more than LEAD seconds ahead of it. */
  report() {
    const at = this.player?.time;
    if (this.state !== "telling" || at === undefined || Math.abs(at - (this.reported ?? -1)) < 0.05) return;
    this.reported = at;
    this.tell({ type: "session.playback", position_seconds: at });
  }

  leave() {
    this.state = "idle";
    this.socket?.close();
    clearInterval(this.ping);
    this.player?.remove();
  }

  /** The chunk, and the number of the scene, that are on the screen. */
  get shown() {
    if (!this.player) return {};
    const frame = (this.player.seen + 0.001) * this.fps; // what is a hair short of a frame is that frame
    return { chunk: this.chunks.findLast(({ start_frame }) => start_frame <= frame), scene: this.sceneAt(frame) };
  }

  sceneAt(frame) { return this.scenes.findLastIndex(({ start_frame }) => start_frame <= frame); }
}
