// The page put together: what is chosen, the one session that runs, and what of it is shown where.

import { Connection } from "./connection.js";
import { Curve, ThresholdSlider } from "./curve.js";
import { FileFeed, LiveFeed, openStream } from "./frames.js";
import { InFlight, Signal } from "./in_flight.js";
import { clock, Transcript, webvtt } from "./transcript.js";
import { Subtitle, TranscriptList, Voice } from "./transcript_view.js";

const MOST_LIVE = 8;
const MOST_OF_A_FILE = 16;
const SETTINGS_EVERY_MS = 120;
const HOLD_BEHIND_S = 0.25;
const GO_ON_AHEAD_S = 1;
const KEY = "videollm-online.key";
const STATES = {
  idle: "not connected",
  connecting: "connecting…",
  open: "connected",
  reconnecting: "reconnecting…",
  ending: "finishing…",
  ended: "session ended",
  failed: "not connected",
};

const part = (id) => document.getElementById(id);
const player = part("player");
const curve = new Curve(part("curve"));
const subtitle = new Subtitle(part("subtitle"));
const voice = new Voice();
const list = new TranscriptList(part("transcript"), (time) => {
  player.currentTime = time;
});
const transcript = new Transcript((line) => lineChanged(line));
const slider = new ThresholdSlider(part("plot"), part("threshold"), part("threshold-label"), () => settingsChanged());

player.addEventListener("resize", () => {
  part("stage").style.setProperty("--ratio", player.videoWidth / player.videoHeight || 1);
});

let run = null; // the session that runs, or null

/** One session from Start to its end. */
class Run {
  #settingsTimer = 0;

  constructor(source) {
    this.source = source;
    this.isFile = source === "file";
    this.signal = new Signal();
    this.inFlight = new InFlight(this.isFile ? MOST_OF_A_FILE : MOST_LIVE);
    this.frames = null;
    this.decidedTo = -1;
    this.decided = 0;
    this.fresh = true;
    this.stream = null;
    this.address = null;
    this.held = false;
  }

  /** Throws an Error for people when the source cannot be had. */
  async start() {
    if (this.isFile) {
      const file = part("file").files[0];
      if (!file) throw new Error("Choose a video file first.");
      this.address = URL.createObjectURL(file);
    } else {
      this.stream = await openStream(this.source);
      this.stream.getVideoTracks()[0].addEventListener("ended", () => this.finish());
    }
    if (run !== this) return this.release();
    const url = new URL("v1/realtime", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    this.connection = new Connection(url.href, part("key").value.trim(), this);
    const Feed = this.isFile ? FileFeed : LiveFeed;
    this.feed = new Feed(player, this.connection, this.inFlight, this.signal);
    this.feed.fps = fps();
    if (player.src) URL.revokeObjectURL(player.src);
    if (this.isFile) {
      this.feed.pace = part("pace").value;
      player.srcObject = null;
      player.src = this.address;
      player.controls = true;
      player.muted = false;
    } else {
      player.removeAttribute("src");
      player.srcObject = this.stream;
      player.controls = false;
      player.muted = true;
    }
    this.connection.open();
    player.play().catch(() => {}); // a browser that wants a click first shows its controls
    if (this.isFile) this.feed.run(this.address).then(() => this.finish(), (error) => failed(this, error.message));
    return undefined;
  }

  /** No more frames: what waits is decided and answered, then the session ends. */
  finish() {
    if (this.finishing || run !== this) return;
    this.finishing = true;
    this.feed?.stop();
    this.connection?.finish();
    showState("ending");
    showControls();
  }

  /** What the source and the connection hold. The player keeps a file, so that it can be watched with its lines. */
  release() {
    clearTimeout(this.#settingsTimer);
    this.feed?.stop();
    this.connection?.close();
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    if (this.stream && player.srcObject === this.stream) player.srcObject = null;
  }

  ask(text) {
    const id = `item_${random()}`;
    transcript.ask(id, text);
    this.#askAgain(id, text);
  }

  #askAgain(id, text) {
    if (!this.connection?.ready) return;
    const content = [{ type: "input_text", text }];
    this.connection.say({ type: "conversation.item.create", event_id: id, item: { id, content } });
  }

  interrupt() {
    this.connection?.say({ type: "response.cancel" });
    voice.hush();
  }

  /** Tell new settings soon, but not with every pixel of a drag. */
  settings() {
    if (this.#settingsTimer) return;
    this.#settingsTimer = setTimeout(() => {
      this.#settingsTimer = 0;
      this.#tellSettings();
    }, SETTINGS_EVERY_MS);
  }

