// The timeline on a canvas that stays in view while its parent scrolls: only what is visible is drawn.

const stage = document.getElementById("stage"), space = document.getElementById("space"), canvas = document.getElementById("canvas");
const pen = canvas.getContext("2d");
const AXIS = 24, STRIP = 46, TOP = AXIS + STRIP, STUB = 34, TAIL = 60; // pixels; STUB: room for prompts
const MOST = 90; // pixels a token at the closest
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace";

const view = {
  rows: lanes, // what the filters leave
  scale: 1, // pixels a tick
  row: lanes.length > 24 ? 18 : 26,
  colour: "confidence",
  below: 1, // tokens at least this likely are dimmed
  lane: null, token: null, // selected
  width: 0, height: 0, gutter: 120,
};

let colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "ink", "soft", "line", "band", "accent", "inserted", "fork", "join", "bad", "seen", "held", "pick"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// Doubt stands out: from red over yellow to a calm blue, which the colour-blind can tell apart as well.
const ramp = Array.from({ length: 101 }, (_, i) => d3.interpolateRdYlBu(0.1 + (0.78 * i) / 100));
const known = lanes.some((lane) => lane.logprobs !== null && lane.logprobs.some((l) => l !== null));

function colourOf(lane, i) {
  const kind = lane.kinds[i];
  if (view.colour === "thread") return `hsl(${(lane.number * 137.5) % 360} 55% ${isDark() ? 62 : 46}%)`;
  if (kind & INSERTED) return colours.inserted;
  const p = chance(lane, i);
  return view.colour === "confidence" && p !== null ? ramp[Math.round(100 * p)] : colours.held;
}

