// What is said of the operation under the pointer, of the selected one, or of the critical path.
const NAMES = {
  F: "forward", B: "backward", I: "gradient of inputs", W: "gradient of weights", R: "recompute",
  S: "first vocabulary pass", T: "second vocabulary pass", O: "offload of activations", L: "load of activations",
  UNSHARD: "gather of parameters", RESHARD: "release of parameters", REDUCE_GRAD: "reduction of gradients", OPT: "optimizer step",
};
const MOST_NAMED = 600;

const details = document.getElementById("details");

function paragraph(...parts) {
  const line = document.createElement("p");
  for (const part of parts) {
    if (typeof part === "string") line.append(part);
    else {
      const span = document.createElement(part.strong ? "b" : "span");
      span.textContent = part.strong ?? part.soft;
      if (part.soft) span.className = "soft";
      line.append(span);
    }
  }
  return line;
}

function waited(schedule, row) {
  const cause = schedule.cause[row], rank = rankOf(schedule, row), start = schedule.start[row];
  if (cause === NONE) return start > 0 ? `idle from 0 to ${shown(start)}` : "waited for nothing";
  const there = rankOf(schedule, cause), end = schedule.end[cause];
  const before = previousOnRank(schedule, row), idle = before === NONE ? start : start - schedule.end[before];
  const delay = start - end > 1e-9 * schedule.makespan ? `, ${shown(start - end)} away` : "";
  const whose = there === rank ? "" : ` on rank ${there}`;
  const what = `${token(schedule, cause)}${whose}, which ended at ${shown(end)}${delay}`;
  return idle > 1e-9 * schedule.makespan ? `the rank was idle for ${shown(idle)}, waiting for ${what}` : `started right after ${what}`;
}

function previousOnRank(schedule, row) {
  const rows = schedule.lanes[rankOf(schedule, row)].main;
  const at = rows.indexOf(row);
  return at > 0 ? rows[at - 1] : NONE;
}

function memoryDuring(schedule, row) {
  const rank = rankOf(schedule, row), slack = 1e-9 * schedule.makespan;
  let value = 0;
  for (let i = schedule.memoryOffsets[rank]; i < schedule.memoryOffsets[rank + 1]; i++) {
    if (schedule.memoryAt[i] > schedule.start[row] + slack) break;
    value = schedule.memory[i];
  }
  return `memory ${shown(value)}`;
}

function tellOperation(schedule, row, several) {
  const kind = KINDS[schedule.kind[row]], parts = [];
  if (several) parts.push(`${schedule.name}: `);
  parts.push({ strong: token(schedule, row) }, ` ${NAMES[kind] ?? kind}`);
  if (schedule.stage[row] >= 0) parts.push(` of stage ${schedule.stage[row]}`);
  if (schedule.microbatch[row] >= 0) parts.push(header.per_block.includes(kind) ? `, block ${schedule.microbatch[row]}` : `, micro-batch ${schedule.microbatch[row]}`);
  const times = `rank ${rankOf(schedule, row)}, ${shown(schedule.start[row])} to ${shown(schedule.end[row])} (${shown(schedule.end[row] - schedule.start[row])})`;
  const path = schedule.onPath[row] ? ", on the critical path" : "";
  details.replaceChildren(paragraph(...parts, { soft: ` · ${times}${path} · ${memoryDuring(schedule, row)}` }), paragraph(waited(schedule, row)));
}

function tellPath(schedule, choose) {
  const spent = new Map();
  let waiting = 0, before = 0;
  for (const row of schedule.critical) {
    const kind = KINDS[schedule.kind[row]];
    spent.set(kind, (spent.get(kind) ?? 0) + schedule.end[row] - schedule.start[row]);
    waiting += Math.max(0, schedule.start[row] - before);
    before = schedule.end[row];
  }
  const sums = [...spent].map(([kind, time]) => `${kind} ${shown(time)}`);
  if (waiting > 1e-9 * schedule.makespan) sums.push(`between operations ${shown(waiting)}`);
  const list = document.createElement("div");
  list.className = "ops";
  for (const row of schedule.critical.slice(0, MOST_NAMED)) {
    const button = document.createElement("button");
    button.textContent = token(schedule, row);
    button.onclick = () => choose(row);
    list.append(button);
  }
  const rest = schedule.critical.length - MOST_NAMED;
  if (rest > 0) list.append(`and ${rest} more`);
  return [paragraph({ strong: `${schedule.name}: ` }, `makespan ${shown(schedule.makespan)} = ${sums.join(" + ")}`), list];
}