  #tellSettings() {
    if (!this.connection?.ready) return;
    const video = { fps: fps(), drop_policy: this.isFile ? "block" : "latest" };
    if (slider.touched) video.threshold = slider.value;
    this.connection.say({ type: "session.update", session: { include: ["frame_decided"], video } });
  }

  /** The file waits where its lines are not known yet. */
  hold() {
    if (!this.isFile || this.feed?.pace !== "playback") return;
    const through = this.finished ? Infinity : this.decidedTo + 1 / fps();
    if (!this.held && !player.paused && player.currentTime > through + HOLD_BEHIND_S) {
      this.held = true;
      player.pause();
    } else if (this.held && through >= player.currentTime + (this.feed.done ? 0 : GO_ON_AHEAD_S)) {
      this.held = false;
      player.play().catch(() => {});
    }
    part("held").hidden = !this.held;
  }

  // What the connection tells:

  state(name) {
    showState(name === "open" && this.finishing ? "ending" : name);
    showControls();
  }

  began(through) {
    this.#tellSettings();
    for (const { id, text } of transcript.unheard) this.#askAgain(id, text);
    this.feed.resume(through);
    this.signal.notify();
  }

  event(event) {
    transcript.take(event);
    switch (event.type) {
      case "session.created":
      case "session.updated":
        return this.#told(event);
      case "frame_decided":
        return this.#frameDecided(event);
      case "response.created":
        if (!event.response.item_id) curve.spoke(event.response.video_time);
        return undefined;
      case "input_video_buffer.status":
      case "session.ended":
        this.frames = event.frames;
        return showFigures();
      case "session.going_away":
        return notice("The server restarts. The session goes on by itself.");
      case "error":
        return this.#error(event.error);
      default:
        return undefined;
    }
  }

  #told({ session, position, type }) {
    part("stage").dataset.fit = session.video.fit;
    if (!slider.touched) slider.show(session.video.threshold);
    // Changes in the middle of a stream are in force where the log says so.
    if (position !== undefined || type === "session.created" || this.decided === 0) {
      curve.applied = session.video.threshold;
      slider.inForce = session.video.threshold;
    }
  }

  #frameDecided({ video_time: time, p_silent: p }) {
    this.decided += 1;
    this.decidedTo = time;
    this.inFlight.settle(time);
    curve.add(time, p);
    part("latest").textContent = `${p.toFixed(2)} at ${clock(time)}. It speaks where the curve is below the line.`;
    this.hold();
    this.signal.notify();
    showFigures();
  }

  #error({ code, message, param, event_id: id, video_time: time }) {
    if (id || code === "refused") transcript.refuse(id ?? param);
    if (code === "frame_skipped" && time !== undefined) {
      this.inFlight.settle(time);
      this.decidedTo = Math.max(this.decidedTo, time); // a player that waits for the model goes on
      this.hold();
      this.signal.notify();
    }
    if (code === "buffer_full") this.inFlight.most = Math.max(1, this.inFlight.most >> 1);
    notice(`The server says: ${message}.`);
  }

  over(text, reason) {
    this.finished = true;
    if (reason === "key") part("key-box").open = true;
    end(this, text);
  }
}

function fps() {
  return Number(part("fps").value);
}

function random() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function start() {
  end(run);
  const source = document.querySelector("input[name=source]:checked").value;
  transcript.clear();
  list.clear();
  list.seekable = source === "file";
  curve.clear();
  subtitle.clear();
  notice("");
  const mine = new Run(source);
  run = mine;
  part("stage").dataset.source = source;
  const opening = part("opening").value.trim();
  if (opening) mine.ask(opening);
  showControls();
  showFigures();
  try {
    await mine.start();
  } catch (error) {
    failed(mine, error.message);
  }
}

function failed(mine, text) {
  if (run !== mine) return;
  end(mine, text);
  if (!mine.decided) part("stage").dataset.source = "none";
}

/** The session is over; `text` says why if that was not the plan. */
function end(mine, text = "") {
  if (!mine || run !== mine) return;
  mine.release();
  mine.finished = true;
  mine.hold?.();
  run = null;
  if (!mine.isFile) part("stage").dataset.source = "none";
  part("held").hidden = true;
  showState(text ? "failed" : "ended");
  if (text) notice(text);
  showControls();
}

