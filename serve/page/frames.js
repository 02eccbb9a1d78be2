// Where frames come from: camera and screen as they are now, a file at every tick of its own clock.

const LONGEST_SIDE_PX = 512;
const JPEG_QUALITY = 0.85;
const MOST_WAITING_BYTES = 1 << 18;
const LEAD_S = 2; // how far frames of a file are sent ahead of its playback
const INSIDE_S = 0.001; // a seek to a frame's first moment may land on the frame before
const PAINTED_MS = 200; // how long the frame from before a seek may still be the one that is drawn
const TELLS = "VideoFrame" in globalThis; // older browsers do not say which frame is drawn

/** The picture that a video shows now, as JPEG bytes; null while it shows none. */
export class Camera {
  #canvas = document.createElement("canvas");

  async picture(video) {
    const { videoWidth: width, videoHeight: height } = video;
    if (!width || !height) return null;
    const scale = Math.min(1, LONGEST_SIDE_PX / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(width * scale));
    this.#canvas.height = Math.max(1, Math.round(height * scale));
    this.#canvas.getContext("2d").drawImage(video, 0, 0, this.#canvas.width, this.#canvas.height);
    const blob = await new Promise((resolve) => this.#canvas.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
    return blob && new Uint8Array(await blob.arrayBuffer());
  }
}

/** A stream of camera or screen. Throws an Error whose message is for people. */
export async function openStream(source) {
  const devices = navigator.mediaDevices;
  if (!devices) throw new Error(`The browser gives a ${source} only to pages from https:// or from this machine.`);
  try {
    if (source === "screen") {
      if (!devices.getDisplayMedia) throw new Error("This browser cannot share a screen.");
      return await devices.getDisplayMedia({ video: true, audio: false });
    }
    return await devices.getUserMedia({ video: { facingMode: { ideal: "environment" } }, audio: false });
  } catch (error) {
    throw new Error(mediaText(source, error), { cause: error });
  }
}

function mediaText(source, error) {
  switch (error.name) {
    case "NotAllowedError":
      return source === "screen"
        ? "No screen was shared."
        : "The camera was refused. Allow it for this page in the browser's settings and start again.";
    case "NotFoundError":
      return "No camera was found. Connect one, or choose a file.";
    case "NotReadableError":
      return `The ${source} cannot be read: another program may be using it.`;
    default:
      return error.message;
  }
}

/** Sends what a stream shows at every tick; a tick that finds no room passes without a frame. */
export class LiveFeed {
  #ticker = new Worker(new URL("ticker.js", import.meta.url));
  #camera = new Camera();
  #busy = false;
  #began = null;
  #last = -1;
  #stopped = false;

  constructor(video, connection, inFlight, signal) {
    this.video = video;
    this.connection = connection;
    this.inFlight = inFlight;
    this.signal = signal;
    this.skipped = 0;
    this.#ticker.onmessage = () => this.#tick();
  }

  /** Seconds since the first frame. */
  get now() {
    return this.#began === null ? 0 : (performance.now() - this.#began) / 1000;
  }

  set fps(fps) {
    this.#ticker.postMessage(1000 / fps);
  }

  stop() {
    this.#stopped = true;
    this.#ticker.terminate();
  }

  /** The server answers for frames up to `through`; what the others showed has passed. */
  resume(through) {
    this.inFlight.dropBeyond(through);
    this.#last = Math.max(this.#last, through);
  }

  async #tick() {
    if (this.#began === null && (!this.connection.ready || !this.video.videoWidth)) return;
    const full = this.inFlight.full || this.connection.waitingBytes > MOST_WAITING_BYTES;
    if (this.#busy || full || !this.connection.ready) {
      this.skipped += 1;
      this.signal.notify();
      return;
    }
    this.#busy = true;
    try {
      this.#began ??= performance.now();
      const time = this.now;
      const bytes = await this.#camera.picture(this.video);
      if (!bytes || this.#stopped || !this.connection.ready || time <= this.#last) return;
      this.#last = time;
      this.inFlight.add(time, bytes);
      this.connection.frame(time, bytes);
    } finally {
      this.#busy = false;
    }
  }
}

/** Sends a file's frame at every tick of its clock, each of them, no sooner than the server has decided others. */
export class FileFeed {
  #camera = new Camera();
  #reader = document.createElement("video");
  #stopped = false;
  #origin = 0;
  #ticks = 0;
  #fps = 2;

