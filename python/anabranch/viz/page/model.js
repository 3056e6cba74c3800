// A timeline as Python wrote it (anabranch.viz.html), with what a page asks of it.

const data = JSON.parse(document.getElementById("data").textContent);
const lanes = data.lanes;
const INSERTED = 1, CUT = 2; // bits of a token's kind

// Serial numbers of what each thread wrote, in order; the text of each thread is made when it is asked for.
for (const lane of lanes) {
  lane.serials = [];
  for (const [what, , ranges] of lane.steps) {
    if (what === "write") for (const [begin, stop] of ranges) for (let s = begin; s < stop; s++) lane.serials.push(s);
  }
  lane.children = [];
}
for (const lane of lanes) if (lane.parent !== null) lanes[lane.parent].children.push(lane);

const encoder = new TextEncoder(), decoder = new TextDecoder();

/** What tokens read as, by serial numbers; a character of several tokens is put together from their bytes. */
function textOf(serials) {
  let text = "", bytes = [];
  const flush = () => {
    if (bytes.length) text += decoder.decode(Uint8Array.from(bytes));
    bytes = [];
  };
  for (const s of serials) {
    const piece = pieceOf(s);
    if (typeof piece === "string") {
      flush();
      text += piece;
    } else bytes.push(...piece);
  }
  flush();
  return text;
}

function pieceOf(serial) {
  const id = data.ids[serial];
  return data.pieces === null ? ` ${id}` : data.pieces[id] ?? "\ufffd";
}

/** One token for a label: bytes of a part of a character are shown as such. */
function label(serial) {
  const piece = pieceOf(serial);
  const text = typeof piece === "string" ? piece : piece.map((b) => `\\x${b.toString(16).padStart(2, "0")}`).join("");
  return visible(text);
}

/** White space and control characters made visible. */
function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·").replace(/[\u0000-\u001f\u007f-\u009f]/g, "\ufffd");
}

function chance(lane, i) {
  const logprob = lane.logprobs === null ? null : lane.logprobs[i];
  return logprob === null || logprob === undefined ? null : Math.exp(logprob);
}

const sizeOf = (ranges) => ranges.reduce((n, [begin, stop]) => n + stop - begin, 0);

function firstOf(ranges, count) {
  const found = [];
  for (const [begin, stop] of ranges) {
    if (count <= 0) break;
    found.push([begin, Math.min(stop, begin + count)]);
    count -= stop - begin;
  }
  return found;
}

/** What a thread saw when it wrote its token number `token`; null: at its end. As Timeline.context in Python. */
function contextOf(lane, token) {
  let seen = lane.shared.slice(), written = 0;
  for (const [what, , ranges, , , length] of lane.steps) {
    if (what === "write") {
      const size = sizeOf(ranges);
      if (token !== null && written + size > token) return seen.concat(firstOf(ranges, token - written));
      written += size;
    }
    seen = what === "cut" ? firstOf(seen, length) : seen.concat(ranges);
  }
  return seen;
}

/** A context in pieces of one origin: [lane, whether it is a prompt, serial numbers]. */
function origins(ranges) {
  const found = [];
  for (const [begin, stop] of ranges) {
    for (let s = begin; s < stop; s++) {
      const lane = lanes[data.owner[s]], prompt = s >= lane.prompt[0] && s < lane.prompt[1];
      const last = found[found.length - 1];
      if (last && last[0] === lane && last[1] === prompt) last[2].push(s);
      else found.push([lane, prompt, [s]]);
    }
  }
  return found;
}

const byClock = d3.bisector((clock) => clock);

/** The token that a thread wrote at a tick, or the nearest one. */
function tokenAt(lane, clock) {
  if (!lane.clocks.length) return null;
  const i = byClock.right(lane.clocks, clock) - 1;
  if (i < 0) return 0;
  if (i + 1 < lane.clocks.length && lane.clocks[i + 1] - clock < clock - lane.clocks[i] - 1) return i + 1;
  return i;
}
