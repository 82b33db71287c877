// State, and what changes it. Every change of the view raises `version`; everything is then drawn from the state.
const schedules = await readSchedules();
const state = {
  from: 0, to: 1, pointed: null, hover: null, selected: null, range: null,
  critical: false, messages: false, memory: true, beside: false, kind: NONE, version: 0,
};
const whole = Math.max(...schedules.map((schedule) => schedule.makespan));
const panels = schedules.map((schedule) => new Panel(schedule, state));
const element = (id) => document.getElementById(id);
const field = element("panels"), several = panels.length > 1;
const MOST_WITH_MEMORY = 40; // ranks whose memory curves have room on a screen
let planned = false;

function redraw(changed = true) {
  if (changed) state.version++;
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    for (const panel of panels) panel.draw();
    tell();
  });
}

function layout() {
  const rows = state.beside ? 1 : panels.length;
  const taken = document.querySelector("header").offsetHeight + element("help").offsetHeight + 66 + 26 * rows;
  for (const panel of panels) panel.resize(Math.max(120, (window.innerHeight - taken) / rows));
  redraw();
}

function tell() {
  const focus = state.hover ?? state.selected;
  if (focus) return tellOperation(focus.panel.schedule, focus.row, several);
  if (!state.critical) return details.replaceChildren(paragraph({ soft: "Point at an operation to see when it runs and what it waited for; ? shows the keys." }));
  details.replaceChildren(...panels.flatMap((panel) => tellPath(panel.schedule, (row) => select(panel, row, true))));
}

function view(from, to) {
  const least = whole * 1e-5, length = Math.min(whole * 1.02, Math.max(least, to - from));
  const middle = (from + to) / 2;
  state.from = Math.max(-0.01 * whole, Math.min(middle - length / 2, whole * 1.01 - length));
  state.to = state.from + length;
  redraw();
}

const fit = () => view(-0.005 * whole, 1.005 * whole);
const move = (share) => view(state.from + share * (state.to - state.from), state.to + share * (state.to - state.from));

function zoom(factor, around = (state.from + state.to) / 2) {
  view(around - (around - state.from) * factor, around + (state.to - around) * factor);
}

function select(panel, row, follow = false) {
  state.hover = null;
  if (!panel || row === NONE) state.selected = null;
  else {
    const { start, end, microbatch, kind } = panel.schedule;
    const alone = header.per_block.includes(KINDS[kind[row]]);
    state.selected = { panel, row, microbatch: alone ? NONE : microbatch[row] };
    if (follow && (start[row] < state.from || end[row] > state.to)) {
      const half = Math.max((state.to - state.from) / 2, (end[row] - start[row]) * 0.6), middle = (start[row] + end[row]) / 2;
      view(middle - half, middle + half);
    }
  }
  redraw();
}

function step(along, across) {
  const { panel, row } = state.selected, { schedule } = panel, rank = rankOf(schedule, row);
  const rows = schedule.lanes[rank].main;
  if (along) return select(panel, rows[rows.indexOf(row) + along] ?? row, true);
  const other = schedule.lanes[rank + across]?.main;
  if (!other?.length) return;
  select(panel, other[Math.max(0, firstFrom(other, (each) => schedule.start[each], schedule.start[row] + 1e-12) - 1)], true);
}

function find(text) {
  const match = /^(\d+)([A-Z_]+)(\d+)$/.exec(text.trim().toUpperCase());
  for (const panel of panels) {
    const { kind, stage, microbatch } = panel.schedule;
    const wanted = match && [Number(match[1]), KINDS.indexOf(match[2]), Number(match[3])];
    for (let row = 0; wanted && row < kind.length; row++) {
      if (stage[row] === wanted[0] && kind[row] === wanted[1] && microbatch[row] === wanted[2]) {
        select(panel, row);
        const { start, end } = panel.schedule, length = (end[row] - start[row]) * 20;
        if (state.to - state.from > 3 * length) view(start[row] - length, end[row] + length);
        return true;
      }
    }
  }
  return false;
}

function toggle(name) {
  state[name] = !state[name];
  element(name).setAttribute("aria-pressed", state[name]);
  field.classList.toggle("beside", state.beside);
  layout();
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  readColours();
  legend();
  redraw();
}

function legend() {
  const present = new Set(schedules.flatMap((schedule) => [...new Set(schedule.kind)]));
  element("legend").replaceChildren(
    ...[...present].sort((a, b) => a - b).map((kind) => {
      const item = document.createElement("li"), button = document.createElement("button"), patch = document.createElement("i");
      patch.style.background = `rgb(${palette.kinds[kind]})`;
      button.append(patch, KINDS[kind]);
      button.title = NAMES[KINDS[kind]] ?? "";
      button.setAttribute("aria-pressed", state.kind === kind);
      button.onclick = () => {
        state.kind = state.kind === kind ? NONE : kind;
        legend();
        redraw();
      };
      item.append(button);
      return item;
    }),
  );
}