  constructor(player, connection, inFlight, signal) {
    this.player = player;
    this.connection = connection;
    this.inFlight = inFlight;
    this.signal = signal;
    this.skipped = 0;
    this.pace = "playback";
    this.done = false;
  }

  get now() {
    return this.player.currentTime;
  }

  /** In the middle of a file the new rate counts from the next tick on. */
  set fps(fps) {
    if (this.#ticks) this.#origin = this.#next;
    this.#ticks = 0;
    this.#fps = fps;
  }

  get #next() {
    return this.#origin + this.#ticks / this.#fps;
  }

  stop() {
    this.#stopped = true;
    this.signal.notify();
  }

  /** Send again what the server has never got. */
  resume(through) {
    for (const { time, bytes } of this.inFlight.beyond(through)) this.connection.frame(time, bytes);
    this.signal.notify();
  }

  /** All frames, then the end. */
  async run(address) {
    const duration = await this.#load(address);
    while (!this.#stopped && this.#next < duration) {
      if (!this.#mayGo()) {
        await this.signal.changed();
        continue;
      }
      const time = this.#next;
      await this.#seek(Math.min(time + INSIDE_S, duration));
      const bytes = await this.#camera.picture(this.#reader);
      if (this.#stopped) break;
      if (!bytes) throw new Error(`The picture at ${time.toFixed(2)} s of the file cannot be read.`);
      this.#ticks += 1;
      this.inFlight.add(time, bytes);
      if (this.connection.ready) this.connection.frame(time, bytes);
    }
    this.#reader.removeAttribute("src");
    this.#reader.load();
    this.done = true;
  }

  #mayGo() {
    if (!this.connection.ready || this.inFlight.full || this.connection.waitingBytes > MOST_WAITING_BYTES) return false;
    return this.pace === "fast" || this.player.ended || this.#next <= this.player.currentTime + LEAD_S;
  }

  async #load(address) {
    this.#reader.muted = true;
    this.#reader.preload = "auto";
    this.#reader.src = address;
    await happens(this.#reader, "loadeddata");
    if (!this.#reader.videoWidth) throw new Error("The file has no picture.");
    if (!Number.isFinite(this.#reader.duration)) await this.#seek(1e7); // recordings know their length only at their end
    return this.#reader.duration;
  }

  async #seek(time) {
    const before = mediaTime(this.#reader);
    const sought = happens(this.#reader, "seeked");
    this.#reader.currentTime = time;
    await sought;
    // Another thread paints: on a busy machine "seeked" comes first. Two moments of one frame wait in vain.
    const until = performance.now() + PAINTED_MS;
    while (TELLS && [null, before].includes(mediaTime(this.#reader)) && performance.now() < until) await pause();
  }
}

/** Which frame a canvas would get from a video, by its time in the file; null for none. */
function mediaTime(video) {
  if (!TELLS || video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return null;
  const frame = new VideoFrame(video);
  const { timestamp } = frame;
  frame.close();
  return timestamp;
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve));
}

/** Resolves with the next such event of a video. Throws an Error for people when the video fails. */
function happens(video, name) {
  return new Promise((resolve, reject) => {
    const over = new AbortController();
    const once = { once: true, signal: over.signal };
    const end = (settle) => () => {
      over.abort();
      settle();
    };
    const failed = () =>
      reject(new Error("This browser cannot play the file. MP4 with H.264 and WebM are played by most."));
    video.addEventListener(name, end(resolve), once);
    video.addEventListener("error", end(failed), once);
  });
}
