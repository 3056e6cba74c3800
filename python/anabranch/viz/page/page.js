// Pointer, keys, filters, theme.

const by = (id) => document.getElementById(id);
const hint = by("tip"), find = by("find"), fate = by("fate"), below = by("below");

// -- selecting ----------------------------------------------------------------------------------------------------------

function select(lane, token) {
  view.lane = lane;
  view.token = lane === null || !lane.serials.length ? null : token;
  if (lane !== null) {
    reveal();
    const p = view.token === null ? null : chance(lane, view.token);
    const what = view.token === null ? "no tokens" : `token ${view.token + 1} of ${lane.serials.length}: ${textOf([lane.serials[view.token]]).trim() || "white space"}`;
    by("said").textContent = `thread ${lane.id}, ${what}${p === null ? "" : `, ${percent(p)}`}`;
  }
  showDetails();
  redraw();
}

/** Scroll so that the selection is in sight. */
function reveal() {
  if (!view.rows.includes(view.lane)) return;
  const y = yOf(view.lane.row), half = view.row / 2;
  if (y - half < TOP) stage.scrollTop -= TOP - y + half;
  if (y + half > view.height) stage.scrollTop += y + half - view.height;
  const x = xOf(view.token === null ? view.lane.begin : view.lane.clocks[view.token]), margin = Math.min(60, view.width / 5);
  if (x < view.gutter + 4 || x > view.width - margin) stage.scrollLeft += x - view.gutter - (view.width - view.gutter) / 2;
}

function under(event) {
  const [x, y] = d3.pointer(event, canvas), row = rowAt(y);
  if (y < TOP || row < 0 || row >= view.rows.length) return null;
  const lane = view.rows[row], token = tokenAt(lane, clockAt(x));
  const near = token !== null && x > view.gutter && Math.abs(xOf(lane.clocks[token]) + view.scale / 2 - x) <= view.scale / 2 + 4;
  return { lane, token, near };
}

canvas.addEventListener("click", (event) => {
  const at = under(event);
  if (at) select(at.lane, at.token);
  stage.focus({ preventScroll: true });
});

canvas.addEventListener("pointermove", (event) => {
  const at = event.pointerType === "touch" ? null : under(event);
  if (!at || !at.near) return void (hint.hidden = true);
  const { lane, token } = at, p = chance(lane, token), around = lane.serials;
  const code = element("code");
  code.append(visible(textOf(around.slice(Math.max(0, token - 12), token))), element("b", label(around[token])), visible(textOf(around.slice(token + 1, token + 13))));
  const kind = lane.kinds[token] & INSERTED ? "inserted" : p === null ? "sampled" : percent(p);
  const position = lane.positions[token] === null ? "" : `, position ${lane.positions[token]}`;
  hint.replaceChildren(code, element("div", `thread ${lane.id}, token ${token + 1}, id ${data.ids[around[token]]}, tick ${lane.clocks[token]}${position}: ${kind}`, { class: "facts" }));
  hint.hidden = false;
  const box = hint.getBoundingClientRect();
  hint.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
  hint.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
});
canvas.addEventListener("pointerleave", () => (hint.hidden = true));

// -- zoom ---------------------------------------------------------------------------------------------------------------

// One finger and the plain wheel scroll, as everywhere; Ctrl with the wheel and two fingers zoom.
let before = 1;
const gestures = d3.zoom()
  .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : event.touches && event.touches.length > 1))
  .on("start", () => (before = 1))
  .on("zoom", (event) => {
    const source = event.sourceEvent;
    if (!source) return;
    const at = source.touches ? d3.pointer(source.touches[0], canvas)[0] : d3.pointer(source, canvas)[0];
    zoomTo((view.scale * event.transform.k) / before, at);
    before = event.transform.k;
  })
  .on("end", () => (canvas.__zoom = d3.zoomIdentity));
d3.select(canvas).call(gestures).on("dblclick.zoom", null);

const middle = () => (view.token !== null && view.lane !== null ? xOf(view.lane.clocks[view.token]) : (view.gutter + view.width) / 2);
const zoomBy = (factor) => zoomTo(view.scale * factor, middle());
const fit = () => zoomTo(0, view.gutter);

// -- filters ------------------------------------------------------------------------------------------------------------

for (const name of [...new Set(lanes.map((lane) => lane.fate))].filter(Boolean)) fate.append(element("option", name, { value: name }));

/** Threads that match, and those that they come from. */
function filter() {
  const wanted = find.value.trim().toLowerCase(), kept = new Set();
  let matches = 0;
  for (const lane of lanes) {
    if (fate.value && lane.fate !== fate.value) continue;
    if (wanted && lane.id !== wanted) {
      lane.lower ??= textOf(lane.serials).toLowerCase();
      if (!lane.lower.includes(wanted)) continue;
    }
    matches += 1;
    for (let each = lane; each && !kept.has(each); each = each.parent === null ? null : lanes[each.parent]) kept.add(each);
  }
  view.rows = lanes.filter((lane) => kept.has(lane));
  const all = counted(lanes.length, "thread");
  by("count").textContent = matches === lanes.length ? `${all}, ${counted(lanes.reduce((n, lane) => n + lane.serials.length, 0), "token")}` : `${matches} of ${all}`;
  resize();
  redraw();
}
find.addEventListener("input", filter);
fate.addEventListener("change", filter);
find.addEventListener("keydown", (event) => {
  if (event.key === "Escape" || event.key === "Enter") stage.focus();
});

