// Frames that were sent and are not decided: how many there may be, and which to send again after a lost connection.

/** Wakes whoever waits for something to change. */
export class Signal {
  #waiting = [];

  notify() {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const wake of waiting) wake();
  }

  changed() {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }
}

export class InFlight {
  #frames = [];

  constructor(most) {
    this.most = most;
  }

  get count() {
    return this.#frames.length;
  }

  get full() {
    return this.count >= this.most;
  }

  add(time, bytes) {
    this.#frames.push({ time, bytes });
  }

  /** The frame of that time was decided or given up; those before it were decided or dropped. */
  settle(time) {
    this.#frames = this.#frames.filter((frame) => frame.time > time);
  }

  /** Those the server does not answer for, oldest first. */
  beyond(time) {
    return this.#frames.filter((frame) => frame.time > time);
  }

  /** Forget those: they will not be sent again. */
  dropBeyond(time) {
    this.#frames = this.#frames.filter((frame) => frame.time <= time);
  }
}