function watch(panel) {
  const { canvas } = panel;
  let grip = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x] = place(event), lines = event.deltaMode === 1 ? 16 : 1;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(((event.deltaX || event.deltaY) * lines) / panel.plot);
    else zoom(Math.exp(Math.max(-100, Math.min(100, event.deltaY * lines)) * (event.ctrlKey ? 0.01 : 0.003)), panel.time(x));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    const [x, y] = place(event);
    grip = { x, y, scroll: window.scrollY, clientY: event.clientY, from: state.from, to: state.to, moved: false, range: event.shiftKey };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    if (grip && Math.abs(event.clientX - canvas.getBoundingClientRect().left - grip.x) + Math.abs(event.clientY - grip.clientY) > 3) grip.moved = true;
    if (grip?.moved && grip.range) {
      state.range = [panel.time(grip.x), panel.time(x)].sort((a, b) => a - b);
      redraw(false);
    } else if (grip?.moved) {
      canvas.classList.add("moving");
      window.scrollTo(0, grip.scroll + grip.clientY - event.clientY);
      const shift = ((grip.x - x) / panel.plot) * (grip.to - grip.from);
      view(grip.from + shift, grip.to + shift);
    } else {
      const row = panel.at(x, y);
      state.pointed = x >= LEFT && x <= LEFT + panel.plot ? panel.time(x) : null;
      state.hover = row === NONE ? null : { panel, row };
      redraw(false);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const [x, y] = place(event);
    if (state.range) view(...state.range);
    else if (grip && !grip.moved) select(panel, panel.at(x, y));
    canvas.classList.remove("moving");
    grip = state.range = null;
    redraw(false);
  });
  canvas.addEventListener("pointerleave", () => {
    state.hover = state.pointed = null;
    redraw(false);
  });
  canvas.addEventListener("dblclick", (event) => {
    const row = panel.at(...place(event)), { start, end } = panel.schedule;
    if (row === NONE) return fit();
    const length = (end[row] - start[row]) * 8;
    view(start[row] - length, end[row] + length);
  });
}

const KEYS = {
  w: () => zoom(0.7), s: () => zoom(1 / 0.7), "+": () => zoom(0.7), "-": () => zoom(1 / 0.7), a: () => move(-0.2), d: () => move(0.2),
  0: fit, f: fit, c: () => toggle("critical"), v: () => toggle("messages"), m: () => toggle("memory"), b: () => several && toggle("beside"),
  t: () => element("theme").click(), "?": () => element("keys").click(), "/": () => element("find").focus(),
  Escape: () => select(null, NONE),
  ArrowLeft: () => (state.selected ? step(-1, 0) : move(-0.2)), ArrowRight: () => (state.selected ? step(1, 0) : move(0.2)),
  ArrowUp: () => state.selected && step(0, -1), ArrowDown: () => state.selected && step(0, 1),
  Enter: () => {
    const { panel, row } = state.selected ?? {};
    if (panel && panel.schedule.cause[row] !== NONE) select(panel, panel.schedule.cause[row], true);
  },
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, summary") || (event.key === "Enter" && event.target.matches("button"));
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  if (event.key.startsWith("Arrow") && !state.selected && !event.target.matches("canvas")) return;
  event.preventDefault();
  KEYS[event.key]();
});
for (const name of ["critical", "messages", "memory", "beside"]) element(name).onclick = () => toggle(name);
element("fit").onclick = fit;
element("theme").onclick = () => theme(!document.documentElement.classList.contains("dark"));
element("keys").onclick = () => {
  element("help").hidden = !element("help").hidden;
  element("keys").setAttribute("aria-expanded", !element("help").hidden);
  layout();
};
element("find").addEventListener("input", (event) => {
  event.target.classList.toggle("unknown", event.target.value !== "" && !find(event.target.value));
});
element("find").addEventListener("keydown", (event) => {
  if (event.key === "Escape" || event.key === "Enter") event.target.blur();
});
element("beside").hidden = !several;

for (const panel of panels) {
  field.append(panel.element);
  watch(panel);
}
const preferred = matchMedia("(prefers-color-scheme: dark)");
preferred.addEventListener("change", () => theme(preferred.matches));
window.addEventListener("resize", layout);
theme(preferred.matches);
if (panels.reduce((ranks, panel) => ranks + panel.schedule.ranks, 0) > MOST_WITH_MEMORY) toggle("memory");
fit();
layout();
