// The schedules, as typed arrays. Times are whole ticks of 10^-digits of the costs' unit.
const header = JSON.parse(document.getElementById("header").textContent);
const KINDS = header.kinds;
const NONE = -1;

async function inflated(text) {
  const packed = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// One column: the differences of its int32 values, as four planes of bytes, lowest first.
function unpacked(bytes, at, length) {
  const values = new Int32Array(length);
  let value = 0;
  for (let i = 0; i < length; i++) {
    value += bytes[at + i] | (bytes[at + length + i] << 8) | (bytes[at + 2 * length + i] << 16) | (bytes[at + 3 * length + i] << 24);
    values[i] = value;
  }
  return values;
}

// The schedules of the page; each has the header's fields and its columns:
// kind stage microbatch start end cause source per operation; memoryAt memory per change of memory.
async function readSchedules() {
  const bytes = await inflated(document.getElementById("columns").textContent);
  let at = 0;
  return header.schedules.map((about) => {
    const schedule = { ...about };
    for (const [name, length] of about.columns) {
      schedule[name] = unpacked(bytes, at, length);
      at += 4 * length;
    }
    const scale = 10 ** -about.digits;
    const time = (ticks) => Float64Array.from(ticks, (tick) => (about.digits > 0 ? tick / 10 ** about.digits : tick * scale));
    schedule.start = time(schedule.start);
    schedule.end = time(schedule.end);
    schedule.memoryAt = time(schedule.memoryAt);
    schedule.memory = Float64Array.from(schedule.memory, (value) => value / header.memory_scale);
    schedule.onPath = new Uint8Array(schedule.kind.length);
    for (const row of schedule.critical) schedule.onPath[row] = 1;
    arrange(schedule);
    return schedule;
  });
}

// Which rows of a rank share its lane (main) and which run beside them on another stream; where each
// stage's colour lies between a kind's full tone and its palest; which operations overlap on their rank.
function arrange(schedule) {
  const beside = new Set(header.beside.map((name) => KINDS.indexOf(name)));
  schedule.lanes = [];
  schedule.half = new Uint8Array(schedule.kind.length);
  for (let rank = 0; rank < schedule.ranks; rank++) {
    const main = [], side = [];
    for (let row = schedule.offsets[rank]; row < schedule.offsets[rank + 1]; row++) {
      (beside.has(schedule.kind[row]) ? side : main).push(row);
    }
    for (const rows of [main, side]) rows.sort((a, b) => schedule.start[a] - schedule.start[b] || a - b);
    for (let i = 1; i < main.length; i++) {
      if (schedule.start[main[i]] < schedule.end[main[i - 1]] - 1e-9 * schedule.makespan) {
        schedule.half[main[i - 1]] = schedule.half[main[i - 1]] || 1;
        schedule.half[main[i]] = schedule.half[main[i - 1]] === 1 ? 2 : 1;
      }
    }
    schedule.lanes.push({ main: Int32Array.from(main), side: Int32Array.from(side) });
  }
  schedule.tone = schedule.placement.map((replica, voice) => {
    const held = {};
    return replica.map((rank) => (held[rank] = (held[rank] ?? NONE) + 1) + voice * schedule.chunks);
  });
  schedule.tones = schedule.chunks * schedule.placement.length;
}

function rankOf(schedule, row) {
  let low = 0, high = schedule.ranks;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (schedule.offsets[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

function token(schedule, row) {
  const name = KINDS[schedule.kind[row]];
  return name === "OPT" ? name : `${schedule.stage[row]}${name}${schedule.microbatch[row]}`;
}

// First place in rows (ascending) whose value is at least what is looked for.
function firstFrom(rows, value, wanted) {
  let low = 0, high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (value(rows[middle]) < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

const shown = (number) => (Math.abs(number) < 1e-9 ? "0" : String(Number(number.toPrecision(7))));