below.addEventListener("input", () => {
  view.below = below.value / 100;
  by("shown-below").textContent = view.below < 1 ? `${below.value} %` : "all";
  redraw();
});

const colour = by("colour");
function setColour(name) {
  view.colour = colour.value = name;
  legend();
  showDetails();
  redraw();
}
colour.addEventListener("change", () => setColour(colour.value));
if (!known) {
  colour.querySelector('[value="confidence"]').remove();
  view.colour = colour.value = "origin";
  by("unsure").hidden = true;
}

function legend() {
  const place = by("legend");
  place.replaceChildren();
  const entry = (fill, words) => {
    const part = place.appendChild(element("span")), box = part.appendChild(element("i"));
    box.style.background = fill;
    part.append(words);
  };
  if (view.colour === "confidence") {
    const part = place.appendChild(element("span")), strip = element("canvas");
    strip.width = 101;
    strip.height = 1;
    ramp.forEach((fill, i) => {
      const brush = strip.getContext("2d");
      brush.fillStyle = fill;
      brush.fillRect(i, 0, 1, 1);
    });
    part.append("confidence 0", strip, "100 %");
  }
  if (view.colour === "origin") entry(colours.held, "sampled");
  if (view.colour !== "thread") entry(colours.inserted, "inserted by the strategy");
  entry(colours.fork, "fork (dashed: fresh prompt)");
  entry(colours.join, "join (dashed: computed again)");
  entry(colours.seen, "tokens seen by all threads");
  entry(colours.held, "tokens held once for all");
  place.append(element("span", "× killed or discarded; faint: cut off again; numbers: tokens of a prompt, and of a thread"));
}

// -- buttons and keys ---------------------------------------------------------------------------------------------------

function theme() {
  const now = document.documentElement.dataset.theme, next = { undefined: isDark() ? "light" : "dark", light: "dark", dark: "light" }[now];
  document.documentElement.dataset.theme = next;
  repaint();
}

function repaint() {
  readColours();
  legend();
  showDetails();
  redraw();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

function rows() {
  view.row = { 26: 18, 18: 10, 10: 26 }[view.row];
  resize();
  redraw();
}

const actions = { in: () => zoomBy(1.5), out: () => zoomBy(1 / 1.5), fit, rows, theme, keys: () => by("help").showModal() };
for (const [id, act] of Object.entries(actions)) by(id).addEventListener("click", act);

function step(rowsDown, tokens) {
  if (view.lane === null || !view.rows.includes(view.lane)) return select(view.rows[0] ?? null, 0);
  const { lane, token } = view;
  if (rowsDown) {
    const next = view.rows[Math.max(0, Math.min(view.rows.length - 1, lane.row + rowsDown))];
    return select(next, tokenAt(next, token === null ? lane.begin : lane.clocks[token]));
  }
  select(lane, Math.max(0, Math.min(lane.serials.length - 1, (token ?? 0) + tokens)));
}

function jump(kind) {
  const lane = view.lane;
  if (lane === null) return;
  if (kind === "parent" && lane.parent !== null) select(lanes[lane.parent], tokenAt(lanes[lane.parent], lane.begin - 1));
  if (kind === "joined") {
    const found = data.arrows.find(([what, source]) => what === "join" && source === lane.number);
    if (found) select(lanes[found[3]], tokenAt(lanes[found[3]], found[4]));
  }
  if (kind === "child") {
    const clock = view.token === null ? lane.begin : lane.clocks[view.token];
    const next = lane.children.find((child) => child.begin >= clock) ?? lane.children[0];
    if (next) select(next, 0);
  }
}

const keys = {
  ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1), ArrowUp: () => step(-1, 0), ArrowDown: () => step(1, 0),
  PageUp: () => step(-10, 0), PageDown: () => step(10, 0), Home: () => step(0, -Infinity), End: () => step(0, Infinity),
  "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), "−": () => zoomBy(1 / 1.5), 0: fit,
  p: () => jump("parent"), n: () => jump("child"), j: () => jump("joined"), Enter: () => showTab(shown === "wrote" ? "saw" : "wrote"),
  c: () => setColour(colour.options[(colour.selectedIndex + 1) % colour.options.length].value),
  d: rows, t: theme, "?": () => by("help").showModal(),
  Escape: () => {
    if (find.value || fate.value) {
      find.value = fate.value = "";
      filter();
    } else select(null, null);
  },
};

stage.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    find.focus();
  }
});

stage.addEventListener("scroll", redraw, { passive: true });
new ResizeObserver(() => {
  resize();
  redraw();
}).observe(stage);

readColours();
resize();
view.scale = Math.min(MOST, Math.max(least(), data.length < 60 ? 18 : least()));
filter();
legend();
showDetails();
draw();
document.documentElement.dataset.ready = Math.round(performance.now());
