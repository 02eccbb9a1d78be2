// The P(silent) of every frame as a curve over video time, and the threshold as a line that can be dragged.

const SHOWN_S = 60;
const LEAST_SHOWN_S = 20;
const KEPT = 20000;
const STEPS = { ArrowUp: 0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowLeft: -0.01, PageUp: 0.1, PageDown: -0.1 };
const PAD = { top: 10, bottom: 20, left: 30, right: 10 };

export class Curve {
  #points = []; // {time, p, threshold}, the threshold that was in force
  #spoken = []; // times of unasked responses
  #applied = null;
  #drawing = false;

  constructor(canvas) {
    this.canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  clear() {
    this.#points = [];
    this.#spoken = [];
    this.draw();
  }

  /** The threshold that decides from here on. */
  set applied(threshold) {
    this.#applied = threshold;
    this.draw();
  }

  add(time, p) {
    this.#points.push({ time, p, threshold: this.#applied });
    if (this.#points.length > KEPT) this.#points.splice(0, KEPT / 10);
    this.draw();
  }

  spoke(time) {
    this.#spoken.push(time);
    this.draw();
  }

  /** Once with the next picture of the screen, however much has changed until then. */
  draw() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
    });
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const last = this.#points.at(-1)?.time ?? 0;
    const until = Math.max(last, LEAST_SHOWN_S);
    const from = Math.max(0, until - SHOWN_S);
    const x = (time) => PAD.left + ((time - from) / (until - from)) * (width - PAD.left - PAD.right);
    const y = (p) => PAD.top + (1 - p) * (height - PAD.top - PAD.bottom);
    this.#axes(context, colour, x, y, from, until, width);
    const points = this.#points.filter(({ time }) => time >= from);
    if (points.length) this.#line(context, colour, points, x, y);
    for (const time of this.#spoken.filter((at) => at >= from)) {
      context.fillStyle = colour("speak");
      context.beginPath();
      context.arc(x(time), y(0) - 5, 3.5, 0, 2 * Math.PI);
      context.fill();
    }
  }

  #axes(context, colour, x, y, from, until, width) {
    context.font = "11px system-ui, sans-serif";
    context.strokeStyle = colour("rule");
    context.fillStyle = colour("muted");
    context.lineWidth = 1;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const p of [0, 0.5, 1]) {
      context.beginPath();
      context.moveTo(PAD.left, Math.round(y(p)) + 0.5);
      context.lineTo(width - PAD.right, Math.round(y(p)) + 0.5);
      context.stroke();
      context.fillText(String(p), PAD.left - 6, y(p));
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    const step = until - from > 30 ? 10 : 5;
    for (let time = Math.ceil(from / step) * step; time <= until; time += step) {
      context.textAlign = time >= until - 1 ? "right" : "center";
      context.fillText(`${time} s`, x(time), y(0) + 6);
    }
  }

  #line(context, colour, points, x, y) {
    context.beginPath();
    for (const { time, p } of points) context.lineTo(x(time), y(p));
    context.strokeStyle = colour("accent");
    context.lineWidth = 2;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(x(points.at(-1).time), y(0));
    context.lineTo(x(points[0].time), y(0));
    context.fillStyle = colour("accent-soft");
    context.fill();
    context.beginPath();
    let begun = false;
    for (const { time, threshold } of points) {
      if (threshold === null) continue;
      if (begun) context.lineTo(x(time), y(Math.min(1, threshold)));
      else context.moveTo(x(time), y(Math.min(1, threshold)));
      begun = true;
    }
    context.strokeStyle = colour("speak");
    context.lineWidth = 1;
    context.setLineDash([2, 3]);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = colour("speak");
    for (const { time, p, threshold } of points) {
      if (threshold === null || p >= threshold) continue;
      context.beginPath();
      context.arc(x(time), y(p), 3, 0, 2 * Math.PI);
      context.fill();
    }
  }
}

/** The line over the plot: dragged by pointer, moved by keys, announced as a slider. `chosen(value)` hears of both. */
export class ThresholdSlider {
  #value = 0.7;
  #inForce = null;
  #plot;
  #line;
  #label;

  constructor(plot, line, label, chosen) {
    this.#plot = plot;
    this.#line = line;
    this.#label = label;
    this.chosen = chosen;
    this.touched = false;
    line.addEventListener("keydown", (event) => this.#key(event));
    line.addEventListener("pointerdown", (event) => {
      line.setPointerCapture(event.pointerId);
      line.focus({ preventScroll: true });
      event.preventDefault();
    });
    line.addEventListener("pointermove", (event) => {
      if (line.hasPointerCapture(event.pointerId)) this.#choose(this.#at(event.clientY));
    });
    this.show(this.#value);
  }

  get value() {
    return this.#value;
  }

  /** The threshold that decides; until it is the one chosen, the line is dashed. */
  set inForce(value) {
    this.#inForce = value;
    this.#mark();
  }

  /** Put the line there without telling anybody. */
  show(value) {
    this.#value = Math.min(1, Math.max(0, Math.round(value * 1000) / 1000));
    const share = 1 - this.#value;
    this.#line.style.top = `calc(${PAD.top}px + (100% - ${PAD.top + PAD.bottom}px) * ${share})`;
    this.#line.setAttribute("aria-valuenow", this.#value);
    this.#line.setAttribute("aria-valuetext", `speaks below ${this.#value.toFixed(2)}`);
    this.#label.textContent = this.#value.toFixed(2);
    this.#mark();
  }

  #mark() {
    const pending = this.#inForce !== null && Math.abs(this.#inForce - this.#value) > 0.001;
    this.#line.classList.toggle("pending", pending);
  }

  #at(clientY) {
    const box = this.#plot.getBoundingClientRect();
    return 1 - (clientY - box.top - PAD.top) / (box.height - PAD.top - PAD.bottom);
  }

  #key(event) {
    const ends = { Home: 0, End: 1 };
    if (event.key in STEPS) this.#choose(this.#value + STEPS[event.key]);
    else if (event.key in ends) this.#choose(ends[event.key]);
    else return;
    event.preventDefault();
  }

  #choose(value) {
    const before = this.#value;
    this.touched = true;
    this.show(Math.round(value * 100) / 100);
    if (this.#value !== before) this.chosen(this.#value);
  }
}