function lineChanged(line) {
  list.show(line);
  part("export").disabled = !transcript.lines.some((one) => one.who === "assistant" && one.text.trim());
  part("interrupt").disabled = !run || !transcript.openResponse;
  part("stage").classList.toggle("speaking", Boolean(run && transcript.openResponse));
  if (line.who !== "assistant") return;
  if (list.seekable) subtitle.at(player.currentTime, transcript.lines);
  else subtitle.live(line);
  if (line.state === "open" || !line.text.trim()) return;
  part("spoken").textContent = line.text;
  if (line.reason !== "interrupted") voice.say(line.text);
}

function settingsChanged() {
  run?.settings();
}

function showState(name) {
  const badge = part("connection");
  badge.dataset.state = name;
  if (badge.textContent !== STATES[name]) badge.textContent = STATES[name];
}

function showControls() {
  const running = Boolean(run);
  const button = part("start");
  button.textContent = running ? (run.finishing ? "Stop now" : "Stop") : "Start";
  button.classList.toggle("primary", !running);
  for (const id of ["opening", "file", "key"]) part(id).disabled = running;
  for (const radio of document.querySelectorAll("input[name=source]")) radio.disabled = running;
  part("send").disabled = !running || Boolean(run.finishing);
  part("interrupt").disabled = !running || !transcript.openResponse;
  part("stage").classList.toggle("speaking", Boolean(run && transcript.openResponse));
}

function showFigures() {
  if (!run) return;
  const { frames, feed, inFlight } = run;
  part("lag").textContent = frames?.lag_p50 == null ? "–" : seconds(frames.lag_p50);
  part("behind").textContent = `${inFlight.count} ${inFlight.count === 1 ? "frame" : "frames"}`;
  part("decided").textContent = String(Math.max(run.decided, frames?.decided ?? 0));
  const dropped = (frames?.dropped ?? 0) + (frames?.skipped ?? 0) + (feed?.skipped ?? 0);
  part("dropped").textContent = String(dropped);
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`;
}

function notice(text) {
  part("notice").hidden = !text;
  part("notice-text").textContent = text;
}

function showSource() {
  const isFile = document.querySelector("input[name=source]:checked").value === "file";
  part("file-field").hidden = part("pace-field").hidden = !isFile;
}

function exportVtt() {
  const address = URL.createObjectURL(new Blob([webvtt(transcript.lines)], { type: "text/vtt" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = "transcript.vtt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function passing() {
  part("clock").hidden = !run || run.isFile;
  if (run?.feed && !run.isFile) part("clock").textContent = clock(run.feed.now);
  if (!list.seekable) return;
  subtitle.at(player.currentTime, transcript.lines);
  run?.hold();
  run?.signal.notify();
}

part("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!run) start();
  else if (run.finishing || !run.connection?.ready) end(run);
  else run.finish();
});
part("setup").addEventListener("change", (event) => {
  if (event.target.name === "source") showSource();
  if (event.target.id === "fps" && run?.feed) {
    run.feed.fps = fps();
    settingsChanged();
  }
  if (event.target.id === "pace" && run?.feed) {
    run.feed.pace = part("pace").value;
    run.signal.notify();
  }
});
part("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = part("question").value.trim();
  if (!text || !run || run.finishing) return;
  voice.hush();
  run.ask(text);
  part("question").value = "";
});
part("interrupt").addEventListener("click", () => run?.interrupt());
part("export").addEventListener("click", exportVtt);
part("notice-close").addEventListener("click", () => notice(""));
part("speech").addEventListener("change", ({ target }) => {
  voice.on = target.checked;
  if (!voice.on) voice.hush();
});
part("key").addEventListener("change", ({ target }) => sessionStorage.setItem(KEY, target.value.trim()));
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && run && transcript.openResponse) run.interrupt();
});
addEventListener("pagehide", () => run?.connection?.finish());
for (const name of ["timeupdate", "seeked", "play", "ended"]) player.addEventListener(name, passing);
setInterval(() => {
  passing();
  showFigures();
}, 500);

part("speech-field").hidden = !Voice.possible;
part("key").value = sessionStorage.getItem(KEY) ?? "";
showSource();
showState("idle");
showControls();
