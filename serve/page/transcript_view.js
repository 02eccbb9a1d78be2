// The transcript on the page: a list that follows its end, lines over the video, and a voice that reads them.

import { clock, cuesOf, readingTime } from "./transcript.js";

const NEAR_END_PX = 60;

/** The list of lines by their times. `seek(time)` is called for a click where `seekable`. */
export class TranscriptList {
  #list;
  #rows = new Map();

  constructor(list, seek) {
    this.#list = list;
    this.seek = seek;
    this.seekable = false;
  }

  clear() {
    this.#list.replaceChildren();
    this.#rows.clear();
  }

  show(line) {
    const list = this.#list;
    const follow = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END_PX;
    const row = this.#rows.get(line.id) ?? this.#make(line);
    row.item.dataset.state = line.state;
    row.item.hidden = line.who === "assistant" && line.state !== "open" && !line.text.trim();
    row.text.textContent = line.text.trim() || "…";
    row.mark.textContent = markOf(line);
    if (line.time !== null) {
      row.time.textContent = clock(line.time);
      row.time.disabled = !this.seekable;
      row.time.title = this.seekable ? "Go there" : "";
      row.time.onclick = () => this.seek(line.time);
      this.#place(row, line.time);
    }
    if (follow) list.scrollTop = list.scrollHeight;
  }

  /** Questions take their place once it is known when they were heard. */
  #place(row, time) {
    if (row.at === time) return;
    row.at = time;
    const later = [...this.#rows.values()].find((other) => other !== row && (other.at === null || other.at > time));
    this.#list.insertBefore(row.item, later?.item ?? null);
    this.#sort();
  }

  #sort() {
    const order = new Map([...this.#list.children].map((item, index) => [item, index]));
    this.#rows = new Map([...this.#rows].sort(([, one], [, other]) => order.get(one.item) - order.get(other.item)));
  }

  #make(line) {
    const part = (tag, name, parent) => {
      const element = document.createElement(tag);
      element.className = name;
      parent.append(element);
      return element;
    };
    const item = part("li", line.who, this.#list);
    const head = part("div", "head", item);
    const who = part("span", "who", head);
    who.textContent = line.who === "assistant" ? "Model" : "You";
    const time = part("button", "time", head);
    time.type = "button";
    time.disabled = true;
    const mark = part("span", "mark", head);
    const row = { item, time, mark, text: part("p", "text", item), at: null };
    this.#rows.set(line.id, row);
    return row;
  }
}

function markOf(line) {
  if (line.state === "waiting") return "waiting";
  if (line.state === "refused") return "refused";
  if (line.state !== "cut") return "";
  return line.reason === "interrupted" ? "interrupted" : "cut at its longest";
}

/** The line over the video: of a file what belongs to its moment, of live video what was said last. */
export class Subtitle {
  #element;
  #timer = 0;

  constructor(element) {
    this.#element = element;
  }

  /** What belongs to that moment of a file. */
  at(time, lines) {
    const cue = cuesOf(lines).findLast(({ start, stop }) => start <= time && time < stop);
    this.#show(cue?.text ?? "");
  }

  /** What is being said; it stays as long as it takes to read. */
  live(line) {
    clearTimeout(this.#timer);
    if (!line.text.trim()) return;
    this.#show(line.text.trim());
    if (line.state !== "open") this.#timer = setTimeout(() => this.clear(), 1000 * readingTime(line.text));
  }

  clear() {
    clearTimeout(this.#timer);
    this.#show("");
  }

  #show(text) {
    this.#element.hidden = !text;
    if (this.#element.textContent !== text) this.#element.textContent = text;
  }
}

/** The browser's speech synthesis, if there is one and it is asked for. */
export class Voice {
  static get possible() {
    return "speechSynthesis" in window;
  }

  constructor() {
    this.on = false;
  }

  say(text) {
    if (this.on && text.trim()) speechSynthesis.speak(new SpeechSynthesisUtterance(text));
  }

  hush() {
    if (Voice.possible) speechSynthesis.cancel();
  }
}
