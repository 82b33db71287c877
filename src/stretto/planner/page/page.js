// Tips on hover and focus; one stop for Tab per group, arrow keys inside; which plan's memory is shown.
const tip = document.getElementById("tip");

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height < innerHeight ? y + 16 : Math.max(4, y - height - 12)}px`;
}

const hide = () => { tip.hidden = true; };
const tipped = (target) => target.closest?.("[data-tip]");

document.addEventListener("pointermove", (event) => {
  const found = tipped(event.target);
  if (found) return show(found.dataset.tip, event.clientX, event.clientY);
  const plot = event.target.closest?.(".plot[data-cloud]");
  const near = plot && nearest(plot, event);
  if (near) show(near, event.clientX, event.clientY);
  else hide();
});
document.addEventListener("focusin", (event) => {
  const found = tipped(event.target);
  if (!found || !found.matches(":focus-visible")) return;
  const box = found.getBoundingClientRect();
  show(found.dataset.tip, box.left + Math.min(box.width / 2, 200), box.bottom - 8);
});
document.addEventListener("focusout", hide);
document.addEventListener("scroll", hide, true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return hide();
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const group = event.target.closest?.("[data-roving]");
  if (!group || !(step || event.key === "Home" || event.key === "End")) return;
  const all = [...group.querySelectorAll("[tabindex]")];
  const at = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : all.indexOf(event.target) + step;
  const next = all[Math.max(0, Math.min(all.length - 1, at))];
  for (const each of all) each.tabIndex = each === next ? 0 : -1;
  next.focus();
  event.preventDefault();
});

// The points that nothing marks: found by their place, since they are one path.
const clouds = new Map();
function nearest(plot, event) {
  if (!clouds.has(plot)) clouds.set(plot, JSON.parse(document.getElementById(plot.dataset.cloud).textContent));
  const box = plot.getBoundingClientRect();
  let best = 10, found = null;
  for (const [x, y, text] of clouds.get(plot)) {
    const away = Math.hypot(box.left + (x / 1000) * box.width - event.clientX, box.top + (y / 1000) * box.height - event.clientY);
    if (away < best) { best = away; found = text; }
  }
  return found;
}

for (const choice of document.querySelectorAll(".choice")) {
  const buttons = [...choice.querySelectorAll("button")];
  const parts = buttons.map((button) => document.getElementById(button.getAttribute("aria-controls")));
  const choose = (chosen) => buttons.forEach((button, at) => {
    button.setAttribute("aria-pressed", String(at === chosen));
    parts[at].hidden = at !== chosen;
  });
  buttons.forEach((button, at) => button.addEventListener("click", () => choose(at)));
  choose(0);
  choice.hidden = false;
}
