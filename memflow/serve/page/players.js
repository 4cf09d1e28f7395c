// What puts the film on the screen: fragmented MP4 into a <video> where Media Source Extensions are there, JPEG
// pictures onto a <canvas> everywhere else. All have: time, seen (that of the picture on the screen), ahead, paused,
// pause, finish, remove; those that take what the server sends: push.

const KEEP = 20; // seconds behind the playhead that stay in the browser's buffer
const Source = window.ManagedMediaSource || window.MediaSource;

/** The format to ask the server for; `?format=jpeg` in the address asks for the fallback. */
export function format() {
  const asked = new URLSearchParams(location.search).get("format");
  if (asked === "m4s" || asked === "jpeg") return asked;
  return Source?.isTypeSupported('video/mp4; codecs="avc1.640028"') ? "m4s" : "jpeg";
}

/** Bytes of a film without the boxes `ftyp moov` in front, if they are there: a second time they make the decoder stop short. */
function withoutHeader(data) {
  const view = new DataView(data);
  let at = 0;
  for (const name of [0x66747970, 0x6d6f6f76]) if (view.getUint32(at + 4) === name) at += view.getUint32(at);
  return at ? data.slice(at) : data;
}

class VideoPlayer {
  constructor(video, controls) {
    this.video = video;
    video.controls = controls;
    video.hidden = false;
    const presented = (now, { mediaTime }) => { // the picture may be ahead of or behind the clock
      this.picture = mediaTime;
      if (!this.removed) video.requestVideoFrameCallback(presented);
    };
    video.requestVideoFrameCallback?.(presented);
  }

  get time() { return this.video.currentTime; }
  get seen() { return this.picture ?? this.time; }

  remove() {
    this.removed = true;
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
    this.video.controls = false;
    this.video.hidden = true;
  }
}

export class MsePlayer extends VideoPlayer {
  constructor(video, fail) {
    super(video, false);
    this.fail = fail;
    this.queue = [];
    this.paused = false;
    this.media = new Source();
    video.disableRemotePlayback = true; // ManagedMediaSource asks for it
    video.src = this.url = URL.createObjectURL(this.media);
    this.media.addEventListener("sourceopen", () => this.pump(), { once: true });
    this.check = setInterval(() => this.pump(), 250);
  }

  push(data, { mime }) {
    this.mime = mime;
    this.queue.push(data);
    this.pump();
  }

  /** A story that goes on: its film so far comes before what is pushed; it plays from second `at` on, if that is given. */
  begin(response, at) {
    this.at = at;
    this.filling = response
      .then((answer) => (answer.ok ? answer.arrayBuffer() : null), () => null)
      .then((film) => {
        this.filling = null;
        if (film) this.queue.unshift(film);
        this.pump();
      });
  }

  get time() { return this.at ?? this.video.currentTime; }
  get end() { const { buffered } = this.video; return buffered.length ? buffered.end(buffered.length - 1) : 0; }
  get ahead() { return Math.max(0, this.end - this.time); }

  pause(paused) {
    this.paused = paused;
    if (paused) this.video.pause();
    else this.pump();
  }

  finish() {
    this.over = true;
    this.pump();
  }

  remove() {
    clearInterval(this.check);
    super.remove();
    URL.revokeObjectURL(this.url);
    this.media = null;
  }

  pump() {
    const { media, video, queue } = this;
    if (media?.readyState !== "open" || this.filling) return;
    if (!this.buffer && this.mime && queue.length) {
      media.duration = Infinity; // not that of the film so far, at whose end the browser would stop
      this.buffer = media.addSourceBuffer(this.mime);
      this.buffer.addEventListener("updateend", () => this.pump());
      this.buffer.addEventListener("error", () => this.fail("This browser cannot decode the film."));
    }
    const { buffer } = this;
    if (!buffer || buffer.updating) return;
    this.jumpGap();
    if (buffer.buffered.length && video.currentTime - buffer.buffered.start(0) > 2 * KEEP) {
      buffer.remove(0, video.currentTime - KEEP);
    } else if (queue.length) {
      this.append();
    } else if (this.over) {
      media.endOfStream();
    }
    if (!this.paused && video.paused && buffer.buffered.length && !(this.over && video.ended)) {
      video.play().catch((error) => { if (error.name === "NotAllowedError") this.onblocked?.(); });
    }
  }

  append() {
    const { buffer, video, queue } = this;
    if (this.headed) queue[0] = withoutHeader(queue[0]);
    try {
      buffer.appendBuffer(queue[0]);
      queue.shift();
      this.headed = true;
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      // Full: make room behind the playhead; where there is none, `check` tries again when there is.
      if (buffer.buffered.length && video.currentTime - buffer.buffered.start(0) > 2) buffer.remove(0, video.currentTime - 1);
    }
  }

  /** A story that was resumed begins in the middle of its time, and may have a hole where a connection was lost. */
  jumpGap() {
    const { buffered } = this.video;
    if (this.at !== undefined) {
      if (!buffered.length) return;
      this.video.currentTime = Math.max(buffered.start(0), Math.min(this.at, this.end));
      this.at = undefined;
    }
    const { currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) {
      if (currentTime >= buffered.start(i) && currentTime < buffered.end(i) - 0.01) return;
      if (buffered.start(i) > currentTime) {
        this.video.currentTime = buffered.start(i) + 0.001;
        return;
      }
    }
  }
}

export class ImagePlayer {
  constructor(canvas, fps, start) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.fps = fps;
    this.time = start;
    this.paused = false;
    this.queue = [];
    this.decoded = Promise.resolve();
    this.next = 0;
    canvas.hidden = false;
    this.request = requestAnimationFrame((now) => this.show(now));
  }

  push(data, { mime, start_frame }) {
    const decoding = createImageBitmap(new Blob([data], { type: mime }));
    this.decoded = this.decoded.then(async () => this.queue.push({ picture: await decoding, time: start_frame / this.fps }));
  }

  show(now) {
    this.request = requestAnimationFrame((later) => this.show(later));
    if (this.paused || !this.queue.length || now < this.next) return;
    const { picture, time } = this.queue.shift();
    if (this.canvas.width !== picture.width || this.canvas.height !== picture.height) {
      this.canvas.width = picture.width;
      this.canvas.height = picture.height;
    }
    this.context.drawImage(picture, 0, 0);
    picture.close();
    this.time = time;
    this.next = Math.max(this.next + 1000 / this.fps, now - 100); // late by more than that: not made up for
  }

  get seen() { return this.time; }
  get ahead() { return this.queue.length / this.fps; }
  pause(paused) { this.paused = paused; }
  finish() {}

  remove() {
    cancelAnimationFrame(this.request);
    this.canvas.hidden = true;
  }
}

/** A film that is whole, with the browser's own controls. */
export class FilmPlayer extends VideoPlayer {
  constructor(video, url) {
    super(video, true);
    video.src = url;
  }

  get ahead() { return 0; }
  get paused() { return this.video.paused; }
  pause(paused) { if (paused) this.video.pause(); else this.video.play(); }
  finish() {}
}
