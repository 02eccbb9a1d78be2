// One session over as many WebSockets as it takes: events come once and in order, and a lost connection resumes.

const HEADER_BYTES = 9; // version byte, video time as a big-endian double
const VERSION = 1;
const FIRST_DELAY_MS = 250;
const LONGEST_DELAY_MS = 8000;
const FIRST_TRIES = 4; // of a connection that never was there
const QUIET_MS = 5000; // without a word while something is expected, after which the server is asked for one
const ANSWER_MS = 10000; // for it to come, else the connection is dead
const FULL = ["sessions_full", "too_many_sessions", "no_capacity"];
const RESUMABLE = ["slow_reader", "going_away"];

/** A frame as the binary message the server reads. */
export function packFrame(time, bytes) {
  const message = new Uint8Array(HEADER_BYTES + bytes.byteLength);
  const view = new DataView(message.buffer);
  view.setUint8(0, VERSION);
  view.setFloat64(1, time);
  message.set(bytes, HEADER_BYTES);
  return message;
}

/**
 * `listener` has: state(name, text), event(event), began(through) once input may be sent, where frames up to
 * `through` are with the server, and over(text) when the session is: `text` says why if that was not the plan.
 */
export class Connection {
  #url;
  #key;
  #listener;
  #socket = null;
  #session = null;
  #position = null;
  #seen = new Set(); // ids of events at #position: an entry may have come in part
  #error = null;
  #tries = 0;
  #timer = 0;
  #heard = 0;
  #asked = null; // when the server was asked for a word
  #watch = 0;
  #ending = false;
  #closed = false;

  constructor(url, key, listener) {
    this.#url = url;
    this.#key = key;
    this.#listener = listener;
    this.ready = false;
    this.onOffline = () => this.#socket && this.#lost();
    this.onOnline = () => this.#hurry();
    addEventListener("offline", this.onOffline);
    addEventListener("online", this.onOnline);
    this.#watch = setInterval(() => this.#check(), 1000);
  }

  /** A network may go away without a word: no close comes then, for many minutes. */
  #check() {
    const now = performance.now();
    if (!this.ready) return;
    if (this.#asked !== null) {
      if (now - this.#asked > ANSWER_MS) this.#lost();
    } else if (now - this.#heard > QUIET_MS && (this.#ending || this.#listener.inFlight.count)) {
      this.#asked = now;
      this.say({ type: "session.update", session: {} }); // changes nothing and is answered
    }
  }

  /** Bytes that the network has not taken yet. */
  get waitingBytes() {
    return this.#socket?.bufferedAmount ?? 0;
  }

