// The selected thread as text: what it wrote, token by token, and what it saw.

const text = document.getElementById("text"), facts = document.getElementById("of");
const MANY = 3000; // tokens shown at once
let shown = "wrote";

function element(name, content, attributes = {}) {
  const made = document.createElement(name);
  if (content !== undefined) made.textContent = content;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;

function showDetails() {
  const { lane, token } = view;
  facts.replaceChildren();
  for (const name of ["wrote", "saw"]) document.getElementById(`tab-${name}`).setAttribute("aria-selected", String(shown === name));
  if (lane === null) {
    facts.append(element("p", "Click or tap a token, or use the arrow keys."));
    text.replaceChildren(element("span", "What a thread wrote and what it saw stands here.", { class: "note" }));
    return;
  }
  facts.append(element("h2", `Thread ${lane.id}`));
  const list = facts.appendChild(element("dl"));
  const row = (name, value) => list.append(element("dt", name), element("dd", value));
  const begun = { trunk: "the answer itself", fork: `forked from ${lane.parent === null ? "" : lanes[lane.parent].id}`, fresh: "a prompt of its own" };
  row("Began as", `${begun[lane.role]}, at tick ${lane.begin}`);
  row("Ended", `${lane.fate ?? "–"}${lane.ended ? ` (last decode: ${lane.ended})` : ""}, at tick ${lane.end}`);
  row("Wrote", counted(lane.serials.length, "token"));
  const context = contextOf(lane, token), seen = sizeOf(context), common = sizeOf(lane.shared);
  row(token === null ? "Saw at the end" : "Saw by then", `${counted(seen, "token")}${common ? `, ${common.toLocaleString("en")} shared with ${lanes[lane.parent].id}` : ""}`);
  if (token !== null) {
    const p = chance(lane, token), dd = element("dd");
    dd.append(element("code", label(lane.serials[token])), ` id ${data.ids[lane.serials[token]]}`);
    list.append(element("dt", `Token ${token + 1}`), dd);
    const position = lane.positions[token], kind = lane.kinds[token];
    row("Where", `tick ${lane.clocks[token]}${position === null ? "" : `, position ${position}`}`);
    row("Confidence", kind & INSERTED ? "put there by the strategy" : p === null ? "not recorded" : `${percent(p)} (log-probability ${lane.logprobs[token].toFixed(3)})`);
    if (kind & CUT) row("Later", "cut off again");
  }
  if (shown === "wrote") showWritten(lane, token);
  else showSeen(context);
}

function showWritten(lane, token) {
  text.replaceChildren();
  const count = lane.serials.length;
  if (!count) return void text.append(element("span", "Nothing.", { class: "note" }));
  const from = Math.max(0, Math.min((token ?? 0) - MANY / 2, count - MANY)), to = Math.min(count, from + MANY);
  if (from) text.append(element("span", `… ${counted(from, "token")} before …`, { class: "note" }), "\n");
  for (let i = from; i < to; ) {
    let j = i + 1; // tokens that make one character together stand together
    while (j < to && typeof pieceOf(lane.serials[j - 1]) !== "string" && typeof pieceOf(lane.serials[j]) !== "string") j++;
    const kind = lane.kinds[i], span = element("span", textOf(lane.serials.slice(i, j)), { class: "token", "data-token": i });
    if (kind & INSERTED) span.classList.add("inserted");
    if (kind & CUT) span.classList.add("cut");
    if (token !== null && token >= i && token < j) span.classList.add("picked");
    if (view.colour === "confidence" && known && !(kind & INSERTED) && chance(lane, i) !== null) {
      const colour = colourOf(lane, i);
      span.style.backgroundColor = colour;
      span.style.color = light(colour) ? "#111" : "#fff";
    }
    text.append(span);
    i = j;
  }
  if (to < count) text.append("\n", element("span", `… ${counted(count - to, "token")} after …`, { class: "note" }));
  text.querySelector(".picked")?.scrollIntoView({ block: "nearest" });
}

function showSeen(context) {
  text.replaceChildren();
  for (const [lane, prompt, serials] of origins(context)) {
    text.append(element("h3", `${prompt ? (lane.parent === null ? "prompt" : `prompt of ${lane.id}`) : `thread ${lane.id}`} · ${counted(serials.length, "token")}`));
    text.append(element("div", textOf(serials)));
  }
  if (!context.length) text.append(element("span", "Nothing.", { class: "note" }));
  text.scrollTop = text.scrollHeight;
}

text.addEventListener("click", (event) => {
  const token = event.target.closest?.("[data-token]");
  if (token) select(view.lane, Number(token.dataset.token));
});
for (const name of ["wrote", "saw"]) document.getElementById(`tab-${name}`).addEventListener("click", () => showTab(name));

function showTab(name) {
  shown = name;
  showDetails();
}
