// What was said and when, made from events: each line once, however often its events come; and as WebVTT.

const SECONDS_PER_CHARACTER = 1 / 12;
const SHORTEST_S = 2;

/** Lines have: id, who ("assistant" or "user"), time in seconds or null, text, state ("open", "done", "cut", "waiting"). */
export class Transcript {
  #lines = new Map();
  #changed;

  constructor(changed) {
    this.#changed = changed;
  }

  get lines() {
    return [...this.#lines.values()];
  }

  get openResponse() {
    return this.lines.find((line) => line.who === "assistant" && line.state === "open") ?? null;
  }

  clear() {
    this.#lines.clear();
  }

  /** A question on its way, until an event says that it was heard. */
  ask(id, text) {
    this.#set({ id, who: "user", time: null, text, state: "waiting" });
  }

  /** Questions that nobody has confirmed: to be sent again after a lost connection. */
  get unheard() {
    return this.lines.filter((line) => line.who === "user" && line.state === "waiting");
  }

  /** A question that was refused. */
  refuse(id) {
    const line = this.#lines.get(id);
    if (line) this.#set({ ...line, state: "refused" });
  }

  /** Take in an event of the server; others than those of lines are left alone. */
  take(event) {
    switch (event.type) {
      case "conversation.item.added":
        return this.#set({
          id: event.item.id,
          who: "user",
          time: event.video_time,
          text: event.item.content.map((part) => part.text).join(" "),
          state: "done",
        });
      case "response.created": {
        const { id, video_time: time, item_id: answers = null } = event.response;
        return this.#set({ id, who: "assistant", time, text: "", state: "open", answers });
      }
      case "response.output_text.delta":
        return this.#patch(event.response_id, (line) => ({ ...line, text: line.text + event.delta }));
      case "response.output_text.done":
        return this.#patch(event.response_id, (line) => ({ ...line, text: event.text }));
      case "response.done":
        return this.#patch(event.response.id, (line) => ({
          ...line,
          state: event.response.status === "completed" ? "done" : "cut",
          reason: event.response.reason,
        }));
      default:
        return undefined;
    }
  }

  #patch(id, change) {
    const line = this.#lines.get(id);
    if (line) this.#set(change(line));
  }

  #set(line) {
    this.#lines.set(line.id, line);
    this.#changed(line);
  }
}

/** How long a text stays when no other follows. */
export function readingTime(text) {
  return Math.max(SHORTEST_S, text.length * SECONDS_PER_CHARACTER);
}

/** What the assistant said as cues {start, stop, text}, one for each moment. */
export function cuesOf(lines) {
  const said = new Map();
  for (const line of lines) {
    const text = line.who === "assistant" ? line.text.split(/\s+/).filter(Boolean).join(" ") : "";
    if (text) said.set(line.time, said.has(line.time) ? `${said.get(line.time)} ${text}` : text);
  }
  const times = [...said.keys()].sort((one, other) => one - other);
  return times.map((start, index) => {
    const text = said.get(start);
    const stop = Math.min(times[index + 1] ?? Infinity, start + readingTime(text));
    return { start, stop, text };
  });
}

/** WebVTT: the assistant's lines as cues, the questions as notes. */
export function webvtt(lines) {
  const notes = lines
    .filter((line) => line.who === "user" && line.time !== null)
    .map((line) => ({ at: line.time, block: `NOTE ${clock(line.time)} asked: ${plain(line.text)}\n` }));
  const cues = cuesOf(lines).map(({ start, stop, text }) => ({
    at: start,
    block: `${stamp(start)} --> ${stamp(stop)}\n${escaped(text)}\n`,
  }));
  const blocks = [...notes, ...cues].sort((one, other) => one.at - other.at).map(({ block }) => block);
  return ["WEBVTT\n", ...blocks].join("\n");
}

/** Minutes and seconds for people. */
export function clock(seconds) {
  const whole = Math.floor(seconds);
  const rest = String(whole % 60).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${rest}`;
  return `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

function stamp(seconds) {
  const ms = Math.round(seconds * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes, whole] = [Math.floor(ms / 3.6e6), Math.floor(ms / 6e4) % 60, Math.floor(ms / 1000) % 60];
  return `${two(hours)}:${two(minutes)}:${two(whole)}.${String(ms % 1000).padStart(3, "0")}`;
}

function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** One line without an arrow, which a note may not hold. */
function plain(text) {
  return text.split(/\s+/).join(" ").replaceAll("-->", "→");
}