  open() {
    clearTimeout(this.#timer);
    if (this.#closed || this.#socket) return;
    this.#error = null;
    const url = new URL(this.#url);
    if (this.#session) {
      url.searchParams.set("session_id", this.#session);
      // The entry at the last position may lack events: ask for it again, what came of it is known by its ids.
      if (this.#position !== null) url.searchParams.set("after", this.#position - 1);
    }
    const protocols = this.#key ? ["realtime", `openai-insecure-api-key.${this.#key}`] : [];
    try {
      this.#socket = new WebSocket(url, protocols);
    } catch (error) {
      const text = error.name === "SyntaxError" ? "The key has characters that no key has." : String(error.message);
      this.#over(text, "key");
      return;
    }
    this.#listener.state(this.#tries || this.#session ? "reconnecting" : "connecting");
    const socket = this.#socket;
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#receive(JSON.parse(data));
    };
    socket.onclose = ({ code }) => {
      if (socket === this.#socket) this.#lost(code);
    };
  }

  say(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  frame(time, bytes) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(packFrame(time, bytes));
  }

  /** No more frames: the session ends once all is decided and answered. */
  finish() {
    this.#ending = true;
    if (this.ready) this.say({ type: "input_video_buffer.end" }); // else once what was lost is sent again
  }

  /** Leave at once. */
  close() {
    const socket = this.#socket;
    this.#release();
    this.#socket = null; // what it still says is about another session
    socket?.close(1000);
  }

  #receive(event) {
    this.#heard = performance.now();
    this.#asked = null;
    if (event.position !== undefined && this.#known(event)) return;
    if (event.type === "session.created") {
      this.#tries = 0;
      this.#session = event.session.id;
      this.#listener.event(event);
      if (!event.resumed) this.#begin(-1);
      return;
    }
    if (event.type === "error") this.#error = event.error;
    if (event.type === "input_video_buffer.status" && !this.ready) this.#begin(event.frames.through ?? -1);
    this.#listener.event(event);
    if (event.type === "session.ended") this.#over("");
  }

  #begin(through) {
    this.ready = true;
    this.#listener.state("open");
    this.#listener.began(through);
    if (this.#ending) this.finish();
  }

  #known(event) {
    if (event.position !== this.#position) {
      if (this.#position !== null && event.position < this.#position) return true;
      this.#position = event.position;
      this.#seen.clear();
    }
    if (this.#seen.has(event.event_id)) return true;
    this.#seen.add(event.event_id);
    return false;
  }

  async #lost(code = 1006) {
    if (this.#closed) return;
    const socket = this.#socket;
    const error = this.#error;
    this.#socket = null;
    this.#asked = null;
    this.ready = false;
    socket?.close();
    if (error?.code === "session_expired" && this.#position === null && this.#session) {
      this.#session = null; // it was lost before it began: nothing of it is missing in another
    } else if (FULL.includes(error?.code) && (code === 1013 || !this.#session)) {
      return this.#over(fullText(error), "full");
    } else if (code === 1008 && error && !RESUMABLE.includes(error.code)) {
      return this.#over(endText(error), error.code);
    } else if (code === 1011 && !this.#session) {
      return this.#over(`The server failed: ${error?.message ?? "it did not say how"}.`, "server");
    }
    this.#tries += 1;
    this.#listener.state("reconnecting");
    const refused = code === 1006 || code === 1008 ? await this.#refusal() : null;
    if (this.#closed || this.#socket) return;
    if (refused?.status === 401) return this.#over(keyText(this.#key), "key");
    if (!this.#session && this.#tries >= FIRST_TRIES) {
      return this.#over("The server cannot be reached. Is it running, and is this its address?", "server");
    }
    // A gateway that ends asks to come back at once; one that is still about to end asks again and again.
    const delay = code === 1012 && this.#tries === 1 ? 0 : Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** (this.#tries - 1));
    this.#timer = setTimeout(() => this.open(), delay * (0.75 + Math.random() / 2));
  }

  /** How the server answers over HTTP: a refused handshake does not tell a page why. */
  async #refusal() {
    try {
      const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
      const signal = AbortSignal.timeout(ANSWER_MS);
      return await fetch(new URL("models", this.#url.replace(/^ws/, "http")), { headers, cache: "no-store", signal });
    } catch {
      return null;
    }
  }

  #hurry() {
    if (this.#closed || this.#socket) return;
    clearTimeout(this.#timer);
    this.open();
  }

  #over(text, reason = "") {
    this.#release();
    this.#listener.over(text, reason);
  }

  #release() {
    this.#closed = true;
    this.ready = false;
    clearTimeout(this.#timer);
    clearInterval(this.#watch);
    removeEventListener("offline", this.onOffline);
    removeEventListener("online", this.onOnline);
  }
}

function keyText(key) {
  return key ? "The server does not know this key." : "This server needs an API key: enter it under Key.";
}

function fullText(error) {
  if (error.code === "too_many_sessions") return `Your key has no place for another session. ${error.message}`;
  return `The server is full. Try again in a moment. (${error.message})`;
}

function endText(error) {
  if (error.code === "session_taken") return "This session goes on in another window.";
  if (error.code === "session_expired") return "The session is over at the server: it was away for too long.";
  return `The server ended the session: ${error.message}.`;
}