function strength(lane, i) {
  const p = chance(lane, i);
  if (view.below < 1 && (p === null || p >= view.below)) return 0.15;
  return lane.kinds[i] & CUT ? 0.35 : 1;
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const least = () => Math.max(0.02, Math.min(MOST, (view.width - view.gutter - STUB - TAIL) / Math.max(1, data.length)));
const xOf = (clock) => view.gutter + STUB + clock * view.scale - stage.scrollLeft;
const clockAt = (x) => (x - view.gutter - STUB + stage.scrollLeft) / view.scale;
const yOf = (row) => TOP + (row + 0.5) * view.row - stage.scrollTop;
const rowAt = (y) => Math.floor((y - TOP + stage.scrollTop) / view.row);

/** Sizes after the window, the scale or the rows have changed. */
function resize() {
  const ratio = window.devicePixelRatio || 1;
  view.width = stage.clientWidth;
  view.height = stage.clientHeight;
  view.gutter = Math.min(150, Math.max(96, view.width * 0.2));
  view.scale = Math.max(view.scale, least());
  for (const [side, size] of [["width", view.width], ["height", view.height]]) {
    if (canvas[side] !== Math.round(size * ratio)) canvas[side] = Math.round(size * ratio);
    canvas.style[side] = `${size}px`;
  }
  space.style.width = `${Math.max(view.width, view.gutter + STUB + data.length * view.scale + TAIL)}px`;
  space.style.height = `${Math.max(view.height, TOP + view.rows.length * view.row + 12)}px`;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  view.rows.forEach((lane, row) => (lane.row = row));
}

/** Zoom about a place on the screen. */
function zoomTo(scale, x) {
  const clock = clockAt(x);
  view.scale = Math.min(MOST, Math.max(least(), scale));
  resize();
  stage.scrollLeft = view.gutter + STUB + clock * view.scale - x;
  redraw();
}

let waiting = false;
function redraw() {
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

function draw() {
  waiting = false;
  pen.clearRect(0, 0, view.width, view.height);
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, view.width, view.height);
  const from = Math.max(0, rowAt(TOP)), to = Math.min(view.rows.length, rowAt(view.height) + 1);
  pen.save();
  pen.beginPath();
  pen.rect(view.gutter, TOP, view.width - view.gutter, view.height - TOP);
  pen.clip();
  for (let row = from; row < to; row++) drawBand(view.rows[row]);
  for (let row = from; row < to; row++) drawLane(view.rows[row]);
  drawArrows(from, to);
  drawSelection();
  pen.restore();
  drawGutter(from, to);
  drawHead();
}

function drawBand(lane) {
  const y = yOf(lane.row) - view.row / 2;
  if (lane === view.lane || lane.row % 2) {
    pen.globalAlpha = lane === view.lane ? 0.16 : 1;
    pen.fillStyle = lane === view.lane ? colours.pick : colours.band;
    pen.fillRect(view.gutter, y, view.width, view.row);
    pen.globalAlpha = 1;
  }
}

function drawLane(lane) {
  const y = yOf(lane.row), half = Math.max(3, view.row / 2 - 4);
  pen.strokeStyle = colours.line;
  line(xOf(lane.begin), y, xOf(lane.gone), y);
  const begin = byClock.left(lane.clocks, clockAt(view.gutter) - 1), stop = byClock.right(lane.clocks, clockAt(view.width));
  if (view.scale >= 3) for (let i = begin; i < stop; i++) drawToken(lane, i, y, half);
  else drawDense(lane, begin, stop, y, half);
  pen.globalAlpha = 1;
  pen.font = `11px ${FONT}`;
  pen.textBaseline = "middle";
  if (lane.prompt[1] > lane.prompt[0]) {
    const x = xOf(lane.begin), size = lane.prompt[1] - lane.prompt[0];
    pen.fillStyle = colours.seen;
    pen.fillRect(x - STUB + 2, y - half, STUB - 4, 2 * half);
    if (view.row > 12) {
      pen.fillStyle = colours.ink;
      pen.textAlign = "center";
      pen.fillText(short(size), x - STUB / 2, y);
    }
  }
  const end = xOf(lane.gone);
  if (lane.fate === "killed" || lane.fate === "discarded") {
    pen.strokeStyle = colours.bad;
    pen.lineWidth = 1.5;
    line(end + 3, y - 4, end + 11, y + 4);
    line(end + 3, y + 4, end + 11, y - 4);
    pen.lineWidth = 1;
  }
}

function drawToken(lane, i, y, half) {
  const x = xOf(lane.clocks[i]), width = view.scale - (view.scale > 5 ? 1 : 0);
  const colour = colourOf(lane, i);
  pen.globalAlpha = strength(lane, i);
  pen.fillStyle = colour;
  pen.fillRect(x, y - half, width, 2 * half);
  if (view.scale < 13 || view.row < 14) return;
  const most = Math.floor((width - 3) / 6.4), text = label(lane.serials[i]);
  if (most < 1) return;
  pen.font = `10.5px ${MONO}`;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillStyle = light(colour) ? "#111" : "#fff";
  pen.fillText([...text].length > most ? `${[...text].slice(0, Math.max(1, most - 1)).join("")}${most > 1 ? "…" : ""}` : text, x + 2, y + 0.5);
}

/** Several tokens a pixel: the colour of the least likely of them, so that no doubt is lost. */
function drawDense(lane, begin, stop, y, half) {
  for (let i = begin; i < stop; ) {
    const x = Math.floor(xOf(lane.clocks[i]));
    let worst = i, j = i + 1;
    for (; j < stop && Math.floor(xOf(lane.clocks[j])) === x; j++) {
      const [p, q] = [chance(lane, j), chance(lane, worst)];
      if (p !== null && (q === null || p < q)) worst = j;
    }
    pen.globalAlpha = strength(lane, worst);
    pen.fillStyle = colourOf(lane, worst);
    pen.fillRect(x, y - half, Math.max(1, view.scale), 2 * half);
    i = j;
  }
}

const brightness = new Map();
function light(colour) {
  if (!brightness.has(colour)) {
    const probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = colour;
    probe.fillRect(0, 0, 1, 1);
    const [r, g, b] = probe.getImageData(0, 0, 1, 1).data;
    brightness.set(colour, 0.299 * r + 0.587 * g + 0.114 * b > 135);
  }
  return brightness.get(colour);
}

function line(x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(x1, Math.round(y1) + 0.5);
  pen.lineTo(x2, Math.round(y2) + 0.5);
  pen.stroke();
}

// Arrows that leave one thread, or reach it, at one tick share their vertical line.
const bundles = new Map();
for (const [kind, source, leaves, target, arrives, mode] of data.arrows) {
  const join = kind === "join", hub = lanes[join ? target : source], clock = join ? arrives : leaves;
  const dashed = kind === "spawn" || (join && mode !== "concat"), key = [kind, hub.number, clock, dashed].join();
  if (!bundles.has(key)) bundles.set(key, { join, hub, clock, dashed, ends: [] });
  bundles.get(key).ends.push([lanes[join ? source : target], join ? leaves : arrives]);
}

/** Elbows: along a thread, then straight to the other one. What a join computes again is dashed. */
function drawArrows(from, to) {
  const rows = new Set(view.rows);
  for (const { join, hub, clock, dashed, ends } of bundles.values()) {
    const there = ends.filter(([lane]) => rows.has(lane));
    if (!rows.has(hub) || !there.length) continue;
    const numbers = [hub.row, ...there.map(([lane]) => lane.row)], clocks = [clock, ...there.map(([, tick]) => tick)];
    if (Math.max(...numbers) < from || Math.min(...numbers) >= to) continue;
    if (xOf(Math.max(...clocks)) < view.gutter - 20 || xOf(Math.min(...clocks)) > view.width + 20) continue;
    const x = xOf(clock) + (join ? 1 : 0), y = yOf(hub.row), half = view.row / 2 - 4;
    pen.strokeStyle = pen.fillStyle = join ? colours.join : colours.fork;
    const stroke = (chosen, draw) => {
      pen.globalAlpha = chosen || view.lane === null || hub === view.lane ? 0.95 : 0.45;
      pen.lineWidth = chosen ? 2.2 : 1.2;
      pen.setLineDash(dashed ? [4, 3] : []);
      pen.beginPath();
      draw();
      pen.stroke();
      pen.setLineDash([]);
    };
    stroke(false, () => {
      pen.moveTo(x, yOf(Math.min(...numbers)));
      pen.lineTo(x, yOf(Math.max(...numbers)));
    });
    for (const [lane, tick] of there) {
      if (lane.row < from - 1 || lane.row > to) continue;
      const chosen = lane === view.lane;
      stroke(chosen, () => {
        pen.moveTo(xOf(tick), yOf(lane.row));
        pen.lineTo(x, yOf(lane.row));
        if (chosen) pen.lineTo(x, y);
      });
      if (!join) tip(x, yOf(lane.row), xOf(tick) - x < 8 ? Math.sign(lane.row - hub.row) : 0, half, xOf(tick));
    }
    if (join) tip(x, y, there.some(([lane]) => lane.row > hub.row) ? -1 : 1, half);
  }
  pen.globalAlpha = pen.lineWidth = 1;
}

/** An arrow's head: down (1), up (−1), or to the right (0), where it ends at `right`. */
function tip(x, y, way, half, right) {
  pen.globalAlpha = Math.max(pen.globalAlpha, 0.7);
  pen.beginPath();
  if (way) {
    pen.moveTo(x, y - way * half);
    pen.lineTo(x - 4, y - way * (half + 6));
    pen.lineTo(x + 4, y - way * (half + 6));
  } else {
    pen.moveTo(right, y);
    pen.lineTo(right - 6, y - 4);
    pen.lineTo(right - 6, y + 4);
  }
  pen.fill();
}

function drawSelection() {
  if (view.lane === null || view.token === null || !view.rows.includes(view.lane)) return;
  const x = xOf(view.lane.clocks[view.token]), y = yOf(view.lane.row);
  pen.strokeStyle = colours.pick;
  pen.lineWidth = 2;
  pen.strokeRect(x - 1, y - view.row / 2 + 2, Math.max(3, view.scale) + 1, view.row - 4);
  pen.lineWidth = 1;
  pen.setLineDash([2, 3]);
  line(x + view.scale / 2, TOP, x + view.scale / 2, view.height);
  pen.setLineDash([]);
}

function drawGutter(from, to) {
  pen.fillStyle = colours.paper;
  pen.fillRect(0, TOP, view.gutter, view.height);
  pen.strokeStyle = colours.line;
  pen.beginPath();
  pen.moveTo(view.gutter - 0.5, 0);
  pen.lineTo(view.gutter - 0.5, view.height);
  pen.stroke();
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  for (let row = from; row < to; row++) {
    const lane = view.rows[row], y = yOf(row);
    if (lane === view.lane) {
      pen.fillStyle = colours.pick;
      pen.fillRect(0, y - view.row / 2, 3, view.row);
    }
    pen.font = `${lane === view.lane ? 600 : 400} ${Math.min(12, view.row - 3)}px ${FONT}`;
    pen.fillStyle = colours.ink;
    const room = view.gutter - 48, indent = Math.min(8 * lane.depth, view.gutter / 8);
    pen.fillText(shorten(lane.id, room - indent), 8 + indent, y);
    pen.font = `${Math.min(11, view.row - 3)}px ${FONT}`;
    pen.fillStyle = colours.soft;
    pen.textAlign = "right";
    pen.fillText(lane.serials.length, view.gutter - 8, y);
    pen.textAlign = "left";
  }
}

function shorten(text, room) {
  if (pen.measureText(text).width <= room) return text;
  while (text.length > 1 && pen.measureText(`…${text}`).width > room) text = text.slice(1);
  return `…${text}`; // the end of an id tells threads apart
}

const short = (n) => (n < 10000 ? String(n) : `${Math.round(n / 1000).toLocaleString("en")}k`);

/** The axis in ticks, and above the lanes what the cache shares: tokens seen by all threads, tokens held. */
function drawHead() {
  pen.fillStyle = colours.paper;
  pen.fillRect(0, 0, view.width, TOP);
  pen.font = `11px ${FONT}`;
  pen.textBaseline = "middle";
  pen.fillStyle = colours.soft;
  pen.textAlign = "right";
  pen.fillText("tick", view.gutter - 8, AXIS / 2);
  const most = d3.max(data.usage, (u) => u[2]) || 1, held = d3.max(data.usage, (u) => u[3]) || 1;
  pen.fillStyle = colours.ink;
  pen.fillText(`${short(most)} seen`, view.gutter - 8, AXIS + 13);
  pen.fillText(`${short(held)} held`, view.gutter - 8, AXIS + 30);
  pen.save();
  pen.beginPath();
  pen.rect(view.gutter, 0, view.width, TOP);
  pen.clip();
  pen.textAlign = "center";
  const span = [clockAt(view.gutter), clockAt(view.width)];
  for (const tick of d3.scaleLinear().domain(span).ticks(Math.max(2, view.width / 110))) {
    if (tick < 0 || tick > data.length || tick % 1) continue;
    pen.fillStyle = colours.soft;
    pen.fillText(tick, xOf(tick), AXIS / 2);
    pen.fillStyle = colours.line;
    pen.fillRect(xOf(tick), AXIS - 4, 1, 4);
  }
  const y = d3.scaleLinear([0, most], [TOP - 3, AXIS + 3]);
  for (const [column, colour] of [[2, colours.seen], [3, colours.held]]) {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.moveTo(xOf(0), y(0));
    for (const u of data.usage) pen.lineTo(xOf(u[0]), y(u[column]));
    pen.lineTo(xOf(data.length), y(0));
    pen.fill();
  }
  pen.restore();
  pen.fillStyle = colours.line;
  pen.fillRect(0, TOP - 1, view.width, 1);
}
